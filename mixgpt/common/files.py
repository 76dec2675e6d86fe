"""Files that are written whole or not at all, and whether a path can be written, before the work."""

import contextlib
import os
import tempfile
from pathlib import Path

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
