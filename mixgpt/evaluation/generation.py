"""Complete a prompt with a model."""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mixgpt.common.errors import InputError
from mixgpt.common.runtime import position_limit
from mixgpt.datautils import begin, token_ids


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt."""

    text: str  # without the prompt
    tokens: int  # generated
    seconds: float  # for all of them, including the prompt
    rate: float  # of the median token after the first, which takes the prompt, per second; NaN if there is none
    nbytes: int  # of the model's weights in memory
    cut: int = 0  # tokens at the beginning of the prompt for which the model's context had no room


def compare_speeds(dense: Callable[..., Completion], other: Callable[..., Completion], tokens: int,
                   seconds: float) -> float:
    """Return how many times as fast as `dense` another model makes tokens, in alternation; NaN if that is unsteady.

    Both are `complete` but for max_new_tokens, of which a round makes up to `tokens`. 7 rounds, of which those after
    the third begin within `seconds`. Unsteady: rounds give ratios that differ twofold, or make less than two tokens.
    """
    ratios, start = [], time.perf_counter()
    while len(ratios) < 3 or len(ratios) < 7 and time.perf_counter() - start < seconds:
        before = dense(max_new_tokens=tokens).rate
        ratios.append(other(max_new_tokens=tokens).rate / before)
    return median(ratios) if max(ratios) <= 2 * min(ratios) else math.nan  # no NaN is at most another


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 64,
             temperature: float = 0.0, seed: int = 0, until: Collection[str] = (), bos: str | None = None,
             heading: str | None = None) -> Completion:
    """Complete `prompt` with a model that is entirely on its device.

    temperature: 0 is greedy; otherwise tokens are sampled. All else is as the model's generation config says. until:
    stop strings, not included. bos: as `token_ids` takes it. heading: printed, and below it the completion while it is
    made. A prompt without room in the model's context is truncated on the left. Raises InputError if even that leaves
    no room, for a prompt without usable tokens, and if logits are NaN or inf.
    """
    ids = torch.tensor([token_ids(tokenizer, prompt, bos, goes_on=True)], dtype=torch.long, device=model.device)
    limit, vocabulary = position_limit(model.config), model.get_input_embeddings().num_embeddings
    if limit and max_new_tokens >= limit:
        raise InputError(f"--max-new-tokens {max_new_tokens}: the model's limit is {limit} tokens, with the prompt")
    if not ids.numel():
        raise InputError("prompt: the model's tokenizer gives no token for it; give another one")
    if ids.max() >= vocabulary:
        raise InputError(f"model {model.config.name_or_path}: its tokenizer gives token {ids.max()}, but its "
                         f"vocabulary has {vocabulary}")
    cut = max(ids.shape[1] + max_new_tokens - limit, 0) if limit else 0
    ids = begin(ids[:, cut:], tokenizer, bos)
    streamer = None if heading is None else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    times = []

    def check_logits(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Raise InputError for logits that cannot be ranked or sampled from; -inf excludes a token. Notes the time."""
        if logits.isnan().any() or logits.isposinf().any():  # waits for a GPU
            raise InputError(f"model {model.config.name_or_path}: its logits contain NaN or inf; try --dtype float32")
        if streamer and not times:
            print(heading, end="\n\n", flush=True)
        times.append(time.perf_counter())
        return logits

    choice = {"temperature": temperature, "top_k": model.generation_config.top_k or 0} if temperature else {}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=temperature > 0,
            num_beams=1, stop_strings=list(until) or None, tokenizer=tokenizer, pad_token_id=0, streamer=streamer,
            logits_processor=[check_logits], return_dict_in_generate=False, **choice)[0, ids.shape[1]:].tolist()
        seconds = time.perf_counter() - start
    text = tokenizer.decode(output, skip_special_tokens=True)
    for end in until:
        text = text.partition(end)[0]
    gaps = [after - before for before, after in pairwise(times)]  # in the first one kernels are compiled
    nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return Completion(text, len(output), seconds, 1 / median(gaps or [math.nan]), nbytes, cut)
