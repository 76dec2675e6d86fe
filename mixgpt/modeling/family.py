"""Where models of each family have their decoder layers. Their own `forward` runs what comes before and after."""

import contextlib

from mixgpt.common.errors import InputError

LAYERS = [  # the list of decoder layers, as a dotted path
    "model.decoder.layers",  # OPT
    "transformer.h",  # BLOOM, Falcon
    "model.layers",  # LLaMA, Baichuan and most others
    "gpt_neox.layers",  # GPT-NeoX, Pythia
    "transformer.blocks",  # MPT
]


def layers_path(model):
    """Return the first of LAYERS that a model has. Raises InputError if there is none."""
    for path in LAYERS:
        with contextlib.suppress(AttributeError):
            model.get_submodule(path)
            return path
    raise InputError(f"model {model.config.name_or_path}: the layers of a {type(model).__name__} are not at "
                     f"{' or '.join(LAYERS)}")


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
