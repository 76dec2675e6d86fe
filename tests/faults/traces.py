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


FAULTS = {
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
