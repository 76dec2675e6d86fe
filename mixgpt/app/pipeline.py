"""The main pipeline: load, calibrate, allocate, prune and quantize, save, verify, evaluate, report."""

import contextlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub.utils import disable_progress_bars

from datautils import calibration_samples, test_tokens
from mixgpt.allocation import traces
from mixgpt.allocation.fisher import Gradients, every_second_sequence, output_gradients
from mixgpt.allocation.plan import Budget
from mixgpt.allocation.synthetic import GENERATED, RESAMPLED, synthetic, windows_of
from mixgpt.app import records
from mixgpt.app.choices import ALLOCATIONS, ESTIMATORS, SALIENCIES, SOLVERS
from mixgpt.app.report import heading, plan_text, result_text
from mixgpt.app.tracking import Tracker
from mixgpt.checkpoints import formats, load, run_dir, shards
from mixgpt.checkpoints.layer_files import LayerFiles
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import distributed, memory, progress
from mixgpt.common.clock import Clock, peak_memory
from mixgpt.common.errors import InputError, VerificationError
from mixgpt.common.memory import MemoryPlan, retry_with_less_memory
from mixgpt.common.outputs import write
from mixgpt.common.runtime import choose_device, choose_dtype, choose_seqlen
from mixgpt.evaluation import selfcheck, semistructured
from mixgpt.evaluation.perplexity import logits, perplexity
from mixgpt.evaluation.sparsity import count_zeros, measure_weights
from mixgpt.kernels.columns import triton_obstacle
from mixgpt.modeling.streaming import disk_weights
from mixgpt.pruning import calibration, distill
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.magnitude import prune_magnitude
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Selection, Target, select
from mixgpt.text import bos
from modelutils import Family, StreamedModel, check_hidden_states

PROBE = 128  # tokens on which the saved model is compared with the one in memory


@dataclass
class Job:
    """State that the steps of a run pass on to later steps."""

    family: Family
    settings: Any  # app.settings.Settings
    command: str | None  # the command line, for the heading
    stack: contextlib.ExitStack  # closed at the end of the run
    device: torch.device
    clock: Clock
    config: Any = None
    seqlen: int = 0
    tokenizer: Any = None
    selected: dict = field(default_factory=dict)  # {(layer, name): (out, in)}, the matrices to change
    calibration: torch.Tensor | None = None  # (N, T)
    further: torch.Tensor | None = None  # (n, T), synthetic sequences for the Hessians
    distills: bool = False  # as asked for, if there is room
    distilled_on: torch.Tensor | None = None  # (n, T), the tokens that the pruned model is distilled on
    dense_states: torch.Tensor | None = None  # (n, T, C), the dense model's behind its last layer, of `distilled_on`
    tests: dict = field(default_factory=dict)  # {test set: tokens (n, T)}
    sources: dict = field(default_factory=dict)  # origin of the texts
    score: Any = None  # function that scores a model on the tasks, None without tasks
    model: Any = None
    run_dir: RunDir | None = None  # with --save
    layer_files: LayerFiles | None = None  # with --save, or if the weights are on disk
    identity: dict = field(default_factory=dict)  # what a run that goes on must share, see records.identity
    tracker: Tracker | None = None
    plan: dict = field(default_factory=dict)  # {(layer, name): Target}
    traces: Any = None  # used by the plan, None if not needed
    gradients: Any = None  # of the loss w.r.t. matrix outputs, None if not needed
    outcomes: dict = field(default_factory=dict)  # {(layer, name): Outcome}
    matrices: list = field(default_factory=list)  # MatrixSparsity of every linear
    others: list = field(default_factory=list)  # likewise, of the layers' weights that are left dense
    perplexities: dict = field(default_factory=dict)  # {"dense" or method: {test set: perplexity}}
    scores: dict = field(default_factory=dict)  # likewise, of tasks
    record: dict = field(default_factory=dict)

    def __post_init__(self):
        settings = self.settings
        one_pass = settings.calibrates and settings.true_sequential
        self.memory_plan = MemoryPlan(settings.batch_size, on_host=not settings.calibrates, two_passes=not one_pass)

    @property
    def on_disk(self):
        """Whether the weights stay on disk, so that a failed step can restart."""
        return disk_weights(self.model) is not None

    @property
    def hessian_tokens(self):
        """The tokens that matrices are pruned on."""
        return self.calibration if self.further is None else torch.cat([self.calibration, self.further])

    @property
    def written(self):
        """The numbers of synthetic sequences for the Hessians, and for distillation."""
        return self.settings.synthetic_counts(self.distills)

    def kept(self, name, make):
        """Return make(), or what an interrupted run has kept of it; see `RunDir.kept`."""
        return self.run_dir.kept(name, make) if self.run_dir else make()

    def decided(self, name, choose):
        """Return the JSON-able choose(), or what it was in the interrupted run."""
        return self.kept(name, lambda: (choose(), {}))[0]

    def streamed(self, way):
        return StreamedModel(self.model, self.family, self.device, way.batch_size, self.clock, way.on_host)


def run(family, settings, command=None):
    """Run the pipeline and print its report. Returns the record of the run, as saved in mixgpt.json.

    command: the command line, for the heading. All input errors that can be detected early are raised before the
    weights are loaded.
    """
    if settings.quiet or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        disable_progress_bars()
    device = choose_device(settings.device)
    with contextlib.ExitStack() as stack:
        job = Job(family, settings, command, stack, device, Clock(device))
        stack.enter_context(distributed.joined(device))
        if settings.quiet:
            stack.enter_context(progress.silent())
        if settings.resume and (record := records.completed(settings)):
            report_completed(job, record)
            return record
        for step in (check, read_texts, open_model, announce, choose_plan, evaluate_dense, compress, save, evaluate,
                     report):
            step(job)
        return job.record


def report_completed(job, record):
    """Print the results of a run that has ended before, as when its job is queued again.

    Raises InputError if it had other settings, or other weights where the model goes by another name.
    """
    settings = job.settings
    records.check_completed(record, settings, job.device)
    if settings.model != record["settings"]["model"]:
        job.config = load.load_config(settings.model, job.family)
        model = load.open_model(settings.model, job.config, job.family, dtype_of(job))
        if records.identity({}, model, None)["model's weights"] != record["identity"]["model's weights"]:
            raise InputError(f"--resume: the complete run in {settings.save} has pruned other weights than those of "
                             f"{settings.model}")
    job.record, job.perplexities, job.scores = record, record["perplexity"], record.get("tasks", {})
    job.matrices, job.others, job.outcomes = records.matrices_of(record)
    log(settings, f"resume   the run in {settings.save} is complete; these are its results")
    print(result_text(job), flush=True)
    if distributed.rank() == 0:
        run_dir.clear(settings.save)  # it may have been killed while it did this
        write_record(settings, record)


# ---- before the weights are read -------------------------------------------------------------------------------


def check(job):
    """Raise InputError for settings that do not fit the model or the disk."""
    settings = job.settings
    settings.check_paths()  # again, for callers that are not the command line
    with job.clock.part("load"):
        job.config = load.load_config(settings.model, job.family)
        job.seqlen = choose_seqlen(settings.seqlen, job.config)
        skeleton = load.skeleton(job.config)
        load.check_layers(settings.model, skeleton, job.family, settings.save_format)
        if settings.compresses:
            job.selected = select(skeleton, job.family, selection_of(settings),
                                  {"--prunem": settings.prunem, "--groupsize": settings.groupsize})
        widening = selfcheck.check(settings.model, job.family, skeleton,
                                   {name for _, name in job.selected} if settings.calibrates else ())
        _check_room(job, widening)
        if settings.sensitivity_file:
            traces.read(settings.sensitivity_file, traces.matrices_of(skeleton, job.family), settings.sensitivity)
        if settings.save:
            job.run_dir = job.stack.enter_context(RunDir(settings.save, settings.save_format,
                                                         _size_on_disk(job, skeleton), settings.resume))
            job.layer_files = job.run_dir.files
        job.tokenizer = load.load_tokenizer(settings.model)
        job.settings = replace(settings, bos=bos.resolve(settings.bos, job.config.model_type, job.tokenizer))


def _check_room(job, widening):
    """Raise InputError for calibration sequences that fit neither in memory nor on the disk, before they are drawn.

    widening: of hidden states, see `selfcheck.check`.
    """
    settings, numel = job.settings, job.seqlen * (job.settings.nsamples + sum(job.settings.synthetic_counts()))
    if not settings.needs_calibration:
        return
    if not memory.fits(16 * numel, host := torch.device("cpu")):  # a list of the tokens, then a tensor
        raise InputError(f"--nsamples {settings.nsamples}: sequences of {job.seqlen} tokens take "
                         f"{16 * numel / 1e9:.1f} GB, {memory.free(host) / 1e9:.1f} GB of memory are free; lower "
                         "--nsamples or --seqlen")
    dtype = dtype_of(job)
    itemsize = 2 if dtype == "auto" else dtype.itemsize  # at least
    sets = 2 if settings.target == "dense" else 1
    check_hidden_states(int(sets * widening * numel * job.config.hidden_size * itemsize) // distributed.world(),
                        job.device)


def _size_on_disk(job, skeleton):
    """Estimate the bytes of finished layers and of the result, which is written beside them."""
    settings, dtype, changed = job.settings, dtype_of(job), list(job.selected.values())
    layers = load.size(skeleton, dtype) if job.selected else 0
    return layers + load.size(skeleton, dtype) + formats.expected_bytes(
        settings.save_format, changed, target_of(settings).sparsity, settings.scheme, load.itemsize(dtype)) - (
        load.itemsize(dtype) * sum(out * columns for out, columns in changed))


def selection_of(settings):
    return Selection(settings.minlayer, settings.maxlayer, settings.prune_only, settings.invert)


def dtype_of(job):
    return choose_dtype(job.settings.dtype, job.config, job.device)


def read_texts(job):
    """Read and tokenize the texts, and load the tasks."""
    settings = job.settings
    with job.clock.part("data"):
        job.calibration, job.tests, job.sources = _tokens(settings, job.seqlen, job.tokenizer, job.config.vocab_size)
        if settings.tasks:
            job.score = _scorer(job)


def _tokens(settings, seqlen, tokenizer, vocab_size):
    """Return calibration tokens (N, T) or None, {test set: tokens (n, T)} and the origin of the texts."""
    calibration, tests, sources = None, {}, {}
    if settings.nsamples < distributed.world():
        raise InputError(f"--nsamples {settings.nsamples}: must be at least {distributed.world()}, the number "
                         "of processes")
    if settings.distill and len(windows := _windows(settings, seqlen)) < distributed.world():
        raise InputError(f"--distill {settings.distill:g}: gives {len(windows)} pieces of text, must be at least "
                         f"{distributed.world()}, the number of processes; raise --nsamples")
    if settings.needs_calibration:
        calibration, sources["calibration"] = calibration_samples(
            settings.dataset, settings.nsamples, seqlen, settings.seed, tokenizer, settings.data_dir,
            settings.bos)
    for name in settings.eval:
        tokens, sources[name] = test_tokens(name, seqlen, tokenizer, settings.data_dir, settings.bos)
        tests[name] = tokens[:settings.eval_limit]
    for tokens in ([calibration] if calibration is not None else []) + list(tests.values()):
        if tokens.max() >= vocab_size:
            raise InputError(f"model {settings.model}: its tokenizer gives token {tokens.max()}, but its "
                             f"vocabulary has {vocab_size}")
    return calibration, tests, sources


def _scorer(job):
    """Return a function of (model, batch size) that scores a model on the tasks of a run."""
    settings = job.settings
    try:
        from mixgpt.evaluation import tasks  # lm-eval is an optional dependency
    except ImportError as error:
        raise InputError(f"--tasks: lm-eval cannot be used ({error}); pip install -r requirements-eval.txt") from error
    chosen = tasks.load(settings.tasks, settings.tasks_dir, settings.limit)
    tasks.check(chosen, job.tokenizer, load.size(load.skeleton(job.config), dtype_of(job)), job.device)
    return lambda model, batch_size: tasks.score(
        chosen, model, job.family, job.tokenizer, settings.limit, batch_size * job.seqlen, job.device,
        settings.bos)


def open_model(job):
    """Open the weights, and start or resume the output directory."""
    settings = job.settings
    with job.clock.part("load"):
        job.model = load.open_model(settings.model, job.config, job.family, dtype_of(job))
        if job.run_dir:
            job.identity = records.identity(records.asked(settings, job.seqlen, job.device), job.model, job.calibration)
            job.run_dir.open(job.model, job.family, job.identity)
        elif job.selected and job.on_disk:  # pruned layers go to disk too
            job.layer_files = job.stack.enter_context(_temporary_files(job))
            job.layer_files.open(job.model, job.family)


def _temporary_files(job):
    """Return LayerFiles in a temporary directory. Raises InputError if none has room for the pruned layers."""
    layers = job.family.layers_of(job.model)
    if job.settings.calibrates:
        layers = layers[:max(index for index, _ in job.selected) + 1]
    needed = sum(shards.size(layer.state_dict()) for layer in layers) * (2 if job.settings.distill else 1)
    path = None
    if distributed.rank() == 0:
        try:
            path = job.stack.enter_context(tempfile.TemporaryDirectory(prefix="mixgpt"))
            free = shutil.disk_usage(path).free
        except OSError as error:
            raise InputError("TMPDIR: no folder for temporary files can be written; set it to one, or give --save"
                             ) from error
        if free < needed:
            raise InputError(f"TMPDIR {tempfile.gettempdir()}: pruned layers need {needed / 1e9:.3f} GB, "
                             f"{free / 1e9:.3f} GB are free; set it to a folder on a larger disk, or give --save")
    return LayerFiles(distributed.broadcast_object(path), f"TMPDIR {tempfile.gettempdir()}",
                      "free some space, or set TMPDIR to a folder on a larger disk")


def announce(job):
    """Print the heading, and start a W&B run if requested."""
    settings, model = job.settings, job.model
    job.record = records.facts(settings, job.seqlen, model.dtype, job.device, job.sources)
    log(settings, heading(job))
    if settings.dtype == "auto" and dtype_of(job) != "auto":
        log(settings, "dtype    float32: this CPU computes more slowly in the stored dtype; give --dtype to keep it")
    if job.identity:
        job.record["identity"] = job.identity
    with job.clock.part("W&B"):
        job.tracker = job.stack.enter_context(tracker_of(settings, job.record))
    if job.tracker.place:
        log(settings, f"W&B      {job.tracker.place}")
    if settings.distill:
        _plan_distillation(job)
    if job.selected and not job.memory_plan.two_passes and job.device.type == "cuda":
        log(settings, _plan_memory(job))
    if settings.calibrates and job.device.type == "cuda" and (reason := triton_obstacle(job.device)):
        log(settings, f"kernels  using the slower PyTorch implementation, as Triton is not available ({reason})")
    if settings.semi_structured and (reason := semistructured.obstacle(job.device, model.dtype)):
        job.record["semi_structured"] = {"skipped": reason}
        log(settings, f"kernels  --semi-structured is skipped: {reason}")


def _windows(settings, seqlen):
    """Return a tensor of the shape of what the model will be distilled on."""
    return windows_of(torch.empty(settings.synthetic_counts()[1], seqlen, dtype=torch.long), GENERATED)


def _plan_distillation(job):
    """Choose whether the model will be distilled at the end: if it can be trained as a whole on every device."""
    tokens = _windows(job.settings, job.seqlen)
    streamed = distill.widened(job.streamed(job.memory_plan), tokens, job.seqlen)
    job.distills = job.decided("distills", lambda: min(distributed.all_gather_object(
        distill.room_for(streamed, tokens))) > 0)
    if not job.distills:
        job.record["distilled"] = "no room"
        log(job.settings, f"distill  skipped: the model as a whole cannot be trained in what is free on {job.device}")


def _plan_memory(job):
    """Choose whether all sequences are to wait inside a layer at a time. Returns a line that says so."""
    settings, count = job.settings, -(-(len(job.calibration) + job.written[0]) // distributed.world())
    needed = calibration.one_pass_bytes(job.streamed(job.memory_plan), job.selected, (count, job.seqlen),
                                        settings.target == "dense", settings.solver == "admm")
    free = min(distributed.all_gather_object(memory.free(job.device)))  # all go the same way
    job.memory_plan = MemoryPlan(**job.decided("memory_plan", lambda: asdict(
        replace(job.memory_plan, two_passes=needed > free))))
    passes = ("two passes through each layer: one would take" if job.memory_plan.two_passes else
              "one pass through each layer takes")
    return f"memory   {passes} about {needed / 1e9:.1f} of {free / 1e9:.1f} GB free on the GPU"


def tracker_of(settings, facts):
    """Return a W&B tracker, active only if requested and only in the first process."""
    config = {**facts["settings"], **facts, "method": settings.method if settings.compresses else "dense"}
    return Tracker(config if settings.log_wandb and distributed.rank() == 0 else None, settings.wandb_project,
                   settings.wandb_name, settings.wandb_group)


def log(settings, text):
    if not settings.quiet:
        print(text, flush=True)


# ---- sparsity allocation ---------------------------------------------------------------------------------------


def choose_plan(job):
    """Choose each matrix's target sparsity, from sensitivities if requested; print and plot it."""
    settings = job.settings
    if not settings.compresses:
        return
    path = retry_with_less_memory(settings, MemoryPlan(settings.batch_size, on_host=False), partial(_measure, job))
    if settings.is_nonuniform and not job.traces:
        sparsities = [target.sparsity for target in job.plan.values()]
        log(settings, f"plan     {ALLOCATIONS.title(settings.sparsity_way)}: matrices from {min(sparsities):.2%} to "
                      f"{max(sparsities):.2%}")
    if job.traces:
        log(settings, f"{job.traces.verdict()}\n         kept in {path}")
        if warning := job.traces.warning():
            print(warning, flush=True)
        log(settings, plan_text(settings, target_of(settings), job.plan, job.selected, job.traces))
        job.tracker.plan(job.traces, job.plan)
    if settings.plot and distributed.rank() == 0:
        from mixgpt.app import plots  # matplotlib takes half a second to import
        write("--plot", settings.plot, plots.draw(job.plan, job.traces, Path(settings.plot).suffix))


def _measure(job, way):
    """Write synthetic text, measure traces and gradients, and make the plan. Returns the file of the traces, if any."""
    settings, clock, streamed, path = job.settings, job.clock, job.streamed(way), None
    number, more = job.written
    if number + more:
        how, tensors = job.kept("synthetic", partial(_synthetic, job, streamed))
        job.further, job.record["synthetic"] = tensors["tokens"][:number] if number else None, how
        if how == RESAMPLED:
            log(settings, f"data     the model as a whole has no room on {job.device}: its synthetic sequences are "
                          "single tokens drawn in place of those of the calibration sequences, not text")
        if more:
            job.distilled_on, job.dense_states = windows_of(tensors["tokens"][number:], how), tensors["dense_states"]
    if settings.ranks_by_sensitivity:
        sampling = traces.Sampling(settings.sensitivity, ESTIMATORS[settings.sensitivity].load(), settings.seed,
                                   settings.nprobes)
        with clock.part("sensitivity"):
            job.traces, path = traces.load_or_compute(streamed, job.calibration, sampling, settings.sensitivity_file)
    targets, tensors = job.kept("plan", partial(_plan, job, streamed))
    job.plan = {(layer, name): Target(*target) for layer, name, *target in targets}
    job.gradients = Gradients.of(tensors) if settings.needs_gradients else None
    return path


def _synthetic(job, streamed):
    """Return how synthetic text was made, and {"tokens", "dense_states" of this process's share of what is distilled}.
    """
    settings, (number, more) = job.settings, job.written
    with job.clock.part("synthetic"):
        first = bos.first_token(job.tokenizer, settings.bos)
        sequences, how, states = synthetic(streamed, job.calibration, number + more, settings.seed, more, first)
    if not more:
        return how, {"tokens": sequences}
    windows = windows_of(sequences[number:], how)
    if states is not None:
        ours = windows[distributed.share(len(windows))]
        return how, {"tokens": sequences, "dense_states": states[-len(ours):].clone()}
    with job.clock.part("distillation"):
        states = distill.dense_states(distill.widened(streamed, windows, job.seqlen), windows)
    return how, {"tokens": sequences, "dense_states": states}


def _plan(job, streamed):
    """Return the targets of all matrices, a JSON-able list, and the tensors of the `Gradients` behind them."""
    settings, gradients = job.settings, None
    if settings.needs_gradients:
        percdamp = settings.percdamp if ALLOCATIONS[settings.sparsity_way].by_loss else None  # it needs H, too
        tokens = (job.hessian_tokens if settings.token_weights == "fisher" else
                  every_second_sequence(job.calibration))
        with job.clock.part("gradients"):
            gradients = output_gradients(streamed, list(job.selected), tokens, settings.seed, percdamp)
    plan = ALLOCATIONS[settings.sparsity_way].load()(Budget(
        job.selected, target_of(settings), settings.alpha, job.traces and job.traces.sensitivity, gradients,
        streamed, job.calibration))
    return [[layer, name, *astuple(target)] for (layer, name), target in plan.items()], (
        gradients.tensors() if gradients else {})


def target_of(settings):
    """Return the overall target."""
    if settings.prunem:
        return Target(settings.prunen / settings.prunem, settings.prunen, settings.prunem)
    return Target(settings.sparsity)


# ---- prune, quantize, save -------------------------------------------------------------------------------------


def compress(job):
    """Prune and quantize the matrices of the plan."""
    settings, record, counted = job.settings, job.record, {}
    if job.plan:
        job.outcomes, counted, way = retry_with_less_memory(settings, job.memory_plan, partial(_compress, job),
                                                            job.on_disk)
        if job.distills:
            _distill_if_possible(job, counted, way.on_host)
        record["settings"] |= {"batch_size": way.batch_size,
                               "true_sequential": settings.true_sequential and not (
                                   settings.calibrates and way.two_passes)}
    job.matrices, job.others = measure_weights(job.model, job.family, job.device, counted)
    record |= records.of_matrices(job.matrices, job.others, job.outcomes, job.plan, job.traces)


def _compress(job, way):
    """Prune and quantize. Returns {(layer, name): Outcome}, {layer: LayerSparsity} and the memory plan."""
    settings, tracker, counted = job.settings, job.tracker, {}

    def observe(index, layer, outcomes, start):
        counted[index] = count_zeros(index, layer)
        if tracker.run:
            matrices, _ = counted[index].read()  # which waits for all of the layer
            tracker.layer(index, outcomes, time.perf_counter() - start, matrices)

    streamed = job.streamed(way)
    if job.run_dir:
        job.run_dir.keep("memory_plan", asdict(way))
    if not settings.calibrates:
        with job.clock.part("magnitude" if settings.prunes else "rounding"):
            outcomes = prune_magnitude(streamed, job.plan, settings.scheme, job.layer_files, observe)
    else:
        recipe = replace(recipe_of(settings, job.gradients), true_sequential=not way.two_passes)
        outcomes = prune_layerwise(streamed, job.plan, job.hessian_tokens, recipe, job.layer_files, observe)
    return outcomes, counted, way


def _distill_if_possible(job, counted, on_host):
    """Distill the pruned or quantized model, or leave it as it is and say why. counted: by `_compress`.

    What an interrupted run has done, or could not do, stays so.
    """
    settings, files = job.settings, job.layer_files
    result = files and files.distilled
    if not result:
        try:
            result = retry_with_less_memory(settings, MemoryPlan(settings.batch_size, on_host),
                                            partial(_distill, job, counted))
        except (distill.Diverged, memory.OutOfMemory) as error:
            result = str(error)
            if files:
                files.keep_undistilled(result)
    if isinstance(result, str):
        print(f"warning  --distill: {result}: the model stays as it was before distillation", flush=True)
    job.record["distilled"] = result


def _distill(job, counted, way):
    """Distill the pruned or quantized model. Returns what to record."""
    settings, files = job.settings, job.layer_files
    streamed = distill.widened(job.streamed(way), job.distilled_on, job.seqlen)
    room = job.decided("distillation_batch", lambda: min(distributed.all_gather_object(
        distill.room_for(streamed, job.distilled_on))))
    streamed = replace(streamed, batch_size=max(min(room, streamed.batch_size), 1))

    def finish(index, layer, _):
        if files:
            outcomes = {key: outcome for key, outcome in job.outcomes.items() if key[0] == index}
            files.save_layer(index, layer, outcomes, kind="distilled")

    with job.clock.part("distillation"):
        grids = {key: outcome.grid for key, outcome in job.outcomes.items()}
        divergence = distill.distill(streamed, grids, job.distilled_on, job.dense_states, settings.seed, finish)
        if files:
            files.finish_distillation({"divergence": divergence})
    counted.clear()
    return {"divergence": divergence}


def recipe_of(settings, gradients=None):
    """Return the Recipe for pruning and quantizing. gradients: fisher.Gradients, if settings.needs_gradients."""
    saliency = SALIENCIES[settings.saliency]
    return Recipe(
        SOLVERS[settings.solver].load(), settings.blocksize, saliency.load(), settings.scheme,
        settings.percdamp, settings.act_order, settings.true_sequential, settings.target == "dense",
        row_weights=gradients.rows if saliency.weighs_rows else None,
        token_weights=gradients.tokens if settings.token_weights == "fisher" else None,
        title=SOLVERS.title(settings.solver))


def save(job):
    """Complete the output directory, reload it and compare it with the model in memory."""
    settings, record = job.settings, job.record
    if not settings.save:
        return
    with job.clock.part("save"):
        job.run_dir.write_record(record)
        job.run_dir.write_checkpoint(job.tokenizer, {job.family.path(*key): outcome.grid
                                                     for key, outcome in job.outcomes.items() if outcome.grid})
        _verify(job)
        if job.plan:
            record["disk"] = records.disk(settings, job.run_dir, job.plan, job.selected)


def _verify(job):
    """Reload the saved model and compare it with the one in memory: zeros of every weight, logits of a few tokens."""
    folder, family = job.settings.save, job.family
    probe = _probe(job.tests, job.calibration, job.config.vocab_size)
    reloaded = load.open_model(folder, load.load_config(folder, family), family, "auto")
    if measure_weights(reloaded, family, job.device) != (job.matrices, job.others):
        raise VerificationError(f"--save {folder}: the zeros of the saved weights differ from those in memory")
    found, wanted = (logits(each, family, probe, 1, job.device) for each in (reloaded, job.model))
    if not torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True):
        raise VerificationError(f"--save {folder}: the logits of the saved model differ from those in memory")


def _probe(tests, calibration, vocab_size):
    for tokens in (*tests.values(), calibration):
        if tokens is not None:
            return tokens[:1, :PROBE]
    return torch.arange(PROBE)[None] % vocab_size


# ---- evaluate and report ---------------------------------------------------------------------------------------


def evaluate_dense(job):
    """Evaluate the dense model, if requested or if there is nothing else to do."""
    if job.settings.dense or not job.plan:
        _evaluate(job, "dense")


def evaluate(job):
    """Evaluate the pruned model, and the kernels for 2:4 sparsity."""
    settings = job.settings
    if job.plan:
        _evaluate(job, settings.method)
    if settings.semi_structured and "semi_structured" not in job.record:
        job.record["semi_structured"] = retry_with_less_memory(
            settings, MemoryPlan(settings.batch_size),
            lambda way: semistructured.compare(job.model, job.family, job.tests, way.batch_size, job.device))


def _evaluate(job, method):
    def perplexities(way):
        with job.clock.part("evaluation"):
            return {name: perplexity(job.model, job.family, tokens, way.batch_size, job.device, name)
                    for name, tokens in job.tests.items()}

    def scores(way):
        with job.clock.part("tasks"):
            return job.score(job.model, way.batch_size)

    way = MemoryPlan(job.settings.batch_size)
    job.perplexities[method] = retry_with_less_memory(job.settings, way, perplexities)
    if job.score:
        job.scores[method] = retry_with_less_memory(job.settings, way, scores)


def write_record(settings, record):
    if settings.record:
        write("--record", settings.record, json.dumps(record, indent=1) + "\n")


def report(job):
    """Complete the record, write it if requested, and print the tables."""
    settings, record = job.settings, job.record
    record |= {"perplexity": job.perplexities} | ({"tasks": job.scores} if job.scores else {})
    record |= {"seconds": dict(job.clock.seconds), "peak_memory": peak_memory(job.device)}
    if settings.save:
        job.run_dir.write_record(record)
        job.run_dir.close()
    if result := result_text(job):
        print(result, flush=True)
    if distributed.rank() == 0:
        write_record(settings, record)
    job.tracker.result(record, settings.method if job.plan else "dense")
