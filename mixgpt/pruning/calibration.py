"""Calibrate a layer: the Hessian of each input that its linears read, by forward passes that pause at linears.

In one pass through a layer, every batch of sequences is a greenlet. A stop (‖) is the first linear that reads an input:

    batch 1   x ──▶ ‖ q k v ──▶ attention ──▶ ‖ o ──▶ …   All batches pause at a stop. The inputs that wait there add up
    batch 2   x ──▶ ‖ q k v ──▶ attention ──▶ ‖ o ──▶ …   to one Hessian; the linears that read them are pruned; then
       ⋮            ▼                         ▼           the batches go on, through pruned weights, to the next stop.
                 Hessian                   Hessian

In two passes, unpruned batches first give all Hessians, then run again through the pruned layer. Readers are functions
that hooks call with what a module reads or returns. An expert that gets few tokens borrows from a pool, the Hessian of
all tokens that enter the experts of its layer. For --target dense, a twin, the dense copy of the layer, runs each batch
first: see `dense_target`.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from tqdm import tqdm

from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.common.runtime import Clock
from mixgpt.modeling.experts import RoutedLinear, is_split
from mixgpt.modeling.linears import Key, hooked, linears, shared_inputs
from mixgpt.modeling.placing import on_device
from mixgpt.modeling.running import HiddenStates, StreamedModel
from mixgpt.pruning.dense_target import DenseTwin
from mixgpt.pruning.hessian import InputHessian, activation_order
from mixgpt.pruning.rotation import rotate_heads
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target


class LayerHessians:
    """The Hessians of the inputs of a layer's planned matrices, and of all tokens that enter its experts."""

    def __init__(self, layer: nn.Module, stream: HiddenStates, groups: list[tuple[str, ...]], nsequences: int,
                 clock: Clock, twin: DenseTwin | None = None) -> None:
        self.modules, self.stream, self.clock, self.twin = linears(layer), stream, clock, twin
        self.hessians = {stop: InputHessian(stop.in_features, nsequences, stream.device)
                         for stop in (self.modules[group[0]] for group in groups)}
        self.readers, self.pools = {}, {}  # {experts: function}, {linear that reads what enters its expert: Hessian}
        for experts in filter(is_split, layer.modules()) if groups else ():
            pool = InputHessian(experts.get_submodule("0").up_proj.in_features, nsequences, stream.device)
            self.readers[experts] = pool.add_batch
            self.pools |= {linear: pool for name, linear in experts.named_modules()
                           if name.endswith(("gate_proj", "up_proj"))}
        self.undersampled = []  # The names of linears with fewer tokens than columns, and these tokens' numbers.

    def read(self, module: nn.Module, X: Tensor) -> None:
        """Add a batch to the Hessian of a module's input."""
        with self.clock.part("Hessian"):
            self.hessians[module].add_batch(X, **self.twin.gaps(module, X) if self.twin else {})
            if not isinstance(module, RoutedLinear):  # An expert's tokens come from several sequences.
                numbers = X.shape[-1] * self.stream.hidden.shape[1]
                # The sums are cheap, and looked at only if the Hessian is not finite.
                self.hessians[module].sequence_sums.append(X.reshape(-1, numbers).sum(1, dtype=torch.float32))

    def take(self, name: str) -> InputHessian:
        """Return the Hessian of a linear's input, topped up if it is an expert's and rank-deficient, and forget it.

        It is topped up to as many tokens as the expert has columns: for gate and up projections with the mean over all
        tokens that enter the layer's experts, else with a multiple of the identity.
        """
        module = self.modules[name]
        hessian = self.hessians.pop(module)
        if not isinstance(module, RoutedLinear):
            return hessian
        pool = self.pools.get(module)  # All tokens have entered the experts before the first one is pruned.
        tokens, pooled = distributed.total([hessian.tokens, pool.tokens if pool else 0])
        if (missing := hessian.columns - tokens) > 0:
            H = hessian.H
            if pool:
                H.add_(pool.H, alpha=missing / pooled)
            else:
                mean = H.diagonal().mean() / max(tokens, 1)
                H.diagonal().add_(missing * torch.where(mean > 0, mean, 1.0))
            self.undersampled.append(f"{name} ({tokens})")
        return hessian


class Calibration:
    """The calibration hidden states before the next layer, and those of the dense model, the reference, if any."""

    def __init__(self, streamed: StreamedModel, plan: dict[Key, Target], tokens: Tensor, recipe: Recipe) -> None:
        self.plan, self.recipe, self.clock = plan, recipe, streamed.clock
        with self.clock.part("forward"):
            self.stream = streamed.embed(tokens[distributed.share(len(tokens))], 2 if recipe.fits_dense else 1)
            self.reference = self.stream.copy() if recipe.fits_dense else None
        self.nsequences = len(tokens)  # The number over all processes.

    def pass_finished(self, index: int, layer: nn.Module, files: Any, observe: Callable | None) -> None:
        """Take a layer that an interrupted run has pruned, and advance the hidden states through it as that run did."""
        if self.reference:
            with on_device([layer], self.stream.device):
                self._rotate(index, layer)
                with self.clock.part("forward"):
                    self.reference.advance(layer, index)
        files.load_layer(index)
        with on_device([layer], self.stream.device), self.clock.part("forward"):
            self.stream.advance(layer, index)
            if observe:
                observe(index, layer)

    def inputs(self, index: int, layer: nn.Module, bar: tqdm) -> Iterator[tuple[tuple[str, ...], InputHessian]]:
        """Yield (names of linears, factored InputHessian of the input that they read) in the order in which they run.

        The caller prunes these linears before it asks for the next input. At the end the hidden states are the layer's
        output, unless no matrix of a later layer is planned. Raises InputError if an input is not finite.
        """
        self._rotate(index, layer)
        recipe, reference = self.recipe, self.reference
        names = [name for planned, name in self.plan if planned == index]
        with self.clock.part("forward"):
            groups = [tuple(name for name in group if name in names)
                      for group in shared_inputs(layer, index, self.stream)]
        groups = [group for group in groups if group]
        if unused := set(names).difference(*groups):
            raise InputError(f"layer {index} {', '.join(sorted(unused))}: not called as a module, cannot be "
                             "calibrated; leave it out with --prune-only")
        with self.clock.part("forward"):
            twin = DenseTwin(layer, index, self.stream, reference, groups, recipe.light_first) if reference else None
        hessians = LayerHessians(layer, self.stream, groups, self.nsequences, self.clock, twin)
        passes = self._one_pass if recipe.true_sequential else self._two_passes
        with contextlib.closing(passes(layer, index, hessians, twin)) as stops:
            for group in groups:
                with self.clock.part("forward"):
                    next(stops)
                hessian, order = hessians.take(group[0]), None
                if recipe.act_order:
                    order = activation_order(hessian.H.diagonal(), self.plan[index, group[0]].prunem)
                try:
                    with self.clock.part("factorisation"):
                        percdamp = hessian.factor(recipe.percdamp, order)
                except torch.linalg.LinAlgError as error:
                    finite = [bool(each) for sums in hessian.sequence_sums for each in sums.isfinite()]
                    bad = "" if all(finite) else f", from calibration sequence {finite.index(False)} on"
                    raise InputError(f"layer {index} {group[0]}: {error}{bad}") from error
                if percdamp != recipe.percdamp:
                    bar.write(f"layer {index} {', '.join(group)}: Hessian not positive definite at --percdamp "
                              f"{recipe.percdamp:g}, raised to {percdamp:g}")
                yield group, hessian
                del hessian
            if index < max(planned for planned, _ in self.plan):
                with self.clock.part("forward"):
                    next(stops, None)
        if twin:
            twin.readers.clear()  # They refer to the twin: it would stay in memory until Python looks for cycles.
        if few := hessians.undersampled:
            others = f" and {len(few) - 3} more" if len(few) > 3 else ""
            bar.write(f"layer {index}: {', '.join(few[:3])}{others} got fewer tokens than they have columns; "
                      "their Hessians are filled up with the mean over the layer's experts")

    def _rotate(self, index: int, layer: nn.Module) -> None:
        if self.recipe.rotate:
            targets = {name: target for (planned, name), target in self.plan.items() if planned == index}
            with self.clock.part("rotation"):
                rotate_heads(layer, index, self.reference or self.stream, targets,
                             distributed.share(self.nsequences).start, self.recipe.dtype)

    def _one_pass(self, layer: nn.Module, index: int, hessians: LayerHessians, twin: DenseTwin | None) -> Generator:
        """Yield when all batches pause in front of a stop, and go on to the next one; the dense model goes first."""
        forwards = [paused_forwards(layer, index, self.stream, list(hessians.hessians), hessians.read)]
        if twin and self.reference:
            forwards.insert(0, paused_forwards(twin.layer, index, self.reference, list(twin.stops), twin.record_input))
        with hooked(hessians.readers), hooked(twin.readers if twin else {}, outputs=True):
            yield from itertools.zip_longest(*forwards)

    def _two_passes(self, layer: nn.Module, index: int, hessians: LayerHessians, twin: DenseTwin | None) -> Generator:
        """Run all batches of both models, yield for each stop, and run the pruned layer again."""
        stops = list(hessians.hessians)
        readers = hessians.readers | {module: partial(hessians.read, module) for module in stops}
        if twin:
            readers |= {module: partial(twin.record_input, module) for module in twin.stops}
        with hooked(readers), hooked(twin.readers if twin else {}, outputs=True):
            for rows in self.stream.batches():
                outputs = [self.reference.forward(twin.layer, index, rows)] if twin else []
                if stops:
                    self.stream.forward(layer, index, rows)
                for output in outputs:
                    self.reference.put(rows, output)  # Linears may have read the hidden states themselves until now.
        yield from stops
        self.stream.advance(layer, index)


@torch.no_grad()
def paused_forwards(layer: nn.Module, index: int, stream: HiddenStates, stops: list[nn.Module],
                    read: Callable[[nn.Module, Tensor], None]) -> Generator[nn.Module]:
    """Run all batches through layer number `index` concurrently, pausing at each module of `stops`.

    stops: in the order in which the layer runs them. Calls read(module, input) for each batch, and yields the module
    once all batches wait before it, to be changed given all its inputs. At the end, the stream holds the output.
    """
    def forward(rows: slice) -> None:
        stream.put(rows, stream.forward(layer, index, rows))

    def pause(module: nn.Module, X: Tensor) -> None:
        read(module, X)
        getcurrent().parent.switch()

    batches = [greenlet(partial(forward, rows)) for rows in stream.batches()]
    with hooked({module: partial(pause, module) for module in stops}):
        for module in stops:
            for batch in batches:
                batch.switch()
            yield module
        for batch in batches:
            batch.switch()
