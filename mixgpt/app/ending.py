"""How a command line ends: an exit status, and one line on stderr for whatever stopped it. Needs no PyTorch."""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback

from mixgpt.common import environment
from mixgpt.common.errors import InputError, is_out_of_memory, one_line

ASKED_TO_END = (signal.SIGTERM, signal.SIGHUP)  # by schedulers, and by a terminal that closes
LONGEST = 300  # characters of an unforeseen error's message; the file has all
PATIENCE = 2  # seconds in which torchrun ends the other processes, or in which a signal repeats the one before
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numba", "numpy")


class Ended(KeyboardInterrupt):
    """A signal asks this process to end. Like Ctrl-C, it passes all handlers of errors."""

    def __init__(self, number):
        super().__init__()
        self.number = number


def run(script, argv, body, remedy):
    """Call body(), a whole command line, and say in one line what stopped it. Returns the exit status.

    0: done. 1: an unforeseen error, whose traceback is in the file that the line names. 2: InputError, or memory or the
    room for stdout is used up. 128 + n: signal n, that is 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM; 141, without a line:
    stdout was closed, as by `| head`. remedy: what to do about a lack of memory.
    """
    _prepare_streams()
    try:
        with _signals_raised():
            status, line = body() or 0, None
    except SystemExit as stop:  # argparse, after --help
        status, line = stop.code or 0, None
    except KeyboardInterrupt as stop:
        status, line = _interruption(stop)
    except InputError as error:
        status, line = status_of(error), f"error: {error}"
    except Exception as error:  # the last line of defence
        status, line = _failure(script, argv, error, remedy)
    if broken := _write_error(sys.stdout):
        if not line and not status:
            status, line = _unwritable(broken)
        _discard(sys.stdout)
    if line:
        _say_once(f"{script}: {line}")
    return status


def say(line):
    """Print one line on stderr, with escapes for line breaks and whatever else names may do to a terminal."""
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def status_of(error):
    """Return the exit status of a run that an exception ends, of one that is done for None."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT)
    return 2 if isinstance(error, InputError) or is_out_of_memory(error) else 1


def _interruption(stop):
    number = getattr(stop, "number", signal.SIGINT)
    name = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return status_of(stop), name + _notes(stop)


def _failure(script, argv, error, remedy):
    """Return the exit status and the line for an exception that is no InputError."""
    if isinstance(error, OSError) and not error.filename:  # try once more: an unbuffered stream forgets what it refused
        if broken := _write_error(sys.stdout, "\n") or _write_error(sys.stderr):
            return _unwritable(broken, _notes(error))
    if is_out_of_memory(error):
        return status_of(error), f"error: out of memory; {remedy}{_notes(error)}"
    text = one_line(error)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return status_of(error), (f"error: unforeseen {type(error).__name__}: {text}; {_kept(script, argv, error)}"
                              f"{_notes(error)}")


def _unwritable(error, notes=""):
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, None
    return 2, f"error: stdout: cannot be written ({error.strerror}){notes}"


def _notes(error):
    """Return what was added to an exception on its way."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _kept(script, argv, error):
    """Write traceback, command and versions to a new file. Returns where it is, for the line."""
    text = "\n".join([shlex.join(["python", script, *argv]), *_versions(), "",
                      "".join(traceback.format_exception(error))])
    for folder in (None, os.curdir):  # None: the folder for temporary files
        try:
            descriptor, path = tempfile.mkstemp(prefix=f"{script}-", suffix=".txt", dir=folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return f"please report it with {os.path.abspath(path)}, which has the traceback"
        except OSError:  # no folder for them, or no room in it
            continue
    print(text, file=sys.stderr)
    return "please report it with the traceback above, which could not be written to a file"


def _versions():
    yield f"Python {platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name} {importlib.metadata.version(name)}"


# ---- signals ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals_raised():
    """Raise Ended within the block when a signal asks to end, so that temporary files are removed.

    Of several processes only the first does that: the others keep none, and may hang in one that waits for it. A signal
    that is ignored, as under nohup, stays so.
    """
    if threading.current_thread() is not threading.main_thread() or _rank():
        yield
        return
    last = -math.inf

    def end(number, _):
        nonlocal last
        if time.monotonic() - last > PATIENCE:  # a terminal that closes sends two, the second while files are removed
            last = time.monotonic()
            raise Ended(number)

    taken = [number for number in ASKED_TO_END if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


# ---- streams ---------------------------------------------------------------------------------------------------


def _prepare_streams():
    """Let stdout and stderr take everything: nothing if they are closed, all characters if they know only some."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors != "backslashreplace":
        sys.stdout.reconfigure(errors="backslashreplace")


def _write_error(stream, text=""):
    """Return the OSError that keeps a stream from taking a text and what was printed before; None if there is none."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        return error


def _discard(stream):
    """Drop what a stream could not take: Python would try once more at its exit, and complain."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _rank():
    try:
        return environment.rank()
    except InputError:  # which `body` reports
        return 0


def _say_once(line):
    """Print the last line, in the first process of torchrun; in the others only if that one goes on."""
    number, report = _rank(), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if number and report:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # any other status has 7 lines in the report of torchrun
        time.sleep(PATIENCE)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError), open(report, "w") as file:
            json.dump({"message": {"message": line, "extraInfo": {"py_callstack": line,
                                                                  "timestamp": str(int(time.time()))}}}, file)
    say(f"{line} (process {number})" if number else line)
