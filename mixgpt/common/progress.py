"""Show the progress of long loops, as a bar in a terminal and elsewhere in a line now and then; and lay out tables."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

INTERVAL = 30  # seconds between two lines, and before the first one
LINE = "{desc}: {unit} {n_fmt} of {total_fmt}, {elapsed}, about {remaining} left ({eta:%H:%M})"


class Lines(tqdm):
    """Write lines such as `SparseGPT: layer 12 of 32, 03:04, about 05:10 left (22:41)`, as a log cannot redraw bars."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line if a step has ended since the last one; tqdm calls this to redraw or remove the bar."""
        if msg is None and self.n > self.last_print_n:
            self.fp.write(f"{self}\n")
            self.fp.flush()


def bar(iterable: Iterable | None = None, *, title: str, unit: str = "layer", **options: Any) -> tqdm:
    """Return a tqdm: a bar in a terminal or a notebook, else `Lines`. options: those of tqdm."""
    stream = getattr(sys.stderr, "behind", sys.stderr)  # `hub.silenced` hides stderr from libraries alone
    options |= {"desc": title, "unit": unit, "file": stream} | ({} if stream else {"disable": True})
    if stream and (stream.isatty() or type(stream).__module__.startswith("ipykernel.")):
        return tqdm(iterable, **options)
    return Lines(iterable, **options | {"mininterval": INTERVAL, "delay": INTERVAL, "miniters": 1, "smoothing": 0,
                                        "leave": False, "bar_format": LINE})


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Lay out rows of text under a header, the first column left-aligned, the others right-aligned."""
    widths, lines = [max(map(len, column)) for column in zip(header, *rows, strict=True)], []
    for cells in (header, ["-" * width for width in widths], *rows):
        _, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([cells[0].ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)
