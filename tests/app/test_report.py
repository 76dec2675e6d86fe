"""Check the tables."""

from mixgpt.app.report import sparsity_table


def row(layer, name, shape, sparsity, **more):
    return {"layer": layer, "name": name, "shape": list(shape), "sparsity": sparsity, **more}


def test_rows_weigh_sparsity_by_size_average_errors_and_name_what_is_left_dense():
    matrices = [row(0, f"mlp.experts.{number}.up_proj", (2, 4), number / 8, error=number / 10) for number in range(5)]
    matrices.append(row(1, "a", (6, 4), 1))
    others = [row(0, "mlp.gate", (5, 4), 0), row(1, "conv", (4, 1, 3), 2 / 12)]
    assert sparsity_table({"matrices": matrices, "left_dense": others}).splitlines() == [
        "matrix kind            count  shape  sparsity   error",
        "---------------------  -----  -----  --------  ------",
        "mlp.experts.*.up_proj      5    2x4    25.00%  20.00%",
        "a                          1    6x4   100.00%       -",
        "left dense: mlp.gate       1    5x4     0.00%       -",
        "left dense: conv           1  4x1x3    16.67%       -",
        "total                      6     64    53.12%",
        "total with these           8     96    37.50%",
    ]
