"""Which matrices to prune, the target sparsity of each, and the outcome."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mixgpt.common.errors import InputError
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import Key, linears
from mixgpt.quant import Grid
from mixgpt.sparsegpt import Target as Target


@dataclass(frozen=True)
class Outcome:
    """Result of pruning and quantizing one matrix."""

    error: Any = None  # ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration inputs, if any: a tensor, then a float.
    percdamp: float | None = None  # The damping used for its Hessian.
    grid: Grid | None = None  # The grid, if the matrix is quantized.


def select(model: PreTrainedModel, minlayer: int = 0, maxlayer: int = 1000, prune_only: str = "", invert: bool = False,
           widths: dict[str, int] | None = None, uncalled: Collection[str] = ()) -> dict[Key, tuple[int, int]]:
    """Return the shapes of the matrices to change, {(layer, name): (out, in)}, in model order.

    These are in layers minlayer ≤ index < maxlayer and have prune_only in their names; with invert, all others.
    uncalled: names to leave out. Raises InputError for none, or a width {flag: columns per group} that does not divide.
    """
    selected, layers = {}, layers_of(model)
    for index, layer in enumerate(layers):
        for name, module in linears(layer).items():
            if (minlayer <= index < maxlayer and prune_only in name) == invert or name in uncalled:
                continue
            for flag, width in (widths or {}).items():
                if width > 0 and module.in_features % width:
                    raise InputError(f"{flag} {width}: does not divide the {module.in_features} columns of "
                                     f"layer {index} {name}")
            selected[index, name] = tuple(module.weight.shape)
    if not selected:
        raise InputError(f"--minlayer {minlayer} --maxlayer {maxlayer} --prune-only {prune_only!r}"
                         f"{' --invert' if invert else ''}: select no matrix of {len(layers)} layers with "
                         f"{', '.join(linears(layers[0]))}")
    return selected
