"""Places that a run cannot write to."""

from faults.damage import Fault, nothing

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
}
