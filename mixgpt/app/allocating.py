"""Before pruning: remove experts, measure gradients, and assign a sparsity to each matrix."""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from mixgpt.allocation import fisher, traces
from mixgpt.allocation.plan import Budget
from mixgpt.allocation.traces import Traces
from mixgpt.app.run import Run
from mixgpt.common import choices, distributed, files, memory
from mixgpt.common.progress import table
from mixgpt.modeling.experts import kind_of
from mixgpt.modeling.linears import Key
from mixgpt.pruning import distill, expert_removal
from mixgpt.pruning.targets import Target

SEQUENCES, TOKENS = 8, 4096  # Gradients are measured on so many: perplexity on twice as much is the same within 0.3%.


def with_gradients(N: int, T: int) -> range:
    """Return the calibration sequences, of N with T tokens each, on which gradients are measured: at most half."""
    return range(0, N, max(2, N // max(SEQUENCES, math.ceil(TOKENS / T))))


@dataclass(frozen=True)
class Plan:
    """What pruning needs beside the model. Empty for a dense model."""

    targets: dict[Key, Target]
    gradients: dict[Key, tuple[torch.Tensor, torch.Tensor]] | None = None  # `fisher.output_gradients` returns them.
    traces: Traces | None = None  # They are there if matrices are ranked by sensitivity.
    reference: dict[str, torch.Tensor] = field(default_factory=dict)  # A run that distils has `reference_states`.


def choose(run: Run) -> Plan:
    """Return the `Plan` of a run; print and plot it."""
    settings = run.settings
    retry = partial(run.retry, on_host=False)
    reference = {}
    if run.distills:
        run.begin("reference")
        with run.clock.part("distillation"):
            _, reference = run.keep_tensors("dense_states", lambda: (
                None, retry(lambda plan: distill.reference_states(*run.distilling(plan)))))
    if settings.experts:
        smaller = expert_removal.with_fewer_experts(run.model, settings.experts)
        kept = run.keep("experts", partial(_best_experts, run, smaller, retry))
        expert_removal.remove_experts(run.model, smaller, dict(kept))
        run.record["kept_experts"] = kept
        run.log(f"experts  {len(kept[0][1])} stay in each of {len(kept)} layers, those of highest REAP score, and "
                f"{run.model.num_parameters():,} parameters in all")
    if not settings.compresses:
        return Plan({})
    plan = retry(partial(_measure, run, reference))
    if plan.traces:
        if warning := plan.traces.warning():
            print(warning, flush=True)
        run.log(_plan_text(run, plan))
        run.tracker.plan(plan.traces, plan.targets)
    elif settings.allocation is not choices.ALLOCATIONS[settings.sparsity_way]:
        run.log(f"plan     {settings.prunen} of {settings.prunem} in each matrix: --alpha {settings.alpha:g} changes "
                "none, so no sensitivities are measured")
    elif not settings.allocation.even:
        sparsities = [target.sparsity for target in plan.targets.values()]
        run.log(f"plan     {choices.ALLOCATIONS.title(settings.sparsity_way)}: matrices from {min(sparsities):.2%} to "
                f"{max(sparsities):.2%}")
    if settings.plot and distributed.rank() == 0:
        from mixgpt.app import plots  # matplotlib takes half a second to import.
        files.write_output("--plot", settings.plot, plots.draw(plan.targets, plan.traces, Path(settings.plot).suffix))
    return plan


def _best_experts(run: Run, smaller: PreTrainedModel, retry: Callable) -> list:
    """Return [layer, the experts of highest score] of each layer, as many as `smaller` has. retry: with less memory."""
    run.begin("experts")
    with run.clock.part("experts"):
        scores = retry(lambda plan: expert_removal.expert_scores(run.streamed(plan), run.calibration))
    return [[index, expert_removal.best_experts(of_layer, smaller)] for index, of_layer in scores.items()]


def _measure(run: Run, reference: dict[str, torch.Tensor], memory_plan: memory.MemoryPlan) -> Plan:
    """Return the `Plan`: measure what the allocation needs, unless an interrupted run has, and assign the targets."""
    settings, streamed, measured = run.settings, run.streamed(memory_plan), None
    if settings.allocation.ranks:
        run.begin("sensitivity")
        with run.clock.part("sensitivity"):
            measured, path = traces.load_or_compute(streamed, run.calibration, settings.sensitivity, settings.seed,
                                                    settings.nprobes, settings.sensitivity_file)
        run.log(f"{measured.verdict()}\n         kept in {path}")

    def allocate() -> tuple[list, dict[str, torch.Tensor]]:
        gradients = {}
        if settings.needs_gradients:
            tokens = run.calibration[list(with_gradients(*run.calibration.shape))]
            run.begin("gradients")
            with run.clock.part("gradients"):
                gradients = fisher.output_gradients(streamed, list(run.selected), tokens, settings.seed,
                                                    reference.get("vocabulary"))
        found = run.masks.targets if run.masks else settings.allocation.load()(Budget(
            run.selected, run.target, settings.alpha, measured.sensitivity if measured else None, gradients, streamed,
            run.calibration))
        return [[layer, name, *astuple(target)] for (layer, name), target in found.items()], {
            f"{layer}.{name}": torch.cat(pair) for (layer, name), pair in gradients.items()}

    targets, tensors = run.keep_tensors("targets", allocate)
    gradients = {(layer, name): tensors[f"{layer}.{name}"].split(shape)
                 for (layer, name), shape in run.selected.items()} if settings.needs_gradients else None
    return Plan({(layer, name): Target(*target) for layer, name, *target in targets}, gradients, measured, reference)


def _plan_text(run: Run, plan: Plan) -> str:
    """Tabulate trace per weight, rank (1: most sensitive) and assigned sparsity by kind and by layer, and the total."""
    sensitivity = plan.traces.sensitivity
    frame = pd.DataFrame([(layer, kind_of(name), sensitivity[layer, name], math.prod(run.selected[layer, name]),
                           target.sparsity) for (layer, name), target in plan.targets.items()],
                         columns=["layer", "matrix kind", "trace", "numel", "sparsity"])
    frame["rank"] = frame["trace"].rank(ascending=False, method="first")
    tables = [table([column, "mean trace/n", "mean rank", "sparsity"], [
        [str(value), f"{group['trace'].mean():.3e}", f"{group['rank'].mean():.0f}",
         f"{np.average(group['sparsity'], weights=group['numel']):.2%}"]
        for value, group in frame.groupby(column, sort=False)]) for column in ("matrix kind", "layer")]
    total = np.average(frame["sparsity"], weights=frame["numel"])
    return "\n" + "\n\n".join([*tables, f"plan     {total:.2%} of the weights in all"])
