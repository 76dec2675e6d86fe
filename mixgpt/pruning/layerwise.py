"""Prune and quantize a whole model on calibration data, one decoder layer on the device at a time."""

import contextlib
import time
from dataclasses import replace
from functools import partial

import torch

from mixgpt.common import distributed, progress
from mixgpt.common.errors import InputError
from mixgpt.kernels.matmul import fast_linears
from mixgpt.modeling.experts import RoutedLinear
from mixgpt.modeling.streaming import prefetch
from mixgpt.pruning.calibration import groups_of, hessians_of, paused_forwards, pools_of, strengthen
from mixgpt.pruning.dense_target import DenseTwin
from mixgpt.pruning.hessian import activation_order
from mixgpt.pruning.solvers import prune_in_place
from mixgpt.pruning.targets import Outcome
from modelutils import hooked, linears, on_device


@torch.no_grad()
@fast_linears()
def prune_layerwise(streamed, plan, tokens, recipe, files=None, observe=None):
    """Prune and quantize every matrix of the plan on calibration tokens (N, T), in place.

    streamed: a modelutils.StreamedModel. plan: {(layer, name): Target}. recipe: a solvers.Recipe. Inputs come from the
    preceding pruned layers; with recipe.true_sequential also from preceding pruned linears of the same layer. files:
    a checkpoints.layer_files.LayerFiles that saves finished layers. observe: called with (index, layer, {(layer, name):
    Outcome}, time.perf_counter() at its start) for each finished layer while it is on the device. Returns
    {(layer, name): Outcome}. Raises InputError if an input is not finite.
    """
    calibrated = _Calibrated(streamed, plan, tokens, recipe)
    layers, clock, outcomes = calibrated.layers, streamed.clock, {}
    finished = files.resume_from(len(layers)) if files else []
    for index, of_layer in enumerate(finished):
        calibrated.pass_finished(index, files, advances=len(finished) < len(layers))
        outcomes |= of_layer
    first = len(finished)
    with progress.bar(range(first, len(layers)), title=recipe.title, initial=first, total=len(layers)) as bar:
        for index in bar:
            layer, start, last = layers[index], time.perf_counter(), index + 1 == len(layers)
            with on_device([layer], streamed.device):
                prefetch(layers, index + 1, streamed.device)
                new = calibrated.prune(index, last, bar)
                if observe:
                    observe(index, layer, new, start)
                if files:
                    with clock.part("save"):
                        files.save_layer(index, layer, new)
                outcomes |= new
    if files:
        with clock.part("save"):
            files.flush()
    return outcomes


class _Calibrated:
    """A model being pruned layer by layer, and the calibration hidden states before the next layer."""

    def __init__(self, streamed, plan, tokens, recipe):
        self.streamed, self.plan, self.recipe, self.clock = streamed, plan, recipe, streamed.clock
        with self.clock.part("forward"):
            self.stream = streamed.embed(tokens[distributed.share(len(tokens))], 2 if recipe.dense_target else 1)
            self.dense = self.stream.twin() if recipe.dense_target else None
        self.nsequences = len(tokens)  # over all processes
        self.layers = streamed.layers[:max(index for index, _ in plan) + 1]
        self.shared = {}  # which linears read the same input, by kind of layer
        self.few = None  # inputs of experts in this layer with fewer tokens than columns, once its pools are reduced

    def pass_finished(self, index, files, advances):
        """Take a layer that an interrupted run has pruned, and advance the hidden states through it as that run did.

        advances: whether any layer is left to prune.
        """
        device = self.streamed.device
        if advances and self.dense:
            with on_device([self.layers[index]], device), self.clock.part("forward"):
                self.dense.advance(self.layers[index], index)
        files.load_layer(index)
        if advances:
            with on_device([self.layers[index]], device), self.clock.part("forward"):
                self.stream.advance(self.layers[index], index)

    def prune(self, index, last, bar):
        """Prune layer number `index`, which is on the device, and advance the hidden states through it.

        last: its output is not needed. Returns {(layer, name): Outcome}.
        """
        layer, stream = self.layers[index], self.stream
        groups = groups_of(layer, index, stream, self.plan, self.shared)
        twin = DenseTwin(layer, index, stream, self.dense, groups) if self.dense else None
        hessians, read = hessians_of(layer, stream, groups, self.nsequences, self.clock, twin,
                                     self._token_weights(index, groups))
        pools = pools_of(layer, self.nsequences, stream.device) if groups else {}
        prune = partial(self._prune_groups, layer, index, bar, pools)
        self.few = None
        pooling = hooked({experts: pool.add_batch for experts, pool in pools.items()})
        if groups and self.recipe.true_sequential:
            runs = [paused_forwards(layer, index, stream, list(hessians), read)]
            if twin:  # it pauses at the same modules, before the layer does
                runs.insert(0, paused_forwards(twin.layer, index, self.dense, list(twin.stops), twin.record_input))
            with pooling, twin.recording() if twin else contextlib.nullcontext():
                outcomes = self._prune_in_turn(runs, dict(zip(groups, hessians, strict=True)), hessians, prune, last)
        else:
            with self.clock.part("forward"), pooling, twin.recording() if twin else contextlib.nullcontext():
                self._collect(layer, index, twin, hessians, read)
            outcomes = prune(dict(zip(groups, hessians.values(), strict=True)))
            if not last:
                with self.clock.part("forward"):
                    stream.advance(layer, index)
        if self.few:
            shown = ", ".join(self.few[:3]) + (f" and {len(self.few) - 3} more" if len(self.few) > 3 else "")
            bar.write(f"layer {index}: {shown} got fewer tokens than they have columns; their Hessians are filled up "
                      "with the mean over the layer's experts")
        return self._report(index, groups, outcomes, bar)

    def _token_weights(self, index, groups):
        """Return token weights per input, the root of the mean over the linears that read it: [(n, T)], or None."""
        weights = self.recipe.token_weights
        return weights and [torch.stack([weights[index, name] for name in group]).mean(0).sqrt() for group in groups]

    def _prune_in_turn(self, runs, stops, hessians, prune, last):
        """Prune each input's matrices once all batches have reached them, in one pass through the layer.

        stops: {group: module before which the batches pause}. Leaves the layer's output in the hidden states, except
        for the last layer.
        """
        outcomes = {}
        for group, module in stops.items():
            with self.clock.part("forward"):
                for run in runs:
                    next(run)
            outcomes |= prune({group: hessians.pop(module)})
        for run in runs:
            if last:
                run.close()
            with self.clock.part("forward"):
                next(run, None)
        return outcomes

    def _collect(self, layer, index, twin, hessians, read):
        """Accumulate a layer's Hessians over all sequences, and advance the dense hidden states."""
        for rows in self.stream.batches():
            if twin:
                with hooked({module: partial(twin.record_input, module) for module in twin.stops}):
                    output = self.dense.forward(twin.layer, index, rows)
            if hessians:
                with hooked({module: partial(read, module) for module in hessians}):
                    self.stream.forward(layer, index, rows)
            if twin:
                self.dense.hidden[rows] = output  # not earlier: a linear may read the hidden states themselves

    def _prune_groups(self, layer, index, bar, pools, hessians):
        """Prune the matrices of each input, {group: its Hessian}. Returns {(layer, name): Outcome}, on the device."""
        modules, outcomes = linears(layer), {}
        for hessian in hessians.values():
            hessian.reduce()
        self._strengthen(modules, pools, hessians)
        for group, hessian in hessians.items():
            outcomes |= self._prune_group(modules, index, group, hessian)
        bar.refresh()  # a line, if one is due
        return outcomes

    def _report(self, index, groups, outcomes, bar):
        """Return the outcomes of a layer on the host, and show them.

        The errors of all matrices are copied at once: the host waits for a GPU only then.
        """
        if not groups:
            return {}
        errors = torch.stack([outcome.error for outcome in outcomes.values()]).tolist()
        outcomes = {key: replace(outcome, error=error, grid=outcome.grid and outcome.grid.to("cpu"))
                    for (key, outcome), error in zip(outcomes.items(), errors, strict=True)}
        for group in groups:
            used = outcomes[index, group[0]].percdamp
            if used != self.recipe.percdamp:
                bar.write(f"layer {index} {', '.join(group)}: Hessian not positive definite at --percdamp "
                          f"{self.recipe.percdamp:g}, raised to {used:g}")
        bar.set_postfix_str(f"layer {index} error {sum(errors) / len(errors):.2%}")
        return outcomes

    def _strengthen(self, modules, pools, hessians):
        """Make up for tokens that the Hessians of experts lack, and note which."""
        routed = {group: hessian for group, hessian in hessians.items() if isinstance(modules[group[0]], RoutedLinear)}
        if routed and self.few is None:
            self.few = []
            for pool in pools.values():  # once: all tokens have entered the experts before the first one is pruned
                pool.reduce()
        if routed:
            self.few += [f"{group[0]} ({hessian.tokens})" for group, hessian in routed.items()
                     if strengthen(hessian, modules[group[0]], pools)]

    def _prune_group(self, modules, index, group, hessian):
        recipe, targets = self.recipe, [self.plan[index, name] for name in group]
        row_weights = recipe.row_weights and torch.cat([recipe.row_weights[index, name] for name in group]).to(
            hessian.device)
        order = activation_order(hessian.H.diagonal(), targets[0].prunem) if recipe.act_order else None
        try:
            with self.clock.part("factorisation"):
                used = hessian.factor(recipe.percdamp, order)
        except torch.linalg.LinAlgError as error:
            raise InputError(f"layer {index} {group[0]}: {error}{_first_bad(hessian)}") from error
        with self.clock.part(recipe.solver.__name__):
            pruned = prune_in_place(hessian, [modules[name].weight for name in group],
                                    [(target.sparsity, target.prunen, target.prunem) for target in targets], recipe,
                                    row_weights)
        return {(index, name): Outcome(error, used, grid)
                for name, (error, grid) in zip(group, pruned, strict=True)}


def _first_bad(hessian):
    """Name this process's first calibration sequence whose input is not finite, if any."""
    finite = torch.cat(hessian.sequence_sums).isfinite().tolist()
    return "" if all(finite) else f", from calibration sequence {finite.index(False)} on"
