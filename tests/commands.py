"""Run command lines: in this process on little text, or by torchrun."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_little

from mixgpt.app import cli

SMALL = ["--nsamples", "4", "--seqlen", "32", "--eval", "builtin", "--device", "cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture(autouse=True)
def short_builtin(monkeypatch, tmp_path_factory):
    """Read little text, and keep traces out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    read_little(monkeypatch)


def run(script, *arguments):
    """Run the command line of a script in this process. Returns the exit status."""
    try:
        return cli.main(script, [str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        return stop.code


def torchrun(number, *arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen([*TORCHRUN, str(number), *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
