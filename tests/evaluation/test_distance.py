"""Check distances to the dense model against both models' own forwards."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, VOCABULARY, _llama, make
from makebelieve import CUDA, Gpu

from mixgpt.evaluation import distance
from mixgpt.evaluation.distance import TOP, Distance
from mixgpt.evaluation.measures import perplexities
from mixgpt.modeling import running


def distances(dense, other, tokens, device=CPU):
    found = Distance()
    perplexities(dense, {"text": tokens}, 2, device, behind=found.keep)
    perplexities(other, {"text": tokens}, 4, device, behind=found.compare)
    return found.result()["text"]


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3"])
@pytest.mark.parametrize("sequences, device", [(5, CPU), (3, CPU), (5, CUDA)])
def test_distances_are_those_of_full_forwards(name, sequences, device, tokens, monkeypatch):
    """sequences: the first ones, which are compared."""
    dense = make(name)
    other = copy.deepcopy(dense)
    for weight in other.parameters():
        if weight.dim() == 2 and weight is not other.get_input_embeddings().weight:
            weight.data[torch.rand_like(weight) < 0.4] = 0
    other.get_output_embeddings().weight = dense.get_output_embeddings().weight
    monkeypatch.setattr(distance, "TOKENS", sequences * tokens.shape[1])
    monkeypatch.setattr(distance, "SLICE", 7)
    monkeypatch.setattr(running, "CACHED", 300)
    p, q = (copy.deepcopy(model).double()(tokens[:sequences], use_cache=False).logits[:, :-1].log_softmax(-1).detach()
            for model in (dense, other))
    KL, same = (p.exp() * (p - q)).sum(-1).flatten().numpy(), (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    expected = {"KL": KL.mean(), "KL median": np.median(KL), "KL 90%": np.quantile(KL, 0.9), TOP: same}
    if device == CUDA:
        with Gpu():
            found = distances(dense, other, tokens, device)
    else:
        found = distances(dense, other, tokens)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6) and KL.mean() > 1e-3


@pytest.mark.parametrize("compares", [False, True])
def test_logits_of_a_slice_are_let_go_of_before_those_of_the_next(compares, monkeypatch):
    monkeypatch.setattr(running, "rows_at_once", lambda device, V: 2)  # so that they take most, as on a CPU
    model, found = _llama("Llama", vocab_size=16_384).bfloat16(), Distance()
    tokens = torch.randint(VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
    perplexities(model, {"text": tokens}, 1, CPU, behind=found.keep)

    def peak(count):
        with Gpu() as gpu:
            perplexities(model, {"text": tokens[:count]}, 1, CUDA, behind=found.compare if compares else None)
        return gpu.peak

    assert peak(4) < 1.1 * peak(1)


@pytest.mark.parametrize("logit, expected", [(-torch.inf, 0.0), (torch.nan, torch.nan)])
def test_a_model_has_no_distance_to_itself(logit, expected):
    """Tokens may have no probability, but what is no number stays none."""
    states, found = torch.randn(2, 6, 8), Distance()
    stream = SimpleNamespace(hidden=states, channels=8, device=CPU)
    found.keep("text", None, stream)
    found.compare("text", lambda hidden: torch.cat([hidden, hidden.new_full((len(hidden), 1), logit)], 1), stream)
    measures = found.result()["text"]
    assert measures["KL"] == pytest.approx(expected, abs=1e-6, nan_ok=True) and measures[TOP] == 1
