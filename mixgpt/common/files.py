"""Atomic writes of files and directories, locks, and the cache."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path to write to; at the end of the block it is flushed to disk and renamed to `path`.

    After an error the file at `path` is unchanged. Several processes may write to one path concurrently.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path):
    """Yield a temporary directory, flushed and renamed to `path` at the end of the block; one process at a time.

    After an error there is no directory at `path`.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir()
        yield partial
        for written in (*partial.rglob("*"), partial):
            _flush(written)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path):
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def locked(path):
    """Hold an exclusive lock on the file at `path` within the block, waiting for it. The file is not removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def os_errors():
    """Turn the errors of safetensors and tokenizers on writing a file into OSError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, SafetensorError) and type(error) is not Exception:  # tokenizers raises plain Exception
            raise
        raise OSError(str(error)) from error


def cache_folder():
    """Return the cache directory shared by all runs: mixgpt in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixgpt"


def check_room(folder, nbytes):
    """Raise OSError if the disk of a directory has less than nbytes free."""
    if shutil.disk_usage(folder).free < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def try_writing(path):
    """Create and delete a file in the nearest existing folder above a path. Raises OSError if that fails."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()
