"""Kill many runs at random moments, and compare what --resume makes of them with a run that nobody killed (make soak).

Each row of the table is a command line on a tiny model. Its moments are writes to the disk and steps of the model; the
parts of a run that they fall in take turns. Exit status 1 if a folder differs in one bit.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from conftest import as_rank, command, forking, free_port, make, train_tokenizer
from kills import SMALL, check_goes_on, drawn, side_by_side, watch

from mixgpt.app.tables import table

SHARD = 60_000  # bytes: three shards
QUANTIZED = ["--sparsity", ".5", "--wbits", "4"]
ROWS = {  # name: (arguments, processes)
    "SparseGPT": (["--sparsity", ".5"], 1),
    "best": (["--preset", "best", "--sparsity", ".5"], 1),
    "2:4": (["--prunen", "2", "--prunem", "4"], 1),
    "50% + 4 bit, dense": (QUANTIZED, 1),
    "50% + 4 bit, sparse": ([*QUANTIZED, "--save-format", "sparse"], 1),
    "50% + 4 bit, compressed-tensors": ([*QUANTIZED, "--sym", "--save-format", "compressed-tensors"], 1),
    "SparseGPT, 2 processes": (["--sparsity", ".5"], 2),
    "best, 2 processes": (["--preset", "best", "--sparsity", ".5"], 2),
}


class Together:
    """Processes of one run; if one dies, the others are killed, as by torchrun."""

    def __init__(self, processes):
        self.processes, self.exitcode = processes, None

    def join(self):
        until = time.monotonic() + 300
        while self.exitcode is None:
            codes = [process.exitcode for process in self.processes]
            bad = next((code for code in codes if code), None)
            if bad or time.monotonic() > until:
                for process in self.processes:
                    process.kill()
            if bad or None not in codes:
                self.exitcode = bad or 0
            self.processes[0].join(0.02)
        for process in self.processes:
            process.join()


def member(rank, world, port, *watched):
    """Be one of the processes of a run, and let `watch` watch it."""
    if world > 1:
        as_rank(rank, world, port)
    watch(*watched)


def start(fork, model, row, root, victim, fatal, *more):
    """Start a row's command line in `root`, whose process `victim` is killed at a moment, or none at moment 0."""
    options, world = ROWS[row]
    root.mkdir(exist_ok=True)
    arguments, port = [model, "builtin", *options, *SMALL, "--save", root / "saved", *more], free_port()
    return Together([fork(command, "llama", arguments, root / ("log" if rank == victim else f"log-{rank}"), member, (
        rank, world, port, fatal if rank == victim else 0, root / f"moments-{rank}.json", root, SHARD))
        for rank in range(world)])


def choose(passed, count, generator):
    """Draw `count` moments, as many as possible from every part of a run."""
    left = {part: passed.count(part) for part in passed}
    parts = []
    while len(parts) < min(count, len(passed)):
        for part in generator.sample(sorted(left), len(left)):
            if left[part]:
                left[part] -= 1
                parts.append({part})
    return drawn(passed, parts[:count], generator)


def guarded(chain, failures, what):
    """Go through a chain, and keep what it finds wrong."""
    try:
        yield from chain
    except AssertionError as error:
        failures.append(f"{what}: {error}")


def soak(fork, model, row, root, count, seed):
    """Kill `count` runs of a row. Returns its line of the table and what was wrong."""
    began, generator, failures, world = time.monotonic(), random.Random(f"{row} {seed}"), [], ROWS[row][1]
    root.mkdir()
    whole = start(fork, model, row, root / "whole", 0, 0)
    whole.join()
    if whole.exitcode:
        return [row, "-", "0", "-", "-"], [f"{row}: {(root / 'whole' / 'log').read_text()}"]
    passed = [json.loads((root / "whole" / f"moments-{rank}.json").read_text()) for rank in range(world)]
    victims = [number % world for number in range(count)]
    moments = {rank: choose(passed[rank], victims.count(rank), generator) for rank in range(world)}
    kills = [(victim, moments[victim].pop()) for victim in victims if moments[victim]]
    side_by_side((guarded(check_goes_on(partial(start, fork, model, row, root / str(number), victim),
                                        root / str(number), [fatal], root / "whole"),
                          failures, f"{row}, process {victim}, moment {fatal} ({passed[victim][fatal - 1]})")
                  for number, (victim, fatal) in enumerate(kills)), count=max(1, (os.cpu_count() or 1) // world))
    parts = len({passed[victim][fatal - 1] for victim, fatal in kills})
    return [row, str(len(kills)), str(parts), str(len(kills) - len(failures)),
            f"{time.monotonic() - began:.0f}"], failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each row (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the folder
    lines, failures = [], []
    with (tempfile.TemporaryDirectory(prefix="soak") as root, forking() as fork,
          contextlib.redirect_stderr(io.StringIO())):  # the progress bars of transformers
        root = Path(root)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        make("llama")[1].save_pretrained(root / "model")
        train_tokenizer(root / "model")
        for number, row in enumerate(ROWS):
            line, wrong = soak(fork, root / "model", row, root / f"row{number}", given.kills, given.seed)
            print(f"{row}: {line[3]} of {line[1]} equal, {line[4]} s", flush=True)
            lines.append(line)
            failures += wrong
    print("\n" + table(["run", "killed", "parts", "equal", "seconds"], lines), *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
