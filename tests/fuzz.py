"""Hand damaged files to the command lines: `make fuzz`, which is not part of the tests.

An example damages one file in a few places, as bytes or within its JSON, and runs a command line in a process of its
own. It must end by itself, with status 0, or with status 2 and one line, and change nothing outside --save.
"""

import copy
import gzip
import json
import os
import re
import resource
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import command
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from makegguf import write_gguf

import generate
import results

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 500))
SECONDS = 10  # of processor time, the most a run may take
PATIENCE = 120  # of wall time, on a machine that does other things too
SMALL = "--nsamples 2 --seqlen 32 --device cpu --eval builtin --eval-limit 1"
PRUNE = f"{{root}}/model builtin --sparsity .5 {SMALL} --save {{root}}/saved"
WEIGHTS = "model.safetensors"

# ---- damage ----------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, -2**63, 10**30, 1e308]
WORDS = ["", "float32", "llama", "../../x", "/dev/zero", "\x00"]
SCALARS = st.sampled_from([None, False, True, *NUMBERS, *WORDS]) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=5), inner, max_size=3), max_leaves=6)
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "delete", "rename"]), VALUES),
                 min_size=1, max_size=3)
CUTS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["flip", "insert", "delete", "truncate"]),
                          st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)


def places(content, path=()):
    """List the paths of all values within a JSON value but itself."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = []
    for key, value in items:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def edited(content, edits):
    """Return a JSON value with some of its values replaced, deleted or renamed."""
    content = copy.deepcopy(content)
    for number, kind, value in edits:
        paths = places(content)
        if not paths:
            return value
        *above, key = paths[number % len(paths)]
        parent = content
        for step in above:
            parent = parent[step]
        if kind == "replace":
            parent[key] = value
        elif kind == "delete" or isinstance(parent, list):
            del parent[key]
        else:
            parent[str(value)] = parent.pop(key)
    return content


def dumped(content):
    return json.dumps(content).encode("utf-8", "surrogatepass")


def damaged(data, cuts, within=None):
    """Return bytes with some flipped, inserted, deleted or cut off, in the first `within` of them."""
    data = bytearray(data)
    for fraction, kind, more in cuts:
        at = int(fraction * min(len(data), within or len(data)))
        if kind == "flip" and at < len(data):
            data[at] ^= more[0] or 1
        elif kind == "insert":
            data[at:at] = more
        elif kind == "delete":
            del data[at:at + len(more)]
        elif kind == "truncate":
            del data[at:]
    return bytes(data)


DAMAGE = st.tuples(st.just("edit"), EDITS) | st.tuples(st.just("cut"), CUTS)


def damage(file, how, within=None):
    """Damage a file: {"edit": values of its JSON, "cut": bytes}."""
    kind, changes = how
    data = file.read_bytes()
    file.unlink()  # it may be a link to the original
    file.write_bytes(dumped(edited(json.loads(data), changes)) if kind == "edit" else damaged(data, changes, within))


def damage_header(file, how):
    """Damage the header of a safetensors file, keeping its length right where its JSON is edited."""
    kind, changes = how
    data = file.read_bytes()
    length, = struct.unpack("<Q", data[:8])
    file.unlink()
    if kind == "edit":
        header = dumped(edited(json.loads(data[8:8 + length]), changes))
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length:])
    else:
        file.write_bytes(damaged(data, changes, 8 + length))


# ---- runs ------------------------------------------------------------------------------------------------------


def limited(log):
    """Bound processor time and memory, and let the cache be beside the model."""
    os.environ["XDG_CACHE_HOME"] = os.path.join(os.path.dirname(log), "cache")
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + time_so_far(), SECONDS + time_so_far() + 1))


def time_so_far():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int(used.ru_utime + used.ru_stime) + 1


def script(main, arguments, log):
    """Run results.py or generate.py, for `fork`."""
    with open(log, "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    limited(log)
    sys.exit(main(arguments))


def ends(fork, root, line, scripted=None):
    """Run a command line in a process of its own. Returns its status; fails as the docstring of this file says."""
    log, arguments = root / "log", [word.format(root=root) for word in line.split()]
    before = snapshot(root)
    process = fork(script, scripted, arguments, log) if scripted else fork(
        command, "llama", arguments, log, limited, (str(log),))
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"runs for more than {PATIENCE} s")
    said = log.read_text(errors="replace")
    refusals = re.findall(r"^\w+\.py: error: .*", said, re.MULTILINE)
    assert process.exitcode in (0, 2), f"status {process.exitcode}\n{said}"
    assert "Traceback" not in said, said
    if process.exitcode == 2:
        assert len(refusals) == 1 and said.rstrip().endswith(refusals[0]), said
    assert snapshot(root) == before
    return process.exitcode


def snapshot(root):
    """Return what must stay as it is: {path: bytes} of all but the log, the cache and what --save names."""
    return {path: path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and path.relative_to(root).parts[0] not in ("log", "cache", "saved")}


@pytest.fixture
def room():
    """Return a function that gives a new folder with links to the files of a model."""
    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(10**9))

        def new(model):
            root = Path(folder) / str(next(count))
            shutil.copytree(model, root / "model", copy_function=os.link)
            shutil.rmtree(Path(folder) / str(int(root.name) - 1), ignore_errors=True)
            return root

        yield new


def fuzzed(*strategies):
    """Run a test on many examples."""
    def decorate(test):
        return settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck),
                        print_blob=True)(given(*strategies)(test))

    return decorate


@pytest.fixture
def model(checkpoint_folder):
    return checkpoint_folder("llama")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_configurations_and_tokenizers(name, fork, room, model):
    @fuzzed(DAMAGE)
    def each(how):
        root = room(model)
        damage(root / "model" / name, how)
        ends(fork, root, PRUNE)

    each()


def test_headers_of_safetensors(fork, room, model):
    @fuzzed(DAMAGE)
    def each(how):
        root = room(model)
        damage_header(root / "model" / WEIGHTS, how)
        ends(fork, root, PRUNE)

    each()


def test_gguf_files(fork, room, model, tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tokenizer)
    data = (tmp_path / "tiny.gguf").read_bytes()

    @fuzzed(CUTS)
    def each(cuts):
        root = room(model)
        (root / "tiny.gguf").write_bytes(damaged(data, cuts, 20_000))  # metadata and the table of tensors
        ends(fork, root, PRUNE.replace("model", "tiny.gguf", 1))

    each()


def test_records(fork, room, model):
    root = room(model)
    assert ends(fork, root, f"{PRUNE} --gmp") == 0
    record = (root / "saved" / "mixgpt.json").read_bytes()

    @fuzzed(DAMAGE)
    def each(how):
        root = room(model)
        (root / "run.json").write_bytes(record)
        damage(root / "run.json", how)
        ends(fork, root, "{root}/run.json", results.main)

    each()


ROWS = b"".join(dumped({"text": f"Row {number} of a text that is long enough for a sample or two.", "id": number})
                + b"\n" for number in range(40))


@pytest.mark.parametrize("name", ["train.txt", "train.json", "train.json.gz", "train.parquet", "train.arrow"])
def test_texts(name, fork, room, model, tmp_path):
    content = texts_of(name, tmp_path)

    @fuzzed(CUTS)
    @example([(0.0, "insert", b"null\n")])
    @example([(0.0, "insert", b"[" * 100_000)])
    @example([(0.0, "insert", b'{"text": null}\n')])
    def each(cuts):
        root = room(model)
        (root / "texts").mkdir()
        inner = gzip.compress(damaged(ROWS, cuts)) if name.endswith(".gz") and len(cuts) % 2 else damaged(content, cuts)
        (root / "texts" / name).write_bytes(inner)
        ends(fork, root, PRUNE.replace("builtin", f"{{root}}/texts/{name}", 1))

    each()


def texts_of(name, folder):
    """Return the bytes of a file of texts."""
    import datasets

    table = datasets.Dataset.from_list([json.loads(line) for line in ROWS.splitlines()])
    if name.endswith(".parquet"):
        table.to_parquet(folder / name)
    elif name.endswith(".arrow"):
        table.save_to_disk(folder / "saved")
        return next((folder / "saved").glob("*.arrow")).read_bytes()
    else:
        (folder / name).write_bytes(gzip.compress(ROWS) if name.endswith(".gz") else ROWS)
    return (folder / name).read_bytes()


@fuzzed(st.lists(st.sampled_from(["--temperature", "--seed", "--max_new_tokens", "--dtype", "--device", "--dense", "x"])
                 | st.floats().map(str) | st.integers().map(str) | st.text(max_size=5), max_size=6))
def test_arguments_of_generate(fork, checkpoint_folder, words):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "model").symlink_to(checkpoint_folder("llama"))
        process = fork(script, generate.main, [str(root / "model"), *words], root / "log")
        process.join(PATIENCE)
        said = (root / "log").read_text(errors="replace")
        assert process.exitcode in (0, 2) and "Traceback" not in said, said
