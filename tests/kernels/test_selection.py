"""Check the marks of the least salient weights against sorted lists, in Triton as in PyTorch."""

import pytest
import torch
from test_columns import GPU, NO_TRITON, inside, untouched

from mixgpt.kernels import columns, selection

try:
    from mixgpt.kernels import selection_cuda
except ImportError:  # no Triton
    selection_cuda = None

MARKERS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(selection_cuda is None, reason=NO_TRITON))]


def marker(name):
    """Return a `mark_smallest` and the device of its tensors."""
    return (selection_cuda.mark_smallest, GPU) if name == "triton" else (selection.mark_smallest, torch.device("cpu"))


@pytest.mark.parametrize("name", MARKERS)
@pytest.mark.parametrize("width, rows, counts, ties, by_columns, weighted", [
    (1, (1,), (1,), False, False, False), (8, (5,), (0,), False, True, True), (8, (5,), (40,), True, False, False),
    (128, (33, 100, 7), (2000, 0, 500), False, False, True), (128, (33, 100, 7), (2000, 0, 500), True, True, False),
    (16, (400,), (3201,), False, True, False), (48, (300, 41), (9000, 1500), True, False, True)])
def test_exactly_the_smallest_are_marked(name, width, rows, counts, ties, by_columns, weighted):
    mark, device = marker(name)
    make, out = torch.Generator().manual_seed(0), sum(rows)
    W = torch.randn(width, out, generator=make)
    W = W.round() if ties else W * torch.randn(width, 1, generator=make).exp()
    mask = torch.rand(width, out, generator=make) < 0.1
    factors = torch.ones(width) if ties else 0.5 + torch.rand(width, generator=make)
    row_weights = 2.0 ** torch.randint(0, 3, (out,), generator=make) if weighted else None
    stops = torch.tensor(rows).cumsum(0).tolist()
    matrices = [(slice(stop - n, stop), count) for stop, n, count in zip(stops, rows, counts, strict=True)]

    _, inner_W = inside(W, device, by_columns=by_columns)
    large, marked = inside(mask, device, extra_columns=3, by_columns=by_columns)
    mark(inner_W, marked, marked, factors.to(device), None if row_weights is None else row_weights.to(device), matrices)
    marked = marked.cpu()
    assert untouched(large, mask) and (marked | ~mask).all()
    scores = W.double().square() * factors.double()[:, None] * (1 if row_weights is None else row_weights)
    for part, count in matrices:
        chosen, before, values = marked[:, part], mask[:, part], scores[:, part]
        assert chosen.sum() == max(count, before.sum())  # what is marked already counts
        new = values[chosen & ~before].sort().values
        torch.testing.assert_close(new, values[~before].sort().values[:len(new)], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MARKERS)
def test_counts_may_lie_on_the_device_and_marks_elsewhere(name):
    mark, device = marker(name)
    W = torch.arange(24.0, device=device).view(4, 6)
    mask, marked = W > 21, W < 0
    matrices = [(slice(0, 3), torch.tensor(5, device=device)), (slice(3, 6), torch.tensor(-2, device=device))]
    mark(W, mask, marked, torch.ones(4, device=device), None, matrices)
    assert marked.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6, [0] * 6]
    assert (mask == (W > 21)).all()


@pytest.mark.skipif(selection_cuda is None, reason=NO_TRITON)
def test_the_first_of_equal_weights_are_marked_whatever_program_they_are_in():
    W = torch.ones(64, 200, device=GPU)  # 12,800 weights, in four programs
    mask = W < 0
    selection_cuda.mark_smallest(W, mask, mask, torch.ones(64, device=GPU), None, [(slice(0, 200), 9001)])
    assert mask.flatten()[:9001].all() and not mask.flatten()[9001:].any()


@pytest.mark.skipif(selection_cuda is None, reason=NO_TRITON)
def test_no_numbers_and_infinite_ones_are_the_last():
    W = torch.tensor([[torch.nan, -torch.inf, 3, 0, -torch.nan, 1e-30]], device=GPU)
    mask = torch.zeros(1, 6, dtype=torch.bool, device=GPU)
    selection_cuda.mark_smallest(W, mask, mask, torch.ones(1, device=GPU), None, [(slice(0, 6), 4)])
    assert mask.int().tolist() == [[0, 1, 1, 1, 0, 1]]


@pytest.mark.skipif(selection_cuda is None, reason=NO_TRITON)
def test_triton_marks_on_a_gpu_in_float32(monkeypatch):
    gpu = torch.device("cuda", 1)
    for reason, dtype, expected in ((None, torch.float32, selection_cuda.mark_smallest),
                                    (None, torch.float64, selection.mark_smallest),
                                    ("no compiler", torch.float32, selection.mark_smallest)):
        monkeypatch.setattr(columns, "triton_obstacle", lambda device, reason=reason: reason)
        assert selection.fastest(gpu, dtype) is expected
    assert selection.fastest(torch.device("cpu"), torch.float32) is selection.mark_smallest
