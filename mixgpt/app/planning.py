"""Before pruning: remove experts, measure gradients, and assign a sparsity to each matrix."""

from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mixgpt.allocation import fisher, traces
from mixgpt.allocation.plan import Budget
from mixgpt.app.report import plan_text
from mixgpt.common import choices, distributed, files
from mixgpt.pruning import distill, expert_removal
from mixgpt.pruning.targets import Target


@dataclass(frozen=True)
class Plan:
    """What pruning needs beside the model. Empty for a dense model."""

    targets: dict  # {(layer, name): Target}
    gradients: dict | None = None  # of `output_gradients`, if needed
    traces: Any = None  # allocation.traces.Traces, if matrices are ranked by sensitivity
    dense: dict = field(default_factory=dict)  # `distill.reference_states` of the text for distillation, if it distils


def choose(run):
    """Return the `Plan` of a run; print and plot it."""
    settings = run.settings
    retry = partial(run.retry, on_host=False)
    dense = {}
    if run.distills:
        with run.clock.part("distillation"):
            _, dense = run.kept("dense_states", lambda: (
                None, retry(lambda plan: distill.reference_states(*run.distilling(plan)))))
    if settings.experts:
        _remove_experts(run, retry)
    if not settings.compresses:
        return Plan({})
    plan = retry(partial(_measure, run, dense))
    if plan.traces:
        if warning := plan.traces.warning():
            print(warning, flush=True)
        run.log(plan_text(plan.targets, run.selected, plan.traces.sensitivity))
        run.tracker.plan(plan.traces, plan.targets)
    elif settings.allocation is not choices.ALLOCATIONS[settings.sparsity_way]:
        run.log(f"plan     {settings.prunen} of {settings.prunem} in each matrix: --alpha {settings.alpha:g} changes "
                "none, so no sensitivities are measured")
    elif not settings.allocation.even:
        sparsities = [target.sparsity for target in plan.targets.values()]
        run.log(f"plan     {choices.ALLOCATIONS.title(settings.sparsity_way)}: matrices from {min(sparsities):.2%} to "
                f"{max(sparsities):.2%}")
    if settings.plot and distributed.rank() == 0:
        from mixgpt.app import plots  # matplotlib takes half a second to import
        files.write_output("--plot", settings.plot, plots.draw(plan.targets, plan.traces, Path(settings.plot).suffix))
    return plan


def _remove_experts(run, retry):
    """Remove the experts of least score, the same as an interrupted run. retry: of a step, with less memory."""
    smaller = expert_removal.with_fewer_experts(run.model, run.settings.experts)

    def choose():
        with run.clock.part("experts"):
            scores = retry(lambda plan: expert_removal.expert_scores(run.streamed(plan), run.calibration))
        return [[index, expert_removal.best_experts(of_layer, smaller)] for index, of_layer in scores.items()]

    kept = run.decided("experts", choose)
    expert_removal.remove_experts(run.model, smaller, dict(kept))
    run.record["kept_experts"] = kept
    run.log(f"experts  {len(kept[0][1])} stay in each of {len(kept)} layers, those of highest REAP score, and "
            f"{run.model.num_parameters():,} parameters in all")


def _measure(run, dense, memory_plan):
    """Return the `Plan`."""
    settings, streamed, measured = run.settings, run.streamed(memory_plan), None
    if settings.allocation.ranks:
        with run.clock.part("sensitivity"):
            measured, path = traces.load_or_compute(streamed, run.calibration, settings.sensitivity, settings.seed,
                                                    settings.nprobes, settings.sensitivity_file)
        run.log(f"{measured.verdict()}\n         kept in {path}")
    targets, tensors = run.kept("targets", lambda: _allocate(run, streamed, measured, dense.get("vocabulary")))
    gradients = {(layer, name): tensors[f"{layer}.{name}"].split(shape)
                 for (layer, name), shape in run.selected.items()} if settings.needs_gradients else None
    return Plan({(layer, name): Target(*target) for layer, name, *target in targets}, gradients, measured, dense)


def _allocate(run, streamed, measured, vocabulary):
    """Return the targets of all matrices, a JSON-able list, and the gradients used for them, a tensor for each."""
    settings, gradients = run.settings, {}
    n, m = settings.prunen, settings.prunem
    if settings.needs_gradients:
        # every second sequence gives the same perplexity, within 0.5%
        tokens = run.calibration[::2]
        with run.clock.part("gradients"):
            gradients = fisher.output_gradients(streamed, list(run.selected), tokens, settings.seed, vocabulary)
    targets = settings.allocation.load()(Budget(
        run.selected, Target(n / m, n, m) if m else Target(settings.sparsity), settings.alpha,
        measured and measured.sensitivity, gradients, streamed, run.calibration))
    return [[layer, name, *astuple(target)] for (layer, name), target in targets.items()], {
        f"{layer}.{name}": torch.cat(pair) for (layer, name), pair in gradients.items()}
