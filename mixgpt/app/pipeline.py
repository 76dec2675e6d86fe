"""A run from the model to the report: check, read, plan, prune and quantize, save, verify, evaluate."""

import contextlib
import os
from dataclasses import replace

import torch

from mixgpt.app import compression, planning, report
from mixgpt.app.run import check, open_run, read_texts
from mixgpt.checkpoints import card, load
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import choices, distributed, errors, program, runtime
from mixgpt.evaluation import measures
from mixgpt.modeling.decoder import path_of
from mixgpt.modeling.running import StreamedModel

PRUNED = 0.25  # sparsity above which a model is no dense one: of normal weights 4 bits round a fifth to 0
PROBE = 128  # tokens on which the saved model is compared with the one in memory


def run(settings, command=None, model=None, tokenizer=None, texts=None):
    """Run the pipeline and print its report. Returns the record of the run, as saved in mixgpt.json.

    command: the command line, for the heading. model, tokenizer: if they are in memory already; the model is changed
    in place. texts: calibration text in memory, a list of strings or tokens (N, T).
    """
    device = runtime.choose_device(settings.device)
    clock = runtime.Clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # that of the runs before
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        if program.rank():  # only the first process prints
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        if program.rank() or settings.quiet:  # results and warnings go to stdout
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)  # not that of a caller, as are the next three
        if torch.get_default_device().type != "cpu":  # the context is felt in every call
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(runtime.float32_products("ieee", torch.backends.cuda, torch.backends.mkldnn))
        stack.enter_context(distributed.joined(device))
        if settings.resume and model is tokenizer is texts is None and (record := report.completed(settings, device)):
            if not settings.quiet:
                print(f"resume   the run in {settings.save} is complete; these are its results", flush=True)
            return report.publish(settings, record)
        with clock.part("load"):
            current = check(settings, device, clock, model, tokenizer)
            size = load.size(current.config, current.dtype) * (1 + bool(current.selected) + settings.quantizes_last)
            folder = stack.enter_context(RunDir(settings.save, settings.save_format, size, settings.resume,
                                                settings.overwrite)) if settings.save else None
        with clock.part("data"):
            read_texts(current, texts)
        with clock.part("load"):
            open_run(current, stack, folder, command)
        if settings.dense and settings.method() != "dense":
            _add_scores(current, "dense", _perplexities(current, current.model))
        plan = planning.choose(current)
        probe = torch.arange(min(PROBE, current.settings.seqlen))[None] % current.config.vocab_size
        survey = measures.Survey(StreamedModel(current.model, device, 1), probe if settings.save else None)
        outcomes = compression.compress(current, plan, survey)
        method = _finish(current, plan, outcomes, survey)
        record = current.record | {"seconds": clock.seconds(), "peak_memory": runtime.peak_memory(device)}
        if settings.save:
            folder.write_json(folder.path / choices.RECORD, record)
            folder.write_text(folder.path / choices.CARD, card.text(record, current.model, command))
        if current.files:
            current.files.close()
        report.publish(current.settings, record)
        current.tracker.result(record, method)
        return record


def _perplexities(current, model, observe=None):
    """Return the perplexities of a model on the test sets. observe: as in `measures.perplexities`."""
    with current.clock.part("evaluation"):
        return current.retry(lambda plan: measures.perplexities(
            model, current.tests, plan.batch_size, current.device, observe=observe))


def _add_scores(current, method, perplexities):
    """Add perplexities, and task scores of the model as it is now, to the record. method: "dense" or its name."""
    current.record.setdefault("perplexity", {})[method] = perplexities
    if current.score_tasks:
        with current.clock.part("tasks"):
            current.record.setdefault("tasks", {})[method] = current.retry(
                lambda plan: current.score_tasks(current.model, plan.batch_size))


def _finish(current, plan, outcomes, survey):
    """Save the model if asked to, and measure what is reported in one pass. Returns its name in the report.

    survey: of the model in memory, with which the saved one is compared.
    """
    settings, final, found = current.settings, current.model, survey
    if settings.save:
        with current.clock.part("save"):
            written = current.files.write_checkpoint(current.tokenizer, {
                path_of(current.model, *key): outcome.grid for key, outcome in outcomes.items() if outcome.grid},
                current.record)
            final = load.open_model(written, load.read_config(written), "auto")
            final.config._attn_implementation = current.model.config._attn_implementation  # a caller may have chosen it
        found = measures.Survey(replace(survey.streamed, model=final), survey.tokens)
    perplexities = _perplexities(current, final, found.take)
    zeros, logits = found.finish()
    if settings.save:
        expected_zeros, expected = survey.finish()
        for what, equal in (("zeros", zeros == expected_zeros),
                            ("logits", torch.allclose(logits, expected, 0, 0, equal_nan=True))):
            if not equal:
                raise errors.VerificationError(f"--save {settings.save}: the {what} of the saved model differ from "
                                               "those in memory")
        current.files.publish()
    current.record |= report.of_matrices(current, plan, outcomes, zeros)
    if settings.save and plan.targets:
        current.record["disk"] = report.disk(current, plan.targets)
    if settings.save:
        current.record["sizes"] = card.sizes(current.files.path, current.record, current.model, settings)
    method = current.method
    if method == "dense" and current.record["sparsity"] > PRUNED:
        method = "as given"
    _add_scores(current, method, perplexities)
    return method
