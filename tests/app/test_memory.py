"""Check what is counted of a GPU's memory against what pruning takes on the make-believe one."""

import pytest
import torch
from conftest import VOCABULARY, make
from makebelieve import CUDA, Gpu

from mixgpt.app import memory
from mixgpt.app.pipeline import recipe_of
from mixgpt.app.settings import Settings
from mixgpt.kernels import columns
from mixgpt.modeling.experts import split_experts
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.targets import Target, select
from modelutils import Execution


@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in ("opt", "llama", "bloom", "qwen3-moe")),
    *((name, {"solver": "admm", "target": "dense"}) for name in ("opt", "llama", "bloom"))])
def test_the_count_is_a_little_above_the_peak(name, options, two_passes, monkeypatch):
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
    family, model = make(name)
    split_experts(model)
    tokens = torch.randint(VOCABULARY, (40, 64), generator=torch.Generator().manual_seed(0))
    settings, selected = Settings(name, "builtin", sparsity=0.5, **options), select(model, family)
    demand = memory.Demand.of(model, family, selected, tokens, settings)
    way = memory.Way(1, on_host=False, two_passes=two_passes)
    recipe = recipe_of(settings)
    with Gpu() as gpu:
        prune_layerwise(Execution(model, family, CUDA, 1), dict.fromkeys(selected, Target(0.5)), tokens,
                        recipe if not two_passes else type(recipe)(**vars(recipe) | {"true_sequential": False}))
    counted = demand.bytes(way, True)
    assert gpu.peak <= counted <= 2.2 * gpu.peak
