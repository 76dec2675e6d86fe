"""Check the tables of the paper: their cells and the paper's own numbers."""

import json
from itertools import groupby

import paper
import pytest
import scores
from commands import SMALL, short_builtin  # noqa: F401, a fixture
from paper import TABLES, facts
from scores import DENSE


def rows_of(text):
    """Return {(method, target): the other cells} of a table in Markdown, and its header."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return lines[0], {tuple(line[:2]): line[2:] for line in lines[2:]}


def test_the_papers_number_and_the_difference_stand_beside_ours(checkpoint_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "facts.csv").write_text(
        "# a comment\nplace,page,model,method,target,measure,value\n"
        f"table 2,4,{checkpoint_folder('llama').name.upper()}-hf,sparsegpt,50%,builtin,100\n"
        "table 1,3,another,magnitude,50%,builtin,7\n")
    monkeypatch.setattr(paper, "FACTS", tmp_path / "facts.csv")
    assert paper.main(["table2", str(checkpoint_folder("llama")), "--dataset", "builtin", "--output",
                       str(tmp_path / "paper.json"), "--sensitivity", "fisher", *SMALL]) == 0
    text = capsys.readouterr().out
    header, rows = rows_of(text)
    cells = {cell["method"]: cell for cell in json.loads((tmp_path / "paper.json").read_text())["cells"]}
    value = cells["sparsegpt"]["figures"]["builtin"]
    assert text.startswith("table2, methods: --dataset builtin --sensitivity fisher --nsamples 4 --seqlen 32 ")
    assert header == [checkpoint_folder("llama").name, "target", "builtin", "paper", "difference", "sparsity", "seeds"]
    assert rows["sparsegpt", "50%"] == [f"{value:.2f}", "100", f"{value - 100:+.2f}",
                                        f"{100 * cells['sparsegpt']['sparsity']:.3f}%", "1"]
    assert rows["magnitude", "50%"][1:3] == ["-", "-"]
    assert text.splitlines()[-1] == "paper: arXiv 2310.09499, table 2 on page 4"


def test_what_the_paper_reports_is_of_cells_that_there_are():
    known = facts()
    for (_, method, target, measure), (value, place, page) in known.items():
        table = TABLES[place.replace(" ", "")]
        assert (method, target) in (DENSE, *table.rows) and value > 0 and page == "4"
        assert measure in ((*paper.TASKS, scores.AVERAGE) if table.flags else ("wikitext2", "ptb", "c4"))
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
        if key[3] == scores.AVERAGE:
            accuracies = [known[*key[:3], task][0] for task in paper.TASKS]
            assert value == pytest.approx(sum(accuracies) / 4, abs=0.051)
