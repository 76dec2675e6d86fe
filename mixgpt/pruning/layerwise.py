"""Prune and quantize a model one decoder layer at a time, on calibration data or, as baselines, by magnitude."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mixgpt.common import distributed, progress
from mixgpt.modeling.linears import Key, linears
from mixgpt.modeling.placing import in_turn
from mixgpt.modeling.running import StreamedModel
from mixgpt.modeling.streaming import stored_dtype
from mixgpt.pruning.admm import prune_masks
from mixgpt.pruning.calibration import Calibration
from mixgpt.pruning.solvers import Recipe, prune_in_place
from mixgpt.pruning.targets import Outcome, Target
from mixgpt.quant import Grid, Scheme, meet_sparsities, quantize_nearest


@torch.no_grad()
def prune_layerwise(streamed: StreamedModel, plan: dict[Key, Target], tokens: Tensor, recipe: Recipe,
                    files: Any = None, observe: Callable | None = None) -> dict[Key, Outcome]:
    """Prune and quantize every matrix of the plan on calibration tokens (N, T), in place.

    files: a checkpoints.run_dir.RunDir that saves finished layers. observe: called with (index, layer) for each
    finished layer while it is on the device and, unless an interrupted run has finished it, with its outcomes and
    time.perf_counter() at its start. Raises InputError if an input is not finite.
    """
    calibration, outcomes, clock = Calibration(streamed, plan, tokens, recipe), {}, streamed.clock
    layers = streamed.layers[:max(index for index, _ in plan) + 1]
    for index, layer, new, bar in layers_in_turn(streamed, layers, recipe.title, outcomes, files, observe, calibration):
        modules, masks = linears(layer), recipe.masks.of_layer(index, streamed.device) if recipe.masks else {}
        for names, hessian in calibration.inputs(index, layer, bar):
            keys = [(index, name) for name in names]
            weights = recipe.row_weights
            row_weights = torch.cat([weights[key] for key in keys]).to(hessian.device) if weights else None
            with clock.part(recipe.solver.__name__):
                pruned = prune_in_place(hessian, [modules[name].weight for name in names],
                                        [plan[key] for key in keys], recipe, row_weights,
                                        [masks[name] for name in names] if masks else None)
            new |= {key: Outcome(error, hessian.percdamp, grid)
                    for key, (error, grid) in zip(keys, pruned, strict=True)}
            del hessian, pruned  # The next Hessian fills up now.
            bar.refresh()  # In a log this prints a line, if one is due.
        if new:
            errors = torch.stack([outcome.error for outcome in new.values()]).tolist()  # The only wait for a GPU.
            new |= {key: replace(outcome, error=error, grid=outcome.grid and outcome.grid.to("cpu"))
                    for (key, outcome), error in zip(new.items(), errors, strict=True)}
            bar.set_postfix_str(f"layer {index} error {sum(outcome.error for outcome in new.values()) / len(new):.2%}")
    return outcomes


def layers_in_turn(streamed: StreamedModel, layers: Sequence[nn.Module], title: str, outcomes: dict[Key, Outcome],
                   files: Any = None, observe: Callable | None = None, calibration: Calibration | None = None
                   ) -> Iterator[tuple[int, nn.Module, dict[Key, Outcome], tqdm]]:
    """Yield (index, layer, {}, progress bar) for each layer that is not finished, while it is on the device.

    The caller prunes the layer and puts its outcomes into the dict. They are then observed, saved with the layer, and
    added to `outcomes`, as are those of layers that an interrupted run has finished.
    """
    clock, finished = streamed.clock, files.resume_from(len(layers)) if files else []
    first = len(finished)
    for index, old in enumerate(finished):
        if calibration and first < len(layers):
            calibration.pass_finished(index, layers[index], files, observe)
        else:
            files.load_layer(index)
        outcomes |= old
    with progress.bar(in_turn(layers[first:], streamed.device), title=title, initial=first, total=len(layers)) as bar:
        for place, layer in bar:
            index, new, start = first + place, {}, time.perf_counter()
            yield index, layer, new, bar
            if observe:
                observe(index, layer, new, start)
            if files:
                with clock.part("save"):
                    files.save_layer(index, layer, new)
            outcomes |= new
    if files:
        with clock.part("save"):
            files.flush()


@torch.no_grad()
def prune_magnitude(streamed: StreamedModel, plan: dict[Key, Target], scheme: Scheme | None = None, files: Any = None,
                    observe: Callable | None = None) -> dict[Key, Outcome]:
    """Prune the matrices of a plan by magnitude and round them to the nearest, in place; see `prune_layerwise`."""
    title = "magnitude" if any(target.sparsity for target in plan.values()) else "nearest"
    outcomes = {}
    for index, layer, new, _ in layers_in_turn(streamed, streamed.layers, title, outcomes, files, observe):
        for name, module in linears(layer).items():
            if target := plan.get((index, name)):
                rows = len(module.weight)
                dense = module.weight[distributed.share(rows)].to(stored_dtype(streamed.model))
                W, grid = _by_magnitude(dense, target, scheme)
                module.weight.copy_(*distributed.all_gather_shares([W], [rows]))
                new[index, name] = Outcome(grid=grid and grid.gathered(rows).to("cpu"))
    return outcomes


def _by_magnitude(W: Tensor, target: Target, scheme: Scheme | None) -> tuple[Tensor, Grid | None]:
    def attempt(sparsities: Sequence[float]) -> list[tuple[Tensor, Grid | None]]:
        pruned = magnitude_prune(W, replace(target, sparsity=sparsities[0]))
        return [quantize_nearest(pruned, scheme) if scheme else (pruned, None)]

    W, grid = meet_sparsities(attempt, [target.sparsity], attempts=4 if scheme and not target.prunem else 1)[0]
    return magnitude_prune(W, target) if scheme else W, grid  # This removes what is still missing.


def magnitude_prune(W: Tensor, target: Target) -> Tensor:
    """Return W (out, in), or a process's share of its rows, with as many of its smallest weights 0 as a Target says."""
    mask, = prune_masks([W.abs().float()], [target], distributed.total([len(W)]))
    return W.masked_fill(mask, 0)
