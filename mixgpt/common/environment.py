"""What environment variables say: which of several processes this is, and where the hub is. Needs no PyTorch."""

import os
import tempfile
from urllib.parse import urlsplit

from mixgpt.common.errors import InputError

LARGEST_PORT = 65_535


def world_size():
    """Return the number of processes; 1 if WORLD_SIZE is not set. Raises InputError if it is not a number."""
    return _number("WORLD_SIZE", 1, 1)


def rank():
    """Return the number of this process among all; 0 for a single one, whatever RANK says."""
    return _number("RANK", 0, 0, world_size() - 1) if world_size() > 1 else 0


def local_rank():
    """Return the number of this process on its machine; 0 for a single one, whatever LOCAL_RANK says."""
    return _number("LOCAL_RANK", 0, 0) if world_size() > 1 else 0


def check():
    """Raise InputError for surroundings that cannot be used: variables of torchrun, HF_ENDPOINT, folders."""
    if world_size() > 1:
        needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if not os.environ.get(name)]:
            raise InputError(f"WORLD_SIZE {world_size()}: {', '.join(missing)} must be set too; start with torchrun, "
                             "or unset WORLD_SIZE")
        rank()
        local_rank()
        _number("MASTER_PORT", None, 0, LARGEST_PORT)
    _check_endpoint()
    _check_folders()


def _number(name, default, least, most=None):
    """Return the whole number in a variable, `default` if it is not set or empty."""
    given = os.environ.get(name)
    if not given:
        return default
    number = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else -1
    if number < least or most is not None and number > most:
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} {given}: must be a whole number, {limits}, as torchrun sets it; start with torchrun, "
                         "or unset WORLD_SIZE")
    return number


def _check_endpoint():
    given = os.environ.get("HF_ENDPOINT")
    if not given:
        return
    try:
        parts = urlsplit(given)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port >= 0)
    except ValueError:  # the port, or brackets around the host
        usable = False
    if not usable or not given.isascii() or not given.isprintable() or " " in given:
        raise InputError(f"HF_ENDPOINT {given}: must be the URL of a hub, such as https://huggingface.co")


def _check_folders():
    try:
        os.getcwd()
    except FileNotFoundError as error:  # libraries of PyTorch end the process then
        raise InputError("current folder: was removed; change to another one") from error
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise InputError(f"TMPDIR {os.environ.get('TMPDIR', 'is not set')}: no folder for temporary files can be "
                         "written; name one, with room") from error
