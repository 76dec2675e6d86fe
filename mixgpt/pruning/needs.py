"""What the stages of a run take in memory, by which it, and the forecast of one, decide what fits; all from shapes."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from mixgpt.common import distributed, memory, program
from mixgpt.common.runtime import attention_heads
from mixgpt.modeling import decoder
from mixgpt.modeling.experts import is_split, kind_of
from mixgpt.modeling.linears import Key, linears
from mixgpt.modeling.placing import place_for
from mixgpt.modeling.running import SLICE, StreamedModel, rows_at_once
from mixgpt.pruning.rotation import OUTPUTS


@dataclass(frozen=True)
class Way:
    """How a model is trained in the memory that there is."""

    graph: bool  # The graph of a step's forward stays until its backward; else each layer runs again.
    whole: bool  # All layers are on the device; else one in turn.
    place: str  # There is what is kept between the turns of layers: device, host or disk.
    batch_size: int = 0

    def __str__(self) -> str:
        layers = "all layers at once" if self.graph else (
            "all layers on the device, activations recomputed" if self.whole else "a layer at a time")
        kept = "the lower 16 bits of weights" if self.whole else "weights"
        place = {"device": "", "host": f", {kept} on the host", "disk": f", {kept} on disk"}[self.place]
        return layers + place


WAYS = (Way(True, True, "device"), Way(False, True, "device"), Way(False, True, "host"), Way(False, True, "disk"),
        Way(False, False, "host"), Way(False, False, "disk"))  # From the fastest to the one that takes least.


class Taken(NamedTuple):
    """The bytes that a stage takes on the device, beside it on the host, and on disk."""

    device: float
    host: float = 0
    disk: float = 0


def layer_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the largest decoder layer."""
    return max(sum(weight.nbytes for weight in layer.parameters()) for layer in decoder.layers_of(model))


def rest_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights outside of the decoder layers."""
    inside = {id(weight) for layer in decoder.layers_of(model) for weight in layer.parameters()}
    return sum(weight.nbytes for weight in model.parameters() if id(weight) not in inside)


def batch_bytes(streamed: StreamedModel, T: int, gradients: bool = False) -> int:
    """Estimate the bytes of a batch of sequences (T,) inside a decoder layer; gradients: whether its graph is kept."""
    model = streamed.model
    shapes = {(index, kind_of(name)): module for index, layer in enumerate(streamed.layers)
              for name, module in linears(layer).items()}
    width = model.get_input_embeddings().embedding_dim
    if gradients:  # All inputs and outputs of linears count, and half as much again for what is between them.
        last = max(index for index, _ in shapes)
        numbers = 2 * width + int(1.5 * sum(
            m.in_features + m.out_features for (index, _), m in shapes.items() if index == last))
    else:  # The residual stream, its norm, and the widest linear's input and outputs count.
        numbers = 3 * width + 3 * max(max(m.in_features, m.out_features) for m in shapes.values())
    if model.config._attn_implementation == "eager":
        numbers += 3 * attention_heads(model.config) * T
    return streamed.batch_size * T * numbers * model.dtype.itemsize


def head_bytes(streamed: StreamedModel, tokens: int, vocabulary: int, copies: int) -> int:
    """Estimate the bytes of the logits of `tokens` tokens, `copies` of a slice of them, and float32 ones of a few."""
    rows = min(SLICE, tokens)
    return vocabulary * (copies * rows * streamed.model.dtype.itemsize
                         + 12 * min(rows, rows_at_once(streamed.device, vocabulary)))


def writing_bytes(model: PreTrainedModel, T: int, device: torch.device) -> tuple[int, int]:
    """Return the bytes of a model's weights that are not on the device yet, and those that it takes to write T tokens.

    These have keys and values of each layer, and float32 probabilities.
    """
    config, itemsize = model.config.get_text_config(), model.dtype.itemsize
    width = config.hidden_size
    if heads := getattr(config, "num_key_value_heads", None):
        width = heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads)
    weights = sum(weight.nbytes for weight in model.parameters() if weight.device.type != device.type)
    states = (2 * len(decoder.layers_of(model)) + 1) * T * width  # Each is copied to append to it.
    return weights, itemsize * states + config.vocab_size * (2 * itemsize + 12)


def working_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which gradients are computed: the model's, but gradients underflow in float16."""
    return torch.float32 if model.dtype == torch.float16 else model.dtype


def chunk(streamed: StreamedModel, count: int, T: int, states: int, limit: float = math.inf,
          free: Callable[[torch.device], int] | None = None) -> tuple[int, str, int]:
    """Return how many of `count` sequences of T tokens go back through all layers together, where, and their bytes.

    At least a batch, at most what half of the free memory holds at all layer boundaries; the other half is for the
    work. states: kinds of hidden states per boundary. limit: bytes that these may take. free: as of `place_for`.
    """
    batch, width = streamed.batch_size, streamed.model.config.hidden_size
    sequence = states * (len(streamed.layers) + 1) * T * width * working_dtype(streamed.model).itemsize
    place = place_for(batch * sequence, streamed.device, streamed.on_host, free)
    room = min((free or memory.free)(streamed.device if place == "device" else torch.device("cpu")) // 2, limit)
    size = int(max(min(room // sequence // batch, -(-count // batch)), 1) * batch)
    return size, place, size * sequence


def pass_bytes(streamed: StreamedModel, selected: dict[Key, tuple[int, int]], shape: tuple[int, int],
               fits_dense: bool, admm: bool) -> tuple[int, int]:
    """Estimate, on the high side, the bytes that pruning takes with one pass through each layer, and with two passes.

    In one pass all batches pause inside a layer at a time, and there is one Hessian; in two passes one batch is inside,
    and there are the Hessians of all inputs of the layer, of which a mixture of experts has hundreds. Beside these,
    experts have one of all tokens that enter them. shape: (sequences of this process, tokens). While a batch waits in
    front of a linear, it holds the residual stream, its norm, and the linear's input or outputs of others beside it.
    """
    model, (sequences, T), sets = streamed.model, shape, 1 + fits_dense
    inputs, hessians = defaultdict(list), defaultdict(dict)
    for (index, name), (out, columns) in selected.items():
        path, _, last = name.rpartition(".")
        inputs[index, path, columns].append(out)  # These linears may read one input.
        hessians[index][path, columns, last in OUTPUTS] = 4 * sets * columns**2
    width = model.get_input_embeddings().embedding_dim
    mixture = any(map(is_split, model.modules()))  # Experts hold copies of their tokens.
    waiting = (2 + mixture) * width + max(
        max(columns, sum(outs) - min(outs)) for (_, _, columns), outs in inputs.items())
    if model.config._attn_implementation == "eager":
        waiting += 3 * attention_heads(model.config) * T
    squares, stacks = (8, 9) if admm else (3 + fits_dense, 6)  # matrices like H, and like W
    solving = max(4 * (squares * columns**2 + stacks * columns * sum(outs)) for (_, _, columns), outs in inputs.items())
    entering = 4 * width**2 * mixture
    token, work = T * model.dtype.itemsize, 2 * streamed.batch_size
    states = (token * (sequences + work) * (sets + 2 * fits_dense) * width
              + (2 + fits_dense) * layer_bytes(model) + solving)
    return (states + token * (sequences + work) * sets * waiting + entering + max(
                max(of_layer.values()) for of_layer in hessians.values()),
            states + token * work * sets * waiting + entering + max(
                sum(of_layer.values()) for of_layer in hessians.values()))


def training_bytes(streamed: StreamedModel, tokens: torch.Tensor, step: int, vocabulary: int, way: Way) -> Taken:
    """Estimate the bytes of training on sequences (N, T) in one `Way`.

    Counted are the weights that are not there yet, or a layer's; a layer's gradients; three more copies of the largest
    matrix; two bytes below each 16-bit weight; what restores weights in memory, or keeps those of layers in turn; a
    second copy of the head, narrowed to the vocabulary, and `head_bytes`; hidden states; and for each token of a batch
    the inputs and outputs of a layer's linears, half as much again, and the scores of attention, or a third of their
    bytes for the buffers of PyTorch's attention on a CPU; half of that stays in a graph, for each token of a step and
    in all layers. step: sequences of a step. vocabulary: most tokens of which predictions are compared.
    """
    model, device, layers = streamed.model, streamed.device, streamed.layers
    itemsize, T, config = model.dtype.itemsize, tokens.shape[1], model.config.get_text_config()
    width = model.get_input_embeddings().embedding_dim
    matrices = {(index, kind_of(name)): module for index, layer in enumerate(layers)
                for name, module in linears(layer).items()}  # One expert of a layer stands for those of a token.
    on_disk = any(weight.is_meta for layer in layers for weight in layer.parameters())
    of_layers = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    below = 2 * (itemsize == 2)
    kept: float = below * sum(of_layers)  # between the turns of layers
    V, states = min(config.vocab_size, vocabulary), itemsize * width * T
    fixed = itemsize * (max(of_layers) + V * width) + 12 * max(m.weight.numel() for m in matrices.values())
    fixed += head_bytes(streamed, min(streamed.batch_size, step) * T, V, 2)
    fixed += states * (-(-len(tokens) // distributed.world()) + step * (len(layers) + 1))
    host = itemsize * sum(of_layers) * (not on_disk)
    if way.whole:
        fixed += sum(weight.nbytes for weight in model.parameters() if weight.device.type != device.type)
    else:
        fixed += rest_bytes(model) + (itemsize + below) * max(of_layers)
        host += itemsize * max(of_layers)  # The next layer is read ahead.
        kept += itemsize * sum(of_layers) * on_disk
    fixed += kept * (way.place == "device")
    host += kept * (way.place == "host") / program.world("LOCAL_WORLD_SIZE")  # The processes of a machine share it.
    disk = kept * (way.place == "disk")
    experts = getattr(config, "num_experts_per_tok", None) or 1
    activations = 1.5 * itemsize * T * sum((m.in_features + m.out_features) * (experts if "*" in kind else 1)
                                           for (_, kind), m in matrices.items())
    score = 12 if model.config._attn_implementation == "eager" else 4 if device.type == "cpu" else 3 * itemsize
    activations += score * T * T * len(layers) * attention_heads(config)
    fixed += step * activations / 2 if way.graph else 0
    fixed += way.batch_size * activations / len(layers)
    return Taken(fixed + host, 0, disk) if device.type == "cpu" else Taken(fixed, host, disk)
