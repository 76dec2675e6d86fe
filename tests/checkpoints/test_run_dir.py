"""Check the folder of a run: who may write to it, what may go on in it, and that what comes back is what was left."""

import errno
import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_weights, contents, full, record_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mixgpt
from mixgpt.allocation import fisher
from mixgpt.app import compression, opening, pipeline
from mixgpt.checkpoints import formats, load, run_dir
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import choices, memory
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming
from mixgpt.pruning import distill, needs, solvers

AGAIN = "to evaluate its result again, give the folder as the model"
NOT_EMPTY = "exists and is not an empty folder; name another one, or give --overwrite to replace a saved model"
HALF = "--sparsity .5 --save"


@pytest.fixture
def interrupt(prune, monkeypatch):
    """Return a function that runs a command line, as `prune` does, until so many layers are finished."""
    def interrupt(finished, *arguments, **options):
        keep, count = RunDir.save_layer, []

        def finish(*given, **more):
            keep(*given, **more)
            count.append(1)
            if len(count) == finished:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunDir, "save_layer", finish)
            prune(*arguments, status=130, **options)

    return interrupt


def snapshot(path):
    """Return {path: bytes, None for folders} of everything below a path."""
    return {file: None if file.is_dir() else file.read_bytes() for file in sorted(Path(path).rglob("*"))}


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
    (tmp_path / "progress" / "run.json").write_text('{"published": "dense"}' if saved else "{}")
    (tmp_path / "progress" / "layer-00000.safetensors").write_bytes(bytes(layers))
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(bytes(saved))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    with RunDir(tmp_path, nbytes=200):
        pass
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r": finished layers and the result need 0.000 GB, 0.000 GB are free there"):
        RunDir(tmp_path, nbytes=200)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_the_run_goes_on(error, prune, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(error, "as Lustre")

    monkeypatch.setattr(run_dir, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=0, LOCK_NB=0))
    assert prune("opt", "--gmp", HALF, tmp_path / "saved").startswith(
        f"warning  --save {tmp_path / 'saved'}: its file system has no locks; start no other run there\n")
    with pytest.raises(InputError), RunDir(tmp_path / "none"):
        raise InputError("a text is too short")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"] and not (tmp_path / "saved" / "progress").exists()


def test_what_the_end_needs_of_memory_is_asked_for_before_weights_are_read(checkpoint_folder, prune, tmp_path,
                                                                           monkeypatch):
    size = load.size(load.read_config(checkpoint_folder("opt")), "auto")
    monkeypatch.setattr(streaming, "stored_tensors", None)
    monkeypatch.setattr(formats, "LARGEST", 50_000)
    monkeypatch.setitem(choices.FORMATS, "whole", choices.SaveFormat("", formats.save_dense))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of which each loads packed weights to verify them
    for save_format, needed in (("dense", 50_000), ("sparse", 50_000), ("whole", size),
                                ("compressed-tensors", 2 * size)):
        words = ["opt", "--gmp --wbits 4 --sym --save-format", save_format, HALF, tmp_path / "saved"]
        monkeypatch.setattr(memory, "free_on_host", lambda needed=needed: needed - 1)
        assert f"--save {tmp_path / 'saved'}: needs 0.000 GB of memory at the end" in prune(*words, status=2)
        monkeypatch.setattr(memory, "free_on_host", lambda needed=needed: needed)
        assert "NoneType" in prune(*words, status=2)


@pytest.mark.parametrize("kind, free, needed", [("tmpfs", 89_999, 90_000), ("ramfs", 89_999, 90_000), ("ext4", 0, 1)])
def test_files_in_a_tmpfs_take_memory(kind, free, needed, tmp_path, monkeypatch):
    disks = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(memory.psutil, "disk_partitions", lambda all: disks if all else [])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0 if kind != "tmpfs" else 10**9))
    monkeypatch.setattr(memory, "free_on_host", lambda: free)
    with pytest.raises(InputError, match=f"0.000 GB are free there{'' if kind == 'ext4' else ', as .* is memory'}; "):
        RunDir(tmp_path / "new" / "saved", nbytes=needed)
    if kind != "ext4":
        with RunDir(tmp_path / "new" / "saved", nbytes=needed - 1):
            pass


def hold(path, held):
    """Hold a folder until this process is killed, for `fork`."""
    with RunDir(path):
        held.touch()
        time.sleep(99)


def test_a_folder_is_held_against_other_processes_until_its_process_is_killed(fork, prune, tmp_path):
    saved, held = tmp_path / "saved", tmp_path / "held"
    holder = fork(hold, saved, held)
    try:
        while not held.exists():
            assert holder.is_alive()
            time.sleep(0.01)
        before = snapshot(tmp_path)
        for resume in ("", "--resume"):
            assert prune("opt", "--gmp", HALF, saved, resume, status=2) == (
                f"llama.py: error: --save {saved}: is in use by another run\n")
            assert snapshot(tmp_path) == before
    finally:
        holder.kill()
        holder.join()
    prune("opt", "--gmp", HALF, saved)


def test_a_run_goes_on_with_the_same_flags_and_inputs_only(checkpoint_folder, prune, interrupt, tmp_path, monkeypatch):
    source, saved = shutil.copytree(checkpoint_folder("opt"), tmp_path / "model"), tmp_path / "saved"

    def refused(*options):
        return prune("opt", "--extra 1", HALF, saved, *options, model=source, status=2)

    interrupt(1, "opt", "--extra 1", HALF, saved, model=source)
    before = snapshot(saved)
    assert refused() == (f"llama.py: error: --save {saved}: holds an interrupted run; continue it with --resume, or "
                         f"remove {saved}/progress\n")
    for flag, was, now in (("--sparsity", "0.5", "0.6"), ("--dtype", "float32", "bfloat16"),
                           ("--percdamp", "0.01", "0.02")):
        assert re.search(f"--resume: {flag} was {was} .*, now it is {now}$", refused(flag, now, "--resume"))
    several = "--seed 1", "--sparsity .6", "--blocksize 8", "--percdamp .02", "--extra .5"
    assert "--resume: --sparsity was 0.5 " in refused(*several, "--resume")  # the first in the order of --help

    draw = opening.calibration_samples
    for changed in (0, "0, further"):  # the seed of these sequences
        with monkeypatch.context() as patch:
            patch.setattr(opening, "calibration_samples", lambda *asked, **more: (lambda tokens, source: (
                tokens.flip(1) if asked[3] == changed else tokens, source))(*draw(*asked, **more)))  # noqa: B023
            assert "--resume: calibration tokens was " in refused("--resume")

    whole = load_file(source / "model.safetensors")
    for name in ("layers.2.fc2.weight", "final_layer_norm.weight"):
        key = f"model.decoder.{name}"
        save_file(whole | {key: whole[key] + 0.01}, source / "model.safetensors", metadata={"format": "pt"})
        assert "--resume: model's weights was " in refused("--resume")
    assert snapshot(saved) == before


@pytest.mark.parametrize("weights", ["in shards", "in a .bin file"])
def test_a_run_may_go_on_with_another_evaluation_and_folder(weights, checkpoint_folder, prune, interrupt, tmp_path):
    source, saved = shutil.copytree(checkpoint_folder("opt"), tmp_path / "model"), tmp_path / "saved"
    interrupt(1, "opt", HALF, saved, model=source)
    moved = source.rename(tmp_path / "moved")
    state = load_file(moved / "model.safetensors")
    (moved / "model.safetensors").unlink()
    if weights == "in shards":
        AutoModelForCausalLM.from_pretrained(checkpoint_folder("opt")).save_pretrained(moved, max_shard_size=40_000)
    else:
        torch.save(state, moved / "pytorch_model.bin")
    prune("opt", HALF, saved, "--resume --dense", model=moved)
    assert set(record_of(saved)["perplexity"]) == {"dense", "SparseGPT"}


@pytest.mark.parametrize("before, now", [("sparse", "dense"), ("dense", "sparse")])
def test_a_run_may_go_on_in_another_format_until_it_has_ended(before, now, prune, interrupt, tmp_path, monkeypatch):
    words, saved = ["llama", "--wbits 4", HALF], tmp_path / "saved"
    prune(*words, tmp_path / "whole", "--save-format", now)
    interrupt(1, *words, saved, "--save-format", before)
    file = saved / "progress" / "run.json"
    run = json.loads(file.read_text())
    assert "--save-format" not in run["identity"]
    with monkeypatch.context() as patch:  # the result is in place already
        patch.setattr(pipeline, "_add_scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prune(*words, saved, "--resume --save-format", before, status=130)
        patch.setattr(streaming, "write", None)
        prune(*words, saved, "--resume --save-format", before, status=130)
    prune(*words, saved, "--resume --save-format", now)
    assert contents(saved) == contents(tmp_path / "whole")
    assert f"--save-format was {now} in the complete run" in prune(*words, saved, "--resume --save-format", before,
                                                                   status=2)


@pytest.mark.parametrize("until, more", [
    ("tokenizer.json", "--sparsity .75"), ("config.json", "--sparsity .75"), ("config.json", "--save-format sparse")])
def test_a_folder_whose_model_is_being_replaced_holds_none_until_resume(until, more, prune, tmp_path, monkeypatch):
    """The last one has no finished layers."""
    options, saved = ["llama", more, "--overwrite --save"], tmp_path / "saved"
    prune("llama", HALF, saved)
    prune(*options, tmp_path / "whole")
    replace = Path.replace

    def stopped(file, target):
        if file.parent.name == "result" and file.name == until:
            raise KeyboardInterrupt
        return replace(file, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        prune(*options, saved, status=130)
    with pytest.raises(InputError, match="holds no model"):
        load.read_config(saved)
    for name in ("mixgpt.json", "README.md"):
        (saved / f"{name}.1.partial").touch()  # A kill while they were written would have left these.
    prune(*options, saved, "--resume")
    assert contents(saved) == contents(tmp_path / "whole")


@pytest.fixture
def complete(prune, tmp_path):
    """Give the folder of a complete run and the tables that it printed."""
    saved = tmp_path / "complete" / "saved"
    return saved, prune("opt", "--dense", HALF, saved).partition("\n\n")[2]


def test_the_folder_of_a_complete_run_without_resume_or_of_others_is_refused(complete, prune, tmp_path):
    notes, saved = tmp_path / "notes", complete[0]
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert "--seqlen 32: the train text of" in prune("opt", HALF, saved, "--overwrite", data=notes / "a.txt", status=2)
    for folder, resume in ((saved, ""), (notes, ""), (notes, "--resume")):
        assert prune("opt", "--dense", HALF, folder, resume, status=2) == (
            f"llama.py: error: --save {folder}: {NOT_EMPTY}\n")
    assert snapshot(tmp_path) == before
    for lost in ("mixgpt.json", "model.safetensors"):
        shutil.copytree(saved, tmp_path / lost)
        (tmp_path / lost / lost).unlink()
        assert NOT_EMPTY in prune("opt", "--dense", HALF, tmp_path / lost, "--resume", status=2)
    (tmp_path / "mixgpt.json" / "mixgpt.json").write_text("[]")
    assert "/mixgpt.json: " in prune("opt", "--dense", HALF, tmp_path / "mixgpt.json", "--resume", status=2)


def test_resume_of_a_complete_run_prints_its_results_again_reads_no_weights_and_refuses_other_inputs(
        complete, checkpoint_folder, prune, tmp_path, monkeypatch):
    saved, tables = complete
    before = snapshot(saved)
    (saved / "progress").mkdir()  # as if killed while it removed them
    for name in ("lock", "layer-00001.safetensors"):
        (saved / "progress" / name).write_text("")
    monkeypatch.setattr(load, "open_model", None)
    out = prune("opt", "--dense", HALF, saved, "--resume --record", tmp_path / "record.json")
    said, _, again = out.partition("\n\n")
    assert said == f"resume   the run in {saved} is complete; these are its results"
    assert again == tables and "dense " in again and "saved in" in again
    assert snapshot(saved) == before
    assert (tmp_path / "record.json").read_bytes() == (saved / "mixgpt.json").read_bytes()
    assert "resume" not in prune("opt", "--dense", HALF, saved, "--resume --quiet")
    for arguments, what in (("--sparsity .6", "--sparsity was 0.5 in the complete run in {}, now it is 0.6"),
                            ("--eval ptb", "--eval was ['builtin'] in the complete run in {}, now it is ['ptb']")):
        assert prune("opt", "--dense", HALF, saved, arguments, "--resume", status=2) == (
            f"llama.py: error: --resume: {what.format(saved)}; {AGAIN}\n")
    model, source = checkpoint_folder("opt"), shutil.copytree(checkpoint_folder("opt"), tmp_path / "model")
    assert prune("opt", "--dense", HALF, saved, "--resume", model=source, status=2) == (
        f"llama.py: error: --resume: model was {model} in the complete run in {saved}, now it is {source}; {AGAIN}\n")
    assert snapshot(saved) == before


@pytest.mark.parametrize("save_format, name, options", [
    ("dense", "qwen3-moe", "--wbits 3 --saliency isc"), ("dense", "gemma4", "--wbits 3 --saliency isc"),
    ("dense", "llama", "--wbits 3 --target dense --rotate"),
    ("sparse", "llama", "--wbits 4 --groupsize 16 --act-order"), ("compressed-tensors", "opt", "--wbits 4 --sym")])
def test_an_interrupted_run_gives_the_files_of_a_whole_one(save_format, name, options, prune, interrupt, tmp_path):
    """--resume begins in an empty folder, too."""
    words, saved = [name, options, "--percdamp .02 --save-format", save_format, HALF], tmp_path / "parts"
    (tmp_path / "whole").mkdir()
    prune(*words, tmp_path / "whole", "--resume")
    interrupt(1, *words, saved)
    interrupt(1, *words, saved, "--resume")
    prune(*words, saved, "--resume")
    whole, parts = contents(tmp_path / "whole"), contents(saved)
    assert all(row["error"] > 0 and row["percdamp"] == .02 and row["wbits"] == int(options.split()[1])
               for row in parts["mixgpt.json"]["matrices"])
    assert parts == whole


def test_a_temporary_folder_that_is_full_is_named_and_not_save(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", full)
        assert prune("opt", "--sparsity .5", status=2) == (
            "llama.py: error: TMPDIR: 0.000 GB of pruned layers cannot be written (No space left on device); set it to "
            "another folder, or give --save\n")
    monkeypatch.setattr(memory, "room", lambda path: (room, bool(why)))
    layers, hidden = 102_528, 4 * 32 * 32 * 4
    for needed, why in ((layers, ""), (layers + hidden, ", as its file system is memory")):
        room = needed
        prune("opt", "--sparsity .5")
        room = needed - 1
        assert prune("opt", "--sparsity .5", status=2) == (
            f"llama.py: error: TMPDIR {tmp_path}: finished layers and the result need 0.000 GB, 0.000 GB are free "
            f"there{why}; free some, or name another folder\n")
    room = hidden - 1
    monkeypatch.setattr(memory, "free", lambda _: hidden)  # of which half is for the work
    assert prune("opt", "--sparsity .5", status=2) == (
        "llama.py: error: --nsamples, --seqlen: hidden states take 0.0 GB, more than is free in memory, and cannot "
        f"be written ({tmp_path} is memory, too); lower these, or set TMPDIR to a larger disk\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("saves", [True, False])
def test_a_step_that_starts_over_goes_on_from_the_finished_layers(saves, prune, tmp_path, monkeypatch):
    """As when the GPU's memory runs out in the third layer."""
    options = "--sparsity .5 --target dense --rotate --batch-size 1 --record {0}.json" + " --save {0}" * saves
    prune("opt", options.format(tmp_path / "whole"))
    save_layer, indexes = RunDir.save_layer, []

    def scarce(files, index, *given):
        indexes.append(index)
        if len(indexes) == 3:
            raise torch.OutOfMemoryError("as if")
        save_layer(files, index, *given)

    monkeypatch.setattr(RunDir, "save_layer", scarce)
    monkeypatch.setattr(memory.MemoryPlan, "next_cheaper", lambda plan: (plan, "as if"))
    prune("opt", options.format(tmp_path / "again"))
    assert indexes == [0, 1, 2, 2]
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "again"))
    assert again["matrices"] == whole["matrices"] and again["perplexity"] == whole["perplexity"]
    if saves:
        assert_same_weights(tmp_path / "again", tmp_path / "whole")


@pytest.mark.parametrize("finished, more", [
    *(pytest.param(finished, "", marks=pytest.mark.slow) for finished in (3, 4, 6)), (8, "--wbits 4 --effort 1.1")])
def test_distillation_that_is_interrupted_costs_at_most_itself(finished, more, prune, interrupt, tmp_path, monkeypatch):
    """Ctrl-C behind the last pruned layer, the first distilled one, all, and the second quantized one."""
    options, saved = ["llama", f"--preset best {more}", HALF], tmp_path / "saved"
    prune(*options, tmp_path / "whole")
    if finished != 6:
        interrupt(finished, *options, saved)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(RunDir, "write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            prune(*options, saved, status=130)
        assert {file.name.partition("-")[0] for file in saved.glob("progress/*-0000*.safetensors")} == {"layer"}
    for owner, name in ((solvers, "admm_pruner"), (distill, "reference_states"), (fisher, "output_gradients"),
                        *[(distill, "distill")] * (finished > 4)):
        monkeypatch.setattr(owner, name, None)  # nothing is done again
    if finished > 3:
        monkeypatch.setattr(distill, "ways", lambda *_: [])
    prune(*options, saved, "--resume")
    assert contents(saved) == contents(tmp_path / "whole")


def test_a_run_that_goes_on_has_the_grids_of_the_distilled_layers(prune, tmp_path, monkeypatch):
    """Killed when all are written and none has replaced the pruned one: scales are trained, and both must fit."""
    options = "--sparsity .5 --wbits 4 --distill .5 --save-format sparse --save"
    prune("llama", options, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "take_distilled", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        prune("llama", options, tmp_path / "saved", status=130)
    prune("llama", options, tmp_path / "saved", "--resume")
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")


def test_a_run_that_goes_on_prunes_in_the_way_of_the_interrupted_one(prune, interrupt, tmp_path, monkeypatch):
    """As on a GPU with less memory free, where two passes through each layer would be chosen."""
    prune("llama", HALF, tmp_path / "whole")
    ways, apply = [], compression._prune
    monkeypatch.setattr(compression, "_prune", lambda *given: (ways.append(given[-1]), apply(*given))[1])
    interrupt(1, "llama", HALF, tmp_path / "saved")
    monkeypatch.setattr(needs, "pass_bytes", lambda *_: (10**18, 0))
    decide = opening._plan

    def on_a_gpu(current):
        lines = decide(current)
        opening._plan_passes(current)
        return lines

    monkeypatch.setattr(opening, "_plan", on_a_gpu)
    prune("llama", HALF, tmp_path / "saved", "--resume")
    assert ways[0] == ways[1] and not ways[1].two_passes
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")
    monkeypatch.setattr(opening, "_plan", decide)
    interrupt(1, "llama", "--no-true-sequential", HALF, tmp_path / "cut")
    file = tmp_path / "cut" / "progress" / "run.json"
    file.write_text(file.read_text().replace('"batch_size": 2', '"batch_size": 1'))  # as where memory has run out
    prune("llama", "--no-true-sequential", HALF, tmp_path / "cut", "--resume")
    assert ways[-1].batch_size == 1 and ways[-1].two_passes


@pytest.mark.parametrize("calls, what, finished", [  # as many files are written before the disk is full
    (0, "layer-00000.safetensors", 0), (2, "layer-00002.safetensors", 2), (4, "the model", 3)])
def test_a_full_disk_gets_one_line_and_resume_gives_the_files(calls, what, finished, prune, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST", 40_000)  # the result has several files
    saved = tmp_path / "saved"
    prune("opt", HALF, tmp_path / "whole")
    save_file, left = streaming.save_file, iter(range(calls))
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "save_file", lambda *given, **more: full() if next(left, None) is None else save_file(
            *given, **more))
        line = prune("opt", HALF, saved, status=2)
    assert line == (f"llama.py: error: --save {saved}: {what} cannot be written (No space left on device); "
                    "free some space and continue with --resume\n")
    assert len(list(saved.glob("progress/layer-*.safetensors"))) == finished
    assert finished or not saved.exists()
    prune("opt", HALF, saved, "--resume")
    assert contents(saved) == contents(tmp_path / "whole")


def test_what_the_disk_has_damaged_of_a_layer_is_computed_again(prune, interrupt, tmp_path):
    file = tmp_path / "saved" / "progress" / "layer-00001.safetensors"
    prune("llama", "--wbits 4", HALF, tmp_path / "whole")
    interrupt(2, "llama", "--wbits 4", HALF, tmp_path / "saved")
    file.write_bytes(file.read_bytes()[:-9])
    out = prune("llama", "--wbits 4", HALF, tmp_path / "saved", "--resume")
    assert f"resume   {file} cannot be read (" in out
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["run.json", "targets-0.safetensors", "layer-00001.safetensors"])
def test_what_identifies_the_run_or_is_distilled_and_cannot_be_read_is_refused(name, prune, interrupt, tmp_path):
    options, saved = ["llama", "--preset best --wbits 4 --effort 1.1", HALF], tmp_path / "saved"
    interrupt(7, *options, saved)  # behind the first quantized layer
    file = saved / "progress" / name
    file.write_bytes(file.read_bytes()[:-9])
    before = snapshot(tmp_path)
    line = prune(*options, saved, "--resume", status=2)
    assert re.fullmatch(f"llama.py: error: --resume: {file} cannot be read; remove {file.parent} to start over: .*\n",
                        line)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place, change, line", [
    ("progress/run.json", {"schema": 2, "program": {"version": "9"}},
     "was written by version 9 of this program (schema 2); this is version 1.0.0 (schema 1)"),
    ("mixgpt.json", {"schema": None, "program": None},
     "was written by version unknown of this program (schema None); this is version 1.0.0 (schema 1)")])
def test_a_run_of_another_version_of_this_program_is_refused(place, change, line, prune, interrupt, tmp_path):
    saved = tmp_path / "saved"
    if place == "mixgpt.json":
        prune("opt", "--gmp", HALF, saved)
    else:
        interrupt(1, "opt", "--gmp", HALF, saved)
    content = json.loads((saved / place).read_text())
    assert content["schema"] == 1 and content["program"]["version"] == mixgpt.__version__
    content = {key: value for key, value in (content | change).items() if value is not None}
    (saved / place).write_text(json.dumps(content))
    assert prune("opt", "--gmp", HALF, saved, "--resume", status=2) == (
        f"llama.py: error: --resume: the run in {saved} {line}\n")
