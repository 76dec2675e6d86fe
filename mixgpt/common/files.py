"""Atomic writes of files and directories, the cache, and checks that a path can be written."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from mixgpt.common.errors import InputError


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path to write to; at the end of the block it is flushed to disk and renamed to `path`.

    After an error the file at `path` is unchanged. Several processes may write to one path concurrently.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


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
            _to_disk(written)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
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


def write(flag, path, text):
    """Write text, creating parent directories. Raises InputError on failure, leaving no partial file.

    flag: the command-line flag of the file.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="surrogateescape")  # names of files need not be text
    except OSError as error:
        raise _refusal(flag, path, error) from error


def nearest_folder(path):
    """Return the path itself if it exists, else its nearest existing parent."""
    path = Path(path).absolute()
    while not os.path.lexists(path):  # a dangling link exists, and cannot be written
        path = path.parent
    return path


def try_writing(folder):
    """Create and delete a file in a directory. Raises OSError if that fails."""
    tempfile.TemporaryFile(dir=folder).close()


def check_writable(flag, path):
    """Raise InputError early for a file that could not be written; missing directories will be created.

    flag: the command-line flag of the file. Leaves nothing behind.
    """
    if Path(path).is_dir():
        raise InputError(f"{flag} {path}: is a folder; name a file")
    try:
        try_writing(nearest_folder(Path(path).absolute().parent))
    except OSError as error:
        raise _refusal(flag, path, error) from error


def _refusal(flag, path, error):
    return InputError(f"{flag} {path}: cannot be written ({error.strerror}); name another file")
