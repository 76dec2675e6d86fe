"""Linear layers whose weights stay in the encoding of `packing`."""

import functools
import math
import threading
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mixgpt.checkpoints.packing import decode, grid_of
from mixgpt.common.choices import GRIDS
from mixgpt.kernels import sparse_cpu
from mixgpt.kernels.columns import triton_obstacle

DTYPES = {"mask": torch.uint8, "codes": torch.uint8, "zero": torch.uint8, "group": torch.int32}  # Parts have these.
MOST = sparse_cpu.TILES * sparse_cpu.TILE  # More tokens are multiplied by the expanded matrix.
FEW = 8  # More are multiplied in the matrix units of the CPU, or without these by the expanded matrix.
_scratch = threading.local()


class PackedWeight(nn.Module):
    """A matrix (out, in) as a mask and values or codes: buffers under the names that its parts have in a file.

    description: that of `packing.encode`, which must have a mask. `prepare` comes between loading and use. dtype: of
    the weights in memory, if it is smaller than that in the file.
    """

    def __init__(self, description: dict[str, Any], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        dtype = min(getattr(torch, description["dtype"]), dtype, key=lambda dtype: dtype.itemsize)
        self.description, self.shape = description, torch.Size(description["shape"])
        self.wbits, self.data = description.get("wbits", 0), "codes" if "wbits" in description else "values"
        for part in description["parts"]:
            self.register_buffer(part, torch.empty(0, dtype=DTYPES.get(part, dtype)))
        self.register_load_state_dict_post_hook(PackedWeight.prepare)

    @classmethod
    def of(cls, parts: dict[str, Tensor], description: dict[str, Any]) -> Self:
        """Return the matrix that `packing.encode` has encoded with a mask, ready for products."""
        weight = cls(description)
        for name, part in parts.items():
            setattr(weight, name, part)
        weight.prepare()
        return weight

    def prepare(self, _: Any = None) -> None:
        """Check the loaded parts, and add what products need. Raises ValueError if the parts do not fit each other."""
        (rows, columns), wbits = self.shape, self.wbits
        self._check("mask", rows * columns / 8)
        mask, step = self.mask.cpu().numpy(), 1 if columns % 8 else 8  # A count is that of so many columns.
        counts = np.bitwise_count(mask) if step == 8 else np.unpackbits(mask, bitorder="little")
        starts = (columns * np.arange(rows)[:, None] + np.arange(0, columns, sparse_cpu.BLOCK)) // step
        sizes = np.add.reduceat(counts[:rows * columns // step], starts.ravel(), dtype=np.int64)  # They are per block.
        offsets = torch.from_numpy((sizes.cumsum() - sizes).astype(np.int32)).view(rows, -1)
        self.register_buffer("offsets", offsets.to(self.mask.device), persistent=False)
        self._check(self.data, sizes.sum() * (wbits / 8 or 1))
        if not wbits:
            return
        if wbits not in range(1, 9):
            raise ValueError(f"its codes have {wbits} bits")
        self._check("scale", rows * self.groups)
        if "zero" in self._buffers and self.zero.dim() == 1:  # It is packed.
            self._check("zero", rows * self.groups * wbits / 8)
        grid = grid_of(self._buffers, self.description)
        self.register_buffer("zero", grid.zero)
        self.register_buffer("group", grid.group)
        self._check("zero", rows * self.groups)
        self._check("group", columns)
        if int(self.zero.max()) >> wbits or not 0 <= int(self.group.min()) <= int(self.group.max()) < self.groups:
            raise ValueError("its zeros or groups are out of range")

    def _check(self, part: str, count: float) -> None:
        """Raise ValueError if a part does not hold so many numbers, rounded up, of its dtype."""
        tensor, count = getattr(self, part), math.ceil(count)
        if tensor.numel() != count or tensor.dtype != DTYPES.get(part, tensor.dtype) or not tensor.is_contiguous():
            raise ValueError(f"its {part} has {tensor.numel()} numbers in {tensor.dtype}, must have {count}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which `.to(dtype)` changes."""
        return (self.scale if self.wbits else self.values).dtype

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + bias: for few tokens from the packed form if there is a kernel, else as the dense matrix."""
        rows, columns = self.shape
        tokens, differentiated = x.numel() // columns, x.requires_grad and torch.is_grad_enabled()
        dtype, kernel = x.dtype, None
        if tokens <= MOST and not differentiated and (kind := self.kind(x.device)):
            kernel = _kernel(kind, self.dtype, self.wbits, rows, tokens, dtype, bias is not None)
        if kernel is None:
            return linear(x, self.expand(None if differentiated else self._room()).to(dtype), bias)
        arranged = sparse_cpu.arrange((x if kernel.bfloat16 else x.float()).contiguous(), kernel)
        y = torch.empty(*x.shape[:-1], rows, dtype=kernel.writes, device=x.device)
        self._run(kernel, arranged, y)
        return (y if bias is None else y.add_(bias)).to(dtype)

    def expand(self, out: Tensor | None = None) -> Tensor:
        """Return the matrix, in `out` if given."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.mask.device) if out is None else out
        if kind := self.kind(out.device):
            self._run(sparse_cpu.Kernel(kind, self.dtype, self.wbits, 0), out, out)
            return out
        return out.copy_(decode(self._buffers, self.description))

    @torch.inference_mode(False)  # The buffer outlives the caller's inference mode.
    def _room(self) -> Tensor:
        """Return a buffer of this thread for the matrix, which the next one that is expanded overwrites."""
        numel, key = self.shape.numel(), (self.dtype, self.mask.device)
        rooms: dict[Any, Tensor] = vars(_scratch)
        if key not in rooms or len(rooms[key]) < numel:
            rooms[key] = torch.empty(numel, dtype=self.dtype, device=self.mask.device)
        return rooms[key][:numel].view(self.shape)

    def kinds(self) -> list[str]:
        """Return the kinds of kernels by which the CPU can multiply by this matrix, the fastest first."""
        if "group" in self.description["parts"]:  # The columns of a group do not lie side by side.
            return []
        return sparse_cpu.kinds_for(self.dtype, self.wbits, self.shape[1] // self.groups)

    def kind(self, device: torch.device) -> str | None:
        """Return the kind of the kernels that a device multiplies with: "triton", the CPU's fastest, or None."""
        if device.type == "cpu":
            return next(iter(self.kinds()), None)
        able = device.type == "cuda" and self.dtype != torch.float64
        return "triton" if able and triton_obstacle(device) is None else None

    @property
    def groups(self) -> int:
        """The groups of columns, each with a scale of its own in every row."""
        return self.scale.shape[1] if self.wbits else 1

    def _run(self, kernel: sparse_cpu.Kernel, x: Tensor, y: Tensor) -> None:
        """Launch a kernel that reads x, arranged for it, and writes y."""
        if y.is_cuda:
            from mixgpt.kernels import sparse_cuda as kernels
        else:
            kernels = sparse_cpu
            if not sparse_cpu.has_room(data := self._buffers[self.data]):
                with torch.inference_mode(False):  # The padded part outlives the caller's inference mode.
                    self._buffers[self.data] = nn.functional.pad(data, (0, sparse_cpu.REACH))[:len(data)]
        tensors = self._buffers | {"data": self._buffers[self.data], "x": x, "y": y}
        if self.wbits:
            tensors["units"] = _units(self.description.get("grid", "uniform"), self.wbits, self.dtype, y.device)
        kernels.launch(kernel, *self.shape, self.groups, tensors)


@functools.cache
def _kernel(kind: str, dtype: torch.dtype, wbits: int, rows: int, tokens: int, x_dtype: torch.dtype, biased: bool
            ) -> sparse_cpu.Kernel | None:
    """Return the kernel of a kind that multiplies x by a packed matrix, None if there is none for so many tokens."""
    on_gpu = kind == "triton"
    narrow = on_gpu or x_dtype == torch.bfloat16 and sparse_cpu.multiplies_bfloat16(kind)
    writes = torch.float32 if biased or x_dtype.itemsize > 4 else x_dtype  # A sum with a bias is rounded once.
    kernel = sparse_cpu.Kernel(kind, dtype, wbits, tokens, narrow, writes)
    if tokens > 1 and rows >= sparse_cpu.TILE and narrow and not on_gpu and sparse_cpu.has_matrix_units():
        return kernel._replace(tokens=0, tiles=-(-tokens // sparse_cpu.TILE))
    return kernel if 0 < tokens <= FEW else None


@functools.cache
def _units(grid: str, wbits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the values of codes in units of the scale, (zeros, codes), rounded to the dtype of the scale."""
    codes = torch.arange(2**wbits, dtype=torch.uint8)
    units = GRIDS[grid].load()(wbits).decode(codes.expand(len(codes), -1), codes[:, None])
    return units.to(dtype).float().repeat(1, -(-16 // len(codes))).to(device)


class SparseLinear(nn.Module):
    """A linear layer with a `PackedWeight`."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias, for x (…, in)."""
        multiply = self.weight.multiply
        if torch.compiler.is_compiling():  # The compiler cannot look into the kernels.
            multiply = torch.compiler.disable(multiply)
        return multiply(x, self.bias)

    def prepared(self, dtype: torch.dtype) -> nn.Module:
        """Return this layer ready for use; one in a dtype if its matrix has no mask, or no kernel on this machine."""
        has_kernel = self.weight.kinds() or torch.cuda.is_available()
        if "mask" not in self.weight.description["parts"] or self.weight.dtype == torch.float64 or not has_kernel:
            return self.expanded(dtype)
        self.weight.prepare()
        return self

    def expanded(self, dtype: torch.dtype) -> nn.Linear:
        """Return an ordinary linear with the matrix in a dtype."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        W = decode(dict(self.weight.named_buffers()), self.weight.description)
        dense.weight, dense.bias = nn.Parameter(W.to(dtype)), self.bias
        return dense
