"""Check the swaps of the benchmark of attribution against whole forward passes of the models."""

import copy
import re

import attribution
import pytest
import torch
from conftest import make

from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import linears


def divergence(p, q, tokens):
    """Return the mean KL(p ‖ q) of tokens 2 … T by whole forward passes."""
    log_p, log_q = (model(tokens).logits[:, :-1].double().log_softmax(-1) for model in (p, q))
    return ((log_p - log_q) * log_p.exp()).sum(-1).mean().item()


@torch.no_grad()
def test_matrices_are_swapped_alone_and_together_and_put_back():
    dense, tokens = make("llama"), torch.randint(0, 384, (3, 24), generator=torch.Generator().manual_seed(0))
    pruned, before = copy.deepcopy(dense), copy.deepcopy(dense.state_dict())
    for parameter in linears(layers_of(pruned)[1]).values():
        parameter.weight.mul_(torch.rand(parameter.weight.shape) < 0.5)
    found, whole = attribution.attribute(dense, pruned, tokens)
    assert whole == pytest.approx(divergence(dense, pruned, tokens), rel=1e-3)
    assert {layer for (_, layer), values in found.items() if min(values) > 1e-9} == {1}
    assert {kind for (kind, _), values in found.items() if len(values) == 1} == {"v_proj + o_proj"}
    for kind, names in attribution.units_of(linears(layers_of(dense)[1])).items():
        other = copy.deepcopy(dense)
        for name in names:
            linears(layers_of(other)[1])[name].weight.copy_(linears(layers_of(pruned)[1])[name].weight)
        assert found[kind, 1][0] == pytest.approx(divergence(dense, other, tokens), rel=1e-3, abs=1e-8)
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())


def test_all_experts_of_a_kind_are_swapped_together():
    names = ["attn.v_proj", "experts.0.up_proj", "experts.1.up_proj", "attn.o_proj", "attn.q_proj"]
    assert attribution.units_of(names) == {
        "v_proj + o_proj": [names[0], names[3]], "up_proj": names[1:3], "q_proj": [names[4]]}


def test_noise_has_the_norms_of_the_rows_of_what_is_lost():
    W, W_hat = torch.randn(5, 40), torch.randn(5, 40)
    noise = attribution.noisy(W, W_hat, torch.Generator().manual_seed(0)) - W
    torch.testing.assert_close(noise.norm(dim=1), (W - W_hat).norm(dim=1))


def test_rows_sum_kinds_over_thirds_of_the_layers():
    found = {(kind, layer): (0.001 * (layer + 1), 0.1) for kind in ("q_proj", "up_proj") for layer in range(6)}
    assert attribution.rows_of(found, 0.5) == [
        *([kind, "3.0 (200.0)", "7.0 (200.0)", "11.0 (200.0)", "21.0 (600.0)"] for kind in ("q_proj", "up_proj")),
        ["all, summed", "", "", "", "42.0"], ["all together", "", "", "", "500.0"]]


def test_a_saved_model_is_compared_with_the_dense_one(checkpoint_folder, prune, tmp_path, capsys):
    prune("llama", "--sparsity .5 --save", tmp_path / "pruned")
    assert attribution.main([str(checkpoint_folder("llama")), str(tmp_path / "pruned"), "builtin", "--nsamples", "2",
                             "--seqlen", "16", "--dtype", "float32"]) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header == "| kind | first third | second third | last third | all layers |"
    assert re.fullmatch(r"\| all together \|  \|  \|  \| [\d.]+ \|", rows[-1])
