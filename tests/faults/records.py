"""Files that are no records of runs, and what results.py may not write to."""

import json
import os

from faults.damage import Fault, nothing

RECORD = {
    "settings": {"model": "opt", "seed": 0, "sparsity_way": "uniform", "saliency": "obs", "sparsity": 0.5},
    "sparsity": 0.5, "data": {}, "perplexity": {"SparseGPT": {"c4": 30.0}}, "seconds": {}, "peak_memory": {}}
NONE = "{root}/a.json: is not the record of a run "
UNREAD = "{root}/a.json: cannot be read as JSON "
FILE = "{root}/a.json: is not a file of at most 100 MB; give files of --record or folders of --save"


def changed(**keys):
    """Return what writes a record with other keys; None leaves one out."""
    content = {key: value for key, value in (RECORD | keys).items() if value is not None}
    return lambda root: (root / "a.json").write_text(json.dumps(content))


def settings(**keys):
    return changed(settings=RECORD["settings"] | keys)


def text(content):
    return lambda root: (root / "a.json").write_text(content)


def read(damage, message):
    return Fault(damage, message, "{root}/a.json", "results")


def written(message, options, damage=nothing):
    """Refuse a file before the record is read and the table is printed."""
    return Fault(lambda root: (changed()(root), damage(root)), message, "{root}/a.json " + options, "results")


FAULTS = {
    "a record that is deeply nested": read(text("[" * 10**6), f"{UNREAD}(nested too deeply)"),
    "a record of a number of 5,000 digits": read(text("9" * 5000), f"{UNREAD}(Exceeds the limit …)"),
    "a record with half of a character": read(
        settings(model="\ud83d"), f"{UNREAD}('utf-8' codec can't encode character '\\ud83d' …)"),
    "a record that is a pipe": read(lambda root: os.mkfifo(root / "a.json"), FILE),
    "a record that is a link to a device": read(lambda root: (root / "a.json").symlink_to("/dev/zero"), FILE),
    "a record of 101 MB": read(
        lambda root: (text("{")(root), os.truncate(root / "a.json", 101 * 10**6)), FILE),
    "a record in a folder without one": read(
        lambda root: (root / "a.json").mkdir(),
        "{root}/a.json/mixgpt.json: no such file; give files of --record or folders of --save"),
    "a record that is a folder in a folder": read(
        lambda root: (root / "a.json" / "mixgpt.json").mkdir(parents=True), FILE.replace(":", "/mixgpt.json:", 1)),
    "a record that is a dangling link": read(
        lambda root: (root / "a.json").symlink_to("gone"),
        "{root}/a.json: no such file; give files of --record or folders of --save"),
    "a record that is null": read(text("null"), f"{NONE}(it is null)"),
    "a record without a seed": read(
        changed(settings={"model": "opt"}), f"{NONE}(settings lacks seed)"),
    "a record without perplexities": read(changed(perplexity=None), f"{NONE}(it lacks perplexity)"),
    "a record of a list of perplexities": read(changed(perplexity=[30.0]), f"{NONE}(perplexity is [30.0])"),
    "a record of a perplexity in words": read(
        changed(perplexity={"SparseGPT": {"c4": "low"}}), f'{NONE}(perplexity SparseGPT c4 is "low")'),
    "a record of a perplexity that is true": read(
        changed(perplexity={"SparseGPT": {"c4": True}}), f"{NONE}(perplexity SparseGPT c4 is true)"),
    "a record of 400 digits": read(
        changed(sparsity=10**400), f"{NONE}(sparsity is a number of 401 digits)"),
    "a record of a model that is a number": read(settings(model=125), f"{NONE}(settings model is 125)"),
    "a record of a seed in words": read(settings(seed="zero"), f'{NONE}(settings seed is "zero")'),
    "a record of a list for a setting": read(
        settings(nsamples=[128]), f"{NONE}(TypeError: unhashable type: 'list')"),
    "a record of a length in words": read(settings(seqlen=[1]), f'{NONE}(settings seqlen is [1])'),
    "a record of seconds that are none": read(changed(seconds={"load": None}), f"{NONE}(seconds load is null)"),
    "a record of text for data": read(changed(data={"c4": "here"}), f'{NONE}(data c4 is "here")'),
    "a record of a name that is too long": Fault(
        nothing, "a" * 5000 + ": cannot be read as JSON (File name too long)", "a" * 5000, "results"),
    "an empty --csv": written(
        '--csv "": must not be empty; is a variable of the shell unset?', "--csv="),
    "a table onto a record": written(
        "--csv {root}/a.json: is the same file as RUN {root}/a.json; name another file", "--csv {root}/a.json"),
    "a table onto a record by a link": written(
        "--csv {root}/b.csv: is the same file as RUN {root}/a.json; name another file", "--csv {root}/b.csv",
        lambda root: (root / "b.csv").symlink_to("a.json")),
    "a table onto the configuration": written(
        "--csv {root}/model/config.json: is not a file of --csv, and not replaced; name another file",
        "--csv {root}/model/config.json"),
    "a table of another program": written(
        "--csv {root}/b.csv: is not a file of --csv, and not replaced; name another file", "--csv {root}/b.csv",
        lambda root: (root / "b.csv").write_text("model,perplexity\nopt,30\n")),
    "a table onto a device": written("--csv /dev/null: is a device; name a file", "--csv /dev/null"),
    "a table onto a pipe": written(
        "--csv {root}/b.csv: is a pipe; name a file", "--csv {root}/b.csv", lambda root: os.mkfifo(root / "b.csv")),
    "a table in the place of the picture": written(
        "--plot {root}/b.png: is the same file as --csv {root}/b.png; name another file",
        "--csv {root}/b.png --plot {root}/b.png"),
}
