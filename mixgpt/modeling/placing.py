"""Where modules and hidden states are: on the device while they are used, else on the host or on disk."""

import contextlib
import errno
import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixgpt.common import distributed, memory, program, progress
from mixgpt.common.files import writing
from mixgpt.modeling import decoder, streaming

READER = ThreadPoolExecutor(1)  # One thread reads all ahead: malloc would keep freed blocks of each new one.


@contextlib.contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device, ahead: Future | None = None) -> Generator[None]:
    """Keep `modules` on `device` within the block; then on the host, or on disk, where changes are only if written."""
    there = {}  # A head may share its weight with the embedding: it is moved once.

    def move(key: tuple, tensor: Tensor) -> Tensor:
        if key not in there:
            there[key] = tensor.to(device, non_blocking=True)
        return there[key]

    with contextlib.ExitStack() as stack:
        for module in modules:
            if (places := streaming.disk_weights(module)) is None:
                stack.callback(module.to, "cpu")
            else:
                tensors, empty = ahead.result() if ahead else streaming.read(module), module.state_dict(keep_vars=True)
                stack.callback(module.load_state_dict, empty, strict=False, assign=True)  # This frees the weights.
                module.load_state_dict({name: move((places[name], own.dtype), tensors.pop(name)) for name, own in
                                        empty.items()}, assign=True)  # `ahead` keeps what is not popped on the host.
            module.to(device)
        there.clear()
        yield


def in_turn(layers: Sequence[nn.Module], device: torch.device, title: str = "") -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, layer), each on the device while the next one is read. title: of a progress bar, if any."""
    ahead = None
    for index, layer in enumerate(progress.bar(layers, title=title, leave=False) if title else layers):
        with on_device([layer], device, ahead):
            if index + 1 < len(layers) and streaming.disk_weights(layer):
                ahead = READER.submit(streaming.read, layers[index + 1], pinned=device.type == "cuda")
            yield index, layer


def whole(model: PreTrainedModel, device: torch.device) -> AbstractContextManager:
    """Keep the whole model on `device` within the block, to run it as usual."""
    return on_device([*decoder.rest_of(model).values(), *decoder.layers_of(model)], device)


def place_for(nbytes: float, device: torch.device, on_host: bool = False,
              free: Callable[[torch.device], float] | None = None) -> str:
    """Choose where states go: the first of "device" (not with on_host), "host", "disk" with twice nbytes free."""
    free = free or memory.free  # Another machine has another one.
    if device.type == "cuda" and not on_host and 2 * nbytes <= free(device):
        return "device"
    return "host" if 2 * nbytes <= free(torch.device("cpu")) else "disk"


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device, place: str) -> Tensor:
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
            raise OSError(errno.ENOSPC, why)  # Reserving the bytes would fill the disk before it fails.
        _reserve(file, nbytes)
        return torch.from_file(file.name, shared=True, size=numel, dtype=dtype).view(shape)


def allocate_together(nbytes: int, place: str, folder: Path | None) -> Tensor:
    """Return bytes (nbytes,), on the host or on disk, that are the same for all processes of this machine.

    folder: of files on disk (default: TMPDIR). Raises InputError if the disk is full.
    """
    if place == "host" and program.world("LOCAL_WORLD_SIZE") == 1:
        return torch.empty(nbytes, dtype=torch.uint8)
    local, path = program.rank("LOCAL_RANK"), ""
    with contextlib.ExitStack() as stack:
        if not local:
            with writing(f"--distill: {nbytes / 1e9:.1f} GB", "free some space"):
                if place == "host" and hasattr(os, "memfd_create"):  # It makes files in memory, on Linux.
                    file = stack.enter_context(os.fdopen(os.memfd_create("mixgpt"), "wb"))
                    path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
                else:
                    file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder))
                    path = file.name
                _reserve(file, nbytes)
        path = distributed.all_gather_object(path)[distributed.rank() - local]
        tensor = torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
        distributed.barrier()  # All have opened it: it may lose its name.
    return tensor


def _reserve(file: IO[bytes], nbytes: int) -> None:
    """Give a file its bytes on disk. Raises OSError if there is no room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
    else:  # On macOS, a disk that others fill ends the run later.
        os.truncate(file.fileno(), nbytes)
