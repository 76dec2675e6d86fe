"""Run a model one decoder layer at a time, on batches of sequences."""

import contextlib
import copy
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import mixgpt.modeling.baichuan  # noqa: F401, registers Baichuan with the Auto classes
from mixgpt.common import distributed, runtime
from mixgpt.modeling import decoder
from mixgpt.modeling.placing import allocate, on_device, place_for

SLICE = 512  # Logits of so many tokens are in memory at a time.
CACHED = 2**18  # So many float32 logits stay in the caches of a CPU's core.


def by_rows(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split logits (n, V), and others of n rows, into the parts of which float32 values are in memory at a time."""
    size = rows_at_once(logits.device, logits.shape[1])
    return zip(*(values.split(size) for values in (logits, *others)), strict=True)


def rows_at_once(device: torch.device, V: int) -> int:
    """Return how many rows of V logits `by_rows` gives at a time: on a CPU, as many as its caches hold."""
    return SLICE if device.type == "cuda" else max(CACHED * torch.get_num_threads() // V, 1)


@dataclass(frozen=True)
class StreamedModel:
    """Where and how a model runs: one decoder layer on the device at a time, on batches of sequences."""

    model: PreTrainedModel
    device: torch.device
    batch_size: int
    clock: runtime.Clock = field(default_factory=lambda: runtime.Clock(torch.device("cpu")))
    on_host: bool = False  # Keep calibration hidden states on the host even if the device has room.

    @property
    def layers(self) -> nn.ModuleList:
        return decoder.layers_of(self.model)

    @torch.no_grad()
    def embed(self, tokens: Tensor, sets: float = 1) -> "HiddenStates":
        """Return the `HiddenStates` of tokens (N, T) before the first layer, with room for so many sets of them."""
        stream, layers = HiddenStates(torch.empty(0), self.batch_size, self.device), self.layers
        with on_device(decoder.rest_of(self.model).values(), self.device):
            hidden, calls = _record(self.model, layers, tokens[:1].to(self.device))
            if len(hidden) != min(len(tokens), 1):
                raise ValueError(f"its layers take hidden states of {tuple(hidden.shape)}, whose batch does not come "
                                 "first")
            stream.channels, stream.shared = hidden.shape[-1], decoder.shared_shapes(layers, hidden, calls)
            shape = len(tokens), *hidden.shape[1:-1], stream.channels + sum(decoder.widths(stream.shared))
            stream.place = place_for(sets * math.prod(shape) * hidden.dtype.itemsize, self.device, self.on_host)
            stream.hidden = allocate(shape, hidden.dtype, self.device, stream.place)
            stream.hidden[..., stream.channels:] = 0
            _, others = _record(self.model, layers, (tokens[:1] == 0).long().to(self.device))  # All tokens differ.
            places = decoder.per_sequence(calls, others, len(tokens))
            for rows in [slice(0, 1), *stream.batches()]:
                hidden, calls = _record(self.model, layers, tokens[rows].to(self.device))
                stream.hidden[rows, ..., :stream.channels] = hidden
                stream.arguments.setdefault(len(hidden), decoder.fill(places, calls, rows))
        return stream


class Reached(Exception):
    """A forward pass has got as far as it needs to."""


def _record(model: PreTrainedModel, layers: nn.ModuleList, tokens: Tensor,
            tuples: bool = True) -> tuple[Tensor, list[tuple[tuple, dict]]]:
    """Run a model up to its layers. Returns the hidden states before these, and the (args, kwargs) of each layer."""
    calls = []

    def record(hidden: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        calls.append((hidden, (args, kwargs)))
        if len(calls) == len(layers):
            raise Reached
        return (hidden, None) if tuples else hidden  # Some models unpack two values.

    try:
        with _replaced(layers, record), contextlib.suppress(Reached):
            model(tokens, use_cache=False)
    except (AttributeError, TypeError):
        if not tuples:
            raise
        return _record(model, layers, tokens, tuples=False)  # This model expects a tensor from its layers.
    return calls[0][0], [arguments for _, arguments in calls]


@contextlib.contextmanager
def _replaced(layers: Iterable[nn.Module], forward: Callable) -> Generator[None]:
    """Let layers run `forward` within the block; afterwards, one that a caller has set, as accelerate does, is back."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(vars(layer).update, {name: own for name, own in vars(layer).items() if name == "forward"})
            stack.callback(vars(layer).pop, "forward")
            layer.forward = forward  # The layer stays, because models read attributes of their layers.
        yield


@dataclass
class HiddenStates:
    """The hidden states of a set of sequences between two layers, with what earlier layers leave for later ones."""

    hidden: Tensor  # (N, T, C), or wider by what layers share.
    batch_size: int
    device: torch.device  # Where layers run.
    arguments: dict = field(default_factory=dict)  # {batch size: (args, kwargs) of every layer}
    channels: int | None = None  # C
    shared: decoder.Shapes = field(default_factory=dict)  # From `decoder.shared_shapes`.
    tuples: bool = False  # Whether the layers return tuples; known once one has run.
    place: str = ""  # Where the hidden states are, as chosen by `place_for`.

    def copy(self, dtype: torch.dtype | None = None) -> "HiddenStates":
        """Return a copy of the hidden states, in the same place. dtype: that of the copy (default: the same)."""
        hidden = allocate(self.hidden.shape, dtype or self.hidden.dtype, self.device, self.place).copy_(self.hidden)
        return replace(self, hidden=hidden)

    def batches(self) -> list[slice]:
        """Return the slices of sequences that form the batches."""
        N = len(self.hidden)
        return [slice(start, min(start + self.batch_size, N)) for start in range(0, N, self.batch_size)]

    def forward(self, layer: nn.Module, index: int, rows: slice) -> Tensor:
        """Run layer number `index`, which is on the device, on sequences `rows`. Returns (B, T, C) there."""
        return self.call(layer, index, self.hidden[rows].to(self.device), rows)

    def call(self, layer: nn.Module, index: int, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        """Run layer number `index` on hidden states (B, T, C), or wider by what layers share, of sequences `rows`."""
        distributed.alive()
        arguments, (hidden, shared) = self.arguments[len(hidden)][index], decoder.unpack(hidden, self.shared)
        args, kwargs = decoder.take(arguments, rows, shared, self.device)
        output = layer(hidden, *args, **kwargs)
        self.tuples = not torch.is_tensor(output)
        output = output[0] if self.tuples else output
        parts = [tensor.reshape(*output.shape[:2], -1) for key in self.shared for tensor in shared[key]]
        return torch.cat([output, *parts], -1) if parts else output

    @torch.no_grad()
    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace the hidden states by the output of layer number `index`, which is on the device."""
        for rows in self.batches():
            self.put(rows, self.forward(layer, index, rows))

    def put(self, rows: slice, hidden: Tensor) -> None:
        """Keep the hidden states of sequences `rows`; all change to the dtype that a layer returns, as Mamba's do."""
        if hidden.dtype != self.hidden.dtype:
            self.hidden = self.copy(hidden.dtype).hidden
        self.hidden[rows] = hidden

    @contextlib.contextmanager
    def head(self, model: PreTrainedModel, dtype: torch.dtype | None = None,
             vocabulary: Tensor | None = None) -> Generator[Callable[[Tensor], Tensor]]:
        """Yield a function from hidden states behind the last layer (n, C) to logits (n, vocabulary).

        The model's own forward computes them, with its layers skipped. dtype: of hidden states and logits (default: the
        model's; another one needs a copy of the modules behind the layers). vocabulary: numbers of tokens, or all.
        """
        layers, narrowed = decoder.layers_of(model), {}
        if converts := dtype not in (None, model.dtype):
            model = copy.deepcopy(model, {id(layers): layers})
        rest = decoder.rest_of(model).values()

        def logits(hidden: Tensor) -> Tensor:
            output = hidden[:, None, ..., :self.channels]  # Sequences of one token.
            tokens = output.new_zeros(len(output), 1, dtype=torch.long)  # Any token will do: the layers are skipped.
            with _replaced(layers, lambda *_, **__: (output, None) if self.tuples else output):
                return torch.func.functional_call(model, narrowed, (tokens,), {"use_cache": False},
                                                  tie_weights=False).logits.squeeze(1)

        with on_device(rest, self.device):
            for module in rest if converts else ():
                module.to(dtype)
            if vocabulary is not None:
                linear = model.get_output_embeddings()
                path = next(path for path, module in model.named_modules() if module is linear)
                narrowed |= {f"{path}.{name}": weight.detach()[vocabulary]
                             for name, weight in linear.named_parameters()}
            try:
                yield logits
            finally:
                narrowed.clear()  # `logits` would keep these weights.
