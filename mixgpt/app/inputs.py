"""What a run takes: model, texts and device, checked before the weights are read."""

from dataclasses import replace
from functools import partial

import torch

from datautils import begin, calibration_samples, resolve_bos, test_tokens
from mixgpt.allocation import traces
from mixgpt.app.run import Run
from mixgpt.checkpoints import load
from mixgpt.common import distributed, runtime
from mixgpt.common.errors import InputError
from mixgpt.evaluation import selfcheck
from mixgpt.modeling.streaming import digest
from mixgpt.pruning import distill, expert_removal, targets
from modelutils import allocate, place_for


def check(settings, device, clock, model=None, tokenizer=None):
    """Return a `Run` without texts. Raises InputError for settings that do not fit the model or the disk."""
    settings.check_paths()  # again, for callers that are not the command line
    config = model.config if model else load.read_config(settings.model)
    skeleton = load.skeleton(config)
    if settings.experts:
        skeleton = expert_removal.with_fewer_experts(skeleton, settings.experts)
    load.check_layers(settings.model, skeleton, settings.save_format)
    widening, uncalled = selfcheck.check(settings.model, skeleton, device)
    selected = targets.select(skeleton, settings.minlayer, settings.maxlayer, settings.prune_only, settings.invert, {
        "--prunem": settings.prunem, "--groupsize": settings.groupsize}, uncalled) if settings.compresses else {}
    if settings.sensitivity_file:
        traces.read(settings.sensitivity_file, targets.select(skeleton), settings.sensitivity)
    tokenizer = tokenizer or load.load_tokenizer(settings.model)
    settings = replace(settings, bos=resolve_bos(settings.bos, config.model_type, tokenizer))
    run = Run(settings, device, clock, config, runtime.choose_seqlen(settings.seqlen, config), tokenizer, selected,
              uncalled, model)
    if settings.needs_calibration:
        _check_sequences(run, widening)
    return run


def _check_sequences(run, widening):
    """Raise InputError for calibration sequences that exceed memory and disk, or are fewer than the processes."""
    settings, world = run.settings, distributed.world()
    itemsize = 2 if run.dtype == "auto" else run.dtype.itemsize  # at least
    numel = run.seqlen * (settings.nsamples + sum(settings.extra_counts)) * run.config.hidden_size
    sets = 2 if settings.target == "dense" else 1
    nbytes = int(sets * widening * numel * itemsize) // world
    allocate([nbytes], torch.uint8, run.device, place_for(nbytes, run.device))  # and free it again
    if settings.nsamples < world:
        raise InputError(f"--nsamples {settings.nsamples}: must be at least {world}, the number of processes")
    if settings.distill and settings.extra_counts[1] < world:
        raise InputError(f"--distill {settings.distill:g}: gives {settings.extra_counts[1]} sequences, must be at "
                         f"least {world}, the number of processes; raise --nsamples")


def read_texts(run, texts=None):
    """Read calibration and test tokens and the tasks into a `Run`.

    texts: calibration text in memory, a list of strings or tokens (N, T), which are the further sequences, too.
    """
    settings, tokenizer, sources = run.settings, run.tokenizer, run.sources
    count, width = sum(settings.extra_counts), distill.piece_length(run.seqlen)
    if settings.needs_calibration and isinstance(texts, torch.Tensor):
        run.calibration = texts.to("cpu")
        sources["calibration"] = {"dataset": settings.dataset, "tokens": digest(run.calibration)}
        run.further = run.calibration[torch.arange(count) % len(run.calibration)]
        begin(distill.pieces(run.further), tokenizer, settings.bos)
    elif settings.needs_calibration:
        draw = partial(calibration_samples, settings.dataset if texts is None else texts, tokenizer=tokenizer,
                       data_dir=settings.data_dir, bos=settings.bos)
        run.calibration, sources["calibration"] = draw(settings.nsamples, run.seqlen, settings.seed)
        run.further = run.calibration[:0]
        if count:  # in pieces, as many short ones differ more than a few long ones
            pieces, _ = draw(count * run.seqlen // width, width, f"{settings.seed}, further")
            run.further = pieces.view(count, run.seqlen)
    for name in settings.eval:
        segments, sources[name] = test_tokens(name, run.seqlen, tokenizer, settings.data_dir, settings.bos)
        run.tests[name] = segments[:settings.eval_limit]
    for tokens in filter(torch.is_tensor, (run.calibration, run.further, *run.tests.values())):
        if tokens.numel() and tokens.max() >= run.config.vocab_size:
            raise InputError(f"model {settings.model}: its tokenizer gives token {tokens.max()}, but its vocabulary "
                             f"has {run.config.vocab_size}")
    if not settings.tasks:
        return
    try:
        from mixgpt.evaluation import tasks  # lm-eval is an optional dependency
    except ImportError as error:
        raise InputError(f"--tasks: lm-eval cannot be used ({error}); pip install -r requirements-eval.txt") from error
    chosen = tasks.load(settings.tasks, settings.tasks_dir, settings.limit)
    tasks.check(chosen, tokenizer, load.size(run.config, run.dtype), run.device)
    run.score_tasks = lambda model, batch_size: tasks.score(
        chosen, model, tokenizer, settings.limit, batch_size * run.seqlen, run.device, settings.bos)
