"""Kill runs at moments all over them, for test_resume.py."""

import builtins
import contextlib
import functools
import io
import json
import os
import signal
import threading
from multiprocessing import connection
from pathlib import Path

import torch
import transformers
from conftest import contents
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from mixgpt.allocation import backward, traces
from mixgpt.app import pipeline
from mixgpt.checkpoints import formats, load, run_dir
from mixgpt.common import runtime
from mixgpt.modeling import running, streaming

SMALL = ["--nsamples", "4", "--seqlen", "32", "--batch-size", "1", "--eval", "builtin", "--device", "cpu"]


class Moments:
    """Count what a process does to the disk and to the model, and kill it at one of these moments."""

    def __init__(self, fatal):
        self.fatal, self.passed = fatal, []
        self.lock, self.threads = threading.Lock(), threading.local()

    @property
    def parts(self):
        """The parts of the run that this thread is in, one inside the other."""
        return self.threads.__dict__.setdefault("parts", ["start"])

    def mark(self):
        """Let a moment pass, or none any more."""
        with self.lock:
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
            with self.part("half a file" if half.parent.name == "result" else self.parts[-1]):
                self.mark()  # half a file of the result
            half.unlink()

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


def watch(fatal, log, root, shard):
    """Kill this process at moment number `fatal`, or write the parts that all moments fell in to `log`."""
    moments = Moments(fatal)
    backward.SAVED_AFTER = 1  # a chunk of sequences is one batch
    formats.LARGEST = shard
    timed = runtime.Clock.part

    @contextlib.contextmanager
    def timed_part(clock, name):
        with timed(clock, name), moments.part(name):
            yield

    runtime.Clock.part = timed_part
    for name in ("save_layer", "_write", "take_distilled"):  # a thread writes what is finished
        moments.around(run_dir.RunDir, name, "finish")
    for name, part in (("keep", "kept"), ("write_checkpoint", "complete"), ("publish", "publish"), ("close", "end")):
        moments.around(run_dir.RunDir, name, part)
    moments.around(traces, "write_output", "traces")
    moments.around(running.StreamedModel, "embed")
    moments.around(running.HiddenStates, "call")
    for owner, name in ((streaming, "save_file"), (transformers.modeling_utils, "safe_save_file")):
        moments.half_written(owner, name)
    for owner in (io, builtins):
        moments.opened(owner, root)
    for name in ("replace", "fsync", "unlink", "rmdir"):
        moments.around(os, name)
    whole = pipeline.execute

    def run(*arguments):
        whole(*arguments)
        log.write_text(json.dumps(moments.passed))

    pipeline.execute = run


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
    for read in (AutoModelForCausalLM.from_pretrained, functools.partial(load.read_model, dtype="auto")):
        with contextlib.suppress(*refusals):
            model = read(path)
            return model.state_dict(), model.config.to_dict(), model.generation_config.to_dict()
    return None


def end_of(processes):
    """Wait for the processes of one run; if one dies, the others are killed, as by torchrun. Returns the exit code."""
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        for sentinel in connection.wait(list(waiting), 300) or list(waiting):
            process = waiting.pop(sentinel)
            process.join(0.1)
            if process.exitcode != 0:
                for other in (process, *waiting.values()):
                    other.kill()
    for process in processes:
        process.join()
    return next((process.exitcode for process in processes if process.exitcode), 0)


def check_goes_on(run, root, kills, whole):
    """Kill a run, and those that go on with it, at the moments `kills`; the next one must end with the right files.

    run: called with a moment and further arguments, runs a command line that saves in `root` and returns its exit code.
    whole: the folder of a run that nobody killed, which has `saved` and maybe `traces.json`.
    """
    expected = loaded(whole / "saved")
    for number, fatal in enumerate([*kills, 0]):
        status = run(fatal, *["--resume"] if number else [])
        if number and fatal and status == 0:
            break  # there was less left to do
        assert status == (-signal.SIGKILL if fatal else 0), (root / "log").read_text()
        if fatal and (found := loaded(root / "saved")):  # as a whole or not at all
            for state, whole_state in zip(found, expected, strict=True):
                assert state.keys() == whole_state.keys()
            assert all(torch.equal(tensor, expected[0][name]) for name, tensor in found[0].items())
    assert contents(root / "saved") == contents(whole / "saved"), (root, kills)
    kept = root / "traces.json"
    assert not kept.exists() or kept.read_bytes() == (whole / "traces.json").read_bytes()
