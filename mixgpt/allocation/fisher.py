"""The Fisher matrix, an estimate of the loss's curvature: its traces, and its diagonals at the outputs of matrices.

It is the mean outer product of gradients of L(ŷ), with labels ŷ sampled from the model's own predictions; for
cross-entropy it equals the Gauss-Newton matrix. Notation as in `backward`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mixgpt.allocation.backward import Chunk, by_sequence, chunk_size
from mixgpt.common import distributed, progress
from mixgpt.common.errors import InputError
from mixgpt.common.runtime import repeatable_attention, seeded, wide
from mixgpt.modeling.experts import RoutedLinear
from mixgpt.modeling.linears import Key, hooked, linears
from mixgpt.modeling.running import SLICE, StreamedModel, by_rows

TOKEN_CLIP = 4  # A token counts in G at most so many times the mean ‖∂L/∂y‖² of its sequence's tokens.
ROUNDING = 1e-9  # A token with less than this share of its sequence's largest ‖∂L/∂y‖² was not routed here.
ROW_WEIGHT_EXPONENT = 0.7  # This power shrinks the differences of G within a matrix.
PART = 512  # So many probabilities are cumulated at a time.


def output_gradients(streamed: StreamedModel, matrices: Sequence[Key], tokens: Tensor, seed: int,
                     vocabulary: Tensor | None = None) -> dict[Key, tuple[Tensor, Tensor]]:
    """Measure gradients of the loss w.r.t. matrix outputs y = W x, with labels sampled from the model's predictions.

    Returns {matrix: (G (out,), E[x_c²] (in,))}, float32 on the host; G_r = E[(∂L/∂y_r)²], means over tokens, E[x_c²]
    over those that reach the matrix: an expert's G_r is 0 for the others. If x is independent of ∂L/∂y, the Fisher
    matrix of row r of a matrix is G_r E[x xᵀ]; G is the diagonal of the output factor in K-FAC (arXiv 1503.05671). The
    estimate is noisy, so a token's contribution is clipped at TOKEN_CLIP times the sequence's mean, and
    ROW_WEIGHT_EXPONENT shrinks the differences within a matrix. vocabulary: the tokens among which the model predicts.
    """
    N, T = tokens.shape
    mine, layers = range(N)[distributed.share(N)], streamed.layers
    size, place = chunk_size(streamed, -(-N // distributed.world()), T, 1)
    of_layers = [linears(layer) for layer in layers]
    modules = [of_layers[index][name] for index, name in matrices]
    sums, inputs = ([torch.zeros(getattr(module, side), dtype=torch.float64, device=streamed.device)
                     for module in modules] for side in ("out_features", "in_features"))
    reached = torch.zeros(len(matrices), dtype=torch.float64, device=streamed.device)  # Tokens that reach each matrix.

    def measure(column: int, _: slice, X: Tensor, Y: Tensor) -> None:
        squares = wide(Y).square()
        sums[column] += torch.mv(squares.flatten(0, 1).t(), _clipping(squares.sum(2)).flatten())
        inputs[column] += wide(X).square().sum((0, 1))
        reached[column] += X.any(-1).sum() if isinstance(modules[column], RoutedLinear) else len(X) * X.shape[1]

    total = 2 * len(mine) * len(layers)
    with progress.bar(total=total, title="gradients", unit="step") as bar:
        for start in range(0, len(mine), size):
            numbers = mine[start:start + size]
            _sampled_backward(Chunk(streamed, matrices, tokens[numbers.start:numbers.stop], place, bar),
                              [(seed, n, 0) for n in numbers], measure, vocabulary)
    together = torch.cat([*sums, *inputs, reached])
    distributed.all_reduce(together)
    *sums, reached = together.cpu().split([*map(len, (*sums, *inputs)), len(reached)])
    result = {}
    for key, G, energy, count in zip(matrices, sums[:len(matrices)], sums[len(matrices):], reached, strict=True):
        G, energy = G / (N * T), energy / count.clamp(min=1)
        powers = G ** ROW_WEIGHT_EXPONENT
        result[key] = (powers * (G.mean() / powers.mean()).nan_to_num(1.0)).float(), energy.float()
        if not all(values.isfinite().all() for values in result[key]):
            raise InputError(f"layer {key[0]} {key[1]}: its gradient is NaN or inf; try --dtype float32")
    return result


def _clipping(energies: Tensor) -> Tensor:
    """Return factors (B, T) that clip ‖∂L/∂y‖² (B, T) at TOKEN_CLIP times the mean of a sequence's routed tokens."""
    routed = energies > ROUNDING * energies.amax(1, keepdim=True)
    mean = energies.sum(1, keepdim=True) / routed.sum(1, keepdim=True).clamp(min=1)
    return (TOKEN_CLIP * mean / energies).nan_to_num(1.0).clamp_(max=1)


def squared_gradients(chunk: Chunk, keys: Sequence[tuple]) -> Tensor:
    """Return ‖∇_W L(ŷ)‖² per sequence and matrix (n, matrices), labels ŷ sampled from the model's predictions.

    Its expectation is T − 1 times the trace of the Gauss-Newton matrix of the mean cross-entropy, as the gradients of
    different tokens are independent with mean zero. keys: seeds of the sequences' labels.
    """
    # The result stays on the device, so that the host waits for no batch.
    result = torch.zeros(len(chunk.tokens), len(chunk.matrices), dtype=torch.float64, device=chunk.device)

    def measure(column: int, rows: slice, X: Tensor, Y: Tensor) -> None:
        result[rows, column] = wide(Y.mT @ X).square().sum(dim=(1, 2)).double()

    _sampled_backward(chunk, keys, measure)
    return result.cpu()


def _sampled_backward(chunk: Chunk, keys: Sequence[tuple], measure: Callable, vocabulary: Tensor | None = None) -> None:
    """Run all layers forward and backward, with labels ŷ sampled from the model's predictions, seeded by `keys`.

    Calls measure(column, rows, X, Y) with the index of a matrix, the slice of sequences in a batch, the matrix's
    input X (B, T, in) and the gradient Y of L(ŷ) w.r.t. its output (B, T, out). Gradients replace hidden states.
    """
    @torch.no_grad()
    def forward(layer: nn.Module, index: int, rows: slice) -> list[Tensor]:
        return [chunk.stream.call(layer, index, *chunk.read(index, rows), rows)]

    def backward(layer: nn.Module, index: int, rows: slice) -> list[Tensor]:
        modules, inputs, outputs = chunk.matrices_of(layer, index), {}, {}
        (x,), (g,) = chunk.read(index, rows), chunk.read(index + 1, rows)
        before, after = ({module: partial(kept.__setitem__, column) for column, module in modules.items()}
                         for kept in (inputs, outputs))
        with hooked(before), hooked(after, outputs=True), torch.enable_grad():
            y = chunk.stream.call(layer, index, x.requires_grad_(), rows)
            reached = {column: Y for column, Y in outputs.items() if Y.requires_grad}
            next_g, *gradients = torch.autograd.grad(y, [x, *reached.values()], g, materialize_grads=True)
        cotangents = dict(zip(reached, gradients, strict=True))
        for column, Y in outputs.items():  # An output without a gradient is unused, or chooses what is attended to.
            X, Y = inputs[column].detach(), cotangents[column] if column in reached else torch.zeros_like(Y)
            measure(column, rows, *(by_sequence(modules[column], A, len(x)) for A in (X, Y)))
        return [next_g]

    with repeatable_attention(chunk.device):
        chunk.run(forward, lambda head, rows: [_sampled_gradient(chunk, head, rows, keys[rows])], backward, vocabulary)


def _sampled_gradient(chunk: Chunk, head: Callable, rows: slice, keys: Sequence[tuple]) -> Tensor:
    """Return ∂L(ŷ)/∂x after the last layer (B, T, C)."""
    hidden, = chunk.read(-1, rows)
    uniform = torch.cat([torch.rand(hidden.shape[1] - 1, generator=seeded(*key, "labels"), dtype=torch.float64)
                         for key in keys]).to(chunk.device)
    parts = []
    for h, thresholds in zip(hidden[:, :-1].flatten(0, 1).split(SLICE), uniform.split(SLICE), strict=True):
        with torch.enable_grad():
            logits = head(h.requires_grad_())
        cotangent = torch.empty_like(logits)
        for scores, threshold, g in by_rows(logits.detach(), thresholds, cotangent):
            p = wide(scores).softmax(-1)
            g.copy_(p.scatter_add_(1, drawn(p, threshold)[:, None], p.new_full((len(p), 1), -1)))  # ∂(−log p(ŷ))
        parts.append(torch.autograd.grad(logits, h, cotangent)[0])
    return torch.cat([torch.cat(parts).view(hidden[:, :-1].shape), torch.zeros_like(hidden[:, :1])], 1)


def drawn(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index from each row of p (n, V), probabilities: the first whose cumulated p reaches uniform (n,)."""
    parts, uniform = nn.functional.pad(p, (0, -p.shape[1] % PART)).unflatten(1, (-1, PART)), uniform[:, None]
    sums = parts.sum(2, dtype=torch.float64)  # Cumulating whole rows would take a third of the head's time.
    ends = sums.cumsum(1)
    part = torch.searchsorted(ends, uniform).clamp_(max=ends.shape[1] - 1)
    inside = parts.take_along_dim(part[..., None], 1).squeeze(1).cumsum(1, dtype=torch.float64)
    place = torch.searchsorted(inside, uniform - (ends - sums).gather(1, part))
    return (part * PART + place).squeeze(1).clamp_(max=p.shape[1] - 1)
