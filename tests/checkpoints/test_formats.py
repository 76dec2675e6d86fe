"""Check that what every format saves is, read back from disk, the model that was in memory, bit for bit."""

import json

import pytest
import torch
from conftest import make, modules_of, save, saved_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mixgpt
from mixgpt.checkpoints import formats, load, run_dir
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming
from mixgpt.modeling.decoder import path_of
from mixgpt.pruning.layerwise import magnitude_prune
from mixgpt.pruning.targets import Target
from mixgpt.quant import Codebooks, Scheme, quantize_nearest

SYM, SYM_GROUPS, ASYM_GROUPS = Scheme(4, sym=True), Scheme(4, 8, sym=True), Scheme(4, 8)


@pytest.fixture
def halved(tmp_path):
    """Return a function that makes a tiny model in which half of every matrix is 0 and the rest on the grids it gives.

    scheme: None leaves the matrices as they are. only: quantizes those whose path contains it. The model has been on
    disk: .to(bfloat16) would also cast rotary buffers, which from_pretrained does not.
    """
    def build(name, scheme, dtype=torch.float32, only=""):
        model = make(name)
        model.to(dtype).save_pretrained(tmp_path / "dense")
        model, grids = load.load_model(tmp_path / "dense", "auto"), {}
        for path, W in matrices(model).items():
            W.copy_(magnitude_prune(W, Target(0.5)))
            if scheme and only in path:
                Q, grids[path] = quantize_nearest(W, scheme)
                W.copy_(Q)
        return model, grids

    return build


def matrices(model):
    """Return the weights of the linears of the decoder layers by their paths."""
    return {path_of(model, *key): module.weight.data for key, module in modules_of(model).items()}


def assert_same(model, other):
    """Assert that two models have the same state, in the same dtypes, bit for bit."""
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), second[key].view(torch.uint8)), key


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("name, dtype", [
    pytest.param("opt", torch.float32, marks=pytest.mark.slow), ("llama", torch.bfloat16),
    pytest.param("bloom", torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("save_format, scheme", [
    ("dense", None), ("compressed-tensors", SYM), ("compressed-tensors", SYM_GROUPS),
    ("compressed-tensors", Scheme(8, 16, sym=True)), ("sparse", None), ("sparse", SYM), ("sparse", ASYM_GROUPS),
    ("sparse", Scheme(3, 16, sym=True)), ("sparse", Codebooks(4))])
def test_a_saved_model_comes_back_bit_for_bit(save_format, scheme, dtype, name, halved, tokenizer, tokens, tmp_path):
    model, grids = halved(name, scheme, dtype)
    model.generation_config.eos_token_id = [7, 9]
    expected, folder, config = logits(model, tokens), tmp_path / "saved", model.config.to_dict()
    save(folder, model, tokenizer, {}, save_format, grids)
    assert "sparsity_config" not in (folder / "config.json").read_text()  # with which vLLM refuses any folder
    reloaded = load.load_model(folder, "auto")
    assert_same(model, reloaded)
    assert reloaded.generation_config.eos_token_id == [7, 9] and model.config.to_dict() == config
    assert torch.equal(logits(reloaded, tokens), expected)
    if save_format == "sparse":
        assert_same(model, load.read_model(folder, "auto"))
    else:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), tokens), expected)


@pytest.mark.parametrize("save_format", ["compressed-tensors", "sparse"])
@pytest.mark.parametrize("name, tied", [("llama", True), ("qwen3", False), ("opt-350m", True)])
def test_embeddings_stay_tied_and_are_stored_once(name, tied, save_format, halved, tokenizer, tmp_path):
    model, grids = halved(name, SYM_GROUPS)
    save(tmp_path / "saved", model, tokenizer, {}, save_format, grids)
    reloaded = load.load_model(tmp_path / "saved", "auto")
    assert_same(model, reloaded)
    assert (reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight) == tied
    stored = [W for W in saved_tensors(tmp_path / "saved").values() if W.ndim == 2 and len(W) == 384]
    assert len(stored) == 2 - tied


@pytest.mark.parametrize("save_format, wbits, index", [
    ("sparse", "4", "model.sparse.safetensors.index.json"), ("sparse", "16", "model.sparse.safetensors.index.json"),
    ("compressed-tensors", "4", "model.safetensors.index.json")])
def test_packed_files_are_filled_and_read_one_at_a_time(save_format, wbits, index, prune, tmp_path, monkeypatch):
    """The whole model is never in memory: not to be packed, not to be verified, not as the input of a run."""
    options = ["llama", f"--gmp --sparsity .5 --wbits {wbits}", "--sym" * (wbits == "4"), "--save"]
    prune(*options, tmp_path / "dense")
    write, sizes = streaming.write, []
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "whole", None)
        patch.setattr(formats, "LARGEST", 5_000)
        patch.setattr(streaming, "write", lambda file, tensors, **more: (
            sizes.append(sum(tensor.nbytes for tensor in tensors.values())), write(file, tensors, **more)))
        if save_format == "sparse":
            patch.setattr(load, "read_model", None)
        prune(*options, tmp_path / "saved", "--save-format", save_format)
        sizes = sizes[3:]  # behind the layers
        assert len(sizes) > 3 and max(sizes[1:]) <= 5_000 < sizes[0]  # the embeddings
        prune("llama", "--save", tmp_path / "again", model=tmp_path / "saved")
    assert (tmp_path / "saved" / index).exists()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for folder in ("saved", "again"):
        assert_same(dense, load.load_model(tmp_path / folder, "auto"))
        assert_same(dense, mixgpt.load(tmp_path / folder, "cpu", packed=False)[0])
    parts = saved_tensors(tmp_path / "again")
    assert parts.keys() == saved_tensors(tmp_path / "dense").keys()
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()


CODES = "model.layers.1.mlp.up_proj.weight.codes"


@pytest.mark.parametrize("part, kept", [(CODES, 0.5), (CODES, 0), ("model.sparse.safetensors", 0.5),
                                        ("config.json", 0.5), ("config.json", 0)])
def test_a_sparse_folder_with_a_cut_or_missing_part_is_refused_in_one_line(part, kept, halved, tokenizer, tmp_path,
                                                                           prune):
    model, grids = halved("llama", SYM)
    save(folder := tmp_path / "saved", model, tokenizer, {}, "sparse", grids)
    file = folder / ("model.sparse.safetensors" if part == CODES else part)
    if part == CODES:
        tensors = load_file(file)
        codes = tensors.pop(CODES)
        save_file(tensors | ({CODES: codes[:-8].clone()} if kept else {}), file, {"format": "pt"})
    elif kept:
        file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    else:
        file.unlink()
    line = prune("llama", model=folder, status=2)
    assert ("model.layers.1.mlp.up_proj.weight: its parts cannot be decoded: " if (part, kept) == (CODES, 0.5) else
            str(folder)) in line and line.count("\n") == 1


CHANNEL = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
GROUP = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}


@pytest.mark.parametrize("name, only, dense, scheme, weights", [
    ("opt-350m", "", ["lm_head", "model.decoder.project_in", "model.decoder.project_out"], SYM, CHANNEL),
    ("bloom", "dense_", ["lm_head", *(f"transformer.h.{index}.self_attention.{name}" for index in range(3)
                                      for name in ("dense", "query_key_value"))], Scheme(8, 16, sym=True), GROUP)])
def test_configuration_and_tensors_are_what_vllm_reads(name, only, dense, scheme, weights, halved, tokenizer, tmp_path):
    model, grids = halved(name, scheme, torch.bfloat16, only)
    save(tmp_path / "saved", model, tokenizer, {}, "compressed-tensors", grids)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["format"], written["quantization_status"]) == (
        "compressed-tensors", "pack-quantized", "compressed")
    assert sorted(written["ignore"]) == dense and list(written["config_groups"]) == ["group_0"]
    group = written["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["weights"].items() >= weights.items()
    assert ("group_size" in group["weights"]) == ("group_size" in weights)
    assert "input_activations" not in group and "output_activations" not in group
    tensors = saved_tensors(tmp_path / "saved")
    for path in grids:
        parts = {key.removeprefix(f"{path}."): tensor for key, tensor in tensors.items() if key.startswith(f"{path}.w")}
        assert parts.keys() == {"weight_packed", "weight_scale", "weight_shape"}
        numel, bits = model.get_submodule(path).weight.numel(), 8 * parts["weight_packed"].nbytes
        assert bits == numel * scheme.wbits and parts["weight_scale"].dtype == torch.bfloat16
    with pytest.raises(InputError, match="^model: .* quantized weights, cannot be pruned in memory; give its name"):
        mixgpt.prune(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), "builtin", tokenizer, eval=["builtin"])


@pytest.mark.parametrize("scheme, only", [(None, ""), (SYM, ""), (SYM_GROUPS, "fc"), (ASYM_GROUPS, "fc1"),
                                          (Scheme(8, 16, sym=True), "")])
def test_the_size_of_each_format_is_known_before_it_is_written(scheme, only, halved, tokenizer, tmp_path):
    model, grids = halved("wide opt", scheme, torch.bfloat16, only)
    if not scheme:
        model.model.decoder.layers[0].fc1.weight.fill_(1)  # a mask would not pay
    weights = [(tuple(W.shape), float((W == 0).float().mean()), scheme.wbits if path in grids else 16)
               for path, W in matrices(model).items()]
    options = {"groupsize": scheme.groupsize, "sym": scheme.sym} if scheme else {}
    sizes = formats.format_bytes(2 * model.num_parameters(), weights, 2, **options)
    for save_format in ["dense", "sparse"] + ["compressed-tensors"] * bool(scheme and scheme.sym):
        save(folder := tmp_path / f"as {save_format}", model, tokenizer, {}, save_format, grids)
        stored = sum(tensor.nbytes for tensor in saved_tensors(folder).values())
        assert sizes[save_format] == pytest.approx(stored, rel=1e-3)
    assert sizes["sparse"] < sizes["dense"] and (sizes["compressed-tensors"] < sizes["dense"]) == bool(scheme)
