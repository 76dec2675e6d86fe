"""The finished model in shards, named and filled as by transformers, and what belongs beside them."""

import copy
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mixgpt.common.files import replacing
from mixgpt.modeling import streaming
from mixgpt.modeling.experts import layout_of
from mixgpt.modeling.streaming import disk_weights

LARGEST = 5 * 10**9  # bytes of a shard; a larger tensor gets its own


def own_tensors(model):
    """Return the {name: tensor} of a model's checkpoint: all but tensors tied to another."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def size(tensors):
    """Return the total bytes of {name: tensor}."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write(folder, model, family=None, grids=None):
    """Write a model as `save_pretrained` does, a shard in memory at a time; an index, if any, comes last."""
    write_configuration(folder, model)
    state, layout, slices = own_tensors(model), layout_of(model), {}  # slices: key -> {name: ExpertSlice or None}
    for name in state:
        key, part = layout.get(name, (name, None))
        slices.setdefault(key, {})[name] = part
    empty = {key: _empty(names, state) for key, names in slices.items()}
    weights = disk_weights(model)

    def read(name):
        if weights:  # mapped, if stored in its dtype
            return streaming.mapped(weights.locations[name]).to(state[name].dtype)
        return state[name].clone()  # a file takes no tensors that share memory

    files = split_torch_state_dict_into_shards(empty, filename_pattern="model{suffix}.safetensors",
                                               max_shard_size=LARGEST).tensor_to_filename
    for file in dict.fromkeys(files.values()):
        streaming.write(folder / file, {key: _merged(empty[key], slices[key], read) for key in files
                                        if files[key] == file})
    if len(set(files.values())) > 1:
        with replacing(folder / SAFE_WEIGHTS_INDEX_NAME) as partial:
            partial.write_text(json.dumps({"metadata": {"total_size": size(empty)}, "weight_map": files},
                                          indent=1) + "\n")


def _empty(names, state):
    """Return a tensor of the checkpoint on meta. names: {name: ExpertSlice or None} of what it consists of."""
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
    if not (weights := disk_weights(model)):
        return model
    state = {name: weights.tensor(name) for name in own_tensors(model)}
    loaded = type(model).from_pretrained(None, config=copy.deepcopy(model.config), state_dict=state, dtype=model.dtype)
    loaded.generation_config = model.generation_config
    return loaded


def copy_code(folder, model, tokenizer):
    """Copy the code that a model or its tokenizer names by `auto_map`, for others to load it; it is never run here.

    If there is none beside the model, an `auto_map` would make the folder useless to others: it is dropped, unless it
    names code on the hub (REPOSITORY--MODULE.CLASS).
    """
    source = Path(model.config.name_or_path)
    owners = [owner for owner in (vars(model.config), tokenizer.init_kwargs) if owner.get("auto_map")]
    files = list(source.glob("*.py")) if owners and model.config.name_or_path else []
    for file in files:  # all: they may import each other
        shutil.copyfile(file, folder / file.name)
    for owner in owners if not files else ():
        if "--" not in str(owner["auto_map"]):
            del owner["auto_map"]
