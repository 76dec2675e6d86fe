"""Check what a run is said to take against what it takes."""

import pytest
import torch
from conftest import CPU, read_little
from makebelieve import Gpu

from mixgpt.app import forecast, pipeline
from mixgpt.app.checks import check
from mixgpt.app.run import Run
from mixgpt.app.settings import Settings
from mixgpt.common import runtime
from mixgpt.kernels import columns


@pytest.fixture
def forecast_of(checkpoint_folder, monkeypatch, tmp_path):
    """Return a function that gives a checked run of a tiny model, and its settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_little(monkeypatch)
    monkeypatch.setitem(forecast.TEST_TOKENS, "builtin", 4 * 64)

    def checked(name, **options):
        settings = Settings(str(checkpoint_folder(name)), "builtin", **{
            "sparsity": 0.5, "nsamples": 64, "seqlen": 64, "eval": ["builtin"], "device": "cpu"} | options)
        return check(settings, torch.device(settings.device), runtime.Clock(CPU)), settings

    return checked


@pytest.mark.parametrize("preset", ["sparsegpt", "mixgpt", "best"])
@pytest.mark.parametrize("name", ["wide llama", "wide opt"])
def test_what_a_gpu_is_said_to_hold_at_most_is_what_it_holds(name, preset, forecast_of, monkeypatch, tmp_path):
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
    begun, begin = [], Run.begin
    monkeypatch.setattr(Run, "begin", lambda self, stage: (begin(self, stage), begun.append((stage, gpu.used))))
    with Gpu() as gpu:
        run, settings = forecast_of(name, preset=preset, device="cuda:0", save=str(tmp_path / "saved"))
        needs = forecast.memory_needs(run)
        peak = pipeline.execute(settings)["peak_memory"]["device"]
    most = max(need.device for need in needs)
    assert 0.8 * peak < most < 1.25 * peak
    assert [stage for stage, _ in begun] == [need.stage for need in needs]
    assert max(used for _, used in begun) < 0.02 * peak  # a stage leaves nothing large behind
