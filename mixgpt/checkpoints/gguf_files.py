"""GGUF files: each is read once, and converted into a folder in the cache that is an ordinary model from then on."""

import contextlib
import functools
import hashlib
import sys

import gguf
import transformers
from transformers.utils import SAFE_WEIGHTS_NAME

from mixgpt.checkpoints import shards
from mixgpt.common.files import cache_folder, check_room, locked, os_errors, replacing_folder
from mixgpt.modeling import streaming

DTYPE = "float32"  # in which transformers dequantizes, whatever dtype it then gives


def folder_of(file, read):
    """Return the folder that a .gguf file is converted into at its first use, None where the cache cannot be written.

    read: called with the path, returns (model in DTYPE, tokenizer); raises InputError where it is damaged. Processes
    that come to a file at the same time wait for one of them. A line on stderr tells what happened.
    """
    status = file.stat()
    return _folder_of(file, read, (status.st_ino, status.st_size, status.st_mtime_ns), cache_folder())


@functools.cache  # the key: what tells that the file at a path is still the one whose checksum was computed
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
        print(f"warning  {file} is read anew in each run, which takes longer: it cannot be converted into {folder} "
              f"({error.strerror or error})", file=sys.stderr, flush=True)
        return None
    print(f"converted {file} into {folder} (once)", file=sys.stderr, flush=True)
    return folder


def _write(folder, model, tokenizer):
    state = shards.own_tensors(model)
    check_room(folder, shards.size(state))
    with os_errors():
        shards.write_configuration(folder, model)
        tokenizer.save_pretrained(folder)
        # save_pretrained of a model writes nothing, and says nothing, in all but the first process of torchrun
        streaming.write(folder / SAFE_WEIGHTS_NAME, state)


@contextlib.contextmanager
def parsed_once():
    """Let transformers parse the header of a .gguf file once within the block.

    It does so anew for the configuration, the tokenizer and the weights: seconds each, for the words of a vocabulary.
    """
    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader
