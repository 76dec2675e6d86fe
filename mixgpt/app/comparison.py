"""Compare the records of many runs: one table, and perplexity against sparsity by method."""

import csv
import io
import math
from collections import defaultdict
from pathlib import Path

from mixgpt.app import record_files
from mixgpt.app.settings import EVALUATION, RESULT, having_effect, recipe
from mixgpt.app.tables import table
from mixgpt.common.errors import InputError
from mixgpt.common.outputs import PICTURE, write

NO_SCORES = ("examples", "num_fewshot", "version")  # keys of a task that are not metrics
TOLD = ("wbits", "sparsity_way", "saliency")  # columns already implied by the method's name
ABOUT = ("model", "seed")  # columns on what was run; like dense results, above the table if equal in all rows


def read(file):
    """Read the record of a run. Raises InputError, naming the file, if it is not a record."""
    record = record_files.load(file)
    try:
        names = [name for name in record["perplexity"] if name != "dense"] or ["dense"]
        settings, model = record["settings"], record["settings"]["model"]
        n, m = (settings.get(name, 0) for name in ("prunen", "prunem"))
        run = record | {"file": str(file), "model": _short(model), "method": names[0],
                        "label": _named(settings, names[0]) + (f" {n}:{m}" if m else "")}
        table_of([run]), panels_of([run])  # check that all they read is present
    except (KeyError, TypeError, AttributeError, ValueError) as error:
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
    return {_text_of(run, name): float(value) for run in runs
            for name, value in run["perplexity"].get("dense", {}).items()}


def _text_of(run, name):
    settings, source = run["settings"], run["data"].get(name, {})
    asked = (settings.get(key) for key in ("seqlen", "eval_limit", "bos"))
    return run["model"], *asked, name, source.get("sha256")


def table_of(runs):
    """Return a row {column: value} per run, sorted by model, sparsity, bits, method in the order given, and seed."""
    dense, rows, order = _dense(runs), [], list(dict.fromkeys(run["label"] for run in runs))
    sets = _sets(runs)
    scores = list(dict.fromkeys(name for run in runs for name in _scores(run)))
    for run in runs:
        settings, method = run["settings"], run["method"]
        pruned = method != "dense" and run["sparsity"] > 0 and bool(settings.get("sparsity") or settings.get("prunem"))
        walked = pruned and not settings.get("gmp")
        row = {"model": run["model"], "method": run["label"],
               "sparsity": run["sparsity"], "wbits": settings.get("wbits", 16),
               "sparsity_way": settings["sparsity_way"].replace("origin", "uniform") if pruned else None,
               "saliency": settings["saliency"] if walked else None, "seed": settings["seed"]}
        place = (row["model"], round(row["sparsity"], 3), -row["wbits"], order.index(row["method"]), row["seed"],
                 run["file"])  # before a test set that is called like a column is added
        for name in sets:
            row |= {name: run["perplexity"].get(method, {}).get(name), f"dense {name}": dense.get(_text_of(run, name))}
        row |= dict.fromkeys(scores) | _scores(run) | {"seconds": sum(run["seconds"].values())}
        row |= {f"GB {place}": size / 1e9 for place, size in run["peak_memory"].items()}
        rows.append((place, row | {"file": run["file"]}))
    return [row for _, row in sorted(rows, key=lambda placed: placed[0])]


def _sets(runs):
    return list(dict.fromkeys(name for run in runs for values in run["perplexity"].values() for name in values))


def _scores(run):
    """Return {task and metric: value} of the run's pruned model."""
    return {f"{task} {metric}": value for task, values in run.get("tasks", {}).get(run["method"], {}).items()
            for metric, value in values.items() if metric not in NO_SCORES and not metric.endswith("_stderr")}


def panels_of(runs):
    """Return the panels for `plots.draw_tradeoff`; runs that differ only in seed become one point."""
    dense, points, values = _dense(runs), defaultdict(list), defaultdict(set)
    pruned = [run for run in runs if run["method"] != "dense"]
    for run in pruned:
        for name in having_effect(RESULT, EVALUATION):
            values[run["model"], run["label"], name].add(run["settings"].get(name))
    for run in pruned:
        settings = run["settings"]
        label = [run["label"], *(f"{name} {settings.get(name)}" for name in having_effect(RESULT, EVALUATION)
                                 if len(values[run["model"], run["label"], name]) > 1)]
        for name, perplexity in run["perplexity"][run["method"]].items():
            if not math.isfinite(perplexity):
                continue  # it stands in the table only
            key = run["model"], name, ", ".join(label), settings.get("sparsity", 0), settings.get("prunen", 0)
            points[key].append((float(run["sparsity"]), float(perplexity), dense.get(_text_of(run, name))))
    panels = {}
    for (model, name, label, *_), found in sorted(points.items()):
        sparsities, perplexities, references = zip(*found, strict=True)
        reference, series = panels.get((model, name), (None, {}))
        series.setdefault(label, []).append((sum(sparsities) / len(found), sum(perplexities) / len(found),
                                             min(perplexities), max(perplexities)))
        panels[model, name] = next((value for value in (reference, *references) if value is not None
                                    and math.isfinite(value)), None), series
    return panels


def text_of(runs, markdown=False):
    """Return the table as text, for a terminal or in Markdown, with values common to all runs listed once above it."""
    rows = table_of(runs)
    header = [column for column in _header(rows)
              if column not in TOLD and any(row.get(column) is not None for row in rows)]
    shared = {column: _text(column, rows[0].get(column)) for column in header
              if (column in ABOUT or column.startswith("dense ")) and len({row.get(column) for row in rows}) == 1}
    header = [column for column in header if column not in shared]
    cells = [[_text(column, row.get(column)) for column in header] for row in rows]
    above = ", ".join(f"{column} {value}" for column, value in shared.items())
    header = [f"{column} ppl" if column in _sets(runs) else column for column in header]
    return (above and f"{above}\n\n") + (_markdown(header, cells) if markdown else table(header, cells))


def csv_of(runs):
    """Return the table as CSV: all columns, all digits, and the file names."""
    rows, text = table_of(runs), io.StringIO()
    writer = csv.DictWriter(text, [*_header(rows), "file"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw(path, runs):
    """Plot perplexity against sparsity, as a file. Raises InputError if no run has both or it cannot be written."""
    panels = panels_of(runs)
    if not panels:
        raise InputError(f"--plot {path}: none of the runs has both a finite perplexity and pruned weights")
    from mixgpt.app import plots  # imports PyTorch and matplotlib

    write("--plot", path, plots.draw_tradeoff(panels, Path(path).suffix), PICTURE)


def _header(rows):
    return list(dict.fromkeys(column for row in rows for column in row if column != "file"))


def _text(column, value):
    if value is None:
        return "-"
    if column == "sparsity":
        return f"{value:.2%}"
    if column == "seconds":
        return f"{value:.0f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _markdown(header, cells):
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
