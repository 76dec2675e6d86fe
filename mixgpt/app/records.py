"""The record of a run, mixgpt.json, and the settings that a resumed run must share with it."""

import dataclasses
import platform
from importlib.metadata import version

import datasets
import torch
import transformers

from mixgpt.app.settings import METHOD, RESULT, ROUNDING, flags, having_effect
from mixgpt.checkpoints.formats import stored_bytes
from mixgpt.common import distributed
from mixgpt.evaluation.sparsity import total_sparsity
from mixgpt.modeling.streaming import digest, fingerprint
from mixgpt.pruning.targets import Outcome


def facts(settings, seqlen, dtype, device, sources):
    """Return the part of the record known before pruning: resolved settings, versions, device and texts."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    if settings.tasks:
        versions["lm_eval"] = version("lm_eval")
    return {"settings": dataclasses.asdict(settings) | {"seqlen": seqlen, "dtype": str(dtype).removeprefix("torch."),
                                                        "device": str(device)},
            "device_name": device_name, "versions": versions, "data": sources}


def of_matrices(matrices, outcomes, plan, known):
    """Return the part of the record on the matrices."""
    sensitivity = known.sensitivity if known else {}
    rows = []
    for m in matrices:
        key = m.layer, m.name
        row = {"layer": m.layer, "name": m.name, "shape": list(m.shape), "sparsity": m.zeros / m.numel}
        if key in plan:
            row["target"] = plan[key].sparsity
        if key in sensitivity:
            row["sensitivity"] = sensitivity[key]
        outcome = outcomes.get(key, Outcome())
        row |= {name: value for name in ("error", "percdamp") if (value := getattr(outcome, name)) is not None}
        if outcome.grid:
            row["wbits"] = outcome.grid.scheme.wbits
        rows.append(row)
    return {"sparsity": total_sparsity(matrices), "matrices": rows}


def identity(settings, seqlen, device, model, calibration):
    """Return what a resumed run must have in common with the first one, {flag: value}."""
    shared = {flags()[name]: getattr(settings, name) for name in having_effect(RESULT, METHOD, ROUNDING)}
    return shared | {"--seqlen": seqlen, "--device": device.type, "--dtype": str(model.dtype).removeprefix("torch."),
                     "number of processes": distributed.world(), "model's weights": fingerprint(model),
                     "calibration tokens": None if calibration is None else digest(calibration)}


def disk(settings, family, plan, selected):
    """Count the plan's matrices' bytes on disk, against bfloat16; theory counts only the kept weights' bits."""
    sizes = {key: out * columns for key, (out, columns) in selected.items()}
    kept = sum((1 - target.sparsity) * sizes[key] for key, target in plan.items())
    nbytes = stored_bytes(settings.save, {family.path(*key) for key in plan})
    numel = sum(sizes.values())
    return {"bytes": nbytes, "bits_per_weight": 8 * nbytes / numel, "ratio": 2 * numel / nbytes,
            "theoretical_ratio": 16 * numel / (settings.wbits * kept)}
