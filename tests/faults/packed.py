"""Damaged checkpoints of the sparse format."""

import json
import shutil

from faults.damage import MODEL, UP, Fault

MISFIT = f"{UP} does not fit its description in sparse.json"


def sparse(root, change):
    """Replace the model by one in the sparse format, with its sparse.json changed."""
    shutil.rmtree(root / "model")
    shutil.copytree(root / "made" / "packed", root / "model")
    described = json.loads((root / "model" / "sparse.json").read_text())
    change(described)
    (root / "model" / "sparse.json").write_text(json.dumps(described))


def described(root, **changes):
    sparse(root, lambda held: held[UP].update(changes))


FAULTS = {
    "sparse: another shape": Fault(
        lambda root: described(root, shape=[47, 32]), f"{MODEL}{MISFIT} (… value tensor of shape […] …)"),
    "sparse: turned": Fault(
        lambda root: described(root, shape=[32, 48]), f"{MODEL}{UP} is (32, 48), its configuration expects (48, 32)"),
    "sparse: a negative shape": Fault(lambda root: described(root, shape=[-48, 32]), f"{MODEL}{MISFIT} (… [-1536, 1])"),
    "sparse: a huge shape": Fault(
        lambda root: described(root, shape=[10**9, 10**9]), f"{MODEL}{MISFIT} (… input of size 1536)"),
    "sparse: no shape": Fault(lambda root: described(root, shape=48), f"{MODEL}{MISFIT} ('int' object …)"),
    "sparse: another dtype": Fault(
        lambda root: described(root, dtype="float16"), f"{MODEL}{MISFIT} (… Half … Float …)"),
    "sparse: a dtype that is none": Fault(
        lambda root: described(root, dtype="load"), f"{MODEL}{MISFIT} (… 'dtype' must be torch.dtype, not function)"),
    "sparse: a part that is missing": Fault(
        lambda root: described(root, parts=["mask", "values", "codes"]), f"{MODEL}{MISFIT} ('{UP}.codes')"),
    "sparse: no values": Fault(lambda root: described(root, parts=["mask"]), f"{MODEL}{MISFIT} ('wbits')"),
    "sparse: parts elsewhere": Fault(
        lambda root: described(root, parts=["../../../etc/passwd"]), f"{MODEL}{MISFIT} ('{UP}.../../../etc/passwd')"),
    "sparse: not a description": Fault(
        lambda root: sparse(root, lambda held: held.update({UP: None})), f"{MODEL}{MISFIT} ('NoneType' object …)"),
    "sparse: a list": Fault(
        lambda root: (sparse(root, lambda held: None), (root / "model" / "sparse.json").write_text("[]")),
        f"{MODEL}sparse.json holds no descriptions of matrices"),
}
