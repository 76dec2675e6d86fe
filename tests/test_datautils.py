"""Check the text, the cuts and the random draws of datautils against ones written out here."""

import gzip
import hashlib
import json
import logging
import random
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import datautils
from mixgpt.common.errors import InputError
from mixgpt.text import local
from mixgpt.text.sets import DATASETS

BOS = 256
WIKI_ROWS = ["", " = Alpha = \n", "", " Beta gamma “δ” . \n", " Epsilon zeta . \n", ""]
WIKI_LINES = " \n = Alpha = \n \n Beta gamma “δ” . \n Epsilon zeta . \n\n"
WIKI_TEST = "\n\n = Alpha = \n\n\n\n\n Beta gamma “δ” . \n\n\n Epsilon zeta . \n\n\n"
WIKI_TRAIN = "  = Alpha = \n   Beta gamma “δ” . \n  Epsilon zeta . \n "
PTB_ROWS = ["no it was n't black <unk>", "but while the new york stock exchange did n't fall apart"]
PTB_TEXT = "no it was n't black <unk> but while the new york stock exchange did n't fall apart"


def byte_ids(text):
    """Return what the tokenizer of these tests makes of a text: BOS and the bytes, numbered by the file."""
    return [BOS, *text.encode()]


@pytest.fixture
def tokenizer():
    """Make a tokenizer with one token a byte, BOS in front and a small maximal length."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    unchanged = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes_to_unicode
    shifted = [byte for byte in range(256) if byte not in unchanged]
    characters = {byte: chr(byte) for byte in unchanged} | {b: chr(256 + i) for i, b in enumerate(shifted)}
    assert set(characters.values()) == set(alphabet)
    vocabulary = {character: byte for byte, character in characters.items()} | {"<s>": BOS}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", model_max_length=16)


@pytest.fixture
def root(tmp_path):
    """Return an empty folder whose own name says nothing about a dataset."""
    folder = tmp_path / "copies"
    folder.mkdir()
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    """Fail where the hub is asked at all."""
    monkeypatch.setattr(datautils.hub, "reachable", lambda: pytest.fail("the hub was asked"))


def put(path, content):
    """Write text or bytes to a path, making its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_parquet(path, rows, column="text"):
    """Write rows to a parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)


def json_lines(rows, column="text"):
    """Return rows as JSON lines with the other columns of C4."""
    return "".join(json.dumps({column: row, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) + "\n" for row in rows)


def put_c4(path, rows):
    """Write rows in the shape of the hub's C4 files."""
    put(path, gzip.compress(json_lines(rows).encode()))


def put_arrow(path, rows, column="text"):
    """Write rows to an Arrow stream, as the cache of `datasets` holds them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({column: rows})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def put_hub_cache(root):
    """Write the layout of the hub's cache: the snapshot is a link to a blob without an ending."""
    repository = root / "datasets--Salesforce--wikitext"
    put_parquet(repository / "blobs" / "0c4e", WIKI_ROWS)
    link = repository / "snapshots" / "b08601e" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to(repository / "blobs" / "0c4e")


def put_shards(root):
    """Write a split in two parquet shards."""
    put_parquet(root / "wikitext-2-raw-v1" / "test-00001-of-00002.parquet", WIKI_ROWS[2:])
    put_parquet(root / "wikitext-2-raw-v1" / "test-00000-of-00002.parquet", WIKI_ROWS[:2])


WIKI_SHAPES = {
    "raw": lambda root: put(root / "wiki.test.raw", WIKI_LINES),
    "zip_folder": lambda root: put(root / "wikitext-2-raw" / "wiki.test.raw", WIKI_LINES),
    "txt": lambda root: put(root / "wikitext2_test.txt", WIKI_LINES),
    "hub_folder": lambda root: put_parquet(root / "wikitext-2-raw-v1/test-00000-of-00001.parquet", WIKI_ROWS),
    "hub_path": lambda root: put_parquet(
        root / "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet", WIKI_ROWS
    ),
    "hub_cache": put_hub_cache,
    "shards": put_shards,
    "json": lambda root: put(root / "WikiText2" / "test.json", json.dumps([{"text": row} for row in WIKI_ROWS])),
    "jsonl": lambda root: put(root / "wikitext" / "test.jsonl", json_lines(WIKI_ROWS)),
    "json_gz": lambda root: put_c4(root / "wiki_test.json.gz", WIKI_ROWS),
    "arrow": lambda root: put_arrow(root / "Salesforce___wikitext" / "0.0.0" / "wikitext-test.arrow", WIKI_ROWS),
    "saved": lambda root: Dataset.from_dict({"text": WIKI_ROWS}).save_to_disk(root / "wikitext-2-raw-v1-test"),
    "saved_dict": lambda root: DatasetDict(
        {"train": Dataset.from_dict({"text": ["no"]}), "test": Dataset.from_dict({"text": WIKI_ROWS})}
    ).save_to_disk(root / "wikitext2"),
    "linked_folder": lambda root: (
        put(root.parent / "elsewhere" / "wiki.test.raw", WIKI_LINES),
        (root / "link").symlink_to(root.parent / "elsewhere"),
    ),
    "brackets": lambda root: put(root / "wikitext[2]" / "test.jsonl", json_lines(WIKI_ROWS)),
}


@pytest.mark.parametrize("shape", WIKI_SHAPES)
def test_every_local_shape_gives_the_same_tokens(shape, root, tokenizer, no_hub):
    WIKI_SHAPES[shape](root)
    tokens, source = datautils.test_tokens("wikitext2", 5, tokenizer, data_dir=root)
    ids = byte_ids(WIKI_TEST)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [ids[i : i + 5] for i in range(0, len(ids) - 4, 5)]
    assert (source["dataset"], source["split"]) == ("wikitext2", "test")
    assert all(str(root) in path for path in json.loads(json.dumps(source))["files"])


PTB_SHAPES = {
    "txt": lambda root: put(root / "ptb.test.txt", "".join(f" {row} \n" for row in PTB_ROWS)),
    "hub_folder": lambda root: put_parquet(root / "penn_treebank" / "test" / "0000.parquet", PTB_ROWS, "sentence"),
    "numbered": lambda root: [
        put_parquet(root / "penn_treebank" / "test" / f"000{i}.parquet", [PTB_ROWS[i]], "sentence") for i in (1, 0)
    ],
    "json": lambda root: put(root / "ptb" / "test.jsonl", json_lines(PTB_ROWS, "sentence")),
}


@pytest.mark.parametrize("shape", PTB_SHAPES)
def test_ptb_rows_are_stripped_and_joined_with_spaces(shape, root, tokenizer, no_hub):
    put(root / "ptb.valid.txt", "not this\n")
    PTB_SHAPES[shape](root)
    tokens, _ = datautils.test_tokens("ptb", 7, tokenizer, data_dir=root)
    ids = byte_ids(PTB_TEXT)
    assert tokens.tolist() == [ids[i : i + 7] for i in range(0, len(ids) - 6, 7)]


def test_c4_tests_on_1100_documents_and_256_segments(root, tokenizer, no_hub):
    documents = [f"doc {i}" for i in range(1100)] + ["x" * 2000]
    put_c4(root / "en" / "c4-validation.00000-of-00008.json.gz", documents)
    put_c4(root / "en" / "c4-validation.00001-of-00008.json.gz", ["second shard"])
    folder = root.rename(root.with_name("c4"))
    ids = byte_ids(" ".join(f"doc {i}" for i in range(1100)))
    long, source = datautils.test_tokens("c4", 1000, tokenizer, data_dir=folder)
    assert long.flatten().tolist() == ids[: len(ids) // 1000 * 1000] and len(long) < 256
    assert source["files"] == [str(folder / "en" / "c4-validation.00000-of-00008.json.gz")]
    short, _ = datautils.test_tokens("c4", 3, tokenizer, data_dir=folder)
    assert short.shape == (256, 3) and short.flatten().tolist() == ids[:768]


def test_c4_is_read_from_the_hub_cache_and_from_text(root, tokenizer, no_hub):
    snapshot = root / "cache/datasets--allenai--c4/snapshots/1588ec45"
    put_c4(snapshot / "en.noblocklist/c4-validation.00000-of-00008.json.gz", ["wrong folder"])
    put_c4(snapshot / "en/c4-validation.00000-of-00008.json.gz", ["one two", "three"])
    put(root / "plain" / "c4_valid.txt", "one two\nthree\n")
    for folder in (root / "cache", root / "plain"):
        tokens, _ = datautils.test_tokens("c4", 3, tokenizer, data_dir=folder)
        assert tokens.flatten().tolist() == byte_ids("one two three")[:12]


def test_all_pieces_of_a_saved_c4_are_read(root, tokenizer, no_hub):
    for piece in (0, 1):
        put_arrow(root / "allenai___c4" / f"c4-validation-0000{piece}-of-00002.arrow", [f"piece {piece}"])
    tokens, source = datautils.test_tokens("c4", 16, tokenizer, data_dir=root)
    assert tokens[0].tolist() == byte_ids("piece 0 piece 1") and len(source["files"]) == 2


@pytest.mark.parametrize(
    ("dataset", "name", "lines", "text"),
    [("wikitext2", "wiki.train.raw", WIKI_LINES, WIKI_TRAIN), ("ptb", "ptb.train.txt", "\n".join(PTB_ROWS), PTB_TEXT)],
)
def test_samples_are_those_of_the_ancestors(dataset, name, lines, text, root, tokenizer, no_hub):
    put(root / name, lines)
    samples, source = datautils.calibration_samples(dataset, 6, 8, 3, tokenizer, data_dir=root)
    ids, expected = byte_ids(text), []
    random.seed(3)
    for _ in range(6):
        i = random.randint(0, len(ids) - 8 - 1)
        expected.append(ids[i : i + 8])
    assert samples.dtype == torch.long and samples.tolist() == expected
    assert source == {"dataset": dataset, "split": "train", "files": [str(root / name)]}
    again, _ = datautils.calibration_samples(dataset, 6, 8, 3, tokenizer, data_dir=root)
    other, _ = datautils.calibration_samples(dataset, 6, 8, 4, tokenizer, data_dir=root)
    assert torch.equal(samples, again) and not torch.equal(samples, other)


def test_c4_samples_are_those_of_the_ancestors(root, tokenizer, no_hub):
    documents = ["abcdefghij" * (i % 3) + str(i) for i in range(30)]
    put_c4(root / "c4-train.00000-of-01024.json.gz", documents)
    samples, _ = datautils.calibration_samples("c4", 12, 11, 5, tokenizer, data_dir=root)
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


def test_c4_gives_up_when_every_document_is_too_short(monkeypatch, root, tokenizer, no_hub):
    put_c4(root / "c4-train.json.gz", ["a", "bcd", "ef"])
    texts = []
    monkeypatch.setattr(datautils, "token_ids", lambda _, text: texts.append(text) or byte_ids(text))
    with pytest.raises(InputError, match="--seqlen 4: none of the 3 documents .* longest has 4; lower") as error:
        datautils.calibration_samples("c4", 2, 4, 0, tokenizer, data_dir=root)
    assert "\n" not in str(error.value)
    assert sorted(texts) == ["a", "bcd", "ef"], "a document was tokenized again"
    assert datautils.calibration_samples("c4", 2, 3, 0, tokenizer, data_dir=root)[0].tolist() == [[BOS, *b"bc"]] * 2


def test_c4_gives_up_after_many_short_documents(monkeypatch, root, tokenizer, no_hub):
    monkeypatch.setattr(datautils, "DRAWS", 20)
    put_c4(root / "c4-train.json.gz", ["a"] * 1000)
    with pytest.raises(InputError, match=r"none of the 20 documents looked at \(of 1000\)"):
        datautils.calibration_samples("c4", 2, 4, 0, tokenizer, data_dir=root)


def test_the_tokenizer_does_not_warn_or_truncate(monkeypatch, root, tokenizer, no_hub, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    put(root / "wiki.test.raw", "x" * 100)
    tokens, _ = datautils.test_tokens("wikitext2", 101, tokenizer, data_dir=root)
    assert tokens.tolist() == [byte_ids("x" * 100)]
    assert not caplog.records


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
    i = random.Random(1).randint(0, len(byte_ids("\n\n".join(train))) - 64 - 1)
    sample, _ = datautils.calibration_samples("builtin", 1, 64, 1, tokenizer, data_dir="ignored")
    assert sample[0].tolist() == byte_ids("\n\n".join(train))[i : i + 64]


def test_builtin_text_is_cut_at_a_paragraph_and_drops_what_was_there(monkeypatch):
    topics = {"b": "two two\n\n  one   one\n\nfour", "a": "one one\n\nthree three three three three three"}
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    train, _ = datautils.load_rows("builtin", "train", None)
    test, source = datautils.load_rows("builtin", "test", None)
    assert train == ["one one", "three three three three three three"] and test == ["two two", "four"]
    text = b"one one\n\nthree three three three three three\n\ntwo two\n\nfour"
    assert source["sha256"] == hashlib.sha256(text).hexdigest()


HUB_CALLS = [
    ("wikitext2", "train", ("Salesforce/wikitext",), {"name": "wikitext-2-raw-v1", "split": "train"}),
    ("wikitext2", "test", ("Salesforce/wikitext",), {"name": "wikitext-2-raw-v1", "split": "test"}),
    ("ptb", "train", ("ptb-text-only/ptb_text_only",), {"revision": "refs/convert/parquet", "split": "train"}),
    ("ptb", "test", ("ptb-text-only/ptb_text_only",), {"revision": "refs/convert/parquet", "split": "test"}),
    (
        "c4", "train", ("allenai/c4",),
        {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
    ),
    (
        "c4", "test", ("allenai/c4",),
        {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
    ),
    ("an-owner/their.set:words_1", "train", ("an-owner/their.set",), {"split": "train"}),
    ("an-owner/their.set:words_1", "test", ("an-owner/their.set",), {"split": "test"}),
]


@pytest.mark.parametrize(("dataset", "part", "arguments", "options"), HUB_CALLS)
def test_the_hub_is_asked_for_the_datasets_of_the_field(monkeypatch, dataset, part, arguments, options):
    calls = []

    def load_dataset(*given, **keywords):
        calls.append((given, keywords))
        column = "words_1" if "words_1" in dataset else "sentence" if dataset == "ptb" else "text"
        return Dataset.from_dict({"url": ["u", "v"], "text": ["c", "d"], column: ["a", "b"]}).select_columns(
            ["url", "text", column] if "words_1" in dataset else ["url", column])

    monkeypatch.setattr(datautils.hub, "reachable", lambda: True)
    monkeypatch.setattr(datautils, "load_dataset", load_dataset)
    rows, source = datautils.load_rows(dataset, part, None)
    assert rows == ["a", "b"] and calls == [(arguments, options)]
    assert source == {"dataset": dataset, "hub": arguments[0], **options}
    json.dumps(source)


def test_a_column_that_the_hub_does_not_have_is_one_line(monkeypatch):
    monkeypatch.setattr(datautils.hub, "reachable", lambda: True)
    monkeypatch.setattr(datautils, "load_dataset", lambda *_, **__: Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(InputError, match="^an-owner/set has the columns text: there is no words$"):
        datautils.load_rows("an-owner/set:words", "train", "a folder that it is not looked for in")


@pytest.mark.parametrize("dataset", ["wikitext2", "ptb", "c4"])
def test_offline_the_error_comes_at_once_and_in_one_line(monkeypatch, tmp_path, dataset, tokenizer):
    monkeypatch.setattr(datautils.hub, "reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(InputError, match=f"^dataset {dataset}: .*cannot be reached.*--data-dir DIR.*builtin") as error:
        datautils.test_tokens(dataset, 8, tokenizer)
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value) and DATASETS[dataset].hub_id in str(error.value)
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False


def test_offline_the_cache_is_asked_with_the_flags_set(monkeypatch):
    def load_dataset(*_, **__):
        assert constants.HF_HUB_OFFLINE is True and datasets.config.HF_HUB_OFFLINE is True
        return Dataset.from_dict({"text": ["cached"]})

    monkeypatch.setattr(datautils.hub, "reachable", lambda: False)
    monkeypatch.setattr(datautils, "load_dataset", load_dataset)
    assert datautils.load_rows("wikitext2", "test", None)[0] == ["cached"]


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("it does\nnot exist"),
        FileNotFoundError("it does\nnot exist"),
        ConnectionError("it does\nnot exist"),
        ValueError("it does\nnot exist"),
    ],
)
def test_a_failure_of_the_hub_is_one_line(monkeypatch, error, tokenizer):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datautils.hub, "reachable", lambda: True)
    monkeypatch.setattr(datautils, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="ptb: cannot load ptb-text-only/ptb_text_only: it does not exist; supply"):
        datautils.test_tokens("ptb", 8, tokenizer)


def test_a_local_read_stays_local_and_leaves_no_copy(monkeypatch, root, tmp_path, tokenizer, no_hub):
    def load_dataset(*given, **keywords):
        assert datasets.config.HF_HUB_OFFLINE, "the hub counts what is loaded while this is off"
        return datasets.load_dataset(*given, **keywords)

    monkeypatch.setattr(local, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    put_parquet(root / "wikitext" / "test.parquet", WIKI_ROWS)
    put_c4(root / "c4-validation.json.gz", ["a b c"])
    before = sorted(root.rglob("*"))
    datautils.test_tokens("wikitext2", 3, tokenizer, data_dir=root)
    datautils.test_tokens("c4", 3, tokenizer, data_dir=root)
    assert not cache.exists() and sorted(root.rglob("*")) == before


def test_one_copy_is_read_of_a_split_that_is_there_in_several(root, tokenizer, no_hub):
    put_parquet(root / "deep" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", WIKI_ROWS)
    put(root / "wiki.test.raw", "other\n")
    put(root / "wiki.test.head.raw", "head\n")
    put(root / "wikitext" / "wiki.test.raw", "deeper\n")
    rows, _ = datautils.load_rows("wikitext2", "test", root)
    assert rows == WIKI_ROWS
    (root / "deep" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet").unlink()
    assert datautils.load_rows("wikitext2", "test", root)[0] == ["other\n"]


@pytest.mark.parametrize(
    ("path", "dataset", "part"),
    [
        ("c4-train/wiki.test.raw", "wikitext2", "test"),
        ("wikitext_and_ptb/ptb/train.txt", "ptb", "train"),
        ("wikitext-2-raw-v1-train/rows.txt", "wikitext2", "train"),
        ("train/c4/validation/0000.txt", "c4", "test"),
        ("ptb_train_test/ptb.test.txt", "ptb", "test"),
        ("ptb/test/train_test.txt", "ptb", "test"),
        ("C4/Val.TXT", "c4", "test"),
    ],
)
def test_the_nearest_name_tells_dataset_and_split(path, dataset, part, root, no_hub):
    put(root / path, "row\n")
    folder = root / path.split("/")[0]
    assert datautils.load_rows(dataset, part, root)[0] == datautils.load_rows(dataset, part, folder)[0]
    for other in {"wikitext2", "ptb", "c4"} - {dataset}:
        for other_part in ("train", "test"):
            with pytest.raises(InputError):
                datautils.load_rows(other, other_part, root)
    with pytest.raises(InputError):
        datautils.load_rows(dataset, "test" if part == "train" else "train", root)


@pytest.mark.parametrize(
    ("path", "dataset"),
    [
        ("snapshots/1c4e/validation.txt", "c4"),
        ("abc4/validation.txt", "c4"),
        ("c4x/validation.txt", "c4"),
        ("text/test.txt", "wikitext2"),
        ("wikitext/latest.txt", "wikitext2"),
        ("ptb/train/part.txt", "ptb"),
        ("c4-train/ptb.txt", "ptb"),
        ("wikitext-test/dataset_info.json", "wikitext2"),
        ("wikitext-validation/c4/part.txt", "c4"),
        ("c4-validation/wiki.raw", "c4"),
    ],
)
def test_other_files_are_not_taken(path, dataset, tmp_path, no_hub):
    folder = tmp_path / "ptb_test_c4_validation_wikitext" / "inner"  # above --data-dir: must not count
    put(folder / path, "row\n")
    split = "validation" if dataset == "c4" else "test"
    with pytest.raises(InputError, match=f"no {split} split of {dataset} found") as error:
        datautils.load_rows(dataset, "test", folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert path.endswith("info.json") or path in str(error.value)


@pytest.mark.parametrize(
    ("path", "dataset", "needed"),
    [
        ("wikitext-2-v1/test-00000-of-00001.parquet", "wikitext2", "raw version"),
        ("wikitext-2/wiki.test.tokens", "wikitext2", "raw version"),
        ("wikitext-103-raw-v1/test-00000-of-00001.parquet", "wikitext2", "wikitext-2-raw-v1"),
        ("wikitext_103/wiki.test.raw", "wikitext2", "wikitext-2-raw-v1"),
        ("c4/en.noclean/c4-validation.00000-of-00008.json.gz", "c4", "en/c4-validation"),
        ("c4/realnewslike/c4-validation.00000-of-00001.json.gz", "c4", "en/c4-validation"),
    ],
)
def test_a_variant_is_refused_by_name(path, dataset, needed, root, no_hub):
    put(root / path, "row\n")
    with pytest.raises(InputError, match=f"{needed}.* is needed .*is only {path}"):
        datautils.load_rows(dataset, "test", root)


BAD_FILES = {
    "not_gzip": ("wikitext/test.json.gz", b'{"text": "a"}\n', "gzip"),
    "cut_gzip": ("wikitext/test.json.gz", gzip.compress(json_lines(map(str, range(999))).encode())[:500], "ended"),
    "damaged_gzip": ("wikitext/test.json.gz", b"\x1f\x8b\x08\x00junkjunkjunk", "decompressing"),
    "parquet": ("wikitext/test.parquet", b"PAR1junk", "parquet"),
    "arrow": ("wikitext/test.arrow", b"junk", "arrow"),
    "json": ("wikitext/test.json", b'{"text": "a"\n{', "JSON"),
    "text": ("wikitext/test.txt", b"\xff\xfe", "utf-8"),
    "no_rows": ("wikitext/test.json", b"", "no rows"),
    "no_rows_text": ("wikitext/test.txt", b"", "no rows"),
    "numbers": ("wikitext/test.json", b'{"text": 1}\n', "not text"),
    "empty_value": ("wikitext/test.json", b'{"text": "a"}\n{"text": null}\n', "not text"),
    "columns": ("wikitext/test.json", b'{"body": "a", "id": 1}\n', "columns body, id: text, sentence or messages"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_in_one_line(case, root, no_hub):
    path, content, reason = BAD_FILES[case]
    put(root / path, content)
    with pytest.raises(InputError, match=f"{root / path}.*{reason}") as error:
        datautils.load_rows("wikitext2", "test", root)
    assert "\n" not in str(error.value) and str(error.value).count(path) == 1


def test_a_damaged_saved_dataset_is_named(root, no_hub):
    Dataset.from_dict({"text": WIKI_ROWS}).save_to_disk(root / "wikitext-test")
    put(root / "wikitext-test" / "data-00000-of-00001.arrow", "junk")
    with pytest.raises(InputError, match="wikitext-test/state.json cannot be read .save_to_disk.: "):
        datautils.load_rows("wikitext2", "test", root)


def test_a_missing_shard_is_refused(root, no_hub):
    put_parquet(root / "wikitext" / "test-00001-of-00002.parquet", WIKI_ROWS)
    with pytest.raises(InputError, match="only 1 of the 2 files .*test-#-of-00002.parquet found"):
        datautils.load_rows("wikitext2", "test", root)


def test_an_empty_or_missing_folder_is_refused(root, no_hub):
    with pytest.raises(InputError, match="there is nothing"):
        datautils.load_rows("ptb", "test", root)
    with pytest.raises(InputError, match=f"--data-dir {root / 'absent'}: no such folder"):
        datautils.load_rows("ptb", "test", root / "absent")


def test_the_folder_may_be_given_as_text_or_relative(root, monkeypatch, no_hub):
    put(root / "ptb" / "test.txt", "row\n")
    monkeypatch.chdir(root / "ptb")
    assert datautils.load_rows("ptb", "test", ".")[0] == ["row"]


def test_an_unknown_dataset_is_refused(tokenizer):
    with pytest.raises(InputError, match="dataset wiki: must be one of wikitext2, ptb, c4, builtin"):
        datautils.test_tokens("wiki", 8, tokenizer)


def test_a_text_that_is_too_short_is_refused_with_both_numbers(root, tokenizer, no_hub):
    put(root / "wiki.test.raw", "1234567")
    put(root / "wiki.train.raw", "1234567")
    assert len(datautils.test_tokens("wikitext2", 8, tokenizer, data_dir=root)[0]) == 1
    samples, _ = datautils.calibration_samples("wikitext2", 2, 7, 0, tokenizer, data_dir=root)
    assert samples.tolist() == [[BOS, *b"123456"]] * 2
    with pytest.raises(InputError, match="--seqlen 9: the test text of dataset wikitext2 has 8 tokens and 9 are"):
        datautils.test_tokens("wikitext2", 9, tokenizer, data_dir=root)
    with pytest.raises(InputError, match="--seqlen 8: the train text of dataset wikitext2 has 8 tokens and 9 are"):
        datautils.calibration_samples("wikitext2", 2, 8, 0, tokenizer, data_dir=root)


@pytest.mark.parametrize("dataset", ["builtin", "c4"])
def test_more_samples_than_memory_are_refused_at_once(dataset, root, tokenizer, no_hub):
    put_c4(root / "c4-train.json.gz", ["a long document"])
    with pytest.raises(InputError, match="^--nsamples 1000000000: 1000000000 sequences of 4000 tokens take 32000.0 "
                                         "GB of memory, [0-9.]+ GB are free; lower --nsamples or --seqlen$"):
        datautils.calibration_samples(dataset, 1_000_000_000, 4_000, 0, tokenizer, data_dir=root)


def test_a_line_that_no_tokenizer_could_digest_is_refused(root, no_hub, monkeypatch):
    monkeypatch.setattr(local, "LONGEST", 2_000_000)
    long = "x" * 1_999_980
    put(root / "wiki.test.raw", f"short\n{long}\n")
    assert len(datautils.load_rows("wikitext2", "test", root)[0][-1]) == len(long) + 1
    put(root / "wiki.test.raw", f"short\n{long}" + 99 * "x")
    put_parquet(root.parent / "parquet" / "wikitext" / "test.parquet", [long + 99 * "x"])
    put(root / "ptb" / "test.json.gz", gzip.compress(json_lines(["short", long + 99 * "x"]).encode()))
    put(root / "c4" / "validation.json", json.dumps([{"text": long + 99 * "x"}]))
    for dataset, folder, reason in [
            ("wikitext2", root, "wiki.test.raw cannot be read .text.: line 2 is longer than 2 MB; split it"),
            ("ptb", root, "test.json.gz cannot be read .json.: line 2 is longer than 2 MB; split it"),
            ("wikitext2", root.parent / "parquet", "test.parquet: a row is longer than 2 MB; split it"),
            ("c4", root, "validation.json cannot be read .json.: line 1 is longer than 2 MB; split it")]:
        with pytest.raises(InputError, match=reason):
            datautils.load_rows(dataset, "test", folder)


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_text(root, no_hub):
    bom = b"\xef\xbb\xbf"
    put(root / "wiki.test.raw", bom + WIKI_LINES.replace("\n", "\r\n").encode())
    with_them = datautils.load_rows("wikitext2", "test", root)[0]
    put(root / "wiki.test.raw", WIKI_LINES)
    assert with_them == datautils.load_rows("wikitext2", "test", root)[0]
    for name, content in {"test.jsonl": json_lines(PTB_ROWS).replace("\n", "\r\n"),
                          "test.json": json.dumps([{"sentence": row} for row in PTB_ROWS], indent=1),
                          "test.jsonl.gz": None}.items():
        content = gzip.compress(bom + json_lines(PTB_ROWS).encode()) if content is None else bom + content.encode()
        put(root / name / "ptb" / name, content)
        assert datautils.load_rows("ptb", "test", root / name)[0] == PTB_ROWS


def test_json_gives_what_python_reads_in_it(root, no_hub):
    rows = ["", "plain", "tab\there", "“δ”", "\U0001f600", "2019-04-25T12:57:54Z", "1", "\x00"]
    put(root / "ptb" / "test.jsonl", json_lines(rows).replace("tab\\there", "tab\there"))
    assert datautils.load_rows("ptb", "test", root)[0] == rows
    put(root / "list" / "ptb" / "test.json", json.dumps(rows))  # without columns
    assert datautils.load_rows("ptb", "test", root / "list")[0] == rows


def test_a_link_back_is_not_followed_and_other_links_are(root, no_hub):
    put(root / "texts" / "ptb" / "test.txt", "row\n")
    for number in range(9):
        (root / "texts" / f"back{number}").symlink_to("..")
    (root / "elsewhere").symlink_to("texts/ptb")
    start = time.monotonic()
    assert sorted(path.relative_to(root).as_posix() for path in local.data_files(root)) == [
        "elsewhere/test.txt", "texts/ptb/test.txt"]
    assert time.monotonic() - start < 5
