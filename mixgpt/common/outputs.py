"""Files that options write: checked before the work, and written in one step."""

import os
from pathlib import Path

from mixgpt.common.errors import InputError
from mixgpt.common.files import replacing, try_writing

PICTURES = (".png", ".pdf", ".svg")


def check(paths, overwrite, folder=None):
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
            raise InputError(f"{flag} {path}: lies in the folder of --save; name a file elsewhere")
        places[place] = flag


def _check_path(flag, path, overwrite):
    if flag == "--plot" and path.suffix not in PICTURES:
        raise InputError(f"{flag} {path}: must end in {', '.join(PICTURES)}")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{flag} {path}: is not a file; name a file")
        if path.exists() and not overwrite:
            raise InputError(f"{flag} {path}: exists; give --overwrite to replace it, or name another file")
        try_writing(path)
    except OSError as error:
        raise _refusal(flag, path, error) from error


def write(flag, path, content):
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
