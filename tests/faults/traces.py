"""Files of traces, and pictures of them."""

import json
import math

from faults.damage import SMALL, Fault, nothing

MIXED = (f"{{root}}/model builtin --sparsity .5 --sparsity_way weight-level --sensitivity fisher {SMALL} "
         "--sensitivity_file {root}/traces.json")
TRACES = "--sensitivity_file {root}/traces.json: "


def known_traces(root, change):
    """Put traces of the model there, with the text of their file changed."""
    (root / "traces.json").write_text(change((root / "made" / "traces.json").read_text()))


def with_samples(change):
    """Return a change of a file of traces that changes the numbers of every sequence."""
    def changed(text):
        content = json.loads(text)
        return json.dumps(content | {"samples": [change(row) for row in content["samples"]]})

    return changed


def with_key(**changes):
    """Return a change of a file of traces that changes what its key says; None removes that."""
    def changed(text):
        content = json.loads(text)
        key = {name: value for name, value in (content["key"] | changes).items() if value is not None}
        return json.dumps(content | {"key": key})

    return changed


def with_matrix(**changes):
    """Return a change of a file of traces that changes the row of the first matrix; None removes that."""
    def changed(text):
        content = json.loads(text)
        row = {name: value for name, value in (content["matrices"][0] | changes).items() if value is not None}
        return json.dumps(content | {"matrices": [row, *content["matrices"][1:]]})

    return changed


def with_content(**changes):
    """Return a change of a file of traces that changes its keys; None removes a key."""
    def changed(text):
        content = json.loads(text) | changes
        return json.dumps({name: value for name, value in content.items() if value is not None})

    return changed


DAMAGES = {  # change of the text; the error to Python, or None where the file is not taken for one of traces
    "empty": (lambda text: "", None),
    "null": (lambda text: "null", None),
    "a number": (lambda text: "7", None),
    "a list": (lambda text: "[]", None),
    "an empty object": (lambda text: "{}", None),
    "two objects": (lambda text: text + text, "JSONDecodeError"),
    "a page of HTML": (lambda text: "<html>", None),
    "nested too deeply": (lambda text: "[" * 100_000, None),
    "a number of 5000 digits": (lambda text: text.replace('"samples"', f'"more": {"9" * 5000}, "samples"'),
                                "ValueError"),
    "without matrices": (with_content(matrices=None), "KeyError"),
    "matrices that are a number": (with_content(matrices=3), "TypeError"),
    "matrices that are names": (with_content(matrices=["a"]), "TypeError"),
    "a matrix without a name": (with_matrix(name=None), "KeyError"),
    "a matrix whose name is a list": (with_matrix(name=["a"]), "TypeError"),
    "a matrix whose shape is a number": (with_matrix(shape=32), "TypeError"),
    "without a key": (with_content(key=None), None),
    "a key that is text": (with_content(key="a"), None),
    "without an estimator": (with_key(estimator=None), "KeyError"),
    "without the model's weights": (with_key(weights=None), None),
    "without a number of sequences": (with_key(sequences=None), "KeyError"),
    "a number of sequences that is text": (with_key(sequences="four"), "TypeError"),
    "more samples than sequences": (with_key(sequences=3), "ValueError"),
    "without samples": (with_content(samples=None), "KeyError"),
    "no sample": (with_content(samples=[]), "ValueError"),
    "samples that are text": (with_samples(lambda row: ["a" for _ in row]), "ValueError"),
    "samples that are null": (with_samples(lambda row: [None for _ in row]), "TypeError"),
    "samples that are objects": (with_content(samples={"a": 1}), "TypeError"),
    "samples of different lengths": (with_content(samples=[[1.0], [1.0, 2.0]]), "ValueError"),
    "a sample that is infinite": (with_samples(lambda row: [math.inf, *row[1:]]), "ValueError"),
    "a sample beyond any float": (with_samples(lambda row: [10**400, *row[1:]]), "OverflowError"),
}

FAULTS = {f"traces: {name}": Fault(
    lambda root, change=change: known_traces(root, change), f"{TRACES}is not a file of traces" + (
        f" ({error})" if error else ", and not replaced; name another file"), MIXED)
    for name, (change, error) in DAMAGES.items()} | {
    "traces that are cut": Fault(
        lambda root: known_traces(root, lambda content: content[:500]),
        f"{TRACES}is not a file of traces (JSONDecodeError)", MIXED),
    "traces of other matrices": Fault(
        lambda root: known_traces(root, lambda content: content.replace("up_proj", "middle")),
        f"{TRACES}does not match the model: layer 0 mlp.up_proj is missing there, (48, 32) in the model", MIXED),
    "traces of another number of matrices": Fault(
        lambda root: known_traces(root, with_samples(lambda row: row[:-1])),
        f"{TRACES}is not a file of traces (ValueError)", MIXED),
    "traces that are NaN": Fault(
        lambda root: known_traces(root, with_samples(lambda row: [math.nan for _ in row])),
        f"{TRACES}is not a file of traces (ValueError)", MIXED),
    "traces in a folder": Fault(
        lambda root: (root / "traces.json").mkdir(), f"{TRACES}is a folder; name a file", MIXED),
    "traces that are not text": Fault(
        lambda root: (root / "traces.json").write_bytes(b"\xff\xfe\x00"),
        f"{TRACES}is not a file of traces, and not replaced; name another file", MIXED),
    "traces by another estimator": Fault(
        lambda root: known_traces(root, with_key(estimator="hutchinson")),
        f"{TRACES}contains hutchinson traces; give --sensitivity hutchinson", MIXED),
    "traces of a matrix of another shape": Fault(
        lambda root: known_traces(root, with_matrix(shape=[32, 31])),
        f"{TRACES}does not match the model: layer 0 self_attn.q_proj is (32, 31) there, (32, 32) in the model", MIXED),
    "traces of a layer that the model lacks": Fault(
        lambda root: known_traces(root, with_matrix(layer=9)),
        f"{TRACES}does not match the model: layer 0 self_attn.q_proj is missing there, (32, 32) in the model", MIXED),
    "traces where nobody can write": Fault(
        nothing,
        "--sensitivity_file /proc/a/traces.json: cannot be written (No such file or directory); name another file",
        MIXED.replace("{root}/traces", "/proc/a/traces")),
    "a picture where nobody can write": Fault(
        nothing,
        "--plot /proc/a.png: cannot be written (No such file or directory); name another file",
        MIXED + " --plot /proc/a.png"),
    "a picture that is a folder": Fault(
        lambda root: (root / "a.png").mkdir(),
        "--plot {root}/a.png: is a folder; name a file", MIXED + " --plot {root}/a.png"),
}
