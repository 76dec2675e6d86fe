"""Small files that are written whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

from mixgpt.common.errors import InputError


def check_writable(flag, path):
    """Refuse a file that could not be written, before the work; folders that are missing will be made.

    flag: what names the file on the command line. Leaves nothing behind.
    """
    if Path(path).is_dir():
        raise InputError(f"{flag} {path}: is a folder; name a file")
    parent = Path(path).absolute().parent
    while not os.path.lexists(parent):  # a link that leads nowhere is there, and cannot be written
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise _refusal(flag, path, error) from error


def write(flag, path, text):
    """Write text with the folders above it. Raises InputError, without a half-written file, where that fails."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # runs that share a file write it side by side
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise _refusal(flag, path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _refusal(flag, path, error):
    return InputError(f"{flag} {path}: cannot be written ({error.strerror}); name another file")
