"""Which linear layers a decoder layer has, which of them read the same input, and hooks that read it."""

import contextlib
import re
from collections.abc import Callable, Generator, Mapping

import torch
from torch import Tensor, nn

from mixgpt.modeling import experts
from mixgpt.modeling.running import HiddenStates

Key = tuple[int, str]  # The number of a decoder layer, and the name of a linear in it.
ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")  # Names of what routes tokens to experts.


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a decoder layer by name, those of each expert included, without routers."""
    mixture = any(map(experts.is_split, layer.modules()))
    return {name: module for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and not hasattr(module, "n_groups")  # DeepSeek-V4's is block-diagonal.
            and not (mixture and ROUTERS.search(name))}


def other_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return all other parameters of a decoder layer of two dimensions or more, by name: routers, convolutions."""
    known = {id(module.weight) for module in linears(layer).values()}
    return {name.removesuffix(".weight"): weight for name, weight in layer.named_parameters()
            if weight.dim() > 1 and id(weight) not in known}


@torch.no_grad()
def shared_inputs(layer: nn.Module, index: int, stream: HiddenStates) -> list[list[str]]:
    """Group the linears that a layer calls by the tensors they read, in that order, by running one sequence."""
    groups, inputs = {}, []  # Inputs are kept alive, so that no address is reused.

    def note(name: str, X: Tensor) -> None:
        inputs.append(X)
        # A tensor changed in place counts as another input. Experts without tokens get empty ones without an address.
        groups.setdefault((X.data_ptr() or id(X), X.shape, X.stride(), X._version), {})[name] = None

    with hooked({module: lambda X, name=name: note(name, X) for name, module in linears(layer).items()}):
        stream.forward(layer, index, slice(0, 1))
    return [list(names) for names in groups.values()]


@contextlib.contextmanager
def hooked(readers: Mapping[nn.Module, Callable[[Tensor], object]], outputs: bool = False) -> Generator[None]:
    """Within the block, call readers[module](input) before each forward of a module, or with its output after it."""
    with contextlib.ExitStack() as stack:
        for module, read in readers.items():
            stack.enter_context(module.register_forward_hook(lambda _, args, output, read=read: read(output)) if outputs
                                else module.register_forward_pre_hook(lambda _, args, read=read: read(args[0])))
        yield
