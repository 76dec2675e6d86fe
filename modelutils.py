"""Model families, and running a model one decoder layer at a time."""

import contextlib
import copy
import errno
import math
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

import mixgpt.modeling.baichuan  # noqa: F401, registers Baichuan with the Auto classes
from mixgpt.common import distributed, memory, program, progress, runtime
from mixgpt.common.files import writing
from mixgpt.modeling import decoder, experts, streaming

SLICE = 512  # tokens whose logits are in memory at a time
CACHED = 2**18  # float32 logits that a core of a CPU computes with at a time, so that they stay in its caches
READER = ThreadPoolExecutor(1)  # reads ahead; malloc would keep freed blocks of each new thread
ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")  # names of what routes tokens to experts


def by_rows(logits, *others):
    """Split logits (n, V), and others of n rows, into those of which float32 values are in memory at a time."""
    size = rows_at_once(logits.device, logits.shape[1])
    return zip(*(values.split(size) for values in (logits, *others)), strict=True)


def rows_at_once(device, V):
    """Return of how many tokens `by_rows` gives logits (V,) at a time: on a CPU those that its caches hold."""
    return SLICE if device.type == "cuda" else max(CACHED * torch.get_num_threads() // V, 1)


@dataclass(frozen=True)
class StreamedModel:
    """Where and how a model runs: one decoder layer on the device at a time, on batches of sequences."""

    model: torch.nn.Module
    device: torch.device
    batch_size: int
    clock: runtime.Clock = field(default_factory=lambda: runtime.Clock(torch.device("cpu")))
    on_host: bool = False  # keep calibration hidden states on the host even if the device has room

    @property
    def layers(self):
        return decoder.layers_of(self.model)

    @torch.no_grad()
    def embed(self, tokens, sets=1):
        """Return the `HiddenStates` of tokens (N, T) before the first layer, with arguments for batches of their sizes.

        sets: number of such sets of hidden states to make room for, all in one place. Raises ValueError if the batch
        is not their first dimension.
        """
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
            _, others = _record(self.model, layers, (tokens[:1] == 0).long().to(self.device))  # all tokens are others
            places = decoder.per_sequence(calls, others, len(tokens))
            for rows in [slice(0, 1), *stream.batches()]:
                hidden, calls = _record(self.model, layers, tokens[rows].to(self.device))
                stream.hidden[rows, ..., :stream.channels] = hidden
                stream.arguments.setdefault(len(hidden), decoder.fill(places, calls, rows))
        return stream


@contextlib.contextmanager
def on_device(modules, device, ahead=None):
    """Keep `modules` on `device` within the block; afterwards on the host, or on disk if they have `disk_weights`.

    Changes to modules on disk are lost at the end of the block, unless written there. ahead: Future of the tensors of
    a single module, if they are being read already.
    """
    there = {}  # once each, as a head may be the embedding

    def move(key, tensor):
        if key not in there:
            there[key] = tensor.to(device, non_blocking=True)
        return there[key]

    with contextlib.ExitStack() as stack:
        for module in modules:
            if (places := streaming.disk_weights(module)) is None:
                stack.callback(module.to, "cpu")
            else:
                tensors, empty = ahead.result() if ahead else streaming.read(module), module.state_dict(keep_vars=True)
                stack.callback(module.load_state_dict, empty, strict=False, assign=True)  # frees what is on disk only
                module.load_state_dict({name: move((places[name], own.dtype), tensors.pop(name)) for name, own in
                                        empty.items()}, assign=True)  # popped, as `ahead` would keep them on the host
            module.to(device)
        there.clear()
        yield


def in_turn(layers, device, title=None):
    """Yield (index, layer), each on the device until the next one is asked for, read meanwhile. title: of a bar."""
    ahead = None
    for index, layer in enumerate(progress.bar(layers, title=title, leave=False) if title else layers):
        with on_device([layer], device, ahead):
            if index + 1 < len(layers) and streaming.disk_weights(layer):
                ahead = READER.submit(streaming.read, layers[index + 1], pinned=device.type == "cuda")
            yield index, layer


def whole(model, device):
    """Keep the whole model on `device` within the block, to run it as usual."""
    return on_device([*decoder.rest_of(model).values(), *decoder.layers_of(model)], device)


class Reached(Exception):
    """A forward pass has got as far as it needs to."""


def _record(model, layers, tokens, tuples=True):
    """Run a model up to its layers. Returns the hidden states before these, and the (args, kwargs) of each layer.

    Models with sliding windows pass different masks to different layers. tuples: whether the layers return tuples.
    """
    calls = []

    def record(hidden, *args, **kwargs):
        calls.append((hidden, (args, kwargs)))
        if len(calls) == len(layers):
            raise Reached
        return (hidden, None) if tuples else hidden  # some models unpack two

    try:
        with _replaced(layers, record), contextlib.suppress(Reached):
            model(tokens, use_cache=False)
    except (AttributeError, TypeError):
        if not tuples:
            raise
        return _record(model, layers, tokens, tuples=False)  # this model takes a layer's output for a tensor
    return calls[0][0], [arguments for _, arguments in calls]


@contextlib.contextmanager
def _replaced(layers, forward):
    """Let layers run `forward` within the block; one that a caller has set, as accelerate does, comes back."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(vars(layer).update, {name: own for name, own in vars(layer).items() if name == "forward"})
            stack.callback(vars(layer).pop, "forward")
            layer.forward = forward  # on the instance, to preserve attributes the model reads from its layers
        yield


def place_for(nbytes, device, on_host=False):
    """Choose where to keep nbytes of hidden states: on the "device", the "host" or, memory-mapped, on "disk".

    The first of these with twice the room, half of it for the work; on_host skips the device.
    """
    if device.type == "cuda" and not on_host and 2 * nbytes <= memory.free(device):
        return "device"
    return "host" if 2 * nbytes <= memory.free(torch.device("cpu")) else "disk"


def allocate(shape, dtype, device, place):
    """Return an uninitialised tensor at the place chosen by `place_for`. Raises InputError if the disk is full."""
    if place != "disk":
        return torch.empty(shape, dtype=dtype, device=device if place == "device" else "cpu")
    numel = math.prod(shape)
    nbytes = numel * dtype.itemsize
    with writing(f"--nsamples, --seqlen: hidden states take {nbytes / 1e9:.1f} GB, more than is free in memory, and",
                 "lower these, or set TMPDIR to a larger disk"), tempfile.NamedTemporaryFile() as file:
        free, in_memory = memory.room(file.name)
        if nbytes * (program.world("LOCAL_WORLD_SIZE") if in_memory else 1) > free:
            why = f"{tempfile.gettempdir()} is memory, too" if in_memory else os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, why)  # reserving them would fill the disk before it fails
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.from_file(file.name, shared=True, size=numel, dtype=dtype).view(shape)


@dataclass
class HiddenStates:
    """The hidden states of a set of sequences between two layers, with what earlier layers leave for later ones."""

    hidden: torch.Tensor  # (N, T, C), or wider by what layers share
    batch_size: int
    device: torch.device  # where layers run
    arguments: dict = field(default_factory=dict)  # batch size -> (args, kwargs) of every layer
    channels: int | None = None  # C
    shared: dict = field(default_factory=dict)  # shapes of what layers share, see `decoder.shared_shapes`
    tuples: bool = False  # whether the layers return tuples, once one has run
    place: str = ""  # of the hidden states, as chosen by `place_for`

    def twin(self, dtype=None):
        """Return a stream with a copy of the hidden states, in the same place. dtype: default: theirs."""
        hidden = allocate(self.hidden.shape, dtype or self.hidden.dtype, self.device, self.place).copy_(self.hidden)
        return replace(self, hidden=hidden)

    def batches(self):
        """Return the slices of sequences that form the batches."""
        N = len(self.hidden)
        return [slice(start, min(start + self.batch_size, N)) for start in range(0, N, self.batch_size)]

    def forward(self, layer, index, rows):
        """Run layer number `index`, which is on the device, on sequences `rows`. Returns (B, T, C) there."""
        return self.call(layer, index, self.hidden[rows].to(self.device), rows)

    def call(self, layer, index, hidden, rows):
        """Run layer number `index` on hidden states (B, T, C) of sequences `rows`, all on the device.

        Returns (B, T, C). rows: a slice, or a tensor of numbers. Both may be wider by what layers share.
        """
        distributed.alive()
        arguments, (hidden, shared) = self.arguments[len(hidden)][index], decoder.unpack(hidden, self.shared)
        args, kwargs = decoder.take(arguments, rows, shared, self.device)
        output = layer(hidden, *args, **kwargs)
        self.tuples = not torch.is_tensor(output)
        output = output[0] if self.tuples else output
        return decoder.pack(output, shared, self.shared) if self.shared else output

    @torch.no_grad()
    def advance(self, layer, index):
        """Replace the hidden states by the output of layer number `index`, which is on the device."""
        for rows in self.batches():
            self.put(rows, self.forward(layer, index, rows))

    def put(self, rows, hidden):
        """Keep the hidden states of sequences `rows`, in a wider dtype than before if a layer gives one, as Mamba's."""
        if hidden.dtype != self.hidden.dtype:
            self.hidden = self.twin(hidden.dtype).hidden
        self.hidden[rows] = hidden

    @contextlib.contextmanager
    def head(self, model, dtype=None, vocabulary=None):
        """Within the block, give a function from hidden states behind the last layer (n, C) to logits (n, vocabulary).

        The model's own forward computes them, its layers skipped. dtype: of hidden states and logits (default: the
        model's; another one needs a copy of the modules behind the layers). vocabulary: the tokens whose logits are
        computed (default: all), a tensor of their numbers.
        """
        layers, narrowed = decoder.layers_of(model), {}
        if converts := dtype not in (None, model.dtype):
            model = copy.deepcopy(model, {id(layers): layers})
        rest = decoder.rest_of(model).values()

        def logits(hidden):
            output = hidden[:, None, ..., :self.channels]  # as sequences of one token
            tokens = output.new_zeros(len(output), 1, dtype=torch.long)  # whichever
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
                narrowed.clear()  # which `logits` would keep


def linears(layer):
    """Return the linear layers of a decoder layer by name, those of each expert included, without routers."""
    mixture = any(map(experts.is_split, layer.modules()))
    return {name: module for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear) and not hasattr(module, "n_groups")  # DeepSeek-V4's, block-diagonal
            and not (mixture and ROUTERS.search(name))}


def other_weights(layer):
    """Return all other parameters of a decoder layer of two dimensions or more, by name: routers, convolutions."""
    known = {id(module.weight) for module in linears(layer).values()}
    return {name.removesuffix(".weight"): weight for name, weight in layer.named_parameters()
            if weight.dim() > 1 and id(weight) not in known}


@torch.no_grad()
def shared_inputs(layer, index, stream):
    """Group the linears of a layer that read the same tensor, by running one sequence through it.

    Returns lists of names, in the order in which the inputs are first read. Linears not called as modules are missing.
    """
    groups, inputs = {}, []  # inputs are kept alive, so that no address is reused

    def note(name, X):
        inputs.append(X)
        # a tensor changed in place counts as another input; empty ones, of experts without tokens, have no address
        groups.setdefault((X.data_ptr() or id(X), X.shape, X.stride(), X._version), {})[name] = None

    with hooked({module: lambda X, name=name: note(name, X) for name, module in linears(layer).items()}):
        stream.forward(layer, index, slice(0, 1))
    return [list(names) for names in groups.values()]


@contextlib.contextmanager
def hooked(readers, outputs=False):
    """Within the block, call readers[module](input) before each forward of a module, or with its output after it."""
    with contextlib.ExitStack() as stack:
        for module, read in readers.items():
            stack.enter_context(module.register_forward_hook(lambda _, args, output, read=read: read(output)) if outputs
                                else module.register_forward_pre_hook(lambda _, args, read=read: read(args[0])))
        yield
