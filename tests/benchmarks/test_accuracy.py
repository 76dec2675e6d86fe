"""Check that the accuracy benchmark runs the command lines it says, goes on, and that its tables are right."""

import gzip
import json
import math
import shlex

import accuracy
import pytest
import scores
from commands import run, short_builtin  # noqa: F401, a fixture
from conftest import FAMILIES
from peers import registered

import datautils
from mixgpt.app import pipeline
from mixgpt.app.choices import ALLOCATIONS, SOLVERS

SMALL = ["--eval", "builtin", "--eval-limit", "4", "--nsamples", "4", "--seqlen", "32", "--device", "cpu"]


@pytest.fixture
def benchmark(checkpoint_folder, tmp_path):
    """Give a function that runs the benchmark on a tiny model. Returns the exit status."""
    return lambda *arguments: accuracy.main([str(checkpoint_folder("llama")), "builtin", "--output",
                                             str(tmp_path / "accuracy.json"), *arguments])


@pytest.fixture
def cells(tmp_path):
    """Give a function that returns {(method, target, seed): cell} of the file of `benchmark`."""
    return lambda: {(cell["method"], cell["target"], cell["seed"]): cell for cell in json.loads(
        (tmp_path / "accuracy.json").read_text())["cells"]}


def test_the_benchmark_goes_on_where_it_left_off(benchmark, cells, monkeypatch, tmp_path, capsys):
    real = pipeline.run

    def interrupted(family, settings):
        if settings.solver == "wanda":
            raise KeyboardInterrupt
        return real(family, settings)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", interrupted)
        assert benchmark("--seeds", "0", "--targets", "50%", *SMALL) == 130
    before = cells()
    assert [method for method, *_ in before] == ["dense", "magnitude"]
    assert benchmark("--seeds", "0", "--targets", "50%", "2:4", *SMALL) == 0
    after = cells()
    assert after.items() >= before.items()  # seconds included: they were not measured again
    assert len(after) == 1 + 7 + 5  # no OWL at 2:4
    for (method, *_), cell in after.items():
        assert math.isfinite(cell["figures"]["builtin"])
        # within half a weight of each tiny matrix
        assert method == "dense" or cell["sparsity"] == pytest.approx(0.5, abs=2e-4)
    assert len({cell["figures"]["builtin"] for (_, target, _), cell in after.items() if target == "50%"}) == 7
    table = (tmp_path / "accuracy.md").read_text()
    assert table in capsys.readouterr().out and "| owl-wanda | " in table and table.count("| best |") == 2
    assert "wanda" not in SOLVERS and "owl" not in ALLOCATIONS


@pytest.mark.parametrize("method, target", [("best", "2:4"), ("owl-wanda", "60%")])
def test_a_cell_is_the_result_of_its_command_line(method, target, benchmark, cells, tmp_path):
    assert benchmark("--methods", method, "--targets", target, "--seeds", "3", *SMALL) == 0
    cell = cells()[method, target, 3]
    script, *arguments = shlex.split(cell["command"])
    assert script == "llama.py" and arguments[-2:] == ["--seed", "3"]
    with registered():
        assert run(FAMILIES["llama"][0], *arguments, "--record", tmp_path / "record.json") == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert [cell["figures"]] == list(record["perplexity"].values()) and cell["sparsity"] == record["sparsity"]


def test_other_flags_are_other_cells(benchmark, cells, tmp_path):
    few = ["--methods", "magnitude", "--targets", "50%", "--seeds", "0"]
    assert benchmark(*few, *SMALL) == 0
    assert benchmark(*few, *SMALL, "--seqlen", "16") == 0
    assert len(json.loads((tmp_path / "accuracy.json").read_text())["cells"]) == 4
    text = (tmp_path / "accuracy.md").read_text()
    assert f"{cells()['magnitude', '50%', 0]['figures']['builtin']:.2f}" in text and text.count("magnitude") == 1


def test_the_tables_average_seeds_and_gaps_and_add_the_sensitivities_that_later_runs_read():
    cells = [{"method": method, "target": "50%", "seed": seed, "figures": {"c4": value}, "sparsity": 0.5,
              "seconds": 10, "sensitivity_seconds": 5.0 if (method, seed) == ("mixgpt", 0) else 0.0}
             for method, seed, value in [("dense", 0, 4), ("sparsegpt", 0, 16), ("sparsegpt", 1, 64), ("best", 0, 8),
                                         ("best", 1, 16), ("mixgpt", 0, 32)]]
    cells.append(cells[-1] | {"target": "60%", "sensitivity_seconds": 0.0})
    text = accuracy.markdown(cells)
    assert text.startswith("dense: c4 4.00\n")
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


def test_a_file_that_holds_something_else_is_refused_in_one_line(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.json").write_text("[]")
    assert benchmark(*SMALL, "--output", "notes.json") == 2
    assert capsys.readouterr().err == ("accuracy.py: error: --output notes.json: exists and holds no cells of this "
                                       "benchmark; name another file\n")


def test_targets_are_flags():
    flags = {"50%": "--sparsity 0.5", "2:4": "--prunen 2 --prunem 4", "4bit": " --wbits 4",
             "70%+3bit": "--sparsity 0.7 --wbits 3"}
    assert {target: scores.flags_of(target) for target in flags} == flags
