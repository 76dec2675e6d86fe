"""Train the matrices of a model a layer at a time: forward, and back with a step of each layer along its gradients.

A step goes forward through the layers, keeping the hidden states between them, and back, where each layer runs again
with gradients and is updated at once:

    x₀ ──▶ layer 0 ──▶ x₁ ──▶ … ──▶ layer n ──▶ xₙ₊₁ ──▶ head ──▶ KL(p ‖ q), which gives the length of the step
    g₀ ◀── layer 0 ◀── g₁ ◀── … ◀── layer n ◀── gₙ₊₁ ◀──┘         The sum over all gradients is that of the step before.

So one layer at a time needs to be on the device. With room for more, all layers stay there, and the forward's graph.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mixgpt.common import distributed, memory, program, progress
from mixgpt.common.runtime import wide
from mixgpt.modeling.linears import Key, linears
from mixgpt.modeling.placing import READER, allocate_together, in_turn, on_device
from mixgpt.modeling.running import SLICE, HiddenStates, StreamedModel, by_rows, rows_at_once
from mixgpt.modeling.streaming import disk_weights
from mixgpt.pruning.needs import Way
from mixgpt.quant import Grid

LABELS = 0.25  # The weight of the text's next token beside the dense model's prediction.
SCALES_RATE = 1e-2  # The root mean square of the change of scales in a step, as a fraction of their own.
SHORTENED = 0.5  # This share of the steps, the last ones, becomes shorter and shorter.


class Diverged(ArithmeticError):
    """A divergence or gradient is not finite. The model is as it was before distillation."""


class Training:
    """The layers in training, as a context: where they are, and what is kept of each between its turns."""

    def __init__(self, streamed: StreamedModel, chosen: dict[Key, Grid | None], tokens: Tensor,
                 reference: dict[str, Tensor], way: Way, folder: Path | None) -> None:
        self.model, self.device, self.layers, self.way = streamed.model, streamed.device, streamed.layers, way
        self.folder = folder
        self.states = [{name: _Scales(grid.to(self.device), grid) if grid else _Weight()
                        for (at, name), grid in chosen.items() if at == index} for index in range(len(self.layers))]
        self.first = min(index for index, _ in chosen)
        self.streamed, self.tokens, self.reference = streamed, tokens, reference
        self.writing: Future | None = None
        self.fall = torch.zeros((), device=self.device)  # of the loss, by a step as large as the weights

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if self.way.whole:
                stack.enter_context(on_device(self.layers, self.device))
            self.places = [disk_weights(layer) for layer in self.layers]
            self.trained = [linears(layer)[name].weight for layer, of_layer in zip(
                self.layers, self.states, strict=True) for name in of_layer]
            self.before = [] if self.places[0] else [weight.detach().to("cpu", copy=True) for weight in self.trained]
            stack.push(self._restore)
            for weight in self.trained:  # A layer that is read from disk takes this over from the one on meta.
                weight.requires_grad_(True)
            vocabulary, labels = self.reference.get("vocabulary"), self.tokens[:, 1:].contiguous()
            self.stream = replace(self.streamed, batch_size=self.way.batch_size).embed(self.tokens)
            self.head = stack.enter_context(self.stream.head(self.model, vocabulary=vocabulary))
            self.labels = labels if vocabulary is None else torch.searchsorted(vocabulary, labels)
            self.exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.exit.__exit__(*error)

    def _restore(self, kind: type | None, *_: object) -> None:
        """Let layers read from disk what they did before; after an error, weights in memory are what they were."""
        if self.writing:
            self.writing.exception()
        for weight in self.trained:
            weight.requires_grad_(False).grad = None
        for weight, before in zip(self.trained, self.before if kind else (), strict=False):
            weight.data.copy_(before)
        for layer, places in zip(self.layers, self.places, strict=True):
            if places:
                layer.disk_weights = places

    def turns(self, indices: range) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, layer) while the layer is on the device."""
        layers = [self.layers[index] for index in indices]
        turns = enumerate(layers) if self.way.whole else in_turn(layers, self.device)
        return ((indices[place], layer) for place, layer in turns)

    def run(self, steps: Sequence[Tensor]) -> float:
        """Take the steps on sequences (n,). Returns the mean divergence per token, or raises Diverged."""
        totals, shortening = [], math.ceil(SHORTENED * len(steps))
        with progress.bar(steps, title="distilling", unit="step") as bar:
            self._step(steps[0], None)
            for number, rows in enumerate(bar):
                total, count = self._step(rows, min((len(steps) - number) / shortening, 1))
                totals.append((total, count))
                bar.set_postfix_str(f"divergence {total / count:.3f}")
        if not self.fall.isfinite():
            raise Diverged("gradients became infinite")
        divergence, count = map(sum, zip(*totals, strict=True))
        return divergence / count

    def _step(self, rows: Tensor, share: float | None) -> tuple[float, float]:
        """Take a share of a step on sequences `rows`; None: measure the gradients alone. Returns divergence, tokens."""
        border = len(rows) // self.stream.batch_size * self.stream.batch_size
        batches = *rows[:border].split(self.stream.batch_size), *rows[border:].split(1)  # The stream takes these sizes.
        batches = [_Batch(part, self.stream.hidden[part].to(self.device)) for part in batches if len(part)]
        with memory.shared_fate():
            for index, layer in self.turns(range(len(self.layers))):
                for batch in batches:
                    batch.forward(self.stream, layer, index, self.way.graph)
            sums = torch.tensor([0.0, self.labels[rows].numel()], device=self.device)
            sums[0] = sum(self._turn(batch) for batch in batches)
        distributed.all_reduce(sums)
        total, count, fall = torch.cat([sums, self.fall[None]]).tolist()  # The host waits once.
        if not math.isfinite(total):
            raise Diverged(f"the divergence from the dense model is {total}")
        if not math.isfinite(fall):
            raise Diverged("gradients became infinite")
        self.fall.zero_()
        ahead = None
        for index, layer in self.turns(range(len(self.layers) - 1, self.first - 1, -1)):
            fetched = ahead.result() if ahead else self._fetched(index)
            ahead = READER.submit(self._fetched, index - 1) if index else None
            # What fits once will fit in all further steps.
            with memory.shared_fate() if share is None else contextlib.nullcontext():
                for batch in batches:
                    batch.backward(self.stream, layer, index)
            self._update(index, layer, fetched, None if share is None else {
                _Weight: share * total / (fall or 1), _Scales: share * SCALES_RATE})
        if self.writing:
            self.writing.result()
        distributed.barrier()  # From now on other processes may read what the first one of a machine has written.
        return total, count

    def _turn(self, batch: "_Batch") -> Tensor:
        """Start the gradient of a batch. Returns its divergence, summed over tokens."""
        rows, hidden = batch.rows, batch.borders[-1]
        reference, labels = self.reference["states"][rows, :-1], self.labels[rows]
        divergence, gradient = divergence_of(self.head, hidden[:, :-1].flatten(0, 1), *(
            tensor.to(self.device).flatten(0, 1) for tensor in (reference, labels)))
        batch.gradient = torch.zeros_like(hidden)
        batch.gradient[:, :-1] = gradient.view_as(hidden[:, :-1])
        return divergence

    def _fetched(self, index: int) -> dict[str, dict[str, Tensor]]:
        """Return what is kept of a layer, on the device, beside its weights: {name: {part: tensor}}."""
        shared = self.way.place != "device" and distributed.world() > 1
        return {name: {part: tensor.to(self.device, copy=shared) for part, tensor in state.kept.items()
                       if part != "weight"} for name, state in self.states[index].items()}

    def _update(self, index: int, layer: nn.Module, fetched: dict[str, dict[str, Tensor]],
                rates: dict[type, float] | None) -> None:
        """Move the rows of a layer's matrices equally far against their gradients, which are removed.

        rates: of each kind of state; None to measure alone, at first.
        """
        modules, states, gradients = linears(layer), self.states[index], []
        weights = {name: modules[name].weight for name in states}
        for name, state in states.items():
            if rates is None:
                fetched[name] = state.begin(weights[name])
            gradients.append(state.gradient(weights[name]))
            weights[name].grad = None
        if gradients:
            distributed.all_reduce(*gradients)
        for (name, state), gradient in zip(states.items(), gradients, strict=True):
            norm = torch.linalg.vector_norm(wide(gradient), dim=1, keepdim=True)  # (rows, 1)
            self.fall += state.size * norm.sum()
            if rates:
                factor = torch.where(norm > 0, rates[type(state)] * state.size / norm, 0)
                state.move(weights[name], fetched[name], gradient, factor)
            if self.places[index] and not self.way.whole:
                fetched[name]["weight"] = weights[name].detach()
        if rates is None:
            self._make_room(index, fetched)
        if self.writing:
            self.writing.result()
        self.writing = READER.submit(self._keep, index, fetched)

    def _make_room(self, index: int, fetched: dict[str, dict[str, Tensor]]) -> None:
        """Allocate what is kept of a layer, one part behind the other; its weights will be read from there."""
        parts = sorted(((name, part, tensor) for name, parts in fetched.items() for part, tensor in parts.items()),
                       key=lambda part: -part[2].itemsize)
        sizes, places = [tensor.nbytes for *_, tensor in parts], self.places[index]
        rooms = [tensor for *_, tensor in parts]
        if parts and self.way.place != "device":
            rooms = [room.view(tensor.dtype).view(tensor.shape) for room, (*_, tensor) in zip(
                allocate_together(sum(sizes), self.way.place, self.folder).split(sizes), parts, strict=True)]
        for (name, part, _), room in zip(parts, rooms, strict=True):
            self.states[index][name].kept[part] = room
            if part == "weight" and places:
                place = places[f"{name}.weight"]._replace(packed=lambda *_, room=room: room)
                self.layers[index].disk_weights = self.layers[index].disk_weights | {f"{name}.weight": place}

    def _keep(self, index: int, fetched: dict[str, dict[str, Tensor]]) -> None:
        """Keep the parts of a layer's matrices until its next turn; the first process of a machine does for all."""
        if not program.rank("LOCAL_RANK") or self.way.place == "device":
            for name, parts in fetched.items():
                for part, tensor in parts.items():
                    self.states[index][name].kept[part].copy_(tensor)


class _Batch:
    """Sequences that pass through all layers and back, with their hidden states between these."""

    def __init__(self, rows: Tensor, hidden: Tensor) -> None:
        self.rows, self.borders, self.outputs = rows, [hidden], []

    def forward(self, stream: HiddenStates, layer: nn.Module, index: int, graph: bool) -> None:
        """Run a layer. graph: whether to keep it for `backward`."""
        with torch.set_grad_enabled(graph):
            output = stream.call(layer, index, self.borders[-1].requires_grad_(graph), self.rows)
        self.outputs.append(output if graph else None)
        self.borders.append(output.detach())

    def backward(self, stream: HiddenStates, layer: nn.Module, index: int) -> None:
        """Add to the gradients of a layer's weights; the gradient is then that before it."""
        output, hidden = self.outputs.pop(), self.borders[index].requires_grad_()
        if output is None:
            with torch.enable_grad():
                output = stream.call(layer, index, hidden, self.rows)
        torch.autograd.backward(output, self.gradient)
        self.gradient = hidden.grad
        del self.borders[index:]


def divergence_of(head: Callable, hidden: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ KL(p ‖ q) over tokens (n,) and the gradient of the loss w.r.t. the states (n, C) that predict q."""
    total, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
    for h, h_dense, label, h_gradient in zip(
            *(rows.split(SLICE) for rows in (hidden, reference, labels, gradient)), strict=True):
        with torch.enable_grad():
            logits = head(h.requires_grad_())
        others = head(h_dense)  # The gradient w.r.t. the logits will replace these.
        for *pair, label_rows in by_rows(logits.detach(), others, label[:, None]):
            log_q, log_p = (wide(scores).log_softmax(-1) for scores in pair)
            difference, p = log_p - log_q, log_p.exp_()
            total += torch.dot(p.flatten(), difference.flatten())
            p.mul_(1 - LABELS).scatter_add_(1, label_rows, torch.full_like(label_rows, LABELS, dtype=p.dtype))
            pair[1].copy_(log_q.exp_().sub_(p))
        h_gradient.copy_(torch.autograd.grad(logits, h, others)[0])
    return total, gradient


class _Weight:
    """A matrix that is trained. A 16-bit weight and "below", the bits below it, are a float32 one."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}  # between the turns of its layer
        self.size: Tensor | float = 0.0  # the root mean square norm of rows, at first

    def begin(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what will be kept of a weight."""
        self.size = torch.linalg.vector_norm(wide(weight)) / len(weight) ** 0.5
        return {"below": torch.zeros_like(weight, dtype=torch.bfloat16)} if weight.itemsize == 2 else {}

    def gradient(self, weight: Tensor) -> Tensor:
        """Return the gradient, 0 where the weight is 0."""
        if weight.grad is None:
            return torch.zeros_like(weight)
        # A boolean mask would take many times as long as this one of floats on a CPU.
        return weight.grad.mul_(torch.ne(weight, 0, out=torch.empty_like(weight)))

    def move(self, weight: Tensor, kept: dict[str, Tensor], gradient: Tensor, factor: Tensor) -> None:
        """Subtract the gradient times a factor of each row (rows, 1)."""
        parts = weight, gradient, factor, *kept.values()
        # A CPU's cache holds the float32 numbers of some rows.
        rows = rows_at_once(weight.device, weight.shape[1]) if weight.device.type == "cpu" else len(weight)
        for w, g, f, *below in zip(*(part.split(rows) for part in parts), strict=True):
            change = g.to(torch.float32, copy=True).mul_(f)
            if not below:
                w.sub_(change)
                continue
            exact = below[0].float().add_(w).sub_(change)
            w.copy_(exact)
            below[0].copy_(exact.sub_(w))

    def finish(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Round the weight to the dtype on disk."""
        weight.copy_(weight.to(dtype))


class _Scales:
    """The scales of a quantized matrix: factors of them are trained; its codes stay."""

    def __init__(self, grid: Grid, result: Grid) -> None:
        """Start from a grid on the device. result: the grid that gets the scales in the end."""
        self.grid, self.result = replace(grid, scale=grid.scale.clone()), result
        self.kept: dict[str, Tensor] = {}
        self.before, self.factors = grid.scale.float(), torch.ones_like(grid.scale, dtype=torch.float32)
        self.size = grid.scale.shape[1] ** 0.5  # the root mean square norm of rows of the factors, at first
        self.order = grid.group.argsort(stable=True)  # All groups have one width.

    def begin(self, weight: Tensor) -> dict[str, Tensor]:
        """Return what will be kept of a weight."""
        units = self.grid.units(self.grid.codes(weight)).masked_fill_(weight == 0, 0)
        return {"units": units.bfloat16()}  # They are exact in it.

    def gradient(self, weight: Tensor) -> Tensor:
        """Return the gradient of the factors."""
        if weight.grad is None:
            return torch.zeros_like(self.factors)
        products = weight.grad.float().mul_(weight)
        return products[:, self.order].view(*self.before.shape, -1).sum(-1).div_(self.factors)

    def move(self, weight: Tensor, kept: dict[str, Tensor], gradient: Tensor, factor: Tensor) -> None:
        """Subtract the gradient times a factor of each row (rows, 1) from the factors."""
        self.factors.sub_(gradient.float().mul_(factor))
        self.grid.scale.copy_(self.before * self.factors)
        scale = self.grid.scale[:, self.grid.group]
        weight.copy_((kept["units"] * scale).to(scale.dtype))

    def finish(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Give the grid its scales."""
        self.result.scale.copy_(self.grid.scale)
