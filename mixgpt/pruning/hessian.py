"""The Hessian of a layer's input, accumulated batch by batch, and its triangular factor.

Notation: Y = X Wᵀ with W (out, in); H = (2/N) Xᵀ X (in, in) over N sequences; H + λI = R Rᵀ with R upper triangular.
"""

import functools

import torch
from torch import Tensor

from mixgpt.common import distributed
from mixgpt.common.runtime import float32_products

STRIP = 2048  # A product with so many columns occupies all of a GPU.
MAX_DAMPING = 1.0  # λ = mean(diag H) bounds the condition number by in + 1: any finite H can be factored.


class InputHessian:
    """The Hessian of one input, accumulated batch by batch, and its factor for all matrices that read this input.

    Once factored, it has R (in, in); h (in,), the diagonal of H without damping; percdamp; order and inverse_order, the
    column indices of the walk. R and h are in the order of the walk.
    """

    def __init__(self, columns: int, nsequences: int, device: torch.device | str) -> None:
        """Start from H = 0. nsequences: N in H = (2/N) Xᵀ X."""
        self.columns, self.device, self._scale = columns, torch.device(device), 2 / nsequences
        # Narrower blocks of columns save little and multiply slower; on a GPU each should occupy all of it.
        width = max(STRIP if self.device.type == "cuda" else 192, columns // 8)
        self._blocks = [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
        self._products = {}  # Sums over tokens: Xᵀ X on and above the diagonal, and each gap times X.
        self.tokens = 0  # Tokens added by this process.
        self.sequence_sums = []  # Per batch, (B,): the sum of each sequence's input, to find those not finite.

    def add_batch(self, X: Tensor, input_gap: Tensor | None = None, output_gap: Tensor | None = None,
                  weights: Tensor | None = None) -> None:
        """Accumulate inputs X (..., in) into the blocks on and above the diagonal of H: exact products, float32 sums.

        The matrices are fitted to X Wᵀ; with input_gap (..., in), to (X + input_gap) Wᵀ; with output_gap (..., out), to
        X Wᵀ + output_gap. All batches have the same gaps. weights: (...,), factors of each token's input and gaps.
        """
        factors = {"input": X, "input_gap": input_gap, "output_gap": output_gap}
        factors = {name: A.reshape(-1, A.shape[-1]) for name, A in factors.items() if A is not None}
        if weights is not None:
            factors = {name: A * weights.reshape(-1, 1).to(A.device, A.dtype) for name, A in factors.items()}
        self.tokens += len(factors["input"])
        if not self._products:  # Memory is taken no earlier, as the inputs of a layer may follow each other.
            self._products = {name: torch.zeros(A.shape[1], self.columns, device=self.device)
                              for name, A in factors.items()}
        if not len(factors["input"]):  # An expert may get no tokens.
            return
        # Products of bfloat16 values on bfloat16 hardware (AMX), and of 16-bit values on a GPU, are exact.
        with float32_products("bf16" if X.dtype == torch.bfloat16 else "ieee", torch.backends.mkldnn):
            X, *gaps = (A if A.is_cuda else A.float() for A in factors.values())
            H, *moments = self._products.values()
            for B in self._blocks:
                add_product(H[:B.stop, B], X[:, :B.stop].t(), X[:, B])
            for moment, gap in zip(moments, gaps, strict=True):
                add_product(moment, gap.t(), X)

    @functools.cached_property
    def H(self) -> Tensor:
        """The complete Hessian (in, in) over all processes, undamped. No batch can be added once it has been read."""
        H, *moments = self._products.values()
        distributed.all_reduce(*(H[:B.stop, B] for B in self._blocks), *moments)
        H.mul_(self._scale).triu_()
        return H.add_(H.triu(1).t())

    def factor(self, percdamp: float, order: Tensor | None = None) -> float:
        """Factor the Hessian once for all matrices, columns in an order (in,). Returns the percdamp used."""
        self.order = slice(None) if order is None else order
        self.inverse_order = slice(None) if order is None else order.argsort()
        self.R, self.percdamp = factor(self.H[self.order][:, self.order], percdamp)
        self.h = self.H.diagonal()[self.order]
        return self.percdamp

    @property
    def damped(self) -> Tensor:
        """A copy of H + λI (in, in), in the order of the walk."""
        H = self.H[self.order][:, self.order].clone()
        H.diagonal().add_(damping(self.h, self.percdamp))
        return H

    def optimum(self, W: Tensor) -> Tensor:
        """Return the optimum W* (out, in) that pruning should approximate, columns in the order of the walk.

        W* = W if no batch had an input gap s or an output gap g. Otherwise, with D = (2/N) Σ s ẋᵀ and G = (2/N) Σ g ẋᵀ
        over the inputs ẋ, W* = W + (W D + G) (H + λI)⁻¹: ridge regression onto the outputs W (ẋ + s) + g, with penalty
        λ on the distance from W. The loss around W* is the same quadratic as without gaps around W. Zero weights stay
        zero. Compare QEP (arXiv 2504.09629).
        """
        W, moment = W[:, self.order], 0.0
        if self._products.keys() == {"input"}:
            return W
        if "input_gap" in self._products:
            moment = W @ self._products["input_gap"][self.order][:, self.order]
        if "output_gap" in self._products:
            G = self._products["output_gap"]
            moment = moment + G[distributed.share(len(G))][:, self.order]
        change = torch.linalg.solve_triangular(self.R.t(), self._scale * moment, upper=False, left=False)
        change = torch.linalg.solve_triangular(self.R, change, upper=True, left=False)
        return (W + change).masked_fill_(W == 0, 0)


def factor(H: Tensor, percdamp: float = 0.01) -> tuple[Tensor, float]:
    """Factor the damped Hessian: R upper triangular with H + λI = R Rᵀ, λ = percdamp · mean(diag H).

    Only H's upper triangle is read. While H + λI is not positive definite, percdamp, which is returned, is multiplied
    by 10, from at least 1e-4 to MAX_DAMPING. Raises torch.linalg.LinAlgError if even that fails, or H is not finite.
    """
    all_finite = H.diagonal().isfinite().all()
    while True:
        flipped = H.flip(0, 1)  # Its lower Cholesky factor, flipped back, is upper triangular.
        flipped.diagonal().add_(damping(H.diagonal(), percdamp))
        flipped, info = torch.linalg.cholesky_ex(flipped)
        positive, finite = torch.stack([info == 0, all_finite]).tolist()  # The host waits for a GPU only here.
        if not finite:
            raise torch.linalg.LinAlgError("the Hessian contains NaN or inf")
        if positive:
            return flipped.flip(0, 1), percdamp
        if percdamp >= MAX_DAMPING:
            raise torch.linalg.LinAlgError(f"the Hessian is not positive definite at percdamp {percdamp:g}")
        percdamp = min(max(10 * percdamp, 1e-4), MAX_DAMPING)


def activation_order(h: Tensor, prunem: int = 0) -> Tensor:
    """Order the columns by decreasing h (in,), the diagonal of H; n:m groups stay together, ordered by their sum."""
    groups = h.view(-1, prunem or 1)
    order = groups.sum(1).argsort(descending=True, stable=True)
    return torch.arange(len(h), device=h.device).view(groups.shape)[order].flatten()


def damping(h: Tensor, percdamp: float) -> Tensor:
    """Return λ = percdamp · mean(diag H) from h (in,), the diagonal of H."""
    mean = h.mean()
    return torch.where(mean > 0, percdamp * mean, 1.0)  # An input of zeros has no scale.


def add_product(total: Tensor, A: Tensor, B: Tensor) -> None:
    """Add A (m, k) B (k, n) to `total` in place: exact products, in 16 bits where both have one dtype, float32 sums."""
    if A.dtype != B.dtype or A.dtype not in (torch.bfloat16, torch.float16):
        total.addmm_(A.float(), B.float())
    else:
        total.add_(torch.mm(A, B, out_dtype=torch.float32))
