"""Calibration samples and test tokens from WikiText-2, PTB, C4, text shipped with Python, or text of the user's own.

Joins, splits and the order of random draws follow SparseGPT and GPTQ (github.com/IST-DASLab/sparsegpt, datautils.py),
so that the same seed gives the same samples. BOS is the token for the beginning of a text.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import load_dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from mixgpt.common.errors import InputError, reading
from mixgpt.common.hub import hub_reachable, silenced
from mixgpt.common.texts import ARGUMENTS, OWN, Row, counts_of, hub_copies, read_files, text_set_of, texts_of

OwnText = Callable[[int, int], torch.Tensor]
OWN_TOKENS = 16_384  # The dense model writes so many for a test.
DRAWS = 10_000  # consecutive documents that may be too short before giving up
# Parts of the model types that need BOS in front of every sequence: lm-eval (pull request 1465: perplexity of Gemma-7B
# on LAMBADA 6e9 without BOS, 3.5 with it; 2049 and 2105: the others) and llama.cpp (21500: Gemma 4) add it to the same.
NEED_EACH = ("gemma",)


def calibration_samples(dataset: str | list[Row], nsamples: int, seqlen: int, seed: int | str,
                        tokenizer: PreTrainedTokenizerBase, data_dir: str | None = None,
                        bos: str | None = None, own: OwnText | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Draw random segments (nsamples, seqlen) of a train split, or of a mixture of several, and say where from.

    bos: as `token_ids` takes it; with each it replaces the first token of every segment. own: gives the next (n, T)
    tokens of the dense model's own text. A mixture takes the first segments that each text alone would give, and
    shuffles them. Raises InputError if one is unavailable or too short.
    """
    counts = {} if isinstance(dataset, list) else counts_of(dataset, nsamples)
    if len(counts) > 1:
        parts, sources = zip(*(calibration_samples(text, count, seqlen, seed, tokenizer, data_dir, bos, own)
                               for text, count in counts.items()), strict=True)
        order = random.Random(seed).sample(range(nsamples), nsamples)
        return torch.cat(parts)[order], {"dataset": dataset, "parts": [
            source | {"sequences": len(part)} for source, part in zip(sources, parts, strict=True)]}
    text, = counts or [dataset]
    if text == OWN and own:
        return begin(own(nsamples, seqlen), tokenizer, bos), {"dataset": text, "split": "train"}
    text_set, rng, segments = text_set_of(text), random.Random(seed), []
    rows, source = load_rows(text, "train", data_dir)
    if not text_set.by_document:
        ids = token_ids(tokenizer, text_set.train_join.join(as_texts(rows, tokenizer)), bos)
        require_tokens(ids, seqlen + 1, seqlen, source)
    for _ in range(nsamples):
        if text_set.by_document:
            drawn = (rows[rng.randint(0, len(rows) - 1)] for _ in range(DRAWS if rows else 0))
            encoded = (token_ids(tokenizer, as_texts([document], tokenizer)[0], bos) for document in drawn)
            if not (ids := next((ids for ids in encoded if len(ids) > seqlen), [])):
                raise InputError(f"--seqlen {seqlen}: none of {DRAWS} documents in a row has more than {seqlen} "
                                 "tokens; lower --seqlen")
        start = rng.randint(0, len(ids) - seqlen - 1)  # SparseGPT and GPTQ never draw the last possible segment
        segments.append(ids[start:start + seqlen])
    return begin(torch.tensor(segments), tokenizer, bos), source


def test_tokens(dataset: str, seqlen: int, tokenizer: PreTrainedTokenizerBase, data_dir: str | None = None,
                bos: str | None = None, own: OwnText | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Cut a test split into segments (n, seqlen); the incomplete last one is dropped. See `calibration_samples`."""
    if dataset == OWN and own:
        return begin(own(max(OWN_TOKENS // seqlen, 1), seqlen), tokenizer, bos), {"dataset": dataset, "split": "test"}
    text_set = text_set_of(dataset)
    rows, source = load_rows(dataset, "test", data_dir)
    text = text_set.test_join.join(as_texts(rows[:text_set.test_documents], tokenizer))
    ids = token_ids(tokenizer, text, bos)
    require_tokens(ids, seqlen, seqlen, source)
    n = min(len(ids) // seqlen, text_set.test_segments or len(ids))
    return begin(torch.tensor(ids[:n * seqlen]).view(n, seqlen), tokenizer, bos), source


def resolve_bos(bos: str, model_type: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return each, once or never for a value of --bos. Raises InputError for a tokenizer without BOS."""
    if bos == "auto" and any(name in model_type for name in NEED_EACH):
        bos = "each"
    elif bos == "auto":
        bos = "once" if encode(tokenizer, "a").input_ids[:1] == [tokenizer.bos_token_id] else "never"
    if bos != "never" and tokenizer.bos_token_id is None:
        raise InputError(f"--bos {bos}: the tokenizer of model {tokenizer.name_or_path} has no BOS; must be never")
    return bos


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> BatchEncoding:
    """Return what a tokenizer gives for a text. Raises InputError if it fails."""
    with reading(f"model {tokenizer.name_or_path}: its tokenizer fails on a text"):
        return tokenizer(text, verbose=False, **options)  # else it warns that the text exceeds the model's length


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, bos: str | None = None,
              goes_on: bool = False) -> list[int]:
    """Return the ids of a whole text, with the special tokens that the tokenizer adds by itself, except for BOS.

    bos: each or once: BOS in front; never: none; None: what the tokenizer does. A text that begins with BOS stays so.
    goes_on: whether others follow, so that the end of a text (EOS) that the tokenizer adds is left out.
    """
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = encode(tokenizer, text, add_special_tokens=not begun).input_ids
    if goes_on and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    if begun or bos is None or (ids[:1] == [tokenizer.bos_token_id]) == (bos != "never"):
        return ids
    return ids[1:] if bos == "never" else [tokenizer.bos_token_id, *ids]


def begin(sequences: torch.Tensor, tokenizer: PreTrainedTokenizerBase, bos: str | None) -> torch.Tensor:
    """With bos each put BOS in place of the first token of sequences (n, T), in place. Returns them."""
    if bos == "each":
        sequences[:, 0] = tokenizer.bos_token_id
    return sequences


def as_texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return rows as text: chats by the tokenizer's template, in jinja's sandbox. Raises InputError if that fails."""
    with reading(f"model {tokenizer.name_or_path}: its chat template"):
        return [row if isinstance(row, str) else tokenizer.apply_chat_template(row, tokenize=False) for row in rows]


def require_tokens(ids: list[int], needed: int, seqlen: int, source: dict[str, Any]) -> None:
    """Raise InputError if a text has fewer than `needed` tokens."""
    if len(ids) < needed:
        raise InputError(f"--seqlen {seqlen}: the {source['split']} text of dataset {source['dataset']} has "
                         f"{len(ids)} tokens and {needed} are needed; lower --seqlen or take another dataset")


def load_rows(dataset: str | list[Row], part: str, data_dir: str | None) -> tuple[Sequence[Row], dict[str, Any]]:
    """Return (rows, source) of the "train" or "test" part of a dataset; paths and lists have one part."""
    text_set = text_set_of(dataset)
    name = f"a list of {len(dataset)} texts" if isinstance(dataset, list) else dataset
    split = text_set.test_split if part == "test" else part
    if text_set.code:
        rows, origin = text_set.load()(split)
    elif data_dir and text_set.local:
        rows, origin = read_files(hub_copies(data_dir, **{part: [name]})[name, split], "--data-dir")
    else:
        options: dict[str, Any] = dict(text_set.hub_options)
        if text_set.hub_files:
            options["data_files"] = {split: text_set.hub_files[split]}
        origin = {"hub": text_set.hub_id, **options}
        online, subject = hub_reachable(), f"{ARGUMENTS[split]} {name}: cannot load {text_set.hub_id}"
        try:
            with reading(subject), silenced():
                table = load_dataset(text_set.hub_id, split=split, **options)
        except InputError as error:
            refusal = error if online else f"{subject}: the hub cannot be reached and it is not in the cache"
            copy = f"below --data-dir DIR, named as on the hub ({text_set.local.format(split=split)})"
            raise InputError(f"{refusal}; supply a copy {copy if text_set.local else 'as a file'}, or use "
                             f"{ARGUMENTS[split]} builtin") from None
        # documents stay on disk until they are drawn: C4's shard would take a gigabyte in each process
        rows = table["text"] if text_set.by_document else texts_of(table.to_list(), text_set.hub_id, text_set.columns)
    return rows, {"dataset": name, "split": split, **origin}
