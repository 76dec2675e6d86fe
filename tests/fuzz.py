"""Hand damaged files to the command lines: `make fuzz`, which is not part of the tests.

An example damages one file in a few places, as bytes or within its JSON, and runs a command line in a process of its
own. It must end by itself, with status 0, or with status 2 and one line, and change nothing outside --save. Sizes stay
small: a configuration of a million layers is one that takes long to build.
"""

import copy
import gzip
import json
import os
import re
import shutil
import struct
import sys

import pytest
from conftest import command
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from makegguf import write_gguf

import results

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 50))
LONGEST = 120  # seconds that a run may take, on a machine that does other things too
SMALL = "--nsamples 2 --seqlen 32 --device cpu --eval builtin --eval-limit 1"
PRUNE = f"{{root}}/model builtin --sparsity .5 {SMALL} --save {{root}}/saved"

# ---- damage ----------------------------------------------------------------------------------------------------

SCALARS = st.sampled_from([None, False, True, 0, 1, -1, 2, 3, 7, 100, "", "float32", "llama", "../../x", "/dev/zero",
                           "\x00"]) | st.floats(-100, 100) | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=5), inner, max_size=3), max_leaves=6)
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "delete", "rename"]), VALUES),
                 min_size=1, max_size=3)
CUTS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["flip", "insert", "delete", "truncate"]),
                          st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)


def places(content, path=()):
    """List the paths of all values within a JSON value but itself."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


def edited(data, edits):
    """Return JSON, as bytes, with some of its values replaced, deleted or renamed."""
    content = json.loads(data)
    for number, kind, value in edits:
        if not (paths := places(content)):
            break
        *above, key = paths[number % len(paths)]
        parent = content
        for step in above:
            parent = parent[step]
        if kind == "replace":
            parent[key] = copy.deepcopy(value)
        elif kind == "delete" or isinstance(parent, list):
            del parent[key]
        else:
            parent[str(value)] = parent.pop(key)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def cut(data, cuts):
    """Return bytes with some flipped, inserted, deleted or cut off."""
    data = bytearray(data)
    for fraction, kind, more in cuts:
        at = int(fraction * len(data))
        if kind == "flip" and at < len(data):
            data[at] ^= more[0] or 1
        elif kind == "insert":
            data[at:at] = more
        elif kind == "delete":
            del data[at:at + len(more)]
        elif kind == "truncate":
            del data[at:]
    return bytes(data)


DAMAGE = st.tuples(st.just(edited), EDITS) | st.tuples(st.just(cut), CUTS)


def replace(file, data):
    """Give a file, which may be a link to another one, other bytes."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


# ---- runs ------------------------------------------------------------------------------------------------------


def compare(arguments, log):
    """Run results.py, for `fork`."""
    with open(log, "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.exit(results.main(arguments))


def keep_cache(root):
    """Let the cache be beside the model."""
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")


def check_run(fork, root, line, script="llama"):
    """Run a command line in a process of its own. Fails as the docstring of this file says."""
    log, arguments = root / "log", [word.format(root=root) for word in line.split()]
    before = snapshot(root)
    process = fork(compare, arguments, log) if script == "results" else fork(
        command, script, arguments, log, keep_cache, (root,))
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"runs for more than {LONGEST} s")
    said = log.read_text(errors="replace")
    refusals = re.findall(r"^\w+\.py: error: .*", said, re.MULTILINE)
    assert process.exitcode in (0, 2), f"status {process.exitcode}\n{said}"
    assert "Traceback" not in said, said
    assert process.exitcode == 0 or len(refusals) == 1 and said.rstrip().endswith(refusals[0]), said
    assert snapshot(root) == before


def snapshot(root):
    """Return what must stay as it is: {path: bytes} of all but the log, the cache and what --save names."""
    return {path: path.read_bytes() for path in sorted(root.rglob("*"))
            if path.is_file() and path.relative_to(root).parts[0] not in ("log", "cache", "saved")}


@pytest.fixture
def new_root(checkpoint_folder, tmp_path):
    """Return a function that gives a new folder with links to the files of a model."""
    def new():
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        shutil.copytree(checkpoint_folder("llama"), tmp_path / "root" / "model", copy_function=os.link)
        return tmp_path / "root"

    return new


def fuzzed(*strategies):
    """Run a test on many examples."""
    def decorate(test):
        return settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck),
                        print_blob=True)(given(*strategies)(test))

    return decorate


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_configurations_and_tokenizers(name, fork, new_root):
    @fuzzed(DAMAGE)
    def each(damage):
        root, (change, changes) = new_root(), damage
        file = root / "model" / name
        replace(file, change(file.read_bytes(), changes))
        check_run(fork, root, PRUNE)

    each()


def test_headers_of_safetensors(fork, new_root):
    @fuzzed(DAMAGE)
    def each(damage):
        root, (change, changes) = new_root(), damage
        file = root / "model" / "model.safetensors"
        data = file.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = edited(data[8:end], changes) if change is edited else None
        head = struct.pack("<Q", len(header)) + header if header else cut(data[:end], changes)
        replace(file, head + data[end:])
        check_run(fork, root, PRUNE)

    each()


def test_gguf_files(fork, new_root, tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tokenizer)
    data = (tmp_path / "tiny.gguf").read_bytes()

    @fuzzed(CUTS)
    def each(cuts):
        root = new_root()
        replace(root / "tiny.gguf", cut(data[:20_000], cuts) + data[20_000:])  # metadata and the table of tensors
        check_run(fork, root, PRUNE.replace("model", "tiny.gguf", 1))

    each()


def test_records(fork, new_root):
    root = new_root()
    check_run(fork, root, f"{PRUNE} --gmp")
    record = (root / "saved" / "mixgpt.json").read_bytes()

    @fuzzed(DAMAGE)
    def each(damage):
        root, (change, changes) = new_root(), damage
        replace(root / "run.json", change(record, changes))
        check_run(fork, root, "{root}/run.json", "results")

    each()


ROWS = b"".join(json.dumps({"text": f"Row {number} of a text that is long enough for a sample or two.", "id": number}
                           ).encode() + b"\n" for number in range(40))


@pytest.mark.parametrize("name", ["train.txt", "train.json", "train.json.gz", "train.parquet"])
def test_texts(name, fork, new_root, tmp_path):
    content = texts_of(name, tmp_path)

    @fuzzed(CUTS)
    @example([(0.0, "insert", b"null\n")])
    @example([(0.0, "insert", b'{"text": null}\n')])
    def each(cuts):
        root = new_root()
        (root / "texts").mkdir()
        inner = gzip.compress(cut(ROWS, cuts)) if name.endswith(".gz") and len(cuts) % 2 else cut(content, cuts)
        replace(root / "texts" / name, inner)
        check_run(fork, root, PRUNE.replace("builtin", f"{{root}}/texts/{name}", 1))

    each()


def texts_of(name, folder):
    """Return the bytes of a file of texts."""
    if not name.endswith(".parquet"):
        return gzip.compress(ROWS) if name.endswith(".gz") else ROWS
    import datasets

    datasets.Dataset.from_list([json.loads(line) for line in ROWS.splitlines()]).to_parquet(folder / name)
    return (folder / name).read_bytes()
