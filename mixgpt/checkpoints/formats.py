"""Save formats, and the size of matrices on disk."""

import json
from collections import Counter
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from mixgpt.checkpoints import packing
from mixgpt.checkpoints.quantizer import METHOD
from mixgpt.modeling import decoder, experts, streaming
from modelutils import linears

LARGEST = 5 * 10**9  # bytes of a file; a larger tensor gets its own
PACKED = "pack-quantized"  # name used by compressed-tensors and vLLM
NONE = "none until you `import mixgpt`"  # the weights of a sparse folder: without mixgpt, transformers shows it


def save_dense(folder, model, grids=None):
    """Write a model as `save_pretrained` does, one file in memory at a time; an index, if any, comes last."""
    if (layout := experts.layout_of(model)) is None:
        return experts.fuse(model).save_pretrained(folder)
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    state = remove_tied_weights_from_state_dict(model.state_dict(), model)
    locations = streaming.locations_of(model)
    slices, empty = {}, {}  # {key: {name: ExpertSlice or None}}, {key: tensor on meta}
    for name, tensor in state.items():
        key, part = layout.get(name, (name, None))
        slices.setdefault(key, {})[name] = part
        empty[key] = torch.empty(part.shape if part else tensor.shape, dtype=tensor.dtype, device="meta")

    def filled(key):
        tensor = torch.empty_like(empty[key], device="cpu")
        for name, part in slices[key].items():
            place = part.of(tensor) if part else tensor
            place.copy_(streaming.mapped(locations[name]) if locations else state[name])
        return tensor

    split = split_torch_state_dict_into_shards(empty, filename_pattern="model{suffix}.safetensors",
                                               max_shard_size=LARGEST)
    for file, keys in split.filename_to_tensors.items():
        streaming.write(folder / file, {key: filled(key) for key in keys})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")


def save_compressed_tensors(folder, model, grids):
    """Save a pack-quantized checkpoint for `from_pretrained` and vLLM, with the matrices of `grids` packed.

    grids: {name of a linear: quant.Grid}, all of one symmetric scheme, with contiguous column groups.
    Raises ValueError if weights are not on their grid.
    """
    quantization = next(iter(grids.values())).scheme
    width = None if quantization.groupsize == -1 else quantization.groupsize
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
        num_bits=quantization.wbits, symmetric=True, strategy="group" if width else "channel", group_size=width))
    compressor = BaseCompressor.get_value_from_registry(PACKED)
    state = model.state_dict()
    for name, grid in grids.items():
        W = state.pop(f"{name}.weight")
        grid.codes(W)  # raises if W is not on the grid
        packed = compressor.compress({  # in float32, which recovers the same codes
            "weight": W.float(), "weight_scale": grid.scale.float(),
            "weight_zero_point": torch.zeros_like(grid.scale, dtype=torch.int8)}, scheme)
        packed["weight_scale"] = grid.scale
        state |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
    dense = [name for name, module in model.named_modules()
             if isinstance(module, torch.nn.Linear) and name not in grids]
    model.config.quantization_config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=PACKED, quantization_status="compressed",
        ignore=dense).model_dump(mode="json", exclude_none=True)
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        del model.config.quantization_config


def save_sparse(folder, model, grids):
    """Save every linear of the decoder layers in the encoding of `packing`. Raises ValueError for W not on its grid."""
    state, matrices = model.state_dict(), {}
    for index, layer in enumerate(decoder.layers_of(model)):
        for name in linears(layer):
            path = decoder.path_of(model, index, name)
            parts, matrices[f"{path}.weight"] = packing.encode(state.pop(f"{path}.weight"), grids.get(path))
            state |= {f"{path}.weight.{part}": tensor for part, tensor in parts.items()}
    # one file, with a name of its own: under the usual one, weights would be set at random
    model.save_pretrained(folder, state_dict=state, variant="sparse", max_shard_size="1000TB")
    config = Path(folder) / CONFIG_NAME
    marks = {"quantization_config": {"quant_method": METHOD, "matrices": matrices}, "transformers_weights": NONE}
    config.write_text(json.dumps(json.loads(config.read_text()) | marks, indent=2) + "\n")


def stored_bytes(folder, weights, itemsize):
    """Count the bytes of weights in a directory's safetensors files.

    weights: {name: numbers in it}. itemsize: bytes of a number where the name is another, as of experts, never packed.
    """
    sizes = Counter()  # by key without .weight and what follows
    for file in Path(folder).glob("*.safetensors"):
        for key, tensor in load_file(file).items():  # mapped: no values are read
            sizes[key.rpartition(".weight")[0] or key] += tensor.nbytes
    return sum(sizes.get(name.removesuffix(".weight"), numel * itemsize) for name, numel in weights.items())
