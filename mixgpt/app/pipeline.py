"""A run from the model to the report: check, read, plan, prune and quantize, save, verify, evaluate."""

import contextlib
import sys

import datasets
from huggingface_hub import utils as hub
from transformers.utils import logging

from mixgpt.app import compression, evaluation, inputs, planning, records
from mixgpt.app.report import result_text
from mixgpt.app.run import opened
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import distributed, progress
from mixgpt.common.runtime import Clock, choose_device, peak_memory


def run(family, settings, command=None, model=None, tokenizer=None, texts=None):
    """Run the pipeline and print its report. Returns the record of the run, as saved in mixgpt.json.

    command: the command line, for the heading. model, tokenizer: if they are in memory already; the model is changed
    in place. texts: calibration text in memory, a list of strings or tokens (N, T). Input errors that can be detected
    early are raised before the weights are loaded.
    """
    device = choose_device(settings.device)
    clock = Clock(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quieter(settings))
        stack.enter_context(distributed.joined(device))
        if settings.resume and (record := records.completed(settings)):
            return _report_completed(family, settings, device, record)
        with clock.part("load"):
            given = inputs.check(settings, family, device, clock, model, tokenizer)
            folder = stack.enter_context(RunDir(settings.save, settings.save_format, inputs.size_on_disk(given),
                                                settings.resume, settings.overwrite)) if settings.save else None
        with clock.part("data"):
            given = inputs.read_texts(given, texts)
        current = stack.enter_context(opened(given, folder, command))
        plan = planning.choose(current)
        if settings.dense or not plan.targets:
            evaluation.evaluate(current, "dense")
        compressed = compression.compress(current, plan)
        if settings.save:
            _save(current, plan, *compressed)
        if plan.targets:
            evaluation.evaluate(current, settings.method)
        if settings.semi_structured and "semi_structured" not in current.record:
            evaluation.compare_kernels(current)
        return _report(current)


@contextlib.contextmanager
def _quieter(settings):
    """Silence the progress bars of libraries where they would fill a log, and our own with --quiet."""
    bars = ((logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar),
            (not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
            (not hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars))
    with contextlib.ExitStack() as stack:
        for enabled, disable, enable in bars:
            if enabled and (settings.quiet or not sys.stderr.isatty()):
                disable()
                stack.callback(enable)
        if settings.quiet:
            stack.enter_context(progress.shown_on(None))
        yield


def _report_completed(family, settings, device, record):
    """Print the results of a run that has ended before, as when its job is queued again. Returns its record."""
    records.check_completed(record, settings, device, family)
    if not settings.quiet:
        print(f"resume   the run in {settings.save} is complete; these are its results", flush=True)
    print(result_text(settings, record), flush=True)
    if distributed.rank() == 0:
        records.write_file(settings, record)
    return record


def _save(current, plan, outcomes, matrices, others):
    """Complete the output folder, reload it and compare it with the model in memory."""
    given, folder = current.inputs, current.run_dir
    with current.clock.part("save"):
        folder.write_record(current.record)
        folder.write_checkpoint(given.tokenizer, {given.family.path(*key): outcome.grid
                                                  for key, outcome in outcomes.items() if outcome.grid})
        evaluation.verify(current, matrices, others)
        if plan.targets:
            current.record["disk"] = records.disk(current.settings, folder, plan.targets, given.selected)


def _report(current):
    """Complete the record, write it if requested, and print the tables. Returns the record."""
    settings, record = current.settings, current.record
    record |= {"seconds": dict(current.clock.seconds), "peak_memory": peak_memory(current.inputs.device)}
    if settings.save:
        current.run_dir.write_record(record)
        current.run_dir.close()
    if text := result_text(settings, record):
        print(text, flush=True)
    if distributed.rank() == 0:
        records.write_file(settings, record)
    current.tracker.result(record, settings.method if settings.compresses else "dense")
    return record
