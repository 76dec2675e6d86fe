"""Take the zeros of another model, and fit the kept weights to the calibration inputs."""

import re

import pytest
import torch
from conftest import CPU, record_of
from safetensors.torch import load_file
from test_sparsegpt import correlated_inputs, damped, random

from mixgpt.common.choices import SOLVERS
from mixgpt.pruning.hessian import InputHessian
from mixgpt.pruning.solvers import Recipe, prune_in_place
from mixgpt.pruning.targets import Target


@pytest.mark.parametrize("ordered", [False, True])
def test_kept_weights_are_the_least_squares_solution_on_the_given_mask(ordered):
    X, W = correlated_inputs(600, 64).float(), random(20, 64).float()
    mask, hessian = random(20, 64, seed=3) < 0.2, InputHessian(64, 1, CPU)
    hessian.add_batch(X)
    order = random(64, seed=5).argsort() if ordered else None
    percdamp = hessian.factor(0.01, order)
    H = damped(hessian.H.double(), percdamp)
    pruned = [W.clone(), 2 * W]
    targets = [Target(gone.double().mean().item()) for gone in (mask, ~mask)]
    prune_in_place(hessian, pruned, targets, Recipe(SOLVERS["admm"].load()), masks=[mask, ~mask])
    for found, optimum, gone in zip(pruned, (W, 2 * W), (mask, ~mask), strict=True):
        assert torch.equal(found == 0, gone)
        for row, wanted, kept in zip(found.double(), optimum.double(), ~gone, strict=True):
            best = torch.zeros_like(row)
            best[kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ wanted)
            losses = [(w - wanted) @ H @ (w - wanted) for w in (row, best, wanted * kept)]
            assert losses[1] <= losses[0] * (1 + 1e-6) and losses[0] - losses[1] <= 0.01 * (losses[2] - losses[1])


@pytest.mark.parametrize("given, options", [
    ("--sparsity .5 --sparsity-way global --alpha .3", "--sparsity .5 --preset best"),
    ("--prunen 2 --prunem 4 --gmp", "--prunen 2 --prunem 4 --preset best --wbits 4"),
    ("--sparsity .5 --gmp --minlayer 1", "--sparsity .5 --minlayer 1 --solver admm --wbits 4 --act-order")])
def test_the_result_has_the_zeros_of_the_other_model_and_its_own_weights(given, options, prune, tmp_path):
    prune("llama", given, "--save", tmp_path / "given")
    out = prune("llama", options, "--mask-from", tmp_path / "given", "--save", tmp_path / "saved")
    given, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("given", "saved"))
    record, changed = record_of(tmp_path / "saved"), 0
    for name, weight in given.items():
        extra = (saved[name] == 0) & (weight != 0)  # Even grids round small weights to 0.
        assert (saved[name][weight == 0] == 0).all() and extra.float().mean() <= 0.1 * ("act-order" in options)
        changed += not torch.equal(saved[name], weight)
    assert changed == len([row for row in record["matrices"] if "target" in row]) > 0
    assert record["settings"]["mask_from"] == str(tmp_path / "given") and "given masks" in out


@pytest.mark.parametrize("model, options, message", [
    ("llama", "--sparsity .5 --preset best", r"0\.00% of its weights are 0, but --sparsity is 0\.5$"),
    ("llama", "--prunen 2 --prunem 4 --preset best",
     r"layer 0 self_attn\.q_proj does not have 2 zeros in every 4 weights of a row$"),
    ("opt", "--sparsity .5 --preset best", r"has no layer 0 self_attn\.k_proj of \(16, 32\)$")])
def test_masks_that_do_not_fit_are_refused_before_anything_is_read(model, options, message, checkpoint_folder, prune):
    line = prune("llama", "--mask-from", checkpoint_folder(model), options, status=2)
    assert re.search(rf"--mask-from \S+: {message}", line.strip())


@pytest.mark.parametrize("options, flag", [
    ("", "--solver obs"), ("--solver admm --rotate", "--rotate"), ("--preset best --experts .5", "--experts"),

    ("--preset best --sparsity-way global", "--sparsity-way global")])
def test_options_that_would_change_the_masks_are_refused(options, flag, checkpoint_folder, prune):
    line = prune("llama", "--sparsity .5 --mask-from", checkpoint_folder("llama"), options, status=2)
    assert flag in line and "--mask-from" in line
