"""Check generated text against decoding by full forwards, and the columns in which it is shown."""

import math
import re
import shutil
import time
from functools import partial

import pytest
import torch
from commands import SMALL
from commands import run as prune
from conftest import make, save

import mixgpt
from mixgpt.app import generate
from mixgpt.common import memory
from mixgpt.evaluation import generation

SPEED = r"([\d.]+ times as fast|speeds vary too much to compare)"


@torch.no_grad()
def go_on(model, ids, count):
    """Return the likeliest tokens behind ids, each from a forward of all before it."""
    length = len(ids)
    while len(ids) < length + count and ids[-1] != model.generation_config.eos_token_id:
        ids = [*ids, model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()]
    return ids[length:]


def by_hand(model, tokenizer, prompt, count):
    return tokenizer.decode(go_on(model, tokenizer(prompt).input_ids, count), skip_special_tokens=True)


def test_greedy_text_is_that_of_full_forwards(tiny, tokenizer):
    found = generation.complete(tiny, tokenizer, "import a module", max_new_tokens=12)
    assert found.text == by_hand(tiny, tokenizer, "import a module", 12)


def test_a_text_appears_word_by_word_while_it_is_made(tokenizer, monkeypatch):
    model, steps, seen = make("llama"), [], []
    model.register_forward_hook(lambda *_: steps.append(1))
    monkeypatch.setattr("builtins.print", lambda text, end=None, flush=False: seen.append(
        (len(steps), text + ("\n" if end is None else end))))
    text = generation.complete(model, tokenizer, "import a module", max_new_tokens=12, heading="as given").text
    assert seen[0] == (1, "as given\n\n") and "".join(part for _, part in seen[1:]) == text + "\n"
    assert next(step for step, part in seen[1:] if part.strip()) == 1 < len(steps)


def test_a_chat_is_laid_out_by_the_template_of_the_tokenizer(saved, tokenizer, tmp_path, capsys):
    folder = shutil.copytree(saved / "dense", tmp_path / "chat")
    options = "--chat", "--max-new-tokens", "8", "--device", "cpu"
    for template, line in (None, "the tokenizer of model {} has no chat template; leave it out"), (
            "{{ raise_exception('no\nuser') }}", "the chat template of model {}: no user"):
        (folder / "chat_template.jinja").write_text(template) if template else None
        assert run(folder, "the list", *options) == 2
        assert capsys.readouterr().err == f"generate.py: error: --chat: {line.format(folder)}\n"
    (folder / "chat_template.jinja").write_text(
        "<s>{{ messages[0].role }}: {{ messages[0].content }} {% if add_generation_prompt %}me:{% endif %}")
    assert run(folder, "the list", *options) == 0
    out, model = capsys.readouterr().out, mixgpt.load(folder, "cpu")[0]
    ids = [0, *tokenizer("user: the list me:", add_special_tokens=False).input_ids]
    text = tokenizer.decode(go_on(model, ids, 8), skip_special_tokens=True)
    assert out.startswith(f"the list\n\n{text}\n\nmodel ") and text != by_hand(model, tokenizer, "the list", 8)


def test_the_rate_leaves_out_the_first_tokens(tokenizer):
    model, pauses = make("llama"), iter([0, 1])  # as where a kernel is compiled in front of the second token
    model.register_forward_pre_hook(lambda *_: time.sleep(next(pauses, 0)))
    slow = generation.complete(model, tokenizer, "import a module", max_new_tokens=12)
    assert 4 < slow.tokens <= 12 and slow.seconds > 1 and slow.rate * slow.seconds > 14
    assert math.isnan(generation.complete(model, tokenizer, "import a module", max_new_tokens=1).rate)


def test_draws_depend_on_the_seed_only_and_leave_the_global_one(tokenizer):
    model = make("llama")
    model.generation_config.return_dict_in_generate = True  # as some have it
    state = torch.get_rng_state()
    texts = [generation.complete(model, tokenizer, "import", 12, 5.0, seed).text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    assert torch.equal(torch.get_rng_state(), state)
    cold = generation.complete(model, tokenizer, "import", 12, 1e-4, 3)
    model.generation_config.top_k = 1
    for each in (cold, generation.complete(model, tokenizer, "import", 12, 5.0, 3)):
        assert each.text == generation.complete(model, tokenizer, "import", 12).text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_texts_stand_beside_each_other_in_the_width(width):
    left, right = "a line\n\nand a second one that is long " * 4, "x" * 130 + "\tend"
    lines = generate.side_by_side({"dense": left, "model": right}, width)
    each = (width - 3) // 2
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["dense", "|", "model"] and lines[1] == f"{'-' * each} | {'-' * each}"
    columns = [[line[:each] for line in lines[2:]], [line[each + 3:] for line in lines[2:]]]
    assert [re.sub(r"\s", "", "".join(column)) for column in columns] == [re.sub(r"\s", "", text)
                                                                          for text in (left, right)]
    assert columns[0][0].rstrip() == "a line" and not columns[0][1].strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """Return {format: folder} of a pruned and quantized model, and "dense" the model before."""
    root = tmp_path_factory.mktemp("saved")
    save(root / "dense", make("wide llama"), tokenizer, {})
    for kind in ("sparse", "compressed-tensors"):
        assert prune("llama.py", root / "dense", "builtin", *SMALL, "--eval", "--gmp", "--sparsity", ".5", "--wbits",
                     4, "--sym", "--save", root / kind, "--save-format", kind) == 0
    return root


def run(*arguments):
    return generate.main("generate.py", [str(argument) for argument in arguments])


def test_every_format_generates_and_the_dense_model_stands_beside_it(saved, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = {}
    for kind in ("sparse", "compressed-tensors"):
        assert run(saved / kind, "the list", "--max-new-tokens", 8, "--dense", saved / "dense", "--device", "cpu") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["the list", ""] and lines[2].split() == ["dense", "|", "model"]
        assert re.fullmatch(r"dense \d tokens in \d+\.\d s, [\d.]+ tokens/s after the first, weights \d+ MB; model \d "
                            r"tokens in .* on cpu", lines[-2])
        assert re.fullmatch(SPEED + r", \d\.\d\d times the memory", lines[-1])
        assert float(lines[-1].split()[-4]) < 0.9 or kind != "sparse"
        texts[kind] = lines[2:-2]
    assert texts["sparse"] == texts["compressed-tensors"]
    expected = {title: by_hand(mixgpt.load(saved / folder, "cpu")[0], tokenizer, "the list", 8)
                for title, folder in (("dense", "dense"), ("model", "sparse"))}
    assert "\n".join(texts["sparse"]).strip() == "\n".join(generate.side_by_side(expected, 80)).strip()
    assert expected["dense"] != expected["model"]
    save(saved / "wide", make("wide llama").double(), tokenizer, {})
    assert run(saved / "dense", "the list", "--max-new-tokens", 2, "--dense", saved / "wide", "--device", "cpu") == 0
    assert re.fullmatch(SPEED + ", 1.00 times the memory", capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(memory, "free", lambda _: 0)
    assert run(saved / "dense", "the list", "--max-new-tokens", 2, "--dense", saved / "wide", "--device", "cpu") == 0
    assert "\nspeeds not compared: too little memory for both models at once, 1.00 times" in capsys.readouterr().out


@pytest.mark.parametrize("rates, expected", [
    ([(10, 12), (5, 8), (10, 10)], 1.2), ([(10, 12), (1, 8), (10, 10)], math.nan), ([(10, math.nan)] * 3, math.nan)])
def test_speeds_are_the_median_of_alternating_rounds_or_none(rates, expected):
    made, left = [], [rate for pair in rates for rate in pair]

    def model(name, max_new_tokens):
        made.append((name, max_new_tokens))
        return generation.Completion("", 4, 1.0, left.pop(0), 1)

    found = generation.compare_speeds(partial(model, "dense"), partial(model, "other"), 4, 0)
    assert found == pytest.approx(expected, nan_ok=True) and made == [("dense", 4), ("other", 4)] * 3


@pytest.mark.parametrize("arguments, message", [
    (["nowhere", "x"], "model nowhere: not a folder or .gguf file here, not in the cache"),
    (["{}", "x", "--dense", "nowhere"], "model nowhere: not a folder"), (["{}", ""], "prompt: is empty"),
    (["{}", "x", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["{}", "x", "--max-new-tokens", "128"], "--max-new-tokens 128: the model's limit is 128 tokens"),
    (["{}", "x", "--temperature", "-1"], "--temperature -1: must be at least 0"),
    (["{}", "x", "--device", "cuda:07"], "--device cuda:07: must be cpu"),
    (["{}"], "the following arguments are required: prompt")])
def test_bad_input_gets_one_line_and_status_2(arguments, message, saved, capsys):
    capsys.readouterr()
    assert run(*(argument.replace("{}", str(saved / "dense")) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"generate.py: error: {message}") and err.count("\n") == 1 and not out
