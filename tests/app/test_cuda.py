"""Run the whole command line on a GPU, and compare what it saves and reports with a CPU's.

The GPU is a real one where there is one (marked gpu), else the make-believe one of makebelieve.py. Each family meets
a third of the jobs, with the dtypes and the room on the GPU in turn; with `--every-combination` pytest takes all.
"""

import contextlib
import gc
import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import FAMILIES, read_little, saved_tensors, slow_but
from makebelieve import Gpu, GpuTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mixgpt.allocation import fisher
from mixgpt.app import cli
from mixgpt.checkpoints import load
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import memory, runtime
from mixgpt.common.choices import RECORD
from mixgpt.kernels import columns, selection
from mixgpt.modeling import running
from mixgpt.pruning import distill, needs, training
from mixgpt.sparsegpt import Walk

JOBS = {
    "dense and magnitude": "--sparsity .5 --gmp --dense", "SparseGPT": "--sparsity .5",
    "MixGPT, two passes": "--sparsity .5 --preset mixgpt --no-true-sequential", "2:4": "--prunen 2 --prunem 4",
    "best": "--sparsity .5 --preset best", "2:4 + 4 bit": "--prunen 2 --prunem 4 --preset best --wbits 4 --effort 1.1",
    "50% + 4 bit, sparse": "--sparsity .5 --wbits 4 --act-order --save-format sparse",
    "4:8 + 4 bit, compressed-tensors": "--prunen 4 --prunem 8 --wbits 4 --sym --save-format compressed-tensors",
    "best + 4 bit": "--sparsity .5 --preset best --wbits 4",
}
DTYPES = ("float32", "bfloat16", "float16")
ROOMS = ("ample", "none")
KERNEL = columns.triton_obstacle


def chosen(family, job, dtype, room):
    """Say whether a combination is one of those that run always: every third pair of family and job."""
    i, j = list(FAMILIES).index(family), list(JOBS).index(job)
    return (i + j) % 3 == 0 and dtype == DTYPES[(i + 2 * j) // 3 % 3] and room == ROOMS[(i + j) // 3 % 2]


def pytest_generate_tests(metafunc):
    if "combination" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-combination")
        taken = [each for each in itertools.product(FAMILIES, JOBS, DTYPES, ROOMS) if every or chosen(*each)]
        first = [each for i, each in enumerate(taken) if i % 3 == (i // 3 + i // 9) % 3]  # all families and jobs, once
        metafunc.parametrize("combination", slow_but(first, taken), ids=" ".join)


@pytest.fixture(params=[pytest.param(True, marks=pytest.mark.gpu, id="real") if torch.cuda.is_available()
                        else pytest.param(False, id="make-believe")])
def gpu(request, monkeypatch, tmp_path_factory):
    """Give a function that returns a context with the GPU; that of the make-believe one takes its memory.

    Columns are walked by PyTorch on the make-believe one: its kernels run in an interpreter, which takes long.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    read_little(monkeypatch)
    if request.param:
        return contextlib.nullcontext
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
    monkeypatch.setattr(selection, "DIGIT", 8)  # else numbers of scores take more memory than so small a model
    return Gpu


@pytest.fixture
def simulated(gpu):
    if gpu is not Gpu:
        pytest.skip("needs the make-believe GPU")
    return Gpu


@pytest.fixture
def run(checkpoint_folder, tmp_path, capsys):
    """Return a function that runs a job on a device and returns what it saved and reported, and what it printed."""
    count = itertools.count()

    def run(family, job, device, *more, dtype="float32", save=None, status=0):
        folder = save or tmp_path / str(next(count))
        words = [checkpoint_folder(family), "builtin", *JOBS.get(job, job).split(), "--seqlen", 32, "--nsamples", 5,
                 "--eval", "builtin", "--device", device, "--dtype", dtype, "--save", folder, *more]
        assert cli.main("llama.py", [str(word) for word in words]) == status
        printed = capsys.readouterr()
        if status:
            return printed.err
        record = json.loads((folder / RECORD).read_text())
        state = saved_tensors(folder)
        if "--save-format" in words:
            state = load.load_model(str(folder), "auto").state_dict()
        return state, record, printed.out

    return run


@pytest.fixture
def no_waiting_in_the_walk(monkeypatch):
    """Fail where the host waits for the GPU while columns are walked."""
    walk = Walk.run

    def watched(*args, **kwargs):
        before = Gpu.current.synchronisations.copy() if Gpu.current else None
        result = walk(*args, **kwargs)
        assert before is None or not Gpu.current.synchronisations - before
        return result

    monkeypatch.setattr(Walk, "run", watched)


def compare(ours, theirs, job, dtype="float32"):
    """Check that what two devices made is equal, up to the rounding of their sums.

    Weights whose scores differ by less than that may change places, and what is pruned after them reads other inputs,
    so that each further layer differs more. Layers before the first such weights have errors equal to within rounding;
    in the first layer with some, the matrix with the fewest has no more than scores lie within rounding of each other.
    """
    (state, record, _), (expected, wanted, _) = ours, theirs
    assert set(state) == set(expected)
    options = JOBS.get(job, job)
    # scores in 16 bit, and those of ADMM, whose products have as many digits, are good to 2⁻⁸; those in float32 to
    # 2⁻²⁴ times the condition of the damped Hessian, which is at most columns / percdamp: 2⁻¹² here
    rough = dtype != "float32" or "best" in options or "--target dense" in options
    rounding = 2.0 ** (-8 if rough else -12)
    assert record["sparsity"] == pytest.approx(wanted["sparsity"], abs=5e-3 if "wbits" in options else 1e-6)
    for layer, rows in itertools.groupby(zip(record["matrices"], wanted["matrices"], strict=True),
                                         lambda pair: pair[0]["layer"]):
        rows = list(rows)
        if differing := [count for mine, _ in rows if (count := turned(state, expected, mine))]:
            count, numel = min(differing)
            assert count <= max(4, 4 * rounding * numel), (layer, differing)
            break
        errors = [[row.get("error", 0) for row in each] for each in zip(*rows, strict=True)]
        assert errors[0] == pytest.approx(errors[1], rel=4 * rounding, abs=1e-6)
    else:
        for method, values in wanted["perplexity"].items():
            assert record["perplexity"][method] == pytest.approx(values, rel=4 * rounding)
    if "--gmp" in options:
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


def turned(state, expected, row):
    """Return how many weights of a matrix are zero in one of two results only, and its size; None if there are none."""
    key, = (key for key in state if f".{row['layer']}.{row['name']}.weight" in key)
    count = ((state[key] == 0) != (expected[key] == 0)).sum().item()
    return (count, state[key].numel()) if count else None


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_gpu_gives_what_a_cpu_gives(combination, gpu, run, no_waiting_in_the_walk, monkeypatch):
    family, job, dtype, room = combination
    for module in (fisher, distill):  # gradients of other kernels of attention round otherwise
        monkeypatch.setattr(module, "repeatable_attention", lambda device: sdpa_kernel(SDPBackend.MATH))
    expected = run(family, job, "cpu", dtype=dtype)
    if room == "none":  # for hidden states
        monkeypatch.setattr(running, "place_for", lambda *_, **__: "host")
        monkeypatch.setattr(needs, "place_for", lambda *_, **__: "host")
    with gpu():
        compare(run(family, job, "cuda:0", dtype=dtype), expected, job, dtype)


def test_a_gpu_keeps_the_experts_that_a_cpu_keeps(gpu, run):
    job = "--experts .5 --sparsity .5"
    expected = run("qwen3-moe", job, "cpu")
    with gpu() as device:
        ours = run("qwen3-moe", job, "cuda:0")
    waits = {what for what, place in device.synchronisations if place.startswith("experts.py")} if device else ()
    assert ours[1]["kept_experts"] == expected[1]["kept_experts"] and "aten.nonzero.default" not in waits
    compare(ours, expected, job)


def test_gradients_on_a_gpu_take_the_attention_that_gives_the_same_each_time(simulated, run):
    fused, enabled = [], torch.backends.cuda.flash_sdp_enabled
    with Gpu(), torch.nn.modules.module.register_module_forward_pre_hook(
            lambda *_: fused.append(enabled()) if torch.is_grad_enabled() else None):
        run("llama", "best", "cuda:0")
    assert len(fused) > 100 and not any(fused)


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), "auto")])
def test_a_gpu_that_does_not_multiply_bfloat16_computes_in_float32(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.choose_dtype("auto", LlamaConfig(dtype="bfloat16"), torch.device("cuda")) == dtype


@pytest.mark.parametrize("free", [None, 0])  # with hidden states there, and on the host
def test_a_model_whose_kernels_need_a_gpu_is_checked_there(free, simulated, run, monkeypatch):
    forward = LlamaMLP.forward

    def on_gpus(self, X):
        if not X.is_cuda:
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
        return forward(self, X)

    monkeypatch.setattr(LlamaMLP, "forward", on_gpus)
    with Gpu(free=free):
        run("llama", "", "cuda:0")


@pytest.mark.parametrize("job, dtype", [
    ("SparseGPT", "float32"), ("2:4", "bfloat16"), ("50% + 4 bit, sparse", "float16")])
def test_the_kernel_gives_what_a_cpu_gives(job, dtype, gpu, run, monkeypatch, no_waiting_in_the_walk):
    """In the layouts that the pipeline gives it: on a GPU U lies by columns, as solve_triangular returns it."""
    launched, columns_cuda = [], pytest.importorskip("mixgpt.kernels.columns_cuda", exc_type=ImportError)
    KERNEL.cache_clear()
    monkeypatch.setattr(columns, "triton_obstacle", KERNEL)
    walk = columns_cuda.walk_columns
    monkeypatch.setattr(columns_cuda, "walk_columns", lambda *args: launched.append(args[2].stride()) or walk(*args))
    one_layer = ["--maxlayer", 1]  # which an interpreter takes seconds for
    expected = run("llama", job, "cpu", *one_layer, dtype=dtype)
    with gpu():
        found = run("llama", job, "cuda:0", *one_layer, dtype=dtype)
    KERNEL.cache_clear()
    assert len(launched) >= 4 and (1, 32) in launched  # the inputs of a layer
    compare(found, expected, job, dtype)


def test_tensors_on_two_devices_are_refused_and_waits_and_bytes_are_counted():
    """Guards the make-believe GPU itself."""
    with Gpu(memory=4096) as gpu:
        x, y = torch.ones(4, 4, device="cuda:0"), torch.ones(4, 4)
        assert isinstance(x, GpuTensor) and x.device == torch.device("cuda:0") and not isinstance(y, GpuTensor)
        for mixed in (lambda: x + y, lambda: torch.cat([x, y]), lambda: y.index_put_((x.long()[0],), x[0]),
                      lambda: torch.nn.functional.linear(y, x), lambda: x.addmm_(x, y)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert not gpu.synchronisations
        waits = (lambda: x[0, 0].item(), lambda: bool((x > 0).all()), lambda: x.cpu(), lambda: x[x > 0],
                 lambda: x.nonzero(), lambda: y.copy_(x), lambda: x.tolist(), lambda: float(x.sum()),
                 lambda: torch.tensor([1.0, 2.0], device="cuda:0"))
        for count, wait in enumerate(waits, 1):
            wait()
            assert sum(gpu.synchronisations.values()) >= count
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(1024, device="cuda:0")
        before, view = gpu.used, torch.ones(512, device="cuda:0")[:3]
        assert gpu.used == before + 2048
        del view
        assert gpu.used == before


def test_memory_that_pytorch_holds_but_does_not_use_is_free(monkeypatch):
    for name, value in {"mem_get_info": (100, 1000), "memory_reserved": 700, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert memory.free(torch.device("cuda")) == 500 * memory.USABLE


def test_what_control_groups_leave_of_the_hosts_memory_is_free(tmp_path, monkeypatch):
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "process").write_text("0::/job/step\n")
    for group, most in {"job": 7000, "job/step": "max"}.items():
        (tmp_path / group / "memory.max").write_text(f"{most}\n")
        (tmp_path / group / "memory.stat").write_text("anon 1500\nfile 9000\nshmem 500\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "process")
    assert memory.free(torch.device("cpu")) == 5000 * memory.USABLE
    (tmp_path / "process").write_text("5:cpu:/\n4:memory:/job/step\n0::/\n")  # version 1
    (tmp_path / "memory" / "job" / "step").mkdir(parents=True)
    for group, most in {"memory": 2**63 - 4096, "memory/job": 6000, "memory/job/step": 2**63 - 4096}.items():
        (tmp_path / group / "memory.limit_in_bytes").write_text(f"{most}\n")
        (tmp_path / group / "memory.stat").write_text("rss 1\ntotal_cache 9000\ntotal_rss 1500\ntotal_shmem 500\n")
    assert memory.free(torch.device("cpu")) == 4000 * memory.USABLE
    monkeypatch.setenv("WORLD_SIZE", "16")  # of which four are on this machine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free(torch.device("cpu")) == 1000 * memory.USABLE
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert memory.free(torch.device("cpu")) == 250 * memory.USABLE


def peak_of(run, *options, **limits):
    with Gpu(**limits) as gpu:
        gpu.peak = 2**40  # of a run before
        result = run("llama", "SparseGPT", "cuda:0", "--batch-size", 1, "--nsamples", 20, *options)
    return gpu.peak, result


def ways(out):
    """Return what the lines about memory say that the run goes on with."""
    return [line.partition("continuing with ")[2] for line in out.splitlines() if "warning" in line]


@pytest.mark.slow
def test_a_run_goes_on_in_the_way_that_fits(simulated, run):
    """In one pass through a layer all sequences are inside it at a time: smaller batches do not help there."""
    one_pass, (_, record, out) = peak_of(run)
    two_passes, (expected, _, _) = peak_of(run, "--no-true-sequential")
    on_host, _ = peak_of(run, "--no-true-sequential", free=0)
    assert on_host < 0.8 * two_passes < 0.6 * one_pass and not ways(out) and record["settings"]["true_sequential"]
    for options, limit, way in (
            ([], (one_pass + two_passes) // 2,
             "two passes through each layer, as by --no-true-sequential, and hidden states on the host"),
            (["--no-true-sequential"], (two_passes + on_host) // 2, "hidden states on the host")):
        _, (found, record, out) = peak_of(run, *options, memory=limit, free=2**40)
        assert ways(out) == [way]
        assert not record["settings"]["true_sequential"]
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    dense = "--no-true-sequential", "--target", "dense"
    assert peak_of(run, *dense, free=0)[0] < 0.5 * peak_of(run, *dense)[0]  # the lags are on the host, too


def test_the_way_that_fits_is_chosen_before_a_run(simulated, run):
    peaks, said = {}, {}
    for memory_of, limits in {"ample": {}, "little": {"memory": 420_000}}.items():
        peaks[memory_of], (_, record, out) = peak_of(run, **limits)
        line = out.partition("memory   ")[2].partition(" through each layer")[0]
        said[memory_of] = line, record["settings"]["true_sequential"]
        assert not ways(out)
    assert said == {"ample": ("one pass", True), "little": ("two passes", False)}
    assert peaks["little"] < 420_000 < peaks["ample"]


def test_what_takes_less_is_chosen_where_neither_way_fits(simulated, run, monkeypatch):
    """As of a mixture of experts, of which two passes hold the Hessians of all experts."""
    monkeypatch.setattr(needs, "pass_bytes", lambda *_: (10**18, 10**19))
    _, (_, record, out) = peak_of(run)
    assert "memory   one pass through each layer" in out and record["settings"]["true_sequential"]
    cheaper, _ = memory.MemoryPlan(2, on_host=False, two_passes=False, two_take_less=False).next_cheaper()
    assert cheaper.on_host and not cheaper.two_passes
    assert memory.MemoryPlan(2, on_host=False, two_passes=False).next_cheaper()[0].two_passes


def test_a_gpu_that_is_too_small_ends_in_one_line(simulated, run):
    with Gpu(memory=100_000):
        error = run("llama", "SparseGPT", "cuda:0", status=2)
    assert error == ("llama.py: error: --batch-size 1: out of GPU memory; lower --seqlen\n")


@pytest.mark.slow
def test_distillation_goes_on_in_the_next_way_where_memory_runs_out(simulated, run, monkeypatch):
    job, train, forward, tried = "--sparsity .5 --distill 2", distill.distill, training._Batch.forward, []
    with Gpu():
        expected, whole, _ = run("llama", job, "cuda:0")

    def scarce(batch, stream, layer, index, graph):
        if graph or len(batch.rows) > 1:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        forward(batch, stream, layer, index, graph)

    monkeypatch.setattr(training._Batch, "forward", scarce)
    monkeypatch.setattr(distill, "distill", lambda *given: tried.append(given[5]) or train(*given))
    with Gpu():
        found, record, _ = run("llama", job, "cuda:0")
    assert [(way.graph, way.whole, way.batch_size > 1) for way in tried] == [
        (True, True, True), (True, True, False), (False, True, True), (False, True, False)]
    assert record["distilled"] == {"divergence": pytest.approx(whole["distilled"]["divergence"], rel=1e-4)} | asdict(
        tried[-1])
    assert all(torch.allclose(tensor, expected[key], rtol=0, atol=1e-4) for key, tensor in found.items())


@pytest.mark.parametrize("way", slow_but(needs.WAYS[-1:], [needs.WAYS[2], *needs.WAYS[4:]]), ids=str)
def test_distillation_on_a_gpu_with_less_room_gives_the_same_model(way, simulated, run, monkeypatch):
    job, ways = "--sparsity .5 --distill 2", distill.ways
    with Gpu() as ample:
        expected, whole, _ = run("llama", job, "cuda:0")
    monkeypatch.setattr(distill, "ways", lambda *given: [replace(way, batch_size=ways(*given)[0].batch_size)])
    with Gpu() as gpu:
        found, record, out = run("llama", job, "cuda:0")
    assert f"distill  {way}: takes about 0.0 of" in out
    assert record["distilled"]["divergence"] == pytest.approx(whole["distilled"]["divergence"], rel=1e-4)
    assert all(torch.allclose(tensor, expected[key], rtol=0, atol=1e-4) for key, tensor in found.items())
    waits = [{what: count for what, count in device.synchronisations.items() if what[1].startswith("distill.py")}
             for device in (ample, gpu)]
    assert waits[0] == waits[1]  # Threads move what is kept; the one that launches work waits once a step.


@pytest.mark.parametrize("message", [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA driver error: out of memory",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"])
def test_memory_is_given_back_before_a_step_begins_again(simulated, message):
    with Gpu() as device:
        def step(way):
            if way.on_host:
                return device.used
            cycle = [torch.ones(100, device="cuda:0")]
            cycle.append(cycle)  # which only the garbage collector frees
            raise RuntimeError(message)

        gc.disable()
        try:
            assert memory.retry_with_less_memory(memory.MemoryPlan(2, on_host=False), step) == 0
        finally:
            gc.enable()


def test_the_host_goes_on_while_the_gpu_prunes_a_layer(simulated, checkpoint_folder, monkeypatch):
    """Without --save: the clock does not wait for the GPU, from layer to layer."""
    finish, waits = RunDir.save_layer, []

    def finished(*given):
        finish(*given)
        waits.append(Gpu.current.synchronisations.copy())

    monkeypatch.setattr(RunDir, "save_layer", finished)
    with simulated():
        assert cli.main("llama.py", [str(word) for word in (
            checkpoint_folder("llama"), "builtin", "--sparsity", ".5", "--seqlen", 32, "--nsamples", 5, "--eval",
            "--device", "cuda:0")]) == 0
    each = {(what, place): count for (what, place), count in (waits[2] - waits[1]).items()
            if not place.startswith("run_dir.py")}  # which copies the weights
    assert sum(each.values()) <= 10, each
    assert {place.partition(":")[0] for _, place in each} <= {
        "sparsegpt.py", "hessian.py", "solvers.py", "layerwise.py", "calibration.py", "measures.py"}


def test_where_triton_does_not_run_pytorch_walks_and_one_line_says_so(gpu, run, monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    columns_cuda = pytest.importorskip("mixgpt.kernels.columns_cuda", exc_type=ImportError)
    KERNEL.cache_clear()
    monkeypatch.setattr(columns, "triton_obstacle", KERNEL)
    monkeypatch.setattr(columns_cuda, "_walk_rows", Broken())
    with gpu():
        found = run("llama", "SparseGPT", "cuda:0")
    KERNEL.cache_clear()
    lines = [line for line in found[2].splitlines() if "Triton" in line]
    assert lines == ["kernels  using the slower PyTorch implementation, as Triton is not available "
                     "(Failed to find C compiler. Please specify via CC)"]
    compare(found, run("llama", "SparseGPT", "cpu"), "SparseGPT")
