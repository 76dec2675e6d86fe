"""Run the dense model beside the pruned one, layer by layer, and regress the pruned linears towards its outputs.

Notation: x and ẋ are the inputs of a linear in the dense and in the pruned model. A lag is the dense minus the pruned
residual stream just before a linear's output is added to it.
"""

import contextlib
import copy
from collections import Counter, defaultdict, deque

import torch

from mixgpt.common import distributed
from mixgpt.modeling.experts import RoutedLinear
from modelutils import hooked, linears

SHARE = 0.5  # fraction of the gap to the dense model that the regression target closes


@torch.no_grad()
def residual_writers(layer, index, stream):
    """Find the linears that write to the residual stream of layer number `index`, in order of writing.

    Runs one sequence through the layer. Returns a list of names, empty if the layer's output is not its input plus
    outputs of linears (a norm on the residual path), or anything is not finite.
    """
    x, outputs = stream.hidden[:1].to(stream.device, copy=True), {}
    writers = {name: module for name, module in linears(layer).items()
               if module.out_features == x.shape[-1] and not isinstance(module, RoutedLinear)}
    with hooked({module: lambda y, name=name: outputs.update({name: y.flatten().double()})
                 for name, module in writers.items()}, outputs=True):
        y = stream.call(layer, index, x.clone())
    change = (y.double() - x.double()).flatten()
    names, A = list(outputs), torch.stack([*outputs.values(), change], 1)
    if not outputs or not A.isfinite().all():
        return []
    A = A[:, :-1]
    share = torch.linalg.pinv(A.t() @ A, hermitian=True) @ (A.t() @ change)  # 1 for writers, 0 for others
    writes = share > 0.5
    rest = (change - A @ writes.double()).norm()
    rounding = torch.finfo(y.dtype).eps * (x.double().norm() + y.double().norm())
    return [name for name, written in zip(names, writes.tolist(), strict=True)
            if written and rest <= 0.01 * change.norm() + rounding]


def _aligned(module, x, tokens, X):
    """Return a linear's input x in the dense model for the tokens of X in the pruned one.

    Of an expert, x has the dense model's `tokens`; those that the pruned model routes there alone keep X.
    """
    if not isinstance(module, RoutedLinear):
        return x
    aligned = module.spread(X, 1)[0]
    aligned[tokens] = x
    return aligned[module.tokens]


class DenseTwin:
    """The dense copy of a layer and what it computes, batch by batch; the pruned layer runs each batch after it.

    layer: the dense copy. stops: {its module: the pruned layer's}, for the first reader of each input.
    """

    def __init__(self, layer, index, stream, dense, groups):
        """stream, dense: both models' hidden states before the layer. groups: from `calibration.groups_of`."""
        self.layer = copy.deepcopy(layer)
        modules, twins = linears(layer), linears(self.layer)
        self.stops = {twins[group[0]]: modules[group[0]] for group in groups}
        names = distributed.broadcast_object(residual_writers(layer, index, stream))
        self._writers = [(modules[name], twins[name]) for name in names]
        self._alone = {modules[group[0]] for group in groups if len(group) == 1}
        self._inputs, self._outputs, self._taken = defaultdict(deque), defaultdict(deque), Counter()
        self._lags = {module: [] for module, _ in self._writers}  # per batch
        for module, _ in self._writers[:1]:
            self._lags[module] = [(dense.hidden[rows] - stream.hidden[rows]).to(stream.device)
                                  for rows in stream.batches()]

    def record_input(self, twin, x):
        """Keep x, the input of a module of the dense layer in the next batch."""
        self._inputs[self.stops[twin]].append((x, getattr(twin, "tokens", None)))

    def fit_targets(self, module, X):
        """Return the shift or gain of a pruned layer's module in the next batch, whose input is X.

        Keyword arguments of `SparseGPT.add_batch`: half of the gap to the dense model's input and, if the module
        writes to the residual stream, half of the gap there too.
        """
        batch, self._taken[module] = self._taken[module], self._taken[module] + 1
        x, tokens = self._inputs[module].popleft()
        shift = SHARE * (_aligned(module, x, tokens, X) - X)
        if module not in self._lags or module not in self._alone:
            return {"shift": shift}
        lag = self._lags[module][batch]
        return {"gain": torch.nn.functional.linear(shift, module.weight).view_as(lag).add(lag, alpha=SHARE)}

    @contextlib.contextmanager
    def recording(self):
        """While active, record what both layers add to the residual stream."""
        readers = {}
        for (module, twin), (behind, _) in zip(self._writers, self._writers[1:], strict=False):
            readers[twin] = self._outputs[module].append
            readers[module] = lambda y, module=module, behind=behind: self._go_on(module, behind, y)
        with hooked(readers, outputs=True):
            yield

    def _go_on(self, module, behind, y):
        batch = len(self._lags[behind])
        lag, self._lags[module][batch] = self._lags[module][batch], None
        self._lags[behind].append(lag + (self._outputs[module].popleft() - y))
