"""Load models and tokenizers, and save a pruned model as a folder that `from_pretrained` loads."""

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
    GgufConfig,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import hub
from errors import InputError
from formats import FORMATS
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


def skeleton(config):
    """Build the model of `config` without weights, to know its modules and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


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
    for key, parameter in loaded.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"model {model}: {key} holds NaN or inf")
    return loaded.eval()


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


def check_save(folder, nbytes):
    """Refuse a folder that is not empty, cannot be written or lacks room for nbytes. Leaves nothing behind."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"--save {folder}: exists and is not an empty folder")
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise InputError(f"--save {folder}: {parent} cannot be written ({error.strerror})") from error
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise InputError(f"--save {folder}: needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {parent}")


def save(folder, model, tokenizer, record, family=None, save_format="dense", grids=None):
    """Write weights, configuration, tokenizer and record; the folder appears under its name when all is there.

    save_format: a key of formats.FORMATS. grids: {name of a linear: quant.Grid} of those that are quantized.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    FORMATS[save_format](partial, model, family, grids)
    tokenizer.save_pretrained(partial)
    write_record(partial, record)
    partial.replace(folder)  # an empty folder of this name gives way


def write_record(folder, record):
    """Write the record of a run into `folder`, whole or not at all."""
    path = Path(folder) / RECORD
    partial = path.with_name(RECORD + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)
