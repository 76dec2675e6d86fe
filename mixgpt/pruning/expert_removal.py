"""Remove the experts of least score from every layer in one shot: REAP (arXiv 2510.13999).

The score of an expert is the mean, over the calibration tokens routed to it, of its router weight times the norm of
its output. All that a class keeps for each expert, such as rows and biases of its routers, is found by comparing with
the same class built with fewer experts.
"""

import contextlib
import copy
import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixgpt.common import distributed
from mixgpt.common.errors import InputError, reading
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.experts import RoutedLinear, is_split, split_experts
from mixgpt.modeling.linears import hooked
from mixgpt.modeling.placing import in_turn
from mixgpt.modeling.running import StreamedModel
from mixgpt.modeling.streaming import compute_buffers, disk_weights

# Configurations have these names for the number of experts, and for how many of them a token takes.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class ExpertRows:
    """The entries of some experts in a tensor with one for each expert; the part of a `TensorLocation`."""

    dim: int  # Experts lie along this dimension.
    numbers: tuple[int, ...]  # The numbers of these experts.

    def of(self, tensor: Tensor) -> Tensor:
        """Return the entries of these experts from a tensor, or from a slice of a safetensors file."""
        return tensor[:].index_select(self.dim, torch.tensor(self.numbers))


def _experts_of(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Return the name and the module of the first experts of a model or a layer, "" and None if it has none."""
    return next(((name, module) for name, module in model.named_modules() if is_split(module)), ("", None))


def with_fewer_experts(model: PreTrainedModel, fraction: float) -> PreTrainedModel:
    """Return a model on meta like this one without a fraction of each layer's experts, or raise InputError."""
    config, kind, flag = copy.deepcopy(model.config), type(model).__name__, f"--experts {fraction:g}"
    counts = {module.num_experts for module in model.modules() if is_split(module)}
    names = [name for name in EXPERTS if config.to_dict().get(name) in counts]
    if len(counts) != 1 or not names:
        raise InputError(f"{flag}: this {kind} has no mixture of experts whose number can be lowered")
    (count,), groups = counts, getattr(config, "n_group", None) or 1
    in_group = count // groups - round(fraction * count / groups)
    left, before = groups * in_group, f"the {count} experts of a layer" + (f", {groups} groups" if groups > 1 else "")
    top_k = max(int(torch.tensor(getattr(config, name, None) or 0).max()) for name in TOP_K)  # Some list it by layer.
    if left == count:
        raise InputError(f"{flag}: removes none of {before}")
    if in_group * (config.topk_group if groups > 1 else 1) < top_k or in_group < min(groups, 2):
        raise InputError(f"{flag}: leaves {left} of {before}, too few for tokens that take {top_k}")
    for name in names:
        setattr(config, name, left)
    with reading(f"{flag}: a {kind} with {left} experts cannot be built"), torch.device("meta"):
        smaller = type(model)._from_config(config, dtype=model.dtype).eval()
    split_experts(smaller)
    for index, layer in enumerate(layers_of(smaller)):
        _sources(index, layers_of(model)[index], layer, range(left))  # This raises if experts cannot be told apart.
    return smaller


def _sources(index: int, layer: nn.Module, smaller: nn.Module, kept: Iterable[int]) -> dict[str, tuple]:
    """Return {name of a tensor of a layer with the `kept` experts: (its name in the layer, `ExpertRows` or None)}."""
    state, (path, experts), kept, sources = layer.state_dict(), _experts_of(layer), tuple(kept), {}
    for name, tensor in smaller.state_dict().items() if experts else ():
        source = re.sub(rf"^({re.escape(path)}\.)(\d+)\.", lambda found: f"{found[1]}{kept[int(found[2])]}.", name)
        sizes = zip(state[source].shape, tensor.shape, strict=True)
        differing = {dim: pair for dim, pair in enumerate(sizes) if len(set(pair)) > 1}
        if list(differing.values()) not in ([], [(experts.num_experts, len(kept))]) or not tensor.is_floating_point():
            raise InputError(f"--experts: layer {index} has {name}, of which no part belongs to each expert")
        sources[name] = source, ExpertRows(*differing, kept) if differing else None
    return sources


@torch.no_grad()
def expert_scores(streamed: StreamedModel, tokens: Tensor) -> dict[int, Tensor]:
    """Return {layer: scores (experts,)} of a model on tokens (N, T). Raises InputError if a score is not finite."""
    sums, stream = {}, streamed.embed(tokens[distributed.share(len(tokens))])
    for index, layer in in_turn(streamed.layers, streamed.device, "experts"):
        _, experts = _experts_of(layer)
        with _recording(experts, stream.device) if experts else contextlib.nullcontext() as recorded:
            stream.advance(layer, index)
        if recorded is not None:
            distributed.all_reduce(recorded)
            if not recorded.isfinite().all():
                raise InputError(f"layer {index}: its experts give NaN or inf on the calibration sequences")
            sums[index] = recorded
    return {index: (norms / counts.clamp_min(1)).cpu() for index, (norms, counts) in sums.items()}


@contextlib.contextmanager
def _recording(experts: nn.Module, device: torch.device) -> Generator[Tensor]:
    """Within the block, sum up router weight times norm of the output, and tokens, of each expert: (2, experts)."""
    sums, routing = torch.zeros(2, experts.num_experts, dtype=torch.float64, device=device), {}

    def add(number: int, linear: RoutedLinear, output: Tensor) -> None:
        output = experts.post_expert_norm(output) if experts.has_post_expert_norm else output
        _, chosen, weights = routing.values()  # (n, k) each
        weights = (weights * (chosen == number)).sum(-1)[linear.tokens]
        sums[0, number] += (weights * output.float().norm(dim=-1)).sum(dtype=torch.float64)
        sums[1, number] += len(output)

    downs = [experts.get_submodule(f"{number}.down_proj") for number in range(experts.num_experts)]
    readers = {linear: partial(add, number, linear) for number, linear in enumerate(downs)}
    with hooked(readers, outputs=True), experts.register_forward_pre_hook(
            lambda _, args: routing.update(enumerate(args))):
        yield sums


def best_experts(scores: Tensor, smaller: PreTrainedModel) -> list[int]:
    """Return the numbers, ascending, of the experts of highest scores (experts,), as many as `smaller` has."""
    groups, left = getattr(smaller.config, "n_group", None) or 1, _experts_of(smaller)[1].num_experts
    best = scores.view(groups, -1).topk(left // groups).indices  # Experts of a group are neighbours.
    return (best + len(scores) // groups * torch.arange(groups)[:, None]).flatten().sort().values.tolist()


def remove_experts(model: PreTrainedModel, smaller: PreTrainedModel, kept: dict[int, Sequence[int]]) -> None:
    """Keep only experts {layer: numbers, ascending}, in layers of `with_fewer_experts`; weights on disk stay there."""
    layers = layers_of(model)
    for index, numbers in kept.items():
        layer, new = layers[index], layers_of(smaller)[index]
        sources, state = _sources(index, layer, new, numbers), layer.state_dict()
        if locations := disk_weights(layer):
            new.disk_weights = {name: locations[source]._replace(part=rows) if rows else locations[source]
                                for name, (source, rows) in sources.items()}
            for name, tensor in new.state_dict(keep_vars=True).items():
                tensor.data = tensor.data.to(state[name].dtype)
        else:
            new.load_state_dict({name: rows.of(state[source]) if rows else state[source]
                                 for name, (source, rows) in sources.items()}, assign=True)
        layers[index] = new.requires_grad_(next(layer.parameters()).requires_grad)
    compute_buffers(model)
    for name in vars(model.config).keys() & EXPERTS:
        setattr(model.config, name, getattr(smaller.config, name))
