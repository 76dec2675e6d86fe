"""File names in a run's output directory."""

import os
from pathlib import Path

RECORD = "mixgpt.json"  # of a run: settings, versions, every matrix, perplexities
PROGRESS = "progress"  # a directory, until the run has ended: the resume state


def begun(path):
    """Return whether a directory holds an unfinished run."""
    return os.path.lexists(Path(path) / PROGRESS / "run.json")
