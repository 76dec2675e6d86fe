"""Texts that are missing, damaged or too short."""

import gzip

from faults.damage import Fault, nothing

LINES = "".join(f'{{"text": "row {number}"}}\n' for number in range(999))
WIKI = "{root}/model wikitext2 --sparsity .5 --eval builtin --data-dir {root}/texts"


def text(root, name, content):
    file = root / "texts" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


FAULTS = {
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
        "--data-dir: {root}/texts/wikitext/train.json cannot be read (json): JSON parse error: …", WIKI),
    "other columns": Fault(
        lambda root: text(root, "wikitext/train.json", LINES.replace("text", "body")),
        "{root}/texts/wikitext/train.json has the columns body: text or sentence is needed", WIKI),
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
}
