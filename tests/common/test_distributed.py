"""Run several processes by torchrun, and compare them with one."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
import ranks
import torch
from conftest import ROOT, as_rank, assert_same_weights, free_port, record_of, run_together, saved_tensors
from torch.distributed import TCPStore

from mixgpt.common import distributed
from mixgpt.pruning.admm import ITERATIONS

ARGUMENTS = ["builtin", "--seqlen", "32", "--nsamples", "7", "--sparsity", ".5", "--eval", "--device", "cpu"]
MIXED = ["--sparsity-way", "weight-level", "--sensitivity", "fisher"]


@pytest.fixture
def start(fork, checkpoint_folder, tmp_path):
    """Return a function that runs LLaMA's command line in one process or two. Returns its output and exit status."""
    def start(options, world=1, prepare=as_rank, more=()):
        logs = [tmp_path / f"log-{rank}" for rank in range(world)]
        said, status = run_together(fork, [checkpoint_folder("llama"), *ARGUMENTS, *options], logs,
                                    prepare if world > 1 else None, more)
        assert not any(said[1:])
        return said[0], status

    return start


@pytest.fixture
def in_processes(fork, tmp_path):
    """Return a function that returns what a function returns in this process alone, and in each of several."""
    def results(make, world):
        port, files = free_port(), [tmp_path / str(rank) for rank in range(world)]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # noqa: F841, torchrun's
        processes = [fork(ranks.run, rank, world, port, file, make) for rank, file in enumerate(files)]
        alone = make()
        for process in processes:
            process.join(600)
            assert process.exitcode == 0
        return alone, [torch.load(file, weights_only=False) for file in files]

    return results


def test_every_way_to_prune_gives_the_same_rows_divided_among_processes(in_processes):
    alone, together = in_processes(ranks.pruned_of_all, 3)
    for case, (weights, errors, scales) in alone.items():
        for other_weights, other_errors, other_scales in (results[case] for results in together):
            for W, other in zip(weights, other_weights, strict=True):
                assert torch.equal(W == 0, other == 0), case
                torch.testing.assert_close(other, W, rtol=1e-4, atol=1e-5)
            assert other_errors == pytest.approx(errors, rel=1e-4)
            for scale, other in zip(scales, other_scales, strict=True):
                assert (scale is None) == (other is None) == (case[2] == "16 bit")
                assert scale is None or torch.allclose(scale, other, rtol=1e-5)


def test_processes_divide_the_pieces_of_the_models_own_text_and_all_have_all_of_it(in_processes):
    (alone, kept), together = in_processes(ranks.written, 2)
    text = together[0][0].view(5, 16)
    assert torch.equal(kept[0], alone) and torch.equal(together[0][1][0], text.flatten())
    assert torch.equal(together[1][0], together[0][0]) and not together[1][1]  # The first process keeps it.
    assert len({tuple(row) for row in text.tolist()}) == 5
    assert (text.flatten() == alone).double().mean() > 0.9  # but for rounding in batches of another size


def test_processes_select_the_smallest_of_all_scores(in_processes):
    alone, together = in_processes(ranks.selected_of_all, 3)
    for results in (alone, *together):
        for (name, k), (scores, mask) in results.items():
            assert mask.sum() == k, (name, k)
            assert sorted(scores[mask].tolist())[:k] == sorted(scores.flatten().tolist())[:k], (name, k)


def test_a_hessian_its_blocks_and_its_weights_take_few_exchanges(in_processes):
    expected = ["", "." * 3000], [1 + 3 * 3 + 1, 2, 1 + (ITERATIONS - 1) + 3 + 1]
    alone, together = in_processes(ranks.exchanged, 2)
    assert together == [expected] * 2 and alone == ([""], [0] * 3)


def test_processes_give_what_one_gives_and_all_the_same(in_processes):
    alone, together = in_processes(ranks.made_of_all, 3)
    for case, expected in alone.items():
        assert sum(rank[case]["rows"] for rank in together) == expected["rows"]
        for rank in together:  # a share of each matrix may be a row more than a third
            assert rank[case]["rows"] == pytest.approx(expected["rows"] / 3, abs=len(expected["outcomes"]))
        for rank in together:
            result = rank[case]
            assert all(torch.equal(result["state"][key], tensor) for key, tensor in together[0][case]["state"].items())
            assert result["perplexity"] == together[0][case]["perplexity"]
            differing = total = 0
            # Rounding may choose another code, or with best another weight, which bears on all that is behind it.
            loose = 0.1 if "best" in case else 0.01 if case[2] < 16 else 0
            first = {key: tensor for key, tensor in expected["state"].items() if "layers.0." in key}
            for key, tensor in (first if "best" in case else expected["state"]).items():
                if "best" in case:
                    assert (result["state"][key] - tensor).norm() <= 0.1 * tensor.norm()
                else:
                    far = ~torch.isclose(result["state"][key], tensor, rtol=1e-3, atol=1e-4)
                    assert far.double().mean() <= loose
                differing += ((result["state"][key] == 0) != (tensor == 0)).sum().item()
                total += tensor.numel()
            assert differing <= (loose / 5 or 1e-4) * total
            for traces, wanted in zip(result["traces"], expected["traces"], strict=True):
                torch.testing.assert_close(traces, wanted, rtol=1e-4, atol=1e-7)
            assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=loose or 1e-4)
            assert result["distance"] == pytest.approx(expected["distance"], rel=loose or 1e-3)
            assert set(result["outcomes"]) == set(expected["outcomes"])
            for key, (error, percdamp, scale) in result["outcomes"].items():
                assert (error, percdamp) == pytest.approx(expected["outcomes"][key][:2], rel=0.1 if loose else 1e-3)
                assert (scale is None) == (case[2] == 16)


def test_the_command_line_saves_once_prints_once_and_goes_on(start, tmp_path):
    def options(name):
        return [*MIXED, "--save", tmp_path / name, "--sensitivity-file", tmp_path / f"{name}.json"]

    out, status = start(options("two"), 2)
    assert status == 0 and [out.count(words) for words in ("total", "saved in", "traces ")] == [1, 1, 1], out
    assert start(options("one"))[1] == 0
    one, two = saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two")
    assert set(one) == set(two)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(two[key] == 0, tensor == 0)
    assert record_of(tmp_path / "one")["sparsity"] == record_of(tmp_path / "two")["sparsity"] == pytest.approx(
        0.5, abs=1e-3)

    out, status = start([*options("two"), "--resume"], 2)  # queued again
    assert out.startswith(f"resume   the run in {tmp_path / 'two'} is complete") and "saved in" in out and status == 0
    assert start([*options("two"), "--resume"]) == (
        f"llama.py: error: --resume: number of processes was 2 in the complete run in {tmp_path / 'two'}, now it is "
        "1; to evaluate its result again, give the folder as the model\n", 2)


@pytest.mark.slow
def test_all_processes_leave_the_model_as_pruned_if_one_has_no_memory_for_distillation(start, tmp_path):
    options = ["--nsamples", "6", "--sparsity", ".5", "--batch-size", "1", "--save"]
    assert start([*options, tmp_path / "pruned"], 2)[1] == 0
    assert start(options[:-1], 2, ranks.poor, [False, 2])[1] == 0  # the first removes what the last still reads
    out, status = start([*options, tmp_path / "saved", "--distill", "1"], 2, ranks.poor, [True, 0])
    assert status == 0 and out.count("warning  --distill: out of memory: the model stays as it was") == 1
    assert_same_weights(tmp_path / "pruned", tmp_path / "saved")


@pytest.mark.slow
def test_processes_that_share_what_distillation_keeps_distil_as_those_that_do_not(start, tmp_path):
    options = ["--nsamples", "6", "--sparsity", ".5", "--batch-size", "1", "--distill", "1", "--dtype", "bfloat16",
               "--save"]
    for way in (0, 4, 5):  # in memory of each process, and in memory and a file of both
        assert start([*options, tmp_path / str(way)], 2, ranks.in_way, [way])[1] == 0
    apart = saved_tensors(tmp_path / "0")
    for way in (4, 5):
        assert not record_of(tmp_path / str(way))["distilled"]["whole"]
        for key, tensor in saved_tensors(tmp_path / str(way)).items():
            assert torch.equal(tensor, apart[key]), key


@pytest.mark.slow
def test_the_others_wait_for_the_first_process_as_long_as_it_writes(start, tmp_path):
    options = ["--sparsity", ".5", "--save"]
    began = time.monotonic()
    out, status = start([*options, tmp_path / "slow"], 2, ranks.impatient, [1.5, False])
    assert status == 0 and "saved in" in out and time.monotonic() - began > 2 * 3, out
    assert start([*options, tmp_path / "saved"], 2)[1] == 0
    assert_same_weights(tmp_path / "slow", tmp_path / "saved")


HANGING = """
import sys, conftest, ranks
rank, port, *arguments = sys.argv[1:]
conftest.command("llama", arguments, f"{arguments[-1]}-{rank}", ranks.impatient, (int(rank), 2, int(port), 0, True))
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_in_one_line(checkpoint_folder, tmp_path):
    """And their interpreters, where gloo's threads would wait until it comes."""
    words = [free_port(), checkpoint_folder("llama"), *ARGUMENTS, "--save", tmp_path / "saved"]
    first, second = (subprocess.Popen([sys.executable, "-c", HANGING, *map(str, (rank, *words))], cwd=ROOT / "tests",
                                      env=os.environ | {"PYTHONPATH": str(ROOT)}) for rank in range(2))
    try:
        assert first.wait(300) == 1 and second.poll() is None
    finally:
        first.kill()
        second.kill()
    assert (tmp_path / "saved-0").read_text().splitlines()[-1] == (
        "llama.py: error: another process does not answer; what is in the folder of --save goes on with --resume")


@pytest.mark.parametrize("saves", [True, False])
def test_machines_without_a_shared_folder_are_told_before_the_first_layer(saves, fork, checkpoint_folder, tmp_path):
    words = [checkpoint_folder("llama"), *ARGUMENTS, *(["--save", tmp_path / "saved"] if saves else [])]
    said, status = run_together(fork, words, [tmp_path / "0", tmp_path / "1"], ranks.elsewhere, [tmp_path / "other"])
    place = f"--save {tmp_path / 'saved'}" if saves else f"TMPDIR {tempfile.gettempdir()}"
    assert status == 2 and not (tmp_path / "saved").exists()
    for text in said:
        assert text.count("\n") == 1 and text.startswith(
            f"llama.py: error: {place}: a process does not see what the first one writes there; it must be a folder")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(checkpoint_folder, tmp_path):
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "llama.py",
             checkpoint_folder("llama"), *ARGUMENTS, *MIXED, "--nsamples", "3000", "--save", tmp_path / "saved"]
    process = subprocess.Popen([sys.executable, "-m", *map(str, words)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "saved" / "progress" / "run.json").is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    workers = [child for child in psutil.Process(process.pid).children()
               if "llama.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    first, = (worker for worker in workers if worker.environ()["RANK"] == "0")  # all others wait for this one
    first.send_signal(signal.SIGKILL)
    assert process.wait(600) != 0
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert "SIGKILL" in process.stderr.read() or "Signal 9" in process.stderr.read()


def test_a_process_whose_first_has_refused_the_input_is_no_bug(fork, checkpoint_folder, tmp_path):
    (saved := tmp_path / "saved").mkdir()  # in which the logs are
    said, _ = run_together(fork, [checkpoint_folder("llama"), *ARGUMENTS, "--save", saved], [saved / "0", saved / "1"])
    assert said[0].startswith(f"llama.py: error: --save {saved}: exists and is not an empty")
    *_, last = said[1].splitlines()  # PyTorch may warn before it.
    assert last.startswith("llama.py: error: another process has ended; ")


def test_fewer_sequences_than_processes_or_one_gpu_for_all_are_refused(prune, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert prune("llama", "--sparsity .5 --nsamples 1", status=2) == (
        "llama.py: error: --nsamples 1: must be at least 2, the number of processes\n")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert "--device cuda:1: torchrun gives each process a GPU of its own" in prune("llama", "--device cuda:1",
                                                                                    status=2)
