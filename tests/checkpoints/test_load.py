"""Check loading, what is refused, and that a saved folder loads with plain transformers."""

import json

import pytest
import sentencepiece as spm
import torch
from commands import SMALL, run, short_builtin  # noqa: F401, a fixture
from conftest import measure_sparsity, save
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import datautils
from mixgpt.checkpoints import load


@pytest.mark.parametrize("name, other", [("bloom", "opt.py"), ("opt", "llama.py"), ("qwen3", "opt.py")])
def test_any_command_line_prunes_a_model_of_another_family(name, other, checkpoint_folder, tmp_path):
    assert run(other, checkpoint_folder(name), "builtin", "--sparsity", ".5", *SMALL, "--save", tmp_path / "saved") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    matrices = measure_sparsity(model)
    assert matrices and all(matrix.zeros == matrix.numel // 2 for matrix in matrices)


def test_a_saved_folder_loads_with_plain_transformers_and_gives_the_same_logits(tiny, tokenizer, tokens, tmp_path):
    model = tiny
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
