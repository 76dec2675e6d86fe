"""Text of one's own, given in place of a dataset's name: a file, a folder of files, or a column on the hub."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

from mixgpt.common.errors import InputError
from mixgpt.text.local import READERS, read_file, reader_of
from mixgpt.text.sets import DATASETS, TextSet, hub_column


def text_set_of(name):
    """Return the TextSet of a dataset's name, of a path, or of a column on the hub. Raises InputError if it is none.

    Rows of the latter two are joined by blank lines, and samples are drawn from anywhere in the joined text.
    """
    if name not in DATASETS and os.path.exists(name):
        return TextSet("a file or folder of text", partial(own_rows, name))
    if on_hub := hub_column(name):
        hub_id, column = on_hub
        return TextSet("a column of a dataset on the hub", hub_id=hub_id, column=column)
    return DATASETS.check(name)


def own_rows(path, split):
    """Return all rows of a file, or of the files below a folder, in order of their paths, and where they come from.

    A plain text file is one row. A path has no splits: `split` is ignored. Raises InputError, naming the file, if it
    cannot be read or holds no text.
    """
    root = Path(path)
    files = sorted(file for file in root.rglob("*") if reader_of(file)) if root.is_dir() else [root]
    saved = {file.parent for file in files if reader_of(file) == "save_to_disk"}
    files = [file for file in files if reader_of(file) == "save_to_disk" or file.parent not in saved]
    if not files or reader_of(files[0]) is None:
        raise InputError(f"dataset {path}: {'no files below it end' if root.is_dir() else 'must end'} in one of "
                         f"{' '.join(READERS)}")
    rows, digest = [], hashlib.sha256()
    for file in files:
        part = read_file(file, "dataset")
        rows += ["".join(part)] if reader_of(file) == "text" else part
    for row in rows:
        digest.update((row if isinstance(row, str) else json.dumps(row)).encode() + b"\0")
    if not any(row.strip() if isinstance(row, str) else row for row in rows):
        raise InputError(f"dataset {path}: contains no text")
    return rows, {"files": [str(file) for file in files], "sha256": digest.hexdigest()}
