"""Run every command of README.md and docs/ on tiny stand-ins, and check that what the pages name exists.

A command that cannot run here says so in its line: it "needs the hub", "a GPU", "a server" and so on.
"""

import functools
import importlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import small_models
import torch
from conftest import ROOT, read_little, slow_but
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

import mixgpt
from mixgpt import __main__
from mixgpt.app import cli, generate, results
from mixgpt.modeling.linears import linears

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
         if path.name != "extending.md"}  # whose commands run files that it holds: test_extending.py
TEXT = "\n".join(PAGES.values())
VERBS = ("mixgpt", "python", "pip", "make", "torchrun", "wandb", "jupyter", "git")
MARK = re.compile(r"needs (the hub|a GPU|several GPUs|an account|a server|measurements)")
# What the commands name -> the tiny model of conftest.py that stands there as a folder.
MODELS = {"facebook/opt-125m": "opt", "models/opt-125m": "opt", "meta-llama/Llama-2-7b-hf": "llama",
          "Qwen/Qwen3-0.6B": "qwen3", "google/gemma-3-4b-it": "gemma3", "Qwen/Qwen3-30B-A3B": "qwen3-moe",
          "HuggingFaceTB/SmolLM2-135M-Instruct": "wide llama", "EleutherAI/pythia-160m": "gpt-neox",
          "baichuan-inc/Baichuan2-7B-Base": "baichuan-7b"}
SMALL = ("--nsamples", "2", "--seqlen", "32", "--device", "cpu", "--data-dir", "texts")
LESS = {"benchmarks/accuracy.py": (*SMALL, "--methods", "magnitude", "wanda", "--targets", "50%", "--seeds", "0"),
        "benchmarks/paper.py": SMALL, "benchmarks/small_models.py": ("opt",), "benchmarks/models.py": ("gpt2",)}
TINY = {"WIDTH": 16, "VOCABULARY": 300, "SEQLEN": 32, "STEPS": 1, "TRAIN_BYTES": 20_000, "TEST_BYTES": 20_000}
SCRIPTS = [path for path in sorted((*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")))
           if '__name__ == "__main__"' in path.read_text()]


def commands(text):
    """Yield (command, line) for each line of a sh block, and for what starts with a verb in other code.

    line: where it stands, with the marks that it has. A line that ends in a backslash goes on in the next; of a loop
    the commands are given once, with the first value.
    """
    fence, values = None, {}
    verb = re.compile(rf"(?:{'|'.join(VERBS)}) ")
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:]
        elif loop := re.match(r" *for (\w+) in (\S+) .*; do$", line):
            values[loop[1]] = loop[2]
        elif line.strip() == "done":
            values.clear()
        elif fence == "sh" and line.strip() and not line.startswith("#") or (
                (fence is not None or line.startswith("    ")) and verb.match(line.strip().removeprefix("$ "))):
            yield re.sub(r"\$(\w+)", lambda name: values[name[1]], line.strip().removeprefix("$ ")), line
        elif fence is None:
            yield from ((span, line) for span in re.findall(r"`([^`]+)`", line) if verb.match(span))


COMMANDS = list(dict.fromkeys(commands(TEXT)))
TO_RUN = list(dict.fromkeys(command for command, line in COMMANDS if not MARK.search(line)))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Give a folder with what `python benchmarks/small_models.py opt` makes, tiny."""
    folder = tmp_path_factory.mktemp("small-models")
    with mock.patch.multiple(small_models, **TINY):
        small_models.make_model("opt", folder)
    return folder


@pytest.fixture
def workplace(checkpoint_folder, texts, small, tmp_path, monkeypatch):
    """Go to a folder with all that the commands name: models, texts and the files of this repository."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    for name, value in TINY.items():
        monkeypatch.setattr(small_models, name, value)
    read_little(monkeypatch)
    (tmp_path / "small-models").symlink_to(small)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of which tiny models have no use for more
    for name, kind in MODELS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(checkpoint_folder(kind))
    shutil.copytree(texts, "texts")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for path in (*ROOT.glob("*.txt"), *ROOT.glob("*.yaml"), ROOT / "Makefile", ROOT / "README.md"):
        (tmp_path / path.name).symlink_to(path)
    for name in ("images", "docs"):
        (tmp_path / name).mkdir()
    yield
    torch.set_num_threads(threads)


def run_script(name, *arguments):
    """Run a script in this process, a family's on little text. Returns the exit status."""
    path = ROOT / name
    assert path in SCRIPTS, name
    script = importlib.import_module(path.stem)
    try:
        if script.main is cli.main:
            return cli.main(name, [*arguments, *(SMALL[:-2] if "--data-dir" in arguments else SMALL)])
        if script.main in (generate.main, results.main):
            return script.main(name, arguments)
        return script.main([*arguments, *LESS.get(name, ())]) or 0
    except SystemExit as stop:  # argparse
        return stop.code


def run_mixgpt(name, *arguments):
    """Run a subcommand in this process, on little text; alone, its help. Returns the exit status."""
    less = {"prune": SMALL, "eval": SMALL[2:]}.get(name, ()) if arguments else ["--help"]
    return __main__.main([name, *arguments, *less])


def run_pip(verb, *words):
    """Check that what is installed satisfies the files of requirements. Returns the exit status."""
    files = [*(file for option, file in pairwise(words) if option == "-r"), "requirements.txt"]
    lines = [line for file in files for line in Path(file).read_text().splitlines() if not line.startswith("-r")]
    return not all(each.specifier.contains(importlib.metadata.version(each.name)) for each in map(Requirement, lines))


def run(command):
    """Run a command, or what stands for it. Returns the exit status."""
    verb, *words = map(os.path.expanduser, shlex.split(command, comments=True))
    if verb == "torchrun":  # its options are checked, and the script is run in one process
        given = get_args_parser().parse_args(words)
        verb, words = "python", [given.training_script, *given.training_script_args]
    if verb == "make":
        return subprocess.run(["make", "--dry-run", *words], capture_output=True).returncode
    return {"mixgpt": run_mixgpt, "python": run_script, "pip": run_pip}[verb](*words)


@pytest.fixture(scope="session")
def pruned(checkpoint_folder, texts, tmp_path_factory):
    """Give a folder that a run has saved."""
    folder = tmp_path_factory.mktemp("saved") / "pruned"
    assert run_script("opt.py", str(checkpoint_folder("opt")), "builtin", "--gmp", "--sparsity", ".5", "--eval",
                      "builtin", "--data-dir", str(texts), "--save", str(folder)) == 0
    return folder


@pytest.mark.parametrize("command", slow_but([each for each in TO_RUN if "benchmarks/" not in each], TO_RUN))
def test_commands_run(command, workplace, pruned):
    if "--save" not in command:
        Path("pruned").symlink_to(pruned)
    Path("runs").mkdir()
    if "--record" not in command:
        shutil.copy(pruned / "mixgpt.json", "runs")
    assert run(command) == 0


@pytest.mark.slow
def test_the_demo_ends_in_one_table_one_picture_and_the_gain_in_speed_and_memory(workplace, capsys):
    done = subprocess.run(["make", "--dry-run", "demo", "MODEL=HuggingFaceTB/SmolLM2-135M-Instruct"],
                          capture_output=True, text=True, check=True)
    Path("demo").mkdir()
    *methods, table, generate = re.findall(r"echo '\$ (python .*?)'", done.stdout)
    assert len(methods) == 4 and [run(command) for command in methods] == [0] * 4
    capsys.readouterr()
    assert run(table) == 0
    above, _, header, _, *rows, _, picture = capsys.readouterr().out.splitlines()
    assert re.split("  +", header) == ["method", "sparsity", "builtin ppl", "code ppl", "seconds", "GB host"]
    assert [row.split()[0] for row in rows] == ["dense", "SparseGPT", "MixGPT", "best"]
    assert max(map(len, (above, *rows))) <= 100
    assert picture == "picture  demo/perplexity.png" and Path("demo/perplexity.png").is_file()
    assert run(generate) == 0
    assert re.fullmatch(r"([\d.]+ times as fast|speeds vary too much to compare), 0\.\d\d times the memory",
                        capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
def test_python_runs(block, workplace, pruned, monkeypatch):
    if "save=" not in block:
        Path("pruned").symlink_to(pruned)
    monkeypatch.setattr(mixgpt, "prune", functools.partial(mixgpt.prune, nsamples=2, seqlen=32, device="cpu",
                                                           data_dir="texts"))
    exec(block, names := {})
    layers = names["model"].model.decoder.layers
    weights = [module.weight for layer in layers for module in linears(layer).values()]
    zeros = sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)
    assert zeros == pytest.approx(0.5, abs=1e-3)
    assert "result" not in names or names["result"].sparsity == pytest.approx(zeros)


def test_commands_of_all_kinds_are_found():
    assert {"make demo", "make test"} <= set(TO_RUN) and len(TO_RUN) > 15


def test_make_alone_lists_its_targets_and_does_nothing(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    make = ["make", "--no-print-directory"]  # It may run below another one, which would be named.
    lines = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    targets = re.search(r"^\.PHONY: help (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[1] for line in lines] == targets and all(len(line.split()) > 4 for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]
