"""What a run will take: memory and disk by the run's own formulas, and time by running it on a layer of each kind."""

import contextlib
import io
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from mixgpt.app.checks import saving_bytes
from mixgpt.app.run import Run
from mixgpt.checkpoints import load
from mixgpt.common import distributed, memory
from mixgpt.common.errors import InputError
from mixgpt.common.progress import table
from mixgpt.evaluation import measures, selfcheck
from mixgpt.modeling import decoder, experts
from mixgpt.modeling.placing import place_for
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import distill, needs

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
TEST_TOKENS = {"wikitext2": 330_000, "ptb": 110_000, "builtin": 25_000}  # about so many, by most tokenizers
SEQUENCES = 2  # calibration sequences for which a layer is timed
STEPS = 4  # steps of distillation that are timed
ONCE = ("factorisation", "rotation", "walk", "admm", "quantize", "magnitude", "rounding")  # parts without sequences
AMPLE = 2**60  # bytes of a host of which nothing is known
WORTH = 10**12  # weights times calibration tokens from which on a run says how long it will take


@dataclass(frozen=True)
class Machine:
    """Where a run is to take place."""

    device: torch.device
    free: Callable[[torch.device], float]  # like `memory.free`

    @classmethod
    def of(cls, run: Run) -> "Machine":
        """Return this machine, or with --device-memory one of which nothing else is known."""
        if not (given := run.settings.device_memory):
            return cls(run.device, memory.free)
        parsed = re.fullmatch(r"(\d+\.?\d*) ?([KMGT])i?B?", given.strip(), re.IGNORECASE)
        if not parsed:
            raise InputError(f"--device-memory {given}: must be a number with its unit, such as 24GB")
        free = memory.USABLE * float(parsed[1]) * UNITS[parsed[2].upper()]
        return cls(torch.device("cuda"), lambda device: free if device.type == "cuda" else AMPLE)


@dataclass(frozen=True)
class Need:
    """The bytes that a stage takes, beside the program itself."""

    stage: str
    device: float  # of a GPU; 0 without one
    host: float
    disk: float  # of hidden states for which memory has no room


def training_need(run: Run, machine: Machine) -> float:
    """Return the bytes that distillation takes on the device, with as many sequences in a batch as there is room for.

    Also decides whether the run distils, as `distill.room_for` does.
    """
    settings = run.settings
    run.further = torch.empty(sum(settings.extra_counts), settings.seqlen, dtype=torch.long, device="meta")
    streamed, pieces = run.distilling(memory.MemoryPlan(settings.batch_size))
    streamed = replace(streamed, device=machine.device)
    fixed, sequence = distill.training_bytes(streamed, pieces, settings.effort)
    most = min(streamed.batch_size, distill.per_step(pieces, settings.effort))
    room = min(most, int((machine.free(machine.device) - fixed) / sequence))
    run.distills = room > 0
    return fixed + max(room, 1) * sequence


def memory_needs(run: Run, machine: Machine) -> list[Need]:
    """Return what each stage takes."""
    settings, model, T, world = run.settings, run.model, run.settings.seqlen, distributed.world()
    streamed = StreamedModel(model, machine.device, settings.batch_size)
    layer, rest, V = needs.layer_bytes(model), needs.rest_bytes(model), run.config.get_text_config().vocab_size
    training = training_need(run, machine) if settings.distill else 0
    trained = settings.extra_counts[1] * T // world * run.token_bytes * run.distills  # states of these tokens

    def need(stage: str, device: float, host: float, states: float) -> Need:
        place = place_for(states, machine.device, free=machine.free)
        device, host = device + states * (place == "device"), host + states * (place == "host")
        on_gpu = machine.device.type == "cuda"
        return Need(stage, device * on_gpu, host + device * (not on_gpu), states * (place == "disk"))

    def forward(stage: str, tokens: int, host: float = 0) -> Need:
        head = rest + needs.head_bytes(streamed, T, V, 1)
        return need(stage, max(layer + needs.batch_bytes(streamed, T), head), layer + host,
                    tokens // world * run.token_bytes)

    def of(stage: str) -> Need:
        if stage in ("dense model", "evaluation"):
            return forward(stage, sum(test_tokens(run)))
        if stage == "reference":
            return forward(stage, settings.extra_counts[1] * T, trained)
        if stage == "experts":
            return forward(stage, settings.nsamples * T)
        if stage in ("sensitivity", "gradients"):
            count, kinds = (settings.nsamples, 2) if stage == "sensitivity" else (-(-settings.nsamples // 2), 1)
            _, place, borders = needs.chunk(streamed, -(-count // world), T, kinds, free=machine.free)
            borders //= kinds if settings.sensitivity == "fisher" else 1  # it keeps no tangents
            narrow = min(V, distill.VOCABULARY) if run.distills else V
            work = max(layer + needs.batch_bytes(streamed, T, gradients=True),
                       rest + needs.head_bytes(streamed, T, narrow, 2))
            return need(stage, work + borders * (place == "device"), trained + layer + borders * (place == "host"), 0)
        if stage == "distillation":
            return need(stage, training, trained + layer, 0)
        if stage == "saving":
            return need(stage, 0, saving_bytes(load.size(run.config, run.dtype), settings.save_format), 0)
        if not settings.calibrates:
            return need(stage, 5 * layer, layer, 0)
        count = -(-(settings.nsamples + settings.extra_counts[0]) // world)
        one, two = needs.pass_bytes(streamed, run.selected, (count, T), settings.target == "dense",
                                    settings.solver == "admm")
        two_passes = not settings.true_sequential or machine.free(machine.device) < one > two
        states = (1 + (settings.target == "dense")) * count * T * run.token_bytes
        return need(stage, max((two if two_passes else one) - states, 0), trained + layer, states)

    return [of(stage) for stage in run.stages]


def test_tokens(run: Run) -> list[int]:
    """Return about how many tokens of each test set are evaluated."""
    settings = run.settings
    sizes = [256 * settings.seqlen if name == "c4" else os.path.getsize(name) // 4 if os.path.isfile(name)
             else TEST_TOKENS.get(name, TEST_TOKENS["wikitext2"]) for name in settings.eval]
    return [min(size, (settings.eval_limit or size) * settings.seqlen) for size in sizes]


def seconds(run: Run, execute: Callable) -> dict[str, float]:
    """Estimate the seconds of each stage, by executing the run on a model of one layer of each kind, and little text.

    What this takes is multiplied by the weights in layers and by the number of sequences; the head, of which there is
    one however many layers there are, is timed alone. execute: `pipeline.execute`.
    """
    settings, T, layers = run.settings, run.settings.seqlen, decoder.layers_of(run.model)
    with torch.random.fork_rng(devices=[]):
        config, dtype = one_of_each(run.config, layers), run.model.dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    experts.use_linears(model)
    few, pieces = min(SEQUENCES, settings.nsamples), distill.pieces(run.further[settings.extra_counts[0]:])
    tokens = torch.arange(few * T).remainder(run.config.get_text_config().vocab_size).view(few, T)
    step = distill.per_step(pieces, settings.effort) * pieces.shape[1] / T if run.distills else 0
    trained = min(STEPS * step, settings.extra_counts[1])  # sequences that are distilled here
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        parts = execute(replace(
            settings, nsamples=few, distill=trained / few, eval=(), tasks=(), tasks_dir=None, dense=False,
            effort=STEPS / distill.STEPS if settings.preset == "best" else 1.0, minlayer=0, maxlayer=len(layers),
            dtype="auto", save=None, save_format="dense", resume=False, plot=None, record=None, log_wandb=False,
            wandb_project=None, wandb_name=None, wandb_group=None, quiet=True, dry_run=False, device_memory=None,
            sensitivity_file=f"{folder}/traces.json"), None, model, run.tokenizer, tokens)["seconds"]
    streamed = StreamedModel(model.to("cpu"), run.device, settings.batch_size)
    start = time.perf_counter()
    measures.perplexities(model, {"": tokens}, settings.batch_size, run.device)
    evaluation = time.perf_counter() - start
    loss, divergence = head_seconds(streamed, tokens[:1], run.distills)
    depth = sum(weight.numel() for layer in layers for weight in layer.parameters()) / sum(
        weight.numel() for layer in streamed.layers for weight in layer.parameters())
    more = settings.nsamples / few  # times as many sequences

    def scaled(part: float, head: float, times: float) -> float:
        """Return the seconds of a whole stage. head: the seconds of the head in `part`."""
        return (max(part - head, 0) * depth + head) * times

    once = sum(parts.get(part, 0) for part in ONCE)
    each = sum(parts.get(part, 0) for part in ("forward", "Hessian"))
    pruning = depth * (once + more * each)
    tests, training = sum(test_tokens(run)) / tokens.numel(), trained * T * divergence
    of_stage = {
        "dense model": scaled(evaluation, loss * tokens.numel(), tests),
        "sensitivity": scaled(parts.get("sensitivity", 0), divergence * tokens.numel(), more * settings.nprobes),
        "gradients": scaled(parts.get("gradients", 0), divergence * tokens.numel() / 2, more),
        "experts": scaled(parts.get("experts", 0), 0, more),
        "pruning": pruning, "rounding": pruning, "quantization": pruning - depth * parts.get("admm", 0),
        "distillation": scaled(parts.get("distillation", 0), training, settings.extra_counts[1] / (trained or 1))}
    of_stage["evaluation"] = of_stage["dense model"]
    return {stage: of_stage.get(stage, 0) for stage in run.stages}


def one_of_each(config: PretrainedConfig, layers: torch.nn.ModuleList) -> PretrainedConfig:
    """Return a copy of a configuration with as few layers as show each kind: one of each where they differ in lists."""
    config = selfcheck.with_few_layers(config, layers, 1)
    count = config.num_hidden_layers
    lists = {key: value for key, value in config.to_dict().items() if isinstance(value, list) and len(value) == count}
    entries = [str([value[index] for value in lists.values()]) for index in range(count)]
    chosen = [entries.index(entry) for entry in dict.fromkeys(entries)]
    if len({str(layer) for layer in layers[:count]}) == 1:
        for key, value in lists.items():
            setattr(config, key, [value[index] for index in chosen])
        config.num_hidden_layers = len(chosen)
    return config


def head_seconds(streamed: StreamedModel, tokens: torch.Tensor, narrow: bool) -> tuple[float, float]:
    """Return the seconds that the head takes for a token in evaluation, and in distillation or for a gradient.

    tokens: (1, T). narrow: whether the vocabulary is narrowed as for distillation.
    """
    stream, V = streamed.embed(tokens), streamed.model.config.get_text_config().vocab_size
    vocabulary = torch.arange(distill.VOCABULARY) if narrow and V > distill.VOCABULARY else None
    hidden, labels = stream.hidden[0, :, :stream.channels].to(stream.device), tokens[0].to(stream.device)
    labels = labels.clamp(max=distill.VOCABULARY - 1) if vocabulary is not None else labels
    taken = []
    for kind, compute in ((None, lambda head: measures.negative_log_likelihood(head, stream, tokens)),
                          (vocabulary, lambda head: distill.divergence_of(head, hidden, hidden, labels)[0].item())):
        with stream.head(streamed.model, vocabulary=kind) as head:
            compute(head)  # first, to warm up
            start = time.perf_counter()
            compute(head)
            taken.append((time.perf_counter() - start) / tokens.numel())
    return taken[0], taken[1]


def text(run: Run, execute: Callable) -> str:
    """Return what a dry run prints: needs against what is free, whether it distils, and time."""
    machine, settings = Machine.of(run), run.settings
    rows, elsewhere = memory_needs(run, machine), settings.device_memory is not None
    times = {} if elsewhere or distributed.world() > 1 else seconds(run, execute)
    places = ("device", "host", "disk")
    most = [max((getattr(row, place) for row in rows), default=0) for place in places]
    free = [machine.free(machine.device) if machine.device.type == "cuda" else 0,
            *(["?", "?"] if elsewhere else [memory.free_on_host(), memory.room(tempfile.gettempdir())[0]])]
    cells = [[row.stage, *(gigabytes(getattr(row, place)) for place in places),
              duration(times[row.stage]) if times else ""] for row in rows]
    cells += [["at most", *map(gigabytes, most), duration(sum(times.values())) if times else ""],
              ["free", *map(gigabytes, free), ""]]
    model, size = run.model, load.size(run.config, run.dtype)
    lines = [f"model    {settings.model}: {model.num_parameters():,} parameters, {gigabytes(size)} GB in "
             f"{str(model.dtype).removeprefix('torch.')}",
             f"method   {run.method}", "", table(["GB beside the program", "GPU", "host", "TMPDIR", "time"], cells), "",
             f"program  {gigabytes(psutil.Process().memory_info().rss)} GB of the host's memory"]
    if settings.distill:
        lines.append("distill  yes" if run.distills else
                     f"distill  no: needs {gigabytes(training_need(run, machine))} GB on {machine.device}, which has "
                     f"{gigabytes(machine.free(machine.device))} GB free")
    disk, folder = run.disk_bytes, settings.save or tempfile.gettempdir()
    free_there = "" if elsewhere else f"; {gigabytes(memory.room(folder)[0])} GB are free"
    lines.append(f"disk     {gigabytes(disk)} GB in {folder}{free_there}")
    return "\n".join(lines)


def gigabytes(nbytes: float | str) -> str:
    """Return bytes as GB with as many digits as matter."""
    return nbytes if isinstance(nbytes, str) else f"{nbytes / 1e9:.2f}" if nbytes < 1e10 else f"{nbytes / 1e9:.0f}"


def duration(seconds: float) -> str:
    """Return a time as a reader says it: 40 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else (
        f"{seconds / 3600:.1f} h")


def announce(run: Run, execute: Callable) -> None:
    """Print how long a long run will take, stage by stage."""
    settings = run.settings
    sequences = (settings.nsamples + sum(settings.extra_counts)) * settings.needs_calibration
    work = run.model.num_parameters() * (sequences * settings.seqlen + sum(test_tokens(run)))
    if settings.quiet or distributed.world() > 1 or work < WORTH:
        return
    times = seconds(run, execute)
    parts = ", ".join(f"{stage} {duration(time)}" for stage, time in times.items() if time >= 1)
    run.log(f"time     about {duration(sum(times.values()))} ({parts})")
