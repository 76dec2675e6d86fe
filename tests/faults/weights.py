"""Weights that are missing, damaged or of another model, as files of each kind."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from faults.damage import INDEX, MODEL, UP, WEIGHTS, Fault, config_changed, cut, filled, json_changed, weights_changed

PICKLE = "its .bin file is damaged or holds more than tensors, which is not executed; give safetensors files"


def sharded(root, **index):
    """Replace the weights by two shards and an index; index: keys of the JSON to change."""
    state = load_file(root / "model" / WEIGHTS)
    (root / "model" / WEIGHTS).unlink()
    names, places = ["one.safetensors", "two.safetensors"], {}
    for number, name in enumerate(names):
        part = {key: tensor for place, (key, tensor) in enumerate(state.items()) if place % 2 == number}
        save_file(part, root / "model" / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    (root / "model" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    json_changed(root / "model" / INDEX, **index)


def leading(root, name):
    """Let the index name a file elsewhere, which is there and holds all weights."""
    shutil.copy(root / "model" / WEIGHTS, root / "elsewhere.safetensors")
    keys = load_file(root / "model" / WEIGHTS)
    sharded(root, weight_map=dict.fromkeys(keys, name.format(root=root)))


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickled(root):
    (root / "model" / WEIGHTS).unlink()
    content = {UP: Malicious(root / "executed"), "as many bytes as the weights": torch.zeros(50_000)}
    torch.save(content, root / "model" / "pytorch_model.bin")


def cast(root, key, dtype):
    weights_changed(root, lambda state: state.update({key: state[key].to(dtype)}))


def binary(root, change):
    """Replace the weights by a .bin file of what `change` makes of them."""
    content = change(load_file(root / "model" / WEIGHTS))
    (root / "model" / WEIGHTS).unlink()
    torch.save(content, root / "model" / "pytorch_model.bin")


def header_changed(root, **changes):
    """Change what the header of the weights says of one of them; another length of the header fits as well."""
    content = (root / "model" / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    header[UP] |= changes
    text = json.dumps(header).encode()
    (root / "model" / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size:])


HEADER = f"{MODEL}{WEIGHTS} is damaged (Error while deserializing header: …"
FLOATS = "must be a floating-point dtype"

FAULTS = {
    "empty weights": Fault(
        lambda root: cut(root / "model" / WEIGHTS, 0), f"{MODEL}{WEIGHTS} is damaged (… header too small)"),
    "cut in the header's length": Fault(
        lambda root: cut(root / "model" / WEIGHTS, 5), f"{MODEL}{WEIGHTS} is damaged (… header too small)"),
    "cut in the header": Fault(
        lambda root: cut(root / "model" / WEIGHTS, 200), f"{MODEL}{WEIGHTS} is damaged (… invalid header length)"),
    "cut in the data": Fault(
        lambda root: cut(root / "model" / WEIGHTS, -9), f"{MODEL}{WEIGHTS} is damaged (… file not fully covered)"),
    "not safetensors": Fault(
        lambda root: (root / "model" / WEIGHTS).write_text("<html>\nquota exceeded\n" * 99),
        f"{MODEL}{WEIGHTS} is damaged (… header too large)"),
    "a pointer of git LFS": Fault(
        lambda root: (root / "model" / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        f"{MODEL}{WEIGHTS} is damaged (… header too large)"),
    "weights are a folder": Fault(
        lambda root: ((root / "model" / WEIGHTS).unlink(), (root / "model" / WEIGHTS).mkdir()),
        f"{MODEL}… no file named {WEIGHTS}, or pytorch_model.bin, found in …"),
    "no weights": Fault(
        lambda root: (root / "model" / WEIGHTS).unlink(),
        f"{MODEL}… no file named {WEIGHTS}, or pytorch_model.bin, found in …"),
    "a weight is missing": Fault(
        lambda root: weights_changed(root, lambda state: state.pop(UP)), f"{MODEL}the checkpoint lacks {UP}"),
    "NaN": Fault(lambda root: filled(root, UP, float("nan")), f"{MODEL}{UP} contains NaN or inf"),
    "inf in the embeddings": Fault(
        lambda root: filled(root, "model.embed_tokens.weight", float("inf")),
        f"{MODEL}model.embed_tokens.weight contains NaN or inf"),
    "a weight of another shape": Fault(
        lambda root: weights_changed(root, lambda state: state.update({UP: torch.zeros(47, 32)})),
        f"{MODEL}{UP} is 47 x 32, its configuration expects 48 x 32"),
    "weights of another layout": Fault(
        lambda root: config_changed(root, hidden_size=64),
        f"{MODEL}model.embed_tokens.weight is 384 x 32, its configuration expects 384 x 64"),
    "more layers in the configuration": Fault(
        lambda root: config_changed(root, num_hidden_layers=4),
        f"{MODEL}the checkpoint lacks model.layers.3.input_layernorm.weight, model.layers.3.mlp.down_proj.weight, "
        "model.layers.3.mlp.gate_proj.weight"),
    "no shard": Fault(
        lambda root: (sharded(root), (root / "model" / "two.safetensors").unlink()),
        f"{MODEL}No such file or directory: {{root}}/model/two.safetensors"),
    "a shard is cut": Fault(
        lambda root: (sharded(root), cut(root / "model" / "two.safetensors", 99)),
        f"{MODEL}two.safetensors is damaged (… invalid header length)"),
    "an index is no JSON": Fault(
        lambda root: (sharded(root), cut(root / "model" / INDEX, 99)),
        f"{MODEL}{INDEX} is damaged (JSONDecodeError: …)"),
    "an index without a map": Fault(
        lambda root: sharded(root, weight_map=None), f"{MODEL}{INDEX} is damaged (KeyError: 'weight_map')"),
    "an index that is a list": Fault(
        lambda root: (sharded(root), (root / "model" / INDEX).write_text("[]")),
        f"{MODEL}{INDEX} is damaged (TypeError: list indices …)"),
    "an index whose map is a list": Fault(
        lambda root: sharded(root, weight_map=["one.safetensors"]),
        f"{MODEL}{INDEX} is damaged (AttributeError: 'list' object …)"),
    "an index that names numbers": Fault(
        lambda root: sharded(root, weight_map={UP: 1}), f"{MODEL}its index names 1, which is not in the folder"),
    "an index out of the folder": Fault(
        lambda root: leading(root, "../elsewhere.safetensors"),
        f"{MODEL}its index names ../elsewhere.safetensors, which is not in the folder"),
    "an index to an absolute path": Fault(
        lambda root: leading(root, "{root}/elsewhere.safetensors"),
        f"{MODEL}its index names {{root}}/elsewhere.safetensors, which is not in the folder"),
    "an index of .bin files out of the folder": Fault(
        lambda root: ((root / "model" / WEIGHTS).rename(root / "elsewhere"),
                      (root / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(
                          {"metadata": {}, "weight_map": {UP: "../elsewhere"}}))),
        f"{MODEL}its index names ../elsewhere, which is not in the folder"),
    "a weight of another shape in a .bin file": Fault(
        lambda root: (torch.save(load_file(root / "model" / WEIGHTS) | {UP: torch.zeros(47, 32)},
                                 root / "model" / "pytorch_model.bin"), (root / "model" / WEIGHTS).unlink()),
        f"{MODEL}{UP} is (47, 32), its configuration expects (48, 32)"),
    "a malicious pickle": Fault(pickled, f"{MODEL}{PICKLE}"),
    "a damaged pickle": Fault(
        lambda root: (root / "model" / WEIGHTS).rename(root / "model" / "pytorch_model.bin"), f"{MODEL}{PICKLE}"),
    "a matrix of integers": Fault(
        lambda root: cast(root, UP, torch.int8), f"{MODEL}{UP} is stored as I8, {FLOATS}"),
    "a norm of integers": Fault(
        lambda root: cast(root, "model.norm.weight", torch.int64),
        f"{MODEL}model.norm.weight is stored as I64, {FLOATS}"),
    "a matrix of booleans": Fault(
        lambda root: cast(root, UP, torch.bool), f"{MODEL}{UP} is stored as BOOL, {FLOATS}"),
    "complex weights": Fault(
        lambda root: cast(root, UP, torch.complex64), f"{MODEL}{UP} is stored as C64, {FLOATS}"),
    "a tied head of integers": Fault(
        lambda root: weights_changed(root, lambda state: state.update(
            {"lm_head.weight": torch.ones(384, 32, dtype=torch.int32)})),
        f"{MODEL}lm_head.weight is stored as I32, {FLOATS}"),
    "a tied head of another shape": Fault(
        lambda root: weights_changed(root, lambda state: state.update({"lm_head.weight": torch.ones(3, 32)})),
        f"{MODEL}lm_head.weight is 3 x 32, its configuration expects 384 x 32"),
    "a norm that is one number": Fault(
        lambda root: weights_changed(root, lambda state: state.update({"model.norm.weight": torch.tensor(1.0)})),
        f"{MODEL}model.norm.weight is a single number, its configuration expects 32"),
    "a header with a negative shape": Fault(
        lambda root: header_changed(root, shape=[-48, 32]), f"{HEADER} invalid value: integer `-48`, …)"),
    "a header with a huge shape": Fault(
        lambda root: header_changed(root, shape=[2**40, 2**40]), f"{HEADER}overflow …)"),
    "a header with an unknown dtype": Fault(
        lambda root: header_changed(root, dtype="F99"), f"{HEADER} unknown variant `F99`, …)"),
    "a header with offsets out of the file": Fault(
        lambda root: header_changed(root, data_offsets=[0, 2**62]), f"{HEADER}invalid offset for tensor `{UP}`)"),
    "no tensors": Fault(
        lambda root: save_file({}, root / "model" / WEIGHTS),
        f"{MODEL}its configuration asks for 3.55e+04 weights in 3 layers, more than its files of 1.6e-08 GB can hold; "
        "they may be incomplete"),
    "an index that names no files": Fault(
        lambda root: sharded(root, weight_map={}), f"{MODEL}{INDEX} is damaged (it names no files)"),
    "an index whose metadata are a number": Fault(
        lambda root: sharded(root, metadata=3), f"{MODEL}{INDEX} is damaged (TypeError: 'int' object …)"),
    "an index that names the folder": Fault(
        lambda root: sharded(root, weight_map={UP: "."}), f"{MODEL}its index names ., which is not in the folder"),
    "an index that is nested": Fault(
        lambda root: (sharded(root), (root / "model" / INDEX).write_text("[" * 100_000)),
        f"{MODEL}{INDEX} is damaged (RecursionError: …)"),
    "a .bin file with text for a weight": Fault(
        lambda root: binary(root, lambda state: state | {UP: "x"}),
        f"{MODEL}its weights cannot be read: TypeError …"),
    "a .bin file with a number for a name": Fault(
        lambda root: binary(root, lambda state: state | {3: state[UP]}),
        f"{MODEL}its weights cannot be read: AttributeError …"),
    "a .bin file of something else": Fault(
        lambda root: binary(root, lambda state: torch.zeros(50_000)),
        f"{MODEL}its weights cannot be read: TypeError …"),
    "an empty .bin file": Fault(
        lambda root: ((root / "model" / WEIGHTS).unlink(), (root / "model" / "pytorch_model.bin").touch()),
        f"{MODEL}its .bin file is damaged: it ends too early"),
}
