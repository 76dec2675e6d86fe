"""Time per part of a run, and peak memory."""

import contextlib
import resource
import sys
import time
from collections import defaultdict, deque

import torch


class Clock:
    """Add up time per part of the run; a nested part is not counted in the outer one.

    On a GPU it is the time between events on the stream that the part's kernels are launched on, so that the host does
    not wait for them; elsewhere wall time. What a GPU still works on belongs to the part that launched it.
    """

    def __init__(self, device):
        self.device = device
        self._seconds = defaultdict(float)
        self._current = None  # name of the part that runs
        self._changes = deque()  # (name of the part that begins, or None; its time or event), not added up yet

    @property
    def seconds(self):
        """Seconds by name of a part. On a GPU this waits until the parts that have ended on the host end there."""
        if len(self._changes) > 1 and self.device.type == "cuda":
            self._changes[-1][1].synchronize()
        self._add_up()
        return self._seconds

    @contextlib.contextmanager
    def part(self, name):
        """Count the time of the block, even if an error ends it."""
        outer = self._current
        self._change(name)
        try:
            yield
        finally:
            self._change(outer)

    def _change(self, name):
        """Count the time from now on for part `name`; None: for none."""
        self._current = name
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
        else:
            now = time.perf_counter()
        self._changes.append((name, now))
        self._add_up()

    def _add_up(self):
        """Add up the parts that have ended on the device, in order, and forget their events."""
        cuda = self.device.type == "cuda"
        while len(self._changes) > 1 and (not cuda or self._changes[1][1].query()):
            name, start = self._changes.popleft()
            end = self._changes[0][1]
            if name is not None:
                self._seconds[name] += start.elapsed_time(end) / 1000 if cuda else end - start


def peak_memory(device):
    """Return the peak memory so far in bytes: {"host": …} and on CUDA {"device": …}."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
