"""Further calibration sequences without further text: what the dense model itself writes.

Hessians of few tokens fit what these happen to be; with as many synthetic ones they fit what the model expects, too.
Calibration on synthetic text alone: Williams et al., arXiv 2410.17170.
"""

from functools import partial

import torch
from transformers import GenerationConfig

from mixgpt.allocation.fisher import drawn
from mixgpt.common import distributed, memory, progress
from mixgpt.common.tensors import seeded, wide
from mixgpt.kernels.attention import fast_attention
from mixgpt.kernels.matmul import fast_linears
from mixgpt.text.bos import begin
from modelutils import SLICE, bytes_to_load, hooked, run_layers, whole

WINDOW = 128  # tokens that are generated in one piece: short ones are many, and differ more
PREFIX = 16  # of them are those of the calibration sequence
AT_A_TIME = 128  # windows, times the batch size; fewer where memory is short
DRAWS = 16  # windows whose probabilities are in memory at a time on a CPU: these stay in its caches
GENERATED, RESAMPLED = "generated", "resampled"


def synthetic(streamed, tokens, count, seed, more=0, first=None):
    """Return `count` synthetic sequences (count, T) for calibration sequences (N, T) in turn, and how they were made.

    "generated" by `generated`, or, if the model as a whole has no room on the device, by `resampled`.
    streamed: the dense model. more: how many of the last ones are for something else: every
    process takes its share of both kinds and returns all. first: id that every window begins with, None for that of the
    calibration sequence. Also returns the hidden states behind the dense model's last layer for the `windows_of` its
    share, on the host, if it has generated them in windows that do not overlap and all processes have as many of the
    last ones; else None.
    """
    kinds = range(count - more), range(count - more, count)
    share = [n for kind in kinds for n in kind[distributed.share(len(kind))]]
    mine = tokens[[n % len(tokens) for n in share]]
    uniform = [torch.rand(tokens.shape[1], generator=seeded(seed, n, "synthetic"), dtype=torch.float64) for n in share]
    room = all(distributed.all_gather_object(has_room(streamed)))
    make, how = (partial(generated, first=first), GENERATED) if room else (resampled, RESAMPLED)
    found, states = make(streamed, mine, torch.stack(uniform)) if uniform else (mine, None)
    numbers, parts = zip(*distributed.all_gather_object((share, found)), strict=True)
    sequences = torch.cat(parts)[torch.tensor(sum(numbers, [])).argsort()]
    return sequences, how, None if more % distributed.world() else states


def windows_of(sequences, how):
    """Return synthetic sequences (n, T), made as `how` says, in the pieces that were written on their own, if alike."""
    T = sequences.shape[1]
    return sequences.reshape(-1, WINDOW) if how == GENERATED and T % WINDOW == 0 else sequences


def has_room(streamed):
    """Return whether the whole model fits on the device, and a window of text beside it."""
    return memory.fits(bytes_to_load(streamed.model, streamed.device) + _window_bytes(streamed, WINDOW),
                       streamed.device)


@torch.no_grad()
@fast_linears()
def generated(streamed, tokens, uniform, first=None):
    """Return sequences (n, T) of windows that start as those of the tokens (n, T), and that the model continues.

    first: id in place of the first token of every window. uniform: (n, T), decides on the token drawn at each place.
    Also returns the hidden states behind the last layer, one window after the other, (windows, tokens, C), on the host,
    or None if windows overlap (then the last one stays whole), or if the last layers do not run on all tokens of a
    prefix (Gemma 4's that reuse keys and values).
    """
    n, T = tokens.shape
    width = min(WINDOW, T)
    starts = [*range(0, T - width + 1, width), *([T - width] if T % width else [])]
    parts = [torch.cat([each[:, start:start + width] for start in starts]) for each in (tokens, uniform)]
    begin(parts[0], first)
    head = streamed.model.get_output_embeddings()  # of hidden states with gaps it would multiply each by its own copy
    with (whole(streamed.model, streamed.family, streamed.device), hooked({head: torch.Tensor.contiguous}),
          fast_attention(streamed.model, streamed.device)):
        room = memory.free(streamed.device) // _window_bytes(streamed, width)
        size = max(min(room, AT_A_TIME * streamed.batch_size), 1)
        batches = list(zip(*(part.split(size) for part in parts), strict=True))
        total = len(batches) * width
        with progress.bar(total=total, title="generating", unit="step", leave=False) as bar:
            found, states = zip(*(_continued(streamed, *batch, bar) for batch in batches), strict=True)
    new = tokens.clone()
    for start, windows in zip(starts, torch.cat(found).split(n), strict=True):
        new[:, start:start + width] = windows
    if T % width or states[0].shape[1] < width:
        return new, None
    return new, torch.cat(states).unflatten(0, (len(starts), n)).transpose(0, 1).flatten(0, 1)


def _window_bytes(streamed, width):
    """Estimate the bytes that continuing a window takes: keys and values, which grow by copying, and logits."""
    model = streamed.model
    cache = 2 * len(streamed.layers) * width * model.get_input_embeddings().embedding_dim * model.dtype.itemsize
    return 2 * (cache + 16 * min(PREFIX, width) * model.config.get_text_config().vocab_size)


def _continued(streamed, windows, uniform, bar):
    """Return windows (B, T) continued from their prefixes, and their hidden states behind the last layer (B, T, C).

    Tokens that end a text are not drawn. One token more is, so that the last one of a window is read, too.
    """
    T, ends = windows.shape[1], streamed.model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=streamed.device).flatten()
    prefix, uniform, states = min(PREFIX, T // 2), uniform.to(streamed.device), []
    start = windows[:, :prefix].to(streamed.device)
    bar.update(prefix)

    def draw(read, logits):
        """Be a logits processor that leaves the drawn token alone. The logits are a copy."""
        bar.update(read.shape[1] < T)
        logits.index_fill_(1, ends, -torch.inf)
        size = len(logits) if logits.is_cuda else DRAWS
        parts = zip(logits.split(size), uniform[:, min(read.shape[1], T - 1)].contiguous().split(size), strict=True)
        token = torch.cat([drawn(wide(rows).softmax(-1), each) for rows, each in parts])
        return logits.fill_(-torch.inf).scatter_(1, token[:, None], 0)

    beyond = streamed.model.config.get_text_config().vocab_size  # no token: all windows go on to their ends
    settings = GenerationConfig(do_sample=False, max_new_tokens=T + 1 - prefix, eos_token_id=beyond, pad_token_id=0,
                                repetition_penalty=1.0)

    def keep(output):
        states.append(output[0] if isinstance(output, tuple) else output)

    with hooked({streamed.layers[-1]: keep}, outputs=True):
        found = streamed.model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings,
                                         logits_processor=[draw])
    return found[:, :T].to("cpu"), torch.cat(states, dim=1).to("cpu")


@torch.no_grad()
@fast_linears()
def resampled(streamed, tokens, uniform):
    """Return sequences (n, T) whose tokens are drawn from the model's predictions in tokens (n, T), and None.

    Each draw is from p(x_t | x_<t) given the tokens of the original sequence, not earlier draws, so that one pass over
    the layers serves all of them. The first token stays. uniform: (n, T), decides on the token drawn at each place.
    """
    stream = streamed.embed(tokens)
    run_layers(streamed.model, streamed.family, [stream], streamed.device, "resampling")
    new = tokens.clone()
    with stream.head(streamed.model, streamed.family) as head:
        for rows in stream.batches():
            hidden = stream.hidden[rows, :-1].to(streamed.device).flatten(0, 1)
            thresholds = uniform[rows, 1:].flatten().to(streamed.device)
            found = [drawn(wide(head(h)).softmax(-1), each)
                     for h, each in zip(hidden.split(SLICE), thresholds.split(SLICE), strict=True)]
            new[rows, 1:] = torch.cat(found).to("cpu").view(-1, tokens.shape[1] - 1)
    return new, None
