"""Check which linears share an input, what layers take as arguments, and where hidden states lie."""

import pytest
import torch
from conftest import CPU, make

from mixgpt.common.errors import InputError
from mixgpt.modeling import placing
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.linears import linears, shared_inputs
from mixgpt.modeling.running import HiddenStates, StreamedModel


class Changed(torch.nn.Module):
    """A layer whose second linear reads the input after it was changed in place, and whose third never runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        a = self.a(x)
        x += a
        return self.b(x)


def test_a_tensor_changed_in_place_is_another_input():
    stream = HiddenStates(torch.ones(1, 2, 4), 1, CPU, {1: [((), {})]})
    layer = Changed()
    assert list(linears(layer)) == ["a", "b", "c"]
    assert shared_inputs(layer, 0, stream) == [["a"], ["b"]]


def test_a_layer_may_change_its_input_in_place_where_gradients_are_computed(tokens):
    model = make("llama")
    layer, stream = layers_of(model)[1], StreamedModel(model, CPU, 2).embed(tokens[:2])
    hidden = stream.hidden.clone().requires_grad_()
    expected = stream.call(layer, 1, hidden + 1, slice(0, 2)).detach()
    with layer.register_forward_pre_hook(lambda _, args: (args[0].add_(1), *args[1:])):
        changed = stream.call(layer, 1, hidden * 1, slice(0, 2))
    assert torch.equal(changed, expected) and torch.autograd.grad(changed.sum(), hidden)[0].any()


def test_layers_take_the_arguments_of_the_sequences_that_they_run_on_in_any_order(tokens):
    model = make("gemma4")
    stream = StreamedModel(model, CPU, 2).embed(tokens)
    rows = torch.tensor([3, 1])
    with torch.no_grad():
        expected = model(tokens[rows], output_hidden_states=True, use_cache=False).hidden_states
    hidden = stream.hidden[rows]
    for index, layer in enumerate(layers_of(model)):
        assert index == 0 or torch.equal(hidden[..., :stream.channels], expected[index])
        hidden = stream.call(layer, index, hidden, rows)
    assert stream.arguments[2][0][0][0].values.shape == (5, 24, 8)
    assert stream.hidden.shape == (5, 24, 32 + 2 * 2 * 8 + 2 * 2 * 16)  # and keys and values of two layers


@pytest.mark.parametrize("dtype, system", [(torch.float32, "Linux"), (torch.bfloat16, "macOS")])
def test_hidden_states_lie_on_disk_where_memory_is_short_and_are_the_same(dtype, system, tokens, monkeypatch):
    if system == "macOS":
        monkeypatch.delattr(placing.os, "posix_fallocate")
    model = make("llama")
    model.to(dtype)

    def last():
        stream = StreamedModel(model, CPU, 2).embed(tokens)
        for index, layer in enumerate(layers_of(model)):
            stream.advance(layer, index)
        return stream.hidden

    expected, mapped, from_file = last(), [], torch.from_file
    monkeypatch.setattr(placing.memory, "free", lambda device: 1000)
    monkeypatch.setattr(torch, "from_file", lambda *given, **options: mapped.append(options["size"]) or from_file(
        *given, **options))
    found = last()
    assert torch.equal(found, expected) and found.dtype == dtype
    assert mapped == [expected.numel()]


def test_hidden_states_that_fit_nowhere_are_refused_without_filling_the_disk(monkeypatch):
    monkeypatch.setattr(placing.os, "posix_fallocate", None)
    with pytest.raises(InputError, match=r"--nsamples, --seqlen: hidden states take 1000000\.0 GB, more than is free "):
        placing.allocate([10**15], torch.uint8, CPU, placing.place_for(10**15, CPU))
