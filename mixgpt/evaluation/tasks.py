"""Tasks of EleutherAI's lm-eval, zero-shot or few-shot: find and build them, and score a model on them."""

import contextlib
import difflib
import io
import numbers
import sys
from pathlib import Path

import jinja2
import lm_eval
import psutil
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks.manager import TaskManager

from mixgpt.common import progress
from mixgpt.common.errors import InputError
from mixgpt.evaluation.streamed_lm import StreamedLM
from mixgpt.text import hub
from mixgpt.text.local import one_line
from modelutils import free_memory

VERSION = lm_eval.__version__
BOOTSTRAP = 1000  # resamples for the standard error of a metric that is not a mean
# What lm-eval raises for a task with an unusable description or data; tasks may run their own Python.
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, ImportError, SyntaxError,
          AssertionError, ArithmeticError, DatasetsError, yaml.YAMLError, jinja2.TemplateError)


def load(names, folder, limit):
    """Build lm-eval tasks, groups and tags with their data, and try them on a model that guesses.

    folder: of additional tasks, or None. limit: examples per task, None for all. Returns the argument of `score`.
    Raises InputError if a task is unknown or unusable.
    """
    if folder is not None and not any(Path(folder).glob("**/*.yaml")):
        raise InputError(f"--tasks_dir {folder}: must be a folder with .yaml files that describe tasks of lm-eval")
    chosen = {"tasks": {}, "groups": {}}
    with _silent(), contextlib.nullcontext() if hub.reachable() else hub.offline():
        manager = _manager(names, folder)
        for name in names:
            with _refusing(name):
                found = manager.load([name])
                _check(name, found["tasks"].values())
                _run(DummyLM(), found, limit, 0)
                chosen["tasks"] |= found["tasks"]
                chosen["groups"] |= found["groups"]
    return chosen


def _manager(names, folder):
    """Return a TaskManager that knows all of `names`."""
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager  # skips indexing lm-eval's thousands of tasks, which takes seconds
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            similar = difflib.get_close_matches(name, manager.all_tasks, 3, 0.7)
            raise InputError(f"--tasks {name}: no task, group or tag of this name in lm-eval {VERSION}"
                             + (f" or {folder}" if folder else "; --tasks_dir names a folder of further ones")
                             + (f"; there is {', '.join(similar)}" if similar else ""))
    return manager


def _check(name, tasks):
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"--tasks {name}: executes code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"--tasks {name}: asks about images or sound; the models here read text")


@contextlib.contextmanager
def _refusing(name):
    """Turn errors raised for an unusable task into a one-line InputError."""
    try:
        yield
    except InputError:
        raise
    except BROKEN as error:
        if isinstance(error, ConnectionError) and not hub.reachable():
            raise InputError(f"--tasks {name}: its dataset is not in the cache ({one_line(error)}), and the hub cannot "
                             "be reached; --tasks_dir names a folder of tasks with data of their own") from error
        raise InputError(f"--tasks {name}: cannot be used: {type(error).__name__}: {one_line(error)}") from error


@contextlib.contextmanager
def _silent():
    """Suppress lm-eval's output and logs and, without a terminal, its progress bars; ours pass."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(hub.unlogged("lm_eval"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(progress.shown_on(sys.stderr))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def _run(lm, chosen, limit, bootstrap):
    """Run lm-eval on a model. Returns its results."""
    for task in chosen["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # reset each time, or each model gets other examples
    return evaluate(lm, chosen, limit=limit, bootstrap_iters=bootstrap, log_samples=False)


def check(chosen, tokenizer, nbytes, device):
    """Raise InputError for tasks that need special tokens or memory (nbytes, for the whole model) that are missing."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("--tasks: the model's tokenizer has no token for the begin or the end of a text")
    for name, task in chosen["tasks"].items():
        kinds = {instance.request_type for instance in task.instances}
        if "generate_until" in kinds:
            free = free_memory(device) if device.type == "cuda" else psutil.virtual_memory().available
            if nbytes > free:
                raise InputError(f"--tasks {name}: lets the model generate, which needs all of its {nbytes / 1e9:.1f} "
                                 f"GB in memory; {free / 1e9:.1f} GB are free on {device}")
        if any(instance.request_type == "loglikelihood" and not "".join(instance.args) for instance in task.instances):
            raise InputError(f"--tasks {name}: asks for the likelihood of an empty text")


def score(chosen, model, family, tokenizer, limit, tokens, device):
    """Score a model on the tasks from `load`.

    tokens: number per batch. Returns {task or group: {metric: value, metric_stderr: value, "examples": count,
    "num_fewshot": count, "version": lm-eval's}}. Prints a warning if texts were truncated.
    """
    lm = StreamedLM(model, family, tokenizer, tokens, device)
    with _silent():
        results = _run(lm, chosen, limit, BOOTSTRAP)
    if lm.cut:
        print(f"warning  --tasks: {lm.cut} texts are longer than the model's {lm.max_length} tokens and lost their "
              "beginning", flush=True)
    return {name: _metrics(found) | {key: value for key, value in {
        "examples": results["n-samples"].get(name, {}).get("effective"), "num_fewshot": results["n-shot"].get(name),
        "version": results["versions"].get(name)}.items() if value is not None}
        for name, found in results["results"].items()}


def _metrics(found):
    """Return {metric or metric (filter): value} of lm-eval's {"metric,filter": value}; standard errors end in _stderr.

    Values unknown to lm-eval are left out.
    """
    metrics = {}
    for key, value in found.items():
        metric, comma, name = key.partition(",")
        if comma and isinstance(value, numbers.Real):
            filtered = "" if name == "none" else f" ({name})"
            stderr = "_stderr" if metric.endswith("_stderr") else ""
            metrics[metric.removesuffix("_stderr") + filtered + stderr] = float(value)
    return metrics
