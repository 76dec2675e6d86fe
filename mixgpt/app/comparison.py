"""Compare the records of many runs: one table, and perplexity against sparsity by method."""

import glob
import json
import math
from pathlib import Path

import pandas as pd

from mixgpt.app.settings import EVALUATION, RESULT, having_effect, recipe
from mixgpt.app.tables import NO_METRICS, table
from mixgpt.checkpoints.names import RECORD, begun
from mixgpt.common.errors import InputError
from mixgpt.common.program import SCHEMA, check_signature

IMPLIED = ["wbits", "sparsity_way", "saliency", "file"]  # columns of the CSV alone; the method's name tells the first
ABOUT = ("model", "seed")  # columns on what was run; like dense results, above the table if equal in all rows


def files_of(names):
    """Return the record files that names, folders and glob patterns refer to, each once."""
    paths = [Path(path) for name in names for path in sorted(glob.glob(name)) or [name]]
    return list(dict.fromkeys(path / RECORD if path.is_dir() else path for path in paths))


def read(file):
    """Read the record of a finished run. Raises InputError, naming the file, if it is not one."""
    if file.name == RECORD and begun(file.parent):
        raise InputError(f"{file}: its run has not finished; continue it with --save {file.parent} --resume")
    try:
        record = json.loads(file.read_text())
        if record.get("schema", SCHEMA) != SCHEMA:  # without one it is older: see what fits
            check_signature(record, str(file))
        settings, methods = record["settings"], [name for name in record["perplexity"] if name != "dense"] or ["dense"]
        n, m = settings.get("prunen", 0), settings.get("prunem", 0)
        run = record | {"file": str(file), "model": _short(settings["model"]), "method": methods[0],
                        "label": _named(settings, methods[0]) + (f" {n}:{m}" if m else "")}
        text_of([run]), points_of([run])  # check that all they read is present
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give files of --record or folders of --save"
                         ) from error
    except Exception as error:  # whatever a file that is none leads to
        raise InputError(f"{file}: is not the record of a run ({type(error).__name__}: {error})") from error
    return run


def _short(model):
    """Return a hub id unchanged, or the last part of a path."""
    return model if model.count("/") <= 1 and not model.startswith((".", "/")) else Path(model).name


def _named(settings, method):
    """Return a method's name, with best in place of its choices if all settings are that preset's, however given."""
    prunes = settings.get("sparsity") or settings.get("prunem")
    best = recipe("best", settings.get("prunem", 0), settings.get("wbits", 16), settings.get("groupsize", -1))
    alike = prunes and all(settings.get(name) == value for name, value in best.items())
    return "best" + method.rpartition(")")[2] if alike else method


def _dense(runs):
    """Return {(model, sequence length and count, BOS, dataset, its sha256): perplexity} of the dense models."""
    return {_text_key(run, name): float(value) for run in runs
            for name, value in run["perplexity"].get("dense", {}).items()}


def _text_key(run, name):
    settings, source = run["settings"], run["data"].get(name, {})
    return run["model"], *(settings.get(key) for key in ("seqlen", "eval_limit", "bos")), name, source.get("sha256")


def _sets(runs):
    return list(dict.fromkeys(name for run in runs for values in run["perplexity"].values() for name in values))


def table_of(runs):
    """Return a DataFrame of a row per run, sorted by model, sparsity, bits, method in the order given, and seed."""
    methods = list(dict.fromkeys(run["label"] for run in runs))
    runs = sorted(runs, key=lambda run: (run["model"], round(run["sparsity"], 3), -run["settings"].get("wbits", 16),
                                         methods.index(run["label"]), run["settings"]["seed"], run["file"]))
    dense, sets, scores = _dense(runs), _sets(runs), [_scores(run) for run in runs]
    metrics = dict.fromkeys(name for values in scores for name in values)
    parts = [
        [_about(run) for run in runs],
        [{column: value for name in sets for column, value in (
            (name, run["perplexity"].get(run["method"], {}).get(name)),
            (f"dense {name}", dense.get(_text_key(run, name))))} for run in runs],
        [metrics | values for values in scores],
        [{"seconds": sum(run["seconds"].values())} | {
            f"GB {place}": nbytes / 1e9 for place, nbytes in run["peak_memory"].items()} for run in runs],
        [{"file": run["file"]} for run in runs]]
    return pd.concat([pd.DataFrame(rows, dtype=object) for rows in parts], axis=1)


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
    frame = table_of(runs).drop(columns=IMPLIED)
    cells = {column: [_text(column, value) for value in frame[column]] for column in frame}
    cells = {column: texts for column, texts in cells.items() if set(texts) != {"-"}}
    shared = {column: texts[0] for column, texts in cells.items()
              if (column in ABOUT or column.startswith("dense ")) and len(set(texts)) == 1}
    above = ", ".join(f"{column} {value}" for column, value in shared.items())
    header = [f"{column} ppl" if column in _sets(runs) else column for column in cells if column not in shared]
    rows = [list(row) for row in zip(*(texts for column, texts in cells.items() if column not in shared), strict=True)]
    return (above and f"{above}\n\n") + (_markdown if markdown else table)(header, rows)


def csv_of(runs):
    """Return the table as CSV: all columns, all digits, and the file names."""
    return table_of(runs).map(lambda value: "" if value is None else str(value)).to_csv(index=False)


def _text(column, value):
    if value is None:
        return "-"
    if column == "sparsity":
        return f"{value:.2%}"
    if column == "seconds":
        return f"{value:.0f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _markdown(header, rows):
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def points_of(runs):
    """Return the points of a picture as a DataFrame; runs that differ only in their seed become one point.

    Columns: model, text, method, sparsity, mean, low and high of the perplexity, and dense, the dense model's.
    """
    dense, told, rows = _dense(runs), having_effect(RESULT, EVALUATION), []
    for run in runs:
        settings = run["settings"]
        for text, perplexity in run["perplexity"].get(run["method"], {}).items():
            if run["method"] != "dense" and math.isfinite(perplexity):
                rows.append({"model": run["model"], "text": text, "method": run["label"], "sparsity": run["sparsity"],
                             "perplexity": perplexity, "dense": dense.get(_text_key(run, text)),
                             "target": (settings.get("sparsity", 0), settings.get("prunen", 0)),
                             "settings": {name: str(settings.get(name)) for name in told}})
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
