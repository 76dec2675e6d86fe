"""Prune the text part of models that also see or hear, through the whole command line."""

import conftest
import pytest
import torch
from conftest import CPU, VOCABULARY, logits, make, measure_sparsity
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from mixgpt.checkpoints import load
from mixgpt.evaluation.measures import total_sparsity

TEXT = conftest.COMMON | conftest.TOKEN_IDS | {"num_hidden_layers": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14, "num_channels": 3}
# model_type -> (class of the text part, configuration)
MODELS = {
    "gemma3": ("Gemma3ForCausalLM", None),  # as built by conftest
    "gemma4": ("Gemma4ForCausalLM", {"text_config": make("gemma4").config.to_dict(), "audio_config": None,
                                     "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 16,
                                                                "position_embedding_size": 16}}),
    "mistral3": ("MistralForCausalLM", {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": VISION | {
        "model_type": "pixtral", "head_dim": 16}}),
    "llava": ("LlamaForCausalLM", {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {
        "model_type": "clip_vision_model", "projection_dim": 32}}),
    "smolvlm": ("LlamaForCausalLM", {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION,
                                     "scale_factor": 2}),
    "qwen2_audio": ("Qwen2ForCausalLM", {  # whose configuration does not say whether embeddings are tied
        "text_config": TEXT | {"model_type": "qwen2"}, "audio_config": {
            "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}}),
}


def build(kind):
    if not MODELS[kind][1]:
        return make(kind)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind][1], image_token_index=VOCABULARY - 1)
    return AutoModelForMultimodalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_for_text_are_those_of_the_whole_model_and_the_text_part_is_pruned_and_saved_alone(
        kind, folder, tokens, prune, tmp_path):
    path = str(folder(kind))
    model = load.open_model(path, load.read_config(path), "auto")
    with torch.no_grad():
        expected = build(kind)(input_ids=tokens % (VOCABULARY - 1), use_cache=False).logits
    assert torch.equal(logits(model, tokens % (VOCABULARY - 1), len(tokens), CPU), expected)
    output = prune("llama", "--sparsity .5 --save", tmp_path / "saved", model=folder(kind))
    assert f"{MODELS[kind][0]}, {4 if kind == 'gemma4' else 2} layers, " in output
    assert f"the text part of a {kind}\n" in output
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(loaded).__name__ == MODELS[kind][0] and not any(report.values())
    assert total_sparsity(measure_sparsity(loaded)) == 0.5
