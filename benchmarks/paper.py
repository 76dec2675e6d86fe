"""Run the tables of the MixGPT paper (arXiv 2310.09499) on models, and print its numbers beside those measured here.

python benchmarks/paper.py table1 huggyllama/llama-7b --dry-run               # the cells, and about how long they take
python benchmarks/paper.py table2 meta-llama/Llama-2-13b-hf --methods best    # and one more method
python benchmarks/paper.py table3 meta-llama/Llama-2-7b-hf                    # zero-shot tasks of lm-eval

table1: saliency and allocation; table2: methods; table3: zero-shot tasks; table4: quantization; figure3: perplexity
against sparsity; ablations: table1 and allocation by layers. By default as in the paper: 128 sequences of 2,048 tokens
of C4, the whole test sets, sensitivities by Hutchinson.

A cell is a run of a method at a sparsity and a number of bits, from one seed. What is measured is kept in the file of
--output: an interrupted table goes on when the command is given again, and tables share their cells and the dense
model's. Sensitivities are kept in ~/.cache/mixgpt. The log of the runs goes to stderr, the table in Markdown to stdout
and into a file beside --output.
"""

import argparse
import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

from paper_tables import ADDED, AVERAGE, DENSE, TABLES, TASKS, markdown, options_of
from paper_time import BASIS, Size, estimate, operations
from peers import registered
from scores import Scores

from mixgpt.app import exit_status, pipeline
from mixgpt.app.cli import REMEDY
from mixgpt.app.settings import Parser, Settings, add_option, texts
from mixgpt.app.tables import table as text_table
from mixgpt.checkpoints import load
from mixgpt.common.clock import Clock
from mixgpt.common.errors import InputError
from mixgpt.common.outputs import Kind, check_writable
from mixgpt.common.runtime import choose_device
from mixgpt.modeling.family import Family, family_of
from mixgpt.modeling.streaming import digest, fingerprint

PROTOCOL = ("nsamples", "seqlen", "dtype", "sensitivity", "nprobes")  # which all cells of a file share
TESTS = {"perplexity": ("eval", "eval_limit"), "tasks": ("tasks", "tasks_dir", "limit")}
SCORES = Kind("a file of scores", rb'\{\s*"setup":\s', (".json",))
MARKDOWN = Kind("a table of scores", b"(table.|figure3|ablations), [^:]*: dataset ")
FREE = ("data_dir", "batch_size", "device")  # no part of what a cell is
FLAGS = (*PROTOCOL, *TESTS["perplexity"], *TESTS["tasks"], *FREE)  # those of a run, by their names in Settings


@dataclass(frozen=True)
class Subject:
    """A model of a table, and what all its cells share."""

    path: str  # as given
    family: Family
    size: Size  # for estimates
    measured: dict  # what identifies the texts or tasks, a part of the key of every cell
    calibration: str  # digest of the tokens of seed 0

    @property
    def name(self):
        return Path(self.path).name

    def key(self, method, target, seed):
        """Return what identifies a cell in the file."""
        return {"model": self.name, "measured": self.measured, "method": method, "target": target, "seed": seed}


def parse(argv):
    """Return the arguments; flags of a run are among them only if they were given. Raises InputError."""
    parser = Parser(prog="paper.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="hub id, local folder or .gguf file")
    parser.add_argument("--methods", nargs="+", default=[], choices=ADDED,
                        help=f"further methods, at every sparsity of the table: {', '.join(ADDED)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="the table has their mean (default: 0)")
    parser.add_argument("--dataset", type=texts, default="c4", help="calibration text (default: c4)")
    parser.add_argument("--output", default="paper.json",
                        help=".json file of the cells; the table goes beside it, in .md (default: paper.json)")
    parser.add_argument("--dry-run", action="store_true", default=False,
                        help="list the cells that are missing and about how long they take; write nothing")
    for field in dataclasses.fields(Settings):
        if field.name in FLAGS:
            add_option(parser, field)
    given = parser.parse_args(argv)
    for kind, names in TESTS.items():
        for name in names:
            if kind != TABLES[given.table].kind and hasattr(given, name):
                raise InputError(f"--{name.replace('_limit', '-limit')}: {given.table} is about "
                                 f"{TABLES[given.table].title}, not {kind}")
    if not getattr(given, "eval", True):
        raise InputError("--eval: names no text to measure perplexity on")
    return given


def settings_of(path, given, method, target, seed):
    """Return the settings of the run that measures a cell. Raises InputError."""
    measured = {"tasks": TASKS, "eval": ()} if TABLES[given.table].kind == "tasks" else {}
    flags = {name: getattr(given, name) for name in FLAGS if hasattr(given, name)}
    settings = Settings(path, given.dataset, seed=seed, **measured | flags | options_of(method, target))
    settings.check_paths()
    return settings


def cells_of(given):
    """Return (method, target, seed) of every cell of a table, the dense model's first."""
    rows = TABLES[given.table].with_methods(given.methods)
    return [(*DENSE, 0), *((*row, seed) for seed in dict.fromkeys(given.seeds) for row in rows)]


def prepare(path, given):
    """Read all of a model but its weights, and its texts or tasks. Returns the `Subject`. Raises InputError."""
    family = family_of(load.skeleton(load.read_config(path)))
    if family is None:
        raise InputError(f"model {path}: no script here prunes it")
    settings = settings_of(path, given, "sparsegpt", "50%", seed=0)  # which reads all that any cell reads
    device = choose_device(settings.device)
    with contextlib.ExitStack() as stack:
        job = pipeline.Job(family, settings, None, stack, device, Clock(device))
        pipeline.check(job)
        pipeline.read_texts(job)
    measured = {"tasks": list(settings.tasks), "limit": settings.limit} if settings.tasks else {
        "eval_limit": settings.eval_limit, "texts": {name: digest(tokens) for name, tokens in job.tests.items()}}
    size = Size(tuple(job.selected.values()), job.config.vocab_size * job.config.hidden_size, job.seqlen,
                sum(tokens.numel() for tokens in job.tests.values()))
    return Subject(path, family, size, measured, digest(job.calibration))


def check_weights(subject, settings, scores):
    """Raise InputError if the file has cells of other weights or texts by the name of a model; else note these."""
    device = choose_device(settings.device)
    config = load.load_config(subject.path, subject.family)
    model = load.open_model(subject.path, config, subject.family, pipeline.choose_dtype(settings.dtype, config, device))
    now = {"weights": fingerprint(model), "calibration": subject.calibration}
    for name, value in now.items():
        if scores.dense.setdefault(subject.name, now)[name] != value:
            raise InputError(f"--output {scores.path}: holds cells of {subject.name} with other {name}; name another "
                             "file")


def measure(subject, settings):
    """Run a cell. Returns its figures, perplexities or accuracies in percent, its sparsity and seconds."""
    with contextlib.redirect_stdout(sys.stderr):
        record = pipeline.run(subject.family, settings)
    method = settings.method if settings.compresses else "dense"
    figures = record["perplexity"][method]
    if settings.tasks:
        figures = {name: 100 * _accuracy(name, found) for name, found in record["tasks"][method].items()}
        figures[AVERAGE] = mean(figures.values())
    seconds = dict(record["seconds"])
    shared = seconds.pop("sensitivity", 0.0)
    return {"figures": figures, "sparsity": record["sparsity"], "seconds": sum(seconds.values()),
            "sensitivity_seconds": shared}


def _accuracy(name, found):
    """Return the accuracy of a task, with normalised likelihoods if it has that."""
    for metric in ("acc_norm", "acc"):
        if metric in found:
            return found[metric]
    raise InputError(f"--tasks {name}: reports no accuracy (acc_norm or acc), which the table is about")


def run(subjects, given, scores):
    """Measure every cell that the file lacks."""
    for subject in subjects:
        missing = [cell for cell in cells_of(given) if not scores.find(**subject.key(*cell))]
        for number, cell in enumerate(missing):
            settings = settings_of(subject.path, given, *cell)
            if not number:
                check_weights(subject, settings, scores)
            print(f"\n{subject.name}, {' '.join(map(str, cell))}: cell {number + 1} of {len(missing)}\n",
                  file=sys.stderr, flush=True)
            scores.add(subject.key(*cell) | measure(subject, settings))


def list_missing(subjects, given, scores):
    """Print the cells that the file lacks, and about how long they take."""
    rows, total = [], 0.0
    for subject in subjects:
        settings = {cell: settings_of(subject.path, given, *cell) for cell in cells_of(given)}
        found = {cell: scores.find(**subject.key(*cell)) for cell in settings}
        done = [(cell[0], operations(settings[cell], subject.size), each["seconds"])
                for cell, each in found.items() if each]
        ranked = {settings[cell].seed for cell, each in found.items() if each and settings[cell].mixed}
        for cell in [cell for cell, each in found.items() if not each]:
            first = settings[cell].mixed and settings[cell].seed not in ranked
            ranked |= {settings[cell].seed} if first else set()
            seconds = estimate(settings[cell], subject.size, cell[0], done, first)
            rows.append([subject.name, *map(str, cell), f"{seconds:,.0f}"])
            total += seconds
    print(text_table(["model", "method", "target", "seed", "seconds"], rows))
    print(f"\n{len(rows)} cells, about {total / 3600:.2f} h: {BASIS}")


def _check(given):
    """Raise InputError for arguments that cannot be used, before anything is read. Returns the settings of a cell."""
    names = [Path(path).name for path in given.models]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"MODEL {name}: is the name of two models, which the table would not tell apart")
    for path in given.models:
        for cell in cells_of(given):
            settings = settings_of(path, given, *cell)
    check_writable("--output", given.output, SCORES)
    check_writable("--output", Path(given.output).with_suffix(".md"), MARKDOWN)
    return settings


def _run(argv):
    given = parse(argv)
    with registered():
        settings = _check(given)
        subjects = [prepare(path, given) for path in given.models]
        setup = {"dataset": given.dataset} | {name: getattr(settings, name) for name in PROTOCOL}
        scores = Scores(given.output, setup, partial(markdown, given.table, {each.name: each.measured for each in
                                                                             subjects}, given.methods), given.dry_run)
        if given.dry_run:
            return list_missing(subjects, given, scores)
        try:
            run(subjects, given, scores)
        except InputError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            error.add_note(f"what was measured is in {given.output}; the same command goes on")
            raise
    print(scores.path.with_suffix(".md").read_text(), end="")


def main(argv=None):
    """Run the command line. Returns the exit status, see `exit_status.run`."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status.run("paper.py", argv, lambda: _run(argv), REMEDY)


if __name__ == "__main__":
    sys.exit(main())
