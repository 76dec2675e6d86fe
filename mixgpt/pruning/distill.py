"""Train a pruned or quantized model to predict what the dense model predicts, and the text. Zeros stay zeros.

Kept weights are trained, or, where weights lie on grids, the scales of these. The loss is the cross-entropy of the
pruned model's predictions q with the mean of the dense model's p and the token that follows (Hinton et al., arXiv
1503.02531). The text is little, so that gradients are mostly noise, which dividing by their size in each column, as
Adam does, would enlarge. So steps go along them, as far as the loss would fall by the divergence KL(p ‖ q) if it were
linear (after stochastic Polyak steps, Loizou et al., arXiv 2002.10542), and end at the mean of the later ones' weights
(stochastic weight averaging, Izmailov et al., arXiv 1803.05407).
"""

import contextlib
import math
from dataclasses import replace

import torch

from mixgpt.common import distributed, memory, progress
from mixgpt.common.runtime import repeatable_attention, seeded, wide
from mixgpt.modeling.linears import linears
from mixgpt.modeling.placing import in_turn, on_device
from mixgpt.modeling.running import SLICE, by_rows
from mixgpt.modeling.streaming import disk_weights
from mixgpt.pruning import needs

PIECE = 128  # tokens of a sequence to train on: many short ones of different documents teach more than a few long ones
SHORTEST = 16  # tokens of a piece: fewer give too little context
STEPS = 40  # at most, with an effort of 1
STEP_TOKENS = 512  # of a step, if there are as many: gradients of fewer are too noisy for such steps
LABELS = 0.5  # weight of the text's next token in the targets, beside the dense model's prediction
VOCABULARY = 49_152  # most tokens of which predictions are compared: all of Gemma's 262,144 take 70% of a step
SCALES_RATE = 1e-2  # root mean square of the change of scales in a step, as a fraction of their own
AVERAGED = 0.5  # share of the steps, the last ones, over which weights are averaged


class Diverged(ArithmeticError):
    """A divergence or weight is not finite. The model is as it was before distillation."""


def piece_length(T):
    """Return the length of the pieces of further sequences of T tokens: its largest divisor up to PIECE.

    T itself if that is below SHORTEST, as of prime numbers.
    """
    length = next(length for length in range(min(T, PIECE), 0, -1) if T % length == 0)
    return length if length >= SHORTEST else T


def pieces(sequences):
    """Cut further sequences (n, T) into their pieces."""
    return sequences.reshape(-1, piece_length(sequences.shape[1]))


@torch.no_grad()
def dense_states(streamed, tokens):
    """Run the dense model on this process's share of tokens (N, T). Returns {name: tensor on the host}.

    "states": the last hidden states, (n, T, C). "vocabulary", of models with more than VOCABULARY tokens: the sorted
    numbers of so many, those of the text and others that the model predicts most. Without the rest, which share 1% to
    2% of its predictions, distillation is as good.
    """
    stream = streamed.embed(tokens[distributed.share(len(tokens))])
    for index, layer in in_turn(streamed.layers, streamed.device, "dense model"):
        stream.advance(layer, index)
    states = stream.hidden[..., :stream.channels].to("cpu")
    if streamed.model.config.get_text_config().vocab_size <= VOCABULARY:
        return {"states": states}
    step, before = max(tokens.numel() // SLICE, 1), distributed.share(len(tokens)).start * tokens.shape[1]
    some = states.flatten(0, 1)[-before % step::step]  # the same tokens in any number of processes
    total = torch.zeros(len(streamed.model.get_output_embeddings().weight), device=stream.device)
    with stream.head(streamed.model) as head:
        for hidden in some.split(PIECE):  # no more than a batch has
            for logits, in by_rows(head(hidden.to(stream.device))):
                total += wide(logits).softmax(-1).sum(0)
    distributed.all_reduce(total)
    of_text = tokens.unique().to(total.device)
    total[of_text] = torch.inf
    vocabulary = total.topk(max(VOCABULARY, len(of_text))).indices.sort().values
    return {"states": states, "vocabulary": vocabulary.to("cpu")}


def room_for(streamed, tokens, effort=1.0):
    """Return how many of the sequences (N, T) can be a batch if each device trains the whole model, 0 if none.

    At most streamed.batch_size.
    """
    fixed, sequence = training_bytes(streamed, tokens, effort)
    room = int((memory.free(streamed.device) - fixed) / sequence)
    return min(distributed.all_gather_object(max(min(streamed.batch_size, per_step(tokens, effort), room), 0)))


def training_bytes(streamed, tokens, effort=1.0):
    """Return `needs.training_bytes` of tokens (N, T)."""
    return needs.training_bytes(streamed, tokens, per_step(tokens, effort), VOCABULARY)


@torch.no_grad()
def distill(streamed, chosen, tokens, dense, seed, finish=None, effort=1.0):
    """Train the chosen matrices in place.

    streamed: a running.StreamedModel of the pruned model, all of which is put on the device. chosen: {(layer, name):
    quant.Grid or None}, all of them pruned or quantized. The kept weights are trained, or, with a grid, its scales,
    which change in place at the end. tokens: (N, T), each read once, in an order drawn by the seed. dense:
    `dense_states` of these. finish: called at the end with (index, layer) for each layer up to the last chosen one,
    while it is on the device. effort: multiplies STEPS. Returns the mean divergence KL(p ‖ q) per token, in nats.
    Raises Diverged if it or a weight is not finite, memory.OutOfMemory, or torch.OutOfMemoryError in one of several
    processes; the model is then as it was before.
    """
    model, device, layers = streamed.model, streamed.device, streamed.layers
    mine, size = tokens[distributed.share(len(tokens))], per_step(tokens, effort)
    steps = torch.randperm(len(mine), generator=seeded(seed, "distillation", distributed.rank())).split(size)
    steps += (steps[0][:0],) * (-(-_most(tokens) // size) - len(steps))  # as many as in every other process
    with contextlib.ExitStack() as stack:
        with memory.shared_fate() if distributed.world() == 1 else contextlib.nullcontext():  # else they wait in it
            with memory.shared_fate():
                stack.enter_context(on_device(layers, device))
                weights = stack.enter_context(_trained(layers, chosen))
                stream = replace(streamed, batch_size=min(streamed.batch_size, size)).embed(mine)
                vocabulary, labels = dense.get("vocabulary"), mine[:, 1:].contiguous()
                head = stack.enter_context(stream.head(model, vocabulary=vocabulary))
                labels = labels if vocabulary is None else torch.searchsorted(vocabulary, labels)
                states = [_Scales(weight, grid) if grid else _Weight(weight)
                          for weight, grid in zip(weights, chosen.values(), strict=True)]
            with repeatable_attention(device):
                mean = _train(stream, layers, head, states, steps, dense["states"][:, :-1], labels)
        for state in states:
            if isinstance(state, _Scales):
                state.grid.scale.copy_(state.scale)
        for index in range(1 + max(index for index, _ in chosen) if finish else 0):
            finish(index, layers[index])
    return mean


def _train(stream, layers, head, states, steps, dense, labels):
    """Take the steps, of sequences (n,) each. Returns the mean divergence. Raises Diverged.

    dense: (N, T − 1, C), the states that predict the labels (N, T − 1).
    """
    totals, before = [], len(steps) - math.ceil(AVERAGED * len(steps))  # steps before those averaged
    with progress.bar(steps, title="distilling", unit="step") as bar:
        for number, rows in enumerate(bar, 1):
            border = len(rows) // stream.batch_size * stream.batch_size
            batches = *rows[:border].split(stream.batch_size), *rows[border:].split(1)  # the stream runs these sizes
            with memory.shared_fate():
                divergences = [_backward(stream, layers, head, part, dense, labels) for part in batches if len(part)]
            sums = torch.tensor([0.0, labels[rows].numel()], device=stream.device)  # divergence, tokens
            sums[0] = sum(divergences)
            distributed.all_reduce(sums)
            total, count = sums.tolist()
            if not math.isfinite(total):
                raise Diverged(f"the divergence from the dense model is {total}")
            totals.append((total, count))
            _step(states, total, number - before)
            bar.set_postfix_str(f"divergence {total / count:.3f}")
    for state in states:
        state.exact.add_(state.lag)
        state.update()
    if not torch.stack([state.exact.isfinite().all() for state in states]).all():
        raise Diverged("gradients became infinite")
    divergence, count = map(sum, zip(*totals, strict=True))
    return divergence / count


def _most(tokens):
    """Return the number of sequences in the largest share of a process."""
    return -(-len(tokens) // distributed.world())


def per_step(tokens, effort):
    """Return how many sequences a process takes in a step."""
    enough = -(-STEP_TOKENS // (tokens.shape[1] * distributed.world()))
    return min(max(math.ceil(_most(tokens) / (STEPS * effort)), enough), _most(tokens))


@contextlib.contextmanager
def _trained(layers, chosen):
    """Within the block, let the weights of the chosen matrices require gradients; before and after it none does.

    Gives a list of these. If the block raises, they are restored: read from disk, or from a copy.
    """
    modules = [linears(layer) for layer in layers]
    trained = [modules[index][name].weight for index, name in chosen]
    before = [weight.detach().to("cpu", copy=True) for weight in trained if not disk_weights(layers[0])]
    try:
        for weight in trained:
            weight.requires_grad_(True)
        yield trained
    except BaseException:
        for weight, copy in zip(trained, before, strict=False):
            weight.data.copy_(copy)
        raise
    finally:
        for weight in trained:
            weight.requires_grad_(False)
            weight.grad = None


def _backward(stream, layers, head, rows, dense, labels):
    """Add the gradients of the loss of sequences `rows` to the weights'. Returns the divergence, summed over tokens."""
    hidden = stream.hidden[rows].to(stream.device)
    with torch.enable_grad():
        for index, layer in enumerate(layers):
            hidden = stream.call(layer, index, hidden, rows)
        predicting = hidden[:, :-1]
    divergence, gradient = divergence_of(head, *(tensor.to(stream.device).flatten(0, 1) for tensor in (
        predicting.detach(), dense[rows], labels[rows])))
    predicting.backward(gradient.view_as(predicting))
    return divergence


def divergence_of(head, hidden, dense, labels):
    """Return Σ KL(p ‖ q) over tokens, on the device, and the gradient of the loss w.r.t. the states that predict q.

    head: from hidden states to logits. hidden, dense: (n, C), of the pruned and of the dense model. labels: (n,).
    """
    total, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
    for h, of_dense, label, of_h in zip(*(of.split(SLICE) for of in (hidden, dense, labels, gradient)), strict=True):
        with torch.enable_grad():
            logits = head(h.requires_grad_())
        others = head(of_dense)  # replaced by the gradient w.r.t. logits
        for *pair, target in by_rows(logits.detach(), others, label[:, None]):
            log_q, log_p = (wide(scores).log_softmax(-1) for scores in pair)
            difference, p = log_p - log_q, log_p.exp_()
            total += torch.dot(p.flatten(), difference.flatten())
            p.mul_(1 - LABELS).scatter_add_(1, target, torch.full_like(target, LABELS, dtype=p.dtype))
            pair[1].copy_(log_q.exp_().sub_(p))
        of_h.copy_(torch.autograd.grad(logits, h, others)[0])
    return total, gradient


class _Weight:
    """A matrix that is trained, its float32 copy `exact`, and how far the mean over the averaged steps is from that."""

    def __init__(self, weight):
        self.weight, self.exact = weight, weight.detach().to(torch.float32, copy=True)
        self.lag = torch.zeros_like(weight)

    def gradient(self):
        """Return the gradient, 0 where the weight is."""
        # a float mask: with a boolean one this takes many times as long on a CPU
        return self.weight.grad.mul_(torch.ne(self.weight, 0, out=torch.empty_like(self.weight)))

    def update(self):
        """Take over the float32 copy."""
        self.weight.copy_(self.exact)


class _Scales:
    """The scales of a quantized matrix, of which factors are trained; its codes stay."""

    def __init__(self, weight, grid):
        self.weight, self.grid = weight, grid
        on_device = grid.to(weight.device)
        self.group, self.scale, self.before = on_device.group, on_device.scale, on_device.scale.float()
        self.units = on_device.units(on_device.codes(weight.detach()))  # the weights in units of their scales
        self.order = self.group.argsort(stable=True)  # groups are of one width
        self.exact, self.lag = torch.ones_like(self.before), torch.zeros_like(self.before)  # of the factors

    def gradient(self):
        """Return the gradient of the factors."""
        products = self.weight.grad.float().mul_(self.weight)
        return products[:, self.order].view(*self.before.shape, -1).sum(-1).div_(self.exact)

    def update(self):
        """Take over the factors."""
        self.scale = (self.before * self.exact).to(self.weight.dtype)
        self.weight.copy_(self.units * self.scale[:, self.group])


def _step(states, divergence, number):
    """Move the rows of a matrix equally far, or factors of its scales, against the gradients, which are removed.

    divergence: that of the gradients, summed over tokens. number: of the step, counted from 1 where averaging starts.
    """
    gradients, norms = zip(*map(_gradient, states), strict=True)
    sizes = [torch.linalg.vector_norm(state.exact) / len(of) ** 0.5 for state, of in zip(states, norms, strict=True)]
    fall = sum(size * of.sum() for size, of in zip(sizes, norms, strict=True))  # of a step as large as the matrices
    for state, gradient, size, of in zip(states, gradients, sizes, norms, strict=True):
        rate = divergence / fall if isinstance(state, _Weight) else SCALES_RATE
        change = gradient.to(torch.float32, copy=True).mul_(torch.where(of > 0, rate * size / of, 0))
        state.exact.sub_(change)
        if number > 1:
            state.lag.add_(change.to(state.lag.dtype)).mul_(1 - 1 / number)
        state.update()


def _gradient(state):
    """Return the gradient of all processes, (rows, n), and the norms of its rows, (rows, 1)."""
    gradient = torch.zeros_like(state.lag) if state.weight.grad is None else state.gradient()
    state.weight.grad = None
    distributed.all_reduce(gradient)
    return gradient, torch.linalg.vector_norm(wide(gradient), dim=1, keepdim=True)
