"""Places that a run cannot write to, and files that it may not replace."""

import os
import shutil
import socket

from faults.damage import WEIGHTS, Fault, nothing
from faults.traces import MIXED

RUN = "{root}/model builtin --sparsity .5 "
RECORD = "--record {root}/a.json"
UNLIKE = ": is not a file of --record, and not replaced; name another file"
PIPE = "is a pipe; name a file"


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def linked(root, name, target):
    (root / name).symlink_to(target)


FAULTS = {
    "save onto a file": Fault(
        lambda root: (root / "taken").write_text(""),
        "--save {root}/taken: exists and is not an empty folder", "{root}/model builtin --save {root}/taken"),
    "save into the model": Fault(
        nothing, "--save {root}/model: exists and is not an empty folder", "{root}/model builtin --save {root}/model"),
    "save where nobody can write": Fault(
        nothing,
        "--save /proc/saved/a: /proc cannot be written (No such file or directory)",
        "{root}/model builtin --save /proc/saved/a"),
    "save under a name that is too long": Fault(
        nothing, "--save {root}/" + "a" * 300 + ": cannot be used (File name too long)",
        "{root}/model builtin --save {root}/" + "a" * 300),
    "save to a dangling link": Fault(
        lambda root: (root / "link").symlink_to(root / "gone" / "away"),
        "--save {root}/link: {root}/link cannot be written (No such file or directory)",
        "{root}/model builtin --save {root}/link"),
    # what --record, --plot and --sensitivity_file may replace
    "a record onto the configuration": Fault(
        nothing, "--record {root}/model/config.json: lies in model {root}/model; name a file elsewhere",
        RUN + "--record {root}/model/config.json"),
    "a record onto the weights": Fault(
        nothing, f"--record {{root}}/model/{WEIGHTS}: lies in model {{root}}/model; name a file elsewhere",
        f"{RUN}--record {{root}}/model/{WEIGHTS}"),
    "a new record beside the weights": Fault(
        nothing, "--record {root}/model/runs/a.json: lies in model {root}/model; name a file elsewhere",
        RUN + "--record {root}/model/runs/a.json"),
    "a record through a link to the model": Fault(
        lambda root: linked(root, "link", "model"),
        "--record {root}/link/a.json: lies in model {root}/model; name a file elsewhere",
        RUN + "--record {root}/link/a.json"),
    "a record onto a link to the configuration": Fault(
        lambda root: linked(root, "a.json", "model/config.json"),
        "--record {root}/a.json: lies in model {root}/model; name a file elsewhere", RUN + RECORD),
    "a record onto a .gguf model": Fault(
        lambda root: (root / "a.gguf").write_bytes(b"GGUF"),
        "--record {root}/a.gguf: is the same file as model {root}/a.gguf; name another file",
        "{root}/a.gguf builtin --sparsity .5 --record {root}/a.gguf"),
    "a record onto another model's configuration": Fault(
        lambda root: shutil.copytree(root / "model", root / "other"), f"--record {{root}}/other/config.json{UNLIKE}",
        RUN + "--record {root}/other/config.json"),
    "a record onto that of a saved model": Fault(
        lambda root: (shutil.copytree(root / "made" / "packed", root / "b"), linked(root, "a.json", "b/mixgpt.json")),
        "--record {root}/a.json: belongs to the model saved beside it; name another file", RUN + RECORD),
    "a record onto notes": Fault(
        lambda root: (root / "a.json").write_text("what I found out\n"), f"{RECORD}{UNLIKE}", RUN + RECORD),
    "a record onto other JSON": Fault(
        lambda root: (root / "a.json").write_text('{"settings": 1}'), f"{RECORD}{UNLIKE}", RUN + RECORD),
    "a record onto an empty file": Fault(
        lambda root: (root / "a.json").touch(), f"{RECORD}{UNLIKE}", RUN + RECORD),
    "a record onto traces": Fault(
        lambda root: shutil.copy(root / "made" / "traces.json", root / "a.json"), f"{RECORD}{UNLIKE}", RUN + RECORD),
    "a record onto a pipe": Fault(lambda root: os.mkfifo(root / "a.json"), f"{RECORD}: {PIPE}", RUN + RECORD),
    "a record onto a socket": Fault(
        lambda root: listening(root / "a.json"), f"{RECORD}: is a socket; name a file", RUN + RECORD),
    "a record onto a device": Fault(
        nothing, "--record /dev/null: is a device; name a file", RUN + "--record /dev/null"),
    "a record onto a link to a device": Fault(
        lambda root: linked(root, "a.json", "/dev/zero"), f"{RECORD}: is a device; name a file", RUN + RECORD),
    "a record onto a dangling link": Fault(
        lambda root: linked(root, "a.json", "gone.json"),
        f"{RECORD}: is a link to a file that does not exist; name another file", RUN + RECORD),
    "a record onto a link to itself": Fault(
        lambda root: linked(root, "a.json", "a.json"),
        f"{RECORD}: cannot be written (Too many levels of symbolic links); name another file", RUN + RECORD),
    "a record under a name that is too long": Fault(
        nothing, "--record {root}/" + "a" * 250 + ": cannot be written (File name too long); name another file",
        RUN + "--record {root}/" + "a" * 250),
    "a record below a dangling link": Fault(
        lambda root: linked(root, "link", "gone"),
        "--record {root}/link/a.json: cannot be written (No such file or directory); name another file",
        RUN + "--record {root}/link/a.json"),
    "a record where the weights go": Fault(
        nothing, "--record {root}/new: is the same file as --save {root}/new; name another file",
        RUN + "--save {root}/new --record {root}/new"),
    "a record among the weights": Fault(
        nothing, "--record {root}/new/mixgpt.json: lies in --save {root}/new; name a file elsewhere",
        RUN + "--save {root}/new --record {root}/new/mixgpt.json"),
    "weights below a record": Fault(
        nothing, "--record {root}/new: is to be a file, and the folder of --save {root}/new/a; name another file",
        RUN + "--save {root}/new/a --record {root}/new"),
    "traces in a record's place": Fault(
        nothing, "--record {root}/traces.json: is the same file as --sensitivity_file {root}/traces.json; "
                 "name another file", f"{MIXED} --record {{root}}/traces.json"),
    "a picture in the model": Fault(
        nothing, "--plot {root}/model/a.png: lies in model {root}/model; name a file elsewhere",
        f"{MIXED} --plot {{root}}/model/a.png"),
    "a picture onto a photograph": Fault(
        lambda root: (root / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)),
        "--plot {root}/a.png: is not a file of --plot, and not replaced; name another file",
        f"{MIXED} --plot {{root}}/a.png"),
    "a picture onto a pipe": Fault(
        lambda root: os.mkfifo(root / "a.svg"), f"--plot {{root}}/a.svg: {PIPE}", f"{MIXED} --plot {{root}}/a.svg"),
    "a picture of another kind": Fault(
        nothing, "--plot {root}/a.jpg: must end in .png, .pdf, .svg", f"{MIXED} --plot {{root}}/a.jpg"),
    "traces from a pipe": Fault(
        lambda root: os.mkfifo(root / "traces.json"), f"--sensitivity_file {{root}}/traces.json: {PIPE}", MIXED),
    "traces from a device": Fault(
        nothing, "--sensitivity_file /dev/zero: is a device; name a file",
        MIXED.replace("{root}/traces.json", "/dev/zero")),
    "traces from weights": Fault(
        lambda root: shutil.copy(root / "model" / WEIGHTS, root / "traces.json"),
        "--sensitivity_file {root}/traces.json: is not a file of traces, and not replaced; name another file", MIXED),
    "traces in the model": Fault(
        nothing, "--sensitivity_file {root}/model/traces.json: lies in model {root}/model; name a file elsewhere",
        MIXED.replace("{root}/traces", "{root}/model/traces")),
}
