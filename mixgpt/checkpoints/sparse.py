"""Linear layers whose weights stay in the encoding of `packing`."""

import functools
import math
import threading

import numpy as np
import torch
from torch.nn.functional import linear

from mixgpt.checkpoints.packing import consecutive, decode, unpack
from mixgpt.common.choices import GRIDS
from mixgpt.kernels import sparse_cpu
from mixgpt.kernels.columns import triton_obstacle

BLOCK = 512  # columns to an offset
DTYPES = {"mask": torch.uint8, "codes": torch.uint8, "zero": torch.uint8, "group": torch.int32}  # of parts
FEW = 8  # tokens at most that are multiplied without expanding the matrix
_scratch = threading.local()


class PackedWeight(torch.nn.Module):
    """A matrix (out, in) as a mask and values or codes: buffers under the names that its parts have in a file.

    description: that of `packing.encode`, which must have a mask. `prepare` comes between loading and use. dtype: of
    the weights in memory, if it is smaller than that in the file.
    """

    def __init__(self, description, dtype=torch.float64):
        super().__init__()
        dtype = min(getattr(torch, description["dtype"]), dtype, key=lambda dtype: dtype.itemsize)
        self.description, self.shape = description, torch.Size(description["shape"])
        self.wbits, self.data = description.get("wbits", 0), "codes" if "wbits" in description else "values"
        for part in description["parts"]:
            self.register_buffer(part, torch.empty(0, dtype=DTYPES.get(part, dtype)))
        self.register_load_state_dict_post_hook(PackedWeight.prepare)

    def prepare(self, _=None):
        """Check the loaded parts, and add what products need. Raises ValueError if the parts do not fit each other."""
        (rows, columns), wbits = self.shape, self.wbits
        self._check("mask", rows * columns / 8)
        sizes = _bits(self.mask.cpu().numpy(), rows, columns)
        offsets = torch.from_numpy((sizes.cumsum() - sizes).astype(np.int32)).view(rows, -1)
        self.register_buffer("offsets", offsets.to(self.mask.device), persistent=False)
        self._check(self.data, sizes.sum() * (wbits / 8 or 1))
        if not wbits:
            return
        if wbits not in range(1, 9):
            raise ValueError(f"its codes have {wbits} bits")
        self._check("scale", rows * self.groups)
        if "zero" not in self._buffers:
            self.register_buffer("zero", torch.full_like(self.scale, 2 ** (wbits - 1), dtype=torch.uint8))
        if self.zero.dim() == 1:  # packed
            self._check("zero", rows * self.groups * wbits / 8)
            self.zero = unpack(self.zero, wbits, self.scale.numel()).view_as(self.scale)
        if "group" not in self._buffers:
            self.register_buffer("group", consecutive(columns, self.groups, self.mask.device))
        self._check("zero", rows * self.groups)
        self._check("group", columns)
        if int(self.zero.max()) >> wbits or not 0 <= int(self.group.min()) <= int(self.group.max()) < self.groups:
            raise ValueError("its zeros or groups are out of range")

    def _check(self, part, count):
        tensor, count = getattr(self, part), math.ceil(count)
        if tensor.numel() != count or tensor.dtype != DTYPES.get(part, tensor.dtype) or not tensor.is_contiguous():
            raise ValueError(f"its {part} has {tensor.numel()} numbers in {tensor.dtype}, must have {count}")

    @property
    def dtype(self):
        """That of the weights, which `.to(dtype)` changes."""
        return (self.scale if self.wbits else self.values).dtype

    def multiply(self, x, bias=None):
        """Return x Wᵀ + bias: for few tokens from the packed form if there is a kernel, else as the dense matrix."""
        rows, columns = self.shape
        tokens, differentiated = x.numel() // columns, x.requires_grad and torch.is_grad_enabled()
        way, dtype = self.way(x.device), x.dtype
        if not way or not 0 < tokens <= FEW or differentiated:
            return linear(x, self.expand(None if differentiated else self._room()).to(dtype), bias)
        narrow = x.is_cuda or dtype == torch.bfloat16 and sparse_cpu.multiplies_bfloat16(way)
        written = dtype if x.is_cuda and bias is None else torch.float32
        y = torch.empty(*x.shape[:-1], rows, dtype=written, device=x.device)
        kernel = sparse_cpu.Kernel(way, self.dtype, self.wbits, tokens, narrow)
        self._run(kernel, sparse_cpu.arrange((x if narrow else x.float()).contiguous(), kernel), y)
        return (y if bias is None else y.add_(bias)).to(dtype)

    def expand(self, out=None):
        """Return the matrix, in `out` if given."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.mask.device) if out is None else out
        if way := self.way(out.device):
            self._run(sparse_cpu.Kernel(way, self.dtype, self.wbits, 0), out, out)
            return out
        return out.copy_(decode(self._buffers, self.description))

    @torch.inference_mode(False)  # of the caller: others use it, too
    def _room(self):
        """Return a buffer of this thread for the matrix, which the next one that is expanded overwrites."""
        numel, key = self.shape.numel(), (self.dtype, self.mask.device)
        rooms = vars(_scratch)
        if key not in rooms or len(rooms[key]) < numel:
            rooms[key] = torch.empty(numel, dtype=self.dtype, device=self.mask.device)
        return rooms[key][:numel].view(self.shape)

    def ways(self):
        """Return the ways in which the CPU can multiply by this matrix, the fastest first."""
        if "group" in self.description["parts"]:  # columns of a group do not lie side by side
            return []
        return sparse_cpu.kinds_for(self.dtype, self.wbits, self.shape[1] // self.groups)

    def way(self, device):
        """Return what a device multiplies by this matrix with: "triton", the CPU's fastest way, or None."""
        if device.type == "cpu":
            return next(iter(self.ways()), None)
        able = device.type == "cuda" and self.dtype != torch.float64
        return "triton" if able and triton_obstacle(device) is None else None

    @property
    def groups(self):
        return self.scale.shape[1] if self.wbits else 1

    def _run(self, kernel, x, y):
        if y.is_cuda:
            from mixgpt.kernels import sparse_cuda as kernels
        else:
            kernels = sparse_cpu
            with torch.inference_mode(False):  # of the caller: it stays
                self._buffers[self.data] = sparse_cpu.padded(self._buffers[self.data])
        tensors = self._buffers | {"data": self._buffers[self.data], "x": x, "y": y}
        if self.wbits:
            tensors["units"] = _units(self.description.get("grid", "uniform"), self.wbits, self.dtype, y.device)
        kernels.launch(kernel, *self.shape, BLOCK, self.groups, tensors)


@functools.cache
def _units(grid, wbits, dtype, device):
    """Return the values of codes in units of the scale, (zeros, codes), rounded to the dtype of the scale."""
    codes = torch.arange(2**wbits, dtype=torch.uint8)
    units = GRIDS[grid].load()(wbits).decode(codes.expand(len(codes), -1), codes[:, None])
    return units.to(dtype).float().repeat(1, -(-16 // len(codes))).to(device)


def _bits(mask, rows, columns):
    """Return how many weights are kept in each block of columns, by rows."""
    step = 1 if columns % 8 else 8  # columns to a number in `counts`
    counts = np.bitwise_count(mask) if step == 8 else np.unpackbits(mask, bitorder="little")
    starts = (columns * np.arange(rows)[:, None] + np.arange(0, columns, BLOCK)) // step
    return np.add.reduceat(counts[:rows * columns // step], starts.ravel(), dtype=np.int64)


class SparseLinear(torch.nn.Module):
    """A linear layer with a `PackedWeight`."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x):
        multiply = self.weight.multiply
        if torch.compiler.is_compiling():  # which cannot look into the kernels
            multiply = torch.compiler.disable(multiply)
        return multiply(x, self.bias)

    def prepared(self, dtype):
        """Return this layer ready for use; one in a dtype if its matrix has no mask, or no kernel on this machine."""
        has_kernel = self.weight.ways() or torch.cuda.is_available()
        if "mask" not in self.weight.description["parts"] or self.weight.dtype == torch.float64 or not has_kernel:
            return self.expanded(dtype)
        self.weight.prepare()
        return self

    def expanded(self, dtype):
        """Return an ordinary linear with the matrix in a dtype."""
        dense = torch.nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        W = decode(dict(self.weight.named_buffers()), self.weight.description)
        dense.weight, dense.bias = torch.nn.Parameter(W.to(dtype)), self.bias
        return dense
