"""Compare the records of many runs: one table, and perplexity against sparsity by method."""

import glob
import json
import math
from functools import partial
from pathlib import Path

import pandas as pd

from mixgpt.app.settings import EVALUATION, RESULT, having_effect, recipe
from mixgpt.common.choices import RECORD, is_interrupted_run
from mixgpt.common.errors import InputError, reading
from mixgpt.common.program import SCHEMA, check_signature

IMPLIED = ["wbits", "sparsity_way", "saliency", "file"]  # columns of the CSV alone; the method's name tells the first
NO_METRICS = ("examples", "num_fewshot", "version")  # keys of a task's results that are not metrics
ABOUT = ("model", "seed")  # columns on what was run; like dense results, above the table if equal in all rows


def table(header, rows):
    """Lay out rows of text under a header, the first column left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line(cells):
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def files_of(names):
    """Return the record files that names, folders and glob patterns refer to, each once."""
    paths = [Path(path) for name in names for path in sorted(glob.glob(name)) or [name]]
    return list(dict.fromkeys(path / RECORD if path.is_dir() else path for path in paths))


def read(file):
    """Read the record of a finished run. Raises InputError, naming the file, if it is not one."""
    if file.name == RECORD and is_interrupted_run(file.parent):
        raise InputError(f"{file}: its run has not finished; continue it with --save {file.parent} --resume")
    with reading(f"{file}: is not the record of a run, as --record and --save write it"):
        record = json.loads(file.read_text())
        if record.get("schema", SCHEMA) != SCHEMA:  # without one it is older: see what fits
            check_signature(record, str(file))
        settings, methods = record["settings"], [name for name in record["perplexity"] if name != "dense"] or ["dense"]
        n, m = settings.get("prunen", 0), settings.get("prunem", 0)
        run = record | {"file": str(file), "model": _short(settings["model"]), "method": methods[0],
                        "label": _named(settings, methods[0]) + (f" {n}:{m}" if m else "")}
        text_of([run]), points_of([run])  # which read all that a table and a plot need
    return run


def _short(model):
    """Return a hub id unchanged, or the last part of a path."""
    return model if model.count("/") <= 1 and not model.startswith((".", "/")) else Path(model).name


def _named(settings, method):
    """Return a method's name, with best in place of its choices if all settings are that preset's, however given."""
    prunes = settings.get("sparsity") or settings.get("prunem")
    best = recipe("best", settings.get("prunem", 0), settings.get("wbits", 16), settings.get("groupsize", -1))
    is_best = prunes and all(settings.get(name) == value for name, value in best.items())
    return "best" + method.rpartition(")")[2] if is_best else method


def _text_key(run, name):
    """Return what two perplexities must share to be compared: model, sequences, BOS and text."""
    settings, source = run["settings"], run["data"].get(name, {})
    return run["model"], *(settings.get(key) for key in ("seqlen", "eval_limit", "bos")), name, source.get("sha256")


def _dense(runs):
    """Return {_text_key: perplexity} of the dense models."""
    return {_text_key(run, name): float(value) for run in runs
            for name, value in run["perplexity"].get("dense", {}).items()}


def _texts(runs):
    return list(dict.fromkeys(name for run in runs for values in run["perplexity"].values() for name in values))


def table_of(runs):
    """Return a DataFrame of a row per run, sorted by model, sparsity, bits, method in the order given, and seed."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    runs = sorted(runs, key=lambda run: (run["model"], round(run["sparsity"], 3), -run["settings"].get("wbits", 16),
                                         labels.index(run["label"]), run["settings"]["seed"], run["file"]))
    dense, texts = _dense(runs), _texts(runs)
    metrics = dict.fromkeys(name for run in runs for name in _scores(run))
    places = dict.fromkeys(f"GB {place}" for run in runs for place in run["peak_memory"])
    rows = []
    for run in runs:
        row = _about(run)
        for name in texts:
            row |= {name: run["perplexity"].get(run["method"], {}).get(name),
                    f"dense {name}": dense.get(_text_key(run, name))}
        peaks = {f"GB {place}": nbytes / 1e9 for place, nbytes in run["peak_memory"].items()}
        rows.append(row | metrics | _scores(run) | {"seconds": sum(run["seconds"].values())} | places | peaks
                    | {"file": run["file"]})
    return pd.DataFrame(rows, dtype=object)


def _about(run):
    """Return the columns of a run's settings; None for those that had no effect."""
    settings = run["settings"]
    pruned = run["method"] != "dense" and run["sparsity"] > 0 and (settings.get("sparsity") or settings.get("prunem"))
    return {"model": run["model"], "method": run["label"], "sparsity": run["sparsity"],
            "wbits": settings.get("wbits", 16),
            "sparsity_way": settings["sparsity_way"].replace("origin", "uniform") if pruned else None,
            "saliency": settings["saliency"] if pruned and not settings.get("gmp") else None, "seed": settings["seed"]}


def _scores(run):
    """Return {task and metric: value} of the run's pruned model."""
    return {f"{task} {metric}": value for task, values in run.get("tasks", {}).get(run["method"], {}).items()
            for metric, value in values.items() if metric not in NO_METRICS and not metric.endswith("_stderr")}


def text_of(runs, markdown=False):
    """Return the table as text, for a terminal or in Markdown, with values common to all runs listed once above it."""
    cells = table_of(runs).drop(columns=IMPLIED)
    cells = cells.apply(lambda column: column.map(partial(_text, column.name)))
    cells = cells.loc[:, (cells != "-").any()]
    shared = [name for name in cells if (name in ABOUT or name.startswith("dense ")) and cells[name].nunique() == 1]
    above = ", ".join(f"{name} {cells.at[0, name]}" for name in shared)
    cells = cells.drop(columns=shared)
    header = [f"{name} ppl" if name in _texts(runs) else name for name in cells]
    return (above and f"{above}\n\n") + (_markdown if markdown else table)(header, cells.to_numpy().tolist())


def csv_of(runs):
    """Return the table as CSV: all columns, all digits, and the file names."""
    return table_of(runs).map(lambda value: "" if value is None else str(value)).to_csv(index=False)


def _text(name, value):
    if value is None:
        return "-"
    if name == "sparsity":
        return f"{value:.2%}"
    if name == "seconds":
        return f"{value:.0f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _markdown(header, rows):
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def points_of(runs):
    """Return the points of a picture as a DataFrame; runs that differ only in their seed become one point.

    Columns: model, text, method, sparsity, mean, low and high of the perplexity, and dense, the dense model's.
    """
    dense, distinguished = _dense(runs), having_effect(RESULT, EVALUATION)
    rows = [{"model": run["model"], "text": text, "method": run["label"], "sparsity": run["sparsity"],
             "perplexity": perplexity, "dense": dense.get(_text_key(run, text)),
             "target": (run["settings"].get("sparsity", 0), run["settings"].get("prunen", 0)),
             "settings": {name: str(run["settings"].get(name)) for name in distinguished}}
            for run in runs if run["method"] != "dense"
            for text, perplexity in run["perplexity"][run["method"]].items() if math.isfinite(perplexity)]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows).replace({"dense": {math.inf: math.nan}})
    frame["method"] = _with_settings(frame)
    return frame.groupby(["model", "text", "method", "target"]).agg(
        sparsity=("sparsity", "mean"), mean=("perplexity", "mean"), low=("perplexity", "min"),
        high=("perplexity", "max"), dense=("dense", "first")).reset_index()


def _with_settings(frame):
    """Return the method of each row, followed by the settings in which rows of its model and method differ."""
    settings = pd.DataFrame(frame["settings"].tolist())
    varied = settings.groupby([frame["model"], frame["method"]]).transform("nunique") > 1
    return [", ".join([method, *(f"{name} {settings.at[row, name]}" for name in settings if varied.at[row, name])])
            for row, method in enumerate(frame["method"])]


def picture_of(runs, path):
    """Plot perplexity against sparsity. Returns the content of a file. Raises InputError if no run has both."""
    points = points_of(runs)
    if points.empty:
        raise InputError(f"--plot {path}: none of the runs has both a finite perplexity and pruned weights")
    from mixgpt.app import plots  # imports PyTorch

    return plots.draw_tradeoff(points, Path(path).suffix)
