"""Run the command line: what it prints, saves and refuses."""

import math
import platform
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from commands import SMALL
from conftest import CPU, assert_same_weights, make, make_plan, measure_sparsity, modules_of, record_of, saved_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mixgpt
from mixgpt import datautils
from mixgpt.allocation import fisher, traces
from mixgpt.allocation.plan import allocate_whole
from mixgpt.app import allocating, opening
from mixgpt.app.cli import parse
from mixgpt.app.pipeline import execute
from mixgpt.app.settings import Settings
from mixgpt.checkpoints import load
from mixgpt.common import choices, memory, runtime
from mixgpt.common.errors import InputError
from mixgpt.evaluation import selfcheck
from mixgpt.evaluation.measures import perplexities
from mixgpt.modeling import streaming
from mixgpt.modeling.running import HiddenStates, StreamedModel
from mixgpt.pruning import distill, needs, solvers, training
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target, select


@pytest.mark.parametrize("name, options", [
    ("opt", ""), ("opt-350m", "--sparsity .5"), ("qwen2", "--sparsity .5"), ("llama", "--sparsity .5 --gmp"),
    ("bloom", "--prunen 2 --prunem 4 --no-true-sequential")])
def test_the_main_job_prints_measured_numbers_and_saves_them(name, options, prune, tmp_path):
    folder = tmp_path / "saved"
    out, record = prune(name, options, "--save", folder), record_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert [row["sparsity"] for row in record["matrices"]] == [
        (module.weight == 0).double().mean().item() for module in modules_of(model).values()]
    assert all(row["sparsity"] == (0.5 if options else 0) for row in record["matrices"])
    method = "magnitude" if "--gmp" in options else "SparseGPT" if options else "dense"
    if options:
        assert re.search(r"^total .* 50\.00%$", out, re.MULTILINE)
        assert all(("error" in row) == (method == "SparseGPT") for row in record["matrices"])
        assert record["disk"]["theoretical_ratio"] == pytest.approx(1)  # half of the weights, in float32

    tokens, source = opening.test_tokens("builtin", 32, load.load_tokenizer(folder))
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.exp().item()
    assert record["perplexity"] == {method: {"builtin": pytest.approx(expected, rel=1e-5)}}
    assert re.search(rf"^{method} +{record['perplexity'][method]['builtin']:.2f}$", out, re.MULTILINE)
    assert record["data"]["builtin"]["sha256"] == source["sha256"]
    assert record["settings"]["seqlen"] == 32 and record["versions"]["torch"] == torch.__version__


def test_the_parts_of_a_run_add_up_to_its_time_also_where_it_does_what_has_no_name(checkpoint_folder, monkeypatch):
    choose = allocating.choose
    monkeypatch.setattr(allocating, "choose", lambda run: time.sleep(2) or choose(run))
    start = time.perf_counter()
    seconds = execute(Settings(str(checkpoint_folder("llama")), "builtin", sparsity=0.5, preset="best", nsamples=4,
                               seqlen=32, eval=(), device="cpu", quiet=True))["seconds"]
    assert 0.95 <= sum(seconds.values()) / (time.perf_counter() - start) <= 1


@pytest.mark.parametrize("name, save_format, options", [
    ("opt", "dense", "--wbits 4"), ("llama", "sparse", "--wbits 3 --nearest"),
    ("bloom", "sparse", "--wbits 4 --gmp --sparsity .5"), ("opt", "dense", "--wbits 8 --sparsity .5 --act-order"),
    ("llama", "sparse", "--wbits 4 --prunen 2 --prunem 4 --groupsize 8 --mse --act-order"),
    ("bloom", "sparse", "--wbits 4 --sparsity .5 --groupsize 8 --distill 1"),
    ("opt", "dense", "--wbits 4 --sparsity .5 --sym --sparsity-way weight-level --sensitivity fisher"),
    ("llama", "compressed-tensors", "--wbits 8 --sym --nearest --groupsize 16"),
    ("bloom", "compressed-tensors", "--wbits 4 --sym --sparsity .5 --act-order --distill 2"),
    ("opt", "compressed-tensors", "--wbits 4 --sym --prunen 2 --prunem 4 --groupsize 8 --mse"),
    ("llama", "sparse", "--wbits 4 --grid codebook --sparsity .5 --mse --act-order --distill 1"),
    ("opt", "sparse", "--wbits 3 --grid codebook --groupsize 8 --nearest")])
def test_a_quantized_model_is_saved_with_its_zeros_and_reports_its_size(name, save_format, options, prune, tmp_path):
    folder = tmp_path / "saved"
    out, record = prune(name, options, "--save", folder, "--save-format", save_format), record_of(folder)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "who may read one file may read all"
    model = load.load_model(folder, "auto")
    counted, words = measure_sparsity(model), options.split()
    assert [row["sparsity"] for row in record["matrices"]] == [m.zeros / m.numel for m in counted]
    pruned = 0.5 if "--sparsity " in options or "--prunen" in options else 0
    assert sum(m.zeros for m in counted) >= pruned * sum(m.numel for m in counted)
    wbits = int(words[words.index("--wbits") + 1])
    for module in modules_of(model).values():
        size = int(words[words.index("--groupsize") + 1]) if "--groupsize" in words else module.in_features
        assert "--act-order" in words or max(len(row.unique()) for row in module.weight.view(-1, size)) <= 2**wbits
        assert "--prunen" not in words or ((module.weight.view(-1, 4) == 0).sum(1) >= 2).all()

    [(method, perplexities)] = record["perplexity"].items()
    assert method.endswith(f"{wbits} bit" + " codebook" * ("codebook" in words)) and f"\n{method} " in out
    again = prune(name, model=folder)  # what was saved is a model like any other
    label = "as given" if sum(m.zeros for m in counted) > 0.25 * sum(m.numel for m in counted) else "dense"
    assert re.search(rf"^{label} +{perplexities['builtin']:.2f}$", again, re.MULTILINE)

    disk, numel = record["disk"], sum(m.numel for m in counted)
    least = 32 if save_format == "dense" else wbits if save_format == "compressed-tensors" else wbits * (1 - pruned)
    assert disk["bits_per_weight"] == 8 * disk["bytes"] / numel and disk["ratio"] == 2 * numel / disk["bytes"]
    assert 0.8 * least <= disk["bits_per_weight"] <= least + (0 if save_format == "dense" else 8)
    assert disk["theoretical_ratio"] == pytest.approx(16 / (wbits * (1 - pruned)))
    bits = disk["bits_per_weight"]
    assert f"{bits:.2f} bits a weight, {bits / 16:.2f} times the size of bfloat16" in out


def test_kept_weights_are_quantized_after_distillation_as_in_a_run_of_its_own(prune, tmp_path):
    options, saved = "--extra 0 --no-act-order --save", [tmp_path / name for name in "abc"]
    for more, folder in zip(("--wbits 4", ""), saved[:2], strict=True):
        prune("llama", "--prunen 2 --prunem 4 --preset best --effort 1.1", more, options, folder)
    prune("llama", "--wbits 4 --grid codebook --mse --target dense --percdamp .1", options, saved[2], model=saved[1])
    assert_same_weights(saved[0], saved[2])
    assert {row["wbits"] for row in record_of(saved[0])["matrices"]} == {4}


MIXGPT = "--sparsity .5 --sparsity-way weight-level --saliency isc"


@pytest.mark.parametrize("name, options, recipe", [
    ("opt", f"{MIXGPT} --prune-only fc --minlayer 1", "weight-level by hutchinson"),
    ("bloom", f"{MIXGPT} --sparsity-way layer-level --sensitivity fisher", "layer-level by fisher")])
def test_mixgpt_meets_the_total_of_what_is_pruned_in_the_saved_weights(name, options, recipe, prune, tmp_path):
    folder, plot = tmp_path / "saved", tmp_path / "plan.png"
    out = prune(name, options, "--save", folder, "--plot", plot)
    counted = measure_sparsity(AutoModelForCausalLM.from_pretrained(folder))
    rows = record_of(folder)["matrices"]
    pairs = [(row, m) for row, m in zip(rows, counted, strict=True) if "target" in row]
    assert sum(m.zeros for _, m in pairs) / sum(m.numel for _, m in pairs) == pytest.approx(0.5, abs=1e-4)
    assert [round(row["target"] * m.numel) for row, m in pairs] == [m.zeros for _, m in pairs]
    assert re.search(r"^plan     50\.00% of the weights in all$", out, re.MULTILINE)
    assert re.search(r"^matrix kind +mean trace/n +mean rank +sparsity$", out, re.MULTILINE)
    assert re.search(rf"^MixGPT \({recipe}\) +\d+\.\d\d$", out, re.MULTILINE)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options, name", [
    ({"wbits": 4}, "SparseGPT + 4 bit"), ({"wbits": 3, "gmp": True}, "magnitude + 3 bit"),
    ({"wbits": 4, "sparsity": 0}, "GPTQ 4 bit"), ({"wbits": 4, "sparsity": 0, "nearest": True}, "nearest 4 bit"),
    ({"saliency": "isc"}, "SparseGPT (isc)"), ({"gmp": True, "saliency": "isc"}, "magnitude"),
    ({"sparsity_way": "layer-level"}, "SparseGPT (layer-level by hutchinson)"),
    ({"target": "dense", "wbits": 4, "sparsity": 0}, "GPTQ 4 bit (dense target)"),
    ({"sparsity_way": "global", "saliency": "fisher", "gmp": True}, "magnitude (global)"),
])
def test_a_recipe_is_named_by_its_choices(options, name):
    assert Settings("model", "c4", **{"sparsity": 0.5} | options).method() == name


@pytest.mark.parametrize("m, alpha, ranks", [(4, 0.1, False), (8, 0.06, False), (8, 0.1, True), (4, 0.2, True)])
def test_sensitivities_are_measured_only_where_ranks_change_n_of_m(m, alpha, ranks, prune, tmp_path):
    """Else all matrices have one n, whatever the sensitivities are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "STABLE", -1)
        out = prune("llama", f"--preset mixgpt --prunen {m // 2} --prunem {m} --alpha {alpha} --save", tmp_path)
    assert ("traces   fisher" in out) == ("MixGPT (weight-level by fisher)" in out) == ranks
    assert (f"plan     {m // 2} of {m} in each matrix: --alpha {alpha:g} changes none" in out) != ranks
    matrices = record_of(tmp_path)["matrices"]
    by_rank = allocate_whole(range(len(matrices)), [math.prod(row["shape"]) for row in matrices], 0.5, alpha, m)
    assert (len(set(by_rank)) > 1) == (len({row["target"] for row in matrices}) > 1) == ranks


def test_a_preset_means_its_recipe_without_the_command_line_too():
    best = Settings("m", "c4", sparsity=0.5, preset="best")
    for given in ({"solver": "obs", "saliency": "obs"}, {"percdamp": 0.01}, {"distill": 0.0}):  # all of them defaults
        assert given.items() <= asdict(Settings("m", "c4", sparsity=0.5, preset="best", **given)).items()
    assert Settings(**asdict(best)) == best  # as from a record
    with pytest.raises(InputError, match="^--preset best .--solver admm.: needs calibration, "):
        Settings("m", "c4", sparsity=0.5, preset="best", gmp=True)


@pytest.mark.parametrize("dataset, options, expected", [
    ("c4", {"preset": "best"}, "c4:0.5,self:0.5"), ("c4", {}, "c4"), ("c4", {"preset": "sparsegpt"}, "c4"),
    ("c4:1", {"preset": "best"}, "c4:1"), ("wikitext2", {"preset": "best"}, "wikitext2"),
    ("c4", {"preset": "best", "nsamples": 1}, "c4"),  # One sequence cannot be divided.
])
def test_half_of_what_best_calibrates_on_in_place_of_c4_is_the_models_own_text(dataset, options, expected):
    assert Settings("m", dataset, sparsity=0.5, **options).dataset == expected


BEST = "--sparsity-way global --saliency fisher --solver admm --target dense --rotate --alpha .15 --percdamp .1"


@pytest.mark.parametrize("preset, amount, expected", [
    ("sparsegpt", "--sparsity .5", "--sparsity-way uniform --saliency obs --solver obs"),
    ("mixgpt", "--sparsity .5", "--sparsity-way weight-level --saliency isc --sensitivity fisher"),
    ("best", "--sparsity .5", f"{BEST} --extra .5 --distill .5"),
    ("best --effort 4", "--sparsity .5", f"{BEST} --extra 2 --distill 2"),
    ("best --effort 4", "--prunen 2 --prunem 4",
     "--solver admm --target dense --rotate --alpha .15 --percdamp .1 --extra 2 --distill 2"),
    ("best", "--sparsity .5 --alpha .2 --solver obs --wbits 4 --sym",
     f"{BEST} --alpha .2 --solver obs --extra 1 --distill .375 --mse --act-order"),
    ("best --effort 4", "--sparsity .5 --wbits 4",
     f"{BEST} --extra 2 --distill 2 --grid codebook --mse --act-order"),
    ("best", "--sparsity .5 --wbits 3 --groupsize 16 --distill 0 --no-mse", f"{BEST} --grid codebook --extra 1"),
])
def test_a_preset_is_its_flags_and_flags_given_override_it(preset, amount, expected):
    mixture = "c4:0.5,self:0.5" if "best" in preset else "c4"
    preset, flags = (parse("llama.py", ["m", dataset, *amount.split(), *given.split()])
                     for dataset, given in (("c4", f"--preset {preset}"), (mixture, expected)))
    assert replace(preset, preset=None, effort=1.0) == flags


def test_the_heading_tells_all_that_it_takes_to_repeat_the_run(checkpoint_folder, prune):
    out = prune("opt", "--sparsity .5 --prune-only fc1 --invert")
    command, versions, model, pruning, data, *_ = out.splitlines()
    assert shlex.split(command) == ["command", "python", "llama.py", str(checkpoint_folder("opt")), "builtin", *SMALL,
                                    "--sparsity", ".5", "--prune-only", "fc1", "--invert"]
    assert f"torch {torch.__version__}" in versions and f"python {platform.python_version()}" in versions
    assert "float32, on cpu" in model and pruning.startswith("pruning  SparseGPT, 0.5") and "seed 0" in data


def test_quiet_prints_the_tables_and_warnings_only(prune, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # where bars would be drawn
    warning, header, _, *rows = prune("llama", MIXGPT, "--quiet").splitlines()
    assert warning.startswith("warning  the ranking is not stable") and header.startswith("matrix kind  ")
    assert [row.split(" ")[0].strip("-") for row in rows[-5:]] == ["total", "", "perplexity", "", "MixGPT"]


def test_eval_limit_takes_the_first_sequences_of_each_test_set(prune, tokenizer):
    model = make("opt")
    tokens, _ = datautils.test_tokens("builtin", 32, tokenizer)
    found = float(re.search(r"^dense +(\d+\.\d\d)$", prune("opt", "--eval-limit 2"), re.MULTILINE)[1])
    expected = [perplexities(model, {"": tokens[:count]}, 2, CPU)[""] for count in (2, 4)]
    assert found == pytest.approx(expected[0], abs=0.006) and abs(found - expected[1]) > 0.02


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("stored, fast, used", [
    ("float16", True, "float32"), ("bfloat16", False, "float32"), ("bfloat16", True, "bfloat16")])
def test_a_cpu_computes_in_float32_if_that_is_faster(stored, fast, used, named, checkpoint_folder, prune, tmp_path,
                                                     monkeypatch):
    monkeypatch.setattr(runtime, "multiplies_bfloat16", lambda device: fast)
    model, saved = shutil.copytree(checkpoint_folder("opt"), tmp_path / "model"), tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(model, dtype=stored).save_pretrained(model)
    if not named:  # in the configuration
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(config.replace(f'"dtype": "{stored}",', ""))
    assert load.size(load.read_config(model), "auto") == 2 * make("opt").num_parameters()
    for more, dtype, on_disk in ("", used, stored), (f"--dtype {stored}", stored, stored), (
            "--dtype float32", "float32", "float32"):
        out = prune("opt", more, "--overwrite --save", saved, model=model)
        assert f"{dtype}, on cpu" in out and ("dtype    float32" in out) == (dtype != on_disk)
        assert {str(tensor.dtype) for tensor in saved_tensors(saved).values()} == {f"torch.{on_disk}"}


@pytest.mark.parametrize("key, what", [("layers.1.mlp.up_proj", "zeros"), ("norm", "logits")])
def test_a_save_that_reads_back_differently_is_reported(key, what, prune, tmp_path, monkeypatch):
    write = streaming.write

    def corrupt(file, tensors, **metadata):
        if "model.norm.weight" in tensors:  # in the result
            numbers = tensors[f"model.{key}.weight"].view(torch.int32).flatten()
            numbers[numbers.argmax()] *= what == "logits"
            numbers[-1] ^= what == "logits"  # the last bit
        write(file, tensors, **metadata)

    folder, options = tmp_path / "saved", "--sparsity .5 --gmp --overwrite --save"
    prune("llama", options, folder)
    before = {file: file.read_bytes() for file in folder.iterdir() if file.name != "mixgpt.json"}
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "write", corrupt)
        line = prune("llama", "--wbits 4", options, folder, status=1)
        assert f"VerificationError: --save {folder}: the {what} of the saved" in line
    assert all(file.read_bytes() == content for file, content in before.items())  # the model that was to be replaced
    prune("llama", "--wbits 4 --resume", options, folder)
    assert (file := folder / "model.safetensors").read_bytes() != before[file]


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("preset, most", [("sparsegpt", 2), ("mixgpt", 4), ("best", 8)])
def test_what_is_read_of_each_layer_is_counted(preset, most, dense, prune, tmp_path, monkeypatch):
    """One pass for what is reported, whatever the number of test sets, and one for the dense model."""
    read, counts, tests = streaming.read, Counter(), [tmp_path / "a.txt", tmp_path / "b.txt"]

    def counted(module, **how):
        counts.update(set(re.findall(r"layers.(\d)", str(streaming.disk_weights(module)))))
        return read(module, **how)

    for file in tests:
        file.write_text("".join(f"The {number} sheep of {file.name} graze. " for number in range(50)))
    monkeypatch.setattr(streaming, "read", counted)
    prune("llama", "--sparsity .5 --preset", preset, "--dense" * dense, "--eval builtin", *tests, "--save",
          tmp_path / "saved")
    record = record_of(tmp_path / "saved")
    assert [len(row) for row in record["perplexity"].values()] == [3] * (1 + dense)
    assert [len(row) for row in record.get("distance", {}).values()] == [3] * 2 * dense
    assert len(counts) == 3 and max(counts.values()) <= most + 2 * dense


@torch.no_grad()
def test_the_distance_of_the_dense_model_to_itself_is_that_of_rounding(prune, checkpoint_folder, tokenizer, tmp_path):
    out = prune("llama", "--sparsity .5 --gmp --dense --save", tmp_path / "saved")
    found = record_of(tmp_path / "saved")["distance"]["dense again"]["builtin"]
    tokens, _ = datautils.test_tokens("builtin", 32, tokenizer)
    p, q = (AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama"), dtype=dtype)(tokens[:4]).logits[:, :-1]
            .double().log_softmax(-1) for dtype in (torch.float32, torch.bfloat16))
    KL = (p.exp() * (p - q)).sum(-1).mean().item()
    assert 0.2 * KL < found["KL"] < 2 * KL and found["KL"] > 0  # The head alone has one dtype.
    assert "builtin, dense again " in out


def test_a_matrix_with_a_zero_less_than_asked_ends_the_run(prune, monkeypatch):
    def careless(problem):
        (W, grid), *others = solvers.walk(problem)
        return [(W.index_put(tuple((W == 0).nonzero()[:1].t()), torch.tensor(1.0)), grid), *others]

    monkeypatch.setitem(choices.SOLVERS, "careless", choices.Solver("", careless))
    for amount, found in (("--sparsity .5", "511 zeros, 49.90%; asked were 512, 50.00%"),
                          ("--prunen 1 --prunem 4", "255 zeros, 24.90%; asked were 256, 25.00%")):
        line = prune("llama", amount, "--solver careless", status=2)
        assert line.endswith(f"error: --solver careless: layer 0 self_attn.q_proj has {found}\n")


def test_a_saved_model_is_replaced_with_overwrite_and_no_other_folder(checkpoint_folder, prune, tmp_path):
    folder, gmp = tmp_path / "saved", "--sparsity .75 --gmp --save"
    prune("llama", "--sparsity .5 --gmp --save", folder)
    for mine in ("extra/notes.txt", "tokenizer.old/notes.txt", "tokenizer_notes.txt"):
        (folder / mine).parent.mkdir(exist_ok=True)
        (folder / mine).write_text("mine")
    save_file({"mine": torch.ones(1)}, folder / "model_of_mine.safetensors")
    for name in ("model.safetensors.index.json", "model.sparse.safetensors", "merges.txt"):  # of a save before
        (folder / name).write_text("{}")
    prune("llama", gmp, folder, "--overwrite")
    assert record_of(folder)["sparsity"] == 0.75 and (folder / "extra" / "notes.txt").read_text() == "mine"
    prune("llama", gmp, tmp_path / "new")
    assert {file.name for file in folder.iterdir()} == {
        "extra", "tokenizer.old", "model_of_mine.safetensors", "tokenizer_notes.txt",
        *(file.name for file in (tmp_path / "new").iterdir())}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    prune("llama", gmp[:-7], "--record", tmp_path / "mine" / "mixgpt.json")  # whose name is that of a saved one
    prune("llama", gmp, tmp_path / "mine", "--overwrite", status=2)
    (folder / "mine.txt").write_text("mine")
    for reads in ({"model": folder}, {"data": folder / "mine.txt"}, {"data": f"builtin:1,{folder / 'mine.txt'}:1"}):
        assert "which this run uses; name another folder" in prune("llama", gmp, folder, "--overwrite", status=2,
                                                                   **reads)
    assert (folder / "mine.txt").read_text() == "mine"
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine" and (folder / "mixgpt.json").is_file()


@pytest.mark.parametrize("flags, message", [
    ("--sparsity -0.1", "--sparsity -0.1: must be at least 0 and below 1"),
    ("--prunen 3 --prunem 2", "--prunen 3 --prunem 2: needs 0 < prunen < prunem"),
    ("--sparsity .3 --prunen 2 --prunem 4", "--sparsity 0.3: contradicts --prunen 2 --prunem 4"),
    ("--gmp", "--gmp: needs --sparsity, --prunen and --prunem, or --wbits"),
    ("--wbits 4 --groupsize 0", "--groupsize 0: must be at least 1, or -1 for a whole row"),
    ("--sparsity .5 --groupsize 8", "--groupsize 8: needs --wbits 2, 3, 4, 8"),
    ("--mse", "--mse: needs --wbits"),
    ("--wbits 4 --nearest --sparsity .5", "--nearest: rounds without calibration; with --sparsity"),
    ("--wbits 4 --nearest --act-order", "--act-order: needs calibration"),
    ("--wbits 8 --grid codebook", "--grid codebook: has 2, 3 or 4 bits, and is symmetric without --sym"),
    ("--wbits 4 --sym --sparsity .5 --grid codebook --save-format compressed-tensors", "--grid codebook: has 2"),
    ("--wbits 4 --groupsize 2 --prunen 2 --prunem 4 --act-order",
     "--act-order --groupsize 2: must be at least 4, as the 4 columns of an n:m group stay together"),
    ("--wbits 4 --groupsize 16 --prunen 2 --prunem 6", "--groupsize 16 --prunem 6: one must divide the other"),
    ("--sparsity .5 --save-format compressed-tensors", "supports uniform symmetric grids of 4 or 8 bits"),
    ("--wbits 4 --save-format compressed-tensors", "needs --wbits 4 or 8, and --sym"),
    ("--wbits 4 --sym --groupsize 8 --act-order --save-format compressed-tensors",
     "supports groups of consecutive columns only; with --act-order needs --groupsize -1"),
    ("--sparsity-way weight-level", "--sparsity-way weight-level: needs --sparsity or --prunen and --prunem"),
    ("--preset best", "--preset best: needs --sparsity or --prunen and --prunem"),
    ("--prunen 2 --prunem 4 --sparsity-way global", "--sparsity-way global: gives each matrix a"),
    ("--sparsity .5 --gmp --solver admm", "--solver admm: needs calibration"),
    ("--wbits 4 --nearest --target dense", "--target dense: needs calibration"),
    ("--sparsity .5 --gmp --distill 1", "--distill 1: needs calibration"),
    ("--distill 1", "--distill 1: needs calibration"),
    ("--wbits 4 --solver admm", "--solver admm: needs --sparsity"),
    ("--sparsity .5 --solver admm --saliency isc",
     "--saliency isc: --solver admm does not support it; must be obs or fisher"),
    ("--sparsity .5 --preset mixgpt --effort 2", "--effort 2: needs --preset best"),
    ("--sparsity .5 --alpha -1", "--alpha -1: must lie between 0 and 1"),
    ("--plot a.png", "--plot a.png: needs --sparsity, --prunen and --prunem, or --wbits"),
    ("--wandb-project pruning", "--wandb-project pruning: needs --log-wandb"),
    ("--nsamples 0", "--nsamples 0: must be at least 1"),
    ("--seqlen 1", "--seqlen 1: must be at least 2"),
    ("--eval=", "--eval : invalid choice: ''"),
    *[(f"--{name}=", f'--{name} "": must not be empty') for name in ("save", "tasks")]])
def test_settings_that_contradict_or_lack_each_other_are_refused(flags, message):
    with pytest.raises(InputError) as error:
        parse("llama.py", ["model", "builtin", "--save", "saved", *flags.split()])
    assert message in str(error.value)


@pytest.mark.parametrize("amount, expected", [("--sparsity .5", [(2, 200)]), ("--prunen 2 --prunem 4", [])])
def test_best_takes_gradients_from_half_of_the_sequences_and_the_likely_tokens(amount, expected, prune, monkeypatch):
    seen, measure = [], fisher.output_gradients
    monkeypatch.setattr(distill, "VOCABULARY", 200)
    monkeypatch.setattr(fisher, "output_gradients", lambda streamed, matrices, tokens, seed, vocabulary: seen.append(
        (len(tokens), len(vocabulary))) or measure(streamed, matrices, tokens, seed, vocabulary))
    prune("llama", amount, "--preset best")
    assert seen == expected


@pytest.mark.parametrize("N, T, count", [(1, 512, 1), (5, 512, 3), (16, 512, 8), (32, 512, 8), (128, 2048, 8),
                                         (128, 128, 32), (40, 8, 20)])
def test_gradients_need_a_part_of_the_text(N, T, count):
    numbers = allocating.with_gradients(N, T)
    assert len(numbers) == count and numbers[0] == 0 and N - numbers[-1] <= numbers.step


def test_a_gradient_that_is_not_finite_ends_the_run(prune, monkeypatch):
    gradient = fisher._sampled_gradient
    monkeypatch.setattr(fisher, "_sampled_gradient", lambda *given: gradient(*given).index_fill_(
        1, torch.tensor(5), torch.nan))
    line = prune("llama", "--sparsity .5 --preset best --distill 0", status=2)
    assert line.endswith(": layer 0 self_attn.q_proj: its gradient is NaN or inf; try --dtype float32\n")


@pytest.mark.parametrize("number, more, piece, source", [
    (8, 0, 128, "builtin"), (0, 3, 16, "builtin"), (2, 3, 16, "builtin"), (2, 3, 16, "tokens")])
def test_further_text_serves_the_hessians_and_distillation(number, more, piece, source, checkpoint_folder, prune,
                                                           tmp_path, tokenizer, monkeypatch):
    """The saved weights are those of the library's parts in turn, and the record tells how far both models differ.

    The further sequences are pieces of the same text, or the tokens in memory once more.
    """
    monkeypatch.setattr(distill, "PIECE", piece)
    length, folder, given = min(piece, 32), tmp_path / "saved", {"extra": number / 4, "distill": more / 4}
    tokens, _ = datautils.calibration_samples("builtin", 4, 32, 0, tokenizer)
    if source == "tokens":
        mixgpt.prune(checkpoint_folder("llama"), tokens, sparsity=0.5, **given, device="cpu", batch_size=2, eval=(),
                     save=folder)
        further = tokens[[0, 1, 2, 3, 0]]
    else:
        out = prune("llama", f"--sparsity .5 --extra {number / 4} --distill {more / 4} --save", folder)
        notes = ["more text"] * bool(number) + ["distilled"] * bool(more)
        assert f"SparseGPT ({', '.join(notes)})" in out
        assert f"4 sequences of 32 tokens, {number + more} further ones, seed 0" in out
        further = torch.cat([datautils.calibration_samples("builtin", count * 32 // length, length, f"0, {what}",
                                                           tokenizer)[0].view(-1, 32)
                             for what, count in (("further", number), ("distillation", more)) if count])
    model, record = AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama")), record_of(folder)
    streamed, plan = StreamedModel(model, CPU, 2), make_plan(select(model), Target(0.5))
    further, distilled = further.view(-1, 32)[:number], further.view(-1, 32)[number:].reshape(-1, length)
    training = replace(streamed, batch_size=2 * 32 // length)
    dense = distill.reference_states(training, distilled) if more else None
    prune_layerwise(streamed, plan, torch.cat([tokens, further]), Recipe())
    zeros = {name: weight == 0 for name, weight in model.state_dict().items()}
    if more:
        way = distill.ways(training, distilled, 1.0, 0)[0]
        divergence = distill.distill(training, dict.fromkeys(plan), distilled, dense, 0, way)
        assert record["distilled"] == {"divergence": divergence} | asdict(way)
    assert record["settings"]["true_sequential"] and record["settings"]["batch_size"] == 2  # as pruned
    for key, tensor in saved_tensors(folder).items():
        assert torch.equal(tensor, model.state_dict()[key]) and torch.equal(tensor == 0, zeros[key]), key


def test_without_room_for_training_the_model_is_not_distilled(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "training_bytes", lambda *_: needs.Taken(712 * 10**8 + 10 * _[-1].batch_size, 0, 2e15))
    monkeypatch.setattr(memory, "free", lambda device: 71 * 10**9)
    out = prune("llama", "--sparsity .5 --distill .5 --extra .25 --quiet --save", tmp_path / "with")
    prune("llama", "--sparsity .5 --extra .25 --save", tmp_path / "without")
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    assert re.search(r"distill  skipped: a layer at a time, weights on disk, it would take 71\.2 of 71\.0 "
                     r"GB free on cpu and 2000000\.0 of [\d.]+ GB free on disk\n", out)
    assert record_of(tmp_path / "with")["distilled"] == "no room"
    assert [*record_of(tmp_path / "with")["perplexity"]] == ["SparseGPT (more text, not distilled)"]
    assert "SparseGPT (more text, not distilled) " in out
    out = prune("llama", "--sparsity .5 --distill .5 --extra .25")
    assert out.index("pruning  SparseGPT (more text, not distilled), ") < out.index("distill  skipped: ")


@pytest.mark.parametrize("error, step, in_memory, reason", [
    (MemoryError(), 1, False, "out of memory"), (None, 4, True, "the divergence from the dense model is inf")])
def test_a_failed_distillation_leaves_the_pruned_model(error, step, in_memory, reason, checkpoint_folder, prune,
                                                       tmp_path, monkeypatch):
    """Weights of a checkpoint are on disk, or in memory where its .bin file cannot be converted."""
    model, backward, calls = shutil.copytree(checkpoint_folder("llama"), tmp_path / "model"), training.divergence_of, []
    if in_memory:
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")

    def failing(*given):
        calls.append(given)
        if len(calls) < step:
            return backward(*given)
        if error:
            raise error
        divergence, gradient = backward(*given)
        return divergence * torch.inf, gradient

    monkeypatch.setattr(distill, "STEP_TOKENS", 1)
    monkeypatch.setattr(training, "divergence_of", failing)
    options = "--sparsity .5 --batch-size 1 --save"
    prune("llama", options, tmp_path / "pruned", model=model)
    saved = tmp_path / "saved"
    with monkeypatch.context() as patch:  # killed behind it
        patch.setattr(runtime, "peak_memory", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prune("llama", options, saved, "--distill 1", model=model, status=130)
    assert calls
    monkeypatch.setattr(distill, "distill", lambda *_: pytest.fail("tried again"))
    out = prune("llama", options, saved, "--distill 1 --resume", model=model)
    assert out.count(f"warning  --distill: {reason}: the model stays as it was before distillation\n") == 1
    assert_same_weights(tmp_path / "pruned", saved)
    records = [record_of(tmp_path / name) for name in ("pruned", "saved")]
    assert records[1]["distilled"] == reason and not (saved / "progress").exists()
    assert records[0]["matrices"] == records[1]["matrices"]
    assert list(records[0]["perplexity"].values()) == list(records[1]["perplexity"].values())
    assert [*records[1]["perplexity"]] == ["SparseGPT (not distilled)"]
    out = prune("llama", options, saved, "--distill 1 --resume", model=model)
    assert "is complete; these are its results" in out


def test_batches_are_halved_when_gpu_memory_runs_out(prune, tmp_path, monkeypatch):
    options, forward = "--sparsity .5 --no-true-sequential --batch-size", HiddenStates.forward

    def limited(self, layer, index, rows):
        """Lack memory for more than one sequence at a time, from layer 1 on."""
        if index and rows.stop - rows.start > 1 and self.hidden.shape[1] != selfcheck.TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, layer, index, rows)

    prune("llama", options, 1, "--save", tmp_path / "one")
    monkeypatch.setattr(HiddenStates, "forward", limited)
    out = prune("llama", options, 4, "--save", tmp_path / "halved")
    assert out.count("out of GPU memory: continuing with batches of 2\n") == 2  # pruning, evaluation
    assert out.count("out of GPU memory: continuing with batches of 1\n") == 2
    one, halved = saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "halved")
    for key, tensor in one.items():
        torch.testing.assert_close(halved[key], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(halved[key] == 0, tensor == 0)
