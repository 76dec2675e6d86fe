"""Check synthetic sequences against the predictions of the model's own forward."""

import pytest
import torch
from conftest import CPU, VOCABULARY, make
from makebelieve import CUDA, Gpu

from mixgpt.allocation import synthetic as module
from mixgpt.allocation.synthetic import GENERATED, RESAMPLED, synthetic
from mixgpt.common import memory
from modelutils import StreamedModel


@pytest.fixture(scope="module", params=["opt", "baichuan-13b", "gemma2", "qwen3-moe"])
def model(request):
    """A model whose predictions differ from token to token."""
    model = make(request.param)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 4)
    monkeypatch.setattr(module, "PREFIX", 2)


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setattr(module, "has_room", lambda streamed: False)


def ends_of(model):
    """Return the tokens that end a text, which are not generated."""
    end = model.generation_config.eos_token_id
    return [] if end is None else [end]


def check_draws(model, contexts, found, uniform, ends=()):
    """Check that each token is the first whose cumulated probability behind its context reaches its threshold."""
    with torch.no_grad():
        logits = model(contexts).logits[:, :-1].double()
        logits[..., list(ends)] = -torch.inf
        cumulated = logits.softmax(-1).cumsum(-1)
    expected = (cumulated < uniform[:, 1:, None]).sum(-1)
    return (found[:, 1:] == expected).double()


def test_windows_go_on_from_their_prefixes_as_the_model_predicts(model, tokens, small):
    """From its own tokens: the whole forward on what was generated gives the probabilities of each draw."""
    uniform = torch.rand(3, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = module.generated(StreamedModel(model, CPU, 2), tokens, uniform)
    for start, end in ((0, 4), (4, 7), (7, 11)):  # the last window overlaps the second, and stays whole
        window = slice(start, end)
        assert torch.equal(found[:, start:start + 2], tokens[:, start:start + 2])
        right = check_draws(model, found[:, window], found[:, window], uniform[:, window], ends_of(model))
        assert right[:, 1:].mean() > 0.9  # others lie within rounding of a border


def test_without_room_frequencies_are_the_predictions_from_the_original_tokens(model, tokens, no_room):
    copies, tokens = 2000, tokens[:, :5]
    found, how = synthetic(StreamedModel(model, CPU, 2000), tokens, copies * len(tokens), 0)
    found = found.view(copies, *tokens.shape)
    assert how == RESAMPLED and torch.equal(found[:, :, 0], tokens[:, 0].expand(copies, -1))
    with torch.no_grad():
        p = model(tokens).logits[:, :-1].softmax(-1)  # (n, T − 1, vocabulary)
    counts = torch.nn.functional.one_hot(found[:, :, 1:], p.shape[-1]).sum(0)
    spread = (copies * p * (1 - p)).sqrt()
    assert ((counts - copies * p).abs() <= 5 * spread + 3).all()  # as binomial counts are
    assert (counts.amax(-1) > 10 * copies / VOCABULARY).all()  # which uniform draws would not reach


@pytest.mark.parametrize("room", [True, False])
def test_draws_depend_on_the_seed_but_not_on_batches(model, tokens, room, small, monkeypatch):
    monkeypatch.setattr(module, "has_room", lambda streamed: room)
    first, how = synthetic(StreamedModel(model, CPU, 2), tokens, 5, 0)
    assert how == (GENERATED if room else RESAMPLED)
    assert first.dtype == tokens.dtype and first.shape == (5, 11)
    assert not torch.equal(first[:2], first[3:])  # others from the same
    assert torch.equal(first[:2, :2], first[3:, :2]) or not room
    monkeypatch.setattr(module, "AT_A_TIME", 1)
    again, other = (synthetic(StreamedModel(model, CPU, 3), tokens, 5, seed)[0] for seed in (0, 1))
    assert (first == again).double().mean() > 0.9 > (first == other).double().mean()


def test_a_model_is_resampled_that_has_no_room_beside_a_window_of_text(monkeypatch):
    model = make("llama")
    tokens = torch.randint(VOCABULARY, (1, module.WINDOW))
    streamed = StreamedModel(model, CUDA, 1, clock=object())
    with Gpu() as gpu:
        module.generated(streamed, tokens, torch.rand(tokens.shape, dtype=torch.float64))
    weights = sum(weight.nbytes for weight in model.parameters())
    for device, needed in ((CUDA, gpu.peak), (CPU, gpu.peak - weights)):  # on the host they are there
        for free, expected in ((0.95 * needed, False), (10 * needed, True)):
            monkeypatch.setattr(memory, "free", lambda device, free=free: free)
            assert module.has_room(StreamedModel(model, device, 1, clock=object())) == expected
            if device == CPU:
                how = synthetic(StreamedModel(model, CPU, 1), tokens, 1, 0)[1]
                assert how == (GENERATED if expected else RESAMPLED)
