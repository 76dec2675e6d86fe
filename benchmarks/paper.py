"""Run the tables of the MixGPT paper (arXiv 2310.09499) on models, and print its numbers beside those measured here.

python benchmarks/paper.py table1 huggyllama/llama-7b --dry-run               # the command lines that are missing
python benchmarks/paper.py table2 meta-llama/Llama-2-13b-hf --methods best    # and one more method
python benchmarks/paper.py table3 meta-llama/Llama-2-7b-hf                    # zero-shot tasks of lm-eval

table1: saliency and allocation; table2: methods; table3: zero-shot tasks; table4: quantization; figure3: perplexity
against sparsity; ablations: table1 and allocation by layers. By default as in the paper: 128 sequences of 2,048 tokens
of C4, the whole test sets, sensitivities by Hutchinson. The arguments behind these here are flags of the family
scripts, for all runs.

An interrupted table goes on when the command is given again, and tables share their cells. The log of the runs goes to
stderr, the table in Markdown to stdout and into a file beside --output.
"""

import argparse
import csv
import re
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

from peers import PEERS, registered
from scores import DENSE, Scores, cell_of, rows_of_markdown, script_of, spread

from mixgpt.app.cli import REMEDY, Parser, reported

FACTS = Path(__file__).with_name("paper.csv")  # what the paper reports, a number a line
PAPER = "arXiv 2310.09499"
METHODS = PEERS | {  # flags of a run
    "gptq": "",
    "sparsegpt": "",
    "isc": "--saliency isc",
    "layer-level": "--sparsity-way layer-level",
    "layer-level-isc": "--sparsity-way layer-level --saliency isc",
    "weight-level": "--sparsity-way weight-level",
    "mixgpt": "--sparsity-way weight-level --saliency isc",
    "best": "--preset best",
}
ADDED = (*PEERS, "best")  # what --methods adds to a table
TASKS = ("arc_challenge", "hellaswag", "truthfulqa_mc2", "piqa")  # section 3.1.1


@dataclass(frozen=True)
class Table:
    """A table of the paper: what it is about, and its rows below the dense model's."""

    title: str
    rows: tuple  # of (method, target)
    flags: tuple = ()  # of its runs

    def with_methods(self, methods):
        """Return the dense model's row, the others, and those of further methods at every target that prunes."""
        targets = dict.fromkeys(target for _, target in self.rows if "%" in target)
        return list(dict.fromkeys([DENSE, *self.rows, *product(methods, targets)]))


def _rows(methods, *targets):
    return tuple(product(methods, targets))


TABLES = {
    "table1": Table("saliency and allocation", _rows(("sparsegpt", "isc", "weight-level", "mixgpt"), "50%")),
    "table2": Table("methods", _rows(("magnitude", "sparsegpt", "mixgpt"), "50%")),
    "table3": Table("zero-shot tasks, accuracy in %", _rows(("sparsegpt", "mixgpt"), "50%"),
                    ("--tasks", ",".join(TASKS), "--eval")),
    "table4": Table("quantization", (("gptq", "4bit"), ("gptq", "3bit"), *_rows(("sparsegpt", "mixgpt"), "50%+4bit"))),
    "figure3": Table("perplexity against sparsity", _rows(("magnitude", "sparsegpt", "mixgpt"),
                                                          *(f"{percent}%" for percent in range(10, 90, 10)))),
    "ablations": Table("saliency and allocation, of layers as well", _rows(
        ("sparsegpt", "isc", "layer-level", "layer-level-isc", "weight-level", "mixgpt"), "50%")),
}


def cells_of(options, flags):
    """Return the cells of a table, model by model. flags: words of the command line for all runs."""
    table, cells = TABLES[options.table], []
    for model in options.models:
        words = [script_of(model), model, options.dataset, *table.flags, *flags]
        for method, target in table.with_methods(options.methods):
            seeds = [0] if (method, target) == DENSE else options.seeds
            cells += [cell_of(words, method, target, seed, METHODS.get(method, "")) for seed in seeds]
    return cells


def facts():
    """Return what the paper reports, {(model, method, target, measure): (value, "table n", page)}."""
    with FACTS.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {(plain(row["model"]), row["method"], row["target"], row["measure"]):
                (float(row["value"]), row["place"], row["page"]) for row in rows}


def plain(model):
    """Return a model's name without what hubs and papers write differently: LLaMA-7B is huggyllama/llama-7b."""
    return re.sub("[^a-z0-9.]", "", re.sub("-(hf|base)$", "", Path(model).name.lower()))


def markdown(title, rows, cells):
    """Write the cells of a table: ours and, for models of which the paper has numbers, the paper's and the difference.

    rows: (method, target). "-" is not measured, or not in the paper.
    """
    known, places, lines = facts(), {}, [title]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        of_model = [cell for cell in cells if cell["model"] == model]
        measures = list(dict.fromkeys(name for cell in of_model for name in cell["figures"]))
        reported = {(*row, name): known[key] for row in rows for name in measures
                    if (key := (plain(model), *row, name)) in known}
        compared = {name for *_, name in reported}
        header = [Path(model).name, "target", *(title for name in measures for title in (
            (name, "paper", "difference") if name in compared else (name,))), "sparsity", "seeds"]
        texts = [_row(row, [cell for cell in of_model if row == (cell["method"], cell["target"])],
                      {name: reported.get((*row, name), ()) if name in compared else None for name in measures})
                 for row in rows]
        lines += ["", *rows_of_markdown(header, texts)]
        places |= dict.fromkeys(f"{place} on page {page}" for _, place, page in reported.values())
    return "\n".join(lines + (["", f"paper: {PAPER}, {', '.join(places)}"] if places else []))


def _row(row, cells, reported):
    """Return the texts of a row. reported: {measure: a value of `facts`, () if the paper has none, None: no column}."""
    texts = [*row]
    for name, fact in reported.items():
        ours = [cell["figures"][name] for cell in cells if name in cell["figures"]]
        texts.append(spread(ours) if ours else "-")
        if fact is not None:
            texts += [f"{fact[0]:g}" if fact else "-", f"{mean(ours) - fact[0]:+.2f}" if fact and ours else "-"]
    sparsities = [100 * cell["sparsity"] for cell in cells]
    return [*texts, f"{spread(sparsities, 3)}%" if cells else "-", str(len(cells))]


def parse(argv):
    """Return the arguments, and those behind them that are flags of the family scripts."""
    parser = Parser(prog="paper.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, local folder or .gguf file")
    parser.add_argument("--methods", nargs="+", default=[], choices=ADDED,
                        help=f"further methods, at every sparsity of the table: {', '.join(ADDED)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="the table has their mean (default: 0)")
    parser.add_argument("--dataset", default="c4", help="calibration text (default: c4)")
    parser.add_argument("--output", default="paper.json",
                        help=".json file of the cells; the table goes beside it, in .md (default: paper.json)")
    parser.add_argument("--dry-run", action="store_true", help="print the command lines of the missing cells; write "
                                                               "nothing")
    return parser.parse_known_args(argv)


def _run(argv):
    options, flags = parse(argv)
    table = TABLES[options.table]
    title = " ".join([f"{options.table}, {table.title}: --dataset {options.dataset}", *flags])
    with registered():
        scores = Scores(options.output, partial(markdown, title, table.with_methods(options.methods)))
        cells = cells_of(options, flags)
        if options.dry_run:
            print("\n".join(f"python {cell['command']}" for cell in scores.missing(cells)))
        else:
            print(scores.run(cells))


def main(argv=None):
    """Run the command line. Returns the exit status, see `reported`."""
    argv = sys.argv[1:] if argv is None else argv
    with reported("paper.py", argv, REMEDY) as end:
        _run(argv)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
