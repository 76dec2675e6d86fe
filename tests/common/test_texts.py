"""Check that texts are read from files of every form, and that a mixture draws from each what it alone gives."""

import ast
import asyncio
import copy
import gzip
import inspect
import json
import os

import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from conftest import record_of
from datasets import Dataset

from mixgpt import datautils
from mixgpt.app.cli import parse
from mixgpt.common.errors import InputError
from mixgpt.common.texts import check_texts, counts_of, shares_of

ROWS = ["The first row ,\nof two lines.", "Second row: café, “δ” \U0001f600", "2019-04-25T12:57:54Z", "\t1\x00", ""]
LINES = "".join(json.dumps({"text": row, "of": [[], {"a": 1}][place % 2]}) + "\n" for place, row in enumerate(ROWS))
BOM = b"\xef\xbb\xbf"  # no text, nor are the line ends of Windows

FORMS = {
    "notes.txt": lambda path: path.write_bytes(BOM + ROWS[0].replace("\n", "\r\n").encode()),
    "rows.jsonl": lambda path: path.write_bytes(BOM + LINES.replace("\n", "\r\n\r\n").encode()),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "objects.json": lambda path: path.write_text(json.dumps([{"sentence": row} for row in ROWS], indent=1)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(BOM + LINES.encode())),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), path),
    "rows.arrow": lambda path: pyarrow.feather.write_feather(pyarrow.table({"text": ROWS}), path),
    "saved": lambda path: Dataset.from_dict({"text": ROWS}).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_those_of_the_file_in_every_form(name, tmp_path):
    path = tmp_path / name
    FORMS[name](path)
    before = sorted(tmp_path.rglob("*"))
    for part in ("train", "test"):
        rows, source = datautils.load_rows(str(path), part, None)
        assert rows == (ROWS[:1] if name == "notes.txt" else ROWS)
        assert (source["dataset"], source["split"]) == (str(path), part)
        assert source["files"] == [str(path / "data-00000-of-00001.arrow" if name == "saved" else path)]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_read_whole_in_order_of_its_paths(tmp_path):
    (elsewhere := tmp_path.with_name(f"{tmp_path.name}, elsewhere") / "b").mkdir(parents=True)
    (elsewhere / "rows.jsonl").write_text(LINES)
    (tmp_path / "b.json").symlink_to(elsewhere)  # a folder, as where large files have a disk of their own
    (tmp_path / "dataset_c.json").write_text('["last"]')
    (tmp_path / "a.txt").write_text("first\nof two lines\n")
    (tmp_path / "README.md").write_text("not a text")
    rows, source = datautils.load_rows(str(tmp_path), "train", None)
    assert rows == ["first\nof two lines\n", *ROWS, "last"] and len(source["files"]) == 3
    before = source["sha256"]
    (tmp_path / "dataset_c.json").write_text('["Last"]')
    assert datautils.load_rows(str(tmp_path), "train", None)[1]["sha256"] != before


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
CHATS = [[{"role": "user", "content": "What is a list? " * 9}, {"role": "assistant", "content": "A sequence. " * 9}],
         [{"role": "system", "content": "Be brief: café."}]]


@pytest.mark.parametrize("name", ["chats.jsonl", "lists.jsonl", "chats.parquet"])
def test_chats_become_text_by_the_chat_template(name, tokenizer, tmp_path):
    path, tokenizer = tmp_path / name, copy.deepcopy(tokenizer)
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(chat if "lists" in name else {"messages": chat, "id": 1}) + "\n"
                                for chat in CHATS))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"messages": CHATS}), path)
    tokenizer.chat_template = TEMPLATE
    expected = "\n\n".join("".join(f"<{part['role']}>{part['content']}</s>" for part in chat) for chat in CHATS)
    ids = torch.tensor(tokenizer(expected).input_ids)
    tokens, _ = datautils.test_tokens(str(path), 8, tokenizer)
    assert torch.equal(tokens, ids[:len(ids) // 8 * 8].view(-1, 8))
    samples, _ = datautils.calibration_samples(str(path), 200, 8, 0, tokenizer)
    assert len(samples) == 200 and all(sample in ids.unfold(0, 8, 1).tolist() for sample in samples.tolist())


def test_code_is_that_of_the_standard_library_and_the_test_set_is_other_code():
    parts = [datautils.load_rows("code", part, None) for part in ("train", "test")]
    (train, _), (test, _) = parts
    assert inspect.getsource(inspect) in train and inspect.getsource(asyncio.events) in test
    assert not {*train} & {*test} and len({source["sha256"] for _, source in parts}) == 2
    assert all(ast.parse(source) for source in test)


@pytest.mark.parametrize("template, message", [
    ("{% for m in", "model .*: its chat template: unexpected"), ("{{ raise_exception('no system') }}", "no system"),
    ("{{ ''.__class__.__mro__ }}", "its chat template: .*unsafe")])
def test_a_template_that_fails_is_one_line(template, message, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message) as error:
        datautils.as_texts(["text", *CHATS], tokenizer)
    assert "\n" not in str(error.value)


BAD_FILES = {
    "not gzip": ("test.json.gz", b'{"text": "a"}\n', "gzip"),
    "second line": ("test.jsonl", b'{"text": "a"}\n{', "cannot be read: Expecting .*: line 2 column 2 "),
    "text": ("test.txt", b"\xff\xfe", "utf-8"),
    "nothing": ("test.json", b'{"text": "a"}\n{"text": null}\n', "row 2 is neither text nor a chat"),
    "chat without a role": ("test.json", b'{"messages": [{"content": "a"}]}\n', "row 1 is neither text nor a chat"),
    "columns": ("test.json", b'{"body": "a", "id": 1}\n', "row 1 has the columns body, id; needs text or "),
    "another kind": ("test.csv", b"text\na\n", "must end in one of .txt .json"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_in_one_line(case, tmp_path):
    name, content, reason = BAD_FILES[case]
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^--eval {path}.*{reason}") as error:
        datautils.load_rows(str(path), "test", None)
    assert "\n" not in str(error.value)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Give the name of a file of text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("This is a line of mine.\n" * 200)
    return "mine.txt"


@pytest.mark.parametrize("name, nsamples, expected", [
    ("builtin:0.7, mine.txt:0.3", 10, [7, 3]), ("builtin:7,mine.txt:3", 128, [90, 38]),
    ("builtin:1,mine.txt:1", 3, [2, 1]), ("builtin:1,builtin:1,mine.txt:1", 9, [6, 3]), ("mine.txt:5", 4, [4]),
    ("builtin", 5, [5])])
def test_each_text_gets_its_share(name, nsamples, expected, mine):
    assert list(counts_of(name, nsamples).values()) == expected


def test_each_text_gets_a_calibration_sequence_but_not_each_further_one(mine):
    name = f"builtin:0.8,{mine}:0.2"
    assert counts_of(name, 1) == {"builtin": 1}  # as of further sequences
    check_texts(name, (), 3)
    check_texts(name, (), 0)
    with pytest.raises(InputError, match=f"^--nsamples 2: gives no sequence to {mine} in {name}; raise it"):
        check_texts(name, (), 2)


def test_samples_are_the_first_that_each_text_gives_alone(mine, tokenizer):
    name = "builtin:0.75,mine.txt:0.25"
    tokens, source = datautils.calibration_samples(name, 12, 16, 5, tokenizer)
    alone = [datautils.calibration_samples(text, count, 16, 5, tokenizer)[0] for text, count in
             (("builtin", 9), (mine, 3))]
    assert sorted(tokens.tolist()) == sorted(torch.cat(alone).tolist())
    assert tokens.tolist() != torch.cat(alone).tolist()  # shuffled, as processes take consecutive ones
    assert torch.equal(tokens, datautils.calibration_samples(name, 12, 16, 5, tokenizer)[0])
    assert source["dataset"] == name
    assert [(part["dataset"], part["sequences"]) for part in source["parts"]] == [("builtin", 9), (mine, 3)]


def test_a_column_on_the_hub_is_a_text_and_so_is_a_folder_in_that_of_the_user():
    assert shares_of("owner/set.1:words") == {"owner/set.1:words": 1}
    assert shares_of("owner/set:words:3,~/:1") == {"owner/set:words": 0.75, os.path.expanduser("~/"): 0.25}
    for name in ("owner/set", "owner/set:0.5", "owner/set:3", "a/b/c:text", "set:text"):
        with pytest.raises(InputError, match="invalid choice|in a mixture each text needs a share"):
            shares_of(name)


@pytest.mark.parametrize("name, message", [
    ("c5:0.5,builtin:0.5", "invalid choice: 'c5' .*, or give a file or folder of text, or owner/dataset:column"),
    (":1,builtin:1", "invalid choice: ''"), ("c5", "invalid choice: 'c5'"),
    ("builtin,c4:1", "'builtin': in a mixture each text needs a share above 0, for example c4:0.7,builtin:0.3"),
    *((f"builtin:{share},c4:1", f"'builtin:{share}': in") for share in ("x", "0", "-1", "nan", "inf", "")),
    ("builtin:1,", "'': in")])
def test_what_is_no_mixture_is_refused(name, message):
    with pytest.raises(InputError, match=f"^dataset {name}: {message}"):
        counts_of(name, 10)


def test_a_run_draws_from_all_and_its_record_says_what_from_where(mine, prune, tmp_path):
    name, other = f"builtin:1,{mine}:1", tmp_path / "other.txt"
    other.write_text("This is a line of another text.\n" * 100)
    printed = prune("llama", "--sparsity .5 --eval", other, "builtin --save", tmp_path / "saved", data=name)
    record = record_of(tmp_path / "saved")
    parts = record["data"]["calibration"]["parts"]
    assert [part["sequences"] for part in parts] == [2, 2] and parts[1]["files"] == [mine]
    assert f"data     {name}: 4 sequences of 32 tokens" in printed and str(other) in printed
    assert list(record["perplexity"]["SparseGPT"]) == [str(other), "builtin"]
    assert len(record["data"][str(other)]["sha256"]) == 64
    for wrong, line in {
            name: f"--eval {name}: is a mixture, which is for calibration; give its texts one by one",
            "./mine.txt": "--eval ./mine.txt: is text that calibration draws from; give another one"}.items():
        assert prune("llama", "--sparsity .5 --eval", wrong, data=name, status=2) == f"llama.py: error: {line}\n"


def test_a_folder_and_a_file_in_it_overlap_and_the_splits_of_a_dataset_do_not(mine):
    os.mkdir("links")
    os.symlink(f"../{mine}", "links/theirs.txt")
    for text, test in ((".", mine), (mine, "."), ("links", mine)):
        with pytest.raises(InputError, match=f"^--eval {test}: is text that calibration draws from"):
            check_texts(text, [test], nsamples=4)
    for name in ("builtin", "owner/dataset:column"):
        check_texts(name, [name], nsamples=4)


@pytest.mark.parametrize("words, expected", [
    ("c4", ("wikitext2", "ptb", "c4")), ("builtin", ("builtin",)), ("builtin --gmp --sparsity .5", ("builtin",)),
    ("builtin --eval c4 ptb", ("c4", "ptb")), ("builtin --eval", ())])
def test_a_run_on_the_builtin_text_needs_no_other_unless_it_is_asked_for(words, expected):
    assert parse("opt.py", ["a/model", *words.split()]).eval == expected
