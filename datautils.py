"""Calibration samples and test tokens from WikiText-2, PTB, C4 or text shipped with Python.

Joins, splits and the order of random draws follow SparseGPT and GPTQ (github.com/IST-DASLab/sparsegpt, datautils.py),
so that the same seed gives the same samples.
"""

import contextlib
import random

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from mixgpt.common.errors import InputError, one_line
from mixgpt.text import hub, mixture
from mixgpt.text.bos import begin, first_token, token_ids
from mixgpt.text.local import local_rows, supply, text_column
from mixgpt.text.own import text_set_of
from mixgpt.text.tokenizing import as_texts

DRAWS = 10_000  # consecutive new documents that may be too short before giving up


def calibration_samples(dataset, nsamples, seqlen, seed, tokenizer, data_dir=None, bos=None):
    """Draw random segments of a train split, or of a mixture of several.

    Returns (LongTensor (nsamples, seqlen), source), source being a JSON-able dict that says where the text comes from.
    Of each text in a mixture they are the first that it alone would give, and all are shuffled. bos: as `bos.token_ids`
    takes it; with each it replaces the first token of every segment. Raises InputError if a text is unavailable or
    shorter than seqlen + 1 tokens.
    """
    counts, parts, sources = mixture.counts(dataset, nsamples), [], []
    for name, count in counts.items():
        rows, source = load_rows(name, "train", data_dir)
        parts.append(samples_of(rows, source, count, seqlen, seed, tokenizer, bos))
        sources.append(source)
    if len(counts) == 1:
        return parts[0], sources[0]
    order = random.Random(seed).sample(range(nsamples), nsamples)
    return torch.cat(parts)[order], {"dataset": dataset, "parts": [
        source | {"sequences": count} for source, count in zip(sources, counts.values(), strict=True)]}


def samples_of(rows, source, nsamples, seqlen, seed, tokenizer, bos=None):
    """Draw random segments from all or some of the rows of `load_rows`. Returns LongTensor (nsamples, seqlen)."""
    rng, text_set = random.Random(seed), text_set_of(source["dataset"])
    rows, samples = as_texts(rows, tokenizer), torch.empty(nsamples, seqlen, dtype=torch.int64)
    if text_set.by_document:
        segments = sample_documents(rows, nsamples, seqlen, rng, tokenizer, bos)
    else:
        ids = token_ids(tokenizer, text_set.train_join.join(rows), bos)
        require_tokens(ids, seqlen + 1, seqlen, source)
        segments = (random_segment(ids, seqlen, rng) for _ in range(nsamples))
    for sample, segment in zip(samples, segments, strict=True):
        sample.copy_(torch.tensor(segment))
    return begin(samples, first_token(tokenizer, bos))


def test_tokens(dataset, seqlen, tokenizer, data_dir=None, bos=None):
    """Cut a test split into segments; the incomplete last one is dropped.

    Returns (LongTensor (n, seqlen), source), and takes bos, as `calibration_samples` does. Raises InputError if the
    text is unavailable or shorter than seqlen tokens.
    """
    rows, source = load_rows(dataset, "test", data_dir)
    return segments_of(rows, source, seqlen, tokenizer, bos), source


def segments_of(rows, source, seqlen, tokenizer, bos=None):
    """Cut all or some of the rows of `load_rows` like a test split. Returns LongTensor (n, seqlen)."""
    text_set = text_set_of(source["dataset"])
    ids = token_ids(tokenizer, text_set.test_join.join(as_texts(rows[: text_set.test_documents], tokenizer)), bos)
    require_tokens(ids, seqlen, seqlen, source)
    n = min(len(ids) // seqlen, text_set.test_segments or len(ids))
    return begin(torch.tensor(ids[: n * seqlen]).view(n, seqlen), first_token(tokenizer, bos))


def random_segment(ids, seqlen, rng):
    """Return `seqlen` consecutive random ids; never the last possible segment, as in SparseGPT and GPTQ."""
    start = rng.randint(0, len(ids) - seqlen - 1)
    return ids[start : start + seqlen]


def sample_documents(documents, nsamples, seqlen, rng, tokenizer, bos):
    """Draw each segment from a random document of more than `seqlen` tokens. Yields lists of ids."""
    short = {}  # index -> length
    for _ in range(nsamples):
        yield random_segment(long_document(documents, seqlen, rng, tokenizer, bos, short), seqlen, rng)


def long_document(documents, seqlen, rng, tokenizer, bos, short):
    """Draw documents until one has more than `seqlen` tokens; return its ids and fill `short`.

    SparseGPT and GPTQ draw forever if none is long enough; this raises InputError once all documents, or `DRAWS` new
    ones in a row, were too short.
    """
    most = min(len(documents), len(short) + DRAWS)
    while len(short) < most:
        i = rng.randint(0, len(documents) - 1)
        if i in short:
            continue
        ids = token_ids(tokenizer, documents[i], bos)
        if len(ids) > seqlen:
            return ids
        short[i] = len(ids)
    raise InputError(
        f"--seqlen {seqlen}: none of the {len(short)} documents looked at (of {len(documents)}) has "
        f"more than {seqlen} tokens, the longest has {max(short.values())}; lower --seqlen"
    )


def require_tokens(ids, needed, seqlen, source):
    """Raise InputError if a text has fewer than `needed` tokens."""
    if len(ids) < needed:
        raise InputError(
            f"--seqlen {seqlen}: the {source['split']} text of dataset {source['dataset']} has {len(ids)} "
            f"tokens and {needed} are needed; lower --seqlen or take another dataset"
        )


def load_rows(dataset, part, data_dir):
    """Return (rows, source) of the "train" or "test" part of a dataset, or of all of a path.

    rows is a list of str, or of chats, see `local.chat_of`.
    """
    text_set = text_set_of(dataset)
    split = text_set.test_split if part == "test" else part
    if text_set.code:
        rows, origin = text_set.load()(split)
    elif data_dir is None or not text_set.local:
        rows, origin = hub_rows(dataset, text_set, split)
    else:
        rows, origin = local_rows(dataset, split, data_dir)
    return rows, {"dataset": dataset, "split": split, **origin}


def hub_rows(dataset, text_set, split):
    """Return the rows of a split from the hub or its cache, and the name of the hub dataset."""
    options = dict(text_set.hub_options)
    if text_set.hub_files:
        options["data_files"] = {split: text_set.hub_files[split]}
    online = hub.reachable()
    try:
        with contextlib.nullcontext() if online else hub.offline():
            table = load_dataset(text_set.hub_id, split=split, **options)
    except (DatasetsError, OSError, ValueError) as error:  # ValueError: another configuration is cached
        reason = one_line(error) if online else "the hub cannot be reached and it is not in the cache"
        copy = f"with --data-dir DIR ({supply(dataset, split)})" if text_set.local else "as a file"
        raise InputError(
            f"dataset {dataset}: cannot load {text_set.hub_id}: {reason}; supply a copy {copy}, or use the dataset "
            "builtin"
        ) from None
    return text_column(table, text_set.hub_id, text_set.column), {"hub": text_set.hub_id, **options}
