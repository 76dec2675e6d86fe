"""What a run will take: memory and disk by the run's own formulas, and time by running it on a layer of each kind."""

import contextlib
import io
import math
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from mixgpt.app.allocating import with_gradients
from mixgpt.app.checks import saving_bytes
from mixgpt.app.run import Run
from mixgpt.checkpoints import card, load
from mixgpt.common import choices, distributed, errors, memory, progress, runtime
from mixgpt.common.errors import InputError
from mixgpt.datautils import OWN_TOKENS
from mixgpt.evaluation import distance, measures, own_text, selfcheck
from mixgpt.modeling import decoder, experts
from mixgpt.modeling.placing import in_turn, place_for, whole
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import distill, needs, training

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
# Those of most tokenizers.
TEST_TOKENS = {"wikitext2": 330_000, "ptb": 110_000, "builtin": 25_000, "code": 190_000, "self": OWN_TOKENS}
SEQUENCES = 2  # A layer is timed with so many calibration sequences.
ENOUGH = 2048  # On fewer tokens, what evaluation begins with takes longer than a layer.
TIMED = 8  # So many tokens of the model's own text are timed.
STEPS = 4  # So many steps of distillation are timed.
ONCE = ("allocation", "factorisation", "rotation", "quantize", "magnitude", "rounding")  # These read no sequences.
WORTH = 10**12  # A run of more weights times calibration tokens says how long it will take.


class Need(NamedTuple):
    """The bytes that a stage takes, beside the program itself."""

    stage: str
    device: float  # It is 0 without a GPU.
    host: float
    disk: float  # Hidden states go there where memory has no room.


def machine_of(run: Run) -> tuple[torch.device, Callable[[torch.device], int]]:
    """Return the device of a run and a function like `memory.free`: of this machine, or as --device-memory says."""
    if not (given := run.settings.device_memory):
        return run.device, memory.free
    parsed = re.fullmatch(r"(\d+\.?\d*) ?([KMGT])i?B?", given.strip(), re.IGNORECASE)
    if not parsed:
        raise InputError(f"--device-memory {given}: must be a number with its unit, such as 24GB")
    free = int(memory.USABLE * float(parsed[1]) * UNITS[parsed[2].upper()])
    return torch.device("cuda"), lambda device: free if device.type == "cuda" else sys.maxsize


def training_need(run: Run) -> needs.Taken:
    """Return the bytes that distillation takes in the fastest way that fits, or else in the one that takes least.

    Also decides whether and how the run distils.
    """
    settings, (device, free) = run.settings, machine_of(run)
    run.further = torch.empty(sum(settings.extra_counts), run.seqlen, dtype=torch.long, device="meta")
    streamed, pieces = run.distilling(memory.MemoryPlan(settings.batch_size))
    streamed = replace(streamed, device=device)
    disk = sys.maxsize if settings.device_memory else run.disk_left
    run.ways = distill.ways(streamed, pieces, settings.effort, disk, free)
    return distill.training_bytes(streamed, pieces, settings.effort, run.ways[0] if run.ways else replace(
        needs.WAYS[-1], batch_size=1))


def memory_needs(run: Run) -> list[Need]:
    """Return what each stage takes."""
    settings, T, world, (device, free), rows = run.settings, run.seqlen, distributed.world(), machine_of(run), []
    streamed, V = StreamedModel(run.model, device, settings.batch_size), run.config.get_text_config().vocab_size
    layer, rest = needs.layer_bytes(run.model), needs.rest_bytes(run.model)
    distilled, distilling = settings.extra_counts[1] * T, training_need(run) if settings.distill else needs.Taken(0)
    trained = distilled // world * run.token_bytes * run.distills  # The dense model's states wait until they are used.
    tested, compared = sum(test_tokens(run)), 0.0
    if settings.dense and settings.method() != "dense":
        compared = sum(min(count, distance.TOKENS) for count in test_tokens(run)) // world * run.token_bytes
    read = {"dense model": tested, "evaluation": tested, "reference": distilled, "experts": settings.nsamples * T}
    for stage in run.stages:
        work, host, states, disk = 0.0, layer + trained + compared, 0.0, 0.0
        if stage in read:
            # Compared are the logits of two models, and of the dense one again in a dtype that may be twice as wide.
            wider = 4 / run.model.dtype.itemsize if compared and stage == "dense model" else 1
            head = wider * rest + needs.head_bytes(streamed, T, V, math.ceil(wider * (1 + (compared > 0))))
            work = max(wider * layer + needs.batch_bytes(streamed, T), head)
            host, states = layer + compared + trained * (stage == "reference"), read[stage] // world * run.token_bytes
        elif stage in ("sensitivity", "gradients"):
            count, kinds = (settings.nsamples, 2) if stage == "sensitivity" else (
                len(with_gradients(settings.nsamples, T)), 1)
            _, place, borders = needs.chunk(streamed, -(-count // world), T, kinds, free=free)
            borders //= kinds if settings.sensitivity == "fisher" else 1  # Fisher keeps no tangents.
            narrow = min(V, distill.VOCABULARY) if run.distills else V
            work = borders * (place == "device") + max(layer + needs.batch_bytes(streamed, T, gradients=True),
                                                       rest + needs.head_bytes(streamed, T, narrow, 2))
            host += borders * (place == "host")
        elif stage == "own text":
            weights, piece = needs.writing_bytes(run.model, own_text.PIECE, device)
            pieces = min(own_text.rows_at_once(run.model, device, free), max(pieces_of(run)))
            work = weights + piece * pieces if pieces else 0.0  # Without room, other text takes its place.
        elif stage == "distillation":
            work, host, disk = distilling.device, trained + compared + distilling.host, distilling.disk
        elif stage == "saving":
            host = saving_bytes(load.size(run.config, run.dtype), settings.save_format)
        elif not settings.calibrates:
            work = 5 * layer
        else:
            count = -(-(settings.nsamples + settings.extra_counts[0]) // world)
            one, two = needs.pass_bytes(streamed, run.selected, (count, T), settings.target == "dense",
                                        settings.solver == "admm")
            two_passes = not settings.true_sequential or free(device) < one > two
            states = (1 + (settings.target == "dense")) * count * T * run.token_bytes
            work = max((two if two_passes else one) - states, 0)
        place = place_for(states, device, free=free)
        work, host = work + states * (place == "device"), host + states * (place == "host")
        on_gpu = device.type == "cuda"
        rows.append(Need(stage, work * on_gpu, host + work * (not on_gpu), disk + states * (place == "disk")))
    return rows


def pieces_of(run: Run) -> list[int]:
    """Return how many pieces the dense model writes of each text of its own."""
    return [-(-count // own_text.PIECE) for count in run.own_tokens.values()]


def test_tokens(run: Run) -> list[int]:
    """Return how many tokens of each test set are evaluated, about so many if they have not been read yet."""
    if run.tests:
        return [tokens.numel() for tokens in run.tests.values()]
    sizes = [256 * run.seqlen if name == "c4" else os.path.getsize(name) // 4 if os.path.isfile(name)
             else TEST_TOKENS.get(name, TEST_TOKENS["wikitext2"]) for name in run.settings.eval]
    return [min(size, (run.settings.eval_limit or size) * run.seqlen) for size in sizes]


def seconds(run: Run, execute: Callable) -> dict[str, float]:
    """Estimate the seconds of each stage, by executing the run on a model of one layer of each kind, and little text.

    What this takes is multiplied by the weights in layers and by the number of sequences; the head, of which there is
    one however many layers there are, is timed alone. execute: `pipeline.execute`.
    """
    settings, T, layers = run.settings, run.seqlen, decoder.layers_of(run.model)
    with torch.random.fork_rng(devices=[]):
        config, dtype = one_of_each(run.config, layers), run.model.dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    experts.use_linears(model)
    few, step, trained = min(SEQUENCES, settings.nsamples), 0.0, 0.0
    tokens = torch.arange(few * T).remainder(run.config.get_text_config().vocab_size).view(few, T)
    if run.distills:
        pieces = distill.pieces(run.further[settings.extra_counts[0]:])
        step = distill.per_step(pieces, settings.effort) * pieces.shape[1] / T
        trained = min(STEPS * step, settings.extra_counts[1])  # So many sequences are distilled here.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        short = replace(
            settings, nsamples=few, distill=trained / few, eval=(), tasks=(), tasks_dir=None, dense=False,
            effort=STEPS / distill.STEPS if settings.preset == "best" else 1.0, minlayer=0, maxlayer=len(layers),
            dtype="auto", save=None, save_format="dense", resume=False, plot=None, record=None, log_wandb=False,
            wandb_project=None, wandb_name=None, wandb_group=None, quiet=True, dry_run=False, device_memory=None)
        for turn in ("first", "second"):  # Kernels are compiled and caches filled in the first turn.
            own = replace(short, sensitivity_file=f"{folder}/{turn}.json")
            parts = execute(own, None, model, run.tokenizer, tokens)["seconds"]
    streamed = StreamedModel(model.to("cpu"), run.device, settings.batch_size)
    tested = tokens.repeat(max(ENOUGH // tokens.numel(), 1), 1)
    layers_take, loss, divergence = layers_and_head(streamed, tested, run.distills)
    written = pieces_of(run)
    rows = min(max(written, default=0), own_text.TOGETHER)
    token, of_layers = seconds_of_a_token(streamed, rows) if rows else (0.0, 0.0)
    depth = sum(weight.numel() for layer in layers for weight in layer.parameters()) / sum(
        weight.numel() for layer in streamed.layers for weight in layer.parameters())
    more, size, some = settings.nsamples / few, tokens.numel(), len(with_gradients(few, T))

    def scaled(part: float, head: float, times: float) -> float:
        """Return the seconds of a whole stage, of which `head` are the head's in `part`."""
        return (max(part - head, 0) * depth + head) * times

    took = defaultdict(float, parts)
    solving = took[choices.SOLVERS[settings.solver].load().__name__]
    pruning = depth * (solving + sum(took[part] for part in ONCE) + more * (took["forward"] + took["Hessian"]))
    tests = sum(test_tokens(run)) * (depth * layers_take + loss)
    of_stage = {
        "own text": (token + (depth - 1) * of_layers) * (own_text.PIECE - 1) * sum(
            -(-pieces // own_text.TOGETHER) for pieces in written),
        "dense model": tests, "evaluation": tests, "experts": scaled(took["experts"], 0, more),
        "sensitivity": scaled(took["sensitivity"], divergence * size, more * settings.nprobes),
        "gradients": scaled(took["gradients"], divergence * T * some, len(with_gradients(settings.nsamples, T)) / some),
        "pruning": pruning, "rounding": pruning, "quantization": pruning - depth * solving,
        # Distillation takes its first step twice.
        "distillation": scaled(took["distillation"], divergence * (step + trained) * T,
                               (step + settings.extra_counts[1]) / (step + trained or 1))}
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


@torch.no_grad()
def layers_and_head(streamed: StreamedModel, tokens: torch.Tensor, narrow: bool) -> tuple[float, float, float]:
    """Return seconds a token: of all layers, of the head in evaluation, and of the head in distillation or a gradient.

    tokens: (N, T). narrow: whether the vocabulary is narrowed as for distillation.
    """
    stream, V = streamed.embed(tokens), streamed.model.config.get_text_config().vocab_size
    vocabulary = torch.arange(distill.VOCABULARY) if narrow and V > distill.VOCABULARY else None
    hidden, labels = stream.hidden[0, :, :stream.channels].to(stream.device), tokens[0].to(stream.device)
    labels = labels.clamp(max=distill.VOCABULARY - 1) if vocabulary is not None else labels

    def timed(compute: Callable[[], object], count: int) -> float:
        compute()  # The first time is slower.
        clock = runtime.Clock(stream.device)
        with clock.part("second"):
            compute()
        return clock.seconds()["second"] / count

    def advance() -> None:
        for index, layer in in_turn(streamed.layers, stream.device):
            stream.advance(layer, index)

    with stream.head(streamed.model) as head:
        loss = timed(lambda: measures.negative_log_likelihood(head, stream, tokens), tokens.numel())
    with stream.head(streamed.model, vocabulary=vocabulary) as head:
        divergence = timed(lambda: training.divergence_of(head, hidden, hidden, labels), len(labels))
    return timed(advance, tokens.numel()), loss, divergence


def seconds_of_a_token(streamed: StreamedModel, rows: int) -> tuple[float, float]:
    """Return the seconds in which a model writes a token of each of so many pieces, and what its layers take of them.

    The rest, above all the head and the drawing, takes as long in a model of any number of layers. The layers are timed
    without attention to earlier tokens.
    """
    clock, forced = runtime.Clock(streamed.device), torch.zeros(rows, 1, dtype=torch.long, device=streamed.device)
    with whole(streamed.model, streamed.device), progress.bar(title="own text", disable=True) as bar:
        for count in (1, TIMED):  # The first tokens take longer.
            with clock.part(f"{count}"):
                own_text.write_pieces(streamed.model, forced, torch.rand(rows, count), bar)
        stream = replace(streamed, batch_size=rows).embed(forced)
        for turn in ("first", "second"):
            with clock.part(turn):
                for index, layer in enumerate(streamed.layers):
                    stream.advance(layer, index)
    return clock.seconds()[f"{TIMED}"] / TIMED, clock.seconds()["second"]


def text(run: Run, execute: Callable) -> str:
    """Return what a dry run prints: needs against what is free, whether it distils, and time."""
    settings, (device, free), elsewhere = run.settings, machine_of(run), run.settings.device_memory is not None
    rows = memory_needs(run)
    times = {} if elsewhere or distributed.world() > 1 else seconds(run, execute)
    most = [max((row[place] for row in rows), default=0) for place in (1, 2, 3)]
    host, disk, folder = "?", "?", settings.save or tempfile.gettempdir()
    if not elsewhere:
        host, disk = gigabytes(memory.free_on_host()), gigabytes(memory.room(tempfile.gettempdir())[0])
    cells = [[stage, *map(gigabytes, bytes_of), duration(times[stage]) if times else ""] for stage, *bytes_of in rows]
    cells += [["at most", *map(gigabytes, most), duration(sum(times.values())) if times else ""],
              ["free", gigabytes(free(device) if device.type == "cuda" else 0), host, disk, ""]]
    lines = [f"model    {settings.model}: {run.model.num_parameters():,} parameters, "
             f"{gigabytes(load.size(run.config, run.dtype))} GB in {str(run.model.dtype).removeprefix('torch.')}",
             f"method   {run.method}", "",
             progress.table(["GB beside the program", "GPU", "host", "TMPDIR", "time"], cells), "",
             f"program  {gigabytes(psutil.Process().memory_info().rss)} GB of the host's memory"]
    if run.own_tokens and not own_text.rows_at_once(run.model, device, free):
        lines.append(f"own text no: {device} has no room for the whole model")
    if settings.distill:
        taken = training_need(run)
        lines.append(f"distill  {run.ways[0] if run.ways else 'no'}: takes {gigabytes(taken.device)} GB on "
                     f"{device}, which has {gigabytes(free(device))} GB free")
    if run.selected:
        zeros = settings.prunen / settings.prunem if settings.prunem else settings.sparsity
        sizes = card.sizes([(shape, zeros, settings.wbits) for shape in run.selected.values()], run.model, settings)
        lines.append("result   " + ", ".join(f"{name} {gigabytes(nbytes)} GB" for name, nbytes in sizes.items()))
    left = "" if elsewhere else f"; {gigabytes(memory.room(folder)[0])} GB are free"
    return "\n".join([*lines, f"disk     {gigabytes(run.disk_bytes)} GB in {folder}{left}"])


def gigabytes(nbytes: float) -> str:
    """Return bytes as GB with as many digits as matter."""
    return f"{nbytes / 1e9:.2f}" if nbytes < 1e10 else f"{nbytes / 1e9:.0f}"


def duration(seconds: float) -> str:
    """Return a time as a reader says it: 40 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else (
        f"{seconds / 3600:.1f} h")


def announce(run: Run, execute: Callable) -> None:
    """Print how long a long run will take, stage by stage."""
    sequences = (run.settings.nsamples + sum(run.settings.extra_counts)) * run.settings.needs_calibration
    work = run.model.num_parameters() * (sequences * run.seqlen + sum(test_tokens(run)))
    if work < WORTH or distributed.world() > 1 or run.settings.quiet:
        return
    try:
        times = seconds(run, execute)
    except Exception as error:  # An estimate must not end a run.
        return run.log(f"time     cannot be told: {errors.one_line(error)}")
    parts = ", ".join(f"{stage} {duration(time)}" for stage, time in times.items() if time >= 1)
    run.log(f"time     about {duration(sum(times.values()))} ({parts})")
