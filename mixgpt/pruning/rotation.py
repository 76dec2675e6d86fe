"""Rotate the heads of attention so that pruning keeps more of them. The layer computes the same as before.

Notation: W_v (k d, C) and W_o (C, k g d) are the projections to values and from them, of k key/value heads of width d,
each read by g query heads. As attention only mixes tokens, an orthogonal Q (d, d) of each key/value head may turn its
rows of W_v into Qᵀ W_v, and the columns of W_o that read them into W_o Q. A weight whose input is x counts w² E[x²]; Q
is chosen so that the kept weights have as large a share of the sum as possible, in W_v and in W_o.
"""

import contextlib

import torch

from mixgpt.common import distributed
from mixgpt.common.runtime import wide
from mixgpt.kernels.selection import smallest_in_groups
from mixgpt.modeling.linears import hooked, linears
from mixgpt.modeling.running import Reached
from mixgpt.pruning.admm import SAMPLE

# names of linears that give values, alone or below queries and keys, and of the projection beside them that reads these
VALUES = ("v_proj", "qkv_proj", "W_pack", "query_key_value", "c_attn", "Wqkv")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
TOKENS = 2048  # on which E[x xᵀ] is measured
STEPS = 20
LENGTH = 0.5  # of the first step, as a multiple of the norm of Q
ZEROS = 0.25  # share of zeros above which a matrix has been pruned before; 4 bits round a fifth to 0
TOLERANCE = {2: 2e-2, 4: 1e-3, 8: 1e-3}  # relative deviation of rotated values by rounding, by bytes of a number


@torch.no_grad()
def rotate_heads(layer, index, stream, targets, first=0):
    """Rotate the heads of layer number `index`, which is on the device, in place, if it computes the same then.

    stream: hidden states before it. targets: {name of a linear: Target}. first: number of this process's first sequence
    among all. Heads stay as they are if not both linears are in the targets.
    """
    for name in () if stream.shared else targets:  # later layers may read these values
        path, _, last = name.rpartition(".")
        beside = [f"{path}.{output}" for output in OUTPUTS if f"{path}.{output}" in targets]
        attention = layer.get_submodule(path)
        d = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
        clipped = any(getattr(of, "clip_qkv", None) for of in (attention, getattr(attention, "config", None)))
        if last not in VALUES or not beside or not d or d % (targets[name].prunem or 1) or clipped:
            continue
        v, o = (linears(layer)[of] for of in (name, beside[0]))
        heads, rows = o.in_features // d, torch.arange(v.out_features, device=v.weight.device)
        k = len(rows) // d if last == "v_proj" else (len(rows) // d - heads) // 2
        if k > 0 and not heads % k and not len(rows) % (k * d) and all(
                (linear.weight == 0).float().mean() <= ZEROS for linear in (v, o)):
            layouts = rows[-k * d:], rows.view(k, -1, d)[:, -1].flatten()  # values last in all, or in each head
            any(_rotate(v, o, of_values.view(k, d), (targets[name], targets[beside[0]]), layer, index, stream, first)
                for of_values in layouts)


def _rotate(v, o, rows, targets, layer, index, stream, first):
    """Rotate heads whose values are rows (k, d) of v. Returns whether the layer computes the same; else it stays."""
    (k, d), before, h, C = rows.shape, [], 0, 0
    for of_v, of_o in _inputs(v, o, layer, index, stream, max(TOKENS // stream.hidden.shape[1] - first, 1)):
        of_v, x = of_v.double(), of_o.double().unflatten(-1, (k, -1, d))
        h, C = h + of_v.square().sum(0), C + torch.einsum("nkgd,nkge->kgde", x, x)
        before.append(of_o)
    distributed.all_reduce(h)
    distributed.all_reduce(C)
    W_v, W_o = wide(v.weight[rows]), wide(o.weight).unflatten(1, (k, -1, d))
    Q = best_rotation(W_v, W_o, h.to(W_v.dtype), C.to(W_v.dtype), targets)
    Q = distributed.broadcast_object(Q.cpu()).to(h.device)  # alike in all processes
    dense = {weight: weight.clone() for weight in (*v.parameters(), o.weight)}
    for weight in v.parameters():
        weight[rows] = (Q.mT @ wide(weight[rows]).view(k, d, -1)).view_as(weight[rows]).to(weight.dtype)
    o.weight.copy_(_turned(wide(o.weight), Q))
    (_, after), *_ = _inputs(v, o, layer, index, stream, 1)
    expected = _turned(before[0], Q)
    tolerance = TOLERANCE[o.weight.itemsize] * expected.norm()
    alike = all(distributed.all_gather_object(bool((after - expected).norm() <= tolerance)))
    for weight, values in () if alike else dense.items():
        weight.copy_(values)
    return alike


def _inputs(v, o, layer, index, stream, count):
    """Yield the inputs (n, ...) of two linears, batch by batch, of at least `count` sequences if there are as many."""
    seen = []

    def reached(x):
        seen.append(x)
        raise Reached

    with hooked({v: seen.append, o: reached}):
        for rows in stream.batches():
            if rows.start < count:
                with contextlib.suppress(Reached):
                    stream.forward(layer, index, rows)
                yield [wide(x).flatten(0, -2) for x in seen]
                seen.clear()


def _turned(x, Q):
    """Return x (n, k g d), each head turned by its Q (k, d, d)."""
    return torch.einsum("nkgd,kde->nkge", x.unflatten(-1, (len(Q), -1, Q.shape[-1])), Q).flatten(1)


def best_rotation(W_v, W_o, h, C, targets):
    """Return Q (k, d, d), the orthogonal matrix of each head with which pruning keeps most.

    W_v: (k, d, in). W_o: (out, k, g, d). h: (in,), Σ x² of the inputs of W_v. C: (k, g, d, d), Σ x xᵀ of those of W_o.
    targets: of both. Ascent of the sum of the kept shares along its gradient, by Cayley's transform.
    """
    (k, d, _), g = W_v.shape, C.shape[1]
    W_o = W_o.permute(1, 2, 0, 3).flatten(1, 2)  # (k, g out, d)
    eye = torch.eye(d, dtype=W_v.dtype, device=W_v.device)
    Q = eye.repeat(k, 1, 1)
    for step in range(STEPS):
        values = Q.mT @ W_v
        counts = values.square() * h  # whose sum is the same for all Q
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
        Q = Q @ torch.linalg.solve_ex(eye - A / 2, eye + A / 2).result  # without a check: A may be NaN
    return Q


def _kept(counts, target):
    """Mark by 1 what a target keeps of weights that count so much, by 0 the others."""
    if target.prunem:
        return 1 - smallest_in_groups(counts.view(-1, target.prunem, 1), target.prunen).view_as(counts).to(counts.dtype)
    sample = counts.flatten()[::counts.numel() // SAMPLE | 1]
    return (counts > sample.kthvalue(max(round(target.sparsity * len(sample)), 1)).values).to(counts.dtype)
