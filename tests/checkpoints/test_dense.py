"""Check the files of a finished model against those that transformers writes, byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make, save
from modeling import test_experts
from transformers import AutoModelForCausalLM

from mixgpt.checkpoints import formats, load
from mixgpt.modeling.streaming import locations_of


def weights(folder):
    """Return {name: bytes} of the safetensors files of a folder, and what its index says where there is one."""
    found = {file.name: file.read_bytes() for file in Path(folder).glob("*.safetensors")}
    index = Path(folder) / "model.safetensors.index.json"
    return found, json.loads(index.read_text())["weight_map"] if index.exists() else None


@pytest.mark.parametrize("largest", [5 * 10**9, 60_000, 5_000])  # all in one; parts of layers; a matrix each
def test_the_files_are_those_of_save_pretrained(largest, tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", largest)
    tiny.save_pretrained(tmp_path / "plain", max_shard_size=largest)
    save(tmp_path / "saved", tiny, tokenizer, {})
    assert weights(tmp_path / "saved") == weights(tmp_path / "plain")
    assert (len(weights(tmp_path / "saved")[0]) == 1) == (largest == 5 * 10**9)


@pytest.mark.parametrize("largest", [5 * 10**9, 60_000])
@pytest.mark.parametrize("options", ["", "--sparsity .5 --gmp --maxlayer 2"])
def test_a_model_on_disk_is_saved_as_save_pretrained_does(options, largest, checkpoint_folder, prune, tmp_path,
                                                          monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", largest)
    prune("llama", options, "--eval --save", tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama")).state_dict()
    for name, tensor in saved.items():
        pruned = bool(options) and "_proj" in name and "layers.2" not in name
        assert torch.equal(tensor, dense[name]) != pruned, name
    model = make("llama")  # from_pretrained would remember an order of its own
    model.load_state_dict(saved)
    model.save_pretrained(tmp_path / "plain", max_shard_size=largest)
    assert weights(tmp_path / "saved") == weights(tmp_path / "plain")
    assert not (tmp_path / "saved" / "progress").exists()


@pytest.mark.parametrize("build, name, on_disk", [
    (make, "llama", True), (test_experts.build, "kimi_linear", False)])  # whose experts are fused for transformers
def test_how_a_model_generates_is_kept(build, name, on_disk, tokenizer, tmp_path):
    build(name).save_pretrained(tmp_path / "dense")
    settings = {"eos_token_id": [1, 7, 9], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(settings))
    model = load.open_model(tmp_path / "dense", load.read_config(tmp_path / "dense"), "auto")
    assert bool(locations_of(model)) == on_disk
    save(tmp_path / "saved", model, tokenizer, {})
    assert (written := json.loads((tmp_path / "saved" / "generation_config.json").read_text())) == written | settings
