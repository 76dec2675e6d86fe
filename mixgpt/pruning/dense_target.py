"""Run the dense model beside the pruned one, layer by layer, and regress the pruned linears towards its outputs.

Notation: x and ẋ are the inputs of a linear in the dense and in the pruned model. A lag is the dense minus the pruned
residual stream just before a linear's output is added to it.
"""

import contextlib
import copy
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from functools import partial

import torch

from mixgpt.common import distributed
from mixgpt.common.runtime import wide
from mixgpt.modeling.experts import RoutedLinear
from mixgpt.modeling.linears import linears

SHARE = 0.5  # fraction of the gap to the dense model that the regression target closes
PROBE_TOKENS = 256  # on which the residual stream is found
SCALE_FLOOR = 0.01  # added to the squared scale of a norm, times its mean: faint channels need not close their lag
COEFFICIENT_TOLERANCE = 0.05  # of the scale of what is added to the stream: it is 0, or 1, up to rounding
RESIDUAL_TOLERANCE = 0.01  # share of a change of the stream that may stay unexplained, beyond rounding


@dataclass(frozen=True)
class Writer:
    """A linear whose output is added to the residual stream."""

    linear: str
    scale: float = 1.0  # factor of what is added
    norm: str = ""  # module between the linear and the stream, if any
    base: str = ""  # module whose output is the stream there; else the stream is what the writer before it left


@torch.no_grad()
def residual_writers(layer, index, stream):
    """Find the `Writer`s of layer number `index` by running one sequence through it, in order of writing.

    The residual stream is what modules read, or the layer returns, that differs from an earlier state of it, or from a
    norm of that, by multiples of outputs of linears, or of norms that follow them; after anything else, none is.
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

    def __init__(self, layer, x):
        self.shape, self.writers = x.shape, []
        self.candidates = {name for name, module in linears(layer).items()
                           if module.out_features == x.shape[-1] and not isinstance(module, RoutedLinear)}
        self.bases, self.pending = {"": self.view(x)}, {}  # {norm, or "": stream behind it}, {linear: (norm, output)}
        self.eps = torch.finfo(x.dtype).eps

    def view(self, tensor):
        """Return the values of some tokens, or None for a tensor that cannot be the stream."""
        if torch.is_tensor(tensor) and tensor.numel() == self.shape.numel() and tensor.shape[-1] == self.shape[-1]:
            return tensor.reshape(self.shape)[0, :PROBE_TOKENS].flatten().double()
        return None

    def note(self, name, _, args, named, Y):
        """Note a call of a module: of a linear, of a norm that follows one, or of a norm of the stream."""
        X, *_ = *args, *named.values()
        X, Y = self.view(X), self.view(Y)
        sources = [linear for linear, (norm, output) in self.pending.items()
                   if X is not None and not norm and torch.equal(output, X)]
        if not sources:  # an output that dwarfs the stream would pass for its change
            self.see(X)
        if Y is None:
            return
        if name in self.candidates:
            self.pending[name] = "", Y
        elif X is not None and not torch.equal(X, Y):  # dropout does nothing here
            if sources:
                self.pending[sources[-1]] = name, Y
            elif torch.equal(X, self.bases[""]):
                self.bases[name] = Y

    def see(self, state):
        """Explain a `view` of a tensor as a later state of the stream, if it is one."""
        if state is None or not self.pending or torch.equal(state, self.bases[""]):
            return
        for base, before in self.bases.items():
            if found := self._explain(state - before, before, base):
                self.writers += found
                self.bases, self.pending = {"": state}, {}
                return

    def _explain(self, change, before, base):
        """Return the writers whose outputs, times scales by least squares, sum up to a change, in order; [] if none."""
        A = torch.stack([output for _, output in self.pending.values()], 1)
        if not A.isfinite().all() or not change.isfinite().all():
            return []
        scales = torch.linalg.pinv(A.t() @ A, hermitian=True) @ (A.t() @ change)
        for value in (0.0, 1.0):
            scales = torch.where((scales - value).abs() < COEFFICIENT_TOLERANCE, value, scales)
        rounding = self.eps * (before.abs() + (before + change).abs())  # of each value, as some tokens' are huge
        unexplained = ((change - A @ scales).abs() - rounding).clamp_min(0).norm()
        if not scales.any() or unexplained > RESIDUAL_TOLERANCE * change.norm():
            return []
        writers = [(name, scale) for name, scale in zip(self.pending, scales.tolist(), strict=True) if scale]
        return [Writer(name, scale, self.pending[name][0], base if position == 0 else "")
                for position, (name, scale) in enumerate(writers)]


def first_token_weights(hidden):
    """Return weights (B, T) of the tokens of hidden states (B, T, C).

    The first token of a sequence, which all others attend to, may have a huge residual stream. Norms divide by it, so
    errors of what is added there matter as much less as it exceeds the median. All other tokens have 1.
    """
    sizes = wide(hidden).norm(dim=-1)
    weights, first, median = torch.ones_like(sizes), sizes[:, 0], sizes.median(1).values
    weights[:, 0] = torch.where(first > median, median / first, 1.0)
    return weights


class DenseTwin:
    """The dense copy of a layer and what it computes, batch by batch; the pruned layer runs each batch after it.

    layer: the dense copy. stops: {its module: the pruned layer's}, for the first reader of each input. readers: of the
    outputs that reach the residual stream, {module of either layer: function}, to be called in every batch.
    """

    def __init__(self, layer, index, stream, dense, groups, light_first=False):
        """Prepare for all batches.

        stream, dense: both models' hidden states before the layer. groups: from `calibration.groups_of`. light_first:
        whether what writes to the stream weighs tokens by `first_token_weights`.
        """
        self.layer, self._pruned, self.readers, self._place = copy.deepcopy(layer), layer, {}, stream.hidden.device
        modules, twins = linears(layer), linears(self.layer)
        self.stops = {twins[group[0]]: modules[group[0]] for group in groups}
        self._alone = {modules[group[0]] for group in groups if len(group) == 1}
        self._inputs, self._taken = defaultdict(deque), Counter()
        self._writers = {modules[writer.linear]: writer for writer in
                         distributed.broadcast_object(residual_writers(layer, index, stream))}
        self._lags = {module: [] for module in self._writers}  # per batch, where the hidden states are
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
                self._lags[module] = [dense.hidden[rows, ..., :stream.channels]
                                      - stream.hidden[rows, ..., :stream.channels] for rows in stream.batches()]
            before = module

    def _read(self, name, act):
        """Call act(output in the dense model − in the pruned one), put where the hidden states are, in every batch."""
        kept = deque()
        self.readers[self.layer.get_submodule(name)] = kept.append
        self.readers[self._pruned.get_submodule(name)] = lambda y: act((kept.popleft() - y).to(self._place))

    def _advance_lag(self, module, next_module, difference):
        batch = len(self._lags[next_module])
        lag, self._lags[module][batch] = self._lags[module][batch], None
        self._lags[next_module].append(lag + self._writers[module].scale * difference)

    def record_input(self, twin, x):
        """Keep x, the input of a module of the dense layer in the next batch."""
        self._inputs[self.stops[twin]].append((x, getattr(twin, "tokens", None)))

    def gaps(self, module, X):
        """Return the input or output gap of a pruned layer's module in the next batch, whose input is X.

        Keyword arguments of `InputHessian.add_batch`: half of the gap to the dense model's input and, if the module
        writes to the residual stream, half of the gap there too, and the weights of its tokens.
        """
        batch, self._taken[module] = self._taken[module], self._taken[module] + 1
        x, tokens = self._inputs[module].popleft()
        if isinstance(module, RoutedLinear):  # tokens that the pruned model alone routes here keep X
            of_batch = module.scatter_to_batch(X, 1)[0]
            of_batch[tokens] = x
            x = of_batch[module.tokens]
        gap = SHARE * (x - X)
        if module not in self._lags or module not in self._alone:
            return {"input_gap": gap}
        lag = self._lags[module][batch].to(X.device)
        missing = self._before(module, x, lag)
        output_gap = torch.nn.functional.linear(gap, module.weight).view_as(lag).add(missing, alpha=SHARE)
        return {"output_gap": output_gap, "weights": self._weights[batch]}

    def _before(self, module, x, lag):
        """Return the change of a writer's output that closes a lag of the stream: through its scale and its norm."""
        writer = self._writers[module]
        if writer.norm:  # taken to scale its input as it does in the dense model
            linear, norm = map(self.layer.get_submodule, (writer.linear, writer.norm))
            y = linear.forward(x)  # without hooks
            scale = torch.where(y == 0, 0, wide(norm.forward(y)) / y)  # float16 does not hold its square
            energy = scale.square() + SCALE_FLOOR * scale.square().mean(-1, keepdim=True)
            # energy is 0 where y is, as of an embedding of 0
            lag = torch.where(scale == 0, 0, lag * scale / energy).to(lag.dtype)
        return lag / writer.scale
