"""Run the tables of the MixGPT paper (arXiv 2310.09499) on models, and print its numbers beside those measured here.

python benchmarks/paper.py table1 huggyllama/llama-7b --dry-run               # the command lines that are missing
python benchmarks/paper.py table2 meta-llama/Llama-2-13b-hf --methods best    # and one more method
python benchmarks/paper.py table3 meta-llama/Llama-2-7b-hf                    # zero-shot tasks of lm-eval

table1: saliency and allocation; table2: methods; table3: zero-shot tasks; table4: quantization; figure3: perplexity
against sparsity; ablations: table1 and allocation by layers. By default as in the paper: 128 sequences of 2,048 tokens
of C4, the whole test sets, sensitivities by Hutchinson. Further arguments are flags of the family scripts for all runs.
Where the paper is silent, "mixed" and "ours" are taken for weight-level allocation, and table 3's metric for acc_norm,
or acc for tasks without it.

An interrupted table goes on when the command is given again, and tables share their cells. The log of the runs goes to
stderr, the table in Markdown to stdout and into a file beside --output.
"""

import re
import sys
from collections import namedtuple
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd
from peers import PEERS, registered
from scores import DENSE, Scores, cell_of, parser_of, spread, table_of_markdown

from mixgpt.app.cli import REMEDY, reported

FACTS = Path(__file__).with_name("paper.csv")  # what the paper reports, a number a line
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
HALF = ["50%"]
Table = namedtuple("Table", "title rows flags", defaults=[()])  # rows: (method, target). flags: words for all runs
TABLES = {
    "table1": Table("saliency and allocation", [*product(("sparsegpt", "isc", "weight-level", "mixgpt"), HALF)]),
    "table2": Table("methods", [*product(("magnitude", "sparsegpt", "mixgpt"), HALF)]),
    "table3": Table("zero-shot tasks, accuracy in %", [*product(("sparsegpt", "mixgpt"), HALF)],
                    ("--tasks", ",".join(TASKS), "--eval")),
    "table4": Table("quantization", [("gptq", "4bit"), ("gptq", "3bit"), ("sparsegpt", "50%+4bit"),
                                     ("mixgpt", "50%+4bit")]),
    "figure3": Table("perplexity against sparsity", [*product(
        ("magnitude", "sparsegpt", "mixgpt"), [f"{percent}%" for percent in range(10, 90, 10)])]),
    "ablations": Table("saliency and allocation, of layers as well", [*product(
        ("sparsegpt", "isc", "layer-level", "layer-level-isc", "weight-level", "mixgpt"), HALF)]),
}


def rows_of(options):
    """Return the rows (method, target) of a table: the dense model, the paper's, and those of --methods."""
    rows = TABLES[options.table].rows
    return list(dict.fromkeys([DENSE, *rows, *product(options.methods, [of for _, of in rows if "%" in of])]))


def cells_of(options, flags):
    """Return the cells of a table, model by model. flags: words of the command line for all runs."""
    return [cell_of([model, options.dataset, *TABLES[options.table].flags, *flags], *row, seed,
                    METHODS.get(row[0], ""))
            for model in options.models for row in rows_of(options)
            for seed in ([0] if row == DENSE else dict.fromkeys(options.seeds))]


def facts():
    """Return what the paper reports, {(model, method, target, measure): (value, "table n", page)}."""
    rows = pd.read_csv(FACTS, comment="#").itertuples()
    return {(plain(row.model), row.method, row.target, row.measure): (row.value, row.place, row.page) for row in rows}


def plain(model):
    """Return a model's name without what hubs and papers write differently: LLaMA-7B is huggyllama/llama-7b."""
    return re.sub("[^a-z0-9.]", "", re.sub("-(hf|base)$", "", Path(model).name.lower()))


def markdown(title, rows, cells):
    """Write the cells of a table: ours and, where the paper has a number, that and the difference.

    rows: (method, target). "-" is not measured.
    """
    known, places, lines = facts(), {}, [title]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        measures = list(dict.fromkeys(name for cell in cells if cell["model"] == model for name in cell["figures"]))
        table = []
        for row in rows:
            of_row = [cell for cell in cells if (cell["model"], cell["method"], cell["target"]) == (model, *row)]
            texts = [*row]
            for name in measures:
                value, place, page = known.get((plain(model), *row, name), (None, None, None))
                ours = [cell["figures"][name] for cell in of_row]
                texts.append(spread(ours) if ours else "-")
                if place:
                    places[f"{place} on page {page}"] = None
                    texts[-1] += f" (paper {value:g}" + (f", {mean(ours) - value:+.2f})" if ours else ")")
            sparsity = f"{spread([100 * cell['sparsity'] for cell in of_row], 3)}%" if of_row else "-"
            table.append([*texts, sparsity, str(len(of_row))])
        lines += ["", table_of_markdown([Path(model).name, "target", *measures, "sparsity", "seeds"], table)]
    return "\n".join(lines + (["", f"paper: arXiv 2310.09499, {', '.join(places)}"] if places else []))


def main(argv=None):
    """Run the command line. Returns the exit status, see `reported`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_of("paper.py", __doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, local folder or .gguf file")
    parser.add_argument("--methods", nargs="+", default=[], choices=ADDED,
                        help=f"further methods, at every sparsity of the table: {', '.join(ADDED)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="the table has their mean (default: 0)")
    parser.add_argument("--dataset", default="c4", help="calibration text (default: c4)")
    parser.add_argument("--output", default="paper.json",
                        help=".json file of the cells; the table goes beside it, in .md (default: paper.json)")
    parser.add_argument("--dry-run", action="store_true", help="print the missing cells' commands; write nothing")
    with reported("paper.py", argv, REMEDY) as end, registered():
        options, flags = parser.parse_known_args(argv)
        title = " ".join([f"{options.table}, {TABLES[options.table].title}: --dataset {options.dataset}", *flags])
        scores, cells = Scores(options.output, partial(markdown, title, rows_of(options))), cells_of(options, flags)
        print("\n".join(f"python {cell['command']}" for cell in scores.missing(cells)) if options.dry_run
              else scores.run(cells))
    return end.status


if __name__ == "__main__":
    sys.exit(main())
