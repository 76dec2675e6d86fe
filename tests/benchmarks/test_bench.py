"""Check that the yardstick of speed does the same work, and that the benchmarks run."""

import contextlib
import json
import re

import bench
import gpu
import pytest
import sparse
import torch
from commands import short_builtin  # noqa: F401, a fixture
from conftest import CPU
from makebelieve import Gpu
from test_sparsegpt import correlated_inputs, prune_matrix, random, relative_error
from textbook import Textbook
from transformers import LlamaConfig

from mixgpt.app import opening
from mixgpt.kernels import columns
from mixgpt.pruning.hessian import InputHessian
from mixgpt.pruning.targets import Target


@pytest.mark.parametrize("target", [(0.5,), (0.0, 2, 4)])
def test_the_textbook_prunes_as_the_product_does(target):
    X = correlated_inputs(900, 256).float().view(3, 300, 256)
    hessian, linear = InputHessian(256, 3, CPU), torch.nn.Linear(256, 64, bias=False)
    book = Textbook(linear)
    for batch in X:
        hessian.add_batch(batch)
        book.add_batch(batch[None])
    torch.testing.assert_close(book.H, hessian.H, rtol=0, atol=1e-5 * hessian.H.max().item())
    W = random(64, 256).float()
    linear.weight.data.copy_(W)
    book.prune(book.inverse(0.01), *target)
    hessian.factor(0.01)
    ours, _ = prune_matrix(W, hessian.R, hessian.H.diagonal(), Target(*target))
    theirs = linear.weight.data
    assert ((ours == 0) == (theirs == 0)).float().mean() > 0.998
    assert relative_error(W, ours, hessian.H) == pytest.approx(relative_error(W, theirs, hessian.H), rel=2e-3)


def test_the_benchmark_of_matrices_prints_ratios_and_agreement(monkeypatch, capsys):
    monkeypatch.setattr(bench, "WARMUP", "32x32")
    bench.main(["matrices", "--sizes", "64x96", "--device", "cpu"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("64x96")]
    assert len(rows) == 3 and all(row.count("x") == 2 and row.count("%") >= 3 for row in rows)
    monkeypatch.setattr(sparse, "measure", lambda *given: ["-"] * 7 if given[2] < 16 else pytest.fail("has no codes"))
    sparse.main(["--kernel", "codes"])


def test_the_benchmark_of_a_model_prints_the_same_perplexity_twice(checkpoint_folder, capsys):
    bench.main(["model", str(checkpoint_folder("llama")), "--nsamples", "4", "--seqlen", "32", "--device", "cpu"])
    perplexities = re.findall(r"^perplexity +(\S+) +(\S+)", capsys.readouterr().out, re.M)
    assert len(perplexities) == 2 and all(float(one) == pytest.approx(float(other), rel=0.1)
                                          for one, other in perplexities)


@pytest.mark.slow
def test_make_gpu_measures_every_method_and_writes_all_it_found(tmp_path, capsys, monkeypatch):
    """On a make-believe GPU where there is no real one."""
    real, file = torch.cuda.is_available(), tmp_path / "gpu.json"
    shape = LlamaConfig(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                        num_attention_heads=4), 6
    monkeypatch.setattr(gpu, "SHAPES", {"LLaMA-tiny": shape})
    monkeypatch.setattr(gpu, "test_tokens", lambda *asked: opening.test_tokens(*asked))  # little text
    methods = {name: gpu.METHODS[name] for name in ("SparseGPT", "2:4")}  # the others take long on a make-believe GPU
    monkeypatch.setattr(gpu, "METHODS", methods)
    if not real:
        monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
    with contextlib.nullcontext() if real else Gpu():
        gpu.main(["--output", str(file), "--shapes", "LLaMA-tiny", *"--nsamples 4 --seqlen 32 --device cuda:0".split()])
    results = json.loads(file.read_text())
    assert set(results["LLaMA-tiny"]) == {*gpu.METHODS, "textbook"}
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "50.00%" in line]
    assert [row[0] for row in rows] == [*gpu.METHODS, "textbook"] and rows[-1][2] == "1.0x"
    for method, record in results["LLaMA-tiny"].items():
        assert record["sparsity"] == 0.5 and record["peak_memory"]["device"] > 0
        assert any(part not in gpu.NOT_PRUNING for part in record["seconds"]), method
    assert "skipped" in results["LLaMA-tiny"]["2:4"]["semi_structured"] or real
