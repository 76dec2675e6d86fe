"""Run the command line: what it prints, saves and refuses."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from commands import SMALL, run, short_builtin  # noqa: F401, a fixture
from conftest import CPU, FAMILIES, ROOT, make, make_plan, saved_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import datautils
from mixgpt.allocation import synthetic, traces
from mixgpt.app import inputs, pipeline, planning
from mixgpt.app.cli import parse
from mixgpt.app.settings import Settings, recipe
from mixgpt.checkpoints import load
from mixgpt.common import runtime
from mixgpt.common.errors import InputError
from mixgpt.evaluation import selfcheck
from mixgpt.evaluation.measures import measure_sparsity, perplexity
from mixgpt.modeling import streaming
from mixgpt.pruning import distill
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target, select
from modelutils import HiddenStates, StreamedModel, linears


@pytest.mark.parametrize("name, options", [
    ("opt", []), ("opt-350m", ["--sparsity", ".5"]), ("qwen2", ["--sparsity", ".5"]),
    ("llama", ["--sparsity", ".5", "--gmp"]), ("bloom", ["--prunen", "2", "--prunem", "4", "--no-true-sequential"])])
def test_the_main_job_prints_measured_numbers_and_saves_them(name, options, checkpoint_folder, tmp_path, capsys):
    family, _ = FAMILIES[name]
    folder = tmp_path / "saved"
    assert run(family, checkpoint_folder(name), "builtin", *options, *SMALL, "--save", folder) == 0
    out = capsys.readouterr().out
    record = json.loads((folder / "mixgpt.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    zeros = [[(m.weight == 0).sum().item(), m.weight.numel()] for layer in family.layers_of(model)
             for m in linears(layer).values()]
    assert [row["sparsity"] for row in record["matrices"]] == [count / numel for count, numel in zeros]
    assert all(row["sparsity"] == (0.5 if options else 0) for row in record["matrices"])
    method = "magnitude" if "--gmp" in options else "SparseGPT" if options else "dense"
    if options:
        assert re.search(r"^total .* 50\.00%$", out, re.MULTILINE)
        assert all(("error" in row) == (method == "SparseGPT") for row in record["matrices"])

    tokens, source = inputs.test_tokens("builtin", 32, load.load_tokenizer(folder))
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.exp().item()
    assert record["perplexity"] == {method: {"builtin": pytest.approx(expected, rel=1e-5)}}
    assert re.search(rf"^{method} +{record['perplexity'][method]['builtin']:.2f}$", out, re.MULTILINE)
    assert record["data"]["builtin"]["sha256"] == source["sha256"]
    assert record["settings"]["seqlen"] == 32 and record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name, save_format, options", [
    ("opt", "dense", ["--wbits", "4"]), ("llama", "sparse", ["--wbits", "3", "--nearest"]),
    ("bloom", "sparse", ["--wbits", "4", "--gmp", "--sparsity", ".5"]),
    ("opt", "dense", ["--wbits", "8", "--sparsity", ".5", "--act-order"]),
    ("llama", "sparse", ["--wbits", "4", "--prunen", "2", "--prunem", "4", "--groupsize", "8", "--mse", "--act-order"]),
    ("bloom", "sparse", ["--wbits", "4", "--sparsity", ".5", "--groupsize", "8", "--distill", "1"]),
    ("opt", "dense", ["--wbits", "4", "--sparsity", ".5", "--sym", "--sparsity-way", "weight-level", "--sensitivity",
                      "fisher"]),
    ("llama", "compressed-tensors", ["--wbits", "8", "--sym", "--nearest", "--groupsize", "16"]),
    ("bloom", "compressed-tensors", ["--wbits", "4", "--sym", "--sparsity", ".5", "--act-order", "--distill", "2"]),
    ("opt", "compressed-tensors", ["--wbits", "4", "--sym", "--prunen", "2", "--prunem", "4", "--groupsize", "8",
                                   "--mse"])])
def test_a_quantized_model_is_saved_with_its_zeros_and_reports_its_size(name, save_format, options, checkpoint_folder,
                                                                        tmp_path, capsys):
    family, _ = FAMILIES[name]
    folder = tmp_path / "saved"
    assert run(family, checkpoint_folder(name), "builtin", *options, *SMALL, "--save", folder,
               "--save-format", save_format) == 0
    out, record = capsys.readouterr().out, json.loads((folder / "mixgpt.json").read_text())
    model = load.load_model(folder, "auto")
    counted = measure_sparsity(model, family)
    assert [row["sparsity"] for row in record["matrices"]] == [m.zeros / m.numel for m in counted]
    pruned = 0.5 if "--sparsity" in options or "--prunen" in options else 0
    assert sum(m.zeros for m in counted) >= pruned * sum(m.numel for m in counted)
    wbits = int(options[options.index("--wbits") + 1])
    for layer in family.layers_of(model):
        for module in linears(layer).values():
            size = int(options[options.index("--groupsize") + 1]) if "--groupsize" in options else module.in_features
            groups = module.weight.view(-1, size)
            assert "--act-order" in options or max(len(row.unique()) for row in groups) <= 2**wbits
            if "--prunen" in options:
                assert ((module.weight.view(-1, 4) == 0).sum(1) >= 2).all()

    [(method, perplexities)] = record["perplexity"].items()
    assert method.endswith(f"{wbits} bit") and f"\n{method} " in out
    assert run(family, folder, "builtin", *SMALL) == 0  # what was saved is a model like any other
    assert re.search(rf"^dense +{perplexities['builtin']:.2f}$", capsys.readouterr().out, re.MULTILINE)

    disk, numel = record["disk"], sum(m.numel for m in counted)
    least = 32 if save_format == "dense" else wbits if save_format == "compressed-tensors" else wbits * (1 - pruned)
    assert disk["bits_per_weight"] == 8 * disk["bytes"] / numel and disk["ratio"] == 2 * numel / disk["bytes"]
    assert 0.8 * least <= disk["bits_per_weight"] <= least + (0 if save_format == "dense" else 8)
    assert disk["theoretical_ratio"] == pytest.approx(16 / (wbits * (1 - pruned)))
    assert f"{disk['bits_per_weight']:.2f} bits a weight, {disk['ratio']:.2f} times smaller than bfloat16" in out


MIXGPT = ["--sparsity", ".5", "--sparsity-way", "weight-level", "--saliency", "isc"]


@pytest.mark.parametrize("name, options", [
    ("opt", MIXGPT), ("bloom", [*MIXGPT, "--sparsity-way", "layer-level", "--sensitivity", "fisher"])])
def test_mixgpt_meets_the_total_in_the_saved_weights(name, options, checkpoint_folder, tmp_path, capsys):
    family, _ = FAMILIES[name]
    folder, plot = tmp_path / "saved", tmp_path / "plan.png"
    assert run(family, checkpoint_folder(name), "builtin", *options, *SMALL, "--save", folder, "--plot", plot) == 0
    out = capsys.readouterr().out
    counted = measure_sparsity(AutoModelForCausalLM.from_pretrained(folder), family)
    assert sum(m.zeros for m in counted) / sum(m.numel for m in counted) == pytest.approx(0.5, abs=1e-4)
    rows = json.loads((folder / "mixgpt.json").read_text())["matrices"]
    assert [round(row["target"] * m.numel) for row, m in zip(rows, counted, strict=True)] == [m.zeros for m in counted]

    if "fisher" in options:
        units = {row["layer"]: set() for row in rows}
        for row in rows:
            units[row["layer"]].add(row["target"])
        assert all(len(targets) == 1 for targets in units.values()) and len(set.union(*units.values())) == 3
    else:
        ranked = sorted(rows, key=lambda row: row["sensitivity"], reverse=True)
        targets = [row["target"] for row in ranked]
        assert targets == sorted(targets) and targets[-1] - targets[0] == pytest.approx(0.2)
    assert re.search(r"^plan     50\.00% of the weights in all$", out, re.MULTILINE)
    assert re.search(r"^matrix kind +mean trace/n +mean rank +sparsity$", out, re.MULTILINE)
    recipe = "layer-level by fisher" if "fisher" in options else "weight-level by hutchinson"
    assert re.search(rf"^MixGPT \({recipe}\) +\d+\.\d\d$", out, re.MULTILINE)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options, name", [
    ({"wbits": 4}, "SparseGPT + 4 bit"), ({"wbits": 3, "gmp": True}, "magnitude + 3 bit"),
    ({"wbits": 4, "sparsity": 0}, "GPTQ 4 bit"), ({"wbits": 4, "sparsity": 0, "nearest": True}, "nearest 4 bit"),
    ({"wbits": 8, "sparsity": 0, "gmp": True}, "nearest 8 bit"),
    ({}, "SparseGPT"), ({"saliency": "isc"}, "SparseGPT (isc)"), ({"gmp": True, "saliency": "isc"}, "magnitude"),
    ({"sparsity_way": "layer-level"}, "SparseGPT (layer-level by hutchinson)"),
    ({"sparsity_way": "weight-level", "saliency": "isc", "sensitivity": "fisher"}, "MixGPT (weight-level by fisher)"),
    ({"sparsity_way": "weight-level", "gmp": True}, "magnitude (weight-level by hutchinson)"),
    ({"sparsity_way": "origin"}, "SparseGPT"), ({"saliency": "fisher"}, "SparseGPT (fisher)"),
    ({"sparsity_way": "global", "saliency": "fisher", "solver": "admm", "target": "dense", "wbits": 4},
     "ADMM (global, fisher, dense target) + 4 bit"),
    ({"token_weights": "fisher"}, "SparseGPT (weighted tokens)"),
    ({"target": "dense", "wbits": 4, "sparsity": 0}, "GPTQ 4 bit (dense target)"),
    ({"sparsity_way": "global", "saliency": "fisher", "gmp": True}, "magnitude (global)"),
])
def test_a_recipe_is_named_by_its_choices(options, name):
    assert Settings("model", "c4", **{"sparsity": 0.5} | options).method == name


def test_a_preset_means_its_recipe_without_the_command_line_too():
    best = Settings("m", "c4", sparsity=0.5, preset="best")
    assert best.method == "ADMM (global, fisher, dense target, synthetic text, distilled)"
    assert replace(best, preset=None) == Settings("m", "c4", sparsity=0.5, **recipe("best"))
    for given in ({"solver": "obs", "saliency": "obs"}, {"percdamp": 0.01}, {"distill": 0.0}):  # all of them defaults
        assert given.items() <= asdict(Settings("m", "c4", sparsity=0.5, preset="best", **given)).items()
    shape = {"prunen": 2, "prunem": 4, "wbits": 4}
    assert recipe("best", 4, 4).items() <= asdict(Settings("m", "c4", preset="best", **shape)).items()
    assert replace(best, seed=1) == Settings("m", "c4", sparsity=0.5, preset="best", seed=1)
    assert Settings(**asdict(best)) == best  # as from a record
    with pytest.raises(InputError, match="^--preset best .--solver admm.: needs calibration, "):
        Settings("m", "c4", sparsity=0.5, preset="best", gmp=True)
    with pytest.raises(InputError, match="^--preset good: must be one of sparsegpt, mixgpt, best$"):
        Settings("m", "c4", sparsity=0.5, preset="good")
    with pytest.raises(TypeError, match="sparseness"):
        Settings("m", "c4", sparseness=0.5)


@pytest.mark.parametrize("preset, amount, expected", [
    ("sparsegpt", "--sparsity .5", "--sparsity-way uniform --saliency obs --solver obs"),
    ("mixgpt", "--sparsity .5", "--sparsity-way weight-level --saliency isc --sensitivity fisher"),
    ("best", "--sparsity .5", "--sparsity-way global --saliency fisher --solver admm --target dense --alpha .15 "
                              "--percdamp .1 --synthetic .5 --distill .75"),
    ("best", "--prunen 2 --prunem 4", "--solver admm --target dense --alpha .15 --percdamp .1 --synthetic .75 "
                                      "--distill 1"),
    ("best", "--sparsity .5 --alpha .2 --solver obs --wbits 4",
     "--sparsity-way global --saliency fisher --target dense --percdamp .1 --synthetic .5 --distill .5 --mse "
     "--act-order"),
    ("best", "--sparsity .5 --wbits 3 --groupsize 16 --distill 0 --no-mse",
     "--sparsity-way global --saliency fisher --solver admm --target dense --alpha .15 --percdamp .1 --synthetic .5"),
])
def test_a_preset_is_its_flags_and_flags_given_override_it(preset, amount, expected):
    preset, flags = (parse(FAMILIES["opt"][0], ["m", "c4", *amount.split(), *given.split()])
                     for given in (f"--preset {preset}", expected))
    assert replace(preset, preset=None) == flags


def test_mixed_n_to_m_tells_how_close_whole_n_come(checkpoint_folder, tmp_path, capsys):
    folder = tmp_path / "saved"
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--prunen", "3", "--prunem", "8",
               "--sparsity-way", "weight-level", "--alpha", ".2", *SMALL, "--save", folder) == 0
    counted = measure_sparsity(AutoModelForCausalLM.from_pretrained(folder), FAMILIES["llama"][0])
    total = sum(m.zeros for m in counted) / sum(m.numel for m in counted)
    assert abs(total - 3 / 8) < 0.02 and len({m.zeros * 8 // m.numel for m in counted}) > 1
    assert all(m.zeros * 8 % m.numel == 0 for m in counted)
    assert f"plan     {total:.2%} of the weights in all" in capsys.readouterr().out


def test_a_sweep_computes_the_traces_once(checkpoint_folder, tmp_path, monkeypatch, capsys):
    arguments = [checkpoint_folder("opt"), "builtin", *MIXGPT, *SMALL]
    named = ["--sensitivity-file", tmp_path / "traces.json"]
    assert run(FAMILIES["opt"][0], *arguments) == run(FAMILIES["opt"][0], *arguments, *named) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(traces, "hessian_traces", lambda *_, **__: pytest.fail("computed again"))
    assert run(FAMILIES["opt"][0], *arguments, "--sparsity", ".4") == 0
    assert run(FAMILIES["opt"][0], *arguments, *named, "--sparsity", ".6", "--prune-only", "fc") == 0
    assert str(tmp_path / "traces.json") in first


def test_a_budget_is_over_what_is_pruned(checkpoint_folder, tmp_path):
    folder = tmp_path / "saved"
    assert run(FAMILIES["opt"][0], checkpoint_folder("opt"), "builtin", *MIXGPT, *SMALL, "--prune-only", "fc",
               "--minlayer", "1", "--save", folder) == 0
    counted = measure_sparsity(AutoModelForCausalLM.from_pretrained(folder), FAMILIES["opt"][0])
    pruned = [m for m in counted if m.layer >= 1 and "fc" in m.name]
    assert sum(m.zeros for m in pruned) / sum(m.numel for m in pruned) == pytest.approx(0.5, abs=1e-4)
    assert not any(m.zeros for m in counted if m not in pruned)


def test_the_heading_tells_all_that_it_takes_to_repeat_the_run(checkpoint_folder, capsys):
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, "--prune-only", "fc 1", "--invert"]
    assert run(FAMILIES["opt"][0], *arguments) == 0
    command, versions, model, pruning, data, *_ = capsys.readouterr().out.splitlines()
    assert shlex.split(command) == ["command", "python", "opt.py", *map(str, arguments)]
    assert f"torch {torch.__version__}" in versions and f"python {platform.python_version()}" in versions
    assert "float32, on cpu" in model and pruning.startswith("pruning  SparseGPT, 0.5") and "seed 0" in data


def test_quiet_prints_the_tables_and_warnings_only(checkpoint_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # where bars would be drawn
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", *MIXGPT, *SMALL, "--quiet") == 0
    captured = capsys.readouterr()
    warning, header, _, *rows = captured.out.splitlines()
    assert warning.startswith("warning  the ranking is not stable") and header.startswith("matrix kind  ")
    assert [row.split(" ")[0].strip("-") for row in rows[-5:]] == ["total", "", "perplexity", "", "MixGPT"]
    assert captured.err == ""


def test_eval_limit_takes_the_first_sequences_of_each_test_set(checkpoint_folder, tokenizer, capsys):
    family, model = make("opt")
    assert run(family, checkpoint_folder("opt"), "builtin", *SMALL, "--eval-limit", "2") == 0
    tokens, _ = datautils.test_tokens("builtin", 32, tokenizer)
    found = float(re.search(r"^dense +(\d+\.\d\d)$", capsys.readouterr().out, re.MULTILINE)[1])
    expected = [perplexity(model, family, tokens[:count], 2, CPU) for count in (2, 4)]
    assert found == pytest.approx(expected[0], abs=0.006) and abs(found - expected[1]) > 0.02


def test_sequences_and_their_tokens_come_from_the_options(checkpoint_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(inputs, "calibration_samples",
                        lambda *given: asked.append(given) or datautils.calibration_samples(*given))
    run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".1", "--nsamples", "3", "--seqlen",
        "16", "--seed", "5", "--eval")
    (dataset, nsamples, seqlen, seed, _, data_dir, bos), = asked
    assert (dataset, nsamples, seqlen, seed, data_dir, bos) == ("builtin", 3, 16, 5, None, "once")


def test_dtype_is_that_of_the_saved_weights(checkpoint_folder, tmp_path):
    folder = tmp_path / "saved"
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".5", *SMALL, "--dtype",
               "bfloat16", "--save", folder) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert all(m.zeros == m.numel // 2 for m in measure_sparsity(model, FAMILIES["llama"][0]))


@pytest.mark.parametrize("stored, fast, used", [
    ("float16", True, "float32"), ("bfloat16", False, "float32"), ("bfloat16", True, "bfloat16")])
def test_a_cpu_computes_in_float32_where_that_is_faster_and_a_line_says_so(stored, fast, used, checkpoint_folder,
                                                                           tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "multiplies_bfloat16", lambda: fast)
    AutoModelForCausalLM.from_pretrained(checkpoint_folder("opt"), dtype=stored).save_pretrained(tmp_path)
    for file in checkpoint_folder("opt").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for more, dtype in ([], used), (["--dtype", stored], stored):
        assert run(FAMILIES["opt"][0], tmp_path, "builtin", *SMALL, *more) == 0
        out = capsys.readouterr().out
        assert f"{dtype}, on cpu" in out and ("dtype    float32" in out) == (dtype != stored)


def test_a_save_that_reads_back_differently_is_reported(checkpoint_folder, tmp_path, capsys, monkeypatch):
    write = streaming.write

    def corrupt(file, tensors):
        if "model.norm.weight" in tensors:  # in the result
            tensors["model.norm.weight"].view(torch.int32)[-1] ^= 1  # the last bit
        write(file, tensors)

    monkeypatch.setattr(streaming, "write", corrupt)
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".5", *SMALL, "--save",
               tmp_path / "saved") == 1
    assert "VerificationError: --save" in capsys.readouterr().err


def test_a_saved_model_is_replaced_with_overwrite_and_no_other_folder(checkpoint_folder, tmp_path, capsys):
    family, folder = FAMILIES["llama"][0], tmp_path / "saved"
    arguments = [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--gmp", *SMALL, "--save"]
    assert run(family, *arguments, folder) == 0
    (folder / "extra").mkdir()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert run(family, *arguments, folder, "--sparsity", ".75") == 2
    assert "give --overwrite to replace a saved model" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert run(family, *arguments, folder, "--sparsity", ".75", "--overwrite") == 0
    assert json.loads((folder / "mixgpt.json").read_text())["sparsity"] == 0.75 and not (folder / "extra").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run(family, *arguments, tmp_path / "mine", "--overwrite") == 2
    (folder / "mine.txt").write_text("mine")
    for reads in ([folder, "builtin"], [checkpoint_folder("llama"), folder / "mine.txt"]):
        assert run(family, *reads, *arguments[2:], folder, "--overwrite") == 2
        assert "which this run reads; name another folder" in capsys.readouterr().err
    assert (folder / "mine.txt").read_text() == "mine"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine" and (folder / "mixgpt.json").is_file()


REFUSED = [  # flags, what the line says
    ("--sparsity -0.1", "--sparsity -0.1: must be at least 0 and below 1"),
    ("--sparsity 1.0", "--sparsity 1: must be at least 0 and below 1"),
    ("--sparsity half", "--sparsity: invalid float value: 'half'"),
    ("--prunen 2", "--prunen 2 --prunem 0: needs 0 < prunen < prunem"),
    ("--prunen 3 --prunem 2", "--prunen 3 --prunem 2: needs 0 < prunen < prunem"),
    ("--sparsity .3 --prunen 2 --prunem 4", "--sparsity 0.3: contradicts --prunen 2 --prunem 4"),
    ("--gmp", "--gmp: needs --sparsity, --prunen and --prunem, or --wbits"),
    ("--wbits 5", "--wbits: invalid choice: 5 (choose from 2, 3, 4, 8, 16)"),
    ("--wbits 4 --groupsize 0", "--groupsize 0: must be at least 1, or -1 for a whole row"),
    ("--sparsity .5 --groupsize 8", "--groupsize 8: needs --wbits 2, 3, 4, 8"),
    ("--mse", "--mse: needs --wbits"),
    ("--nearest", "--nearest: needs --wbits"),
    ("--wbits 4 --nearest --sparsity .5", "--nearest: rounds without calibration; with --sparsity"),
    ("--wbits 4 --nearest --act-order", "--act-order: needs calibration"),
    ("--sparsity .5 --wbits 4 --gmp --mse", "--mse: needs calibration"),
    ("--wbits 4 --groupsize 2 --prunen 2 --prunem 4 --act-order",
     "--act-order --groupsize 2: must be at least 4, as the 4 columns of an n:m group stay together"),
    ("--wbits 4 --groupsize 16 --prunen 2 --prunem 6", "--groupsize 16 --prunem 6: one must divide the other"),
    ("--save-format gguf", "--save-format: invalid choice: 'gguf'"),
    ("--sparsity .5 --save-format compressed-tensors", "supports symmetric grids of 4 or 8 bits"),
    ("--wbits 4 --save-format compressed-tensors", "needs --wbits 4 or 8, and --sym"),
    ("--wbits 4 --sym --groupsize 8 --act-order --save-format compressed-tensors",
     "supports groups of consecutive columns only; with --act-order needs --groupsize -1"),
    ("--sparsity-way weight-level", "--sparsity-way weight-level: needs --sparsity or --prunen and --prunem"),
    ("--sparsity .5 --sparsity-way best", "--sparsity-way: invalid choice: 'best'"),
    ("--sparsity .5 --preset worst", "--preset: invalid choice: 'worst'"),
    ("--preset best", "--preset best: needs --sparsity or --prunen and --prunem"),
    ("--prunen 2 --prunem 4 --sparsity-way global", "--sparsity-way global: gives each matrix a"),
    ("--sparsity .5 --gmp --solver admm", "--solver admm: needs calibration"),
    ("--wbits 4 --nearest --target dense", "--target dense: needs calibration"),
    ("--sparsity .5 --gmp --token-weights fisher", "--token-weights fisher: needs calibration"),
    ("--sparsity .5 --gmp --synthetic 2", "--synthetic 2: needs calibration"),
    ("--sparsity .5 --gmp --distill 1", "--distill 1: needs calibration"),
    ("--distill 1", "--distill 1: needs calibration"),
    ("--sparsity .5 --distill -1", "--distill -1: must lie between 0 and"),
    ("--sparsity .5 --synthetic -1", "--synthetic -1: must lie between"),
    ("--wbits 4 --solver admm", "--solver admm: needs --sparsity"),
    ("--sparsity .5 --solver admm --saliency isc",
     "--saliency isc: --solver admm does not support it; must be obs or fisher"),
    ("--sparsity .5 --saliency l1", "--saliency: invalid choice: 'l1'"),
    ("--sparsity .5 --alpha -1", "--alpha -1: must lie between 0 and 1"),
    ("--sparsity .5 --nprobes 0", "--nprobes 0: must be at least 1"),
    ("--sparsity .5 --plot a.png", "--plot a.png: needs --sparsity-way layer-level or weight-level or global"),
    ("--wandb-project pruning", "--wandb-project pruning: needs --log-wandb"),
    ("--sparsity .5 --percdamp -1", "--percdamp -1: must lie between 0 and 1"),
    ("--nsamples 0", "--nsamples 0: must be at least 1"),
    ("--batch-size 0", "--batch-size 0: must be at least 1"),
    ("--blocksize 0", "--blocksize 0: must be at least 1"),
    ("--seqlen 1", "--seqlen 1: must be at least 2"),
    ("--sparsety .5", "unrecognized arguments: --sparsety"),
    ("--eval c5", "--eval c5: invalid choice: 'c5'"), ("--limit 3", "--limit 3: needs --tasks"),
    ("--tasks-dir x", "--tasks-dir x: needs --tasks"),
    ("--semi-structured --prunen 1 --prunem 4", "--semi-structured: needs a 2:4 sparse model: --prunen 2 --prunem 4"),
    ("--semi-structured --eval", "--semi-structured: needs the test sets of --eval"),
    ("--seed -1", "--seed -1: must lie between 0 and"),
]


@pytest.mark.parametrize("flags, message", [*REFUSED, ("--save=", '--save "": must not be empty'),
                                            ("--eval=", "--eval : invalid choice: ''")])
def test_settings_that_contradict_or_lack_each_other_are_refused(flags, message):
    with pytest.raises(InputError) as error:
        parse(FAMILIES["opt"][0], ["model", "builtin", "--save", "saved", *flags.split()])
    assert message in str(error.value)


BAD = [  # what is given after the script's name, what the line on stderr holds
    ("no/model builtin", "model no/model: not a folder or .gguf file here"),
    ("{bloom} builtin", "this is a BloomForCausalLM; use bloom.py"),
    ("{empty} builtin", "model {empty}: "),
    ("{opt} builtin --wbits 4 --groupsize 12",
     "--groupsize 12: does not divide the 32 columns of layer 0 self_attn.k_proj"),
    ("{opt} builtin --sparsity .5 --minlayer 3", "select no matrix"),
    ("{opt} builtin --sparsity .5 --sparsity-way weight-level --sensitivity-file {full}/config.json",
     "--sensitivity-file {full}/config.json: is not a file of traces"),
    ("{opt} builtin --record {full}/config.json/a.json", "config.json/a.json: cannot be written"),
    ("{opt} builtin --record {empty}", "--record {empty}: is not a file; name a file"),
    ("{opt} c4 --sparsity .5 --data-dir {empty}", "--data-dir {empty}: no train split"),
    ("{opt} c4 --sparsity .5", "dataset c4: cannot load allenai/c4: the hub cannot be reached"),
    ("{opt} builtin --eval ptb --data-dir {empty}/no", "no such folder"),
    ("{opt} builtin --device tpu", "--device tpu: must be cpu, cuda or cuda:N"),
    ("{opt} builtin --sparsity .5 --save {full}", "exists and is not an empty folder"),
    ("{opt} builtin --save {full}/config.json/x", "cannot be used (Not a directory)"),
]


@pytest.mark.parametrize("command, message", BAD)
def test_bad_input_gets_one_line_and_status_2_and_nothing_is_written(command, message, checkpoint_folder, tmp_path,
                                                                     capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"opt": checkpoint_folder("opt"), "bloom": checkpoint_folder("bloom"), "empty": tmp_path / "empty",
              "full": shutil.copytree(checkpoint_folder("opt"), tmp_path / "full")}
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.format(**places) for argument in command.split()]
    for flag, value in {"--eval": "builtin", "--seqlen": "32", "--save": "saved"}.items():
        arguments += [] if flag in arguments else [flag, value]
    assert run(FAMILIES["opt"][0], *arguments) == 2
    captured = capsys.readouterr()
    error, = captured.err.splitlines()
    assert error.startswith("opt.py: error: ") and message.format(**places) in error
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_perplexity_of_the_cpu(checkpoint_folder, tmp_path):
    perplexities = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--nsamples", "4",
                   "--seqlen", "32", "--eval", "builtin", "--device", device, "--save", folder) == 0
        perplexities.append(json.loads((folder / "mixgpt.json").read_text())["perplexity"]["SparseGPT"]["builtin"])
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-2)


@pytest.mark.parametrize("script", ["opt.py", "llama.py", "bloom.py", "baichuan.py"])
def test_help_of_every_script_tells_the_flags(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for flag in ("--sparsity", "--prunen", "--prunem", "--gmp", "--true-sequential", "--data-dir", "--save"):
        assert flag in done.stdout


@pytest.mark.parametrize("amount, expected", [
    (["--sparsity", ".5"], [2]), (["--prunen", "2", "--prunem", "4"], []),
    (["--prunen", "2", "--prunem", "4", "--token-weights", "fisher"], [7])])  # of 4 sequences and 3 synthetic ones
def test_best_takes_gradients_from_half_of_the_sequences_unless_they_weigh_each_token(amount, expected,
                                                                                      checkpoint_folder, monkeypatch):
    seen, measure = [], planning.output_gradients
    monkeypatch.setattr(planning, "output_gradients", lambda streamed, matrices, tokens, *more: seen.append(
        len(tokens)) or measure(streamed, matrices, tokens, *more))
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", *amount, "--preset", "best", *SMALL) == 0
    assert seen == expected


@pytest.mark.parametrize("room, how", [(True, "generated"), (False, "resampled")])
def test_matrices_are_pruned_on_calibration_and_synthetic_sequences(room, how, checkpoint_folder, tmp_path, monkeypatch,
                                                                    tokenizer, capsys):
    monkeypatch.setattr(synthetic, "has_room", lambda streamed: room)
    folder = tmp_path / "saved"
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--synthetic", "2",
               *SMALL, "--save", folder) == 0
    output = capsys.readouterr().out
    assert "builtin: 4 sequences of 32 tokens, 8 synthetic ones, seed 0" in output
    assert ("are single tokens drawn in place" in output) == (not room)
    assert json.loads((folder / "mixgpt.json").read_text())["synthetic"] == how
    family, model = FAMILIES["llama"][0], AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama"))
    streamed = StreamedModel(model, family, CPU, 2)
    tokens, _ = datautils.calibration_samples("builtin", 4, 32, 0, tokenizer)
    further, _ = synthetic.synthetic(streamed, tokens, 8, 0)
    prune_layerwise(streamed, make_plan(select(model, family), Target(0.5)), torch.cat([tokens, further]), Recipe())
    for key, tensor in saved_tensors(folder).items():
        assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("number, more", [(0, 3), (2, 2), (4, 2)])
def test_a_pruned_model_is_distilled_on_synthetic_sequences_of_its_own(number, more, checkpoint_folder, tmp_path,
                                                                       tokenizer, capsys):
    """The saved weights are those of the library's parts in turn, and the record tells how far both models differ."""
    folder = tmp_path / "saved"
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--distill",
               str(more / 4), *(["--synthetic", str(number / 4)] if number else []), *SMALL, "--save", folder) == 0
    output = capsys.readouterr().out
    assert f"SparseGPT ({'synthetic text, ' if number else ''}distilled)" in output
    assert f"4 sequences of 32 tokens, {number + more} synthetic ones, seed 0" in output
    family, model = FAMILIES["llama"][0], AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama"))
    streamed = StreamedModel(model, family, CPU, 2)
    tokens, _ = datautils.calibration_samples("builtin", 4, 32, 0, tokenizer)
    written, how = synthetic.synthetic(streamed, tokens, number + more, 0)
    windows = synthetic.windows_of(written[number:], how)
    dense = distill.dense_states(distill.with_token_budget(streamed, windows, 32), windows)
    plan = make_plan(select(model, family), Target(0.5))
    prune_layerwise(streamed, plan, torch.cat([tokens, written[:number]]), Recipe())
    zeros = {name: weight == 0 for name, weight in model.state_dict().items()}
    divergence = distill.distill(streamed, dict.fromkeys(plan), windows, dense, 0)
    record = json.loads((folder / "mixgpt.json").read_text())
    assert record["distilled"] == {"divergence": divergence}
    assert record["settings"]["true_sequential"] and record["settings"]["batch_size"] == 2  # as pruned
    for key, tensor in saved_tensors(folder).items():
        assert torch.equal(tensor, model.state_dict()[key]) and torch.equal(tensor == 0, zeros[key]), key


@pytest.mark.parametrize("share, more, together", [(".25", ".25", ".5"), (".5", "2", "1"), ("1.5", "1", "1.5")])
def test_without_room_for_training_the_hessians_take_its_sequences(share, more, together, checkpoint_folder, tmp_path,
                                                                   monkeypatch, capsys):
    monkeypatch.setattr(distill, "room_for", lambda streamed, tokens: 0)
    for name, options in {"with": ["--distill", more, "--synthetic", share], "without": ["--synthetic", together]
                          }.items():
        assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".5", *options, *SMALL,
                   "--save", tmp_path / name) == 0
    one, other = (saved_tensors(tmp_path / name) for name in ("with", "without"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert capsys.readouterr().out.count("distill  skipped: all weights cannot be trained at once") == 1
    assert json.loads((tmp_path / "with" / "mixgpt.json").read_text())["distilled"] == "no room"


def test_each_process_needs_text_to_distill_on(checkpoint_folder, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.distributed, "world", lambda: 4)
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--distill", ".5",
               *SMALL) == 2
    assert capsys.readouterr().err == ("llama.py: error: --distill 0.5: gives 2 pieces of text, must be at least 4, "
                                       "the number of processes; raise --nsamples\n")


@pytest.mark.parametrize("error, step, in_memory, reason", [
    (MemoryError(), 1, False, "out of memory"), (torch.OutOfMemoryError("CUDA"), 2, True, "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), 4, False,
     "out of memory"),
    (None, 4, True, "the divergence from the dense model is inf")])
def test_a_run_whose_distillation_fails_ends_with_the_model_as_pruned(error, step, in_memory, reason, checkpoint_folder,
                                                                      tmp_path, monkeypatch, capsys):
    """Weights of a checkpoint are on disk, or in memory where its file is a .bin file."""
    model, backward, calls = checkpoint_folder("llama"), distill._backward, []
    if in_memory:
        model = str(tmp_path / "bin")
        shutil.copytree(checkpoint_folder("llama"), model)
        torch.save(load_file(f"{model}/model.safetensors"), f"{model}/pytorch_model.bin")
        os.remove(f"{model}/model.safetensors")

    def failing(*given):
        calls.append(given)
        if len(calls) % 4 != step % 4:  # of four batches, one a step
            return backward(*given)
        if error:
            raise error
        return backward(*given) * torch.inf

    monkeypatch.setattr(distill, "STEP_TOKENS", 1)
    monkeypatch.setattr(distill, "_backward", failing)
    options = [model, "builtin", "--sparsity", ".5", *SMALL, "--batch-size", "1", "--save"]
    assert run(FAMILIES["llama"][0], *options, tmp_path / "pruned") == 0
    capsys.readouterr()
    assert run(FAMILIES["llama"][0], *options, tmp_path / "saved", "--distill", "1") == 0 and calls
    output = capsys.readouterr().out
    assert output.count(f"warning  --distill: {reason}: the model stays as it was before distillation\n") == 1
    one, other = (saved_tensors(tmp_path / name) for name in ("pruned", "saved"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    records = [json.loads((tmp_path / name / "mixgpt.json").read_text()) for name in ("pruned", "saved")]
    assert records[1]["distilled"] == reason
    assert records[0]["matrices"] == records[1]["matrices"]
    assert list(records[0]["perplexity"].values()) == list(records[1]["perplexity"].values())
    assert run(FAMILIES["llama"][0], *options, tmp_path / "saved", "--distill", "1", "--resume") == 0
    assert "is complete; these are its results" in capsys.readouterr().out


def test_a_run_killed_after_its_distillation_failed_does_not_try_again(checkpoint_folder, tmp_path, monkeypatch,
                                                                       capsys):
    options = [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", *SMALL, "--save"]
    assert run(FAMILIES["llama"][0], *options, tmp_path / "pruned") == 0
    with monkeypatch.context() as patched:
        patched.setattr(distill, "_backward", lambda *_: (_ for _ in ()).throw(MemoryError))
        patched.setattr(pipeline, "_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(FAMILIES["llama"][0], *options, tmp_path / "saved", "--distill", "1") == 130
    monkeypatch.setattr(distill, "distill", lambda *_: pytest.fail("tried again"))
    capsys.readouterr()
    assert run(FAMILIES["llama"][0], *options, tmp_path / "saved", "--distill", "1", "--resume") == 0
    assert "warning  --distill: out of memory: the model stays" in capsys.readouterr().out
    assert json.loads((tmp_path / "saved" / "mixgpt.json").read_text())["distilled"] == "out of memory"
    one, other = (saved_tensors(tmp_path / name) for name in ("pruned", "saved"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert not (tmp_path / "saved" / "progress").exists()


def test_a_script_runs_from_the_shell_and_ends_with_status_2_on_bad_input(checkpoint_folder):
    done = subprocess.run([sys.executable, "llama.py", checkpoint_folder("bloom"), "builtin"], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"llama.py: error: model {checkpoint_folder('bloom')}: this is a "
                                        "BloomForCausalLM; use bloom.py"]


def test_devices_default_to_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.choose_device(None) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert runtime.choose_device(None) == torch.device("cuda")


def _limited(monkeypatch, limit):
    """Let a layer have too little memory for more than `limit` sequences at a time, from layer 1 on."""
    forward = HiddenStates.forward

    def limited(self, layer, index, rows):
        if index and rows.stop - rows.start > limit and self.hidden.shape[1] != selfcheck.TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, layer, index, rows)

    monkeypatch.setattr(HiddenStates, "forward", limited)


def test_batches_are_halved_when_gpu_memory_runs_out(checkpoint_folder, tmp_path, monkeypatch, capsys):
    arguments = [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--no-true-sequential", *SMALL]
    assert run(FAMILIES["llama"][0], *arguments, "--batch-size", 1, "--save", tmp_path / "one") == 0
    _limited(monkeypatch, 1)
    assert run(FAMILIES["llama"][0], *arguments, "--batch-size", 4, "--save", tmp_path / "halved") == 0
    out = capsys.readouterr().out
    assert out.count("out of GPU memory: continuing with batches of 2\n") == 2  # pruning, evaluation
    assert out.count("out of GPU memory: continuing with batches of 1\n") == 2
    one, halved = saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "halved")
    for key, tensor in one.items():
        torch.testing.assert_close(halved[key], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(halved[key] == 0, tensor == 0)
