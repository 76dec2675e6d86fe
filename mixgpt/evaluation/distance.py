"""How far predictions are from the dense model's. Perplexity alone also falls where a model fits its text better."""

from collections.abc import Callable

import torch
from torch import Tensor

from mixgpt.common import distributed
from mixgpt.common.choices import TOP
from mixgpt.common.runtime import wide
from mixgpt.modeling.running import SLICE, HiddenStates, by_rows

TOKENS = 32_768  # Predictions of at most so many tokens of a text are compared.


class Distance:
    """The dense model's hidden states behind the last layer, and another model's predictions against its.

    `measures.perplexities` of both models call `keep` and `compare`, for each text of which this process has a share.
    """

    def __init__(self) -> None:
        self.states: dict[str, Tensor] = {}
        self.compared: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(self, name: str, head: Callable, stream: HiddenStates) -> None:
        """Keep the hidden states of a text's first sequences, (n, T, C), on the host."""
        count = -(-TOKENS // (stream.hidden.shape[1] * distributed.world()))
        self.states[name] = stream.hidden[:count, :, :stream.channels].to("cpu", copy=True)

    def compare(self, name: str, head: Callable, stream: HiddenStates) -> None:
        """Compare the predictions of tokens 2 to T of each sequence. head: that of both models."""
        parts = []
        for hidden, reference in zip(stream.hidden, self.states[name], strict=False):
            pairs = zip(*(states[:-1, :stream.channels].to(stream.device, hidden.dtype).split(SLICE)
                          for states in (hidden, reference)), strict=True)
            parts += [_compared(*map(head, pair)) for pair in pairs]
        divergences, same = (torch.cat(each).double().cpu() for each in zip(*parts, strict=True))
        self.compared[name] = divergences, same

    def result(self) -> dict[str, dict[str, float]]:
        """Return {text: measures}, over all processes.

        "KL", "KL median", "KL 90%": the mean, median and 90th percentile over tokens of KL(p ‖ q), in nats, of the
        dense model's predictions p and the other one's q. TOP: the fraction of tokens for which both find the same next
        one most probable.
        """
        parts = distributed.all_gather_object(self.compared)
        found = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            KL, same = (torch.cat(each) for each in zip(*(part[name] for part in parts if name in part), strict=True))
            median, most = torch.quantile(KL, torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
            found[name] = {"KL": KL.mean().item(), "KL median": median, "KL 90%": most, TOP: same.mean().item()}
        return found


def _compared(logits: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q) of the predictions p of `others` and q of logits (n, V), and whether most probable is the same.

    With it the logits of one slice are let go of before those of the next are computed.
    """
    divergences, same = [], []
    for pair in by_rows(logits, others):
        log_q, log_p = (wide(scores).log_softmax(-1) for scores in pair)
        same.append(log_q.argmax(-1) == log_p.argmax(-1))
        p = log_p.exp()
        divergences.append(log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0).sum(-1))  # 0 · log 0 = 0
    return torch.cat(divergences), torch.cat(same)
