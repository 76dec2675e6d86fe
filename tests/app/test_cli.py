"""Check that the command line answers before anything expensive is imported."""

import dataclasses
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import ROOT, slow_but

from mixgpt.app.cli import parse
from mixgpt.app.options import Options
from mixgpt.app.settings import Settings
from mixgpt.kernels import columns

CHECK = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
try:
    (runpy.run_path if script.endswith(".py") else runpy.run_module)(script, run_name="__main__")
except SystemExit as stop:
    print("status", stop.code)
expensive = {"torch", "transformers", "datasets", "numba", "matplotlib", "lm_eval", "wandb"}
print("imported", sorted(expensive.intersection(sys.modules)))
"""
ANSWERS = {
    "opt.py --help": 0, "generate.py --help": 0, "results.py --help": 0,
    "opt.py facebook/opt-125m c4 --sparsity 1.5": 2,
    "opt.py facebook/opt-125m nowhere": 2, "opt.py facebook/opt-125m c4 --no-such-flag": 2,
    "opt.py ./nowhere c4": 2, "llama.py nowhere.gguf c4": 2, "opt.py facebook/opt-125m c4 --data-dir nowhere": 2,
    "opt.py facebook/opt-125m c4 --save-format sparse": 2, "generate.py nowhere.gguf Hello": 2,
    "results.py nowhere.json": 2,
    "mixgpt": 0, "mixgpt --version": 0, "mixgpt prune --help": 0, "mixgpt prnue": 2, "mixgpt results nowhere.json": 2,
    "mixgpt prune facebook/opt-125m nowhere": 2, "mixgpt eval facebook/opt-125m --sparsity .5": 2,
    "mixgpt.app.cli facebook/opt-125m nowhere": 2, "mixgpt.app.generate nowhere.gguf Hello": 2,
    "mixgpt.app.results nowhere.json": 2,
}


@pytest.mark.parametrize("command", slow_but(["opt.py --help", "mixgpt", "mixgpt results nowhere.json"], ANSWERS))
def test_what_needs_no_model_is_answered_before_pytorch_is_imported(command):
    done = subprocess.run([sys.executable, "-c", CHECK, *command.split()], cwd=ROOT, capture_output=True, text=True)
    *_, status, imported = done.stdout.splitlines()
    assert status == f"status {ANSWERS[command]}" and imported == "imported []", done.stderr
    assert done.stderr.count("\n") == 1 if ANSWERS[command] else len(done.stdout.splitlines()) > 2
    assert command != "opt.py --help" or "on the unpruned layer (default: True)" in " ".join(done.stdout.split())


def test_the_published_spellings_of_flags_are_the_same_flags():
    published = ["--sparsity_way", "layer-level", "--sensitivity_file=a_b.json", "--prune_only", "fc_1", "--log_wandb",
                 "--wandb_project", "p", "--data_dir", "d"]
    hyphens = ["--sparsity-way", "layer-level", "--sensitivity-file=a_b.json", "--prune-only", "fc_1", "--log-wandb",
               "--wandb-project", "p", "--data-dir", "d"]
    old, new = (parse("opt.py", ["opt", "builtin", "--sparsity", ".5", *flags]) for flags in (published, hyphens))
    assert old == new == Settings("opt", "builtin", sparsity=0.5, sparsity_way="layer-level", prune_only="fc_1",
                                  sensitivity_file="a_b.json", log_wandb=True, wandb_project="p", data_dir="d")


def test_magnitude_is_another_name_of_gmp(capsys):
    old, new = (parse("opt.py", ["opt", "builtin", "--sparsity", ".5", flag]) for flag in ("--gmp", "--magnitude"))
    assert old == new == Settings("opt", "builtin", sparsity=0.5, gmp=True)
    with pytest.raises(SystemExit):
        parse("opt.py", ["--help"])
    assert "--gmp, --no-gmp, --magnitude, --no-magnitude" in capsys.readouterr().out


WINDOWS = """
import runpy, signal, sys
sys.platform, sys.modules["fcntl"], sys.modules["resource"] = "win32", None, None
del signal.SIGHUP
import mixgpt
try:
    mixgpt.prune("model", "builtin", sparsity=0.5)
except ImportError as error:
    print(error, file=sys.stderr)
runpy.run_path("opt.py", run_name="__main__")
"""


def test_windows_gets_one_line_that_names_wsl():
    done = subprocess.run([sys.executable, "-c", WINDOWS], cwd=ROOT, capture_output=True, text=True)
    line = "mixgpt runs on Linux and macOS; on Windows, run it in WSL, which `wsl --install` sets up\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{line}opt.py: error: {line}")


def test_the_options_of_prune_are_those_of_the_flags_in_name_and_type():
    """Some take more, which becomes the type of the field: paths, lists of names, devices and dtypes of PyTorch."""
    hints = get_type_hints(Options, None, {"torch": torch})
    wider = {str | None: str | Path | None, tuple[str, ...]: Sequence[str], object: str | torch.device | None,
             str: str | torch.dtype}
    fields = {field.name: field.type for field in dataclasses.fields(Settings)}
    assert hints == {name: hints[name] if hints[name] == kind else wider.get(kind) for name, kind in fields.items()
                     if name not in ("model", "dataset")}


@pytest.mark.parametrize("options", ["", "--no-true-sequential"])
def test_ten_frames_lead_from_main_to_the_line_that_zeroes(options, prune, monkeypatch):
    frames = []

    def walk(*args):
        names = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT / "mixgpt"))]
        frames.append(names[names.index("main"):])
        return columns.walk_columns(*args)

    monkeypatch.setattr(columns, "fastest", lambda W, grid: walk)
    prune("llama", "--sparsity .5", options)
    assert frames and all(len(names) + 1 <= 10 for names in frames), frames[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only GNU's OpenMP shows its spin count")
@pytest.mark.parametrize("entry, given, spins", [
    ("opt", {}, "1000"), ("generate", {}, "1000"), ("mixgpt.__main__", {}, "1000"),
    ("opt", {"GOMP_SPINCOUNT": "7"}, "7"), ("opt", {"OMP_WAIT_POLICY": "active"}, "30000000000")], ids=str)
def test_openmp_spins_for_a_short_time_at_barriers_unless_the_user_says_else(entry, given, spins):
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", f"import {entry}, torch"], capture_output=True, text=True, check=True,
                          cwd=ROOT, env=own | {"OMP_DISPLAY_ENV": "verbose"} | given)
    assert {*re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)} == {spins}
