"""Prune tiny random models of every class that is claimed, through the whole command line."""

import re

import conftest
import pytest
import torch
from conftest import CPU, VOCABULARY, logits, measure_sparsity, saved_tensors, slow_but
from transformers import AutoConfig, AutoModelForCausalLM

from mixgpt.checkpoints import load
from mixgpt.common.errors import InputError
from mixgpt.evaluation import selfcheck
from mixgpt.modeling import decoder
from mixgpt.modeling.decoder import path_of, take
from mixgpt.modeling.experts import use_linears
from mixgpt.modeling.streaming import locations_of
from mixgpt.pruning.rotation import VALUES

COMMON = conftest.COMMON | conftest.TOKEN_IDS
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.2,
       "bos_token_id": 0, "eos_token_id": 1}
WINDOW = {"sliding_window": 8}
LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
FALCON = {key: value for key, value in COMMON.items() if key != "head_dim"}
# model_type -> what its configuration needs beside COMMON, or all that it needs
BESIDE = {
    "apertus": {}, "arcee": {}, "cohere": {"logit_scale": 0.2}, "cohere2": LOCAL | {"logit_scale": 0.2},
    "diffllama": {}, "ernie4_5": {}, "exaone4": LOCAL, "gemma": {}, "gemma2": WINDOW | {"final_logit_softcapping": 2.0},
    "gemma3_text": LOCAL, "glm": {}, "glm4": {},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}, "helium": {},
    "hunyuan_v1_dense": {}, "jais2": {}, "llama": {}, "ministral": LOCAL, "mistral": WINDOW, "nemotron": {},
    "olmo": {}, "olmo2": {}, "olmo3": LOCAL, "persimmon": {}, "phi": {}, "phi3": {}, "qwen2": {}, "qwen3": {},
    "seed_oss": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {}, "vaultgemma": WINDOW,
}
ALONE = {"codegen": GPT | {"rotary_dim": 8}, "falcon": FALCON | {"new_decoder_architecture": True}, "gpt2": GPT,
         "gpt_bigcode": GPT, "gpt_neox": COMMON, "gptj": GPT | {"rotary_dim": 8}, "openai-gpt": GPT,
         "biogpt": COMMON,
         "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
                 "bos_token_id": 0, "eos_token_id": 1}}
# their layers take arguments that depend on the tokens; Gemma 4's also keys and values of earlier layers
GEMMA4 = COMMON | LOCAL | {"global_head_dim": 16, "num_hidden_layers": 4, "hidden_size_per_layer_input": 8,
                           "vocab_size_per_layer_input": VOCABULARY,
                           "layer_types": ["sliding_attention", "full_attention"] * 2}
ZAMBA2 = {key: value for key, value in COMMON.items() if key not in ("head_dim", "max_position_embeddings")} | {
    "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_mem_blocks": 2, "adapter_rank": 4, "mamba_d_state": 8,
    "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 8}
BY_TOKEN = {"gemma4_text": GEMMA4, "gemma4_text shared": GEMMA4 | {"num_kv_shared_layers": 2}, "zamba2": ZAMBA2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
# layers of several kinds; Mamba's mixer.dt_proj is not called as a module, and stays dense
HYBRID = {
    "bamba": COMMON | MAMBA2 | {"attn_layer_indices": [1]},
    "falcon_h1": COMMON | MAMBA2 | {"mamba_d_ssm": 64, "ssm_multipliers": [0.5, 2.0, 1.5, 0.7, 1.2]},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3},
}
LIKE_LLAMA = ["cohere2", "gemma2", "granite", "phi3", "starcoder2"]
MODELS = {kind: COMMON | options for kind, options in BESIDE.items()} | ALONE | BY_TOKEN | HYBRID


def build(kind, **options):
    """Build the tiny random model of a model_type, or of one of its variants."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split()[0], **MODELS[kind] | options)).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_streamed_logits_are_those_of_the_models_own_forward(kind, tokens, folder):
    model = build(kind)
    with torch.no_grad():
        own = model(tokens, use_cache=False).logits
        use_linears(model)
        expected = model(tokens, use_cache=False).logits
    assert torch.allclose(expected, own, rtol=1e-5, atol=1e-6)  # GPT-2's products round otherwise
    assert torch.equal(logits(model, tokens, len(tokens), CPU), expected)
    assert torch.allclose(logits(model, tokens, 2, CPU), expected, rtol=1e-4, atol=1e-4)
    opened = load.open_model(folder(kind), model.config, "auto")
    assert locations_of(opened) and torch.equal(logits(opened, tokens, len(tokens), CPU), expected)


def test_a_residual_stream_that_layers_widen_is_not_rounded_between_them(tokens):
    model = build("mamba").bfloat16()
    with torch.no_grad():
        assert torch.equal(logits(model, tokens, len(tokens), CPU), model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("kind, options, reason", [
    ("gemma3n_text", GEMMA4 | {"laurel_rank": 4, "activation_sparsity_pattern": None, "num_kv_shared_layers": 2},
     "its layers take hidden states of (4, 1, 16, "),
    ("dory", FALCON, "cannot be run one decoder layer at a time: "),
    ("zamba2", ZAMBA2 | {"num_mem_blocks": 1}, "layers 1 and 2 of this Zamba2ForCausalLM share the weights of "
                                               "shared_transformer.self_attn.q_proj, which is not supported")])
def test_layers_that_cannot_run_one_at_a_time_are_refused_with_the_reason(kind, options, reason):
    config = AutoConfig.for_model(kind, **options)
    skeleton = load.skeleton(config)
    with pytest.raises(InputError, match=re.escape(reason)):
        load.check_layers("M", skeleton)
        selfcheck.check("M", skeleton, CPU)


@pytest.mark.parametrize("kind", BY_TOKEN)
def test_arguments_of_other_sequences_do_not_pass_the_self_check(kind, monkeypatch):
    skeleton = load.skeleton(build(kind).config)
    selfcheck.check("M", skeleton, CPU)
    monkeypatch.setattr(decoder, "take", lambda given, rows, *more: take(given, slice(0, len(range(3)[rows])), *more))
    with pytest.raises(InputError, match=r"on random weights, its logits differ by \d"):
        selfcheck.check("M", skeleton, CPU)


@pytest.mark.parametrize("passes", ["", pytest.param("--no-true-sequential", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", slow_but(["gpt2", "gemma4_text shared", "zamba2", "mamba", "phi3"], [
    *ALONE, *BY_TOKEN, *HYBRID, *LIKE_LLAMA]))
def test_a_model_is_pruned_by_best_saved_and_loaded_again(kind, passes, folder, prune, tmp_path):
    prune("llama", "--sparsity .5 --preset best", passes, "--save", tmp_path / "saved", model=folder(kind))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    use_linears(loaded)
    matrices = [matrix for matrix in measure_sparsity(loaded) if matrix.name != "mixer.dt_proj"]
    assert sum(m.zeros for m in matrices) == round(0.5 * sum(m.numel for m in matrices))
    dense, pruned = saved_tensors(folder(kind)), saved_tensors(tmp_path / "saved")
    assert dense.keys() == pruned.keys()
    changed = {key for key in dense if not torch.equal(dense[key], pruned[key])}
    names = {f"{path_of(loaded, matrix.layer, matrix.name)}.weight" for matrix in matrices}
    biases = {f"{name.removesuffix('weight')}bias" for name in names if name.split(".")[-2] in VALUES}
    assert names <= changed <= names | biases  # those of values are rotated with them
