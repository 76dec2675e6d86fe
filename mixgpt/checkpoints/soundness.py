"""Check what the small files of a model say, before anything is built from them."""

import json
from pathlib import PurePath

from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import (
    CHAT_TEMPLATE_DIR,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
)

from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
OBJECTS = (CONFIG_NAME, GENERATION_CONFIG_NAME, TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json",
           "added_tokens.json")  # files that hold a JSON object
TOKEN = (int, type(None))
# Types of entries that transformers takes on trust; it checks the others of a configuration itself.
TYPES = {
    CONFIG_NAME: {"model_type": str, "auto_map": dict, "id2label": dict, "quantization_config": dict,
                  "architectures": list, "dtype": str, "torch_dtype": str, "attn_implementation": str,
                  "_attn_implementation": str, "rope_theta": (int, float), "sliding_window": TOKEN},
    GENERATION_CONFIG_NAME: {"bos_token_id": TOKEN, "pad_token_id": TOKEN, "eos_token_id": (int, list, type(None)),
                             "max_length": TOKEN, "max_new_tokens": TOKEN, "watermarking_config": dict,
                             "temperature": (int, float, type(None)), "top_k": TOKEN},
    TOKENIZER: {"added_tokens": list},
    TOKENIZER_CONFIG: {"tokenizer_class": str, "added_tokens_decoder": dict, "auto_map": dict,
                       "model_max_length": (int, float), "init_inputs": list, "model_input_names": list},
}
# Least values of sizes, under the names of all families.
SIZES = dict.fromkeys(("vocab_size", "hidden_size", "n_embed", "num_hidden_layers", "n_layer", "num_attention_heads",
                       "n_head", "num_key_value_heads", "head_dim", "intermediate_size", "ffn_dim",
                       "word_embed_proj_dim"), 1)
SIZES |= {"max_position_embeddings": 2, "model_max_length": 2}  # a token is predicted from another one
SIZES |= {"sliding_window": 0}  # Qwen2-MoE saves 0 for none
# Entries of a .gguf file without which there is no model, and their names in configurations.
GGUF_KEYS = {"block_count": ("num_hidden_layers", "n_layer"), "embedding_length": ("hidden_size", "n_embed", "n_embd"),
             "attention.head_count": ("num_attention_heads", "n_head")}
DTYPES = ("float32", "bfloat16", "float16", "float64")
SETTINGS_OF = {CONFIG_NAME: PreTrainedConfig, GENERATION_CONFIG_NAME: GenerationConfig}
# The files whose content, or code, ends up in a saved folder.
COPIED = ("*.json", "*.jinja", f"{CHAT_TEMPLATE_DIR}/*", "*.model", "*.txt", "*.tiktoken", "*.py")
BESIDE_GGUF = ("*.jinja", f"{CHAT_TEMPLATE_DIR}/*")  # what transformers reads beside a .gguf file
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
TABLE_ENTRY = 24  # bytes; a file's entry of a tensor takes more, in every format


def check_files(model, folder):
    """Raise InputError for JSON files of a model that are damaged, or files that are links out of its folder."""
    check_links(model, folder, COPIED)
    for name in OBJECTS:
        if (folder / name).is_file():
            _check_object(model, folder / name)


def check_links(model, folder, patterns):
    """Raise InputError for links that lead out of a folder: what they lead to would be copied into the saved one.

    Except those of the hub's cache, from snapshots/REVISION to blobs; weights, which are read as numbers, may be
    anywhere.
    """
    here = folder.resolve()
    allowed = [here, here.parent.parent / "blobs"] if here.parent.name == "snapshots" else [here]
    for file in (file for pattern in patterns for file in sorted(folder.glob(pattern))):
        if not any(file.resolve().is_relative_to(place) for place in allowed):
            raise InputError(f"model {model}: {file.relative_to(folder)} is a link out of its folder, to "
                             f"{file.resolve()}; replace it by the file itself")


def _check_object(model, file):
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"model {model}: {file.name} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"model {model}: {file.name} holds {_named(type(content))}, must be a JSON object")
    check_entries(model, file.name, content)


def check_entries(model, name, content):
    """Raise InputError for an entry of a file, {key: value}, that would end in an error of another place."""
    for key, value in content.items():
        if callable(getattr(SETTINGS_OF.get(name), key, None)):
            raise InputError(f"model {model}: {name}: {key} is not a setting")
        kinds = TYPES.get(name, {}).get(key)
        if kinds and not isinstance(value, (kinds, type(None)) if isinstance(kinds, type) else kinds):
            raise InputError(f"model {model}: {name}: {key} is {json.dumps(value)[:60]}, must be {_named(kinds)}")
    if name == TOKENIZER_CONFIG:
        check_templates(model, content.get("chat_template"))
    if name == CONFIG_NAME:
        _check_sizes(model, content)
        _check_names(model, content)


def check_gguf_header(model, config):
    """Raise InputError if the header of a .gguf file does not say how large the model is.

    config: the entries that transformers makes of it; what is missing would get the values of another model.
    """
    for key, names in GGUF_KEYS.items():
        if not any(name in config for name in names):
            raise InputError(f"model {model}: its header has no {key}")
    check_entries(model, CONFIG_NAME, config)


def _named(kinds):
    words = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a JSON object",
             bool: "true or false", type(None): "null"}
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(words[kind] for kind in kinds if kind is not int or float not in kinds)


def _check_sizes(model, config):
    for key, least in SIZES.items():
        value = config.get(key)
        if isinstance(value, int) and value < least:
            raise InputError(f"model {model}: its configuration has {key} {value}, must be at least {least}")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise InputError(f"model {model}: its configuration has num_key_value_heads {shared}, must divide "
                         f"num_attention_heads {heads}")
    if config.get("output_attentions"):  # such a configuration cannot be saved with the attention that is used
        raise InputError(f"model {model}: its configuration has output_attentions true, must be false")


def _check_names(model, config):
    for key in ("hidden_act", "activation_function"):
        if isinstance(config.get(key), str) and config[key] not in ACT2FN:
            raise InputError(f"model {model}: its configuration has {key} {config[key]!r}, which transformers does "
                             "not know")
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise InputError(f"model {model}: its configuration has rope_type {kind!r}, must be one of "
                         f"{', '.join(ROPE_INIT_FUNCTIONS)}")
    if isinstance(rope, dict) and not isinstance(rope.get("rope_theta", 1), int | float):
        raise InputError(f"model {model}: its configuration has rope_theta {rope['rope_theta']!r}, must be a number")
    for key in ("dtype", "torch_dtype"):
        if config.get(key) and config[key].removeprefix("torch.") not in DTYPES:
            raise InputError(f"model {model}: its configuration has {key} {config[key]!r}, must be one of "
                             f"{', '.join(DTYPES)}")


def check_templates(model, templates):
    """Raise InputError for chat templates that are no text, or whose names could lead out of a folder as file names.

    templates: text, {name: text}, a list of {"name": name, "template": text}, or None.
    """
    if isinstance(templates, list | tuple):
        entries = [entry if isinstance(entry, dict) else {} for entry in templates]
        templates = {entry.get("name"): entry.get("template") for entry in entries}
    for name, text in (templates if isinstance(templates, dict) else {"default": templates or ""}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise InputError(f"model {model}: {TOKENIZER_CONFIG}: chat_template must be text, or a list of objects "
                             "with name and template")
        if name in ("", ".", "..") or PurePath(name).name != name:
            raise InputError(f"model {model}: {TOKENIZER_CONFIG}: the chat template's name {name!r} is a path, must "
                             "be a plain name")


def stored_bytes(path):
    """Return the bytes of the weight files in a folder, or of a .gguf file; None if there are none, or not all.

    Raises ValueError if the header of a safetensors file is damaged.
    """
    if path.is_file():
        return path.stat().st_size
    names = {SAFE_WEIGHTS_NAME}
    for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if (path / index).is_file():
            streaming.check_index(path / index)
            names = set(json.loads((path / index).read_text())["weight_map"].values())
            if not all((path / name).is_file() for name in names):
                return None
    for name in names:
        if name.endswith(".safetensors") and (path / name).is_file():
            streaming.check_header(path / name)
    return sum(file.stat().st_size for pattern in WEIGHTS for file in path.rglob(pattern) if file.is_file()) or None


def check_size(model, config, family, one_layer, nbytes):
    """Raise InputError if a configuration asks for more weights than files of nbytes can hold.

    one_layer: the model of `config` with one layer, on meta. Says so before the whole is built, which takes minutes if
    a damaged configuration has thousands of layers.
    """
    layers = config.num_hidden_layers
    inside = {id(tensor): tensor.numel() for tensor in family.layers_of(one_layer).parameters()}
    outside = [tensor.numel() for tensor in one_layer.parameters() if id(tensor) not in inside]
    count = layers * sum(inside.values()) + max(outside)  # the embeddings; the head may be tied to them
    # a weight takes a bit or more: the sparse format has a bit for each, GGUF's smallest types have 1.6
    if count / 8 + layers * len(inside) * TABLE_ENTRY > nbytes:
        raise InputError(f"model {model}: its configuration asks for {count:.3g} weights in {layers} layers, more "
                         f"than its files of {nbytes / 1e9:.3g} GB can hold; they may be incomplete")
