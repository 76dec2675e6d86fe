"""Open a checked run: its weights, texts, folder and W&B, and whether its steps fit in memory."""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from mixgpt.app import report, tracking
from mixgpt.app.run import Run
from mixgpt.app.settings import METHOD, RESULT, Settings, flag_of, having_effect
from mixgpt.checkpoints import load
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import distributed, memory, program
from mixgpt.common.errors import InputError
from mixgpt.common.files import writing
from mixgpt.common.texts import OWN, text_for, without_own
from mixgpt.datautils import begin, calibration_samples, test_tokens
from mixgpt.evaluation import own_text
from mixgpt.kernels import columns
from mixgpt.modeling import streaming
from mixgpt.pruning import distill, needs


def open_run(run: Run, stack: contextlib.ExitStack, command: str | None = None,
             texts: list | torch.Tensor | None = None) -> None:
    """Open the folder of --save, weights, texts and W&B of a `Run`, on an ExitStack, and print the heading.

    command, texts: as of `pipeline.execute`.
    """
    settings, whole = run.settings, None
    with run.clock.part("load"):
        folder = stack.enter_context(RunDir(settings.save, settings.save_format, run.disk_bytes, settings.resume,
                                            settings.overwrite)) if settings.save else None
        if next(run.model.parameters()).is_meta:
            whole, skeleton = load.multimodal(settings.model), run.model
            run.model = load.open_model(settings.model, run.config, run.dtype)
            if (stored := streaming.stored_dtype(skeleton)) != skeleton.dtype:
                run.model.stored_dtype = stored
    with run.clock.part("data"):
        _read_texts(run, texts)
    with run.clock.part("load"):
        run.record = report.facts(run)
        if folder:
            run.record["identity"] = asked(settings, run.device) | {
                "--dtype": str(run.model.dtype).removeprefix("torch."),
                "model's weights": streaming.fingerprint(run.model),
                "calibration tokens": None if run.calibration is None else streaming.digest(
                    torch.cat([run.calibration, run.further]))}
        elif run.selected and streaming.locations_of(run.model):  # Pruned layers go to disk, like the dense ones.
            nbytes, path = run.disk_bytes, None
            if distributed.rank() == 0:
                with writing(f"TMPDIR: {nbytes / 1e9:.3f} GB of pruned layers", "set it to another folder, or give "
                             "--save"):
                    path = stack.enter_context(tempfile.TemporaryDirectory(prefix="mixgpt"))
            if memory.room(tempfile.gettempdir())[1]:  # Hidden states and layers share it.
                nbytes += run.hidden_bytes * program.world("LOCAL_WORLD_SIZE")
            folder = stack.enter_context(RunDir(
                distributed.broadcast_object(path), nbytes=nbytes, place=f"TMPDIR {tempfile.gettempdir()}",
                advice="free some space, or set TMPDIR to a folder on a larger disk"))
        if folder:
            folder.open(run.model, run.record.get("identity", {}))
        run.folder = folder
        notes, warnings = _plan(run)
    run.log("\n".join([report.heading(run, command, whole), *notes]))
    for warning in warnings:
        print(warning, flush=True)
    with run.clock.part("W&B"):
        run.tracker = stack.enter_context(tracking.Tracker(settings, run.record, run.method))
    distributed.prepared()


def asked(settings: Settings, device: torch.device, *effects: str) -> dict[str, object]:
    """Return the settings that a resumed run must have in common with the first one, {flag: value}.

    effects: further ones, see `settings.option`.
    """
    shared = {flag_of(name): getattr(settings, name) for name in having_effect(RESULT, METHOD, *effects)}
    return shared | {"--device": device.type, "number of processes": distributed.world()}


def _read_texts(run: Run, texts: list | torch.Tensor | None) -> None:
    """Read calibration and test tokens and the tasks.

    texts: calibration text in memory, a list of strings or tokens (N, T), which are the further sequences, too.
    """
    settings, seqlen, tokenizer, sources = run.settings, run.seqlen, run.tokenizer, run.sources
    count, options = sum(settings.extra_counts), {"data_dir": settings.data_dir, "bos": settings.bos}
    if run.own_tokens:
        run.begin("own text")
    if settings.needs_calibration and isinstance(texts, torch.Tensor):
        run.calibration = begin(texts.to("cpu", copy=True), tokenizer, settings.bos)
        sources["calibration"] = {"dataset": settings.dataset, "tokens": streaming.digest(run.calibration)}
        run.further = run.calibration[torch.arange(count) % len(run.calibration)]
        begin(distill.pieces(run.further), tokenizer, settings.bos)
    elif settings.needs_calibration:
        mixture: Any
        mixture, own = _own_text(run) if texts is None else (texts, None)
        drawn = {what: calibration_samples(text_for(what, mixture), *asked, tokenizer, own=own, **options)
                 for what, asked in run.draws.items() if asked[0]}
        run.calibration, sources["calibration"] = drawn.pop("calibration")
        run.further = torch.cat([run.calibration[:0], *(tokens.view(-1, seqlen) for tokens, _ in drawn.values())])
    for name in settings.eval:
        own = _taken_from(_write(run, "--eval", "test")) if name == OWN else None
        segments, sources[name] = test_tokens(name, seqlen, tokenizer, own=own, **options)
        run.tests[name] = segments[:settings.eval_limit]
    for tokens in filter(torch.is_tensor, (run.calibration, run.further, *run.tests.values())):
        if tokens.numel() and tokens.max() >= run.config.vocab_size:
            given = tokens is run.calibration and torch.is_tensor(texts)
            raise InputError(f"{'dataset: holds' if given else f'model {settings.model}: its tokenizer gives'} token "
                             f"{tokens.max()}, but the model's vocabulary has {run.config.vocab_size}")
    if not settings.tasks:
        return
    try:
        from mixgpt.evaluation import tasks  # lm-eval is an optional dependency.
    except ImportError as error:
        raise InputError(f"--tasks: lm-eval cannot be used ({error}); pip install \"mixgpt[eval]\", or in a checkout "
                         "-r requirements-eval.txt") from error
    chosen = tasks.load(settings.tasks, settings.tasks_dir)
    tasks.check(chosen, tokenizer, load.size(run.config, run.dtype), run.device)
    run.score_tasks = lambda model, batch_size: tasks.score(
        chosen, model, tokenizer, batch_size * seqlen, run.device, settings.bos)


def _own_text(run: Run) -> tuple[str, Callable | None]:
    """Let the model write its part of the calibration text, if it has one.

    Returns the text, in which others replace what the model cannot write, and `calibration_samples`'s `own`.
    """
    dataset: Any = run.settings.dataset
    if "dataset" not in run.own_tokens:
        return dataset, None
    why = own_text.obstacle(run.model, run.device)
    if why and (others := without_own(dataset)) != dataset:
        print(f"warning  dataset {dataset}: without {OWN}, as {why}", flush=True)
        return others, None
    return dataset, _taken_from(_write(run, "dataset", run.settings.seed))


def _write(run: Run, argument: str, seed: int | str) -> torch.Tensor:
    """Return the tokens that the model writes for an argument. Raises InputError if it cannot."""
    if why := own_text.obstacle(run.model, run.device):
        raise InputError(f"{argument} {OWN}: cannot be written, as {why}; give another text")
    with run.clock.part("evaluation" if argument == "--eval" else "own text"):
        return own_text.write_text(
            run.model, run.tokenizer, run.device, run.own_tokens[argument], seed, run.settings.bos)


def _taken_from(tokens: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """Return a function that gives the next n sequences of T tokens, (n, T), of a text."""
    place = 0

    def take(n: int, T: int) -> torch.Tensor:
        nonlocal place
        place += n * T
        return tokens[place - n * T:place].view(n, T)
    return take


def _plan(run: Run) -> tuple[list[str], list[str]]:
    """Decide whether and how the run distils, and whether layers take one pass.

    Returns the lines that tell why, and those of them that a quiet run prints, too.
    """
    settings, device, notes, warnings = run.settings, run.device, [], []
    run.memory_plan = memory.MemoryPlan(settings.batch_size, on_host=not settings.calibrates,
                                        two_passes=not (settings.calibrates and settings.true_sequential))
    if run.uncalled and run.selected:
        notes.append(f"dense    {', '.join(run.uncalled)}: stay dense, as the layers do not call them as modules")
    if (stored := streaming.stored_dtype(run.model)) != run.model.dtype:
        name = str(stored).removeprefix("torch.")
        notes.append(f"dtype    float32 in memory, {name} on disk: this device is slower in that; --dtype sets both")
    if settings.distill:
        line = _plan_distillation(run)
        (notes if run.distills else warnings).append(line)
    if run.selected and not run.memory_plan.two_passes and device.type == "cuda":
        notes.append(_plan_passes(run))
    elif run.selected:
        run.memory_plan = memory.MemoryPlan(**run.keep("memory_plan", lambda: asdict(run.memory_plan)))
    if settings.calibrates and device.type == "cuda" and (reason := columns.triton_obstacle(device)):
        notes.append(f"kernels  using the slower PyTorch implementation, as Triton is not available ({reason})")
    return notes, warnings


def _plan_distillation(run: Run) -> str:
    """Choose the ways to distil that fit, if any does. Returns a line."""
    device, effort, (streamed, tokens) = run.device, run.settings.effort, run.distilling(run.memory_plan)
    run.ways = [needs.Way(**way) for way in run.keep("distillation", lambda: [
        asdict(way) for way in distill.ways(streamed, tokens, effort, run.disk_left)])]
    way = run.ways[0] if run.ways else replace(needs.WAYS[-1], batch_size=1)
    taken = distill.training_bytes(streamed, tokens, effort, way)
    places = ((f"on {device}", taken.device, memory.free(device)),
              ("on the host", taken.host, memory.free(torch.device("cpu"))), ("on disk", taken.disk, run.disk_left))
    sizes = " and ".join(f"{nbytes / 1e9:.1f} of {free / 1e9:.1f} GB free {place}" for place, nbytes, free in places
                         if nbytes)
    if run.ways:
        return f"distill  {way}: takes about {sizes}"
    run.record["distilled"] = "no room"
    return f"distill  skipped: {way}, it would take {sizes}"


def _plan_passes(run: Run) -> str:
    """Choose one pass through each layer, unless that does not fit on the GPU and two take less. Returns a line."""
    settings = run.settings
    count = -(-(len(run.calibration) + settings.extra_counts[0]) // distributed.world())
    one, two = needs.pass_bytes(run.streamed(run.memory_plan), run.selected, (count, run.seqlen),
                                settings.target == "dense", settings.solver == "admm")
    free = min(distributed.all_gather_object(memory.free(run.device)))  # All processes decide alike.
    run.memory_plan = memory.MemoryPlan(**run.keep("memory_plan", lambda: asdict(replace(
        run.memory_plan, two_passes=free < one > two, two_take_less=two < one))))
    passes, taken, other, more = ("two passes", two, "one", one) if run.memory_plan.two_passes else (
        "one pass", one, "two", two)
    return (f"memory   {passes} through each layer: about {taken / 1e9:.1f} of {free / 1e9:.1f} GB free on the GPU; "
            f"{other} would take {more / 1e9:.1f} GB")
