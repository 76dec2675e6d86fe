"""Check the clock and the tables."""



from mixgpt.app.report import perplexity_table, sparsity_table
from mixgpt.evaluation.sparsity import MatrixSparsity
from mixgpt.pruning.targets import Outcome


def test_sparsity_is_weighted_by_size_and_errors_are_averaged():
    a, b, c = ((0, "a", (2, 4), 4), (0, "b", (3, 10), 0), (1, "a", (2, 4), 8))
    matrices = [MatrixSparsity(*a), MatrixSparsity(*b), MatrixSparsity(*c)]
    outcomes = {(0, "a"): Outcome(0.1, 0.01), (1, "a"): Outcome(0.3, 0.01)}
    assert sparsity_table(matrices, outcomes).splitlines() == [
        "matrix kind  count  shape  sparsity   error",
        "-----------  -----  -----  --------  ------",
        "a                2    2x4    75.00%  20.00%",
        "b                1   3x10     0.00%       -",
        "total            3     46    26.09%",
    ]


def test_perplexities_stand_in_columns_by_dataset():
    assert perplexity_table({"dense": {"c4": 12.345, "ptb": 100.0}, "SparseGPT": {"c4": 20.0, "ptb": 7.0}}) == (
        "perplexity     c4     ptb\n"
        "----------  -----  ------\n"
        "dense       12.35  100.00\n"
        "SparseGPT   20.00    7.00")
