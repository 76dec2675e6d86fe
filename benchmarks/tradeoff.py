"""Draw perplexity against sparsity by method: python benchmarks/tradeoff.py README.md images/tradeoff.png"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mixgpt.app.plots import draw_tradeoff

MODEL, TEXTS = "SmolLM2-135M-Instruct", ("WikiText-2", "C4")
HIGHEST = 1000  # perplexity; the one point above it (Wanda at 70%) would push the other curves together


def panels(markdown):
    """Return what `draw_tradeoff` takes, from the table of results, whose header starts with the dense perplexities.

    Cells read "WikiText-2 / C4". Columns other than a plain sparsity (2:4, 4 bit) are left out.
    """
    table = markdown[markdown.index("| dense "):].partition("\n\n")[0].splitlines()
    (head, *columns), _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table]
    result = {(MODEL, text): (float(dense), {method: [] for method, *_ in rows})
              for text, dense in zip(TEXTS, re.findall(r"\d+\.\d+", head), strict=True)}
    for method, *cells in rows:
        for column, cell in zip(columns, cells, strict=True):
            if re.fullmatch(r"\d+%", column):
                for (_, series), value in zip(result.values(), map(float, cell.split(" / ")), strict=True):
                    series[method] += [(float(column[:-1]) / 100, value, value, value)] if value <= HIGHEST else []
    return result


def main(argv=None):
    source, picture = map(Path, sys.argv[1:] if argv is None else argv)
    picture.write_bytes(draw_tradeoff(panels(source.read_text()), picture.suffix))
    return 0


if __name__ == "__main__":
    sys.exit(main())
