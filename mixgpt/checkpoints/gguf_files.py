"""GGUF files: each is converted once into an ordinary checkpoint in the cache."""

import functools
import hashlib
import sys

import transformers
from transformers.utils import SAFE_WEIGHTS_NAME

from mixgpt.checkpoints import shards
from mixgpt.common.errors import InputError
from mixgpt.common.files import cache_folder, check_room, locked, os_errors, replacing_folder
from mixgpt.modeling import streaming

DTYPE = "float32"  # transformers dequantizes in it, whatever dtype is requested


def folder_of(file, read):
    """Return the cached checkpoint of a .gguf file, converted on first use, which a line on stderr reports.

    read: called with the path, returns (model in DTYPE, tokenizer); raises InputError if it is damaged. Of concurrent
    processes, one converts while the others wait. Raises InputError if the cache cannot be written.
    """
    status = file.stat()
    return _folder_of(file, read, (status.st_ino, status.st_size, status.st_mtime_ns), cache_folder())


@functools.cache  # the key detects that the file at a path has changed since its checksum
def _folder_of(file, read, _, cache):
    with file.open("rb") as content:
        checksum = hashlib.file_digest(content, "sha256").hexdigest()[:32]
    folder = cache / f"gguf-{checksum}-transformers-{transformers.__version__}-{DTYPE}"
    if folder.is_dir():
        return folder
    try:
        with locked(cache / "gguf.lock"):
            if not folder.is_dir():
                with replacing_folder(folder) as partial:
                    _write(partial, *read(file))
    except OSError as error:
        raise InputError(f"model {file}: cannot be converted into {folder} ({error.strerror or error}); set "
                         "XDG_CACHE_HOME to a folder with room") from error
    print(f"converted {file} into {folder} (once)", file=sys.stderr, flush=True)
    return folder


def _write(folder, model, tokenizer):
    state = shards.own_tensors(model)
    check_room(folder, shards.size(state))
    with os_errors():
        shards.write_configuration(folder, model)
        tokenizer.save_pretrained(folder)
        # a model's save_pretrained silently writes nothing in all but torchrun's first process
        streaming.write(folder / SAFE_WEIGHTS_NAME, state)
