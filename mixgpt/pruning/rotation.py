"""Rotate the heads of attention so that pruning keeps more of them. The layer computes the same as before.

Notation: W_v (k d, C) and W_o (C, k g d) are the projections to values and from them, of k key/value heads of width d,
each read by g query heads. As attention only mixes tokens, an orthogonal Q (d, d) of each key/value head may turn its
rows of W_v into Qᵀ W_v, and the columns of W_o that read them into W_o Q. A weight whose input is x counts w² E[x²]; Q
is chosen so that the kept weights have as large a share of the sum as possible, in W_v and in W_o.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mixgpt.common import distributed
from mixgpt.common.runtime import wide
from mixgpt.kernels.selection import kth_smallest, smallest_in_groups
from mixgpt.modeling.linears import hooked, linears
from mixgpt.modeling.running import HiddenStates, Reached
from mixgpt.pruning.admm import SAMPLE
from mixgpt.pruning.targets import Target

# Linears that give values, alone or below queries and keys, have these names, and so has the projection of the values.
VALUES = ("v_proj", "qkv_proj", "W_pack", "query_key_value", "c_attn", "Wqkv")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
TOKENS = 2048  # E[x xᵀ] is measured on so many tokens.
STEPS = 20
LENGTH = 0.5  # The length of the first step, as a multiple of the norm of Q.
ZEROS = 0.25  # A matrix with a larger share of zeros has been pruned before; 4 bits round a fifth to 0.
TOLERANCE = {2: 2e-2, 4: 1e-3, 8: 1e-3}  # Rounding changes rotated values by at most so much, by bytes of a number.


@torch.no_grad()
def rotate_heads(layer: nn.Module, index: int, stream: HiddenStates, targets: dict[str, Target], first: int,
                 dtype: torch.dtype | None = None) -> None:
    """Rotate a layer's heads in place if it computes the same then. first: number of this process's first sequence."""
    for name in () if stream.shared else targets:  # Later layers may read values that are shared.
        path, _, last = name.rpartition(".")
        beside = [f"{path}.{output}" for output in OUTPUTS if f"{path}.{output}" in targets]
        attention = layer.get_submodule(path)
        d = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
        clipped = any(getattr(owner, "clip_qkv", None) for owner in (attention, getattr(attention, "config", None)))
        if last not in VALUES or not beside or not d or d % (targets[name].prunem or 1) or clipped:
            continue
        v, o = (linears(layer)[path] for path in (name, beside[0]))
        heads, rows = o.in_features // d, torch.arange(v.out_features, device=v.weight.device)
        k = len(rows) // d if last == "v_proj" else (len(rows) // d - heads) // 2
        if k > 0 and not heads % k and not len(rows) % (k * d) and all(
                (linear.weight == 0).float().mean() <= ZEROS for linear in (v, o)):
            layouts = rows[-k * d:], rows.view(k, -1, d)[:, -1].flatten()  # Values come last in all, or in each head.
            any(_rotate(v, o, values.view(k, d), (targets[name], targets[beside[0]]), layer, index, stream, first,
                        dtype or o.weight.dtype) for values in layouts)


def _rotate(v: nn.Linear, o: nn.Linear, rows: Tensor, targets: tuple[Target, Target], layer: nn.Module, index: int,
            stream: HiddenStates, first: int, dtype: torch.dtype) -> bool:
    """Rotate heads whose values are rows (k, d) of v. Returns whether the layer computes the same; else it stays."""
    (k, d), before = rows.shape, []
    h = torch.zeros(v.in_features, dtype=torch.float64, device=stream.device)
    C = torch.zeros(k, o.in_features // (k * d), d, d, dtype=torch.float64, device=stream.device)
    for x_v, x_o in _inputs(v, o, layer, index, stream, max(TOKENS // stream.hidden.shape[1] - first, 1)):
        heads = x_o.double().unflatten(-1, (k, -1, d))
        h += x_v.double().square().sum(0)
        C += torch.einsum("nkgd,nkge->kgde", heads, heads)
        before.append(x_o)
    distributed.all_reduce(h, C)
    W_v, W_o = wide(v.weight[rows]), wide(o.weight).unflatten(1, (k, -1, d))
    Q = best_rotation(W_v, W_o, h.to(W_v.dtype), C.to(W_v.dtype), targets)
    Q = distributed.all_gather_shares([Q[None]], [distributed.world()])[0][0]  # They may differ in the last digits.
    unrotated = {weight: weight.clone() for weight in (*v.parameters(), o.weight)}
    for weight in v.parameters():
        weight[rows] = (Q.mT @ wide(weight[rows]).view(k, d, -1)).view_as(weight[rows]).to(dtype).to(weight.dtype)
    o.weight.copy_(_turned(wide(o.weight), Q).to(dtype))
    (_, after), *_ = _inputs(v, o, layer, index, stream, 1)
    expected = _turned(before[0], Q)
    tolerance = TOLERANCE[dtype.itemsize] * expected.norm()
    alike = all(distributed.all_gather_object(bool((after - expected).norm() <= tolerance)))
    for weight, values in () if alike else unrotated.items():
        weight.copy_(values)
    return alike


def _inputs(v: nn.Linear, o: nn.Linear, layer: nn.Module, index: int, stream: HiddenStates, count: int) -> Iterator:
    """Yield the inputs (n, ...) of two linears, batch by batch, of at least `count` sequences if there are as many."""
    seen = []

    def reached(x: Tensor) -> None:
        seen.append(x)
        raise Reached

    with hooked({v: seen.append, o: reached}):
        for rows in stream.batches():
            if rows.start < count:
                with contextlib.suppress(Reached):
                    stream.forward(layer, index, rows)
                yield [wide(x).flatten(0, -2) for x in seen]
                seen.clear()


def _turned(x: Tensor, Q: Tensor) -> Tensor:
    """Return x (n, k g d), each head turned by its Q (k, d, d)."""
    return torch.einsum("nkgd,kde->nkge", x.unflatten(-1, (len(Q), -1, Q.shape[-1])), Q).flatten(1)


def best_rotation(W_v: Tensor, W_o: Tensor, h: Tensor, C: Tensor, targets: tuple[Target, Target]) -> Tensor:
    """Return Q (k, d, d), the orthogonal matrix of each head with which pruning keeps most.

    W_v: (k, d, in). W_o: (out, k, g, d). h: (in,), Σ x² of the inputs of W_v. C: (k, g, d, d), Σ x xᵀ of those of W_o.
    The sum of the kept shares is increased along its gradient, by Cayley's transform.
    """
    (k, d, _), g = W_v.shape, C.shape[1]
    W_o = W_o.permute(1, 2, 0, 3).flatten(1, 2)  # (k, g out, d)
    eye = torch.eye(d, dtype=W_v.dtype, device=W_v.device)
    Q = eye.repeat(k, 1, 1)
    for step in range(STEPS):
        values = Q.mT @ W_v
        counts = values.square() * h  # Their sum is the same for all Q.
        G = W_v @ (_kept(counts, targets[0]) * values * h).mT / counts.sum()
        outputs, image = (W_o @ Q).unflatten(1, (g, -1)), C @ Q[:, None]
        e = (Q[:, None] * image).sum(-2, keepdim=True)  # (k, g, 1, d), Σ x² of the rotated inputs
        squares = outputs.square()
        counts = squares * e
        kept, total = _kept(counts, targets[1]), counts.sum()
        excess = kept - torch.dot(kept.flatten(), counts.flatten()) / total
        G += W_o.mT @ (excess * outputs * e).flatten(1, 2) / total
        G += (image * (excess * squares).sum(2, keepdim=True)).sum(1) / total
        A = Q.mT @ G
        A = A - A.mT
        A *= LENGTH * (1 - step / STEPS) * d**0.5 / A.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
        Q = Q @ torch.linalg.solve_ex(eye - A / 2, eye + A / 2).result  # solve_ex does not raise where A is NaN.
    return Q


def _kept(counts: Tensor, target: Target) -> Tensor:
    """Mark with 1 the weights that a target keeps when they count so much, with 0 the others."""
    if target.prunem:
        return 1 - smallest_in_groups(counts.view(-1, target.prunem, 1), target.prunen).view_as(counts).to(counts.dtype)
    sample = counts.flatten()[::counts.numel() // SAMPLE | 1]
    return (counts > kth_smallest(sample, max(round(target.sparsity * len(sample)), 1))).to(counts.dtype)
