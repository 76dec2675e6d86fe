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
from functools import partial
from pathlib import Path

import datasets
import pytest
from conftest import command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makegguf import write_gguf

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 50))
LONGEST = 120  # seconds that a run may take, on a machine that does other things too
SMALL = "--nsamples 2 --seqlen 32 --device cpu --eval builtin --eval-limit 1"
PRUNE = f"{{root}}/model builtin --sparsity .5 {SMALL} --save {{root}}/saved"

SCALARS = st.sampled_from([None, False, True, 0, 1, -1, 2, 3, 7, 100, "", "float32", "llama", "../../x", "/dev/zero",
                           "\x00"]) | st.floats(-100, 100) | st.text(max_size=8)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=5), inner, max_size=3), max_leaves=6)
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "delete", "rename"]), VALUES),
                 min_size=1, max_size=3)
CUTS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9), st.sampled_from(
    ["replace", "insert", "delete", "truncate"])), min_size=1, max_size=4)


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
    """Return bytes with some replaced, inserted, deleted or cut off."""
    for fraction, more, kind in cuts:
        at = int(fraction * len(data))
        gone = {"insert": 0, "truncate": len(data)}.get(kind, len(more))
        data = data[:at] + (more if kind in ("replace", "insert") else b"") + data[at + gone:]
    return data


EDITED, CUT = EDITS.map(lambda edits: partial(edited, edits=edits)), CUTS.map(lambda cuts: partial(cut, cuts=cuts))


def replace(file, data):
    """Give a file, which may be a link to another one, other bytes."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def keep_cache(root):
    """Let the cache be beside the model."""
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")


def check_run(fork, root, line):
    """Run a command line in a process of its own. Fails as the docstring of this file says."""
    log, arguments = root / "log", [word.format(root=root) for word in line.split()]
    before = snapshot(root)
    process = fork(command, "llama", arguments, log, keep_cache, (root,))
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
def fuzz(fork, checkpoint_folder, tmp_path):
    """Return a function that runs a command line on many examples of damage, each in a new folder with a model."""
    def fuzz(strategy, damage, line=PRUNE):
        """damage: called with the folder and an example of the strategy, a function that changes bytes."""
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
        @given(strategy)
        def each(change):
            root = tmp_path / "root"
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(checkpoint_folder("llama"), root / "model", copy_function=os.link)
            damage(root, change)
            check_run(fork, root, line)

        each()

    return fuzz


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_configurations_and_tokenizers(name, fuzz):
    def damage(root, change):
        replace(root / "model" / name, change((root / "model" / name).read_bytes()))

    fuzz(EDITED | CUT, damage)


def test_headers_of_safetensors(fuzz):
    def damage(root, change):
        file = root / "model" / "model.safetensors"
        data = file.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        if change.func is edited:
            header = change(data[8:end])
            replace(file, struct.pack("<Q", len(header)) + header + data[end:])
        else:
            replace(file, change(data[:end]) + data[end:])

    fuzz(EDITED | CUT, damage)


def test_gguf_files(fuzz, tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tokenizer)
    data = (tmp_path / "tiny.gguf").read_bytes()
    fuzz(CUT, lambda root, change: replace(root / "tiny.gguf", change(data[:20_000]) + data[20_000:]),
         PRUNE.replace("model", "tiny.gguf", 1))  # metadata and the table of tensors


ROWS = b"".join(json.dumps({"text": f"Row {number} of a text that is long enough for a sample or two.", "id": number}
                           ).encode() + b"\n" for number in range(40))

@pytest.mark.parametrize("name", ["train.txt", "train.json", "train.json.gz", "train.parquet"])
def test_texts(name, fuzz, tmp_path):
    datasets.Dataset.from_list([json.loads(line) for line in ROWS.splitlines()]).to_parquet(tmp_path / "parquet")
    contents = {".gz": gzip.compress(ROWS), ".parquet": (tmp_path / "parquet").read_bytes()}

    def damage(root, change):
        (root / "texts").mkdir()
        inner = gzip.compress(change(ROWS)) if name.endswith(".gz") and len(change.keywords["cuts"]) % 2 else change(
            contents.get(Path(name).suffix, ROWS))
        replace(root / "texts" / name, inner)

    fuzz(CUT, damage, PRUNE.replace("builtin", f"{{root}}/texts/{name}", 1))
