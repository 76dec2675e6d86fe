"""Check which matrices go to the semi-structured kernels and that nothing else changes; the kernels need a GPU."""

import pytest
import semistructured
import torch
from commands import short_builtin  # noqa: F401, a fixture
from conftest import COMMON, CPU, modules_of, save
from transformers import LlamaConfig, LlamaForCausalLM

from mixgpt.evaluation.measures import perplexities

FITTING = 3 * 4 - 1  # not those with 16 rows or 96 columns, nor one with a weight too many
ON_GPU = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": 1}


def halved():
    model = LlamaForCausalLM(LlamaConfig(**COMMON | SIZES)).eval()
    for module in modules_of(model).values():
        module.weight.data.view(-1, 4)[:, :2] = 0
    model.model.layers[1].self_attn.q_proj.weight.data[3, 0] = 1
    return model


@pytest.mark.parametrize("factor", [1, 1.5])
def test_both_kinds_of_kernels_get_the_same_input_and_the_weights_come_back(factor, tokens, monkeypatch):
    model = halved()
    before, expected = dict(model.named_parameters()), perplexities(model, {"": tokens}, 2, CPU)[""]
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda W: W * factor)
    found = semistructured.compare(model, tokens, 2, CPU)
    assert found["matrices"] == FITTING and (found["difference"] > 0.01) == (factor != 1)
    assert (found["perplexity"] == pytest.approx(expected, rel=1e-5)) == (factor == 1)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_the_command_line_says_why_it_cannot_run_or_what_is_gained(device, tokenizer, tmp_path, capsys, monkeypatch):
    save(tmp_path, halved().bfloat16(), tokenizer, {})
    words = [str(tmp_path), "--seqlen", "32", "--device", device]
    if device == "cpu":
        assert semistructured.main(words) == 2 and "must be a CUDA GPU" in capsys.readouterr().err
        monkeypatch.setattr(semistructured, "check_kernels", lambda *_: None)
        monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", torch.clone)
    assert semistructured.main(words) == 0
    assert f" {FITTING} matrices compressed; their outputs differ by 0." in capsys.readouterr().out
