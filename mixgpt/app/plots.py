"""Plot sensitivities, assigned sparsities and perplexities: MixGPT (arXiv 2310.09499), figures 1 to 3."""

import io
import itertools
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from mixgpt.allocation.traces import Traces
from mixgpt.modeling.experts import kind_of
from mixgpt.pruning.targets import Target

Key = tuple[int, str]  # (layer, name)
PRUNED = "fraction of weights pruned"


def draw(plan: Mapping[Key, Target], traces: Traces | None = None, suffix: str = ".png") -> bytes:
    """Plot {(layer, name): Target} as a heat map, and above it by layer and by kind of matrix. Returns a file's bytes.

    traces: the `Traces` that the plan follows from, shown in the three ways in place of the sparsities.
    """
    sparsity = _grid({key: target.sparsity for key, target in plan.items()}, traces.shapes if traces else plan)
    figure = Figure(figsize=(11, 12 if traces else 8), layout="constrained")
    grid = figure.add_gridspec(3 if traces else 2, 2, width_ratios=[3, 2])
    lines, bars = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _heat_map(figure.add_subplot(grid[-1, :]), sparsity, "Sparsity assigned", PRUNED)
    values, errors, title, label = sparsity, None, "Sparsity", PRUNED
    if traces:
        values, errors = (_grid(values, traces.shapes) for values in (traces.sensitivity, traces.sensitivity_errors))
        title, label = f"Sensitivity by {traces.estimator}", "trace per weight"
        positive = values.where(values > 0)  # Hutchinson estimates can be negative
        _heat_map(figure.add_subplot(grid[1, :]), positive, "Sensitivity", label,
                  "log" if positive.notna().any(axis=None) else None)
        lines.set_yscale("log" if positive.notna().equals(values.notna()) else "linear")
    for number, kind in enumerate(values):
        lines.errorbar(values.index, values[kind], errors if errors is None else errors[kind], label=kind, marker=".",
                       linewidth=1, linestyle="-" if number < 10 else ":", elinewidth=0.5)  # ten colours
    lines.set(xlabel="layer", ylabel=label, title=f"{title}, by layer")
    lines.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    bars.barh(values.columns, values.mean())
    bars.invert_yaxis()
    bars.locator_params(axis="x", nbins=4)
    bars.set(xlabel=f"{label}, mean over layers", title=f"{title}, by matrix kind")
    return bytes_of(figure, suffix)


def _grid(values: Mapping[Key, float], keys: Iterable[Key]) -> pd.DataFrame:
    """Return {(layer, name): value} as a DataFrame (layers, kinds) of means over experts; keys: all that it shows."""
    kinds = dict.fromkeys(kind_of(name) for _, name in keys)
    rows = pd.DataFrame([(layer, kind_of(name), value) for (layer, name), value in values.items()])
    return rows.pivot_table(2, 0, 1).reindex(index=sorted({layer for layer, _ in keys}), columns=list(kinds))


def _heat_map(axis: Axes, values: pd.DataFrame, title: str, label: str, norm: str | None = None) -> None:
    """Show a DataFrame (layers, kinds) as colours; missing values stay blank."""
    image = axis.imshow(values.T, aspect="auto", cmap="viridis", norm=norm)
    axis.set(xlabel="layer", title=title, yticks=range(values.shape[1]), yticklabels=values)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(image, ax=axis, label=label)


def draw_tradeoff(points: pd.DataFrame, suffix: str = ".png") -> bytes:
    """Plot perplexity against sparsity by method (arXiv 2310.09499, figure 3). Returns the file's bytes.

    points: of `results.points_of`. One row per model, one column per text; bars if all have one sparsity, in percent.
    """
    models, texts, methods = (list(points[name].unique()) for name in ("model", "text", "method"))
    sparsity, *others = points["sparsity"].map("{:.0%}".format).unique()
    show, height = (_tradeoff, 4 + 0.1 * len(methods)) if others else (_bars, 1.8 + 0.5 * len(methods))
    colours = {method: f"C{number % 10}" for number, method in enumerate(methods)} | {"dense": "0.6"}
    figure = Figure(figsize=(max(5.5 * len(texts), 7), height * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(texts), squeeze=False)
    for axis, (model, text) in zip(axes.flat, itertools.product(models, texts), strict=True):
        panel = points[(points["model"] == model) & (points["text"] == text)]
        if panel.empty:
            axis.set_axis_off()
            continue
        show(axis, panel, panel["dense"].dropna()[:1].tolist(), colours)
        title = [f"{model}, {text}"] if others else [model, f"{text}, {sparsity} of the weights pruned"]
        axis.set_title("\n".join(textwrap.fill(line, 40) for line in title), fontsize=11)
    return bytes_of(figure, suffix)


def _tradeoff(axis: Axes, panel: pd.DataFrame, dense: list[float], colours: dict[Any, str]) -> None:
    """Draw the methods of one panel with error bars from lowest to highest. dense: its perplexity in a list, or []."""
    for method, rows in panel.sort_values("sparsity").groupby("method"):
        axis.errorbar(rows["sparsity"], rows["mean"], _bounds(rows), label=method, color=colours[method],
                      marker="osD^vP*X"[list(colours).index(method) % 8], markersize=5, capsize=3)
    for perplexity in dense:
        axis.axhline(perplexity, label="dense", color="black", linestyle="--", linewidth=1)
    _perplexity_axis(axis, axis.yaxis, *axis.dataLim.intervaly)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    axis.set(xlabel="weights pruned", ylabel="perplexity")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _bounds(rows: pd.DataFrame) -> list[pd.Series]:
    """Return the distances of the lowest and the highest from the mean, (2, points); rounding makes none negative."""
    return [(rows["mean"] - rows["low"]).abs(), (rows["high"] - rows["mean"]).abs()]


def _bars(axis: Axes, panel: pd.DataFrame, dense: list[float], colours: dict[Any, str]) -> None:
    """Draw a bar per method of one panel, best first, below the dense model's, with the range over seeds."""
    rows = pd.concat([pd.DataFrame({"method": "dense", "mean": dense, "low": dense, "high": dense}),
                      panel.sort_values("mean")])
    bars = axis.barh([textwrap.fill(method, 30) for method in rows["method"]], rows["mean"], height=0.6,
                     xerr=_bounds(rows), color=rows["method"].map(colours))
    axis.bar_label(bars, [f"{value:,.{2 if value < 100 else 0}f}" for value in rows["mean"]], padding=4)
    axis.invert_yaxis()
    axis.set_xlabel("perplexity")
    axis.margins(x=0.12)
    _perplexity_axis(axis, axis.xaxis, rows["low"].min(), rows["high"].max())
    axis.xaxis.set_minor_formatter(NullFormatter())  # the bars have labels
    axis.spines[["top", "right"]].set_visible(False)


def _perplexity_axis(axis: Axes, side: XAxis | YAxis, low: float, high: float) -> None:
    """Scale and label a perplexity axis for values between low and high; the axis's own limits add a margin."""
    if high > 5 * low:
        axis.set(**{f"{side.axis_name}scale": "log"})
    side.set_major_formatter("{x:,g}")
    side.set_minor_formatter("{x:,g}" if high < 50 * low else NullFormatter())  # they would overlap


def bytes_of(figure: Figure, suffix: str) -> bytes:
    """Return a figure as a .png, .pdf or .svg file."""
    content = io.BytesIO()
    figure.savefig(content, format=suffix[1:], dpi=120)
    return content.getvalue()
