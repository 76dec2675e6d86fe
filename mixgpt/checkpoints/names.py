"""What the folder of a run holds, by name."""

from pathlib import Path

RECORD = "mixgpt.json"  # of a run: settings, versions, every matrix, perplexities
PROGRESS = "progress"  # a folder, until the run has ended: what it takes to go on


def begun(path):
    """Tell whether a folder holds a run that has begun and not ended."""
    return (Path(path) / PROGRESS / "run.json").is_file()
