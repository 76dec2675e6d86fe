"""Configurations, tokenizers and paths of models."""

from faults.damage import MODEL, Fault, config_changed, cut, json_changed, nothing, weights_changed

UNREAD = "its configuration cannot be read: "
REMOTE = "it needs code from its repository, which is never executed here"
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


FAULTS = {
    "no configuration": Fault(
        lambda root: (root / "model" / "config.json").unlink(),
        f"{MODEL}{UNREAD}… `model_type` key in its config.json."),
    "an empty configuration": Fault(
        lambda root: cut(root / "model" / "config.json", 0),
        f"{MODEL}{UNREAD}… '{{root}}/model/config.json' is not a valid JSON file."),
    "a cut configuration": Fault(
        lambda root: cut(root / "model" / "config.json", 99),
        f"{MODEL}{UNREAD}… '{{root}}/model/config.json' is not a valid JSON file."),
    "a configuration that is a list": Fault(
        lambda root: (root / "model" / "config.json").write_text("[1]"),
        f"{MODEL}{UNREAD}… `model_type` key in its config.json."),
    "a binary configuration": Fault(
        lambda root: (root / "model" / "config.json").write_bytes(b"\xff\xfe\x00"),
        f"{MODEL}{UNREAD}… '{{root}}/model/config.json' is not a valid JSON file."),
    "an unknown kind": Fault(
        lambda root: config_changed(root, model_type="other"),
        f"{MODEL}{UNREAD}… model type `other` but Transformers does not recognize this …"),
    "no kind": Fault(
        lambda root: config_changed(root, model_type=None), f"{MODEL}{UNREAD}… `model_type` key in its config.json."),
    "a configuration that contradicts itself": Fault(
        lambda root: config_changed(root, num_attention_heads=5),
        f"{MODEL}{UNREAD}… hidden size (32) … attention heads (5)."),
    "text for a number": Fault(
        lambda root: config_changed(root, hidden_size="32"), f"{MODEL}{UNREAD}… 'hidden_size' expected int, got str …"),
    "no layers": Fault(
        lambda root: config_changed(root, num_hidden_layers=0), f"{MODEL}its configuration has 0 layers"),
    "a dtype that is none": Fault(lambda root: config_changed(root, dtype="float99"), f"{MODEL}{UNREAD}… 'float99'"),
    "an unknown activation": Fault(
        lambda root: config_changed(root, hidden_act="other"),
        f"{MODEL}its configuration cannot be used: KeyError 'other'"),
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
        f"{MODEL}its tokenizer cannot be read: … line 57 column 3 (char 999)"),
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
    "a damaged gguf": Fault(
        lambda root: (root / "a.gguf").write_bytes(b"GGUFjunk"),
        f"model {{root}}/a.gguf: {UNREAD}… (actual buffer size is 8)", "{root}/a.gguf builtin"),
}
