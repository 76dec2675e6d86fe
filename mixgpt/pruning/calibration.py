"""Calibrate a layer: linears that share an input, the Hessian of each input, forward passes that pause at linears."""

import contextlib
import itertools
from functools import partial

import torch
from greenlet import getcurrent, greenlet

from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.modeling.experts import RoutedLinear, is_split
from mixgpt.modeling.linears import hooked, linears, shared_inputs
from mixgpt.modeling.placing import on_device
from mixgpt.pruning.dense_target import DenseTwin
from mixgpt.pruning.hessian import InputHessian, activation_order
from mixgpt.pruning.rotation import rotate_heads


def groups_of(layer, index, stream, plan):
    """Return the inputs of the planned matrices, in order, each as a tuple of the names of the linears that read it."""
    names = [name for planned, name in plan if planned == index]
    groups = [tuple(name for name in group if name in names) for group in shared_inputs(layer, index, stream)]
    groups = [group for group in groups if group]
    if unused := set(names).difference(*groups):
        raise InputError(f"layer {index} {', '.join(sorted(unused))}: not called as a module, cannot be calibrated; "
                         "leave it out with --prune-only")
    return groups


class LayerHessians:
    """The Hessians of the inputs of a layer's planned matrices, and of all tokens that enter its experts."""

    def __init__(self, layer, stream, groups, nsequences, clock, twin=None):
        """groups: of `groups_of`. nsequences: over all processes. twin: a DenseTwin, which runs each batch first."""
        self.modules, self.stream, self.clock, self.twin = linears(layer), stream, clock, twin
        self.hessians = {module: InputHessian(module.in_features, nsequences, stream.device)  # first reader of an input
                         for module in (self.modules[group[0]] for group in groups)}
        self.readers, self.pools = {}, {}  # pools: of the linears that read the tokens of all experts
        for experts in filter(is_split, layer.modules()) if groups else ():
            pool = InputHessian(experts.get_submodule("0").up_proj.in_features, nsequences, stream.device)
            self.readers[experts] = pool.add_batch
            self.pools |= {linear: pool for name, linear in experts.named_modules()
                           if name.endswith(("gate_proj", "up_proj"))}
        self.undersampled = []  # names and tokens of linears with fewer tokens than columns

    def read(self, module, X):
        """Add a batch to the Hessian of a module's input."""
        with self.clock.part("Hessian"):
            self.hessians[module].add_batch(X, **self.twin.gaps(module, X) if self.twin else {})
            if not isinstance(module, RoutedLinear):  # whose tokens are of several sequences
                of_sequence = X.shape[-1] * self.stream.hidden.shape[1]
                # cheap; read only if the Hessian is not finite
                self.hessians[module].sequence_sums.append(X.reshape(-1, of_sequence).sum(1, dtype=torch.float32))

    def take(self, name):
        """Return the Hessian of a linear's input, topped up if it is an expert's and rank-deficient, and forget it.

        That is done as if the expert had seen as many tokens as it has columns: for gate and up projections by the mean
        over all tokens that enter the layer's experts, else by a multiple of the identity.
        """
        module = self.modules[name]
        hessian = self.hessians.pop(module)
        H = hessian.H  # first, as only then its tokens are those of all processes
        if isinstance(module, RoutedLinear) and (missing := hessian.columns - hessian.tokens) > 0:
            if pool := self.pools.get(module):  # all tokens have entered the experts before the first one is pruned
                H.add_(pool.H, alpha=missing / pool.tokens)
            else:
                mean = H.diagonal().mean() / max(hessian.tokens, 1)
                H.diagonal().add_(missing * torch.where(mean > 0, mean, 1.0))
            self.undersampled.append(f"{name} ({hessian.tokens})")
        return hessian


class Calibration:
    """The calibration hidden states before the next layer of a model, and of the dense model if that is the target."""

    def __init__(self, streamed, plan, tokens, recipe):
        """tokens: (N, T). plan and recipe: as in `layerwise.prune_layerwise`."""
        self.plan, self.recipe, self.clock = plan, recipe, streamed.clock
        with self.clock.part("forward"):
            self.stream = streamed.embed(tokens[distributed.share(len(tokens))], 2 if recipe.dense_target else 1)
            self.dense = self.stream.twin() if recipe.dense_target else None
        self.nsequences = len(tokens)  # over all processes

    def pass_finished(self, index, layer, files, observe):
        """Take a layer that an interrupted run has pruned, and advance the hidden states through it as that run did."""
        if self.dense:
            with on_device([layer], self.stream.device):
                self._rotate(index, layer)
                with self.clock.part("forward"):
                    self.dense.advance(layer, index)
        files.load_layer(index)
        with on_device([layer], self.stream.device), self.clock.part("forward"):
            self.stream.advance(layer, index)
            if observe:
                observe(index, layer)

    def inputs(self, index, layer, bar):
        """Yield (names of linears, factored InputHessian of the input that they read) in the order in which they run.

        The caller prunes these linears before it asks for the next input. With recipe.true_sequential, all batches
        pause in front of them meanwhile, so that later inputs come from pruned linears. At the end the hidden states
        are the layer's output, unless no matrix of a later layer is planned. Raises InputError if an input is not
        finite.
        """
        self._rotate(index, layer)
        groups = groups_of(layer, index, self.stream, self.plan)
        twin = DenseTwin(layer, index, self.stream, self.dense, groups, self.recipe.light_first) if self.dense else None
        hessians = LayerHessians(layer, self.stream, groups, self.nsequences, self.clock, twin)
        way = self._one_pass if self.recipe.true_sequential else self._two_passes
        with contextlib.closing(way(layer, index, hessians, twin)) as run:
            for group in groups:
                with self.clock.part("forward"):
                    next(run)
                yield group, self._factored(index, group, hessians.take(group[0]), bar)
            if index < max(planned for planned, _ in self.plan):
                with self.clock.part("forward"):
                    next(run, None)
        if few := hessians.undersampled:
            others = f" and {len(few) - 3} more" if len(few) > 3 else ""
            bar.write(f"layer {index}: {', '.join(few[:3])}{others} got fewer tokens than they have columns; "
                      "their Hessians are filled up with the mean over the layer's experts")

    def _rotate(self, index, layer):
        if self.recipe.rotate:
            targets = {name: target for (planned, name), target in self.plan.items() if planned == index}
            with self.clock.part("rotation"):
                rotate_heads(layer, index, self.dense or self.stream, targets, distributed.share(self.nsequences).start)

    def _one_pass(self, layer, index, hessians, twin):
        """Yield when all batches pause in front of a stop, and go on to the next one; the dense model goes first."""
        runs = [paused_forwards(layer, index, self.stream, list(hessians.hessians), hessians.read)]
        if twin:
            runs.insert(0, paused_forwards(twin.layer, index, self.dense, list(twin.stops), twin.record_input))
        with hooked(hessians.readers), hooked(twin.readers if twin else {}, outputs=True):
            yield from itertools.zip_longest(*runs)

    def _two_passes(self, layer, index, hessians, twin):
        """Run all batches of both models, yield for each stop, and run the pruned layer again."""
        stops = list(hessians.hessians)
        readers = hessians.readers | {module: partial(hessians.read, module) for module in stops}
        if twin:
            readers |= {module: partial(twin.record_input, module) for module in twin.stops}
        with hooked(readers), hooked(twin.readers if twin else {}, outputs=True):
            for rows in self.stream.batches():
                output = self.dense.forward(twin.layer, index, rows) if twin else None
                if stops:
                    self.stream.forward(layer, index, rows)
                if twin:
                    self.dense.put(rows, output)  # not earlier: a linear may read the hidden states themselves
        yield from stops
        self.stream.advance(layer, index)

    def _factored(self, index, group, hessian, bar):
        recipe, order = self.recipe, None
        if recipe.act_order:
            order = activation_order(hessian.H.diagonal(), self.plan[index, group[0]].prunem)
        try:
            with self.clock.part("factorisation"):
                percdamp = hessian.factor(recipe.percdamp, order)
        except torch.linalg.LinAlgError as error:
            finite = [bool(each) for sums in hessian.sequence_sums for each in sums.isfinite()]  # of this process
            bad = "" if all(finite) else f", from calibration sequence {finite.index(False)} on"
            raise InputError(f"layer {index} {group[0]}: {error}{bad}") from error
        if percdamp != recipe.percdamp:
            bar.write(f"layer {index} {', '.join(group)}: Hessian not positive definite at --percdamp "
                      f"{recipe.percdamp:g}, raised to {percdamp:g}")
        return hessian


@torch.no_grad()
def paused_forwards(layer, index, stream, stops, read):
    """Run all batches through layer number `index` concurrently, pausing at each module of `stops`.

    stops: modules in the order in which the layer runs them. Calls read(module, input) for each batch, and yields the
    module once all batches wait before it, so that its weights can be changed given all its inputs. When the generator
    is exhausted, the stream holds the layer's output. Every batch is a greenlet, and resumes where it paused.
    """
    def run(rows):
        stream.put(rows, stream.forward(layer, index, rows))

    def pause(module, X):
        read(module, X)
        getcurrent().parent.switch()

    batches = [greenlet(partial(run, rows)) for rows in stream.batches()]
    with hooked({module: partial(pause, module) for module in stops}):
        for module in stops:
            for batch in batches:
                batch.switch()
            yield module
        for batch in batches:
            batch.switch()
