"""A run in progress: the opened model, where its results go, and what was decided on memory."""

import contextlib
import errno
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace

from mixgpt.app import report
from mixgpt.app.inputs import Inputs
from mixgpt.app.tracking import Tracker
from mixgpt.checkpoints import load
from mixgpt.checkpoints.layer_files import LayerFiles
from mixgpt.common import distributed, memory
from mixgpt.common.errors import InputError
from mixgpt.common.memory import MemoryPlan
from mixgpt.evaluation import semistructured
from mixgpt.kernels import columns
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.streaming import disk_weights
from mixgpt.pruning import calibration, distill
from modelutils import StreamedModel


@dataclass(kw_only=True)
class Run(Inputs):
    """A run in progress: its inputs and what it has beside them."""

    files: LayerFiles | None  # the RunDir of --save; else in a temporary folder, if the weights are on disk
    record: dict  # as in mixgpt.json, filled step by step
    tracker: Tracker | None = None
    memory_plan: MemoryPlan = field(init=False)  # of pruning
    distills: bool = False  # whether the pruned model is distilled at the end

    def __post_init__(self):
        one_pass = self.settings.calibrates and self.settings.true_sequential
        self.memory_plan = MemoryPlan(self.settings.batch_size, on_host=not self.settings.calibrates,
                                      two_passes=not one_pass)

    @property
    def distillation_tokens(self):
        """The further sequences (n, T) for distillation, cut into pieces (m, t)."""
        return distill.pieces(self.further[self.settings.extra_counts[0]:])

    def streamed(self, plan):
        """Return the model as it runs under a MemoryPlan."""
        return StreamedModel(self.model, self.device, plan.batch_size, self.clock, plan.on_host)

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


@contextlib.contextmanager
def opened(inputs, files, command=None):
    """Yield a `Run`: open the weights, start or resume the output folder and W&B, and print the heading.

    files: the RunDir of --save, if it is given. command: the command line, for the heading.
    """
    with contextlib.ExitStack() as stack, inputs.clock.part("load"):
        model = inputs.model
        if model is None:
            model = load.open_model(inputs.settings.model, inputs.config, inputs.dtype)
        record = report.facts(inputs, model.dtype)
        if files:
            record["identity"] = report.identity(inputs, model)
            files.open(model, record["identity"])
        elif inputs.selected and disk_weights(model):  # pruned layers go to disk, like the dense ones
            files = stack.enter_context(_temporary_files(stack, inputs, model))
            files.open(model)
        run = Run(**vars(inputs) | {"model": model}, files=files, record=record)
        run.log(report.heading(run, command, load.multimodal(inputs.settings.model) if inputs.model is None else None))
        with inputs.clock.part("W&B"):
            run.tracker = stack.enter_context(Tracker(inputs.settings, record))
        _plan(run)
        stack = stack.pop_all()
    with stack:
        yield run


def _temporary_files(stack, inputs, model):
    """Return LayerFiles in a temporary folder. Raises InputError if none has room for the pruned layers."""
    nbytes = sum(tensor.nbytes for layer in layers_of(model) for tensor in layer.state_dict().values())
    nbytes *= 2 if inputs.settings.distill else 1
    path = None
    if distributed.rank() == 0:
        try:
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="mixgpt"))
            if shutil.disk_usage(path).free < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(f"TMPDIR: {nbytes / 1e9:.3f} GB of pruned layers cannot be written to the folder for "
                             f"temporary files ({error.strerror}); set it to another one, or give --save") from error
    return LayerFiles(distributed.broadcast_object(path), f"TMPDIR {tempfile.gettempdir()}",
                      "free some space, or set TMPDIR to a folder on a larger disk")


def _plan(run):
    """Decide whether the run distils, and whether a layer is calibrated in one pass; print what the user should know.

    It distils if all weights can be trained at once on every device.
    """
    settings, device = run.settings, run.device
    if run.uncalled and run.selected:
        run.log(f"dense    {', '.join(run.uncalled)}: stay dense, as the layers do not call them as modules")
    if settings.dtype == "auto" and run.dtype != "auto":
        run.log("dtype    float32: this CPU computes more slowly in the stored dtype; give --dtype to keep it")
    if settings.distill:
        tokens = run.distillation_tokens
        streamed = distill.with_token_budget(run.streamed(run.memory_plan), tokens, run.seqlen)
        run.distills = run.decided("distills", lambda: min(distributed.all_gather_object(
            distill.room_for(streamed, tokens, settings.effort))) > 0)
        if not run.distills:
            run.record["distilled"] = "no room"
            run.log(f"distill  skipped: all weights cannot be trained at once in what is free on {device}")
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
    run.memory_plan = MemoryPlan(**run.decided("memory_plan", lambda: asdict(
        replace(run.memory_plan, two_passes=needed > free))))
    passes = ("two passes through each layer: one would take" if run.memory_plan.two_passes else
              "one pass through each layer takes")
    run.log(f"memory   {passes} about {needed / 1e9:.1f} of {free / 1e9:.1f} GB free on the GPU")
