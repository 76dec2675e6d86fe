"""The registries that a run is chosen from. docs/extending.md shows how to add to them from a file of one's own."""

from dataclasses import dataclass

from mixgpt.common.registry import Choice, Registry
from mixgpt.text.sets import DATASETS  # noqa: F401, one of them


@dataclass(frozen=True)
class Saliency(Choice):
    """A saliency: w² times the factor of a column that its code returns, see sparsegpt.py."""

    weighs_rows: bool = False  # and times the loss's mean squared gradient at the row's output
    solvers: tuple[str, ...] = ("obs",)  # that honour it


@dataclass(frozen=True)
class Allocation(Choice):
    """A way to spread a sparsity over matrices."""

    ranks: bool = False  # by the traces of --sensitivity
    by_loss: bool = False  # by gradients of the loss, in fractions only


SALIENCIES = Registry("--saliency", {
    "obs": Saliency("w² / [H⁻¹]_mm (SparseGPT)", "sparsegpt:obs_saliency", solvers=("obs", "admm")),
    "isc": Saliency("w² (H_mm + 1 / [H⁻¹]_mm) (MixGPT)", "sparsegpt:isc_saliency"),
    "fisher": Saliency("obs, rows weighted by the loss's gradient there", "sparsegpt:obs_saliency", weighs_rows=True,
                       solvers=("obs", "admm")),
})
SOLVERS = Registry("--solver", {
    "obs": Choice("one walk over the columns (SparseGPT)", "mixgpt.pruning.solvers:walk", "SparseGPT"),
    "admm": Choice("masks by ADMM, and the kept weights solved for", "mixgpt.pruning.solvers:admm", "ADMM"),
})
ESTIMATORS = Registry("--sensitivity", {
    "hutchinson": Choice("trace of the exact Hessian of the loss, by random probes",
                         "mixgpt.allocation.hutchinson:curvatures"),
    "fisher": Choice("trace of the Gauss-Newton matrix, less noise in less time",
                     "mixgpt.allocation.fisher:squared_gradients"),
})
ALLOCATIONS = Registry("--sparsity_way", {
    "uniform": Allocation("all matrices alike"),
    "origin": Allocation("what the ancestors call uniform"),
    "layer-level": Allocation("the less sensitive a layer, the sparser, with the same total", ranks=True),
    "weight-level": Allocation("the less sensitive a matrix, the sparser, with the same total", ranks=True),
    "global": Allocation("one threshold for the weights of all matrices, on what removing them adds to the loss",
                         by_loss=True),
})
FORMATS = Registry("--save-format", {
    "dense": Choice("every weight in its dtype"),
    "compressed-tensors": Choice("packed integers, for vLLM too",
                                 "mixgpt.checkpoints.formats:save_compressed_tensors"),
    "sparse": Choice("a bit mask and the packed values of the kept weights", "mixgpt.checkpoints.formats:save_sparse"),
})
