"""Run command lines in this process, on little text."""

import pytest
from conftest import read_little

from mixgpt.app import cli

SMALL = ["--nsamples", "4", "--seqlen", "32", "--eval", "builtin", "--device", "cpu"]


@pytest.fixture(autouse=True)
def short_builtin(monkeypatch, tmp_path_factory):
    """Read little text, and keep traces out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    read_little(monkeypatch)


def run(script, *arguments):
    """Run the command line of a script in this process. Returns the exit status."""
    return cli.main(script, [str(argument) for argument in arguments])
