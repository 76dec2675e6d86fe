"""Write tiny models as .gguf files."""

import json

import gguf
import torch
from conftest import VOCABULARY
from transformers import AutoModelForCausalLM, LlamaConfig


def permuted(weight, heads):
    """Reorder rows of a query or key matrix from the halves of transformers to the pairs of GGUF's rotary layout."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, tokenizer, kind=None, change=None, seed=0):
    """Write a tiny random LLaMA as GGUF. Returns the model.

    kind: of quantization, for its matrices. change: called with the weights before, {name: tensor}.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                         tie_word_embeddings=True, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
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
    state = model.state_dict()
    if change:
        change(state)
    for key, weight in state.items():
        if key == "lm_head.weight":  # tied
            continue
        if "q_proj" in key or "k_proj" in key:
            weight = permuted(weight, 4 if "q_proj" in key else 2)
        weight, quantized = weight.numpy(), kind if kind and weight.dim() == 2 else None
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)),
                          gguf.quantize(weight, quantized) if quantized else weight, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
