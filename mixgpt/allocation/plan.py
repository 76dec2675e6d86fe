"""Say how sparse each matrix shall be, from a sparsity in all and the sensitivities."""

from mixgpt.allocation.ranking import allocate, allocate_whole
from mixgpt.pruning.targets import Target


def make_plan(selected, target, way="uniform", sensitivity=None, alpha=0.0):
    """Say how sparse each matrix shall be. Returns {(layer, name): Target}.

    selected: {(layer, name): (out, in)}. target: of all of them together. way: uniform (origin), layer-level or
    weight-level. sensitivity: {(layer, name): trace per weight}, of any matrices that include the selected ones;
    layer-level ranks layers by the sum over their selected matrices.
    """
    if way in ("uniform", "origin"):
        return dict.fromkeys(selected, target)
    unit_of = {key: key[0] if way == "layer-level" else key for key in selected}
    ranked, sizes = {}, {}
    for key, (out, columns) in selected.items():
        ranked[unit_of[key]] = ranked.get(unit_of[key], 0) + sensitivity[key]
        sizes[unit_of[key]] = sizes.get(unit_of[key], 0) + out * columns
    arguments = list(ranked.values()), list(sizes.values()), target.sparsity, alpha
    if target.prunem:
        m = target.prunem
        targets = [Target(n / m, n, m) for n in allocate_whole(*arguments, m)]
    else:
        targets = [Target(sparsity) for sparsity in allocate(*arguments)]
    of_unit = dict(zip(ranked, targets, strict=True))
    return {key: of_unit[unit_of[key]] for key in selected}
