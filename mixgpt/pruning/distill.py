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
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mixgpt.common import distributed, memory, progress
from mixgpt.common.runtime import repeatable_attention, seeded, wide
from mixgpt.modeling.linears import Key, linears
from mixgpt.modeling.placing import in_turn, on_device
from mixgpt.modeling.running import SLICE, HiddenStates, StreamedModel, by_rows
from mixgpt.modeling.streaming import disk_weights, stored_dtype
from mixgpt.pruning import needs
from mixgpt.quant import Grid

PIECE = 128  # Tokens per training sequence: many short ones of different documents teach more than a few long ones.
SHORTEST = 16  # A piece of fewer tokens gives too little context.
STEPS = 40  # With an effort of 1, there are at most so many steps.
STEP_TOKENS = 512  # A step has so many tokens, if there are as many: gradients of fewer are too noisy.
LABELS = 0.5  # The weight of the text's next token beside the dense model's prediction.
VOCABULARY = 49_152  # At most so many tokens' predictions are compared: all 262,144 of Gemma take 70% of a step.
SCALES_RATE = 1e-2  # The root mean square of the change of scales in a step, as a fraction of their own.
AVERAGED = 0.5  # Weights are averaged over this share of the steps, the last ones.


class Diverged(ArithmeticError):
    """A divergence or weight is not finite. The model is as it was before distillation."""


def piece_length(T: int) -> int:
    """Return the length of pieces: the largest divisor of T up to PIECE, or T itself if that is below SHORTEST."""
    length = next(length for length in range(min(T, PIECE), 0, -1) if T % length == 0)
    return length if length >= SHORTEST else T


def pieces(sequences: Tensor) -> Tensor:
    """Cut sequences (n, T) into pieces, (more, `piece_length`)."""
    return sequences.reshape(-1, piece_length(sequences.shape[1]))


@torch.no_grad()
def reference_states(streamed: StreamedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Run the dense model on this process's share of tokens (N, T). Returns {name: tensor on the host}.

    "states": the last hidden states, (n, T, C). "vocabulary", for models with more than VOCABULARY tokens: the sorted
    numbers of so many, those of the text and others that the model predicts most; the rest share 1% to 2%.
    """
    stream = streamed.embed(tokens[distributed.share(len(tokens))])
    for index, layer in in_turn(streamed.layers, streamed.device, "dense model"):
        stream.advance(layer, index)
    states = stream.hidden[..., :stream.channels].to("cpu")
    if streamed.model.config.get_text_config().vocab_size <= VOCABULARY:
        return {"states": states}
    step, before = max(tokens.numel() // SLICE, 1), distributed.share(len(tokens)).start * tokens.shape[1]
    some = states.flatten(0, 1)[-before % step::step]  # These are the same tokens in any number of processes.
    total = torch.zeros(len(streamed.model.get_output_embeddings().weight), device=stream.device)
    with stream.head(streamed.model) as head:
        for hidden in some.split(PIECE):
            for logits, in by_rows(head(hidden.to(stream.device))):
                total += wide(logits).softmax(-1).sum(0)
    distributed.all_reduce(total)
    occurring = tokens.unique().to(total.device)
    total[occurring] = torch.inf
    vocabulary = total.topk(max(VOCABULARY, len(occurring))).indices.sort().values
    return {"states": states, "vocabulary": vocabulary.to("cpu")}


def room_for(streamed: StreamedModel, tokens: Tensor, effort: float = 1.0,
             free: Callable[[torch.device], int] | None = None) -> int:
    """Return how many of the sequences (N, T), up to streamed.batch_size, fit in a batch if each device trains all.

    free: as of `placing.place_for`.
    """
    fixed, sequence = training_bytes(streamed, tokens, effort)
    room = int(((free or memory.free)(streamed.device) - fixed) / sequence)
    return min(distributed.all_gather_object(max(min(streamed.batch_size, per_step(tokens, effort), room), 0)))


def training_bytes(streamed: StreamedModel, tokens: Tensor, effort: float = 1.0) -> tuple[float, float]:
    """Return `needs.training_bytes` of tokens (N, T)."""
    return needs.training_bytes(streamed, tokens, per_step(tokens, effort), VOCABULARY)


@torch.no_grad()
def distill(streamed: StreamedModel, chosen: dict[Key, Grid | None], tokens: Tensor, reference: dict[str, Tensor],
            seed: int, finish: Callable[[int, nn.Module], None] | None = None, effort: float = 1.0) -> float:
    """Train the chosen matrices in place.

    streamed: the pruned model, put on the device as a whole. chosen: all pruned or quantized matrices, of which kept
    weights are trained or, with a grid, its scales, in place at the end. finish: called at the end for each layer up to
    the last chosen one, while it is on the device. Returns the mean KL(p ‖ q) per token, in nats. Raises Diverged if it
    or a weight is not finite, or an error of memory, maybe in this process alone; the model is then as it was before.
    """
    model, device, layers = streamed.model, streamed.device, streamed.layers
    mine, size = tokens[distributed.share(len(tokens))], per_step(tokens, effort)
    steps = torch.randperm(len(mine), generator=seeded(seed, "distillation", distributed.rank())).split(size)
    steps += (steps[0][:0],) * (-(-len(tokens) // (size * distributed.world())) - len(steps))  # All take as many steps.
    with contextlib.ExitStack() as stack:
        # A process that runs out of memory in the middle of a step leaves others waiting: only a single one goes on.
        with memory.shared_fate() if distributed.world() == 1 else contextlib.nullcontext():
            with memory.shared_fate():
                stack.enter_context(on_device(layers, device))
                weights = stack.enter_context(_trained(layers, chosen))
                stream = replace(streamed, batch_size=min(streamed.batch_size, size)).embed(mine)
                vocabulary, labels = reference.get("vocabulary"), mine[:, 1:].contiguous()
                head = stack.enter_context(stream.head(model, vocabulary=vocabulary))
                labels = labels if vocabulary is None else torch.searchsorted(vocabulary, labels)
                states = [_Scales(weight, grid) if grid else _Weight(weight)
                          for weight, grid in zip(weights, chosen.values(), strict=True)]
            with repeatable_attention(device):
                mean = _train(stream, layers, head, states, steps, reference["states"][:, :-1], labels)
        for state in states:
            if isinstance(state, _Scales):
                state.grid.scale.copy_(state.scale)
            else:
                state.weight.copy_(state.weight.to(stored_dtype(model)))
        if finish:
            for index in range(1 + max(index for index, _ in chosen)):
                finish(index, layers[index])
    return mean


def _train(stream: HiddenStates, layers: nn.ModuleList, head: Callable[[Tensor], Tensor],
           states: "Sequence[_Weight | _Scales]", steps: Sequence[Tensor], reference: Tensor, labels: Tensor) -> float:
    """Take the steps on sequences (n,), with reference (N, T − 1, C). Returns the divergence or raises Diverged."""
    totals, before = [], len(steps) - math.ceil(AVERAGED * len(steps))  # Averaging starts after so many steps.
    with progress.bar(steps, title="distilling", unit="step") as bar:
        for number, rows in enumerate(bar, 1):
            border = len(rows) // stream.batch_size * stream.batch_size
            batches = *rows[:border].split(stream.batch_size), *rows[border:].split(1)  # The stream takes these sizes.
            with memory.shared_fate():
                divergences = [_backward(stream, layers, head, part, reference, labels)
                               for part in batches if len(part)]
            sums = torch.tensor([0.0, labels[rows].numel()], device=stream.device)  # (divergence, tokens)
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


def per_step(tokens: Tensor, effort: float) -> int:
    """Return how many sequences a process takes in a step."""
    most = -(-len(tokens) // distributed.world())  # Sequences in the largest share of a process.
    enough = -(-STEP_TOKENS // (tokens.shape[1] * distributed.world()))
    return min(max(math.ceil(most / (STEPS * effort)), enough), most)


@contextlib.contextmanager
def _trained(layers: nn.ModuleList, chosen: dict[Key, Grid | None]) -> Generator[list[nn.Parameter]]:
    """Yield the weights of the chosen matrices, which require gradients in the block; if it raises, restore them."""
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


def _backward(stream: HiddenStates, layers: nn.ModuleList, head: Callable[[Tensor], Tensor], rows: Tensor,
              reference: Tensor, labels: Tensor) -> Tensor:
    """Add the gradients of the loss of sequences `rows` to the weights'. Returns the divergence, summed over tokens."""
    hidden = stream.hidden[rows].to(stream.device)
    with torch.enable_grad():
        for index, layer in enumerate(layers):
            hidden = stream.call(layer, index, hidden, rows)
        predicting = hidden[:, :-1]
    divergence, gradient = divergence_of(head, *(tensor.to(stream.device).flatten(0, 1) for tensor in (
        predicting.detach(), reference[rows], labels[rows])))
    predicting.backward(gradient.view_as(predicting))
    return divergence


def divergence_of(head: Callable, hidden: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ KL(p ‖ q) over tokens (n,) and the gradient of the loss w.r.t. the states (n, C) that predict q."""
    total, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
    for h, h_dense, label, h_gradient in zip(
            *(rows.split(SLICE) for rows in (hidden, reference, labels, gradient)), strict=True):
        with torch.enable_grad():
            logits = head(h.requires_grad_())
        others = head(h_dense)  # The gradient w.r.t. the logits will replace these.
        for *pair, label_rows in by_rows(logits.detach(), others, label[:, None]):
            log_q, log_p = (wide(scores).log_softmax(-1) for scores in pair)
            difference, p = log_p - log_q, log_p.exp_()
            total += torch.dot(p.flatten(), difference.flatten())
            p.mul_(1 - LABELS).scatter_add_(1, label_rows, torch.full_like(label_rows, LABELS, dtype=p.dtype))
            pair[1].copy_(log_q.exp_().sub_(p))
        h_gradient.copy_(torch.autograd.grad(logits, h, others)[0])
    return total, gradient


class _Weight:
    """A matrix that is trained, its float32 copy `exact`, and `lag`: its mean over the averaged steps minus `exact`."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.exact = weight, weight.detach().to(torch.float32, copy=True)
        self.lag = torch.zeros_like(weight)

    def gradient(self) -> Tensor:
        """Return the gradient, 0 where the weight is 0."""
        # A boolean mask would take many times as long as this one of floats on a CPU.
        return self.weight.grad.mul_(torch.ne(self.weight, 0, out=torch.empty_like(self.weight)))

    def update(self) -> None:
        """Take over the float32 copy."""
        self.weight.copy_(self.exact)


class _Scales:
    """The scales of a quantized matrix: factors of them are trained, `exact` and `lag`; its codes stay."""

    def __init__(self, weight: nn.Parameter, grid: Grid) -> None:
        self.weight, self.grid = weight, grid
        on_device = grid.to(weight.device)
        self.group, self.scale, self.before = on_device.group, on_device.scale, on_device.scale.float()
        self.units = on_device.units(on_device.codes(weight.detach()))
        self.order = self.group.argsort(stable=True)  # All groups have one width.
        self.exact, self.lag = torch.ones_like(self.before), torch.zeros_like(self.before)

    def gradient(self) -> Tensor:
        """Return the gradient of the factors."""
        products = self.weight.grad.float().mul_(self.weight)
        return products[:, self.order].view(*self.before.shape, -1).sum(-1).div_(self.exact)

    def update(self) -> None:
        """Take over the factors."""
        self.scale = (self.before * self.exact).to(self.scale.dtype)
        self.weight.copy_(self.units * self.scale[:, self.group])


def _step(states: "Sequence[_Weight | _Scales]", divergence: float, number: int) -> None:
    """Move the rows of a matrix equally far, or factors of its scales, against the gradients, which are removed."""
    gradients = []
    for state in states:
        gradients.append(torch.zeros_like(state.lag) if state.weight.grad is None else state.gradient())
        state.weight.grad = None
        distributed.all_reduce(gradients[-1])
    norms = [torch.linalg.vector_norm(wide(gradient), dim=1, keepdim=True) for gradient in gradients]  # (rows, 1)
    sizes = [torch.linalg.vector_norm(state.exact) / len(norm) ** 0.5
             for state, norm in zip(states, norms, strict=True)]
    fall = sum(size * norm.sum() for size, norm in zip(sizes, norms, strict=True))  # By a step as large as the weights.
    for state, gradient, size, norm in zip(states, gradients, sizes, norms, strict=True):
        rate = divergence / fall if isinstance(state, _Weight) else SCALES_RATE
        change = gradient.to(torch.float32, copy=True).mul_(torch.where(norm > 0, rate * size / norm, 0))
        state.exact.sub_(change)
        if number > 1:  # It is 1 where averaging starts.
            state.lag.add_(change.to(state.lag.dtype)).mul_(1 - 1 / number)
        state.update()
