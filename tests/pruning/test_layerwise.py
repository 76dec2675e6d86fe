"""Check the pruning of whole models against hooks on the model's own forward, and against least squares."""

import copy
from pathlib import Path

import makebelieve
import pytest
import torch
from conftest import CPU, inputs_of, make, make_plan, modules_of
from modeling.test_decoders import COMMON, build
from test_sparsegpt import prune_matrix
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from mixgpt.common.choices import SALIENCIES, SOLVERS
from mixgpt.kernels import columns
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.experts import split_experts
from mixgpt.modeling.linears import linears
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import layerwise
from mixgpt.pruning.dense_target import residual_writers
from mixgpt.pruning.hessian import factor
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target, select

HALF = Target(0.5)

# linears that write to the residual stream: a module that reads what they are added to
NORMS = {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm",
         "self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm",
         "self_attention.dense": "input_layernorm", "mlp.dense_4h_to_h": "post_attention_layernorm"}
POST_NORMS = {"self_attn.out_proj": "self_attn.q_proj", "fc2": "fc1"}  # of OPT-350m


def plan_of(model, **selection):
    return make_plan(select(model, **selection), HALF)


def sparsegpt(model, plan, tokens, batch_size=2, **changes):
    options = {"saliency": "obs", "blocksize": 16, "true_sequential": False} | changes
    saliency, solver = SALIENCIES[options.pop("saliency")].load(), SOLVERS[options.pop("solver", "obs")].load()
    recipe = Recipe(solver, saliency=saliency, **options)
    return prune_layerwise(StreamedModel(model, CPU, batch_size), plan, tokens, recipe)


@torch.no_grad()
def prune_by_whole_forwards(model, tokens, steps):
    """Prune as `steps` orders it, each step a list of (layer, name), from one run of the whole model per step."""
    for step in steps:
        modules = {key: modules_of(model)[key] for key in step}
        for key, X in inputs_of(model, modules, tokens).items():
            H, module = 2 / len(tokens) * X.double().T @ X.double(), modules[key]
            R, _ = factor(H)
            module.weight.copy_(prune_matrix(module.weight.double(), R, H.diagonal(), HALF, blocksize=16)[0])


def least_squares(W, X, Y):
    """Return the weights (out, in) by which inputs X (n, in) give outputs Y best, drawn to W by the default damping."""
    ridge = (0.01 * X.square().sum(0).mean()).sqrt()
    return torch.linalg.lstsq(torch.cat([X, ridge * torch.eye(X.shape[1])]), torch.cat([Y, ridge * W.T])).solution.T


def regress_layer_1(model, parts, read, tokens, **options):
    """Halve layer 0, and regress linears of layer 1 towards the dense model, by parts of their names, pruning none.

    Returns layer 1 as it was, and inputs {name: X} of its modules `read` in that model and the dense one, in float64.
    """
    dense = copy.deepcopy(model)
    plan = {(index, name): Target(0.0) if index else HALF for index, name in select(model, maxlayer=2)
            if not index or any(part in name for part in parts)}
    sparsegpt(model, plan, tokens, fits_dense=True, **options)
    before = copy.deepcopy(dense)
    layers_of(before)[0] = layers_of(model)[0]
    return layers_of(dense)[1], [inputs_of(each.double(), {name: layers_of(each)[1].get_submodule(name)
                                                           for name in read}, tokens) for each in (before, dense)]


def weights(model):
    return {key: module.weight for key, module in modules_of(model).items()}


@pytest.mark.parametrize("true_sequential", [False, True])
def test_calibration_is_on_the_pruned_layers_or_linears_before(tiny, tokens, true_sequential):
    model, reference = tiny, copy.deepcopy(tiny)
    sparsegpt(model, plan_of(model), tokens, true_sequential=true_sequential)
    names = list(linears(layers_of(model)[0]))  # every family registers its linears as they run
    steps = [[name] for name in names] if true_sequential else [names]
    prune_by_whole_forwards(reference, tokens, [[(index, name) for name in step] for index in range(3)
                                                        for step in steps])
    for (key, W), R in zip(weights(model).items(), weights(reference).values(), strict=True):
        assert torch.equal(W == 0, R == 0), key
        assert torch.allclose(W, R, atol=2e-4), key


@pytest.mark.parametrize("true_sequential, light_first", [(False, False), (True, True)])
@torch.no_grad()
def test_the_dense_target_is_that_of_the_dense_models_inputs_and_sums(tiny, tokens, true_sequential, light_first):
    """Each matrix is solved for by least squares on what the model as pruned before it, and the dense one, give."""
    tiny.get_input_embeddings().weight[tokens[:, 0]] *= 9
    model, reference, dense = tiny, copy.deepcopy(tiny), copy.deepcopy(tiny)
    plan = plan_of(model)
    sparsegpt(model, plan, tokens, fits_dense=True, true_sequential=true_sequential, light_first=light_first)
    names = list(linears(layers_of(model)[0]))
    norms = NORMS if getattr(model.config, "do_layer_norm_before", True) else POST_NORMS
    pruned, expected = weights(reference), {}
    for index in range(3):
        sizes = inputs_of(reference, {0: layers_of(reference)[index]}, tokens)[0].norm(dim=-1).view(tokens.shape)
        light = torch.ones(tokens.shape)
        light[:, 0] = (sizes.median(1).values / sizes[:, 0]).clamp(max=1)
        for step in ([[name] for name in names] if true_sequential else [names]):
            seen = []
            for each in (reference, dense):
                layer = layers_of(each)[index]
                wanted = [*step, *(norms[name] for name in step if name in norms)]
                inputs = inputs_of(each, {name: layer.get_submodule(name) for name in wanted}, tokens)
                seen.append({name: X.double() for name, X in inputs.items()})
            for name in step:
                module = layers_of(reference)[index].get_submodule(name)
                W, (X, X_dense) = module.weight, (inputs[name] for inputs in seen)
                Y = (X + X_dense) / 2 @ W.double().T
                if name in norms:
                    Y += (seen[1][norms[name]] - seen[0][norms[name]]) / 2
                    if light_first:
                        X, Y = (values * light.flatten()[:, None] for values in (X, Y))
                H = 2 / len(tokens) * X.T @ X
                R, _ = factor(H)
                wanted = least_squares(W.double(), X, Y)
                expected[index, name] = prune_matrix(wanted, R, H.diagonal(), HALF, blocksize=16)[0].float()
            for name in step:  # what follows is compared on the same inputs, whatever rounding did here
                pruned[index, name].copy_(weights(model)[index, name])
    rows = differing = 0
    for key, W in weights(model).items():
        same = ((W == 0) == (expected[key] == 0)).all(dim=1)  # a tie that rounding breaks changes its row alone
        assert torch.allclose(W[same], expected[key][same], atol=2e-4), key
        rows, differing = rows + len(W), differing + (~same).sum().item()
    assert differing <= 0.01 * rows


@pytest.mark.parametrize("true_sequential", [False, True])
@torch.no_grad()
def test_the_dense_target_of_an_expert_is_that_of_each_token_that_both_models_route_to_it(true_sequential, tokens):
    split_experts(model := make("qwen3-moe"))
    tokens = torch.cat([tokens, tokens.flip(1)])  # each expert gets more than it has columns
    layer, seen = regress_layer_1(model, ["experts"], ["mlp"], tokens, true_sequential=true_sequential)
    hidden = [inputs["mlp"] for inputs in seen]
    for number in range(4):
        own, theirs = (((X @ layer.mlp.gate.weight.T).topk(2).indices == number).any(1) for X in hidden)
        assert own.sum() >= 32 and (own & theirs).any() and (own & ~theirs).any() and (theirs & ~own).any()
        old, new = (each.mlp.experts.get_submodule(f"{number}") for each in (layer, layers_of(model)[1].double()))
        acts = [torch.nn.functional.silu(X @ expert.gate_proj.weight.T) * (X @ expert.up_proj.weight.T)
                for X, expert in zip(hidden, (new if true_sequential else old, old), strict=True)]
        for name, (X, x) in {"gate_proj": hidden, "up_proj": hidden, "down_proj": acts}.items():
            W, target = old.get_submodule(name).weight, torch.where(theirs[:, None], (X + x) / 2, X)  # no gap elsewhere
            expected = least_squares(W, X[own], target[own] @ W.T)
            torch.testing.assert_close(new.get_submodule(name).weight, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, writers", [  # {linear: (what reads the stream before it is added, norm between)}
    ("gemma2", {"self_attn.o_proj": ("input_layernorm", "post_attention_layernorm"),
                "mlp.down_proj": ("pre_feedforward_layernorm", "post_feedforward_layernorm")}),
    ("granite", {"self_attn.o_proj": ("input_layernorm", ""), "mlp.down_proj": ("post_attention_layernorm", "")})])
@torch.no_grad()
def test_the_lag_of_the_stream_is_closed_through_the_norm_and_the_scale_of_what_is_added(kind, writers, tokens):
    model = build(kind, **{"residual_multiplier": 0.3} if kind == "granite" else {})
    for name, weight in model.named_parameters():
        if name.endswith("layernorm.weight"):
            weight.normal_()
    if kind == "gemma2":
        layers_of(model)[1].mlp.down_proj.weight.mul_(1000)  # whose outputs dwarf the stream
    layer, seen = regress_layer_1(model, writers, [*writers, *(reader for reader, _ in writers.values())], tokens)
    for name, (reader, norm) in writers.items():
        (X, stream), (x, dense_stream) = ((inputs[name], inputs[reader]) for inputs in seen)
        W, scale, floor = layer.get_submodule(name).weight, torch.tensor(0.3), 0
        if norm:  # taken to scale what it reads as it does in the dense model
            scale = (1 + layer.get_submodule(norm).weight) / ((x @ W.T).square().mean(1, keepdim=True) + 1e-6).sqrt()
            floor = 0.01 * scale.square().mean(1, keepdim=True)
        change = (dense_stream - stream) * scale / (scale.square() + floor)  # least (scale · it − lag)² + floor · it²
        torch.testing.assert_close(layers_of(model)[1].get_submodule(name).weight.double(),
                                   least_squares(W, X, (X + x) / 2 @ W.T + change / 2), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_scale_of_a_norm_may_exceed_what_float16_holds_the_square_of(tokens):
    model = make("gemma2")
    layers_of(model)[1].mlp.down_proj.weight.mul_(1e-3)
    found, dense = [], weights(model)[1, "mlp.down_proj"].clone()
    for dtype in (torch.float32, torch.float16):
        other = copy.deepcopy(model).to(dtype)
        sparsegpt(other, plan_of(other), tokens, fits_dense=True)
        found.append(weights(other)[1, "mlp.down_proj"].float() - dense)
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


@torch.no_grad()
def test_a_gated_output_is_not_added_as_it_is_because_a_token_is_huge(tokens):
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
    split_experts(model := Qwen2MoeForCausalLM(Qwen2MoeConfig(**COMMON, **experts)).eval().bfloat16())
    model.get_input_embeddings().weight[tokens[:, 0], 5] = 3000
    streamed = StreamedModel(model, CPU, 2)
    writers = residual_writers(streamed.layers[0], 0, streamed.embed(tokens))
    assert [writer.linear for writer in writers] == ["self_attn.o_proj"]


@torch.no_grad()
def test_the_dense_target_is_finite_where_a_norm_follows_outputs_of_zero(tokens):
    model = make("gemma2")
    model.get_input_embeddings().weight[tokens[0, 0]] = 0  # the first token attends to itself alone
    outcomes = sparsegpt(model, plan_of(model), tokens, fits_dense=True)
    assert all(0 < outcome.error < 1 for outcome in outcomes.values())


class ByName(torch.nn.Module):
    """A module that passes its input on by name, as xLSTM's do."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states):
        return self.norm(hidden_states=hidden_states)


def test_the_dense_target_is_the_same_if_modules_get_their_input_by_name(tokens):
    model, other = make("llama"), make("llama")
    for layer in layers_of(other):
        layer.post_attention_layernorm = ByName(layer.post_attention_layernorm)
    for each in (model, other):
        sparsegpt(each, plan_of(each), tokens, fits_dense=True)
    assert all(map(torch.equal, weights(model).values(), weights(other).values()))


@pytest.mark.parametrize("selection, chosen", [
    ({"minlayer": 1}, lambda index, name: index >= 1),
    ({"maxlayer": 2}, lambda index, name: index < 2),
    ({"prune_only": "fc1"}, lambda index, name: name == "fc1"),
    ({"minlayer": 1, "maxlayer": 2, "prune_only": "self_attn"}, lambda index, name: index == 1 and "attn" in name),
    ({"minlayer": 1, "prune_only": "fc", "invert": True}, lambda index, name: not (index >= 1 and "fc" in name)),
])
@pytest.mark.parametrize("true_sequential", [False, True])
def test_only_what_is_selected_changes(selection, chosen, true_sequential, tokens):
    model = make("opt")
    before = {key: W.clone() for key, W in weights(model).items()}
    outcomes = sparsegpt(model, plan_of(model, **selection), tokens, true_sequential=true_sequential)
    assert set(outcomes) == {key for key in before if chosen(*key)}
    for key, W in weights(model).items():
        assert torch.equal(W, before[key]) != chosen(*key), key


@pytest.mark.parametrize("solver, dense", [("obs", False), ("admm", True)])
def test_the_host_waits_for_a_gpu_once_per_input_and_once_for_all_errors(solver, dense, tokens, monkeypatch):
    """In this room: for the factorisations of the four inputs of a layer, and for its errors."""
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
    model = make("llama")
    with makebelieve.Gpu() as gpu:
        streamed = StreamedModel(model.bfloat16(), torch.device("cuda:0"), 2)
        recipe = Recipe(SOLVERS[solver].load(), 16, fits_dense=dense)
        outcomes = prune_layerwise(streamed, plan_of(model), tokens, recipe)
    here = {"sparsegpt.py", "quant.py", *(file.name for room in ("kernels", "pruning")
                                          for file in (Path(layerwise.__file__).parents[1] / room).iterdir())}
    waited = {what: count for what, count in gpu.synchronisations.items()
              if what[1].partition(":")[0] in here - {"dense_target.py"}}
    assert sum(waited.values()) == 3 * 5, waited
    assert all(type(outcome.error) is float and 0 < outcome.error < 1 for outcome in outcomes.values())
