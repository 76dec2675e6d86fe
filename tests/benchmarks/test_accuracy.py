"""Check that the accuracy benchmark goes on where it was interrupted, and that its tables are right."""

import json
from itertools import product

import accuracy
import pytest
import scores
import tables
from commands import short_builtin  # noqa: F401, a fixture
from conftest import ROOT

from mixgpt.app import pipeline
from mixgpt.common.choices import ALLOCATIONS, SOLVERS

NAMES = "accuracy", "others", "spread", "gap", "effort", "paper", "families", "distance", "methods", "serving"


@pytest.mark.slow
def test_the_benchmark_goes_on_where_it_left_off(checkpoint_folder, monkeypatch, tmp_path, capsys):
    output = tmp_path / "accuracy.json"

    def benchmark(*targets):
        return accuracy.main([str(checkpoint_folder("llama")), "builtin", "--output", str(output),
                              "--methods", "magnitude", "wanda", "owl", "best", "--targets", *targets, "--dense",
                              "--seeds", "0", "0", "--eval", "builtin", "--nsamples", "4", "--seqlen", "32",
                              "--device", "cpu"])

    def cells():
        content = json.loads(output.read_text())
        return {(cell["method"], cell["target"]): cell for cell in content["cells"]}

    def interrupted(settings, run=pipeline.execute):
        if settings.solver == "wanda":
            raise KeyboardInterrupt
        return run(settings)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "execute", interrupted)
        assert benchmark("50%") == 130
    assert benchmark("50%", "--wbits", "4") == 2  # all runs quantize, the dense model's, too
    before = cells()
    assert list(before) == [("dense", "0%"), ("magnitude", "50%")]
    assert benchmark("50%", "2:4") == 0
    after = cells()
    assert after.items() >= before.items()  # seconds included: they were not measured again
    assert len(after) == 1 + 4 + 3  # no OWL at 2:4
    assert all(cell["sparsity"] == pytest.approx(0.5, abs=2e-4) for cell in list(after.values())[1:])
    assert all(0 < cell["distance"]["builtin"]["KL"] < 30 for cell in list(after.values())[1:])
    assert len({cell["figures"]["builtin"] for cell in after.values()}) == len(after)
    table = (tmp_path / "accuracy.md").read_text()
    assert table in capsys.readouterr().out and "| OWL | " in table and table.count("| best |") == 4
    assert "| best |  |  |" in table and " at - |" in table  # one seed has no spread, and SparseGPT no time
    assert "wanda" not in SOLVERS and "owl" not in ALLOCATIONS


def test_what_is_missing_is_told_with_the_time_of_cells_alike(tmp_path):
    cells = [{"command": str(n), "model": "m", "method": method, "seconds": seconds}
             for n, (method, seconds) in enumerate([("best", 3600), ("best", 7200), ("best", 0), ("wanda", 0)])]
    untimed = {"command": "untimed", "model": "m", "method": "best", "seconds": None}
    (tmp_path / "a.json").write_text(json.dumps({"cells": [*cells[:2], untimed]}))
    found = scores.Scores(tmp_path / "a.json", lambda _: "")
    assert found.hours(found.missing(cells)) == "1.5 h of pruning, and 1 of unknown time"
    assert found.hours(found.missing(cells[:3])) == "1.5 h of pruning"


def test_superseded_cells_are_marked_and_measured_again(tmp_path, monkeypatch):
    cells = [{"command": f"{method} {target} {seed}", "model": "m", "method": method, "target": target, "seed": seed,
              "figures": {"x": perplexity}, "seconds": 1.0, "sensitivity_seconds": 0.0, "peak_bytes": 1e9} | why
             for method, target, seed, perplexity, why in [
                 ("dense", "0%", 0, 10.0, {"superseded": "other test"}), ("sparsegpt", "50%", 0, 40.0, {}),
                 ("sparsegpt", "2:4", 0, 90.0, {}),
                 ("best", "50%", 0, 20.0, {"superseded": "other text"}), ("best", "50%", 1, 20.0, {}),
                 ("best", "2:4", 0, 30.0, {})]]
    written = tables.Measured("m", cells).tables()
    assert "| m: dense 10.0* | 50% | 2:4 |" in written["accuracy"]
    assert "| best | 20.0* | 30.0 |" in written["accuracy"] and "| SparseGPT | 40.0 | 90.0 |" in written["accuracy"]
    assert "| best | 0.0* |  |" in written["spread"] and "| best | 50%* | 50% |" in written["gap"]
    assert "| best | 20.0* at 1.0x | 30.0 at 1.0x |" in written["effort"]
    (tmp_path / "a.json").write_text(json.dumps({"cells": cells}))
    wanted = [{key: cell[key] for key in ("command", "model", "method", "target", "seed")} for cell in cells]
    monkeypatch.setattr(scores, "measure", lambda command: {"figures": {"x": 25.0}})
    scores.Scores(tmp_path / "a.json", lambda _: "").run(wanted)
    assert json.loads((tmp_path / "a.json").read_text())["cells"] == [
        cell | {"figures": {"x": 25.0}} if "superseded" in old else old
        for cell, old in zip(wanted, cells, strict=True)]


def test_the_picture_of_efforts_has_the_dense_model_and_earlier_versions_hollow(monkeypatch):
    monkeypatch.setattr(tables, "bytes_of", lambda figure, ending: [axis.lines for axis in figure.axes])
    cells = [{"method": method, "target": target, "seed": 0, "figures": {"x": perplexity}, "seconds": 1.0,
              "sensitivity_seconds": 0.0} | why
             for (method, perplexity, why), target in [(("dense", 10.0, {}), "0%"), *product(
                 [("sparsegpt", 40.0, {}), ("best", 20.0, {}), ("best-3", 15.0, {"superseded": "other text"})],
                 ("50%", "2:4"))]]
    for lines in tables.draw_efforts([tables.Measured("m", cells)]):
        drawn = {line.get_label(): list(line.get_ydata()) for line in lines}
        assert drawn["dense"] == [10.0, 10.0] and {20.0, 15.0} < set(drawn["best"])
        assert [list(line.get_ydata()) for line in lines if line.get_markerfacecolor() == "white"] == [[15.0]]


def test_what_is_measured_anew_replaces_what_was():
    cells = [{"model": "m", "method": "best", "target": "50%", "seed": seed, "command": f"llama.py m {text}", "n": n}
             for n, (seed, text) in enumerate([(0, "c4"), (1, "c4"), (0, "c4"), (0, "c4:1")])]
    assert sorted(cell["n"] for cell in tables.latest(cells)) == [1, 2, 3]


def test_distances_stand_beside_what_best_closes_of_them(monkeypatch):
    cells = [{"model": "m/a-1.5B.gguf", "target": target, "method": method, "seed": seed,
              "figures": {"x": perplexity, "y": 1.0}, "distance": {"x": {"KL": KL}, "y": {"KL": 2 * KL}},
              "command": f"llama.py m/a-1.5B.gguf {text} --seed {seed}"}
             for target, method, seed, KL, perplexity, text in [
                 ("0%", "dense", 0, 0, 10.0, "c4"), ("2:4", "sparsegpt", 0, 1.0, 40.0, "c4"),
                 ("2:4", "sparsegpt", 1, 2.0, 40.0, "c4"), ("2:4", "best", 0, 0.5, 20.0, "c4"),
                 ("2:4", "best", 1, 0.7, 20.0, "c4"), ("2:4", "best", 0, 0.8, 20.0, "c4:0.6,code:0.4"),
                 ("50%", "best", 0, 0.1, 11.0, "c4"), ("50%", "best", 1, 0.2, 11.0, "c4"),
                 ("50%", "best", 0, 0.3, 11.0, "c4:1"), ("50%", "best-3", 0, 0.05, 10.5, "c4")]]
    assert tables.distances(cells).splitlines()[2:] == [
        "| a-1.5B, 2:4 | 1.500 → 0.600, 60% | 3.000 → 1.200, 60% | 60% | 40.0 → 20.0, 50% |",
        "| a-1.5B, 2:4, c4:0.6,code:0.4 | 1.000 → 0.800, 20% | 2.000 → 1.600, 20% | 20% | 40.0 → 20.0, 50% |"]
    header, _, row = tables.methods_by_distance(cells).splitlines()
    assert dict(zip(header.split(" | "), row.split(" | "), strict=True)) == {
        "| model": "| a-1.5B", "magnitude": "", "Wanda": "", "SparseGPT": "", "MixGPT": "", "best": "0.10 / 0.20",
        "best, effort 3 |": "0.05 / 0.10 |"}
    monkeypatch.setattr(tables, "bytes_of", lambda figure, ending: [
        [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
        for axis in figure.axes])
    others = [cell | {"model": "m/b-7M.gguf"} for cell in cells]
    KL, perplexity = tables.draw_sizes(cells + others)
    assert KL == [("2:4", [7e6, 1.5e9], pytest.approx([60, 60]))]
    assert perplexity == [("2:4", [7e6, 1.5e9], pytest.approx([50, 50]))]


def test_the_tables_of_the_pages_have_their_places():
    text = "".join((ROOT / page).read_text() for page in tables.PAGES)
    for name in NAMES:
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- end of {name} -->") == 1
