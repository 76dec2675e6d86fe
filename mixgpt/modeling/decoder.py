"""Decoder layers: where a model has them, and what they take beside hidden states.

The model's own `forward` runs what comes before and after them. An argument is the same for all batches, depends on the
tokens of a sequence, or is left by earlier layers.
"""

import contextlib
from collections import UserDict
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from mixgpt.common.errors import InputError

Shapes = dict[str, list[torch.Size]]  # Of the tensors, (1, heads, T, d) for one sequence, that layers share.


def layers_path(model: PreTrainedModel) -> str:
    """Return the dotted path of the list of modules with the most weights. Raises InputError if there is none."""
    paths = list(_lists(model))
    if not paths:
        raise InputError(f"model {model.config.name_or_path}: a {type(model).__name__} has no list of layers")
    return paths[0] if len(paths) == 1 else max(paths, key=lambda path: sum(
        weight.numel() for weight in model.get_submodule(path).parameters()))


def _lists(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of the lists of modules that are in no other list."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name
        else:
            yield from _lists(child, f"{prefix}{name}.")


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model."""
    return model.get_submodule(layers_path(model))


def path_of(model: PreTrainedModel, index: int, name: str) -> str:
    """Return the full name of the linear `name` of decoder layer number `index`."""
    return f"{layers_path(model)}.{index}.{name}"


def rest_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules that hold what is not in the layers, {dotted path: module}."""
    layers = layers_path(model)
    names = layers.split(".")
    above = [".".join(names[:count]) for count in range(len(names))]  # "", "model", "model.decoder"
    return {path: module for path, module in model.named_modules()
            if path.rpartition(".")[0] in above and path not in (*above, layers)}


@dataclass(frozen=True, eq=False)
class PerSequence:
    """The values, for all sequences, of an argument that depends on the tokens."""

    values: Tensor  # (N, ...), on the host


class Shared(UserDict):
    """Tensors that layers leave for later layers, as Gemma 4's leave keys and values; `read` holds the keys read."""

    def __init__(self, *tensors: dict) -> None:
        super().__init__(*tensors)
        self.read = set()

    def __getitem__(self, key: str) -> tuple[Tensor, ...]:
        self.read.add(key)
        return super().__getitem__(key)


def is_shared(argument: object) -> bool:
    """Return whether an argument is a mapping to which layers write."""
    return isinstance(argument, MutableMapping) and not isinstance(argument, dict)


def per_sequence(calls: list, others: list, N: int) -> list:
    """Return a `PerSequence` (N, ...) where arguments for two sequences without a common token differ, else None."""
    kept = {}  # {id of a tensor: its PerSequence}, as many layers may take the same tensor.

    def compare(ours: Any, theirs: Any) -> PerSequence | None:
        if not torch.is_tensor(ours) or ours is theirs or torch.equal(ours, theirs):
            return None
        if id(ours) not in kept:
            kept[id(ours)] = PerSequence(torch.empty(N, *ours.shape[1:], dtype=ours.dtype))
        return kept[id(ours)]

    return tree_map(compare, calls, others)


def fill(places: list, calls: list, rows: slice) -> list:
    """Put the arguments of sequences `rows` that depend on tokens into `places` from `per_sequence`; return all."""
    def put(place: PerSequence | None, argument: Any) -> Any:
        if place is None:
            return argument
        place.values[rows] = argument.to("cpu")
        return place

    return tree_map(put, places, calls)


def take(arguments: tuple[tuple, dict], rows: slice | Tensor, shared: Shared, device: torch.device) -> tuple:
    """Return the arguments of a layer for the sequences `rows`, on the device, with `shared` for what layers share."""
    return tree_map(lambda argument: argument.values[rows].to(device) if isinstance(argument, PerSequence)
                    else shared if is_shared(argument) else argument, arguments)


def cast(arguments: dict, dtype: torch.dtype) -> dict:
    """Convert the floating-point tensors in arguments."""
    def convert(value: Any) -> Any:
        if isinstance(value, PerSequence):
            return PerSequence(convert(value.values))
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    return tree_map(convert, arguments)


def shared_shapes(layers: nn.ModuleList, hidden: Tensor, calls: list) -> Shapes:
    """Return the `Shapes` of what layers leave for later ones, by running them on meta on these calls."""
    shared = Shared()
    if any(map(is_shared, tree_leaves(calls))):
        for layer, arguments in zip(layers, calls, strict=True):
            weights = {name: tensor.to("meta") for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]}
            args, kwargs = tree_map(lambda each: each.to("meta") if torch.is_tensor(each) else shared
                                    if is_shared(each) else each, arguments)
            with contextlib.suppress(RuntimeError):  # Experts choose tokens by value; they come after attention.
                torch.func.functional_call(layer, weights, (hidden.to("meta"), *args), kwargs)
    return {key: [tensor.shape for tensor in shared.data[key]] for key in sorted(shared.read & shared.keys())}


def unpack(packed: Tensor, shapes: Shapes) -> tuple[Tensor, Shared]:
    """Return hidden states (B, T, C), contiguous, and what layers share from one tensor (B, T, C + ...) with both."""
    sizes = widths(shapes)
    width = packed.shape[-1] - sum(sizes)
    hidden, parts = packed[..., :width], iter(packed[..., width:].split(sizes, -1))
    return hidden.contiguous(), Shared({key: tuple(next(parts).reshape(len(packed), *shape[1:]) for shape in tensors)
                                        for key, tensors in shapes.items()})


def widths(shapes: Shapes) -> list[int]:
    """Return how many numbers per token there are in each tensor of these shapes."""
    return [shape[1] * shape[3] for tensors in shapes.values() for shape in tensors]
