"""Hutchinson estimates of the traces of the cross-entropy's Hessian, one decoder layer at a time (MixGPT, 2.3.1).

Notation as in `backward`; ẋ, ẏ, ġ are the tangents of x, y, g: derivatives along the probes Z of all matrices at once.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixgpt.allocation.backward import by_sequence, loss_of, seeded
from mixgpt.modeling.experts import RoutedLinear
from modelutils import SLICE


def signs(shape, generator, dtype):
    """Draw independent ±1 on the generator's device, 8 from each random byte."""
    count = shape.numel()
    random_bytes = torch.randint(256, (-(-count // 8), 1), generator=generator, device=generator.device,
                                 dtype=torch.uint8)
    bits = (random_bytes >> torch.arange(8, device=generator.device, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].view(shape).to(dtype).mul_(2).sub_(1)


def curvatures(chunk, keys):
    """Return zᵀ H z per sequence and matrix (n, matrices), H the Hessian of the loss summed over tokens.

    keys: seeds of the sequences' probes Z, entries ±1, regenerated in the backward pass. Exact second derivatives by
    double backward, with respect to one scalar ε per matrix and sequence, at W + εZ: no gradient of the size of a
    weight matrix is ever formed.
    """
    tangents = [torch.zeros_like(chunk.borders[0])]
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        for index, layer in enumerate(chunk.layers):
            layer = chunk.copied(layer)
            outputs = [_layer_tangent(chunk, layer, index, rows, tangents[-1], keys) for rows in chunk.stream.batches()]
            for border, parts in zip((chunk.borders, tangents), zip(*outputs, strict=True), strict=True):
                border.append(torch.cat(parts))
            chunk.bar.update(len(chunk.tokens))
        g, g_dot = chunk.head_gradients(lambda head, rows: _head_tangent(chunk, head, rows, tangents[-1]))
        result = torch.zeros(len(chunk.tokens), len(chunk.matrices), dtype=torch.float64)
        for index in reversed(range(len(chunk.layers))):
            layer = chunk.copied(chunk.layers[index])
            for rows in chunk.stream.batches():
                g[rows], g_dot[rows], found = _layer_curvature(
                    chunk, layer, index, rows, tangents[index], keys, (g[rows], g_dot[rows]))
                for column, values in found.items():
                    result[rows, column] = values
            chunk.borders.pop()
            tangents.pop()
            chunk.bar.update(len(chunk.tokens))
    return result


def _per_sequence(scalars, like):
    return scalars.view(-1, *[1] * (like.dim() - 1))


@contextlib.contextmanager
def _probed(chunk, layer, index, keys):
    """Perturb the matrices of a layer by ε Z within the block. Yields {column: ε (B,), zeros}."""
    epsilons, handles = {}, []
    for column, module in chunk.matrices_of(layer, index).items():
        Z = torch.stack([signs(module.weight.shape, seeded(*key, *chunk.matrices[column], device=chunk.device),
                               chunk.dtype) for key in keys])  # (B, out, in)
        epsilon = torch.zeros(len(keys), device=chunk.device, dtype=chunk.dtype, requires_grad=True)

        def perturb(module, args, output, Z=Z, epsilon=epsilon):
            X = by_sequence(module, args[0], len(Z))  # (B, T, in)
            change = _per_sequence(epsilon, X) * (X @ Z.mT)
            if isinstance(module, RoutedLinear):
                change = change.flatten(0, 1)[module.tokens]
            return output + change.view(output.shape)

        handles.append(module.register_forward_hook(perturb))
        epsilons[column] = epsilon
    try:
        yield epsilons
    finally:
        for handle in handles:
            handle.remove()


def _along(chunk, index, rows, x_dot):
    """Return x, a scalar t per sequence, and x + t ẋ: the input of layer `index` displaced along its tangent."""
    x = chunk.borders[index][rows].to(chunk.device).requires_grad_()
    t = torch.zeros(len(x), device=chunk.device, dtype=chunk.dtype, requires_grad=True)
    return x, t, x + _per_sequence(t, x) * x_dot[rows].to(chunk.device)


def _layer_tangent(chunk, layer, index, rows, x_dot, keys):
    """Return output y and tangent ẏ of a layer (B, T, C), on the host: ẏ = ∇_u (d/dε ⟨y, u⟩), linear in u."""
    with torch.enable_grad(), _probed(chunk, layer, index, keys[rows]) as epsilons:
        _, t, moved = _along(chunk, index, rows, x_dot)
        y = chunk.stream.call(layer, index, moved)
        u = torch.zeros_like(y, requires_grad=True)
        first = torch.autograd.grad((y * u).sum(), [t, *epsilons.values()], create_graph=True)
        y_dot, = torch.autograd.grad(sum(d.sum() for d in first), u)
    return y.detach().to("cpu"), y_dot.to("cpu")


def _head_tangent(chunk, head, rows, x_dot):
    """Return g = ∂L/∂x and its tangent ġ after the last layer (B, T, C), on the host."""
    hidden, targets = chunk.borders[-1][rows, :-1], chunk.tokens[rows, 1:].flatten()
    g, g_dot = (torch.zeros_like(chunk.borders[-1][rows]) for _ in range(2))
    results = []
    for h, h_dot, target in zip(hidden.flatten(0, 1).split(SLICE), x_dot[rows, :-1].flatten(0, 1).split(SLICE),
                                targets.split(SLICE), strict=True):
        with torch.enable_grad():
            h = h.to(chunk.device).requires_grad_()
            t = torch.zeros((), device=chunk.device, dtype=chunk.dtype, requires_grad=True)
            loss = loss_of(head(h + t * h_dot.to(chunk.device)), target.to(chunk.device))
            gradient, phi = torch.autograd.grad(loss, [h, t], create_graph=True)
            results.append((gradient.detach().to("cpu"), torch.autograd.grad(phi, h)[0].to("cpu")))
    for whole, parts in zip((g, g_dot), zip(*results, strict=True), strict=True):
        whole[:, :-1] = torch.cat(parts).view(hidden.shape)
    return g, g_dot


def _layer_curvature(chunk, layer, index, rows, x_dot, keys, cotangents):
    """Backpropagate (g, ġ) through a layer. Returns those of the layer before, and zᵀ H z, {column: (B,)}.

    With s = ⟨y, g⟩ and φ = ds/dε + ⟨y, ġ⟩: ∇_x s = g and ∇_x φ = ġ of the layer before, and ∂φ/∂ε for a matrix's own
    ε is zᵀ H z.
    """
    g, g_dot = (each.to(chunk.device) for each in cotangents)
    with torch.enable_grad(), _probed(chunk, layer, index, keys[rows]) as epsilons:
        x, t, moved = _along(chunk, index, rows, x_dot)
        y = chunk.stream.call(layer, index, moved)
        first = torch.autograd.grad((y * g).sum(), [x, t, *epsilons.values()], create_graph=True)
        phi = sum(d.sum() for d in first[1:]) + (y * g_dot).sum()
        second = torch.autograd.grad(phi, [x, *epsilons.values()])
    found = {column: curvature.to("cpu", torch.float64) for column, curvature in zip(epsilons, second[1:], strict=True)}
    return first[0].detach().to("cpu"), second[0].to("cpu"), found
