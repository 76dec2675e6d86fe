"""The main job: load, calibrate, allocate, prune and quantize, save, verify, evaluate, report."""

import contextlib
import gc
import json
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace

import datasets
import torch
import transformers

from datautils import calibration_samples, test_tokens
from mixgpt.allocation import traces
from mixgpt.allocation.fisher import output_gradients
from mixgpt.allocation.global_threshold import global_plan, inverse_diagonals
from mixgpt.allocation.plan import make_plan
from mixgpt.app import plots, records
from mixgpt.app.report import heading, plan_tables, result_text
from mixgpt.app.settings import parse
from mixgpt.app.tracking import Tracker
from mixgpt.checkpoints import load
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import distributed, progress
from mixgpt.common.clock import Clock, peak_memory
from mixgpt.common.errors import InputError
from mixgpt.common.files import check_writable, write
from mixgpt.common.runtime import choose_device, choose_dtype, choose_seqlen
from mixgpt.evaluation import semistructured
from mixgpt.evaluation.perplexity import logits, perplexity
from mixgpt.evaluation.sparsity import count_zeros, measure_sparsity
from mixgpt.kernels.columns import triton_obstacle
from mixgpt.pruning.layerwise import prune_sparsegpt
from mixgpt.pruning.magnitude import prune_magnitude
from mixgpt.pruning.targets import select

PROBE = 128  # tokens on which a saved model is compared with the one in memory


def main(family, argv=None):
    """Run a family script. Returns the exit status: 0, 2 after one line about unusable input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = parse(family, argv)
        with contextlib.ExitStack() as stack:
            if int(os.environ.get("RANK", 0)):  # only the first of several processes tells what happens
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            if settings.quiet:
                stack.enter_context(contextlib.redirect_stderr(_Barred(sys.stderr)))
            if not sys.stderr.isatty():
                transformers.utils.logging.disable_progress_bar()
                datasets.disable_progress_bars()
            run(family, settings, shlex.join(["python", family.script, *argv]))
    except InputError as error:
        print(f"{family.script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{family.script}: interrupted; what is in the folder of --save goes on with --resume", file=sys.stderr)
        return 130
    return 0


class _Barred:
    """A stream that is no terminal, so that bars keep off it."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def isatty(self):
        return False


def run(family, settings, command=None):
    """Do the main job and print its report. Returns the record of the run, as saved in mixgpt.json.

    command: the command line, for the heading.

    Everything that can be refused is refused before the weights are loaded.
    """
    device = choose_device(settings.device)
    clock = Clock(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.joined(device))
        if settings.quiet:
            stack.enter_context(progress.silent())
        with clock.part("load"):
            config = load.load_config(settings.model, family)
            seqlen = choose_seqlen(settings.seqlen, config)
            dtype = choose_dtype(settings.dtype, config, device)
            skeleton = load.skeleton(config)
            selected = _check(settings, family, skeleton, dtype)
            tokenizer = load.load_tokenizer(settings.model)
            folder = stack.enter_context(RunDir(settings.save, settings.save_format)) if settings.save else None
        with clock.part("data"):
            calibration, tests, sources = _tokens(settings, seqlen, tokenizer, config.vocab_size)
            score = _scorer(settings, seqlen, tokenizer, skeleton, dtype, device)
        with clock.part("load"):
            model = load.open_model(settings.model, config, family, dtype)
            if not folder and selected and hasattr(model, "source"):  # pruned layers are put away on disk too
                path = stack.enter_context(tempfile.TemporaryDirectory(prefix="mixgpt"))
                folder = stack.enter_context(RunDir(distributed.tell(path)))
            if folder:
                folder.start(model, family, records.identity(settings, seqlen, device, model, calibration))
        facts = records.facts(settings, seqlen, model.dtype, device, sources)
        _tell(settings, heading(model, family, settings, selected, calibration, seqlen, device, facts, command))
        with clock.part("W&B"):
            tracker = stack.enter_context(_tracker(settings, facts))
        if tracker.place:
            _tell(settings, f"W&B      {tracker.place}")

        if settings.calibrates and device.type == "cuda" and (reason := triton_obstacle(device)):
            _tell(settings, f"kernels  PyTorch walks the columns, which is slower: Triton does not run here ({reason})")
        obstacle = semistructured.obstacle(device, model.dtype) if settings.semi_structured else None
        if obstacle:
            _tell(settings, f"kernels  --semi-structured is skipped: {obstacle}")

        way = Way(settings.batch_size)

        def evaluate(way):
            with clock.part("evaluation"):
                return {name: perplexity(model, family, tokens, way.batch_size, device, name)
                        for name, tokens in tests.items()}

        def score_tasks(way):
            with clock.part("tasks"):
                return score(model, family, way.batch_size)

        plan, known, gradients = _fitting(settings, way, lambda way: _plan(
            settings, selected, model, family, calibration, device, clock, tracker, folder, way))
        perplexities, scores = {}, {}
        if settings.dense or not plan:
            perplexities["dense"] = _fitting(settings, way, evaluate)
            if score:
                scores["dense"] = _fitting(settings, way, score_tasks)
        holds_layer = settings.calibrates and settings.true_sequential
        outcomes, taken = _fitting(
            settings, Way(settings.batch_size, two_passes=not holds_layer, on_host=not settings.calibrates),
            lambda way: (_compress(settings, plan, gradients, model, family, calibration, device, clock, folder,
                                   tracker, way), way), again=hasattr(model, "source"))
        facts["settings"] |= {"batch_size": taken.batch_size,
                              "true_sequential": settings.true_sequential and not (holds_layer and taken.two_passes)}
        matrices = measure_sparsity(model, family)
        record = facts | records.of_matrices(matrices, outcomes, plan, known)
        if settings.save:
            with clock.part("save"):
                _complete(settings, folder, tokenizer, record, family, outcomes)
                _verify(settings.save, model, family, matrices, _probe(tests, calibration, config.vocab_size), device)
                if plan:
                    record["disk"] = records.disk(settings, family, plan, selected)
        if plan:
            perplexities[settings.method] = _fitting(settings, way, evaluate)
            if score:
                scores[settings.method] = _fitting(settings, way, score_tasks)
        if settings.semi_structured:
            record["semi_structured"] = {"skipped": obstacle} if obstacle else _fitting(
                settings, way, lambda way: semistructured.compare(model, family, tests, way.batch_size, device))
        record |= {"perplexity": perplexities} | ({"tasks": scores} if score else {})
        record |= {"seconds": dict(clock.seconds), "peak_memory": peak_memory(device)}
        if settings.save and distributed.rank() == 0:
            load.write_record(settings.save, record)
            folder.end()
        if result := result_text(settings, matrices, outcomes, perplexities, scores, record):
            print(result, flush=True)
        if settings.record and distributed.rank() == 0:
            write("--record", settings.record, json.dumps(record, indent=1) + "\n")
        tracker.result(record, settings.method if plan else "dense")
        return record


def _tell(settings, text):
    if not settings.quiet:
        print(text, flush=True)


def _tracker(settings, facts):
    """Begin a run in W&B, in the first of several processes, where it is asked for."""
    config = {**facts["settings"], **facts, "method": settings.method if settings.compresses else "dense"}
    return Tracker(config if settings.log_wandb and distributed.rank() == 0 else None, settings.wandb_project,
                   settings.wandb_name, settings.wandb_group)


@dataclass(frozen=True)
class Way:
    """How a step gets by with the memory of a GPU, from the fastest way to the thriftiest."""

    batch_size: int
    on_host: bool = True  # hidden states of the calibration
    two_passes: bool = True  # through each layer, so that what is inside it is there for one batch at a time

    def thriftier(self):
        """Return the next way and what it does, None where there is none."""
        if not self.two_passes:  # in one, every sequence holds its hidden states inside the layer, wherever they lie
            return replace(self, two_passes=True, on_host=True), (
                "two passes through each layer, as by --no-true-sequential, and hidden states on the host")
        if not self.on_host:
            return replace(self, on_host=True), "hidden states on the host"
        size = self.batch_size // 2
        return (replace(self, batch_size=size), f"batches of {size}") if size else None


def _fitting(settings, way, step, again=True):
    """Return step(way), in a thriftier way each time the memory of the GPU does not suffice.

    again: whether the step can be begun a second time.
    """
    while True:
        try:
            return step(way)
        except torch.OutOfMemoryError as error:
            thriftier = way.thriftier()
            if not thriftier or not again or distributed.world() > 1:
                remedies = "--seqlen" if way.batch_size == 1 else "--batch-size or --seqlen"
                if settings.true_sequential and not way.two_passes:
                    remedies += ", or give --no-true-sequential"
                raise InputError(f"--batch-size {way.batch_size} --seqlen {settings.seqlen or 'default'}: the GPU's "
                                 f"memory does not suffice; lower {remedies}") from error
        way, change = thriftier
        gc.collect()  # what the error's frames held
        torch.cuda.empty_cache()
        print(f"warning  the GPU's memory does not suffice: going on with {change}", flush=True)


def _check(settings, family, skeleton, dtype):
    """Refuse what does not fit the model, given on meta, or the disk. Returns the shapes of the matrices to change."""
    selected = select(skeleton, family, settings.prunem, settings.groupsize, settings.minlayer, settings.maxlayer,
                      settings.prune_only, settings.invert) if settings.compresses else {}
    if settings.sensitivity_file:
        traces.read(settings.sensitivity_file, traces.matrices_of(skeleton, family), settings.sensitivity)
    if settings.plot:
        plots.check(settings.plot)
    if settings.record:
        check_writable("--record", settings.record)
    if settings.save and distributed.rank() == 0:  # which locks the folder then
        load.check_save(settings.save, load.size(skeleton, dtype), settings.resume)
    return selected


def _compress(settings, plan, gradients, model, family, calibration, device, clock, folder, tracker, way):
    """Prune and quantize what the plan names. Returns {(layer, name): Outcome}."""
    if not plan:
        return {}

    def observe(index, layer, outcomes, start):
        seconds = clock.now() - start
        tracker.layer(index, outcomes, seconds, count_zeros(index, layer))

    observe = observe if tracker.run else None
    if not settings.calibrates:
        with clock.part("magnitude" if settings.prunes else "rounding"):
            return prune_magnitude(model, family, plan, device, settings.scheme, folder, observe)
    return prune_sparsegpt(
        model, family, plan, calibration, saliency=settings.saliency, blocksize=settings.blocksize,
        percdamp=settings.percdamp, true_sequential=not way.two_passes, batch_size=way.batch_size,
        device=device, clock=clock, scheme=settings.scheme, act_order=settings.act_order, folder=folder,
        observe=observe, solver=settings.solver, to_dense=settings.target == "dense",
        row_weights=gradients.rows if settings.saliency == "fisher" else None,
        token_weights=gradients.tokens if settings.token_weights == "fisher" else None, on_host=way.on_host)


def _complete(settings, folder, tokenizer, record, family, outcomes):
    """Write what the folder lacks to be loaded, the record first."""
    if distributed.rank() == 0:
        load.write_record(settings.save, record)
    folder.complete(tokenizer, {family.path(*key): outcome.grid for key, outcome in outcomes.items() if outcome.grid})


def _plan(settings, selected, model, family, calibration, device, clock, tracker, folder, way):
    """Return {(layer, name): Target}; the `Traces` behind it, None where it needs none; the loss's `Gradients` by the
    outputs of matrices, None likewise. Print and draw the plan.

    The folder keeps what was measured: on a GPU another run may round it in another way, and choose other targets.
    """
    kept = folder if settings.save and (settings.weighs or settings.mixed) else None
    plan, gradients = kept.kept_plan() if kept else (None, None)
    known = path = None
    if settings.weighs and not plan:
        with clock.part("gradients"):
            gradients = output_gradients(model, family, list(selected), calibration, seed=settings.seed,
                                         batch_size=way.batch_size, device=device)
    if settings.mixed:
        with clock.part("sensitivity"):
            known, path = traces.obtain(
                model, family, calibration, settings.sensitivity, seed=settings.seed, nprobes=settings.nprobes,
                batch_size=way.batch_size, device=device, path=settings.sensitivity_file)
    if not plan:
        if settings.sparsity_way == "global":
            with clock.part("allocation"):
                diagonals = inverse_diagonals(model, family, list(selected), calibration, settings.percdamp,
                                                         way.batch_size, device, clock)
                plan = global_plan(model, family, selected, gradients.rows, diagonals, settings.sparsity,
                                              settings.alpha)
        else:
            plan = make_plan(selected, settings.amount, settings.sparsity_way, known and known.sensitivity,
                             settings.alpha)
        if kept:
            kept.keep_plan(plan, gradients)
    if settings.sparsity_way == "global":
        sparsities = [target.sparsity for target in plan.values()]
        _tell(settings, f"plan     one threshold: matrices from {min(sparsities):.2%} to {max(sparsities):.2%}")
    if known:
        _tell_plan(settings, plan, selected, known, path)
        if settings.plot and distributed.rank() == 0:
            plots.draw(settings.plot, known, plan)
        tracker.plan(known, plan)
    return plan, known, gradients


def _tell_plan(settings, plan, selected, known, path):
    """Print what the traces say and how sparse each matrix shall be."""
    numel = {key: out * columns for key, (out, columns) in selected.items()}
    total = sum(target.sparsity * numel[key] for key, target in plan.items()) / sum(numel.values())
    met = abs(total - settings.amount.sparsity) < 1e-9
    closest = "" if met else f", as close to {settings.amount.sparsity:.2%} as whole n of {settings.prunem} allow"
    _tell(settings, f"{known.verdict()}\n         kept in {path}")
    if warning := known.warning():
        print(warning, flush=True)
    _tell(settings, f"\n{plan_tables(plan, selected, known)}\n\nplan     {total:.2%} of the weights in all{closest}")


def _tokens(settings, seqlen, tokenizer, vocab_size):
    """Return calibration tokens (N, T) or None, {test set: tokens (n, T)} and where the texts come from."""
    calibration, tests, sources = None, {}, {}
    if settings.nsamples < distributed.world():
        raise InputError(f"--nsamples {settings.nsamples}: must be at least one for each of the "
                         f"{distributed.world()} processes")
    if settings.mixed or settings.weighs or settings.calibrates:
        calibration, sources["calibration"] = calibration_samples(
            settings.dataset, settings.nsamples, seqlen, settings.seed, tokenizer, settings.data_dir)
    for name in settings.eval:
        tokens, sources[name] = test_tokens(name, seqlen, tokenizer, settings.data_dir)
        tests[name] = tokens[:settings.eval_limit]
    for tokens in ([calibration] if calibration is not None else []) + list(tests.values()):
        if tokens.max() >= vocab_size:
            raise InputError(f"model {settings.model}: its tokenizer gives token {tokens.max()}, its vocabulary "
                             f"has {vocab_size}")
    return calibration, tests, sources


def _scorer(settings, seqlen, tokenizer, skeleton, dtype, device):
    """Return a function (model, family, batch size) that scores a model on the tasks of a run, None without any."""
    if not settings.tasks:
        return None
    try:
        from mixgpt.evaluation import tasks  # lm-eval is an extra
    except ImportError as error:
        raise InputError(f"--tasks: lm-eval cannot be used ({error}); pip install -r requirements-eval.txt") from error
    chosen = tasks.load(settings.tasks, settings.tasks_dir, settings.limit)
    tasks.check(chosen, tokenizer, load.size(skeleton, dtype), device)
    return lambda model, family, batch_size: tasks.score(
        chosen, model, family, tokenizer, settings.limit, batch_size * seqlen, device)


def _probe(tests, calibration, vocab_size):
    for tokens in (*tests.values(), calibration):
        if tokens is not None:
            return tokens[:1, :PROBE]
    return torch.arange(PROBE)[None] % vocab_size


def _verify(folder, model, family, matrices, probe, device):
    """Load what was saved and compare it with the model in memory: zeros of every matrix, logits of the probe."""
    reloaded = load.open_model(folder, load.load_config(folder, family), family, "auto")
    if measure_sparsity(reloaded, family) != matrices:
        raise InputError(f"--save {folder}: the zeros of the saved weights differ from those in memory")
    found, wanted = (logits(each, family, probe, 1, device) for each in (reloaded, model))
    if not torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True):
        raise InputError(f"--save {folder}: the logits of the saved model differ from those in memory")
