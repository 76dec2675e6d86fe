"""The table of faults that a command line must refuse in one line: what users get wrong, and what would be unsafe."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from makegguf import write_gguf
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

SMALL = "--nsamples 4 --seqlen 32 --device cpu"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
MODEL = "model {root}/model: "
PRUNED = "{root}/model builtin --sparsity .5 "


def nothing(root=None):
    """Break nothing."""


def weights_changed(root, change):
    state = load_file(root / "model" / WEIGHTS)
    change(state)
    save_file(state, root / "model" / WEIGHTS, metadata={"format": "pt"})


def json_changed(file, **changes):
    """Change the keys of a JSON file; None removes a key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def config_changed(root, **changes):
    json_changed(root / "model" / "config.json", **changes)


@dataclass
class Fault:
    """What is broken, what the line on stderr says, and what is asked for."""

    damage: object  # called with the folder in which `model` is a copy of a tiny model
    message: str  # the whole of it; "…" stands for words of other libraries
    command: str = PRUNED
    script: str = "llama"


WEIGHTS_UNREAD = f"{MODEL}its weights cannot be read: "
UNREAD, REMOTE = "its configuration cannot be read: ", "it needs code from its repository, which is never executed here"
LINK = "is a link out of its folder, to {root}/elsewhere; replace it by the file itself"


def refused(options, message, command=PRUNED):
    return Fault(nothing, message, command + options)


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


def linked(root, name):
    """Let a file of the model be a link to one elsewhere, with the same content."""
    file = root / "model" / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    file.rename(root / "elsewhere")
    file.symlink_to(root / "elsewhere")


def leading(root):
    """Let an index name a file out of the folder, which is there and holds all weights."""
    elsewhere = (root / "model" / WEIGHTS).rename(root / "elsewhere.safetensors")
    places = dict.fromkeys(load_file(elsewhere), f"../{elsewhere.name}")
    (root / "model" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickled(root):
    (root / "model" / WEIGHTS).unlink()
    torch.save({UP: Malicious(root / "executed"), "weights": torch.zeros(50_000)}, root / "model" / "pytorch_model.bin")


def gguf_file(message, damage=nothing, **options):
    def write(root):
        write_gguf(root / "a.gguf", PreTrainedTokenizerFast.from_pretrained(root / "model"), **options)
        damage(root / "a.gguf")

    return Fault(write, f"model {{root}}/a.gguf: {message}", "{root}/a.gguf builtin --sparsity .5")


FAULTS = {
    # weights
    "no weights": Fault(
        lambda root: (root / "model" / WEIGHTS).unlink(), f"{WEIGHTS_UNREAD}… no file named …"),
    "weights cut by a full disk": Fault(
        lambda root: (file := root / "model" / WEIGHTS).write_bytes(file.read_bytes()[:-9]),
        f"{{root}}/model/{WEIGHTS}: cannot be read: …"),
    "a weight is missing": Fault(
        lambda root: weights_changed(root, lambda state: state.pop(UP)), f"{MODEL}the checkpoint lacks {UP}"),
    "an index out of the folder": Fault(leading, f"{MODEL}…../elsewhere.safetensors…"),
    "a malicious pickle": Fault(pickled, f"{WEIGHTS_UNREAD}…"),
    # configuration, tokenizer
    "no configuration": Fault(
        lambda root: (root / "model" / "config.json").unlink(), f"{MODEL}holds no model, as it has no config.json"),
    "an unknown kind": Fault(
        lambda root: config_changed(root, model_type="other"),
        f"{MODEL}{UNREAD}… model type `other` but Transformers does not recognize this …"),
    "remote code": Fault(lambda root: remote(root, "other"), f"{MODEL}{REMOTE}"),
    "a tokenizer in other code": Fault(remote_tokenizer, f"{MODEL}{REMOTE}"),
    "no tokenizer": Fault(
        lambda root: [file.unlink() for file in (root / "model").glob("*token*")],
        f"{MODEL}its tokenizer cannot be read: …"),
    "no tokenizer, for which transformers makes one up": Fault(
        lambda root: ([file.unlink() for file in (root / "model").glob("*token*")],
                      config_changed(root, model_type="qwen2")),
        f"{MODEL}its tokenizer has no words; get its files, such as tokenizer.json, again"),
    "a tokenizer of another model": Fault(
        lambda root: (weights_changed(root, lambda state: state.update(
            {"model.embed_tokens.weight": state["model.embed_tokens.weight"][:99].clone()})),
            config_changed(root, vocab_size=99)),
        f"{MODEL}its tokenizer gives token …, but the model's vocabulary has 99"),
    "a template that is a link out of the folder": Fault(
        lambda root: linked(root, "additional_chat_templates/tools.jinja"),
        f"{MODEL}additional_chat_templates/tools.jinja {LINK}"),
    # other formats
    "gguf: junk": gguf_file("the file cannot be read: …", lambda file: file.write_bytes(b"GGUFjunk")),
    "gguf: NaN": gguf_file("model.norm.weight contains NaN or inf",
                           change=lambda state: state["model.norm.weight"].fill_(float("nan"))),
    # arguments
    "groups that do not divide the columns": refused(
        "--prunen 2 --prunem 5", "--prunem 5: …", "{root}/model builtin "),
    "no matrix": refused("--invert", "--minlayer 0 --maxlayer 1000 --prune-only '' --invert: select no matrix of …"),
    "sequences beyond the model": refused("--seqlen 1000", "--seqlen 1000: the model's limit is 128 tokens"),
    "a device that is not there": refused("--device cuda:9", "--device cuda:9: there are … CUDA devices here…"),
    # generate.py
    "logits that are not finite": Fault(
        lambda root: weights_changed(root, lambda state: state["model.norm.weight"].fill_(3e38)),
        f"{MODEL}its logits contain NaN or inf; try --dtype float32", "{root}/model import --device cpu", "generate"),
}
