"""Prune and quantize a whole model, one decoder layer on the device at a time, with calibration or without.

observe: called with (index, layer, {(layer, name): Outcome}, time.perf_counter() at its start) when a layer is finished
and still on the device.
"""

import contextlib
import time
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from allocation import allocate, allocate_whole
from dense import Beside
from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.kernels.matmul import fast_linears
from mixgpt.modeling.streaming import prefetch
from modelutils import Stream, hooked, linears, on_device, paused_forwards, shared_inputs
from quant import Grid, meet_sparsities, quantize_nearest
from sparsegpt import SparseGPT, activation_order, magnitude_prune
from walk import SALIENCIES

SOLVERS = {"obs": "SparseGPT", "admm": "ADMM"}


@dataclass(frozen=True)
class Target:
    """How sparse one matrix shall be: a fraction of its weights, or prunen of every prunem consecutive ones."""

    sparsity: float
    prunen: int = 0
    prunem: int = 0


@dataclass(frozen=True)
class Outcome:
    """What was done to one matrix."""

    error: float | None = None  # ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration inputs, where there are any
    percdamp: float | None = None  # the damping that its Hessian needed
    grid: Grid | None = None  # where it is quantized


def select(model, family, prunem, groupsize, minlayer, maxlayer, prune_only, invert):
    """Return the shapes of the matrices to change, {(layer, name): (out, in)}, in the order of the model.

    Selected are the layers minlayer ≤ index < maxlayer and the names that contain prune_only; invert selects all
    others instead. The model may be on meta. Raises InputError where nothing is selected, or prunem or groupsize does
    not divide the columns.
    """
    selected = {}
    for index, layer in enumerate(family.layers_of(model)):
        for name, module in linears(layer).items():
            if (minlayer <= index < maxlayer and prune_only in name) == invert:
                continue
            for flag, width in {"--prunem": prunem, "--groupsize": groupsize}.items():
                if width and module.in_features % width:
                    raise InputError(f"{flag} {width}: does not divide the {module.in_features} columns of "
                                     f"layer {index} {name}")
            selected[index, name] = tuple(module.weight.shape)
    if not selected:
        names = ", ".join(linears(family.layers_of(model)[0]))
        raise InputError(f"--minlayer {minlayer} --maxlayer {maxlayer} --prune_only {prune_only!r}: select no matrix "
                         f"of {len(family.layers_of(model))} layers with {names}")
    return selected


def make_plan(selected, target, way="uniform", sensitivity=None, alpha=0.0):
    """Say how sparse each matrix shall be. Returns {(layer, name): Target}.

    selected: {(layer, name): (out, in)}. target: of all of them together. way: uniform (origin), layer-level or
    weight-level. sensitivity: {(layer, name): trace per weight}, of any matrices that include the selected ones;
    layer-level ranks layers by the sum over their selected matrices.
    """
    if way in ("uniform", "origin"):
        return dict.fromkeys(selected, target)
    unit_of = {key: key[0] if way == "layer-level" else key for key in selected}
    ranked, sizes = {}, {}
    for key, (out, columns) in selected.items():
        ranked[unit_of[key]] = ranked.get(unit_of[key], 0) + sensitivity[key]
        sizes[unit_of[key]] = sizes.get(unit_of[key], 0) + out * columns
    arguments = list(ranked.values()), list(sizes.values()), target.sparsity, alpha
    if target.prunem:
        m = target.prunem
        targets = [Target(n / m, n, m) for n in allocate_whole(*arguments, m)]
    else:
        targets = [Target(sparsity) for sparsity in allocate(*arguments)]
    of_unit = dict(zip(ranked, targets, strict=True))
    return {key: of_unit[unit_of[key]] for key in selected}


@torch.no_grad()
def prune_magnitude(model, family, plan, device, scheme=None, folder=None, observe=None):
    """Prune every matrix of the plan by magnitude and round it to the nearest grid values of `scheme`, in place.

    folder: a folder.Folder that keeps finished layers. Returns {(layer, name): Outcome}.
    """
    title = "magnitude" if any(target.sparsity for target in plan.values()) else "nearest"
    layers = family.layers_of(model)
    first, outcomes = folder.begin(len(layers)) if folder else (0, {})
    for index in tqdm(range(first, len(layers)), desc=title, unit="layer", disable=None, initial=first,
                      total=len(layers)):
        layer, made, start = layers[index], {}, time.perf_counter()
        with on_device([layer], device):
            prefetch(layers, index + 1, device)
            for name, module in linears(layer).items():
                if target := plan.get((index, name)):
                    W, grid = _by_magnitude(module.weight, target, scheme)
                    module.weight.copy_(W)
                    made[index, name] = Outcome(grid=grid and grid.to("cpu"))
            if observe:
                observe(index, layer, made, start)
            if folder:
                folder.finish(index, layer, made)
        outcomes |= made
    return outcomes


def _by_magnitude(W, target, scheme):
    if scheme is None:
        return magnitude_prune(W, target.sparsity, target.prunen, target.prunem), None
    made, = meet_sparsities(lambda asked: [quantize_nearest(
        magnitude_prune(W, asked[0], target.prunen, target.prunem), scheme)], [target.sparsity],
        attempts=1 if target.prunem else 4)
    return made


@torch.no_grad()
@fast_linears()
def prune_sparsegpt(model, family, plan, tokens, *, saliency, blocksize, percdamp, true_sequential, batch_size, device,
                    clock, scheme=None, act_order=False, folder=None, observe=None, solver="obs", to_dense=False,
                    row_weights=None, token_weights=None):
    """Prune and quantize every matrix of the plan on calibration tokens (N, T), in place.

    Inputs come from the pruned layers before; with true_sequential also from the pruned linears before in the same
    layer. saliency: a key of SALIENCIES. scheme: a quant.Scheme, None: do not quantize. act_order: walk the columns
    in `activation_order`. folder: a folder.Folder that keeps finished layers. solver: a key of SOLVERS. to_dense: fit
    the outputs of the dense model, too, whose hidden states are then computed beside those of the pruned one.
    row_weights: {(layer, name): (out,)}, as in `walk.prune_matrices`. token_weights: {(layer, name): (n, T)}, squares
    of what the tokens of this process count in the Hessians, of mean 1. Returns {(layer, name): Outcome}. Raises
    InputError where an input is not finite.
    """
    mine = tokens[distributed.share(len(tokens))]
    with clock.part("forward"):
        stream = Stream.embed(model, family, mine, batch_size, device)
        dense = Stream.embed(model, family, mine, batch_size, device) if to_dense else None
    states = {"hidden": stream.hidden} | ({"dense": dense.hidden} if dense else {})
    layers = family.layers_of(model)[:max(index for index, _ in plan) + 1]
    shared = {}
    first, outcomes = folder.begin(len(layers), states) if folder else (0, {})
    with tqdm(range(first, len(layers)), desc=SOLVERS[solver], unit="layer", disable=None, initial=first,
              total=len(layers)) as bar:
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


def groups_of(layer, index, stream, plan, shared):
    """Return the inputs that planned matrices read, in order, each as a tuple of the names of its readers.

    shared: {names of a layer's linears: its inputs}, as found in the layers before of the same making.
    """
    wanted = [name for planned, name in plan if planned == index]
    if not wanted:
        return []
    kind = tuple(linears(layer))
    if kind not in shared:
        shared[kind] = shared_inputs(layer, index, stream)
    groups = [tuple(name for name in group if name in wanted) for group in shared[kind]]
    groups = [group for group in groups if group]
    unused = set(wanted).difference(*groups)
    if unused:
        raise InputError(f"layer {index} {', '.join(sorted(unused))}: not called as a module, cannot be calibrated; "
                         "leave it out with --prune_only")
    return groups


def _of_groups(token_weights, index, groups):
    """Return what tokens count for each input, the root of what its readers have on average: [(n, T)]."""
    return [torch.stack([token_weights[index, name] for name in group]).mean(0).sqrt() for group in groups]


def hessians_of(layer, stream, groups, nsequences, clock, beside=None, token_weights=None):
    """Return {module that reads an input first: SparseGPT of that input}, in order, and what adds an input to it.

    nsequences: in all processes together. beside: a dense.Beside, whose batches come before the layer's.
    token_weights: of each input, (n, T).
    """
    modules = linears(layer)
    firsts = [modules[group[0]] for group in groups]
    hessians = {module: SparseGPT(module.in_features, nsequences, stream.device) for module in firsts}
    weights = {module: iter(of_tokens.split(stream.batch_size))  # batch by batch
               for module, of_tokens in zip(firsts, token_weights or [], strict=bool(token_weights))}

    T = stream.hidden.shape[1]

    def read(module, X):
        with clock.part("Hessian"):
            more = beside.ahead(module, X) if beside else {}
            if weights:
                more["weights"] = next(weights[module]).flatten().to(X.device)
            hessians[module].add_batch(X, **more)
            # one pass; asked for only where the Hessian is not finite
            hessians[module].sums.append(X.reshape(-1, T * X.shape[-1]).sum(1, dtype=torch.float32))

    return hessians, read


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
        pruned = hessian.prune([modules[name].weight for name in group],
                               [(target.sparsity, target.prunen, target.prunem) for target in targets], solver=solver,
                               row_weights=row_weights, **options)
    return {(index, name): Outcome(error, used, grid and grid.to("cpu"))
            for name, (error, grid) in zip(group, pruned, strict=True)}
