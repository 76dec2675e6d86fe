"""Mixtures of experts: the matrices of every expert as linears of their own.

transformers keeps the weights of all experts of a layer in 3-D parameters. Split, they are linears like any other, with
a Hessian and a sparsity each, and run through transformers' interface for implementations of experts.
"""

import copy

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SPLIT = "one linear for each matrix"  # name of the implementation


class RoutedLinear(torch.nn.Linear):
    """A linear of an expert. Its input is the tokens that are routed to the expert, possibly none."""

    tokens = None  # (n,): the numbers of these tokens in the batch, in the latest call
    batch_tokens = 0  # tokens of the batch, in the latest call

    def __call__(self, hidden, tokens, batch_tokens):
        """Run on the tokens of these numbers; hooks find them in `tokens` and `batch_tokens`."""
        self.tokens, self.batch_tokens = tokens, batch_tokens
        return super().__call__(hidden)

    def spread(self, rows, B):
        """Return rows (n, C), one for each token of the latest call, as (B, T, C) with zeros for all other tokens."""
        spread = rows.new_zeros(self.batch_tokens, rows.shape[-1])
        return spread.index_put((self.tokens,), rows).view(B, -1, rows.shape[-1])


class Expert(torch.nn.Module):
    """The linears of one expert, named as in most checkpoints."""


def is_fused(module):
    """Return whether a module holds experts in 3-D parameters, in one of transformers' layouts."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and "down_proj" in module._parameters


def is_split(module):
    """Return whether a module holds experts as linears of their own."""
    return hasattr(module, "is_transposed") and module.config._experts_implementation == SPLIT


def fused_parts(module, leaf):
    """Return the names of an expert's tensors in a fused parameter, in order; None for a parameter of another kind."""
    kind = "bias" if leaf.endswith("_bias") else "weight"
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
    matrices = parts.get(leaf.removesuffix("_bias"))
    return matrices and [f"{name}.{kind}" for name in matrices]


def split_experts(model):
    """Replace the 3-D parameters of all experts of a model by linears, without copying where the layout allows it.

    The model may be on meta. Returns whether there were any.
    """
    fused = [module for module in model.modules() if is_fused(module)]
    for module in fused:
        for number, matrices in enumerate(zip(*_matrices(module), strict=True)):
            expert = Expert()
            for name, weight, bias in matrices:
                expert.add_module(name, _linear(weight, bias))
            module.add_module(str(number), expert)
        for name in [name for name in module._parameters if name.removesuffix("_bias").endswith("_proj")]:
            del module._parameters[name]
        module.config = copy.copy(module.config)  # the model's own, as saved, stays as it is
        module.config._experts_implementation = SPLIT
    return bool(fused)


def _matrices(module):
    """Return lists, over the experts, of (name of the linear, weight (out, in), bias or None)."""
    names = {"gate_up_proj": ("gate_proj", "up_proj")} if module.has_gate else {"up_proj": ("up_proj",)}
    lists = []
    for fused, parts in (names | {"down_proj": ("down_proj",)}).items():
        for part, name in enumerate(parts):
            weights = [_part(weight.t() if module.is_transposed else weight, part, len(parts), module.is_concatenated)
                       for weight in module._parameters[fused].unbind()]
            biases = module._parameters[f"{fused}_bias"].unbind() if module.has_bias else [None] * len(weights)
            if module.has_bias:
                biases = [_part(bias, part, len(parts), module.is_concatenated) for bias in biases]
            lists.append([(name, weight, bias) for weight, bias in zip(weights, biases, strict=True)])
    return lists


def _part(rows, part, parts, concatenated):
    """Return the rows of one of several matrices that are stored below each other, or row by row in turn."""
    return rows.chunk(parts)[part] if concatenated else rows[part::parts]


def _linear(weight, bias):
    """Return a linear with these weights (out, in)."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = RoutedLinear(in_features, out_features, bias=bias is not None)
    linear.weight = torch.nn.Parameter(weight.detach().contiguous(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias.detach().contiguous(), requires_grad=bias.requires_grad)
    return linear


def _run_split(experts, hidden_states, top_k_index, top_k_weights):
    """Run tokens (n, C) through their experts, each expert on all of its tokens, also where these are none.

    top_k_index, top_k_weights: (n, k), the experts of each token. Returns (n, C).
    """
    result = torch.zeros_like(hidden_states)
    for number in range(experts.num_experts):
        expert = experts.get_submodule(str(number))
        tokens, places = torch.where(top_k_index == number)
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


ALL_EXPERTS_FUNCTIONS.register(SPLIT, _run_split)
