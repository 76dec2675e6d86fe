"""Linears in place of what models keep otherwise, experts and GPT-2's Conv1D, and where checkpoints keep them.

transformers keeps the weights of all experts of a layer in 3-D parameters. Split, they are linears like any other, with
a Hessian and a sparsity each, and run through transformers' interface for implementations of experts. A Conv1D keeps
its matrix as (in, out).
"""

import copy
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

SPLIT = "one linear for each matrix"  # The name of this implementation in transformers' registry.


@dataclass(frozen=True)
class ExpertSlice:
    """The place of an expert's matrix or bias in a tensor of all experts, (experts, rows, columns) or transposed."""

    shape: torch.Size  # The shape of that tensor.
    expert: int | None  # None if the tensor is this matrix alone, transposed.
    part: int = 0  # Which of `parts` matrices that share the rows.
    parts: int = 1
    transposed: bool = False
    concatenated: bool = True  # Parts lie below each other; else their rows take turns.

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part (out, in), a view, of the tensor of all experts, which may be a slice of a file."""
        own = tensor[... if self.expert is None else self.expert]
        rows = own.t() if self.transposed and own.dim() == 2 else own
        return rows.chunk(self.parts)[self.part] if self.concatenated else rows[self.part::self.parts]


class RoutedLinear(nn.Linear):
    """A linear of an expert. Its input is the tokens that are routed to the expert, possibly none."""

    tokens: Tensor | None = None  # (n,): the numbers of these tokens in the batch of the latest call.
    batch_tokens = 0  # The number of all tokens in that batch.

    def __call__(self, hidden: Tensor, tokens: Tensor, batch_tokens: int) -> Tensor:
        """Run on the tokens of these numbers; hooks find them in `tokens` and `batch_tokens`."""
        self.tokens, self.batch_tokens = tokens, batch_tokens
        return super().__call__(hidden)

    def scatter_to_batch(self, rows: Tensor, B: int) -> Tensor:
        """Return rows (n, C), one for each token of the latest call, as (B, T, C) with zeros for all other tokens."""
        zeros = rows.new_zeros(self.batch_tokens, rows.shape[-1])
        return zeros.index_put((self.tokens,), rows).view(B, -1, rows.shape[-1])


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds experts in 3-D parameters, in one of transformers' layouts."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and "down_proj" in module._parameters


def is_split(module: nn.Module) -> bool:
    """Return whether a module holds experts as linears of their own."""
    return hasattr(module, "is_transposed") and module.config._experts_implementation == SPLIT


def kind_of(name: str) -> str:
    """Return the kind of a matrix, the same in all layers: its name, with * for the number of an expert."""
    return re.sub(r"\.\d+\.", ".*.", name)


def parts_of(module: nn.Module, leaf: str) -> dict[str, ExpertSlice]:
    """Return {name of an expert's tensor once split: its `ExpertSlice` of a parameter}, {} if that is not fused."""
    matrices = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
    names = matrices.get(leaf.removesuffix("_bias"), ()) if is_fused(module) else ()
    kind = "bias" if leaf.endswith("_bias") else "weight"
    if not names:
        return {}
    shape = module._parameters[leaf].shape
    return {f"{expert}.{name}.{kind}": ExpertSlice(shape, expert, part, len(names), module.is_transposed,
                                                   module.is_concatenated)
            for expert in range(shape[0]) for part, name in enumerate(names)}


def split_experts(model: PreTrainedModel) -> None:
    """Replace the 3-D parameters of all experts by linears; the model may be on meta."""
    for module in filter(is_fused, list(model.modules())):
        tensors = {}
        for leaf, parts in {leaf: parts_of(module, leaf) for leaf in module._parameters}.items():
            if parts:
                parameter = module._parameters.pop(leaf)
                tensors |= {name: nn.Parameter(part.of(parameter.detach()).contiguous())
                            for name, part in parts.items()}
        for name in [name for name in tensors if name.endswith("weight")]:
            number, matrix, _ = name.split(".")
            bias = tensors.get(f"{number}.{matrix}.bias")
            with torch.device("meta"):
                linear = RoutedLinear(*reversed(tensors[name].shape), bias=bias is not None)
            linear.weight, linear.bias = tensors[name], bias
            module._modules.setdefault(number, nn.Module()).add_module(matrix, linear)
        module.config = copy.copy(module.config)  # The model's own configuration, which is saved, stays as it is.
        module.config._experts_implementation = SPLIT


def use_linears(model: PreTrainedModel) -> dict[str, Conv1D]:
    """Split a model's experts and replace its Conv1D by linears; it may be on meta. Returns {path: Conv1D}."""
    split_experts(model)
    replaced = {path: module for path, module in model.named_modules() if isinstance(module, Conv1D)}
    for path, module in replaced.items():
        with torch.device("meta"):
            linear = nn.Linear(module.nx, module.nf)
        linear.weight, linear.bias = nn.Parameter(module.weight.detach().t().contiguous()), module.bias
        model.set_submodule(path, linear)
    return replaced


def restore(model: PreTrainedModel, replaced: dict[str, Conv1D]) -> None:
    """Put each Conv1D, {path: Conv1D}, back into a model in place of its linear, with what that holds now."""
    for path, module in replaced.items():
        linear = model.get_submodule(path)
        module.weight.data, module.bias = linear.weight.data.t().contiguous(), linear.bias
        model.set_submodule(path, module)


def _run_split(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run tokens (n, C) through their experts, with numbers and weights (n, k); an expert may get no tokens."""
    result = torch.zeros_like(hidden_states)
    chosen, k = top_k_index.flatten(), top_k_index.shape[1]
    counts = chosen.bincount(minlength=experts.num_experts).tolist()  # This is the only wait for a GPU.
    for number, choices in enumerate(chosen.argsort(stable=True).split(counts)):
        expert, tokens, places = experts.get_submodule(str(number)), choices // k, choices % k
        hidden = hidden_states[tokens]
        if experts.has_gate:
            gate, up = (linear(hidden, tokens, len(hidden_states)) for linear in (expert.gate_proj, expert.up_proj))
            together = torch.cat([gate, up], -1) if experts.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
            hidden = experts._apply_gate(together)
        else:
            hidden = experts.act_fn(expert.up_proj(hidden, tokens, len(hidden_states)))
        hidden = expert.down_proj(hidden, tokens, len(hidden_states))
        if experts.has_post_expert_norm:
            hidden = experts.post_expert_norm(hidden)
        weighted = hidden * top_k_weights[tokens, places, None]
        result = result.index_add(0, tokens, weighted.to(result.dtype))
    return result


def published(model: PreTrainedModel) -> dict[str, tuple[str, ExpertSlice | None]]:
    """Return {name of a tensor once experts are split: (published key, `ExpertSlice` or None)} while they are not."""
    tensors, names = {}, []
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if parts := parts_of(module, leaf):
            numbers = torch.arange(len(names), len(names) + len(parts)).view(len(tensor), -1)
            if tensor.dim() == 3:
                numbers = numbers[:, None] if module.is_transposed else numbers[:, :, None]
        else:
            numbers = torch.full((1,) * tensor.dim(), len(names))
            transposed = isinstance(module, Conv1D) and leaf == "weight"
            parts = {leaf: ExpertSlice(tensor.shape, None, transposed=True) if transposed else None}
        tensors[name] = numbers.clone()
        names += [(name.removesuffix(leaf) + part_name, part) for part_name, part in parts.items()]
    places = {}  # The model's conversion for saving tells where the numbers of tensors end up.
    for key, numbers in revert_weight_conversion(model, tensors).items():
        for number in numbers.flatten().tolist():
            name, part = names[number]
            places[name] = key, part if numbers.numel() > 1 or part and part.expert is None else None
    return places


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Return another model of the same configuration as transformers builds it, on meta."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config))


def layout_of(model: PreTrainedModel) -> dict[str, tuple[str, ExpertSlice | None]] | None:
    """Return {name: (key, `ExpertSlice` or None)} of the tensors that published checkpoints keep under another key.

    Returns None for a model in whose checkpoints transformers splits or joins other matrices: only it can load them.
    """
    fused = on_meta(model)
    try:
        places = published(fused)
        shapes = {key: tensor.shape for key, tensor in revert_weight_conversion(fused, fused.state_dict()).items()}
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError):
        return None
    names = model.state_dict()
    if places.keys() == names.keys() and all(shapes.get(key) == (part.shape if part else names[name].shape)
                                             for name, (key, part) in places.items()):
        return {name: place for name, place in places.items() if place != (name, None)}
    return None


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model in memory as transformers builds it, with its split experts in 3-D parameters again."""
    fused, state = on_meta(model), model.state_dict()
    for name, tensor in fused.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if parts := parts_of(fused.get_submodule(path), leaf):
            state[name] = torch.empty(tensor.shape, dtype=model.dtype)
            for part_name, part in parts.items():
                part.of(state[name]).copy_(state.pop(f"{path}.{part_name}"))
    fused.load_state_dict(state, assign=True)
    fused.generation_config = model.generation_config
    return fused


ALL_EXPERTS_FUNCTIONS.register(SPLIT, _run_split)
