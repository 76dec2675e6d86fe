"""The tables of arXiv 2310.09499: their cells, what the paper reports in them, and both beside each other in Markdown.

What the paper reports is in paper.csv, a number a line.
"""

import csv
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

from scores import spread

from mixgpt.app.settings import recipe

FACTS = Path(__file__).with_name("paper.csv")
PAPER = "arXiv 2310.09499"
METHODS = {  # options of a run; what ranks by sensitivity takes --sensitivity
    "dense": {},
    "magnitude": {"gmp": True},
    "gptq": {},
    "sparsegpt": {},
    "isc": {"saliency": "isc"},
    "layer-level": {"sparsity_way": "layer-level"},
    "layer-level-isc": {"sparsity_way": "layer-level", "saliency": "isc"},
    "weight-level": {"sparsity_way": "weight-level"},
    "mixgpt": {"sparsity_way": "weight-level", "saliency": "isc"},
    "wanda": {"solver": "wanda", "true_sequential": False},
    "owl": {"sparsity_way": "owl"},
}
ADDED = ("magnitude", "wanda", "owl", "best")  # what --methods adds to a table
TASKS = ("arc_challenge", "hellaswag", "truthfulqa_mc2", "piqa")  # section 3.1.1
AVERAGE = "average"
DENSE = "dense", "0%"


@dataclass(frozen=True)
class Table:
    """A table of the paper: what it is about, and its rows below the dense model's."""

    title: str
    rows: tuple  # of (method, target)
    kind: str = "perplexity"  # or "tasks": what is measured

    def with_methods(self, methods):
        """Return the rows, and those that further methods have at every target that prunes."""
        targets = dict.fromkeys(target for _, target in self.rows if "%" in target)
        return list(dict.fromkeys([*self.rows, *product(methods, targets)]))


def _rows(methods, *targets):
    return tuple(product(methods, targets))


TABLES = {
    "table1": Table("saliency and allocation", _rows(("sparsegpt", "isc", "weight-level", "mixgpt"), "50%")),
    "table2": Table("methods", _rows(("magnitude", "sparsegpt", "mixgpt"), "50%")),
    "table3": Table("zero-shot tasks, accuracy in %", _rows(("sparsegpt", "mixgpt"), "50%"), "tasks"),
    "table4": Table("quantization", (("gptq", "4bit"), ("gptq", "3bit"), *_rows(("sparsegpt", "mixgpt"), "50%+4bit"))),
    "figure3": Table("perplexity against sparsity", _rows(("magnitude", "sparsegpt", "mixgpt"),
                                                          *(f"{percent}%" for percent in range(10, 90, 10)))),
    "ablations": Table("saliency and allocation, by layers too", _rows(
        ("sparsegpt", "isc", "layer-level", "layer-level-isc", "weight-level", "mixgpt"), "50%")),
}


def options_of(method, target):
    """Return the options of a run of a method at a target, "50%", "4bit" or "50%+4bit"."""
    sparsity, wbits = re.fullmatch(r"(?:(\d+)%)?\+?(?:(\d+)bit)?", target).groups()
    chosen = recipe("best", wbits=int(wbits or 16)) if method == "best" else METHODS[method]
    return chosen | ({"sparsity": int(sparsity) / 100} if sparsity else {}) | (
        {"wbits": int(wbits)} if wbits else {})


def facts():
    """Return what the paper reports, {(model, method, target, measure): (value, "table n", page)}."""
    with FACTS.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {(plain(row["model"]), row["method"], row["target"], row["measure"]):
                (float(row["value"]), row["place"], row["page"]) for row in rows}


def plain(model):
    """Return a model's name without what hubs and papers write differently: LLaMA-7B is huggyllama/llama-7b."""
    return re.sub("[^a-z0-9.]", "", re.sub("-(hf|base)$", "", Path(model).name.lower()))


def markdown(table, models, methods, content):
    """Write the cells of a table that a file of scores holds: ours, the paper's, and the difference.

    models: {name in the file: what identifies the texts or tasks}. methods: those of --methods. content: of
    `scores.Scores`. "-" is not measured, or not in the paper; a model of which it has nothing gets no columns for it.
    """
    known, places, lines = facts(), {}, [_heading(table, models, content["setup"])]
    for model, measured in models.items():
        rows = [(*row, [cell for cell in content["cells"] if row == (cell["method"], cell["target"])
                        and (cell["model"], cell["measured"]) == (model, measured)])
                for row in (DENSE, *TABLES[table].with_methods(methods))]
        measures = list(dict.fromkeys(name for *_, cells in rows for cell in cells for name in cell["figures"]))
        reported = {(method, target, name): known[key] for method, target, _ in rows for name in measures
                    if (key := (plain(model), method, target, name)) in known}
        compared = {name for *_, name in reported}
        header = [model, "target", *(text for name in measures for text in (
            (name, "paper", "difference") if name in compared else (name,))), "sparsity", "seeds"]
        lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(_row(*row, measures, reported, compared))} |" for row in rows]
        places |= dict.fromkeys(f"{place} on page {page}" for _, place, page in reported.values())
    return "\n".join(lines + (["", f"paper: {PAPER}, {', '.join(places)}"] if places else []))


def _heading(table, models, setup):
    limits = {name: value for measured in models.values() for name, value in measured.items() if "limit" in name}
    return f"{table}, {TABLES[table].title}: " + ", ".join(
        f"{name} {value}" for name, value in (setup | limits).items() if value is not None)


def _row(method, target, cells, measures, reported, compared):
    """Return the texts of a row: of every measure ours and, where it is compared, the paper's and the difference."""
    row = [method, target]
    for name in measures:
        ours = [cell["figures"][name] for cell in cells if name in cell["figures"]]
        row.append(spread(ours) if ours else "-")
        if name in compared:
            value = reported[method, target, name][0] if (method, target, name) in reported else None
            row += ["-" if value is None else f"{value:g}",
                    "-" if value is None or not ours else f"{mean(ours) - value:+.2f}"]
    sparsities = [100 * cell["sparsity"] for cell in cells]
    return [*row, f"{spread(sparsities, 3)}%" if cells else "-", str(len(cells))]
