"""Check what progress looks like: a bar in a terminal, else a line when one is due."""

import io
import sys

import pytest
from commands import SMALL, run
from tqdm import std, tqdm

from mixgpt.common import progress
from mixgpt.common.hub import silenced


@pytest.fixture
def sleep(monkeypatch):
    """Give a function that lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(std, "time", lambda: now[0])
    return lambda seconds: now.append(now.pop() + seconds)


def finish(sleep, steps):
    """Go through layers that take the seconds given. Returns the bar."""
    bar = progress.bar(steps, title="SparseGPT")
    for seconds in bar:
        sleep(seconds)
        bar.set_postfix_str("error 1.00%")
    return bar


def test_lines_come_every_30_seconds_at_most_with_the_time_left_by_the_mean_of_all_steps(sleep, capsys):
    with silenced():  # libraries alone
        finish(sleep, [10, 10, 10, 50, 10, 10, 10, 10])
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" (")[0] for line in lines] == [
        "SparseGPT: layer 3 of 8, 00:30, about 00:50 left", "SparseGPT: layer 4 of 8, 01:20, about 01:20 left",
        "SparseGPT: layer 7 of 8, 01:50, about 00:15 left"]


def test_a_terminal_gets_a_bar_and_a_closed_stderr_is_no_error(sleep, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.isatty = lambda: True
    assert type(finish(sleep, [40] * 2)) is tqdm and "SparseGPT: 100%|" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    finish(sleep, [40] * 2)
    with silenced():
        finish(sleep, [40] * 2)


def test_every_long_step_of_a_run_tells_how_far_it_is(checkpoint_folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0)
    assert run("llama.py", checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--preset", "best", *SMALL) == 0
    lines = capsys.readouterr().err.splitlines()
    assert list(dict.fromkeys(line.partition(": ")[0] for line in lines)) == [
        "dense model", "gradients", "ADMM", "distilling", "perplexity"]
    assert [line for line in lines if line.startswith("ADMM: layer 3 of 3, ")]
