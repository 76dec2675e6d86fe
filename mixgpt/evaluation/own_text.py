"""Text that the dense model writes itself: it has what the model tends to write, without anyone naming it.

Half of the pieces begin with a random token of the vocabulary, as in LLM-QAT (arXiv 2305.17888), or with BOS where all
sequences must. The others begin with a user's turn, if the tokenizer has a chat template: the model then asks and
answers. Each further token is drawn from all that the model predicts, at temperature 1.
"""

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mixgpt.common import distributed, memory, progress
from mixgpt.common.errors import InputError
from mixgpt.common.files import cache_folder
from mixgpt.common.runtime import position_limit, seeded, wide
from mixgpt.datautils import as_texts, encode
from mixgpt.modeling.placing import whole
from mixgpt.modeling.streaming import fingerprint, write
from mixgpt.pruning import needs

PIECE = 64  # Tokens of a piece, which the model writes one after the other, but of many pieces at a time.
TOGETHER = 256  # At most so many.
BELOW_ONE = 1 - 1e-6  # A product with it is smaller, so that what is drawn has a probability.
BLOCK = 256  # Probabilities are summed over so many tokens of the vocabulary first.
FREE = -1  # Stands for a token that the model chooses.
MESSAGE = "‹message›"  # It marks where a user's message would stand.


def beginnings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, number: int, T: int, seed: int | str,
               bos: str) -> Tensor:
    """Return tokens (number, t) with which pieces of T tokens begin, FREE behind the beginning of each.

    bos: a value of --bos. A user's turn of which the beginning fills more than half of a piece is left out.
    """
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    ordinary = [token for token in range(known) if token not in special]
    drawn = torch.randint(len(ordinary), (number,), generator=seeded(seed, "beginnings")).tolist()
    starts = [[tokenizer.bos_token_id if bos == "each" else ordinary[place]] for place in drawn]
    if tokenizer.chat_template:
        with contextlib.suppress(InputError):  # Some templates ask for more than a user's message.
            text, = as_texts([[{"role": "user", "content": MESSAGE}]], tokenizer)
            before, message, _ = text.partition(MESSAGE)
            turn = encode(tokenizer, before, add_special_tokens=False).input_ids if message else []
            if 1 <= len(turn) <= max(T // 2, 1):
                starts[1::2] = [turn] * (number // 2)
    forced = torch.full((number, max(map(len, starts))), FREE)
    for row, start in zip(forced, starts, strict=True):
        row[:len(start)] = torch.tensor(start)
    return forced


def obstacle(model: PreTrainedModel, device: torch.device) -> str:
    """Return why a model cannot write text, "" if it can."""
    return "" if rows_at_once(model, device) else f"{device} has no room for the whole model"


def rows_at_once(model: PreTrainedModel, device: torch.device, free: Callable[[torch.device], int] | None = None
                 ) -> int:
    """Return how many pieces a device has room to write at a time, 0 if not even the model fits.

    free: as of `placing.place_for`.
    """
    weights, piece = needs.writing_bytes(model, PIECE, device)
    rows = ((free or memory.free)(device) - weights) // piece
    return max(min(TOGETHER, *distributed.all_gather_object(rows)), 0)


@torch.no_grad()
def write_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, count: int,
               seed: int | str, bos: str) -> Tensor:
    """Return so many tokens (count,) that a model writes, in pieces; from the cache if it has written them before.

    bos: a value of --bos. The model has no `obstacle`. Raises InputError for NaN or inf in its predictions.
    """
    length = min(count, PIECE, position_limit(model.config) or PIECE)
    number = -(-count // length)
    forced = beginnings(model, tokenizer, number, length, seed, bos)
    key = fingerprint(model), str(model.dtype), device.type, distributed.world(), forced.tolist(), length, count, seed
    file = cache_folder() / f"text-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.safetensors"
    kept = load_file(file)["tokens"] if distributed.rank() == 0 and file.exists() else None
    if (kept := distributed.broadcast_object(kept)) is not None:  # Other machines have caches of their own.
        return kept
    uniform = torch.rand(number, length - 1, generator=seeded(seed, "own text"))
    # So the text is the same in any number of processes and batches, but for rounding.
    mine, size = distributed.share(number), rows_at_once(model, device)
    batches = [each for each in zip(forced[mine].split(size), uniform[mine].split(size), strict=True) if len(each[0])]
    with whole(model, device), progress.bar(total=len(batches) * (length - 1), title="own text", unit="token") as bar:
        pieces = [write_pieces(model, part.to(device), numbers, bar) for part, numbers in batches]
    tokens = torch.cat(sum(distributed.all_gather_object(pieces), [])).flatten()[:count]
    if distributed.rank() == 0:
        with contextlib.suppress(OSError, SafetensorError):  # The next run writes it again.
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, {"tokens": tokens})
    return tokens


def write_pieces(model: PreTrainedModel, forced: Tensor, uniform: Tensor, bar: tqdm) -> Tensor:
    """Write pieces (n, T) that begin with tokens (n, t), but for those that are FREE; uniform: numbers (n, T − 1).

    Behind the end of a text, the model begins another one.
    """

    def draw(written: Tensor, logits: Tensor) -> Tensor:
        """Leave one token of each row, drawn by its probability: `torch.multinomial` takes as long as the model."""
        logits = wide(logits)
        p = (logits - logits.amax(1, keepdim=True)).exp_()
        p = nn.functional.pad(p, (0, -p.shape[1] % BLOCK)).view(len(p), -1, BLOCK)
        blocks = p.sum(2).cumsum(1)
        if not blocks[:, -1].isfinite().all():
            raise InputError(f"model {model.config.name_or_path}: its logits contain NaN or inf; try --dtype float32")
        t = written.shape[1]
        place = uniform[:, t - 1:t].clamp(max=BELOW_ONE).to(p.device, p.dtype) * blocks[:, -1:]
        block = torch.searchsorted(blocks, place, right=True)
        within = p.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(1)
        place = (place - blocks.gather(1, block) + within[:, -1:]).minimum(BELOW_ONE * within[:, -1:])
        chosen = BLOCK * block + torch.searchsorted(within, place, right=True)
        if t < forced.shape[1]:
            chosen = torch.where(forced[:, t:t + 1] == FREE, chosen, forced[:, t:t + 1])
        bar.update()
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen, 0)

    first, own = forced[:, :1], model.generation_config
    options: dict[str, Any] = {"max_new_tokens": uniform.shape[1], "pad_token_id": 0, "logits_processor": [draw]}
    model.generation_config = GenerationConfig()  # The model's own may end or alter texts.
    try:
        return model.generate(first, attention_mask=torch.ones_like(first), **options).to("cpu")
    finally:
        model.generation_config = own
