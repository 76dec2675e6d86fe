"""Where texts come from: the Hugging Face hub, a copy of a dataset of it in --data-dir, files of the user's own."""

import contextlib
import functools
import gzip
import hashlib
import json
import logging
import os
from functools import partial
from pathlib import Path

import datasets
import pyarrow.parquet
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from mixgpt.common.errors import InputError, reading
from mixgpt.text.sets import DATASETS, TextSet, hub_column

ENDINGS = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".arrow")
IGNORED = ("state.json", "dataset_*.json", "cache-*.arrow")  # what `datasets` keeps beside the data
COLUMNS = ("text", "sentence", "messages")


@functools.cache
def hub_reachable(timeout=5):
    """Return whether the hub answers its own client within `timeout` seconds; with HF_HUB_OFFLINE it is not asked.

    If not, its libraries work offline from now on: they would retry for 23 s each time. The client has the endpoint,
    certificates and proxies of all later requests.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # what a client raises depends on its library: no name, no route, no certificate, no answer
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return False
    return True  # an error status is an answer too


@contextlib.contextmanager
def unlogged():
    """Suppress the logs of libraries: we report their exceptions in one line, where they would log a table."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def text_set_of(dataset):
    """Return the TextSet of a dataset's name, a path, a column on the hub, or a list of texts.

    Rows of the last three are joined by blank lines, and samples are drawn from anywhere in the joined text. Raises
    InputError for an unknown name.
    """
    if isinstance(dataset, list):
        return TextSet("a list of texts", lambda split: (dataset, {"sha256": _digest(dataset)}))
    if dataset not in DATASETS and os.path.exists(dataset):
        return TextSet("a file or folder of text", partial(path_rows, dataset))
    if on_hub := hub_column(dataset):
        hub_id, column = on_hub
        return TextSet("a column of a dataset on the hub", hub_id=hub_id, column=column)
    return DATASETS.check(dataset)


def path_rows(path, split=None):
    """Return all rows of a file, or of the files below a folder in order of their paths, and where they come from.

    A .txt file is one row. A path has no splits: `split` is ignored. Raises InputError, naming the file, if it cannot
    be read or holds no text.
    """
    root = Path(path)
    files = [file for file in (sorted(root.rglob("*")) if root.is_dir() else [root])
             if file.name.endswith(ENDINGS) and not any(file.match(name) for name in IGNORED)]
    if not files:
        raise InputError(f"dataset {path}: {'no files below it end' if root.is_dir() else 'must end'} in one of "
                         f"{' '.join(ENDINGS)}")
    rows = [row for file in files for row in read_file(file, "dataset")]
    if not any(row.strip() if isinstance(row, str) else row for row in rows):
        raise InputError(f"dataset {path}: contains no text")
    return rows, {"files": [str(file) for file in files], "sha256": _digest(rows)}


def hub_copy_rows(dataset, split, data_dir):
    """Return the rows of a split from the files below a folder that are named as on the hub, and these files."""
    pattern = DATASETS[dataset].local.format(split=split)
    files = sorted(Path(data_dir).glob(f"**/{pattern}"))
    if not files:
        raise InputError(f"--data-dir {data_dir}: no {split} split of {dataset} in it; needs {pattern}, as on the hub")
    files = [file for file in files if file.parent == files[0].parent]  # of one copy
    return [row for file in files for row in read_file(file, "--data-dir")], {"files": [str(file) for file in files]}


def read_file(path, argument):
    """Return the rows of one file, each a text or a chat. Raises InputError that begins with the argument and path."""
    subject = f"{argument} {path}"
    with reading(f"{subject}: cannot be read"):
        if path.suffix == ".parquet":
            return column_of(Dataset(pyarrow.parquet.read_table(path)), subject)
        if path.suffix == ".arrow":
            return column_of(Dataset.from_file(str(path)), subject)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
        if path.suffix == ".txt":
            return [text]
        rows = json.loads(text) if text.lstrip().startswith("[") else [
            json.loads(line) for line in text.split("\n") if line.strip()]
        return [_text_or_chat(row[_column(row, subject)] if isinstance(row, dict) else row, f"{subject}: row {number}")
                for number, row in enumerate(rows, 1)]


def column_of(table, subject, wanted=None):
    """Return the texts or chats in a column of a datasets.Dataset: `wanted`, or the first of COLUMNS that it has."""
    column = _column(table.column_names, subject, wanted)
    return [_text_or_chat(value, f"{subject}: row {number}") for number, value in enumerate(table[column], 1)]


def _column(names, subject, wanted=None):
    for column in [wanted] if wanted else COLUMNS:
        if column in names:
            return column
    needed = wanted or "text, sentence or messages"
    raise InputError(f"{subject} has the columns {', '.join(names)}: {needed} is needed")


def _text_or_chat(value, subject):
    """Return a text, or a chat [{"role": …, "content": …}, …] without further keys. Raises InputError otherwise."""
    if isinstance(value, str):
        return value
    try:
        chat = [{"role": part["role"], "content": part["content"]} for part in value]
    except (TypeError, KeyError):
        chat = []
    if not chat or not all(isinstance(part["content"], str) for part in chat):
        raise InputError(f'{subject} is neither text nor a chat [{{"role": "user", "content": "text"}}, …]')
    return chat


def _digest(rows):
    """Return the sha256 of rows."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
