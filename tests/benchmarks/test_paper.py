"""Check the tables of the paper: cells against the family scripts and the other benchmark, the paper's own numbers."""

import json
import re
from itertools import groupby
from pathlib import Path

import accuracy
import paper
import paper_tables
import pytest
from commands import run, short_builtin  # noqa: F401, a fixture
from conftest import CPU, FAMILIES, make
from paper_tables import ADDED, DENSE, TABLES, facts, markdown, options_of, plain
from paper_time import Size, estimate, operations
from peers import registered

import datautils
from mixgpt.app import pipeline
from mixgpt.app.choices import ALLOCATIONS, SOLVERS
from mixgpt.app.settings import PRESETS, Settings

SMALL = ["--eval-limit", "2", "--nsamples", "4", "--seqlen", "32", "--sensitivity", "fisher", "--device", "cpu"]
TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


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


@pytest.mark.parametrize("table, method, target, flags", [
    ("table1", "mixgpt", "50%", ["--sparsity", ".5", "--preset", "mixgpt"]),
    ("table4", "sparsegpt", "50%+4bit", ["--preset", "sparsegpt", "--sparsity", ".5", "--wbits", "4"]),
    ("table4", "gptq", "3bit", ["--wbits", "3"])])
def test_a_cell_is_what_the_family_script_reports(table, method, target, flags, command, checkpoint_folder, tmp_path,
                                                  monkeypatch):
    monkeypatch.setitem(TABLES, table, paper_tables.Table(table, ((method, target),)))
    assert command(table) == 0
    dense, cell = cells_of(tmp_path / "paper.json").values()
    record = tmp_path / "record.json"
    assert run(FAMILIES["llama"][0], checkpoint_folder("llama"), "builtin", *SMALL, "--eval", "builtin", *flags,
               "--dense", "--record", record) == 0
    found = json.loads(record.read_text())
    assert [dense["figures"], cell["figures"]] == list(found["perplexity"].values())
    assert cell["sparsity"] == found["sparsity"] and dense["method"] == "dense" and dense["sparsity"] < 0.01


def test_every_method_gives_what_the_other_benchmark_measures_in_memory(command, tokenizer, tmp_path):
    assert command("table2", "--methods", *ADDED) == 0
    cells = cells_of(tmp_path / "paper.json")
    family, model = make("llama")
    tokens, _ = datautils.calibration_samples("builtin", 4, 32, 0, tokenizer)
    tests = {"builtin": datautils.test_tokens("builtin", 32, tokenizer)[0][:2]}
    calibration = accuracy.Calibration(model, family, tokens, 0, 2, CPU)
    for name in ("magnitude", "wanda", "owl-sparsegpt", "sparsegpt", "mixgpt", "best"):
        theirs = accuracy.measure(accuracy.METHODS[name], "50%", calibration, tests)
        ours = cells[name.removesuffix("-sparsegpt"), "50%", 0]
        assert ours["figures"]["builtin"] == pytest.approx(theirs["perplexity"]["builtin"], rel=1e-3), name
        assert ours["sparsity"] == pytest.approx(theirs["sparsity"], abs=1e-6), name
    assert len(cells) == 7 and len({cell["figures"]["builtin"] for cell in cells.values()}) == 7
    assert "wanda" not in SOLVERS and "owl" not in ALLOCATIONS


def test_an_interrupted_table_goes_on_and_is_that_of_a_whole_run(command, runs, tmp_path, monkeypatch, capsys):
    rows = (("magnitude", "50%"), ("sparsegpt", "50%"), ("gptq", "4bit"))
    monkeypatch.setitem(TABLES, "table4", paper_tables.Table("shorter", rows))
    counting = pipeline.run
    with monkeypatch.context() as patch:
        def interrupt(family, settings):
            if len(runs) == 2:
                raise KeyboardInterrupt
            return counting(family, settings)

        patch.setattr(pipeline, "run", interrupt)
        assert command("table4") == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"paper.py: interrupted; what was measured is in {tmp_path / 'paper.json'}; the same command goes on"
    before = cells_of(tmp_path / "paper.json")
    assert [method for method, *_ in before] == ["dense", "magnitude"]
    assert command("table4") == 0 and len(runs) == 4
    assert cells_of(tmp_path / "paper.json").items() >= before.items()  # seconds included
    table = capsys.readouterr().out
    assert command("table4", output=tmp_path / "whole.json") == 0
    assert capsys.readouterr().out == table == (tmp_path / "paper.md").read_text()
    assert list(tmp_path.glob("*.partial")) == []


def test_tables_share_cells_and_methods_added_later_measure_no_other(command, runs):
    assert command("table2") == 0 and len(runs) == 4
    assert command("table2", "--methods", "wanda") == 0
    assert [settings.solver for settings in runs[4:]] == ["wanda"]
    assert command("table1") == 0
    assert [(settings.sparsity_way, settings.saliency) for settings in runs[5:]] == [
        ("uniform", "isc"), ("weight-level", "obs")]


def test_the_sensitivities_of_a_seed_are_computed_once(command, tmp_path, monkeypatch):
    from mixgpt.allocation import traces

    computed, real = [], traces.hessian_traces
    monkeypatch.setattr(traces, "hessian_traces", lambda *given: computed.append(given) or real(*given))
    rows = (("layer-level", "50%"), ("mixgpt", "50%"))
    monkeypatch.setitem(TABLES, "ablations", paper_tables.Table("two of them", rows))
    assert command("ablations", "--seeds", "0", "1") == 0
    assert len(computed) == 2 and len(cells_of(tmp_path / "paper.json")) == 1 + 4


def test_the_papers_number_and_the_difference_stand_beside_ours(command, checkpoint_folder, tmp_path, monkeypatch,
                                                                capsys):
    (tmp_path / "facts.csv").write_text(
        "# a comment\nplace,page,model,method,target,measure,value\n"
        f"table 2,4,{checkpoint_folder('llama').name.upper()}-hf,sparsegpt,50%,builtin,100\n"
        "table 1,3,another,magnitude,50%,builtin,7\n")
    monkeypatch.setattr(paper_tables, "FACTS", tmp_path / "facts.csv")
    assert command("table2") == 0
    text = capsys.readouterr().out
    header, rows = rows_of(text)
    ours = cells_of(tmp_path / "paper.json")["sparsegpt", "50%", 0]
    value = ours["figures"]["builtin"]
    assert text.startswith("table2, methods: dataset builtin, nsamples 4, seqlen 32, ")
    assert header == [checkpoint_folder("llama").name, "target", "builtin", "paper", "difference", "sparsity", "seeds"]
    assert rows["sparsegpt", "50%"] == [f"{value:.2f}", "100", f"{value - 100:+.2f}", f"{100 * ours['sparsity']:.3f}%",
                                        "1"]
    assert rows["magnitude", "50%"][1:3] == ["-", "-"]
    assert text.splitlines()[-1] == "paper: arXiv 2310.09499, table 2 on page 4"


def test_the_table_has_the_mean_of_seeds_and_what_is_missing():
    measured = {"eval_limit": 3, "texts": {"ptb": "x"}}
    cells = [{"model": "Llama-2-13b-hf", "measured": measured, "method": "mixgpt", "target": "50%", "seed": seed,
              "figures": {"ptb": 50.0 + 2 * seed}, "sparsity": 0.5, "seconds": 1} for seed in (0, 1)]
    other = cells[0] | {"measured": {"eval_limit": 1, "texts": {"ptb": "y"}}, "figures": {"ptb": 9.0}}
    content = {"setup": {"nsamples": 128, "seqlen": None}, "dense": {}, "cells": [*cells, other]}
    text = markdown("table2", {"Llama-2-13b-hf": measured}, [], content)
    _, rows = rows_of(text)
    assert rows["mixgpt", "50%"] == ["51.00 ± 1.41", "53.03", "-2.03", "50.000 ± 0.000%", "2"]
    assert rows["sparsegpt", "50%"] == ["-", "59.03", "-", "-", "0"]
    assert text.startswith("table2, methods: nsamples 128, eval_limit 3\n") and "seqlen" not in text


def test_a_dry_run_lists_what_is_missing_and_writes_nothing(command, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("paper_time.rate", lambda *_: 1e9)
    assert command("table2", "--dry-run") == 0 and runs == [] and list(tmp_path.iterdir()) == []
    listed = capsys.readouterr().out
    assert re.findall(r"^\S+ +(\S+) +(\S+) +0 +\d+$", listed, re.M) == [
        ("dense", "0%"), ("magnitude", "50%"), ("sparsegpt", "50%"), ("mixgpt", "50%")]
    assert "\n4 cells, about 0.00 h" in listed
    assert command("table2") == 0
    held = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert command("table2", "--methods", "owl", "--dry-run") == 0
    assert re.findall(r"^\S+ +(\S+) +50% +0 +\d+$", capsys.readouterr().out, re.M) == ["owl"]
    assert held == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_estimates_go_by_the_cells_that_were_measured(monkeypatch):
    size = Size(((4, 8), (16, 4)), 10, 32, 100)
    dense, pruned, mixed = (Settings("m", "c4", nsamples=2, **options) for options in (
        {}, {"sparsity": 0.5}, {"sparsity": 0.5, "sparsity_way": "weight-level", "sensitivity": "fisher"}))
    forward = 2 * (4 * 8 + 16 * 4)
    evaluation = (forward + 20) * 100
    assert operations(dense, size) == evaluation
    assert operations(pruned, size) == evaluation + 2 * forward * 64 + (
        64 * 64 + 4 * 64 + 512) + (16 * 64 + 16 * 16 + 64)
    written = Settings("m", "c4", nsamples=2, sparsity=0.5, synthetic=1)
    assert operations(written, size) - operations(pruned, size) == (forward + 20) * 64 + 2 * forward * 64 + (
        64 * 64 + 16 * 64)
    distilled = Settings("m", "c4", nsamples=2, sparsity=0.5, distill=0.5)  # written, then forward and back
    assert operations(distilled, size) - operations(pruned, size) == 32 * (forward + 20 + 3 * forward + 80)
    done = [("dense", operations(dense, size), 3.0), ("sparsegpt", operations(pruned, size), 8.0)]
    assert estimate(pruned, size, "sparsegpt", done, False) == pytest.approx(8.0)
    assert estimate(dense, size, "dense", done[:1], False) == pytest.approx(3.0)
    assert estimate(mixed, size, "mixgpt", done[1:], True) == pytest.approx(
        8.0 * (1 + 4 * (forward + 20) * 64 / operations(pruned, size)))
    monkeypatch.setattr("paper_time.rate", lambda *_: 1000.0)
    assert estimate(dense, size, "dense", [], False) == pytest.approx(evaluation / 1000)


def test_tasks_are_those_of_the_family_script(command, checkpoint_folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"what is {word}?", "choices": ["a list", "a number of them"], "label": number % 2}
            for number, word in enumerate(("one", "import", "None"))]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    tasks = ["--tasks", "words", "--tasks_dir", str(tmp_path)]
    small = [each for each in SMALL if each not in ("--eval-limit", "2")]
    shared = ["--dataset", "builtin", *small, *tasks, "--output", str(tmp_path / "tasks.json")]
    assert paper.main(["table3", str(checkpoint_folder("opt")), *shared, "--limit", "2"]) == 0
    header, table = rows_of(capsys.readouterr().out)
    assert header[2:4] == ["words", "average"] and list(table) == [DENSE, *TABLES["table3"].rows]
    record = tmp_path / "record.json"
    assert run(FAMILIES["opt"][0], checkpoint_folder("opt"), "builtin", *small, "--eval", *tasks, "--limit", "2",
               "--preset", "mixgpt", "--sparsity", ".5", "--record", record) == 0
    (found,) = json.loads(record.read_text())["tasks"].values()
    expected = found["words"]["acc_norm"]
    assert cells_of(tmp_path / "tasks.json")["mixgpt", "50%", 0]["figures"] == {
        "words": 100 * expected, "average": 100 * expected}


def test_tasks_without_accuracy_are_refused():
    assert paper._accuracy("piqa", {"acc": 0.25, "acc_norm": 0.5}) == 0.5
    assert paper._accuracy("truthfulqa_mc2", {"acc": 0.25}) == 0.25
    with pytest.raises(paper.InputError, match="--tasks wikitext: reports no accuracy"):
        paper._accuracy("wikitext", {"word_perplexity": 9.0})


@pytest.mark.parametrize("arguments, line", [
    (["--methods", "magic"], "argument --methods: invalid choice: 'magic' (choose from 'magnitude', 'wanda', 'owl', "
                             "'best')"),
    (["--output", "no/such.txt"], "--output no/such.txt: must end in .json"),
    (["--output", "/proc/paper.json"], "--output /proc/paper.json: cannot be written"),
    (["--output", "other.json"], "--output other.json: is not a file of scores, and not replaced; name another file"),
    (["--output", "notes.json"], "--output notes.md: is not a table of scores, and not replaced; name another file"),
    (["--seeds", "-1"], "--seed -1: must be at least 0 and at most"),
    (["--tasks", "piqa"], "--tasks: table1 is about saliency and allocation, not tasks"),
    (["--eval"], "--eval: names no text to measure perplexity on"),
    (["--nsamples", "0"], "--nsamples 0: must be at least 1"),
    (["--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
    (["--dtype", "bfloat16"], "holds cells of another setup (dtype: auto there, bfloat16 here); name another file"),
])
def test_what_cannot_be_used_gives_one_line(arguments, line, command, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"mine": 1}')
    Path("notes.md").write_text("table1, of my own")
    setup = {"dataset": "builtin", "nsamples": 4, "seqlen": 32, "dtype": "auto", "sensitivity": "fisher", "nprobes": 1}
    Path("paper.json").write_text(json.dumps({"setup": setup, "dense": {}, "cells": []}))
    assert command("table1", *arguments) == 2 and runs == []
    errors = capsys.readouterr().err
    assert errors.startswith("paper.py: error: ") and errors.count("\n") == 1 and line in errors


@pytest.mark.parametrize("other, line", [
    ("./nothing", "model ./nothing: no such file or folder"),
    ("nobody/nothing", "model nobody/nothing: "),
    ("elsewhere/checkpoint-llama", "MODEL checkpoint-llama: is the name of two models, which the table would not tell "
                                   "apart")])
def test_models_that_cannot_be_used_give_one_line(other, line, checkpoint_folder, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models = [str(checkpoint_folder("llama")), other]
    assert paper.main(["table1", *models, "--dataset", "builtin", *SMALL, "--eval", "builtin"]) == 2 and runs == []
    errors = capsys.readouterr().err
    assert errors.startswith(f"paper.py: error: {line}") and errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_other_weights_of_the_same_name_are_refused(command, runs, tmp_path, capsys):
    assert command("table2") == 0
    path = tmp_path / "paper.json"
    content = json.loads(path.read_text())
    (identity,), content["cells"] = content["dense"].values(), content["cells"][:2]
    identity["weights"] = "others"
    path.write_text(json.dumps(content, indent=1))
    count = len(runs)
    assert command("table2") == 2 and len(runs) == count
    assert capsys.readouterr().err.splitlines()[-1].endswith("with other weights; name another file")


def test_what_the_paper_reports_is_of_cells_that_there_are():
    known = facts()
    with registered():
        for (_, method, target, measure), (value, place, page) in known.items():
            table = TABLES[place.replace(" ", "")]
            assert (method, target) in (DENSE, *table.rows) and value > 0 and page == "4"
            assert measure in ((*paper_tables.TASKS, paper_tables.AVERAGE) if table.kind == "tasks" else
                               ("wikitext2", "ptb", "c4"))
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
        if key[3] == paper_tables.AVERAGE:
            scores = [known[*key[:3], task][0] for task in paper_tables.TASKS]
            assert value == pytest.approx(sum(scores) / 4, abs=0.051)


def test_names_of_models_are_compared_without_what_hubs_write_differently():
    same = [("LLaMA-7B", "huggyllama/llama-7b"), ("LLaMA-2-13B", "meta-llama/Llama-2-13b-hf"),
            ("Baichuan-13B", "baichuan-inc/Baichuan-13B-Base"), ("Baichuan-7B", "models/Baichuan-7B")]
    assert all(plain(one) == plain(other) for one, other in same)
    assert len({plain(name) for name in ("LLaMA-7B", "LLaMA-2-7B", "Baichuan2-7B-Base", "Baichuan-7B",
                                         "Baichuan-13B-Chat", "Llama-2-7b-chat-hf")}) == 6


def test_targets_and_methods_are_settings_of_runs():
    with registered():
        for table in TABLES.values():
            for method, target in table.with_methods(ADDED):
                settings = Settings("m", "c4", **options_of(method, target))
                assert settings.prunes == ("%" in target) and settings.quantizes == ("bit" in target)
                assert not settings.prunes or target.startswith(f"{settings.sparsity:.0%}")
    assert options_of("best", "50%+4bit") == PRESETS["best"] | {"sparsity": 0.5, "wbits": 4, "distill": 0.5,
                                                                "mse": True, "act_order": True}
    assert options_of("gptq", "3bit") == {"wbits": 3}
