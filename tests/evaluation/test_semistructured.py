"""Check which matrices go to the semi-structured kernels and that nothing else changes; the kernels need a GPU."""

from unittest.mock import Mock

import pytest
import torch
from conftest import COMMON, CPU, modules_of, record_of, save
from makebelieve import Gpu
from transformers import LlamaConfig, LlamaForCausalLM

from mixgpt.evaluation import semistructured
from mixgpt.evaluation.measures import perplexities


@pytest.mark.parametrize("rows, columns, ones, fits", [(32, 64, 0, True), (96, 192, 0, True), (32, 64, 1, False),
                                                       (16, 64, 0, False), (32, 96, 0, False)])
def test_what_fits_is_2_to_4_sparse_in_sizes_of_the_kernels(rows, columns, ones, fits):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    W.view(-1, 4)[:, :2] = 0
    W[3, :ones] = 1
    assert semistructured.fits(W) == fits


@pytest.fixture
def halved():
    """Give a model with 2:4 sparse matrices, those of the MLP in sizes that fit."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**COMMON | sizes)).eval()
    for module in modules_of(model).values():
        module.weight.data.view(-1, 4)[:, :2] = 0
    return model


def test_both_kinds_of_kernels_get_the_same_input_and_the_weights_come_back(halved, tokens, monkeypatch):
    model = halved
    before = dict(model.named_parameters())
    expected = perplexities(model, {"": tokens}, 2, CPU)[""]
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda W: W.clone())
    found = semistructured.compare(model, {"a": tokens, "b": tokens}, 2, CPU)
    assert found["perplexity"] == {"a": expected, "b": expected} and found["difference"] == 0
    assert found["matrices"] == 3 * 5  # k_proj and v_proj have 16 rows
    assert found["speed_up"] == found["seconds"]["dense"] / found["seconds"]["semi_structured"] > 0
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda W: W * 1.5)
    found = semistructured.compare(model, {"a": tokens}, 2, CPU)
    assert found["difference"] > 0.01 and found["perplexity"]["a"] != expected
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize("failure, dtype, reason", [
    (None, torch.float32, "weights in 16 bits, these are float32; give --dtype bfloat16"),
    (None, torch.bfloat16, None), (None, torch.float16, None),
    (RuntimeError("CUDA error:\nmismatch"), torch.float16, "kernels do not run on this GPU (CUDA error: mismatch)")])
def test_the_reason_is_told_where_the_kernels_cannot_run(failure, dtype, reason, monkeypatch):
    with Gpu():
        monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", Mock(side_effect=failure or (lambda W: W)))
        found = semistructured.obstacle(torch.device("cuda"), dtype)
    assert found is None if reason is None else found.endswith(reason)


def test_on_a_cpu_the_run_goes_on_and_says_why_it_skipped_them(prune, tmp_path):
    out = prune("llama", "--prunen 2 --prunem 4 --semi-structured --save", tmp_path / "saved")
    reason = "the kernels need a CUDA GPU, this runs on the cpu"
    assert f"kernels  --semi-structured is skipped: {reason}\n" in out
    assert f"\nsemi-structured kernels: skipped, {reason}\n" in out
    assert record_of(tmp_path / "saved")["semi_structured"] == {"skipped": reason}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_give_what_dense_ones_give(halved, tokenizer, prune, tmp_path):
    if reason := semistructured.obstacle(torch.device("cuda"), torch.bfloat16):
        pytest.skip(reason)
    save(tmp_path / "model", halved.bfloat16(), tokenizer, {})
    out = prune("llama", "--device cuda --semi-structured --save", tmp_path / "saved", model=tmp_path / "model")
    record = record_of(tmp_path / "saved")
    found = record["semi_structured"]
    assert found["matrices"] == 15 and 0 <= found["difference"] < 0.02
    assert found["perplexity"]["builtin"] == pytest.approx(record["perplexity"]["dense"]["builtin"], rel=0.02)
    assert "times as fast as on dense ones" in out
