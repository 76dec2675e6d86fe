"""Find, check and load models and tokenizers."""

import contextlib
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from huggingface_hub.utils import WeakFileLock
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from mixgpt.checkpoints import packing
from mixgpt.checkpoints.quantizer import METHOD, WEIGHTS
from mixgpt.common import choices, distributed, files
from mixgpt.common.errors import InputError, reading
from mixgpt.common.hub import hub_reachable, silenced
from mixgpt.modeling import decoder, experts, streaming
from mixgpt.modeling.linears import linears, other_weights

# Names of the text part's weights in checkpoints of models that see or hear, old and new, and on their own.
TEXT_PART = {r"^language_model\.": "", r"^model\.(?:language|text)_model\.": "model."}
NO_CODE = {"trust_remote_code": False}  # Without it, transformers asks on a terminal whether to run the code.
# The files whose content, or code, ends up in a saved folder.
COPIED = ("*.json", "*.jinja", f"{CHAT_TEMPLATE_DIR}/*", "*.model", "*.txt", "*.tiktoken", "*.py")


@contextlib.contextmanager
def _reading(model: str | Path, part: str) -> Generator[None]:
    """Raise InputError for whatever transformers raises while it reads a part of a model, without its logs and bars."""
    with reading(f"model {model}: {part}"), silenced():
        try:
            yield
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise InputError(f"model {model}: it needs code from its repository, which is never executed here"
                                 ) from error
            if isinstance(error, OSError) and not Path(model).exists() and not hub_reachable():
                raise InputError(f"model {model}: not a folder or .gguf file here, not in the cache of the Hugging "
                                 "Face hub, and the hub cannot be reached") from error
            raise


def check_links(model: str | Path, folder: Path, patterns: Sequence[str]) -> None:
    """Raise InputError for links that lead out of a folder: their files would be copied into the saved one."""
    here = folder.resolve()  # In the hub's cache, links lead from snapshots/REVISION to blobs.
    allowed = [here, here.parent.parent / "blobs"] if here.parent.name == "snapshots" else [here]
    for file in (file for pattern in patterns for file in sorted(folder.glob(pattern))):
        if not any(file.resolve().is_relative_to(place) for place in allowed):
            raise InputError(f"model {model}: {file.relative_to(folder)} is a link out of its folder, to "
                             f"{file.resolve()}; replace it by the file itself")


def _converted(model: str | Path, kind: str, write: Callable[[list[Path], Path], None], sources: Sequence[str | Path],
               version: str = "") -> Path:
    """Return the folder in the cache that write(sources, folder) fills once for each version of a model's files."""
    paths = [Path(source) for source in sources]
    statuses = [(path.resolve(), path.stat()) for path in paths]
    key = " ".join([*(f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in statuses), version])
    folder = files.cache_folder() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    with reading(f"model {model}: cannot be converted into {folder}; set XDG_CACHE_HOME to a folder with room"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with silenced(), WeakFileLock(f"{folder}.lock"):  # Each process would need memory to convert.
            if folder.is_dir():
                return folder
            with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as made:
                write(paths, Path(made))
                try:
                    os.rename(made, folder)
                except OSError:
                    if not folder.is_dir():  # Another machine may have made it meanwhile.
                        raise
    print(f"converted {model} into {folder} (once)", file=sys.stderr, flush=True)
    return folder


def _write_dequantized(sources: list[Path], folder: Path) -> None:
    """Write the model and the tokenizer of a .gguf file, which is slow to read."""
    file, = sources
    check_links(file, file.parent, ("*.jinja", f"{CHAT_TEMPLATE_DIR}/*"))  # transformers reads these, too.
    with _reading(file, "the file cannot be read"):
        counts = Counter()
        for tensor in GGUFReader(file).tensors:
            counts[tensor.tensor_type.name] += tensor.n_elements
        (most, _), = counts.most_common(1)  # These decide; for quantized weights, float32 would waste bits.
        dtype = {"F32": torch.float32, "F16": torch.float16}.get(most, torch.bfloat16)
        loaded = from_pretrained(file, str(file.parent), dtype, gguf_file=file.name,
                                 quantization_config=transformers.GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, **NO_CODE)
    loaded.save_pretrained(folder, save_original_format=False)  # The names of tensors stay those in memory.
    tokenizer.save_pretrained(folder)


def _write_streamable(sources: list[Path], folder: Path) -> None:
    """Write the tensors of .bin files as safetensors files, which can be read tensor by tensor, and their index."""
    places = {}
    for source in sources:
        mapped, file = load_state_dict(str(source)), f"{source.name}.safetensors"
        streaming.write(folder / file, {key: tensor.clone() for key, tensor in mapped.items()})  # Some share memory.
        places |= dict.fromkeys(mapped, file)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _stored(model: str | Path, name: str) -> dict[str, tuple]:
    """Return `streaming.stored_tensors`, of .bin files those of a copy in the cache, {} if there can be none."""
    stored = streaming.stored_tensors(name)
    sources = [] if stored else streaming.weight_files(name, WEIGHTS_NAME)
    if not sources:
        return stored
    with contextlib.suppress(InputError, OSError):  # Loading the model whole tells what is wrong with a file.
        folder = _converted(model, "bin", _write_streamable, sources)
        stored = streaming.stored_tensors(str(folder))
    return stored if all(distributed.all_gather_object(bool(stored))) else {}  # Some machine may have no room.


def _source(model: str | Path) -> str:
    """Return the name by which `from_pretrained` finds `model`: a hub id, a directory or a .gguf file."""
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted(path, "gguf", _write_dequantized, [path], f"16 bit {transformers.__version__}"))
    if path.is_file():
        raise InputError(f"model {model}: is a file; give its folder, a .gguf file or a hub id")
    if not path.is_dir():
        hub_reachable()  # If it is not, its libraries are offline from now on.
    return str(model)


def read_config(model: str | Path) -> transformers.PretrainedConfig:
    """Load a configuration. Raises InputError if the model is no causal language model, or for `check_links`."""
    name = _source(model)
    check_links(model, Path(name), COPIED)
    with _reading(model, "its configuration cannot be read"):
        config, _ = _config_of(name)
        if config.dtype is None:  # Older configurations leave it out.
            stored = (tensor.dtype for _, tensor in _stored(model, name).values())
            config.dtype = next((dtype for dtype in stored if dtype.is_floating_point), None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise InputError(f"model {model}: {config.model_type} is not a causal language model")
    return config


def _config_of(name: str) -> tuple[transformers.PretrainedConfig, str | None]:
    """Return a configuration and None; of a model that also sees or hears, that of its text part and its model_type."""
    if Path(name).is_dir() and not (Path(name) / CONFIG_NAME).is_file():
        raise InputError(f"model {name}: holds no model, as it has no {CONFIG_NAME}")
    whole = AutoConfig.from_pretrained(name, **NO_CODE)
    config = whole.get_text_config()
    if whole.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        config = whole
    method = (getattr(whole, "quantization_config", None) or {}).get("quant_method")
    if method and (config is not whole or method not in (METHOD, *choices.FORMATS)):
        raise InputError(f"model {name}: its weights are quantized by {method}; give the original model")
    if config is whole:
        return config, None
    config.name_or_path, config.dtype = whole.name_or_path, config.dtype or whole.dtype
    if getattr(whole, "tie_word_embeddings", False):  # Some classes leave it out.
        config.tie_word_embeddings = True
    return config, whole.model_type


def multimodal(model: str | Path) -> str | None:
    """Return the model_type of a model of which only the text part is loaded, None for others."""
    with _reading(model, "its configuration cannot be read"):
        return _config_of(_source(model))[1]


def check_layers(model: str, skeleton: PreTrainedModel, save_format: str = "dense") -> None:
    """Raise InputError if layers hold no linears, or some that other layers use, or less than other tensors."""
    this, layers, owners = f"of this {type(skeleton).__name__}", decoder.layers_of(skeleton), {}
    if not choices.FORMATS[save_format].holds_experts:
        layout = experts.layout_of(skeleton)
        if layout is None or any(map(experts.is_split, skeleton.modules())) or any(part for _, part in layout.values()):
            raise InputError(f"--save-format {save_format}: does not support mixtures of experts, nor checkpoints "
                             "whose matrices are transposed (GPT-2), joined or split; must be dense")
    if not any(linears(layer) for layer in layers):
        raise InputError(f"model {model}: the layers {this} have no torch.nn.Linear, which is all that is pruned")
    for index, layer in enumerate(layers):
        for name, module in linears(layer).items():
            if (owner := owners.setdefault(id(module.weight), index)) != index:
                raise InputError(f"model {model}: layers {owner} and {index} {this} share the weights of {name}, which "
                                 "is not supported")
        stacked = {name: weight.numel() for name, weight in other_weights(layer).items() if weight.dim() > 2}
        if sum(stacked.values()) > sum(module.weight.numel() for module in linears(layer).values()):
            raise InputError(f"model {model}: layer {index} {this} keeps most of its weights in tensors of three "
                             f"dimensions, which are not pruned: {', '.join(stacked)}")


def load_tokenizer(model: str | Path) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer of a model."""
    name, options = _source(model), dict[str, Any](NO_CODE)
    with _reading(model, "its tokenizer cannot be read"):
        if get_tokenizer_config(name).get("bos_token") == "":  # Early LLaMA-1 conversions lack the model file's.
            options |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers has made it up.
        raise InputError(f"model {model}: its tokenizer has no words; get its files, such as tokenizer.json, again")
    return tokenizer


def skeleton(config: transformers.PretrainedConfig, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Build the model of `config` on meta, without weights, for its modules and shapes. dtype "auto": as stored."""
    dtype = config.dtype or torch.float32 if dtype == "auto" else dtype
    with _reading(config.name_or_path, "its configuration cannot be used"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **NO_CODE).eval()
        if exact := "|".join(model._get_dtype_plan(dtype)).replace("*", ".*"):  # These stay in float32.
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.data = tensor.data.float() if re.search(exact, name) else tensor.data
        experts.use_linears(model)
    return model


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with the weights of another, in memory or on disk as there, in a dtype; itself if it has that."""
    if dtype == model.dtype:
        return model
    other = skeleton(model.config, dtype).requires_grad_(False)
    for path, module in model.named_modules():
        if locations := streaming.disk_weights(module):
            other.get_submodule(path).disk_weights = locations
    if not streaming.locations_of(model):
        dtypes = {name: tensor.dtype for name, tensor in other.state_dict().items()}
        state = {name: tensor.to(dtypes[name]) for name, tensor in model.state_dict().items()}
        other.load_state_dict(state, assign=True)
        other.tie_weights()
    streaming.compute_buffers(other)
    other.generation_config = model.generation_config
    return other


def size(config: transformers.PretrainedConfig, dtype: torch.dtype | str) -> int:
    """Return the bytes of the parameters of a configuration's model in a dtype, "auto" for the stored one."""
    return sum(parameter.nbytes for parameter in skeleton(config, dtype).parameters())


def load_model(model: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a model with its experts as linears; see `read_model`."""
    loaded = read_model(model, dtype)
    experts.use_linears(loaded)
    for parameter in loaded.parameters():
        parameter.data = parameter.data.contiguous()  # .bin files may hold views whose elements share memory.
    return loaded.eval().requires_grad_(False)


def read_model(model: str | Path, dtype: torch.dtype | str, packed: bool = False) -> PreTrainedModel:
    """Load a model of any format on the host; packed: with a `sparse.SparseLinear` for each matrix that is packed."""
    name = _source(model)
    with _reading(model, "its weights cannot be read"):
        config, whole = _config_of(name)
        if quantization := getattr(config, "quantization_config", None):
            quantization["dequantize"] = not (packed and quantization["quant_method"] == METHOD)
        return from_pretrained(model, name, dtype, config=config, key_mapping=TEXT_PART if whole else None)


def from_pretrained(model: str | Path, name: str, dtype: torch.dtype | str, **arguments: Any) -> PreTrainedModel:
    """Load the user's model by the name of `_source`. Raises InputError if a weight is missing, NaN or inf."""
    loaded, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **arguments,
                                                          **NO_CODE)
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"model {model}: the checkpoint lacks {', '.join(missing[:3])}")
    packed = {key: buffer for key, buffer in loaded.named_buffers() if ".weight." in key}
    for key, tensor in (dict(loaded.named_parameters()) | packed).items():
        streaming.check_finite(tensor.detach(), f"model {model}: {key}")
    return loaded


def open_model(model: str | Path, config: transformers.PretrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """Open a model with its weights left on disk if its safetensors files hold them unchanged, else load it."""
    quantization = getattr(config, "quantization_config", None)
    if quantization and quantization["quant_method"] != METHOD:
        return load_model(model, dtype)
    name = _source(model)
    with _reading(model, "its weights cannot be read"):
        if quantization:
            stored = streaming.stored_tensors(name, WEIGHTS)
            stored |= {key: (first[0], torch.empty(description["shape"], device="meta"),
                             partial(packing.read, description))
                       for key, description in quantization["matrices"].items()
                       if (first := stored.get(f"{key}.{description['parts'][0]}"))}
            config = copy.deepcopy(config)
            for mark in ("quantization_config", "transformers_weights"):  # An ordinary model has neither.
                vars(config).pop(mark, None)
        else:
            stored = _stored(model, name)
        opened = skeleton(config, dtype)
        if not streaming.attach_disk_weights(opened, stored):
            return load_model(model, dtype)
        with contextlib.suppress(OSError):  # Without this file, the configuration says how it generates.
            opened.generation_config = transformers.GenerationConfig.from_pretrained(name)
    return opened
