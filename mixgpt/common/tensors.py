"""Generators with a seed of many parts, and dtypes wide enough for sums."""

import random

import torch


def seeded(*key, device="cpu"):
    """Return a generator seeded by all of `key`."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def wide(tensor):
    """Return a tensor in float32, or in float64 if that is its dtype: enough for sums of squares of one batch."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
