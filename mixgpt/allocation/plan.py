"""Assign a target sparsity to each matrix, from an overall sparsity and measurements of the model."""

from dataclasses import dataclass

import torch

from mixgpt.allocation.fisher import Gradients
from mixgpt.allocation.ranking import allocate, allocate_whole, meet_total
from mixgpt.pruning.targets import Target
from modelutils import StreamedModel


@dataclass(frozen=True)
class Budget:
    """Input of an allocation, which returns {(layer, name): Target}."""

    selected: dict  # {(layer, name): (out, in)}, the matrices to prune
    target: Target  # overall
    alpha: float = 0.0  # largest deviation of a matrix from it
    sensitivity: dict | None = None  # {(layer, name): trace per weight} of all matrices, if the allocation ranks by it
    gradients: Gradients | None = None  # if it goes by the loss
    streamed: StreamedModel | None = None  # the dense model, to run it
    calibration: torch.Tensor | None = None  # (N, T)


def uniform(budget):
    """Give every matrix the overall target."""
    return dict.fromkeys(budget.selected, budget.target)


def by_matrix(budget):
    """Rank matrices by sensitivity, the least sensitive become sparsest."""
    return _by_rank(budget, lambda key: key)


def by_layer(budget):
    """Rank layers by the summed sensitivities of their selected matrices, the least sensitive become sparsest."""
    return _by_rank(budget, lambda key: key[0])


def _by_rank(budget, unit_of):
    ranked, sizes, target = {}, {}, budget.target
    weights = {key: out * columns for key, (out, columns) in budget.selected.items()}
    for key, size in weights.items():
        unit = unit_of(key)
        ranked[unit] = ranked.get(unit, 0) + budget.sensitivity[key]
        sizes[unit] = sizes.get(unit, 0) + size
    arguments = list(ranked.values()), list(sizes.values()), target.sparsity, budget.alpha
    if target.prunem:
        m = target.prunem
        of_unit = dict(zip(ranked, allocate_whole(*arguments, m), strict=True))
        return {key: Target(of_unit[unit_of(key)] / m, of_unit[unit_of(key)], m) for key in weights}
    of_unit = dict(zip(ranked, allocate(*arguments), strict=True))
    sparsities = meet_total([of_unit[unit_of(key)] for key in weights], list(weights.values()),
                            round(target.sparsity * sum(weights.values())))
    return {key: Target(sparsity) for key, sparsity in zip(weights, sparsities, strict=True)}
