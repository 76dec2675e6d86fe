"""Write the cells that `accuracy.py` and `paper.py` have measured into the tables of the pages, and draw them.

python benchmarks/tables.py docs/accuracy/*.json  # paper, families, distance and serving, and one for each model

A table NAME stands in one of PAGES between the lines <!-- NAME --> and <!-- end of NAME -->.
"""

import copy
import json
import re
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scores import spread, table_of_markdown

from mixgpt.app.plots import bytes_of, draw_tradeoff

PAGES = "README.md", "docs/results.md", "docs/speed.md"
PICTURE, EFFORT_PICTURE, SIZE_PICTURE = "images/tradeoff.png", "images/effort.png", "images/size.png"
METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "owl": "OWL", "sparsegpt": "SparseGPT",
           "sparsegpt-76": "SparseGPT, 76 sequences", "mixgpt": "MixGPT", "best": "best"}
REFERENCE, *BETTER = DRAWN = "sparsegpt", "mixgpt", "best"  # whose gap the others close a part of
CALIBRATED = "c4"  # the text of all rows that name no other
COST = "50%"  # the target of which time and memory are given
TIMED = {method: METHODS[method] for method in ("sparsegpt", "sparsegpt-76", "mixgpt")} | {
    "best-0.3": "best, effort 0.3", "best": "best", "best-3": "best, effort 3", "best-10": "best, effort 10",
    "best-30": "best, effort 30"}
TIMED_TARGETS, TICKS = ("50%", "2:4"), (1, 2, 5, 10, 20, 50, 100)
BY_DISTANCE = {method: (METHODS | TIMED)[method]
               for method in ("magnitude", "wanda", "sparsegpt", "mixgpt", "best", "best-3")}
BY_MODEL = {  # file: methods, and how `by_model` writes the cells of one
    "paper": ({"dense": "dense", "sparsegpt": "SparseGPT", "isc": "ISC", "weight-level": "mixed", "mixgpt": "MixGPT"},
              lambda of, texts: " / ".join(spread(of[text].tolist(), 1) for text in texts)),
    "families": ({method: METHODS.get(method, method) for method in ("dense", "wanda", "owl", *DRAWN)},
                 lambda of, texts: " / ".join(map("{:.2f}".format, of.groupby("target", sort=False)[texts[0]].mean())))}


class Measured:
    """The cells of a model, the dense one's first."""

    def __init__(self, name, cells):
        self.name, self.texts = name, list(cells[0]["figures"])
        self.cells = pd.DataFrame([cell | cell["figures"] for cell in cells]).drop(columns="figures")
        self.dense = self.cells[self.cells["method"] == "dense"].iloc[0]
        self.targets = [target for target in self.cells["target"].unique() if target != self.dense["target"]]

    def of_seed_0(self):
        (other := copy.copy(self)).cells = self.cells[self.cells["seed"] == 0]
        return other

    def of(self, method, target):
        """Return the cells of a method and a target, a DataFrame of a row per seed."""
        return self.cells[(self.cells["method"] == method) & (self.cells["target"] == target)]

    def gaps(self, method, target):
        """Return the shares of the gap in log-perplexity to the dense model that a method closes, means over seeds."""
        dense = self.dense[self.texts].astype(float)
        ours, theirs = (np.log(self.of(each, target).set_index("seed")[self.texts] / dense)
                        for each in (method, REFERENCE))
        return (1 - ours / theirs).mean()

    def table(self, corner, write, last=None, methods=METHODS, targets=None):
        """Write a table in Markdown. write: function of (method, target). last: function of the method, for COST."""
        targets = targets or self.targets
        rows = [[name, *(write(method, target) for target in targets), *(last and [last(method)] or [])]
                for method, name in methods.items() if method in self.cells["method"].to_numpy()]
        titles = [target.replace("+4bit", " + 4 bit") for target in targets]
        return table_of_markdown([corner, *titles, *([f"cost at {COST}"] if last else [])], rows)

    def star(self, method, target):
        """Return a star for cells that are "superseded": what measured them now gives other figures."""
        of = self.of(method, target).get("superseded", pd.Series(dtype=object))
        return "*" if of.notna().any() else ""

    def figures(self, method, target, statistic="mean"):
        """Write the perplexities of the texts, or another statistic of them over the seeds."""
        of = self.of(method, target)[self.texts]  # NaN of a seed is that of the mean, too
        written = " / ".join(map(_number, of.agg(statistic, skipna=False)))
        return "" if len(of) < 1 + (statistic == "std") else written + self.star(method, target)

    def seconds(self, method, target):
        """Return the seconds to prune, with the sensitivities that one run of a seed has measured for all."""
        sensitivity = self.cells.loc[self.cells["method"] == method, "sensitivity_seconds"].max()
        return self.of(method, target)["seconds"].mean() + sensitivity

    def multiple(self, method, target):
        """Return the time to prune, SparseGPT's being 1; a cell of another machine has that as "reference_seconds"."""
        elsewhere = self.of(method, target).get("reference_seconds", pd.Series(dtype=float)).mean()
        reference = elsewhere if elsewhere == elsewhere else self.seconds(REFERENCE, target)
        return self.seconds(method, target) / reference

    def cost(self, method):
        """Write the time to prune, GB, and what trains."""
        memory, trains = self.of(method, COST)["peak_bytes"].mean() / 1e9, ", trains" if method == "best" else ""
        multiple = self.multiple(method, COST)  # 1 for SparseGPT; NaN where that was not measured
        time = f"{multiple:.2g}x" if multiple < 1 or multiple > 1 else f"{self.seconds(method, COST):.0f} s"
        return f"{time}, {memory:.1f} GB{trains}" if memory == memory else ""

    def tables(self):
        """Return {name: text}."""
        first, dense = self.of_seed_0(), self.figures("dense", self.dense["target"])
        return {"accuracy": self.table(f"{self.name}: dense {dense}", self.figures, self.cost),
                "spread": self.table(self.name, lambda *of: self.figures(*of, "std"),
                                     methods={method: METHODS[method] for method in DRAWN}),
                "gap": self.table(self.name, lambda *of: " / ".join(
                    "-" if share != share else f"{share:.0%}" for share in self.gaps(*of)) + self.star(*of),
                    methods={method: TIMED[method] for method in (*BETTER, "best-10")}),
                "effort": first.table(self.name, lambda *of: first.figures(*of) and f"{first.figures(*of)} at "
                                      f"{first.multiple(*of):.1f}x".replace("nanx", "-"), None, TIMED, TIMED_TARGETS)}


def _number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def points_of(models):
    """Return the perplexities at plain sparsities as `mixgpt.app.plots.draw_tradeoff` takes them."""
    values = {(model, text, method, target): model.of(method, target)[text] for model in models for text in model.texts
              for method in DRAWN for target in model.targets if re.fullmatch(r"\d+%", target)}
    return pd.DataFrame([{"model": model.name, "text": text, "method": METHODS[method], "dense": model.dense[text],
                          "sparsity": int(target[:-1]) / 100, "mean": of.mean(), "low": of.min(), "high": of.max()}
                         for (model, text, method, target), of in values.items() if len(of)])


def draw_efforts(models):
    """Plot the first text's perplexity at TIMED_TARGETS against the time to prune, of seed 0; starred cells hollow."""
    figure = Figure(figsize=(11, 4 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(TIMED_TARGETS), squeeze=False).flat
    for axis, (model, target) in zip(axes, product(models, TIMED_TARGETS), strict=True):
        first, text = model.of_seed_0(), model.texts[0]
        for line in ("SparseGPT", "MixGPT", "best"):
            points = {method: (first.multiple(method, target), first.of(method, target)[text].mean())
                      for method, name in TIMED.items() if name.startswith(line)}
            color = axis.plot(*zip(*points.values(), strict=True), marker="o", label=line)[0].get_color()
            for method, point in points.items():
                if first.star(method, target):
                    axis.plot(*point, marker="o", color=color, markerfacecolor="white")
        axis.axhline(model.dense[text], color="black", linestyle="--", linewidth=1, label="dense")
        axis.set(xscale="log", xlabel="time to prune, SparseGPT: 1", ylabel=f"perplexity, {text}",
                 title=f"{model.name}, {target}")
        axis.set_xticks(TICKS, TICKS)
        axis.set_xticks([], minor=True)
        axis.legend()
    return bytes_of(figure, Path(EFFORT_PICTURE).suffix)


def by_model(cells, methods, write):
    """Write a table of a row for each model. write: function of a method's cells, a DataFrame, and the texts."""
    frame, texts = pd.DataFrame([cell | cell["figures"] for cell in cells]), list(cells[0]["figures"])
    return table_of_markdown(["model", *methods.values()], [
        [Path(model).name.removesuffix(".gguf"), *(write(of[of["method"] == method], texts) for method in methods)]
        for model, of in frame.groupby("model", sort=False)])


def text_of(cell):
    """Return the calibration text of a cell, "" if it has none."""
    return "".join(cell.get("command", "").split()[2:3])


def compared(cells):
    """Yield what best saves of SparseGPT's distance to the dense model, for each model, target and calibration text.

    That is (model, target, best's text if that is not CALIBRATED, [[SparseGPT's KL, best's] of each text],
    [perplexities on the first text], share of each KL that best closes, and of the log-perplexity), means over the
    seeds that best has.
    """
    texts, found = list(cells[0]["figures"]), {}
    for cell in cells:
        method = cell["method"], "" if text_of(cell) == CALIBRATED else text_of(cell)
        found.setdefault((cell["model"], cell["target"]), {}).setdefault(method, []).append(cell)
    for (model, target), of in found.items():
        for method, text in of if (REFERENCE, "") in of else ():
            if method != "best":
                continue
            dense, ours = found[model, "0%"]["dense", ""][0]["figures"][texts[0]], of[method, text]
            seeds = [cell["seed"] for cell in ours]
            pairs = [cell for cell in of[REFERENCE, ""] if cell["seed"] in seeds], ours
            KL = [[np.mean([cell["distance"][text]["KL"] for cell in each]) for each in pairs] for text in texts]
            ppl = [np.exp(np.mean([np.log(cell["figures"][texts[0]]) for cell in each])) for each in pairs]
            yield (Path(model).name.removesuffix(".gguf"), target.replace("+4bit", " + 4 bit"), text, KL, ppl,
                   [1 - ours / theirs for theirs, ours in KL], 1 - np.log(ppl[1] / dense) / np.log(ppl[0] / dense))


def distances(cells):
    """Write how far SparseGPT's and best's models are from the dense one, and what share of that best closes."""
    texts = list(cells[0]["figures"])
    rows = [[", ".join(filter(None, [model, target, text])), *(
        f"{theirs:.3f} → {ours:.3f}, {share:.0%}" for (theirs, ours), share in zip(KL, shares, strict=True)),
        f"{np.mean(shares):.0%}", f"{ppl[0]:.1f} → {ppl[1]:.1f}, {saved:.0%}"]
        for model, target, text, KL, ppl, shares, saved in compared(cells)]
    return table_of_markdown(["", *(f"KL, {text}" for text in texts), "mean", f"perplexity, {texts[0]}"], rows)


def methods_by_distance(cells):
    """Write each method's KL to the dense model on two texts at COST, of seed 0, calibrated on CALIBRATED."""
    cells = [cell for cell in cells if (cell["target"], cell["seed"], text_of(cell)) == (COST, 0, CALIBRATED)]
    return by_model(cells, BY_DISTANCE, lambda of, texts: " / ".join(
        f"{distance[text]['KL']:.2f}" for distance in of["distance"] for text in texts[:2]))


def draw_sizes(cells):
    """Plot the shares that best closes against the model's size, which its name has, such as 0.5B, by target."""
    figure, rows, ticks = Figure(figsize=(11, 4), layout="constrained"), [], {}
    for model, target, text, *_, shares, saved in compared(cells):
        size, unit = re.search(r"([\d.]+)([MB])\b", model).groups()
        parameters = float(size) * {"M": 1e6, "B": 1e9}[unit]
        ticks[parameters] = model.replace("-Instruct", "").replace("-", "\n", 1)
        if not text:
            rows.append([parameters, target, np.mean(shares), saved])
    frame = pd.DataFrame(rows, columns=["parameters", "target", "KL, mean of three texts", "perplexity, WikiText-2"])
    for axis, share in zip(figure.subplots(1, 2, sharey=True), frame.columns[2:], strict=True):
        for target, of in frame.groupby("target", sort=False):
            of = of.sort_values("parameters")
            axis.plot(of["parameters"], 100 * of[share], marker="o", label=target)
        axis.set(xscale="log", ylabel="% of SparseGPT's gap that best closes", title=share, ylim=(0, 100))
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set_xticks([], minor=True)
        axis.legend(loc="lower right", ncols=2)
    return bytes_of(figure, Path(SIZE_PICTURE).suffix)


def servings(cells):
    """Write tokens per second of the dense and the packed model, their ratio's median, least and most, and bytes."""
    rows, targets = {}, list(dict.fromkeys(cell["target"] for cell in cells))
    for cell in cells:
        ratios, (before, after) = sorted(cell["ratios"]), cell["rates"]
        written = f"{before:.1f} → {after:.1f}, {np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        if None not in cell["bytes"]:
            written += ", {1:.0f} of {0:.0f} MB".format(*(nbytes / 1e6 for nbytes in cell["bytes"]))
        place = Path(cell["model"]).name.removesuffix(".gguf"), cell["method"], str(cell["sequences"])
        rows.setdefault(place, {})[cell["target"]] = written
    return table_of_markdown(["model", "engine", "sequences", *targets], [
        [*place, *(of.get(target, "") for target in targets)] for place, of in rows.items()])


def latest(cells):
    """Return the cells without those that another one of the same kind comes after."""
    kind = "model", "method", "target", "seed", "sequences"
    return list({(*map(cell.get, kind), text_of(cell)): cell for cell in cells}.values())


def main(argv=None):
    files = sorted(map(Path, sys.argv[1:] if argv is None else argv), reverse=True)  # SmolLM2 before Gemma
    cells = {file.stem: latest(json.loads(file.read_text())["cells"]) for file in files}
    blocks = {name: by_model(cells.pop(name), *of) for name, of in BY_MODEL.items() if name in cells}
    if "distance" in cells:
        Path(SIZE_PICTURE).write_bytes(draw_sizes(cells["distance"]))
        blocks["methods"] = methods_by_distance(cells["distance"])
    blocks |= {name: write(cells.pop(name)) for name, write in (("distance", distances), ("serving", servings))
               if name in cells}
    models = [Measured(name, of_model) for name, of_model in cells.items()]
    tables = [model.tables() for model in models]
    blocks |= {name: "\n\n".join(of_model[name] for of_model in tables) for name in tables[0]}
    blocks["accuracy"], *others = (of_model["accuracy"] for of_model in tables)  # the README has the first alone
    blocks["others"] = "\n\n".join(others)
    for page in map(Path, PAGES):
        text = page.read_text()
        for name, block in blocks.items():
            text = re.sub(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- end of {name} -->)", f"{block}\n", text)
        page.write_text(text)
    Path(PICTURE).write_bytes(draw_tradeoff(points_of(models), Path(PICTURE).suffix))
    Path(EFFORT_PICTURE).write_bytes(draw_efforts(models))
    return 0


if __name__ == "__main__":
    sys.exit(main())
