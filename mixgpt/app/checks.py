"""Check a run before its weights are read: the model, its layers and matrices, the tokenizer, and what it needs."""

import math
import tempfile
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixgpt.allocation import traces
from mixgpt.app.run import Run
from mixgpt.app.settings import Settings
from mixgpt.checkpoints import formats, load
from mixgpt.common import choices, distributed, memory, program, runtime
from mixgpt.common.errors import InputError, reading
from mixgpt.datautils import resolve_bos
from mixgpt.evaluation import selfcheck
from mixgpt.modeling.placing import allocate, place_for
from mixgpt.pruning import expert_removal, targets
from mixgpt.pruning.masks import Masks


def check(settings: Settings, device: torch.device, clock: runtime.Clock, model: PreTrainedModel | None = None,
          tokenizer: PreTrainedTokenizerBase | None = None) -> Run:
    """Return a `Run` that is not open yet. Raises InputError for settings that do not fit the model or the disk."""
    settings.check_paths()  # Only the command line has checked them before.
    config = model.config if model else load.read_config(settings.model)
    if settings.device_memory and settings.dtype == "auto":  # What is fast on this device says nothing of another.
        settings = replace(settings, dtype=str(config.dtype or torch.float32).removeprefix("torch."))
    skeleton = load.skeleton(config, model.dtype if model else runtime.choose_dtype(settings.dtype, config, device))
    if settings.experts:
        skeleton = expert_removal.with_fewer_experts(skeleton, settings.experts)
    if not model and settings.dtype == "auto" != runtime.choose_dtype("auto", config, device):
        skeleton.stored_dtype = config.dtype
    load.check_layers(settings.model, model if model and settings.compresses else skeleton, settings.save_format)
    if model and (settings.compresses or settings.save):
        _check_in_memory(settings.save, model, skeleton)
    widening, uncalled = selfcheck.check(settings.model, skeleton, device)
    selected = targets.select(skeleton, settings.minlayer, settings.maxlayer, settings.prune_only, settings.invert, {
        "--prunem": settings.prunem, "--groupsize": settings.groupsize}, uncalled) if settings.compresses else {}
    if settings.sensitivity_file:
        traces.read(settings.sensitivity_file, targets.select(skeleton), settings.sensitivity)
    tokenizer = tokenizer or load.load_tokenizer(settings.model)
    limit = runtime.position_limit(config) or math.inf
    seqlen = settings.seqlen or min(runtime.DEFAULT_SEQLEN, limit)
    if seqlen > limit:
        raise InputError(f"--seqlen {seqlen}: the model's limit is {limit} tokens")
    settings = replace(settings, bos=resolve_bos(settings.bos, config.model_type, tokenizer), seqlen=seqlen)
    run = Run(settings, device, clock, config, tokenizer, selected, uncalled, widening, model or skeleton)
    if path := settings.mask_from:
        with reading(f"--mask-from {path}"):
            run.masks = Masks(load.open_model(path, load.read_config(path), "auto"), selected, run.target)
    if settings.needs_calibration and not settings.dry_run:
        nbytes, world, distilled = run.hidden_bytes, distributed.world(), settings.extra_counts[1]
        allocate([nbytes], torch.uint8, device, place_for(nbytes, device))  # Only whether there is room counts.
        if settings.nsamples < world:
            raise InputError(f"--nsamples {settings.nsamples}: must be at least {world}, the number of processes")
        if settings.distill and distilled < world:
            raise InputError(f"--distill {settings.distill:g}: gives {distilled} sequences, must be at least {world}, "
                             "the number of processes; raise --nsamples")
    needed = saving_bytes(load.size(config, run.dtype), settings.save_format)
    if settings.save and not settings.dry_run and needed > (free := memory.free_on_host()):
        raise InputError(f"--save {settings.save}: needs {needed / 1e9:.3f} GB of memory at the end, {free / 1e9:.3f} "
                         "GB are free; end other programs, or use a machine with more")
    return run


def saving_bytes(size: int, save_format: str) -> int:
    """Return the bytes of the host's memory that saving a model of `size` bytes takes, and loading it to verify it."""
    if save_format == "compressed-tensors":  # Each process loads it.
        return size * program.world("LOCAL_WORLD_SIZE")
    return min(size, formats.LARGEST) if choices.FORMATS[save_format].streams else size


def _check_in_memory(path: str | None, model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Raise InputError for a model in memory with other matrices than its skeleton, or that --save could not keep."""
    own, made = ({(name, *getattr(tensor, "shape", ())) for name, tensor in each.state_dict().items()}
                 for each in (model, skeleton))
    for name, *shape in sorted(own ^ made)[:1]:
        raise InputError("model: its config makes another model than the one in memory: only one of them has "
                         f"{name} {tuple(shape)}; merge adapters first, or give its name or folder")
    if not path:
        return
    own, made = (dict(each.named_parameters()) for each in (model, skeleton))  # Shared ones count once.
    for name in sorted(made.keys() - own.keys())[:1]:
        raise InputError(f"--save {path}: {name} is tied to another tensor of the model, but not by model.config; set "
                         "its tie_word_embeddings, or give the model a copy of the tensor")
    own, made = (dict([*each.named_buffers(), *each.named_parameters()]) for each in (model, skeleton))
    if cast := [name for name, tensor in made.items() if name in own and own[name].dtype != tensor.dtype]:
        before, after = (tensors[cast[0]].dtype for tensors in (own, made))
        raise InputError(f"--save {path}: {cast[0]} was cast to {before}, and will be {after} once loaded; load "
                         "the model by from_pretrained(..., dtype=...)")
    with reading(f"--save {path}: the model's generation_config"), tempfile.TemporaryDirectory() as folder:
        model.generation_config.save_pretrained(folder)
