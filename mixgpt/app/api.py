"""The Python interface: `mixgpt.prune`, `mixgpt.evaluate` and `mixgpt.load`."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixgpt.app import pipeline, plots, report
from mixgpt.app.options import Evaluation, Options
from mixgpt.app.settings import IN_MEMORY, Settings
from mixgpt.checkpoints import load as checkpoints
from mixgpt.checkpoints.quantizer import METHOD
from mixgpt.checkpoints.sparse import SparseLinear
from mixgpt.common.errors import InputError
from mixgpt.common.hub import hub_asked_anew
from mixgpt.common.runtime import choose_device
from mixgpt.common.texts import texts_of
from mixgpt.modeling.experts import is_fused, restore, use_linears
from mixgpt.pruning.targets import Target


@dataclass(frozen=True, repr=False)
class Result:
    """What a run has measured. Printed, or as the last line of a notebook's cell, it is its tables."""

    record: dict[str, Any]  # mixgpt.json and the files of --record hold it.

    @property
    def perplexity(self) -> dict[str, float]:
        """Perplexities of the pruned model, {test set: perplexity}."""
        return list(self.record["perplexity"].values())[-1]

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Scores of the pruned model in tasks, {task: {metric: value}}."""
        return list(self.record.get("tasks", {"": {}}).values())[-1]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights of the pruned matrices, counted."""
        return self.record["sparsity"]

    @property
    def matrices(self) -> list[dict[str, Any]]:
        """One dict per matrix: layer, name, shape, sparsity, and the reconstruction error if it was calibrated."""
        return self.record["matrices"]

    def table(self) -> str:
        """Return the tables of sparsity, perplexity and tasks as text."""
        return "\n\n".join(report.tables(self.record))

    __repr__ = table

    def plot(self) -> Image.Image:
        """Return a picture of the sparsities by layer and by kind of matrix, a PIL.Image."""
        measured = {(row["layer"], row["name"]): Target(row["sparsity"]) for row in self.matrices}
        return Image.open(io.BytesIO(plots.draw(measured)))


@torch.inference_mode(False)  # Estimators and distillation need gradients, even where the caller needs none.
@hub_asked_anew()
def prune(model: str | Path | PreTrainedModel, dataset: str | Path | list[Any] | torch.Tensor | None,
          tokenizer: PreTrainedTokenizerBase | None = None, **options: Unpack[Options]) -> Result:
    """Prune and quantize a model in one shot, print the report, and return a `Result`.

    model: a hub id, a folder, a .gguf file, or a model of transformers in memory, which is changed in place. tokenizer:
    needed with the latter, else in place of the model's own. dataset: calibration text as on the command line (a name,
    a path, a mixture), a list of strings, the documents of a text, or a LongTensor of tokens (N, T). options: those of
    the command line, with underscores: sparsity=0.5, preset="best", save="pruned", quiet=True. Raises
    `mixgpt.common.errors.InputError`, a ValueError, with the line that the command line would print.
    """
    model, given = (str(path) if isinstance(path, os.PathLike) else path for path in (model, dataset))
    name, texts = (given, None) if isinstance(given, str | None) else (IN_MEMORY, given)
    if texts is not None and not isinstance(texts, torch.Tensor):
        texts = texts_of(texts, "dataset")
    if isinstance(texts, torch.Tensor):
        if texts.dim() != 2 or texts.dtype != torch.long or (texts < 0).any():
            raise InputError(f"dataset: tokens are {texts.dtype} {tuple(texts.shape)}, must be torch.int64 (N, T), "
                             "none below 0")
        options |= {"nsamples": len(texts), "seqlen": texts.shape[1]}
    if not isinstance(tokenizer, PreTrainedTokenizerBase) and (tokenizer or not isinstance(model, str)):
        raise InputError(f"tokenizer: is a {type(tokenizer).__name__}, must be one of transformers")
    if isinstance(model, str):
        return Result(pipeline.execute(Settings(model, name, **options), tokenizer=tokenizer, texts=texts))
    if not (isinstance(model, PreTrainedModel) and model.can_generate()):  # PEFT's and compiled ones are none.
        raise InputError(f"model: is a {type(model).__name__}, must be a causal language model of transformers")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise InputError("model: lies on several devices; load it without device_map, or give its name or folder")
    quantized = getattr(model, "quantization_method", METHOD) != METHOD
    if quantized or model.config.get_text_config() is not model.config or any(map(is_fused, model.modules())):
        raise InputError("model: a mixture of experts, or one with images, sound or quantized weights, cannot be "
                         "pruned in memory; give its name or folder")
    settings = Settings(type(model).__name__, name, **options)
    if settings.dtype != "auto":
        raise InputError(f"dtype: a model in memory keeps its own, {model.dtype}; load it in the other, or leave this "
                         "out")
    if (settings.compresses or settings.save) and any(isinstance(module, SparseLinear) for module in model.modules()):
        raise InputError("model: its matrices are packed, and can only be evaluated; load it with packed=False")
    device, trained = model.device, [weight for weight in model.parameters() if weight.requires_grad]
    modes = {module: module.training for module in model.modules()}
    replaced = use_linears(model)
    try:
        return Result(pipeline.execute(settings, None, model.to("cpu").eval().requires_grad_(False), tokenizer, texts))
    finally:
        for weight in trained:
            weight.requires_grad_(True)
        restore(model, replaced)
        model.to(device)
        for module, training in modes.items():
            module.training = training


def evaluate(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None,
             **options: Unpack[Evaluation]) -> Result:
    """Measure perplexities, and scores of tasks, of a model as it is, print them, and return a `Result`.

    model, tokenizer: as in `prune`. options: those of `mixgpt eval`, with underscores, such as eval=["wikitext2"].
    Raises `mixgpt.common.errors.InputError`.
    """
    if others := options.keys() - Evaluation.__annotations__.keys():
        raise TypeError(f"no option of an evaluation is called {', '.join(sorted(others))}")
    return prune(model, None, tokenizer, **options)


@torch.inference_mode(False)  # `prune` would refuse a model that is loaded in the caller's inference mode.
@hub_asked_anew()
def load(folder: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto",
         packed: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a saved model, in any format, for evaluation. Returns (model, tokenizer), as of transformers.

    device: cpu, cuda or cuda:N (default: cuda if available). dtype: a torch.dtype, or "auto" for that on disk. packed:
    multiply by the matrices of a sparse folder as they are stored; False: expand them into ordinary linears.
    """
    device, folder = choose_device(device), os.path.expanduser(folder)
    model, tokenizer = checkpoints.read_model(folder, dtype, packed), checkpoints.load_tokenizer(folder)
    if any(isinstance(module, SparseLinear) and not module.weight.kind(device) for module in model.modules()):
        model = checkpoints.read_model(folder, dtype)  # A GPU without Triton multiplies by ordinary matrices.
    return model.eval().to(device), tokenizer
