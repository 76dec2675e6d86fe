"""Break the world around the command line: damaged files, numbers that overflow. One line, a status, nothing left."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from commands import short_builtin  # noqa: F401, a fixture
from conftest import VOCABULARY
from faults import FAULTS, SMALL, config_changed, remote, weights_changed

import datautils
import generate
from mixgpt.app import cli


def run(script, command, **places):
    """Run a command line here. Returns the exit status."""
    main = generate.main if script == "generate" else partial(cli.main, f"{script}.py")
    return main([word.format(**places) for word in command.split()])


def says(message):
    """Return the pattern of a line: "…" stands for anything."""
    return ".*".join(map(re.escape, message.split("…")))


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_gets_one_line_and_nothing_is_written(case, checkpoint_folder, tmp_path, capsys, monkeypatch):
    fault, root = FAULTS[case], tmp_path / "root"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint_folder("llama"), root / "model")
    fault.damage(root)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    command = fault.command
    if fault.script == "llama":
        command = f"{SMALL} {command}"
        command += " --save {root}/saved" if "--save" not in command else ""
        command += " --eval builtin" if "--eval" not in command else ""
    assert run(fault.script, command, root=root) == 2
    captured = capsys.readouterr()
    line, = captured.err.splitlines()
    assert re.fullmatch(says(f"{fault.script}.py: error: {fault.message.format(root=root)}"), line), line
    assert captured.out == ""
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


RUN = f"{{root}}/model builtin --sparsity .5 --eval builtin {SMALL} --save {{root}}/saved"


@pytest.fixture
def model(checkpoint_folder, tmp_path):
    """Give the folder of a copy of a tiny LLaMA."""
    return shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")


def record_of(tmp_path, command, script="llama"):
    """Run a command line that saves, and return its record."""
    assert run(script, command, root=tmp_path) == 0
    return json.loads((tmp_path / "saved" / "mixgpt.json").read_text())


def test_a_vocabulary_padded_beyond_the_tokenizer_works(model, tmp_path):
    def pad(state):
        embeddings = state["model.embed_tokens.weight"]
        state["model.embed_tokens.weight"] = torch.cat([embeddings, torch.zeros(128, embeddings.shape[1])])

    weights_changed(tmp_path, pad)
    config_changed(tmp_path, vocab_size=VOCABULARY + 128)
    assert record_of(tmp_path, RUN)["sparsity"] == pytest.approx(0.5)


def test_code_beside_a_known_kind_of_model_is_not_executed(model, tmp_path):
    remote(tmp_path, "llama")
    assert record_of(tmp_path, RUN)["sparsity"] == pytest.approx(0.5)
    assert not (tmp_path / "executed").exists()


def test_a_hessian_that_is_not_positive_definite_is_damped_and_that_is_told(model, tmp_path, capsys):
    record = record_of(tmp_path, f"{RUN} --nsamples 1 --seqlen 8 --percdamp 0")  # 8 tokens, 32 and 48 columns
    out = capsys.readouterr().out
    for row in record["matrices"]:
        assert row["percdamp"] >= 1e-4 and row["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert re.search(rf"^layer {row['layer']} .*{row['name']}.*: Hessian not positive definite at --percdamp 0, "
                         rf"raised to {row['percdamp']:g}$", out, re.MULTILINE)


@pytest.mark.parametrize("options", ["", "--no-true-sequential"])
def test_an_input_that_is_not_finite_is_named_by_its_sequence(options, checkpoint_folder, tokenizer, tmp_path, capsys):
    shutil.copytree(checkpoint_folder("opt"), tmp_path / "model")
    samples, _ = datautils.calibration_samples("builtin", 4, 32, 0, tokenizer)
    token = next(token for token in samples[2].tolist() if token not in samples[:2])
    # finite, and too large for a norm
    weights_changed(tmp_path, lambda state: state["model.decoder.embed_tokens.weight"][token].fill_(3e38))
    assert run("opt", f"{RUN} {options}", root=tmp_path) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "opt.py: error: layer 0 self_attn.q_proj: the Hessian contains NaN or inf, from calibration sequence 2 on"]
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("factor, perplexity", [(1e6, "inf"), (3e38, "nan")])
def test_a_perplexity_beyond_all_numbers_is_reported(factor, perplexity, model, tmp_path):
    weights_changed(tmp_path, lambda state: state["model.norm.weight"].fill_(factor))
    record = record_of(tmp_path, RUN.replace("--sparsity .5", "--sparsity .5 --gmp"))
    assert str(record["perplexity"]["magnitude"]["builtin"]) == perplexity
