"""Traces of the Gauss-Newton matrix, and squared gradients at matrix outputs, from labels sampled from the model.

Notation as in `backward`; ŷ are labels sampled from the model's predictions.
"""

from dataclasses import dataclass
from functools import partial

import torch

from mixgpt.allocation.backward import Chunk, by_sequence, chunk_size, loss_of, seeded
from mixgpt.common import distributed, progress
from mixgpt.kernels.matmul import fast_linears
from modelutils import SLICE, linears


@dataclass(frozen=True)
class Gradients:
    """Mean squared gradients of the loss w.r.t. matrix outputs y, {(layer, name): float32 tensor on the host}."""

    rows: dict  # (out,): G_r = E[(∂L/∂y_r)²], over tokens
    tokens: dict  # (n, T): ‖∂L/∂y‖² per token of this process's sequences, divided by its mean over all processes


@fast_linears()
def output_gradients(execution, matrices, tokens, seed):
    """Measure the `Gradients` of the loss w.r.t. matrix outputs, with labels sampled from the model's predictions.

    If x is independent of ∂L/∂y, the Fisher matrix of row r of a matrix is G_r E[x xᵀ]; G is the diagonal of the
    output factor in K-FAC (arXiv 1503.05671). execution: a modelutils.Execution. matrices: list of (layer, name).
    tokens: (N, T).
    """
    N, T = tokens.shape
    mine = range(N)[distributed.share(N)]
    layers, size = execution.layers, chunk_size(execution, T, 1)
    sums = [torch.zeros(linears(layers[index])[name].out_features, dtype=torch.float64, device=execution.device)
            for index, name in matrices]
    energies = torch.zeros(len(matrices), len(mine), T, dtype=torch.float64)

    def add(first, column, rows, X, Y):
        squares = Y.double().square()
        sums[column] += squares.sum(dim=(0, 1))
        energies[column, first + rows.start:first + rows.stop] = squares.sum(2).cpu()

    with progress.bar(total=2 * len(mine) * len(layers), title="gradients", unit="step") as bar:
        for start in range(0, len(mine), size):
            numbers = mine[start:start + size]
            chunk = Chunk(execution, matrices, tokens[numbers.start:numbers.stop], bar)
            _sampled_backward(chunk, [(seed, n, 0) for n in numbers], partial(add, start))
    for total in sums:
        distributed.all_reduce(total)
    means = [total.cpu() / (N * T) for total in sums]
    shares = [energy / mean.sum() if mean.any() else torch.ones_like(energy)
              for mean, energy in zip(means, energies, strict=True)]
    return Gradients(*({key: value.float() for key, value in zip(matrices, values, strict=True)}
                       for values in (means, shares)))


def squared_gradients(chunk, keys):
    """Return ‖∇_W L(ŷ)‖² per sequence and matrix (n, matrices), labels ŷ sampled from the model's predictions.

    Its expectation is T − 1 times the trace of the Gauss-Newton matrix of the mean cross-entropy, as the gradients of
    different tokens are independent with mean zero. keys: seeds of the sequences' labels.
    """
    result = torch.zeros(len(chunk.tokens), len(chunk.matrices), dtype=torch.float64)

    def note(column, rows, X, Y):
        result[rows, column] = (Y.mT @ X).double().square().sum(dim=(1, 2)).to("cpu")

    _sampled_backward(chunk, keys, note)
    return result


def _sampled_backward(chunk, keys, visit):
    """Run all layers forward and backward, with labels ŷ sampled from the model's predictions, seeded by `keys`.

    Calls visit(column, rows, X, Y) with the index of each matrix, the sequences of each batch, the matrix's input
    (B, T, in) and the gradient of L(ŷ) w.r.t. its output (B, T, out).
    """
    for index, layer in enumerate(chunk.layers):
        layer = chunk.copied(layer)
        with torch.no_grad():
            outputs = [chunk.stream.call(layer, index, chunk.borders[-1][rows].to(chunk.device)).to("cpu")
                       for rows in chunk.stream.batches()]
        chunk.borders.append(torch.cat(outputs))
        chunk.bar.update(len(chunk.tokens))
    g, = chunk.head_gradients(lambda head, rows: (_sampled_gradient(chunk, head, rows, keys[rows]),))
    for index in reversed(range(len(chunk.layers))):
        layer = chunk.copied(chunk.layers[index])
        for rows in chunk.stream.batches():
            g[rows] = _layer_gradient(chunk, layer, index, rows, g[rows], visit)
        chunk.borders.pop()
        chunk.bar.update(len(chunk.tokens))


def _sampled_gradient(chunk, head, rows, keys):
    """Return ∂L(ŷ)/∂x after the last layer (B, T, C), on the host."""
    hidden = chunk.borders[-1][rows, :-1]
    uniform = torch.cat([torch.rand(hidden.shape[1], generator=seeded(*key, "labels"), dtype=torch.float64)
                         for key in keys])
    g, parts = torch.zeros_like(chunk.borders[-1][rows]), []
    for h, threshold in zip(hidden.flatten(0, 1).split(SLICE), uniform.split(SLICE), strict=True):
        with torch.enable_grad():
            h = h.to(chunk.device).requires_grad_()
            logits = head(h)
            cumulative = logits.detach().double().softmax(-1).cumsum(-1)
            target = torch.searchsorted(cumulative, threshold[:, None].to(chunk.device)).squeeze(1)
            parts.append(torch.autograd.grad(loss_of(logits, target.clamp_(max=logits.shape[-1] - 1)), h)[0].to("cpu"))
    g[:, :-1] = torch.cat(parts).view(hidden.shape)
    return g


def _layer_gradient(chunk, layer, index, rows, g, visit):
    """Backpropagate through a layer, calling `visit` for its matrices; return g for the layer before."""
    seen, handles = {}, []
    for column, module in chunk.matrices_of(layer, index).items():
        handles.append(module.register_forward_hook(
            lambda _, args, output, column=column: seen.update({column: (args[0].detach(), output)})))
    with torch.enable_grad():
        x = chunk.borders[index][rows].to(chunk.device).requires_grad_()
        y = chunk.stream.call(layer, index, x)
        outputs = [output for _, output in seen.values()]
        next_g, *cotangents = torch.autograd.grad((y * g.to(chunk.device)).sum(), [x, *outputs])
    for handle in handles:
        handle.remove()
    modules = chunk.matrices_of(layer, index)
    for (column, (X, _)), Y in zip(seen.items(), cotangents, strict=True):
        visit(column, rows, *(by_sequence(modules[column], A, len(x)) for A in (X, Y)))
    return next_g.to("cpu")
