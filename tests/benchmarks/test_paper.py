"""Check the tables of the paper: their cells, the paper's own numbers, and that an interrupted table goes on."""

import json
from itertools import groupby

import paper
import pytest
import scores
from commands import run, short_builtin  # noqa: F401, a fixture
from paper import TABLES, facts, markdown
from scores import DENSE

from mixgpt.app import pipeline

SMALL = ["--eval-limit", "2", "--nsamples", "4", "--seqlen", "32", "--sensitivity", "fisher", "--device", "cpu"]
@pytest.fixture
def command(checkpoint_folder, tmp_path):
    """Give a function that runs a table on a tiny model. Returns the exit status."""
    def command(table, *arguments, model="llama", output=tmp_path / "paper.json", eval=("--eval", "builtin")):
        return paper.main([table, str(checkpoint_folder(model)), "--dataset", "builtin", "--output", str(output),
                           *SMALL, *eval, *arguments])

    return command


@pytest.fixture
def runs(monkeypatch):
    """Give the settings of every run of the pipeline."""
    made, real = [], pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda family, settings: made.append(settings) or real(family, settings))
    return made


def cells_of(path):
    return {(cell["method"], cell["target"], cell["seed"]): cell for cell in json.loads(path.read_text())["cells"]}


def rows_of(text):
    """Return {(method, target): the other cells} of a table in Markdown, and its header."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return lines[0], {tuple(line[:2]): line[2:] for line in lines[2:]}


def test_an_interrupted_table_goes_on_and_is_that_of_a_whole_run(command, runs, tmp_path, monkeypatch, capsys):
    rows = (("magnitude", "50%"), ("sparsegpt", "50%"), ("gptq", "4bit"))
    monkeypatch.setitem(TABLES, "table4", paper.Table("shorter", rows))
    counting = pipeline.run
    with monkeypatch.context() as patch:
        def interrupt(family, settings):
            if len(runs) == 2:
                raise KeyboardInterrupt
            return counting(family, settings)

        patch.setattr(pipeline, "run", interrupt)
        assert command("table4") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "paper.py: interrupted"
    before = cells_of(tmp_path / "paper.json")
    assert [method for method, *_ in before] == ["dense", "magnitude"]
    assert command("table4") == 0 and len(runs) == 4
    assert cells_of(tmp_path / "paper.json").items() >= before.items()  # seconds included
    table = capsys.readouterr().out
    assert command("table4", output=tmp_path / "whole.json") == 0
    assert capsys.readouterr().out == table == (tmp_path / "paper.md").read_text()
    assert list(tmp_path.glob("*.partial")) == []


def test_the_papers_number_and_the_difference_stand_beside_ours(command, checkpoint_folder, tmp_path, monkeypatch,
                                                                capsys):
    (tmp_path / "facts.csv").write_text(
        "# a comment\nplace,page,model,method,target,measure,value\n"
        f"table 2,4,{checkpoint_folder('llama').name.upper()}-hf,sparsegpt,50%,builtin,100\n"
        "table 1,3,another,magnitude,50%,builtin,7\n")
    monkeypatch.setattr(paper, "FACTS", tmp_path / "facts.csv")
    assert command("table2") == 0
    text = capsys.readouterr().out
    header, rows = rows_of(text)
    ours = cells_of(tmp_path / "paper.json")["sparsegpt", "50%", 0]
    value = ours["figures"]["builtin"]
    assert text.startswith("table2, methods: --dataset builtin --eval-limit 2 --nsamples 4 --seqlen 32 ")
    assert header == [checkpoint_folder("llama").name, "target", "builtin", "paper", "difference", "sparsity", "seeds"]
    assert rows["sparsegpt", "50%"] == [f"{value:.2f}", "100", f"{value - 100:+.2f}", f"{100 * ours['sparsity']:.3f}%",
                                        "1"]
    assert rows["magnitude", "50%"][1:3] == ["-", "-"]
    assert text.splitlines()[-1] == "paper: arXiv 2310.09499, table 2 on page 4"


def test_the_table_has_the_mean_of_seeds_and_what_is_missing():
    cells = [{"model": "meta-llama/Llama-2-13b-hf", "method": "mixgpt", "target": "50%", "seed": seed,
              "figures": {"ptb": 50.0 + 2 * seed}, "sparsity": 0.5, "seconds": 1} for seed in (0, 1)]
    header, rows = rows_of(markdown("table2", TABLES["table2"].with_methods([]), cells))
    assert header[0] == "Llama-2-13b-hf"
    assert rows["mixgpt", "50%"] == ["51.00 ± 1.41", "53.03", "-2.03", "50.000 ± 0.000%", "2"]
    assert rows["sparsegpt", "50%"] == ["-", "59.03", "-", "-", "0"]


def test_a_dry_run_prints_the_missing_command_lines_and_writes_nothing(command, runs, tmp_path, capsys):
    assert command("table2", "--dry-run") == 0 and runs == [] and list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python llama.py ") and " builtin --eval-limit 2 " in line for line in lines)
    assert [line.partition("--eval builtin ")[2] for line in lines] == [
        "--sparsity 0.0 --seed 0", "--gmp --sparsity 0.5 --seed 0", "--sparsity 0.5 --seed 0",
        "--sparsity-way weight-level --saliency isc --sparsity 0.5 --seed 0"]


def test_tasks_without_accuracy_are_refused():
    assert scores._accuracy("piqa", {"acc": 0.25, "acc_norm": 0.5}) == 0.5
    assert scores._accuracy("truthfulqa_mc2", {"acc": 0.25}) == 0.25
    with pytest.raises(scores.InputError, match="--tasks wikitext: reports no accuracy"):
        scores._accuracy("wikitext", {"word_perplexity": 9.0})


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
