"""Processes that divide the work, as started by torchrun; without it, a single process."""

import atexit
import contextlib
import math
import os
import pickle
import sys
import time
from collections.abc import Generator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mixgpt.common import program
from mixgpt.common.errors import reading
from mixgpt.common.program import rank, world

START = 24 * 3600  # seconds for which processes wait for the last one to download, convert and read what it needs
PATIENCE = 600  # seconds for which they then wait while none shows that it works; if one dies, they end at once
UNANSWERED = "another process does not answer"
SMALL = 1024  # objects of so many bytes take one exchange
_hosts = None  # the process group for objects, numbers and tensors on the host; None: the default group
_store = None  # through which the processes meet, behind one more prefix each time, as it keeps earlier addresses
_patience, _shown = START, 0.0  # in force now; when this process last showed that it works


@contextlib.contextmanager
def joined(device: torch.device) -> Generator[None]:
    """Join the processes started by torchrun within the block, unless they are already. device: of this process."""
    global _hosts, _store, _patience
    if program.world() == 1:
        yield
        return
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    if own := not dist.is_initialized():  # by a caller, or a run before that failed
        with reading(f"WORLD_SIZE {program.world()}: the processes did not meet; start them with torchrun, or unset "
                     "WORLD_SIZE"):
            _store = dist.PrefixStore("mixgpt", _store or next(dist.rendezvous("env://"))[0])
            dist.init_process_group("nccl" if gpu else "gloo", None, None, world(), rank(), _store, device_id=gpu)
    _hosts, _patience = dist.new_group(backend="gloo", timeout=timedelta(days=7)), START  # `_wait` ends earlier
    yield
    if own:
        dist.destroy_process_group()  # not after an error: torchrun then ends the others
    _hosts = None


def share(count: int, number: int | None = None) -> slice:
    """Return the slice of `count` items that belongs to process `number` (default: this one)."""
    number = rank() if number is None else number
    return slice(number * count // world(), (number + 1) * count // world())


def prepared() -> None:
    """Wait for the other processes to be as far, and from now on for `PATIENCE` only."""
    global _patience
    barrier()
    _patience = PATIENCE


def alive() -> None:
    """Show the processes that wait for this one that it works; what takes one of them long calls this at each step."""
    global _shown
    if world() > 1 and time.monotonic() - _shown > _patience / 20:
        _shown = time.monotonic()
        _signs(1)


def _signs(new: int = 0) -> int | None:
    """Return how often processes have shown that they work, None if a caller's store, or none any more, counts it."""
    with contextlib.suppress(RuntimeError):  # the store ends with the process that keeps it
        return _store.add("alive", new) if _store else None


def _wait(work: "dist.Work | None") -> bool | None:
    """Wait for an operation of the hosts, None if it is done, while one of them works. Raises RuntimeError."""
    signs, since = None, time.monotonic()
    while work:
        try:
            return work.wait(timedelta(seconds=min(_patience / 20, 1)))
        except RuntimeError:
            if work.is_completed():
                return work.wait()  # raises why it failed, if it did
        if signs != (signs := _signs()):
            since = time.monotonic()
        if time.monotonic() - since > (_patience if _store else START):
            atexit.register(os._exit, 1)  # else gloo would wait for the others once more
            atexit.register(sys.stdout.flush)  # before that
            raise RuntimeError(UNANSWERED)


def all_reduce(*tensors: torch.Tensor) -> None:
    """Sum tensors of one dtype over all processes, in place, in one exchange."""
    if world() > 1:
        sums = torch.cat([tensor.flatten() for tensor in tensors])
        _wait(dist.all_reduce(sums, group=None if sums.is_cuda else _hosts, async_op=not sums.is_cuda))
        for tensor, of_all in zip(tensors, sums.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(of_all.view_as(tensor))


def all_gather_parts(parts: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return tensors (n, ...), each joined in rank order, in one exchange. sizes[rank]: the n of each."""
    if world() == 1:
        return list(parts)
    # as bytes, as dtypes differ and gloo does not support every one
    own = torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])
    widths = [math.prod(part.shape[1:]) * part.itemsize for part in parts]
    ends = [[n * width for n, width in zip(of_rank, widths, strict=True)] for of_rank in sizes]
    own = torch.cat([own, own.new_empty(max(map(sum, ends)) - len(own))])
    together = [torch.empty_like(own) for _ in range(world())]
    _wait(dist.all_gather(together, own, group=None if own.is_cuda else _hosts, async_op=not own.is_cuda))
    split = [tensor[:sum(of_rank)].split(of_rank) for tensor, of_rank in zip(together, ends, strict=True)]
    return [torch.cat(of_all).view(part.dtype).view(-1, *part.shape[1:])
            for part, of_all in zip(parts, zip(*split, strict=True), strict=True)]


def all_gather_shares(parts: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
    """Return tensors with all of their rows, `counts`, of which every process passes its `share`, in one exchange."""
    return all_gather_parts(parts, [[len(range(count)[share(count, number)]) for count in counts]
                                    for number in range(world())])


def all_gather_object(value: Any) -> list[Any]:
    """Return the values passed by all processes, in rank order."""
    if world() == 1:
        return [value]
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    start = torch.cat([own[:SMALL], own.new_zeros(max(SMALL - len(own), 0))])
    sizes, parts = all_gather_shares([torch.tensor([len(own)]), start[None]], [world()] * 2)
    if sizes.max() > SMALL:
        parts = all_gather_parts([own], [[size] for size in sizes.tolist()])[0].split(sizes.tolist())
    return [pickle.loads(part.numpy()) for part in parts]


def total(counts: Sequence[int]) -> list[int]:
    """Return the sums over all processes of a list of integers, computed on the hosts."""
    sums = torch.tensor(counts)
    all_reduce(sums)
    return sums.tolist()


def broadcast_object(value: Any) -> Any:
    """Return the value passed by the first process."""
    return all_gather_object(value)[0]


def barrier() -> None:
    """Wait until all processes get here."""
    if world() > 1:
        _wait(dist.barrier(group=_hosts, async_op=True))
