"""The record of a run, mixgpt.json: what it holds, and the tables and lines that report it."""

import dataclasses
import json
import math
import platform
from collections import defaultdict
from importlib.metadata import version
from statistics import mean

import numpy as np
import pandas as pd
import torch

from mixgpt.app.settings import BOS
from mixgpt.checkpoints import card, formats
from mixgpt.common import distributed, files, program
from mixgpt.common.choices import NO_METRICS
from mixgpt.common.progress import table
from mixgpt.evaluation.measures import total_sparsity
from mixgpt.modeling import decoder, experts
from mixgpt.modeling.streaming import stored_dtype
from mixgpt.pruning.targets import Outcome


def facts(run):
    """Return the part of the record known before pruning: resolved settings, versions, device and texts."""
    settings, device = run.settings, run.device
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    packages = ("transformers", "datasets", "lm_eval") if settings.tasks else ("transformers", "datasets")
    versions = {"python": platform.python_version(), "torch": torch.__version__} | {
        name: version(name) for name in packages}
    return {"settings": dataclasses.asdict(settings) | {
                "dtype": str(run.model.dtype).removeprefix("torch."), "device": str(device)},
            **program.signature(), "device_name": device_name, "versions": versions, "data": run.sources}


def of_matrices(run, plan, outcomes, zeros):
    """Return the part of the record on the matrices, and on other weights of the layers. zeros: of `Survey.finish`."""
    matrices = [m for m in zeros[0] if m.name not in run.uncalled]
    others = zeros[1] + [m for m in zeros[0] if m.name in run.uncalled]
    sensitivity, rows = plan.traces.sensitivity if plan.traces else {}, []
    for m in matrices:
        key = m.layer, m.name
        outcome = outcomes.get(key, Outcome())
        optional = {"target": plan.targets[key].sparsity if key in plan.targets else None,
                    "sensitivity": sensitivity.get(key), "error": outcome.error, "percdamp": outcome.percdamp,
                    "wbits": outcome.grid and outcome.grid.scheme.wbits}
        rows.append(_counted(m) | {name: value for name, value in optional.items() if value is not None})
    return {"sparsity": total_sparsity(matrices), "matrices": rows} | ({
        "sparsity_of_layers": total_sparsity(matrices + others), "left_dense": [_counted(m) for m in others]}
        if others else {})


def _counted(m):
    """Return the entries of the record for a `MatrixSparsity`."""
    return {"layer": m.layer, "name": m.name, "shape": list(m.shape), "sparsity": m.zeros / m.numel}


def disk(run, plan):
    """Count the plan's matrices' bytes on disk, against bfloat16; theory counts only the kept weights' bits."""
    sizes = {key: out * columns for key, (out, columns) in run.selected.items()}
    kept = sum(sizes[key] - round(target.sparsity * sizes[key]) for key, target in plan.items())
    weights = {f"{decoder.path_of(run.model, *key)}.weight": sizes[key] for key in plan}
    itemsize = stored_dtype(run.model).itemsize
    nbytes = formats.stored_bytes(run.settings.save, weights, itemsize)
    numel, bits = sum(sizes.values()), run.settings.wbits if run.settings.quantizes else 8 * itemsize
    return {"bytes": nbytes, "bits_per_weight": 8 * nbytes / numel, "ratio": 2 * numel / nbytes,
            "theoretical_ratio": 16 * numel / (bits * kept)}


def heading(run, command=None, whole=None):
    """Return all that is needed to repeat the run. whole: type of the multimodal model whose text part is pruned."""
    settings, model, parameters = run.settings, run.model, sum(p.numel() for p in run.model.parameters())
    extra, processes = sum(settings.extra_counts), distributed.world()
    data = [f"{settings.dataset}: {len(run.calibration)} sequences of {settings.seqlen} tokens",
            f"{extra} further ones" if extra else "",
            f"seed {settings.seed}, batches of {settings.batch_size}"] if run.calibration is not None else []
    own = run.record["program"]
    lines = {"command": [command],
             "versions": [f"mixgpt {own['version']}" + (f" ({own['commit'][:12]})" if own["commit"] else ""),
                          *(f"{name} {version}" for name, version in run.record["versions"].items())],
             "model": [f"{settings.model}: {type(model).__name__}, {len(decoder.layers_of(model))} layers, "
                       f"{parameters:,} parameters, {str(model.dtype).removeprefix('torch.')}, on {run.device}"
                       + (f" ({run.record['device_name']})" if run.device.type == "cuda" else ""),
                       f"the text part of a {whole}" if whole else "",
                       f"{processes} processes" if processes > 1 else ""],
             **_methods(settings, run.method, len(run.selected)),
             "data": [*data, BOS[settings.bos] if settings.bos != "never" else ""]}
    return "\n".join(f"{title:<8} {', '.join(filter(None, parts))}" for title, parts in lines.items() if any(parts))


def _methods(settings, method, count):
    """Describe how weights are pruned and quantized: {"pruning" or "grids": texts}. count: of the matrices."""
    scheme, nonuniform = settings.scheme, not settings.allocation.even
    amount = f"{settings.prunen}:{settings.prunem}" if settings.prunem else f"{settings.sparsity:.4g} of the weights"
    walk = [f"blocksize {settings.blocksize}, percdamp {settings.percdamp:g}",
            "true-sequential" if settings.true_sequential else "",
            "columns by activation" if settings.act_order else ""] if settings.calibrates else []
    pruning = [f"{method}, {amount} {'over' if nonuniform else 'in each of'} {count} matrices",
               f"alpha {settings.alpha:g}" if nonuniform else "",
               f"nprobes {settings.nprobes}" if settings.allocation.ranks else "", *walk]
    grids = [f"{scheme.wbits} bit, {'symmetric' if scheme.sym else 'asymmetric'}, for "
             f"{'a row' if scheme.groupsize == -1 else f'{scheme.groupsize} columns of a row'} each",
             "range by least error" if scheme.mse else ""] if scheme else []
    if settings.prunes:
        return {"pruning": pruning, "grids": grids}
    return {"grids": [f"{method}, {count} matrices", *grids, *walk] if scheme else []}


def plan_text(plan, selected, sensitivity):
    """Tabulate trace per weight, rank (1: most sensitive) and assigned sparsity by kind and by layer, and the total.

    plan: {(layer, name): Target}. selected: {(layer, name): (out, in)}. sensitivity: {(layer, name): trace per weight}.
    """
    frame = pd.DataFrame([(layer, experts.kind_of(name), sensitivity[layer, name], math.prod(selected[layer, name]),
                           target.sparsity) for (layer, name), target in plan.items()],
                         columns=["layer", "matrix kind", "trace", "numel", "sparsity"])
    frame["rank"] = frame["trace"].rank(ascending=False, method="first")
    tables = [table([column, "mean trace/n", "mean rank", "sparsity"], [
        [str(value), f"{group['trace'].mean():.3e}", f"{group['rank'].mean():.0f}",
         f"{np.average(group['sparsity'], weights=group['numel']):.2%}"]
        for value, group in frame.groupby(column, sort=False)]) for column in ("matrix kind", "layer")]
    total = np.average(frame["sparsity"], weights=frame["numel"])
    return "\n" + "\n\n".join([*tables, f"plan     {total:.2%} of the weights in all"])


def sparsity_table(record):
    """Tabulate measured sparsity and mean reconstruction error by kind of matrix, and the total sparsity."""
    matrices, kinds = record["matrices"], defaultdict(list)
    others = [row | {"name": f"left dense: {row['name']}"} for row in record.get("left_dense", [])]
    for row in matrices + others:
        kinds[experts.kind_of(row["name"])].append(row)
    totals = {"total": matrices} | ({"total with these": matrices + others} if others else {})
    lines = []
    for title, rows in (kinds | totals).items():
        numel = sum(math.prod(row["shape"]) for row in rows)
        zeros = sum(round(row["sparsity"] * math.prod(row["shape"])) for row in rows)
        shapes = sorted({"x".join(map(str, row["shape"])) for row in rows})
        errors = [row["error"] for row in rows if "error" in row]
        shape, error = ((f"{numel:,}", "") if title in totals else
                        (", ".join(shapes), f"{mean(errors):.2%}" if errors else "-"))
        lines.append([title, str(len(rows)), shape, f"{zeros / numel:.2%}", error])
    return table(["matrix kind", "count", "shape", "sparsity", "error"], lines)


def perplexity_table(perplexities):
    """Tabulate {"dense" or method: {dataset: perplexity}}."""
    datasets = list(next(iter(perplexities.values())))
    return table(["perplexity", *datasets],
                 [[name, *(f"{row[dataset]:.2f}" for dataset in datasets)] for name, row in perplexities.items()])


def task_table(scores):
    """Tabulate {"dense" or method: {task: {metric: value, …}}} from tasks.score, with standard errors."""
    models, rows = list(scores), []
    for task, metrics in scores[models[0]].items():
        about = [str(metrics.get(key, "")) for key in NO_METRICS]
        for metric in (key for key in metrics if key not in NO_METRICS and not key.endswith("_stderr")):
            rows.append([task, metric, *about, *(_score(scores[model][task], metric) for model in models)])
    return table(["task", "metric", *NO_METRICS, *models], rows)


def _score(metrics, metric):
    error = metrics.get(f"{metric}_stderr")
    return f"{metrics[metric]:,.4f}" + ("" if error is None else f" ± {error:.4f}")


def result_text(settings, record):
    """Return the final output: tables of sparsity, perplexity and tasks and, unless quiet, the costs."""
    parts = [sparsity_table(record)] if settings.compresses else []
    if settings.eval:
        parts.append(perplexity_table(record["perplexity"]))
    if record.get("tasks"):
        parts.append(task_table(record["tasks"]))
    if settings.quiet:
        return "\n\n".join(parts)
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in record["seconds"].items() if value >= 0.05)
    memory = ", ".join(f"{place} {value / 1e9:.2f} GB" for place, value in record["peak_memory"].items())
    parts.append(f"time {sum(record['seconds'].values()):.1f} s ({seconds}); peak memory {memory}")
    if disk := record.get("disk"):
        parts.append(f"disk {disk['bytes'] / 1e6:.1f} MB for the matrices above, {disk['bits_per_weight']:.2f} bits a "
                     f"weight, {1 / disk['ratio']:.2f} times the size of bfloat16 (in theory, without mask and grids, "
                     f"{1 / disk['theoretical_ratio']:.2f})")
    if settings.save:
        parts.append(card.report(record))
    return "\n" + "\n\n".join(parts)


def publish(settings, record):
    """Print the tables of a record and write it to the file of --record. Returns it."""
    if text := result_text(settings, record):
        print(text, flush=True)
    if settings.record and distributed.rank() == 0:
        files.write_output("--record", settings.record, json.dumps(record, indent=1) + "\n")
    return record
