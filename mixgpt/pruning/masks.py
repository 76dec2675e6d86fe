"""Take the zeros of another model: masks that were learned, or found by another method."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import Key, linears
from mixgpt.modeling.placing import on_device
from mixgpt.pruning.targets import Target, select

CLOSE = 5e-3  # The zeros may be this fraction of all weights fewer or more than asked.


class Masks:
    """The zeros of a model, for selected matrices of another one, and the `targets` that they meet."""

    def __init__(self, model: PreTrainedModel, selected: dict[Key, tuple[int, int]], target: Target) -> None:
        """Count the zeros. Raises ValueError if there are not as many as asked, or matrices of other shapes."""
        self.model, self.targets, shapes = model, {}, select(model)
        zeros = numel = 0
        for (index, name), shape in selected.items():
            if shapes.get((index, name)) != shape:
                raise ValueError(f"has no layer {index} {name} of {shape}")
        for index in sorted({index for index, _ in selected}):
            for name, mask in self.of_layer(index).items():
                if (index, name) not in selected:
                    continue
                if target.prunem and (mask.view(-1, target.prunem).sum(1) < target.prunen).any():
                    raise ValueError(f"layer {index} {name} does not have {target.prunen} zeros in every "
                                     f"{target.prunem} weights of a row")
                count = mask.sum().item()
                self.targets[index, name] = target if target.prunem else replace(target, sparsity=count / mask.numel())
                zeros, numel = zeros + count, numel + mask.numel()
        if not target.prunem and abs(zeros / numel - target.sparsity) > CLOSE:
            raise ValueError(f"{zeros / numel:.2%} of its weights are 0, but --sparsity is {target.sparsity:g}")

    @torch.no_grad()
    def of_layer(self, index: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return where the linears of a layer are 0, {name: (out, in)}."""
        layer = layers_of(self.model)[index]
        with on_device([layer], torch.device(device)):
            return {name: linear.weight == 0 for name, linear in linears(layer).items()}
