"""Kill runs at moments all over them: --resume gives what a run gives that nobody killed, bit for bit."""

import builtins
import contextlib
import functools
import io
import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from conftest import command, contents
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modelutils
from mixgpt.allocation import backward, traces
from mixgpt.app import pipeline
from mixgpt.checkpoints import run_dir, shards
from mixgpt.checkpoints.formats import load_sparse
from mixgpt.common import clock
from mixgpt.modeling import streaming

SMALL = ["--nsamples", "4", "--seqlen", "32", "--batch-size", "1", "--eval", "builtin", "--device", "cpu"]
MIXED = ["--sparsity", ".5", "--sparsity_way", "weight-level", "--sensitivity", "fisher", "--saliency", "isc"]


@dataclass
class Scenario:
    """A command line that is killed at moments in these parts of it."""

    name: str  # in FAMILIES
    options: list
    parts: list  # sets of parts of a run, of which one moment each is drawn
    patience: int = 0  # hidden states are kept behind every layer (0) or behind the first one only (10⁹)
    pickled: bool = False  # weights that cannot be left on disk
    shard: int = shards.LARGEST  # bytes


CALIBRATION = {"forward", "Hessian", "factorisation", "walk"}
SPARSEGPT = [{"forward"}, CALIBRATION, {"finish"}, {"finish"}, {"half a file"}, {"complete"}, {"complete"},
             {"evaluation"}, {"end"}]
SCENARIOS = {
    "opt": Scenario("opt", ["--sparsity", ".5"], [{"load"}, *SPARSEGPT], shard=40_000),
    "opt, in memory": Scenario("opt", ["--sparsity", ".5", "--wbits", "4"], SPARSEGPT[1:8], pickled=True),
    "llama, best": Scenario("llama", ["--preset", "best", "--sparsity", ".5"],
                            [{"gradients", "allocation"}, CALIBRATION | {"admm"}, CALIBRATION | {"admm"}, {"finish"}]),
    "opt, magnitude": Scenario("opt", ["--sparsity", ".5", "--gmp", "--wbits", "3"],
                               [{"finish"}, {"finish"}, {"finish"}, {"complete"}, {"evaluation"}, {"end"}]),
    "llama, mixed": Scenario("llama", [*MIXED, "--wbits", "4"], [{"sensitivity"}, {"traces"}, {"traces"}, {"traces"},
                                                                 *SPARSEGPT]),
    "llama, few layers": Scenario("llama", ["--prunen", "2", "--prunem", "4", "--maxlayer", "2"],
                                  [CALIBRATION, {"finish"}, {"half a file"}, {"complete"}, {"complete"}, {"complete"}],
                                  patience=10**9, shard=60_000),
    "bloom, sparse": Scenario("bloom", ["--sparsity", ".5", "--wbits", "4", "--no-true-sequential", "--save-format",
                                        "sparse"], SPARSEGPT, patience=10**9),
    "baichuan-7b, packed": Scenario("baichuan-7b", ["--sparsity", ".5", "--wbits", "4", "--sym", "--act-order",
                                                    "--save-format", "compressed-tensors"], SPARSEGPT),
}


class Moments:
    """Count what a process does to the disk and to the model, and kill it at one of these moments."""

    def __init__(self, fatal):
        self.fatal, self.passed, self.parts = fatal, [], ["start"]

    def mark(self):
        """Let a moment pass, or none any more."""
        self.passed.append(self.parts[-1])
        if len(self.passed) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def part(self, name):
        self.parts.append(name)
        yield
        self.parts.pop()

    def around(self, owner, name, part=None):
        """Make moments before and behind each call of a function, which may be a part of the run."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def wrapped(*args, **options):
            with self.part(part or self.parts[-1]):
                self.mark()
                result = call(*args, **options)
                self.mark()
            return result

        setattr(owner, name, wrapped)

    def half_written(self, owner, name):
        """Make a moment at which safetensors has written half of a file, under the kind of name that it takes."""
        call = getattr(owner, name)

        def wrapped(tensors, file, **options):
            call(tensors, file, **options)
            content, half = Path(file).read_bytes(), Path(file).with_name(f".tmp{os.getpid()}")
            half.write_bytes(content[:len(content) // 2])
            with self.part("half a file"):
                self.mark()
            half.unlink()

        setattr(owner, name, wrapped)

    def partly_written(self, owner, name):
        """Make a moment before each tensor that is appended to a file."""
        call = getattr(owner, name)

        def wrapped(stream, tensor):
            stream.flush()
            with self.part("half a file" if Path(stream.name).parent.name == "saved" else self.parts[-1]):
                self.mark()  # half a file of the result
            return call(stream, tensor)

        setattr(owner, name, wrapped)

    def opened(self, owner, root):
        """Make a moment behind each opening of a file to write in, when what was there is lost."""
        call = owner.open

        def wrapped(file, mode="r", *args, **options):
            result = call(file, mode, *args, **options)
            if "w" in mode and str(file).startswith(str(root)):
                self.mark()
            return result

        owner.open = wrapped


def watch(fatal, log, root, patience, shard):
    """Kill this process at moment number `fatal`, or write the parts that all moments fell in to `log`."""
    moments = Moments(fatal)
    run_dir.PATIENCE, backward.BORDERS = patience, 1  # a chunk of sequences is one batch
    shards.LARGEST = shard
    timed = clock.Clock.part

    @contextlib.contextmanager
    def part(clock, name):
        with timed(clock, name), moments.part(name):
            yield

    clock.Clock.part = part
    for name in ("finish", "complete", "end"):
        moments.around(run_dir.RunDir, name, name)
    moments.around(traces, "_write", "traces")
    for name in ("embed", "call"):
        moments.around(modelutils.Stream, name)
    moments.partly_written(streaming, "_append")
    moments.half_written(transformers.modeling_utils, "safe_save_file")
    for owner in (io, builtins):
        moments.opened(owner, root)
    for name in ("replace", "fsync", "unlink", "rmdir"):
        moments.around(os, name)
    whole = pipeline.run

    def run(*arguments):
        whole(*arguments)
        log.write_text(json.dumps(moments.passed))

    pipeline.run = run


@pytest.fixture
def launch(fork, checkpoint_folder, tmp_path, monkeypatch):
    """Return a function that starts a scenario's command line in a process, to be killed at a moment or not at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def source(scenario):
        kept = checkpoint_folder(scenario.name)
        if not scenario.pickled:
            return kept
        path = tmp_path / "pickled"
        if not path.exists():
            path.mkdir()
            for file in kept.iterdir():
                (path / file.name).write_bytes(file.read_bytes())
            torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
            (path / "model.safetensors").unlink()
        return path

    def start(scenario, saved, fatal, *more):
        root = tmp_path / saved
        root.mkdir(exist_ok=True)
        arguments = [source(scenario), "builtin", *scenario.options, *SMALL, "--save", root / "saved", *more]
        if "--sensitivity" in scenario.options:
            arguments += ["--sensitivity_file", root / "traces.json"]
        return fork(command, scenario.name, arguments, root / "log", watch,
                    (fatal, root / "moments.json", root, scenario.patience, scenario.shard))

    return start


def drawn(passed, parts, generator):
    """Draw a moment of each set of parts, all different. passed: the part of every moment of a run."""
    chosen = []
    for among in parts:
        candidates = [n for n, part in enumerate(passed, 1) if part in among and n not in chosen]
        assert candidates, f"no moment in {among}"
        chosen.append(generator.choice(candidates))
    return chosen


def loaded(path):
    """Return what plain transformers loads from a folder (for the sparse format our loader), None if it refuses."""
    refusals = (OSError, ValueError, KeyError, SafetensorError)
    with contextlib.suppress(*refusals):
        model = AutoModelForCausalLM.from_pretrained(path)
        return model.state_dict(), model.config.to_dict(), model.generation_config.to_dict()
    with contextlib.suppress(*refusals):
        model = load_sparse(path)
        return model.state_dict(), model.config.to_dict(), model.generation_config.to_dict()
    return None


def check_loads_as_a_whole_or_not(path, whole):
    """Check a folder right behind a kill. Returns whether it can be loaded."""
    found = loaded(path)
    if found is None:
        return False
    state, *configurations = found
    assert state.keys() == whole[0].keys()
    assert all(torch.equal(tensor, whole[0][name]) for name, tensor in state.items())
    assert all(mine | {"_name_or_path": ""} == its | {"_name_or_path": ""}
               for mine, its in zip(configurations, whole[1:], strict=True))
    return True


def check_goes_on(launch, scenario, saved, root, kills, whole):
    """Kill a run, and those that go on with it, at the moments `kills`; the next one must end with the right files."""
    for number, fatal in enumerate([*kills, 0]):
        process = launch(scenario, saved, fatal, *["--resume"] if number else [])
        yield process  # wait
        if number and fatal and process.exitcode == 0:
            break  # there was less left to do
        output = (root / saved / "log").read_text()
        assert process.exitcode == (-signal.SIGKILL if fatal else 0), output
        if fatal:
            check_loads_as_a_whole_or_not(root / saved / "saved", whole)
            if complete_but_for_an_empty_folder(root / saved / "saved"):
                break
    assert contents(root / saved / "saved") == contents(root / "whole" / "saved"), (saved, kills)
    kept = root / saved / "traces.json"
    assert not kept.exists() or kept.read_bytes() == (root / "whole" / "traces.json").read_bytes()


def complete_but_for_an_empty_folder(saved):
    """Tell whether a run was killed after it had taken back that it runs, when it could only remove an empty folder."""
    progress = saved / "progress"
    if run_dir.begun(saved) or not (saved / "mixgpt.json").exists():
        return False
    for file in progress.iterdir() if progress.exists() else ():
        assert file.name == "lock"
        file.unlink()
    return True


def side_by_side(chains, count=2):
    """Go through generators that wait for the processes they yield, some of them at a time."""
    waiting, running = list(chains), []
    while waiting or running:
        while waiting and len(running) < count:
            chain = waiting.pop(0)
            running.append((chain, next(chain)))
        (chain, process), *running = running
        process.join()
        with contextlib.suppress(StopIteration):
            running.append((chain, next(chain)))


@pytest.mark.parametrize("case", SCENARIOS)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_files(case, launch, tmp_path):
    scenario, generator = SCENARIOS[case], random.Random(case)
    process = launch(scenario, "whole", 0)
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole" / "log").read_text()
    passed = json.loads((tmp_path / "whole" / "moments.json").read_text())
    whole = loaded(tmp_path / "whole" / "saved")
    assert whole is not None

    singly = drawn(passed, scenario.parts, generator)
    chains = [[fatal] for fatal in singly]
    started = passed.index("finish")  # killed again, where they have come further or not
    chains.append([generator.randrange(started, len(passed)) for _ in range(3)])
    side_by_side(check_goes_on(launch, scenario, f"killed{number}", tmp_path, kills, whole)
                 for number, kills in enumerate(chains))


def test_enough_moments_in_every_part_of_a_run_are_tried():
    parts = [part for scenario in SCENARIOS.values() for part in scenario.parts]
    assert len(parts) >= 20
    assert {"opt", "llama", "bloom", "baichuan-7b"} == {scenario.name for scenario in SCENARIOS.values()}
    assert {"load", "sensitivity", "traces", "walk", "finish", "half a file", "complete", "evaluation",
            "end"} <= set().union(*parts)
