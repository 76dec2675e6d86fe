"""Check what progress looks like: a bar in a terminal, else a line when one is due, from the first process alone."""

import contextlib
import io
import re
import sys
from datetime import datetime, timedelta

import pytest
from conftest import FAMILIES
from tqdm import std, tqdm

from mixgpt.app import cli
from mixgpt.common import distributed, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self, monkeypatch):
        self.seconds = 1000.0
        monkeypatch.setattr(std, "time", lambda: self.seconds)

    def sleep(self, seconds):
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def finish(steps):
    """Go through layers that take the seconds given. Returns the bar."""
    bar = progress.bar(steps, title="SparseGPT")
    for sleep, seconds in bar:
        sleep(seconds)
    return bar


def test_lines_come_every_30_seconds_at_most_with_what_is_left(clock, capsys):
    finish([(clock.sleep, 10)] * 8)
    lines = capsys.readouterr().err.splitlines()
    at = [datetime.now() + timedelta(seconds=seconds) for seconds in (50, 20)]
    assert [line[:line.index(" (")] for line in lines] == [
        "SparseGPT  layer 3 of 8, 30 s, about 50 s left", "SparseGPT  layer 6 of 8, 60 s, about 20 s left"]
    for line, end in zip(lines, at, strict=True):
        said = datetime.strptime(re.fullmatch(r".* \((\d\d:\d\d)\)", line)[1], "%H:%M")
        assert (end - said).total_seconds() % 86_400 < 120


def test_less_than_30_seconds_are_passed_in_silence(clock, capsys):
    finish([(clock.sleep, 3.7)] * 8)
    assert capsys.readouterr().err == ""


def test_a_layer_that_takes_longer_tells_of_itself_at_its_next_event(clock, capsys):
    with progress.bar(range(2), title="ADMM", initial=3, total=5) as bar:
        for index in bar:
            for _ in range(3):  # groups of matrices
                clock.sleep(25)
                bar.set_postfix_str(f"layer {index} error 1.00%")
    lines = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["ADMM  layer 3 of 5, 50 s", "ADMM  layer 4 of 5, 100 s, about 75 s left",
                     "ADMM  layer 4 of 5, 150 s, about 75 s left"]


def test_the_estimate_rests_on_all_steps_so_far(clock, capsys):
    finish([(clock.sleep, seconds) for seconds in (10, 10, 10, 50, 10, 10)])  # 20 s each
    line, *_ = capsys.readouterr().err.splitlines()[1:]
    assert line.startswith("SparseGPT  layer 4 of 6, 80 s, about 40 s left (")


def test_steps_without_an_iterable_are_counted(clock, capsys):
    with progress.bar(total=40, title="gradients", unit="step") as bar:
        for _ in range(4):
            clock.sleep(20)
            bar.update(10)
    assert capsys.readouterr().err.startswith("gradients  step 20 of 40, 40 s, about 40 s left (")


def test_what_is_written_meanwhile_stands_in_lines_of_its_own(clock, capsys):
    with progress.bar(range(2), title="SparseGPT") as bar:
        for index in bar:
            bar.write(f"layer {index}: damped")
            clock.sleep(40)
    captured = capsys.readouterr()
    assert captured.out == "layer 0: damped\nlayer 1: damped\n"
    assert re.sub(r" \(.*\)", "", captured.err) == (
        "SparseGPT  layer 1 of 2, 40 s, about 40 s left\nSparseGPT  layer 2 of 2, 80 s, about 0 s left\n")


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert type(finish([(clock.sleep, 40)] * 2)) is tqdm
    assert "SparseGPT: 100%|" in terminal.getvalue() and "[01:20<00:00, 40.00s/layer]" in terminal.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("reason", ["quiet", "another process"])
def test_nothing_is_shown_where_nobody_wants_it(reason, stream, clock, monkeypatch):
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        if reason == "quiet":
            stack.enter_context(progress.silent())
        else:
            patch.setattr(distributed, "rank", lambda: 1)
        finish([(clock.sleep, 40)] * 2)
    assert shown.getvalue() == ""
    finish([(clock.sleep, 40)] * 2)
    assert shown.getvalue() != ""


def test_progress_stays_on_its_stream_where_others_are_kept_off(clock, capsys, monkeypatch):
    with progress.shown_on(sys.stderr):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        finish([(clock.sleep, 40)])
        assert sys.stderr.getvalue() == ""
    assert capsys.readouterr().err.startswith("SparseGPT  layer 1 of 1, 40 s")


@pytest.mark.parametrize("quiet", [False, True])
def test_every_long_step_of_a_run_tells_how_far_it_is(quiet, checkpoint_folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0)
    arguments = [str(checkpoint_folder("llama")), "builtin", "--sparsity", ".5", "--nsamples", "2", "--seqlen", "32",
                 "--eval", "builtin", "--device", "cpu"]
    assert cli.main(FAMILIES["llama"][0], arguments + (["--quiet"] if quiet else ["--preset", "best"])) == 0
    lines = capsys.readouterr().err.splitlines()
    if quiet:
        assert lines == []
        return
    assert list(dict.fromkeys(line.partition("  ")[0] for line in lines)) == ["generating", "gradients", "ADMM",
                                                                                "distilling", "builtin"]
    assert [line for line in lines if line.startswith("ADMM  layer 3 of 3, ")]
