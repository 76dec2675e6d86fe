"""Which version of this program wrote a file, and whether this one can read it."""

import subprocess
from pathlib import Path

from mixgpt import __version__
from mixgpt.common.errors import InputError

SCHEMA = 1  # of mixgpt.json and progress/run.json; to be raised when a file of before cannot be read any more


def signature():
    """Return what files of this program hold: their schema, the version and, in a checkout, the git commit."""
    return {"schema": SCHEMA, "program": {"version": __version__, "commit": commit()}}


def commit():
    """Return the git commit of the checkout that this program runs from, "-dirty" if files were changed; else None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout of another user
        return None


def check_signature(content, place):
    """Raise InputError if the content of a file, a dict, was written in another schema. place: names the file."""
    schema = content.get("schema")
    if schema != SCHEMA:
        program = content.get("program") or {}
        writer = f"version {program.get('version')}" if program else "an older version"
        raise InputError(f"{place} was written by {writer} of this program (schema {schema}); this is version "
                         f"{__version__} (schema {SCHEMA})")
