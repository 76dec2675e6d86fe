"""One-shot pruning of language models: SparseGPT, MixGPT and GPTQ.

    import mixgpt

    result = mixgpt.prune("facebook/opt-125m", "c4", sparsity=0.5, preset="best", save="pruned")
    print(result.table())
    model, tokenizer = mixgpt.load("pruned")
"""

import importlib
import sys

from mixgpt.common.program import __version__  # noqa: F401


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


def prune(model, dataset, tokenizer=None, **options):
    """Prune and quantize a model in one shot, print the report, and return a `mixgpt.app.api.Result`.

    model: a hub id, a folder, a .gguf file, or a model of transformers in memory, which is changed in place. tokenizer:
    needed with the latter, else in place of the model's own. dataset: calibration text as on the command line (a name,
    a path, a mixture), a list of strings, the documents of a text, or a LongTensor of tokens (N, T). options: those of
    the command line, with underscores: sparsity=0.5, preset="best", save="pruned", quiet=True. Raises
    `mixgpt.common.errors.InputError`, a ValueError, with the line that the command line would print.
    """
    from mixgpt.app import api  # imports PyTorch
    return api.prune(model, dataset, tokenizer, **options)


def load(folder, device=None, dtype="auto", packed=True):
    """Load a saved model, in any format, for evaluation. Returns (model, tokenizer), as of transformers.

    device: cpu, cuda or cuda:N (default: cuda if available). dtype: a torch.dtype, or "auto" for that on disk. packed:
    multiply by the matrices of a sparse folder as they are stored; False: expand them into ordinary linears.
    """
    from mixgpt.app import api
    return api.load(folder, device, dtype, packed)
