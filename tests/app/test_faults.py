"""Break the world around the command line: damaged files, numbers that overflow. One line, a status, nothing left."""

import re
import shutil
from functools import partial

import pytest
import torch
from commands import short_builtin  # noqa: F401, a fixture
from conftest import VOCABULARY, record_of
from faults import FAULTS, SMALL, config_changed, remote, weights_changed

from mixgpt import datautils
from mixgpt.app import cli, generate


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_gets_one_line_and_nothing_is_written(case, checkpoint_folder, tmp_path, capsys, monkeypatch):
    fault, root = FAULTS[case], tmp_path / "root"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint_folder("llama"), root / "model")
    fault.damage(root)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    main, command = partial(generate.main, "generate.py"), fault.command
    if fault.script == "llama":
        main, command = partial(cli.main, "llama.py"), f"{SMALL} {command} --eval builtin --save {{root}}/saved"
    assert main([word.format(root=root) for word in command.split()]) == 2
    captured = capsys.readouterr()
    line, = captured.err.splitlines()
    parts = f"{fault.script}.py: error: {fault.message.format(root=root)}".split("…")  # which stands for anything
    assert re.fullmatch(".*".join(map(re.escape, parts)), line), line
    assert captured.out == ""
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.fixture
def pruned(checkpoint_folder, prune, tmp_path):
    """Return a function that prunes a copy of a tiny LLaMA, tmp_path / "model", and gives the record and the output."""
    model = shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")

    def pruned(options=""):
        printed = prune("llama", "--sparsity .5", options, "--save", tmp_path / "saved", model=model)
        return record_of(tmp_path / "saved"), printed

    return pruned


def test_a_vocabulary_padded_beyond_the_tokenizer_works(pruned, tmp_path):
    def pad(state):
        embeddings = state["model.embed_tokens.weight"]
        state["model.embed_tokens.weight"] = torch.cat([embeddings, torch.zeros(128, embeddings.shape[1])])

    weights_changed(tmp_path, pad)
    config_changed(tmp_path, vocab_size=VOCABULARY + 128)
    assert pruned()[0]["sparsity"] == pytest.approx(0.5)


def test_code_beside_a_known_kind_of_model_is_not_executed(pruned, tmp_path):
    remote(tmp_path, "llama")
    assert pruned()[0]["sparsity"] == pytest.approx(0.5)
    assert not (tmp_path / "executed").exists()


def test_a_hessian_that_is_not_positive_definite_is_damped_and_that_is_told(pruned):
    record, out = pruned("--nsamples 1 --seqlen 8 --percdamp 0")  # 8 tokens, 32 and 48 columns
    for row in record["matrices"]:
        assert row["percdamp"] >= 1e-4 and row["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert re.search(rf"^layer {row['layer']} .*{row['name']}.*: Hessian not positive definite at --percdamp 0, "
                         rf"raised to {row['percdamp']:g}$", out, re.MULTILINE)


@pytest.mark.parametrize("options", ["", "--no-true-sequential"])
def test_an_input_that_is_not_finite_is_named_by_its_sequence(options, checkpoint_folder, tokenizer, prune, tmp_path):
    model = shutil.copytree(checkpoint_folder("opt"), tmp_path / "model")
    samples, _ = datautils.calibration_samples("builtin", 4, 32, 0, tokenizer)
    token = next(token for token in samples[2].tolist() if token not in samples[:2])
    # finite, and too large for a norm
    weights_changed(tmp_path, lambda state: state["model.decoder.embed_tokens.weight"][token].fill_(3e38))
    assert prune("opt", "--sparsity .5", options, "--save", tmp_path / "saved", model=model, status=2) == (
        "llama.py: error: layer 0 self_attn.q_proj: the Hessian contains NaN or inf, from calibration sequence 2 on\n")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("factor, perplexity", [(1e6, "inf"), (3e38, "nan")])
def test_a_perplexity_beyond_all_numbers_is_reported(factor, perplexity, pruned, tmp_path):
    weights_changed(tmp_path, lambda state: state["model.norm.weight"].fill_(factor))
    assert str(pruned("--gmp")[0]["perplexity"]["magnitude"]["builtin"]) == perplexity
