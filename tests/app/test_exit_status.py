"""Check how a command line ends: in one line and with a status, whatever stops it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from commands import SMALL, run, short_builtin  # noqa: F401, a fixture
from conftest import ROOT, command

from mixgpt import __main__
from mixgpt.app import cli, generate, pipeline, results
from mixgpt.common.errors import InputError, Terminated
from mixgpt.pruning.hessian import InputHessian

COMMANDS = {
    "llama.py": (cli.main, (pipeline, "execute"), ["somebody/model", "builtin"]),
    "mixgpt eval": (__main__.SUBCOMMANDS["eval"].load(), (pipeline, "execute"), ["somebody/model"]),
    "generate.py": (generate.main, (generate, "print_completions"), ["model", "Hello"]),
    "results.py": (results.main, (results, "files_of"), ["record.json"]),
}


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """Keep temporary files where a test can list them."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(cli.tempfile, "tempdir", str(folder))
    return folder


def end(script, error, monkeypatch, *more):
    """Run a command line that is stopped by an exception. Returns its exit status."""
    def failing(*_, **__):
        raise error

    main, (module, name), argv = COMMANDS[script]
    monkeypatch.setattr(module, name, failing)
    return main(script, [*argv, *more])


@pytest.mark.parametrize("script", COMMANDS)
def test_a_bug_gets_one_line_and_a_file_with_the_traceback(script, monkeypatch, capsys, temporary):
    assert end(script, KeyError("a\nsurprise " + "of words " * 1000), monkeypatch) == 1
    file, = temporary.iterdir()
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}: error: unexpected KeyError: 'a\\nsurprise of words") and len(line) < 600
    assert line.endswith(f"; please report it with {file}, which has the traceback")
    text = file.read_text()
    assert text.startswith(f"{'python ' if '.py' in script else ''}{script} {COMMANDS[script][2][0]}")
    assert f"torch {torch.__version__.partition('+')[0]}" in text and "transformers " in text and "Python 3" in text
    assert "Traceback (most recent call last)" in text and "in failing\n" in text and "of words " * 1000 in text
    assert file.stat().st_mode & 0o077 == 0, "a command line is nobody else's business"


MEMORY = "error: out of memory; lower --batch-size, --nsamples or --seqlen, or give --no-true-sequential"


@pytest.mark.parametrize("error, status, line", [
    (KeyboardInterrupt(), 130, "interrupted"), (Terminated(), 143, "terminated"), *((error, 2, MEMORY) for error in (
        MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"))),
    (RuntimeError("surprise"), 1, "error: unexpected RuntimeError: surprise"), *(
        (RuntimeError(f"[gloo/pair.cc:537] {how}."), 1, "error: another process has ended")
        for how in ("Connection closed by peer [::1]", "Read error: Connection reset by peer", "writev: Broken pipe"))])
def test_what_stops_a_run_speaks_of_its_folder_where_there_is_one(error, status, line, monkeypatch, capsys,
                                                              temporary):
    assert end("llama.py", error, monkeypatch) == status
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"llama.py: {line}") and "--resume" not in stderr
    assert end("llama.py", error, monkeypatch, "--save", "saved") == status
    assert capsys.readouterr().err.endswith("; what is in the folder of --save goes on with --resume\n")
    assert end("generate.py", error, monkeypatch) == status
    assert line != MEMORY or "memory; lower --max-new-tokens, or" in capsys.readouterr().err
    assert any(temporary.iterdir()) == ("unexpected" in line)


@pytest.mark.parametrize("script", COMMANDS)
def test_names_cannot_break_the_line(script, capsys):
    assert COMMANDS[script][0](script, ["./no\nmodel.gguf", "builtin", "--no-such\nflag"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}: error: ") and "--no-such flag" in line


@pytest.mark.parametrize("closed, status, line", [
    ("| head -0; exit ${PIPESTATUS[0]}", 141, ""), (">&-", 0, ""),
    ("> /dev/full", 2, "results.py: error: the disk of the output or of TMPDIR is full; free some space\n")])
def test_a_closed_stdout_ends_a_command_without_a_line_and_a_full_one_with_one(closed, status, line, tmp_path):
    """Through the interpreter's own end, where it flushes once more."""
    (tmp_path / "a.json").write_text(json.dumps({"settings": {"model": "a", "seed": 0}, "perplexity": {}, "data": {},
                                                 "sparsity": 0.0, "seconds": {}, "peak_memory": {}}))
    done = subprocess.run(["bash", "-c", f'"$0" results.py "$1" {closed}', sys.executable, tmp_path / "a.json"],
                          cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, line)


def wait_in_the_second_layer(temporary, errors, reached):
    """Let the temporary files be there, and wait forever after the first layer."""
    with open(errors, "w") as output:
        os.dup2(output.fileno(), 2)
    cli.tempfile.tempdir = str(temporary)
    add_batch = InputHessian.add_batch

    def waiting(*given):
        if list(temporary.rglob("layer-00000.safetensors")):
            reached.touch()
            threading.Event().wait()
        return add_batch(*given)

    InputHessian.add_batch = waiting


@pytest.mark.parametrize("number, status, line", [
    (signal.SIGHUP, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_signal_leaves_no_pruned_layers(number, status, line, fork, checkpoint_folder, tmp_path, temporary):
    errors, reached = tmp_path / "errors", tmp_path / "reached"
    process = fork(command, "llama", [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", *SMALL], os.devnull,
                   wait_in_the_second_layer, (temporary, errors, reached))
    while not reached.exists():
        assert process.is_alive(), errors.read_text()
        time.sleep(0.01)
    os.kill(process.pid, number)
    if number == signal.SIGHUP:
        os.kill(process.pid, number)  # as a terminal that closes, and its shell
    process.join(600)
    assert process.exitcode == status
    assert errors.read_text() == f"llama.py: {line}\n"
    assert not list(temporary.iterdir())


def test_signals_act_as_before_after_a_run_and_an_ignored_one_stays_ignored(monkeypatch):
    monkeypatch.setattr(pipeline, "execute", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("llama.py", "somebody/model", "builtin") == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert run("llama.py", "somebody/model", "builtin") == 143
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_later_process_names_itself_and_leaves_signals_alone(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert end("llama.py", InputError("words"), monkeypatch) == 2
    assert capsys.readouterr().err == "llama.py: error: words (process 1)\n"
    handlers = []
    monkeypatch.setattr(pipeline, "execute", lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)))
    assert run("llama.py", "somebody/model", "builtin") == 0
    assert handlers == [signal.SIG_DFL], "it would hang in one that waits for the first process"
