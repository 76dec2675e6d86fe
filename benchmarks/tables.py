"""Write the cells that `accuracy.py` has measured into the tables of the pages, and draw them. A file for each model.

python benchmarks/tables.py docs/accuracy/SmolLM2-135M-Instruct.json docs/accuracy/Gemma-3-270M.json

A table NAME stands in README.md or docs/results.md between the lines <!-- NAME --> and <!-- end of NAME -->.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
from scores import closed, table_of_markdown

from mixgpt.app.plots import draw_tradeoff

PAGES = "README.md", "docs/results.md"
PICTURE = "images/tradeoff.png"
METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "owl": "OWL", "owl-wanda": "OWL with Wanda's mask",
           "sparsegpt": "SparseGPT", "sparsegpt-72": "SparseGPT, 72 sequences", "mixgpt": "MixGPT", "best": "best"}
EFFORTS = "0.3", "3", "10", "30"  # of best, beside 1
REFERENCE, *BETTER = DRAWN = "sparsegpt", "mixgpt", "best"  # whose gap the others close a part of
COST = "50%"  # the target of which time and memory are given


class Measured:
    """The cells of a model, the dense one's first."""

    def __init__(self, name, cells):
        self.name, self.texts = name, list(cells[0]["figures"])
        self.cells = pd.DataFrame([cell | cell["figures"] for cell in cells]).drop(columns="figures")
        self.dense = self.cells[self.cells["method"] == "dense"].iloc[0]
        self.targets = [target for target in self.cells["target"].unique() if target != self.dense["target"]]

    def of(self, method, target):
        """Return the cells of a method and a target, a DataFrame of a row per seed."""
        return self.cells[(self.cells["method"] == method) & (self.cells["target"] == target)]

    def gaps(self, method, target):
        """Return the shares of the gap to the dense model that a method closes, {text: mean over seeds}."""
        pairs = self.of(method, target).merge(self.of(REFERENCE, target), on="seed", suffixes=("", " of reference"))
        return {text: pd.Series([closed(one, other, self.dense[text]) for one, other in
                                 zip(pairs[text], pairs[f"{text} of reference"], strict=True)], dtype=float).mean()
                for text in self.texts}

    def table(self, corner, write, last=None, methods=METHODS):
        """Write a table in Markdown. write: function of (method, target). last: function of the method, for COST."""
        rows = [[METHODS[method], *(write(method, target) for target in self.targets), *(last and [last(method)] or [])]
                for method in methods if method in self.cells["method"].to_numpy()]
        titles = [target.replace("+4bit", " + 4 bit") for target in self.targets]
        return table_of_markdown([corner, *titles, *([f"cost at {COST}"] if last else [])], rows)

    def figures(self, method, target, statistic="mean"):
        """Write the perplexities of the texts, or another statistic of them over the seeds."""
        values = self.of(method, target)[self.texts].agg(statistic)
        return "" if values.isna().any() else " / ".join(map(_number, values))

    def cost(self, method):
        """Write seconds to prune, with the sensitivities that one seed has measured for all, GB, and what trains."""
        cells = self.of(method, COST)
        seconds = cells["seconds"].mean() + self.cells.loc[self.cells["method"] == method, "sensitivity_seconds"].max()
        trains = ", trains" if method == "best" else ""
        return f"{seconds:.0f} s, {cells['peak_bytes'].mean() / 1e9:.1f} GB{trains}" if len(cells) else ""

    def tables(self):
        """Return {name: text}."""
        dense = " / ".join(_number(self.dense[text]) for text in self.texts)
        return {"accuracy": self.table(f"{self.name}: dense {dense}", self.figures, self.cost),
                "spread": self.table(self.name, lambda *of: self.figures(*of, "std")),
                "gap": self.table(self.name, lambda *of: " / ".join(
                    "-" if share != share else f"{share:.0%}" for share in self.gaps(*of).values()), methods=BETTER)}


def _number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def points_of(models):
    """Return the perplexities at plain sparsities as `mixgpt.app.plots.draw_tradeoff` takes them."""
    values = {(model, text, method, target): model.of(method, target)[text] for model in models for text in model.texts
              for method in DRAWN for target in model.targets if re.fullmatch(r"\d+%", target)}
    return pd.DataFrame([{"model": model.name, "text": text, "method": METHODS[method], "dense": model.dense[text],
                          "sparsity": int(target[:-1]) / 100, "mean": of.mean(), "low": of.min(), "high": of.max()}
                         for (model, text, method, target), of in values.items() if len(of)])


def main(argv=None):
    models = [Measured(path.stem, json.loads(path.read_text())["cells"])
              for path in map(Path, sys.argv[1:] if argv is None else argv)]
    tables = [model.tables() for model in models]
    for page in map(Path, PAGES):
        text = page.read_text()
        for name in tables[0]:
            block = "\n\n".join(of_model[name] for of_model in tables)
            text = re.sub(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", f"{block}\n", text,
                          flags=re.DOTALL)
        page.write_text(text)
    Path(PICTURE).write_bytes(draw_tradeoff(points_of(models), Path(PICTURE).suffix))
    return 0


if __name__ == "__main__":
    sys.exit(main())
