"""Collect the records of many runs into one table, and plot perplexity against sparsity by method."""

import glob
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from mixgpt.app.cli import Parser, reported
from mixgpt.app.settings import EVALUATION, RESULT, having_effect, recipe
from mixgpt.common.choices import NO_METRICS, RECORD, TOP, is_interrupted_run
from mixgpt.common.errors import InputError, reading
from mixgpt.common.files import check_outputs, write_output
from mixgpt.common.program import SCHEMA, check_signature
from mixgpt.common.progress import table

ABOUT = ("model", "seed")  # These columns, like dense results, stand above the table if all rows agree in them.
FORMATS = {"sparsity": "{:.2%}", "seconds": "{:.0f}", " KL": "{:.3f}", TOP: "{:.1%}"}  # by the end of a column's name
Runs = list[dict[str, Any]]  # `read` returns each of them.


def files_of(names: Iterable[str]) -> list[Path]:
    """Return the record files that names, folders and glob patterns refer to, each once."""
    paths = [Path(path) for name in names for path in sorted(glob.glob(glob.escape(name)) or glob.glob(name)) or [name]]
    return list(dict.fromkeys(path / RECORD if path.is_dir() else path for path in paths))


def read(file: Path) -> dict[str, Any]:
    """Read the record of a finished run. Raises InputError, naming the file, if it is not one."""
    if file.name == RECORD and is_interrupted_run(file.parent):
        raise InputError(f"{file}: its run has not finished; continue it with --save {file.parent} --resume")
    with reading(f"{file}: is not the record of a run, as --record and --save write it"):
        record = json.loads(file.read_text())
        check_signature({"schema": SCHEMA} | record, str(file))  # A record without one is older; what fits is shown.
        settings, model = record["settings"], str(Path(record["settings"]["model"]))
        method = next((name for name in record["perplexity"] if name != "dense"), "dense")
        n, m, effort, label = settings.get("prunen", 0), settings.get("prunem", 0), settings.get("effort", 1), method
        if recipe(**settings | {"preset": "best"}).items() <= settings.items():  # The choices are those of best.
            label = "best" + (f", effort {effort:g}" if effort != 1 else "") + method.rpartition(")")[2]
        label += f" {n}:{m}" if m else ""
        if isinstance(record.get("distilled"), str) and "not distilled" not in label:
            label += ", not distilled"
        run = record | {"file": str(file), "model": model, "method": method, "label": label}
        text_of([run]), points_of([run])  # They read all that a table and a plot need.
    return run


def distinguish(runs: Runs) -> None:
    """Shorten paths of models to their last part where only one has it, and tell runs of one model and label apart.

    Their labels get the settings in which they differ, except for the seed.
    """
    ends = Counter(Path(model).name for model in {run["model"] for run in runs})
    for run in runs:
        path = Path(run["model"])
        if len(path.parts) > 2 and ends[path.name] == 1:
            run["model"] = path.name
    alike = defaultdict(list)
    for run in runs:
        alike[run["model"], run["label"]].append(run)
    for group, name in itertools.product(alike.values(), having_effect(RESULT, EVALUATION)):
        if len({str(run["settings"].get(name)) for run in group}) > 1:
            for run in group:
                run["label"] += f", {name} {run['settings'].get(name)}"


def _dense(runs: Runs) -> Callable[[dict[str, Any], str], float | None]:
    """Return a function of a run and a text that gives the dense model's perplexity on the same sequences, if known."""
    def key(run: dict[str, Any], name: str) -> tuple:
        settings, source = run["settings"], run["data"].get(name, {})
        return run["model"], *(settings.get(key) for key in ("seqlen", "eval_limit", "bos")), name, source.get("sha256")

    known = {key(run, name): float(value) for run in runs
             for name, value in run["perplexity"].get("dense", {}).items()}
    return lambda run, name: known.get(key(run, name))


def table_of(runs: Runs) -> pd.DataFrame:
    """Return a DataFrame of a row per run, sorted by model, sparsity, bits, method in the order given, and seed.

    Columns from "file" on are for the CSV alone. NaN or None: there is no such value; a perplexity of NaN is text.
    """
    labels, dense_of, groups = list(dict.fromkeys(run["label"] for run in runs)), _dense(runs), []
    for run in sorted(runs, key=lambda run: (
            run["model"], round(run["sparsity"], 3), -run["settings"].get("wbits", 16), labels.index(run["label"]),
            run["settings"]["seed"], run["file"])):
        about = {"model": run["model"], "method": run["label"], "sparsity": run["sparsity"],
                 "seed": run["settings"]["seed"]}
        perplexities = {}
        for name, value in run["perplexity"].get(run["method"], {}).items():
            perplexities |= {f"{name} ppl": "nan" if math.isnan(value) else value,
                             f"dense {name}": dense_of(run, name)}
            perplexities |= {f"{name} {measure}": value for measure, value in run.get("distance", {}).get(
                run["method"], {}).get(name, {}).items() if measure in ("KL", TOP)}
        scores = {f"{task} {metric}": value for task, values in run.get("tasks", {}).get(run["method"], {}).items()
                  for metric, value in values.items() if metric not in NO_METRICS and not metric.endswith("_stderr")}
        costs = {"seconds": sum(run["seconds"].values())} | {
            f"GB {place}": nbytes / 1e9 for place, nbytes in run["peak_memory"].items()}
        settings = {name: value for name, value in run["settings"].items() if name not in about}
        groups.append((about, perplexities, scores, costs, {"file": run["file"], **settings}))
    return pd.concat([pd.DataFrame(rows, dtype=object) for rows in zip(*groups, strict=True)], axis=1)


def text_of(runs: Runs, markdown: bool = False) -> str:
    """Return the table as text, for a terminal or in Markdown, with values common to all runs listed once above it."""
    cells = table_of(runs).loc[:, :"file"].drop(columns="file")
    for name in cells:
        number = next((text for end, text in FORMATS.items() if name.endswith(end)), "{:.2f}")
        cells[name] = ["-" if pd.isna(value) else number.format(value) if isinstance(value, float) else str(value)
                       for value in cells[name]]
    cells = cells.loc[:, (cells != "-").any()]
    shared = [name for name in cells if (name in ABOUT or name.startswith("dense ")) and cells[name].nunique() == 1]
    above = ", ".join(f"{name} {cells.at[0, name]}" for name in shared)
    cells = cells.drop(columns=shared)
    header, rows = list(cells), cells.to_numpy().tolist()
    lines = [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows]]
    return (above and f"{above}\n\n") + ("\n".join(lines) if markdown else table(header, rows))


def points_of(runs: Runs) -> pd.DataFrame:
    """Return the points of a picture as a DataFrame; runs that differ only in their seed become one point.

    Columns: model, text, method, sparsity, mean, low and high of the perplexity, and dense, the dense model's.
    """
    dense_of = _dense(runs)
    rows = [{"model": run["model"], "text": text, "method": run["label"], "sparsity": run["sparsity"],
             "seed": run["settings"]["seed"], "perplexity": perplexity, "dense": dense_of(run, text),
             "target": (run["settings"].get("sparsity", 0), run["settings"].get("prunen", 0))}
            for run in runs if run["method"] != "dense"
            for text, perplexity in run["perplexity"][run["method"]].items() if math.isfinite(perplexity)]
    if not rows:
        return pd.DataFrame()
    point = ["model", "text", "method", "target"]
    return pd.DataFrame(rows).drop_duplicates([*point, "seed"]).groupby(point).agg(
        sparsity=("sparsity", "mean"), mean=("perplexity", "mean"), low=("perplexity", "min"),
        high=("perplexity", "max"), dense=("dense", "first")).reset_index()


def main(script: str, argv: list[str] | None = None) -> int:
    """Run the command line of a script, see `reported`. Returns the exit status; 2 also if a file was unusable."""
    parser, runs = Parser(prog=Path(script).name, description="Compare the records of runs in one table."), []
    parser.add_argument("runs", nargs="+", metavar="RUN", help="file of --record, folder of --save, or a pattern such "
                                                               "as 'runs/*'")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--csv", metavar="FILE", help="also write the table as comma-separated values")
    parser.add_argument("--plot", metavar="FILE", help="also plot perplexity against sparsity by method, or bars if "
                                                       "all runs have the same sparsity; mean and range over seeds "
                                                       "(.png, .pdf, .svg)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --csv and --plot if they exist")
    with reported(script, argv, "give fewer files") as command:
        options = parser.parse_args(command.argv)
        paths = {"--csv": options.csv, "--plot": options.plot}
        check_outputs({flag: path for flag, path in paths.items() if path is not None}, options.overwrite)
        for file in files_of(options.runs):
            try:
                runs.append(read(file))
            except InputError as error:
                print(f"{command.name}: error: {error}", file=sys.stderr)
                command.status = 2
        distinguish(runs)
        if runs:
            print(text_of(runs, options.markdown))
        if runs and options.csv:
            write_output("--csv", options.csv, table_of(runs).to_csv(index=False))
            print(f"\nwritten  {options.csv}")
        if runs and options.plot:
            if (points := points_of(runs)).empty:
                raise InputError(f"--plot {options.plot}: no run has both a finite perplexity and pruned weights")
            from mixgpt.app import plots  # It imports PyTorch.
            write_output("--plot", options.plot, plots.draw_tradeoff(points, Path(options.plot).suffix))
            print(f"\npicture  {options.plot}")
    return command.status


if __name__ == "__main__":
    sys.exit(main("mixgpt results"))
