"""Train a pruned or quantized model to predict what the dense model predicts, and the text. Zeros stay zeros.

Kept weights are trained, or, where weights lie on grids, the scales of these. The loss is the cross-entropy of the
pruned model's predictions q with three parts of the dense model's p and one part of the token that follows (Hinton et
al., arXiv 1503.02531). The text is little, so that gradients are mostly noise, which dividing by their size in each
column, as Adam does, would enlarge. So steps go along them, as far as the loss would fall by the divergence KL(p ‖ q)
if it were linear (after stochastic Polyak steps, Loizou et al., arXiv 2002.10542); the later ones become shorter.
`training` takes them, in the way that fits in memory.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mixgpt.common import distributed, memory
from mixgpt.common.runtime import repeatable_attention, seeded, wide
from mixgpt.modeling.linears import Key, linears
from mixgpt.modeling.placing import in_turn
from mixgpt.modeling.running import SLICE, StreamedModel, by_rows
from mixgpt.modeling.streaming import stored_dtype
from mixgpt.pruning import needs
from mixgpt.pruning.training import Training
from mixgpt.quant import Grid

PIECE = 128  # Tokens per training sequence: many short ones of different documents teach more than a few long ones.
SHORTEST = 16  # A piece of fewer tokens gives too little context.
STEPS = 40  # With an effort of 1, there are at most so many steps.
STEP_TOKENS = 512  # A step has so many tokens, if there are as many: gradients of fewer are too noisy.
VOCABULARY = 49_152  # At most so many tokens' predictions are compared: all 262,144 of Gemma take 70% of a step.


def piece_length(T: int) -> int:
    """Return the length of pieces: the largest divisor of T up to PIECE, or T itself if that is below SHORTEST."""
    length = next(length for length in range(min(T, PIECE), 0, -1) if T % length == 0)
    return length if length >= SHORTEST else T


def pieces(sequences: Tensor) -> Tensor:
    """Cut sequences (n, T) into pieces, (more, `piece_length`)."""
    return sequences.reshape(-1, piece_length(sequences.shape[1]))


@torch.no_grad()
def reference_states(streamed: StreamedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Run the dense model on this process's share of tokens (N, T). Returns {name: tensor on the host}.

    "states": the last hidden states, (n, T, C). "vocabulary", for models with more than VOCABULARY tokens: the sorted
    numbers of so many, those of the text and others that the model predicts most; the rest share 1% to 2%.
    """
    stream = streamed.embed(tokens[distributed.share(len(tokens))])
    for index, layer in in_turn(streamed.layers, streamed.device, "dense model"):
        stream.advance(layer, index)
    states = stream.hidden[..., :stream.channels].to("cpu")
    if streamed.model.config.get_text_config().vocab_size <= VOCABULARY:
        return {"states": states}
    step, before = max(tokens.numel() // SLICE, 1), distributed.share(len(tokens)).start * tokens.shape[1]
    some = states.flatten(0, 1)[-before % step::step]  # These are the same tokens in any number of processes.
    total = torch.zeros(len(streamed.model.get_output_embeddings().weight), device=stream.device)
    with stream.head(streamed.model) as head:
        for hidden in some.split(PIECE):
            for logits, in by_rows(head(hidden.to(stream.device))):
                total += wide(logits).softmax(-1).sum(0)
    distributed.all_reduce(total)
    occurring = tokens.unique().to(total.device)
    total[occurring] = torch.inf
    vocabulary = total.topk(max(VOCABULARY, len(occurring))).indices.sort().values
    return {"states": states, "vocabulary": vocabulary.to("cpu")}


def ways(streamed: StreamedModel, tokens: Tensor, effort: float, disk: float,
         free: Callable[[torch.device], float] | None = None) -> list[needs.Way]:
    """Return the `needs.Way`s to train on sequences (N, T) that fit in what is free, the fastest first.

    Each takes less on the device than the one before. disk: bytes that are free there. free: as of `placing.place_for`.
    """
    found, free, largest = [], free or memory.free, min(streamed.batch_size, per_step(tokens, effort))
    host, least = free(torch.device("cpu")), math.inf
    for way in needs.WAYS:
        taken, sequence = (training_bytes(streamed, tokens, effort, replace(way, batch_size=size)) for size in (0, 1))
        room = (free(streamed.device) - taken.device) // (sequence.device - taken.device)
        size = min(distributed.all_gather_object(int(min(room, largest)) * (taken.host <= host and taken.disk <= disk)))
        if size > 0 and taken.device < least:
            found += [replace(way, batch_size=each) for each in dict.fromkeys((size, 1))]
            least = taken.device
    return found


def training_bytes(streamed: StreamedModel, tokens: Tensor, effort: float, way: needs.Way) -> needs.Taken:
    """Return `needs.training_bytes` of tokens (N, T)."""
    return needs.training_bytes(streamed, tokens, per_step(tokens, effort), VOCABULARY, way)


@torch.no_grad()
def distill(streamed: StreamedModel, chosen: dict[Key, Grid | None], tokens: Tensor, reference: dict[str, Tensor],
            seed: int, way: needs.Way, finish: Callable[[int, nn.Module], None] | None = None, effort: float = 1.0,
            folder: Path | None = None) -> float:
    """Train the chosen matrices in place.

    streamed: the pruned model. chosen: all pruned or quantized matrices, of which kept weights are trained or, with a
    grid, its scales, in place at the end. way: one of `ways`. finish: called at the end for each layer up to the last
    chosen one, while it is on the device. folder: for what is kept on disk. Returns the mean KL(p ‖ q) per token, in
    nats. Raises Diverged if it or a gradient is not finite, or an error of memory, maybe in this process alone; the
    model is then as it was before.
    """
    device, mine, size = streamed.device, tokens[distributed.share(len(tokens))], per_step(tokens, effort)
    steps = torch.randperm(len(mine), generator=seeded(seed, "distillation", distributed.rank())).split(size)
    steps += (steps[0][:0],) * (-(-len(tokens) // (size * distributed.world())) - len(steps))  # All take as many steps.
    with contextlib.ExitStack() as stack:
        # A process that runs out of memory in the middle of a step leaves others waiting: only a single one goes on.
        with memory.shared_fate() if distributed.world() == 1 else contextlib.nullcontext():
            with memory.shared_fate():
                training = stack.enter_context(Training(streamed, chosen, mine, reference, way, folder))
            with repeatable_attention(device):
                mean = training.run(steps)
        for index, layer in training.turns(range(1 + max(index for index, _ in chosen))):
            for name, state in training.states[index].items():
                state.finish(linears(layer)[name].weight, stored_dtype(streamed.model))
            if finish:
                finish(index, layer)
    return mean


def per_step(tokens: Tensor, effort: float) -> int:
    """Return how many sequences a process takes in a step."""
    most = -(-len(tokens) // distributed.world())  # Sequences in the largest share of a process.
    enough = -(-STEP_TOKENS // (tokens.shape[1] * distributed.world()))
    return min(max(math.ceil(most / (STEPS * effort)), enough), most)
