"""Read the rows of text files, and find those of a dataset below --data-dir."""

import glob
import gzip
import json
import re
import tempfile
from pathlib import Path

from datasets import load_dataset, load_from_disk

from mixgpt.common.errors import InputError, reading
from mixgpt.text import hub
from mixgpt.text.sets import DATASETS

# Ending of a file -> its reader.
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".json.gz": "json", ".jsonl.gz": "json",
           ".arrow": "arrow", ".raw": "text", ".txt": "text", "state.json": "save_to_disk"}
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # kept beside the data
COLUMNS = ("text", "sentence", CHAT := "messages")
NEEDED = "text, sentence or messages is needed"


def local_rows(dataset, split, data_dir):
    """Return the rows of a split from the files below a folder that are named as on the hub, and these files.

    Of a dataset that is sampled by document, only the first file is read, as from the hub.
    """
    text_set, root = DATASETS[dataset], Path(data_dir)
    patterns = [pattern.format(split=split) for pattern in text_set.local]
    files = next(filter(None, (sorted(root.glob(pattern)) for pattern in patterns)), None)
    if files is None:
        raise InputError(f"--data-dir {data_dir}: no {split} split of {dataset} in it; needs {supply(dataset, split)}")
    files = files[:1] if text_set.by_document else files
    total = re.search(r"-of-0*(\d+)", files[0].name)
    if total and not text_set.by_document and len(files) != int(total[1]):
        raise InputError(f"--data-dir {data_dir}: only {len(files)} of {total[1]} files like {files[0]} are there")
    rows = [row for file in files for row in read_file(file, "--data-dir", text_set.line)]
    if not rows:
        raise InputError(f"--data-dir {files[0]}: contains no rows")
    return rows, {"files": [str(file) for file in files]}


def supply(dataset, split):
    """Return what a local copy of a split may be named, for messages."""
    return " or ".join(DATASETS[dataset].local).format(split=split).replace("**/", "")


def reader_of(path):
    """Return the reader of a path by its ending, None if there is none; the last ending that fits decides."""
    fitting = [reader for ending, reader in READERS.items() if path.name.lower().endswith(ending)]
    return fitting[-1] if fitting and path.name not in METADATA else None


def read_file(path, argument, line=str):
    """Return the rows of one file, each a text or a chat, leaving no copy in the cache of `datasets`.

    argument: which the path comes from, with which errors begin. line: from a line of plain text to a row.
    """
    reader, subject = reader_of(path), f"{argument} {path}"
    if not path.is_file():
        raise InputError(f"{subject}: is not a regular file")
    with reading(f"{subject}: cannot be read"):
        if reader == "text":
            with path.open(encoding="utf-8-sig") as file:
                return [line(text) for text in file]
        if reader == "json":
            return [_text_of(row, f"{subject}: row {number}") for number, row in enumerate(_json_rows(path), 1)]
        with hub.offline(), hub.unlogged("datasets"), tempfile.TemporaryDirectory() as cache:
            if reader == "save_to_disk":
                return text_column(load_from_disk(path.parent), subject)
            table = load_dataset(reader, data_files=[glob.escape(str(path))], split="train", streaming=True,
                                 cache_dir=cache)
            return text_column(table, subject)


def _json_rows(path):
    """Return the values of JSON lines, or of one JSON list.

    Python's own reader: that of `datasets` takes neither texts without a column nor rows with varying keys.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    return json.loads(text) if text.lstrip().startswith("[") else [
        json.loads(line) for line in text.split("\n") if line.strip()]


def _text_of(row, subject):
    """Return the text or chat of a row: an object with one of COLUMNS, or the text itself."""
    column = None
    if isinstance(row, dict):
        column = next((name for name in COLUMNS if name in row), None)
        if column is None:
            raise InputError(f"{subject} has the columns {', '.join(list(row)[:5]) or 'none'}: {NEEDED}")
        row = row[column]
    if column == CHAT:
        return chat_of(row, subject)
    if not isinstance(row, str):
        raise InputError(f"{subject} is {type(row).__name__}, not text")
    return row


def chat_of(value, subject):
    """Return a chat [{"role": …, "content": …}, …], without further keys. Raises InputError, naming the subject."""
    if not isinstance(value, list) or not value or not all(
            isinstance(part, dict) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)
            for part in value):
        raise InputError(f'{subject} is not a chat: [{{"role": "user", "content": "text"}}, …]')
    return [{name: part[name] for name in ("role", "content")} for part in value]


def text_column(table, subject, wanted=None):
    """Return the texts or chats of a Dataset or IterableDataset, from the column `wanted`, if given.

    subject: named in errors.
    """
    columns = list(next(iter(table), {}))
    column = next((name for name in ([wanted] if wanted else COLUMNS) if name in columns), None)
    if columns and column is None:
        needed = f"there is no {wanted}" if wanted else NEEDED
        raise InputError(f"{subject} has the columns {', '.join(columns)}: {needed}")
    texts = [text for batch in table.iter(batch_size=1000) for text in batch[column]]
    if column == CHAT:
        return [chat_of(chat, f"{subject}: the column {column}") for chat in texts]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{subject}: the column {column} contains values that are not text")
    return texts
