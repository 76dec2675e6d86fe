"""Texts that are missing, damaged or too short."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
from datasets import Dataset

from faults.damage import Fault, nothing

LINES = "".join(f'{{"text": "row {number}"}}\n' for number in range(999))
WIKI = "{root}/model wikitext2 --sparsity .5 --eval builtin --data-dir {root}/texts"


def text(root, name, content):
    file = root / "texts" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def parquet(root, rows, column="text"):
    text(root, "wikitext/train.parquet", b"")
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), root / "texts" / "wikitext" / "train.parquet")


def special(root, name, make):
    """Put something that is no regular file among the texts."""
    text(root, name, b"")
    (root / "texts" / name).unlink()
    make(root / "texts" / name)


def saved(root, name, content):
    """Save a dataset, and overwrite one of its files."""
    Dataset.from_dict({"text": ["row"]}).save_to_disk(root / "texts" / "wikitext-train")
    text(root, f"wikitext-train/{name}", content)


def in_json(content, message, name="train.json.gz"):
    """A fault in a file of JSON lines."""
    written = gzip.compress(content) if name.endswith(".gz") else content
    return Fault(lambda root: text(root, f"wikitext/{name}", written),
                 f"--data-dir: {{root}}/texts/wikitext/{name}{message}", WIKI)


def damaged(line, reason):
    return f" cannot be read (json): {line} {reason}"


def own(name, content, message):
    """A fault in a file of one's own."""
    return Fault(lambda root: text(root, name, content), f"dataset {{root}}/texts/{message}",
                 f"{{root}}/model {{root}}/texts/{name} --sparsity .5 --eval builtin")


FAULTS = {
    "a file of one's own that is not there": Fault(
        nothing, "argument dataset: invalid choice: '{root}/mine.txt' (choose from …)",
        "{root}/model {root}/mine.txt --sparsity .5"),
    "a name of a text that is too long": Fault(
        nothing, f"argument dataset: invalid choice: '{'x' * 300}' (choose from …)",
        f"{{root}}/model {'x' * 300} --sparsity .5"),
    "a file of one's own of another kind": own(
        "mine.md", "text", "mine.md: must end in one of .parquet .json.gz .jsonl.gz .json .jsonl .arrow .raw .txt "
        ".tokens"),
    "a folder of one's own without texts": Fault(
        lambda root: text(root, "mine/a.md", ""), "dataset {root}/texts/mine: no files below it end in one of "
        ".parquet .json.gz .jsonl.gz .json .jsonl .arrow .raw .txt .tokens",
        "{root}/model {root}/texts/mine --sparsity .5 --eval builtin"),
    "a file of one's own that is empty": own("mine.txt", " \n", "mine.txt: contains no text"),
    "a file of one's own that is too short": Fault(
        lambda root: text(root, "mine.txt", "short"),
        "--seqlen 32: the train text of dataset {root}/texts/mine.txt has … tokens and 33 are needed; lower --seqlen "
        "or take another dataset", "{root}/model {root}/texts/mine.txt --sparsity .5 --eval builtin --seqlen 32"),
    "a file of one's own with other columns": own(
        "mine.jsonl", '{"words": "a"}', "mine.jsonl, line 1 has the columns words: text, "
        "sentence or messages is needed"),
    "a chat that is none": own(
        "mine.jsonl", '{"messages": [{"role": "user"}]}', 'mine.jsonl, line 1, messages is not a chat: [{{"role": '
        '"user", "content": "text"}}, …]'),
    "chats for a tokenizer without a template": Fault(
        lambda root: text(root, "mine.jsonl", '{"messages": [{"role": "user", "content": "a"}]}'),
        "model {root}/model: its tokenizer has no chat template, which rows of messages need",
        "{root}/model {root}/texts/mine.jsonl --sparsity .5 --eval builtin"),
    "a file of one's own that is damaged": own(
        "mine.parquet", "PAR1", "mine.parquet cannot be read (parquet): Parquet file size is 4 bytes, …"),
    "calibration and evaluation on one file of one's own": Fault(
        lambda root: text(root, "mine.txt", "text"),
        "--eval {root}/texts/../texts/mine.txt: is text that calibration draws from; give another one",
        "{root}/model {root}/texts/mine.txt --sparsity .5 --eval {root}/texts/../texts/mine.txt"),
    "no texts": Fault(nothing, "--data-dir {root}/texts: no such folder", WIKI),
    "a file of texts": Fault(
        lambda root: (root / "texts").write_text(""), "--data-dir {root}/texts: no such folder", WIKI),
    "an empty folder of texts": Fault(
        lambda root: (root / "texts").mkdir(),
        "--data-dir {root}/texts: no train split of wikitext2 found, the raw version of WikiText-2 "
        "(wikitext-2-raw-v1/*.parquet or wiki.test.raw, wiki.train.raw) is needed (looked for paths with "
        "wikitext|wiki[.-] and \\btrain\\b, ending in … .txt .tokens); there is nothing", WIKI),
    "a cut gzip file": Fault(
        lambda root: text(root, "wikitext/train.json.gz", gzip.compress(LINES.encode())[:500]),
        "--data-dir: {root}/texts/wikitext/train.json.gz cannot be read (json): Compressed file ended before …", WIKI),
    "a cut JSON line": Fault(
        lambda root: text(root, "wikitext/train.json", LINES[:-5]),
        "--data-dir: {root}/texts/wikitext/train.json cannot be read (json): line 999 is not valid JSON: …", WIKI),
    "other columns": Fault(
        lambda root: text(root, "wikitext/train.json", LINES.replace("text", "body")),
        "--data-dir: {root}/texts/wikitext/train.json, line 1 has the columns body: text, sentence or messages is "
        "needed", WIKI),
    "text that is not UTF-8": Fault(
        lambda root: text(root, "wiki.train.raw", "Überschrift\n".encode("latin-1")),
        "--data-dir: {root}/texts/wiki.train.raw cannot be read (text): 'utf-8' codec can't decode byte 0xdc …", WIKI),
    "too little text": Fault(
        lambda root: text(root, "wiki.train.raw", "a few words\n"),
        "--seqlen 32: the train text of dataset wikitext2 has 10 tokens and 33 are needed; lower --seqlen or take"
        " another dataset", WIKI),
    "no text at all": Fault(
        lambda root: text(root, "wiki.train.raw", ""),
        "--data-dir: {root}/texts/wiki.train.raw contains no rows", WIKI),

    # pyarrow crashes on these: a segmentation fault
    "a row nested deeply": in_json(
        b'{"text": "a", "more": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", damaged("line 1", "is nested too deeply")),
    "objects nested deeply": in_json(
        b'{"text": "a"}\n' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000, damaged("line 2", "is nested too deeply")),
    "a list nested deeply": in_json(b"[" * 200_000, damaged("the list", "is nested too deeply"), "train.json"),
    "a row that is null": in_json(b'{"text": "a"}\nnull\n', ", line 2 is null, not text"),
    "only rows that are null": in_json(b"null\n" * 9, ", line 1 is null, not text"),
    "a row that is a number": in_json(b'{"text": "a"}\n\n7\n', ", line 3 is int, not text"),
    "a row that is a list": in_json(b'{"text": "a"}\n["b"]\n', ", line 2 is list, not text", "train.jsonl"),
    "a null text": in_json(b'{"text": "a"}\n{"text": null}\n', ", line 2, text is null, not text"),
    "a text that is a number": in_json(b'{"text": 1.5}', ", line 1, text is float, not text", "train.jsonl.gz"),
    "a text in parts": in_json(b'{"text": ["a", "b"]}', ", line 1, text is list, not text"),
    "texts of several types": in_json(b'[{"text": "a"}, {"text": {}}]', ", element 2, text is dict, not text",
                                      "train.json"),
    "a row of another shape": in_json(b'{"text": "a"}\n{"id": 1, "url": "u"}\n',
                                      ", line 2 has the columns id, url: text, sentence or messages is needed"),
    "a row without columns": in_json(b"{}", ", line 1 has the columns none: text, sentence or messages is needed"),
    "an empty list": in_json(b"[]", " contains no rows", "train.json"),
    "blank lines": in_json(b"\n \n\n", " contains no rows", "train.json"),
    "an empty gzip file": in_json(b"", " contains no rows"),
    "half a surrogate pair": in_json(b'{"text": "\\ud83d"}',
                                     ", line 1, text has half of a surrogate pair, which is not text"),
    "JSON in UTF-16": in_json('{"text": "a"}'.encode("utf-16"), damaged("line 1", "is not text in UTF-8: …"),
                              "train.json"),
    "a binary file by the name of JSON": in_json(bytes(range(256)), damaged("line 1", "is not valid JSON: …"),
                                                 "train.json"),
    "one object over many lines": in_json(json.dumps({"text": "a"}, indent=1).encode(),
                                          damaged("line 1", "is not valid JSON: …"), "train.json"),
    "a number of many digits": in_json(b'{"id": ' + b"1" * 9999 + b"}", damaged("line 1", "is not valid JSON: …")),
    "not a gzip file": Fault(
        lambda root: text(root, "wikitext/train.json.gz", LINES),
        "--data-dir: {root}/texts/wikitext/train.json.gz cannot be read (json): Not a gzipped file …", WIKI),
    "a text file in UTF-16": Fault(
        lambda root: text(root, "wiki.train.raw", "words\n".encode("utf-16")),
        "--data-dir: {root}/texts/wiki.train.raw cannot be read (text): 'utf-8' codec can't decode byte 0xff …", WIKI),
    "a pipe for a text": Fault(
        lambda root: special(root, "wiki.train.raw", os.mkfifo),
        "--data-dir: {root}/texts/wiki.train.raw is not a regular file", WIKI),
    "a pipe for parquet": Fault(
        lambda root: special(root, "wikitext/train.parquet", os.mkfifo),
        "--data-dir: {root}/texts/wikitext/train.parquet is not a regular file", WIKI),
    "a device for a text": Fault(
        lambda root: special(root, "wiki.train.raw", lambda path: path.symlink_to("/dev/zero")),
        "--data-dir: {root}/texts/wiki.train.raw is not a regular file", WIKI),
    "a link to nothing for a text": Fault(
        lambda root: special(root, "wiki.train.raw", lambda path: path.symlink_to("nowhere")),
        "--data-dir: {root}/texts/wiki.train.raw is not a regular file", WIKI),
    "a pipe in a saved dataset": Fault(
        lambda root: (saved(root, "state.json", "{}"), special(root, "wikitext-train/x.arrow", os.mkfifo)),
        "--data-dir: {root}/texts/wikitext-train/x.arrow is not a regular file", WIKI),
    "links in a circle and no texts": Fault(
        lambda root: [special(root, f"folder/{number}", lambda path: path.symlink_to("../folder"))
                      for number in range(9)],
        "--data-dir {root}/texts: no train split of wikitext2 found, …; there is nothing", WIKI),
    "junk for parquet": Fault(
        lambda root: text(root, "wikitext/train.parquet", b"PAR1" + b"junk" * 99 + b"PAR1"),
        "--data-dir: {root}/texts/wikitext/train.parquet cannot be read (parquet): …", WIKI),
    "numbers in parquet": Fault(
        lambda root: parquet(root, [1, 2]),
        "{root}/texts/wikitext/train.parquet: the column text contains values that are not text", WIKI),
    "null values in parquet": Fault(
        lambda root: parquet(root, ["a", None]),
        "{root}/texts/wikitext/train.parquet: the column text contains values that are not text", WIKI),
    "other columns in parquet": Fault(
        lambda root: parquet(root, ["a"], "body"),
        "{root}/texts/wikitext/train.parquet has the columns body: text, sentence or messages is needed", WIKI),
    "no rows in parquet": Fault(
        lambda root: parquet(root, pyarrow.array([], pyarrow.string())),
        "--data-dir: {root}/texts/wikitext/train.parquet contains no rows", WIKI),
    "a saved dataset that is a list": Fault(
        lambda root: saved(root, "state.json", "[]"),
        "--data-dir: {root}/texts/wikitext-train/state.json cannot be read (save_to_disk): …", WIKI),
    "a saved dataset without files": Fault(
        lambda root: saved(root, "state.json", "{}"),
        "--data-dir: {root}/texts/wikitext-train/state.json cannot be read (save_to_disk): …", WIKI),
}
