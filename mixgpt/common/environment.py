"""Which of several processes this is, as torchrun says in environment variables. Needs no PyTorch."""

import os


def world_size():
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank():
    """Return the number of this process among all; 0 for a single one, whatever RANK says."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def local_rank():
    """Return the number of this process on its machine; 0 for a single one, whatever LOCAL_RANK says."""
    return int(os.environ.get("LOCAL_RANK") or 0) if world_size() > 1 else 0
