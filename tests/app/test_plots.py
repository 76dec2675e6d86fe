"""Look at what the pictures show."""

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from mixgpt.allocation.traces import Traces
from mixgpt.app import plots
from mixgpt.pruning.targets import Target

SHAPES = {(layer, name): (4, 8) for layer in range(3) for name in ("attn.c_proj", "mlp.c_proj")}
KEYS = list(SHAPES)


def points_of(panels):
    """Return {text: (dense perplexity, {method: [(sparsity, mean, low, high), …]})} as `draw_tradeoff` takes it."""
    return pd.DataFrame([("a model", text, dense, method, *point) for text, (dense, series) in panels.items()
                         for method, points in series.items() for point in points],
                        columns=["model", "text", "dense", "method", "sparsity", "mean", "low", "high"])


@pytest.mark.parametrize("negative", [0, 1, len(KEYS)])
def test_the_heat_maps_show_sensitivities_and_sparsities(negative, monkeypatch):
    """Traces that noise has made negative stay blank on the logarithmic scale."""
    figures = []
    monkeypatch.setattr(plots, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    values = torch.tensor([[-1.0] * negative + [2.0 ** n for n in range(negative, len(KEYS))]] * 2)
    plan = {key: Target(0.1 * number) for number, key in enumerate(KEYS[1:])}  # one matrix is not pruned
    content = plots.draw(plan, Traces("hutchinson", SHAPES, values))

    titled = {axis.get_title(): axis for axis in figures[0].axes}
    for title, expected in {
            "Sensitivity": {key: value / 32 for key, value in zip(KEYS, values[0].tolist(), strict=True) if value > 0},
            "Sparsity assigned": {key: target.sparsity for key, target in plan.items()}}.items():
        axis = titled[title]
        shown = axis.images[0].get_array().filled(float("nan"))
        assert [label.get_text() for label in axis.get_yticklabels()] == ["attn.c_proj", "mlp.c_proj"]
        for (layer, name), value in zip(KEYS, [expected.get(key, float("nan")) for key in KEYS], strict=True):
            found = shown[["attn.c_proj", "mlp.c_proj"].index(name), layer]
            assert found == pytest.approx(value, nan_ok=True), (title, layer, name)
    assert len(figures[0].axes[1].patches) == len({bar.get_y() for bar in figures[0].axes[1].patches}) == 2
    assert content.startswith(b"\x89PNG")


@pytest.mark.parametrize("values, scale", [
    ({"SparseGPT": (60, 59, 61), "best: ADMM (global)": (49.5, 49, 50)}, "linear"),
    ({"SparseGPT": (60, 60, 60), "magnitude": (3501, 3501, 3501)}, "log")])
def test_methods_at_one_sparsity_are_bars_from_the_best_down(values, scale, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "Figure", lambda **options: figures.append(Figure(**options)) or figures[-1])
    plots.draw_tradeoff(points_of({
        "wikitext2": (29.0, {name: [(0.5001, *points)] for name, points in values.items()}),
        "a/long/path/" * 9 + "c4.jsonl": (None, {"SparseGPT": [(0.5, 25.0, 25.0, 25.0)]})}))
    axis, other = figures[0].axes
    best_first = sorted(values, key=values.get)
    assert [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()] == ["dense", *best_first]
    assert [bar.get_width() for bar in axis.patches] == [29.0, *(values[name][0] for name in best_first)]
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["29.00", *("49.50 60.00" if scale == "linear" else "60.00 3,501").split()]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first bar is on top
    assert axis.get_xscale() == scale and axis.get_title() == "a model\nwikitext2, 50% of the weights pruned"
    assert max(map(len, other.get_title().split("\n"))) <= 40 < len(other.get_title())  # no title is in another
    assert [bar.get_width() for bar in other.patches] == [25.0]
    ranges = [segment[:, 0].tolist() for lines in axis.collections for segment in lines.get_segments()]
    assert ranges == [[29.0, 29.0], *(list(values[name][1:]) for name in best_first)]
