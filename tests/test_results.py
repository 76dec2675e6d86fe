"""Gather records: what stands in the table, the files and the picture, and what is refused."""

import csv
import json
import re

import pytest
from matplotlib.figure import Figure

from mixgpt.app import results
from mixgpt.app.settings import Settings, recipe

SETTINGS = {"model": "facebook/opt-125m", "dataset": "c4", "seqlen": 2048}


def record(perplexity, dense=None, tasks=None, sparsity=None, **settings):
    """Make the record of a run as the pipeline writes it, with made-up figures."""
    settings = Settings(**SETTINGS | {"sparsity": sparsity or 0.0} | settings)
    method = settings.method() if settings.compresses else "dense"
    found = ({"dense": {"wikitext2": dense}} if dense else {}) | {method: {"wikitext2": perplexity}}
    return {"settings": vars(settings) | {"eval": list(settings.eval)},
            "sparsity": settings.prunen / settings.prunem if settings.prunem else settings.sparsity,
            "data": {"wikitext2": {"sha256": "abc"}}, "perplexity": found, "seconds": {"load": 2.0, "walk": 10.4},
            "peak_memory": {"host": 1.5e9}, **({"tasks": {method: tasks}} if tasks else {})}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes records, {name: content}, as files. It returns their paths."""
    def write(**records):
        for name, content in records.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return sorted(str(tmp_path / f"{name}.json") for name in records)

    return write


@pytest.fixture
def table(write, capsys):
    """Return a function that gives the lines which results.py prints for records."""
    def table(*options, status=0, **records):
        assert results.main("results.py", [*write(**records), *map(str, options)]) == status
        return capsys.readouterr().out.splitlines()

    return table


def test_the_table_holds_what_the_records_hold_in_order(write, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files = write(
        a=record(40.0, sparsity=0.6, gmp=True), b=record(35.25, sparsity=0.5, seed=1, tasks={"piqa": {
            "acc": 0.61, "acc_stderr": 0.01, "examples": 100, "version": 1.0}}),
        c=record(27.66),
        d=record(34.0, sparsity=0.5, sparsity_way="weight-level", saliency="isc", sensitivity="fisher"),
        e=record(36.0, prunen=2, prunem=4), f=record(50.0, sparsity=0.5, wbits=4))
    assert results.main("results.py", [*files, "--csv=~/new/runs.csv"]) == 0
    above, _, header, _, *rows, _, written = capsys.readouterr().out.splitlines()
    assert above == "model facebook/opt-125m, dense wikitext2 27.66"
    assert re.split("  +", header) == ["method", "sparsity", "seed", "wikitext2 ppl", "piqa acc", "seconds", "GB host"]
    assert written == f"written  {tmp_path}/new/runs.csv" and max(map(len, rows)) <= 100
    held = list(csv.DictReader((tmp_path / "new" / "runs.csv").open()))
    assert [(row["method"], row["wikitext2 ppl"]) for row in held] == [
        ("dense", "27.66"), ("SparseGPT", "35.25"), ("MixGPT (weight-level by fisher)", "34.0"),
        ("SparseGPT 2:4", "36.0"), ("SparseGPT + 4 bit", "50.0"), ("magnitude", "40.0")]
    assert {row["dense wikitext2"] for row in held} == {"27.66"}  # from the run of the dense model
    assert [row["piqa acc"] for row in held] == ["", "0.61", "", "", "", ""] and "piqa acc_stderr" not in held[0]
    assert [(row["sparsity_way"], row["prunem"], row["wbits"]) for row in held] == [
        ("uniform", "0", "16"), ("uniform", "0", "16"), ("weight-level", "0", "16"), ("uniform", "4", "16"),
        ("uniform", "0", "4"), ("uniform", "0", "16")]
    assert [row["seed"] for row in held] == ["0", "1", "0", "0", "0", "0"] and held[0]["file"] == files[2]
    assert {(row["seconds"], row["GB host"]) for row in held} == {("12.4", "1.5")}
    assert rows[1].split() == ["SparseGPT", "50.00%", "1", "35.25", "0.61", "12", "1.50"]
    assert rows[-1].split() == ["magnitude", "60.00%", "0", "40.00", "-", "12", "1.50"]


def test_dense_figures_of_other_texts_or_models_are_not_put_beside(table, tmp_path):
    other = record(27.66)
    other["data"]["wikitext2"]["sha256"] = "def"
    printed = table("--csv", tmp_path / "runs.csv", a=record(40.0, sparsity=0.6), b=other, f=record(23.0, bos="each"),
                    c=record(20.0, model="/data/opt-1.3b"), d=record(21.0, seqlen=128), e=record(22.0, eval_limit=8))
    held = {row["model"]: row for row in csv.DictReader((tmp_path / "runs.csv").open()) if row["method"] == "SparseGPT"}
    assert held["facebook/opt-125m"]["dense wikitext2"] == "" and any("opt-1.3b" in line for line in printed)


def test_paths_are_models_of_their_own_and_shortened_where_none_ends_alike(table):
    rows = [line.split()[0] for line in table(
        a=record(20.0, model="/data/a/opt"), b=record(40.0, model="/data/a/opt/", sparsity=0.5),
        c=record(30.0, model="/data/b/opt"), d=record(10.0, model="/data/bloom"))[4:]]
    assert rows == ["/data/a/opt", "/data/a/opt", "/data/b/opt", "bloom"]
    assert table(a=record(20.0, model="./opt/"), b=record(40.0, model="opt", sparsity=0.5))[0] == (
        "model opt, seed 0, dense wikitext2 20.00")


def test_markdown_is_a_table_of_the_same_cells(table):
    assert table("--markdown", a=record(40.0, 27.66, sparsity=0.6)) == [
        "model facebook/opt-125m, seed 0, dense wikitext2 27.66", "",
        "| method | sparsity | wikitext2 ppl | seconds | GB host |", "| --- | --- | --- | --- | --- |",
        "| SparseGPT | 60.00% | 40.00 | 12 | 1.50 |"]


def test_the_preset_best_is_named_where_all_its_settings_are_those_of_the_run(table):
    lines = table(a=record(30.0, sparsity=0.5, **recipe("best")),
                  b=record(31.0, sparsity=0.5, **recipe("best") | {"alpha": 0.1}),
                  d=record(33.0, prunen=2, prunem=4, **recipe("best", 4)),
                  f=record(34.0, sparsity=0.5, wbits=4, **recipe("best", wbits=4)),
                  h=record(36.0, sparsity=0.5, wbits=4, **recipe("best")),
                  j=record(35.0, sparsity=0.5, preset="best", effort=4.0),
                  k=record(37.0, sparsity=0.5, preset="best") | {"distilled": "no room"})
    method = "ADMM (global, fisher, dense target, rotated heads, more text, distilled)"
    assert [re.split("  +", row)[0] for row in lines[4:]] == [
        "best", method, "best 2:4", "best, effort 4", "best, not distilled", "best + 4 bit codebook",
        f"{method} + 4 bit"]


def points_of(files):
    """Return the points of a picture, and them as (method, sparsity, mean, low, high)."""
    runs = [results.read(path) for path in results.files_of(files)]
    results.distinguish(runs)
    points = results.points_of(runs)
    return points, list(points[["method", "sparsity", "mean", "low", "high"]].itertuples(index=False, name=None))


def test_runs_that_differ_in_their_seed_alone_are_one_point(write):
    points, rows = points_of(write(
        a=record(40.0, 20.0, sparsity=0.6), b=record(44.0, sparsity=0.6, seed=1), c=record(30.0, sparsity=0.5),
        d=record(50.0, sparsity=0.5, gmp=True), e=record(39.0, sparsity=0.6, nsamples=32), f=record(20.0),
        g=record(48.0, sparsity=0.5, gmp=True, eval_limit=8), again=record(44.0, sparsity=0.6, seed=1)))
    assert set(points["dense"].dropna()) == {20.0} and set(points["text"]) == {"wikitext2"}
    assert rows == [
        ("SparseGPT, nsamples 128", 0.5, 30.0, 30.0, 30.0), ("SparseGPT, nsamples 128", 0.6, 42.0, 40.0, 44.0),
        ("SparseGPT, nsamples 32", 0.6, 39.0, 39.0, 39.0), ("magnitude, eval_limit 8", 0.5, 48.0, 48.0, 48.0),
        ("magnitude, eval_limit None", 0.5, 50.0, 50.0, 50.0)]


def test_rows_of_one_method_say_in_which_settings_they_differ(table):
    rows = table(a=record(40.0, sparsity=0.6), b=record(41.0, sparsity=0.6, percdamp=0.1), c=record(30.0),
                 d=record(39.0, sparsity=0.6, distill=0.5), e=record(38.0, sparsity=0.6, distill=1.0, seed=1))
    assert [row.partition("  ")[0] for row in rows[4:]] == [
        "dense", *map("SparseGPT, percdamp {}".format, (0.01, 0.1)),
        *map("SparseGPT (distilled), distill {}".format, (0.5, 1.0))]


def test_the_picture_has_a_line_for_each_method_and_the_dense_model(write, tmp_path, monkeypatch, capsys):
    files = write(**{f"r{seed}{number}": record(30.0 + 10 * number + seed, 20.0, sparsity=0.5 + number / 10, seed=seed)
                     for seed in (0, 1) for number in (0, 1)}, gmp=record(500.0, 20.0, sparsity=0.5, gmp=True))
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **options: drawn.append(figure) or save(
        figure, *given, **options))
    assert results.main("results.py", [*files, "--plot", str(tmp_path / "tradeoff.png")]) == 0
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"\n\npicture  {tmp_path}/tradeoff.png\n")
    axis, = drawn[0].axes
    bars = {container.get_label(): container for container in axis.containers}
    assert bars["SparseGPT"].lines[0].get_xydata().tolist() == [[0.5, 30.5], [0.6, 40.5]]
    low_high = [segment[:, 1].tolist() for segment in bars["SparseGPT"].lines[2][0].get_segments()]
    assert low_high == [[30.0, 31.0], [40.0, 41.0]]
    assert [line.get_ydata()[0] for line in axis.lines if line.get_label() == "dense"] == [20.0]
    assert axis.get_yscale() == "log"


def test_what_a_run_records_is_read_without_its_weights(prune, tmp_path, capsys):
    file = tmp_path / "new" / "a[1].json"
    for more in (["--record", file], ["--save", tmp_path / "saved", "--record", tmp_path / "b.json"]):
        prune("opt", "--sparsity .5 --gmp --eval --quiet", *more)
    assert [path.name for path in file.parent.iterdir()] == ["a[1].json"]
    (file.parent / "a1.json").touch()  # for which the name stands as a pattern
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((tmp_path / "saved/mixgpt.json").read_text())
    assert results.main("results.py", [str(file), str(tmp_path / "sav*"), str(file)]) == 0
    rows = capsys.readouterr().out.splitlines()[4:]
    assert len(rows) == 2 and all("magnitude" in row and "50.00%" in row for row in rows)


def test_files_that_are_no_records_get_a_line_each_and_the_others_are_shown(write, tmp_path, capsys):
    good, = write(good=record(40.0, sparsity=0.6))
    (tmp_path / "damaged.json").write_text('{"settings": {')
    (tmp_path / "foreign.json").write_text('{"model_type": "opt"}')
    (tmp_path / "types.json").write_text(json.dumps(record(30.0, sparsity=0.6) | {"sparsity": "0.6"}))
    (tmp_path / "unfinished" / "progress").mkdir(parents=True)
    (tmp_path / "unfinished" / "progress" / "run.json").write_text("{}")
    (tmp_path / "unfinished" / "mixgpt.json").write_text("{}")
    names = ["damaged.json", "foreign.json", "types.json", "unfinished"]
    assert results.main("results.py", [good, *(str(tmp_path / name) for name in names)]) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 5 and "40.00" in captured.out
    for name, line in zip(names, captured.err.splitlines(), strict=True):
        reason = "its run has not finished; continue it" if name == "unfinished" else "is not the record of a run"
        assert line.startswith(f"results.py: error: {tmp_path / name}") and reason in line


def test_a_perplexity_beyond_all_numbers_or_none_stands_in_the_table_and_not_in_the_picture(write, table, tmp_path):
    records = {"a": record(float("inf"), float("nan"), sparsity=0.6), "b": record(30.0, sparsity=0.5),
               "c": record(float("nan"), sparsity=0.7), "d": record(30.0) | {"perplexity": {}}}
    points, drawn = points_of(write(**records))
    assert drawn == [("SparseGPT", 0.5, 30.0, 30.0, 30.0)] and points["dense"].isna().all()
    rows = [line.split() for line in table("--plot", tmp_path / "a.png", **records)]
    assert [row[2] for row in rows if row and row[0] == "SparseGPT"] == ["30.00", "inf", "nan"]
    assert [row[1] for row in rows if row and row[0] == "dense"] == ["0.00%"]
