"""Check the zeros that are counted."""

import torch

from mixgpt.evaluation.sparsity import measure_sparsity


def test_sparsity_is_counted_in_every_linear_of_the_layers(tiny):
    family, model = tiny
    for module in family.layers_of(model)[1].modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[0, :3] = 0
            last = module
    last.weight.data[1, 0] = 0
    counted = measure_sparsity(model, family)
    kinds = len(counted) // 3
    assert [m.zeros for m in counted] == [0] * kinds + [3] * (kinds - 1) + [4] + [0] * kinds
    assert sum(m.numel for m in counted) == sum(
        module.weight.numel() for layer in family.layers_of(model) for module in layer.modules()
        if isinstance(module, torch.nn.Linear))
