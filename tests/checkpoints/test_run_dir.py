"""Check the folder of a run: who may write to it, what may go on in it, and that what comes back is what was left."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import torch
from commands import SMALL, short_builtin  # noqa: F401, the fixture
from conftest import FAMILIES, OTHERS, ROOT, contents, make, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import datautils
import mixgpt
from mixgpt.allocation import synthetic
from mixgpt.app import compression, planning
from mixgpt.app import run as running
from mixgpt.checkpoints import load
from mixgpt.checkpoints.layer_files import LayerFiles
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import memory
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming
from mixgpt.pruning import calibration, distill, layerwise


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
    with RunDir(tmp_path / "saved"):
        pass
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


HOLD = """
import sys, time
from mixgpt.app import compression, planning
from mixgpt.app import run as running
from mixgpt.checkpoints.run_dir import RunDir
held = RunDir(sys.argv[1])
print("held", flush=True)
{}
"""


def test_a_folder_is_held_against_other_processes_until_its_process_is_killed(checkpoint_folder, tmp_path, capsys):
    saved = tmp_path / "saved"
    holder = subprocess.Popen([sys.executable, "-c", HOLD.format("time.sleep(99)"), saved], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = snapshot(tmp_path)
        arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", "--gmp", *SMALL, "--save", saved]
        for resume in ([], ["--resume"]):
            line = refused(capsys, "opt", *arguments, *resume)
            assert line == f"opt.py: error: --save {saved}: is in use by another run"
            assert snapshot(tmp_path) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert run("opt", *arguments) == 0


def test_a_run_that_waited_for_another_to_end_does_not_write_over_its_result(tokenizer, tmp_path, monkeypatch):
    _, model = make("opt")
    save(tmp_path / "saved", model, tokenizer, {})
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        RunDir(tmp_path / "saved")  # as after a check that came before the end of the other
    assert snapshot(tmp_path) == before


# ---- what may go on ----------------------------------------------------------------------------------------------

CHANGED = {  # options of the first run, options of its continuation, what the line must name
    "sparsity": ([], ["--sparsity", ".6"], "--sparsity was 0.5 .*, now it is 0.6"),
    "dtype": ([], ["--dtype", "bfloat16"], "--dtype was float32 .*, now it is bfloat16"),
    "format": ([], ["--save-format", "sparse"], "--save-format was dense .*, now it is sparse"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_run_goes_on_with_the_same_settings_only(case, checkpoint_folder, tmp_path, capsys, monkeypatch):
    first, then, named = CHANGED[case]
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, *first, "--save", tmp_path / "saved"]
    interrupt(monkeypatch, "opt", arguments, 1)
    before = snapshot(tmp_path)
    line = refused(capsys, "opt", *arguments, *then, "--resume")
    assert re.search(rf"--resume: {named}$", line), line
    assert snapshot(tmp_path) == before


def test_a_run_goes_on_with_the_same_text_and_weights_only(checkpoint_folder, tmp_path, capsys, monkeypatch):
    source = shutil.copytree(checkpoint_folder("opt"), tmp_path / "model")
    arguments = [source, "builtin", "--sparsity", ".5", *SMALL, "--save", tmp_path / "saved"]
    interrupt(monkeypatch, "opt", arguments, 1)
    before = snapshot(tmp_path / "saved")

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


def test_the_folder_of_a_complete_run_without_resume_or_of_others_is_refused(checkpoint_folder, tmp_path, capsys):
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", "--gmp", *SMALL]
    assert run("opt", *arguments, "--save", tmp_path / "saved") == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    before = snapshot(tmp_path)
    for name, *resume in (["saved"], ["notes"], ["notes", "--resume"]):
        line = refused(capsys, "opt", *arguments, "--save", tmp_path / name, *resume)
        assert line == f"opt.py: error: --save {tmp_path / name}: exists and is not an empty folder"
    assert snapshot(tmp_path) == before


@pytest.fixture(scope="module")
def complete(checkpoint_folder, tmp_path_factory):
    """Give the arguments of a complete run, its folder, and what it printed behind its heading."""
    saved = tmp_path_factory.mktemp("complete") / "saved"
    return [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, "--dense", "--save", saved], saved


def test_resume_of_a_complete_run_prints_its_results_again_and_reads_no_weights(complete, tmp_path, capsys,
                                                                                monkeypatch):
    arguments, saved = complete
    assert run("opt", *arguments) == 0
    tables = capsys.readouterr().out.partition("\n\n")[2]
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


LATER = {
    ("--sparsity", ".6"): "--resume: --sparsity was 0.5 in the complete run in {saved}, now it is 0.6",
    ("--eval", "ptb"): "--resume: --eval was ['builtin'] in the complete run in {saved}, now it is ['ptb']; to "
                       "evaluate it again, give this folder as the model",
}


@pytest.mark.parametrize("others", LATER)
def test_resume_of_a_complete_run_with_other_settings_is_refused(others, complete, capsys):
    arguments, saved = complete
    assert saved.exists() or run("opt", *arguments) == 0
    before = snapshot(saved)
    line = refused(capsys, "opt", *arguments, *others, "--resume")
    assert line == f"opt.py: error: {LATER[others].format(saved=saved)}"
    assert snapshot(saved) == before


def test_resume_of_a_complete_run_reads_the_weights_of_a_model_of_another_name(complete, tmp_path, capsys):
    (model, *arguments), saved = complete
    assert saved.exists() or run("opt", model, *arguments) == 0
    source = shutil.copytree(model, tmp_path / "model")
    assert run("opt", source, *arguments, "--resume") == 0
    state = load_file(source / "model.safetensors")
    state["model.decoder.layers.2.fc2.weight"] += 1
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert refused(capsys, "opt", source, *arguments, "--resume") == (
        f"opt.py: error: --resume: the complete run in {saved} has pruned other weights than those of {source}")


@pytest.mark.parametrize("lost", ["mixgpt.json", "model.safetensors"])
def test_a_folder_without_its_record_or_weights_is_not_that_of_a_complete_run(lost, complete, tmp_path, capsys):
    arguments, saved = complete
    assert saved.exists() or run("opt", *arguments) == 0
    shutil.copytree(saved, tmp_path / "saved")
    (tmp_path / "saved" / lost).unlink()
    assert refused(capsys, "opt", *arguments[:-1], tmp_path / "saved", "--resume") == (
        f"opt.py: error: --save {tmp_path}/saved: exists and is not an empty folder")
    for record in ("[]", "{", '{"matrices": [1]}'):
        (tmp_path / "saved" / "mixgpt.json").write_text(record)
        assert "exists and is not an empty folder" in refused(capsys, "opt", *arguments[:-1], tmp_path / "saved",
                                                              "--resume")


def test_the_folder_of_an_interrupted_run_is_refused_without_resume(checkpoint_folder, tmp_path, capsys, monkeypatch):
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, "--save", tmp_path / "saved"]
    interrupt(monkeypatch, "opt", arguments, 1)
    before = snapshot(tmp_path)
    assert refused(capsys, "opt", *arguments) == (f"opt.py: error: --save {tmp_path / 'saved'}: holds an "
                                                  "interrupted run; continue it with --resume, or remove the folder")
    assert snapshot(tmp_path) == before


# ---- what comes back ---------------------------------------------------------------------------------------------

FORMATS = {
    "dense": ["--wbits", "3", "--saliency", "isc"],
    "sparse": ["--wbits", "4", "--groupsize", "16", "--act-order"],
    "compressed-tensors": ["--wbits", "4", "--sym"],
}


@pytest.mark.parametrize("save_format, name", [
    *itertools.product(["dense"], ["opt", "baichuan-13b", "qwen3-moe", "gemma4"]), ("sparse", "llama"),
    ("compressed-tensors", "opt")])
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


def test_layers_that_are_finished_are_not_pruned_again(checkpoint_folder, tmp_path, monkeypatch):
    arguments = [checkpoint_folder("opt"), "builtin", "--sparsity", ".5", *SMALL, "--save", tmp_path / "saved"]
    interrupt(monkeypatch, "opt", arguments, 2)
    pruned, keep = [], LayerFiles.save_layer
    monkeypatch.setattr(LayerFiles, "save_layer",
                        lambda self, index, *given: (pruned.append(index), keep(self, index, *given)))
    assert run("opt", *arguments, "--resume") == 0
    assert pruned == [2]


@pytest.mark.parametrize("options", [["--wbits", "4", "--nearest"], ["--sparsity", ".5", "--preset", "mixgpt"]])
def test_two_runs_with_the_same_seed_write_the_same_bytes(options, checkpoint_folder, tmp_path):
    for saved in ("one", "two"):
        assert run("bloom", checkpoint_folder("bloom"), "builtin", *options, *SMALL, "--save", tmp_path / saved,
                   "--sensitivity-file", tmp_path / saved / ".." / f"{saved}.json") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


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
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write", full)
        line = refused_after_heading(capsys, "opt", *arguments)
        assert re.fullmatch(f"opt.py: error: TMPDIR {tmp_path}: layer-00000.safetensors needs 0.000 GB, .* GB are free "
                            r"\(No space left on device\); free some space, or set TMPDIR to a folder on a larger disk",
                            line)
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
    arguments = [checkpoint_folder("opt"), "builtin", "--preset", "best", "--sparsity", ".5", *SMALL, "--batch-size",
                 "1", "--distill", "0"]
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
    ("run.json", "--resume: {saved}/progress/run.json cannot be read; remove {saved} to start over"),
    ("plan-0.safetensors", "--resume: {saved}/progress/plan-0.safetensors cannot be read (.*); remove {saved} to "
                           "start over")])
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
