"""Run the files of docs/extending.md as it says, each on its own, and check what they add."""

import contextlib
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest
import torch
from commands import SMALL, run, short_builtin  # noqa: F401, a fixture
from conftest import ROOT, inputs_of, measure_sparsity, record_of, saved_tensors
from test_readme import commands
from transformers import AutoModelForCausalLM

from mixgpt import datautils
from mixgpt.checkpoints import load
from mixgpt.common import choices
from mixgpt.common.errors import InputError
from mixgpt.common.texts import DATASETS
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import linears
from mixgpt.pruning.targets import Target

PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"^## [^\n]*`(\w+\.py)`\n.*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = [command for command, _ in commands(PAGE)]
TEXT = "\n\n".join(f"Paragraph {number} of a text about sheep, hills and mills." * 3 for number in range(100))


@pytest.fixture(autouse=True)
def registries():
    """Forget after each test what it has added to the registries."""
    with contextlib.ExitStack() as stack:
        for registry in (choices.ALLOCATIONS, choices.ESTIMATORS, choices.FORMATS, choices.GRIDS, choices.SALIENCIES,
                         choices.SOLVERS, DATASETS):
            stack.enter_context(mock.patch.dict(registry))
        yield


@pytest.fixture
def execute(tmp_path, monkeypatch, checkpoint_folder):
    """Return a function that runs a file of the page as a script, in this process. It returns the exit status."""
    monkeypatch.chdir(tmp_path)
    folders = {"facebook/opt-125m": checkpoint_folder("opt")}

    def script(name, *arguments):
        (tmp_path / name).write_text(EXAMPLES[name])
        monkeypatch.setattr(sys, "argv", [name, *(str(folders.get(argument, argument)) for argument in arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(tmp_path / name), run_name="__main__")
        return stop.value.code

    return script


@pytest.mark.parametrize("command, label", [(command, label) for command, label in zip(COMMANDS, [
    "SparseGPT (ria)", "SparseGPT (wanda)", "Wanda", "", "SparseGPT"], strict=True) if label])
def test_its_command_prunes_to_the_weight_and_calls_the_method_by_name(command, label, execute, tmp_path, capsys):
    (tmp_path / "my_text.txt").write_text(TEXT)
    python, name, *arguments = shlex.split(command.replace(" c4", " builtin"))
    small = SMALL if "--eval" not in arguments else SMALL[:4]  # of their own
    assert python == "python" and execute(name, *arguments, *small, "--device", "cpu", "--save", "saved") == 0
    out = capsys.readouterr().out
    counted = measure_sparsity(AutoModelForCausalLM.from_pretrained("saved"))
    assert counted and all(m.zeros == round(0.5 * m.numel) for m in counted)
    assert re.search(rf"^{re.escape(label)} +\d+\.\d\d$", out, re.MULTILINE)
    assert f"pruning  {label}, 0.5 of the weights" in out and out.startswith(f"command  python {name} ")
    assert label in record_of("saved")["perplexity"]


@pytest.mark.parametrize("name, arguments, line", [
    ("wanda.py", "facebook/opt-125m builtin --sparsity .5 --saliency wanda --solver admm",
     "--saliency wanda: --solver admm does not support it; must be obs or fisher"),
    ("wanda_solver.py", "facebook/opt-125m builtin --sparsity .5 --solver wanda --wbits 4",
     "--wbits 4: --solver wanda does not quantize; must be obs or admm"),
    ("wanda_solver.py", "facebook/opt-125m builtin --sparsity .5 --solver wanda --gmp",
     "--solver wanda: needs calibration"),
    ("e2m1.py", "facebook/opt-125m builtin --wbits 4 --grid e2m1 --mse", "--grid e2m1: has 4 bits, and no search"),
    ("my_text.py", "facebook/opt-125m my_text --sparsity .5", "dataset my_text: there is no my_text.txt in "),
])
def test_what_it_cannot_do_is_refused_by_name(name, arguments, line, execute, capsys):
    assert execute(name, *arguments.split(), "--eval", "builtin", "--seqlen", "32") == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith(f"{name}: error: ") and line in error.replace("'", "")  # which not every Python puts


def removed_and_inputs(dense):
    """Yield of each linear of the first layer its name, zeros in `saved`, dense weights and norms of its inputs."""
    model, pruned = AutoModelForCausalLM.from_pretrained(dense), AutoModelForCausalLM.from_pretrained("saved")
    tokens, _ = datautils.calibration_samples("builtin", 4, 32, 0, load.load_tokenizer(dense))
    modules = linears(layers_of(model)[0])
    for name, X in inputs_of(model, modules, tokens).items():
        zeros = linears(layers_of(pruned)[0])[name].weight == 0
        yield name, zeros, modules[name].weight.detach(), X.norm(dim=0)


def least(scores, count):
    """Mark the `count` least of each row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.argsort(dim=1)[:, :count], True)


@pytest.mark.parametrize("name, score", [
    ("wanda", lambda A, norms: A * norms),
    ("ria", lambda A, norms: (A / A.sum(1, keepdim=True) + A / A.sum(0)) * norms.sqrt())])
def test_a_saliency_ranks_as_its_paper_says(name, score, execute, checkpoint_folder):
    assert execute(f"{name}.py", "facebook/opt-125m", "builtin", "--sparsity", ".4", "--saliency", name,
                   "--no-true-sequential", *SMALL, "--save", "saved") == 0
    for matrix, zeros, W, norms in removed_and_inputs(checkpoint_folder("opt")):  # one block of columns holds them all
        expected = least(score(W.abs(), norms).reshape(1, -1), round(0.4 * W.numel()))
        assert torch.equal(zeros, expected.view(W.shape)), matrix


@pytest.mark.parametrize("options", ["--prunen 2 --prunem 4 --act-order", "--save-format sparse",
                                     "--sparsity .5 --preset best --alpha 0 --groupsize 16"])
def test_weights_lie_on_the_grid_of_4_bit_floating_point_numbers(options, execute, capsys):
    assert execute("e2m1.py", "facebook/opt-125m", "builtin", "--wbits", "4", "--grid", "e2m1", *options.split(),
                   *SMALL, "--no-mse", "--save", "saved") == 0
    assert "saved in saved, loaded again and found equal" in capsys.readouterr().out
    state = load.load_model("saved", "auto").state_dict()
    W, values = state["model.decoder.layers.0.fc1.weight"], torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for group in W.reshape(-1, 16 if "groupsize 16" in options else W.shape[1]):
        sizes = group.abs().unique()
        units = sizes / (sizes[-1] / values[1:, None])  # the largest weight is one of the values
        off = (units[..., None] - values).abs().amin(-1).amax(-1)
        assert off.min() < 1e-4
    assert len(W.unique()) > 8
    del choices.GRIDS["e2m1"]
    with pytest.raises(InputError, match="e2m1 is not known here") if "sparse" in options else contextlib.nullcontext():
        load.load_model("saved", "auto")


@pytest.mark.parametrize("amount, width", [("--sparsity .5", None), ("--prunen 2 --prunem 4 --act-order", 4)])
def test_the_solver_is_wanda(amount, width, execute, checkpoint_folder):
    assert execute("wanda_solver.py", "facebook/opt-125m", "builtin", *amount.split(), "--solver", "wanda",
                   "--no-true-sequential", *SMALL, "--save", "saved") == 0
    for name, zeros, W, norms in removed_and_inputs(checkpoint_folder("opt")):
        groups = width or W.shape[1]
        assert torch.equal(zeros.view(-1, groups), least((W.abs() * norms).view(-1, groups), groups // 2)), name
    dense = saved_tensors(checkpoint_folder("opt"))
    for key, tensor in saved_tensors("saved").items():
        assert torch.equal(tensor, dense[key].masked_fill(tensor == 0, 0)), key


def test_an_allocation_is_followed_and_named(checkpoint_folder, tmp_path, capsys):
    def alternate(budget):
        """Take turns, alpha above and alpha below the target."""
        return {key: Target(budget.target.sparsity + (-1)**number * budget.alpha)
                for number, key in enumerate(budget.selected)}

    choices.ALLOCATIONS["turns"] = choices.Allocation(
        "one sparser, the next denser", alternate, title="in turns",
        refuses=lambda settings: "fractions only" if settings.prunem else "")
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity-way", "turns", "--prune-only", "out_proj", *SMALL]
    assert run("opt.py", *arguments, "--sparsity", ".5", "--save", tmp_path / "saved") == 0
    out = capsys.readouterr().out
    assert "plan     in turns: matrices from 40.00% to 60.00%" in out
    assert "pruning  SparseGPT (in turns), 0.5 of the weights over 3 matrices, alpha 0.1" in out
    counted = measure_sparsity(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    assert [m.zeros for m in counted if m.name == "self_attn.out_proj"] == [round(f * 1024) for f in (0.6, 0.4, 0.6)]
    assert run("opt.py", *arguments, "--prunen", "2", "--prunem", "4") == 2
    assert "--sparsity-way turns: fractions only" in capsys.readouterr().err
    assert run("opt.py", *arguments) == 2
    assert "--sparsity-way turns: needs --sparsity" in capsys.readouterr().err


def test_a_save_format_may_mark_its_folders_with_its_name(checkpoint_folder, tmp_path):
    config = load.read_config(checkpoint_folder("opt"))
    config.quantization_config = {"quant_method": "own"}
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its weights are quantized by own; give the original model"):
        load.read_config(tmp_path)
    choices.FORMATS["own"] = choices.SaveFormat("")
    assert load.read_config(tmp_path).quantization_config == {"quant_method": "own"}
