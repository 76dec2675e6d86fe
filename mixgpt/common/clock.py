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
        self._inside = None  # spans of the parts nested in the current one, None outside of all
        self._ended = deque()  # (name, span, spans nested in it), not added up yet

    @property
    def seconds(self):
        """Seconds by name of a part. On a GPU this waits until the parts that have ended on the host end there too."""
        if self._ended and self.device.type == "cuda":
            (_, (_, end), _) = self._ended[-1]
            end.synchronize()
        self._add_up()
        return self._seconds

    @contextlib.contextmanager
    def part(self, name):
        """Count the time of the block, even if an error ends it."""
        outer, self._inside, start = self._inside, [], self._now()
        try:
            yield
        finally:
            span, inside = (start, self._now()), self._inside
            self._inside = outer
            if outer is not None:
                outer.append(span)
            self._ended.append((name, span, inside))
            self._add_up()

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _add_up(self):
        """Add up the parts that have ended on the device, in order, and forget their events."""
        while self._ended:
            name, span, inside = self._ended[0]
            if self.device.type == "cuda" and not span[1].query():
                return
            self._seconds[name] += self._length(span) - sum(map(self._length, inside))
            self._ended.popleft()

    def _length(self, span):
        start, end = span
        return start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start


def peak_memory(device):
    """Return the peak memory so far in bytes: {"host": …} and on CUDA {"device": …}."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
