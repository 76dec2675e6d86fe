"""Check the folder of a run: who may write to it, what may go on in it, and that what comes back is what was left."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import torch
from commands import SMALL, short_builtin  # noqa: F401, the fixture
from conftest import FAMILIES, OTHERS, contents, read_little
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import datautils
import mixgpt
from mixgpt.allocation import synthetic
from mixgpt.app import compression, planning
from mixgpt.app import run as running
from mixgpt.checkpoints import formats, load
from mixgpt.checkpoints.layer_files import LayerFiles
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import memory
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming
from mixgpt.pruning import calibration, distill, layerwise

NOT_EMPTY = "exists and is not an empty folder; name another one, or give --overwrite to replace a saved model"


def run(name, *arguments):
    """Run the command line of a name in FAMILIES in this process. Returns the exit status."""
    return commands.run((FAMILIES | OTHERS)[name][0], *arguments)


def interrupt(monkeypatch, name, arguments, finished):
    """Run a command line that Ctrl-C stops when so many layers are finished."""
    with monkeypatch.context() as patch:
        keep, count = LayerFiles.save_layer, []

        def finish(self, *given, **options):
            keep(self, *given, **options)
            count.append(1)
            if len(count) == finished:
                raise KeyboardInterrupt

        patch.setattr(LayerFiles, "save_layer", finish)
        assert run(name, *arguments) == 130


def snapshot(path):
    """Return {path: bytes, None for folders} of everything below a path."""
    return {file: None if file.is_dir() else file.read_bytes() for file in sorted(Path(path).rglob("*"))}


def refused(capsys, name, *arguments):
    """Run a command line that must be refused with one line. Returns the line."""
    capsys.readouterr()
    assert run(name, *arguments) == 2
    captured = capsys.readouterr()
    line, = captured.err.splitlines()
    assert captured.out == ""
    return line


# ---- one run at a time -------------------------------------------------------------------------------------------


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    with RunDir(tmp_path / "saved"):
        with pytest.raises(InputError, match=f"--save {tmp_path / 'saved'}: is in use by another run"):
            RunDir(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["file", "filled", "below a file", "too large"])
def test_a_folder_that_cannot_be_used_is_refused_and_nothing_is_left(case, tmp_path):
    (tmp_path / "file").write_text("kept")
    folder = {"file": tmp_path / "file", "filled": tmp_path, "below a file": tmp_path / "file" / "saved",
              "too large": tmp_path / "new" / "saved"}[case]
    with pytest.raises(InputError, match=f"--save {folder}: "):
        RunDir(folder, nbytes=10**18 if case == "too large" else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layers, saved, needed", [(0, 0, 200), (60, 0, 140), (100, 70, 30)])
def test_room_for_layers_and_result_that_are_not_there_yet_is_asked_for(layers, saved, needed, tmp_path, monkeypatch):
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "run.json").write_text("{}")
    (tmp_path / "progress" / "layer-00000.safetensors").write_bytes(bytes(layers))
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(bytes(saved))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    with RunDir(tmp_path, nbytes=200):
        pass
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r": finished layers and the result need 0.000 GB, 0.000 GB are free there"):
        RunDir(tmp_path, nbytes=200)


def hold(path, held):
    """Hold a folder until this process is killed, for `fork`."""
    with RunDir(path):
        held.touch()
        time.sleep(99)


def test_a_folder_is_held_against_other_processes_until_its_process_is_killed(fork, checkpoint_folder, tmp_path,
                                                                              capsys):
    saved, held = tmp_path / "saved", tmp_path / "held"
    holder = fork(hold, saved, held)
    try:
        while not held.exists():
            assert holder.is_alive()
            time.sleep(0.01)
        before = snapshot(tmp_path)
        arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", "--gmp", *SMALL, "--save", saved]
        for resume in ([], ["--resume"]):
            line = refused(capsys, "opt", *arguments, *resume)
            assert line == f"opt.py: error: --save {saved}: is in use by another run"
            assert snapshot(tmp_path) == before
    finally:
        holder.kill()
        holder.join()
    assert run("opt", *arguments) == 0


# ---- what may go on ----------------------------------------------------------------------------------------------

def test_a_run_goes_on_with_the_same_settings_text_and_weights_only(checkpoint_folder, tmp_path, capsys, monkeypatch):
    source = shutil.copytree(checkpoint_folder("opt"), tmp_path / "model")
    arguments = [source, "builtin", "--sparsity", ".5", *SMALL, "--save", tmp_path / "saved"]
    interrupt(monkeypatch, "opt", arguments, 1)
    before = snapshot(tmp_path / "saved")
    assert refused(capsys, "opt", *arguments) == (f"opt.py: error: --save {tmp_path / 'saved'}: holds an "
                                                  "interrupted run; continue it with --resume, or remove the folder")
    for flag, was, now in (("--sparsity", "0.5", "0.6"), ("--dtype", "float32", "bfloat16"),
                           ("--save-format", "dense", "sparse")):
        line = refused(capsys, "opt", *arguments, flag, now, "--resume")
        assert re.search(f"--resume: {flag} was {was} .*, now it is {now}$", line), line

    with monkeypatch.context() as patch:
        short = datautils.load_rows
        patch.setattr(datautils, "load_rows", lambda *asked: (lambda rows, source: (rows[::-1], source))(
            *short(*asked)))
        assert "--resume: calibration tokens was " in refused(capsys, "opt", *arguments, "--resume")

    whole = load_file(source / "model.safetensors")
    for name in ("layers.2.fc2.weight", "final_layer_norm.weight"):
        state = {key: tensor.clone() for key, tensor in whole.items()}
        state[f"model.decoder.{name}"] += 0.01  # as by training
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
        assert "--resume: model's weights was " in refused(capsys, "opt", *arguments, "--resume")
    assert snapshot(tmp_path / "saved") == before


@pytest.mark.parametrize("weights", ["in shards", "in a .bin file"])
def test_a_run_may_go_on_with_another_evaluation_and_place_of_the_model(weights, checkpoint_folder, tmp_path,
                                                                        monkeypatch):
    arguments = ["builtin", "--sparsity", ".5", *SMALL, "--save", tmp_path / "saved"]
    source = shutil.copytree(checkpoint_folder("opt"), tmp_path / "model")
    interrupt(monkeypatch, "opt", [source, *arguments], 1)
    moved = source.rename(tmp_path / "moved")
    state = load_file(moved / "model.safetensors")
    (moved / "model.safetensors").unlink()
    if weights == "in shards":
        AutoModelForCausalLM.from_pretrained(checkpoint_folder("opt")).save_pretrained(moved, max_shard_size=40_000)
    else:
        torch.save(state, moved / "pytorch_model.bin")
    assert run("opt", moved, *arguments, "--resume", "--dense") == 0
    record = json.loads((tmp_path / "saved" / "mixgpt.json").read_text())
    assert set(record["perplexity"]) == {"dense", "SparseGPT"}


def test_resume_begins_in_an_empty_folder(checkpoint_folder, tmp_path):
    (tmp_path / "resumed").mkdir()
    for name, resume in (("resumed", ["--resume"]), ("plain", [])):
        assert run("opt", checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, "--save", tmp_path / name,
                   *resume) == 0
    assert contents(tmp_path / "resumed") == contents(tmp_path / "plain")


@pytest.fixture(scope="module")
def complete(checkpoint_folder, tmp_path_factory):
    """Give the arguments of a complete run, its folder, and the tables that it printed."""
    saved, printed = tmp_path_factory.mktemp("complete") / "saved", io.StringIO()
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, "--dense", "--save", saved]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        read_little(patch)
        assert run("opt", *arguments) == 0
    return arguments, saved, printed.getvalue().partition("\n\n")[2]


def test_the_folder_of_a_complete_run_without_resume_or_of_others_is_refused(complete, tmp_path, capsys):
    (*arguments, _), saved, _ = complete
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    before = snapshot(tmp_path), snapshot(saved)
    for folder, *resume in ([saved], [tmp_path / "notes"], [tmp_path / "notes", "--resume"]):
        assert refused(capsys, "opt", *arguments, folder, *resume) == (
            f"opt.py: error: --save {folder}: {NOT_EMPTY}")
    assert (snapshot(tmp_path), snapshot(saved)) == before


def test_resume_of_a_complete_run_prints_its_results_again_and_reads_no_weights(complete, tmp_path, capsys,
                                                                                monkeypatch):
    arguments, saved, tables = complete
    before = snapshot(saved)
    (saved / "progress").mkdir()  # as if killed while it removed them
    for name in ("lock", "layer-00001.json", "layer-00001.safetensors"):
        (saved / "progress" / name).write_text("")
    monkeypatch.setattr(load, "open_model", None)
    assert run("opt", *arguments, "--resume", "--record", tmp_path / "record.json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    said, _, again = captured.out.partition("\n\n")
    assert said == f"resume   the run in {saved} is complete; these are its results"
    assert again == tables and "dense " in again and "saved in" in again
    assert snapshot(saved) == before
    assert (tmp_path / "record.json").read_bytes() == (saved / "mixgpt.json").read_bytes()
    assert run("opt", *arguments, "--resume", "--quiet") == 0
    assert "resume" not in capsys.readouterr().out


def test_resume_of_a_complete_run_with_other_settings_or_weights_is_refused(complete, tmp_path, capsys):
    (model, *arguments), saved, _ = complete
    before = snapshot(saved)
    assert refused(capsys, "opt", model, *arguments, "--sparsity", ".6", "--resume") == (
        f"opt.py: error: --resume: --sparsity was 0.5 in the complete run in {saved}, now it is 0.6")
    assert refused(capsys, "opt", model, *arguments, "--eval", "ptb", "--resume") == (
        f"opt.py: error: --resume: --eval was ['builtin'] in the complete run in {saved}, now it is ['ptb']; to "
        "evaluate it again, give this folder as the model")
    source = shutil.copytree(model, tmp_path / "model")
    assert run("opt", source, *arguments, "--resume") == 0  # the same weights under another name
    state = load_file(source / "model.safetensors")
    state["model.decoder.layers.2.fc2.weight"] += 1
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert refused(capsys, "opt", source, *arguments, "--resume") == (
        f"opt.py: error: --resume: the complete run in {saved} has pruned other weights than those of {source}")
    assert snapshot(saved) == before


@pytest.mark.parametrize("lost", ["mixgpt.json", "model.safetensors"])
def test_a_folder_without_its_record_or_weights_is_not_that_of_a_complete_run(lost, complete, tmp_path, capsys):
    arguments, saved, _ = complete
    shutil.copytree(saved, tmp_path / "saved")
    (tmp_path / "saved" / lost).unlink()
    assert refused(capsys, "opt", *arguments[:-1], tmp_path / "saved", "--resume") == (
        f"opt.py: error: --save {tmp_path}/saved: {NOT_EMPTY}")
    for record in ("[]", "{", '{"matrices": [1]}'):
        (tmp_path / "saved" / "mixgpt.json").write_text(record)
        assert NOT_EMPTY in refused(capsys, "opt", *arguments[:-1], tmp_path / "saved", "--resume")


# ---- what comes back ---------------------------------------------------------------------------------------------

FORMATS = {
    "dense": ["--wbits", "3", "--saliency", "isc"],
    "sparse": ["--wbits", "4", "--groupsize", "16", "--act-order"],
    "compressed-tensors": ["--wbits", "4", "--sym"],
}


@pytest.mark.parametrize("save_format, name", [
    ("dense", "qwen3-moe"), ("dense", "gemma4"), ("sparse", "llama"), ("compressed-tensors", "opt")])
def test_an_interrupted_run_gives_the_files_and_the_record_of_one_that_was_not(save_format, name, checkpoint_folder,
                                                                               tmp_path, monkeypatch):
    arguments = [checkpoint_folder(name), "builtin", "--sparsity", ".5", *FORMATS[save_format], *SMALL,
                 "--save-format", save_format, "--percdamp", ".02"]
    assert run(name, *arguments, "--save", tmp_path / "whole") == 0
    interrupt(monkeypatch, name, [*arguments, "--save", tmp_path / "parts"], 1)
    interrupt(monkeypatch, name, [*arguments, "--save", tmp_path / "parts", "--resume"], 1)
    assert run(name, *arguments, "--save", tmp_path / "parts", "--resume") == 0
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    rows = parts["mixgpt.json"]["matrices"]
    assert rows == whole["mixgpt.json"]["matrices"]
    assert all(row["error"] > 0 and row["percdamp"] == .02 and row["wbits"] == int(FORMATS[save_format][1])
               for row in rows)
    assert parts == whole


def test_two_runs_with_the_same_seed_write_the_same_bytes_and_another_seed_others(checkpoint_folder, tmp_path):
    for saved, seed in {"one": 0, "two": 0, "other": 1}.items():
        assert run("bloom", checkpoint_folder("bloom"), "builtin", "--sparsity", ".5", "--preset", "mixgpt", "--seed",
                   seed, *SMALL, "--save", tmp_path / saved, "--sensitivity-file", tmp_path / f"{saved}.json") == 0
    one, two, other = (contents(tmp_path / saved) for saved in ("one", "two", "other"))
    assert one == two and one["model.safetensors"] != other["model.safetensors"]


# ---- temporary folders --------------------------------------------------------------------------------------------


def test_a_temporary_folder_that_is_full_is_named_and_not_save(checkpoint_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL]
    free = SimpleNamespace(free=99_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        assert refused_after_heading(capsys, "opt", *arguments) == (
            f"opt.py: error: TMPDIR {tmp_path}: pruned layers need 0.000 GB, 0.000 GB are free; set it to a folder on "
            "a larger disk, or give --save")
        free.free = 102_912  # three layers
        assert run("opt", *arguments) == 0
        free.free = 34_304  # one
        assert run("opt", *arguments, "--maxlayer", "1") == 0
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert refused_after_heading(capsys, "opt", *arguments) == (
        "opt.py: error: TMPDIR: no folder for temporary files can be written; set it to one, or give --save")
    assert list(tmp_path.iterdir()) == []


def full(*_, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused_after_heading(capsys, name, *arguments):
    capsys.readouterr()
    assert run(name, *arguments) == 2
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("saves", [True, False])
def test_a_step_that_starts_over_goes_on_from_the_finished_layers(saves, checkpoint_folder, tmp_path, monkeypatch):
    """As when the GPU's memory runs out in the third layer."""
    options = ["--save", tmp_path / "whole"] if saves else ["--record", tmp_path / "whole.json"]
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, "--target", "dense", "--batch-size",
                 1]
    assert run("opt", *arguments, *options) == 0
    save_layer, indexes = LayerFiles.save_layer, []

    def scarce(files, index, *given):
        indexes.append(index)
        if len(indexes) == 3:
            raise torch.OutOfMemoryError("as if")
        save_layer(files, index, *given)

    monkeypatch.setattr(LayerFiles, "save_layer", scarce)
    monkeypatch.setattr(memory.MemoryPlan, "next_cheaper", lambda plan: (plan, "as if"))
    options[1] = Path(str(options[1]).replace("whole", "again"))
    assert run("opt", *arguments, *options) == 0
    assert indexes == [0, 1, 2, 2]
    if saves:
        assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    else:
        whole, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "again"))
        assert again["matrices"] == whole["matrices"] and again["perplexity"] == whole["perplexity"]


@pytest.mark.parametrize("finished", [3, 4])
def test_distillation_that_is_interrupted_costs_at_most_itself(finished, checkpoint_folder, tmp_path, monkeypatch):
    """Ctrl-C behind the last pruned layer, and the first distilled one: no layer is pruned again."""
    options = [checkpoint_folder("llama"), "builtin", "--preset", "best", "--sparsity", ".5", *SMALL]
    assert run("llama", *options, "--save", tmp_path / "whole") == 0
    arguments = [*options, "--save", tmp_path / "saved"]
    interrupt(monkeypatch, "llama", arguments, finished)
    monkeypatch.setattr(layerwise, "prune_in_place", None)
    monkeypatch.setattr(planning, "synthetic", None)  # nor is anything measured again
    monkeypatch.setattr(planning, "output_gradients", None)
    monkeypatch.setattr(synthetic, "has_room", lambda _: False)  # nor decided again, by the memory that is free now
    if finished > 3:
        monkeypatch.setattr(distill, "room_for", lambda *_: 0)
    assert run("llama", *arguments, "--resume") == 0
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")


def test_distilled_layers_that_are_all_written_are_not_distilled_again(checkpoint_folder, tmp_path, monkeypatch):
    options = [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--distill", "1", "--wbits", "4", *SMALL]
    assert run("llama", *options, "--save", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_checkpoint", interrupted)
        assert run("llama", *options, "--save", tmp_path / "saved") == 130
    names = {file.name.partition("-")[0] for file in (tmp_path / "saved" / "progress").glob("*-0000*.safetensors")}
    assert names == {"layer"}
    monkeypatch.setattr(distill, "distill", None)
    assert run("llama", *options, "--save", tmp_path / "saved", "--resume") == 0
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")


def interrupted(*_):
    raise KeyboardInterrupt


# ---- what an interrupted run has decided -------------------------------------------------------------------------


def test_a_run_that_goes_on_prunes_in_the_way_of_the_interrupted_one(checkpoint_folder, tmp_path, monkeypatch):
    """As on a GPU with less memory free, where two passes through each layer would be chosen."""
    options = [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", *SMALL, "--save"]
    assert run("llama", *options, tmp_path / "whole") == 0
    ways, prune = [], compression._prune
    monkeypatch.setattr(compression, "_prune", lambda run, plan, way: (ways.append(way), prune(run, plan, way))[1])
    interrupt(monkeypatch, "llama", [*options, tmp_path / "saved"], 1)
    monkeypatch.setattr(calibration, "one_pass_bytes", lambda *_: 10**18)
    decide = running._plan

    def on_a_gpu(current):
        decide(current)
        running._plan_passes(current)

    monkeypatch.setattr(running, "_plan", on_a_gpu)
    assert run("llama", *options, tmp_path / "saved", "--resume") == 0
    assert ways[0] == ways[1] and not ways[1].two_passes
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")


# ---- what cannot be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls, what, finished", [  # as many files are written before the disk is full
    (0, "layer-00000.safetensors", 0), (2, "layer-00002.safetensors", 2), (4, "the model", 3)])
def test_a_full_disk_gets_one_line_and_resume_gives_the_files_of_a_run_with_room(
        calls, what, finished, checkpoint_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "LARGEST", 40_000)  # the result has several files
    options = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, "--save"]
    assert run("opt", *options, tmp_path / "whole") == 0
    save_file, left = streaming.save_file, iter(range(calls))
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "save_file", lambda *given, **more: full() if next(left, None) is None else save_file(
            *given, **more))
        line = refused_after_heading(capsys, "opt", *options, tmp_path / "saved")
    assert line == (f"opt.py: error: --save {tmp_path}/saved: {what} cannot be written ([Errno 28] No space left on "
                    "device); free some space and continue with --resume")
    assert len(list(tmp_path.glob("saved/progress/layer-*.json"))) == finished
    assert finished or not (tmp_path / "saved").exists()
    assert run("opt", *options, tmp_path / "saved", "--resume") == 0
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["layer-00001.safetensors", "layer-00001.json"])
def test_what_the_disk_has_damaged_of_a_layer_is_computed_again(name, checkpoint_folder, tmp_path, monkeypatch, capsys):
    options = [checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--wbits", "4", *SMALL, "--save"]
    assert run("llama", *options, tmp_path / "whole") == 0
    interrupt(monkeypatch, "llama", [*options, tmp_path / "saved"], 2)
    file = tmp_path / "saved" / "progress" / name
    file.write_bytes(file.read_bytes()[:-9])
    capsys.readouterr()
    assert run("llama", *options, tmp_path / "saved", "--resume") == 0
    assert f"resume   {file.with_suffix('.safetensors')} cannot be read (" in capsys.readouterr().out
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name, line", [
    ("run.json", "--resume: {saved}/progress/run.json cannot be read; remove {saved} to start over: .*"),
    ("plan-0.safetensors", "--resume: {saved}/progress/plan-0.safetensors cannot be read; remove {saved} to start "
                           "over: .*")])
def test_what_identifies_the_run_and_cannot_be_read_is_refused(name, line, checkpoint_folder, tmp_path, monkeypatch,
                                                               capsys):
    options = [checkpoint_folder("llama"), "builtin", "--preset", "best", "--sparsity", ".5", *SMALL, "--save",
               tmp_path / "saved"]
    interrupt(monkeypatch, "llama", options, 1)
    file = tmp_path / "saved" / "progress" / name
    file.write_bytes(file.read_bytes()[:-9])
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert run("llama", *options, "--resume") == 2
    assert re.fullmatch(f"llama.py: error: {line}\n".format(saved=tmp_path / "saved"), capsys.readouterr().err)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("complete, change, line", [
    (False, {"schema": 2, "program": {"version": "9"}},
     "was written by version 9 of this program (schema 2); this is version 1.0.0 (schema 1)"),
    (True, {"schema": None, "program": None},
     "was written by an older version of this program (schema None); this is version 1.0.0 (schema 1)")])
def test_a_run_of_another_version_of_this_program_is_refused(complete, change, line, checkpoint_folder, tmp_path,
                                                             monkeypatch, capsys):
    saved = tmp_path / "saved"
    options = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", "--gmp", *SMALL, "--save", saved]
    if complete:
        assert run("opt", *options) == 0
    else:
        interrupt(monkeypatch, "opt", options, 1)
    file = saved / "mixgpt.json" if complete else saved / "progress" / "run.json"
    content = json.loads(file.read_text())
    assert content["schema"] == 1 and content["program"]["version"] == mixgpt.__version__
    file.write_text(json.dumps({key: value for key, value in (content | change).items() if value is not None}))
    assert refused_after_heading(capsys, "opt", *options, "--resume") == (
        f"opt.py: error: --resume: the run in {saved} {line}")
