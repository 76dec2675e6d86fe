"""Check the files of a finished model against those that transformers writes, and what lies on the disk meanwhile."""

import json
from pathlib import Path

import pytest
import torch
from commands import SMALL, run
from conftest import FAMILIES, make, save, saved_tensors
from transformers import AutoModelForCausalLM

from mixgpt.checkpoints import shards
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming


def weights(folder):
    """Return {name: bytes} of the safetensors files of a folder, and what its index says where there is one."""
    found = {file.name: file.read_bytes() for file in Path(folder).glob("*.safetensors")}
    index = Path(folder) / "model.safetensors.index.json"
    return found, json.loads(index.read_text())["weight_map"] if index.exists() else None


@pytest.mark.parametrize("largest", [5 * 10**9, 60_000, 5_000])  # all in one; parts of layers; a matrix each
def test_the_files_are_those_of_save_pretrained(largest, tiny, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", largest)
    _, model = tiny
    model.save_pretrained(tmp_path / "plain", max_shard_size=largest)
    save(tmp_path / "saved", model, tokenizer, {})
    assert weights(tmp_path / "saved") == weights(tmp_path / "plain")
    assert (len(weights(tmp_path / "saved")[0]) == 1) == (largest == 5 * 10**9)


@pytest.mark.parametrize("largest", [5 * 10**9, 60_000])
@pytest.mark.parametrize("options", [[], ["--sparsity", ".5", "--gmp", "--maxlayer", "2"]])
def test_a_model_on_disk_is_saved_as_save_pretrained_saves_it(options, largest, checkpoint_folder, tmp_path,
                                                              monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", largest)
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", *options, *SMALL, "--eval", "--save",
               tmp_path / "saved") == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    dense = AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama")).state_dict()
    for name, tensor in saved.items():
        pruned = bool(options) and "_proj" in name and "layers.2" not in name
        assert torch.equal(tensor, dense[name]) != pruned, name
    _, model = make("llama")  # from_pretrained would remember an order of its own
    model.load_state_dict(saved)
    model.save_pretrained(tmp_path / "plain", max_shard_size=largest)
    assert weights(tmp_path / "saved") == weights(tmp_path / "plain")
    assert not (tmp_path / "saved" / "progress").exists()


def test_the_disk_holds_the_model_and_one_shard_at_most(checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", 40_000)
    folder, most = tmp_path / "saved", []
    append = streaming._append

    def measured(stream, tensor):
        checksum = append(stream, tensor)
        stream.flush()
        layers = list(folder.glob("progress/layer-*"))
        most.append(sum(file.stat().st_size for file in (*folder.glob("model*"), *layers) if file.suffix != ".json"))
        return checksum

    monkeypatch.setattr(streaming, "_append", measured)
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--gmp", *SMALL,
               "--eval", "--save", folder) == 0
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size > 3 * 40_000
    assert max(most) <= size + 40_000 + 31_000  # a layer that is in two shards goes when both are there


def test_a_tensor_that_reads_back_differently_is_named_and_leaves_no_file(tmp_path, monkeypatch):
    state, file = {"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "read", lambda places: {name: torch.ones(3) for name in places})
        with pytest.raises(InputError, match=f"--save {tmp_path}: b in .* differs from what"):
            shards.write(file, state, state.get)
    assert list(tmp_path.iterdir()) == []
    shards.write(file, state, state.get)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved_tensors(tmp_path).items())


def test_tied_weights_in_memory_do_not_share_a_place(tmp_path):
    _, model = make("llama")
    state = {"a": model.lm_head.weight, "b": model.model.embed_tokens.weight, "c": torch.ones(4, 4).T[:2]}
    assert shards.split(state) == dict.fromkeys("abc", "model.safetensors")
