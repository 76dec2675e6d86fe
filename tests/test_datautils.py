"""Check the text, the cuts and the random draws of datautils against ones written out here."""

import gzip
import hashlib
import json
import random
import tracemalloc

import datasets
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import ByT5Tokenizer

from mixgpt import datautils
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
def root(tmp_path):
    """Return an empty folder whose own name says nothing about a dataset."""
    folder = tmp_path / "copies"
    folder.mkdir()
    return folder


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
def test_every_place_of_the_hubs_layout_gives_the_same_tokens(shape, root, tokenizer, no_hub, monkeypatch):
    for name, rows in SHAPES[shape].items():
        put_parquet(root / name, rows)
    if shape == "cache":
        link = root / "datasets--Salesforce--wikitext/snapshots/b08601e" / f"{WIKI}0-of-00001.parquet"
        link.parent.mkdir(parents=True)
        link.symlink_to(root / "datasets--Salesforce--wikitext/blobs/0c4e")
    monkeypatch.chdir(root)
    ids, before = byte_ids(WIKI_TEST), sorted(root.rglob("*"))
    for folder in (root, "."):
        tokens, source = datautils.test_tokens("wikitext2", 5, tokenizer, data_dir=folder)
        assert tokens.dtype == torch.long
        assert tokens.tolist() == [ids[i:i + 5] for i in range(0, len(ids) - 4, 5)]
        assert (source["dataset"], source["split"]) == ("wikitext2", "test")
        assert len(json.loads(json.dumps(source))["files"]) == (2 if shape == "shards" else 1)
    assert sorted(root.rglob("*")) == before


def test_ptb_rows_are_joined_with_spaces(root, tokenizer, no_hub):
    elsewhere = root.with_name(f"{root.name}, elsewhere")
    (root / "linked").symlink_to(elsewhere)
    for i in (1, 0):
        put_parquet(elsewhere / "penn_treebank" / "test" / f"000{i}.parquet", [PTB_ROWS[i]], "sentence")
    tokens, _ = datautils.test_tokens("ptb", 7, tokenizer, data_dir=root)
    ids = byte_ids(PTB_TEXT)
    assert tokens.tolist() == [ids[i:i + 7] for i in range(0, len(ids) - 6, 7)]


def test_c4_tests_on_1100_documents_and_256_segments_of_its_first_file(root, tokenizer, no_hub):
    snapshot = root / "datasets--allenai--c4/snapshots/1588ec45"
    documents = [f"doc {i}" for i in range(1100)] + ["x" * 2000]
    put_c4(snapshot / "en.noblocklist/c4-validation.00000-of-00008.json.gz", ["wrong folder"])
    with pytest.raises(InputError, match="no validation split of c4 in it; needs en/c4-validation.00000-of-"):
        datautils.test_tokens("c4", 3, tokenizer, data_dir=root)
    put_c4(snapshot / "en/c4-validation.00000-of-00008.json.gz", documents)
    put_c4(snapshot / "en/c4-validation.00001-of-00008.json.gz", ["second shard"])
    ids = byte_ids(" ".join(f"doc {i}" for i in range(1100)))
    long, source = datautils.test_tokens("c4", 1000, tokenizer, data_dir=root)
    assert long.flatten().tolist() == ids[:len(ids) // 1000 * 1000] and len(long) < 256
    assert source["files"] == [str(snapshot / "en" / "c4-validation.00000-of-00008.json.gz")]
    short, _ = datautils.test_tokens("c4", 3, tokenizer, data_dir=root)
    assert short.shape == (256, 3) and short.flatten().tolist() == ids[:768]


def put_wiki(root, rows, split="train"):
    """Write a split of WikiText-2. Returns its file."""
    put_parquet(path := root / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet", rows)
    return path


def test_samples_are_those_of_the_ancestors(root, tokenizer, no_hub):
    file = put_wiki(root, WIKI_ROWS)
    samples, source = datautils.calibration_samples("wikitext2", 6, 8, 3, tokenizer, data_dir=root)
    assert samples.dtype == torch.long and samples.tolist() == drawn_as_by_the_ancestors(WIKI_TRAIN, 6, 8, 3)
    assert source == {"dataset": "wikitext2", "split": "train", "files": [str(file)]}


def drawn_as_by_the_ancestors(text, nsamples, seqlen, seed):
    ids, samples = byte_ids(text), []
    random.seed(seed)
    for _ in range(nsamples):
        i = random.randint(0, len(ids) - seqlen - 1)
        samples.append(ids[i:i + seqlen])
    return samples


def test_a_list_of_strings_is_one_text(tokenizer, no_hub):
    documents = ["The first document.", "The second one: café.", "The last."]
    samples, source = datautils.calibration_samples(documents, 5, 9, 2, tokenizer, data_dir="ignored")
    assert samples.tolist() == drawn_as_by_the_ancestors("\n\n".join(documents), 5, 9, 2)
    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
    assert source == {"dataset": "a list of 3 texts", "split": "train", "sha256": digest}


@pytest.mark.parametrize("on_hub", [False, True])
def test_c4_samples_are_those_of_the_ancestors(on_hub, root, tokenizer, no_hub, monkeypatch):
    documents = ["abcdefghij" * (i % 3) + str(i) for i in range(30)]
    put_c4(root / "en" / "c4-train.00000-of-01024.json.gz", documents)
    if on_hub:
        monkeypatch.setattr(datautils, "hub_reachable", lambda: True)
        monkeypatch.setattr(datautils, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": documents}))
        monkeypatch.setattr(Dataset, "to_list", lambda _: pytest.fail("documents that are not drawn are read"))
    samples, _ = datautils.calibration_samples("c4", 12, 11, 5, tokenizer, data_dir=None if on_hub else root)
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


def test_of_a_shard_of_c4_only_the_texts_are_in_memory(root, tokenizer, no_hub):
    put_c4(root / "en" / "c4-train.00000-of-01024.json.gz", ["x" * 2000] * 1000 + ["\U0001f600"])
    for trace in (lambda: None, tracemalloc.start):  # what is imported does not count
        trace()
        rows, _ = datautils.load_rows("c4", "train", root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 1001 and peak < 1.5 * 2000 * 1000


def test_c4_gives_up_when_every_document_is_too_short(root, tokenizer, no_hub):
    for documents in [], ["a", "bcd", "ef"]:
        put_c4(root / "en" / "c4-train.00000-of-01024.json.gz", documents)
        with pytest.raises(InputError, match="--seqlen 4: none of 10000 documents in a row has more than 4 tokens; "):
            datautils.calibration_samples("c4", 2, 4, 0, tokenizer, data_dir=root)
    samples, _ = datautils.calibration_samples("c4", 2, 3, 0, tokenizer, data_dir=root)
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
    calls = []

    def load_dataset(*given, **keywords):
        calls.append((given, keywords))
        column = "words_1" if "words_1" in dataset else "sentence" if dataset == "ptb" else "text"
        return Dataset.from_dict({"url": ["u", "v"], "text": ["c", "d"], column: ["a", "b"]}).select_columns(
            ["url", "text", column] if "words_1" in dataset else ["url", column])

    monkeypatch.setattr(datautils, "hub_reachable", lambda: True)
    monkeypatch.setattr(datautils, "load_dataset", load_dataset)
    rows, source = datautils.load_rows(dataset, part, None)
    assert list(rows) == ["a", "b"] and calls == [((hub_id,), options)]
    assert source == {"dataset": dataset, "hub": hub_id, **options}
    json.dumps(source)


@pytest.mark.parametrize("dataset", ["wikitext2", "ptb", "c4"])
def test_offline_the_error_is_one_line(monkeypatch, tmp_path, dataset, tokenizer):
    monkeypatch.setattr(datautils, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"^--eval {dataset}: .*cannot be reached.*--data-dir DIR.*builtin") as error:
        datautils.test_tokens(dataset, 8, tokenizer)
    assert "\n" not in str(error.value) and DATASETS[dataset].hub_id in str(error.value)


@pytest.mark.parametrize("kind", [datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError, Exception])
def test_a_failure_of_the_hub_is_one_line(monkeypatch, kind, tokenizer):
    def load_dataset(*_, **__):
        raise kind("it does\nnot exist")

    monkeypatch.setattr(datautils, "hub_reachable", lambda: True)
    monkeypatch.setattr(datautils, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="ptb: cannot load ptb-text-only/ptb_text_only: it does not exist; supply"):
        datautils.test_tokens("ptb", 8, tokenizer)


def test_a_text_that_is_too_short_is_refused_with_both_numbers(root, tokenizer, no_hub):
    put_wiki(root, ["1234567"])
    put_wiki(root, ["1234567"], "test")
    assert len(datautils.test_tokens("wikitext2", 8, tokenizer, data_dir=root)[0]) == 1
    samples, _ = datautils.calibration_samples("wikitext2", 2, 7, 0, tokenizer, data_dir=root)
    assert samples.tolist() == [byte_ids("1234567")[:7]] * 2
    with pytest.raises(InputError, match="--seqlen 9: the test text of dataset wikitext2 has 8 tokens and 9 are"):
        datautils.test_tokens("wikitext2", 9, tokenizer, data_dir=root)
    with pytest.raises(InputError, match="--seqlen 8: the train text of dataset wikitext2 has 8 tokens and 9 are"):
        datautils.calibration_samples("wikitext2", 2, 8, 0, tokenizer, data_dir=root)
