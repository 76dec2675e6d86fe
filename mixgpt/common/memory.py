"""What fits in memory and on disks, and how a step goes on where memory has run out: with less of it."""

import contextlib
import ctypes
import gc
import math
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from mixgpt.common import distributed, errors, program

GROUPS, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # where they are, and which are this process's
LIMITS = {"memory.max": ("anon", "shmem"), "memory.limit_in_bytes": ("total_rss", "total_shmem")}  # versions 2 and 1
USABLE = 0.9  # of the free memory: the rest is lost between tensors, or taken by other programs meanwhile


def free(device: torch.device) -> int:
    """Return the bytes of a device's memory that this process may take; processes share a machine's memory equally."""
    if device.type != "cuda":
        return free_on_host() // program.world("LOCAL_WORLD_SIZE")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for new tensors
    return int(USABLE * (torch.cuda.mem_get_info(device)[0] + cached))


def free_on_host() -> int:
    """Return the bytes of the host's memory that are free for all processes of this machine together."""
    left = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError):  # Linux's control groups limit a container or a batch job
        for line in PROCESS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)  # of version 2 without kinds
            group = GROUPS / ("memory" if kinds else "") / path.strip("/")
            for folder in (group, *group.parents) if kinds in ("", "memory") else ():
                for limit, fields in LIMITS.items():
                    if (file := folder / limit).exists() and (most := file.read_text().strip()) != "max":
                        used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                        # the rest are caches
                        left.append(max(int(most) - sum(int(used.get(field, 0)) for field in fields), 0))
    return int(USABLE * min(left))


def room(path: str | Path) -> tuple[float, bool]:
    """Return the bytes free for files at a path, which need not exist, and whether they are memory, as in a tmpfs."""
    place = next(folder for folder in (Path(path).resolve(), *Path(path).resolve().parents) if folder.exists())
    disks = [disk for disk in psutil.disk_partitions(all=True) if place.is_relative_to(disk.mountpoint)]
    kind = max(disks, key=lambda disk: len(disk.mountpoint)).fstype if disks else ""
    of_disk = math.inf if kind == "ramfs" else shutil.disk_usage(place).free  # a ramfs knows no size
    in_memory = kind in ("tmpfs", "ramfs")
    return min(of_disk, free_on_host()) if in_memory else of_disk, in_memory


@dataclass(frozen=True)
class MemoryPlan:
    """How a step uses the device's memory, from the fastest plan to the most economical one."""

    batch_size: int
    on_host: bool = True  # calibration hidden states
    two_passes: bool = True  # per layer, so that only one batch's activations inside it exist at a time
    two_take_less: bool = True  # memory than one; not in mixtures of experts, as they hold all Hessians of a layer

    def next_cheaper(self) -> tuple[Self, str] | None:
        """Return the next more economical plan and its description, or None."""
        if not self.two_passes and self.two_take_less:
            return replace(self, two_passes=True, on_host=True), (
                "two passes through each layer, as by --no-true-sequential, and hidden states on the host")
        if not self.on_host:
            return replace(self, on_host=True), "hidden states on the host"
        size = self.batch_size // 2
        return (replace(self, batch_size=size), f"batches of {size}") if size else None


class OutOfMemory(Exception):
    """A process has run out of memory, on the host, and all of them know."""


class OutOfGpuMemory(OutOfMemory):
    """A process has run out of a GPU's memory, and all of them know."""


@contextlib.contextmanager
def shared_fate() -> Generator[None]:
    """Raise OutOfMemory in all processes if one runs out of memory in the block, in which none waits for another."""
    failure = cause = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu, cause = _is_of_gpu(error), error
        if not on_gpu and not errors.is_out_of_memory(error):
            raise
        failure = OutOfGpuMemory if on_gpu else OutOfMemory
    failures = distributed.all_gather_object(failure)
    if any(failures):
        raise next(filter(None, failures))("out of memory") from cause


def _is_of_gpu(error: BaseException) -> bool:
    """Return whether an exception, of PyTorch, cuBLAS, cuSOLVER or Triton, says that a GPU's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or errors.is_out_of_memory(error) and any(
        name in str(error) for name in ("CUDA", "CUSOLVER"))


def release() -> None:
    """Let go of memory after an error in which it ran out."""
    gc.collect()  # tensors referenced by the error's frames
    torch.cuda.empty_cache()


def trim() -> None:
    """Give freed memory back to the system, of which glibc keeps pieces smaller than 32 MB for itself."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # Other C libraries have no such function.
        ctypes.CDLL(None).malloc_trim(0)


def retry_with_less_memory(plan: MemoryPlan, step: Callable[[MemoryPlan], Any], again: bool = True) -> Any:
    """Return step(plan), retrying with a more economical plan each time the GPU runs out of memory.

    again: whether the step can be restarted. Several processes go on only if all know that one ran out; then
    OutOfGpuMemory is raised in the end, else InputError.
    """
    while True:
        try:
            return step(plan)
        except (RuntimeError, OutOfGpuMemory) as error:
            shared = isinstance(error, OutOfGpuMemory)
            if not shared and not _is_of_gpu(error):
                raise
            cheaper = plan.next_cheaper()
            if not (cheaper and again and (shared or distributed.world() == 1)):
                if shared:
                    raise
                remedy = "--batch-size or --seqlen, or give --no-true-sequential" if cheaper else "--seqlen"
                raise errors.InputError(f"--batch-size {plan.batch_size}: out of GPU memory; lower {remedy}") from error
        plan, change = cheaper
        release()
        print(f"warning  out of GPU memory: continuing with {change}", flush=True)
