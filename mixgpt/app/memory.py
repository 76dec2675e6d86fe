"""Choose how a run uses the memory of a GPU, from counted bytes before it starts, and again when it runs out."""

import gc
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.modeling.experts import RoutedLinear
from modelutils import ample, linears

USABLE = 0.92  # of the free memory: the rest is lost between tensors


@dataclass(frozen=True)
class Way:
    """How a step uses GPU memory, from the fastest way to the most economical."""

    batch_size: int
    on_host: bool = True  # calibration hidden states
    two_passes: bool = True  # per layer, so that only one batch's activations inside it exist at a time

    def thriftier(self):
        """Return the next more economical way and its description, or None."""
        if not self.two_passes:  # one pass keeps all sequences' activations inside the layer
            return replace(self, two_passes=True, on_host=True), (
                "two passes through each layer, as by --no-true-sequential, and hidden states on the host")
        if not self.on_host:
            return replace(self, on_host=True), "hidden states on the host"
        size = self.batch_size // 2
        return (replace(self, batch_size=size), f"batches of {size}") if size else None


def retry_with_less_memory(settings, way, step, again=True):
    """Return step(way), retrying in a more economical way each time the GPU runs out of memory.

    again: whether the step can be restarted.
    """
    while True:
        try:
            return step(way)
        except torch.OutOfMemoryError as error:
            thriftier = way.thriftier()
            if not thriftier or not again or distributed.world() > 1:
                remedies = "--seqlen" if way.batch_size == 1 else "--batch-size or --seqlen"
                if settings.true_sequential and not way.two_passes:
                    remedies += ", or give --no-true-sequential"
                raise InputError(f"--batch-size {way.batch_size} --seqlen {settings.seqlen or 'default'}: out of GPU "
                                 f"memory; lower {remedies}") from error
        way, change = thriftier
        gc.collect()  # tensors referenced by the error's frames
        torch.cuda.empty_cache()
        print(f"warning  out of GPU memory: continuing with {change}", flush=True)


@dataclass(frozen=True)
class Demand:
    """What pruning needs memory for."""

    sequences: int  # of this process
    seqlen: int
    hidden: int  # width of the hidden states
    inside: int  # numbers a token that wait inside a layer, at the most, where batches pause in front of a linear
    itemsize: int  # bytes of a weight and of an activation
    layer: int  # bytes of the largest layer
    hessians: int  # bytes of those of all inputs of a layer, the most that wait to be factored
    inputs: tuple  # (columns, rows of all matrices that read it) of each kind of input
    dense_target: bool
    admm: bool

    @classmethod
    def of(cls, model, family, selected, tokens, settings):
        """Count the demand of pruning the selected matrices, {(layer, name): (out, in)}, on tokens (N, T)."""
        inputs, squares = defaultdict(int), defaultdict(int)
        for (index, name), (out, columns) in selected.items():
            inputs[index, name.rpartition(".")[0], columns] += out  # at most these read one input
        for index, _, columns in inputs:
            squares[index] += 4 * columns**2
        layers = family.layers_of(model)
        return cls(len(tokens[distributed.share(len(tokens))]), tokens.shape[1],
                   model.get_input_embeddings().embedding_dim,
                   max(_inside(model, layer, tokens.shape[1]) for layer in layers), model.dtype.itemsize,
                   max(sum(p.nbytes for p in layer.parameters()) for layer in layers),
                   max(squares.values()), tuple({(columns, rows) for (_, _, columns), rows in inputs.items()}),
                   settings.target == "dense", settings.solver == "admm")

    def bytes(self, way, states_on_device):
        """Return about the most bytes that tensors take on the GPU at a time, rather more than less."""
        sets = 1 + self.dense_target
        whole, batch = (count * self.seqlen * self.itemsize for count in (self.sequences, way.batch_size))
        states = self.hidden * (whole if states_on_device else batch)
        inside = self.inside * (batch if way.two_passes else whole)
        lags = 2 * self.hidden * whole if self.dense_target else 0
        running = 2 * self.inside * batch
        return (sets * (states + inside + self.hessians) + lags + running + (2 + self.dense_target) * self.layer
                + self._solving())

    def on_device(self, way, free):
        """Return whether hidden states will be on a GPU with that many free bytes, see `place_for`."""
        nbytes = (1 + self.dense_target) * self.sequences * self.seqlen * self.hidden * self.itemsize
        return not way.on_host and ample(nbytes, free)

    def _solving(self):
        squares, stacks = (8, 9) if self.admm else (1.3 + self.dense_target, 6)  # matrices like H and like W
        return int(max(4 * (squares * columns**2 + stacks * columns * rows) for columns, rows in self.inputs))


def _inside(model, layer, seqlen):
    """Estimate the numbers a token that wait inside a layer, the most of them in front of one of its linears.

    They are the residual stream, its norm, and what lies between that and the linear: queries, keys and values with, in
    attention without a fused kernel, their products with all other tokens, or the input of the MLP's last linear.
    """
    width, config = model.get_input_embeddings().embedding_dim, model.config
    first = defaultdict(list)  # outputs of the linears that read the norm, by the module that they belong to
    for name, module in linears(layer).items():
        if module.in_features == width:
            first[name.rpartition(".")[0]].append(module.out_features)
    between = [sum(outs) for outs in first.values() if len(outs) != 2]  # gate and up are two, and multiplied
    products = 3 * config.num_attention_heads * seqlen if config._attn_implementation == "eager" else 0
    widest = max((module.in_features for module in linears(layer).values()), default=width)
    mixture = any(isinstance(module, RoutedLinear) for module in layer.modules())
    return (3 if mixture else 2) * width + max([*between, widest]) + products  # experts also wait for their sum


def fitting(demand, way, free):
    """Return the fastest way to prune within so many bytes, and about how many it takes; the last one if none fits.

    way: the fastest of all.
    """
    slower = replace(way, two_passes=True)
    ways = [way, slower, replace(slower, on_host=True)]
    while ways[-1].batch_size > 1:
        ways.append(replace(ways[-1], batch_size=ways[-1].batch_size // 2))
    for each in dict.fromkeys(ways):
        needed = demand.bytes(each, demand.on_device(each, free))
        if needed <= USABLE * free:
            break
    return each, needed


def line(demand, way, needed, free):
    """Say how a run will use the memory of the GPU."""
    passes = "two passes through each layer" if way.two_passes else "one pass"
    place = "on the GPU" if demand.on_device(way, free) else "on the host"
    return (f"memory   about {needed / 1e9:.1f} of {free / 1e9:.1f} GB free on the GPU: {passes}, batches of "
            f"{way.batch_size}, hidden states {place}")
