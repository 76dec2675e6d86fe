"""The card of a saved model, its README.md on the hub, and what a run says of the folder at its end."""

import contextlib
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from transformers import PreTrainedModel
from transformers.utils import cached_file

from mixgpt.checkpoints import load
from mixgpt.checkpoints.formats import format_bytes
from mixgpt.common.choices import CARD, FORMATS
from mixgpt.common.errors import InputError, reading
from mixgpt.modeling.streaming import stored_dtype

TAKEN = ("license", "license_name", "license_link", "language")  # These are taken from the card of the base model.
NEEDS = {"dense": "loads everywhere", "compressed-tensors": "loads in vLLM, too", "sparse": "needs mixgpt to load"}
BY_MIXGPT = """import mixgpt

model, tokenizer = mixgpt.load("{name}")"""
BY_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""


def text(record: dict[str, Any], model: PreTrainedModel, command: str | None = None) -> str:
    """Return the card of the model in memory that a run has saved by a command line, if it has one."""
    settings, name = record["settings"], _name(record)
    prunes, quantizes = settings["sparsity"] or settings["prunen"], settings["wbits"] < 16
    calibrates, packed = not (settings["gmp"] or settings["nearest"]), settings["save_format"] == "sparse"
    in_memory = settings["model"] == type(model).__name__
    base, front = _base(model.config.name_or_path if in_memory else settings["model"])
    tags = {"mixgpt": True, "pruned": prunes, "sparsity": prunes, "quantized": quantizes,
            "sparsegpt": prunes and calibrates and settings["solver"] == "obs", "gptq": quantizes and calibrates,
            "compressed-tensors": settings["save_format"] == "compressed-tensors"}
    data = ModelCardData(
        base_model=base, base_model_relation=("quantized" if quantizes else "finetune") if base else None,
        library_name="mixgpt" if packed else "transformers", pipeline_tag="text-generation",
        tags=[tag for tag, holds in tags.items() if holds], **{key: front[key] for key in TAKEN if key in front})
    *_, (method, found) = record["perplexity"].items()
    kept = f", the others have {settings['wbits']} bits" if quantizes else ""
    parts = [f"---\n{data.to_yaml()}\n---", f"# {name}", " ".join([
        f"{base or Path(settings['model']).name}, compressed in one shot by MixGPT {record['program']['version']}:",
        f"{method}. {record['sparsity']:.2%} of the weights in {len(record['matrices'])} matrices are 0{kept}.",
        "`mixgpt.json` has all settings."])]
    if found:
        rows = [["perplexity", *found], ["---"] * (1 + len(found)), *(
            [title, *(f"{value:.2f}" for value in row.values())] for title, row in record["perplexity"].items())]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    served = "" if packed else f"\nvllm serve {name}"
    blocks = (("sh", command), ("python", (BY_MIXGPT if packed else BY_TRANSFORMERS).format(name=name)),
              ("sh", f'mixgpt generate {name} "Once upon a time"{served}'))
    return "\n\n".join([*parts, *(f"```{language}\n{code}\n```" for language, code in blocks if code)]) + "\n"


def _base(name: str) -> tuple[str | None, dict[str, Any]]:
    """Return the hub id of a model, None if it has none, and the front matter of its own card, {} without one."""
    path, front = Path(name), {}
    with contextlib.suppress(InputError), reading(CARD):
        file = (path.parent if path.is_file() else path) / CARD if path.exists() else cached_file(
            name, CARD, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        front = metadata_load(file) or {}
    if name and not path.exists():
        return name, front
    # A run that has saved this folder names its base model.
    return front.get("base_model") if "mixgpt" in front.get("tags", ()) else None, front


def sizes(matrices: Iterable[tuple[tuple[int, int], float, int]], model: PreTrainedModel, settings: Any
          ) -> dict[str, int]:
    """Return about the bytes of a model's weights in each format that can hold it. matrices: as of `format_bytes`."""
    dtype, found = stored_dtype(model), {}
    total = load.size(model.config, dtype)
    for name, nbytes in format_bytes(total, matrices, dtype.itemsize, settings.groupsize, settings.sym).items():
        with contextlib.suppress(InputError):
            load.check_layers(settings.model, model, name)
            if not FORMATS[name].refuses(settings):
                found[name] = nbytes
    return found


def report(record: dict[str, Any]) -> str:
    """Return what a run says of its saved folder: the size, what smaller formats would take, and how to publish it."""
    folder, saved, found = record["settings"]["save"], record["settings"]["save_format"], record.get("sizes", {})
    line = f"saved in {folder}, loaded again and found equal"
    if saved in found:
        line += f": {found[saved] / 1e6:.1f} MB" + "".join(
            f"; --save-format {name}: {nbytes / 1e6:.1f} MB, {NEEDS[name]}"
            for name, nbytes in found.items() if nbytes < found[saved])
    return f"{line}\nhf upload {_name(record)} {shlex.quote(folder)}"


def _name(record: dict[str, Any]) -> str:
    """Return the name of the saved folder, as the hub allows it."""
    return re.sub(r"[^\w.-]+", "-", Path(record["settings"]["save"]).resolve().name)
