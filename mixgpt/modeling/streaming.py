"""Models on meta whose weights stay on disk: each module reads its own from safetensors files when it runs."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from mixgpt.common import distributed
from mixgpt.common.errors import InputError, reading
from mixgpt.common.files import replacing
from mixgpt.modeling.decoder import layers_of, layers_path, rest_of
from mixgpt.modeling.experts import RoutedLinear, layout_of, on_meta


class TensorLocation(NamedTuple):
    """Where a tensor is on disk."""

    file: str
    key: str  # The key in the file.
    part: Any = None  # An `ExpertSlice` or `ExpertRows`, if the tensor of this key holds more.
    packed: Callable | None = None  # A function that reads it from (open file, key), if it is encoded.


def disk_weights(module: nn.Module) -> dict[str, TensorLocation] | None:
    """Return {name: TensorLocation} of a module on disk, whose tensors are on meta while it does not run, else None."""
    return getattr(module, "disk_weights", None)


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of a model's weights in a checkpoint, to which all changes are rounded at once."""
    return getattr(model, "stored_dtype", model.dtype)


def locations_of(model: PreTrainedModel) -> dict[str, TensorLocation]:
    """Return {name in a model: TensorLocation} of its tensors on disk, {} if it is in memory."""
    return {f"{path}.{name}": location for path, module in model.named_modules()
            for name, location in (disk_weights(module) or {}).items()}


def read(module: nn.Module, pinned: bool = False) -> dict[str, Tensor]:
    """Read {name: tensor} of a module on disk, in its dtypes; pinned: for a GPU. Raises InputError for NaN or inf."""
    locations, tensors = disk_weights(module), {}
    files = {file: safe_open(file, "pt") for file in {location.file for location in locations.values()}}
    for name, own in module.state_dict().items():
        location = locations[name]
        stored = mapped(location, files[location.file])
        tensors[name] = torch.empty(stored.shape, dtype=own.dtype, pin_memory=pinned).copy_(stored)
        distributed.alive()
        if getattr(module, "finite", None) is not locations:  # What was read before needs no second scan.
            check_finite(tensors[name], f"{location.file}: {location.key}")
    module.finite = locations
    return tensors


def mapped(location: TensorLocation, content: Any = None) -> Tensor:
    """Return a tensor as it is stored, from an open file if given; the disk is read where its values are used."""
    content = content or safe_open(location.file, "pt")
    if location.packed:
        return location.packed(content, location.key)
    if location.part:
        return location.part.of(content.get_slice(location.key))
    return content.get_tensor(location.key)


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise InputError if a floating-point tensor holds NaN or inf, by its extremes."""
    if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
        raise InputError(f"{name} contains NaN or inf")


def weight_files(name: str, weights: str = SAFE_WEIGHTS_NAME) -> list[str]:
    """Return a folder's or hub id's weight files, or []. Raises ValueError if an index points outside the folder."""
    single, index = (cached_file(name, file, _raise_exceptions_for_missing_entries=False)
                     for file in (weights, f"{weights}.index.json"))
    if single or not index:
        return [single] if single else []
    for shard in map(PurePosixPath, json.loads(Path(index).read_text())["weight_map"].values()):
        if shard.is_absolute() or ".." in shard.parts:
            raise ValueError(f"its index names {shard}, which is not in the folder")
    return get_checkpoint_shard_files(name, index)[0]


def stored_tensors(name: str, weights: str = SAFE_WEIGHTS_NAME) -> dict[str, tuple[str, Tensor]]:
    """Return {key: (file, tensor on meta)} of `weight_files` in safetensors. Raises InputError if one is unreadable."""
    stored = {}
    for file in weight_files(name, weights):
        with reading(f"{file}: cannot be read"):
            stored |= {key: (file, tensor) for key, tensor in load_state_dict(file, "meta").items()}
    return stored


def attach_disk_weights(model: PreTrainedModel, stored: Mapping[str, tuple]) -> bool:
    """Make a model on meta read its weights from `stored_tensors`. Returns whether these hold all, unchanged.

    Entries for packed matrices have a third value, `TensorLocation.packed`. Keys may lack or add the base model prefix,
    as `from_pretrained` allows, or be those of a model whose text part this is. Raises ValueError for another shape.
    """
    layout, tied, locations = layout_of(model), model.all_tied_weights_keys, {}
    if layout is None:
        return False
    for name, tensor in model.state_dict().items():
        location = _find(model, tied.get(name, name), layout, stored)
        if location is None:
            return False
        shape = location.part.shape if location.part else tensor.shape
        if (found := stored[location.key][1].shape) != shape:
            raise ValueError(f"{location.key} is {tuple(found)}, its configuration expects {tuple(shape)}")
        locations[name] = location
    for name in tied:  # `from_pretrained` does not tie tensors that are both stored and differ.
        own = _find(model, name, layout, stored)
        if own and not torch.equal(*(mapped(place).to(model.dtype) for place in (own, locations[name]))):
            return False
    model.requires_grad_(False)
    layers = {f"{layers_path(model)}.{index}": layer for index, layer in enumerate(layers_of(model))}
    for path, module in (layers | rest_of(model)).items():
        module.disk_weights = {name: locations[f"{path}.{name}"] for name in module.state_dict()}
    compute_buffers(model)
    return True


def _find(model: PreTrainedModel, name: str, layout: dict, stored: Mapping[str, tuple]) -> TensorLocation | None:
    """Return the TensorLocation of a model's tensor under its published key or its own name, None if not stored."""
    base = model.base_model_prefix + "."
    for key, part in (layout.get(name, (name, None)), (name, None)):
        inside = key.removeprefix(base)
        for spelling in (key, inside, base + key, f"language_model.{key}", f"{base}language_model.{inside}",
                         f"{base}text_model.{inside}"):
            if spelling in stored:
                file, _, *packed = stored[spelling]
                return TensorLocation(file, spelling, part, *packed)
    return None


def compute_buffers(model: PreTrainedModel) -> None:
    """Compute on the host the buffers that are in no file, such as rotary frequencies; weights stay on meta."""
    fused = on_meta(model)  # The model's class can only initialize what it has built.
    for path, module in fused.named_modules():
        own = model.get_submodule(path)
        for name in module._non_persistent_buffers_set:
            own._buffers[name] = module._buffers[name] = torch.empty_like(getattr(own, name), device="cpu")
    fused.initialize_weights()


def fingerprint(model: PreTrainedModel) -> str:
    """Return a digest of 64 values of every parameter, 2 of an expert's, the same whether bfloat16 or wider."""
    result, locations = hashlib.sha256(type(model).__name__.encode()), locations_of(model)
    routed = {path for path, module in model.named_modules() if isinstance(module, RoutedLinear)}
    opened = functools.lru_cache(1)(lambda file: safe_open(file, "pt"))  # Opening the next file unmaps the last.
    for name, parameter in model.named_parameters():
        place = locations.get(name)
        stored = mapped(place, opened(place.file)) if place else parameter.detach()
        count = 2 if name.rpartition(".")[0] in routed else 64  # Experts are many, and a disk reads around each value.
        values = stored.take(torch.arange(0, stored.numel(), -(-stored.numel() // count))).to(parameter.dtype)
        result.update(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return result.hexdigest()


def digest(tokens: Tensor) -> str:
    """Return a digest of tokens (N, T)."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def write(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write {key: tensor} as a safetensors file, atomically and flushed to disk, with texts as metadata."""
    with replacing(file) as partial:
        save_file({key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}, partial,
                  metadata={"format": "pt"} | metadata)
    distributed.alive()
