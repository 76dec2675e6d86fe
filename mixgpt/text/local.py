"""Find a dataset in a directory, in any of the usual layouts of local copies, and read its rows."""

import glob
import os
import re
import tempfile
import zlib
from pathlib import Path

from datasets import load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from mixgpt.common.errors import InputError
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
COLUMNS = ("text", "sentence")
READ_ERRORS = (DatasetsError, OSError, EOFError, ValueError, zlib.error)


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
    fit = [path for path in named if not re.search(local_set.unwanted, comparable("/".join(names[path])))]
    if not fit:
        seen = [str(path.relative_to(root)) for path in named or held]
        raise InputError(
            f"--data-dir {data_dir}: no {split} split of {dataset} found, {local_set.wanted} is needed (looked "
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
    for folder, _, names in os.walk(root, followlinks=True):
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


def read_file(path, text_row):
    """Return the rows of one local file as a list of str, leaving no copy in the cache of `datasets`."""
    reader = list(READERS.values())[reader_rank(path)]
    try:
        if reader == "text":
            with path.open(encoding="utf-8") as lines:
                return [text_row(line) for line in lines]
        with hub.offline(), hub.unlogged("datasets"), tempfile.TemporaryDirectory() as cache:
            if reader == "save_to_disk":
                return text_column(load_from_disk(path.parent), path.parent)
            files = [glob.escape(str(path))]
            table = load_dataset(reader, data_files=files, split="train", streaming=True, cache_dir=cache)
            return text_column(table, path)
    except InputError:
        raise
    except StopIteration:  # raised by `datasets` for a JSON file without rows
        return []
    except READ_ERRORS as error:
        raise InputError(f"--data-dir: {path} cannot be read ({reader}): {one_line(error)}") from None


def text_column(table, origin):
    """Return the texts of a Dataset or IterableDataset as a list of str. origin: named in errors."""
    columns = list(next(iter(table), {}))
    column = next((name for name in COLUMNS if name in columns), None)
    if columns and column is None:
        raise InputError(f"{origin} has the columns {', '.join(columns)}: {' or '.join(COLUMNS)} is needed")
    texts = [text for batch in table.iter(batch_size=1000) for text in batch[column]]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{origin}: the column {column} contains values that are not text")
    return texts


def one_line(error):
    """Return an exception's message, or else its name, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
