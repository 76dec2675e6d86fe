"""Mark the least salient weights of a block of columns in Triton, without a host synchronization; see `selection`.

Saliencies are not negative, so that their bits as an integer are in the same order: a key of 31 bits, 0 where the mask
is set already. The key of the last weight to mark is found digit by digit, each by a histogram of the keys that agree
in the digits before, summed over all processes. Of equal keys the first ones in memory are marked, from the first
process on.
"""

import torch
import triton
import triton.language as tl

from mixgpt.common import distributed

TILE, WARPS = 4096, 8  # weights of a matrix per program
BINS = tl.constexpr(2048)  # of the first digit, 11 bits; the other two have 10. The last bin is that of no weight
LARGEST = tl.constexpr(0x7FE00000)  # bits taken for all larger ones, which are no numbers
COUNT, MARK = 3, 4  # passes after those of the three digits


def mark_smallest(W, mask, marked, factors, row_weights, matrices):
    """Mark on the device; arguments as in `selection.mark_smallest`, W and the factors float32."""
    columns, counts = len(W), [count for _, count in matrices]
    starts = [rows.start for rows, _ in matrices] + [rows.stop for rows, _ in matrices]
    if any(map(torch.is_tensor, counts)):
        counts = torch.stack([torch.as_tensor(count, device=W.device) for count in counts])
    else:
        counts = torch.tensor(counts).to(W.device, non_blocking=True)
    bounds = torch.tensor(starts).to(W.device, non_blocking=True)
    programs = max(triton.cdiv(columns * max(rows.stop - rows.start for rows, _ in matrices), TILE), 1)
    bins = torch.zeros(3, len(matrices), BINS.value, dtype=torch.int32, device=W.device)
    ties = torch.zeros(len(matrices), 1 + programs, dtype=torch.int32, device=W.device)  # in processes and tiles before
    with torch.cuda.device_of(W):  # Triton launches on the current device
        for step in (0, 1, 2, COUNT, MARK):
            _mark[programs, len(matrices)](
                W, mask, marked, factors.contiguous(), row_weights, bounds, counts, bins, ties, columns, programs,
                *W.stride(), *mask.stride(), *marked.stride(), STEP=step, TILE=TILE, num_warps=WARPS)
            if step < COUNT:
                distributed.all_reduce(bins[step])
            elif step == COUNT and distributed.world() > 1:
                ties[:, 0] = sum(distributed.all_gather(ties.sum(1, dtype=torch.int32))[:distributed.rank()])


@triton.jit
def _mark(W, mask, marked, factors, row_weights, bounds, counts, bins, ties, columns, programs, w_column, w_row,
          mask_column, mask_row, marked_column, marked_row, STEP: tl.constexpr, TILE: tl.constexpr):
    """Make one pass over a tile of one matrix: count a digit of its keys, or the keys that are the last, or mark."""
    tile, matrix = tl.program_id(0), tl.program_id(1)
    first = tl.load(bounds + matrix).to(tl.int32)
    rows = tl.load(bounds + tl.num_programs(1) + matrix).to(tl.int32) - first
    place = tile * TILE + tl.arange(0, TILE)
    real = place < columns * rows
    column, row = place // rows, first + place % rows
    score = tl.load(W + column * w_column + row * w_row, mask=real, other=0)
    score = score * score * tl.load(factors + column, mask=real, other=0)
    if row_weights is not None:
        score *= tl.load(row_weights + row, mask=real, other=0)
    gone = tl.load(mask + column * mask_column + row * mask_row, mask=real, other=0)
    key = tl.minimum(score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, LARGEST) + 1
    key = tl.where(gone, 0, key)

    bins, of_digit = bins + matrix * BINS, tl.num_programs(1) * BINS
    ties += matrix * (1 + programs)
    left = tl.maximum(tl.load(counts + matrix), 0).to(tl.int32)
    known = 0
    for digit in tl.static_range(3):
        if digit < STEP:
            found, left = _digit(bins + digit * of_digit, left)
            known = (known << 10) + found
    if STEP < 3:
        shift: tl.constexpr = 20 - 10 * STEP
        found = key >> shift
        if STEP > 0:
            real &= (found >> 10) == known
            found &= 1023
        count, bin = tl.histogram(tl.where(real, found, BINS - 1), BINS), tl.arange(0, BINS)
        tl.atomic_add(bins + STEP * of_digit + bin, count, mask=(count > 0) & (bin < BINS - 1), sem="relaxed")
        return
    last = real & (key == known)
    if STEP == 3:
        tl.store(ties + 1 + tile, tl.sum(last.to(tl.int32), 0))
        return
    for start in range(0, 1 + tile, 1024):  # those before this tile are marked first
        other = start + tl.arange(0, 1024)
        left -= tl.sum(tl.load(ties + other, mask=other <= tile, other=0), 0)
    chosen = (key < known) | (last & (tl.cumsum(last.to(tl.int32), 0) <= left))
    tl.store(marked + column * marked_column + row * marked_row, True, mask=real & chosen)


@triton.jit
def _digit(bins, left):
    """Return the digit of the last of the `left` smallest keys, and how many of these have that digit."""
    bin = tl.arange(0, BINS)
    count = tl.load(bins + bin)
    left = tl.minimum(left, tl.sum(count, 0))
    digit = tl.sum((tl.cumsum(count, 0) < left).to(tl.int32), 0)
    return digit, left - tl.sum(tl.where(bin < digit, count, 0), 0)
