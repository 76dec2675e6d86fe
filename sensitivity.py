"""Sensitivity of matrices: traces of the Hessian of the cross-entropy, one decoder layer at a time (MixGPT, 2.3.1).

Notation: L = Σ over the tokens of a sequence of −log p(next token); x, y input and output of a layer or linear;
ẋ, ẏ their tangents, derivatives along the probes Z of all matrices at once; g = ∂L/∂y and ġ its tangent.
"""

import contextlib
import copy
import random
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from mixgpt.common import distributed
from mixgpt.kernels.matmul import fast_linears
from modelutils import SLICE, Stream, apply, linears, on_device

BORDERS = 2e9  # bytes of hidden states and tangents at layer borders that exist at a time, on the host


@fast_linears()
def hessian_traces(model, family, matrices, tokens, estimator, *, seed, nprobes, batch_size, device, known=None,
                   save=None):
    """Estimate Tr ∇²_W of the mean cross-entropy for each matrix W, from each sequence on its own.

    matrices: list of (layer, name). tokens: (N, T). estimator: a key of ESTIMATORS. nprobes: probes (hutchinson) or
    draws of labels (fisher) per sequence. known: rows of an earlier, interrupted call. save: called with the rows
    known so far after every chunk of sequences. Returns (N, len(matrices)) in float64: the mean over sequences
    estimates the trace, their spread its error.
    """
    N, T = tokens.shape
    rows = [] if known is None else list(known)
    layers, chunk = family.layers_of(model), _together(model, family, T, batch_size, 2)
    with tqdm(total=(N - len(rows)) * nprobes * 2 * len(layers), desc=estimator, unit="layer", disable=None) as bar:
        while len(rows) < N:
            together = range(len(rows), min(len(rows) + chunk * distributed.world(), N))
            numbers = together[distributed.share(len(together))]
            sums = torch.zeros(len(numbers), len(matrices), dtype=torch.float64)
            for probe in range(nprobes if numbers else 0):
                sums += ESTIMATORS[estimator](
                    model, family, matrices, tokens[numbers.start:numbers.stop], [(seed, n, probe) for n in numbers],
                    batch_size, device, bar)
            rows.extend(torch.cat(distributed.gather(sums)) / nprobes / (T - 1))
            if save:
                save(torch.stack(rows))
    return torch.stack(rows)


def _together(model, family, T, batch_size, states):
    """Return how many sequences of T tokens have room for `states` kinds of hidden states at all borders at a time."""
    border = states * (len(family.layers_of(model)) + 1) * T * model.config.hidden_size * 4
    return max(int(BORDERS / border / batch_size), 1) * batch_size


@dataclass(frozen=True)
class Gradients:
    """How much the loss hangs on the outputs y of matrices: squares of ∂L/∂y, {(layer, name): float32 on the host}."""

    rows: dict  # (out,): G_r = E[(∂L/∂y_r)²], over tokens
    tokens: dict  # (n, T): ‖∂L/∂y‖² at each token of the sequences of this process, over its mean in all


@fast_linears()
def output_gradients(model, family, matrices, tokens, *, seed, batch_size, device):
    """Measure the loss's `Gradients` by the outputs of matrices, with labels drawn from the model's predictions.

    With x independent of ∂L/∂y, the Fisher matrix of row r of a matrix is G_r times E[x xᵀ]: the diagonal of the
    output's factor in K-FAC (arXiv 1503.05671). matrices: list of (layer, name). tokens: (N, T).
    """
    N, T = tokens.shape
    mine = range(N)[distributed.share(N)]
    layers, chunk = family.layers_of(model), _together(model, family, T, batch_size, 1)
    sums = [torch.zeros(linears(layers[index])[name].out_features, dtype=torch.float64, device=device)
            for index, name in matrices]
    energies = torch.zeros(len(matrices), len(mine), T, dtype=torch.float64)

    def add(first, column, rows, X, Y):
        squares = Y.double().square()
        sums[column] += squares.sum(dim=(0, 1))
        energies[column, first + rows.start:first + rows.stop] = squares.sum(2).cpu()

    with tqdm(total=2 * len(mine) * len(layers), desc="gradients", unit="layer", disable=None) as bar:
        for start in range(0, len(mine), chunk):
            numbers = mine[start:start + chunk]
            keys, visit = [(seed, n, 0) for n in numbers], partial(add, start)
            _sampled_backward(model, family, matrices, tokens[numbers.start:numbers.stop], keys, batch_size, device,
                              bar, visit)
    for total in sums:
        distributed.add(total)
    means = [total.cpu() / (N * T) for total in sums]
    shares = [energy / mean.sum() if mean.any() else torch.ones_like(energy)
              for mean, energy in zip(means, energies, strict=True)]
    return Gradients(*({key: value.float() for key, value in zip(matrices, values, strict=True)}
                       for values in (means, shares)))


def _seeded(*key, device="cpu"):
    """Return a generator whose stream depends on all of `key`."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def signs(shape, generator, dtype):
    """Draw independent ±1 on the generator's device, 8 from each random byte."""
    count = shape.numel()
    random_bytes = torch.randint(256, (-(-count // 8), 1), generator=generator, device=generator.device,
                                 dtype=torch.uint8)
    bits = (random_bytes >> torch.arange(8, device=generator.device, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].view(shape).to(dtype).mul_(2).sub_(1)


class _Pass:
    """Hidden states at all layer borders of a chunk of sequences, and layers as copies that can be differentiated."""

    def __init__(self, model, family, matrices, tokens, batch_size, device, bar):
        self.layers, self.after = family.layers_of(model), family.after_of(model)
        # gradients underflow in float16
        self.dtype = torch.float32 if model.dtype == torch.float16 else model.dtype
        self.tokens, self.matrices, self.device, self.bar = tokens, matrices, device, bar
        self.stream = Stream.embed(model, family, tokens, batch_size, device)
        self.stream.kwargs = {size: [_cast(kwargs, self.dtype) for kwargs in layers]
                              for size, layers in self.stream.kwargs.items()}
        self.borders = [self.stream.hidden.to("cpu", self.dtype)]

    def copied(self, module):
        """Copy a module to the device without gradients of its own weights."""
        with on_device([module], "cpu"):
            return copy.deepcopy(module).to(self.device, self.dtype).requires_grad_(False)

    def wanted(self, layer, index):
        """Return {column of the result: linear} of a layer's matrices."""
        modules = linears(layer)
        return {column: modules[name] for column, (at, name) in enumerate(self.matrices) if at == index}

    def head_gradients(self, gradients):
        """Call gradients(modules after the layers, rows) for every batch; return the tensors it gives, joined."""
        after = [self.copied(module) for module in self.after]
        parts = [gradients(after, rows) for rows in self.stream.batches()]
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def _cast(kwargs, dtype):
    def cast(value):
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    return {key: cast(value) for key, value in kwargs.items()}


def _per_sequence(scalars, like):
    return scalars.view(-1, *[1] * (like.dim() - 1))


# ---- hutchinson ------------------------------------------------------------------------------------------------


def _hutchinson(model, family, matrices, tokens, keys, batch_size, device, bar):
    """Return zᵀ H z of every matrix for each sequence (n, matrices), H the Hessian of the loss summed over tokens.

    keys: seeds of the sequences' probes Z, entries ±1, drawn anew in the backward pass. Exact second derivatives by
    double backward: the loss is seen as a function of one scalar per matrix and sequence, ε at W + εZ, so that no
    gradient of the size of a weight is ever formed.
    """
    chunk = _Pass(model, family, matrices, tokens, batch_size, device, bar)
    tangents = [torch.zeros_like(chunk.borders[0])]
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        for index, layer in enumerate(chunk.layers):
            layer = chunk.copied(layer)
            outputs = [_layer_tangent(chunk, layer, index, rows, tangents[-1], keys) for rows in chunk.stream.batches()]
            for border, parts in zip((chunk.borders, tangents), zip(*outputs, strict=True), strict=True):
                border.append(torch.cat(parts))
            bar.update(len(tokens))
        g, g_dot = chunk.head_gradients(lambda after, rows: _head_tangent(chunk, after, rows, tangents[-1]))
        result = torch.zeros(len(tokens), len(matrices), dtype=torch.float64)
        for index in reversed(range(len(chunk.layers))):
            layer = chunk.copied(chunk.layers[index])
            for rows in chunk.stream.batches():
                g[rows], g_dot[rows] = _layer_curvature(
                    chunk, layer, index, rows, tangents[index], keys, g[rows], g_dot[rows], result[rows])
            chunk.borders.pop()
            tangents.pop()
            bar.update(len(tokens))
    return result


@contextlib.contextmanager
def _probed(chunk, layer, index, keys):
    """Perturb the matrices of a layer by ε Z within the block. Yields {column: ε (B,), zeros}."""
    epsilons, handles = {}, []
    for column, module in chunk.wanted(layer, index).items():
        Z = torch.stack([signs(module.weight.shape, _seeded(*key, *chunk.matrices[column], device=chunk.device),
                               chunk.dtype) for key in keys])  # (B, out, in)
        epsilon = torch.zeros(len(keys), device=chunk.device, dtype=chunk.dtype, requires_grad=True)

        def perturb(_, args, output, Z=Z, epsilon=epsilon):
            X = args[0].reshape(len(Z), -1, Z.shape[2])  # (B, T, in), also where a layer flattens its input
            return output + (_per_sequence(epsilon, X) * (X @ Z.mT)).view(output.shape)

        handles.append(module.register_forward_hook(perturb))
        epsilons[column] = epsilon
    try:
        yield epsilons
    finally:
        for handle in handles:
            handle.remove()


def _along(chunk, index, rows, x_dot):
    """Return x, a scalar t per sequence, and x + t ẋ, where the input of layer `index` moves along its tangent."""
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


def _head_tangent(chunk, after, rows, x_dot):
    """Return g = ∂L/∂x and its tangent ġ at the last border (B, T, C), on the host."""
    hidden, targets = chunk.borders[-1][rows, :-1], chunk.tokens[rows, 1:].flatten()
    g, g_dot = (torch.zeros_like(chunk.borders[-1][rows]) for _ in range(2))
    results = []
    for h, h_dot, target in zip(hidden.flatten(0, 1).split(SLICE), x_dot[rows, :-1].flatten(0, 1).split(SLICE),
                                targets.split(SLICE), strict=True):
        with torch.enable_grad():
            h = h.to(chunk.device).requires_grad_()
            t = torch.zeros((), device=chunk.device, dtype=chunk.dtype, requires_grad=True)
            loss = _loss(apply(after, h + t * h_dot.to(chunk.device)), target.to(chunk.device))
            gradient, phi = torch.autograd.grad(loss, [h, t], create_graph=True)
            results.append((gradient.detach().to("cpu"), torch.autograd.grad(phi, h)[0].to("cpu")))
    for whole, parts in zip((g, g_dot), zip(*results, strict=True), strict=True):
        whole[:, :-1] = torch.cat(parts).view(hidden.shape)
    return g, g_dot


def _loss(logits, target):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")


def _layer_curvature(chunk, layer, index, rows, x_dot, keys, g, g_dot, result):
    """Go back through a layer: write zᵀ H z of its matrices into result (B, matrices); return the next (g, ġ).

    s = ⟨y, g⟩ and φ = ds/dε + ⟨y, ġ⟩ give ∇_x s = g, ∇_x φ = ġ of the layer before, and ∂φ/∂ε of a matrix's own ε
    is zᵀ H z.
    """
    g, g_dot = g.to(chunk.device), g_dot.to(chunk.device)
    with torch.enable_grad(), _probed(chunk, layer, index, keys[rows]) as epsilons:
        x, t, moved = _along(chunk, index, rows, x_dot)
        y = chunk.stream.call(layer, index, moved)
        first = torch.autograd.grad((y * g).sum(), [x, t, *epsilons.values()], create_graph=True)
        phi = sum(d.sum() for d in first[1:]) + (y * g_dot).sum()
        second = torch.autograd.grad(phi, [x, *epsilons.values()])
    for column, curvature in zip(epsilons, second[1:], strict=True):
        result[:, column] = curvature.to("cpu", torch.float64)
    return first[0].detach().to("cpu"), second[0].to("cpu")


# ---- fisher ----------------------------------------------------------------------------------------------------


def _fisher(model, family, matrices, tokens, keys, batch_size, device, bar):
    """Return ‖∇_W L(ŷ)‖² for each sequence and matrix (n, matrices), labels ŷ sampled from the model's predictions.

    Its mean over draws is T − 1 times the trace of the Gauss-Newton matrix of the mean cross-entropy: the gradients
    of different tokens are independent with mean zero. keys: seeds of the sequences' labels.
    """
    result = torch.zeros(len(tokens), len(matrices), dtype=torch.float64)

    def note(column, rows, X, Y):
        result[rows, column] = (Y.mT @ X).double().square().sum(dim=(1, 2)).to("cpu")

    _sampled_backward(model, family, matrices, tokens, keys, batch_size, device, bar, note)
    return result


def _sampled_backward(model, family, matrices, tokens, keys, batch_size, device, bar, visit):
    """Go forward and back through all layers, with labels ŷ sampled from the model's predictions by `keys`.

    Calls visit(column, rows, X, Y) with the number of each matrix, the sequences of each batch, its input (B, T, in)
    and the gradient of L(ŷ) by its output (B, T, out).
    """
    chunk = _Pass(model, family, matrices, tokens, batch_size, device, bar)
    for index, layer in enumerate(chunk.layers):
        layer = chunk.copied(layer)
        with torch.no_grad():
            outputs = [chunk.stream.call(layer, index, chunk.borders[-1][rows].to(device)).to("cpu")
                       for rows in chunk.stream.batches()]
        chunk.borders.append(torch.cat(outputs))
        bar.update(len(tokens))
    g, = chunk.head_gradients(lambda after, rows: (_sampled_gradient(chunk, after, rows, keys[rows]),))
    for index in reversed(range(len(chunk.layers))):
        layer = chunk.copied(chunk.layers[index])
        for rows in chunk.stream.batches():
            g[rows] = _layer_gradient(chunk, layer, index, rows, g[rows], visit)
        chunk.borders.pop()
        bar.update(len(tokens))


def _sampled_gradient(chunk, after, rows, keys):
    """Return ∂L(ŷ)/∂x at the last border (B, T, C), on the host."""
    hidden = chunk.borders[-1][rows, :-1]
    uniform = torch.cat([torch.rand(hidden.shape[1], generator=_seeded(*key, "labels"), dtype=torch.float64)
                         for key in keys])
    g, parts = torch.zeros_like(chunk.borders[-1][rows]), []
    for h, threshold in zip(hidden.flatten(0, 1).split(SLICE), uniform.split(SLICE), strict=True):
        with torch.enable_grad():
            h = h.to(chunk.device).requires_grad_()
            logits = apply(after, h)
            cumulative = logits.detach().double().softmax(-1).cumsum(-1)
            target = torch.searchsorted(cumulative, threshold[:, None].to(chunk.device)).squeeze(1)
            parts.append(torch.autograd.grad(_loss(logits, target.clamp_(max=logits.shape[-1] - 1)), h)[0].to("cpu"))
    g[:, :-1] = torch.cat(parts).view(hidden.shape)
    return g


def _layer_gradient(chunk, layer, index, rows, g, visit):
    """Go back through a layer: let `visit` see its matrices; return the next g."""
    seen, handles = {}, []
    for column, module in chunk.wanted(layer, index).items():
        handles.append(module.register_forward_hook(
            lambda _, args, output, column=column: seen.update({column: (args[0].detach(), output)})))
    with torch.enable_grad():
        x = chunk.borders[index][rows].to(chunk.device).requires_grad_()
        y = chunk.stream.call(layer, index, x)
        outputs = [output for _, output in seen.values()]
        next_g, *cotangents = torch.autograd.grad((y * g.to(chunk.device)).sum(), [x, *outputs])
    for handle in handles:
        handle.remove()
    for (column, (X, _)), Y in zip(seen.items(), cotangents, strict=True):
        visit(column, rows, *(A.reshape(len(x), -1, A.shape[-1]) for A in (X, Y)))
    return next_g.to("cpu")


ESTIMATORS = {"hutchinson": _hutchinson, "fisher": _fisher}
