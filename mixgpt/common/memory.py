"""What fits in memory, and how a step goes on where memory has run out: with less of it."""

import contextlib
import gc
import math
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from mixgpt.common import distributed, errors

GROUPS, PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # where they are, and which are this process's
USABLE = 0.9  # of the free memory: the rest is lost between tensors, or taken by other programs meanwhile


def free(device):
    """Return the bytes of a device's memory that new tensors of this process may take.

    On a GPU that includes what PyTorch's allocator has cached. Processes share the host's memory in equal parts.
    """
    if device.type == "cuda":
        nbytes = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                  - torch.cuda.memory_allocated(device))
    else:
        nbytes = min(psutil.virtual_memory().available, *_left_by_groups()) / distributed.world()
    return int(USABLE * nbytes)


def _left_by_groups():
    """Return inf, and the bytes that Linux's control groups (version 2) leave to this container or batch job."""
    left = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        group = GROUPS / PROCESS.read_text().partition("0::/")[2].strip()
        for folder in (group, *group.parents):
            if (limit := folder / "memory.max").exists() and (most := limit.read_text().strip()) != "max":
                used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(max(int(most) - int(used["anon"]) - int(used["shmem"]), 0))  # the rest are caches
    return left


@dataclass(frozen=True)
class MemoryPlan:
    """How a step uses the device's memory, from the fastest plan to the most economical one."""

    batch_size: int
    on_host: bool = True  # calibration hidden states
    two_passes: bool = True  # per layer, so that only one batch's activations inside it exist at a time
    two_take_less: bool = True  # memory than one; not in mixtures of experts, as they hold all Hessians of a layer

    def next_cheaper(self):
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
def shared_fate():
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


def _is_of_gpu(error):
    """Return whether an exception, of PyTorch, cuBLAS, cuSOLVER or Triton, says that a GPU's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or errors.is_out_of_memory(error) and any(
        name in str(error) for name in ("CUDA", "CUSOLVER"))


def retry_with_less_memory(plan, step, again=True):
    """Return step(plan), retrying with a more economical plan each time the GPU runs out of memory.

    again: whether the step can be restarted. Several processes go on only if all know that one ran out. Raises
    InputError in the end, or OutOfGpuMemory if all know.
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
        gc.collect()  # tensors referenced by the error's frames
        torch.cuda.empty_cache()
        print(f"warning  out of GPU memory: continuing with {change}", flush=True)
