"""Measure the perplexity of a model, streamed one decoder layer at a time."""

import math

import torch

from mixgpt.common import distributed
from modelutils import SLICE, HiddenStates, run_layers


@torch.no_grad()
def perplexity(model, family, tokens, batch_size, device, title="perplexity", step=HiddenStates.advance):
    """Return exp of the mean negative log-likelihood of tokens (N, T), each sequence independently.

    T − 1 tokens of each sequence are predicted, as in SparseGPT and GPTQ. Logits in the model's dtype,
    log-likelihood in float32. title: of the progress bar. step: as `run_layers` takes it.
    """
    N, T = tokens.shape
    mine = tokens[distributed.share(N)]
    total = _negative_log_likelihood(model, family, mine, batch_size, device, title, step) if len(mine) else 0.0
    mean = sum(distributed.all_gather_object(total)) / (N * (T - 1))
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan  # exp overflows above 709


def _negative_log_likelihood(model, family, tokens, batch_size, device, title, step):
    """Return the negative log-likelihood summed over all predicted tokens."""
    stream = HiddenStates.embed(model, family, tokens, batch_size, device)
    run_layers(model, family, [stream], device, title, step)
    total = 0.0
    with stream.head(model, family) as head:
        for rows in stream.batches():
            hidden = stream.hidden[rows, :-1].to(device).flatten(0, 1)  # (B·(T−1), C)
            targets = tokens[rows, 1:].to(device).flatten()
            for h, t in zip(hidden.split(SLICE), targets.split(SLICE), strict=True):
                total += torch.nn.functional.cross_entropy(head(h).float(), t, reduction="sum").item()
    return total


@torch.no_grad()
def logits(model, family, tokens, batch_size, device):
    """Return the logits (N, T, vocabulary) of tokens (N, T) on the host, streamed."""
    stream = HiddenStates.embed(model, family, tokens, batch_size, device)
    run_layers(model, family, [stream], device, "logits")
    with stream.head(model, family) as head:
        return torch.cat([head(hidden.to(device)).to("cpu") for hidden in stream.hidden.flatten(0, 1).split(SLICE)]
                         ).unflatten(0, tokens.shape)
