"""Check that files of text are read in every form, sampled, and told apart from other text by their checksum."""

import copy
import gzip
import json

import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset

from mixgpt import datautils
from mixgpt.common.errors import InputError

ROWS = ["The first row ,\nof two lines.", "Second row: café, “δ” \U0001f600", "2019-04-25T12:57:54Z", "\t1\x00", ""]
LINES = "".join(json.dumps({"text": row, "id": 1}) + "\n" for row in ROWS)
BOM = b"\xef\xbb\xbf"  # no text, nor are the line ends of Windows

FORMS = {
    "notes.txt": lambda path: path.write_bytes(BOM + ROWS[0].replace("\n", "\r\n").encode()),
    "rows.jsonl": lambda path: path.write_bytes(BOM + LINES.replace("\n", "\r\n").encode()),
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
