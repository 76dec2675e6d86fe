"""Go through the doors as a stranger does: installed, from a folder with files of the names that published code has."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run, short_builtin  # noqa: F401, a fixture
from conftest import ROOT, assert_same_weights
from test_imports import imports_of

import mixgpt
from mixgpt.datautils import load_rows

DOORS = ("sparsegpt", "quant", "datautils", "modelutils")
OPTIONS = "--sparsity .5 --nsamples 4 --seqlen 32 --eval --device cpu --save".split()
LOAD = """
import sys, mixgpt
from transformers import LlamaForCausalLM
assert "numba" not in sys.modules
assert (mixgpt.load("pruned", "cpu")[0].model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Build the wheel and install it where neither Python nor numba can write: __pycache__ is a file there."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "mixgpt", source / "mixgpt", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.*"), ROOT / "LICENSE"):
        if path.is_file():
            shutil.copy(path, source)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
                    "--no-build-isolation", "--no-compile", "--target", site, source], check=True)
    for folder in {path.parent for path in site.glob("mixgpt/**/*.py")}:
        (folder / "__pycache__").touch()
    return site


def test_only_the_package_with_its_types_and_one_command_are_installed(installed):
    assert {path.name for path in installed.iterdir()} == {"bin", "mixgpt", f"mixgpt-{mixgpt.__version__}.dist-info"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["mixgpt"]
    assert (installed / "mixgpt/py.typed").is_file()
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("mixgpt/**/*.py")}
    assert {str(path.relative_to(installed)) for path in installed.glob("mixgpt/**/*.py")} == files


@pytest.mark.slow
def test_the_installed_command_prunes_beside_foreign_files_where_nothing_can_be_written(
        installed, checkpoint_folder, tmp_path):
    texts, model = tmp_path / "texts.jsonl", checkpoint_folder("llama")
    texts.write_text("\n".join(json.dumps({"text": row}) for row in load_rows("builtin", "train", None)[0][:50]))
    for name in DOORS:
        (tmp_path / f"{name}.py").write_text("raise ImportError('a stranger')")
    environment = {"HOME": "/dev/null", "PYTHONPATH": str(installed), "TMPDIR": str(tmp_path),
                   "OMP_NUM_THREADS": str(torch.get_num_threads())}  # on which sums depend
    for command in (["-m", "mixgpt", "prune", model, texts, *OPTIONS, "pruned"], ["-c", LOAD],
                    [installed / "bin/mixgpt", "eval", "pruned", "--eval", texts, "--eval-limit", "2"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert run("llama.py", model, texts, *OPTIONS, tmp_path / "expected") == 0
    assert_same_weights(tmp_path / "pruned", tmp_path / "expected")


@pytest.mark.parametrize("door", DOORS)
def test_the_doors_at_the_root_give_what_is_in_the_package(door):
    module = importlib.import_module(door)
    origins = imports_of(Path(module.__file__).read_text(), sys.modules.keys())
    assert all(origin.startswith("mixgpt.") for origin in origins)
    for name in module.__all__:
        assert any(getattr(sys.modules[origin], name, None) is getattr(module, name) for origin in origins), name
