"""One-shot pruning of language models: SparseGPT, MixGPT and GPTQ.

    import mixgpt

    result = mixgpt.prune("facebook/opt-125m", "c4", sparsity=0.5, preset="best", save="pruned")
    print(result)
    model, tokenizer = mixgpt.load("pruned")
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Unpack

from mixgpt.common.program import UNSUPPORTED, __version__  # noqa: F401

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mixgpt.app.api import Result
    from mixgpt.app.options import Evaluation, Options


class _Registration:
    """Registers the sparse format with transformers once that imports models: importing it here would take seconds."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        """Return None, so that Python goes on to find the module by itself."""
        if name == "transformers.modeling_utils":
            sys.meta_path.remove(cls)
            importlib.import_module("mixgpt.checkpoints.quantizer")


if "transformers.modeling_utils" in sys.modules:
    importlib.import_module("mixgpt.checkpoints.quantizer")
else:
    sys.meta_path.insert(0, _Registration)


def _interface() -> ModuleType:
    """Import what is behind the functions below, with PyTorch. Raises ImportError where this program cannot run."""
    if UNSUPPORTED:
        raise ImportError(UNSUPPORTED)
    return importlib.import_module("mixgpt.app.api")


def prune(model: "str | Path | PreTrainedModel", dataset: "str | Path | list[Any] | torch.Tensor | None",
          tokenizer: "PreTrainedTokenizerBase | None" = None, **options: "Unpack[Options]") -> "Result":
    """Prune and quantize a model in one shot, print the report, and return a `mixgpt.app.api.Result`.

    model: a hub id, a folder, a .gguf file, or a model of transformers in memory, which is changed in place. tokenizer:
    needed with the latter, else in place of the model's own. dataset: calibration text as on the command line (a name,
    a path, a mixture), a list of strings, the documents of a text, or a LongTensor of tokens (N, T). options: those of
    the command line, with underscores: sparsity=0.5, preset="best", save="pruned", quiet=True. Raises
    `mixgpt.common.errors.InputError`, a ValueError, with the line that the command line would print.
    """
    return _interface().prune(model, dataset, tokenizer, **options)


def evaluate(model: "str | Path | PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None,
             **options: "Unpack[Evaluation]") -> "Result":
    """Measure perplexities, and scores of tasks, of a model as it is, print them, and return a `mixgpt.app.api.Result`.

    model, tokenizer: as in `prune`. options: those of `mixgpt eval`, with underscores, such as eval=["wikitext2"].
    Raises `mixgpt.common.errors.InputError`.
    """
    return _interface().evaluate(model, tokenizer, **options)


def load(folder: str | Path, device: "str | torch.device | None" = None, dtype: "str | torch.dtype" = "auto",
         packed: bool = True) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a saved model, in any format, for evaluation. Returns (model, tokenizer), as of transformers.

    device: cpu, cuda or cuda:N (default: cuda if available). dtype: a torch.dtype, or "auto" for that on disk. packed:
    multiply by the matrices of a sparse folder as they are stored; False: expand them into ordinary linears.
    """
    return _interface().load(folder, device, dtype, packed)
