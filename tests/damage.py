"""Ways to break a model folder, texts or traces, and what a table of such faults consists of."""

import json
from dataclasses import dataclass, field

from safetensors.torch import load_file, save_file

SMALL = "--nsamples 4 --seqlen 32 --device cpu"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
MODEL = "model {root}/model: "


def nothing(root=None):
    """Break nothing."""


def cut(file, kept):
    """Keep the first bytes of a file."""
    file.write_bytes(file.read_bytes()[:kept])


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
    command: str = "{root}/model builtin --sparsity .5 --eval builtin"
    script: str = "llama"
    env: dict = field(default_factory=dict)  # environment variables
