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


def select(model, family, prunem, groupsize, minlayer, maxlayer, prune_only, invert):
    """Return the shapes of the matrices to change, {(layer, name): (out, in)}, in the order of the model.

    Selected are the layers minlayer ≤ index < maxlayer and the names that contain prune_only; invert selects all
    others instead. The model may be on meta. Raises InputError where nothing is selected, or prunem or groupsize does
    not divide the columns.
    """
    selected = {}
    for index, layer in enumerate(family.layers_of(model)):
        for name, module in linears(layer).items():
            if (minlayer <= index < maxlayer and prune_only in name) == invert:
                continue
            for flag, width in {"--prunem": prunem, "--groupsize": groupsize}.items():
                if width and module.in_features % width:
                    raise InputError(f"{flag} {width}: does not divide the {module.in_features} columns of "
                                     f"layer {index} {name}")
            selected[index, name] = tuple(module.weight.shape)
    if not selected:
        names = ", ".join(linears(family.layers_of(model)[0]))
        raise InputError(f"--minlayer {minlayer} --maxlayer {maxlayer} --prune_only {prune_only!r}: select no matrix "
                         f"of {len(family.layers_of(model))} layers with {names}")
    return selected
