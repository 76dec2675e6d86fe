"""Where the tensors of a model are in its published checkpoint: under other names, or as parts of larger tensors."""

import copy

import torch
from transformers.core_model_loading import revert_weight_conversion

from mixgpt.modeling.experts import is_split, parts_of


def published(model):
    """Return {name of a tensor once experts are split: (key in the published checkpoint, its `Part` there or None)}.

    model: as transformers builds it, possibly on meta. transformers' conversion for saving is run on tensors of numbers
    that tell where each one went.
    """
    tensors, names = {}, []
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parts = parts_of(module, leaf)
        if not parts:
            tensors[name] = torch.full((1,) * tensor.dim(), len(names))
            names.append((name, None))
            continue
        numbers = torch.arange(len(names), len(names) + len(parts)).view(len(tensor), -1)
        if tensor.dim() == 3:
            numbers = numbers[:, None] if module.is_transposed else numbers[:, :, None]
        tensors[name] = numbers.clone()
        names += [(f"{path}.{part_name}", part) for part_name, part in parts.items()]
    places = {}
    for key, numbers in revert_weight_conversion(model, tensors).items():
        for number in numbers.flatten().tolist():
            name, part = names[number]
            places[name] = key, part if numbers.numel() > 1 else None
    return places


def layout_of(model):
    """Return {name of a tensor: (key, `Part` or None)} of those that a published checkpoint keeps under another key.

    model: with its experts split, possibly on meta. Raises ValueError for a mixture of experts in a layout that
    transformers' conversion does not give tensor by tensor; other such models keep the names that they have here.
    """
    with torch.device("meta"):
        fused = type(model)._from_config(copy.deepcopy(model.config))
    try:
        places = published(fused)
        shapes = {key: tensor.shape for key, tensor in revert_weight_conversion(fused, fused.state_dict()).items()}
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError):
        places, shapes = {}, {}
    names = model.state_dict()
    whole = {name: key for name, (key, part) in places.items() if part is None}
    if places.keys() == names.keys() and all(shapes.get(key) == names[name].shape for name, key in whole.items()):
        return {name: place for name, place in places.items() if place != (name, None)}
    if any(is_split(module) for module in model.modules()):
        raise ValueError(f"the checkpoints of {type(model).__name__} are converted in a way that is not supported")
    return {}
