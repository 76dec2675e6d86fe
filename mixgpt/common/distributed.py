"""Several processes that share the work, as torchrun starts them; without it, one process that does all of it."""

import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

# The others wait for the first process while it writes and verifies what is saved. One that dies ends them at once.
PATIENCE = timedelta(days=7)


class _Hosts:
    """Between which processes objects pass; None: those of the default group."""

    group = None


@contextlib.contextmanager
def joined(device):
    """Join the processes that torchrun started, within the block. device: of this process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)  # tensors, on the GPUs
        _Hosts.group = dist.new_group(backend="gloo", timeout=PATIENCE)  # objects, on the hosts
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: torchrun ends the others then
    _Hosts.group = None


def world():
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Return the number of this process, from 0; process 0 prints and saves."""
    return dist.get_rank() if world() > 1 else 0


def share(count):
    """Return the slice of `count` things that falls to this process."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())


def all_reduce(tensor):
    """Sum a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)


def broadcast(tensor, source):
    """Overwrite a tensor by that of process `source`."""
    if world() > 1:
        held = tensor.contiguous()
        dist.broadcast(held.view(torch.uint8), source)  # gloo does not know every dtype
        tensor.copy_(held)


def broadcast_object(value, source=0):
    """Return the value that process `source` gives."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, source, group=_Hosts.group)
    return values[0]


def all_gather_object(value):
    """Return the values that all processes give, in order."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value, group=_Hosts.group)
    return values


def barrier():
    """Wait until all processes are here."""
    all_gather_object(None)
