"""Check loading, what is refused, and that a saved folder loads with plain transformers."""

import json
from types import SimpleNamespace

import gguf
import pytest
import sentencepiece as spm
import torch
from conftest import VOCABULARY, make, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, T5Config

import datautils
import llama
import opt
from mixgpt.checkpoints import load, shards
from mixgpt.common.errors import InputError


@pytest.mark.parametrize("name, other, script", [
    ("bloom", opt.FAMILY, "bloom.py"), ("opt", llama.FAMILY, "opt.py"), ("qwen3", opt.FAMILY, "llama.py"),
])
def test_a_checkpoint_of_another_family_is_refused_with_its_script(name, other, script, checkpoint_folder):
    architecture = type(make(name)[1]).__name__
    with pytest.raises(InputError, match=f"this is a {architecture}; use {script}"):
        load.load_config(checkpoint_folder(name), other)


def test_a_model_of_no_family_is_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="t5 is not a causal language model"):
        load.load_config(tmp_path, opt.FAMILY)


@pytest.mark.parametrize("model", ["facebook/opt-125m", "no/such/thing", "missing.gguf"])
def test_a_model_that_cannot_be_found_is_one_line(model):
    with pytest.raises(InputError, match=f"model {model}: ") as error:
        load.load_config(model, opt.FAMILY)
    assert "\n" not in str(error.value)


def damaged(folder, tmp_path, damage):
    """Copy a checkpoint with `damage` done to its dict of weights."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_weights_that_are_nan_are_refused_by_name(checkpoint_folder, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    folder = damaged(checkpoint_folder("llama"), tmp_path, lambda state: state[key][0].fill_(float("nan")))
    with pytest.raises(InputError, match=f"{key} holds NaN or inf"):
        load.load_model(folder, "auto")


def test_weights_that_are_missing_are_refused_by_name(checkpoint_folder, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    folder = damaged(checkpoint_folder("llama"), tmp_path, lambda state: state.pop(key))
    with pytest.raises(InputError, match=f"the checkpoint lacks {key}"):
        load.load_model(folder, "auto")


def test_a_truncated_file_is_refused(checkpoint_folder, tmp_path):
    folder = damaged(checkpoint_folder("llama"), tmp_path, lambda state: None)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:len(content) // 2])
    with pytest.raises(InputError) as error:
        load.load_model(folder, "auto")
    assert "\n" not in str(error.value)


def test_a_saved_folder_loads_with_plain_transformers_and_gives_the_same_logits(tiny, tokenizer, tokens, tmp_path):
    _, model = tiny
    save(tmp_path / "saved", model, tokenizer, {"seed": 0})
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("Names refer to objects.").input_ids == tokenizer(
        "Names refer to objects.").input_ids
    assert json.loads((tmp_path / "saved" / "mixgpt.json").read_text()) == {"seed": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_can_be_loaded_only_when_all_of_it_is_written(tokenizer, tmp_path, monkeypatch):
    _, model = make("llama")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(model.config), "save_pretrained", fail)
    with pytest.raises(InputError, match="the configuration cannot be written.*disk full"):
        save(tmp_path / "saved", model, tokenizer, {})
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", config=model.config)
    monkeypatch.undo()
    save(tmp_path / "saved", model, tokenizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("case", ["file", "filled", "below a file", "too large"])
def test_a_save_path_that_cannot_be_used_is_refused_and_nothing_is_left(case, tmp_path):
    (tmp_path / "file").write_text("kept")
    folder = {"file": tmp_path / "file", "filled": tmp_path, "below a file": tmp_path / "file" / "saved",
              "too large": tmp_path / "new" / "saved"}[case]
    with pytest.raises(InputError, match=f"--save {folder}: "):
        load.check_save(folder, 10**18 if case == "too large" else 0, False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layers, saved, needed", [
    (0, 0, 140), (60, 0, 80), (100, 0, 40), (80, 20, 40), (20, 70, 40), (0, 70, 60), (0, 100, 0)])
def test_room_for_the_model_and_a_shard_beside_its_layers_is_asked_for(layers, saved, needed, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", 40)
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "run.json").write_text("{}")
    (tmp_path / "progress" / "layer-00000.safetensors").write_bytes(bytes(layers))
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(bytes(saved))
    for free in (needed, needed - 1):
        monkeypatch.setattr(load.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free == needed:
            load.check_save(tmp_path, 100, True)
        else:
            with pytest.raises(InputError, match=r"needs 0.000 GB"):
                load.check_save(tmp_path, 100, True)


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_save_path_is_accepted_and_nothing_is_left(exists, tmp_path):
    folder = tmp_path / "a" / "b"
    if exists:
        folder.mkdir(parents=True)
    load.check_save(folder, 1, False)
    assert folder.exists() == exists


def test_the_empty_special_tokens_of_early_llama_conversions_are_put_right(tmp_path):
    text = "Names refer to objects."
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(datautils.load_rows("builtin", "train", None)[0]), model_prefix=tmp_path / "tokenizer",
        vocab_size=600, model_type="bpe", byte_fallback=True, character_coverage=0.99, minloglevel=2)
    LlamaConfig(vocab_size=600, bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}))
    tokenizer = load.load_tokenizer(tmp_path)
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert tokenizer(text).input_ids == [1, *pieces]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def permuted(weight, heads):
    """Reorder rows of a query or key matrix from the halves of transformers to the pairs of GGUF's rotary layout."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture
def gguf_file(tmp_path, tokenizer):
    """Write a tiny random LLaMA as GGUF. Returns (path, model)."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         tie_word_embeddings=True, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_rope_freq_base(10000.0)
    vocabulary = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight":  # tied
            continue
        if "q_proj" in key or "k_proj" in key:
            weight = permuted(weight, 4 if "q_proj" in key else 2)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_file_loads_and_can_be_saved(gguf_file, tokens, tmp_path):
    path, model = gguf_file
    load.load_config(path, llama.FAMILY)
    loaded, tokenizer = load.load_model(path, "auto"), load.load_tokenizer(path)
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.allclose(loaded(tokens).logits, expected, atol=1e-5)
        save(tmp_path / "saved", loaded, tokenizer, {})
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.allclose(reloaded(tokens).logits, expected, atol=1e-5)
