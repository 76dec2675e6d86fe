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
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter
from scores import closed, table_of_markdown

from mixgpt.app.plots import bytes_of

PAGES = "README.md", "docs/results.md"
PICTURE = "images/tradeoff.png"
METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "owl": "OWL", "owl-wanda": "OWL with Wanda's mask",
           "sparsegpt": "SparseGPT", "mixgpt": "MixGPT", "best": "best"}
TRAINED = ("best",)
DRAWN = {"magnitude": ("0.5", "v"), "sparsegpt": ("C2", "D"), "mixgpt": ("C3", "^"), "best": ("C4", "o")}
REFERENCE = "sparsegpt"  # the method from which the gap is measured
COST = "50%"  # the target of which time and memory are given
HIGHEST = 1000  # perplexity; above it the curves of all other methods would be pushed together


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

    def table(self, corner, write, last=None):
        """Write a table in Markdown. write: function of (method, target). last: function of the method, for COST."""
        rows = [[title, *(write(method, target) for target in self.targets), *([last(method)] if last else [])]
                for method, title in METHODS.items() if method in self.cells["method"].to_numpy()]
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
        trains = ", trains" if method in TRAINED else ""
        return f"{seconds:.0f} s, {cells['peak_bytes'].mean() / 1e9:.1f} GB{trains}" if len(cells) else ""

    def tables(self):
        """Return {name: text}."""
        dense = " / ".join(_number(self.dense[text]) for text in self.texts)
        return {"accuracy": self.table(f"{self.name}: dense {dense}", self.figures, self.cost),
                "spread": self.table(self.name, lambda *of: self.figures(*of, "std")),
                "gap": self.table(self.name, lambda *of: " / ".join(
                    "-" if share != share else f"{share:.0%}" for share in self.gaps(*of).values()))}


def _number(value):
    return f"{value:,.0f}" if value >= 300 else f"{value:.1f}"


def draw(models):
    """Draw perplexity against sparsity, and the gaps that are closed, on the first text: a row for each model."""
    figure = Figure(figsize=(11, 4.4 * len(models)), layout="constrained")
    for model, (left, right) in zip(models, figure.subplots(len(models), 2, squeeze=False), strict=True):
        text = model.texts[0]
        plain = [target for target in model.targets if re.fullmatch(r"\d+%", target)]
        for method, (colour, marker) in DRAWN.items():
            means = [model.of(method, target)[text].mean() for target in plain]
            left.plot([int(target[:-1]) for target in plain], means, label=METHODS[method], color=colour, marker=marker)
        left.axhline(model.dense[text], label="dense", color="black", linestyle="--", linewidth=1)
        left.set(title=f"{model.name}, {text}", xlabel="weights pruned", ylabel="perplexity", yscale="log",
                 ylim=(0.85 * model.dense[text], HIGHEST), xticks=[int(target[:-1]) for target in plain])
        left.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        left.set_yticks(ticks := [30, 50, 100, 200, 500, 1000], map(str, ticks))
        left.yaxis.set_minor_formatter(NullFormatter())
        left.grid(alpha=0.3)
        for number, method in enumerate(("mixgpt", "best")):
            shares = [100 * model.gaps(method, target)[text] for target in model.targets]
            bars = right.bar([place + 0.4 * number for place in range(len(shares))], shares, 0.38,
                             label=METHODS[method], color=DRAWN[method][0])
            right.bar_label(bars, [f"{share:.0f}%" for share in shares], padding=2, fontsize=9)
        right.set(title=f"Gap from {METHODS[REFERENCE]} to dense that is closed", ylabel="share in log-perplexity",
                  ylim=(0, 100), xticks=[place + 0.2 for place in range(len(model.targets))], xticklabels=model.targets)
        right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        right.spines[["top", "right"]].set_visible(False)
        left.legend()
        right.legend()
    return figure


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
    Path(PICTURE).write_bytes(bytes_of(draw(models), Path(PICTURE).suffix))
    return 0


if __name__ == "__main__":
    sys.exit(main())
