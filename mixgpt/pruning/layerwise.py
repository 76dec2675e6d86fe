"""Prune and quantize a whole model on calibration data, one decoder layer on the device at a time.

observe: called with (index, layer, {(layer, name): Outcome}, time.perf_counter() at its start) when a layer is finished
and still on the device.
"""

import contextlib
import time
from functools import partial

import torch

from mixgpt.common import distributed, progress
from mixgpt.common.errors import InputError
from mixgpt.kernels.matmul import fast_linears
from mixgpt.modeling.streaming import prefetch
from mixgpt.pruning.calibration import groups_of, hessians_of, paused_forwards
from mixgpt.pruning.dense_target import Beside
from mixgpt.pruning.solvers import SOLVERS, prune_in_place
from mixgpt.pruning.targets import Outcome
from modelutils import Stream, hooked, linears, on_device
from sparsegpt import SALIENCIES, activation_order


@torch.no_grad()
@fast_linears()
def prune_sparsegpt(model, family, plan, tokens, *, saliency, blocksize, percdamp, true_sequential, batch_size, device,
                    clock, scheme=None, act_order=False, folder=None, observe=None, solver="obs", to_dense=False,
                    row_weights=None, token_weights=None, on_host=False):
    """Prune and quantize every matrix of the plan on calibration tokens (N, T), in place.

    Inputs come from the pruned layers before; with true_sequential also from the pruned linears before in the same
    layer. saliency: a key of SALIENCIES. scheme: a quant.Scheme, None: do not quantize. act_order: walk the columns
    in `activation_order`. folder: a run_dir.RunDir that keeps finished layers. solver: a key of SOLVERS. to_dense: fit
    the outputs of the dense model, too, whose hidden states are then computed beside those of the pruned one.
    row_weights: {(layer, name): (out,)}, as in `prune_matrices`. token_weights: {(layer, name): (n, T)}, squares
    of what the tokens of this process count in the Hessians, of mean 1. on_host: keep hidden states on the host, where
    the device has room for them, too. Returns {(layer, name): Outcome}. Raises InputError where an input is not finite.
    """
    mine = tokens[distributed.share(len(tokens))]
    with clock.part("forward"):
        stream = Stream.embed(model, family, mine, batch_size, device, 2 if to_dense else 1, on_host)
        dense = stream.twin() if to_dense else None
    states = {"hidden": stream.hidden} | ({"dense": dense.hidden} if dense else {})
    layers = family.layers_of(model)[:max(index for index, _ in plan) + 1]
    shared = {}
    first, outcomes = folder.begin(len(layers), states) if folder else (0, {})
    with progress.bar(range(first, len(layers)), title=SOLVERS[solver], initial=first, total=len(layers)) as bar:
        for index in bar:
            layer, start = layers[index], time.perf_counter()
            with on_device([layer], device):
                prefetch(layers, index + 1, device)
                groups = groups_of(layer, index, stream, plan, shared)
                last = index + 1 == len(layers)
                prune = partial(_prune_groups, layer, index, plan, percdamp, act_order, bar, clock,
                                blocksize=blocksize, saliency=SALIENCIES[saliency], scheme=scheme, solver=solver,
                                row_weights=row_weights)
                beside = Beside(layer, index, stream, dense, groups) if dense else None
                calibration = hessians_of(layer, stream, groups, len(tokens), clock, beside,
                                          _of_groups(token_weights, index, groups) if token_weights else None)
                if groups and true_sequential:
                    made = _prune_in_turn(layer, index, stream, dense, beside, groups, *calibration, prune, clock, last)
                else:
                    hessians = _collect(layer, index, stream, dense, beside, groups, *calibration, clock)
                    made = prune(hessians) if groups else {}
                    if not last:
                        with clock.part("forward"):
                            stream.advance(layer, index)
                if observe:
                    observe(index, layer, made, start)
                if folder:
                    with clock.part("save"):
                        folder.finish(index, layer, made, None if last else states)
                outcomes |= made
    return outcomes


def _of_groups(token_weights, index, groups):
    """Return what tokens count for each input, the root of what its readers have on average: [(n, T)]."""
    return [torch.stack([token_weights[index, name] for name in group]).mean(0).sqrt() for group in groups]


def _prune_in_turn(layer, index, stream, dense, beside, groups, hessians, read, prune, clock, last):
    """Prune each input's matrices when all batches have come to them, in one run; hidden states are then those behind
    the layer, except behind the last one, where nobody needs them. The dense model's run pauses at the same places."""
    runs, outcomes = [paused_forwards(layer, index, stream, list(hessians), read)], {}
    if beside:
        runs.insert(0, paused_forwards(beside.layer, index, dense, list(beside.stops), beside.note))
    with beside.following() if beside else contextlib.nullcontext():
        for group in groups:
            with clock.part("forward"):
                *_, module = map(next, runs)
            outcomes |= prune({group: hessians.pop(module)})
        for run in runs:
            if last:
                run.close()
            with clock.part("forward"):
                next(run, None)
    return outcomes


def _collect(layer, index, stream, dense, beside, groups, hessians, read, clock):
    """Run all sequences through a layer. Returns {group: SparseGPT with the Hessian of its input}.

    The dense model's hidden states are then those behind the layer.
    """
    with clock.part("forward"), beside.following() if beside else contextlib.nullcontext():
        for rows in stream.batches():
            if beside:
                with hooked({twin: partial(beside.note, twin) for twin in beside.stops}):
                    output = dense.forward(beside.layer, index, rows)
            if groups:
                with hooked({module: partial(read, module) for module in hessians}):
                    stream.forward(layer, index, rows)
            if beside:
                dense.hidden[rows] = output  # not before: a linear may read the hidden states themselves
    return dict(zip(groups, hessians.values(), strict=True))


def _prune_groups(layer, index, plan, percdamp, act_order, bar, clock, hessians, **options):
    """Prune the matrices of each input from its Hessian; inputs are shared out to the processes."""
    modules, outcomes = linears(layer), {}
    for hessian in hessians.values():
        hessian.reduce()
    for number, (group, hessian) in enumerate(hessians.items()):
        if number % distributed.world() == distributed.rank():
            outcomes |= _prune_group(modules, index, group, hessian, plan, percdamp, act_order, clock, **options)
    for number, group in enumerate(hessians):
        source = number % distributed.world()
        for name in group:
            distributed.copy(modules[name].weight, source)
            outcomes[index, name] = distributed.tell(outcomes.get((index, name)), source)
        used = outcomes[index, group[0]].percdamp
        if used != percdamp:
            bar.write(f"layer {index} {', '.join(group)}: Hessian not positive definite at --percdamp {percdamp:g}, "
                      f"raised to {used:g}")
    bar.set_postfix_str(f"layer {index} error {sum(o.error for o in outcomes.values()) / len(outcomes):.2%}")
    return outcomes


def _first_bad(hessian):
    """Say from which calibration sequence of this process on an input is not finite, where it is not."""
    finite = torch.cat(hessian.sums).isfinite().tolist()
    return "" if all(finite) else f", from calibration sequence {finite.index(False)} on"


def _prune_group(modules, index, group, hessian, plan, percdamp, act_order, clock, solver, row_weights, **options):
    if row_weights:
        row_weights = torch.cat([row_weights[index, name] for name in group]).to(hessian.H.device)
    targets = [plan[index, name] for name in group]
    order = activation_order(hessian.H.diagonal(), targets[0].prunem) if act_order else None
    try:
        with clock.part("factorisation"):
            used = hessian.factor(percdamp, order)
    except torch.linalg.LinAlgError as error:
        raise InputError(f"layer {index} {group[0]}: {error}{_first_bad(hessian)}") from error
    with clock.part("walk" if solver == "obs" else solver):
        pruned = prune_in_place(hessian, [modules[name].weight for name in group],
                                [(target.sparsity, target.prunen, target.prunem) for target in targets], solver=solver,
                                row_weights=row_weights, **options)
    return {(index, name): Outcome(error, used, grid and grid.to("cpu"))
            for name, (error, grid) in zip(group, pruned, strict=True)}
