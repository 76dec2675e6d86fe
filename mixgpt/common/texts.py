"""Texts: the named datasets, files of the user's own, columns of datasets on the hub, and mixtures of these."""

import glob
import gzip
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from mixgpt.common.choices import Choice, Registry
from mixgpt.common.errors import InputError, reading

ENDINGS = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".arrow")
IGNORED = ("state.json", "dataset_dict.json", "dataset_info*.json", "cache-*.arrow")  # what `datasets` puts beside data
COLUMNS = ("text", "sentence", "messages")
ON_HUB = re.compile(r"([\w.-]+/[\w.-]+):([A-Za-z_]\w*)")  # owner/dataset:column
ARGUMENTS = {"train": "dataset", "test": "--eval", "validation": "--eval"}  # the argument that names a split's text
OWN = "self"  # The run's model writes this text.
Row = str | list[dict[str, str]]  # a row is a text, or a chat [{"role": …, "content": …}, …]


@dataclass(frozen=True)
class TextSet(Choice):
    """A dataset. Its code maps a split to (rows, JSON-able dict of their origin); without, rows come from the hub."""

    train_join: str = "\n\n"
    test_join: str = "\n\n"
    hub_id: str = ""
    hub_options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of load_dataset
    hub_files: dict[str, str] = field(default_factory=dict)  # {split: the one file to fetch}
    columns: tuple[str, ...] = COLUMNS  # the first of these that a row has holds its text
    local: str = ""  # the names of its files on the hub, and below --data-dir
    test_split: str = "test"
    by_document: bool = False  # samples do not cross documents
    test_documents: int | None = None
    test_segments: int | None = None


def builtin_rows(split: str) -> tuple[list[str], dict[str, Any]]:
    """Return paragraphs of Python's help topics, the first 80% of the characters for train, and the sha256 of all."""
    from pydoc_data.topics import topics  # half a megabyte
    unique: dict[str, str] = {}  # topics share whole sections, and the test text must be unseen
    for paragraph in "\n\n".join(topics[topic] for topic in sorted(topics)).split("\n\n"):
        unique.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs = list(unique.values())
    ends = list(itertools.accumulate(len(paragraph) + len("\n\n") for paragraph in paragraphs))
    border = sum(end <= 0.8 * ends[-1] for end in ends)
    sha256 = hashlib.sha256("\n\n".join(paragraphs).encode()).hexdigest()
    return paragraphs[:border] if split == "train" else paragraphs[border:], {"sha256": sha256}


def code_rows(split: str) -> tuple[list[Row], dict[str, Any]]:
    """Return source files of Python's standard library, those of two packages for test, and the sha256 of all."""
    library = Path(os.__file__).parent
    folders = [library / name for name in ("asyncio", "email")] if split == "test" else [library]
    files: list[Row] = [file.read_text(encoding="utf-8", errors="replace") for folder in folders
                        for file in sorted(folder.glob("*.py"))]
    return files, {"sha256": _digest(files)}


def own_rows(split: str) -> tuple[list[Row], dict[str, Any]]:
    """Raise InputError: these rows do not exist before a model has written them."""
    raise InputError(f"{ARGUMENTS[split]} {OWN}: is text that a model writes, which only a run has")


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
    OWN: TextSet("text that the dense model writes itself, half of it chats if its tokenizer has a chat template",
                 own_rows),
    "code": TextSet("source code of CPython's standard library, which needs no download", code_rows, by_document=True),
})


def shares_of(name: str, flag: str = "dataset") -> dict[str, float]:
    """Return {text: share} for a mixture, or for one text; shares add up to 1. Raises InputError for anything else."""
    def known(text: str) -> bool:
        return text in DATASETS or os.path.exists(text) or ON_HUB.fullmatch(text) is not None

    weights: dict[str, float] = {}
    for part in name.split(",") if ":" in name and not known(name) else [f"{name}:1"]:
        text, _, share = os.path.expanduser(part.strip()).rpartition(":")
        value = float(share) if re.fullmatch(r"\d+\.?\d*|\.\d+", share) else 0
        if not value:
            raise InputError(f"{flag} {name}: {part!r}: in a mixture each text needs a share above 0, for example "
                             "c4:0.7,builtin:0.3")
        if not known(text):
            raise InputError(f"{flag} {name}: invalid choice: {text!r} (choose from {', '.join(map(repr, DATASETS))}, "
                             "or give a file or folder of text, or owner/dataset:column on the hub)")
        weights[text] = weights.get(text, 0) + value
    return {text: weight / sum(weights.values()) for text, weight in weights.items()}


def without_own(name: str) -> str:
    """Return the other texts of a mixture in which the model's own is one, else the same text."""
    shares = shares_of(name)
    others = [f"{text}:{share:g}" for text, share in shares.items() if text != OWN]
    return ",".join(others) if 0 < len(others) < len(shares) else name


def text_for(what: str, dataset: Any) -> Any:
    """Return the text for calibration or distillation: to distil on the model's own text gains nothing."""
    return without_own(dataset) if what == "distillation" and isinstance(dataset, str) else dataset


def check_texts(name: str | None, tests: Iterable[str], nsamples: int) -> None:
    """Raise InputError for texts that do not exist or of which none of nsamples sequences is (0: none are drawn).

    Also for tests from which calibration draws: paths have no splits.
    """
    texts = shares_of(name) if name else ()
    if name and nsamples and (none := [text for text in texts if text not in counts_of(name, nsamples)]):
        raise InputError(f"--nsamples {nsamples}: gives no sequence to {none[0]} in {name}; raise it")
    drawn_from = {file.resolve() for text in texts if nsamples and is_path(text) for file in _files_of(text)}
    for test in tests:
        if len(shares_of(test, "--eval")) > 1:
            raise InputError(f"--eval {test}: is a mixture, which is for calibration; give its texts one by one")
        if is_path(test) and any(file.resolve() in drawn_from for file in _files_of(test)):
            raise InputError(f"--eval {test}: is text that calibration draws from; give another one")


def is_path(text: str) -> bool:
    """Return whether a text is a file or a folder."""
    return text not in DATASETS and os.path.exists(text)


def counts_of(name: str, nsamples: int) -> dict[str, int]:
    """Return {text: number of its sequences}, nsamples in all, of the texts that get one. Raises InputError."""
    shares = shares_of(name)
    ends = [round(total * nsamples) for total in itertools.accumulate(shares.values(), initial=0)]
    return {text: stop - start for text, (start, stop) in zip(shares, itertools.pairwise(ends), strict=True)
            if stop > start}


def text_set_of(dataset: str | list[Row]) -> TextSet:
    """Return the TextSet of a dataset's name, a path, owner/dataset:column on the hub, or a list."""
    if isinstance(dataset, list):
        return TextSet("a list of texts", lambda split: (dataset, {"sha256": _digest(dataset)}))
    if is_path(dataset):
        return TextSet("a file or folder of text", partial(path_rows, dataset))
    if on_hub := ON_HUB.fullmatch(dataset):
        return TextSet("a column of a dataset on the hub", hub_id=on_hub[1], columns=(on_hub[2],))
    return DATASETS[dataset]


def path_rows(path: str, split: str) -> tuple[list[Row], dict[str, Any]]:
    """Return all rows of a file, or of the files below a folder in order of their paths, and where they come from."""
    if not (files := _files_of(path)):
        ends = "no files below it end" if os.path.isdir(path) else "must end"
        raise InputError(f"{ARGUMENTS[split]} {path}: {ends} in one of {' '.join(ENDINGS)}")
    rows, origin = read_files(files, ARGUMENTS[split])
    return rows, origin | {"sha256": _digest(rows)}


def _files_of(path: str) -> list[Path]:
    """Return the files of text below a folder, or the file itself, if its name is that of one."""
    return [file for file in (_below(path, "*") if os.path.isdir(path) else [Path(path)])
            if file.name.endswith(ENDINGS) and not any(file.match(name) for name in IGNORED) and not file.is_dir()]


def _below(folder: str | Path, pattern: str) -> list[Path]:
    """Return the paths at any depth of a folder that match a pattern, in order. pathlib would not follow links."""
    return sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**/{pattern}", recursive=True, include_hidden=True)))


def hub_copies(data_dir: str | Path, **parts: Iterable[str]) -> dict[tuple[str, str], list[Path]]:
    """Return {(dataset, split): files below a folder, named as on the hub}. parts: train=datasets, test=datasets."""
    if not os.path.isdir(data_dir):
        raise InputError(f"--data-dir {data_dir}: no such folder")
    copies, missing = {}, []
    for text_set, name, part in ((text_set_of(name), name, part) for part, names in parts.items() for name in names):
        if text_set.local:
            split = text_set.test_split if part == "test" else part
            files = _below(data_dir, pattern := text_set.local.format(split=split))
            copies[name, split] = [file for file in files if file.parent == files[0].parent]  # of one copy
            missing += [] if files else [f"{pattern} ({ARGUMENTS[split]} {name})"]
    if missing:
        raise InputError(f"--data-dir {data_dir}: lacks {', '.join(missing)}; files are named as on the hub")
    return copies


def read_files(files: list[Path], argument: str) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of files, one after another, and the files. Raises InputError that begins with the argument."""
    import pyarrow.parquet  # slow
    rows: list[Row] = []
    for path in files:
        with reading(f"{argument} {path}: cannot be read"):
            if path.suffix == ".parquet":
                read = pyarrow.parquet.read_table(path).to_pylist()
            elif path.suffix == ".arrow":
                with path.open("rb") as binary:  # Arrow has two formats: a stream, as `datasets` writes, and a file
                    opened = pyarrow.ipc.open_file if binary.read(6) == b"ARROW1" else pyarrow.ipc.open_stream
                read = opened(path).read_all().to_pylist()
            else:
                with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
                    read = [file.read()] if path.suffix == ".txt" else json_rows(file)
            rows += texts_of(read, f"{argument} {path}")
    return rows, {"files": [str(file) for file in files]}


def json_rows(file: TextIO) -> list[Any]:
    """Return the values in the lines of a file, or in the list that is all of it. Raises JSONDecodeError."""
    rows = []
    for number, line in enumerate(file):
        try:  # most files have a value in each line, and their whole text is never in memory
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:  # the value has more lines; the error, if any, counts those before it, too
            rows.append(json.loads("\n" * number + line + file.read()))
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


def texts_of(rows: Iterable[Any], subject: str, columns: tuple[str, ...] = COLUMNS) -> list[Row]:
    """Return the texts or chats of rows, which are these, or dicts with one in the first of the columns they have."""
    texts = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            if not (present := [column for column in columns if column in row]):
                raise InputError(f"{subject}: row {number} has the columns {', '.join(row)}; needs "
                                 f"{' or '.join(columns)}")
            row = row[present[0]]
        if not isinstance(row, str):
            if not (isinstance(row, list) and row and all(isinstance(part, dict) and "role" in part
                                                          and isinstance(part.get("content"), str) for part in row)):
                raise InputError(f'{subject}: row {number} is neither text nor a chat [{{"role": "user", "content": '
                                 '"text"}, …]')
            row = [{"role": part["role"], "content": part["content"]} for part in row]
        texts.append(row)
    return texts


def _digest(rows: list[Row]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
