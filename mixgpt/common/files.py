"""Atomic writes, the cache, and the files that options write."""

import contextlib
import os
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from mixgpt.common.errors import InputError, one_line, reading

PICTURES = (".png", ".pdf", ".svg")


@contextlib.contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """Yield a temporary path, one for each process; without an error it is flushed to disk and renamed to `path`."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open() as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return the cache directory shared by all runs: mixgpt in $XDG_CACHE_HOME or ~/.cache."""
    with reading("XDG_CACHE_HOME: must name a folder for the cache"):  # raised where a user has no home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixgpt"


def check_outputs(paths: Mapping[str, str | Path], overwrite: bool) -> None:
    """Raise InputError for files {flag: path} that exist and may not be replaced, or that cannot be written."""
    flags = {}  # by file
    for flag, path in paths.items():
        file = Path(path)
        if (other := flags.setdefault(os.path.realpath(path), flag)) != flag:
            raise InputError(f"{flag} {path}: is the file of {other}, too; name another file")
        if flag == "--plot" and file.suffix not in PICTURES:
            raise InputError(f"{flag} {path}: must end in {', '.join(PICTURES)}")
        with writing(f"{flag} {path}:"):
            if file.exists() and not file.is_file():
                raise InputError(f"{flag} {path}: is not a file; name a file")
            if file.exists() and not overwrite:
                raise InputError(f"{flag} {path}: exists; give --overwrite to replace it, or name another file")
            nearest = next(parent for parent in file.absolute().parents if parent.exists())
            tempfile.TemporaryFile(dir=nearest).close()  # tries whether it can be written


def write_output(flag: str, path: str | Path, content: str | bytes) -> None:
    """Write text or bytes, creating parent folders. Raises InputError on failure, leaving no partial file."""
    with writing(f"{flag} {path}:"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(os.path.realpath(path)) as partial:  # a link stays a link
            partial.write_bytes(content if isinstance(content, bytes) else
                                content.encode(errors="surrogateescape"))  # names of files need not be text


@contextlib.contextmanager
def writing(subject: str, advice: str = "name another file") -> Generator[None]:
    """Raise InputError for a full, unwritable or missing disk. subject: what is written."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise  # tokenizers raises a plain Exception
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{subject} cannot be written ({reason}); {advice}") from error
