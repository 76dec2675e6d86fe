"""Prune and quantize the matrices of a plan, and distil the result, before or after quantization."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from mixgpt.app.allocating import Plan
from mixgpt.app.run import Run
from mixgpt.common import choices, memory
from mixgpt.common.errors import InputError
from mixgpt.evaluation import measures
from mixgpt.modeling.streaming import locations_of, stored_dtype
from mixgpt.pruning import distill, layerwise, solvers, training
from mixgpt.pruning.targets import Outcome
from mixgpt.quant import Scheme


def compress(run: Run, plan: Plan, survey: measures.Survey) -> dict[tuple[int, str], Outcome]:
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


def _prune(run: Run, plan: Plan, survey: measures.Survey, kind: str, scheme: Scheme | None,
           memory_plan: memory.MemoryPlan) -> dict[tuple[int, str], Outcome]:
    """Prune, and quantize if a quant.Scheme is given, or quantize alone. Returns outcomes; the run keeps the plan."""
    settings, streamed, run.memory_plan = run.settings, run.streamed(memory_plan), memory_plan
    run.begin("quantization" if kind == "quantized" else "pruning" if settings.prunes else "rounding")

    def observe(index: int, layer: torch.nn.Module, outcomes: dict | None = None, start: float | None = None) -> None:
        counted, _ = survey.take(index, layer)
        if start and kind == "layer":
            run.tracker.layer(index, counted, outcomes, start)

    if run.folder:
        run.folder.put("memory_plan", asdict(memory_plan))
        run.folder.begin(kind, scheme)
    if settings.calibrates:
        saliency = choices.SALIENCIES[settings.saliency]
        recipe = solvers.Recipe(
            choices.SOLVERS[settings.solver].load(), settings.blocksize, saliency.load(), scheme,
            settings.percdamp, settings.act_order, not memory_plan.two_passes, settings.target == "dense",
            settings.bos != "each", settings.rotate,
            {key: G for key, (G, _) in plan.gradients.items()} if saliency.weighs_rows else None,
            title=choices.SOLVERS.title(settings.solver), later=None if scheme else settings.scheme,
            dtype=stored_dtype(run.model), masks=run.masks)
        if kind == "quantized":
            recipe = replace(recipe, solver=solvers.quantize, rotate=False, title="GPTQ")
        tokens = torch.cat([run.calibration, run.further[:settings.extra_counts[0]]])
        outcomes = layerwise.prune_layerwise(streamed, plan.targets, tokens, recipe, run.folder, observe)
    else:
        with run.clock.part("magnitude" if settings.prunes else "rounding"):
            outcomes = layerwise.prune_magnitude(streamed, plan.targets, scheme, run.folder, observe)
    return outcomes


def _distill(run: Run, plan: Plan, survey: measures.Survey, outcomes: dict[tuple[int, str], Outcome]
             ) -> dict[str, Any] | str:
    """Distil the pruned model, or leave it as it is and say why. Returns what to record, as an interrupted run has."""
    folder = run.folder
    grids = {key: outcome.grid for key, outcome in outcomes.items()}
    streamed, tokens = run.distilling(memory.MemoryPlan(run.settings.batch_size, run.memory_plan.on_host))

    def finish(index: int, layer: torch.nn.Module) -> None:
        survey.take(index, layer)
        of_layer = {key: outcome for key, outcome in outcomes.items() if key[0] == index}
        if folder:
            folder.save_layer(index, layer, of_layer, distilled=True)

    def result() -> dict[str, Any] | str:
        run.begin("distillation")
        for way in run.ways:
            try:
                with run.clock.part("distillation"):
                    divergence = distill.distill(
                        streamed, grids, tokens, plan.reference, run.settings.seed, way, finish, run.settings.effort,
                        folder.folder if folder else None)
                    if folder:
                        folder.flush()
                return {"divergence": divergence} | asdict(way)
            except training.Diverged as error:
                return str(error)
            except memory.OutOfMemory as error:
                failure = str(error)
                if way is not run.ways[-1]:
                    print(f"warning  distillation, {way}, batches of {way.batch_size}: {failure}", flush=True)
            memory.release()
        return failure

    distilled = run.keep("distilled", result)
    if isinstance(distilled, str):
        print(f"warning  --distill: {distilled}: the model stays as it was before distillation", flush=True)
    elif folder:
        folder.take_distilled()
    return distilled
