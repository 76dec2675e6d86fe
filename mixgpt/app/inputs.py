"""What a run takes: model, texts and device, checked before the weights are read."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from datautils import begin, calibration_samples, resolve_bos, test_tokens
from mixgpt.allocation import traces
from mixgpt.app.settings import Settings
from mixgpt.checkpoints import load
from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.common.runtime import Clock, choose_dtype, choose_seqlen
from mixgpt.evaluation import selfcheck
from mixgpt.modeling.streaming import digest
from mixgpt.pruning import distill
from mixgpt.pruning.expert_removal import with_fewer_experts
from mixgpt.pruning.targets import Target, select
from modelutils import allocate, place_for


@dataclass
class Inputs:
    """The checked inputs of a run; those from `calibration` on are empty until `read_texts`."""

    settings: Settings  # with what "auto" in --bos stands for
    device: torch.device
    clock: Clock
    config: Any  # of transformers
    seqlen: int
    tokenizer: Any
    selected: dict  # {(layer, name): (out, in)}, the matrices to change
    uncalled: list  # names of linears that layers do not call as modules, which stay dense
    model: Any = None  # if it is in memory already
    calibration: torch.Tensor | None = None  # (N, T)
    further: torch.Tensor | None = None  # (n, T): for the Hessians alone, then for distillation
    tests: dict = field(default_factory=dict)  # {test set: tokens (n, T)}
    sources: dict = field(default_factory=dict)  # origin of the texts
    score_tasks: Any = None  # function of (model, batch size), None without tasks

    @property
    def dtype(self):
        """The dtype of the weights in memory, "auto" for that on disk."""
        return choose_dtype(self.settings.dtype, self.config, self.device)

    @property
    def target(self):
        """The overall target."""
        n, m = self.settings.prunen, self.settings.prunem
        return Target(n / m, n, m) if m else Target(self.settings.sparsity)


def check(settings, device, clock, model=None, tokenizer=None):
    """Return the `Inputs` without texts. Raises InputError for settings that do not fit the model or the disk.

    model, tokenizer: if they are in memory already.
    """
    settings.check_paths()  # again, for callers that are not the command line
    config = model.config if model else load.read_config(settings.model)
    skeleton = load.skeleton(config)
    if settings.experts:
        skeleton = with_fewer_experts(skeleton, settings.experts)
    load.check_layers(settings.model, skeleton, settings.save_format)
    widening, uncalled = selfcheck.check(settings.model, skeleton)
    selected = select(skeleton, settings.minlayer, settings.maxlayer, settings.prune_only, settings.invert, {
        "--prunem": settings.prunem, "--groupsize": settings.groupsize}, uncalled) if settings.compresses else {}
    if settings.sensitivity_file:
        traces.read(settings.sensitivity_file, traces.matrices_of(skeleton), settings.sensitivity)
    tokenizer = tokenizer or load.load_tokenizer(settings.model)
    settings = replace(settings, bos=resolve_bos(settings.bos, config.model_type, tokenizer))
    inputs = Inputs(settings, device, clock, config, choose_seqlen(settings.seqlen, config), tokenizer, selected,
                    uncalled, model)
    if settings.needs_calibration:
        _check_sequences(inputs, widening)
    return inputs


def _check_sequences(inputs, widening):
    """Raise InputError for calibration sequences that are too many for memory and disk, or too few for the processes.

    widening: of hidden states, see `selfcheck.check`.
    """
    settings, world = inputs.settings, distributed.world()
    itemsize = 2 if inputs.dtype == "auto" else inputs.dtype.itemsize  # at least
    numel = inputs.seqlen * (settings.nsamples + sum(settings.extra_counts)) * inputs.config.hidden_size
    sets = 2 if settings.target == "dense" else 1
    nbytes = int(sets * widening * numel * itemsize) // world
    allocate([nbytes], torch.uint8, inputs.device, place_for(nbytes, inputs.device))  # and free it again
    if settings.nsamples < world:
        raise InputError(f"--nsamples {settings.nsamples}: must be at least {world}, the number of processes")
    if settings.distill and settings.extra_counts[1] < world:
        raise InputError(f"--distill {settings.distill:g}: gives {settings.extra_counts[1]} sequences, must be at "
                         f"least {world}, the number of processes; raise --nsamples")


def read_texts(inputs, texts=None):
    """Read calibration and test tokens and the tasks into the `Inputs`.

    texts: calibration text in memory, a list of strings or tokens (N, T), which are the further sequences, too.
    """
    settings, tokenizer, sources = inputs.settings, inputs.tokenizer, inputs.sources
    count, width = sum(settings.extra_counts), distill.piece_length(inputs.seqlen)
    if settings.needs_calibration and isinstance(texts, torch.Tensor):
        inputs.calibration = texts.to("cpu")
        sources["calibration"] = {"dataset": settings.dataset, "tokens": digest(inputs.calibration)}
        inputs.further = inputs.calibration[torch.arange(count) % len(inputs.calibration)]
        begin(distill.pieces(inputs.further), tokenizer, settings.bos)
    elif settings.needs_calibration:
        draw = partial(calibration_samples, settings.dataset if texts is None else texts, tokenizer=tokenizer,
                       data_dir=settings.data_dir, bos=settings.bos)
        inputs.calibration, sources["calibration"] = draw(settings.nsamples, inputs.seqlen, settings.seed)
        inputs.further = inputs.calibration[:0]
        if count:  # in pieces, as many short ones differ more than a few long ones
            pieces, _ = draw(count * inputs.seqlen // width, width, f"{settings.seed}, further")
            inputs.further = pieces.view(count, inputs.seqlen)
    for name in settings.eval:
        segments, sources[name] = test_tokens(name, inputs.seqlen, tokenizer, settings.data_dir, settings.bos)
        inputs.tests[name] = segments[:settings.eval_limit]
    for tokens in filter(torch.is_tensor, (inputs.calibration, inputs.further, *inputs.tests.values())):
        if tokens.numel() and tokens.max() >= inputs.config.vocab_size:
            raise InputError(f"model {settings.model}: its tokenizer gives token {tokens.max()}, but its vocabulary "
                             f"has {inputs.config.vocab_size}")
    if not settings.tasks:
        return
    try:
        from mixgpt.evaluation import tasks  # lm-eval is an optional dependency
    except ImportError as error:
        raise InputError(f"--tasks: lm-eval cannot be used ({error}); pip install -r requirements-eval.txt") from error
    chosen = tasks.load(settings.tasks, settings.tasks_dir, settings.limit)
    tasks.check(chosen, tokenizer, load.size(load.skeleton(inputs.config), inputs.dtype), inputs.device)
    inputs.score_tasks = lambda model, batch_size: tasks.score(
        chosen, model, tokenizer, settings.limit, batch_size * inputs.seqlen, inputs.device, settings.bos)
