"""Check that the accuracy benchmark goes on where it was interrupted, and that its tables are right."""

import json
import math

import accuracy
import pytest
import tables
from commands import short_builtin  # noqa: F401, a fixture
from conftest import ROOT

from mixgpt.app import pipeline
from mixgpt.common.choices import ALLOCATIONS, SOLVERS

NAMES = "accuracy", "spread", "gap", "effort", "paper", "families"


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_left_off(checkpoint_folder, monkeypatch, tmp_path, capsys):
    output = tmp_path / "accuracy.json"

    def benchmark(*targets):
        return accuracy.main([str(checkpoint_folder("llama")), "builtin", "--output", str(output),
                              "--methods", "magnitude", "wanda", "owl", "best", "--targets", *targets, "--seeds",
                              "0", "0", "--eval", "builtin", "--nsamples", "4", "--seqlen", "32", "--device", "cpu"])

    def cells():
        content = json.loads(output.read_text())
        return {(cell["method"], cell["target"]): cell for cell in content["cells"]}

    def interrupted(settings, run=pipeline.execute):
        if settings.solver == "wanda":
            raise KeyboardInterrupt
        if settings.gmp:  # another process has measured something meanwhile
            dense, = json.loads(output.read_text())["cells"]
            output.write_text(json.dumps({"cells": [dense, dense | {"command": "other", "method": "other"}]}))
        return run(settings)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "execute", interrupted)
        assert benchmark("50%") == 130
    assert benchmark("50%", "--wbits", "4") == 2  # all runs quantize, the dense model's, too
    before = cells()
    assert list(before) == [("dense", "0%"), ("magnitude", "50%"), ("other", "0%")]
    assert benchmark("50%", "2:4") == 0
    after = cells()
    assert after.items() >= before.items()  # seconds included: they were not measured again
    del after["other", "0%"]
    assert len(after) == 1 + 4 + 3  # no OWL at 2:4
    for (method, _), cell in after.items():
        assert math.isfinite(cell["figures"]["builtin"])
        # within half a weight of each tiny matrix
        assert method == "dense" or cell["sparsity"] == pytest.approx(0.5, abs=2e-4)
    assert len({cell["figures"]["builtin"] for cell in after.values()}) == len(after)
    table = (tmp_path / "accuracy.md").read_text()
    assert table in capsys.readouterr().out and "| OWL | " in table and table.count("| best |") == 4
    assert "| best |  |  |" in table and " at - |" in table  # one seed has no spread, and SparseGPT no time
    assert "wanda" not in SOLVERS and "owl" not in ALLOCATIONS


@pytest.mark.slow
def test_the_pages_get_means_spread_gaps_and_costs_of_each_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    values = {"sparsegpt": (40, 60, 80), "mixgpt": (30, 40, 50), "best-3": (20, 20, 20), "best-10": (15,),
              "wanda": (40, math.nan)}
    for page in tables.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("above\n" + "".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->\nbelow\n"
                                                        for name in NAMES))
    dense = {"method": "dense", "target": "0%", "seed": 0, "figures": {"wiki": 10.0, "c4": 20.0}, "seconds": 0,
             "sensitivity_seconds": 0, "peak_bytes": 1}
    cells = [dense, *(dense | {"method": method, "target": target, "seed": seed, "seconds": 30, "peak_bytes": 1.5e9,
                               "figures": {"wiki": value, "c4": 400.0 + seed},
                               "sensitivity_seconds": 7 * (method == "mixgpt" and not seed)}
                      | ({"reference_seconds": 10} if method == "best-3" else {})
                      for method, of_seeds in values.items() for target in ("50%", "2:4")
                      for seed, value in enumerate(of_seeds))]
    for model in ("a", "b"):
        (tmp_path / f"{model}.json").write_text(json.dumps({"cells": cells}))
    assert tables.main(["a.json"]) == 0  # without the others, whose tables stay
    assert (tmp_path / "README.md").read_text().count("\nold\n") == 2
    for name, (of_cells, _) in tables.BY_MODEL.items():
        measured = [dense | {"model": f"small/{model}", "method": method, "target": target, "seed": seed,
                             "figures": {"text": 10.0 * number + seed, "other": 7.0}}
                    for model in ("x", "y-1.5") for number, method in enumerate(of_cells)
                    for target in ("50%", "2:4")[:1 if name == "paper" or method in ("dense", "owl") else 2]
                    for seed in ([0] if method == "dense" else [0, 2])]
        (tmp_path / f"{name}.json").write_text(json.dumps({"cells": measured}))
    assert tables.main(["families.json", "b.json", "paper.json", "a.json"]) == 0
    for page in tables.PAGES:
        text = (tmp_path / page).read_text()
        assert "old" not in text and text.startswith("above\n") and text.count("\nbelow\n") == len(NAMES)
        assert text.index("b: dense") < text.index("a: dense")
        assert "| y-1.5 | 0.0 / 7.0 | 11.0 ± 1.4 / 7.0 ± 0.0 | 21.0 ± 1.4 / 7.0 ± 0.0 |" in text
        assert "| model | dense | Wanda | OWL | SparseGPT | MixGPT | best |" in text
        assert "| x | 0.00 | 11.00 / 11.00 | 21.00 | 31.00 / 31.00 |" in text
        assert "| b: dense 10.0 / 20.0 | 50% | 2:4 | cost at 50% |" in text
        assert text.count("| SparseGPT | 60.0 / 401 | 60.0 / 401 | 30 s, 1.5 GB |") == 2
        assert text.count("| MixGPT | 40.0 / 401 | 40.0 / 401 | 1.2x, 1.5 GB |") == 2
        assert text.count("| Wanda | nan / 400 | nan / 400 | 30 s, 1.5 GB |") == 2  # not the mean of the other seed
        assert text.count("| MixGPT | 10.0 / 1.0 | 10.0 / 1.0 |") == 2  # standard deviations
        closed = sum(1 - math.log(ours / 10) / math.log(walk / 10) for ours, walk in zip(
            values["mixgpt"], values["sparsegpt"], strict=True)) / 3
        assert text.count(f"| MixGPT | {closed:.0%} / 0% | {closed:.0%} / 0% |") == 2
        closed = 1 - math.log(15 / 10) / math.log(40 / 10)
        assert text.count(f"| best, effort 10 | {closed:.0%} / 0% | {closed:.0%} / 0% |") == 2
        assert text.count("| MixGPT | 30.0 / 400 at 1.2x | 30.0 / 400 at 1.2x |") == 2  # of seed 0
        assert text.count("| best, effort 3 | 20.0 / 400 at 3.0x | 20.0 / 400 at 3.0x |") == 2
    for picture in (tables.PICTURE, tables.EFFORT_PICTURE):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_the_pages_have_their_places():
    text = "".join((ROOT / page).read_text() for page in tables.PAGES)
    for name in NAMES:
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- end of {name} -->") == 1
