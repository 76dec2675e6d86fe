"""Compile the Triton kernels ahead of time, as no GPU is needed for it: python tests/kernels/aot.py 80 90

They are given the arguments with which `columns_cuda.walk_columns` and `sparse_cuda.launch` launch them, specialised
as Triton specialises them: integers that are 1 are constants, those that 16 divides are known to be so.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # of tests that run the kernel on the CPU
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixgpt.kernels import columns_cuda, sparse_cuda
from mixgpt.kernels.rounding import Levels, UniformGrid
from mixgpt.kernels.sparse_cpu import Kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
            torch.uint8: "*u8", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# rows, columns, m of n:m, dtype of the grid, its levels if they are uneven or None, whether U is row-major
KERNELS = [(4096, 128, 0, None, True), (4096, 128, 8, None, False), (4096, 128, 0, torch.float16, False),
           (4096, 128, 4, torch.bfloat16, False), (4096, 128, 0, 16, False), (4096, 128, 4, 16, False)]
# dtype, bits of codes or 0, tokens or 0 to expand
PACKED = [(torch.bfloat16, 0, 1), (torch.float16, 0, 8), (torch.bfloat16, 4, 1), (torch.bfloat16, 3, 0)]


def launches():
    """Return (kernel, arguments, options) of all kernels, as ranges of 128 columns out of 512 launch them."""
    found = []
    for rows, columns, m, kind, by_rows in KERNELS:
        W, U = torch.zeros(512, rows)[:columns], torch.zeros(512, 512)
        U = (U if by_rows else U.t())[:columns, :columns]
        grid = UniformGrid(torch.ones(rows), torch.zeros(rows), torch.ones(rows), kind)
        grid = Levels.between(torch.zeros(kind, rows)) if isinstance(kind, int) else kind and grid
        choice = (m, torch.full((rows,), m // 2, dtype=torch.int32), torch.ones(columns)) if m else None
        with mock.patch.object(columns_cuda, "_walk_rows", mock.MagicMock()) as recorder:
            columns_cuda.walk_columns(W, torch.zeros_like(W), U, W > 0, choice, grid)
        found.append((columns_cuda._walk_rows, *recorder.__getitem__.return_value.call_args))
    for dtype, wbits, tokens in PACKED:
        kinds = {"mask": torch.uint8, "data": torch.uint8 if wbits else dtype, "offsets": torch.int32, "x": dtype,
                 "y": dtype}
        if wbits:
            kinds |= {"units": torch.float32, "zero": torch.uint8, "scale": dtype, "group": torch.int32}
        with mock.patch.object(sparse_cuda, "_multiply", mock.MagicMock()) as recorder:
            sparse_cuda.launch(Kernel("", dtype, wbits, tokens), 4096, 11008, 86,
                            {part: torch.zeros(1, dtype=kind) for part, kind in kinds.items()})
        found.append((sparse_cuda._multiply, *recorder.__getitem__.return_value.call_args))
    return found


def source(kernel, args, options):
    """Return a kernel as Triton would specialise it for these arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: options[name] for name in kernel.arg_names if name in options}
    signature, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(values.items()):
        if torch.is_tensor(value):
            signature[name] = POINTERS[value.dtype]
        elif name in options or value in (None, 1):
            signature[name], constants[place,] = "constexpr", value
        else:
            signature[name] = "i32"
        if signature[name] != "constexpr" and (torch.is_tensor(value) or value % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def spilled(cubin):
    """Return the bytes of stack and of registers in memory, as NVIDIA's own tool reads them off."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True,
                              check=True).stdout
    return [int(nbytes) for nbytes in re.findall(r"(?:STACK|LOCAL):(\d+)", text)]


if __name__ == "__main__":
    for kernel, args, options in launches():
        for capability in sys.argv[1:]:
            compiled = triton.compile(source(kernel, args, options), target=GPUTarget("cuda", int(capability), 32),
                                      options={key: value for key, value in options.items() if not key.isupper()})
            if spilled(compiled.asm["cubin"]) != [0, 0]:
                sys.exit(f"sm_{capability} {kernel.__name__} {options}: spills registers")
