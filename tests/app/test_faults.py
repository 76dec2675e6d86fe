"""Break the world around the command line: damaged files, full disks, signals. One line, a status, nothing left."""

import gzip
import itertools
import json
import math
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, command, contents, saved_tensors
from safetensors.torch import load_file, save_file

import datautils
from mixgpt.app import pipeline
from mixgpt.checkpoints import shards
from mixgpt.kernels import columns

SMALL = "--nsamples 4 --seqlen 32 --device cpu"
RUN_DIR = "mixgpt.checkpoints.run_dir.RunDir"
WEIGHTS, INDEX, NOTE = "model.safetensors", "model.safetensors.index.json", "progress/layer-00001.json"
UP = "model.layers.1.mlp.up_proj.weight"


def run(family, command, **places):
    """Run a family's command line in this process. Returns the exit status."""
    try:
        return pipeline.main(FAMILIES[family][0], [word.format(**places) for word in command.split()])
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.fixture(autouse=True)
def little_text(monkeypatch, tmp_path_factory):
    """Read and evaluate on little text, as `conftest.command` does, and keep traces out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    rows, tests = datautils.load_rows, datautils.test_tokens
    monkeypatch.setattr(datautils, "load_rows", lambda *asked: (
        lambda found, source: (found[:150], source))(*rows(*asked)))
    monkeypatch.setattr(pipeline, "test_tokens", lambda *asked: (
        lambda tokens, source: (tokens[:4], source))(*tests(*asked)))


# ---- what is broken before the run -----------------------------------------------------------------------------


def nothing(root=None):
    """Break nothing."""


def cut(file, kept):
    """Keep the first bytes of a file."""
    file.write_bytes(file.read_bytes()[:kept])


def weights_changed(root, change):
    state = load_file(root / "model" / WEIGHTS)
    change(state)
    save_file(state, root / "model" / WEIGHTS, metadata={"format": "pt"})


def filled(root, key, value):
    weights_changed(root, lambda state: state[key][0, 0].fill_(value))


def json_changed(file, **changes):
    """Change the keys of a JSON file; None removes a key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def config_changed(root, **changes):
    json_changed(root / "model" / "config.json", **changes)


def sharded(root, **index):
    """Replace the weights by two shards and an index; index: keys of the JSON to change."""
    state = load_file(root / "model" / WEIGHTS)
    (root / "model" / WEIGHTS).unlink()
    names, places = ["one.safetensors", "two.safetensors"], {}
    for number, name in enumerate(names):
        part = {key: tensor for place, (key, tensor) in enumerate(state.items()) if place % 2 == number}
        save_file(part, root / "model" / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    (root / "model" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    json_changed(root / "model" / INDEX, **index)


def leading(root, name):
    """Let the index name a file elsewhere, which is there and holds all weights."""
    shutil.copy(root / "model" / WEIGHTS, root / "elsewhere.safetensors")
    keys = load_file(root / "model" / WEIGHTS)
    sharded(root, weight_map=dict.fromkeys(keys, name.format(root=root)))


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickled(root):
    (root / "model" / WEIGHTS).unlink()
    torch.save({UP: Malicious(root / "executed")}, root / "model" / "pytorch_model.bin")


def remote(root, model_type):
    """Name code in the folder, which writes a file when it is imported."""
    code = f"open({str(root / 'executed')!r}, 'w')\nfrom transformers import LlamaConfig as Other\n"
    (root / "model" / "code.py").write_text(code)
    config_changed(root, model_type=model_type, auto_map={
        "AutoConfig": "code.Other", "AutoModelForCausalLM": "code.Other"})


def remote_tokenizer(root):
    (root / "model" / "code.py").write_text(f"open({str(root / 'executed')!r}, 'w')\n")
    (root / "model" / "tokenizer.json").unlink()
    json_changed(root / "model" / "tokenizer_config.json", tokenizer_class="Other",
                 auto_map={"AutoTokenizer": ["code.Other", None]})


def sparse(root, change):
    """Replace the model by one in the sparse format, with its sparse.json changed."""
    shutil.rmtree(root / "model")
    shutil.copytree(root / "made" / "packed", root / "model")
    described = json.loads((root / "model" / "sparse.json").read_text())
    change(described)
    (root / "model" / "sparse.json").write_text(json.dumps(described))


def described(root, **changes):
    sparse(root, lambda held: held[UP].update(changes))


def text(root, name, content):
    file = root / "texts" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def known_traces(root, change):
    """Put traces of the model there, with the text of their file changed."""
    (root / "traces.json").write_text(change((root / "made" / "traces.json").read_text()))


def with_samples(change):
    """Return a change of a file of traces that changes the numbers of every sequence."""
    def changed(text):
        content = json.loads(text)
        return json.dumps(content | {"samples": [change(row) for row in content["samples"]]})

    return changed


@dataclass
class Fault:
    """What is broken, what the line on stderr says, and what is asked for."""

    damage: object  # called with the folder in which `model` is a copy of a tiny model
    message: str
    command: str = "{root}/model builtin --sparsity .5 --eval builtin"


MIXED = (f"{{root}}/model builtin --sparsity .5 --sparsity_way weight-level --sensitivity fisher {SMALL} "
         "--sensitivity_file {root}/traces.json")
LINES = "".join(f'{{"text": "row {number}"}}\n' for number in range(999))
WIKI = "{root}/model wikitext2 --sparsity .5 --eval builtin --data-dir {root}/texts"

FAULTS = {
    # weights
    "empty weights": Fault(lambda root: cut(root / "model" / WEIGHTS, 0), f"model {{root}}/model: {WEIGHTS}"),
    "cut in the header's length": Fault(
        lambda root: cut(root / "model" / WEIGHTS, 5), f"model {{root}}/model: {WEIGHTS} is damaged"),
    "cut in the header": Fault(
        lambda root: cut(root / "model" / WEIGHTS, 200), f"model {{root}}/model: {WEIGHTS} is damaged"),
    "cut in the data": Fault(
        lambda root: cut(root / "model" / WEIGHTS, -9), f"model {{root}}/model: {WEIGHTS} is damaged"),
    "not safetensors": Fault(
        lambda root: (root / "model" / WEIGHTS).write_text("<html>\nquota exceeded\n" * 99),
        f"model {{root}}/model: {WEIGHTS} is damaged"),
    "a pointer of git LFS": Fault(
        lambda root: (root / "model" / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        f"model {{root}}/model: {WEIGHTS} is damaged"),
    "weights are a folder": Fault(
        lambda root: ((root / "model" / WEIGHTS).unlink(), (root / "model" / WEIGHTS).mkdir()),
        "model {root}/model: "),
    "no weights": Fault(lambda root: (root / "model" / WEIGHTS).unlink(), "model {root}/model: "),
    "a weight is missing": Fault(
        lambda root: weights_changed(root, lambda state: state.pop(UP)),
        f"model {{root}}/model: the checkpoint lacks {UP}"),
    "NaN": Fault(lambda root: filled(root, UP, float("nan")), f"model {{root}}/model: {UP} holds NaN or inf"),
    "inf in the embeddings": Fault(
        lambda root: filled(root, "model.embed_tokens.weight", float("inf")),
        "model {root}/model: model.embed_tokens.weight holds NaN or inf"),
    "a weight of another shape": Fault(
        lambda root: weights_changed(root, lambda state: state.update({UP: torch.zeros(47, 32)})),
        f"model {{root}}/model: {UP} is 47 x 32, its configuration asks for 48 x 32"),
    "weights of another layout": Fault(
        lambda root: config_changed(root, hidden_size=64), "its configuration asks for"),
    "more layers in the configuration": Fault(
        lambda root: config_changed(root, num_hidden_layers=4), "the checkpoint lacks model.layers.3."),
    "no shard": Fault(
        lambda root: (sharded(root), (root / "model" / "two.safetensors").unlink()), "two.safetensors"),
    "a shard is cut": Fault(
        lambda root: (sharded(root), cut(root / "model" / "two.safetensors", 99)), "two.safetensors is damaged"),
    "an index is no JSON": Fault(
        lambda root: (sharded(root), cut(root / "model" / INDEX, 99)), f"model {{root}}/model: {INDEX}"),
    "an index without a map": Fault(
        lambda root: sharded(root, weight_map=None), f"model {{root}}/model: {INDEX}"),
    "an index that is a list": Fault(
        lambda root: (sharded(root), (root / "model" / INDEX).write_text("[]")), f"model {{root}}/model: {INDEX}"),
    "an index whose map is a list": Fault(
        lambda root: sharded(root, weight_map=["one.safetensors"]), f"model {{root}}/model: {INDEX}"),
    "an index that names numbers": Fault(
        lambda root: sharded(root, weight_map={UP: 1}), "model {root}/model: its index names 1, which is not in"),
    "an index out of the folder": Fault(
        lambda root: leading(root, "../elsewhere.safetensors"),
        "model {root}/model: its index names ../elsewhere.safetensors, which is not in the folder"),
    "an index to an absolute path": Fault(
        lambda root: leading(root, "{root}/elsewhere.safetensors"),
        "model {root}/model: its index names {root}/elsewhere.safetensors, which is not in the folder"),
    "an index of .bin files out of the folder": Fault(
        lambda root: ((root / "model" / WEIGHTS).rename(root / "elsewhere"),
                      (root / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(
                          {"metadata": {}, "weight_map": {UP: "../elsewhere"}}))),
        "model {root}/model: its index names ../elsewhere, which is not in the folder"),
    "a weight of another shape in a .bin file": Fault(
        lambda root: (torch.save(load_file(root / "model" / WEIGHTS) | {UP: torch.zeros(47, 32)},
                                 root / "model" / "pytorch_model.bin"), (root / "model" / WEIGHTS).unlink()),
        f"model {{root}}/model: {UP} is (47, 32), its configuration asks for (48, 32)"),
    "a malicious pickle": Fault(pickled, "model {root}/model: "),
    "a damaged pickle": Fault(
        lambda root: (root / "model" / WEIGHTS).rename(root / "model" / "pytorch_model.bin"), "model {root}/model: "),
    # configuration and tokenizer
    "no configuration": Fault(lambda root: (root / "model" / "config.json").unlink(), "model {root}/model: "),
    "an empty configuration": Fault(lambda root: cut(root / "model" / "config.json", 0), "model {root}/model: "),
    "a cut configuration": Fault(lambda root: cut(root / "model" / "config.json", 99), "model {root}/model: "),
    "a configuration that is a list": Fault(
        lambda root: (root / "model" / "config.json").write_text("[1]"), "model {root}/model: "),
    "a binary configuration": Fault(
        lambda root: (root / "model" / "config.json").write_bytes(b"\xff\xfe\x00"), "model {root}/model: "),
    "an unknown kind": Fault(lambda root: config_changed(root, model_type="other"), "model {root}/model: "),
    "no kind": Fault(lambda root: config_changed(root, model_type=None), "model {root}/model: "),
    "a configuration that contradicts itself": Fault(
        lambda root: config_changed(root, num_attention_heads=5), "model {root}/model: "),
    "text for a number": Fault(lambda root: config_changed(root, hidden_size="32"), "model {root}/model: "),
    "no layers": Fault(
        lambda root: config_changed(root, num_hidden_layers=0), "model {root}/model: its configuration has 0 layers"),
    "a dtype that is none": Fault(lambda root: config_changed(root, dtype="float99"), "model {root}/model: "),
    "an unknown activation": Fault(lambda root: config_changed(root, hidden_act="other"), "model {root}/model: "),
    "quantized by others": Fault(
        lambda root: config_changed(root, quantization_config={"quant_method": "gptq", "bits": 4}),
        "model {root}/model: its weights are quantized by gptq; give the original model"),
    "quantized by nobody": Fault(
        lambda root: config_changed(root, quantization_config={"bits": 4}),
        "model {root}/model: its weights are quantized by an unknown method; give the original model"),
    "remote code of an unknown kind": Fault(lambda root: remote(root, "other"), "model {root}/model: "),
    "no tokenizer": Fault(
        lambda root: [file.unlink() for file in (root / "model").glob("*token*")], "model {root}/model: "),
    "a cut tokenizer": Fault(lambda root: cut(root / "model" / "tokenizer.json", 999), "model {root}/model: "),
    "a tokenizer in other code": Fault(remote_tokenizer, "model {root}/model: "),
    "a tokenizer of another model": Fault(
        lambda root: (weights_changed(root, lambda state: state.update(
            {"model.embed_tokens.weight": state["model.embed_tokens.weight"][:99].clone()})),
            config_changed(root, vocab_size=99)),
        "model {root}/model: its tokenizer gives token"),
    # the path of the model
    "a model that is a file": Fault(
        nothing, "model {root}/model/config.json: ", "{root}/model/config.json builtin"),
    "weights for a model": Fault(
        nothing, "model {root}/model/model.safetensors: ", "{root}/model/model.safetensors builtin"),
    "a damaged gguf": Fault(
        lambda root: (root / "a.gguf").write_bytes(b"GGUFjunk"), "model {root}/a.gguf: ", "{root}/a.gguf builtin"),
    # the sparse format
    "sparse: another shape": Fault(
        lambda root: described(root, shape=[47, 32]), f"model {{root}}/model: {UP}"),
    "sparse: turned": Fault(lambda root: described(root, shape=[32, 48]), f"model {{root}}/model: {UP}"),
    "sparse: a negative shape": Fault(
        lambda root: described(root, shape=[-48, 32]), f"model {{root}}/model: {UP}"),
    "sparse: a huge shape": Fault(
        lambda root: described(root, shape=[10**9, 10**9]), f"model {{root}}/model: {UP}"),
    "sparse: no shape": Fault(lambda root: described(root, shape=48), f"model {{root}}/model: {UP}"),
    "sparse: another dtype": Fault(lambda root: described(root, dtype="float16"), f"model {{root}}/model: {UP}"),
    "sparse: a dtype that is none": Fault(lambda root: described(root, dtype="load"), f"model {{root}}/model: {UP}"),
    "sparse: a part that is missing": Fault(
        lambda root: described(root, parts=["mask", "values", "codes"]), f"model {{root}}/model: {UP}"),
    "sparse: no values": Fault(lambda root: described(root, parts=["mask"]), f"model {{root}}/model: {UP}"),
    "sparse: parts elsewhere": Fault(
        lambda root: described(root, parts=["../../../etc/passwd"]), f"model {{root}}/model: {UP}"),
    "sparse: not a description": Fault(
        lambda root: sparse(root, lambda held: held.update({UP: None})), f"model {{root}}/model: {UP}"),
    "sparse: a list": Fault(
        lambda root: (sparse(root, lambda held: None), (root / "model" / "sparse.json").write_text("[]")),
        "model {root}/model: "),
    # where to save
    "save onto a file": Fault(
        lambda root: (root / "taken").write_text(""), "--save {root}/taken: exists and is not an empty folder",
        "{root}/model builtin --save {root}/taken"),
    "save into the model": Fault(
        nothing, "--save {root}/model: exists and is not an empty folder",
        "{root}/model builtin --save {root}/model"),
    "save where nobody can write": Fault(
        nothing, "--save /proc/saved/a: /proc cannot be written", "{root}/model builtin --save /proc/saved/a"),
    "save under a name that is too long": Fault(
        nothing, "--save {root}/" + "a" * 300 + ": ", "{root}/model builtin --save {root}/" + "a" * 300),
    "save to a dangling link": Fault(
        lambda root: (root / "link").symlink_to(root / "gone" / "away"), "--save {root}/link: ",
        "{root}/model builtin --save {root}/link"),
    # texts
    "no texts": Fault(nothing, "--data-dir {root}/texts: there is no such folder", WIKI),
    "a file of texts": Fault(
        lambda root: (root / "texts").write_text(""), "--data-dir {root}/texts: there is no such folder", WIKI),
    "an empty folder of texts": Fault(
        lambda root: (root / "texts").mkdir(), "--data-dir {root}/texts: no train split of wikitext2 found", WIKI),
    "a cut gzip file": Fault(
        lambda root: text(root, "wikitext/train.json.gz", gzip.compress(LINES.encode())[:500]),
        "--data-dir: {root}/texts/wikitext/train.json.gz cannot be read", WIKI),
    "a cut JSON line": Fault(
        lambda root: text(root, "wikitext/train.json", LINES[:-5]),
        "--data-dir: {root}/texts/wikitext/train.json cannot be read", WIKI),
    "other columns": Fault(
        lambda root: text(root, "wikitext/train.json", LINES.replace("text", "body")),
        "{root}/texts/wikitext/train.json has the columns body: text or sentence is needed", WIKI),
    "text that is not UTF-8": Fault(
        lambda root: text(root, "wiki.train.raw", "Überschrift\n".encode("latin-1")),
        "--data-dir: {root}/texts/wiki.train.raw cannot be read (text): 'utf-8' codec can't decode", WIKI),
    "too little text": Fault(
        lambda root: text(root, "wiki.train.raw", "a few words\n"),
        "--seqlen 32: the train text of dataset wikitext2 has", WIKI),
    "no text at all": Fault(
        lambda root: text(root, "wiki.train.raw", ""), "--data-dir: {root}/texts/wiki.train.raw holds no rows", WIKI),
    # traces
    "traces that are cut": Fault(
        lambda root: known_traces(root, lambda content: content[:500]),
        "--sensitivity_file {root}/traces.json: is not a file of traces", MIXED),
    "traces of other matrices": Fault(
        lambda root: known_traces(root, lambda content: content.replace("up_proj", "middle")),
        "--sensitivity_file {root}/traces.json: does not fit the model: layer 0 mlp.up_proj is missing there", MIXED),
    "traces of another number of matrices": Fault(
        lambda root: known_traces(root, with_samples(lambda row: row[:-1])),
        "--sensitivity_file {root}/traces.json: is not a file of traces", MIXED),
    "traces that are NaN": Fault(
        lambda root: known_traces(root, with_samples(lambda row: [math.nan for _ in row])),
        "--sensitivity_file {root}/traces.json: is not a file of traces", MIXED),
    "traces in a folder": Fault(
        lambda root: (root / "traces.json").mkdir(), "--sensitivity_file {root}/traces.json: is not a file of", MIXED),
    "traces where nobody can write": Fault(
        nothing, "--sensitivity_file /proc/a/traces.json: cannot be written",
        MIXED.replace("{root}/traces", "/proc/a/traces")),
    "a picture where nobody can write": Fault(
        nothing, "--plot /proc/a.png: ", MIXED + " --plot /proc/a.png"),
    "a picture that is a folder": Fault(
        lambda root: (root / "a.png").mkdir(), "--plot {root}/a.png: ", MIXED + " --plot {root}/a.png"),
}


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
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    command = fault.command + f" {SMALL}"
    command += " --save {root}/saved" if "--save" not in command else ""
    command += " --eval builtin" if "--eval" not in command else ""
    assert run("llama", command, root=root) == 2
    captured = capsys.readouterr()
    line, = captured.err.splitlines()
    assert line.startswith("llama.py: error: ")
    assert fault.message.format(root=root) in line
    assert captured.out == ""
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


# ---- what breaks while it runs ---------------------------------------------------------------------------------


def limited(nbytes):
    """Let no file of this process grow beyond nbytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def before_call(path, number, act, *given):
    """Replace the function at a dotted path by one that acts before its call `number`, counted from 0."""
    owner, _, name = path.rpartition(".")
    owner, calls = pkgutil.resolve_name(owner), itertools.count()
    function = getattr(owner, name)

    def replacement(*arguments, **options):
        if next(calls) == number:
            act(*given)
        return function(*arguments, **options)

    setattr(owner, name, replacement)


def limited_at(path, nbytes, number=0):
    before_call(path, number, limited, nbytes)


def interrupted():
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_at(path, number=0):
    before_call(path, number, interrupted)


def waiting(file):
    """Wait before layer 2 is kept, and say so."""
    before_call(RUN_DIR + ".finish", 2, lambda: (Path(file).touch(), time.sleep(60)))


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
        self.process.join(60)
        with self.errors:
            return self.process.exitcode, self.errors.read().splitlines()


RUN = f"{{root}}/model builtin --sparsity .5 --eval builtin {SMALL} --save {{root}}/saved"
FULL = "go on with --resume"
STOPPED = "llama.py: interrupted; what is in the folder of --save goes on with --resume"

# What happens, the options of the run, what it says, and how many layers a --resume finds finished.
ACCIDENTS = {
    "no room for the settings": (limited, (100,), "", FULL, 0),
    "no room for a layer": (
        limited, (20_000,), "", "layer-00000.safetensors needs 0.000 GB", 0),
    "no room for hidden states": (
        limited, (40_000,), "--nsamples 12", "state-00001-0.safetensors needs 0.000 GB", 1),
    "no room for the third layer": (
        limited_at, (RUN_DIR + ".finish", 20_000, 2), "", "layer-00002.safetensors needs", 2),
    "no room for the note on a layer": (limited_at, (RUN_DIR + "._write_json", 100, 2), "", FULL, 1),
    "no room for what is not in layers": (
        limited, (40_000,), "", "model-00001-of-00003.safetensors needs 0.000 GB", 3),
    "no room for the tokenizer": (limited_at, (RUN_DIR + ".complete", 100), "", FULL, 3),
    "no room for the configuration": (
        limited_at, ("mixgpt.checkpoints.shards.write_configuration", 100), "", FULL, 3),
    "no room for the names of the shards": (limited_at, (RUN_DIR + "._write_json", 100, 4), "", FULL, 3),
    "no room for the last shard": (
        limited_at, ("mixgpt.checkpoints.shards.write", 100, 2), "", "model-00003-of-00003.safetensors needs", 3),
    "no room for the index": (limited_at, (RUN_DIR + "._write_json", 100, 5), "", FULL, 3),
    "no room for the record": (
        limited_at, ("mixgpt.checkpoints.load.write_record", 100), "", "mixgpt.json cannot be written", 3),
    "no room for the record at the end": (
        limited_at, ("mixgpt.checkpoints.load.write_record", 100, 1), "", "mixgpt.json cannot be written", 3),
    "no room for grids": (
        limited_at, (RUN_DIR + "._write", 100, 4), "--wbits 4", "grids-00001.safetensors needs", 1),
    "no room for the sparse format": (
        limited_at, (RUN_DIR + "._convert", 20_000), "--save-format sparse", FULL, 3),
    "no room for compressed tensors": (
        limited_at, (RUN_DIR + "._convert", 20_000),
        "--wbits 4 --sym --save-format compressed-tensors", FULL, 3),
    "Ctrl-C while it loads": (interrupted_at, ("mixgpt.checkpoints.load.load_tokenizer",), "", None, 0),
    "Ctrl-C in an input's Hessian": (interrupted_at, ("sparsegpt.SparseGPT.add_batch", 9), "", None, 1),
    "Ctrl-C while a layer is kept": (interrupted_at, (RUN_DIR + "._write_json", 2), "", None, 1),
    "Ctrl-C by magnitude": (interrupted_at, (RUN_DIR + ".finish", 1), "--gmp", None, 1),
    "Ctrl-C while a shard is written": (interrupted_at, ("mixgpt.modeling.streaming._append", 30), "", None, 3),
    "Ctrl-C between two shards": (interrupted_at, ("mixgpt.checkpoints.shards.write", 1), "", None, 3),
    "Ctrl-C in the evaluation": (interrupted_at, ("mixgpt.app.pipeline.perplexity",), "", None, 3),
    "Ctrl-C in the traces": (
        interrupted_at, ("mixgpt.allocation.traces._write",),
        "--sparsity_way weight-level --sensitivity fisher --sensitivity_file {root}/traces.json", None, 0),
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
        assert line.startswith(f"llama.py: error: --save {tmp_path}/saved: ") and message in line
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


def test_a_disk_that_fills_up_gets_one_line_and_resume_goes_on(fork, undisturbed, checkpoint_folder, tmp_path):
    disk, many = tmp_path / "saved", "--nsamples 16"
    disk.mkdir()
    (tmp_path / "model").symlink_to(checkpoint_folder("llama"))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        status, (line,) = Child(fork, tmp_path, "llama", RUN, nothing).end()
        assert status == 2 and line.startswith(f"llama.py: error: --save {disk}: needs 0.000 GB, 0.000 GB are free in")
        assert list(disk.iterdir()) == []
        # room for the weights and a shard, which is asked for before the run, and not for the hidden states beside them
        subprocess.run(["mount", "-o", "remount,size=212k", disk], check=True)
        child = Child(fork, tmp_path, "llama", f"{RUN} {many}", nothing)
        status, (line,) = child.end()
        assert status == 2 and "GB are free" in line and line.endswith("make room and go on with --resume")
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        again = Child(fork, tmp_path, "llama", f"{RUN} {many} --resume", nothing)
        assert again.end() == (0, [])
        found = contents(disk)
        found["mixgpt.json"]["settings"].pop("model")
        assert found == undisturbed(many)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_signal_from_outside_stops_a_run_and_two_cannot_share_a_folder(fork, undisturbed, checkpoint_folder,
                                                                         tmp_path, capsys):
    (tmp_path / "model").symlink_to(checkpoint_folder("llama"))
    child = Child(fork, tmp_path, "llama", RUN, waiting, (tmp_path / "waits",))
    while not (tmp_path / "waits").exists():
        assert child.process.is_alive()
        time.sleep(0.01)
    for options in ("", " --resume"):
        assert run("llama", RUN + options, root=tmp_path) == 2
        line, = capsys.readouterr().err.splitlines()
        assert line == f"llama.py: error: --save {tmp_path}/saved: another run is writing there"
    os.kill(child.process.pid, signal.SIGINT)
    assert child.end() == (130, [STOPPED])
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
        "opt.py: error: layer 0 self_attn.q_proj: the Hessian holds NaN or inf, from calibration sequence 2 on"]
    assert not (tmp_path / "saved").exists()


def test_a_product_that_overflows_is_named(model, tmp_path, capsys):
    def grow(state):
        state[UP].fill_(1e30)
        state[UP.replace("up", "gate")].fill_(1e30)

    weights_changed(tmp_path, grow)
    assert run("llama", RUN, root=tmp_path) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("llama.py: error: layer 1 mlp.down_proj: the Hessian holds NaN or inf, from calibration "
                           "sequence 0 on")


@pytest.mark.parametrize("factor, perplexity", [(1e6, float("inf")), (3e38, float("nan"))])
def test_a_perplexity_beyond_all_numbers_is_reported(factor, perplexity, model, tmp_path):
    weights_changed(tmp_path, lambda state: state["model.norm.weight"].fill_(factor))
    record = record_of(tmp_path, RUN.replace("--sparsity .5", "--sparsity .5 --gmp"))
    assert str(record["perplexity"]["magnitude"]["builtin"]) == str(perplexity)


def test_a_cache_that_cannot_be_written_is_refused_and_nothing_is_left(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    assert run("llama", f"{RUN} --sparsity_way weight-level", root=tmp_path) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("llama.py: error: --sensitivity_file /proc/cache/mixgpt/traces-")
    assert line.endswith("cannot be written (No such file or directory); name another file")
    assert not (tmp_path / "saved").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_refused(name, model, tmp_path, capsys):
    (model / name).chmod(0)
    assert run("llama", RUN, root=tmp_path) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llama.py: error: model {model}: ")
    assert not (tmp_path / "saved").exists()
