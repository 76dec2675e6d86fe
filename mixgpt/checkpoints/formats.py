"""Save formats, loading of the sparse one, and the size of matrices on disk."""

import json
from collections import Counter
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from mixgpt.checkpoints.load import from_pretrained
from mixgpt.checkpoints.packing import decode, encode
from mixgpt.common.choices import FORMATS, SPARSE
from modelutils import linears, model_class

PACKED = "pack-quantized"  # name used by compressed-tensors and vLLM
SPARSE_VARIANT = "sparse"  # part of the names of its tensor files


def save_compressed_tensors(folder, model, family, grids):
    """Save a pack-quantized checkpoint for `from_pretrained` and vLLM, with the matrices of `grids` packed.

    grids: {name of a linear: quant.Grid}, all of one symmetric scheme, with contiguous column groups.
    Raises ValueError if weights are not on their grid or groups are not contiguous.
    """
    quantization = next(iter(grids.values())).scheme
    group = {"strategy": "channel"} if quantization.groupsize == -1 else {"strategy": "group",
                                                                         "group_size": quantization.groupsize}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(
        num_bits=quantization.wbits, type="int", symmetric=True, **group))
    compressor = BaseCompressor.get_value_from_registry(PACKED)
    state = model.state_dict()
    for name, grid in grids.items():
        W = state.pop(f"{name}.weight")
        grid.codes(W)  # raises if W is not on the grid
        if not (grid.group.diff() >= 0).all():
            raise ValueError(f"{name}: the columns of a group do not lie side by side")
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


def save_sparse(folder, model, family, grids):
    """Save every linear of the decoder layers in the encoding of `packing`, for `load_sparse`.

    grids: {name of a linear: quant.Grid} of quantized linears. Raises ValueError if weights are not on their grid.
    """
    state, matrices = model.state_dict(), {}
    for index, layer in enumerate(family.layers_of(model)):
        for name in linears(layer):
            path = family.path(index, name)
            parts, matrices[f"{path}.weight"] = encode(state.pop(f"{path}.weight"), grids.get(path))
            state |= {f"{path}.weight.{part}": tensor for part, tensor in parts.items()}
    # not under the name from_pretrained looks for: it would initialise missing weights at random
    model.save_pretrained(folder, state_dict=state, variant=SPARSE_VARIANT)
    (Path(folder) / SPARSE).write_text(json.dumps(matrices, indent=1) + "\n")


def load_sparse(folder, dtype="auto"):
    """Load a checkpoint written by --save-format sparse as an ordinary transformers model, bit for bit.

        from mixgpt.checkpoints.formats import load_sparse
        model = load_sparse("pruned")

    dtype: of the weights in memory ("auto": as saved). Raises InputError if a weight is missing or of another shape,
    and what libraries raise if a file is damaged.
    """
    folder, state = Path(folder), {}
    for shard in sorted(folder.glob(f"model.{SPARSE_VARIANT}*.safetensors")):
        state |= load_file(shard)
    for name, description in json.loads((folder / SPARSE).read_text()).items():
        state[name] = decode({part: state.pop(f"{name}.{part}") for part in description["parts"]}, description)
    config = AutoConfig.from_pretrained(folder)
    model = from_pretrained(folder, None, config.dtype if dtype == "auto" else dtype, model_class(config),
                            config=config, state_dict=state)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def expected_bytes(save_format, shapes, sparsity, scheme, itemsize):
    """Estimate the bytes of matrices in a format.

    shapes: list of (out, in). sparsity: the fraction of zeros. scheme: their quant.Scheme, or None. itemsize: bytes of
    a weight in memory.
    """
    memory = 8 * itemsize
    bits, total = FORMATS[save_format].bits(memory, scheme.wbits if scheme else memory, sparsity), 0
    for out, columns in shapes:
        total += out * columns * bits / 8
        if scheme and bits < memory:
            groups = columns // scheme.groupsize if scheme.groupsize > 0 else 1
            total += out * groups * (itemsize + scheme.wbits / 8)  # scales and zero points
    return round(total)


def stored_bytes(folder, weights, layout):
    """Count the bytes of weights in a directory's safetensors files.

    weights: {name: numbers in it}. layout: where the checkpoint has them, see `layout_of`; of a tensor of several, they
    count for their share.
    """
    sizes, numels, total = Counter(), {}, 0  # by key without .weight and what follows
    for file in Path(folder).glob("*.safetensors"):
        for key, tensor in load_file(file).items():  # mapped: no values are read
            stem = key.rpartition(".weight")[0] or key
            sizes[stem] += tensor.nbytes
            numels[stem] = tensor.numel()
    for name, numel in weights.items():
        key, part = layout.get(name, (name, None))
        stem = key.removesuffix(".weight")
        total += sizes[stem] * numel // numels[stem] if part else sizes[stem]
    return total
