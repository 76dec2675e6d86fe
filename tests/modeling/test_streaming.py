"""Check that a model whose weights stay on disk is the one that plain transformers loads, and that it stays there."""

import hashlib
import json
import resource
import shutil

import pytest
import torch
from conftest import CPU, VOCABULARY, command, logits, make, measure_sparsity
from faults import weights_changed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixgpt.app import pipeline
from mixgpt.checkpoints import formats, load
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.experts import RoutedLinear
from mixgpt.modeling.placing import whole
from mixgpt.modeling.streaming import locations_of

UP = "model.layers.1.mlp.up_proj.weight"


def opened(folder, dtype="auto"):
    """Open a folder as a run does."""
    return load.open_model(folder, load.read_config(folder), dtype)


def store(model, layout, path):
    """Save a model by plain transformers in a layout."""
    if "bfloat16" in layout:
        model = model.to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="20KB" if "sharded" in layout else "1GB")
    if "prefix" in layout:
        base, file = f"{model.base_model_prefix}.", path / "model.safetensors"
        state = {key.removeprefix(base) if layout == "without prefix" else base + key: tensor
                 for key, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("layout", ["float32", "bfloat16 sharded", "without prefix", "prefix twice"])
def test_a_model_on_disk_is_that_of_from_pretrained_and_nothing_of_it_stays_loaded(layout, tiny, tokens, tmp_path):
    store(tiny, layout, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3 or "sharded" not in layout
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    streamed = opened(tmp_path)

    def on_meta():
        return all(parameter.is_meta for parameter in streamed.parameters())

    assert on_meta() and locations_of(streamed) and streamed.dtype == plain.dtype
    assert torch.equal(logits(streamed, tokens, 4, CPU), logits(plain.eval(), tokens, 4, CPU))
    read = streaming.read(layers_of(streamed)[0])
    assert all(torch.equal(read[name], tensor) for name, tensor in layers_of(plain)[0].state_dict().items())
    with whole(streamed, CPU):  # a head that is the embedding is there once
        places = {module.weight.data_ptr() for module in (streamed.lm_head, streamed.get_input_embeddings())}
    assert len(places) == 2 - plain.config.tie_word_embeddings
    assert measure_sparsity(streamed) == measure_sparsity(plain)
    assert on_meta()
    kept = plain.state_dict()
    buffers = {name: buffer for name, buffer in plain.named_buffers() if name not in kept}
    streamed_buffers = dict(streamed.named_buffers())
    assert all(torch.equal(streamed_buffers[name], buffer) for name, buffer in buffers.items())
    assert streaming.fingerprint(streamed) == streaming.fingerprint(plain)


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_a_heads_own_weights_are_kept_where_the_configuration_calls_them_tied(name, tokenizer, tokens, prune, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    state = model.state_dict() | {"lm_head.weight": model.lm_head.weight.detach() * 2}
    save_file(state, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight * 2)  # so transformers takes it
    streamed = opened(tmp_path / "source")
    assert torch.equal(logits(streamed, tokens, 4, CPU), logits(plain, tokens, 4, CPU))

    prune("llama", "--sparsity .5 --gmp --eval --save", tmp_path / "saved", model=tmp_path / "source")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.lm_head.weight, plain.lm_head.weight)


@pytest.mark.parametrize("name, key", [
    ("llama", "model.layers.2.self_attn.q_proj.weight"), ("llama", "model.norm.weight"),
    ("qwen3-moe", "model.layers.1.mlp.experts.3.down_proj.weight")])
def test_a_fingerprint_tells_other_weights_apart_but_not_another_dtype(name, key, tmp_path):
    make(name).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    found = streaming.fingerprint(load.load_model(tmp_path / "model", "auto"))
    assert streaming.fingerprint(opened(tmp_path / "model", torch.float32)) == found
    weights_changed(tmp_path, lambda state: state[key].view(-1)[state[key].numel() // 2:].add_(1))
    assert streaming.fingerprint(opened(tmp_path / "model")) != found


def test_a_fingerprint_copies_no_matrix_to_read_64_of_its_values_and_two_of_an_experts():
    both = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), RoutedLinear(1, 1, bias=False))
    for linear in both:
        linear.weight.data = torch.arange(2.0**20).expand(2**22, -1).t()  # whose copy would take 17 TB
    values = torch.cat([torch.arange(2.0**20)[::2**14], torch.tensor([0, 2.0**19])]).to(torch.bfloat16)
    expected = hashlib.sha256(b"Sequential" + values.view(torch.int16).numpy().tobytes())
    assert streaming.fingerprint(both) == expected.hexdigest()


@pytest.mark.parametrize("value", ["nan", "-inf"])
@pytest.mark.parametrize("key, dtype", [(UP, "auto"), ("model.embed_tokens.weight", torch.bfloat16)])
def test_weights_that_are_not_finite_are_refused_by_name(key, dtype, value, checkpoint_folder, tokens, tmp_path):
    folder = shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")
    weights_changed(tmp_path, lambda state: state[key][-1, -1].fill_(float(value)))
    model = opened(folder, dtype)
    with pytest.raises(InputError, match=f"{folder}/model.safetensors: {key} contains NaN or inf"):
        logits(model, tokens, 4, CPU)


WIDTH, INNER = 1024, 2048
LAYER = 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER)  # bytes in bfloat16


def write_shards(folder, layers, tokenizer):
    """Write a LLaMA with one shard for a layer, its weights never all in memory."""
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
                         num_attention_heads=8, max_position_embeddings=128, dtype="bfloat16",
                         architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in LlamaForCausalLM(config).state_dict().items()}
    places, generator = {}, torch.Generator().manual_seed(0)
    for key in shapes:
        places[key] = f"{key.split('.')[2] if '.layers.' in key else 'rest'}.safetensors"
    for file in set(places.values()):
        save_file({key: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)
                   for key, shape in shapes.items() if places[key] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def peak_of(report):
    """Write the peak memory of this process behind a run, for `command`."""
    whole, formats.LARGEST = pipeline.execute, 2 * LAYER

    def run(*arguments):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        whole(*arguments)
        report.write_text(json.dumps([before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))

    pipeline.execute = run


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(fork, tokenizer, tmp_path):
    grown = {}
    for layers in (4, 16):
        write_shards(tmp_path / f"model{layers}", layers, tokenizer)
        process = fork(command, "llama", [
            tmp_path / f"model{layers}", "builtin", "--prunen", 2, "--prunem", 4, "--gmp", "--eval", "builtin",
            "--eval-limit", 8, "--seqlen", 32, "--dtype", "bfloat16", "--save", tmp_path / f"saved{layers}"],
            tmp_path / "log", peak_of, (tmp_path / "peak",))
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        before, after = json.loads((tmp_path / "peak").read_text())
        grown[layers] = after - before
    size = sum(file.stat().st_size for file in (tmp_path / "saved16").glob("*.safetensors"))
    assert size > 16 * LAYER
    assert abs(grown[16] - grown[4]) < 2.5 * LAYER  # threads that read ahead and write differ by up to two
    # three layers at a time, one being written, what malloc keeps of freed blocks, and compiled code
    assert grown[16] < size
