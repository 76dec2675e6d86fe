"""Check the text, the cuts and the random draws of datautils against ones written out here."""

import gzip
import hashlib
import json
import logging
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
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
    "hub_folder": lambda root: put_parquet(root / "wikitext-2-raw-v1/test-00000-of-00001.parquet", WIKI_ROWS),
    "hub_path": lambda root: put_parquet(
        root / "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet", WIKI_ROWS
    ),
    "hub_cache": put_hub_cache,
    "shards": put_shards,
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


def test_c4_is_read_from_the_hub_cache_and_not_from_its_variants(root, tokenizer, no_hub):
    snapshot = root / "datasets--allenai--c4/snapshots/1588ec45"
    put_c4(snapshot / "en.noblocklist/c4-validation.00000-of-00008.json.gz", ["wrong folder"])
    with pytest.raises(InputError, match="no validation split of c4 in it; needs en/c4-validation.00000-of-"):
        datautils.test_tokens("c4", 3, tokenizer, data_dir=root)
    put_c4(snapshot / "en/c4-validation.00000-of-00008.json.gz", ["one two", "three"])
    tokens, _ = datautils.test_tokens("c4", 3, tokenizer, data_dir=root)
    assert tokens.flatten().tolist() == byte_ids("one two three")[:12]


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
    monkeypatch.setattr(datautils, "token_ids", lambda _, text, bos: texts.append(text) or byte_ids(text))
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
def test_offline_the_error_is_one_line(monkeypatch, tmp_path, dataset, tokenizer):
    monkeypatch.setattr(datautils.hub, "reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=f"^dataset {dataset}: .*cannot be reached.*--data-dir DIR.*builtin") as error:
        datautils.test_tokens(dataset, 8, tokenizer)
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
    put_parquet(root / "wikitext-2-raw-v1" / "test-0.parquet", WIKI_ROWS)
    put_c4(root / "c4-validation.json.gz", ["a b c"])
    before = sorted(root.rglob("*"))
    datautils.test_tokens("wikitext2", 3, tokenizer, data_dir=root)
    datautils.test_tokens("c4", 3, tokenizer, data_dir=root)
    assert not cache.exists() and sorted(root.rglob("*")) == before


def test_one_copy_is_read_of_a_split_that_is_there_in_several(root, tokenizer, no_hub):
    put_parquet(root / "deep" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", WIKI_ROWS)
    put(root / "wiki.test.raw", "other\n")
    put(root / "wikitext-103-raw" / "wiki.test.raw", "another dataset\n")
    rows, _ = datautils.load_rows("wikitext2", "test", root)
    assert rows == WIKI_ROWS
    (root / "deep" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet").unlink()
    assert datautils.load_rows("wikitext2", "test", root)[0] == ["other\n"]


BAD_FILES = {
    "not_gzip": ("test.json.gz", b'{"text": "a"}\n', "gzip"),
    "cut_gzip": ("test.json.gz", gzip.compress(json_lines(map(str, range(999))).encode())[:500], "ended"),
    "parquet": ("test.parquet", b"PAR1junk", ""),
    "arrow": ("test.arrow", b"junk", ""),
    "json": ("test.json", b'{"text": "a"\n{', "cannot be read: Expecting"),
    "text": ("test.txt", b"\xff\xfe", "utf-8"),
    "no_rows": ("test.json", b"", "contains no text"),
    "no_rows_text": ("test.txt", b"", "contains no text"),
    "numbers": ("test.json", b'{"text": 1}\n', "row 1 is int, not text"),
    "empty_value": ("test.json", b'{"text": "a"}\n{"text": null}\n', "row 2 is NoneType, not text"),
    "columns": ("test.json", b'{"body": "a", "id": 1}\n', "columns body, id: text, sentence or messages"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_in_one_line(case, root, no_hub):
    path, content, reason = BAD_FILES[case]
    put(root / path, content)
    with pytest.raises(InputError, match=f"^dataset {root / path}: .*{reason}") as error:
        datautils.load_rows(str(root / path), "test", None)
    assert "\n" not in str(error.value) and str(error.value).count(path) == 1


def test_a_missing_shard_is_refused(root, no_hub):
    put_parquet(root / "wikitext-2-raw-v1" / "test-00001-of-00002.parquet", WIKI_ROWS)
    with pytest.raises(InputError, match="only 1 of 2 files like .*test-00001-of-00002.parquet are there"):
        datautils.load_rows("wikitext2", "test", root)


def test_an_empty_folder_or_file_is_refused(root, no_hub):
    with pytest.raises(InputError, match="no test split of ptb in it; needs penn_treebank/test/.* or ptb.test.txt$"):
        datautils.load_rows("ptb", "test", root)
    put(root / "ptb.test.txt", "")
    with pytest.raises(InputError, match=f"--data-dir {root}/ptb.test.txt: contains no rows"):
        datautils.load_rows("ptb", "test", root)


def test_the_folder_may_be_given_as_text_or_relative(root, monkeypatch, no_hub):
    put(root / "ptb.test.txt", "row\n")
    monkeypatch.chdir(root)
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
        put(root / name, content)
        assert datautils.load_rows(str(root / name), "test", None)[0] == PTB_ROWS


def test_json_gives_what_python_reads_in_it(root, no_hub):
    rows = ["", "plain", "tab\there", "“δ”", "\U0001f600", "2019-04-25T12:57:54Z", "1", "\x00"]
    put(root / "test.jsonl", json_lines(rows))
    assert datautils.load_rows(str(root / "test.jsonl"), "test", None)[0] == rows
    put(root / "test.json", json.dumps(rows))  # without columns
    assert datautils.load_rows(str(root / "test.json"), "test", None)[0] == rows
