"""Terminal output of a run: heading, tables, costs."""

import math

import pandas as pd

from mixgpt.app.comparison import NO_METRICS, table
from mixgpt.app.settings import BOS
from mixgpt.checkpoints import load
from mixgpt.common import distributed
from mixgpt.modeling.experts import kind_of


def sparsity_table(record):
    """Tabulate measured sparsity and mean reconstruction error by kind of matrix, and the total sparsity.

    record: with the entries of `records.of_matrices`.
    """
    matrices, others = _weights(record["matrices"]), _weights(record.get("left_dense", []))
    rows = [*_kinds(matrices), _total("total", matrices)]
    if len(others):
        rows += [*_kinds(others, "left dense: "), _total("total with these", pd.concat([matrices, others]))]
    return table(["matrix kind", "count", "shape", "sparsity", "error"], rows)


def _weights(rows):
    """Return rows of a record, each on a matrix, as a DataFrame with its kind and its numbers of weights and zeros."""
    frame = pd.DataFrame(rows, columns=["name", "shape", "sparsity", "error"])
    frame["kind"], frame["numel"] = frame["name"].map(kind_of), frame["shape"].map(math.prod)
    frame["zeros"] = (frame["sparsity"] * frame["numel"]).round()
    return frame


def _kinds(weights, prefix=""):
    for kind, group in weights.groupby("kind", sort=False):
        shapes = sorted({"x".join(map(str, shape)) for shape in group["shape"]})
        error = group["error"].astype(float).mean()  # NaN without calibration
        yield [prefix + kind, str(len(group)), ", ".join(shapes), f"{group['zeros'].sum() / group['numel'].sum():.2%}",
               "-" if math.isnan(error) else f"{error:.2%}"]


def _total(title, weights):
    numel = weights["numel"].sum()
    return [title, str(len(weights)), f"{numel:,}", f"{weights['zeros'].sum() / numel:.2%}", ""]


def plan_text(settings, target, plan, selected, sensitivity):
    """Tabulate trace per weight, rank (1: most sensitive) and assigned sparsity by kind and by layer, and the total.

    target: the overall one. plan: {(layer, name): Target}. selected: {(layer, name): (out, in)}. sensitivity: {(layer,
    name): trace per weight}.
    """
    frame = pd.DataFrame([(layer, kind_of(name), sensitivity[layer, name], math.prod(selected[layer, name]),
                           each.sparsity) for (layer, name), each in plan.items()],
                         columns=["layer", "matrix kind", "trace", "numel", "sparsity"])
    frame["rank"] = frame["trace"].rank(ascending=False, method="first")
    frame["pruned"] = frame["sparsity"] * frame["numel"]
    tables = [table([column, "mean trace/n", "mean rank", "sparsity"], [
        [str(value), f"{group['trace'].mean():.3e}", f"{group['rank'].mean():.0f}",
         f"{group['pruned'].sum() / group['numel'].sum():.2%}"]
        for value, group in frame.groupby(column, sort=False)]) for column in ("matrix kind", "layer")]
    total = frame["pruned"].sum() / frame["numel"].sum()
    met = not settings.prunem or abs(total - target.sparsity) < 1e-9
    closest = "" if met else f", as close to {target.sparsity:.2%} as whole n of {settings.prunem} allow"
    return "\n" + "\n\n".join([*tables, f"plan     {total:.2%} of the weights in all{closest}"])


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
    value, error = metrics[metric], metrics.get(f"{metric}_stderr")
    digits = 2 if abs(value) >= 100 else 4
    return f"{value:,.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def kernels_line(result, dense):
    """Report semistructured.compare's result, or why it was skipped. dense: dense kernels' {test set: perplexity}."""
    if "skipped" in result:
        return f"semi-structured kernels: skipped, {result['skipped']}"
    perplexities = ", ".join(f"{name} {value:.2f} ({dense[name]:.2f})" for name, value in result["perplexity"].items())
    seconds = result["seconds"]
    return (f"semi-structured kernels: layers run {result['speed_up']:.2f} times as fast as on dense ones "
            f"({seconds['semi_structured']:.2f} s, {seconds['dense']:.2f} s), {result['matrices']} matrices "
            f"compressed; their outputs differ by {result['difference']:.2%} at most\n"
            f"perplexity on them, in brackets on dense kernels: {perplexities}")


def disk_line(disk):
    """Report the size of the changed matrices on disk; see `records.disk` for the keys."""
    return (f"disk {disk['bytes'] / 1e6:.1f} MB for the matrices above, {disk['bits_per_weight']:.2f} bits a weight, "
            f"{disk['ratio']:.2f} times smaller than bfloat16 (in theory, without mask and grids, "
            f"{disk['theoretical_ratio']:.2f} times)")


def cost_line(seconds, peak):
    """Report seconds per part, except those that round to 0, and peak memory in one line."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value >= 0.05)
    memory = ", ".join(f"{place} {value / 1e9:.2f} GB" for place, value in peak.items())
    return f"time {sum(seconds.values()):.1f} s ({parts}); peak memory {memory}"


def heading(inputs, model, versions, command=None):
    """Return the heading: all that is needed to reproduce the run. command: the command line."""
    settings, parameters = inputs.settings, sum(p.numel() for p in model.parameters())
    whole = load.multimodal(settings.model) if inputs.model is None else None
    lines = [f"command  {command}"] if command else []
    lines += ["versions " + ", ".join(f"{name} {version}" for name, version in versions.items()),
              f"model    {settings.model}: {type(model).__name__}, {len(inputs.family.layers_of(model))} layers, "
              f"{parameters:,} parameters, {str(model.dtype).removeprefix('torch.')}, on {inputs.device}"
              + (f", the text part of a {whole}" if whole else "")
              + (f", {distributed.world()} processes" if distributed.world() > 1 else "")]
    lines += [f"{verb:<8} {how}" for verb, how in _methods(settings, len(inputs.selected)).items()]
    data = []
    if inputs.calibration is not None:
        synthetic = sum(settings.synthetic_counts())
        data.append(f"{settings.dataset}: {len(inputs.calibration)} sequences of {inputs.seqlen} tokens, "
                    + (f"{synthetic} synthetic ones, " if synthetic else "")
                    + f"seed {settings.seed}, batches of {settings.batch_size}")
    data += [BOS[settings.bos]] if settings.bos != "never" else []
    return "\n".join(lines + ([f"data     {', '.join(data)}"] if data else []))


def _methods(settings, count):
    """Describe how weights are pruned and quantized: {"pruning" or "grids": text}."""
    how = {}
    walk = f", blocksize {settings.blocksize}, percdamp {settings.percdamp:g}" + (
        ", true-sequential" if settings.true_sequential else "") + (
        ", columns by activation" if settings.act_order else "") if settings.calibrates else ""
    if settings.prunes:
        n, m = settings.prunen, settings.prunem
        amount = f"{n}:{m}" if m else f"{settings.sparsity:.4g} of the weights"
        where = "over" if settings.is_nonuniform else "in each of"
        spread = (f", alpha {settings.alpha:g}" if settings.is_nonuniform else "") + (
            f", nprobes {settings.nprobes}" if settings.ranks_by_sensitivity else "")
        how["pruning"] = f"{settings.method}, {amount} {where} {count} matrices{spread}{walk}"
    if scheme := settings.scheme:
        name = "" if settings.prunes else f"{settings.method}, {count} matrices, "
        grids = "a row" if scheme.groupsize == -1 else f"{scheme.groupsize} columns of a row"
        how["grids"] = (f"{name}{scheme.wbits} bit, {'symmetric' if scheme.sym else 'asymmetric'}, for {grids} each"
                        + (", range by least error" if scheme.mse else "") + ("" if settings.prunes else walk))
    return how


def result_text(settings, record):
    """Return the final output: tables of sparsity, perplexity and tasks and, unless quiet, the costs."""
    parts = [sparsity_table(record)] if settings.compresses else []
    perplexities, scores = record["perplexity"], record.get("tasks")
    if settings.eval:
        parts.append(perplexity_table(perplexities))
    if scores:
        parts.append(task_table(scores))
    if "semi_structured" in record:
        parts.append(kernels_line(record["semi_structured"], list(perplexities.values())[-1]))
    if settings.quiet:
        return "\n\n".join(parts)
    parts.append(cost_line(record["seconds"], record["peak_memory"]))
    if "disk" in record:
        parts.append(disk_line(record["disk"]))
    if settings.save:
        parts.append(f"saved in {settings.save}, loaded again and found equal")
    return "\n" + "\n\n".join(parts)
