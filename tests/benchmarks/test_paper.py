"""Check the tables of the paper: their cells and the paper's own numbers."""

import math
from itertools import groupby

import paper
import pytest
import scores
from paper import TABLES, facts
from scores import DENSE, spread


def test_what_the_paper_reports_is_of_cells_that_there_are():
    known = facts()
    for (_, method, target, measure), (value, place, page) in known.items():
        table = TABLES[place.replace(" ", "")]
        assert (method, target) in (DENSE, *table.rows) and value > 0 and page == 4
        assert measure in ((*paper.TASKS, "average") if table.flags else ("wikitext2", "ptb", "c4"))
    assert len(known) == 141
    for place, rows in groupby(sorted(known, key=lambda key: known[key][1]), key=lambda key: known[key][1]):
        rows = list(rows)
        if place.startswith("table"):  # complete, but for the dense models that table 1 lacks
            found = {row[:3] for row in rows}
            models = {model for model, *_ in found}
            rows_per_model = len(TABLES[place.replace(" ", "")].rows) + (place != "table 1")
            assert len(found) == rows_per_model * len(models)
            assert len(rows) == len(found) * (5 if place == "table 3" else 3)
    for key, (value, *_) in known.items():
        if key[3] == "average":
            accuracies = [known[*key[:3], task][0] for task in paper.TASKS]
            assert value == pytest.approx(sum(accuracies) / 4, abs=0.051)


def test_means_and_standard_deviations_are_written_of_perplexities_beyond_all_numbers_too():
    assert [spread(values) for values in ([1, 2, 4], [3.0], [1.0, float("nan")], [2.0, float("inf")])] == [
        "2.33 ± 1.53", "3.00", "nan ± nan", "inf ± inf"]


def test_a_task_without_accuracies_has_no_figure_and_does_not_end_the_benchmark(monkeypatch):
    monkeypatch.setattr(scores.pipeline, "execute", lambda settings: {
        "perplexity": {"dense": {}}, "tasks": {"dense": {"piqa": {"acc": 0.5}, "gsm8k": {"exact_match": 0.1}}},
        "sparsity": 0.0, "seconds": {}, "peak_memory": {"host": 1}, "program": {"commit": None}})
    figures = scores.measure("llama.py m c4")["figures"]
    assert figures["piqa"] == 50 and math.isnan(figures["gsm8k"])
