"""A run from the model to the report: check, read, plan, prune and quantize, save, verify, evaluate."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mixgpt.app import allocating, compression, forecast, opening, report
from mixgpt.app.checks import check
from mixgpt.app.run import Run
from mixgpt.app.settings import EVALUATION, REPORT, Settings
from mixgpt.checkpoints import card, load, run_dir
from mixgpt.common import choices, distributed, errors, runtime
from mixgpt.evaluation import measures
from mixgpt.evaluation.distance import Distance
from mixgpt.modeling.decoder import path_of
from mixgpt.modeling.running import StreamedModel
from mixgpt.modeling.streaming import locations_of
from mixgpt.pruning.targets import Outcome

PRUNED = 0.25  # A model with more zeros is not called dense. 4 bits round a fifth of normal weights to 0.
FEW = 2048  # Tokens of a text.
PROBE = 128  # The saved model is compared with the one in memory on so many tokens.


def execute(settings: Settings, command: str | None = None, model: PreTrainedModel | None = None,
            tokenizer: PreTrainedTokenizerBase | None = None, texts: list | torch.Tensor | None = None
            ) -> dict[str, Any]:
    """Execute a run and print its report. Returns its record, as saved in mixgpt.json; {} of a dry run.

    command: the command line, for the heading. model, tokenizer: if they are in memory already; the model is changed
    in place. texts: calibration text in memory, a list of strings or tokens (N, T).
    """
    device = runtime.choose_device(settings.device)  # ty: ignore[invalid-argument-type]  # It refuses what is no device.
    clock = runtime.Clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # The peak of earlier runs in this process does not count.
    with contextlib.ExitStack() as stack:
        stack.enter_context(clock.part("other"))  # The other parts lie in it, so that all add up to the whole time.
        stack.enter_context(runtime.isolated(device, settings.quiet))
        if settings.save and settings.resume and model is tokenizer is texts is None and (
                record := run_dir.completed(settings.save, {"model": settings.model} | opening.asked(
                    settings, device, EVALUATION, REPORT))):
            if not settings.quiet:
                print(f"resume   the run in {settings.save} is complete; these are its results", flush=True)
            return report.publish(settings, record)
        with clock.part("load"):
            run = check(settings, device, clock, model, tokenizer)
        if settings.dry_run:
            print(forecast.text(run, execute), flush=True)
            return {}
        opening.open_run(run, stack, command, texts)
        forecast.announce(run, execute)
        distance = None
        if settings.dense and settings.method() != "dense":
            if settings.eval or settings.tasks:
                run.begin("dense model")
            distance = Distance()
            _add_scores(run, "dense", _perplexities(run, run.model, behind=distance.keep))
            if run.tests:
                run.record["distance"] = {choices.AGAIN: _distance_again(run, distance)}
        plan = allocating.choose(run)
        probe = torch.arange(min(PROBE, run.seqlen))[None] % run.config.vocab_size
        survey = measures.Survey(StreamedModel(run.model, device, 1), probe if settings.save else None)
        outcomes = compression.compress(run, plan, survey)
        method = _finish(run, plan, outcomes, survey, distance)
        record = run.record | {"seconds": clock.seconds(), "peak_memory": runtime.peak_memory(device)}
        if settings.save:
            run.folder.write_json(run.folder.path / choices.RECORD, record)
            run.folder.write_text(run.folder.path / choices.CARD, card.text(record, run.model, command))
        if run.folder:
            run.folder.close()
        report.publish(run.settings, record)
        run.tracker.result(record, method)
        return record


def _perplexities(run: Run, model: PreTrainedModel, **functions: Callable | None) -> dict[str, float]:
    """Return the perplexities of a model on the test sets. functions: as `measures.perplexities` takes them."""
    with run.clock.part("evaluation"):
        return run.retry(lambda plan: measures.perplexities(
            model, run.tests, plan.batch_size, run.device, **functions))


def _add_scores(run: Run, method: str, perplexities: dict[str, float]) -> None:
    """Add perplexities, and task scores of the model as it is now, to the record. method: "dense" or its name."""
    run.record.setdefault("perplexity", {})[method] = perplexities
    if score := run.score_tasks:
        with run.clock.part("tasks"):
            run.record.setdefault("tasks", {})[method] = run.retry(lambda plan: score(run.model, plan.batch_size))


def _distance_again(run: Run, distance: Distance) -> dict[str, dict[str, float]]:
    """Return how far the dense model is from itself in other batches and, if it is read from disk, another dtype.

    Rounding alone makes that much. A few tokens of each text tell.
    """
    model, T, few = run.model, run.seqlen, {}
    if locations_of(model):  # A copy in memory might not fit.
        model = load.in_dtype(model, torch.bfloat16 if model.dtype == torch.float32 else torch.float32)
    for name, tokens in run.tests.items():
        shares = (tokens[distributed.share(len(tokens), number)] for number in range(distributed.world()))
        few[name] = torch.cat([tokens[:max(FEW // T, 1)] for tokens in shares])  # Each process has kept these.
    with run.clock.part("evaluation"):
        measures.perplexities(model, few, 1 if run.settings.batch_size > 1 else 2, run.device, behind=distance.compare)
    return distance.result()


def _finish(run: Run, plan: allocating.Plan, outcomes: dict[tuple[int, str], Outcome], survey: measures.Survey,
            distance: Distance | None) -> str:
    """Save the model if asked to, and measure what is reported in one pass. Returns its name in the report.

    survey: of the model in memory, with which the saved one is compared. distance: it keeps the dense model's states.
    """
    settings, final, found = run.settings, run.model, survey
    if settings.save:
        run.begin("saving")
        with run.clock.part("save"):
            written = run.folder.write_checkpoint(run.tokenizer, {
                path_of(run.model, *key): outcome.grid for key, outcome in outcomes.items() if outcome.grid},
                run.record)
            final = load.in_dtype(load.open_model(written, load.read_config(written), "auto"), run.model.dtype)
            final.config._attn_implementation = run.model.config._attn_implementation  # A caller may have chosen it.
        found = measures.Survey(replace(survey.streamed, model=final), survey.tokens)
    if settings.eval or settings.tasks:
        run.begin("evaluation")
    perplexities = _perplexities(run, final, observe=found.take, behind=distance.compare if distance else None)
    with run.clock.part("verification"):
        zeros, logits = found.finish()
        expected_zeros, expected = survey.finish()  # The same, unless the model is saved.
    if settings.save:
        alike = torch.allclose(logits, expected, 0, 0, equal_nan=True)  # ty: ignore[invalid-argument-type]  # tensors
        for what, equal in (("zeros", zeros == expected_zeros), ("logits", alike)):
            if not equal:
                raise errors.VerificationError(f"--save {settings.save}: the {what} of the saved model differ from "
                                               "those in memory")
        run.folder.publish()
    run.record |= report.of_matrices(run, plan, outcomes, zeros)
    if settings.save and plan.targets:
        run.record["disk"] = report.disk(run, plan.targets)
    if settings.save:
        rows = ((row["shape"], row["sparsity"], row.get("wbits", 16)) for row in run.record["matrices"])
        run.record["sizes"] = card.sizes(rows, run.model, settings) | {settings.save_format: sum(
            file.stat().st_size for file in run.folder.path.glob("*.safetensors"))}
    method = run.method
    if method == "dense" and run.record["sparsity"] > PRUNED:
        method = "as given"
    _add_scores(run, method, perplexities)
    if distance and run.tests:
        run.record["distance"][method] = distance.result()
    return method
