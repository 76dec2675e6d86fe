"""Accuracy by cells: each is a command line of this program, run in this process, and its figures are kept in a file.

A benchmark that is started again measures only the command lines that its file lacks.
"""

import argparse
import contextlib
import gc
import json
import math
import re
import shlex
import sys
from pathlib import Path
from statistics import mean

from mixgpt.app import pipeline
from mixgpt.app.cli import Parser, parse
from mixgpt.common.errors import InputError, reading
from mixgpt.common.files import write_output

DENSE = "dense", "0%"
NOT_PRUNING = ("load", "data", "save", "evaluation", "verification", "tasks", "W&B")  # parts of a run


def flags_of(target):
    """Return the flags of a target such as "50%", "2:4", "4bit" or "50%+4bit"."""
    percent, n, m, wbits = re.fullmatch(r"(?:(\d+)%|(\d+):(\d+))?\+?(?:(\d+)bit)?", target).groups()
    sparsity = f"--sparsity {int(percent) / 100}" if percent else f"--prunen {n} --prunem {m}" if n else ""
    return f"{sparsity} --wbits {wbits}" if wbits else sparsity


def cell_of(words, method, target, seed, flags):
    """Return a cell to be measured. words: of the command line, all but those of method, target and seed.

    Raises InputError if the command line is not one, or flags for all runs prune the dense model.
    """
    words = [*words, *flags.split(), *flags_of(target).split(), "--seed", str(seed)]
    made = parse("llama.py", words).method()
    if method == "dense" and made != method:
        raise InputError(f"llama.py {shlex.join(words)}: is {made}, not dense; leave such flags for all runs out")
    return {"model": words[0], "method": method, "target": target, "seed": seed,
            "command": shlex.join(["llama.py", *words])}  # which prunes every family


def measure(command):
    """Run a command line. Returns its perplexities or accuracies in percent, sparsity, commit, and costs of pruning.

    With --dense among its flags the distance to the dense model is there, too, {text: {"KL": in nats, …}}. Accuracies
    have normalised likelihoods if they can; tasks without have NaN. Sensitivities are apart: later runs read them from
    the cache.
    """
    _, *words = shlex.split(command)
    gc.collect()
    if (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5")  # Linux forgets the peak of the runs before
    with contextlib.redirect_stdout(sys.stderr):
        record = pipeline.execute(parse("llama.py", words))
    *_, figures = record["perplexity"].values()
    if "tasks" in record:
        *_, scores = record["tasks"].values()
        figures = {task: 100 * of.get("acc_norm", of.get("acc", math.nan)) for task, of in scores.items()}
        figures["average"] = mean(figures.values())
    seconds = {part: value for part, value in record["seconds"].items() if part not in NOT_PRUNING}
    *_, distance = record.get("distance", {"": {}}).values()
    return {"figures": figures, "distance": distance, "sparsity": record["sparsity"],
            "sensitivity_seconds": seconds.pop("sensitivity", 0.0), "seconds": sum(seconds.values()),
            "peak_bytes": max(record["peak_memory"].values()), "commit": record["program"]["commit"]}


class Scores:
    """The cells measured so far, in a JSON file, and their tables beside it, in Markdown."""

    def __init__(self, path, render):
        """render: writes cells in Markdown. Raises InputError for a file that holds no cells."""
        self.path, self.render, self.measured = Path(path), render, {}
        if self.path.suffix != ".json":
            raise InputError(f"--output {path}: must end in .json; the tables are written beside it, in .md")
        self._read()

    def _read(self):
        """Take up the cells of the file, to which other processes may write, too."""
        if self.path.exists():
            with reading(f"--output {self.path}: exists and holds no cells of this benchmark"):
                self.measured |= {cell["command"]: cell for cell in json.loads(self.path.read_text())["cells"]}

    def missing(self, cells):
        """Return the cells that the file lacks or has as "superseded", for a reason, by what is measured now."""
        return [cell for cell in cells if "superseded" in self.measured.get(cell["command"], ["superseded"])]

    def hours(self, cells):
        """Say how long pruning takes in cells, by those of the same model and method, as far as there are any."""
        known = {}
        for cell in self.measured.values():
            if cell["seconds"] is not None:  # as in cells that were timed elsewhere
                known.setdefault((cell["model"], cell["method"]), []).append(cell["seconds"])
        times = [mean(of) for cell in cells if (of := known.get((cell["model"], cell["method"])))]
        unknown = f", and {len(cells) - len(times)} of unknown time" if len(times) < len(cells) else ""
        return f"{sum(times) / 3600:.1f} h of pruning{unknown}"

    def run(self, cells):
        """Measure the cells that the file lacks, one after the other. Returns the table of all of them."""
        missing, table = self.missing(cells), self._save(cells, {})
        print(f"{self.path}: lacks {len(missing)} of {len(cells)} cells, {self.hours(missing)}", file=sys.stderr)
        for number, cell in enumerate(missing, 1):
            print(f"\n{number} of {len(missing)}: python {cell['command']}\n", file=sys.stderr, flush=True)
            table = self._save(cells, {cell["command"]: cell | measure(cell["command"])})
        return table

    def _save(self, cells, new):
        """Write all that is measured, and the table of the cells. new: {command: cell}. Returns the table."""
        self._read()
        self.measured |= new
        write_output("--output", self.path, json.dumps({"cells": list(self.measured.values())}, indent=1) + "\n")
        table = self.render([self.measured[cell["command"]] for cell in cells if cell["command"] in self.measured])
        write_output("--output", self.path.with_suffix(".md"), table + "\n")
        return table


def parser_of(name, description):
    """Return a parser for `parse_known_args`: the arguments that it does not know are flags of all runs."""
    return Parser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def spread(values, digits=2):
    """Write the mean of some numbers and, of more than one, their standard deviation."""
    text, differences = f"{mean(values):.{digits}f}", [value - mean(values) for value in values]
    return text if len(values) < 2 else f"{text} ± {math.hypot(*differences) / (len(values) - 1) ** 0.5:.{digits}f}"


def table_of_markdown(header, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
