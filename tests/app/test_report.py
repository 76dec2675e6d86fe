"""Check the tables."""

from mixgpt.app.report import sparsity_table


def row(layer, name, shape, sparsity, **more):
    return {"layer": layer, "name": name, "shape": list(shape), "sparsity": sparsity, **more}


def test_sparsity_is_weighted_by_size_and_errors_are_averaged():
    matrices = [row(0, "a", (2, 4), 0.5, error=0.1), row(0, "b", (3, 10), 0), row(1, "a", (2, 4), 1, error=0.3)]
    assert sparsity_table({"matrices": matrices}).splitlines() == [
        "matrix kind  count  shape  sparsity   error",
        "-----------  -----  -----  --------  ------",
        "a                2    2x4    75.00%  20.00%",
        "b                1   3x10     0.00%       -",
        "total            3     46    26.09%",
    ]


def test_experts_share_a_row_and_weights_that_are_left_dense_are_named():
    matrices = [row(0, f"mlp.experts.{number}.up_proj", (2, 4), number / 8) for number in range(5)]
    others = [row(0, "mlp.gate", (5, 4), 0), row(1, "conv", (4, 1, 3), 2 / 12)]
    assert sparsity_table({"matrices": matrices, "left_dense": others}).splitlines() == [
        "matrix kind            count  shape  sparsity  error",
        "---------------------  -----  -----  --------  -----",
        "mlp.experts.*.up_proj      5    2x4    25.00%      -",
        "left dense: mlp.gate       1    5x4     0.00%      -",
        "left dense: conv           1  4x1x3    16.67%      -",
        "total                      5     40    25.00%",
        "total with these           7     72    16.67%",
    ]
