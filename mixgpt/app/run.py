"""A run in progress: the opened model, where its results go, and what was decided on memory."""

import contextlib
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mixgpt.app import records
from mixgpt.app.inputs import Inputs, distillation_windows
from mixgpt.app.report import heading
from mixgpt.app.tracking import Tracker
from mixgpt.checkpoints import load
from mixgpt.checkpoints.layer_files import LayerFiles
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import distributed, memory
from mixgpt.common.errors import InputError
from mixgpt.common.memory import MemoryPlan
from mixgpt.evaluation import semistructured
from mixgpt.kernels import columns
from mixgpt.modeling.streaming import disk_weights
from mixgpt.pruning import calibration, distill
from modelutils import StreamedModel


@dataclass
class Run:
    """A run in progress."""

    inputs: Inputs
    model: Any
    run_dir: RunDir | None  # with --save
    layer_files: LayerFiles | None  # with --save, or if the weights are on disk
    record: dict  # as in mixgpt.json, filled step by step
    tracker: Tracker | None = None
    memory_plan: MemoryPlan = field(init=False)  # of pruning
    distills: bool = False  # whether the pruned model is distilled at the end

    def __post_init__(self):
        one_pass = self.settings.calibrates and self.settings.true_sequential
        self.memory_plan = MemoryPlan(self.settings.batch_size, on_host=not self.settings.calibrates,
                                      two_passes=not one_pass)

    @property
    def settings(self):
        return self.inputs.settings

    @property
    def clock(self):
        return self.inputs.clock

    @property
    def on_disk(self):
        """Whether the weights stay on disk, so that a failed step can restart."""
        return disk_weights(self.model) is not None

    @property
    def synthetic_counts(self):
        """The numbers of synthetic sequences for the Hessians, and for distillation."""
        return self.settings.synthetic_counts(self.distills)

    def streamed(self, plan):
        """Return the model as it runs under a MemoryPlan."""
        return StreamedModel(self.model, self.inputs.family, self.inputs.device, plan.batch_size, self.clock,
                             plan.on_host)

    def kept(self, name, make):
        """Return make(), or what an interrupted run has kept of it; see `RunDir.kept`."""
        return self.run_dir.kept(name, make) if self.run_dir else make()

    def decided(self, name, choose):
        """Return the JSON-able choose(), or what it was in the interrupted run."""
        return self.kept(name, lambda: (choose(), {}))[0]

    def log(self, text):
        """Print text unless the run is quiet."""
        if not self.settings.quiet:
            print(text, flush=True)


@contextlib.contextmanager
def opened(inputs, run_dir, command=None):
    """Yield a `Run`: open the weights, start or resume the output folder and W&B, and print the heading.

    command: the command line, for the heading.
    """
    settings, family = inputs.settings, inputs.family
    with contextlib.ExitStack() as stack, inputs.clock.part("load"):
        model = inputs.model
        if model is None:
            model = load.open_model(settings.model, inputs.config, family, inputs.dtype)
        record = records.facts(settings, inputs.seqlen, model.dtype, inputs.device, inputs.sources)
        layer_files = run_dir
        if run_dir:
            record["identity"] = records.identity(
                records.asked(settings, inputs.seqlen, inputs.device), model, inputs.calibration)
            run_dir.open(model, family, record["identity"])
        elif inputs.selected and disk_weights(model):  # pruned layers go to disk, like the dense ones
            layer_files = stack.enter_context(_temporary_files(stack, inputs, model))
            layer_files.open(model, family)
        run = Run(inputs, model, run_dir, layer_files, record)
        run.log(heading(inputs, model, record["versions"], command))
        with inputs.clock.part("W&B"):
            run.tracker = stack.enter_context(_tracker(settings, record))
        _plan(run)
        stack = stack.pop_all()
    with stack:
        yield run


def _temporary_files(stack, inputs, model):
    """Return LayerFiles in a temporary folder. Raises InputError if none has room for the pruned layers."""
    layers = inputs.family.layers_of(model)
    if inputs.settings.calibrates:
        layers = layers[:max(index for index, _ in inputs.selected) + 1]
    nbytes = sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    needed = 2 * nbytes if inputs.settings.distill else nbytes
    path = None
    if distributed.rank() == 0:
        try:
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="mixgpt"))
            free = shutil.disk_usage(path).free
        except OSError as error:
            raise InputError("TMPDIR: no folder for temporary files can be written; set it to one, or give --save"
                             ) from error
        if free < needed:
            raise InputError(f"TMPDIR {tempfile.gettempdir()}: pruned layers need {needed / 1e9:.3f} GB, "
                             f"{free / 1e9:.3f} GB are free; set it to a folder on a larger disk, or give --save")
    return LayerFiles(distributed.broadcast_object(path), f"TMPDIR {tempfile.gettempdir()}",
                      "free some space, or set TMPDIR to a folder on a larger disk")


def _tracker(settings, record):
    """Return a W&B tracker, active only if requested and only in the first process."""
    config = {**record["settings"], **record, "method": settings.method if settings.compresses else "dense"}
    return Tracker(config if settings.log_wandb and distributed.rank() == 0 else None, settings.wandb_project,
                   settings.wandb_name, settings.wandb_group)


def _plan(run):
    """Decide whether the run distils, and whether a layer is calibrated in one pass; print what the user should know.
    """
    settings, inputs, on_gpu = run.settings, run.inputs, run.inputs.device.type == "cuda"
    if settings.dtype == "auto" and inputs.dtype != "auto":
        run.log("dtype    float32: this CPU computes more slowly in the stored dtype; give --dtype to keep it")
    if run.tracker.place:
        run.log(f"W&B      {run.tracker.place}")
    if settings.distill:
        _plan_distillation(run)
    if inputs.selected and not run.memory_plan.two_passes and on_gpu:
        _plan_passes(run)
    if settings.calibrates and on_gpu and (reason := columns.triton_obstacle(inputs.device)):
        run.log(f"kernels  using the slower PyTorch implementation, as Triton is not available ({reason})")
    if settings.semi_structured and (reason := semistructured.obstacle(inputs.device, run.model.dtype)):
        run.record["semi_structured"] = {"skipped": reason}
        run.log(f"kernels  --semi-structured is skipped: {reason}")


def _plan_distillation(run):
    """Distil at the end only if all weights can be trained at once on every device."""
    tokens = distillation_windows(run.settings, run.inputs.seqlen)
    streamed = distill.with_token_budget(run.streamed(run.memory_plan), tokens, run.inputs.seqlen)
    run.distills = run.decided("distills", lambda: min(distributed.all_gather_object(
        distill.room_for(streamed, tokens))) > 0)
    if not run.distills:
        run.record["distilled"] = "no room"
        run.log(f"distill  skipped: all weights cannot be trained at once in what is free on {run.inputs.device}")


def _plan_passes(run):
    """Calibrate each layer in one pass if the activations of all sequences inside it fit on the GPU."""
    settings, inputs = run.settings, run.inputs
    count = -(-(len(inputs.calibration) + run.synthetic_counts[0]) // distributed.world())
    needed = calibration.one_pass_bytes(run.streamed(run.memory_plan), inputs.selected, (count, inputs.seqlen),
                                        settings.target == "dense", settings.solver == "admm")
    free = min(distributed.all_gather_object(memory.free(inputs.device)))  # all processes decide alike
    run.memory_plan = MemoryPlan(**run.decided("memory_plan", lambda: asdict(
        replace(run.memory_plan, two_passes=needed > free))))
    passes = ("two passes through each layer: one would take" if run.memory_plan.two_passes else
              "one pass through each layer takes")
    run.log(f"memory   {passes} about {needed / 1e9:.1f} of {free / 1e9:.1f} GB free on the GPU")
