"""Files and folders that are written whole or not at all, the cache, and whether a path can be written."""

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
    """Give a path to write to within the block, whose file then takes the place of `path`, on the disk by then.

    After an error the file at `path` is as it was. Several processes may write to one path side by side.
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
    """Give a folder to write to within the block, which is at `path` then, on the disk by then; one process at a time.

    After an error there is none.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
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
    """Be the only process within the block that has locked the file at `path`; wait while another has. It stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def os_errors():
    """Let what safetensors and tokenizers raise where a file cannot be written be an OSError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, SafetensorError) and type(error) is not Exception:  # tokenizers has none of its own
            raise
        raise OSError(str(error)) from error


def cache_folder():
    """Return the folder for what is computed once and used by many runs: mixgpt in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixgpt"


def check_room(folder, nbytes):
    """Raise OSError where the disk of a folder has less than nbytes left."""
    if shutil.disk_usage(folder).free < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(flag, path, text):
    """Write text with the folders above it. Raises InputError, without a half-written file, where that fails.

    flag: what names the file on the command line.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text)
    except OSError as error:
        raise _refusal(flag, path, error) from error


def nearest_folder(path):
    """Return what is there of a path: itself, or the nearest folder above it."""
    path = Path(path).absolute()
    while not os.path.lexists(path):  # a link that leads nowhere is there, and cannot be written
        path = path.parent
    return path


def try_writing(folder):
    """Write to a folder, and leave nothing behind. Raises OSError where that fails."""
    tempfile.TemporaryFile(dir=folder).close()


def check_writable(flag, path):
    """Refuse a file that could not be written, before the work; folders that are missing will be made.

    flag: what names the file on the command line. Leaves nothing behind.
    """
    if Path(path).is_dir():
        raise InputError(f"{flag} {path}: is a folder; name a file")
    try:
        try_writing(nearest_folder(Path(path).absolute().parent))
    except OSError as error:
        raise _refusal(flag, path, error) from error


def _refusal(flag, path, error):
    return InputError(f"{flag} {path}: cannot be written ({error.strerror}); name another file")
