"""A run in progress: what it takes, checked before the weights are read, the opened model, and how memory is used."""

import math
import tempfile
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from mixgpt.allocation import traces
from mixgpt.app import report, tracking
from mixgpt.app.settings import Settings
from mixgpt.checkpoints import formats, load, run_dir
from mixgpt.common import choices, distributed, memory, program, runtime
from mixgpt.common.errors import InputError, reading
from mixgpt.common.files import writing
from mixgpt.datautils import begin, calibration_samples, resolve_bos, test_tokens
from mixgpt.evaluation import selfcheck
from mixgpt.kernels import columns
from mixgpt.modeling import decoder, streaming
from mixgpt.modeling.placing import allocate, place_for
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import calibration, distill, expert_removal, targets


@dataclass
class Run:
    """A run in progress: its inputs, and what it has beside them.

    Those from `calibration` on are empty until `read_texts`, those from `files` on until `open_run`.
    """

    settings: Settings  # with what the defaults of --seqlen and --bos stand for
    device: torch.device
    clock: runtime.Clock
    config: Any  # of transformers
    tokenizer: Any
    selected: dict  # {(layer, name): (out, in)}, the matrices to change
    uncalled: list  # names of linears that layers do not call as modules, which stay dense
    model: Any = None  # if it is in memory already, or else once it is opened
    calibration: torch.Tensor | None = None  # (N, T)
    further: torch.Tensor | None = None  # (n, T): for the Hessians alone, then for distillation
    tests: dict = field(default_factory=dict)  # {test set: tokens (n, T)}
    sources: dict = field(default_factory=dict)  # origin of the texts
    score_tasks: Any = None  # function of (model, batch size), None without tasks
    files: run_dir.RunDir | None = None  # of --save; else in a temporary folder, if the weights are on disk
    record: dict = field(default_factory=dict)  # as in mixgpt.json, filled step by step
    tracker: tracking.Tracker | None = None
    memory_plan: memory.MemoryPlan | None = None  # of pruning
    distills: bool = False  # whether the pruned model is distilled at the end
    hidden_bytes: int = 0  # of the hidden states of its calibration sequences, in this process

    @property
    def method(self):
        """The name of what has happened, in tables and records."""
        return self.settings.method(distilled=not isinstance(self.record.get("distilled"), str))

    @property
    def dtype(self):
        """The dtype of the weights in memory, "auto" for that on disk."""
        return runtime.choose_dtype(self.settings.dtype, self.config, self.device)

    def streamed(self, plan):
        """Return the model as it runs under a MemoryPlan."""
        return StreamedModel(self.model, self.device, plan.batch_size, self.clock, plan.on_host)

    def distilling(self, plan):
        """Return the model as it distils under a MemoryPlan, with as many tokens in a batch, and its pieces (m, t)."""
        tokens = distill.pieces(self.further[self.settings.extra_counts[0]:])
        size = plan.batch_size * (self.settings.seqlen // tokens.shape[1])
        return self.streamed(replace(plan, batch_size=size)), tokens

    def retry(self, step, on_host=True):
        """Return step(MemoryPlan), with less memory if a GPU's runs out. on_host: whether hidden states are."""
        return memory.retry_with_less_memory(memory.MemoryPlan(self.settings.batch_size, on_host), step)

    def kept(self, name, make):
        """Return make(), or what an interrupted run has kept of it; see `RunDir.kept`."""
        return self.files.kept(name, make) if self.settings.save else make()

    def decided(self, name, choose):
        """Return the JSON-able choose(), or what it was in the interrupted run."""
        return self.kept(name, lambda: (choose(), {}))[0]

    def log(self, text):
        """Print text unless the run is quiet."""
        if not self.settings.quiet:
            print(text, flush=True)


def check(settings, device, clock, model=None, tokenizer=None):
    """Return a `Run` without texts. Raises InputError for settings that do not fit the model or the disk."""
    settings.check_paths()  # again, for callers that are not the command line
    config = model.config if model else load.read_config(settings.model)
    skeleton = load.skeleton(config, model.dtype if model else torch.float32)
    if settings.experts:
        skeleton = expert_removal.with_fewer_experts(skeleton, settings.experts)
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
    run = Run(settings, device, clock, config, tokenizer, selected, uncalled, model)
    if settings.needs_calibration:
        _check_sequences(run, widening)
    needed = load.size(config, run.dtype)  # for a format that is written from all weights in memory
    if settings.save_format == "compressed-tensors":
        needed *= program.world("LOCAL_WORLD_SIZE")  # as each process loads it to verify it
    elif choices.FORMATS[settings.save_format].streams:
        needed = min(needed, formats.LARGEST)
    if settings.save and needed > (free := memory.free_on_host()):
        raise InputError(f"--save {settings.save}: needs {needed / 1e9:.3f} GB of memory at the end, {free / 1e9:.3f} "
                         "GB are free; end other programs, or use a machine with more")
    return run


def _check_in_memory(path, model, skeleton):
    """Raise InputError for a model in memory with other matrices than its skeleton, or that --save could not keep."""
    own, made = ({(name, *getattr(tensor, "shape", ())) for name, tensor in each.state_dict().items()}
                 for each in (model, skeleton))
    for name, *shape in sorted(own ^ made)[:1]:
        raise InputError("model: its config makes another model than the one in memory: only one of them has "
                         f"{name} {tuple(shape)}; merge adapters first, or give its name or folder")
    if not path:
        return
    own, made = (dict(each.named_parameters()) for each in (model, skeleton))  # of shared ones, the first alone
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


def _check_sequences(run, widening):
    """Raise InputError for calibration sequences that exceed memory and disk, or are fewer than the processes."""
    settings, world = run.settings, distributed.world()
    itemsize = 2 if run.dtype == "auto" else run.dtype.itemsize  # at least
    numel = settings.seqlen * (settings.nsamples + sum(settings.extra_counts)) * run.config.hidden_size
    sets = 2 if settings.target == "dense" else 1
    nbytes = run.hidden_bytes = int(sets * widening * numel * itemsize) // world
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
    settings, seqlen, tokenizer, sources = run.settings, run.settings.seqlen, run.tokenizer, run.sources
    count, width = sum(settings.extra_counts), distill.piece_length(seqlen)
    if settings.needs_calibration and isinstance(texts, torch.Tensor):
        run.calibration = begin(texts.to("cpu", copy=True), tokenizer, settings.bos)
        sources["calibration"] = {"dataset": settings.dataset, "tokens": streaming.digest(run.calibration)}
        run.further = run.calibration[torch.arange(count) % len(run.calibration)]
        begin(distill.pieces(run.further), tokenizer, settings.bos)
    elif settings.needs_calibration:
        draw = partial(calibration_samples, settings.dataset if texts is None else texts, tokenizer=tokenizer,
                       data_dir=settings.data_dir, bos=settings.bos)
        run.calibration, sources["calibration"] = draw(settings.nsamples, seqlen, settings.seed)
        run.further = run.calibration[:0]
        if count:  # in pieces, as many short ones differ more than a few long ones
            pieces, _ = draw(count * seqlen // width, width, f"{settings.seed}, further")
            run.further = pieces.view(count, seqlen)
    for name in settings.eval:
        segments, sources[name] = test_tokens(name, seqlen, tokenizer, settings.data_dir, settings.bos)
        run.tests[name] = segments[:settings.eval_limit]
    for tokens in filter(torch.is_tensor, (run.calibration, run.further, *run.tests.values())):
        if tokens.numel() and tokens.max() >= run.config.vocab_size:
            given = tokens is run.calibration and torch.is_tensor(texts)
            raise InputError(f"{'dataset: holds' if given else f'model {settings.model}: its tokenizer gives'} token "
                             f"{tokens.max()}, but the model's vocabulary has {run.config.vocab_size}")
    if not settings.tasks:
        return
    try:
        from mixgpt.evaluation import tasks  # lm-eval is an optional dependency
    except ImportError as error:
        raise InputError(f"--tasks: lm-eval cannot be used ({error}); pip install -r requirements-eval.txt") from error
    chosen = tasks.load(settings.tasks, settings.tasks_dir)
    tasks.check(chosen, tokenizer, load.size(run.config, run.dtype), run.device)
    run.score_tasks = lambda model, batch_size: tasks.score(
        chosen, model, tokenizer, batch_size * seqlen, run.device, settings.bos)


def open_run(run, stack, folder, command=None):
    """Open weights, W&B and the RunDir of --save, if given, of a `Run` on an ExitStack, and print the heading."""
    whole = None
    if run.model is None:
        whole = load.multimodal(run.settings.model)
        run.model = load.open_model(run.settings.model, run.config, run.dtype)
    run.files, run.record = folder, report.facts(run)
    if folder:
        run.record["identity"] = report.identity(run)
    elif run.selected and streaming.locations_of(run.model):  # pruned layers go to disk, like the dense ones
        nbytes = sum(tensor.nbytes for layer in decoder.layers_of(run.model) for tensor in layer.state_dict().values())
        nbytes *= 2 if run.settings.distill else 1
        path = None
        if distributed.rank() == 0:
            with writing(f"TMPDIR: {nbytes / 1e9:.3f} GB of pruned layers", "set it to another folder, or give --save"):
                path = stack.enter_context(tempfile.TemporaryDirectory(prefix="mixgpt"))
        if memory.room(tempfile.gettempdir())[1]:  # hidden states and layers share it
            nbytes += run.hidden_bytes * program.world("LOCAL_WORLD_SIZE")
        run.files = stack.enter_context(run_dir.RunDir(
            distributed.broadcast_object(path), nbytes=nbytes, place=f"TMPDIR {tempfile.gettempdir()}",
            advice="free some space, or set TMPDIR to a folder on a larger disk"))
    if run.files:
        run.files.open(run.model, run.record.get("identity", {}))
    notes, warnings = _plan(run)
    run.log("\n".join([report.heading(run, command, whole), *notes]))
    for warning in warnings:
        print(warning, flush=True)
    with run.clock.part("W&B"):
        run.tracker = stack.enter_context(tracking.Tracker(run.settings, run.record, run.method))
    distributed.prepared()


def _plan(run):
    """Decide whether the run distils, which needs room for all weights, and whether layers take one pass.

    Returns the lines that tell why, and those of them that a quiet run prints, too.
    """
    settings, device, notes, warnings = run.settings, run.device, [], []
    run.memory_plan = memory.MemoryPlan(settings.batch_size, on_host=not settings.calibrates,
                                        two_passes=not (settings.calibrates and settings.true_sequential))
    if run.uncalled and run.selected:
        notes.append(f"dense    {', '.join(run.uncalled)}: stay dense, as the layers do not call them as modules")
    if settings.dtype == "auto" and run.dtype == run.model.dtype:  # not that of a model in memory
        notes.append("dtype    float32: this device computes more slowly in the stored dtype; give --dtype to keep it")
    if settings.distill:
        streamed, tokens = run.distilling(run.memory_plan)
        run.distills = run.decided("distills", lambda: distill.room_for(streamed, tokens, settings.effort) > 0)
        if not run.distills:
            run.record["distilled"] = "no room"
            needed = sum(distill.training_bytes(streamed, tokens, settings.effort))
            warnings.append(f"distill  skipped: training all weights takes {needed / 1e9:.1f} GB, and "
                            f"{memory.free(device) / 1e9:.1f} GB are free on {device}")
    if run.selected and not run.memory_plan.two_passes and device.type == "cuda":
        notes.append(_plan_passes(run))
    elif run.selected:
        run.memory_plan = memory.MemoryPlan(**run.decided("memory_plan", lambda: asdict(run.memory_plan)))
    if settings.calibrates and device.type == "cuda" and (reason := columns.triton_obstacle(device)):
        notes.append(f"kernels  using the slower PyTorch implementation, as Triton is not available ({reason})")
    return notes, warnings


def _plan_passes(run):
    """Choose one pass through each layer, unless that does not fit on the GPU and two take less. Returns a line."""
    settings = run.settings
    count = -(-(len(run.calibration) + settings.extra_counts[0]) // distributed.world())
    one, two = calibration.pass_bytes(run.streamed(run.memory_plan), run.selected, (count, settings.seqlen),
                                      settings.target == "dense", settings.solver == "admm")
    free = min(distributed.all_gather_object(memory.free(run.device)))  # all processes decide alike
    run.memory_plan = memory.MemoryPlan(**run.decided("memory_plan", lambda: asdict(replace(
        run.memory_plan, two_passes=free < one > two, two_take_less=two < one))))
    passes, other = (two, one) if run.memory_plan.two_passes else (one, two)
    number, alternative = ("two passes", "one") if run.memory_plan.two_passes else ("one pass", "two")
    return (f"memory   {number} through each layer: about {passes / 1e9:.1f} of {free / 1e9:.1f} GB free on the GPU; "
            f"{alternative} would take {other / 1e9:.1f} GB")
