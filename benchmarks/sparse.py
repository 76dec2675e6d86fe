"""Time products with packed matrices against PyTorch's with dense ones in bfloat16, in pairs.

python benchmarks/sparse.py
python benchmarks/sparse.py --kernel avx2 --tokens 1 4 8
python generate.py pruned "Once upon a time" --dense MODEL --dtype bfloat16 --max-new-tokens 128     # a whole model

A row gives medians in ms, the median of the pairs' ratios, and GB/s of the packed matrix. Copies of a matrix take
turns, so that none is in a cache.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from mixgpt.checkpoints.packing import encode
from mixgpt.checkpoints.sparse import PackedWeight
from mixgpt.common.progress import table
from mixgpt.common.runtime import Clock, choose_device
from mixgpt.kernels.sparse_cpu import KINDS, kinds_for
from mixgpt.quant import Scheme, quantize_nearest

SHAPES = (4096, 4096), (4096, 11008), (1536, 576)
CASES = (0.5, 16), (0.6, 16), (0.7, 16), (0.5, 4)  # sparsity, bits
BYTES = 6e8  # of the copies of a dense matrix


def pack(shape, sparsity, wbits, device):
    """Return a random matrix in bfloat16, and the same packed."""
    W, grid = torch.randn(shape).bfloat16(), None
    if wbits < 16:
        W, grid = quantize_nearest(W, Scheme(wbits, sym=True))  # which sets a fifth to 0
    W[torch.rand(shape) < 1 - (1 - sparsity) / (W != 0).float().mean()] = 0
    parts, description = encode(W, grid)
    return W.to(device), PackedWeight.of(parts, description).to(device)


def seconds(function, device):
    clock = Clock(device)
    if device.type == "cuda":
        torch.cuda._sleep(2**21)  # a millisecond, in which the host launches what is timed
    with clock.part("it"):
        function()
    return clock.seconds()["it"]


@torch.no_grad()
def measure(shape, sparsity, wbits, tokens, device, pairs, kernel):
    """Return a row of the table for products with so many tokens. kernel: its kind on a CPU, None for the fastest."""
    W, packed = pack(shape, sparsity, wbits, device)
    if kernel:
        packed.kinds = lambda: [kernel]
    dense = [W.clone() for _ in range(int(BYTES // W.nbytes))]
    copies, x = [copy.deepcopy(packed) for _ in dense], torch.randn(tokens, shape[1], device=device).bfloat16()
    for each in copies:
        each.multiply(x)  # the first product of a matrix makes room behind its numbers
    times = [(seconds(lambda k=k: torch.nn.functional.linear(x, dense[k % len(dense)]), device),
              seconds(lambda k=k: copies[k % len(dense)].multiply(x), device)) for k in range(-3, pairs)][3:]
    first, second = map(statistics.median, zip(*times, strict=True))
    ratio, nbytes = statistics.median(a / b for a, b in times), sum(buffer.nbytes for buffer in packed.buffers())
    return ["x".join(map(str, shape)), f"{sparsity:.0%}" + f" + {wbits} bit" * (wbits < 16), str(tokens),
            f"{first * 1e3:.3f}", f"{second * 1e3:.3f}", f"{ratio:.2f}x", f"{nbytes / second / 1e9:.1f}"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1], help="multiplied at a time")
    parser.add_argument("--kernel", choices=KINDS, help="where this CPU has it (default: the fastest)")
    given = parser.parse_args(argv)
    able = [case for case in CASES if given.kernel in (None, *kinds_for(torch.bfloat16, case[1] % 16, 64))]
    rows = [measure(shape, *case, tokens, choose_device(given.device), given.pairs, given.kernel)
            for tokens in given.tokens for shape in SHAPES for case in able]
    print(table(["matrix", "sparsity", "tokens", "dense", "packed", "ratio", "GB/s"], rows), flush=True)


if __name__ == "__main__":
    main()
