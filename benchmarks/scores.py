"""The record of an accuracy benchmark: a JSON file that grows cell by cell, and its tables in Markdown."""

import json
import math
import os
from pathlib import Path
from statistics import mean, stdev

from mixgpt.common.errors import InputError

REFERENCE = "sparsegpt"  # the method to which the gap from the dense model is measured


class Scores:
    """What was measured so far: {"setup", "dense": {text: perplexity}, "cells": [...]}, kept in a file.

    A cell is {"method", "target", "seed", "perplexity": {text: …}, "sparsity", "seconds"}. Those of paper.py also name
    their model and what is measured, and have perplexities or accuracies as "figures"; its "dense" holds digests of the
    weights and calibration tokens of each model.
    """

    def __init__(self, path, setup, render=None, dry=False):
        """Go on with the file of the same setup, or begin one.

        render: writes the content in Markdown (default: `markdown`). dry: write no file. Raises InputError where the
        file is of another setup or no such file, or cannot be written.
        """
        self.path, self.render, self.dry = Path(path), render or markdown, dry
        if self.path.suffix != ".json":
            raise InputError(f"--output {path}: must end in .json; the tables are written beside it, in .md")
        self.content = {"setup": setup, "dense": {}, "cells": []}
        if self.path.exists():
            self._resume(setup)
        self.save()

    def _resume(self, setup):
        try:
            content = json.loads(self.path.read_text())
            held, _, _ = (content[key] for key in self.content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--output {self.path}: exists and is no record of this benchmark "
                             f"({type(error).__name__}); name another file") from error
        for name, value in setup.items():
            if held.get(name) != value:
                raise InputError(f"--output {self.path}: holds cells of another setup ({name}: {held.get(name)} there, "
                                 f"{value} here); name another file")
        self.content = content

    @property
    def dense(self):
        return self.content["dense"]

    def find(self, **key):
        """Return the cell of a method, target and seed, None where it is not there yet."""
        return next((cell for cell in self.content["cells"] if key.items() <= cell.items()), None)

    def add(self, cell):
        self.content["cells"].append(cell)
        self.save()

    def save(self):
        """Write both files, each whole or not at all."""
        if self.dry:
            return
        for path, text in {self.path: json.dumps(self.content, indent=1), self.path.with_suffix(".md"):
                           self.render(self.content)}.items():
            partial = path.with_name(path.name + ".partial")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_text(text + "\n")
                os.replace(partial, path)
            except OSError as error:
                raise InputError(f"--output {path}: cannot be written ({error.strerror})") from error


def spread(values, digits=2):
    """Write the mean of some numbers and, of more than one, their standard deviation."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def closed(perplexity, reference, dense):
    """Return the share of the gap in log-perplexity between the dense model and a reference that a method closes."""
    return 1 - math.log(perplexity / dense) / math.log(reference / dense)


def markdown(content):
    """Write a record as one table per target, methods in rows; "-" where a method is not defined or not yet run."""
    setup, dense, cells = content["setup"], content["dense"], content["cells"]
    lines = [", ".join(f"{name} {value}" for name, value in setup.items() if name not in ("weights", "texts")),
             "", "dense: " + ", ".join(f"{text} {value:.2f}" for text, value in dense.items())]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    for target in dict.fromkeys(cell["target"] for cell in cells):
        of_target = [cell for cell in cells if cell["target"] == target]
        header = [cell for text in dense for cell in (text, "gap closed")]
        header = [target, *header, "sparsity", "seconds", "seeds"]
        lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join([method, *_row(method, of_target, dense)])} |" for method in methods]
    return "\n".join(lines)


def _row(method, cells, dense):
    """Return the cells of a line behind the method's name; gaps are taken seed by seed and averaged."""
    mine = [cell for cell in cells if cell["method"] == method]
    if not mine:
        return ["-"] * (2 * len(dense) + 3)
    reference = {cell["seed"]: cell["perplexity"] for cell in cells if cell["method"] == REFERENCE}
    row = []
    for text in dense:
        shares = [closed(cell["perplexity"][text], reference[cell["seed"]][text], dense[text])
                  for cell in mine if cell["seed"] in reference]
        row += [spread([cell["perplexity"][text] for cell in mine]), f"{mean(shares):.0%}" if shares else "-"]
    return [*row, spread([100 * cell["sparsity"] for cell in mine], 3) + "%",
            f"{mean(cell['seconds'] for cell in mine):.0f}", str(len(mine))]
