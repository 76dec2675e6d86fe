"""Save formats, and the size of matrices on disk."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import CONFIG_NAME

from mixgpt.checkpoints import packing
from mixgpt.checkpoints.quantizer import METHOD, WEIGHTS
from mixgpt.common import distributed
from mixgpt.modeling import decoder, experts, streaming
from mixgpt.modeling.linears import linears
from mixgpt.quant import Grid

LARGEST = 5 * 10**9  # A file has at most so many bytes; a larger tensor gets its own.
PACKED = "pack-quantized"  # compressed-tensors and vLLM use this name.
NONE = "none until you `import mixgpt`"  # transformers shows this as the missing file of a sparse folder.
Encode = Callable[[str, Tensor], dict[str, Tensor]]  # It returns {end of a key: tensor} of a linear's path and matrix.


def save_dense(folder: Path, model: PreTrainedModel, grids: dict[str, Grid]) -> None:
    """Write a model as `save_pretrained` does, one file in memory at a time."""
    if experts.layout_of(model) is None:
        experts.fuse(model).save_pretrained(folder)
        return
    _write_configuration(folder, model)
    _write_weights(folder, "model", _tensors(model))


def save_compressed_tensors(folder: Path, model: PreTrainedModel, grids: dict[str, Grid]) -> None:
    """Write a pack-quantized checkpoint for `from_pretrained` and vLLM, with the linears of `grids` packed.

    grids: all of one symmetric scheme, with contiguous column groups. Raises ValueError for weights not on them.
    """
    quantization = next(iter(grids.values())).scheme
    width = None if quantization.groupsize == -1 else quantization.groupsize
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
        num_bits=quantization.wbits, symmetric=True, strategy="group" if width else "channel", group_size=width))
    compressor = BaseCompressor.get_value_from_registry(PACKED)

    def encode(path: str, W: Tensor) -> dict[str, Tensor]:
        grids[path].codes(W)  # This raises if W is not on the grid.
        scale = grids[path].scale
        return compressor.compress({  # ty: ignore[invalid-explicit-return]  # It finds all codes again in float32.
            "weight": W.float(), "weight_scale": scale.float(),
            "weight_zero_point": torch.zeros_like(scale, dtype=torch.int8)}, scheme) | {"weight_scale": scale}

    dense = [name for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and name not in grids]
    _write_weights(folder, "model", _tensors(model, grids, encode))
    _write_configuration(folder, model, quantization_config=QuantizationConfig(
        config_groups={"group_0": scheme}, format=PACKED, quantization_status="compressed",
        ignore=dense).model_dump(mode="json", exclude_none=True))


def save_sparse(folder: Path, model: PreTrainedModel, grids: dict[str, Grid]) -> None:
    """Write every linear of the decoder layers, encoded by `packing`. Raises ValueError for W not on its grid."""
    matrices = {}

    def encode(path: str, W: Tensor) -> dict[str, Tensor]:
        parts, matrices[f"{path}.weight"] = packing.encode(W, grids.get(path))
        return {f"weight.{part}": tensor for part, tensor in parts.items()}

    paths = {decoder.path_of(model, index, name) for index, layer in enumerate(decoder.layers_of(model))
             for name in linears(layer)}
    file = _write_weights(folder, WEIGHTS.removesuffix(".safetensors"), _tensors(model, paths, encode))
    _write_configuration(folder, model, transformers_weights=NONE, quantization_config={
        "quant_method": METHOD, "matrices": matrices, "weights": file})


def _tensors(model: PreTrainedModel, paths: Iterable[str] = (), encode: Encode | None = None
             ) -> Iterator[dict[str, Tensor]]:
    """Yield {key in a checkpoint: tensor} of what belongs together, with the linears at `paths` encoded."""
    state, locations = remove_tied_weights_from_state_dict(model.state_dict(), model), streaming.locations_of(model)
    layout, slices = experts.layout_of(model), {}  # {key: {name: ExpertSlice or None}}
    for name in state:
        key, part = layout.get(name, (name, None))
        slices.setdefault(key, {})[name] = part

    def tensor(name: str) -> Tensor:
        return streaming.mapped(locations[name]).to(state[name].dtype) if locations else state[name]

    for key, parts in slices.items():
        (name, part), *_ = parts.items()
        path, _, leaf = name.rpartition(".")
        if part:
            whole = torch.empty(part.shape, dtype=state[name].dtype)
            for name, part in parts.items():
                part.of(whole).copy_(tensor(name))
            yield {key: whole}
        elif encode and leaf == "weight" and path in paths:
            yield {key.removesuffix(leaf) + end: encoded for end, encoded in encode(path, tensor(name)).items()}
        else:
            yield {key: tensor(name)}


def _write_configuration(folder: Path, model: PreTrainedModel, **entries: Any) -> None:
    """Write a model's configuration, with further entries, and how it generates."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = folder / CONFIG_NAME
    config.write_text(json.dumps(json.loads(config.read_text()) | entries, indent=2) + "\n")


def _write_weights(folder: Path, name: str, groups: Iterable[dict[str, Tensor]]) -> str:
    """Write groups of tensors by key, one file in memory at a time. Returns the name of the file or the index."""
    size, places = 0, {}  # places: {key: file}
    for number, shard in enumerate(_shards(groups), 1):
        file = folder / f"{name}-{number:05d}.safetensors"
        streaming.write(file, shard)
        size += sum(tensor.nbytes for tensor in shard.values())
        places |= dict.fromkeys(shard, file)
    if number == 1:
        return file.rename(file.with_name(f"{name}.safetensors")).name
    names = {file: file.rename(file.with_stem(f"{file.stem}-of-{number:05d}")).name for file in set(places.values())}
    index = {"metadata": {"total_size": size}, "weight_map": {key: names[file] for key, file in places.items()}}
    file = folder / f"{name}.safetensors.index.json"
    file.write_text(json.dumps(index, indent=1) + "\n")
    return file.name


def _shards(groups: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Join groups up to `LARGEST` bytes, as huggingface_hub does; a larger group stays alone."""
    shard, size = {}, 0
    for group in groups:
        distributed.alive()
        nbytes = sum(tensor.nbytes for tensor in group.values())
        if nbytes > LARGEST:
            yield group
            continue
        if size + nbytes > LARGEST:
            yield shard
            shard, size = {}, 0
        shard, size = shard | group, size + nbytes
    if shard:
        yield shard


def stored_bytes(folder: Path, weights: Mapping[str, int], itemsize: int) -> int:
    """Count the bytes of weights in a directory's safetensors files.

    weights: {name: numbers in it}. itemsize: bytes of a number where the name is another, as of experts, never packed.
    """
    sizes = Counter()  # A key is cut before .weight.
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():  # The files are mapped, and no values are read.
            sizes[key.rpartition(".weight")[0] or key] += tensor.nbytes
    return sum(sizes.get(name.removesuffix(".weight"), numel * itemsize) for name, numel in weights.items())


def format_bytes(total: int, matrices: Iterable[tuple[tuple[int, int], float, int]], itemsize: int,
                 groupsize: int = -1, sym: bool = False) -> dict[str, int]:
    """Estimate the bytes of a model's weights in each save format, {format: bytes}, before or after they are pruned.

    total: of all its weights as they are saved, with itemsize bytes a number. matrices: shape, fraction of zeros and
    bits of the kept weights, 16 if they are on no grid, of each linear in the decoder layers. groupsize, sym: as of
    `quant.Scheme`.
    """
    sparse = packed = 8 * total  # Both are in bits.
    for (rows, columns), zeros, wbits in matrices:
        numel, bits = rows * columns, 8 * itemsize
        sparse -= numel * bits
        if wbits < 16:
            groups = rows if groupsize == -1 else numel // groupsize
            packed += numel * (wbits - bits) + groups * bits + 128  # Two integers tell the shape.
            sparse += groups * (bits if sym else bits + wbits)
            bits = wbits
        sparse += min(bits * numel, numel + round((1 - zeros) * numel) * bits)
    return {"dense": total, "compressed-tensors": packed // 8, "sparse": sparse // 8}
