"""Train a pruned or quantized model until it predicts what the dense model predicts. Zeros stay zeros.

Kept weights are trained, or, where weights lie on grids, the scales of these. The loss is KL(p ‖ q) per token, of the
dense model's predictions p and the pruned one's q (Hinton et al., arXiv 1503.02531). Steps are those of Adafactor
(Shazeer & Stern, arXiv 1804.04235) without momentum: beside a float32 copy of the weights it needs a value for each row
and column.
"""

import contextlib
import math
from dataclasses import replace

import torch

from mixgpt.common import distributed, progress
from mixgpt.common.errors import InputError
from mixgpt.common.tensors import seeded, wide
from mixgpt.kernels.attention import fast_attention
from mixgpt.kernels.matmul import fast_linears
from mixgpt.modeling.experts import RoutedLinear
from modelutils import CPU_SLICE, SLICE, Stream, free_memory, linears, on_device, run_layers

STEPS = 16  # at most
SMALLEST = 1024  # tokens of a step, if there are as many: gradients of fewer are too noisy for the rate
RATE = 2.5e-3  # most that a step changes a matrix, as a fraction of the root mean square of its kept weights
SCALES_RATE = 1e-2  # and the scales of its grids, as root mean square of the fractions
WARMUP = 0.1  # share of the steps
DECAY = 0.95  # of the mean squared gradients, per step
LEAST = 1e-3  # root mean square of a weight for its rate
TINY = 1e-30  # least mean square of a gradient


def widened(execution, tokens, T):
    """Return the execution with batches of sequences (N, t), of as many tokens as its own of length T."""
    return replace(execution, batch_size=execution.batch_size * max(T // tokens.shape[1], 1))


@torch.no_grad()
@fast_linears()
def dense_states(execution, tokens):
    """Return the hidden states of this process's share of tokens (N, T) behind the last layer, (n, T, C), on the host.
    """
    stream = execution.embed(tokens[distributed.share(len(tokens))])
    run_layers(execution.model, execution.family, [stream], execution.device, "dense model")
    return stream.hidden.to("cpu")


def room_for(execution, tokens):
    """Return how many of the sequences (N, T) can be a batch if the whole model is trained on the device, 0 if none.

    At most a batch of the execution; a tenth of a GPU's free memory stays free. Of each weight there is itself, its
    gradient and its float32 copy, and of one matrix at a time three more of these; of each token what goes into linears
    and out of them, half as much again, and attention that is not fused.
    """
    model, itemsize, T = execution.model, execution.model.dtype.itemsize, tokens.shape[1]
    batch = min(execution.batch_size, _per_step(tokens))
    if execution.device.type != "cuda":
        return batch
    matrices = [module for layer in execution.layers for module in linears(layer).values()]
    weights = (2 * itemsize + 4) * sum(weight.numel() for weight in model.parameters())
    weights += 12 * max(module.weight.numel() for module in matrices)
    sequence = 1.5 * itemsize * T * sum(module.in_features + module.out_features for module in matrices
                                        if not isinstance(module, RoutedLinear))
    if getattr(model.config, "_attn_implementation", None) == "eager":
        sequence += 8 * T * T * len(execution.layers) * model.config.get_text_config().num_attention_heads
    return max(min(batch, int((0.9 * free_memory(execution.device) - weights) / sequence)), 0)


@fast_linears()
def distill(execution, chosen, tokens, dense, seed, finish=None):
    """Train the chosen matrices, and the norms and biases of their layers, in place.

    execution: a modelutils.Execution of the pruned model, which is on the device as a whole meanwhile. chosen:
    {(layer, name): quant.Grid or None}, all of them pruned or quantized. The kept weights are trained, or, with a grid,
    its scales, which change in place at the end. tokens: (N, T), each read once, in an order drawn by the seed. dense:
    `dense_states` of these. finish: called at the end with (index, layer, result) for each layer up to the last of the
    chosen ones, while it is on the device. Returns the mean divergence KL(p ‖ q) per token, in nats. Raises InputError
    if it or a weight is not finite.
    """
    model, device, layers = execution.model, execution.device, execution.layers
    mine, size = range(len(tokens))[distributed.share(len(tokens))], _per_step(tokens)
    count = -(-_most(tokens) // size)
    generator = seeded(seed, "distillation", distributed.rank())
    found = []
    with on_device(layers, device), _trained(layers, chosen) as weights, fast_attention(model, device):
        stream = Stream.embed(model, execution.family, tokens[mine.start:mine.stop], min(execution.batch_size, size),
                              device, on_host=execution.on_host)
        grids = {linears(layers[index])[name].weight: grid for (index, name), grid in chosen.items() if grid}
        states = [_Scales(weight, grids[weight]) if weight in grids else _Weight(weight) for weight in weights]
        steps = _shuffled(len(mine), size, count, generator)
        with stream.head(model, execution.family) as head, progress.bar(steps, title="distilling", unit="step") as bar:
            for number, rows in enumerate(bar, 1):
                divergences = [_backward(stream, layers, head, part, dense) for part in _batches(stream, rows)]
                found.append(_mean(divergences, len(rows) * tokens.shape[1], device))
                for state in states:
                    state.step(schedule(number, len(steps)), number)
                bar.set_postfix_str(f"divergence {found[-1]:.3f}")
        if not torch.stack([state.exact.isfinite().all() for state in states]).all():
            raise InputError("--distill: gradients became infinite; try --dtype bfloat16")
        for state in states:
            if isinstance(state, _Scales):
                state.grid.scale.copy_(state.scale)
        mean = sum(found) / len(found)
        for index in range(1 + max(index for index, _ in chosen) if finish else 0):
            finish(index, layers[index], mean)
    return mean


def _most(tokens):
    """Return the number of sequences in the largest share of a process."""
    return -(-len(tokens) // distributed.world())


def _per_step(tokens):
    """Return how many sequences a process takes in a step."""
    enough = -(-SMALLEST // (tokens.shape[1] * distributed.world()))
    return min(max(-(-_most(tokens) // STEPS), enough), _most(tokens))


def _shuffled(n, size, count, generator):
    """Return `count` tensors of at most `size` numbers each, together those below n in random order."""
    parts = torch.randperm(n, generator=generator).split(size)
    return [*parts, *(parts[0][:0] for _ in range(count - len(parts)))]


def _batches(stream, rows):
    """Return the parts of rows (n,) that a stream can run: batches, and what is left one by one."""
    border = len(rows) - len(rows) % stream.batch_size
    return [part for part in (*rows[:border].split(stream.batch_size), *rows[border:].split(1)) if len(part)]


def schedule(number, steps):
    """Return the factor of the rate in a step, counted from 1: a linear warm-up, times half a cosine."""
    return min(number / max(WARMUP * steps, 1), 1) * (1 + math.cos(math.pi * (number - 1) / steps)) / 2


@contextlib.contextmanager
def _trained(layers, chosen):
    """Within the block, let the weights of the chosen matrices, and the vectors of their layers, require gradients.

    Gives a list of these.
    """
    weights = [weight for layer in layers for weight in layer.parameters()]
    required = [weight.requires_grad for weight in weights]
    trained = [linears(layers[index])[name].weight for index, name in chosen] + [
        weight for index in sorted({index for index, _ in chosen}) for weight in layers[index].parameters()
        if weight.dim() == 1]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        for weight in trained:
            weight.requires_grad_(True)
        yield trained
    finally:
        for weight, before in zip(weights, required, strict=True):
            weight.requires_grad_(before)
            weight.grad = None


def _backward(stream, layers, head, rows, dense):
    """Add the gradients of the divergence of sequences `rows` to those of the weights. Returns it, summed over tokens.
    """
    hidden = stream.hidden[rows].to(stream.device)
    with torch.enable_grad():
        for index, layer in enumerate(layers):
            hidden = stream.call(layer, index, hidden)
    divergence, gradient = _divergence(head, hidden.detach().flatten(0, 1), dense[rows].to(stream.device).flatten(0, 1))
    hidden.backward(gradient.view_as(hidden))
    return divergence


def _divergence(head, hidden, dense):
    """Return Σ KL(p ‖ q) over tokens, on the device, and its gradient w.r.t. the hidden states that predict q.

    head: from hidden states to logits. hidden, dense: (n, C), of the pruned and of the dense model.
    """
    total, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
    size = SLICE if hidden.is_cuda else CPU_SLICE
    for rows in (slice(start, start + size) for start in range(0, len(hidden), size)):
        with torch.enable_grad():
            h = hidden[rows].requires_grad_()
            logits = head(h)
        log_q, log_p = (wide(each).log_softmax(-1) for each in (logits.detach(), head(dense[rows])))
        difference, p = log_p - log_q, log_p.exp_()
        total += torch.dot(p.flatten(), difference.flatten())
        gradient[rows] = torch.autograd.grad(logits, h, log_q.exp_().sub_(p).to(logits.dtype))[0]
    return total, gradient


def _mean(divergences, count, device):
    """Return the mean over the tokens of all processes. Raises InputError if it is not finite.

    divergences: of this process, each the sum over a batch. count: tokens of this process.
    """
    total = torch.tensor([0.0, count], device=device)
    total[0] = sum(divergences)
    distributed.all_reduce(total)
    if not math.isfinite(mean := (total[0] / total[1]).item()):
        raise InputError(f"--distill: the divergence from the dense model is {mean}; try --dtype bfloat16")
    return mean


class _Adafactor:
    """The mean squares of the gradients of a tensor: of the rows and columns of a matrix, or of each entry."""

    def __init__(self, sizes, device):
        """sizes: numbers of rows and of columns, or one shape for each entry."""
        self.squares = [torch.zeros(size, device=device) for size in sizes]

    def step(self, exact, gradient, number, kept, length):
        """Change a tensor against its gradient (overwritten), by a root mean square of at most `length`.

        kept: number of entries that are not always 0. number: of the step, from 1.
        """
        squares = gradient.square()
        for dim, mean in enumerate(self.squares):
            mean.lerp_(squares.mean(1 - dim) if len(self.squares) == 2 else squares, 1 - DECAY)
        means = [(mean / (1 - DECAY ** number)).clamp_(min=TINY) for mean in self.squares]
        gradient.mul_(means[-1].rsqrt())
        if len(means) == 2:
            gradient.mul_((means[0].mean() / means[0]).sqrt()[:, None])
        size = torch.linalg.vector_norm(gradient) / kept ** 0.5
        exact.addcmul_(gradient, length / size.clamp(min=1), value=-1)


class _Weight:
    """A weight that is trained, and its float32 copy."""

    def __init__(self, weight):
        self.weight, self.exact = weight, weight.detach().to(torch.float32, copy=True)
        self.adafactor = _Adafactor(weight.shape, weight.device)
        self.kept = weight.numel() if weight.dim() == 1 else self.exact.count_nonzero().clamp_(min=1)

    @torch.no_grad()
    def step(self, factor, number):
        """Change the weight, but for zeros of a matrix, against its gradient, which is removed.

        factor: of the rate. number: of the step, from 1.
        """
        gradient = torch.zeros_like(self.exact) if self.weight.grad is None else self.weight.grad.float()
        self.weight.grad = None
        distributed.all_reduce(gradient)
        if gradient.dim() == 2:  # a mask of floats: with one of booleans this takes many times as long on a CPU
            gradient.mul_(torch.ne(self.exact, 0, out=torch.empty_like(self.exact)))
        size = (torch.linalg.vector_norm(self.exact) / self.kept ** 0.5).clamp_(min=LEAST)
        self.adafactor.step(self.exact, gradient, number, self.kept, RATE * factor * size)
        self.weight.copy_(self.exact)


class _Scales:
    """The scales of a quantized matrix, of which the logarithms are trained; its codes stay."""

    def __init__(self, weight, grid):
        self.weight, self.grid, device = weight, grid, weight.device
        on_device = grid.to(device)
        self.group, self.scale, self.before = on_device.group, on_device.scale, on_device.scale.float()
        codes = on_device.codes(weight.detach())
        self.steps = (codes.float() - on_device.zero[:, self.group]).to(weight.dtype)
        self.order = self.group.argsort(stable=True)  # groups are of one width
        self.exact = torch.zeros_like(self.before)  # what is added to the logarithms
        self.adafactor = _Adafactor([self.exact.shape], device)

    @torch.no_grad()
    def step(self, factor, number):
        """Change the scales against the gradient of the weight, which is removed. As `_Weight.step`."""
        gradient = torch.zeros_like(self.exact)
        if self.weight.grad is not None:
            products = self.weight.grad.float().mul_(self.weight)
            gradient = products[:, self.order].view(*gradient.shape, -1).sum(-1)
        self.weight.grad = None
        distributed.all_reduce(gradient)
        self.adafactor.step(self.exact, gradient, number, gradient.numel(), SCALES_RATE * factor)
        self.scale = (self.before * self.exact.exp()).to(self.weight.dtype)
        self.weight.copy_(self.steps * self.scale[:, self.group])
