"""Check that the accuracy benchmark goes on where it was interrupted, and that its tables are right."""

import gzip
import json
import math

import accuracy
import pytest
from commands import short_builtin  # noqa: F401, a fixture

import datautils
from mixgpt.app import pipeline
from mixgpt.common.choices import ALLOCATIONS, SOLVERS


def test_the_benchmark_goes_on_where_it_left_off(checkpoint_folder, monkeypatch, tmp_path, capsys):
    def benchmark(*targets):
        return accuracy.main([str(checkpoint_folder("llama")), "builtin", "--output", str(tmp_path / "accuracy.json"),
                              "--methods", "magnitude", "wanda", "owl-wanda", "best", "--targets", *targets, "--seeds",
                              "0", "--eval", "builtin", "--nsamples", "4", "--seqlen", "32", "--device", "cpu"])

    def cells():
        content = json.loads((tmp_path / "accuracy.json").read_text())
        return {(cell["method"], cell["target"]): cell for cell in content["cells"]}

    def interrupted(settings, run=pipeline.run):
        if settings.solver == "wanda":
            raise KeyboardInterrupt
        return run(settings)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", interrupted)
        assert benchmark("50%") == 130
    before = cells()
    assert list(before) == [("dense", "0%"), ("magnitude", "50%")]
    assert benchmark("50%", "2:4") == 0
    after = cells()
    assert after.items() >= before.items()  # seconds included: they were not measured again
    assert len(after) == 1 + 4 + 3  # no OWL at 2:4
    for (method, _), cell in after.items():
        assert math.isfinite(cell["figures"]["builtin"])
        # within half a weight of each tiny matrix
        assert method == "dense" or cell["sparsity"] == pytest.approx(0.5, abs=2e-4)
    assert len({cell["figures"]["builtin"] for cell in after.values()}) == len(after)
    table = (tmp_path / "accuracy.md").read_text()
    assert table in capsys.readouterr().out and "| owl-wanda | " in table and table.count("| best |") == 2
    assert "wanda" not in SOLVERS and "owl" not in ALLOCATIONS


def test_the_tables_average_seeds_and_gaps_and_add_the_sensitivities_that_later_runs_read():
    cells = [{"method": method, "target": "0%" if method == "dense" else "50%", "seed": seed,
              "figures": {"c4": value}, "sparsity": 0.5, "seconds": 10,
              "sensitivity_seconds": 5.0 if (method, seed) == ("mixgpt", 0) else 0.0}
             for method, seed, value in [("dense", 0, 4), ("sparsegpt", 0, 16), ("sparsegpt", 1, 64), ("best", 0, 8),
                                         ("best", 1, 16), ("mixgpt", 0, 32)]]
    cells.append(cells[-1] | {"target": "60%", "sensitivity_seconds": 0.0})
    text = accuracy.markdown(cells)
    assert text.splitlines()[::2][:2] == ["| 0% | c4 | gap closed | sparsity | seconds | seeds |",
                                          "| dense | 4.00 | - | 50.000% | 10 | 1 |"]
    assert "| sparsegpt | 40.00 ± 33.94 | 0% | 50.000 ± 0.000% | 10 | 2 |" in text
    assert "| best | 12.00 ± 5.66 | 50% | 50.000 ± 0.000% | 10 | 2 |" in text
    assert "| mixgpt | 32.00 | -50% | 50.000% | 15 | 1 |" in text
    assert "| mixgpt | 32.00 | - | 50.000% | 15 | 1 |" in text


def test_held_out_documents_are_never_calibrated_on(tmp_path, tokenizer):
    words = [f"{number} " * 100 for number in range(10)]  # document n holds nothing but the number n
    (tmp_path / "en").mkdir()
    with gzip.open(tmp_path / "en" / "c4-train.00000-of-01024.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in words)
    with accuracy.heldout("c4", tmp_path) as name:
        tokens, _ = datautils.calibration_samples(name, 50, 16, 0, tokenizer)
        tests, _ = datautils.test_tokens(name, 16, tokenizer)
    calibration = set(tokenizer.decode(tokens.flatten(), skip_special_tokens=True).split())
    assert set("01234567") <= calibration and not calibration & {"8", "9"}
    assert "8" in tokenizer.decode(tests.flatten()) and "0" not in tokenizer.decode(tests.flatten())
