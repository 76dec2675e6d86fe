"""Check how a command line ends: in one line and with a status, whatever stops it."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import SMALL, TORCHRUN, run, short_builtin  # noqa: F401, a fixture
from conftest import ROOT, as_rank, command, contents
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import generate
import llama
import results
from mixgpt.app import completion, ending, pipeline
from mixgpt.common.errors import InputError
from mixgpt.kernels import columns
from mixgpt.modeling import streaming
from sparsegpt import SparseGPT

COMMANDS = {
    "llama.py": (lambda argv: run(llama.FAMILY, *argv), (pipeline, "run"), ["somebody/model", "builtin"]),
    "generate.py": (generate.main, (completion, "print_completions"), ["model", "Hello"]),
    "results.py": (results.main, (results, "files_of"), ["record.json"]),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Undo what `as_rank` sets."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.setenv(name, "")


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path):
    """Keep temporary files where a test can list them."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(ending.tempfile, "tempdir", str(folder))
    return folder


def fails(error):
    def failing(*_, **__):
        raise error

    return failing


def end(script, error, monkeypatch, *more):
    """Run a command line that is stopped by an exception. Returns its exit status."""
    main, (module, name), argv = COMMANDS[script]
    monkeypatch.setattr(module, name, fails(error))
    return main([*argv, *more])


@pytest.mark.parametrize("script", COMMANDS)
def test_the_unforeseen_gets_one_line_and_a_file_with_the_traceback(script, monkeypatch, capsys, temporary):
    assert end(script, KeyError("a\nsurprise"), monkeypatch) == 1
    file, = temporary.iterdir()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == (
        f"{script}: error: unforeseen KeyError: 'a\\nsurprise'; please report it with {file}, which has the "
        "traceback\n")
    text = file.read_text()
    assert text.startswith(f"python {script} {COMMANDS[script][2][0]} ") or script == "results.py"
    assert f"torch {torch.__version__.partition('+')[0]}" in text and "transformers " in text and "Python 3" in text
    assert "Traceback (most recent call last)" in text and "in failing\n" in text and text.endswith("surprise'\n")
    assert file.stat().st_mode & 0o077 == 0, "a command line is nobody else's business"


def test_a_long_message_is_cut_in_the_line_and_whole_in_the_file(monkeypatch, capsys, temporary):
    assert end("llama.py", RuntimeError("word " * 1000), monkeypatch) == 1
    line, = capsys.readouterr().err.splitlines()
    assert len(line) < 500 and " …; please report it with " in line
    assert "word " * 1000 in next(temporary.iterdir()).read_text()


def test_without_a_temporary_folder_the_file_is_in_the_current_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ending.tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.chdir(tmp_path)
    assert end("llama.py", RuntimeError("surprise"), monkeypatch) == 1
    file, = tmp_path.glob("*.txt")
    assert f"surprise; please report it with {file}, which" in capsys.readouterr().err


def test_without_any_folder_the_traceback_comes_before_the_line(monkeypatch, capsys):
    monkeypatch.setattr(ending.tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.chdir("/proc")
    assert end("llama.py", RuntimeError("surprise"), monkeypatch) == 1
    *above, line = capsys.readouterr().err.splitlines()
    assert above.count("Traceback (most recent call last):") == 1
    assert line == ("llama.py: error: unforeseen RuntimeError: surprise; please report it with the traceback above, "
                    "which could not be written to a file")


@pytest.mark.parametrize("error", [
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    RuntimeError("can't start new thread"),
])
def test_a_lack_of_memory_gets_a_line_that_says_what_to_lower(error, monkeypatch, capsys, temporary):
    assert end("llama.py", error, monkeypatch) == 2
    assert capsys.readouterr().err == ("llama.py: error: out of memory; lower --batch-size, --nsamples or --seqlen, or "
                                       "give --no-true-sequential\n")
    assert end("generate.py", error, monkeypatch) == 2
    assert capsys.readouterr().err == (
        "generate.py: error: out of memory; lower --max_new_tokens, or give --dtype bfloat16\n")
    assert not list(temporary.iterdir())


def test_a_lack_of_memory_behind_another_error_is_recognized(monkeypatch, capsys):
    error = RuntimeError("cannot load")
    error.__cause__ = MemoryError()
    assert end("llama.py", error, monkeypatch) == 2
    assert "out of memory" in capsys.readouterr().err


def test_a_real_allocation_that_fails_is_recognized(monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "run", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    assert run(llama.FAMILY, "somebody/model", "builtin") == 2
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "interrupted"), (ending.Ended(signal.SIGTERM), 143, "ended by SIGTERM"),
    (RuntimeError("surprise"), 1, "error: unforeseen RuntimeError: surprise; please … which has the traceback"),
    (MemoryError(), 2, "error: out of memory; lower … --no-true-sequential")])
def test_what_stops_a_run_speaks_of_its_folder_where_there_is_one(error, status, words, monkeypatch, capsys):
    pattern = ".*".join(map(re.escape, f"llama.py: {words}".split("…")))
    assert end("llama.py", error, monkeypatch) == status
    assert re.fullmatch(pattern + "\n", capsys.readouterr().err)
    assert end("llama.py", error, monkeypatch, "--save", "saved") == status
    assert re.fullmatch(pattern + "; what is in the folder of --save goes on with --resume\n", capsys.readouterr().err)


@pytest.mark.parametrize("script", COMMANDS)
def test_names_cannot_break_the_line(script, capsys):
    assert COMMANDS[script][0](["./no\n\x1b[2Jmodel.gguf", "builtin", "--no-such\nflag"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}: error: ") and "--no-such\\nflag" in line and "\x1b" not in line


@pytest.mark.parametrize("error, status", [
    (None, 0), (InputError(), 2), (MemoryError(), 2), (KeyboardInterrupt(), 130), (ending.Ended(signal.SIGTERM), 143),
    (RuntimeError(), 1)])
def test_each_kind_of_end_has_one_status(error, status):
    assert ending.status_of(error) == status


def test_a_run_goes_on_after_the_unforeseen(checkpoint_folder, monkeypatch, tmp_path):
    def failing(*given):
        if (tmp_path / "saved" / "progress" / "layer-00000.json").exists():
            raise RuntimeError("surprise")
        return add_batch(*given)

    command = [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", *SMALL, "--save"]
    add_batch = SparseGPT.add_batch
    with monkeypatch.context() as patch:
        patch.setattr(SparseGPT, "add_batch", failing)
        assert run(llama.FAMILY, *command, tmp_path / "saved") == 1
    assert run(llama.FAMILY, *command, tmp_path / "saved", "--resume") == 0
    assert run(llama.FAMILY, *command, tmp_path / "undisturbed") == 0
    assert contents(tmp_path / "saved") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("script", ["llama.py", "generate.py"])
def test_folders_that_are_gone_or_full_are_refused_before_libraries_meet_them(script, monkeypatch, capsys, tmp_path):
    main, (_, _), argv = COMMANDS[script]
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", "/nowhere")
        patch.setattr(ending.tempfile, "gettempdir", fails(FileNotFoundError()))
        assert main(argv) == 2
    assert capsys.readouterr().err == (f"{script}: error: TMPDIR /nowhere: no folder for temporary files can be "
                                       "written; name one, with room\n")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(argv) == 2
    assert capsys.readouterr().err == f"{script}: error: current folder: was removed; change to another one\n"


# ---- stdout ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stdout(monkeypatch):
    """Return a function that puts another stdout in place, of a descriptor."""
    opened = []

    def place(descriptor, **options):
        stream = open(descriptor, "w", **options)
        opened.append(stream)
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    yield place
    for stream in opened:
        stream.close()


def prints(*lines):
    return lambda *_, **__: [print(line, flush=True) for line in lines]


def pipe_without_a_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("place, status, said", [
    (pipe_without_a_reader, 141, ""),
    (lambda: os.open("/dev/full", os.O_WRONLY), 2, "error: stdout: cannot be written (No space left on device)\n")])
@pytest.mark.parametrize("argv", [None, ["--help"]])
def test_a_stdout_that_takes_nothing_ends_a_command(script, place, status, said, argv, monkeypatch, stdout, capsys,
                                                    temporary):
    main, (module, name), given = COMMANDS[script]
    monkeypatch.setattr(module, name, prints("some words"))
    stdout(place())
    assert main(argv or given) == status
    assert capsys.readouterr().err == (said and f"{script}: {said}")
    assert not list(temporary.iterdir())


def test_an_unbuffered_stdout_that_takes_nothing_is_recognized(monkeypatch, stdout, capsys):
    class Unbuffered(io.RawIOBase):
        def writable(self):
            return True

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "run", prints("some words"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Unbuffered(), write_through=True))
    monkeypatch.setattr(ending, "_discard", lambda _: None)  # it has no descriptor
    assert run(llama.FAMILY, "somebody/model", "builtin") == 2
    assert capsys.readouterr().err == "llama.py: error: stdout: cannot be written (No space left on device)\n"
    monkeypatch.undo()  # or it complains when it is closed


def test_a_stdout_of_few_characters_shows_the_others_as_escapes(monkeypatch, stdout, tmp_path):
    monkeypatch.setattr(pipeline, "run", prints("é … \udcc3"))
    stream = stdout(tmp_path / "log", encoding="ascii")
    assert run(llama.FAMILY, "somebody/model", "builtin") == 0
    stream.flush()
    assert (tmp_path / "log").read_text() == "\\xe9 \\u2026 \\udcc3\n"


def test_closed_streams_swallow_all(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(pipeline, "run", lambda *_: print("words", sys.stderr.isatty()))
    assert run(llama.FAMILY, "somebody/model", "builtin") == 0
    assert run(llama.FAMILY, "somebody/model", "nowhere") == 2


def test_unix_tools_find_a_stdout_that_python_left_in_order():
    """Through the interpreter's own end, where it flushes once more."""
    for given, status in (("head -0", 141), ("cat > /dev/null", 0)):
        line = f'"$0" results.py --help | {given}; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", line, sys.executable], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, "")


# ---- signals ---------------------------------------------------------------------------------------------------


def wait_after_first_layer(temporary, errors):
    """Let the temporary files be there, and wait while the first layer is written, in the thread that does it."""
    with open(errors, "w") as output:
        os.dup2(output.fileno(), 2)
    ending.tempfile.tempdir = str(temporary)
    columns.fastest = lambda *_: columns.walk_columns  # loading the compiled ones takes longer than a run

    append = streaming._append

    def slow(stream, tensor):
        append(stream, tensor)
        Path(f"{errors}.waits").touch()
        time.sleep(0.2)

    streaming._append = slow


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "ended by SIGHUP"),
                                          (signal.SIGINT, "interrupted")])
def test_a_signal_leaves_no_pruned_layers(number, name, fork, checkpoint_folder, tmp_path, temporary):
    errors = tmp_path / "errors"
    process = fork(command, "llama", [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", *SMALL], os.devnull,
                   wait_after_first_layer, (temporary, errors))
    while not Path(f"{errors}.waits").exists():
        assert process.is_alive(), errors.read_text()
        time.sleep(0.01)
    assert list(temporary.rglob("layer-00000.safetensors"))
    os.kill(process.pid, number)
    if number == signal.SIGHUP:
        os.kill(process.pid, number)  # as a terminal that closes, and its shell
    process.join(60)
    assert process.exitcode == 128 + number
    assert errors.read_text() == f"llama.py: {name}\n"
    assert not list(temporary.iterdir())


def test_signals_act_as_before_after_a_run_and_an_ignored_one_stays_ignored(monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(llama.FAMILY, "somebody/model", "builtin") == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert run(llama.FAMILY, "somebody/model", "builtin") == 129
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- torchrun --------------------------------------------------------------------------------------------------


def test_torchrun_reports_a_refusal_of_all_processes_once():
    done = subprocess.run([*TORCHRUN, "3", "llama.py", "somebody/model", "nowhere"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "llama.py: error: argument dataset: " in done.stderr
    assert sum(line.startswith("llama.py: error: ") for line in done.stderr.splitlines()) == 1
    assert done.stderr.count("exitcode  :") == 1 and "exitcode  : 2 " in done.stderr


def test_what_stops_a_later_process_only_is_in_the_report_of_torchrun(monkeypatch, capsys, tmp_path):
    as_rank(1, 2, 29500)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(ending, "PATIENCE", 0)
    assert end("llama.py", InputError("words"), monkeypatch) == 2
    assert capsys.readouterr().err == "llama.py: error: words (process 1)\n"
    failure = ProcessFailure(1, os.getpid(), 2, str(tmp_path / "error.json"))
    assert failure.message["extraInfo"]["py_callstack"] == "llama.py: error: words"
    assert time.time() - failure.timestamp < 10


def test_later_processes_leave_signals_alone(monkeypatch):
    as_rank(1, 2, 29500)
    handlers = []
    monkeypatch.setattr(pipeline, "run", lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)))
    assert run(llama.FAMILY, "somebody/model", "builtin") == 0
    assert handlers == [signal.SIG_DFL], "it would hang in one that waits for the first process"
