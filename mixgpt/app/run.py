"""A run in progress: the opened model, where its results go, and what was decided on memory."""

import tempfile
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from mixgpt.app import report, tracking
from mixgpt.app.settings import Settings
from mixgpt.checkpoints import load, run_dir
from mixgpt.common import distributed, memory, runtime
from mixgpt.common.files import writing
from mixgpt.evaluation import semistructured
from mixgpt.kernels import columns
from mixgpt.modeling import decoder, streaming
from mixgpt.pruning import calibration, distill
from modelutils import StreamedModel


@dataclass
class Run:
    """A run in progress: its inputs, and what it has beside them.

    Those from `calibration` on are empty until `inputs.read_texts`, those from `files` on until `open_run`.
    """

    settings: Settings  # with what "auto" in --bos stands for
    device: torch.device
    clock: runtime.Clock
    config: Any  # of transformers
    seqlen: int
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
        size = plan.batch_size * (self.seqlen // tokens.shape[1])
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
        run.files = stack.enter_context(_temporary_folder(stack, run))
    if run.files:
        run.files.open(run.model, run.record.get("identity", {}))
    run.log(report.heading(run, command, whole))
    with run.clock.part("W&B"):
        run.tracker = stack.enter_context(tracking.Tracker(run.settings, run.record))
    _plan(run)


def _temporary_folder(stack, run):
    """Return a RunDir in a temporary folder. Raises InputError if none has room for the pruned layers."""
    nbytes = sum(tensor.nbytes for layer in decoder.layers_of(run.model) for tensor in layer.state_dict().values())
    nbytes *= 2 if run.settings.distill else 1
    path = None
    if distributed.rank() == 0:
        with writing(f"TMPDIR: {nbytes / 1e9:.3f} GB of pruned layers", "set it to another folder, or give --save"):
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="mixgpt"))
    return run_dir.RunDir(distributed.broadcast_object(path), nbytes=nbytes, place=f"TMPDIR {tempfile.gettempdir()}",
                          advice="free some space, or set TMPDIR to a folder on a larger disk")


def _plan(run):
    """Decide whether the run distils, which needs room for all weights, and whether layers take one pass; tell why."""
    settings, device = run.settings, run.device
    run.memory_plan = memory.MemoryPlan(settings.batch_size, on_host=not settings.calibrates,
                                        two_passes=not (settings.calibrates and settings.true_sequential))
    if run.uncalled and run.selected:
        run.log(f"dense    {', '.join(run.uncalled)}: stay dense, as the layers do not call them as modules")
    if settings.dtype == "auto" and run.dtype == run.model.dtype:  # not that of a model in memory
        run.log("dtype    float32: this CPU computes more slowly in the stored dtype; give --dtype to keep it")
    if settings.distill:
        streamed, tokens = run.distilling(run.memory_plan)
        run.distills = run.decided("distills", lambda: distill.room_for(streamed, tokens, settings.effort) > 0)
        if not run.distills:
            run.record["distilled"] = "no room"
            print(f"distill  skipped: all weights cannot be trained at once in what is free on {device}", flush=True)
    if run.selected and not run.memory_plan.two_passes and device.type == "cuda":
        _plan_passes(run)
    if settings.calibrates and device.type == "cuda" and (reason := columns.triton_obstacle(device)):
        run.log(f"kernels  using the slower PyTorch implementation, as Triton is not available ({reason})")
    if settings.semi_structured and (reason := semistructured.obstacle(device, run.model.dtype)):
        run.record["semi_structured"] = {"skipped": reason}
        run.log(f"kernels  --semi-structured is skipped: {reason}")


def _plan_passes(run):
    """Calibrate each layer in one pass if the activations of all sequences inside it fit on the GPU."""
    settings = run.settings
    count = -(-(len(run.calibration) + settings.extra_counts[0]) // distributed.world())
    needed = calibration.one_pass_bytes(run.streamed(run.memory_plan), run.selected, (count, run.seqlen),
                                        settings.target == "dense", settings.solver == "admm")
    free = min(distributed.all_gather_object(memory.free(run.device)))  # all processes decide alike
    run.memory_plan = memory.MemoryPlan(**run.decided("memory_plan", lambda: asdict(
        replace(run.memory_plan, two_passes=needed > free))))
    passes = ("two passes through each layer: one would take" if run.memory_plan.two_passes else
              "one pass through each layer takes")
    run.log(f"memory   {passes} about {needed / 1e9:.1f} of {free / 1e9:.1f} GB free on the GPU")
