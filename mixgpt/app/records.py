"""The record of a run, mixgpt.json, and the settings that a resumed run must share with it."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
import transformers

from mixgpt.app.settings import METHOD, RESULT, ROUNDING, flag_of, having_effect
from mixgpt.checkpoints import load
from mixgpt.checkpoints.formats import stored_bytes
from mixgpt.checkpoints.run_dir import clear
from mixgpt.common import distributed
from mixgpt.common.choices import RECORD, is_interrupted_run
from mixgpt.common.errors import InputError
from mixgpt.common.files import write_output
from mixgpt.common.program import check_signature, signature
from mixgpt.common.runtime import choose_dtype
from mixgpt.evaluation.measures import total_sparsity
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
            **signature(), "device_name": device_name, "versions": versions, "data": sources}


def of_matrices(matrices, others, outcomes, plan, known):
    """Return the part of the record on the matrices, and on other weights of the layers."""
    sensitivity = known.sensitivity if known else {}
    rows = []
    for m in matrices:
        key, row = (m.layer, m.name), _counted(m)
        if key in plan:
            row["target"] = plan[key].sparsity
        if key in sensitivity:
            row["sensitivity"] = sensitivity[key]
        outcome = outcomes.get(key, Outcome())
        row |= {name: value for name in ("error", "percdamp") if (value := getattr(outcome, name)) is not None}
        if outcome.grid:
            row["wbits"] = outcome.grid.scheme.wbits
        rows.append(row)
    return {"sparsity": total_sparsity(matrices), "matrices": rows} | ({
        "sparsity_of_layers": total_sparsity(matrices + others), "left_dense": [_counted(m) for m in others]}
        if others else {})


def _counted(m):
    """Return the entries of the record for a `MatrixSparsity`."""
    return {"layer": m.layer, "name": m.name, "shape": list(m.shape), "sparsity": m.zeros / m.numel}


def asked(settings, seqlen, device):
    """Return the settings that a resumed run must have in common with the first one, {flag: value}."""
    shared = {flag_of(name): getattr(settings, name) for name in having_effect(RESULT, METHOD, ROUNDING)}
    return shared | {"--seqlen": seqlen, "--device": device.type, "number of processes": distributed.world()}


def identity(asked, model, calibration):
    """Return what a resumed run must have in common with the first one, {flag: value}. asked: of `asked`."""
    return asked | {"--dtype": str(model.dtype).removeprefix("torch."),
                    "model's weights": fingerprint(model),
                    "calibration tokens": None if calibration is None else digest(calibration)}


def completed(settings):
    """Return the record of the run that has ended in the folder of --save, None if there is none or it is not whole.

    Raises InputError if another version of this program wrote it.
    """
    folder = Path(settings.save)
    if is_interrupted_run(folder) or not any(folder.glob("*.safetensors")):
        return None
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not {"matrices", "seconds", "settings", "identity"} <= record.keys():
        return None  # of another program, or of a run that was killed after `save`
    check_signature(record, f"--resume: the run in {folder}")
    return record


def check_completed(record, settings, device, family):
    """Raise InputError if a run that has ended had other settings or other weights than those asked for now.

    Removes what it kept to go on from: it may have been killed while it did this.
    """
    before = record["settings"]
    shared = asked(settings, settings.seqlen or before.get("seqlen"), device)
    for flag in (flag for flag in ("--dtype", "--bos") if shared[flag] == "auto"):
        shared.pop(flag)  # not known before the model is read
    evaluation = {flag_of(name): name for name in ("eval", "eval_limit", "dense", "tasks", "limit", "semi_structured")}
    pairs = {flag: (record["identity"].get(flag), value, "") for flag, value in shared.items()} | {
        flag: (before.get(name), json.loads(json.dumps(getattr(settings, name))),
               "; to evaluate it again, give this folder as the model") for flag, name in evaluation.items()}
    for flag, (old, new, advice) in pairs.items():
        if old != new:
            raise InputError(f"--resume: {flag} was {old} in the complete run in {settings.save}, now it is {new}"
                             f"{advice}")
    if settings.model != before["model"]:
        config = load.load_config(settings.model, family)
        model = load.open_model(settings.model, config, family, choose_dtype(settings.dtype, config, device))
        if fingerprint(model) != record["identity"]["model's weights"]:
            raise InputError(f"--resume: the complete run in {settings.save} has pruned other weights than those of "
                             f"{settings.model}")
    if distributed.rank() == 0:
        clear(settings.save)


def disk(settings, folder, plan, selected):
    """Count the plan's matrices' bytes on disk, against bfloat16; theory counts only the kept weights' bits."""
    sizes = {key: out * columns for key, (out, columns) in selected.items()}
    kept = sum(sizes[key] - round(target.sparsity * sizes[key]) for key, target in plan.items())
    nbytes = stored_bytes(settings.save, {f"{folder.family.path(*key)}.weight": sizes[key] for key in plan},
                          folder.model.dtype.itemsize)
    numel = sum(sizes.values())
    return {"bytes": nbytes, "bits_per_weight": 8 * nbytes / numel, "ratio": 2 * numel / nbytes,
            "theoretical_ratio": 16 * numel / (settings.wbits * kept)}


def write_file(settings, record):
    """Write the record to the file of --record, if one is given."""
    if settings.record:
        write_output("--record", settings.record, json.dumps(record, indent=1) + "\n")
