"""The named datasets: where their rows are, and how they are joined into one text; and mixtures of several texts."""

import hashlib
import itertools
import math
import os
import re
from dataclasses import dataclass, field

from mixgpt.common.choices import Choice, Registry
from mixgpt.common.errors import InputError


@dataclass(frozen=True)
class TextSet(Choice):
    """One dataset. Its code, if any, maps a split to (rows, JSON-able dict of their origin); otherwise rows come from
    the hub or a copy."""

    train_join: str = "\n\n"
    test_join: str = "\n\n"
    hub_id: str | None = None
    hub_options: dict = field(default_factory=dict)  # further arguments of load_dataset
    hub_files: dict = field(default_factory=dict)  # split -> the one file to fetch
    column: str | None = None  # that holds the text (default: text, sentence or messages)
    local: str = ""  # pattern of its files on the hub, which are looked for below --data-dir
    test_split: str = "test"
    by_document: bool = False  # samples do not cross documents; only the first shard is used
    test_documents: int | None = None
    test_segments: int | None = None


def hub_column(name):
    """Return hub id and column of owner/dataset:column, or None for another name."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+):([A-Za-z_]\w*)", name)
    return match and match.groups()


def builtin_rows(split):
    """Return the paragraphs of Python's help topics, and the sha256 of their concatenation.

    Repeated paragraphs, ignoring indentation, are dropped: topics share whole sections, and the test text must be
    unseen. Train is the first 80% of the characters, test the rest.
    """
    from pydoc_data.topics import topics  # half a megabyte

    unique = {}
    for paragraph in "\n\n".join(topics[topic] for topic in sorted(topics)).split("\n\n"):
        unique.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs = list(unique.values())
    ends = list(itertools.accumulate(len(paragraph) + len("\n\n") for paragraph in paragraphs))
    border = sum(end <= 0.8 * ends[-1] for end in ends)
    sha256 = hashlib.sha256("\n\n".join(paragraphs).encode()).hexdigest()
    return paragraphs[:border] if split == "train" else paragraphs[border:], {"sha256": sha256}


DATASETS = Registry("dataset", {
    "wikitext2": TextSet(
        "raw WikiText-2", train_join=" ", hub_id="Salesforce/wikitext", hub_options={"name": "wikitext-2-raw-v1"},
        local="wikitext-2-raw-v1/{split}-*.parquet"),
    "ptb": TextSet(
        "Penn Treebank", train_join=" ", test_join=" ", hub_id="ptb-text-only/ptb_text_only",
        hub_options={"revision": "refs/convert/parquet"},  # datasets >= 4 does not run its script
        local="penn_treebank/{split}/*.parquet"),
    "c4": TextSet(
        "C4, English", train_join=" ", test_join=" ", hub_id="allenai/c4", test_split="validation",
        hub_files={"train": "en/c4-train.00000-of-01024.json.gz",
                   "validation": "en/c4-validation.00000-of-00008.json.gz"},
        by_document=True, test_documents=1100, test_segments=256, local="en/c4-{split}.00000-of-*.json.gz"),
    "builtin": TextSet("CPython's own reference manual, which needs no download", builtin_rows),
})


def shares_of(name, flag="dataset"):
    """Return {text: share} of a mixture, or of one text; the shares add up to 1.

    A text is the name of a dataset, a path, or owner/dataset:column on the hub. Raises InputError for anything else.
    """
    if known(name):
        return {name: 1.0}
    weights = {}
    for part in name.split(",") if ":" in name else []:
        text, _, share = part.rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise InputError(f"{flag} {name}: {part!r}: in a mixture each text needs a share above 0, for example "
                             "c4:0.7,builtin:0.3")
        weights[text] = weights.get(text, 0) + value
    if unknown := [text for text in weights or [name] if not known(text)]:
        raise InputError(f"{flag} {name}: invalid choice: {unknown[0]!r} (choose from "
                         f"{', '.join(map(repr, DATASETS))}, or give a file or folder of text, or owner/dataset:column "
                         "on the hub)")
    return {text: weight / sum(weights.values()) for text, weight in weights.items()}


def check_texts(name, tests, drawn):
    """Raise InputError for calibration text or test texts that do not exist, or that overlap.

    name: None for text in memory. drawn: whether calibration draws from its text. Only datasets have separate splits.
    """
    texts = shares_of(name) if name else ()
    paths = {os.path.realpath(text) for text in texts if text not in DATASETS}
    for test in tests:
        if len(shares_of(test, "--eval")) > 1:
            raise InputError(f"--eval {test}: is a mixture, which is for calibration; give its texts one by one")
        if drawn and test not in DATASETS and os.path.realpath(test) in paths:
            raise InputError(f"--eval {test}: is text that calibration draws from; give another one")


def known(text):
    """Return whether a text is the name of a dataset, a path that exists, or has the form of a column on the hub."""
    return text in DATASETS or os.path.exists(text) or bool(hub_column(text))


def counts_of(name, nsamples):
    """Return {text: number of its sequences}, which sum to nsamples: largest remainders.

    Raises InputError if a text would get none, or for an unknown text.
    """
    wanted = {text: share * nsamples for text, share in shares_of(name).items()}
    numbers = {text: int(number) for text, number in wanted.items()}
    for text in sorted(wanted, key=lambda text: numbers[text] - wanted[text])[:nsamples - sum(numbers.values())]:
        numbers[text] += 1
    if none := [text for text, number in numbers.items() if not number]:
        raise InputError(f"--nsamples {nsamples}: gives no sequence to {none[0]} in {name}; raise it")
    return numbers
