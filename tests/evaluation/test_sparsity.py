"""Check the zeros that are counted."""

import pytest
import torch
from conftest import make
from makebelieve import CUDA, Gpu

from mixgpt.checkpoints import load
from mixgpt.evaluation.sparsity import count_zeros, measure_sparsity, measure_weights
from mixgpt.modeling import streaming
from modelutils import on_device


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


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])  # the latter has routers, which are no linears
def test_zeros_are_counted_on_the_device_and_read_from_there_at_once(name, checkpoint_folder, monkeypatch):
    family, folder = make(name)[0], checkpoint_folder(name)
    model = load.open_model(folder, load.load_config(folder, family), family, "auto")
    state, loads, whole = make(name)[1].state_dict(), [], streaming.DiskWeights.load
    monkeypatch.setattr(streaming.DiskWeights, "load", lambda source, *given: loads.append(1) or whole(source, *given))
    with Gpu() as gpu:
        layer = family.layers_of(model)[1]
        with on_device([layer], CUDA):
            for weight in layer.parameters():
                if weight.dim() > 1:
                    weight[0] = 0
            before = gpu.synchronisations.total()
            counted = {1: count_zeros(1, layer)}
            assert gpu.synchronisations.total() == before
        loads.clear()
        matrices, others = measure_weights(model, family, CUDA, counted)
    assert len(loads) == 2  # not the layer that has been counted
    assert bool(others) == (name == "qwen3-moe")
    assert all(m.zeros == (m.shape[-1] if m.layer == 1 else 0) for m in matrices + others)
    assert [m for m in matrices if m.layer != 1] == [m for m in measure_sparsity(model, family) if m.layer != 1]
    numel = sum(tensor.numel() for key, tensor in state.items() if ".layers." in key and tensor.dim() > 1)
    assert sum(m.numel for m in matrices + others) == numel
