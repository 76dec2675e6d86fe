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


def published(state, layout):
    """Return {key in the checkpoint: its tensor on meta} of {name: tensor}. layout: from `layout.layout_of`."""
    parts = {}  # key -> [(Part or None, tensor)]
    for name, tensor in state.items():
        key, part = layout.get(name, (name, None))
        parts.setdefault(key, []).append((part, tensor))
    return {key: torch.empty(_shape(found), dtype=found[0][1].dtype, device="meta") for key, found in parts.items()}


def _shape(parts):
    part, tensor = parts[0]
    return part.whole(tensor.shape, len(parts) // part.parts) if part else tensor.shape


def merged(tensor, names, read):
    """Return a tensor of the checkpoint. tensor: the same on meta. names: {name: Part or None} of what it consists of.

    read: returns the tensor of a name.
    """
    if list(names.values()) == [None]:
        return read(next(iter(names)))
    whole = torch.empty_like(tensor, device="cpu")
    for name, part in names.items():
        part.of(whole[part.expert]).copy_(read(name))
    return whole


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


def write(file, tensors, read):
    """Write a shard, renamed into place once it is flushed to disk and verified.

    tensors: {key: tensor}, possibly on meta. read: returns the tensor of a key. Raises InputError if one cannot be read
    back as it was.
    """
    sums = {}

    def noted(key):
        tensor = read(key)
        sums[key] = streaming.checksum(tensor)
        return tensor

    with replacing(file) as partial:
        streaming.save(partial, tensors, noted)
        for key, checksum in sums.items():
            if streaming.checksum(streaming.read({key: streaming.Place(partial, key)})[key]) != checksum:
                raise InputError(f"--save {file.parent}: {key} in {file.name} differs from what was in memory")
