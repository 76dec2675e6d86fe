"""Wall time per part of a run, and peak memory."""

import contextlib
import resource
import sys
import time
from collections import defaultdict

import torch


class Clock:
    """Add up wall time per part of the run; a nested part is not counted in the outer one."""

    def __init__(self, device):
        self.device = device
        self.seconds = defaultdict(float)

    def now(self):
        """Return time.perf_counter() after all pending work on the device."""
        if self.device.type == "cuda":  # launches are asynchronous
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def part(self, name):
        start, others = self.now(), sum(self.seconds.values())
        yield
        self.seconds[name] += self.now() - start - (sum(self.seconds.values()) - others)


def peak_memory(device):
    """Return the peak memory so far in bytes: {"host": …} and on CUDA {"device": …}."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
