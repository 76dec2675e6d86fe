"""Which matrices are pruned, how sparse each shall be, and what was done to it."""

from dataclasses import dataclass

from mixgpt.common.errors import InputError
from modelutils import linears
from quant import Grid


@dataclass(frozen=True)
class Target:
    """How sparse one matrix shall be: a fraction of its weights, or prunen of every prunem consecutive ones."""

    sparsity: float
    prunen: int = 0
    prunem: int = 0


@dataclass(frozen=True)
class Outcome:
    """What was done to one matrix."""

    error: float | None = None  # ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration inputs, where there are any
    percdamp: float | None = None  # the damping that its Hessian needed
    grid: Grid | None = None  # where it is quantized


@dataclass(frozen=True)
class Selection:
    """Which matrices are changed: layers minlayer ≤ index < maxlayer, names that contain prune_only."""

    minlayer: int = 0
    maxlayer: int = 1000
    prune_only: str = ""
    invert: bool = False  # all others instead


def select(model, family, selection=Selection(), widths=None):  # noqa: B008
    """Return the shapes of the matrices to change, {(layer, name): (out, in)}, in the order of the model.

    widths: {flag: columns of a group}, which must divide those of each matrix where they are positive. The model may be
    on meta. Raises InputError where nothing is selected, or a width does not divide the columns.
    """
    selected, chosen = {}, selection
    for index, layer in enumerate(family.layers_of(model)):
        for name, module in linears(layer).items():
            if (chosen.minlayer <= index < chosen.maxlayer and chosen.prune_only in name) == chosen.invert:
                continue
            for flag, width in (widths or {}).items():
                if width > 0 and module.in_features % width:
                    raise InputError(f"{flag} {width}: does not divide the {module.in_features} columns of "
                                     f"layer {index} {name}")
            selected[index, name] = tuple(module.weight.shape)
    if not selected:
        layers = family.layers_of(model)
        raise InputError(f"--minlayer {chosen.minlayer} --maxlayer {chosen.maxlayer} --prune_only "
                         f"{chosen.prune_only!r}: select no matrix of {len(layers)} layers with "
                         f"{', '.join(linears(layers[0]))}")
    return selected
