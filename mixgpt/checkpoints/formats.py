"""Save formats, and the size of matrices on disk."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import CONFIG_NAME

from mixgpt.checkpoints import packing
from mixgpt.checkpoints.quantizer import METHOD, WEIGHTS
from mixgpt.common import distributed
from mixgpt.modeling import decoder, experts, streaming
from mixgpt.modeling.linears import linears

LARGEST = 5 * 10**9  # bytes of a file; a larger tensor gets its own
PACKED = "pack-quantized"  # name used by compressed-tensors and vLLM
NONE = "none until you `import mixgpt`"  # the weights of a sparse folder: without mixgpt, transformers shows it


def save_dense(folder, model, grids=None):
    """Write a model as `save_pretrained` does, one file in memory at a time."""
    if (layout := experts.layout_of(model)) is None:
        return experts.fuse(model).save_pretrained(folder)
    _write_configuration(folder, model)
    _write_weights(folder, "model", _tensors(model, layout))


def save_compressed_tensors(folder, model, grids):
    """Write a pack-quantized checkpoint for `from_pretrained` and vLLM, with the matrices of `grids` packed.

    grids: {name of a linear: quant.Grid}, all of one symmetric scheme, with contiguous column groups.
    Raises ValueError if weights are not on their grid.
    """
    quantization = next(iter(grids.values())).scheme
    width = None if quantization.groupsize == -1 else quantization.groupsize
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
        num_bits=quantization.wbits, symmetric=True, strategy="group" if width else "channel", group_size=width))
    compressor = BaseCompressor.get_value_from_registry(PACKED)

    def encode(path, W):
        grids[path].codes(W)  # raises if W is not on the grid
        scale = grids[path].scale
        return compressor.compress({  # in float32, which recovers the same codes
            "weight": W.float(), "weight_scale": scale.float(),
            "weight_zero_point": torch.zeros_like(scale, dtype=torch.int8)}, scheme) | {"weight_scale": scale}

    dense = [name for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and name not in grids]
    _write_weights(folder, "model", _tensors(model, experts.layout_of(model), grids, encode))
    _write_configuration(folder, model, quantization_config=QuantizationConfig(
        config_groups={"group_0": scheme}, format=PACKED, quantization_status="compressed",
        ignore=dense).model_dump(mode="json", exclude_none=True))


def save_sparse(folder, model, grids):
    """Write every linear of the decoder layers in the encoding of `packing`. Raises ValueError for W not on its grid.

    The files have a name of their own: under the usual one, weights would be set at random.
    """
    matrices = {}

    def encode(path, W):
        parts, matrices[f"{path}.weight"] = packing.encode(W, grids.get(path))
        return {f"weight.{part}": tensor for part, tensor in parts.items()}

    paths = {decoder.path_of(model, index, name) for index, layer in enumerate(decoder.layers_of(model))
             for name in linears(layer)}
    file = _write_weights(folder, WEIGHTS.removesuffix(".safetensors"),
                          _tensors(model, experts.layout_of(model), paths, encode))
    _write_configuration(folder, model, transformers_weights=NONE, quantization_config={
        "quant_method": METHOD, "matrices": matrices, "weights": file})


def _tensors(model, layout, paths=(), encode=None):
    """Yield {key in a checkpoint: tensor} of what belongs together: for the linears at `paths` encode(path, W).

    layout: of `experts.layout_of`.
    """
    state, locations = remove_tied_weights_from_state_dict(model.state_dict(), model), streaming.locations_of(model)
    slices = {}  # {key: {name: ExpertSlice or None}}
    for name in state:
        key, part = layout.get(name, (name, None))
        slices.setdefault(key, {})[name] = part

    def tensor(name):
        return streaming.mapped(locations[name]).to(state[name].dtype) if locations else state[name]

    for key, parts in slices.items():
        (name, part), *_ = parts.items()
        path, _, leaf = name.rpartition(".")
        if part:
            whole = torch.empty(part.shape, dtype=state[name].dtype)
            for name, part in parts.items():
                part.of(whole).copy_(tensor(name))
            yield {key: whole}
        elif leaf == "weight" and path in paths:
            yield {key.removesuffix(leaf) + end: encoded for end, encoded in encode(path, tensor(name)).items()}
        else:
            yield {key: tensor(name)}


def _write_configuration(folder, model, **entries):
    """Write a model's configuration, with further entries, and how it generates."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = Path(folder) / CONFIG_NAME
    config.write_text(json.dumps(json.loads(config.read_text()) | entries, indent=2) + "\n")


def _write_weights(folder, name, groups):
    """Write groups of tensors {key: tensor}, one file in memory at a time. Returns the name of the file or the index.

    Files are filled as huggingface_hub fills them; a group is in one file.
    """
    size, places = 0, {}  # places: {key: file}
    for number, shard in enumerate(_shards(groups), 1):
        file = Path(folder) / f"{name}-{number:05d}.safetensors"
        streaming.write(file, shard)
        size += sum(tensor.nbytes for tensor in shard.values())
        places |= dict.fromkeys(shard, file)
    if number == 1:
        return file.rename(file.with_name(f"{name}.safetensors")).name
    names = {file: file.rename(file.with_stem(f"{file.stem}-of-{number:05d}")).name for file in set(places.values())}
    index = {"metadata": {"total_size": size}, "weight_map": {key: names[file] for key, file in places.items()}}
    file = Path(folder) / f"{name}.safetensors.index.json"
    file.write_text(json.dumps(index, indent=1) + "\n")
    return file.name


def _shards(groups):
    """Join groups of tensors {key: tensor} up to `LARGEST` bytes; a larger group stays alone."""
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


def stored_bytes(folder, weights, itemsize):
    """Count the bytes of weights in a directory's safetensors files.

    weights: {name: numbers in it}. itemsize: bytes of a number where the name is another, as of experts, never packed.
    """
    sizes = Counter()  # by key without .weight and what follows
    for file in Path(folder).glob("*.safetensors"):
        for key, tensor in load_file(file).items():  # mapped: no values are read
            sizes[key.rpartition(".weight")[0] or key] += tensor.nbytes
    return sum(sizes.get(name.removesuffix(".weight"), numel * itemsize) for name, numel in weights.items())


def format_bytes(total: int, matrices: Iterable[tuple[tuple[int, int], float, int]], itemsize: int,
                 groupsize: int = -1, sym: bool = False) -> dict[str, int]:
    """Estimate the bytes of a model's weights in each save format, {format: bytes}, before or after they are pruned.

    total: of all its weights in the dtype that is saved, of itemsize bytes a number. matrices: shape, fraction of zeros
    and bits of the kept weights, 16 if they are on no grid, of each linear in the decoder layers; of those without
    zeros and grids nothing changes. groupsize, sym: of the grids, as of `quant.Scheme`. Which formats can hold a model
    is told by `load.check_layers` and what a format refuses.
    """
    sparse = packed = 8 * total  # in bits
    for (rows, columns), zeros, wbits in matrices:
        numel, bits, scales = rows * columns, 8 * itemsize, 0
        if wbits < 16:
            groups = 1 if groupsize == -1 else columns // groupsize
            bits, scales = wbits, rows * groups * 8 * itemsize
            packed += wbits * numel + scales + 128 - 8 * itemsize * numel  # 128: two integers for the shape
            scales += 0 if sym else rows * groups * wbits
        sparse += min(bits * numel, numel + round((1 - zeros) * numel) * bits) + scales - 8 * itemsize * numel
    return {"dense": total, "compressed-tensors": packed // 8, "sparse": sparse // 8}
