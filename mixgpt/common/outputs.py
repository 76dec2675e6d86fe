"""Files that options write: which of them may be replaced, checks before the work, and the writing."""

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from mixgpt.common.errors import InputError
from mixgpt.common.files import nearest_folder, partial_of, replacing, try_writing

ENDS = 2**16  # bytes at the beginning and at the end of a file that are looked at
SOFTWARE = "MixGPT"  # the mark in the metadata of a picture


@dataclass(frozen=True)
class Kind:
    """What an option writes, and therefore may replace."""

    name: str  # in messages
    pattern: bytes  # regular expression that matches the two ends of such a file, and of no other
    suffixes: tuple[str, ...] = ()  # that its name may have; empty: any


RECORD = Kind("a file of --record", rb'\{\s*"settings":\s*\{\s*"model":\s')
TABLE = Kind("a file of --csv", rb"model,method,sparsity,wbits,")
TRACES = Kind("a file of traces", rb'\{\s*"key":\s*\{\s*"weights":\s')
PICTURE = Kind("a file of --plot", rb"\x89PNG.*Software\0%b|%%PDF-.*/Creator \(%b\)|<\?xml.*<dc:title>%b</dc:title>"
               % ((SOFTWARE.encode(),) * 3), (".png", ".pdf", ".svg"))


def check_file(flag, path, kind):
    """Raise InputError for a path whose file is not of this `Kind`; a path without a file is fine.

    A symbolic link stands for what it leads to. flag: the command-line flag of the file.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode) and not re.match(kind.pattern, _ends(path), re.DOTALL):
            raise InputError(f"{flag} {path}: is not {kind.name}, and not replaced; name another file")
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise InputError(f"{flag} {path}: is a link to a file that does not exist; name another file") from None
        return
    except OSError as error:
        raise _refusal(flag, path, error) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise InputError(f"{flag} {path}: is a {kinds.get(stat.S_IFMT(mode), 'device')}; name a file")


def _ends(path):
    with open(path, "rb") as file:
        head = file.read(ENDS)
        file.seek(max(os.fstat(file.fileno()).st_size - ENDS, len(head)))
        return head + file.read(ENDS)


def check_writable(flag, path, kind):
    """Raise InputError early for a file that could not be written, or would replace one that is not of this `Kind`.

    Missing folders will be created. flag: the command-line flag of the file. Leaves nothing behind.
    """
    if kind.suffixes and Path(path).suffix not in kind.suffixes:
        raise InputError(f"{flag} {path}: must end in {', '.join(kind.suffixes)}")
    check_file(flag, path, kind)
    folder = nearest_folder(Path(path).absolute().parent)
    try:
        try_writing(folder)
        with contextlib.suppress(FileNotFoundError):
            partial_of(folder / Path(path).name).stat()  # its name may be too long
    except OSError as error:
        raise _refusal(flag, path, error) from error


def check_places(written, taken):
    """Raise InputError for a file to be written that lies in a place that is taken, or at the place of another.

    written: {flag: path}. taken: (name, path) of each file and folder in which only others write.
    """
    places = {f"{name} {path}": Path(os.path.realpath(path)) for name, path in taken}
    for flag, path in written.items():
        place = Path(os.path.realpath(path))
        for other, its in places.items():
            if place == its:
                raise InputError(f"{flag} {path}: is the same file as {other}; name another file")
            if its in place.parents:
                raise InputError(f"{flag} {path}: lies in {other}; name a file elsewhere")
            if place in its.parents:
                raise InputError(f"{flag} {path}: is to be a file, and the folder of {other}; name another file")
        places[f"{flag} {path}"] = place


def write(flag, path, content, kind):
    """Write text or bytes, creating parent directories. Raises InputError on failure, leaving no partial file.

    Replaces a file of this `Kind` only; a symbolic link to one stays a link. flag: the command-line flag of the file.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(os.path.realpath(path)) as partial:
            partial.write_bytes(content if isinstance(content, bytes) else
                                content.encode(errors="surrogateescape"))  # names of files need not be text
            check_file(flag, path, kind)  # again: another program may have put a file there during the work
    except OSError as error:
        raise _refusal(flag, path, error) from error


def _refusal(flag, path, error):
    return InputError(f"{flag} {path}: cannot be written ({error.strerror}); name another file")
