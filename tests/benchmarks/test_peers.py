"""Check the peers of the accuracy benchmark against brute force, and that the benchmark runs and goes on."""

import contextlib
import copy
import gzip
import json
import math
from types import SimpleNamespace

import accuracy
import pytest
import scores
import torch
from conftest import CPU, make, make_plan
from peers import outlier_ratios, owl_plan, prune_wanda, wanda_mask

from mixgpt.evaluation.sparsity import measure_sparsity, total_sparsity
from mixgpt.pruning.targets import Target, select
from modelutils import linears
from quant import Scheme, quantize_nearest


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def all_of(model, family):
    return select(model, family)


def inputs_of(model, family, tokens):
    """Return {(layer, name): inputs (tokens, in)} of one run of the whole model."""
    seen, handles = {}, []
    for index, layer in enumerate(family.layers_of(model)):
        for name, module in linears(layer).items():
            handles.append(module.register_forward_pre_hook(
                lambda _, args, key=(index, name): seen.update({key: args[0].flatten(0, -2)})))
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_wanda_takes_the_least_scores_of_each_row():
    W, norms = random(7, 10), random(10).abs() + 0.1
    mask = wanda_mask(W, norms, Target(0.33))
    assert mask.sum() == round(0.33 * W.numel())  # 3.3 of each row: some lose 3, some 4
    for row, chosen in zip(W, mask, strict=True):
        assert chosen.sum() in (3, 4)
        order = sorted(range(10), key=lambda j: abs(row[j].item()) * norms[j].item())
        assert set(chosen.nonzero().flatten().tolist()) == set(order[:chosen.sum()])


def test_wanda_takes_n_of_every_m():
    W, norms = random(5, 12), random(12).abs() + 0.1
    mask = wanda_mask(W, norms, Target(0.25, 1, 4))
    for i in range(5):
        for start in range(0, 12, 4):
            least = min(range(start, start + 4), key=lambda j: abs(W[i, j].item()) * norms[j].item())
            assert mask[i, start:start + 4].nonzero().flatten().tolist() == [least - start]


@pytest.mark.parametrize("scheme", [None, Scheme(4)])
def test_wanda_calibrates_each_layer_on_the_pruned_layers_before(tokens, scheme):
    family, model = make("llama")
    pruned = copy.deepcopy(model)
    prune_wanda(pruned, family, make_plan(all_of(model, family), Target(0.5)), tokens, 2, CPU, scheme)
    for index, layer in enumerate(family.layers_of(model)):
        seen = inputs_of(model, family, tokens)  # whose layers before this one are pruned by now
        for name, module in linears(layer).items():
            W = module.weight.detach()
            W = W.masked_fill(wanda_mask(W, seen[index, name].norm(dim=0), Target(0.5)), 0)
            module.weight.data.copy_(quantize_nearest(W, scheme)[0] if scheme else W)
        for name, module in linears(family.layers_of(pruned)[index]).items():
            # norms in another order of summation may exchange weights of nearly equal score
            assert ((module.weight == 0) == (layer.get_submodule(name).weight == 0)).float().mean() > 0.995
    assert total_sparsity(measure_sparsity(pruned, family)) == pytest.approx(0.5, abs=1e-9 if scheme is None else 0.1)


def test_owl_counts_outliers_over_all_matrices_of_a_dense_layer(tokens):
    family, model = make("llama")
    with torch.no_grad():
        for layer in family.layers_of(model):
            for module in linears(layer).values():
                module.weight[0, :5] *= 20
    seen = inputs_of(model, family, tokens)
    ratios = outlier_ratios(model, family, tokens, 2, CPU)
    for index, layer in enumerate(family.layers_of(model)):
        A = [(seen[index, name].norm(dim=0) * module.weight.detach().abs()).flatten().tolist()
             for name, module in linears(layer).items()]
        A = [value for values in A for value in values]
        limit = 5 * sum(A) / len(A)
        assert 0 < ratios[index] == pytest.approx(sum(value > limit for value in A) / len(A), abs=1.5 / len(A))


def test_owl_meets_the_budget_and_spares_layers_with_outliers():
    ratios = [0.02, 0.05, 0.01, 0.03]
    equal = {(layer, "a"): (8, 4) for layer in range(4)}
    plan = [owl_plan(equal, ratios, 0.6)[layer, "a"].sparsity for layer in range(4)]
    # by hand: 0.16 · (D − 0.01) / 0.04 = 0.04, 0.16, 0, 0.08, whose mean is 0.07
    assert plan == pytest.approx([0.63, 0.51, 0.67, 0.59])
    sizes = {(layer, "a"): (8, 4 * (layer + 1)) for layer in range(4)}
    unequal = owl_plan(sizes, ratios, 0.6)
    total = sum(unequal[key].sparsity * out * columns for key, (out, columns) in sizes.items())
    assert total == pytest.approx(0.6 * sum(out * columns for out, columns in sizes.values()))
    assert sorted(range(4), key=lambda layer: unequal[layer, "a"].sparsity) == [1, 3, 0, 2]
    assert {target.sparsity for target in owl_plan(equal, [0.1] * 4, 0.6).values()} == {0.6}


def test_the_tables_average_seeds_and_gaps():
    cells = [{"method": method, "target": "50%", "seed": seed, "perplexity": {"c4": value}, "sparsity": 0.5,
              "seconds": 10} for method, seed, value in
             [("sparsegpt", 0, 16), ("sparsegpt", 1, 64), ("best", 0, 8), ("best", 1, 16), ("wanda", 0, 32)]]
    text = scores.markdown({"setup": {"dtype": "float32"}, "dense": {"c4": 4.0}, "cells": cells})
    assert "| sparsegpt | 40.00 ± 33.94 | 0% | 50.000 ± 0.000% | 10 | 2 |" in text
    assert "| best | 12.00 ± 5.66 | 50% | 50.000 ± 0.000% | 10 | 2 |" in text
    assert "| wanda | 32.00 | -50% | 50.000% | 10 | 1 |" in text


def cells_of(path):
    return json.loads(path.read_text())["cells"]


def test_the_benchmark_goes_on_where_it_left_off(checkpoint_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "accuracy.json"
    common = [str(checkpoint_folder("llama")), "builtin", "--eval", "builtin", "--segments", "4", "--nsamples", "4",
              "--seqlen", "32", "--output", str(output)]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(accuracy.METHODS, "wanda", accuracy.Method(accuracy.uniform, interrupt))
        with pytest.raises(KeyboardInterrupt):
            accuracy.main([*common, "--seeds", "0", "--targets", "50%"])
    first, = cells_of(output)
    assert first["method"] == "magnitude"
    assert accuracy.main([*common, "--seeds", "0", "--targets", "50%", "2:4", "50%+4bit"]) == 0
    cells = cells_of(output)
    assert cells[0] == first  # seconds included: it was not measured again
    keys = [(cell["method"], cell["target"], cell["seed"]) for cell in cells]
    assert len(keys) == len(set(keys)) == 8 + 6 + 8  # no OWL at 2:4
    for cell in cells:
        assert math.isfinite(cell["perplexity"]["builtin"]) and cell["seconds"] > 0
        tolerance = 5e-3 if "bit" in cell["target"] else 2e-4  # half a weight of each tiny matrix
        assert cell["sparsity"] == pytest.approx(0.5, abs=tolerance)
    table = output.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out and "| owl-wanda | - | - | - | - | - |" in table
    assert accuracy.main([*common, "--seqlen", "16"]) == 2
    assert capsys.readouterr().err.startswith(f"accuracy.py: error: --output {output}: holds cells of another setup (")
    assert cells_of(output) == cells


def test_sensitivities_that_n_to_m_does_not_use_take_no_time():
    calibration = SimpleNamespace(selected={(0, "a"): (4, 8)}, clock=SimpleNamespace(seconds={"gradients": 9.0}))
    target = Target(0.5, 2, 4)
    assert accuracy.METHODS["best"].allocate(calibration, target) == ({(0, "a"): target}, 0.0)


def test_seconds_hold_what_a_method_rests_on_once(monkeypatch):
    """The first cell measures what later ones share; all of them show it."""
    monkeypatch.setattr(accuracy, "Clock", lambda device: clocks.pop(0))
    monkeypatch.setattr(accuracy, "perplexity", lambda *_: 1.0)
    monkeypatch.setattr(accuracy, "measure_sparsity", lambda *_: [])
    monkeypatch.setattr(accuracy, "total_sparsity", lambda _: 0.5)

    class Counted:
        def __init__(self, seconds):
            self.seconds = {"prune": seconds}

        @contextlib.contextmanager
        def part(self, name):
            yield

    def prune(calibration, model, plan, scheme):
        calibration.clock.seconds.setdefault("synthetic", 3.0)
        return ["synthetic"]

    clocks = [Counted(10.0), Counted(7.0)]  # 3 of the 10 seconds for the synthetic sequences
    monkeypatch.setitem(accuracy.METHODS, "best", accuracy.Method(lambda *_: ({}, 2.0), prune))
    calibration = SimpleNamespace(model=None, family=None, device=CPU, batch_size=1,
                                  clock=SimpleNamespace(seconds={"gradients": 2.0}))
    cells = [accuracy.measure(accuracy.METHODS["best"], "50%", calibration, {}) for _ in range(2)]
    assert [cell["seconds"] for cell in cells] == [12.0, 12.0]


def test_held_out_documents_are_never_calibrated_on(tmp_path, tokenizer):
    words = [f"{number} " * 100 for number in range(10)]  # document n holds nothing but the number n
    (tmp_path / "c4").mkdir()
    with gzip.open(tmp_path / "c4" / "c4-train.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in words)
    draw, tests = accuracy.texts("c4", ["c4"], True, 50, 16, 3, tokenizer, tmp_path)
    assert list(tests) == ["heldout"] and tests["heldout"].shape == (3, 16)
    calibration = set(tokenizer.decode(draw(0).flatten(), skip_special_tokens=True).split())
    assert set("01234567") <= calibration and not calibration & {"8", "9"}
    assert "8" in tokenizer.decode(tests["heldout"].flatten()) and "0" not in tokenizer.decode(
        tests["heldout"].flatten())


@pytest.mark.parametrize("options, message", [
    (["--segments", "0"], "--segments 0: must be at least 1"),
    (["--output", "a.txt"], "--output a.txt: must end in .json; the tables are written beside it, in .md"),
])
def test_unusable_options_give_one_line(checkpoint_folder, options, message, tmp_path, capsys):
    given = [str(checkpoint_folder("llama")), "builtin", "--eval", "builtin", "--seqlen", "32", "--output",
             str(tmp_path / "a.json"), *options]
    assert accuracy.main(given) == 2
    assert capsys.readouterr().err == f"accuracy.py: error: {message}\n"


def test_groups_that_do_not_divide_the_columns_are_refused_before_anything_is_measured(checkpoint_folder, monkeypatch,
                                                                                       tmp_path, capsys):
    monkeypatch.setitem(accuracy.TARGETS, "2:5", (Target(0.4, 2, 5), None))
    output = tmp_path / "a.json"
    given = [str(checkpoint_folder("llama")), "builtin", "--eval", "builtin", "--seqlen", "32", "--output", str(output)]
    assert accuracy.main([*given, "--targets", "50%", "2:5"]) == 2
    assert capsys.readouterr().err == ("accuracy.py: error: --targets 2:5, groups of 5: does not divide the 32 columns "
                                       "of layer 0 self_attn.q_proj\n")
    assert not output.exists()


def test_texts_of_ones_own_are_taken_but_not_for_both_purposes(checkpoint_folder, tmp_path, capsys):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} text. " * 100)
    output = tmp_path / "a.json"
    common = [str(checkpoint_folder("llama")), str(tmp_path / "train.txt"), "--methods", "magnitude", "--targets",
              "50%", "--seeds", "0", "--nsamples", "2", "--seqlen", "32", "--segments", "3", "--output", str(output)]
    assert accuracy.main([*common, "--eval", str(tmp_path / "test.txt")]) == 0
    assert [*json.loads(output.read_text())["dense"]] == [str(tmp_path / "test.txt")]
    capsys.readouterr()
    assert accuracy.main([*common, "--eval", str(tmp_path / ".." / tmp_path.name / "train.txt")]) == 2
    assert "is text that calibration draws from; give another one" in capsys.readouterr().err
