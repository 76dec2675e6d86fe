"""Check that tokenizers run within a time limit, and that their errors are one line."""

import os
import time
from types import SimpleNamespace

import pytest

import datautils
from mixgpt.common.errors import InputError
from mixgpt.text import tokenizing


def behaving(act):
    """Return a tokenizer that calls a function on each text."""
    class Tokenizer:
        name_or_path = "folder"

        def __call__(self, text, verbose, **options):
            return SimpleNamespace(input_ids=act(text))

    return Tokenizer()


class PanicException(BaseException):  # noqa: N818, as Rust's are named, which are in no module
    pass


def failing(error):
    def fail(_):
        os.write(2, b"thread panicked\n")
        raise error

    return behaving(fail)


@pytest.mark.parametrize("error", [PanicException("at 5:\n  over"), Exception("at 5: over"), ValueError("at 5: over")])
def test_an_error_of_a_tokenizer_is_one_line_and_what_it_writes_is_dropped(error, capfd):
    with pytest.raises(InputError) as caught:
        datautils.token_ids(failing(error), "text")
    assert str(caught.value) == "model folder: its tokenizer fails on a text (at 5: over)"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("a line"), ZeroDivisionError("a mistake of ours")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught:
        tokenizing.encode(failing(error), "text")
    assert caught.value is error


def test_a_tokenizer_that_does_not_end_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(tokenizing, "PATIENCE", 0.1)
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        tokenizing.try_out(behaving(lambda _: time.sleep(5)), "the model")
    assert time.perf_counter() - start < 2
    assert str(caught.value).startswith("model the model: its tokenizer takes longer than 0 s for ")


def test_a_long_text_may_take_longer(monkeypatch):
    monkeypatch.setattr(tokenizing, "PATIENCE", 0.1)
    monkeypatch.setattr(tokenizing, "SLOWEST", 10)
    assert tokenizing.encode(behaving(lambda _: time.sleep(0.3) or [1]), "12345678901234567890").input_ids == [1]


def test_what_is_written_without_an_error_is_passed_on(capfd):
    assert tokenizing.encode(behaving(lambda _: os.write(2, b"a remark\n")), "text").input_ids == 9
    assert capfd.readouterr().err == "a remark\n"


def test_a_closed_stderr_does_not_matter(tokenizer):
    saved = os.dup(2)
    os.close(2)
    try:
        ids = datautils.token_ids(tokenizer, "text")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    assert ids == tokenizer("text").input_ids
