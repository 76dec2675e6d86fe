"""Prune and quantize the matrices of a plan, and distil the result, before or after quantization."""

from dataclasses import asdict, replace
from functools import partial

import torch

from mixgpt.common import choices, memory
from mixgpt.common.errors import InputError
from mixgpt.modeling.streaming import locations_of
from mixgpt.pruning import distill, layerwise, solvers


def compress(run, plan, survey):
    """Prune and quantize the matrices of a plan. Returns {(layer, name): Outcome}.

    survey: a measures.Survey, of the result at last. Raises InputError if a matrix has fewer zeros than asked.
    """
    settings, outcomes = run.settings, {}
    if plan.targets:
        last = run.distills and settings.quantizes_last
        retry = partial(memory.retry_with_less_memory, again=bool(locations_of(run.model)))
        outcomes = retry(run.memory_plan, partial(
            _prune, run, plan, survey, "layer", None if last else settings.scheme))
        if run.distills:
            run.record["distilled"] = _distill(run, plan, survey, outcomes)
        if last:
            quantized = retry(run.memory_plan, partial(_prune, run, plan, survey, "quantized", settings.scheme))
            outcomes = {key: replace(outcome, grid=quantized[key].grid) for key, outcome in outcomes.items()}
        two_passes = settings.calibrates and run.memory_plan.two_passes
        run.record["settings"] |= {"batch_size": run.memory_plan.batch_size,
                                   "true_sequential": settings.true_sequential and not two_passes}
        for m in survey.finish()[0][0]:
            target = plan.targets.get((m.layer, m.name))
            if target and m.zeros < (asked := round(target.sparsity * m.numel)):
                flag = "--gmp" if settings.gmp else f"--solver {settings.solver}"
                raise InputError(f"{flag}: layer {m.layer} {m.name} has {m.zeros:,} zeros, {m.zeros / m.numel:.2%}; "
                                 f"asked were {asked:,}, {asked / m.numel:.2%}")
    return outcomes


def _prune(run, plan, survey, stage, scheme, memory_plan):
    """Prune, and quantize if a quant.Scheme is given, or quantize alone. Returns outcomes; the run keeps the plan."""
    settings, streamed, run.memory_plan = run.settings, run.streamed(memory_plan), memory_plan

    def observe(index, layer, outcomes=None, start=None):
        counted, _ = survey.take(index, layer)
        if start and stage == "layer":
            run.tracker.layer(index, counted, outcomes, start)

    if run.files:
        run.files.keep("memory_plan", asdict(memory_plan))
        run.files.begin(stage, scheme)
    if settings.calibrates:
        saliency = choices.SALIENCIES[settings.saliency]
        recipe = solvers.Recipe(
            choices.SOLVERS[settings.solver].load(), settings.blocksize, saliency.load(), scheme,
            settings.percdamp, settings.act_order, not memory_plan.two_passes, settings.target == "dense",
            settings.bos != "each", settings.rotate,
            {key: G for key, (G, _) in plan.gradients.items()} if saliency.weighs_rows else None,
            title=choices.SOLVERS.title(settings.solver), later=None if scheme else settings.scheme)
        if stage == "quantized":
            recipe = replace(recipe, solver=solvers.quantize, rotate=False, title="GPTQ")
        tokens = torch.cat([run.calibration, run.further[:settings.extra_counts[0]]])
        outcomes = layerwise.prune_layerwise(streamed, plan.targets, tokens, recipe, run.files, observe)
    else:
        with run.clock.part("magnitude" if settings.prunes else "rounding"):
            outcomes = layerwise.prune_magnitude(streamed, plan.targets, scheme, run.files, observe)
    return outcomes


def _distill(run, plan, survey, outcomes):
    """Distil the pruned model, or leave it as it is and say why. Returns what to record, as an interrupted run has."""
    on_host, files, grids = run.memory_plan.on_host, run.files, {key: outcome.grid for key, outcome in outcomes.items()}
    streamed, tokens = run.distilling(memory.MemoryPlan(run.settings.batch_size, on_host))
    room = run.decided("distillation_batch", lambda: distill.room_for(streamed, tokens, run.settings.effort))

    def finish(index, layer):
        survey.take(index, layer)
        of_layer = {key: outcome for key, outcome in outcomes.items() if key[0] == index}
        if files:
            files.save_layer(index, layer, of_layer, distilled=True)

    def attempt(memory_plan):
        smaller = replace(streamed, batch_size=memory_plan.batch_size, on_host=memory_plan.on_host)
        with run.clock.part("distillation"):
            divergence = distill.distill(smaller, grids, tokens, plan.dense, run.settings.seed, finish,
                                         run.settings.effort)
            if files:
                files.flush()
        return {"divergence": divergence}

    def result():
        try:
            return memory.retry_with_less_memory(memory.MemoryPlan(max(room, 1), on_host), attempt)
        except (distill.Diverged, memory.OutOfMemory) as error:
            return str(error)

    distilled = run.decided("distilled", result)
    if isinstance(distilled, str):
        print(f"warning  --distill: {distilled}: the model stays as it was before distillation", flush=True)
    elif files:
        files.take_distilled()
    return distilled
