"""Turn whatever ends a command line into an exit status and one line on stderr. Needs no PyTorch."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import signal
import sys
import tempfile
import traceback
from types import SimpleNamespace

from mixgpt.common import program
from mixgpt.common.errors import InputError, is_out_of_memory, one_line

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numba", "numpy")
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """A scheduler or a closing terminal ends this process. Like Ctrl-C, it passes all handlers of errors."""


@contextlib.contextmanager
def reported(script, argv, remedy):
    """Turn what ends the block, a whole command line, into one line on stderr and an exit status.

    Yields an object whose `status` is then 0, or what the block has set. 1: a bug, whose traceback is in the file that
    the line names. 2: InputError, or the host is out of memory; remedy says what to lower. 130: Ctrl-C. 141, without a
    line: stdout was closed, as by `| head`. 143: SIGTERM or SIGHUP.
    """
    end = SimpleNamespace(status=0)
    try:
        with _terminable():
            yield end
        sys.stdout.flush()
    except SystemExit as stop:  # argparse, after --help
        end.status = stop.code or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its exit
        end.status = 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        process = f" (process {program.rank()})" if program.rank() else ""
        print(f"{script}: {_explanation(script, argv, error, remedy)}{process}", file=sys.stderr, flush=True)
        end.status = status_of(error)


def status_of(error):
    """Return the exit status of a run that an exception ends, 0 for None."""
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    return 2 if isinstance(error, InputError) or is_out_of_memory(error) else 1


def _explanation(script, argv, error, remedy):
    """Return what ended a run, in one line; a bug's traceback goes to a file."""
    if isinstance(error, InputError):
        return f"error: {one_line(error)}"
    if isinstance(error, KeyboardInterrupt):
        line = "terminated" if isinstance(error, Terminated) else "interrupted"
    elif is_out_of_memory(error):
        line = f"error: out of memory; {remedy}"
    else:
        line = (f"error: unexpected {type(error).__name__}: {one_line(error):.300}; please report it with "
                f"{_traceback_file(script, argv, error)}, which has the traceback")
    return "; ".join([line, *getattr(error, "__notes__", ())])


def _traceback_file(script, argv, error):
    """Write traceback, command and versions to a new file. Returns its path."""
    with tempfile.NamedTemporaryFile("w", prefix=f"{script}-", suffix=".txt", delete=False) as file:
        print(shlex.join(["python", script, *argv]), file=file)
        print(f"Python {platform.python_version()} on {platform.platform()}", file=file)
        for name in PACKAGES:
            print(name, importlib.metadata.version(name), file=file)
        traceback.print_exception(error, file=file)
    return file.name


@contextlib.contextmanager
def _terminable():
    """Let SIGTERM and SIGHUP raise `Terminated` within the block, so that temporary files are removed.

    Only in the first process, as the others keep no files and may hang in one that waits for it. A signal that is
    ignored, as under nohup, stays so.
    """
    def terminate(*_):
        for number in handled:  # a terminal that closes sends two
            signal.signal(number, signal.SIG_IGN)
        raise Terminated

    handled = [number for number in SIGNALS if program.rank() == 0 and signal.getsignal(number) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
