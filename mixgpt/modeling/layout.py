"""Where the tensors of a model are in its published checkpoint: under other names, or as parts of larger tensors."""

import copy
from dataclasses import dataclass

import torch
from transformers.core_model_loading import revert_weight_conversion

from mixgpt.modeling.experts import fused_parts, is_fused, is_split


@dataclass(frozen=True)
class Part:
    """The place of an expert's matrix or bias in a tensor of all experts, (experts, rows, columns) or transposed."""

    expert: int
    part: int = 0  # which of `parts` matrices that share the rows
    parts: int = 1
    transposed: bool = False
    concatenated: bool = True  # parts below each other, else row by row in turn

    def of(self, tensor):
        """Return this part (out, in), a view, of the tensor of one expert."""
        rows = tensor.t() if self.transposed and tensor.dim() == 2 else tensor
        return rows.chunk(self.parts)[self.part] if self.concatenated else rows[self.part::self.parts]

    def whole(self, shape, experts):
        """Return the shape of the tensor of all experts in which this part has a shape."""
        rows, *columns = shape
        inner = (rows * self.parts, *columns)
        return (experts, *(inner[::-1] if self.transposed else inner))


def published(model):
    """Return {name of a tensor once experts are split: (key in the published checkpoint, its `Part` there or None)}.

    model: as transformers builds it, possibly on meta. transformers' conversion for saving is run on tensors of numbers
    that tell where each one went.
    """
    tensors, names = {}, []
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parts = fused_parts(module, leaf) if is_fused(module) else None
        if parts is None:
            tensors[name] = torch.full((1,) * tensor.dim(), len(names))
            names.append((name, None))
            continue
        numbers = torch.arange(len(names), len(names) + len(tensor) * len(parts)).view(-1, len(parts))
        if tensor.dim() == 3:
            numbers = numbers[:, None] if module.is_transposed else numbers[:, :, None]
        tensors[name] = numbers.clone()
        names += [(f"{path}.{expert}.{part}", Part(expert, number, len(parts), module.is_transposed,
                                                   module.is_concatenated))
                  for expert in range(len(tensor)) for number, part in enumerate(parts)]
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
