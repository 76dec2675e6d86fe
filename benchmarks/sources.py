"""Text that every Python installation has: the manual, the standard library and the sources of installed packages.

Whether a file is train or test text follows from its path alone: packages that are added move none to the other side.
"""

import hashlib
import sysconfig
from pathlib import Path

from mixgpt.text.sets import builtin_rows

LONGEST = 30_000  # bytes of a file; many of the longer ones are tables
TESTED = 10  # one file in so many is test text
PARAGRAPHS = 50  # of the manual in a document


def documents(train_bytes, test_bytes):
    """Return {"train": texts, "test": texts} of about so many bytes each, in an arbitrary but fixed order.

    A text that occurs twice is taken once, the first time.
    """
    room, found, seen = {"train": train_bytes, "test": test_bytes}, {"train": [], "test": []}, set()
    for part, text in _candidates():
        if room[part] > 0 and text.strip() and text not in seen:
            seen.add(text)
            found[part].append(text)
            room[part] -= len(text.encode())
        if max(room.values()) <= 0:
            break
    return {part: sorted(texts, key=_hash) for part, texts in found.items()}


def _candidates():
    """Yield (part, text), the manual first, then files in the order of the hashes of their paths."""
    for part in ("train", "test"):
        rows, _ = builtin_rows(part)
        for start in range(0, len(rows), PARAGRAPHS):
            yield part, "\n\n".join(rows[start:start + PARAGRAPHS])
    for number, file in sorted((_hash(name), file) for name, file in python_files().items()):
        try:
            if file.stat().st_size <= LONGEST:
                yield "train" if number % TESTED else "test", file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def python_files():
    """Return {path below the folder of its kind: file} of the standard library and of all installed packages."""
    folders = {Path(sysconfig.get_paths()[kind]) for kind in ("stdlib", "purelib", "platlib")}
    return {file.relative_to(folder).as_posix(): file for folder in sorted(folders) for file in folder.rglob("*.py")
            if not {"site-packages", "dist-packages"} & set(file.relative_to(folder).parts)}


def _hash(text):
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "big")
