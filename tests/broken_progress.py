"""Damage to the folder of an interrupted run, for a runner of its own: test_damaged_progress.py.

The run has pruned two of three layers of a LLaMA, with the hidden states before the last one kept; or, in "shards", has
written the first of its shards.
"""

import os
import re
import shutil
from dataclasses import dataclass

from damage import cut


@dataclass
class Damage:
    """What is done to the folder `progress` of an interrupted run, and what `--resume` says."""

    act: object  # called with that folder
    said: list  # the lines of what is computed again; or the line with which the run is refused
    interrupted: str = "quantized"  # a key of RUNS
    left: tuple = ()  # foreign files, which stay


RUNS = {  # options of the runs that are interrupted
    "quantized": "--sparsity .5 --wbits 4",
    "planned": "--preset best --sparsity .5",
    "shards": "--sparsity .5",
}


def flip(file, place):
    """Change a bit of a byte."""
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def exchanged(file, other):
    shutil.copyfile(file.parent / other, file)


def folder(file):
    file.unlink()
    file.mkdir()
    (file / "inside").write_text("")


WAYS = {
    "is missing": lambda file: file.unlink(),
    "is empty": lambda file: cut(file, 0),
    "is cut": lambda file: cut(file, file.stat().st_size // 2),
    "has lost its last bytes": lambda file: cut(file, file.stat().st_size - 3),
    "is a folder": folder,
    "is a dangling link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}
def reshaped(file):
    """Let the header of a safetensors file give each tensor one row only."""
    rows = re.compile(rb'(?<="shape":\[)\d+')
    file.write_bytes(rows.sub(lambda found: b"1".ljust(len(found[0])), file.read_bytes()))


BYTES = {
    "has another shape in its header": reshaped,
    "has another bit in its header": lambda file: flip(file, file.read_bytes().index(b"F32")),
    "has another bit at its end": lambda file: flip(file, -5),
    "is text": lambda file: file.write_text("text"),
}
TYPES = {
    "has another bit": lambda file: flip(file, file.read_text().index('"', 40) + 1),
    "is a list": lambda file: file.write_text("[]"),
    "is null": lambda file: file.write_text("null"),
    "is a number": lambda file: file.write_text("1e999"),
    "is an object without its keys": lambda file: file.write_text("{}"),
    "is nested too deep": lambda file: file.write_text("[" * 100_000),
    "is not UTF-8": lambda file: file.write_bytes(b'{"seal": "\xff"}'),
}
SOME = {way: (WAYS | BYTES)[way] for way in ("is missing", "is cut", "has another bit at its end")}


def each(name, ways, said, interrupted="quantized", absent=None):
    """Return a case for every way to damage a file. absent: what is said instead if there is no such file."""
    return {f"{name} {way}": Damage(
        lambda progress, act=act: act(progress / name),
        said if absent is None or "missing" not in way and "dangling" not in way else absent, interrupted)
        for way, act in ways.items()}


AGAIN = "is damaged or missing: pruning again from layer"
NONE_KEPT = "finished layers, going on from layer 0: no later hidden states are kept"
FIRST = [f"of 1 {NONE_KEPT}"]

RECOMPUTED = {
    **{f"nothing of {interrupted}": Damage(lambda progress: None, [], interrupted) for interrupted in RUNS},
    **each("layer-00001.safetensors", WAYS | BYTES, [f"progress/layer-00001.safetensors {AGAIN} 1", *FIRST]),
    **each("grids-00001.safetensors", SOME, [f"progress/grids-00001.safetensors {AGAIN} 1", *FIRST]),
    **each("layer-00001.json", WAYS | TYPES, [f"progress/layer-00001.json {AGAIN} 1", *FIRST],
           absent=FIRST),
    **each("state-00002-0.safetensors", {way: act for way, act in (WAYS | BYTES).items() if "missing" not in way},
           ["progress/state-00002-0.safetensors is damaged or missing", f"of 2 {NONE_KEPT}"]),
    "hidden states are missing": Damage(
        lambda progress: (progress / "state-00002-0.safetensors").unlink(), [f"of 2 {NONE_KEPT}"]),
    "a note on an early layer is missing": Damage(
        lambda progress: (progress / "layer-00000.json").unlink(), [f"progress/layer-00000.json {AGAIN} 0"]),
    "weights of another layer": Damage(
        lambda progress: exchanged(progress / "layer-00001.safetensors", "layer-00000.safetensors"),
        [f"progress/layer-00001.safetensors {AGAIN} 1", *FIRST]),
    "grids of another layer": Damage(
        lambda progress: exchanged(progress / "grids-00001.safetensors", "grids-00000.safetensors"),
        [f"progress/grids-00001.safetensors {AGAIN} 1", *FIRST]),
    "a note on another layer": Damage(
        lambda progress: exchanged(progress / "layer-00001.json", "layer-00000.json"),
        [f"progress/layer-00001.json {AGAIN} 1", *FIRST]),
    "hidden states before another layer": Damage(
        lambda progress: (progress / "state-00002-0.safetensors").rename(progress / "state-00001-0.safetensors"),
        ["progress/state-00001-0.safetensors is damaged or missing", f"of 2 {NONE_KEPT}"]),
    "hidden states of a layer that is not finished": Damage(
        lambda progress: exchanged(progress / "state-00003-0.safetensors", "state-00002-0.safetensors"), []),
    "settings are missing": Damage(
        lambda progress: (progress / "run.json").unlink(), ["progress/run.json is missing: starting over"]),
    "the lock is missing": Damage(lambda progress: (progress / "lock").unlink(), []),
    "foreign files": Damage(
        lambda progress: [(progress / name).write_text("") for name in ("notes.txt", "state-x.safetensors",
                                                                        "layer-1.json")],
        [], left=("notes.txt", "state-x.safetensors", "layer-1.json")),
    "partial files": Damage(
        lambda progress: [(progress / name).write_text("") for name in ("layer-00002.json.7.partial", ".tmp7")], []),
    **each("plan.json", SOME | {"is a list": TYPES["is a list"]}, [f"progress/plan.json {AGAIN} 0"], "planned"),
    **each("gradients-0.safetensors", SOME, [f"progress/gradients-0.safetensors {AGAIN} 0"], "planned"),
    **each("shards.json", SOME | {"is a list": TYPES["is a list"]},
           [f"progress/layer-00000.safetensors {AGAIN} 0"], "shards"),
    **each("../model-00001-of-00003.safetensors", {
        way: act for way, act in (WAYS | BYTES).items() if "a " not in way},
           ["model-00001-of-00003.safetensors is damaged: it is written again",
            f"progress/layer-00000.safetensors {AGAIN} 0"], "shards",
           absent=[f"progress/layer-00000.safetensors {AGAIN} 0"] * 2),
    "a note on a layer in a shard is missing": Damage(
        lambda progress: (progress / "layer-00000.json").unlink(),
        ["model-00001-of-00003.safetensors is damaged: it is written again",
         f"progress/layer-00000.json {AGAIN} 0"], "shards"),
}

UNREAD = "--resume: {saved}/progress/run.json is damaged, or of another version of this program; remove {saved} to " \
         "start over"

REFUSED = {
    **each("run.json", {way: act for way, act in (WAYS | TYPES).items() if "missing" not in way}, UNREAD),
    **each("lock", {"is a folder": WAYS["is a folder"]},
           "--save {saved}: {saved}/progress/lock cannot be used (Is a directory); remove the folder to start over"),
    "lock is a link": Damage(
        lambda progress: ((progress / "lock").unlink(), (progress / "lock").symlink_to("elsewhere")),
        "--save {saved}: {saved}/progress/lock cannot be used (Too many levels of symbolic links); remove the folder "
        "to start over"),
    "lock is a named pipe": Damage(
        lambda progress: ((progress / "lock").unlink(), os.mkfifo(progress / "lock")),
        "--save {saved}: {saved}/progress/lock cannot be used (is not a file); remove the folder to start over"),
    "progress is a file": Damage(
        lambda progress: (shutil.rmtree(progress), progress.write_text("")),
        "--save {saved}: {saved}/progress cannot be used (File exists); remove the folder to start over"),
}
