"""The finished model in shards, named and filled as by transformers."""

import copy
import json

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mixgpt.common.files import replacing
from mixgpt.modeling import streaming

LARGEST = 5 * 10**9  # bytes of a shard; a larger tensor gets its own


def own_tensors(model):
    """Return the {name: tensor} of a model's checkpoint: all but tensors tied to another."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def size(tensors):
    """Return the total bytes of {name: tensor}."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write(folder, model, layout):
    """Write a model as `save_pretrained` does, a shard in memory at a time; an index, if any, comes last.

    layout: from `layout.layout_of`.
    """
    write_configuration(folder, model)
    state, parts = own_tensors(model), {}  # key -> {name: Part or None}
    for name in state:
        key, part = layout.get(name, (name, None))
        parts.setdefault(key, {})[name] = part
    empty = {key: _empty(names, state) for key, names in parts.items()}

    def read(name):
        if hasattr(model, "source"):
            stored = streaming.mapped(model.source.places[name])
            return stored.to(state[name].dtype)  # mapped, if that is its dtype
        return state[name].clone()  # a file takes no tensors that share memory

    files = split_torch_state_dict_into_shards(empty, filename_pattern="model{suffix}.safetensors",
                                               max_shard_size=LARGEST).tensor_to_filename
    for file in dict.fromkeys(files.values()):
        streaming.write(folder / file, {key: _merged(empty[key], parts[key], read) for key in files
                                        if files[key] == file})
    if len(set(files.values())) > 1:
        with replacing(folder / SAFE_WEIGHTS_INDEX_NAME) as partial:
            partial.write_text(json.dumps({"metadata": {"total_size": size(empty)}, "weight_map": files},
                                          indent=1) + "\n")


def _empty(names, state):
    """Return a tensor of the checkpoint on meta. names: {name: Part or None} of what it consists of."""
    name, part = next(iter(names.items()))
    shape = part.whole(state[name].shape, len(names) // part.parts) if part else state[name].shape
    return torch.empty(shape, dtype=state[name].dtype, device="meta")


def _merged(empty, names, read):
    """Return a tensor of the checkpoint. empty, names: as in `_empty`. read: returns the tensor of a name."""
    if list(names.values()) == [None]:
        return read(next(iter(names)))
    whole = torch.empty_like(empty, device="cpu")
    for name, part in names.items():
        part.of(whole[part.expert]).copy_(read(name))
    return whole


def write_configuration(folder, model):
    """Write what `from_pretrained` needs besides the weights."""
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def in_memory(model):
    """Return a model with its weights in memory: another one if they are on disk."""
    if not hasattr(model, "source"):
        return model
    state = {name: model.source.tensor(name) for name in own_tensors(model)}
    loaded = type(model).from_pretrained(None, config=copy.deepcopy(model.config), state_dict=state, dtype=model.dtype)
    loaded.generation_config = model.generation_config
    return loaded
