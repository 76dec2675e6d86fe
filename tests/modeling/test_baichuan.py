"""Check the native Baichuan against a plain implementation of its papers, on folders as they are published."""

import json
import math
import shutil
from functools import partial

import pytest
import sentencepiece as spm
import torch
from conftest import save, saved_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixgpt import datautils
from mixgpt.checkpoints import load
from mixgpt.modeling import baichuan

LAYERS, LIMIT = 2, 64
VARIANTS = {  # architectures, hidden size, heads, vocabulary, further fields, all as in the published configurations
    "Baichuan-7B": ("BaiChuanForCausalLM", 32, 4, 400, {"max_position_embeddings": LIMIT}),
    "Baichuan-13B": ("BaichuanForCausalLM", 32, 4, 400, {"model_max_length": LIMIT}),
    "Baichuan2-7B": ("BaichuanForCausalLM", 32, 4, 125_696,
                     {"max_position_embeddings": LIMIT, "model_max_length": LIMIT}),
    "Baichuan2-13B": ("BaichuanForCausalLM", 24, 6, 125_696, {"model_max_length": LIMIT}),
}
TEXTS = ["Hello world", "  leading spaces", " one", "in 2023 there were 12345 of 6.78%", "你好，世界！百川大模型。",
         "emoji 😀🎉 here",
         "line one\nline two\n\nline four\n", "", " ", "tab\tand  two spaces", "Ünïcödé ﬁ ligature", "<s>not bos</s> x"]
POISON = "raise RuntimeError('code of the checkpoint was run')\n"


def weights(hidden, intermediate, vocabulary, rotary):
    """Return random weights under the published keys."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    state = {"model.embed_tokens.weight": random(vocabulary, hidden) * 5, "model.norm.weight": 1 + random(hidden),
             "lm_head.weight": random(vocabulary, hidden) * 4}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        state |= {layer + "self_attn.W_pack.weight": 2 * random(3 * hidden, hidden),
                  layer + "self_attn.o_proj.weight": random(hidden, hidden),
                  layer + "mlp.gate_proj.weight": random(intermediate, hidden),
                  layer + "mlp.up_proj.weight": random(intermediate, hidden),
                  layer + "mlp.down_proj.weight": random(hidden, intermediate),
                  layer + "input_layernorm.weight": 1 + random(hidden),
                  layer + "post_attention_layernorm.weight": 1 + random(hidden)}
        if rotary:
            state[layer + "self_attn.rotary_emb.inv_freq"] = random(4)
    return state


@pytest.fixture(scope="module")
def sentencepiece_model(once):
    """Train a BPE model with byte fallback, as Baichuan's is, on the builtin text and some Chinese."""
    rows = datautils.load_rows("builtin", "train", None)[0][:200] + TEXTS * 3

    def train(path):
        path.mkdir()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(line for row in rows for line in row.splitlines()), model_prefix=str(path / "m"),
            model_type="bpe", vocab_size=400, character_coverage=0.99, byte_fallback=True, add_dummy_prefix=False,
            remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True, pad_id=-1,
            minloglevel=2)

    return (once("sentencepiece", train) / "m.model").read_bytes()


@pytest.fixture(scope="module")
def published(once, sentencepiece_model):
    """Return a function that gives the folder of a variant, written as on the hub, with code that must not run."""
    def write(name, path):
        path.mkdir()
        architecture, hidden, heads, vocabulary, fields = VARIANTS[name]
        config = {"architectures": [architecture], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
                  "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig",
                               "AutoModelForCausalLM": f"modeling_baichuan.{architecture}"},
                  "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": 40,
                  "model_type": "baichuan", "num_attention_heads": heads, "num_hidden_layers": LAYERS,
                  "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "float32",
                  "transformers_version": "4.29.2", "use_cache": True, "vocab_size": vocabulary,
                  "gradient_checkpointing": False, "_from_model_config": True} | fields
        (path / "config.json").write_text(json.dumps(config))
        token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        (path / "tokenizer_config.json").write_text(json.dumps({
            "add_bos_token": False, "add_eos_token": False, "bos_token": token | {"content": "<s>"},
            "eos_token": token | {"content": "</s>"}, "unk_token": token | {"content": "<unk>"},
            "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
            "clean_up_tokenization_spaces": False, "model_max_length": 4096, "sp_model_kwargs": {},
            "tokenizer_class": "BaichuanTokenizer", "use_fast": False}))
        (path / "tokenizer.model").write_bytes(sentencepiece_model)
        for module in ("modeling", "configuration", "tokenization"):
            (path / f"{module}_baichuan.py").write_text(POISON)
        save_file(weights(hidden, 40, vocabulary, "max_position_embeddings" in fields), path / "model.safetensors",
                  metadata={"format": "pt"})

    return lambda name: once(name, partial(write, name))


def slopes(heads):
    """The geometric sequence of ALiBi's paper; other head counts take every other one of the next power of two."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (i + 1) / heads) for i in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return slopes(lower) + slopes(2 * lower)[::2][:heads - lower]


def rotate(x, position, width):
    """Rotate the pairs (i, i + width/2) of x (width,) by position · 10000^(−2i/width)."""
    half, out = width // 2, x.clone()
    for i in range(half):
        angle = position * 10000 ** (-2 * i / width)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def plain_logits(state, config, ids):
    """Compute the logits (T, vocabulary) of one sequence in float64, head by head and position by position."""
    state = {key: value.double() for key, value in state.items()}
    C, heads = config["hidden_size"], config["num_attention_heads"]
    D, T, rotary = C // heads, len(ids), "max_position_embeddings" in config

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x = state["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        w = {key.removeprefix(f"model.layers.{i}."): value for key, value in state.items()}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = (h @ part.t() for part in w["self_attn.W_pack.weight"].split(C))
        mixed = torch.zeros(T, C, dtype=torch.float64)
        for head, slope in enumerate(slopes(heads)):
            part = slice(head * D, (head + 1) * D)
            keys = [rotate(k[t, part], t, D) if rotary else k[t, part] for t in range(T)]
            for t in range(T):
                query = rotate(q[t, part], t, D) if rotary else q[t, part]
                scores = torch.stack([query @ keys[s] / math.sqrt(D) - (0 if rotary else slope * (t - s))
                                      for s in range(t + 1)])
                mixed[t, part] = scores.softmax(0) @ v[:t + 1, part]
        x = x + mixed @ w["self_attn.o_proj.weight"].t()
        h = norm(x, w["post_attention_layernorm.weight"])
        gated = torch.nn.functional.silu(h @ w["mlp.gate_proj.weight"].t()) * (h @ w["mlp.up_proj.weight"].t())
        x = x + gated @ w["mlp.down_proj.weight"].t()
    head = state["lm_head.weight"]
    if config["vocab_size"] == 125_696:
        head = head / head.norm(dim=1, keepdim=True)
    return norm(x, state["model.norm.weight"]) @ head.t()


def sequences(count, length):
    return torch.randint(3, 400, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VARIANTS)
def variant(request, published):
    """Give (folder, configuration, model) of every variant in turn."""
    folder = published(request.param)
    return folder, json.loads((folder / "config.json").read_text()), load.load_model(folder, "auto")


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_papers_formulas(variant, attention):
    folder, config, model = variant
    model.set_attn_implementation(attention)
    tokens = sequences(3, 12)
    expected = torch.stack([plain_logits(load_file(folder / "model.safetensors"), config, ids) for ids in tokens])
    torch.testing.assert_close(model(tokens).logits.double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_is_the_same_with_and_without_cache_and_with_padding(variant, attention):
    _, _, model = variant
    model.set_attn_implementation(attention)
    tokens = sequences(2, 9)
    tokens[1, :4] = 0
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (model.generate(tokens, attention_mask=mask, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached) and cached.shape == (2, 17)
    assert torch.equal(model.generate(tokens[1:, 4:], **options)[0], cached[1, 4:])
    if not model.config.rotary:  # a static cache brings a mask of four dimensions, without ALiBi
        with pytest.raises(RuntimeError, match="must match the size"):
            model.generate(tokens, attention_mask=mask, cache_implementation="static", **options)
    steps = model(cached[:1]).logits.argmax(-1)[0]
    assert torch.equal(steps[8:-1], cached[0, 9:])  # the model's own full forward


@torch.no_grad()
def test_a_saved_model_has_the_published_keys_and_config_and_the_same_logits(variant, tmp_path):
    folder, config, model = variant
    save(tmp_path / "saved", model, load.load_tokenizer(folder), {})
    saved, source = saved_tensors(tmp_path / "saved"), load_file(folder / "model.safetensors")
    assert set(saved) == {key for key in source if "inv_freq" not in key}
    assert all(torch.equal(saved[key], source[key]) for key in saved)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    for key in ("model_type", "architectures", "vocab_size", "hidden_size", *VARIANTS[folder.name][4]):
        assert written[key] == config[key]
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert type(reloaded).__name__ == config["architectures"][0]
    assert torch.equal(reloaded(sequences(2, 12)).logits, model(sequences(2, 12)).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXTS[3]) == load.load_tokenizer(folder)(TEXTS[3])


def test_token_ids_are_those_of_sentencepiece(published, sentencepiece_model):
    reference = spm.SentencePieceProcessor(model_proto=sentencepiece_model)
    for tokenizer in (load.load_tokenizer(published("Baichuan-7B")),
                      AutoTokenizer.from_pretrained(published("Baichuan2-13B"))):
        assert type(tokenizer).__name__ == "BaichuanTokenizer"
        for text in TEXTS[:-1]:
            ids = tokenizer(text).input_ids
            assert ids == reference.encode(text), text
            assert tokenizer.decode(ids) == reference.decode(ids)
        assert tokenizer(TEXTS[-1]).input_ids == [1, *reference.encode("not bos"), 2, *reference.encode(" x")]
        text = "\n".join(TEXTS[:-1])
        assert datautils.token_ids(tokenizer, text) == reference.encode(text)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


@pytest.mark.parametrize("given, expected", [({}, True), ({"add_bos_token": False}, False)])
def test_a_beginning_is_added_unless_the_configuration_says_no(given, expected, published, tmp_path):
    folder = shutil.copytree(published("Baichuan-7B"), tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | given))
    tokenizer = load.load_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, load.load_tokenizer(tmp_path / "saved")):
        assert (each("Hello").input_ids[0] == 1) == expected


def test_a_saved_folder_keeps_the_code_of_the_published_one_for_others(published, tmp_path, monkeypatch):
    folder = published("Baichuan-7B")
    for name in ("saved", "again"):
        save(tmp_path / name, load.load_model(folder, "auto"), load.load_tokenizer(folder), {})
        folder = tmp_path / name
        assert all("auto_map" in json.loads((folder / each).read_text())
                   for each in ("config.json", "tokenizer_config.json"))
        assert {file.read_text() for file in folder.glob("*.py")} == {POISON}
    for file in folder.glob("*.py"):  # as where only a hub id is known
        file.unlink()
    model, mine = load.load_model(folder, "auto"), tmp_path / "mine.py"
    mine.touch()
    monkeypatch.chdir(tmp_path)
    load.skeleton(baichuan.BaichuanConfig(num_hidden_layers=1))  # names no architectures until it is saved
    for saved, name in (("without", str(folder)), ("nameless", "")):  # the second one is built in memory
        model.config.name_or_path = name
        save(tmp_path / saved, model, load.load_tokenizer(folder), {})
        assert not any("auto_map" in file.read_text() for file in (tmp_path / saved).glob("*config.json"))
        assert not (tmp_path / saved / mine.name).exists()
