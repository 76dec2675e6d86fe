"""Check where hidden states and layers are while gradients are measured, on a make-believe GPU, and what it changes."""

import copy
from collections import Counter, defaultdict

import pytest
import torch
from conftest import CPU, make, modules_of
from makebelieve import CUDA, Gpu

from mixgpt.allocation.fisher import output_gradients
from mixgpt.allocation.plan import Budget, by_threshold
from mixgpt.allocation.traces import hessian_traces
from mixgpt.checkpoints import load
from mixgpt.modeling import streaming
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.experts import split_experts
from mixgpt.modeling.linears import hooked, linears
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import needs
from mixgpt.pruning.targets import Target, select


def traces(streamed, selected, tokens, estimator):
    return hessian_traces(streamed, list(selected), tokens, estimator, 3)


def measurements(streamed, selected, tokens):
    """Return all that is measured with gradients, as a list of tensors on the host."""
    gradients = output_gradients(streamed, list(selected), tokens, 3)
    return [*map(torch.cat, zip(*gradients.values(), strict=True)),
            *(traces(streamed, selected, tokens, estimator).sum(0) for estimator in ("hutchinson", "fisher"))]


def test_inputs_of_experts_are_measured_on_the_tokens_that_reach_them(tokens):
    model, inputs = make("qwen3-moe"), defaultdict(list)
    split_experts(model)
    found = output_gradients(StreamedModel(model, CPU, 2), list(modules_of(model)), tokens[:3], 3)
    with hooked({module: inputs[key].append for key, module in modules_of(model).items()}), torch.no_grad():
        model(tokens[:3])
    for key, (_, energy) in found.items():
        expected = torch.cat([X.flatten(0, -2) for X in inputs[key]]).square().mean(0).nan_to_num()  # an unused expert
        torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-9)


def test_gradients_of_a_float16_model_do_not_underflow(tokens):
    model = make("llama").half()
    model.model.norm.weight.data.fill_(2.0**-20)
    found, expected = (output_gradients(StreamedModel(each, CPU, 2), [(0, "mlp.up_proj")], tokens, 3)[0, "mlp.up_proj"]
                       for each in (model, copy.deepcopy(model).float()))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("name, dtype, place", [
    ("opt-350m", torch.float32, "host"),  # its linears read the layer's input itself
    ("llama", torch.float16, "disk"), ("bloom", torch.bfloat16, "device")])
def test_a_gpu_measures_what_a_cpu_does_wherever_hidden_states_are(name, dtype, place, tokens, monkeypatch):
    model = make(name)
    model.to(dtype).set_attn_implementation("eager")  # C++ makes the mask of others on what it takes for the device
    selected, tokens = select(model), tokens[:3, :6]
    wanted = measurements(StreamedModel(model, CPU, 2), selected, tokens)
    monkeypatch.setattr(needs, "place_for", lambda *_: place)
    with Gpu():
        found = measurements(StreamedModel(model, CUDA, 2), selected, tokens)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() < (0.1 if dtype == torch.bfloat16 else 1e-4) * theirs.norm()
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("what", ["gradients", "plan", "hutchinson", "fisher"])
def test_a_layer_is_loaded_twice_and_not_copied_and_nothing_waits_for_the_gpu(what, checkpoint_folder, tokens,
                                                                              monkeypatch):
    loads, copies, read, copied = Counter(), [], streaming.read, copy.deepcopy

    def read_counted(module, **how):
        loads[id(module)] += bool(linears(module)) and not isinstance(module, torch.nn.Linear)
        return read(module, **how)

    def copy_counted(value, *memo):
        copies.extend(linears(value) if isinstance(value, torch.nn.Module) else ())
        return copied(value, *memo)

    monkeypatch.setattr(streaming, "read", read_counted)
    monkeypatch.setattr(copy, "deepcopy", copy_counted)
    folder = str(checkpoint_folder("llama"))
    config = load.read_config(folder)
    config._attn_implementation = "eager"
    model = load.open_model(folder, config, "auto")
    selected, layers, tokens = select(model), 3, tokens[:2, :6]
    with Gpu() as gpu:
        streamed = StreamedModel(model, CUDA, 1)
        if what == "gradients":
            output_gradients(streamed, list(selected), tokens, 3)
        elif what == "plan":
            ones = {key: list(map(torch.ones, shape)) for key, shape in selected.items()}
            by_threshold(Budget(selected, Target(0.5), 0.1, None, ones, streamed))
        else:
            traces(streamed, selected, tokens, what)
    assert list((+loads).values()) == [2] * layers and not copies  # without modules that are no layers
    assert gpu.pinned == 2 * (layers - 1) * len(layers_of(model)[0].state_dict())  # what is read ahead
    waits = {}
    for (_, place), count in gpu.synchronisations.items():
        file = place.partition(":")[0]
        waits[file] = waits.get(file, 0) + count
    if what == "plan":  # the size of a histogram, and itself
        assert waits == {"plan.py": 5 * len(selected) + 2}
    else:
        assert "backward.py" not in waits and waits.get("hutchinson.py", 0) <= 1
        assert waits.get("fisher.py", 0) <= len(selected) + 1  # none within a layer
