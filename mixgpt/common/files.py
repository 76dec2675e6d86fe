"""Atomic writes of files and directories, the cache, and the files that options write."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from mixgpt.common.errors import InputError

PICTURES = (".png", ".pdf", ".svg")


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


def cache_folder():
    """Return the cache directory shared by all runs: mixgpt in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixgpt"


def check_outputs(paths, overwrite, folder=None):
    """Raise InputError for files that exist and may not be replaced, or that cannot be written; leaves nothing behind.

    paths: {flag: path}. overwrite: whether files may be replaced. folder: that of --save, in which only the saved model
    is written.
    """
    places = {}
    for flag, path in paths.items():
        _check_path(flag, Path(path), overwrite)
        place = Path(os.path.realpath(path))
        if place in places:
            raise InputError(f"{flag} {path}: is the file of {places[place]}; name another file")
        if folder and place.is_relative_to(os.path.realpath(folder)):
            raise InputError(f"{flag} {path}: is in the folder of --save; name a file elsewhere")
        places[place] = flag


def _check_path(flag, path, overwrite):
    if flag == "--plot" and path.suffix not in PICTURES:
        raise InputError(f"{flag} {path}: must end in {', '.join(PICTURES)}")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{flag} {path}: is not a file; name a file")
        if path.exists() and not overwrite:
            raise InputError(f"{flag} {path}: exists; give --overwrite to replace it, or name another file")
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()  # tries whether it can be written
    except OSError as error:
        raise _refusal(flag, path, error) from error


def write_output(flag, path, content):
    """Write text or bytes, creating parent folders. Raises InputError on failure, leaving no partial file.

    A symbolic link stays a link. flag: the command-line flag of the file.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(os.path.realpath(path)) as partial:
            partial.write_bytes(content if isinstance(content, bytes) else
                                content.encode(errors="surrogateescape"))  # names of files need not be text
    except OSError as error:
        raise _refusal(flag, path, error) from error


def _refusal(flag, path, error):
    return InputError(f"{flag} {path}: cannot be written ({error.strerror}); name another file")
