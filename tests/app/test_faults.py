"""Break the world around the command line: damaged files, full disks, signals. One line, a status, nothing left."""

import json
import math
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, command, contents, read_little, saved_tensors
from damage import SMALL, UP, WEIGHTS, config_changed, nothing, weights_changed
from faults import FAULTS, MIXED, remote

import datautils
import generate
import results
from mixgpt.app import cli
from mixgpt.checkpoints import shards
from mixgpt.kernels import columns


def run(family, command, **places):
    """Run the command line of a family, or generate.py or results.py, here. Returns the exit status."""
    main = {"generate": generate.main, "results": results.main}.get(family) or partial(cli.main, FAMILIES[family][0])
    try:
        return main([word.format(**places) for word in command.split()])
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.fixture(autouse=True)
def little_text(monkeypatch, tmp_path_factory):
    """Read little text, as `conftest.command` does, and keep traces out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    read_little(monkeypatch)


# ---- what is broken before the run -----------------------------------------------------------------------------


def says(message):
    """Return the pattern of a line: "…" stands for anything."""
    return ".*".join(map(re.escape, message.split("…")))


@pytest.fixture(scope="module")
def made(checkpoint_folder, tmp_path_factory):
    """Give a folder with a LLaMA in the sparse format, `packed`, and traces of the dense one."""
    root = tmp_path_factory.mktemp("made")
    (root / "model").symlink_to(checkpoint_folder("llama"))
    assert run("llama", f"{MIXED} --gmp --eval --save {{root}}/packed --save-format sparse", root=root) == 0
    return root


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_gets_one_line_and_status_2_and_nothing_is_written(case, checkpoint_folder, made, tmp_path, capsys,
                                                                   monkeypatch):
    fault, root = FAULTS[case], tmp_path / "root"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint_folder("llama"), root / "model")
    (root / "made").symlink_to(made)
    fault.damage(root)
    for name, value in fault.env.items():
        monkeypatch.setenv(name, value)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    command = fault.command
    if fault.script == "llama":
        command = f"{SMALL} {command}"
        command += " --save {root}/saved" if "--save" not in command else ""
        command += " --eval builtin" if "--eval" not in command else ""
    assert run(fault.script, command, root=root) == 2
    captured = capsys.readouterr()
    line, = captured.err.splitlines()
    assert re.fullmatch(says(f"{fault.script}.py: error: {fault.message.format(root=root)}"), line), line
    assert captured.out == ""
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


# ---- what breaks while it runs ---------------------------------------------------------------------------------


def limited(nbytes):
    """Let no file of this process grow beyond nbytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def at(event, name, act, *given):
    """Act when a file of a name is opened, or is about to take its place (event "placed"), the first time."""
    waiting = [act]

    def hook(happening, arguments):
        if waiting and happening == {"opened": "open", "placed": "os.rename"}[event]:
            file = arguments[event == "placed"]
            if isinstance(file, str | Path) and Path(file).match(name):
                waiting.pop()(*given)

    sys.addaudithook(hook)


def before_next(path, act, *given):
    """Let the function at a dotted path act before it is called the next time."""
    owner, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    function = getattr(owner, name)

    def replacement(*arguments, **options):
        setattr(owner, name, function)
        act(*given)
        return function(*arguments, **options)

    setattr(owner, name, replacement)


def interrupted():
    os.kill(os.getpid(), signal.SIGINT)


def apart(errors, prepare, given):
    """Let stderr go to a pipe of its own, then prepare."""
    with open(errors, "w") as output:
        os.dup2(output.fileno(), 2)
    columns.fastest = lambda *_: columns.walk_columns  # loading the compiled ones takes longer than a run
    shards.LARGEST = 60_000  # three of them, each with a part of a layer
    prepare(*given)


class Child:
    """A run in a process of its own."""

    def __init__(self, fork, root, name, arguments, prepare, given=()):
        pipe = root / f"errors-{time.monotonic_ns()}"  # a pipe, which no limit on the size of files ends
        os.mkfifo(pipe)
        self.errors = os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
        self.process = fork(command, name, [word.format(root=root) for word in arguments.split()], os.devnull,
                            apart, (pipe, prepare, given))

    def end(self):
        """Wait for the end of the run. Returns its exit status and the lines on stderr."""
        self.process.join(600)
        with self.errors:
            return self.process.exitcode, self.errors.read().splitlines()


RUN = f"{{root}}/model builtin --sparsity .5 --eval builtin {SMALL} --save {{root}}/saved"
FULL = "… GB are free (…); free some space and continue with --resume"
STOPPED = "llama.py: interrupted; what is in the folder of --save goes on with --resume"

# What happens, the options of the run, what it says, and how many layers a --resume finds finished.
ACCIDENTS = {
    "no room for the settings": (limited, (100,), "", f"run.json cannot be written, {FULL}", 0),
    "no room for a layer": (limited, (20_000,), "", f"layer-00000.safetensors needs 0.000 GB, {FULL}", 0),
    "no room for the third layer": (
        at, ("placed", "layer-00001.json", limited, 20_000), "",
        f"layer-00002.safetensors needs 0.000 GB, {FULL}", 2),
    "no room for the last shard": (
        at, ("placed", "model-00002-of-00003.safetensors", limited, 100), "",
        f"the model needs 0.000 GB, {FULL}", 3),
    "no room for the sparse format": (
        at, ("opened", "saved/config.json", limited, 20_000), "--save-format sparse",
        f"the model needs 0.000 GB, {FULL}", 3),
    "Ctrl-C in an input's Hessian": (
        at, ("placed", "layer-00000.json", before_next, "mixgpt.pruning.hessian.InputHessian.add_batch", interrupted),
        "", None, 1),
    # the layer that is being written is completed
    "Ctrl-C while a layer is kept": (at, ("opened", "layer-00001.json.*", interrupted), "", None, 2),
    "Ctrl-C while a shard is written": (
        at, ("opened", "model-00002-of-00003.safetensors.*", interrupted), "", None, 3),
    "Ctrl-C in the traces": (
        at, ("opened", "traces.json.*", interrupted),
        "--sparsity-way weight-level --sensitivity fisher --sensitivity-file {root}/traces.json", None, 0),
}


@pytest.fixture(scope="module")
def undisturbed(fork, checkpoint_folder, tmp_path_factory):
    """Return a function that gives the contents of the folder saved by a run with some options."""
    held = {}

    def saved(options):
        if options not in held:
            root = tmp_path_factory.mktemp("undisturbed")
            (root / "model").symlink_to(checkpoint_folder("llama"))
            child = Child(fork, root, "llama", f"{RUN} {options}", nothing)
            assert child.end() == (0, [])
            held[options] = contents(root / "saved")
            held[options]["mixgpt.json"]["settings"].pop("model")
        return held[options]

    return saved


@pytest.mark.parametrize("case", ACCIDENTS)
def test_an_accident_gets_one_line_and_resume_gives_the_files_of_an_undisturbed_run(case, fork, undisturbed,
                                                                                    checkpoint_folder, tmp_path):
    prepare, given, options, message, finished = ACCIDENTS[case]
    (tmp_path / "model").symlink_to(checkpoint_folder("llama"))
    child = Child(fork, tmp_path, "llama", f"{RUN} {options}", prepare, given)
    status, (line,) = child.end()
    assert status == (2 if message else 130)
    if message:
        assert re.fullmatch(says(f"llama.py: error: --save {tmp_path}/saved: {message}"), line), line
    else:
        assert line == STOPPED
    assert not list(tmp_path.rglob("*.partial"))
    notes = list((tmp_path / "saved" / "progress").glob("layer-*.json"))
    assert len(notes) == finished
    if not finished:
        assert not (tmp_path / "saved").exists()
    again = Child(fork, tmp_path, "llama", f"{RUN} {options} --resume", nothing)
    assert again.end() == (0, [])
    found = contents(tmp_path / "saved")
    found["mixgpt.json"]["settings"].pop("model")
    assert found == undisturbed(options)


@pytest.mark.parametrize("key", [UP, "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_get_one_line(key, checkpoint_folder, tmp_path, capsys):
    shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")
    weights_changed(tmp_path, lambda state: state[key][0, 0].fill_(math.nan))
    assert run("llama", RUN, root=tmp_path) == 2
    assert capsys.readouterr().err == f"llama.py: error: {tmp_path}/model/{WEIGHTS}: {key} contains NaN or inf\n"


def removed(file, _):
    file.unlink()


def replaced(file, content):
    """Not in place: a process dies if it touches a mapped file that was truncated."""
    file.with_suffix(".new").write_bytes(content)
    file.with_suffix(".new").replace(file)


CHANGES = {  # of the model's file, after the first layer
    "removed": (removed, None, "cannot be read (No such file …)"),
    "replaced": (replaced, b"{" * 99, "cannot be read (…)"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_changes_during_a_run_gets_one_line_and_resume_goes_on(case, fork, undisturbed, checkpoint_folder,
                                                                            tmp_path):
    change, given, message = CHANGES[case]
    shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")
    file = tmp_path / "model" / WEIGHTS
    whole = file.read_bytes()
    child = Child(fork, tmp_path, "llama", RUN, at, ("placed", "layer-00000.safetensors", change, file, given))
    status, (line,) = child.end()
    assert status == 2 and re.fullmatch(says(f"llama.py: error: {file}: {message}"), line)
    file.write_bytes(whole)
    assert Child(fork, tmp_path, "llama", f"{RUN} --resume", nothing).end() == (0, [])
    found = contents(tmp_path / "saved")
    found["mixgpt.json"]["settings"].pop("model")
    assert found == undisturbed("")


# ---- what looks like a fault and is none -----------------------------------------------------------------------


@pytest.fixture
def model(checkpoint_folder, tmp_path):
    """Give the folder of a copy of a tiny LLaMA."""
    return shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")


def record_of(tmp_path, command, family="llama"):
    """Run a command line that saves, and return its record."""
    assert run(family, command, root=tmp_path) == 0
    return json.loads((tmp_path / "saved" / "mixgpt.json").read_text())


def test_a_vocabulary_padded_beyond_the_tokenizer_works(model, tmp_path):
    def pad(state):
        embeddings = state["model.embed_tokens.weight"]
        state["model.embed_tokens.weight"] = torch.cat([embeddings, torch.zeros(128, embeddings.shape[1])])

    weights_changed(tmp_path, pad)
    config_changed(tmp_path, vocab_size=VOCABULARY + 128)
    assert record_of(tmp_path, RUN)["sparsity"] == pytest.approx(0.5)


def test_code_beside_a_known_kind_of_model_is_not_executed(model, tmp_path):
    remote(tmp_path, "llama")
    assert record_of(tmp_path, RUN)["sparsity"] == pytest.approx(0.5)
    assert not (tmp_path / "executed").exists()


def test_a_hessian_that_is_not_positive_definite_is_damped_and_that_is_told(model, tmp_path, capsys):
    record = record_of(tmp_path, f"{RUN} --nsamples 1 --seqlen 8 --percdamp 0")  # 8 tokens, 32 and 48 columns
    out = capsys.readouterr().out
    for row in record["matrices"]:
        assert row["percdamp"] >= 1e-4 and row["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert re.search(rf"^layer {row['layer']} .*{row['name']}.*: Hessian not positive definite at --percdamp 0, "
                         rf"raised to {row['percdamp']:g}$", out, re.MULTILINE)


@pytest.mark.parametrize("options", ["--sparsity .5", "--prunen 2 --prunem 4", "--sparsity .5 --wbits 4",
                                     "--sparsity .5 --no-true-sequential --saliency isc"])
def test_dead_inputs_and_a_dead_linear_are_pruned(options, model, tmp_path):
    def kill(state):
        state[UP].zero_()  # all inputs of down_proj are zero
        state["model.embed_tokens.weight"][:, :5] = 0  # five of k_proj in layer 0

    weights_changed(tmp_path, kill)
    record = record_of(tmp_path, f"{{root}}/model builtin {options} --eval builtin {SMALL} --save {{root}}/saved")
    assert all(0 <= row["error"] < 1 and row["sparsity"] >= 0.499 for row in record["matrices"])
    dead, = (row for row in record["matrices"] if (row["layer"], row["name"]) == (1, "mlp.down_proj"))
    assert dead["error"] == 0
    perplexity, = record["perplexity"].values()
    assert math.isfinite(perplexity["builtin"])


def test_a_pruned_model_pruned_again_at_a_lower_sparsity_keeps_every_zero(model, tmp_path):
    record_of(tmp_path, RUN)
    (tmp_path / "saved").rename(tmp_path / "first")
    record_of(tmp_path, RUN.replace("{root}/model", "{root}/first").replace("--sparsity .5", "--sparsity .3"))
    first, second = (saved_tensors(tmp_path / name) for name in ("first", "saved"))
    for key in first:
        if "_proj" in key:
            assert (second[key][first[key] == 0] == 0).all(), key


# ---- numbers that overflow -------------------------------------------------------------------------------------


def first_with(token, samples):
    return next(number for number, sequence in enumerate(samples.tolist()) if token in sequence)


@pytest.mark.parametrize("options", ["", "--no-true-sequential"])
def test_an_input_that_is_not_finite_is_named_with_its_sequence(options, checkpoint_folder, tokenizer, tmp_path,
                                                                capsys):
    shutil.copytree(checkpoint_folder("opt"), tmp_path / "model")
    samples, _ = datautils.calibration_samples("builtin", 4, 32, 0, tokenizer)
    token = next(token for token in samples[2].tolist() if first_with(token, samples) == 2)
    # finite, and too large for a norm
    weights_changed(tmp_path, lambda state: state["model.decoder.embed_tokens.weight"][token].fill_(3e38))
    assert run("opt", f"{RUN} {options}", root=tmp_path) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "opt.py: error: layer 0 self_attn.q_proj: the Hessian contains NaN or inf, from calibration sequence 2 on"]
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("factor, perplexity", [(1e6, "inf"), (3e38, "nan")])
def test_a_perplexity_beyond_all_numbers_is_reported(factor, perplexity, model, tmp_path):
    weights_changed(tmp_path, lambda state: state["model.norm.weight"].fill_(factor))
    record = record_of(tmp_path, RUN.replace("--sparsity .5", "--sparsity .5 --gmp"))
    assert str(record["perplexity"]["magnitude"]["builtin"]) == perplexity


def test_a_cache_that_cannot_be_written_is_refused_and_nothing_is_left(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    assert run("llama", f"{RUN} --sparsity-way weight-level", root=tmp_path) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("llama.py: error: --sensitivity-file /proc/cache/mixgpt/traces-")
    assert line.endswith("cannot be written (No such file or directory); name another file")
    assert not (tmp_path / "saved").exists()
