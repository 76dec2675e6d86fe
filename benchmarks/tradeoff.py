"""Draw the README's table of results: perplexity against sparsity, and how much of the gap to dense methods close.

python benchmarks/tradeoff.py README.md images/tradeoff.png
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter
from scores import closed

from mixgpt.app.plots import bytes_of

TITLE = "SmolLM2-135M-Instruct, WikiText-2"
REFERENCE = "SparseGPT"  # the method from which the gap is measured
DRAWN = {"magnitude": ("0.5", "v"), REFERENCE: ("C2", "D"), "MixGPT": ("C3", "^"), "best": ("C4", "o")}
HIGHEST = 1000  # perplexity; above it the curves of all other methods would be pushed together


def table_of(markdown):
    """Return the dense perplexity and {method: {column: perplexity}} on WikiText-2 from the table of results.

    Cells read "WikiText-2 / C4"; those without numbers are left out.
    """
    table = markdown[markdown.index("| dense "):].partition("\n\n")[0].splitlines()
    (head, *columns), _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table]
    found = {method: {column: float(cell.split(" / ")[0].replace(",", "")) for column, cell in
                      zip(columns, cells, strict=True) if " / " in cell} for method, *cells in rows}
    return float(re.findall(r"\d+\.\d+", head)[0]), found


def draw_perplexity(axis, dense, table):
    """Draw perplexity against the plain sparsities of the table."""
    for method, (colour, marker) in DRAWN.items():
        points = [(int(column[:-1]), value) for column, value in table[method].items()
                  if re.fullmatch(r"\d+%", column)]
        axis.plot(*zip(*points, strict=True), label=method, color=colour, marker=marker)
    axis.axhline(dense, label="dense", color="black", linestyle="--", linewidth=1)
    axis.set(title=TITLE, xlabel="weights pruned", ylabel="perplexity", yscale="log", ylim=(0.85 * dense, HIGHEST))
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axis.set_xticks([sparsity for sparsity, _ in points])
    axis.set_yticks(ticks := [30, 50, 100, 200, 500, 1000], map(str, ticks))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend()


def draw_gap(axis, dense, table):
    """Draw as bars the share of the gap in log-perplexity between the reference and the dense model that is closed."""
    methods, columns = ("MixGPT", "best"), list(table[REFERENCE])
    for number, method in enumerate(methods):
        shares = [100 * closed(table[method][column], table[REFERENCE][column], dense) for column in columns]
        bars = axis.bar([place + 0.4 * number for place in range(len(columns))], shares, 0.38, label=method,
                        color=DRAWN[method][0])
        axis.bar_label(bars, [f"{share:.0f}%" for share in shares], padding=2, fontsize=9)
    axis.set_xticks([place + 0.2 for place in range(len(columns))], columns)
    axis.set(title=f"Gap from {REFERENCE} to dense that is closed", ylabel="share in log-perplexity", ylim=(0, 100))
    axis.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()


def main(argv=None):
    source, picture = map(Path, sys.argv[1:] if argv is None else argv)
    dense, table = table_of(source.read_text())
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for draw, axis in zip((draw_perplexity, draw_gap), figure.subplots(1, 2), strict=True):
        draw(axis, dense, table)
    picture.write_bytes(bytes_of(figure, picture.suffix))
    return 0


if __name__ == "__main__":
    sys.exit(main())
