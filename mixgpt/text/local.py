"""Find a dataset in a directory, in any of the usual layouts of local copies, and read its rows."""

import glob
import gzip
import itertools
import json
import os
import re
import tempfile
import zlib
from functools import partial
from pathlib import Path

import pyarrow
from datasets import load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from mixgpt.common.errors import InputError, one_line
from mixgpt.text import hub
from mixgpt.text.sets import DATASETS

SPLITS = {"train": r"\btrain\b", "test": r"\btest\b", "validation": r"\b(validation|valid|val)\b"}
# Ending of a local file -> its reader; of several copies of a split, the first in this order is used.
READERS = {
    "/state.json": "save_to_disk",  # stands for its directory
    ".parquet": "parquet",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
    ".raw": "text",
    ".txt": "text",
    ".tokens": "text",
}
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # kept beside the data
COLUMNS = ("text", "sentence", CHAT := "messages")
READ_ERRORS = (DatasetsError, OSError, EOFError, ValueError, zlib.error, pyarrow.ArrowException)
LONGEST = 100_000_000  # bytes of a row: its tokenizer needs many times as much
NEEDED = "text, sentence or messages is needed"


def local_rows(dataset, split, data_dir):
    """Return the rows of a split from a directory, and their files, without contacting the hub."""
    paths = find_files(dataset, split, data_dir)
    rows = [row for path in paths for row in read_file(path, DATASETS[dataset].local.row)]
    if not rows:
        raise InputError(f"--data-dir: {paths[0]} contains no rows")
    return rows, {"files": [str(path) for path in paths]}


def find_files(dataset, split, data_dir):
    """Return the paths of the files below `data_dir` that hold one split. Raises InputError if there are none."""
    local_set, root = DATASETS[dataset].local, Path(data_dir)
    if not root.is_dir():
        raise InputError(f"--data-dir {data_dir}: no such folder")
    held = sorted(data_files(root))
    names = {path: (Path(os.path.abspath(root)).name, *path.relative_to(root).parts) for path in held}
    named = [path for path in held if speaks_of(names[path], dataset, split)]
    fit = [path for path in named if not re.search(local_set.excluded, comparable("/".join(names[path])))]
    if not fit:
        seen = [str(path.relative_to(root)) for path in named or held]
        raise InputError(
            f"--data-dir {data_dir}: no {split} split of {dataset} found, {local_set.supply} is needed (looked "
            f"for paths with {local_set.name} and {SPLITS[split]}, ending in {' '.join(READERS)}); there "
            f"{'is only' if named else 'is'} {', '.join(seen[:5]) or 'nothing'}{', ...' if seen[5:] else ''}"
        )
    return one_copy(fit, local_set.first_shard)


def one_copy(paths, first_shard):
    """Return the shards of one copy of a split, of which `paths` may hold several.

    Copies are preferred by the order of READERS, then by shortest path, shortest name and alphabetically. Raises
    InputError if a shard is missing. first_shard: use only the first of the hub's shards.
    """
    copies = {}
    for path in paths:
        copies.setdefault(path.with_name(re.sub(r"\d+(?=-of-\d)|^\d+(?=\.)", "#", path.name)), []).append(path)
    copy = min(copies, key=lambda path: (reader_rank(path), len(path.parts), len(path.name), path.parts))
    shards = copies[copy]
    # `datasets` splits its own files at 500 MB: all the pieces are the one shard that was loaded.
    if first_shard and copy.suffix != ".arrow":
        return shards[:1]
    total = re.search(r"-of-(\d+)", copy.name)
    if total and len(shards) != int(total[1]):
        raise InputError(f"--data-dir: only {len(shards)} of the {int(total[1])} files {copy} found")
    return shards


def data_files(root):
    """Yield the paths below a folder that have a reader."""
    above = {}  # folder -> the folders it is in, by their numbers on disk, and itself
    for folder, below, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        own, upper = (status.st_dev, status.st_ino), above.get(os.path.dirname(folder), frozenset())
        if own in upper:  # a link back
            below.clear()
            continue
        above[folder] = upper | {own}
        paths = [Path(folder, name) for name in names if name not in METADATA]
        yield from (path for path in paths if reader_rank(path) < len(READERS))


def reader_rank(path):
    """Return the position in READERS of a path's ending; len(READERS) if it has no reader."""
    return next((i for i, end in enumerate(READERS) if path.as_posix().lower().endswith(end)), len(READERS))


def speaks_of(names, dataset, split):
    """Return whether a file's own name, or else its nearest directory, names the dataset and the split.

    names: the directory given as --data-dir, those below it, the file. The split is not taken from a directory of
    another dataset; names that match several splits (or datasets) are ignored.
    """
    found, found_split = False, None
    names_of_sets = {key: text_set.local.name for key, text_set in DATASETS.items() if text_set.local}
    for name in reversed(names):
        sets, splits = labels(name, names_of_sets), labels(name, SPLITS)
        if len(sets) == 1 and sets != [dataset]:
            break
        found = found or sets == [dataset]
        if found_split is None and len(splits) == 1:
            found_split = splits[0]
    return found and found_split == split


def labels(name, patterns):
    """Return the keys of `patterns` whose pattern occurs in a name."""
    return [label for label, pattern in patterns.items() if re.search(pattern, comparable(name))]


def comparable(name):
    """Normalise a local name for the patterns, in which "_" and "-" are the same."""
    return name.lower().replace("_", "-")


def reader_of(path):
    """Return the reader of a path's ending, None if there is none."""
    return [*READERS.values(), None][reader_rank(path)]


def read_file(path, text_row, given="--data-dir:"):
    """Return the rows of one local file as a list of str, leaving no copy in the cache of `datasets`.

    given: the argument that it comes from, with which errors begin.
    """
    reader = reader_of(path)
    for file in path.parent.iterdir() if reader == "save_to_disk" else [path]:
        if not file.is_file() and not file.is_dir():  # a pipe or a device, on which a reader would wait
            raise InputError(f"{given} {file} is not a regular file")
    try:
        if reader == "text":
            with path.open(encoding="utf-8-sig") as lines:
                return [text_row(line) for line in lines_of(lines)]
        if reader == "json":
            return json_texts(path, given)
        with hub.offline(), hub.unlogged("datasets"), tempfile.TemporaryDirectory() as cache:
            if reader == "save_to_disk":
                return text_column(load_from_disk(path.parent), path.parent)
            options = {"batch_size": 1000} if reader == "parquet" else {}  # by default that of its row groups, even 0
            table = load_dataset(reader, data_files=[glob.escape(str(path))], split="train", streaming=True,
                                 cache_dir=cache, **options)
            return text_column(table, path)
    except InputError:
        raise
    except READ_ERRORS as error:
        raise InputError(f"{given} {path} cannot be read ({reader}): {one_line(error)}") from None
    except (KeyError, TypeError, AttributeError) as error:  # from metadata of other types than expected
        raise InputError(f"{given} {path} cannot be read ({reader}): {type(error).__name__}: {one_line(error)}"
                         ) from None


def lines_of(file):
    """Yield the lines of an open file. Raises ValueError for one that no tokenizer could digest."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), file.read(0)), start=1):
        if len(line) > LONGEST:
            raise ValueError(f"line {number} is longer than {LONGEST / 1e6:.0f} MB; split it")
        yield line


def json_texts(path, given):
    """Return the texts of a file of JSON lines, or of one JSON list. Raises ValueError if it is damaged.

    Python's own reader: that of pyarrow, and so that of `datasets`, crashes on rows that are null or nested deeply.
    """
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        lines = lines_of(file)
        first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")
        if first.lstrip().startswith(b"["):
            whole = first + file.read(LONGEST)
            if len(whole) > LONGEST:
                raise ValueError(f"its list is longer than {LONGEST / 1e6:.0f} MB; write one object a line instead")
            rows = ((f"element {number}", row) for number, row in enumerate(json_value(whole, "the list"), start=1))
        else:
            rows = ((f"line {number}", json_value(line, f"line {number}"))
                    for number, line in enumerate(itertools.chain([first], lines), start=1) if line.strip())
        return [json_text(row, place, f"{given} {path}") for place, row in rows]


def json_value(text, place):
    """Return the value of JSON bytes. Raises ValueError, naming the place."""
    try:
        return json.loads(text.decode(), strict=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not text in UTF-8: {error.reason}") from error
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply") from error


def json_text(row, place, file):
    """Return the text of a row, or its chat: of an object, or of the text itself. file: named in errors."""
    if isinstance(row, dict):
        column = next((name for name in COLUMNS if name in row), None)
        if column is None:
            names = ", ".join(list(row)[:5]) or "none"
            raise InputError(f"{file}, {place} has the columns {names}: {NEEDED}")
        row, place = row[column], f"{place}, {column}"
        if column == CHAT:
            return chat_of(row, f"{file}, {place}")
    if not isinstance(row, str):
        kind = "null" if row is None else type(row).__name__
        raise InputError(f"{file}, {place} is {kind}, not text")
    return encodable(row, f"{file}, {place}")


def encodable(text, place):
    """Return a text. Raises InputError, naming the place, if it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place} has half of a surrogate pair, which is not text") from None
    return text


def chat_of(value, place):
    """Return a chat [{"role": …, "content": …}, …], without further keys. Raises InputError, naming the place."""
    if not isinstance(value, list) or not value or not all(
            isinstance(part, dict) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)
            for part in value):
        raise InputError(f'{place} is not a chat: [{{"role": "user", "content": "text"}}, …]')
    return [{name: encodable(part[name], place) for name in ("role", "content")} for part in value]


def text_column(table, origin, wanted=None):
    """Return the texts or chats of a Dataset or IterableDataset, from the column `wanted`, if given.

    origin: named in errors.
    """
    columns = list(next(iter(table), {}))
    column = next((name for name in ([wanted] if wanted else COLUMNS) if name in columns), None)
    if columns and column is None:
        needed = f"there is no {wanted}" if wanted else NEEDED
        raise InputError(f"{origin} has the columns {', '.join(columns)}: {needed}")
    texts = [text for batch in table.iter(batch_size=1000) for text in batch[column]]
    if column == CHAT:
        return [chat_of(chat, f"{origin}: the column {column}") for chat in texts]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{origin}: the column {column} contains values that are not text")
    if max(map(len, texts), default=0) > LONGEST:
        raise InputError(f"{origin}: a row is longer than {LONGEST / 1e6:.0f} MB; split it")
    return texts
