"""Where the published sparsegpt.py went: `fasterprune` is `Walk`, of which `algorithm_1` is the text, in `mixgpt`.

`add_batch` is mixgpt.pruning.hessian.InputHessian, which also damps and factors; mixgpt.pruning.layerwise calls both.
"""

from mixgpt.sparsegpt import ColumnSaliency, Walk, algorithm_1, isc_saliency, obs_saliency

__all__ = ["ColumnSaliency", "Walk", "algorithm_1", "isc_saliency", "obs_saliency"]
