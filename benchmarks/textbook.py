"""The published algorithm written down plainly, as the yardstick of speed: what SparseGPT's paper and pseudocode say.

One float32 Hessian for every linear, batches of one sequence, two passes through a layer, three factorisations, a full
sort for every block of a mask, one Python step and one rank-1 update of the block for every column.
"""

from functools import partial

import torch

from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import hooked, linears
from mixgpt.modeling.placing import in_turn
from mixgpt.modeling.running import StreamedModel
from mixgpt.quant import Scheme


class Textbook:
    """The Hessian of one linear, as a running mean over its batches, and the pruning of its weight."""

    def __init__(self, linear):
        self.linear, self.seen = linear, 0
        self.H = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    def add_batch(self, X):
        """Add the inputs (1, tokens, in) of one sequence."""
        X = X.reshape(-1, X.shape[-1]).t().float()
        self.H *= self.seen / (self.seen + 1)
        self.seen += 1
        X = (2 / self.seen) ** 0.5 * X
        self.H += X @ X.t()

    def inverse(self, percdamp):
        """Return U with (H + λI)⁻¹ = Uᵀ U: factor, invert, factor again."""
        H = self.H.clone()
        H.diagonal().add_(percdamp * H.diagonal().mean())
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)

    def prune(self, U, sparsity=0.0, prunen=0, prunem=0, wbits=16, blocksize=128):
        """Prune, and quantize with a grid for each row where wbits < 16, in place."""
        W = self.linear.weight.data.float()
        scheme = Scheme(wbits) if wbits < 16 else None
        if scheme:
            dtype = self.linear.weight.dtype
            to_grid = scheme.rounder(*scheme.fit(W, torch.zeros_like(W, dtype=torch.bool), dtype), dtype)
        for start in range(0, W.shape[1], blocksize):
            stop = min(start + blocksize, W.shape[1])
            block, Ub = W[:, start:stop].clone(), U[start:stop, start:stop]
            errors, pruned = torch.zeros_like(block), torch.zeros_like(block)
            if prunem:
                mask = torch.zeros_like(block, dtype=torch.bool)
            else:
                scores = block**2 / Ub.diagonal() ** 2
                mask = scores < scores.flatten().sort().values[int(sparsity * scores.numel())]
            for i in range(stop - start):
                if prunem and i % prunem == 0:
                    scores = block[:, i:i + prunem] ** 2 / Ub.diagonal()[i:i + prunem] ** 2
                    mask.scatter_(1, i + scores.topk(prunen, dim=1, largest=False).indices, True)
                w = block[:, i]
                q = torch.where(mask[:, i], 0, to_grid(w) if scheme else w)
                error = (w - q) / Ub[i, i]
                block[:, i:] -= error[:, None] @ Ub[i, i:][None]
                pruned[:, i], errors[:, i] = q, error
            W[:, start:stop] = pruned
            W[:, stop:] -= errors @ U[start:stop, stop:]
        self.linear.weight.data.copy_(W)


@torch.no_grad()
def prune_model(model, tokens, device, clock):
    """Prune every linear of every decoder layer to 50% on calibration tokens (N, T)."""
    def add(pruner, X):
        with clock.part("Hessian"):
            pruner.add_batch(X)

    with clock.part("forward"):
        stream = StreamedModel(model, device, 1).embed(tokens)
    for index, layer in in_turn(layers_of(model), device, "textbook"):
        pruners = {module: Textbook(module) for module in linears(layer).values()}
        with hooked({module: partial(add, pruner) for module, pruner in pruners.items()}), clock.part("forward"):
            for rows in stream.batches():
                stream.forward(layer, index, rows)
        for pruner in pruners.values():
            with clock.part("factorisation"):
                U = pruner.inverse(0.01)
            with clock.part("walk"):
                pruner.prune(U, 0.5)
        with clock.part("forward"):
            stream.advance(layer, index)
