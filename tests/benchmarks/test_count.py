"""Count what a small shape asks of a GPU, and compare with formulas."""

import count
import pytest
import torch
from transformers import LlamaConfig

import llama

CONFIG = LlamaConfig(hidden_size=256, intermediate_size=512, num_attention_heads=4, vocab_size=1000)
WEIGHTS = 4 * 256**2 + 3 * 256 * 512  # in the matrices of a layer
TOKENS = torch.zeros(8, 128, dtype=torch.int64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(count.SHAPES, "small", (llama.FAMILY, CONFIG, 5))


def difference(method, tokens=TOKENS):
    """Return what the third layer adds to every part of a run."""
    (two, _), (three, _) = (count.count("small", method, tokens, 2, layers) for layers in (2, 3))
    return {part: {key: value - two.counts[part][key] for key, value in counted.items()}
            for part, counted in three.counts.items()}


def test_the_arithmetic_of_a_layer_is_that_of_its_shapes():
    added = difference("SparseGPT")
    products, attention = 2 * WEIGHTS * 1024, 4 * 256 * 128 * 1024
    assert added["forward"]["TFLOP"] * 1e12 == pytest.approx(products + attention, rel=1e-6)
    # a Hessian for each of four inputs, of which upper blocks are products: here one block each
    assert added["Hessian"]["TFLOP"] * 1e12 == pytest.approx(2 * 1024 * (3 * 256**2 + 512**2), rel=1e-4)


def test_a_layer_is_loaded_once_and_the_host_waits_for_it_at_most_ten_times():
    added = difference("SparseGPT").values()
    assert sum(part.get("up", 0) for part in added) * 1e9 == pytest.approx(2 * (WEIGHTS + 2 * 256), rel=1e-3)
    assert sum(part.get("waits", 0) for part in added) <= 10


def test_gradients_load_a_layer_twice_and_synthetic_sequences_and_distillation_once():
    added = difference("best", TOKENS[:2])
    up = {part: counted.get("up", 0) * 1e9 / (2 * (WEIGHTS + 2 * 256)) for part, counted in added.items()}
    parts = up["gradients"], up["synthetic"], up["distillation"], sum(up.values())
    assert parts == pytest.approx((2, 1, 1, 5), rel=0.05)


def test_the_table_names_the_way_that_the_memory_is_used(capsys):
    count.main(["--shapes", "small", "--methods", "SparseGPT", "--nsamples", "4", "--seqlen", "64"])
    output = capsys.readouterr().out
    assert "one pass through each layer" in output and "not measured" in output
    assert output.splitlines()[-1].split()[0] == "total"
