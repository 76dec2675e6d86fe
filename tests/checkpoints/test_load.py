"""Check loading, what is refused, and that a saved folder loads with plain transformers."""

import json

import pytest
import sentencepiece as spm
import torch
from conftest import make, save
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import datautils
import llama
import opt
from mixgpt.checkpoints import load
from mixgpt.common.errors import InputError


@pytest.mark.parametrize("name, other, script", [
    ("bloom", opt.FAMILY, "bloom.py"), ("opt", llama.FAMILY, "opt.py"), ("qwen3", opt.FAMILY, "llama.py"),
])
def test_a_checkpoint_of_another_family_is_refused_with_its_script(name, other, script, checkpoint_folder):
    architecture = type(make(name)[1]).__name__
    with pytest.raises(InputError, match=f"this is a {architecture}; use {script}"):
        load.load_config(checkpoint_folder(name), other)


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
