"""The weights of a finished model: shards as transformers names and fills them, read back before they count."""

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from mixgpt.common.errors import InputError
from mixgpt.common.files import replacing
from mixgpt.modeling import streaming

LARGEST = 5 * 10**9  # bytes of a shard; a tensor that is larger has one of its own


def own_tensors(model):
    """Return {name: tensor} of what a checkpoint of a model holds: all but what is tied to another tensor."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def size(tensors):
    """Return the bytes of {name: tensor}."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_configuration(folder, model):
    """Write what `from_pretrained` needs of a model beside its weights."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def split(state):
    """Return {name of a tensor: its file}: one file, or as many shards as it takes. state: {name: tensor}."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}  # none shares memory
    return split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=LARGEST).tensor_to_filename


def write(file, state, read, sums):
    """Write a shard, which has its name when it is on the disk and was read back.

    state: {name: tensor}, which may be on meta. read: returns the tensor of a name. sums: {name: checksum} of tensors
    as they were in memory; those that are missing are added. Raises InputError where a tensor differs from it.
    """
    with replacing(file) as partial:
        for name, checksum in streaming.save(partial, state, read).items():
            if sums.setdefault(name, checksum) != checksum:
                raise InputError(f"--save {file.parent}: {name}, as its finished layer was kept, differs from what was "
                                 "in memory")
        for name in state:
            if streaming.checksum(streaming.read({name: (partial, name)})[name]) != sums[name]:
                raise InputError(f"--save {file.parent}: {name} in {file.name} differs from what was in memory")
