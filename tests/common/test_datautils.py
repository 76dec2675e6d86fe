"""Check the text, the cuts and the random draws of datautils against ones written out here."""

import gzip
import hashlib
import json
import random
import tracemalloc
from unittest.mock import Mock

import datasets
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from transformers import ByT5Tokenizer

from mixgpt import datautils
from mixgpt.app.settings import Settings
from mixgpt.common.errors import InputError
from mixgpt.common.texts import DATASETS

WIKI_ROWS = ["", " = Alpha = \n", "", " Beta gamma “δ” . \n", " Epsilon zeta . \n", ""]
WIKI_TEST = "\n\n = Alpha = \n\n\n\n\n Beta gamma “δ” . \n\n\n Epsilon zeta . \n\n\n"
WIKI_TRAIN = "  = Alpha = \n   Beta gamma “δ” . \n  Epsilon zeta . \n "
PTB_ROWS = ["no it was n't black N", "but while the new york stock exchange did n't fall apart"]
PTB_TEXT = "no it was n't black N but while the new york stock exchange did n't fall apart"


def byte_ids(text):
    """Return what the tokenizer of these tests makes of a text: its bytes behind three special tokens, and an end."""
    return [byte + 3 for byte in text.encode()] + [1]


@pytest.fixture
def tokenizer():
    """Make a tokenizer with one token a byte and a small maximal length."""
    return ByT5Tokenizer(model_max_length=16)


@pytest.fixture
def no_hub(monkeypatch):
    """Fail where the hub is asked at all."""
    monkeypatch.setattr(datautils, "hub_reachable", lambda: pytest.fail("the hub was asked"))


def put_parquet(path, rows, column="text"):
    """Write rows to a parquet file, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)


def put_c4(path, rows):
    """Write rows in the shape of the hub's C4 files, making their folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": row, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) + "\n" for row in rows)
    path.write_bytes(gzip.compress("".join(lines).encode()))


WIKI = "wikitext-2-raw-v1/test-0000"
SHAPES = {  # {path: rows} in a folder; files of the hub's cache are links to blobs without an ending
    "folder": {f"{WIKI}0-of-00001.parquet": WIKI_ROWS},
    "cache": {"datasets--Salesforce--wikitext/blobs/0c4e": WIKI_ROWS},
    "shards": {f"{WIKI}1-of-00002.parquet": WIKI_ROWS[2:], f"{WIKI}0-of-00002.parquet": WIKI_ROWS[:2],
               f"wikitext-2-raw-v1/{WIKI}0-of-00001.parquet": WIKI_ROWS},  # and another copy
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_place_of_the_hubs_layout_gives_the_same_tokens(shape, tmp_path, tokenizer, no_hub, monkeypatch):
    for name, rows in SHAPES[shape].items():
        put_parquet(tmp_path / name, rows)
    if shape == "cache":
        link = tmp_path / "datasets--Salesforce--wikitext/snapshots/b08601e" / f"{WIKI}0-of-00001.parquet"
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / "datasets--Salesforce--wikitext/blobs/0c4e")
    monkeypatch.chdir(tmp_path)
    ids, before = byte_ids(WIKI_TEST), sorted(tmp_path.rglob("*"))
    for folder in (tmp_path, "."):
        tokens, source = datautils.test_tokens("wikitext2", 5, tokenizer, data_dir=folder)
        assert tokens.dtype == torch.long
        assert tokens.tolist() == [ids[i:i + 5] for i in range(0, len(ids) - 4, 5)]
        assert (source["dataset"], source["split"]) == ("wikitext2", "test")
        assert len(json.loads(json.dumps(source))["files"]) == (2 if shape == "shards" else 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_ptb_rows_are_joined_with_spaces(tmp_path, tokenizer, no_hub):
    elsewhere = tmp_path.with_name(f"{tmp_path.name}, elsewhere")
    (tmp_path / "linked").symlink_to(elsewhere)
    for i in (1, 0):
        put_parquet(elsewhere / "penn_treebank" / "test" / f"000{i}.parquet", [PTB_ROWS[i]], "sentence")
    tokens, _ = datautils.test_tokens("ptb", 7, tokenizer, data_dir=tmp_path)
    ids = byte_ids(PTB_TEXT)
    assert tokens.tolist() == [ids[i:i + 7] for i in range(0, len(ids) - 6, 7)]


def test_c4_tests_on_1100_documents_and_256_segments_of_its_first_file(tmp_path, tokenizer, no_hub):
    snapshot = tmp_path / "datasets--allenai--c4/snapshots/1588ec45"
    documents = [f"doc {i}" for i in range(1100)] + ["x" * 2000]
    put_c4(snapshot / "en.noblocklist/c4-validation.00000-of-00008.json.gz", ["wrong folder"])
    with pytest.raises(InputError, match="lacks en/c4-validation.00000-of-"):
        datautils.test_tokens("c4", 3, tokenizer, data_dir=tmp_path)
    put_c4(snapshot / "en/c4-validation.00000-of-00008.json.gz", documents)
    put_c4(snapshot / "en/c4-validation.00001-of-00008.json.gz", ["second shard"])
    ids = byte_ids(" ".join(f"doc {i}" for i in range(1100)))
    long, source = datautils.test_tokens("c4", 1000, tokenizer, data_dir=tmp_path)
    assert long.flatten().tolist() == ids[:len(ids) // 1000 * 1000] and len(long) < 256
    assert source["files"] == [str(snapshot / "en" / "c4-validation.00000-of-00008.json.gz")]
    short, _ = datautils.test_tokens("c4", 3, tokenizer, data_dir=tmp_path)
    assert short.shape == (256, 3) and short.flatten().tolist() == ids[:768]


def test_all_files_that_the_copies_lack_are_named_before_a_model_or_text_is_read(tmp_path, no_hub):
    copies = tmp_path / "copies"
    put_wiki(copies, WIKI_ROWS, "test")
    named = {"data_dir": str(copies), "eval": ["wikitext2", "ptb", "c4", "builtin", str(copies)]}
    with pytest.raises(InputError) as error:
        Settings("an/owner", "wikitext2:1,c4:1,owner/set:text:1", sparsity=0.5, **named).check_paths()
    assert str(error.value) == (
        f"--data-dir {copies}: lacks wikitext-2-raw-v1/train-*.parquet (dataset wikitext2), "
        "en/c4-train.00000-of-*.json.gz (dataset c4), penn_treebank/test/*.parquet (--eval ptb), "
        "en/c4-validation.00000-of-*.json.gz (--eval c4); files are named as on the hub")
    for options in ({"gmp": True, "sparsity": 0.5}, {}):  # nothing is drawn from the train split
        Settings("an/owner", "wikitext2", **named | options | {"eval": ["wikitext2"]}).check_paths()
    with pytest.raises(InputError, match="^--data-dir nowhere: no such folder"):
        Settings("an/owner", "builtin", data_dir="nowhere").check_paths()


def put_wiki(folder, rows, split="train"):
    """Write a split of WikiText-2. Returns its file."""
    put_parquet(path := folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet", rows)
    return path


DOCUMENTS = ["The first document.", "The second one: café.", "The last."]  # a list of strings is one text


@pytest.mark.parametrize("dataset, text", [("wikitext2", WIKI_TRAIN), (DOCUMENTS, "\n\n".join(DOCUMENTS))])
def test_samples_are_those_of_the_ancestors(dataset, text, tmp_path, tokenizer, no_hub):
    file, digest = put_wiki(tmp_path, WIKI_ROWS), hashlib.sha256(json.dumps(DOCUMENTS).encode()).hexdigest()
    samples, source = datautils.calibration_samples(dataset, 6, 8, 3, tokenizer, data_dir=tmp_path)
    ids, expected = byte_ids(text), []
    random.seed(3)
    for _ in range(6):
        i = random.randint(0, len(ids) - 8 - 1)
        expected.append(ids[i:i + 8])
    assert samples.dtype == torch.long and samples.tolist() == expected
    assert source == {"split": "train"} | (
        {"dataset": "wikitext2", "files": [str(file)]} if dataset == "wikitext2" else
        {"dataset": "a list of 3 texts", "sha256": digest})


@pytest.mark.parametrize("on_hub", [False, True])
def test_c4_samples_are_those_of_the_ancestors(on_hub, tmp_path, tokenizer, no_hub, monkeypatch):
    documents = ["abcdefghij" * (i % 3) + str(i) for i in range(30)]
    put_c4(tmp_path / "en" / "c4-train.00000-of-01024.json.gz", documents)
    if on_hub:
        monkeypatch.setattr(datautils, "hub_reachable", lambda: True)
        monkeypatch.setattr(datautils, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": documents}))
        monkeypatch.setattr(Dataset, "to_list", lambda _: pytest.fail("documents that are not drawn are read"))
    samples, _ = datautils.calibration_samples("c4", 12, 11, 5, tokenizer, data_dir=None if on_hub else tmp_path)
    random.seed(5)
    expected = []
    for _ in range(12):
        while True:
            ids = byte_ids(documents[random.randint(0, len(documents) - 1)])
            if len(ids) > 11:
                break
        i = random.randint(0, len(ids) - 11 - 1)
        expected.append(ids[i : i + 11])
    assert samples.tolist() == expected


def test_of_a_shard_of_c4_only_the_texts_are_in_memory(tmp_path, tokenizer, no_hub):
    put_c4(tmp_path / "en" / "c4-train.00000-of-01024.json.gz", ["x" * 2000] * 1000 + ["\U0001f600"])
    for trace in (lambda: None, tracemalloc.start):  # what is imported does not count
        trace()
        rows, _ = datautils.load_rows("c4", "train", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 1001 and peak < 1.5 * 2000 * 1000


def test_c4_gives_up_when_every_document_is_too_short(tmp_path, tokenizer, no_hub):
    for documents in [], ["a", "bcd", "ef"]:
        put_c4(tmp_path / "en" / "c4-train.00000-of-01024.json.gz", documents)
        with pytest.raises(InputError, match="--seqlen 4: none of 10000 documents in a row has more than 4 tokens; "):
            datautils.calibration_samples("c4", 2, 4, 0, tokenizer, data_dir=tmp_path)
    samples, _ = datautils.calibration_samples("c4", 2, 3, 0, tokenizer, data_dir=tmp_path)
    assert samples.tolist() == [byte_ids("bcd")[:3]] * 2


def test_builtin_splits_share_no_paragraph(tokenizer, no_hub):
    train, source = datautils.load_rows("builtin", "train", None)
    test, test_source = datautils.load_rows("builtin", "test", None)
    words = [" ".join(paragraph.split()) for paragraph in train + test]
    assert len(words) == len(set(words)) and min(len(train), len(test)) > 100
    text = "\n\n".join(train + test)
    share = len("\n\n".join(train)) / len(text)
    assert 0.8 - len(test[0]) / len(text) - 1e-4 < share <= 0.8
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    assert source == {"dataset": "builtin", "split": "train", "sha256": sha256}
    assert test_source == {"dataset": "builtin", "split": "test", "sha256": sha256}
    ids = byte_ids("\n\n".join(test))
    assert datautils.test_tokens("builtin", 64, tokenizer)[0].flatten().tolist() == ids[: len(ids) // 64 * 64]


@pytest.mark.parametrize(("dataset", "part", "hub_id", "options"), [
    ("wikitext2", "test", "Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"}),
    ("ptb", "test", "ptb-text-only/ptb_text_only", {"revision": "refs/convert/parquet", "split": "test"}),
    ("c4", "train", "allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}),
    ("c4", "test", "allenai/c4",
     {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"}),
    ("an-owner/their.set:words_1", "train", "an-owner/their.set", {"split": "train"})])
def test_the_hub_is_asked_for_the_datasets_of_the_field(monkeypatch, dataset, part, hub_id, options):
    columns = {"an-owner/their.set:words_1": ["url", "text", "words_1"], "ptb": ["url", "sentence"]}
    *others, column = columns.get(dataset, ["url", "text"])
    table = Dataset.from_dict({other: ["c", "d"] for other in others} | {column: ["a", "b"]})
    monkeypatch.setattr(datautils, "hub_reachable", lambda: True)
    monkeypatch.setattr(datautils, "load_dataset", load_dataset := Mock(return_value=table))
    rows, source = datautils.load_rows(dataset, part, None)
    load_dataset.assert_called_once_with(hub_id, **options)
    assert list(rows) == ["a", "b"]
    assert json.loads(json.dumps(source)) == {"dataset": dataset, "hub": hub_id, **options}


@pytest.mark.parametrize("dataset, error", [
    ("wikitext2", None), ("ptb", None), ("c4", None), ("ptb", DatasetNotFoundError), ("c4", FileNotFoundError),
    ("ptb", ValueError), ("ptb", Exception)])
def test_a_text_that_neither_hub_nor_cache_gives_is_named_in_one_line(dataset, error, monkeypatch, tmp_path):
    monkeypatch.setattr(datautils, "hub_reachable", lambda: error is not None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if error:
        monkeypatch.setattr(datautils, "load_dataset", Mock(side_effect=error("it does\nnot exist")))
    reason = "it does not exist" if error else "the hub cannot be reached and it is not in the cache"
    for part, argument in (("train", "dataset"), ("test", "--eval")):
        with pytest.raises(InputError, match=f"^{argument} {dataset}: cannot load {DATASETS[dataset].hub_id}: {reason}"
                                             f"; supply a copy below --data-dir DIR.*, or use {argument} builtin$"):
            datautils.load_rows(dataset, part, None)


def test_a_text_that_is_too_short_is_refused_with_both_numbers(tmp_path, tokenizer, no_hub):
    put_wiki(tmp_path, ["1234567"])
    put_wiki(tmp_path, ["1234567"], "test")
    assert len(datautils.test_tokens("wikitext2", 8, tokenizer, data_dir=tmp_path)[0]) == 1
    samples, _ = datautils.calibration_samples("wikitext2", 2, 7, 0, tokenizer, data_dir=tmp_path)
    assert samples.tolist() == [byte_ids("1234567")[:7]] * 2
    with pytest.raises(InputError, match="--seqlen 9: the test text of dataset wikitext2 has 8 tokens and 9 are"):
        datautils.test_tokens("wikitext2", 9, tokenizer, data_dir=tmp_path)
    with pytest.raises(InputError, match="--seqlen 8: the train text of dataset wikitext2 has 8 tokens and 9 are"):
        datautils.calibration_samples("wikitext2", 2, 8, 0, tokenizer, data_dir=tmp_path)
