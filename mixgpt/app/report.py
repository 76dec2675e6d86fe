"""The record of a run, mixgpt.json: what it holds, and the tables and lines that report it."""

import dataclasses
import json
import math
import platform
from collections import defaultdict
from importlib.metadata import version
from statistics import mean
from typing import Any

import torch

from mixgpt.app.allocating import Plan
from mixgpt.app.run import Run
from mixgpt.app.settings import BOS, Settings
from mixgpt.checkpoints import card, formats
from mixgpt.common import distributed, files, program
from mixgpt.common.choices import AGAIN, NO_METRICS, TOP
from mixgpt.common.progress import table
from mixgpt.evaluation.measures import Counts, MatrixSparsity, total_sparsity
from mixgpt.modeling import decoder, experts
from mixgpt.modeling.linears import Key
from mixgpt.modeling.streaming import stored_dtype
from mixgpt.pruning.targets import Outcome, Target


def facts(run: Run) -> dict[str, Any]:
    """Return the part of the record known before pruning: resolved settings, versions, device and texts."""
    settings, device = run.settings, run.device
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    packages = ("transformers", "datasets", "lm_eval") if settings.tasks else ("transformers", "datasets")
    versions = {"python": platform.python_version(), "torch": torch.__version__} | {
        name: version(name) for name in packages}
    return {"settings": dataclasses.asdict(settings) | {
                "dtype": str(run.model.dtype).removeprefix("torch."), "device": str(device)},
            **program.signature(), "device_name": device_name, "versions": versions, "data": run.sources}


def of_matrices(run: Run, plan: Plan, outcomes: dict[Key, Outcome], zeros: list[Counts]) -> dict[str, Any]:
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


def _counted(m: MatrixSparsity) -> dict[str, Any]:
    return {"layer": m.layer, "name": m.name, "shape": list(m.shape), "sparsity": m.zeros / m.numel}


def disk(run: Run, plan: dict[Key, Target]) -> dict[str, float]:
    """Count the plan's matrices' bytes on disk, against bfloat16; theory counts only the kept weights' bits."""
    sizes = {key: out * columns for key, (out, columns) in run.selected.items()}
    kept = sum(sizes[key] - round(target.sparsity * sizes[key]) for key, target in plan.items())
    weights = {f"{decoder.path_of(run.model, *key)}.weight": sizes[key] for key in plan}
    itemsize = stored_dtype(run.model).itemsize
    nbytes = formats.stored_bytes(run.folder.path, weights, itemsize)
    numel, bits = sum(sizes.values()), run.settings.wbits if run.settings.quantizes else 8 * itemsize
    return {"bytes": nbytes, "bits_per_weight": 8 * nbytes / numel, "ratio": 2 * numel / nbytes,
            "theoretical_ratio": 16 * numel / (bits * kept)}


def heading(run: Run, command: str | None = None, whole: str | None = None) -> str:
    """Return all that is needed to repeat the run. whole: type of the multimodal model whose text part is pruned."""
    settings, model, own, scheme = run.settings, run.model, run.record["program"], run.settings.scheme
    parameters, extra = sum(weight.numel() for weight in model.parameters()), sum(settings.extra_counts)
    nonuniform, processes, count = not settings.allocation.even, distributed.world(), len(run.selected)
    amount = f"{settings.prunen}:{settings.prunem}" if settings.prunem else f"{settings.sparsity:.4g} of the weights"
    pruning = [f"{run.method}, {amount} {'over' if nonuniform else 'in each of'} {count} matrices",
               f"alpha {settings.alpha:g}" if nonuniform else "",
               f"nprobes {settings.nprobes}" if settings.allocation.ranks else ""] if settings.prunes else []
    grids = ["" if settings.prunes else f"{run.method}, {count} matrices",
             f"{scheme.wbits} bit, {scheme.name}{', symmetric' if scheme.sym else ''}, for "
             f"{'a row' if scheme.groupsize == -1 else f'{scheme.groupsize} columns of a row'} each",
             "range by least error" if scheme.mse else ""] if scheme else []
    if settings.calibrates:
        (pruning or grids).extend([f"blocksize {settings.blocksize}, percdamp {settings.percdamp:g}",
                                   "true-sequential" if settings.true_sequential else "",
                                   "columns by activation" if settings.act_order else ""])
    data = [f"{settings.dataset}: {len(run.calibration)} sequences of {settings.seqlen} tokens",
            f"{extra} further ones" if extra else "",
            f"seed {settings.seed}, batches of {settings.batch_size}"] if run.calibration is not None else []
    lines = {"command": [command or ""],
             "versions": [f"mixgpt {own['version']}" + (f" ({own['commit'][:12]})" if own["commit"] else ""),
                          *(f"{name} {version}" for name, version in run.record["versions"].items())],
             "model": [f"{settings.model}: {type(model).__name__}, {len(decoder.layers_of(model))} layers, "
                       f"{parameters:,} parameters, {str(model.dtype).removeprefix('torch.')}, on {run.device}"
                       + (f" ({run.record['device_name']})" if run.device.type == "cuda" else ""),
                       f"the text part of a {whole}" if whole else "",
                       f"{processes} processes" if processes > 1 else ""],
             "pruning": pruning, "grids": grids,
             "data": [*data, BOS[settings.bos] if settings.bos != "never" else ""]}
    return "\n".join(f"{title:<8} {', '.join(filter(None, parts))}" for title, parts in lines.items() if any(parts))


def sparsity_table(record: dict[str, Any]) -> str:
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


def tables(record: dict[str, Any]) -> list[str]:
    """Return the tables of sparsities and, where a record has them, of perplexities, distances, and scores in tasks."""
    if not record:
        return []  # A dry run measures nothing.
    found, perplexities, scores = [sparsity_table(record)], record["perplexity"], record.get("tasks", {})
    if texts := list(next(iter(perplexities.values()))):
        found.append(table(["perplexity", *texts], [
            [model, *(f"{row[text]:.2f}" for text in texts)] for model, row in perplexities.items()]))
    if distances := record.get("distance"):
        rows = {f"{text}, {model}" if model == AGAIN else text: values
                for model, of_text in distances.items() for text, values in of_text.items()}
        names = list(next(iter(rows.values())))
        found.append(table(["distance to dense", *names], [
            [row, *(format(values[name], ".1%" if name == TOP else ".3f") for name in names)]
            for row, values in rows.items()]))
    rows = []
    for task, metrics in next(iter(scores.values()), {}).items():
        about = [str(metrics.get(key, "")) for key in NO_METRICS]
        for metric in (key for key in metrics if key not in NO_METRICS and not key.endswith("_stderr")):
            values = ((of_model[task][metric], of_model[task].get(f"{metric}_stderr")) for of_model in scores.values())
            rows.append([task, metric, *about, *(
                f"{value:,.4f}" + ("" if error is None else f" ± {error:.4f}") for value, error in values)])
    return [*found, table(["task", "metric", *NO_METRICS, *scores], rows)] if rows else found


def publish(settings: Settings, record: dict[str, Any]) -> dict[str, Any]:
    """Print the tables of a record and, unless quiet, the costs; write it to the file of --record. Returns it."""
    parts = tables(record) if settings.compresses else tables(record)[1:]
    if not settings.quiet:
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in record["seconds"].items() if value >= 0.05)
        memory = ", ".join(f"{place} {value / 1e9:.2f} GB" for place, value in record["peak_memory"].items())
        parts.append(f"time {sum(record['seconds'].values()):.1f} s ({seconds}); peak memory {memory}")
        if disk := record.get("disk"):
            parts.append(f"disk {disk['bytes'] / 1e6:.1f} MB for the matrices above, {disk['bits_per_weight']:.2f} "
                         f"bits a weight, {1 / disk['ratio']:.2f} times the size of bfloat16 (in theory, without mask "
                         f"and grids, {1 / disk['theoretical_ratio']:.2f})")
        if settings.save:
            parts.append(card.report(record))
        parts[0] = "\n" + parts[0]
    if parts:
        print("\n\n".join(parts), flush=True)
    if settings.record and distributed.rank() == 0:
        files.write_output("--record", settings.record, json.dumps(record, indent=1) + "\n")
    return record
