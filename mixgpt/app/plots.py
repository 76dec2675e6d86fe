"""Plot sensitivities, assigned sparsities and perplexities: MixGPT (arXiv 2310.09499), figures 1 to 3."""

import io
from collections import defaultdict

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, NullFormatter, PercentFormatter

from mixgpt.app.tables import wrapped
from mixgpt.common.outputs import SOFTWARE
from mixgpt.modeling.experts import kind_of


def draw(plan, traces=None, suffix=".png"):
    """Plot {(layer, name): Target} as a heat map, and above it by layer and by kind of matrix. Returns a file's bytes.

    traces: the `Traces` that the plan follows from, shown in the three ways in place of the sparsities.
    """
    shapes = traces.shapes if traces else plan
    layers, kinds = sorted({layer for layer, _ in shapes}), list(dict.fromkeys(kind_of(name) for _, name in shapes))
    sparsities = of_kinds({key: target.sparsity for key, target in plan.items()})
    figure = Figure(figsize=(11, 12 if traces else 8), layout="constrained")
    grid = figure.add_gridspec(3 if traces else 2, 2, width_ratios=[3, 2])
    if traces:
        values = of_kinds(traces.sensitivity)
        errors = of_kinds(dict(zip(traces.shapes, (traces.standard_error / traces.sizes).tolist(), strict=True)))
        positive = {key: value for key, value in values.items() if value > 0}  # Hutchinson estimates can be negative
        _heat_map(figure.add_subplot(grid[1, :]), positive, kinds, layers, title="Sensitivity",
                  label="trace per weight", norm="log" if positive else None)
        titles, label = (f"Sensitivity by layer ({traces.estimator})", "Sensitivity by matrix kind"), "trace per weight"
    else:
        values, errors, label = sparsities, None, "fraction of weights pruned"
        titles = "Sparsity by layer", "Sparsity by matrix kind"
    by_layer, by_kind = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _by_layer(by_layer, values, errors, kinds)
    by_layer.set(xlabel="layer", ylabel=label, title=titles[0])
    by_layer.set_yscale("log" if traces and len(positive) == len(values) else "linear")
    _by_kind(by_kind, values, kinds)
    by_kind.set(xlabel=f"{label}, mean over layers", title=titles[1])
    _heat_map(figure.add_subplot(grid[-1, :]), sparsities, kinds, layers, title="Sparsity assigned",
              label="fraction of weights pruned")
    return bytes_of(figure, suffix)


def _by_layer(axis, values, errors, kinds):
    """Draw {(layer, kind): value} as a line for each kind, with bars of one error up and down, if there are errors."""
    for kind in kinds:
        at = sorted(layer for layer, name in values if name == kind)
        axis.errorbar(at, [values[layer, kind] for layer in at], errors and [errors[layer, kind] for layer in at],
                      label=kind.rpartition(".")[2], marker=".", linewidth=1, elinewidth=0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8, ncols=2)


def _by_kind(axis, values, kinds):
    """Draw the mean of {(layer, kind): value} over the layers as a bar for each kind."""
    of_kind = [[value for (_, name), value in values.items() if name == kind] for kind in kinds]
    axis.barh([kind.rpartition(".")[2] for kind in kinds], [sum(found) / max(len(found), 1) for found in of_kind])
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=4)


def of_kinds(values):
    """Return the means of {(layer, name of a matrix): value} over the experts of a layer, {(layer, kind): mean}."""
    found = defaultdict(list)
    for (layer, name), value in values.items():
        found[layer, kind_of(name)].append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def _heat_map(axis, values, kinds, layers, *, title, label, norm=None):
    """Show {(layer, name): value} as colours, matrix kinds against layers; missing values stay blank."""
    grid = torch.full((len(kinds), len(layers)), float("nan"))
    for (layer, name), value in values.items():
        grid[kinds.index(name), layers.index(layer)] = value
    image = axis.imshow(grid.numpy(), aspect="auto", cmap="viridis", norm=norm)
    axis.set(xlabel="layer", title=title, yticks=range(len(kinds)),
             yticklabels=[kind.rpartition(".")[2] for kind in kinds])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(image, ax=axis, label=label)


def draw_tradeoff(panels, suffix=".png"):
    """Plot perplexity against sparsity by method (arXiv 2310.09499, figure 3). Returns the file's bytes.

    panels: {(model, dataset): (dense perplexity or None, {method: [(sparsity, mean, lowest, highest), …]})}. One row
    per model, one column per dataset. Bars if all points have the same sparsity.
    """
    models, sets = (list(dict.fromkeys(key)) for key in zip(*panels, strict=True))
    methods = list(dict.fromkeys(method for _, series in panels.values() for method in series))
    sparsities = {f"{point[0]:.0%}" for _, series in panels.values() for points in series.values() for point in points}
    bars = len(sparsities) == 1
    columns = 1 if len(methods) < 3 else 2
    height = 1.8 + 0.5 * len(methods) if bars else 4
    figure = Figure(figsize=(max(5.5 * len(sets), 7), height * len(models) + (
        0 if bars else 0.3 * len(methods) / columns)), layout="constrained")
    axes = figure.subplots(len(models), len(sets), squeeze=False)
    for row, model in enumerate(models):
        for column, name in enumerate(sets):
            axis = axes[row, column]
            if (model, name) not in panels:
                axis.set_axis_off()
            elif bars:
                _bars(axis, *panels[model, name], methods)
                axis.set_title(f"{model}\n{name}, {', '.join(sparsities)} of the weights pruned", fontsize=11)
            else:
                _tradeoff(axis, *panels[model, name], methods)
                axis.set(title=f"{model}, {name}", xlabel="weights pruned", ylabel="perplexity")
    shown = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    if not bars:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns, fontsize=9)
    return bytes_of(figure, suffix)


def _tradeoff(axis, dense, series, methods):
    """Draw the methods of one panel, each in its colour, with error bars from lowest to highest."""
    for method, points in series.items():
        sparsity, mean, low, high = map(list, zip(*sorted(points), strict=True))
        below, above = ([abs(a - b) for a, b in zip(mean, ends, strict=True)] for ends in (low, high))
        number = methods.index(method)
        axis.errorbar(sparsity, mean, [below, above], label=method, color=f"C{number % 10}",
                      marker="osD^vP*X"[number % 8], markersize=5, capsize=3)
    if dense is not None:
        axis.axhline(dense, label="dense", color="black", linestyle="--", linewidth=1)
    _perplexity_axis(axis, axis.yaxis, *axis.dataLim.intervaly)
    axis.xaxis.set_major_locator(MultipleLocator(0.1))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.grid(alpha=0.3)


def _bars(axis, dense, series, methods):
    """Draw a bar per method of one panel, best first, below the dense model's."""
    bars = [] if dense is None else [("dense", "0.6", dense, dense, dense)]
    bars += sorted(((method, f"C{methods.index(method) % 10}", *point[1:]) for method, (point, *_) in series.items()),
                   key=lambda bar: bar[2])
    names, colours, mean, low, high = zip(*bars, strict=True)
    below, above = ([abs(a - b) for a, b in zip(mean, ends, strict=True)] for ends in (low, high))
    labels = ["\n".join(wrapped(name.replace(" (", "\n("), 30)) for name in names]
    shown = axis.barh(labels, mean, color=colours, height=0.6)
    if low != high:  # over seeds
        axis.errorbar(mean, range(len(mean)), xerr=[below, above], color="black", capsize=3, linestyle="none")
    axis.bar_label(shown, [f"{value:,.{2 if value < 100 else 0}f}" for value in mean], padding=4)
    axis.invert_yaxis()
    axis.set_xlabel("perplexity")
    axis.margins(x=0.12)
    _perplexity_axis(axis, axis.xaxis, min(low), max(high))
    axis.xaxis.set_minor_formatter(NullFormatter())  # the bars have labels
    axis.spines[["top", "right"]].set_visible(False)


def _perplexity_axis(axis, side, low, high):
    """Scale and label a perplexity axis for values between low and high; the axis's own limits add a margin."""
    if low > 0 and high > 5 * low:
        axis.set(**{f"{side.axis_name}scale": "log"})
    side.set_major_formatter("{x:,g}")
    side.set_minor_formatter("{x:,g}" if high < 50 * low else NullFormatter())  # they would overlap


def bytes_of(figure, suffix):
    """Return a figure as a file of an outputs.PICTURE."""
    content, mark = io.BytesIO(), "Software" if suffix == ".png" else "Creator"
    figure.savefig(content, format=suffix[1:], dpi=120, metadata={mark: SOFTWARE})
    return content.getvalue()
