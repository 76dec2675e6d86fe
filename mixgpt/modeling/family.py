"""Where models have their decoder layers. Their own `forward` runs what comes before and after."""

import torch

from mixgpt.common.errors import InputError


def layers_path(model):
    """Return the dotted path of a model's decoder layers: of its lists of modules, that with the most weights.

    Raises InputError if it has none.
    """
    paths = list(_lists(model))
    if not paths:
        raise InputError(f"model {model.config.name_or_path}: a {type(model).__name__} has no list of layers")
    return paths[0] if len(paths) == 1 else max(paths, key=lambda path: sum(
        weight.numel() for weight in model.get_submodule(path).parameters()))


def _lists(module, prefix=""):
    """Yield the dotted paths of the lists of modules that are in no other list."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield prefix + name
        else:
            yield from _lists(child, f"{prefix}{name}.")


def layers_of(model):
    """Return the decoder layers of a model."""
    return model.get_submodule(layers_path(model))


def path_of(model, index, name):
    """Return the full name of the linear `name` of decoder layer number `index`."""
    return f"{layers_path(model)}.{index}.{name}"


def rest_of(model):
    """Return the modules that hold what is not in the layers, {dotted path: module}."""
    layers = layers_path(model)
    names = layers.split(".")
    above = [".".join(names[:count]) for count in range(len(names))]  # "", "model", "model.decoder"
    return {path: module for path, module in model.named_modules()
            if path.rpartition(".")[0] in above and path not in (*above, layers)}
