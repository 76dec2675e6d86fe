"""Where modules and hidden states are: on the device while they are used, else on the host or on disk."""

import contextlib
import errno
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

from mixgpt.common import memory, program, progress
from mixgpt.common.files import writing
from mixgpt.modeling import decoder, streaming

READER = ThreadPoolExecutor(1)  # reads ahead; malloc would keep freed blocks of each new thread


@contextlib.contextmanager
def on_device(modules, device, ahead=None):
    """Keep `modules` on `device` within the block; afterwards on the host, or on disk if they have `disk_weights`.

    Changes to modules on disk are lost at the end of the block, unless written there. ahead: Future of the tensors of
    a single module, if they are being read already.
    """
    there = {}  # once each, as a head may be the embedding

    def move(key, tensor):
        if key not in there:
            there[key] = tensor.to(device, non_blocking=True)
        return there[key]

    with contextlib.ExitStack() as stack:
        for module in modules:
            if (places := streaming.disk_weights(module)) is None:
                stack.callback(module.to, "cpu")
            else:
                tensors, empty = ahead.result() if ahead else streaming.read(module), module.state_dict(keep_vars=True)
                stack.callback(module.load_state_dict, empty, strict=False, assign=True)  # frees what is on disk only
                module.load_state_dict({name: move((places[name], own.dtype), tensors.pop(name)) for name, own in
                                        empty.items()}, assign=True)  # popped, as `ahead` would keep them on the host
            module.to(device)
        there.clear()
        yield


def in_turn(layers, device, title=None):
    """Yield (index, layer), each on the device until the next one is asked for, read meanwhile. title: of a bar."""
    ahead = None
    for index, layer in enumerate(progress.bar(layers, title=title, leave=False) if title else layers):
        with on_device([layer], device, ahead):
            if index + 1 < len(layers) and streaming.disk_weights(layer):
                ahead = READER.submit(streaming.read, layers[index + 1], pinned=device.type == "cuda")
            yield index, layer


def whole(model, device):
    """Keep the whole model on `device` within the block, to run it as usual."""
    return on_device([*decoder.rest_of(model).values(), *decoder.layers_of(model)], device)


def place_for(nbytes, device, on_host=False):
    """Choose where to keep nbytes of hidden states: on the "device", the "host" or, memory-mapped, on "disk".

    The first of these with twice the room, half of it for the work; on_host skips the device.
    """
    if device.type == "cuda" and not on_host and 2 * nbytes <= memory.free(device):
        return "device"
    return "host" if 2 * nbytes <= memory.free(torch.device("cpu")) else "disk"


def allocate(shape, dtype, device, place):
    """Return an uninitialised tensor at the place chosen by `place_for`. Raises InputError if the disk is full."""
    if place != "disk":
        return torch.empty(shape, dtype=dtype, device=device if place == "device" else "cpu")
    numel = math.prod(shape)
    nbytes = numel * dtype.itemsize
    with writing(f"--nsamples, --seqlen: hidden states take {nbytes / 1e9:.1f} GB, more than is free in memory, and",
                 "lower these, or set TMPDIR to a larger disk"), tempfile.NamedTemporaryFile() as file:
        free, in_memory = memory.room(file.name)
        if nbytes * (program.world("LOCAL_WORLD_SIZE") if in_memory else 1) > free:
            why = f"{tempfile.gettempdir()} is memory, too" if in_memory else os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, why)  # reserving them would fill the disk before it fails
        if hasattr(os, "posix_fallocate"):  # macOS has none: there a disk that others fill meanwhile ends the run later
            os.posix_fallocate(file.fileno(), 0, nbytes)
        return torch.from_file(file.name, shared=True, size=numel, dtype=dtype).view(shape)
