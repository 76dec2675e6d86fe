"""The error that the command line reports in one line with exit status 2, and how libraries' errors become one."""

import contextlib
import errno
import signal
from collections.abc import Generator

# How libraries say that memory is used up, where they raise neither MemoryError nor ENOMEM.
EXHAUSTED = ("CUDA out of memory", "error: out of memory", "[CUDA]: out of memory", "STATUS_ALLOC_FAILED",
             "cusolverDnCreate", "DefaultCPUAllocator", "Cannot allocate memory", "failed to map segment",
             "std::bad_alloc", "can't start new thread")
TERSE = (KeyError, TypeError, AttributeError, ArithmeticError)  # whose messages say nothing without their class


class InputError(ValueError):
    """Report an unusable argument, file or checkpoint in one line: what was given, and what is accepted."""


class VerificationError(RuntimeError):
    """Report that a saved model reads back differently: a defect of this program or of the disk, not of the input."""


class Terminated(KeyboardInterrupt):
    """A scheduler or a closing terminal ends this process. Like Ctrl-C, it passes all handlers of errors."""


@contextlib.contextmanager
def reading(subject: str) -> Generator[None]:
    """Turn whatever a library raises, but for a lack of memory, into an InputError: the subject and the reason."""
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust code; a BaseException, in no module
        if isinstance(error, InputError) or is_out_of_memory(error) or not (panic or isinstance(error, Exception)):
            raise
        kind = f"{type(error).__name__}: " if isinstance(error, TERSE) else ""
        raise InputError(f"{subject}: {kind}{one_line(error):.400}") from error


def one_line(error: BaseException) -> str:
    """Return an exception's message, or else its name, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one of its causes, says that memory is used up."""
    chain = []
    while error and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return any(isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
               or any(words in str(error) for words in EXHAUSTED) for error in chain)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception says that a disk is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def status_of(error: BaseException) -> int:
    """Return the exit status of a run that an exception ends."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    return 2 if isinstance(error, InputError) or is_out_of_memory(error) or is_disk_full(error) else 1
