"""Check that a model is saved in its own dtype by a CPU that computes in float32, and is the one in memory then."""

import json

import pytest
import torch
from conftest import CPU, OTHERS, contents, make, record_of, saved_tensors
from modeling import test_experts

from mixgpt.app.checks import check
from mixgpt.app.settings import Settings
from mixgpt.checkpoints import card
from mixgpt.common import runtime
from mixgpt.pruning import layerwise

BEST = "--sparsity .5 --preset best"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Be a CPU that has no instructions for bfloat16."""
    monkeypatch.setattr(runtime, "multiplies_bfloat16", lambda device: False)


@pytest.fixture
def base(tokenizer, tmp_path):
    """Return a function that saves a model of a kind in a dtype. Returns its folder."""
    def save(kind, dtype):
        model = make(kind) if kind in OTHERS or kind in ("opt", "llama", "qwen2") else test_experts.build(kind)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)  # which rotated heads change
        model.to(dtype).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return save


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, options", [
    ("llama", "--sparsity .5 --gmp --wbits 3"), ("qwen2", f"{BEST}"), ("opt", f"{BEST} --wbits 4 --effort 1.5"),
    ("llama", f"{BEST} --wbits 4"), ("llama", "--wbits 8 --sym --act-order --save-format compressed-tensors"),
    ("wide llama", f"{BEST} --wbits 4 --save-format sparse"), ("qwen3-moe", "--sparsity .5 --experts .25 --rotate"),
    ("gpt2", "--prunen 2 --prunem 4"), ("kimi_linear", "--sparsity .5 --minlayer 1")])
def test_the_saved_model_has_its_own_dtype_and_is_the_one_in_memory(kind, options, dtype, base, prune, tmp_path):
    model, folder = base(kind, dtype), tmp_path / "saved"
    out, name = prune("llama", options, "--save", folder, model=model), str(dtype).removeprefix("torch.")
    assert f"dtype    float32 in memory, {name} on disk" in out
    prune("llama", "--eval --dtype", name, "--save", tmp_path / "unpruned", model=model)
    before, after = ({key: tensor.dtype for key, tensor in saved_tensors(path).items() if tensor.is_floating_point()}
                     for path in (tmp_path / "unpruned", folder))
    assert dtype in after.values() and {*after.values()} <= {*before.values()}
    assert "--save-format" in options or after.items() <= before.items()
    prune("llama", "--record", tmp_path / "again.json", model=folder)
    records = record_of(folder), json.loads((tmp_path / "again.json").read_text())
    assert len({list(record["perplexity"].values())[0]["builtin"] for record in records}) == 1
    assert len({record["sparsity"] for record in records}) == 1


@pytest.mark.parametrize("options", [BEST, f"{BEST} --wbits 4"])
def test_an_interrupted_run_goes_on_to_the_same_model(options, base, prune, tmp_path, monkeypatch):
    model, step, calls = base("qwen2", torch.bfloat16), layerwise.prune_in_place, []
    prune("llama", options, "--save", tmp_path / "whole", model=model)
    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "prune_in_place", lambda *given: step(*given) if calls.append(1) or len(calls) < 7
                      else 1 / 0)
        prune("llama", options, "--save", tmp_path / "broken", model=model, status=1)
    prune("llama", options, "--resume --save", tmp_path / "broken", model=model)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_plan_counts_the_result_in_the_dtype_that_is_saved(base):
    settings = Settings(str(base("wide llama", torch.bfloat16)), "builtin", sparsity=0.5, nsamples=4, seqlen=32)
    model = check(settings, CPU, runtime.Clock(CPU)).model
    assert model.dtype == torch.float32
    assert card.sizes([], model, settings)["dense"] == sum(2 * weight.numel() for weight in model.parameters())
