"""Shards of a finished model, named and filled as by transformers, and verified by reading them back."""

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from mixgpt.common.errors import InputError
from mixgpt.common.files import replacing
from mixgpt.modeling import streaming

LARGEST = 5 * 10**9  # bytes of a shard; a larger tensor gets its own


def own_tensors(model):
    """Return the {name: tensor} of a model's checkpoint: all but tensors tied to another."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def size(tensors):
    """Return the total bytes of {name: tensor}."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_configuration(folder, model):
    """Write what `from_pretrained` needs besides the weights."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def split(state):
    """Return {name of a tensor: its file}: one file, or as many shards as needed. state: {name: tensor}."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}  # no shared memory
    return split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=LARGEST).tensor_to_filename


def write(file, state, read, sums):
    """Write a shard, renamed into place once it is flushed to disk and verified.

    state: {name: tensor}, possibly on meta. read: returns the tensor of a name. sums: {name: checksum} of tensors as
    they were in memory; missing ones are added. Raises InputError if a tensor does not match its checksum.
    """
    with replacing(file) as partial:
        for name, checksum in streaming.save(partial, state, read).items():
            if sums.setdefault(name, checksum) != checksum:
                raise InputError(f"--save {file.parent}: {name} differs from what was in memory before; its file has "
                                 "changed")
        for name in state:
            if streaming.checksum(streaming.read({name: (partial, name)})[name]) != sums[name]:
                raise InputError(f"--save {file.parent}: {name} in {file.name} differs from what was in memory")
