"""Check `mixgpt.prune` and `mixgpt.load` against the command line, from_pretrained and what the caller holds."""

import contextlib
import copy
import logging
import os
import random
import signal
from pathlib import Path

import datasets
import numpy
import pytest
import torch
import transformers
from commands import short_builtin  # noqa: F401, a fixture
from conftest import CPU, record_of, saved_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixgpt
from mixgpt.__main__ import main
from mixgpt.app.settings import Settings
from mixgpt.common.errors import InputError
from mixgpt.datautils import calibration_samples, load_rows
from mixgpt.quant import Scheme

OPTIONS = {"sparsity": 0.5, "nsamples": 4, "seqlen": 32, "eval": ["builtin"], "device": "cpu"}


def in_memory(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_name_gives_what_the_command_line_gives(prune, checkpoint_folder, tmp_path, capsys):
    prune("llama", "--sparsity .5 --save", tmp_path / "saved")
    tensors, record = saved_tensors(tmp_path / "saved"), record_of(tmp_path / "saved")
    result = mixgpt.prune(checkpoint_folder("llama"), "builtin", save=tmp_path / "here", **OPTIONS)
    assert f"perplexity  builtin\n{'-' * 10}  {'-' * 7}" in result.table() and result.table() in capsys.readouterr().out
    assert str(result) == repr(result) == result.table()
    assert result.matrices == record["matrices"] and result.sparsity == record["sparsity"] == 0.5
    assert result.perplexity == record["perplexity"]["SparseGPT"]
    width, height = result.plot().size
    assert width > 500 and height > 500
    model, tokenizer = mixgpt.load(tmp_path / "here", device=CPU)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in saved_tensors(tmp_path / "here").items())
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items() if key in tensors)
    _, original = in_memory(checkpoint_folder("llama"))
    assert tokenizer("import a module").input_ids == original("import a module").input_ids


def test_a_saved_model_is_evaluated_as_it_was_when_it_was_pruned(checkpoint_folder, tmp_path, capsys):
    folder, options = tmp_path / "saved", {"seqlen": 32, "eval": ["builtin"], "device": "cpu"}
    pruned = mixgpt.prune(checkpoint_folder("llama"), "builtin", save=folder, **OPTIONS)
    result = mixgpt.evaluate(folder, **options)
    assert result.perplexity == pruned.perplexity and result.sparsity == 0.5 and result.tasks == {}
    assert mixgpt.evaluate(*in_memory(folder), **options).perplexity == pruned.perplexity
    capsys.readouterr()
    command = ["eval", str(folder), "--seqlen", "32", "--eval", "builtin", "--device", "cpu"]
    assert main([*command, "--record", str(tmp_path / "mixgpt.json")]) == 0
    assert capsys.readouterr().out.startswith(f"command  mixgpt {' '.join(command)} --record")
    assert list(record_of(tmp_path)["perplexity"].values()) == [pruned.perplexity]
    with pytest.raises(TypeError, match="^no option of an evaluation is called sparsity"):
        mixgpt.evaluate(folder, sparsity=0.5)
    with pytest.raises(InputError, match="^dataset: is needed for calibration"):
        mixgpt.prune(folder, None, **OPTIONS)


@pytest.mark.parametrize("name, kind", [("llama", "name"), ("opt", "strings"), ("gemma2", "tokens"), ("gpt2", "name")])
def test_a_model_in_memory_is_pruned_in_place_on_text_by_name_or_in_memory(name, kind, prune, checkpoint_folder,
                                                                           tmp_path):
    prune(name, "--sparsity .5 --save", tmp_path / "saved")
    model, tokenizer = in_memory(checkpoint_folder(name))
    text = {"name": "builtin", "strings": load_rows("builtin", "train", None)[0],
            "tokens": calibration_samples("builtin", 4, 32, 0, tokenizer)[0]}[kind]
    result = mixgpt.prune(model, text, tokenizer, quiet=True, **OPTIONS)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in saved_tensors(tmp_path / "saved").items())
    assert result.record["settings"]["dataset"] == ("builtin" if kind == "name" else "text in memory")
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_in_memory_is_not_left_as_it_was_because_its_run_is_complete(checkpoint_folder, tmp_path):
    options = OPTIONS | {"save": tmp_path / "saved", "resume": True}
    for message in (None, f"^--save {tmp_path / 'saved'}: exists and is not an empty folder"):
        model, tokenizer = in_memory(checkpoint_folder("llama"))
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            mixgpt.prune(model, "builtin", tokenizer, **options)
    for others in ([["Other text. " * 999]], ["builtin", tokenizer]):  # text or a tokenizer
        with pytest.raises(InputError, match=message):
            mixgpt.prune(str(checkpoint_folder("llama")), *others, **options)


def test_a_head_that_the_caller_has_untied_is_saved_whatever_the_attention(checkpoint_folder, tmp_path):
    model, tokenizer = in_memory(checkpoint_folder("llama"))
    model.set_attn_implementation("eager")
    model.lm_head.weight, model.config.tie_word_embeddings = copy.deepcopy(model.lm_head.weight), False
    mixgpt.prune(model, "builtin", tokenizer, save=tmp_path / "saved", **OPTIONS)
    assert torch.equal(saved_tensors(tmp_path / "saved")["lm_head.weight"], model.lm_head.weight)


def test_a_model_in_memory_that_could_not_be_saved_is_refused_before_it_is_pruned(checkpoint_folder, tmp_path):
    model, tokenizer = in_memory(checkpoint_folder("llama"))
    for change, reason in [(lambda: vars(model.generation_config).update(temperature=0.3), "the model's generation_c"),
                           (model.model.norm.double, "model.norm.weight was cast to torch.float64, and will be"),
                           (model.bfloat16, "model.rotary_emb.inv_freq was cast to torch.bfloat16, and will be"),
                           (lambda: vars(model.config).update(tie_word_embeddings=False), "lm_head.weight is tied to")]:
        change()
        with pytest.raises(InputError, match=f"^--save {tmp_path}/saved: {reason}"):
            mixgpt.prune(model, "builtin", tokenizer, save=tmp_path / "saved", **OPTIONS)
    model.model.layers.pop(2)
    with pytest.raises(InputError, match=r"^model: its config makes .* has model.layers.2.\S+ \(32,"):
        mixgpt.prune(model, "builtin", tokenizer, preset="best", **OPTIONS)
    model.model.layers.append(model.model.layers[0])
    with pytest.raises(InputError, match="layers 0 and 2 of this LlamaForCausalLM share the weights of"):
        mixgpt.prune(model, "builtin", tokenizer, preset="best", **OPTIONS)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_model_in_memory_that_cannot_be_pruned_keeps_no_hooks(true_sequential, checkpoint_folder):
    """While the error is at hand, as in a notebook, which keeps the last one."""
    model, tokenizer = in_memory(checkpoint_folder("opt"))
    model.model.decoder.embed_tokens.weight.data[3] = 3e38  # finite, and too large for a norm
    with pytest.raises(InputError, match="the Hessian contains NaN or inf") as kept:
        mixgpt.prune(model, torch.full((2, 16), 3), tokenizer, prunen=2, prunem=4, preset="best", extra=0, distill=0,
                     true_sequential=true_sequential, eval=(), device="cpu")
    assert kept and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_in_memory_keeps_its_dtype_mode_and_forward_and_no_line_says_otherwise(checkpoint_folder, capsys):
    model, tokenizer = in_memory(checkpoint_folder("llama"))
    model.model.layers[1].forward = forward = model.model.layers[1].forward  # as libraries wrap it
    model.half().train().config.dtype = torch.float16
    model.lm_head.eval()
    assert mixgpt.prune(model, "builtin", tokenizer, **OPTIONS).record["settings"]["dtype"] == "float16"
    assert model.model.layers[1].forward is forward
    assert model.dtype == torch.float16 and model.training and "float32" not in capsys.readouterr().out
    assert not model.lm_head.training


def test_paths_may_be_those_of_pathlib_or_below_the_home_and_numbers_those_of_numpy(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert type(Settings("model", "builtin", seed=numpy.int64(3)).seed) is int
    (tmp_path / "mine.txt").touch()
    assert Settings("model", "builtin", eval=["builtin", Path("~/mine.txt")]).eval == (
        "builtin", str(tmp_path / "mine.txt"))


def test_grids_are_as_the_settings_say():
    chosen = Settings("model", "builtin", wbits=4, groupsize=8, sym=True, mse=True)
    assert chosen.scheme == Scheme(4, groupsize=8, sym=True, mse=True)


def test_what_the_caller_runs_under_changes_nothing(checkpoint_folder):
    expected = mixgpt.prune(str(checkpoint_folder("llama")), "builtin", preset="best", **OPTIONS)
    for around in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16),
                   transformers.modeling_utils.local_torch_dtype(torch.bfloat16), torch.device("meta")):
        model, tokenizer = in_memory(checkpoint_folder("llama"))
        with around:
            result = mixgpt.prune(model, "builtin", tokenizer, preset="best", **OPTIONS)
        assert result.perplexity == expected.perplexity and result.matrices == expected.matrices, around


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9 has none")
def test_products_in_float32_are_exact_in_a_run_whatever_the_caller_allows_before_and_behind_it(checkpoint_folder):
    def allowed():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

    seen, before = set(), allowed()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.add(allowed())):
            mixgpt.prune(str(checkpoint_folder("llama")), "builtin", **OPTIONS)
        assert seen == {("ieee", "ieee")} and allowed() == ("tf32", "bf16")
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before


def state():
    """Return what libraries and Python keep per process and a run could leave changed."""
    return {"random": random.getstate(), "torch": torch.get_rng_state().tolist(), "dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(), "environment": dict(os.environ),
            "folder": os.getcwd(), "logging": transformers.utils.logging.get_verbosity(),
            "bars": (transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()),
            "levels": {name: logging.getLogger(name).level for name in ("transformers", "datasets")},
            "disabled": logging.root.manager.disable,
            "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]}


def test_no_state_of_the_process_is_left_changed(checkpoint_folder):
    folder = str(checkpoint_folder("llama"))
    for enable in (transformers.utils.logging.enable_progress_bar, datasets.enable_progress_bars):
        enable()
    before = copy.deepcopy(state())
    mixgpt.prune(folder, "builtin", preset="best", **OPTIONS)
    assert state() == before
    transformers.utils.logging.disable_progress_bar()  # as other tests expect


@pytest.mark.parametrize("name", ["qwen3-moe", "gemma3"])
def test_a_mixture_of_experts_or_one_that_sees_in_memory_is_refused_and_left_as_it_was(name, checkpoint_folder):
    model, tokenizer = in_memory(checkpoint_folder(name))
    before, modules = copy.deepcopy(model.train().state_dict()), list(model.modules())
    with pytest.raises(InputError, match="^model: a mixture of experts, or one with .* in memory; give its"):
        mixgpt.prune(model, "builtin", tokenizer, **OPTIONS)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert list(model.modules()) == modules and all(module.training for module in modules)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("given, message", [
    ({"preset": "worst"}, "--preset worst: must be one of sparsegpt, mixgpt, best"),
    ({"dataset": torch.full((4, 32), -100)}, r"dataset: tokens are torch.int64 \(4, 32\), must be .*, none below 0"),
    ({"dataset": torch.zeros(4, 32)}, r"dataset: tokens are torch.float32 \(4, 32\), must be torch.int64 \(N, T\)"),
    ({"dataset": ["short"]}, "--seqlen 32: the train text of dataset a list of 1 texts has"),
    ({"dataset": [[1, 2]]}, "dataset: row 1 is neither text nor a chat"),
    ({"hf_device_map": {"model": 0, "lm_head": 1}}, "model: lies on several devices; load it without device_map, or"),
    ({"model": torch.nn.Linear(1, 1)}, "model: is a Linear, must be a causal language model of transformers"),
    ({"nsamples": "4"}, "--nsamples '4': must be int, not str"), ({"device": 0}, "--device 0: must be cpu, cuda or"),
    ({"seqlen": 32.0}, "--seqlen 32.0: must be int | None, not float"),
    ({"dtype": torch.bfloat16}, "dtype: a model in memory keeps its own, torch.float32"),
    ({"tokenizer": None}, "tokenizer: is a NoneType, must be one of transformers")])
def test_errors_are_those_of_the_flags(given, message, checkpoint_folder):
    model, tokenizer = in_memory(checkpoint_folder("llama"))
    options = OPTIONS | {"model": model, "dataset": "builtin", "tokenizer": tokenizer} | given
    model.hf_device_map = options.pop("hf_device_map", {})
    with pytest.raises(InputError, match=f"^{message}"):
        mixgpt.prune(options.pop("model"), options.pop("dataset"), **options)
