"""Damage the folder of an interrupted run: --resume computes again what is lost, or refuses; other weights never."""

import shutil

import pytest
from broken_progress import RECOMPUTED, REFUSED, RUNS
from conftest import FAMILIES, contents

import datautils
from mixgpt.app import cli, pipeline
from mixgpt.checkpoints import run_dir, shards
from mixgpt.checkpoints.run_dir import RunDir

SMALL = "--nsamples 2 --seqlen 16 --batch-size 2 --eval --device cpu"


@pytest.fixture(scope="module")
def patched():
    """Patch for the module: little text, hidden states kept after every layer, a model in three shards."""
    with pytest.MonkeyPatch.context() as patch:
        whole = datautils.load_rows
        patch.setattr(datautils, "load_rows", lambda *asked: (lambda rows, source: (rows[:150], source))(
            *whole(*asked)))
        patch.setattr(pipeline, "_verify", lambda job: None)  # most of the time of such a run
        patch.setattr(run_dir, "PATIENCE", 0)
        patch.setattr(shards, "LARGEST", 60_000)
        yield patch


def run(model, saved, options, *more):
    return cli.main(FAMILIES["llama"][0], [str(model), "builtin", *options.split(), *SMALL.split(), "--save",
                                           str(saved), *more])


def stopping(owner, name, count, patch):
    """Let Ctrl-C come after the call number `count` of a function."""
    call, calls = getattr(owner, name), []

    def wrapped(*given):
        result = call(*given)
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return result

    patch.setattr(owner, name, wrapped)


@pytest.fixture(scope="module")
def runs(patched, checkpoint_folder, tmp_path_factory):
    """Give {key of RUNS: (folder of an interrupted run, contents of that of a whole one)}."""
    made, model = {}, checkpoint_folder("llama")
    for name, options in RUNS.items():
        root = tmp_path_factory.mktemp(name)
        assert run(model, root / "whole", options) == 0
        with pytest.MonkeyPatch.context() as patch:
            stopping(*((RunDir, "_remove_layers", 2) if name == "shards" else (RunDir, "finish", 2)), patch)
            assert run(model, root / "interrupted", options) == 130
        made[name] = root / "interrupted", contents(root / "whole")
    return made


@pytest.mark.parametrize("case", RECOMPUTED)
def test_what_is_damaged_is_computed_again_and_the_result_is_that_of_an_undisturbed_run(case, runs, checkpoint_folder,
                                                                                      tmp_path, capsys):
    damage, saved = RECOMPUTED[case], tmp_path / "saved"
    interrupted, whole = runs[damage.interrupted]
    shutil.copytree(interrupted, saved)
    damage.act(saved / "progress")
    assert run(checkpoint_folder("llama"), saved, RUNS[damage.interrupted], "--resume") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [line for line in captured.out.splitlines() if line.startswith("resume")] == [
        f"resume   {line}" for line in damage.said]
    for name in damage.left:
        (saved / "progress" / name).unlink()
    assert contents(saved) == whole


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_again_is_refused_in_one_line_and_nothing_changes(case, runs, checkpoint_folder,
                                                                                tmp_path, capsys):
    damage, saved = REFUSED[case], tmp_path / "saved"
    shutil.copytree(runs[damage.interrupted][0], saved)
    damage.act(saved / "progress")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert run(checkpoint_folder("llama"), saved, RUNS[damage.interrupted], "--resume") == 2
    captured = capsys.readouterr()
    assert captured.err == f"llama.py: error: {damage.said.format(saved=saved)}\n"
    assert captured.out == ""
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
