"""Run the dense model beside the pruned one, layer by layer, and regress the pruned linears towards its outputs.

A layer's dense copy, the twin, runs each batch first; then the pruned layer runs it. W is a linear whose output both
add to the residual stream, a writer; the circle is this sum:

    dense model    stream r ──▶ norm ──▶ … x ──▶ W ──▶ (+) ──▶ r' = r + W x    input gap  x − ẋ
                      └─────────────────────────────────┘                      lag        r − ṙ, just before the sum
    pruned model   stream ṙ ──▶ norm ──▶ … ẋ ──▶ Ŵ ──▶ (+) ──▶ ṙ' = ṙ + Ŵ ẋ
                      └─────────────────────────────────┘

Half of each gap to the dense model is closed: Ŵ ẋ is fitted to W (ẋ + (x − ẋ) / 2) or, if it is a writer, to that plus
(r − ṙ) / 2; what is added to W ẋ is its output gap. The lag before the next writer follows from what both models add.
"""

import contextlib
import copy
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixgpt.common import distributed
from mixgpt.common.runtime import wide
from mixgpt.modeling.experts import RoutedLinear
from mixgpt.modeling.linears import linears
from mixgpt.modeling.running import HiddenStates

SHARE = 0.5  # The regression target closes this fraction of a gap to the dense model.
PROBE_TOKENS = 256  # The residual stream is found on so many tokens.
SCALE_FLOOR = 0.01  # Added to the squared scale of a norm, times its mean: faint channels need not close their lag.
COEFFICIENT_TOLERANCE = 0.05  # The scale of what is added to the stream is taken for 0, or 1, if it is as close.
RESIDUAL_TOLERANCE = 0.01  # This share of a change of the stream may stay unexplained, beyond rounding.


@dataclass(frozen=True)
class Writer:
    """A linear whose output is added to the residual stream."""

    linear: str
    scale: float = 1.0  # The output is multiplied by it.
    norm: str = ""  # The module between the linear and the stream, if any.
    base: str = ""  # The module whose output is the stream here; else the stream is what the writer before it left.


@torch.no_grad()
def residual_writers(layer: nn.Module, index: int, stream: HiddenStates) -> list[Writer]:
    """Find the `Writer`s of layer number `index` by running one sequence through it, in order of writing.

    The residual stream is what modules read, or the layer returns, that differs from an earlier state of it, or from a
    norm of that, by multiples of outputs of linears, or of norms that follow them; after another change, none is.
    """
    x = stream.hidden[:1].to(stream.device, copy=True)
    search = _Search(layer, x[..., :stream.channels])
    with contextlib.ExitStack() as stack:
        for name, module in layer.named_modules():
            if not any(module.children()):
                stack.enter_context(module.register_forward_hook(partial(search.note, name), with_kwargs=True))
        y = stream.call(layer, index, x.clone(), slice(0, 1))
    search.see(search.view(y[..., :stream.channels]))
    return search.writers


class _Search:
    """What is known of a layer's residual stream while one sequence runs through it."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.shape, self.eps, self.writers = x.shape, torch.finfo(x.dtype).eps, []
        self.candidates = {name for name, module in linears(layer).items()
                           if module.out_features == x.shape[-1] and not isinstance(module, RoutedLinear)}
        self.bases: dict[str, Any] = {"": self.view(x)}  # {norm, or "": the stream behind it}
        self.pending = {}  # {linear: (norm, output)}

    def view(self, tensor: object) -> Tensor | None:
        """Return the values of some tokens, or None for a tensor that cannot be the stream."""
        if torch.is_tensor(tensor) and tensor.numel() == self.shape.numel() and tensor.shape[-1] == self.shape[-1]:
            return tensor.reshape(self.shape)[0, :PROBE_TOKENS].flatten().double()
        return None

    def note(self, name: str, _: nn.Module, args: tuple, named: dict, Y: object) -> None:
        """Note a call of a module: a linear, a norm that follows one, or a norm of the stream."""
        X, *_ = *args, *named.values()
        X, Y = self.view(X), self.view(Y)
        sources = [linear for linear, (norm, output) in self.pending.items()
                   if X is not None and not norm and torch.equal(output, X)]
        if not sources:  # A linear's output that dwarfs the stream would pass for the stream's change.
            self.see(X)
        if Y is None:
            return
        if name in self.candidates:
            self.pending[name] = "", Y
        elif X is not None and not torch.equal(X, Y):  # Dropout returns its input here.
            if sources:
                self.pending[sources[-1]] = name, Y
            elif torch.equal(X, self.bases[""]):
                self.bases[name] = Y

    def see(self, state: Tensor | None) -> None:
        """Explain a `view` as the stream plus outputs of linears, writers, times scales by least squares, if it is."""
        if state is None or not self.pending or torch.equal(state, self.bases[""]):
            return
        A = torch.stack([output for _, output in self.pending.values()], 1)
        for base, before in self.bases.items():
            change = state - before
            if not A.isfinite().all() or not change.isfinite().all():
                continue
            scales = torch.linalg.pinv(A.t() @ A, hermitian=True) @ (A.t() @ change)
            for value in (0.0, 1.0):
                scales = torch.where((scales - value).abs() < COEFFICIENT_TOLERANCE, value, scales)
            rounding = self.eps * (before.abs() + (before + change).abs())  # Each value has its own: some are huge.
            unexplained = ((change - A @ scales).abs() - rounding).clamp_min(0).norm()
            if scales.any() and unexplained <= RESIDUAL_TOLERANCE * change.norm():
                for name, scale in zip(self.pending, scales.tolist(), strict=True):
                    if scale:
                        self.writers.append(Writer(name, scale, self.pending[name][0], base))
                        base = ""
                self.bases, self.pending = {"": state}, {}
                return


def first_token_weights(hidden: Tensor) -> Tensor:
    """Return weights (B, T) of the tokens of hidden states (B, T, C).

    The first token, which all others attend to, may have a huge residual stream. Norms divide by it, so that errors
    there matter as much less as it exceeds the median. All other tokens have 1.
    """
    sizes = wide(hidden).norm(dim=-1)
    weights, first, median = torch.ones_like(sizes), sizes[:, 0], sizes.median(1).values
    weights[:, 0] = torch.where(first > median, median / first, 1.0)
    return weights


class DenseTwin:
    """The dense copy of a layer and what it computes, batch by batch; the pruned layer runs each batch after it.

    stops: {its module: the pruned layer's}, for the first reader of each input. readers: {module of either layer whose
    output reaches the residual stream: function}, to be called in every batch. groups: the readers of each input.
    """

    def __init__(self, layer: nn.Module, index: int, stream: HiddenStates, reference: HiddenStates,
                 groups: list[tuple[str, ...]], light_first: bool = False) -> None:
        self.layer, self._pruned, self.readers, self._place = copy.deepcopy(layer), layer, {}, stream.hidden.device
        modules, twins = linears(layer), linears(self.layer)
        self.stops = {twins[group[0]]: modules[group[0]] for group in groups}
        self._alone = {modules[group[0]] for group in groups if len(group) == 1}
        self._inputs, self._taken = defaultdict(deque), Counter()
        self._writers = {modules[writer.linear]: writer for writer in
                         distributed.broadcast_object(residual_writers(layer, index, stream))}
        self._lags = {module: [] for module in self._writers}  # One per batch, where the hidden states are.
        self._weights = [first_token_weights(stream.hidden[rows, ..., :stream.channels]) if light_first else None
                         for rows in stream.batches()]
        before = None
        for module, writer in self._writers.items():
            if writer.base:
                self._read(writer.base, self._lags[module].append)
            elif before:
                self._read(self._writers[before].norm or self._writers[before].linear,
                           partial(self._advance_lag, before, module))
            else:
                self._lags[module] = [reference.hidden[rows, ..., :stream.channels]
                                      - stream.hidden[rows, ..., :stream.channels] for rows in stream.batches()]
            before = module

    def _read(self, name: str, act: Callable[[Tensor], None]) -> None:
        """Call act(output in the dense model − in the pruned one), put where the hidden states are, in every batch."""
        kept = deque()
        self.readers[self.layer.get_submodule(name)] = kept.append
        self.readers[self._pruned.get_submodule(name)] = lambda y: act((kept.popleft() - y).to(self._place))

    def _advance_lag(self, module: nn.Module, next_module: nn.Module, difference: Tensor) -> None:
        """Find the lag before the next writer from the one before this writer and the difference of its outputs."""
        batch = len(self._lags[next_module])
        lag, self._lags[module][batch] = self._lags[module][batch], None
        self._lags[next_module].append(lag + self._writers[module].scale * difference)

    def record_input(self, twin: nn.Module, x: Tensor) -> None:
        """Keep x, the input of a module of the dense layer in the next batch."""
        self._inputs[self.stops[twin]].append((x, getattr(twin, "tokens", None)))

    def gaps(self, module: nn.Module, X: Tensor) -> dict[str, Tensor | None]:
        """Return half of a module's input gap or output gap in the next batch, for `InputHessian.add_batch` with X."""
        batch, self._taken[module] = self._taken[module], self._taken[module] + 1
        x, tokens = self._inputs[module].popleft()
        if isinstance(module, RoutedLinear):  # Tokens that only the pruned model routes here have no gap.
            scattered = module.scatter_to_batch(X, 1)[0]
            scattered[tokens] = x
            x = scattered[module.tokens]
        gap = SHARE * (x - X)
        if module not in self._lags or module not in self._alone:
            return {"input_gap": gap}
        writer, lag = self._writers[module], self._lags[module][batch].to(X.device)
        closing = lag  # The change of the writer's output that closes the lag, through its norm and its scale.
        if writer.norm:  # The norm is taken to scale its input as it does in the dense model.
            linear, norm = map(self.layer.get_submodule, (writer.linear, writer.norm))
            y = linear.forward(x)  # This does not call the hooks.
            scale = torch.where(y == 0, 0, wide(norm.forward(y)) / y)  # float16 does not hold its square.
            energy = scale.square() + SCALE_FLOOR * scale.square().mean(-1, keepdim=True)
            # Where y is 0, as it is for an embedding of zeros, so is the energy.
            closing = torch.where(scale == 0, 0, lag * scale / energy).to(lag.dtype)
        closing = closing / writer.scale
        output_gap = nn.functional.linear(gap, module.weight).view_as(lag).add(closing, alpha=SHARE)
        return {"output_gap": output_gap, "weights": self._weights[batch]}
