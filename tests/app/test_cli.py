"""Check that the command line answers before anything expensive is imported."""

import subprocess
import sys
import traceback

import pytest
from conftest import ROOT, slow_but

from mixgpt.app.cli import parse
from mixgpt.app.settings import Settings
from mixgpt.kernels import columns

CHECK = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
try:
    runpy.run_path(script, run_name="__main__")
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
}


@pytest.mark.parametrize("command", slow_but(["opt.py --help", "results.py nowhere.json"], ANSWERS))
def test_what_needs_no_model_is_answered_before_pytorch_is_imported(command):
    done = subprocess.run([sys.executable, "-c", CHECK, *command.split()], cwd=ROOT, capture_output=True, text=True)
    *_, status, imported = done.stdout.splitlines()
    assert status == f"status {ANSWERS[command]}" and imported == "imported []", done.stderr
    assert ANSWERS[command] == 0 or done.stderr.count("\n") == 1
    assert command != "opt.py --help" or "on the unpruned layer (default: True)" in " ".join(done.stdout.split())


def test_the_published_spellings_of_flags_are_the_same_flags():
    published = ["--sparsity_way", "layer-level", "--sensitivity_file=a_b.json", "--prune_only", "fc_1", "--log_wandb",
                 "--wandb_project", "p", "--data_dir", "d"]
    hyphens = ["--sparsity-way", "layer-level", "--sensitivity-file=a_b.json", "--prune-only", "fc_1", "--log-wandb",
               "--wandb-project", "p", "--data-dir", "d"]
    old, new = (parse("opt.py", ["opt", "builtin", "--sparsity", ".5", *flags]) for flags in (published, hyphens))
    assert old == new == Settings("opt", "builtin", sparsity=0.5, sparsity_way="layer-level", prune_only="fc_1",
                                  sensitivity_file="a_b.json", log_wandb=True, wandb_project="p", data_dir="d")


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
