"""One-shot pruning of language models: SparseGPT, MixGPT and GPTQ.

    import mixgpt

    result = mixgpt.prune("facebook/opt-125m", "c4", sparsity=0.5, preset="best", save="pruned")
    print(result)
    model, tokenizer = mixgpt.load("pruned")
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from mixgpt.common.program import UNSUPPORTED, __version__

__all__ = ["__version__", "evaluate", "load", "prune"]


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

if TYPE_CHECKING:
    from mixgpt.app.api import evaluate, load, prune
else:
    def __getattr__(name: str) -> Any:
        """Import a function of the interface on use, with PyTorch. Raises ImportError where this program cannot run."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if UNSUPPORTED:
            raise ImportError(UNSUPPORTED)
        return getattr(importlib.import_module("mixgpt.app.api"), name)
