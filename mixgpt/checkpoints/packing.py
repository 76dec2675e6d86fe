"""The sparse format: a bit mask and the bit-packed values of the kept weights.

A matrix is stored as tensors named after it: `mask`, one bit per weight, if that saves space; `values`, the kept
weights, or on a grid `codes`, packed to wbits; `scale`, and if the grid needs them `zero` (packed to wbits) and
`group`, the group of each column. Bytes are filled from the lowest bit. Descriptions are in config.json.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixgpt.common.choices import GRIDS
from mixgpt.common.errors import reading
from mixgpt.quant import Grid


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits, at most 8 bits each, contiguously. Returns uint8, flat."""
    binary = (codes.to(torch.uint8).flatten()[:, None] >> torch.arange(bits, dtype=torch.uint8)) & 1  # (n, bits)
    return torch.from_numpy(np.packbits(binary.numpy(), bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`. Returns `count` integers, uint8, flat."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    binary = (packed[:, None] >> places & 1).flatten()[:count * bits].view(count, bits)
    return (binary << places[:bits]).sum(1, dtype=torch.uint8)


def encode(W: Tensor, grid: Grid | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Encode a matrix (out, in), on `grid` if given, in the smallest encoding of the format.

    Returns the tensors by name and the description for `decode`. Raises ValueError if W is not on the grid.
    """
    description: dict[str, Any] = {"shape": list(W.shape), "dtype": str(W.dtype).removeprefix("torch.")}
    if grid is None:
        bits = 8 * W.element_size()
        parts, values = {}, W.contiguous().flatten()
        kept = (values != 0) | values.signbit()  # −0 counts as kept, so that no bit is lost.
    else:
        bits = description["wbits"] = grid.scheme.wbits
        if grid.scheme.name != "uniform":
            description["grid"] = grid.scheme.name
        codes, parts = grid.codes(W), {"scale": grid.scale}
        if not (grid.zero == 2 ** (bits - 1)).all():
            parts["zero"] = pack(grid.zero, bits)
        if not torch.equal(grid.group, consecutive(W.shape[1], grid.scale.shape[1])):
            parts["group"] = grid.group
        values, kept = codes.flatten(), (W != 0).flatten()
    count = int(kept.sum())
    # A grid may have no code of 0.
    if W.numel() + bits * count < bits * W.numel() or grid and grid.scheme.name != "uniform" and count < W.numel():
        parts["mask"], values = pack(kept, 1), values[kept]
    parts |= {"values": values} if grid is None else {"codes": pack(values, bits)}
    return parts, description | {"parts": sorted(parts)}


def consecutive(columns: int, groups: int, device: torch.device | None = None) -> Tensor:
    """Return the group of each column, int32, where groups lie side by side."""
    return torch.arange(columns, dtype=torch.int32, device=device) // (columns // groups)


def decode(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> Tensor:
    """Return the matrix (out, in) given to `encode`, bit for bit, on the device of its parts."""
    shape, device = description["shape"], next(iter(parts.values())).device
    count = math.prod(shape)
    kept = unpack(parts["mask"], 1, count) if "mask" in parts else torch.ones(count, device=device)
    kept = kept > 0
    if "values" in parts:
        W = parts["values"].new_zeros(count)
        W[kept] = parts["values"]
        return W.view(shape)
    grid = grid_of(parts, description)
    codes = grid.zero[:, grid.group].flatten()
    codes[kept] = unpack(parts["codes"], description["wbits"], int(kept.sum()))
    return grid.weights(codes.view(shape)).masked_fill_(~kept.view(shape), 0)


def grid_of(parts: Mapping[str, Tensor], description: Mapping[str, Any]) -> Grid:
    """Return the grid of an encoded matrix, on the device of its parts."""
    wbits, scale = description["wbits"], parts["scale"]
    zero = parts.get("zero", torch.full_like(scale, 2 ** (wbits - 1), dtype=torch.uint8))
    if zero.dim() == 1:  # It is packed.
        zero = unpack(zero, wbits, scale.numel()).view(scale.shape)
    group = parts.get("group", consecutive(description["shape"][1], scale.shape[1], scale.device))
    return Grid(GRIDS[description.get("grid", "uniform")].load()(wbits), scale, zero, group)


def read(description: Mapping[str, Any], content: Any, key: str) -> Tensor:
    """Return the matrix whose parts are named after a key in an open file."""
    with reading(f"{key}: its parts cannot be decoded"):
        return decode({part: content.get_tensor(f"{key}.{part}") for part in description["parts"]}, description)
