"""Check loading."""

import json

import sentencepiece as spm
from transformers import LlamaConfig

import datautils
from mixgpt.checkpoints import load


def test_the_empty_special_tokens_of_early_llama_conversions_are_put_right(tmp_path):
    text = "Names refer to objects."
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(datautils.load_rows("builtin", "train", None)[0][:150]), vocab_size=600, minloglevel=2,
        model_prefix=tmp_path / "tokenizer", model_type="bpe", byte_fallback=True, character_coverage=0.99)
    LlamaConfig(vocab_size=600, bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}))
    tokenizer = load.load_tokenizer(tmp_path)
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(text)
    assert tokenizer(text).input_ids == [1, *pieces]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
