"""Remove experts, and compare scores and models with what transformers' own classes compute."""

import itertools
import re

import pytest
import torch
from conftest import CPU, assert_same_weights, record_of, slow_but
from modeling import test_experts
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from mixgpt.checkpoints import load
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.experts import is_fused, split_experts
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import distill, expert_removal, layerwise
from mixgpt.pruning.expert_removal import best_experts, expert_scores, remove_experts, with_fewer_experts

NAMES = [*(kind for kind in test_experts.MODELS if kind != "deepseek_v4"), "grouped"]


def build(name):
    """Build a model of test_experts.py, or a DeepSeek-V3 whose routers choose one of two groups by biases, too."""
    if name != "grouped":
        return test_experts.build(name)
    model = test_experts.build("deepseek_v3", n_routed_experts=8, n_group=2)
    for place, buffer in model.named_buffers():
        if place.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


class Excluded(TorchFunctionMode):
    """Within the block, the logits that routers give some experts are -inf."""

    def __init__(self, experts):
        """experts: {data pointer of a router's weight: numbers of experts}."""
        super().__init__()
        self.experts = experts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        if function is torch.nn.functional.linear and (numbers := self.experts.get(args[1].data_ptr())):
            output[..., numbers] = -torch.inf
        return output


@torch.no_grad()
def logits_without(model, kept, tokens):
    """Return the logits of a model of transformers whose routers never choose experts but those kept, {layer: …}."""
    excluded = {}
    for index, numbers in kept.items():
        layer = layers_of(model)[index]
        count = next(module.num_experts for module in layer.modules() if is_fused(module))
        others = sorted(set(range(count)) - set(numbers))
        for name, tensor in layer.state_dict().items():
            if re.search(r"correction_bias|expert_bias", name):  # of what sigmoids give, which -inf does not exclude
                tensor[..., others] = -torch.inf
            elif re.search(r"(gate|router|wg|router\.proj)(\.gate|\.wg)?\.weight$", name) and len(tensor) == count:
                excluded[tensor.data_ptr()] = others
    assert len(excluded) == len(kept)
    with Excluded(excluded):
        return model(tokens, use_cache=False).logits


@torch.no_grad()
def brute_force_scores(model, tokens):
    """Return {layer: scores} by running each token alone through each expert that the model has routed it to."""
    calls, scores = {}, {}
    for index, layer in enumerate(layers_of(model)):
        for module in filter(is_fused, layer.modules()):
            module.register_forward_pre_hook(lambda module, args, index=index: calls.update({index: (module, args)}))
    model(tokens, use_cache=False)
    for index, (module, (hidden, chosen, weights)) in calls.items():
        values = [[] for _ in range(module.num_experts)]
        for token, (numbers, gates) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
            for number, gate in zip(numbers, gates, strict=True):
                output = module(hidden[token:token + 1], torch.tensor([[number]]), torch.ones(1, 1))
                values[number].append(gate * output.norm().item())
        scores[index] = torch.tensor([sum(of_expert) / max(len(of_expert), 1) for of_expert in values])
    return scores


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_each_token_alone(name, tokens):
    tokens, model = tokens[:3, :5], build(name)  # so few that experts differ in theirs
    split_experts(model)
    scores = expert_scores(StreamedModel(model, CPU, 2), tokens)
    expected = brute_force_scores(build(name), tokens)
    assert scores.keys() == expected.keys()
    for index, of_layer in expected.items():
        assert torch.allclose(scores[index].float(), of_layer, rtol=1e-3), index


def test_an_expert_without_tokens_scores_zero_and_norms_of_outputs_count():
    model, tokens = build("gpt_oss"), torch.arange(8).view(2, 4)
    last = layers_of(model)[2].mlp
    last.router.bias.data[1] = -1e3
    split_experts(model)
    before = expert_scores(StreamedModel(model, CPU, 2), tokens)[2]
    assert before[1] == 0 and (before > 0).sum() >= 2
    last.experts.has_post_expert_norm, last.experts.post_expert_norm = True, lambda hidden: 3 * hidden
    after = expert_scores(StreamedModel(model, CPU, 2), tokens)[2]
    assert torch.allclose(after, 3 * before)


@pytest.mark.parametrize("name, fraction, groups", [("mixtral", 0.5, 1), ("mixtral", 0.25, 1), ("grouped", 0.25, 2),
                                                    ("grouped", 0.5, 2)])
def test_the_best_experts_of_each_group_stay(name, fraction, groups):
    model = build(name)
    split_experts(model)
    smaller, count = with_fewer_experts(model, fraction), 4 * groups
    scores = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    allowed = [chosen for chosen in itertools.combinations(range(count), round((1 - fraction) * count))
               if groups == 1 or len(chosen) == 2 * sum(number < 4 for number in chosen)]
    assert best_experts(scores, smaller) == list(max(allowed, key=lambda chosen: scores[list(chosen)].sum()))


@pytest.mark.parametrize("name", slow_but(["gemma4_text", "gpt_oss", "grouped", "mixtral"], NAMES))
def test_the_saved_model_is_the_dense_one_whose_routers_never_choose_the_removed(name, folder, tokens, prune, tmp_path):
    prune("llama", "--experts .5 --save", tmp_path / "saved", model=folder(name))
    kept = dict(record_of(tmp_path / "saved")["kept_experts"])
    dense = AutoModelForCausalLM.from_pretrained(folder(name), experts_implementation="eager").eval()
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert {module.num_experts for module in saved.modules() if is_fused(module)} == {4 if name == "grouped" else 2}
    with torch.no_grad():
        logits = saved.eval()(tokens, use_cache=False).logits
    assert torch.allclose(logits, logits_without(dense, kept, tokens), rtol=1e-4, atol=1e-4)

    in_memory = load.load_model(str(folder(name)), "auto")  # where it is on disk in the run
    remove_experts(in_memory, with_fewer_experts(in_memory, 0.5), kept)
    with torch.no_grad():
        assert torch.allclose(in_memory(tokens, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, options", [("qwen3_moe", ""), ("gpt_oss", "--preset mixgpt --no-true-sequential")])
def test_what_is_left_is_pruned_as_if_it_had_been_the_model(kind, options, folder, prune, tmp_path):
    prune("llama", "--experts .5 --save", tmp_path / "experts", model=folder(kind))
    prune("llama", "--sparsity .5", options, "--save", tmp_path / "after", model=tmp_path / "experts")
    prune("llama", "--experts .5 --sparsity .5", options, "--save", tmp_path / "once", model=folder(kind))
    assert_same_weights(tmp_path / "after", tmp_path / "once")
    assert not record_of(tmp_path / "experts")["sparsity"]
    assert record_of(tmp_path / "once")["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("options", ["", "--preset best", "--wbits 4"])
def test_an_interrupted_run_goes_on_with_the_same_experts(options, folder, prune, tmp_path, monkeypatch):
    options, model = f"--experts .25 --sparsity .5 {options} --save", folder("qwen3_moe")
    prune("llama", options, tmp_path / "whole", model=model)
    with monkeypatch.context() as patch:
        step, calls = layerwise.prune_in_place, itertools.count()
        patch.setattr(layerwise, "prune_in_place", lambda *given: step(*given) if next(calls) < 9 else 1 / 0)
        prune("llama", options, tmp_path / "resumed", model=model, status=1)
    monkeypatch.setattr(expert_removal, "expert_scores", lambda *_: pytest.fail("the experts are chosen again"))
    prune("llama", options, tmp_path / "resumed", "--resume", model=model)
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_distillation_and_dense_perplexity_are_those_of_the_model_with_all_experts(folder, prune, tmp_path,
                                                                                   monkeypatch):
    states, seen = distill.reference_states, []
    monkeypatch.setattr(distill, "reference_states", lambda streamed, tokens: (
        seen.append(streamed.model.num_parameters()), states(streamed, tokens))[1])
    model = folder("qwen3_moe")
    prune("llama", "--experts .25 --sparsity .5 --dense --distill 1 --save", tmp_path / "all", model=model)
    assert seen == [build("qwen3_moe").num_parameters()]
    prune("llama", "--save", tmp_path / "dense", model=model)
    perplexities = record_of(tmp_path / "all")["perplexity"]
    assert perplexities["dense"] == record_of(tmp_path / "dense")["perplexity"]["dense"]
    assert list(perplexities) == ["dense", "SparseGPT (distilled), 25% fewer experts"]


@pytest.mark.parametrize("name, fraction, message", [
    ("mixtral", 0.75, "leaves 1 of the 4 experts of a layer, too few for tokens that take 2"),
    ("gemma4_text", 0.75, "leaves 1 of the 4 experts of a layer, too few for tokens that take 2"),
    ("hunyuan_v1_moe", 0.1, "removes none of the 4 experts of a layer"),
    ("grouped", 0.1, "removes none of the 8 experts of a layer, 2 groups"),
    ("grouped", 0.75, "leaves 2 of the 8 experts of a layer, 2 groups, too few for tokens that take 2"),
    ("mixtral", 1.5, "must lie between 0 and 1"),
])
def test_what_no_router_could_choose_from_is_refused_before_weights_are_read(
        name, fraction, message, folder, prune, monkeypatch):
    monkeypatch.setattr(load, "open_model", lambda *_, **__: pytest.fail("weights are read"))
    said = prune("llama", "--experts", fraction, model=folder(name), status=2)
    assert said == f"llama.py: error: --experts {fraction}: {message}\n"


def test_models_without_experts_and_tables_of_experts_are_refused(prune):
    assert prune("llama", "--experts .5", status=2) == (
        "llama.py: error: --experts 0.5: this LlamaForCausalLM has no mixture of experts whose number can be lowered\n")
    model = build("deepseek_v4")
    split_experts(model)
    with pytest.raises(ValueError, match="layer 0 has mlp.gate.tid2eid, of which no part belongs to each expert"):
        with_fewer_experts(model, 0.25)
