"""Before pruning: write synthetic text, remove experts, measure gradients, and assign a sparsity to each matrix."""

from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datautils import first_token
from mixgpt.allocation import traces
from mixgpt.allocation.fisher import Gradients, output_gradients
from mixgpt.allocation.plan import Budget
from mixgpt.allocation.synthetic import RESAMPLED, synthetic, windows_of
from mixgpt.app.report import plan_text
from mixgpt.common import distributed
from mixgpt.common.choices import ALLOCATIONS, ESTIMATORS
from mixgpt.common.files import write_output
from mixgpt.common.memory import MemoryPlan, retry_with_less_memory
from mixgpt.pruning import distill, expert_removal
from mixgpt.pruning.targets import Target


@dataclass(frozen=True)
class Plan:
    """What pruning needs beside the model. Empty for a dense model."""

    targets: dict  # {(layer, name): Target}
    tokens: torch.Tensor | None = None  # (n, T), on which matrices are pruned
    gradients: Gradients | None = None  # of the loss w.r.t. matrix outputs, if needed
    traces: Any = None  # allocation.traces.Traces, if matrices are ranked by sensitivity
    distillation_tokens: torch.Tensor | None = None  # (n, T)
    dense_states: torch.Tensor | None = None  # (n, T, C), after the dense model's last layer, of these tokens


def choose(run):
    """Return the `Plan` of a run; print and plot it."""
    settings = run.settings
    retry = partial(retry_with_less_memory, settings, MemoryPlan(settings.batch_size, on_host=False))
    texts = retry(partial(_texts, run))
    if settings.experts:
        _remove_experts(run, retry)
    if not settings.compresses:
        return Plan({})
    plan = retry(partial(_measure, run, texts))
    if plan.traces:
        if warning := plan.traces.warning():
            print(warning, flush=True)
        run.log(plan_text(plan.targets, run.selected, plan.traces.sensitivity))
        run.tracker.plan(plan.traces, plan.targets)
    elif settings.is_nonuniform:
        sparsities = [target.sparsity for target in plan.targets.values()]
        run.log(f"plan     {ALLOCATIONS.title(settings.sparsity_way)}: matrices from {min(sparsities):.2%} to "
                f"{max(sparsities):.2%}")
    if settings.plot and distributed.rank() == 0:
        from mixgpt.app import plots  # matplotlib takes half a second to import

        write_output("--plot", settings.plot, plots.draw(plan.targets, plan.traces, Path(settings.plot).suffix))
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


def _measure(run, texts, memory_plan):
    """Return the `Plan`. texts: as of `_texts`."""
    settings, streamed, measured = run.settings, run.streamed(memory_plan), None
    tokens, *distillation = texts
    if settings.ranks_by_sensitivity:
        sampling = traces.Sampling(settings.sensitivity, ESTIMATORS[settings.sensitivity].load(), settings.seed,
                                   settings.nprobes)
        with run.clock.part("sensitivity"):
            measured, path = traces.load_or_compute(streamed, run.calibration, sampling,
                                                    settings.sensitivity_file)
        run.log(f"{measured.verdict()}\n         kept in {path}")
    targets, tensors = run.kept("plan", lambda: _allocate(run, streamed, tokens, measured))
    return Plan({(layer, name): Target(*target) for layer, name, *target in targets}, tokens,
                Gradients.of(tensors) if settings.needs_gradients else None, measured, *distillation)


def _texts(run, memory_plan):
    """Return the tokens for the Hessians, those for distillation and the dense model's states of these, or Nones."""
    streamed, (for_hessians, for_distillation) = run.streamed(memory_plan), run.synthetic_counts
    if not for_hessians + for_distillation:
        return run.calibration, None, None

    def make():
        """Return how text was made, and {"tokens", "dense_states" of this process's share of what is distilled}."""
        with run.clock.part("synthetic"):
            tokens, how = synthetic(streamed, run.calibration, for_hessians + for_distillation, run.settings.seed,
                                    first_token(run.tokenizer, run.settings.bos))
        tensors = {"tokens": tokens}
        if for_distillation:
            windows = windows_of(tokens[for_hessians:], how)
            with run.clock.part("distillation"):
                tensors["dense_states"] = distill.dense_states(
                    distill.with_token_budget(streamed, windows, run.seqlen), windows)
        return how, tensors

    how, tensors = run.kept("synthetic", make)
    tokens, run.record["synthetic"] = tensors["tokens"], how
    if how == RESAMPLED:
        run.log(f"data     all weights do not fit on {run.device} at once: synthetic sequences are single tokens "
                "drawn in place of those of the calibration sequences, not text")
    windows = windows_of(tokens[for_hessians:], how) if for_distillation else None
    return torch.cat([run.calibration, tokens[:for_hessians]]), windows, tensors.get("dense_states")


def _allocate(run, streamed, tokens, measured):
    """Return the targets of all matrices, a JSON-able list, and the tensors of the `Gradients` used for them."""
    settings, gradients = run.settings, None
    if settings.needs_gradients:
        percdamp = settings.percdamp if ALLOCATIONS[settings.sparsity_way].by_loss else None  # needs H as well
        if settings.token_weights == "equal":  # every second sequence then gives the same perplexity, within 0.5%
            tokens = run.calibration[::2 if len(run.calibration) >= 2 * distributed.world() else 1]
        with run.clock.part("gradients"):
            gradients = output_gradients(streamed, list(run.selected), tokens, settings.seed, percdamp)
    targets = ALLOCATIONS[settings.sparsity_way].load()(Budget(
        run.selected, run.target, settings.alpha, measured and measured.sensitivity, gradients, streamed,
        run.calibration))
    return [[layer, name, *astuple(target)] for (layer, name), target in targets.items()], (
        gradients.tensors() if gradients else {})
