"""Read the files of --record and --save that results.py compares, and check that they are records of runs."""

import glob
import json
import os
import stat
from numbers import Real
from pathlib import Path

from mixgpt.checkpoints.names import RECORD, begun
from mixgpt.common.errors import InputError

LARGEST = 100_000_000  # bytes; the record of LLaMA-70B has a hundredth of them
ADVICE = "give files of --record or folders of --save"
ANY = "*"  # stands for all keys
# What the tables and pictures read; a key with a question mark may be missing.
SHAPE = {
    "settings": {"model": str, "seed": int, "sparsity_way": str, "saliency": str, "sparsity?": Real, "wbits?": int,
                 "prunen?": int, "prunem?": int, "seqlen?": Real | None, "eval_limit?": Real | None, "bos?": str},
    "sparsity": Real, "data": {ANY: {"sha256?": str | None}}, "perplexity": {ANY: {ANY: Real}},
    "tasks?": {ANY: {ANY: dict}}, "seconds": {ANY: Real}, "peak_memory": {ANY: Real},
}


def files_of(names):
    """Return the record files that names, directories and glob patterns refer to, each once."""
    found = []
    for name in names:
        for path in map(Path, sorted(glob.glob(name)) or [name]):
            found.append(path / RECORD if os.path.isdir(path) else path)
    return list(dict.fromkeys(found))


def load(file):
    """Return the record of a finished run, a dict of SHAPE. Raises InputError, naming the file, if it is not one."""
    record = _json_of(file)
    if file.name == RECORD and begun(file.parent):
        raise InputError(f"{file}: its run has not finished; continue it with --save {file.parent} --resume")
    if fault := _misfit(record, SHAPE, "it"):
        raise InputError(f"{file}: is not the record of a run ({fault})")
    return record


def _json_of(file):
    try:
        about = file.stat()
        readable = stat.S_ISREG(about.st_mode) and about.st_size <= LARGEST  # a pipe would be waited for
        record = json.loads(file.read_text()) if readable else None
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair cannot be printed
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file; {ADVICE}") from error
    except RecursionError as error:
        raise InputError(f"{file}: cannot be read as JSON (nested too deeply)") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({getattr(error, 'strerror', None) or error})") from error
    if not readable:
        raise InputError(f"{file}: is not a file of at most {LARGEST // 10**6} MB; {ADVICE}")
    return record


def _misfit(value, shape, name):
    """Return what distinguishes a value from a shape like SHAPE, "" if nothing does."""
    if not isinstance(value, dict if isinstance(shape, dict) else shape) or isinstance(value, bool):
        given = json.dumps(value)
        return f"{name} is {given if len(given) < 40 else f'of type {type(value).__name__}'}"
    if isinstance(value, int) and abs(value) > 1e300:
        return f"{name} is a number of {len(str(abs(value)))} digits"
    if not isinstance(shape, dict):
        return ""
    shape = dict.fromkeys(value, shape[ANY]) if ANY in shape else shape
    for key, its in shape.items():
        key, optional = key.removesuffix("?"), key.endswith("?")
        if key not in value and not optional:
            return f"{name} lacks {key}"
        if key in value and (fault := _misfit(value[key], its, key if name == "it" else f"{name} {key}")):
            return fault
    return ""
