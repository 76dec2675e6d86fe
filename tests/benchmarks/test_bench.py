"""Check that the yardstick of speed does the same work, and that the benchmarks run."""

import copy
import json
import re

import bench
import gpu
import pytest
import torch
from commands import short_builtin  # noqa: F401, a fixture
from conftest import CPU, make, make_plan
from makebelieve import Gpu
from test_sparsegpt import correlated_inputs, prune_matrix, random, relative_error
from textbook import Textbook, prune_model
from transformers import LlamaConfig, LlamaForCausalLM

import llama
from mixgpt.app import inputs
from mixgpt.common.clock import Clock
from mixgpt.kernels import columns
from mixgpt.pruning.hessian import InputHessian
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target, select
from modelutils import StreamedModel, linears
from quant import Scheme


@pytest.mark.parametrize("target, wbits", [((0.5,), 16), ((0.0, 2, 4), 16), ((0.5,), 4)])
def test_the_textbook_prunes_as_the_product_does(target, wbits):
    X = correlated_inputs(900, 256).float().view(3, 300, 256)
    hessian, linear = InputHessian(256, 3, CPU), torch.nn.Linear(256, 64, bias=False)
    book = Textbook(linear)
    for batch in X:
        hessian.add_batch(batch)
        book.add_batch(batch[None])
    torch.testing.assert_close(book.H, hessian.H, rtol=0, atol=1e-5 * hessian.H.max().item())
    W = random(64, 256).float()
    linear.weight.data.copy_(W)
    book.prune(book.inverse(0.01), *target, **{"wbits": wbits})
    hessian.factor(0.01)
    ours, _ = prune_matrix(W, hessian.R, hessian.H.diagonal(), Target(*target),
                           scheme=Scheme(wbits) if wbits < 16 else None)
    theirs = linear.weight.data
    same = (ours == 0) == (theirs == 0)
    errors = relative_error(W, ours, hessian.H), relative_error(W, theirs, hessian.H)
    if wbits == 16:
        assert same.float().mean() > 0.998
        assert errors[0] == pytest.approx(errors[1], rel=2e-3)
        return
    # the textbook removes half of each block, whatever is rounded to 0 besides
    rounded = (theirs == 0).sum() - W.numel() // 2
    assert same[:, :128].float().mean() > 0.998
    assert 0 < rounded and (~same).sum() <= 2 * rounded + 0.002 * W.numel() and errors[0] < errors[1]


def test_the_textbook_prunes_a_model_as_two_passes_do(tokens):
    family, model = make("llama")
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    prune_model(theirs, family, tokens, CPU, Clock(CPU), sparsity=0.5)
    plan = make_plan(select(ours, family), Target(0.5))
    prune_layerwise(StreamedModel(ours, family, CPU, 2), plan, tokens, Recipe(true_sequential=False))
    for left, right in zip(family.layers_of(theirs), family.layers_of(ours), strict=True):
        for W, V in zip(linears(left).values(), linears(right).values(), strict=True):
            assert ((W.weight == 0) == (V.weight == 0)).float().mean() > 0.99


def test_the_benchmark_of_matrices_prints_ratios_and_agreement(monkeypatch, capsys):
    monkeypatch.setattr(bench, "rate", lambda device, dtype: 1e9)  # large products take long here
    monkeypatch.setattr(bench, "WARMUP", "32x32")
    bench.main(["matrices", "--sizes", "64x96", "--device", "cpu"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("64x96")]
    assert len(rows) == 3 and all(row.count("x") == 3 and row.count("%") >= 3 for row in rows)


@pytest.fixture
def small_gpu(monkeypatch, tmp_path):
    """Give a shape that the benchmark for GPUs takes, and a make-believe GPU where there is no real one."""
    shape = llama.FAMILY, LlamaForCausalLM, LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4), 6
    monkeypatch.setattr(gpu, "SHAPES", {"LLaMA-tiny": shape})
    monkeypatch.setattr(gpu, "test_tokens", lambda *asked: inputs.test_tokens(*asked))  # little text
    monkeypatch.setattr(bench, "rate", lambda device, dtype: 1e9)  # large products take long here
    if torch.cuda.is_available():
        yield
    else:
        monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        with Gpu():
            yield


def test_the_benchmark_of_a_model_prints_ratios_and_perplexities(checkpoint_folder, monkeypatch, capsys):
    monkeypatch.setattr(bench, "rate", lambda device, dtype: 1e9)
    bench.main(["model", str(checkpoint_folder("llama")), "--nsamples", "4", "--seqlen", "32", "--device", "cpu"])
    out = capsys.readouterr().out
    for line in re.findall("^total .*", out, re.M):
        textbook, here, _, floor = line.split()[1:]
        assert float(textbook) >= 0 and float(here) >= 0 and float(floor) >= 0
    perplexities = [list(map(float, line.split()[1:])) for line in re.findall("^perplexity .*", out, re.M)]
    assert len(perplexities) == 2 and all(one == pytest.approx(other, rel=0.1) for one, other in perplexities)


def test_make_gpu_measures_every_method_and_writes_all_it_found(small_gpu, tmp_path, capsys, monkeypatch):
    methods = {name: gpu.METHODS[name] for name in ("SparseGPT", "2:4")}  # the others take long on a make-believe GPU
    monkeypatch.setattr(gpu, "METHODS", methods)
    file = tmp_path / "gpu.json"
    assert gpu.main(["--output", str(file), "--shapes", "LLaMA-tiny", "--nsamples", "4", "--seqlen", "32", "--device",
                     "cuda:0", "--no-tests"]) == 0
    results = json.loads(file.read_text())
    assert set(results["LLaMA-tiny"]) == {*gpu.METHODS, "textbook"}
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "50.00%" in line]
    assert [row[0] for row in rows] == [*gpu.METHODS, "textbook"] and rows[-1][2] == "1.0x"
    for method, record in results["LLaMA-tiny"].items():
        assert record["sparsity"] == 0.5 and record["peak_memory"]["device"] > 0
        assert any(part not in gpu.NOT_PRUNING for part in record["seconds"]), method
    assert "skipped" in results["LLaMA-tiny"]["2:4"]["semi_structured"] or torch.cuda.is_available()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_make_gpu_says_so_where_there_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--output", str(tmp_path / "gpu.json")])
    assert stop.value.code == 2 and "--device cuda: there is no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
