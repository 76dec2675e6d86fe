"""Products of packed sparse matrices with a few vectors on a GPU, and their expansion, in one Triton kernel.

A program takes some rows, a block of columns at a time. Each block's place among the packed values is known, so that
one cumulative sum over the bits of the mask gives the places of all its values.
"""

import torch
import triton
import triton.language as tl

from mixgpt.kernels.sparse_cpu import BLOCK, Kernel

ROWS = 4  # A program takes so many rows for one token, fewer for several.
WARPS = 4
TENSORS = ("mask", "data", "offsets", "units", "zero", "scale", "group", "x", "y")
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(kernel: Kernel, rows: int, columns: int, groups: int, tensors: dict[str, torch.Tensor]) -> None:
    """Multiply, or expand, on the device; arguments as of `sparse_cpu.launch`, but the kernel's kind is ignored."""
    tokens = triton.next_power_of_2(kernel.tokens) if kernel.tokens else 0
    tile = max(ROWS // max(tokens, 1), 1)
    with torch.cuda.device_of(tensors["mask"]):  # Triton launches on the current device.
        _multiply[triton.cdiv(rows, tile),](
            *(tensors.get(name) for name in TENSORS), rows, columns, groups, kernel.tokens, WBITS=kernel.wbits,
            TOKENS=tokens, ROWS=tile, BLOCK=BLOCK, DTYPE=FLOATS[kernel.dtype], num_warps=WARPS,
            enable_fp_fusion=True)


@triton.jit
def _multiply(mask, data, offsets, units, zero, scale, group, x, y, rows, columns, groups, tokens, WBITS: tl.constexpr,
              TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Write the products of a tile of rows to y (tokens, rows); without tokens, the rows to y (rows, columns)."""
    row, blocks = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.cdiv(columns, BLOCK)
    real, token = row < rows, tl.arange(0, TOKENS if TOKENS else 1)
    sums = tl.zeros((TOKENS if TOKENS else 1, ROWS, BLOCK if TOKENS else 1), tl.float32)
    for block in range(blocks):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (column < columns)[None, :]
        flat = row[:, None].to(tl.int64) * columns + column[None, :]
        byte = tl.load(mask + (flat >> 3), mask=inside, other=0).to(tl.int32)
        bit = (byte >> (flat & 7).to(tl.int32)) & 1
        place = tl.load(offsets + row * blocks + block, mask=real, other=0)[:, None] + tl.cumsum(bit, 1) - bit
        kept = bit == 1
        if WBITS:
            at = place.to(tl.int64) * WBITS
            low = tl.load(data + (at >> 3), mask=kept, other=0).to(tl.int32)
            crosses = kept & ((at & 7) + WBITS > 8)
            high = tl.load(data + (at >> 3) + 1, mask=crosses, other=0).to(tl.int32)
            code = ((low | (high << 8)) >> (at & 7).to(tl.int32)) & ((1 << WBITS) - 1)
            grid = row[:, None] * groups + tl.load(group + column, mask=column < columns, other=0)[None, :]
            zeros = tl.load(zero + grid, mask=kept, other=0).to(tl.int32)
            unit = tl.load(units + zeros * max(1 << WBITS, 16) + code, mask=kept, other=0)
            weight = (unit * tl.load(scale + grid, mask=kept, other=0).to(tl.float32)).to(DTYPE)
        else:
            weight = tl.load(data + place, mask=kept, other=0)
        if TOKENS:
            at_x = x + token[:, None] * columns + column[None, :]
            part = tl.load(at_x, mask=(token < tokens)[:, None] & (column < columns)[None, :], other=0)
            sums += part.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
        else:
            tl.store(y + flat, weight, mask=inside)
    if TOKENS:
        inside = (token < tokens)[:, None] & real[None, :]
        tl.store(y + token[:, None] * rows + row[None, :], tl.sum(sums, 2), mask=inside)
