"""Which version of this program runs, and in which of torchrun's processes. Needs no PyTorch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mixgpt.common.errors import InputError

__version__ = "1.0.0"

UNSUPPORTED = ("mixgpt runs on Linux and macOS; on Windows, run it in WSL, which `wsl --install` sets up"
               if sys.platform == "win32" else "")  # which cannot lock files as they do, and knows no SIGHUP

SCHEMA = 1  # of mixgpt.json and progress/run.json; to be raised when older files can no longer be read


def world(variable: str = "WORLD_SIZE") -> int:
    """Return the number of processes. variable: LOCAL_WORLD_SIZE for those on this machine, all if it is not set."""
    return int(os.environ.get(variable) or os.environ.get("WORLD_SIZE") or 1)


def rank(variable: str = "RANK") -> int:
    """Return the number of this process, 0 for a single one. variable: LOCAL_RANK for the number on its machine."""
    return int(os.environ.get(variable) or 0) if world() > 1 else 0


def signature() -> dict[str, Any]:
    """Return what files of this program hold: their schema, the version and, in a checkout, the git commit."""
    return {"schema": SCHEMA, "program": {"version": __version__, "commit": commit()}}


def commit() -> str | None:
    """Return the git commit of the checkout that this program runs from, "-dirty" if files were changed; else None."""
    root = Path(__file__).parents[2]
    place = [f"--git-dir={root / '.git'}", f"--work-tree={root}"]  # not those of a folder above it
    command = ["git", *place, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None


def check_signature(content: dict[str, Any], place: str) -> None:
    """Raise InputError if the content of a file was written in another schema. place: names the file."""
    if content.get("schema") != SCHEMA:
        version = (content.get("program") or {}).get("version", "unknown")
        raise InputError(f"{place} was written by version {version} of this program (schema {content.get('schema')}); "
                         f"this is version {__version__} (schema {SCHEMA})")
