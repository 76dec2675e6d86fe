"""Look at what the pictures show."""

import pytest
import torch
from matplotlib.figure import Figure

from mixgpt.allocation.traces import Traces
from mixgpt.app import plots
from mixgpt.pruning.targets import Target

SHAPES = {(layer, name): (4, 8) for layer in range(3) for name in ("self_attn.q_proj", "mlp.fc1")}
KEYS = list(SHAPES)


@pytest.mark.parametrize("negative", [0, 1, len(KEYS)])
def test_the_heat_maps_show_sensitivities_and_sparsities(negative, tmp_path, monkeypatch):
    """Traces that noise has made negative stay blank on the logarithmic scale."""
    figures = []
    monkeypatch.setattr(plots, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    values = torch.tensor([[-1.0] * negative + [2.0 ** n for n in range(negative, len(KEYS))]] * 2)
    plan = {key: Target(0.1 * number) for number, key in enumerate(KEYS[1:])}  # one matrix is not pruned
    plots.draw(tmp_path / "plan.png", Traces("hutchinson", SHAPES, values), plan)

    titled = {axis.get_title(): axis for axis in figures[0].axes}
    for title, expected in {
            "Sensitivity": {key: value / 32 for key, value in zip(KEYS, values[0].tolist(), strict=True) if value > 0},
            "Sparsity assigned": {key: target.sparsity for key, target in plan.items()}}.items():
        axis = titled[title]
        shown = axis.images[0].get_array().filled(float("nan"))
        assert [label.get_text() for label in axis.get_yticklabels()] == ["q_proj", "fc1"]
        for (layer, name), value in zip(KEYS, [expected.get(key, float("nan")) for key in KEYS], strict=True):
            found = shown[["self_attn.q_proj", "mlp.fc1"].index(name), layer]
            assert found == pytest.approx(value, nan_ok=True), (title, layer, name)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_perplexities_of_other_orders_of_magnitude_stay_readable(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    values = {"magnitude": (500, 3000, 57000), "SparseGPT": (60, 129, 323)}
    series = {method: [(0.5 + 0.1 * n, value, value, value) for n, value in enumerate(row)]
              for method, row in values.items()}
    plots.draw_tradeoff(tmp_path / "tradeoff.png", {("a model", "wikitext2"): (29.0, series)})
    (axis,) = figures[0].axes
    assert axis.get_yscale() == "log"
    for axis_of, labels in ((axis.yaxis, ["100", "1,000", "10,000"]), (axis.xaxis, ["50%", "60%", "70%"])):
        low, high = sorted(axis_of.get_view_interval())
        shown = [tick.label1.get_text() for minor in (False, True)
                 for tick in (axis_of.get_minor_ticks() if minor else axis_of.get_major_ticks())
                 if low <= tick.get_loc() <= high and tick.label1.get_text()]
        assert shown == labels
