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
    torch.save({UP: Malicious(root / "executed")}, root / "model" / "pytorch_model.bin")


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
}
