"""Show the progress of long loops: a bar in a terminal, elsewhere a line now and then."""

import contextlib
import sys
from contextvars import ContextVar

from tqdm import tqdm

from mixgpt.common import distributed

INTERVAL = 30  # seconds between two lines, and before the first one

_stream = ContextVar("stream", default=None)  # where progress goes; None: sys.stderr
_silent = ContextVar("silent", default=False)


class Lines(tqdm):
    """Write lines such as `SparseGPT  layer 12 of 32, 184 s, about 310 s left (22:41)`, for logs and notebooks.

    A line is due INTERVAL seconds after the previous one, and is written when the next step, or part of a step, is
    finished. The estimate uses the mean of all finished steps; that of recent ones jumps between lines.
    """

    monitor_interval = 0  # no redrawing thread

    def __init__(self, *arguments, **options):
        self._last_line = self._last_step = 0.0  # seconds from the start
        super().__init__(*arguments, **options | {"leave": False, "mininterval": 0, "miniters": 1})

    def update(self, n=1):
        """Record the time when a step is finished."""
        if not self.disable:
            self._last_step = self.format_dict["elapsed"]
        return super().update(n)

    def display(self, msg=None, pos=None):
        """Write a line if one is due; tqdm calls this to redraw the bar."""
        elapsed = self.format_dict["elapsed"]
        if msg is not None or elapsed == 0 or elapsed - self._last_line < INTERVAL:
            return False
        self._last_line = elapsed
        line = "{desc}  {unit} {n_fmt} of {total_fmt}, {elapsed_s:.0f} s"
        facts = self.format_dict | {"prefix": self.desc.removesuffix(": "), "ncols": None}
        if self.n > self.initial:
            line += ", about {remaining_s:.0f} s left ({eta:%H:%M})"
            facts["rate"] = (self.n - self.initial) / max(self._last_step, 1e-9)
        facts["bar_format"] = line
        self.fp.write(self.format_meter(**facts) + "\n")
        self.fp.flush()
        return True

    def clear(self, nolock=False):
        """Leave lines in place; tqdm calls this to make room for other output."""


def bar(iterable=None, *, title, unit="layer", **options):
    """Return a tqdm over an iterable, or with a given total: a bar in a terminal, else `Lines`.

    Only the first of several processes shows anything. options: those of tqdm.
    """
    stream = _stream.get() or sys.stderr
    if _silent.get() or distributed.rank():
        options["disable"] = True
    kind = tqdm if stream.isatty() else Lines
    return kind(iterable, desc=title, unit=unit, file=stream, **options)


@contextlib.contextmanager
def silent():
    """Show no progress within the block."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


@contextlib.contextmanager
def shown_on(stream):
    """Show progress on a stream within the block, even if sys.stderr is redirected."""
    token = _stream.set(stream)
    try:
        yield
    finally:
        _stream.reset(token)
