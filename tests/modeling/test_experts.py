"""Split mixtures of experts into linears, and prune them through the whole command line."""

import conftest
import pytest
import torch
from conftest import CPU, VOCABULARY, logits, measure_sparsity, record_of, saved_tensors
from transformers import AutoConfig, AutoModelForCausalLM

from mixgpt.checkpoints import load
from mixgpt.evaluation.measures import total_sparsity
from mixgpt.modeling.decoder import layers_of, layers_path, path_of
from mixgpt.modeling.experts import is_fused, is_split, layout_of, published, split_experts
from mixgpt.modeling.streaming import read

COMMON = {key: value for key, value in conftest.COMMON.items() if key != "head_dim"} | conftest.TOKEN_IDS | {
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
          "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
# model_type -> what its configuration needs beside COMMON
MODELS = {
    "afmoe": {"num_experts": 4, "head_dim": 8, "num_dense_layers": 1},
    "deepseek_v4": {"n_routed_experts": 4, "head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2,
                    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "sliding_window": 8,
                    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
                    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
                    "mlp_layer_types": ["hash_moe", "moe", "moe"], "moe_intermediate_size": 16},
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8,
                    "global_head_dim": 16, "num_kv_shared_layers": 2, "enable_moe_block": True, "num_experts": 4,
                    "top_k_experts": 2, "tie_word_embeddings": False, "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": VOCABULARY},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "deepseek_v2": LATENT, "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},  # chosen without gradients
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4}, "mixtral": {"num_local_experts": 4}, "olmoe": {"num_experts": 4},
    "granitemoehybrid": {"num_local_experts": 4, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4,
                         "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
                         "shared_intermediate_size": 24},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "kimi_linear": LATENT | {"num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4, "q_lora_rank": None,
                             "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4,
                   "head_dim": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
                   "chunk_size": 8, "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 24},
    "phimoe": {"num_local_experts": 4}, "qwen2_moe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [1]},
}
LEFT_DENSE = {"afmoe": {"mlp.router.gate"}, "deepseek_v4": {"mlp.gate", "self_attn.o_a_proj", "attn_hc.fn", "ffn_hc.fn",
                                                            "self_attn.compressor.position_bias",
                                                            "self_attn.compressor.indexer.position_bias"},
              "gemma4_text": {"router.proj"}, "gpt_oss": {"mlp.router"}, "hunyuan_v1_moe": {"mlp.gate.wg"},
              "granitemoe": {"block_sparse_moe.router"},
              "granitemoehybrid": {"block_sparse_moe.router", "mamba.conv1d"},
              "jamba": {"feed_forward.router", "mamba.A_log", "mamba.conv1d", "mamba.dt_proj"},
              "kimi_linear": {"mlp.gate", "self_attn.conv1d", "self_attn.forget_gate.A_log"},
              "nemotron_h": {"mixer.conv1d", "mixer.gate"}, "phimoe": {"mlp.router"},
              "qwen2_moe": {"mlp.gate", "mlp.shared_expert_gate"}}


def build(kind, **options):
    """Build the tiny random model of a model_type, as transformers does."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON | MODELS[kind] | options)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # the experts of each token, which are not random
            buffer.random_(4)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_split_experts_compute_what_fused_ones_do(kind, tokens):
    model, fused = build(kind), build(kind)
    split_experts(model)
    assert any(map(is_split, model.modules())) and not any(map(is_fused, model.modules()))
    with torch.no_grad():
        expected = fused(tokens, use_cache=False).logits
        assert torch.allclose(model(tokens, use_cache=False).logits, expected, atol=1e-5)
    assert torch.allclose(logits(model, tokens, 2, CPU), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "kimi_linear"])  # which has none of that kind
def test_the_layout_is_that_of_the_folder_that_transformers_saves(kind, folder):
    model, stored = build(kind), saved_tensors(folder(kind))
    places = published(build(kind))
    split_experts(model)
    layout = layout_of(model)
    assert places == {name: layout.get(name, (name, None)) for name in places}
    for name, tensor in model.state_dict().items():
        key, part = places[name]
        assert torch.equal(part.of(stored[key]) if part else stored[key], tensor), name
    assert {key for key, _ in places.values()} == set(stored)


def test_what_cannot_hold_experts_is_refused(prune, tmp_path):
    assert prune("qwen3-moe", "--sparsity .5 --save-format sparse --save", tmp_path / "saved", status=2) == (
        "llama.py: error: --save-format sparse: does not support mixtures of experts, nor "
        "checkpoints whose matrices are transposed (GPT-2), joined or split; must be dense\n")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind, options, message", [
    ("llama4_text", {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8,
                                   "intermediate_size_mlp": 48, "num_hidden_layers": 2},
     "keeps most of its weights in tensors of three dimensions, which are not pruned: feed_forward.experts.gate_up_proj"
     ", feed_forward.experts.down_proj"),
    ("jetmoe", {"num_local_experts": 4, "kv_channels": 8},
     "keeps most of its weights in tensors of three dimensions, which are not pruned: mlp.input_linear, ")])
def test_models_nothing_prunes_are_refused(kind, options, message, tokenizer, prune, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "open_model", lambda *_, **__: pytest.fail("weights are read"))
    config = AutoConfig.for_model(kind, **COMMON | options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert message in prune("llama", "--sparsity .5", model=tmp_path / "model", status=2)


@pytest.mark.parametrize("kind, dtype", [("deepseek_v3", torch.bfloat16), ("gpt_oss", torch.float16)])
def test_what_a_class_keeps_in_float32_is_read_so_from_disk(kind, dtype, folder):
    path = str(folder(kind))
    on_disk = load.open_model(path, load.read_config(path), dtype)
    loaded = load.load_model(path, dtype)
    tensors, expected = read(layers_of(on_disk)[-1]), layers_of(loaded)[-1].state_dict()
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        name: tensor.dtype for name, tensor in expected.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype, torch.float32}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind, options", [
    *(pytest.param(kind, "--preset best" if kind in ("deepseek_v32", "deepseek_v4", "gemma4_text") else "", marks=[
        pytest.mark.slow] * (kind not in ("gemma4_text", "deepseek_v3", "nemotron_h"))) for kind in MODELS),
    ("gpt_oss", "--preset best"), ("jamba", "--preset best"), ("jamba", "--preset mixgpt"),
    ("qwen3_moe", "--prunen 2 --prunem 4 --preset best"), ("gpt_oss", "--wbits 4"), ("qwen3_moe", "--gmp")])
def test_a_mixture_is_pruned_saved_in_its_published_layout_and_loaded_again(kind, options, folder, prune, tmp_path):
    sparsity = "" if "prunen" in options else "--sparsity .5"
    prune("llama", sparsity, options, "--save", tmp_path / "saved", model=folder(kind))
    record = record_of(tmp_path / "saved")
    dense, pruned = saved_tensors(folder(kind)), saved_tensors(tmp_path / "saved")
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in pruned.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in dense.items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    split_experts(loaded)
    matrices = [matrix for matrix in measure_sparsity(loaded) if matrix.name not in LEFT_DENSE.get(kind, ())]
    assert [(m.layer, m.name, m.zeros / m.numel) for m in matrices] == [
        (row["layer"], row["name"], row["sparsity"]) for row in record["matrices"]]
    inside = [weight for weight in layers_of(loaded).parameters() if weight.dim() > 1]
    assert record["sparsity_of_layers"] == pytest.approx(
        sum((tensor == 0).sum().item() for tensor in inside) / sum(tensor.numel() for tensor in inside), abs=1e-12)
    names = {row["name"] for row in record["left_dense"]}
    assert names == LEFT_DENSE.get(kind, {"mlp.gate"})
    assert record["disk"]["bytes"] == 4 * sum(matrix.numel for matrix in matrices)
    assert abs(total_sparsity(matrices) - 0.5) < (0.02 if "wbits" in options else 1e-3)
    changed = {key for key in dense if not torch.equal(dense[key], pruned[key])}
    keys = {name: key for name, (key, _) in published(build(kind)).items()}
    of_matrices = {keys[f"{path_of(loaded, matrix.layer, matrix.name)}.weight"] for matrix in matrices}
    assert of_matrices <= changed
    others = changed - of_matrices
    trained = {key for name, key in keys.items() if name.startswith(f"{layers_path(loaded)}.")
               and (dense[key].dim() == 1 or key.endswith("bias"))}  # norms and biases, those of experts in one tensor
    assert others <= (trained if "best" in options else set())
