"""Check what a run is said to take against what it takes."""

import re
from pathlib import Path

import pytest
import torch
from conftest import CPU, _llama, assert_same_weights, read_little, slow_but
from makebelieve import Gpu

import mixgpt
from mixgpt import __main__
from mixgpt.app import forecast, pipeline
from mixgpt.app.checks import check
from mixgpt.app.run import Run
from mixgpt.app.settings import Settings
from mixgpt.common import runtime
from mixgpt.common.errors import InputError
from mixgpt.evaluation import own_text
from mixgpt.kernels import columns
from mixgpt.modeling.decoder import layers_of


@pytest.fixture
def forecast_of(checkpoint_folder, monkeypatch, tmp_path):
    """Return a function that gives a checked run of a tiny model, and its settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_little(monkeypatch)
    monkeypatch.setitem(forecast.TEST_TOKENS, "builtin", 4 * 64)

    def checked(name, dataset="builtin", **options):
        settings = Settings(str(name if isinstance(name, Path) else checkpoint_folder(name)), dataset, **{
            "sparsity": 0.5, "nsamples": 64, "seqlen": 64, "eval": ["builtin"], "device": "cpu"} | options)
        return check(settings, torch.device(settings.device), runtime.Clock(CPU)), settings

    return checked


@pytest.mark.parametrize("preset", ["sparsegpt", "mixgpt", "best"])
@pytest.mark.parametrize("name", slow_but(["wide llama"], ["wide llama", "wide opt"]))
def test_what_a_gpu_is_said_to_hold_at_most_is_what_it_holds(name, preset, forecast_of, monkeypatch, tmp_path):
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
    begun, begin = [], Run.begin
    monkeypatch.setattr(Run, "begin", lambda self, stage: (begin(self, stage), begun.append((stage, gpu.used))))
    with Gpu() as gpu:
        run, settings = forecast_of(name, preset=preset, device="cuda:0", save=str(tmp_path / "saved"))
        needs = forecast.memory_needs(run)
        peak = pipeline.execute(settings)["peak_memory"]["device"]
    most = max(need.device for need in needs)
    assert 0.8 * peak < most < 1.25 * peak
    assert [stage for stage, _ in begun] == [need.stage for need in needs]
    assert max(used for _, used in begun) < 0.02 * peak  # a stage leaves nothing large behind


def test_a_large_vocabulary_takes_what_it_is_said_to_where_the_dense_model_is_compared(
        forecast_of, monkeypatch, tokenizer, tmp_path):
    monkeypatch.setattr(columns, "triton_obstacle", lambda device: "it is make-believe")
    _llama("Llama", vocab_size=16_384).bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with Gpu():
        run, settings = forecast_of(tmp_path / "model", nsamples=4, device="cuda:0", dense=True)
        most = {need.stage: need.device for need in forecast.memory_needs(run)}
        peak = pipeline.execute(settings)["peak_memory"]["device"]
    assert most["dense model"] == max(most.values())
    assert 0.8 * peak < most["dense model"] < 1.25 * peak


@pytest.mark.parametrize(("name", "written", "options"), [
    ("wide opt", {"dataset": 32 * 64}, {"dataset": "builtin:0.5,self:0.5"}),
    ("shared heads", {"--eval": 16_384}, {"eval": ["builtin", "self"]})])
def test_the_models_own_text_takes_what_it_is_said_to(name, written, options, forecast_of, monkeypatch, tokenizer,
                                                      tmp_path):
    monkeypatch.setattr(own_text, "TOGETHER", 8)
    if name == "shared heads":
        monkeypatch.setattr(own_text, "TOGETHER", 64)
        _llama("Llama", hidden_size=128, num_attention_heads=16, num_key_value_heads=1).save_pretrained(
            name := tmp_path / "model")
        tokenizer.save_pretrained(name)
    with Gpu():
        run, settings = forecast_of(name, device="cuda:0", gmp=True, sparsity_way="weight-level",
                                    sensitivity="fisher", **options)
        need = next(need for need in forecast.memory_needs(run) if need.stage == "own text")
        model, device = pipeline.load.load_model(settings.model, "auto"), torch.device("cuda:0")
        own_text.write_text(model, run.tokenizer, device, sum(written.values()), 0, "never")
        peak = runtime.peak_memory(device)["device"]
    assert run.own_tokens == written
    assert 0.9 * peak < need.device < 1.2 * peak


def test_the_models_own_texts_are_one_of_the_stages(forecast_of, monkeypatch, capsys):
    monkeypatch.setattr(own_text, "TOGETHER", 8)
    run, settings = forecast_of("wide opt", sparsity=0, eval=["self"])
    pipeline.execute(settings)
    assert run.stages == ["own text", "evaluation"]
    assert re.findall(r"stage +\d of 2: (.*)", capsys.readouterr().out) == run.stages
    run, _ = forecast_of("wide opt", dataset="builtin:0.5,self:0.5", gmp=True, sparsity_way="weight-level",
                         sensitivity="fisher", eval=["self"])
    times = forecast.seconds(run, pipeline.execute)
    assert list(times) == run.stages and times["own text"] > 0
    monkeypatch.setattr(forecast, "seconds_of_a_token", lambda *_: (5.0, 1.0))
    of_all = 5 + (len(layers_of(run.model)) - 1) * 1  # Only the layers take longer in a deeper model.
    assert forecast.seconds(run, pipeline.execute)["own text"] == pytest.approx((32 + 256) / 8 * 63 * of_all)


def test_a_machine_that_is_not_here_is_asked_about_by_the_memory_of_its_gpu(forecast_of, tmp_path):
    def planned(memory):
        run, settings = forecast_of("wide llama", preset="best", dry_run=True, device_memory=memory,
                                    dataset="builtin:0.5,self:0.5", save=str(tmp_path / "saved"))
        return {need.stage: need for need in forecast.memory_needs(run)}, forecast.text(run, None)

    (little, said), (ample, enough), (_, least) = planned("4MB"), planned("1 GiB"), planned("500KB")
    assert "distill  a layer at a time, weights on the host: takes 0.00 GB on cuda" in said
    assert little["distillation"].host > ample["distillation"].host and "distill  no: takes 0.0" in least
    assert "own text no: cuda has no room for the whole model" in least and "own text no" not in enough
    assert little["pruning"].device < ample["pruning"].device  # in two passes
    assert little["pruning"].host > ample["pruning"].host  # of hidden states
    assert not any(need.disk for need in ample.values())
    assert not list(tmp_path.glob("saved*"))
    with pytest.raises(InputError, match="--device-memory 24: must be a number with its unit, such as 24GB"):
        planned("24")


def test_a_dry_run_says_what_the_run_would_do_and_leaves_nothing(checkpoint_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = [str(checkpoint_folder("llama")), "builtin", "--sparsity", ".5", "--preset", "best", "--nsamples", "4",
             "--seqlen", "32", "--save", "saved", "--device", "cpu"]
    assert __main__.main(["prune", *words, "--dry-run"]) == 0
    header, _, rows = capsys.readouterr().out.partition("time\n")
    assert "GB beside the program   GPU  host  TMPDIR" in header
    assert [line.split()[0] for line in rows.splitlines()[1:7]] == [
        "reference", "gradients", "pruning", "distillation", "saving", "evaluation"]
    assert not (tmp_path / "saved").exists()
    assert __main__.main(["plan", words[0], "--nsamples", "4", "--seqlen", "32", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "method   ADMM (global, fisher, dense target, rotated heads, more text, distilled)" in said
    assert re.search(r"result   dense 0\.00 GB, sparse 0\.00 GB\n", said)
    assert re.search(r"at most .* [1-9]\d* s\n", said)  # a model this small takes seconds
    for what in ("plan --sparsity .5", "plan --wbits 4 --nearest", "eval --dry-run"):
        command, *options = what.split()
        assert __main__.main([command, words[0], *options, "--eval", "builtin", "--seqlen", "32"]) == 0
        assert "evaluation" in capsys.readouterr().out
    assert repr(mixgpt.prune(*words[:2], sparsity=0.5, nsamples=4, seqlen=32, dry_run=True)) == ""


def test_a_plan_names_the_formats_that_can_hold_the_result(checkpoint_folder, capsys):
    for name, formats in (("llama", "dense, compressed-tensors, sparse"), ("qwen3-moe", "dense")):
        words = "--wbits 4 --sym --sparsity .5 --nsamples 4 --seqlen 32 --device cpu --eval builtin --dtype bfloat16"
        assert __main__.main(["plan", str(checkpoint_folder(name)), *words.split()]) == 0
        said = re.search(r"result   (.*)", capsys.readouterr().out)[1]
        assert re.sub(r" [\d.]+ GB", "", said) == formats


def test_as_few_layers_are_timed_as_there_are_kinds(forecast_of):
    run, _ = forecast_of("gemma3")
    layers = layers_of(run.model)
    kinds = run.config.layer_types
    assert forecast.one_of_each(run.config, layers).layer_types == list(dict.fromkeys(kinds)) != kinds
    run, _ = forecast_of("llama")
    assert forecast.one_of_each(run.config, layers_of(run.model)).num_hidden_layers == 1


def test_a_long_run_says_its_stages_and_how_long_it_takes_and_goes_on_if_that_cannot_be_told(
        prune, tmp_path, monkeypatch):
    prune("llama", "--sparsity .5 --preset best --save", tmp_path / "untold")
    monkeypatch.setattr(forecast, "WORTH", 0)
    prune("llama", "--sparsity .5 --preset best --save", tmp_path / "told")
    assert_same_weights(*(tmp_path / name for name in ("told", "untold")))
    said = prune("llama", "--sparsity .5", "--preset", "mixgpt")
    assert re.search(r"^time     about \d+ s", said, re.M) and "stage    1 of 3: sensitivity" in said
    monkeypatch.setattr(forecast, "seconds", lambda *_: 1 / 0)
    assert "time     cannot be told: division by zero" in prune("llama", "--sparsity .5")
