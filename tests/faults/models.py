"""Configurations, tokenizers and paths of models."""

import json

from faults.damage import MODEL, Fault, config_changed, cut, json_changed, nothing, weights_changed

UNREAD = "its configuration cannot be read: "
REMOTE = "it needs code from its repository, which is never executed here"
UNUSED = "its configuration cannot be used: "
HAS, ONE = "its configuration has", "must be at least 1"
LARGE = "more than its files of 0.000145 GB can hold; they may be incomplete"
ENTRY, SETTINGS = f"{MODEL}config.json: ", f"{MODEL}generation_config.json: "
A_FILE = "is a file; give its folder, a .gguf file or a hub id"


def remote(root, model_type):
    """Name code in the folder, which writes a file when it is imported."""
    code = f"open({str(root / 'executed')!r}, 'w')\nfrom transformers import LlamaConfig as Other\n"
    (root / "model" / "code.py").write_text(code)
    config_changed(root, model_type=model_type, auto_map={
        "AutoConfig": "code.Other", "AutoModelForCausalLM": "code.Other"})


def remote_tokenizer(root):
    (root / "model" / "code.py").write_text(f"open({str(root / 'executed')!r}, 'w')\n")
    (root / "model" / "tokenizer.json").unlink()
    json_changed(root / "model" / "tokenizer_config.json", tokenizer_class="Other",
                 auto_map={"AutoTokenizer": ["code.Other", None]})


def generation(root, content):
    """Give the settings of text generation, as text or as an object."""
    (root / "model" / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))


def linked(root, name):
    """Let a file of the model be a link to one elsewhere, with the same content."""
    file = root / "model" / name
    file.touch()
    file.rename(root / "elsewhere")
    file.symlink_to(root / "elsewhere")


def size(name, value, rest=ONE):
    """A size in the configuration that cannot be."""
    return Fault(lambda root: config_changed(root, **{name: value}), f"{MODEL}{HAS} {name} {value}, {rest}")


def entry(name, value, kind):
    """An entry of the configuration of a wrong type."""
    return Fault(lambda root: config_changed(root, **{name: value}),
                 f"{ENTRY}{name} is {json.dumps(value)}, must be {kind}")


def setting(name, value, kind):
    """A setting of text generation of a wrong type."""
    return Fault(lambda root: generation(root, {name: value}),
                 f"{SETTINGS}{name} is {json.dumps(value)}, must be {kind}")


def large(weights, layers=3, **changes):
    """A configuration that asks for more than the files hold."""
    return Fault(lambda root: config_changed(root, **changes),
                 f"{MODEL}its configuration asks for {weights} weights in {layers} layers, {LARGE}")


FAULTS = {
    "no configuration": Fault(
        lambda root: (root / "model" / "config.json").unlink(),
        f"{MODEL}{UNREAD}… `model_type` key in its config.json."),
    "an empty configuration": Fault(
        lambda root: cut(root / "model" / "config.json", 0),
        f"{MODEL}config.json cannot be read as JSON (… (char 0))"),
    "a cut configuration": Fault(
        lambda root: cut(root / "model" / "config.json", 99),
        f"{MODEL}config.json cannot be read as JSON (… (char 99))"),
    "a configuration that is a list": Fault(
        lambda root: (root / "model" / "config.json").write_text("[1]"),
        f"{MODEL}config.json holds a list, must be a JSON object"),
    "a binary configuration": Fault(
        lambda root: (root / "model" / "config.json").write_bytes(b"\xff\xfe\x00"),
        f"{MODEL}config.json cannot be read as JSON ('utf-8' …)"),
    "an unknown kind": Fault(
        lambda root: config_changed(root, model_type="other"),
        f"{MODEL}{UNREAD}… model type `other` but Transformers does not recognize this …"),
    "no kind": Fault(
        lambda root: config_changed(root, model_type=None), f"{MODEL}{UNREAD}… `model_type` key in its config.json."),
    "a configuration that contradicts itself": Fault(
        lambda root: config_changed(root, num_attention_heads=6),
        f"{MODEL}{UNREAD}… hidden size (32) … attention heads (6)."),
    "text for a number": Fault(
        lambda root: config_changed(root, hidden_size="32"), f"{MODEL}{UNREAD}… 'hidden_size' expected int, got str …"),
    "no layers": Fault(
        lambda root: config_changed(root, num_hidden_layers=0), f"{MODEL}{HAS} num_hidden_layers 0, {ONE}"),
    "a dtype that is none": Fault(
        lambda root: config_changed(root, dtype="float99"),
        f"{MODEL}{HAS} dtype 'float99', must be one of float32, bfloat16, float16, float64"),
    "an unknown activation": Fault(
        lambda root: config_changed(root, hidden_act="other"),
        f"{MODEL}{HAS} hidden_act 'other', which transformers does not know"),
    "quantized by others": Fault(
        lambda root: config_changed(root, quantization_config={"quant_method": "gptq", "bits": 4}),
        f"{MODEL}its weights are quantized by gptq; give the original model"),
    "quantized by nobody": Fault(
        lambda root: config_changed(root, quantization_config={"bits": 4}),
        f"{MODEL}its weights are quantized by an unknown method; give the original model"),
    "remote code of an unknown kind": Fault(lambda root: remote(root, "other"), f"{MODEL}{UNREAD}{REMOTE}"),
    "no tokenizer": Fault(
        lambda root: [file.unlink() for file in (root / "model").glob("*token*")],
        f"{MODEL}its tokenizer cannot be read: Couldn't instantiate the backend tokenizer …"),
    "a cut tokenizer": Fault(
        lambda root: cut(root / "model" / "tokenizer.json", 999),
        f"{MODEL}tokenizer.json cannot be read as JSON (… line 57 column 3 (char 999))"),
    "a tokenizer in other code": Fault(remote_tokenizer, f"{MODEL}its tokenizer cannot be read: {REMOTE}"),
    "a tokenizer of another model": Fault(
        lambda root: (weights_changed(root, lambda state: state.update(
            {"model.embed_tokens.weight": state["model.embed_tokens.weight"][:99].clone()})),
            config_changed(root, vocab_size=99)),
        f"{MODEL}its tokenizer gives token 382, but its vocabulary has 99"),
    "a model that is a file": Fault(
        nothing, f"model {{root}}/model/config.json: {A_FILE}", "{root}/model/config.json builtin"),
    "weights for a model": Fault(
        nothing, f"model {{root}}/model/model.safetensors: {A_FILE}", "{root}/model/model.safetensors builtin"),
    "no heads": size("num_attention_heads", 0),
    "negative heads": size("num_attention_heads", -4),
    "no key-value heads": size("num_key_value_heads", 0),
    "key-value heads that do not divide the heads": size(
        "num_key_value_heads", 3, "must divide num_attention_heads 4"),
    "no hidden size": size("hidden_size", 0),
    "a negative hidden size": size("hidden_size", -32),
    "no size of heads": size("head_dim", 0),
    "an odd size of heads": Fault(
        lambda root: config_changed(root, head_dim=7), f"{MODEL}{UNREAD}… `head_dim`=7 …"),
    "no intermediate size": size("intermediate_size", 0),
    "a negative vocabulary": size("vocab_size", -1),
    "negative layers": size("num_hidden_layers", -1),
    "one position only": size("max_position_embeddings", 1, "must be at least 2"),
    "a negative window": size("sliding_window", -1, "must be at least 0"),
    "a hundred thousand layers": large("7.74e+08", 100_000, num_hidden_layers=100_000),
    "an absurd width": large("1.11e+12", hidden_size=10**9),
    "an absurd size of heads": large("1.15e+12", head_dim=10**9),
    "an absurd intermediate size": large("2.88e+14", intermediate_size=10**12),
    "an absurd vocabulary": large("3.2e+13", vocab_size=10**12),
    "a width beyond all numbers": Fault(
        lambda root: config_changed(root, hidden_size=2**62), f"{MODEL}{UNUSED}Storage size calculation overflowed …"),
    "a fraction of a layer": Fault(
        lambda root: config_changed(root, num_hidden_layers=1.5),
        f"{MODEL}{UNREAD}… 'num_hidden_layers' expected int, got float …"),
    "an attention that is not installed": Fault(
        lambda root: config_changed(root, attn_implementation="flash_attention_2"),
        f"{MODEL}{UNUSED}FlashAttention2 has been toggled on, …"),
    "an attention that is none": Fault(
        lambda root: config_changed(root, attn_implementation="other"),
        f"{MODEL}{UNUSED}Specified `attn_implementation=\"other\"` is not supported. …"),
    "an attention that is a number": entry("attn_implementation", 3, "text"),
    "a padding token out of the vocabulary": Fault(
        lambda root: config_changed(root, pad_token_id=10**9), f"{MODEL}{UNUSED}Padding_idx …"),
    "an unknown kind of positions": Fault(
        lambda root: config_changed(root, rope_parameters={"rope_type": "other"}),
        f"{MODEL}{HAS} rope_type 'other', must be one of …"),
    "positions of text": Fault(
        lambda root: config_changed(root, rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        f"{MODEL}{HAS} rope_theta 'x', must be a number"),
    "positions without a factor": Fault(
        lambda root: config_changed(root, rope_parameters={"rope_type": "linear"}),
        f"{MODEL}{UNREAD}KeyError \"Missing required keys in `rope_parameters` … {{{{'factor'}}}}\""),
    "weights of integers in the configuration": Fault(
        lambda root: config_changed(root, dtype="int8"), f"{MODEL}{HAS} dtype 'int8', must be one of …"),
    "a kind that is a list": entry("model_type", ["llama"], "text"),
    "architectures that are text": entry("architectures", "LlamaForCausalLM", "a list"),
    "labels that are text": entry("id2label", "x", "a JSON object"),
    "a quantization that is text": entry("quantization_config", "gptq", "a JSON object"),
    "a map of code that is a number": entry("auto_map", 3, "a JSON object"),
    "a setting with a method's name": Fault(
        lambda root: config_changed(root, save_pretrained=1), f"{ENTRY}save_pretrained is not a setting"),
    "attentions as outputs": Fault(
        lambda root: config_changed(root, output_attentions=True),
        f"{MODEL}{HAS} output_attentions true, must be false"),
    "generation: empty": Fault(
        lambda root: generation(root, ""), f"{MODEL}generation_config.json cannot be read as JSON (…)"),
    "generation: a list": Fault(
        lambda root: generation(root, [1]), f"{MODEL}generation_config.json holds a list, must be a JSON object"),
    "generation: nested": Fault(
        lambda root: generation(root, "[" * 100_000),
        f"{MODEL}generation_config.json cannot be read as JSON (maximum recursion depth exceeded …)"),
    "generation: an end of text that is text": setting("eos_token_id", "x", "a whole number or a list or null"),
    "generation: a length of text": setting("max_new_tokens", "x", "a whole number or null"),
    "generation: a temperature of text": setting("temperature", "x", "a number or null"),
    "generation: a watermark that is a number": setting("watermarking_config", 3, "a JSON object"),
    "generation: a method's name": Fault(
        lambda root: generation(root, {"validate": 3}), f"{SETTINGS}validate is not a setting"),
    "generation: a negative length": Fault(
        lambda root: generation(root, {"max_new_tokens": -1}),
        f"{MODEL}generation_config.json cannot be used: `max_new_tokens` must be greater than 0, but is -1."),
    "a configuration that is a link out of the folder": Fault(
        lambda root: linked(root, "config.json"),
        f"{MODEL}config.json is a link out of its folder, to {{root}}/elsewhere; replace it by the file itself"),
}
