"""Draw sensitivities and the sparsities assigned: MixGPT (arXiv 2310.09499), figures 1 and 2, and the plan."""

import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

from errors import InputError

FORMATS = (".png", ".pdf", ".svg")


def check(path):
    """Refuse a picture that could not be written."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"--plot {path}: must end in {', '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise InputError(f"--plot {path}: is a folder; name a file")
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise InputError(f"--plot {path}: cannot be written ({error.strerror})") from error


def draw(path, traces, plan):
    """Write a picture of `Traces` by layer and by matrix kind, and of {(layer, name): Target} as a heat map."""
    layers = sorted({layer for layer, _ in traces.shapes})
    kinds = list(dict.fromkeys(name for _, name in traces.shapes))
    sensitivity = traces.sensitivity
    errors = dict(zip(traces.shapes, (traces.standard_error / traces.sizes).tolist(), strict=True))
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[3, 2])

    by_layer = figure.add_subplot(grid[0, 0])
    for kind in kinds:
        at = [layer for layer in layers if (layer, kind) in sensitivity]
        by_layer.errorbar(at, [sensitivity[layer, kind] for layer in at], [errors[layer, kind] for layer in at],
                          label=kind.rpartition(".")[2], marker=".", linewidth=1, elinewidth=0.5)
    by_layer.set(xlabel="layer", ylabel="trace per weight", title=f"Sensitivity by layer ({traces.estimator})")
    by_layer.set_yscale("log" if all(value > 0 for value in sensitivity.values()) else "linear")
    by_layer.legend(fontsize=8, ncols=2)

    by_kind = figure.add_subplot(grid[0, 1])
    of_kind = [[value for (_, name), value in sensitivity.items() if name == kind] for kind in kinds]
    means = [sum(values) / len(values) for values in of_kind]
    by_kind.barh([kind.rpartition(".")[2] for kind in kinds], means)
    by_kind.invert_yaxis()
    by_kind.locator_params(axis="x", nbins=4)
    by_kind.set(xlabel="trace per weight, mean over layers", title="Sensitivity by matrix kind")

    heat = figure.add_subplot(grid[1, :])
    values = torch.full((len(kinds), len(layers)), float("nan"))
    for (layer, name), target in plan.items():
        values[kinds.index(name), layers.index(layer)] = target.sparsity
    image = heat.imshow(values.numpy(), aspect="auto", cmap="viridis")
    heat.set(xlabel="layer", title="Sparsity assigned", yticks=range(len(kinds)),
             yticklabels=[kind.rpartition(".")[2] for kind in kinds])
    figure.colorbar(image, ax=heat, label="fraction of weights pruned")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        raise InputError(f"--plot {path}: cannot be written ({error.strerror}); the traces are kept") from error
