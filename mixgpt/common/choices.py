"""Registries of flags' choices, and file names in a run's output folder. Nothing here imports PyTorch."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mixgpt.common.errors import InputError

RECORD = "mixgpt.json"  # of a run: settings, versions, every matrix, perplexities
CARD = "README.md"  # of a saved model, for people, and for the hub
PROGRESS = "progress"  # a directory, until the run has ended: the resume state
NO_METRICS = ("examples", "num_fewshot", "version")  # of a task's scores in a record
AGAIN = "dense again"  # The dense model's distance to itself, by rounding.
TOP = "same top token"  # A measure of the distance to the dense model.


def is_interrupted_run(path: str | Path) -> bool:
    """Return whether a directory holds an unfinished run."""
    return (Path(path) / PROGRESS / "run.json").exists()


@dataclass(frozen=True)
class Choice:
    """One value of a flag. Its code is imported on use: the command line is checked before PyTorch is imported."""

    help: str  # what it does, in a few words
    code: Any = None  # "module:name", or the object itself
    title: str = ""  # name in tables and progress (default: its name)
    refuses: Callable[[Any], str] = lambda settings: ""  # why it does not support an app.settings.Settings, or ""

    def load(self) -> Any:
        """Return the code of this choice."""
        return pkgutil.resolve_name(self.code) if isinstance(self.code, str) else self.code


class Registry(dict[str, Any]):
    """{name: Choice} of one flag."""

    def __missing__(self, name: str) -> NoReturn:
        raise InputError(f"{name} is not known here; import what defines it first")

    def title(self, name: str) -> str:
        """Return the name of a choice in tables and progress."""
        return self[name].title or name

    @property
    def help(self) -> str:
        """What each choice does, escaped for argparse's formatting."""
        return "; ".join(f"{name}: {choice.help}" for name, choice in self.items()).replace("%", "%%")


@dataclass(frozen=True)
class SaveFormat(Choice):
    """A save format. Its code writes it: a function of (folder, model, {name of a linear: quant.Grid})."""

    streams: bool = False  # whether it writes models whose weights are on disk; else they are loaded
    holds_experts: bool = False  # whether it has the layouts of mixtures of experts and of GPT-2


@dataclass(frozen=True)
class Saliency(Choice):
    """A saliency: a function score(W, h, u), or a sparsegpt.ColumnSaliency."""

    weighs_rows: bool = False  # also times the loss's mean squared gradient at the row's output


@dataclass(frozen=True)
class Solver(Choice):
    """A solver: a function of a mixgpt.pruning.solvers.Problem."""

    saliencies: tuple[str, ...] | None = ("obs",)  # allowed values of --saliency; None: all
    quantizes: bool = False  # whether it supports --wbits


@dataclass(frozen=True)
class Allocation(Choice):
    """A way to distribute sparsity over matrices: a function of a mixgpt.allocation.plan.Budget."""

    even: bool = False  # all matrices alike
    ranks: bool = False  # by the traces of --sensitivity
    by_loss: bool = False  # by the mean squared gradients of the loss at matrix outputs


def not_packed(settings: Any) -> str:
    """Return why a packed checkpoint cannot hold the run's result; empty if it can."""
    if not (settings.wbits in (4, 8) and settings.sym and settings.grid == "uniform"):
        return "supports uniform symmetric grids of 4 or 8 bits; needs --wbits 4 or 8, and --sym"
    if settings.act_order and settings.groupsize != -1:
        return "supports groups of consecutive columns only; with --act-order needs --groupsize -1"
    return ""


GRIDS = Registry({
    "uniform": Choice("evenly spaced values", "mixgpt.quant:Scheme"),
    "codebook": Choice("uneven values, of which pruned rows need none around 0", "mixgpt.quant:Codebooks",
                       refuses=lambda settings: (
                           "has 2, 3 or 4 bits, and is symmetric without --sym"
                           if settings.sym or settings.wbits > 4 else ""))})
FORMATS = Registry({
    "dense": SaveFormat("every weight in its dtype, as by save_pretrained", "mixgpt.checkpoints.formats:save_dense",
                        streams=True, holds_experts=True),
    "compressed-tensors": SaveFormat(
        "packed integers, which vLLM loads too", "mixgpt.checkpoints.formats:save_compressed_tensors",
        streams=True, refuses=not_packed),
    "sparse": SaveFormat(
        "a bit mask and the packed values of the kept weights", "mixgpt.checkpoints.formats:save_sparse",
        streams=True),
})
SALIENCIES = Registry({
    "obs": Saliency("w² / [H⁻¹]_mm (SparseGPT)", "mixgpt.sparsegpt:obs_saliency"),
    "isc": Saliency("w² (H_mm + 1 / [H⁻¹]_mm) (MixGPT)", "mixgpt.sparsegpt:isc_saliency"),
    "fisher": Saliency("obs times the mean squared gradient of the loss at the row's output",
                       "mixgpt.sparsegpt:obs_saliency", weighs_rows=True),
})
SOLVERS = Registry({
    "obs": Solver("column by column with OBS updates (SparseGPT)", "mixgpt.pruning.solvers:walk", "SparseGPT",
                  saliencies=None, quantizes=True),
    "admm": Solver("masks by ADMM, then least squares for the kept weights, by conjugate gradients",
                   "mixgpt.pruning.solvers:admm", "ADMM", saliencies=("obs", "fisher"), quantizes=True),
})
ESTIMATORS = Registry({
    "hutchinson": Choice("trace of the exact Hessian of the loss, by random probes (Hutchinson)",
                         "mixgpt.allocation.hutchinson:curvatures"),
    "fisher": Choice("trace of the Gauss-Newton matrix, with less noise and in less time",
                     "mixgpt.allocation.fisher:squared_gradients"),
})
ALLOCATIONS = Registry({
    "uniform": Allocation("the same sparsity in every matrix", "mixgpt.allocation.plan:uniform", even=True),
    "origin": Allocation("alias of uniform, as in the published code", "mixgpt.allocation.plan:uniform", even=True),
    "layer-level": Allocation("by sensitivity of the layer: the more sensitive, the less sparse",
                              "mixgpt.allocation.plan:by_layer", ranks=True),
    "weight-level": Allocation("by sensitivity of the matrix: the more sensitive, the less sparse",
                               "mixgpt.allocation.plan:by_matrix", ranks=True),
    "global": Allocation("one threshold for all weights on the estimated increase of the loss",
                         "mixgpt.allocation.plan:by_threshold", by_loss=True, refuses=lambda settings: (
                             "gives each matrix a fraction, not n of m; with --prunen and --prunem it must be uniform, "
                             "layer-level or weight-level") if settings.prunem else ""),
})
