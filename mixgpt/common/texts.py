"""Texts: the named datasets, files of the user's own, columns of datasets on the hub, and mixtures of these."""

import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mixgpt.common.choices import Choice, Registry
from mixgpt.common.errors import InputError, reading

ENDINGS = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".arrow")
IGNORED = ("state.json", "dataset_dict.json", "dataset_info*.json", "cache-*.arrow")  # of `datasets`, beside the data
COLUMNS = ("text", "sentence", "messages")
ARGUMENTS = {"train": "dataset", "test": "--eval", "validation": "--eval"}  # split -> by which its text is given


@dataclass(frozen=True)
class TextSet(Choice):
    """A dataset. Its code maps a split to (rows, JSON-able dict of their origin); without, rows come from the hub."""

    train_join: str = "\n\n"
    test_join: str = "\n\n"
    hub_id: str | None = None
    hub_options: dict = field(default_factory=dict)  # further arguments of load_dataset
    hub_files: dict = field(default_factory=dict)  # split -> the one file to fetch
    columns: tuple[str, ...] = COLUMNS  # of which the first that is there holds the text
    local: str = ""  # pattern of its files on the hub, which are looked for below --data-dir
    test_split: str = "test"
    by_document: bool = False  # samples do not cross documents; only the first shard is used
    test_documents: int | None = None
    test_segments: int | None = None


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


DATASETS = Registry({
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
    weights = {}
    for part in name.split(",") if ":" in name and not text_set_of(name) else [f"{name}:1"]:
        text, _, share = os.path.expanduser(part.strip()).rpartition(":")
        value = float(share) if re.fullmatch(r"\d+\.?\d*|\.\d+", share) else 0
        if not value:
            raise InputError(f"{flag} {name}: {part!r}: in a mixture each text needs a share above 0, for example "
                             "c4:0.7,builtin:0.3")
        if not text_set_of(text):
            raise InputError(f"{flag} {name}: invalid choice: {text!r} (choose from {', '.join(map(repr, DATASETS))}, "
                             "or give a file or folder of text, or owner/dataset:column on the hub)")
        weights[text] = weights.get(text, 0) + value
    return {text: weight / sum(weights.values()) for text, weight in weights.items()}


def check_texts(name, tests, drawn):
    """Raise InputError for calibration text or test texts that do not exist, or that overlap.

    name: None for text in memory. drawn: whether calibration draws from its text. Paths have no separate splits.
    """
    texts = shares_of(name) if name else ()
    drawn_from = {file.resolve() for text in texts if drawn and is_path(text) for file in _files_of(text)}
    for test in tests:
        if len(shares_of(test, "--eval")) > 1:
            raise InputError(f"--eval {test}: is a mixture, which is for calibration; give its texts one by one")
        if is_path(test) and any(file.resolve() in drawn_from for file in _files_of(test)):
            raise InputError(f"--eval {test}: is text that calibration draws from; give another one")


def is_path(text):
    """Return whether a text is a file or a folder."""
    return text not in DATASETS and os.path.exists(text)


def counts_of(name, nsamples):
    """Return {text: number of its sequences}, nsamples in all. Raises InputError if a text gets none or is unknown."""
    shares = shares_of(name)
    ends = [round(total * nsamples) for total in itertools.accumulate(shares.values(), initial=0)]
    numbers = {text: stop - start for text, (start, stop) in zip(shares, itertools.pairwise(ends), strict=True)}
    if none := [text for text, number in numbers.items() if not number]:
        raise InputError(f"--nsamples {nsamples}: gives no sequence to {none[0]} in {name}; raise it")
    return numbers


@functools.cache
def hub_reachable():
    """Return whether the hub answers its own client within 5 seconds; with HF_HUB_OFFLINE it is not asked.

    If not, its libraries work offline from now on, within `hub_asked_anew` until its end: they would retry for 23 s
    each time.
    """
    import datasets
    from huggingface_hub import constants, utils
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # what a client raises depends on its library: no name, no route, no certificate, no answer
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return False
    return True  # an error status is an answer too


@contextlib.contextmanager
def hub_asked_anew():
    """Let `hub_reachable` ask once within the block; behind it the hub's libraries are as they were before."""
    import datasets
    from huggingface_hub import constants
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        hub_reachable.cache_clear()


@contextlib.contextmanager
def silenced():
    """Suppress the logs and warnings of libraries, whose errors become lines, and without a terminal their bars."""
    shown = sys.stderr and sys.stderr.isatty()
    before, hidden = logging.root.manager.disable, io.StringIO()
    hidden.behind = sys.stderr  # to which `progress.bar` still writes
    logging.disable()
    try:
        with (contextlib.nullcontext() if shown else contextlib.redirect_stderr(hidden),
              warnings.catch_warnings(action="ignore")):
            yield
    finally:
        logging.disable(before)


def text_set_of(dataset):
    """Return the TextSet of a dataset's name, a path, owner/dataset:column on the hub, or a list; else None."""
    if isinstance(dataset, list):
        return TextSet("a list of texts", lambda split: (dataset, {"sha256": _digest(dataset)}))
    if is_path(dataset):
        return TextSet("a file or folder of text", partial(path_rows, dataset))
    if on_hub := re.fullmatch(r"([\w.-]+/[\w.-]+):([A-Za-z_]\w*)", dataset):
        hub_id, column = on_hub.groups()
        return TextSet("a column of a dataset on the hub", hub_id=hub_id, columns=(column,))
    return DATASETS.get(dataset)


def path_rows(path, split):
    """Return all rows of a file, or of the files below a folder in order of their paths, and where they come from."""
    if not (files := _files_of(path)):
        ends = "no files below it end" if os.path.isdir(path) else "must end"
        raise InputError(f"{ARGUMENTS[split]} {path}: {ends} in one of {' '.join(ENDINGS)}")
    rows = [row for file in files for row in read_file(file, ARGUMENTS[split])]
    return rows, {"files": [str(file) for file in files], "sha256": _digest(rows)}


def _files_of(path):
    """Return the files of text below a folder, or the file itself, if its name is that of one."""
    return [file for file in (_below(path, "*") if os.path.isdir(path) else [Path(path)])
            if file.name.endswith(ENDINGS) and not any(file.match(name) for name in IGNORED) and not file.is_dir()]


def _below(folder, pattern):
    """Return the paths at any depth of a folder that match a pattern, in order. Those of pathlib pass over links."""
    return sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**/{pattern}", recursive=True, include_hidden=True)))


def hub_copy_rows(dataset, split, data_dir):
    """Return the rows of a split from the files below a folder that are named as on the hub, and these files."""
    pattern = DATASETS[dataset].local.format(split=split)
    files = _below(data_dir, pattern)
    if not files:
        raise InputError(f"--data-dir {data_dir}: no {split} split of {dataset} in it; needs {pattern}, as on the hub")
    files = [file for file in files if file.parent == files[0].parent]  # of one copy
    return [row for file in files for row in read_file(file, "--data-dir")], {"files": [str(file) for file in files]}


def read_file(path, argument):
    """Return the rows of one file, each a text or a chat. Raises InputError that begins with the argument and path."""
    import pyarrow.parquet  # slow
    with reading(f"{argument} {path}: cannot be read"):
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".arrow":
            with path.open("rb") as file:  # Arrow has two formats: a stream, as `datasets` writes, and a file
                opened = pyarrow.ipc.open_file if file.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
            rows = opened(path).read_all().to_pylist()
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
                rows = [file.read()] if path.suffix == ".txt" else json_rows(file)
        return texts_of(rows, f"{argument} {path}")


def json_rows(file):
    """Return the values that follow one another in a file, or in its list if it is one. Raises JSONDecodeError."""
    decoder, blanks, rows = json.JSONDecoder(), re.compile(r"\s*"), []
    for number, line in enumerate(file):
        try:  # most files have a value in each line, and their whole text is never in memory
            rows.append(decoder.decode(line))
        except json.JSONDecodeError:  # takes all that is left, below as many lines as before
            text, end = "\n" * number + line + file.read(), 0
            while (start := blanks.match(text, end).end()) < len(text):
                row, end = decoder.raw_decode(text, start)
                rows.append(row)
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


def texts_of(rows, subject, columns=COLUMNS):
    """Return the texts or chats of rows, which are these, or dicts with one in the first of the columns they have."""
    return [_text_of(row, f"{subject}: row {number}", columns) for number, row in enumerate(rows, 1)]


def _text_of(row, subject, columns):
    """Return a text, or a chat [{"role": …, "content": …}, …] without further keys. Raises InputError otherwise."""
    if isinstance(row, dict):
        if not (present := [column for column in columns if column in row]):
            raise InputError(f"{subject} has the columns {', '.join(row)}; needs {' or '.join(columns)}")
        row = row[present[0]]
    if isinstance(row, str):
        return row
    parts = row if isinstance(row, list) else []
    if not parts or not all(isinstance(part, dict) and "role" in part and isinstance(part.get("content"), str)
                            for part in parts):
        raise InputError(f'{subject} is neither text nor a chat [{{"role": "user", "content": "text"}}, …]')
    return [{"role": part["role"], "content": part["content"]} for part in parts]


def _digest(rows):
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
