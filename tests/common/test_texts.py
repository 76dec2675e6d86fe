"""Check that a mixture draws from each text what it alone gives, as much as its share asks for."""

import os

import pytest
import torch
from conftest import record_of

from mixgpt import datautils
from mixgpt.common.errors import InputError
from mixgpt.common.texts import check_texts, counts_of, shares_of


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
            check_texts(text, [test], drawn=True)
    for name in ("builtin", "owner/dataset:column"):
        check_texts(name, [name], drawn=True)
