"""Check the smallest scores against sorted lists, and triangular inverses against the full matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sparsegpt import hypothesis_settings, random

from mixgpt.kernels.columns import smallest_per_row
from mixgpt.kernels.linalg import kth_smallest, smallest, upper_blocks, upper_inverse

small_integers = st.integers(-3, 3).map(float)  # many ties


@hypothesis_settings
@given(rows=st.integers(1, 5), columns=st.integers(1, 6), data=st.data())
def test_smallest_marks_the_first_k_of_the_sorted_scores(rows, columns, data):
    scores = data.draw(st.lists(small_integers, min_size=rows * columns, max_size=rows * columns))
    k = data.draw(st.integers(0, rows * columns), label="k")
    mask, = smallest([torch.tensor(scores).view(rows, columns)], [k])
    assert mask.shape == (rows, columns) and mask.dtype == torch.bool
    assert sorted(s for s, marked in zip(scores, mask.flatten().tolist(), strict=True) if marked) == sorted(scores)[:k]


def test_the_kth_smallest_with_ties():
    values = torch.tensor([3.0, 1, 1, 0, 2, 0, 1])
    assert [value.item() for value in kth_smallest([values] * 7, range(1, 8))] == sorted(values.tolist())


def test_smallest_reads_scores_in_any_layout():
    scores = random(6, 4).t()
    threshold = sorted(scores.flatten().tolist())[9]
    assert torch.equal(*smallest([scores], [10]), scores <= threshold)


@hypothesis_settings
@given(columns=st.integers(1, 12), data=st.data())
def test_smallest_per_row_marks_the_first_n_of_each_sorted_row(columns, data):
    rows = data.draw(st.lists(st.lists(small_integers, min_size=columns, max_size=columns), min_size=1, max_size=5))
    n = data.draw(st.integers(0, columns), label="n")
    mask = smallest_per_row(torch.tensor(rows), n)
    assert mask.shape == (len(rows), columns) and mask.dtype == torch.bool
    for row, marks in zip(rows, mask.tolist(), strict=True):
        assert sorted(score for score, marked in zip(row, marks, strict=True) if marked) == sorted(row)[:n]


@pytest.mark.parametrize("n", [1, 130, 300, 511])
def test_the_inverse_of_a_triangular_matrix(n):
    R = (torch.eye(n) + random(n, n) / 3 / n ** 0.5).triu()
    torch.testing.assert_close(upper_inverse(R.float()).double(), torch.linalg.inv(R), rtol=0, atol=1e-5)


def test_blocks_of_a_gpu_are_wide_and_all_blocks_cover_the_columns():
    assert [len(upper_blocks(n, torch.device("cuda"))) for n in (768, 2048, 4096, 11008, 12288, 49152)] == [
        1, 1, 2, 6, 6, 8]
    for device in (torch.device("cuda"), torch.device("cpu")):
        for n in (1, 100, 2050, 4096, 11008):
            blocks = upper_blocks(n, device)
            assert [column for B in blocks for column in range(B.start, B.stop)] == list(range(n))
