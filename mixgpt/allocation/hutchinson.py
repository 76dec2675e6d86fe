"""Hutchinson estimates of the traces of the cross-entropy's Hessian, one decoder layer at a time (MixGPT, 2.3.1).

Notation as in `backward`; ẋ, ẏ, ġ are the tangents of x, y, g: derivatives along the probes Z of all matrices at once.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixgpt.allocation.backward import Chunk, by_sequence
from mixgpt.common.runtime import seeded, wide
from mixgpt.modeling.experts import RoutedLinear
from mixgpt.modeling.running import SLICE


def signs(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draw independent ±1 on the generator's device, 8 from each random byte."""
    count = shape.numel()
    random_bytes = torch.randint(256, (-(-count // 8), 1), generator=generator, device=generator.device,
                                 dtype=torch.uint8)
    bits = (random_bytes >> torch.arange(8, device=generator.device, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].view(shape).to(dtype).mul_(2).sub_(1)


def curvatures(chunk: Chunk, keys: Sequence[tuple]) -> Tensor:
    """Return zᵀ H z per sequence and matrix (n, matrices), H the Hessian of the loss summed over tokens.

    keys: seeds of the sequences' probes Z, entries ±1, regenerated in the backward pass. Exact second derivatives by
    double backward, with respect to one scalar ε per matrix and sequence, at W + εZ: no gradient is as large as W.
    """
    chunk.borders[0].append(torch.zeros_like(chunk.borders[0][0]))  # The tangent of the first layer's input is 0.
    result = torch.zeros(len(chunk.tokens), len(chunk.matrices), dtype=torch.float64, device=chunk.device)

    def forward(layer: nn.Module, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return output y and tangent ẏ of a layer (B, T, C): ẏ = ∇_u (d/dε ⟨y, u⟩), linear in u."""
        with torch.enable_grad(), _probed(chunk, layer, index, keys[rows]) as epsilons:
            _, t, moved = _along(chunk, index, rows)
            y = chunk.stream.call(layer, index, moved, rows)
            u = torch.zeros_like(y, requires_grad=True)
            first = torch.autograd.grad((y * u).sum(), [t, *epsilons.values()], create_graph=True,
                                        materialize_grads=True)
            y_dot, = torch.autograd.grad(sum((d.sum() for d in first[1:]), first[0].sum()), u)
        return y.detach(), y_dot

    def turn(head: Callable[[Tensor], Tensor], rows: slice) -> list[Tensor]:
        """Return g = ∂L/∂x and its tangent ġ after the last layer (B, T, C)."""
        hidden, tangent = chunk.read(-1, rows)
        labels, results = chunk.tokens[rows, 1:].flatten().to(chunk.device), []
        states = (x[:, :-1].flatten(0, 1).split(SLICE) for x in (hidden, tangent))
        for h, h_dot, label in zip(*states, labels.split(SLICE), strict=True):
            with torch.enable_grad():
                t = torch.zeros((), device=chunk.device, dtype=chunk.dtype, requires_grad=True)
                logits = wide(head(h.requires_grad_() + t * h_dot))
                loss = nn.functional.cross_entropy(logits, label, reduction="sum")
                gradient, phi = torch.autograd.grad(loss, [h, t], create_graph=True)
                results.append((gradient.detach(), torch.autograd.grad(phi, h)[0]))
        last = torch.zeros_like(hidden[:, :1])  # The last token predicts nothing.
        return [torch.cat([torch.cat(parts).view(hidden[:, :-1].shape), last], 1)
                for parts in zip(*results, strict=True)]

    def backward(layer: nn.Module, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return (g, ġ) before a layer, and store zᵀ H z of its matrices in the result.

        With s = ⟨y, g⟩ and φ = ds/dε + ⟨y, ġ⟩: ∇_x s = g and ∇_x φ = ġ of the layer before, and ∂φ/∂ε = zᵀ H z.
        """
        g, g_dot = chunk.read(index + 1, rows)
        with torch.enable_grad(), _probed(chunk, layer, index, keys[rows]) as epsilons:
            x, t, moved = _along(chunk, index, rows)
            y = chunk.stream.call(layer, index, moved, rows)
            first = torch.autograd.grad((y * g).sum(), [x, t, *epsilons.values()], create_graph=True,
                                        materialize_grads=True)
            phi = sum(d.sum() for d in first[1:]) + (y * g_dot).sum()
            second = torch.autograd.grad(phi, [x, *epsilons.values()], materialize_grads=True)
        for column, curvature in zip(epsilons, second[1:], strict=True):
            result[rows, column] = curvature.double()
        return first[0].detach(), second[0]

    with sdpa_kernel(SDPBackend.MATH):  # The other kernels have no second derivative.
        chunk.run(forward, turn, backward)
    return result.cpu()


@contextlib.contextmanager
def _probed(chunk: Chunk, layer: nn.Module, index: int, keys: Sequence[tuple]) -> Generator[dict[int, Tensor]]:
    """Perturb the matrices of a layer by ε Z within the block. Yields {column: ε (B,), zeros}."""
    epsilons = {}
    with contextlib.ExitStack() as stack:
        for column, module in chunk.matrices_of(layer, index).items():
            Z = torch.stack([signs(module.weight.shape, seeded(*key, *chunk.matrices[column], device=chunk.device),
                                   chunk.dtype) for key in keys])  # (B, out, in)
            epsilon = torch.zeros(len(keys), device=chunk.device, dtype=chunk.dtype, requires_grad=True)

            def perturb(module: nn.Module, args: tuple, output: Tensor, Z: Tensor = Z, eps: Tensor = epsilon) -> Tensor:
                X = by_sequence(module, args[0], len(Z))  # (B, T, in)
                change = eps[:, None, None] * (X @ Z.mT)
                if isinstance(module, RoutedLinear):
                    change = change.flatten(0, 1)[module.tokens]
                return output + change.view(output.shape)

            stack.enter_context(module.register_forward_hook(perturb))
            epsilons[column] = epsilon
        yield epsilons


def _along(chunk: Chunk, index: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, a scalar t per sequence, and x + t ẋ: the input of layer `index` displaced along its tangent."""
    x, x_dot = chunk.read(index, rows)
    t = torch.zeros(len(x), device=chunk.device, dtype=chunk.dtype, requires_grad=True)
    return x, t, x.requires_grad_() + t.view(-1, *[1] * (x.dim() - 1)) * x_dot
