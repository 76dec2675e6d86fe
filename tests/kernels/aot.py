"""Compile the Triton kernels ahead of time, as no GPU is needed for it, and print what they take as JSON.

python tests/kernels/aot.py 80 90        {"sm_80 2:4": {"registers": 160, "stack": 0, "spills": 0, "shuffles": 48}, …}

A kernel is given the arguments that `columns_cuda.walk_columns` would launch it with,
specialised as Triton specialises them: integers that are 1 are constants, those that 16 divides are known to be so.
"""

import json
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

from mixgpt.kernels import columns_cuda

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64"}
BF16, F16 = torch.bfloat16, torch.float16
# name: rows, columns, m of n:m, dtype of the grid or None, whether U is row-major
KERNELS = {"50%": (4096, 128, 0, None, False), "50%, U by rows": (4096, 128, 0, None, True),
           "4:8": (4096, 128, 8, None, False), "50% + grid, float16": (4096, 128, 0, F16, False),
           "2:4 + grid, bfloat16": (4096, 128, 4, BF16, False)}


def launches():
    """Return {name: (kernel, arguments, options)} of all kernels, as ranges of 128 columns out of 512 launch them."""
    found = {}
    for name, (rows, columns, m, dtype, by_rows) in KERNELS.items():
        W, U = torch.zeros(512, rows)[:columns], torch.zeros(512, 512)
        U = (U if by_rows else U.t())[:columns, :columns]
        grid = dtype and (torch.ones(rows), torch.zeros(rows), torch.ones(rows), dtype)
        choice = (m, [(slice(0, rows), m // 2)], torch.ones(columns)) if m else None
        with mock.patch.object(columns_cuda, "_walk_rows", mock.MagicMock()) as recorder:
            columns_cuda.walk_columns(W, torch.zeros_like(W), U, W > 0, choice, grid)
        found[name] = (columns_cuda._walk_rows, *recorder.__getitem__.return_value.call_args)
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


def resources(cubin):
    """Return registers, bytes of stack and of spilled registers, as NVIDIA's own tool reads them off."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True,
                              check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "spills": found["LOCAL"]}


def main(capabilities):
    results = {}
    for capability in capabilities:
        for name, (kernel, args, options) in launches().items():
            rest = {key: value for key, value in options.items() if not key.isupper()}
            compiled = triton.compile(source(kernel, args, options), target=GPUTarget("cuda", int(capability), 32),
                                      options=rest)
            results[f"sm_{capability} {name}"] = resources(compiled.asm["cubin"]) | {
                "shuffles": compiled.asm["ptx"].count("shfl.sync")}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
