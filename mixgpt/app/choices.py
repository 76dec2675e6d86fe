"""The registries of the command line's choices. docs/extending.md shows how to add entries from your own file."""

from dataclasses import dataclass

from mixgpt.common.choices import FORMATS, GRIDS, Choice, Registry  # noqa: F401, two of them
from mixgpt.text.sets import DATASETS  # noqa: F401, another


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


SALIENCIES = Registry("--saliency", {
    "obs": Saliency("w² / [H⁻¹]_mm (SparseGPT)", "sparsegpt:obs_saliency"),
    "isc": Saliency("w² (H_mm + 1 / [H⁻¹]_mm) (MixGPT)", "sparsegpt:isc_saliency"),
    "fisher": Saliency("obs times the mean squared gradient of the loss at the row's output",
                       "sparsegpt:obs_saliency", weighs_rows=True),
})
SOLVERS = Registry("--solver", {
    "obs": Solver("column by column with OBS updates (SparseGPT)", "mixgpt.pruning.solvers:walk", "SparseGPT",
                  saliencies=None, quantizes=True),
    "admm": Solver("masks by ADMM, then the exact least-squares solution for the kept weights",
                   "mixgpt.pruning.solvers:admm", "ADMM", saliencies=("obs", "fisher"), quantizes=True),
})
ESTIMATORS = Registry("--sensitivity", {
    "hutchinson": Choice("trace of the exact Hessian of the loss, by random probes (Hutchinson)",
                         "mixgpt.allocation.hutchinson:curvatures"),
    "fisher": Choice("trace of the Gauss-Newton matrix, with less noise and in less time",
                     "mixgpt.allocation.fisher:squared_gradients"),
})
ALLOCATIONS = Registry("--sparsity-way", {
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
