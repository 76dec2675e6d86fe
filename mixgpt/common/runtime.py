"""Devices, dtypes, sequence lengths, random generators, time and peak memory of a run."""

import contextlib
import itertools
import os
import platform
import random
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig

from mixgpt.common import distributed, program
from mixgpt.common.errors import InputError

DEFAULT_SEQLEN = 2048
KEPT = 10_000  # moments of a `Clock` that are not added up yet; a mixture of experts has millions


def choose_device(name: str | torch.device | None) -> torch.device:
    """Return the device of this process: with torchrun, the GPU of its local rank."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    name = str(default if name is None else name)  # from Python also a torch.device
    if name.startswith("cuda:") and program.world() > 1:
        raise InputError(f"--device {name}: torchrun gives each process a GPU of its own; needs cuda or cpu")
    if name == "cuda" and program.world() > 1:
        name = f"cuda:{program.rank('LOCAL_RANK')}"
    if not re.fullmatch(r"cpu|cuda(:(\d|[1-9]\d))?", name):
        raise InputError(f"--device {name}: must be cpu, cuda or cuda:N")
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"--device {name}: there are {count} CUDA devices here" + "; use --device cpu" * (not count))
    return device


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return a model's context length in tokens, None if unlimited."""
    return getattr(config, "max_position_embeddings", None) or getattr(config, "model_max_length", None)


def attention_heads(config: PreTrainedConfig) -> int:
    """Return the number of attention heads of the layer with the most, 0 without attention."""
    return max(getattr(layer, "num_attention_heads", 0) for layer in config.per_layer_config)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions that multiply bfloat16 matrices, and oneDNN is allowed to use them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # not a T4, of which PyTorch says so, too
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return torch.cpu._is_avx512_bf16_supported() and limit not in ("AVX512_CORE", "AVX512_CORE_VNNI")


def choose_dtype(name: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype | str:
    """Return the dtype of the weights in memory, "auto" for the stored one; but float32 if that is faster."""
    if name != "auto":
        return getattr(torch, name)
    stored = str(config.dtype).removeprefix("torch.")
    if stored == "float16" and device.type == "cpu" or stored == "bfloat16" and not multiplies_bfloat16(device):
        return torch.float32  # float16 overflows on a CPU as well
    return "auto"


def repeatable_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which gradients of PyTorch's attention are the same each time; on GPUs the default is not."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def isolated(device: torch.device, quiet: bool) -> Generator[None]:
    """Within the block, PyTorch has its own defaults, and only the first process prints; quiet: on stdout alone."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        if program.rank():
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        if program.rank() or quiet:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":  # the context is felt in every call
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(float32_products("ieee", torch.backends.cuda, torch.backends.mkldnn))
        stack.enter_context(distributed.joined(device))
        yield


@contextlib.contextmanager
def float32_products(precision: str, *backends: Any) -> Generator[None]:
    """Within the block, let backends of PyTorch ≥ 2.9 multiply float32 matrices in a precision, ieee or bf16."""
    with contextlib.ExitStack() as stack:
        for backend in backends:
            if hasattr(kind := getattr(backend, "matmul", None), "fp32_precision"):
                stack.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
                kind.fp32_precision = precision
        yield


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32, or in float64 if that is its dtype: enough for sums of squares of one batch."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def seeded(*key: object, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator seeded by all of `key`."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


class Clock:
    """Add up time per part of the run, on a GPU between events on its stream; a nested part is not in the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._changes = [self._change(None)]  # not added up yet

    def seconds(self) -> dict[str, float]:
        """Return {name of a part: its seconds so far}. On a GPU this waits for its work so far."""
        if self.device.type == "cuda":
            self._changes[-1][1].synchronize()
        for (name, start), (_, end) in itertools.pairwise(self._changes):
            if name is not None:
                self._seconds[name] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        del self._changes[:-1]
        return dict(self._seconds)

    @contextlib.contextmanager
    def part(self, name: str) -> Generator[None]:
        """Count the time of the block, even if an error ends it."""
        outer = self._changes[-1][0]
        self._changes.append(self._change(name))
        try:
            yield
        finally:
            self._changes.append(self._change(outer))
            if len(self._changes) > KEPT:
                self.seconds()  # adds them up

    def _change(self, name: str | None) -> tuple[str | None, Any]:
        """Return the name of the part that begins, None for none, and its time or event."""
        if self.device.type != "cuda":
            return name, time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # the host does not wait for it
        return name, event


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory so far in bytes: {"host": …} and on CUDA {"device": …}."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
