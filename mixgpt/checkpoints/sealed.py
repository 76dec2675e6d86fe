"""Files of an interrupted run, sealed: a damaged one, or one of another run or place, is noticed when it is read."""

import json
from pathlib import Path

import xxhash
from safetensors import SafetensorError, safe_open

from mixgpt.common.files import replacing
from mixgpt.modeling import streaming

DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


class Damaged(Exception):
    """Report a file that is missing, or not what was written under its name by this run. The message is its name."""


def _seal(run, file, text):
    """Return the seal of a text: of which run it is, in which file, and what it says."""
    return xxhash.xxh3_64_hexdigest(json.dumps([run, Path(file).name, text]).encode())


def write_json(file, content, run):
    """Write a JSON-able value, sealed, atomically. run: what tells the run from others, a string."""
    seal = _seal(run, file, json.dumps(content))
    with replacing(file) as partial:
        partial.write_text(json.dumps({"seal": seal, "content": content}, indent=1) + "\n")


def read_json(file, run):
    """Read what `write_json` wrote. Raises Damaged."""
    try:
        held = json.loads(Path(file).read_text())
        if _seal(run, file, json.dumps(held["content"])) == held["seal"]:
            return held["content"]
    except DAMAGED as error:
        raise Damaged(Path(file).name) from error
    raise Damaged(Path(file).name)


def write_tensors(file, tensors, run):
    """Write {key: tensor} as a safetensors file, sealed, atomically. Returns {key: checksum}."""
    sums = {key: streaming.checksum(tensor) for key, tensor in tensors.items()}
    text = json.dumps(sums)
    streaming.write(file, tensors, {"checksums": text, "seal": _seal(run, file, text)})
    return sums


def read_tensors(file, run):
    """Read {key: tensor}, as `write_tensors` wrote it. Raises Damaged."""
    try:
        with safe_open(file, "pt") as held:
            said = held.metadata()
        if _seal(run, file, said["checksums"]) != said["seal"]:
            raise Damaged(Path(file).name)
        sums = json.loads(said["checksums"])
        return dict(_checked({name: streaming.Place(file, name) for name in sums}, sums))
    except DAMAGED as error:
        raise Damaged(Path(file).name) from error


def check_tensors(places, sums):
    """Raise Damaged unless tensors at {name: streaming.Place} have the checksums {name: checksum}, those that have one.

    One is read at a time.
    """
    for _ in _checked(places, sums):
        pass


def _checked(places, sums):
    """Yield (name, tensor) from places, of those in {name: checksum}. Raises Damaged."""
    for name, place in places.items():
        if name not in sums:
            continue
        try:
            tensor = streaming.read({name: place})[name]
        except DAMAGED as error:
            raise Damaged(Path(place.file).name) from error
        if streaming.checksum(tensor) != sums[name]:
            raise Damaged(Path(place.file).name)
        yield name, tensor
