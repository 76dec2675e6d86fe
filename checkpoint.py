"""Find, check and load models and tokenizers, and write the record of a run."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import hub
import weights
from errors import InputError
from folder import begun, empty
from modelutils import SCRIPTS, SPARSE, load_sparse, model_class

RECORD = "mixgpt.json"


def _source(model):
    """Return where `from_pretrained` finds `model`, a hub id, a folder or a .gguf file, as its arguments."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model {model}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    return model, {"local_files_only": not hub.reachable()}


@contextlib.contextmanager
def _refusing(model):
    """Turn what transformers raises for a model that it cannot load into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        if not Path(model).exists() and not hub.reachable():
            raise InputError(f"model {model}: not a folder or .gguf file here, not in the cache of the Hugging Face "
                             "hub, and the hub cannot be reached") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {model}: {reason}") from error


def load_config(model, family):
    """Load the configuration of `model` and refuse it where its class belongs to another family script."""
    name, arguments = _source(model)
    with _refusing(model):
        config = AutoConfig.from_pretrained(name, **arguments)
    kind = model_class(config)
    if kind is None:
        raise InputError(f"model {model}: {config.model_type} is not a causal language model")
    architecture = kind.__name__
    script = SCRIPTS.get(architecture)
    if script != family.script:
        accepted = ", ".join(name for name, of in SCRIPTS.items() if of == family.script)
        advice = f"use {script}" if script else f"no script here prunes it; {family.script} accepts {accepted}"
        raise InputError(f"model {model}: this is a {architecture}; {advice}")
    return config


def load_tokenizer(model):
    """Load the tokenizer of `model`.

    Early conversions of LLaMA-1 give the empty string as their special tokens; those of its model file are put in.
    """
    name, arguments = _source(model)
    with _refusing(model):
        if "gguf_file" not in arguments and get_tokenizer_config(name, **arguments).get("bos_token") == "":
            arguments |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        return AutoTokenizer.from_pretrained(name, **arguments)


def skeleton(config, dtype=torch.float32):
    """Build the model of `config` without weights, to know its modules and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load_model(model, dtype):
    """Load the weights of `model` on the host, in `dtype` ("auto": as stored), whatever format they were saved in.

    Raises InputError where the checkpoint lacks a weight, holds NaN or inf, or is quantized in another way.
    """
    name, arguments = _source(model)
    with _refusing(model):
        if (Path(model) / SPARSE).is_file():
            loaded, missing = load_sparse(model, dtype), ()
        else:
            arguments |= _dequantizing(model, name, arguments)
            loaded, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True,
                                                                  **arguments)
            missing = report["missing_keys"]
    if missing:
        raise InputError(f"model {model}: the checkpoint lacks {', '.join(sorted(missing)[:3])}")
    _check_finite(model, loaded)
    return loaded.eval()


def open_model(model, config, family, dtype):
    """Open `model` with its weights left on disk where they are in safetensors files as they are, else load it.

    Raises InputError where weights are missing, hold NaN or inf, or do not fit the configuration.
    """
    name, arguments = _source(model)
    if "gguf_file" in arguments or (Path(model) / SPARSE).is_file() or getattr(config, "quantization_config", None):
        return load_model(model, dtype)
    with _refusing(model):
        files = weights.files_of(name, **arguments)
        if dtype == "auto":
            dtype = config.dtype or weights.dtype_of(files)
        opened = skeleton(config, dtype)
        if not (files and weights.stream(opened, family, files)):
            return load_model(model, dtype)
        _check_finite(model, opened)
        with contextlib.suppress(OSError):  # where there is none, what the configuration says
            opened.generation_config = GenerationConfig.from_pretrained(name, **arguments)
    return opened


def _check_finite(model, opened):
    for key, tensor in weights.tensors_of(opened):
        if not tensor.isfinite().all():
            raise InputError(f"model {model}: {key} holds NaN or inf")


def _dequantizing(model, name, arguments):
    """Return the arguments of `from_pretrained` that turn quantized weights into ordinary ones."""
    if "gguf_file" in arguments:
        return {"quantization_config": GgufConfig(dequantize=True)}
    config = AutoConfig.from_pretrained(name, **arguments)
    quantization = getattr(config, "quantization_config", {"quant_method": None})
    method = quantization["quant_method"]
    if method == "compressed-tensors":
        quantization["dequantize"] = True
    elif method:
        raise InputError(f"model {model}: its weights are quantized by {method}; give the original model")
    return {"config": config}


def check_save(folder, nbytes, resume):
    """Refuse a folder that is not empty, cannot be written or lacks room for nbytes. Leaves nothing behind.

    resume: accept the folder of a run that left off.
    """
    folder = Path(folder)
    if begun(folder) and not resume:
        raise InputError(f"--save {folder}: holds a run that left off; go on with --resume, or remove the folder")
    if folder.exists() and not begun(folder) and not (folder.is_dir() and empty(folder)):
        raise InputError(f"--save {folder}: exists and is not an empty folder")
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise InputError(f"--save {folder}: {parent} cannot be written ({error.strerror})") from error
    free = shutil.disk_usage(parent).free
    nbytes -= sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if free < nbytes:
        raise InputError(f"--save {folder}: needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {parent}")


def write_record(folder, record):
    """Write the record of a run into `folder`, whole or not at all."""
    path = Path(folder) / RECORD
    partial = path.with_name(RECORD + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)
