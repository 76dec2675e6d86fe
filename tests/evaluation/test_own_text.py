"""Check the text that a model writes itself against its own forward, without a cache of keys and values."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from conftest import CPU, make, record_of
from torch import nn

from mixgpt import datautils
from mixgpt.app import opening
from mixgpt.common.errors import InputError
from mixgpt.common.runtime import seeded
from mixgpt.evaluation import own_text
from mixgpt.modeling.streaming import locations_of

TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Keep texts in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mixgpt"


@pytest.fixture
def chatty(tokenizer):
    """Give a tokenizer with a chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    return changed


def drawn(model, starts, length, uniform):
    """Return pieces by whole forwards: of each, the first token at which the sum of p passes uniform (steps, n)."""
    pieces = [list(start[:1]) for start in starts]
    for t in range(1, length):
        for row, (piece, start) in enumerate(zip(pieces, starts, strict=True)):
            p = model(torch.tensor([piece])).logits[0, -1].double().softmax(-1)
            token = int((p.cumsum(0) <= uniform[t - 1][row] * p.sum()).sum())
            piece.append(start[t] if t < len(start) else token)
    return pieces


@pytest.mark.parametrize("name", ["opt", "bloom", "llama", "gemma3"])
@torch.no_grad()
def test_each_token_is_drawn_from_the_models_own_predictions(name, chatty, monkeypatch):
    monkeypatch.setattr(own_text, "PIECE", 20)
    model, bos = make(name).eval(), {"gemma3": "each"}.get(name, "never")
    starts = [[token for token in row if token != own_text.FREE]
              for row in own_text.beginnings(model, chatty, 4, 20, 5, bos).tolist()]
    message = chatty("<s>user:", add_special_tokens=False).input_ids
    assert all(start[:len(message)] == message for start in starts[1::2])
    assert all((start == [chatty.bos_token_id]) == (bos == "each") for start in starts[::2])
    text = own_text.write_text(model, chatty, CPU, 4 * 20 - 3, 5, bos)
    uniform = torch.rand(4, 19, generator=seeded(5, "own text")).t().double()
    assert text.tolist() == sum(drawn(model, starts, 20, uniform), [])[:77]


@torch.no_grad()
def test_no_setting_of_the_model_ends_or_alters_its_text(tokenizer):
    model = make("llama").eval()
    expected = own_text.write_text(model, tokenizer, CPU, 128, 0, "never")
    model.config._name_or_path = "other"
    for file in own_text.cache_folder().iterdir():
        file.unlink()
    settings = model.generation_config
    settings.update(eos_token_id=list(range(9, 300)), repetition_penalty=3.0, temperature=9.0, do_sample=True)
    assert torch.equal(own_text.write_text(model, tokenizer, CPU, 128, 0, "never"), expected)
    assert model.generation_config is settings
    assert len(expected.unique()) > 20


def test_text_is_written_once_for_each_model_and_seed(tokenizer, cache, monkeypatch):
    model = make("llama").eval()
    first = own_text.write_text(model, tokenizer, CPU, 100, 0, "never")
    other = own_text.write_text(model, tokenizer, CPU, 100, 1, "never")
    assert not torch.equal(first, other) and len(list(cache.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "write_pieces", lambda *_: pytest.fail("it was written again"))
        assert torch.equal(own_text.write_text(model, tokenizer, CPU, 100, 0, "never"), first)
        assert torch.equal(own_text.write_text(make("llama").eval(), tokenizer, CPU, 100, 1, "never"), other)
    nn.init.ones_(model.lm_head.weight)
    assert not torch.equal(own_text.write_text(model, tokenizer, CPU, 100, 0, "never"), first)


def test_a_cache_that_cannot_be_written_does_not_end_the_run(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(own_text.write_text(make("llama").eval(), tokenizer, CPU, 100, 0, "never")) == 100


def test_predictions_that_are_not_finite_are_refused(tokenizer):
    model = make("llama").eval()
    nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(InputError, match="its logits contain NaN or inf"):
        own_text.write_text(model, tokenizer, CPU, 100, 0, "never")


@pytest.mark.parametrize("template", ["{{ raise_exception('a system message comes first') }}", "<s>nothing of it",
                                      "{{ messages[1].content }}"])
def test_a_chat_template_that_cannot_show_a_message_is_not_used(template, chatty):
    chatty.chat_template = template
    assert own_text.beginnings(make("llama"), chatty, 8, 64, 0, "never").shape == (8, 1)


def test_pieces_begin_with_any_token_but_special_ones_or_those_that_the_model_lacks(chatty):
    model = make("llama")
    model.config.vocab_size = 40
    with_turns, without = (own_text.beginnings(model, chatty, 2000, T, 0, "never") for T in (64, 4))
    assert with_turns.shape[1] > 2 and torch.equal(with_turns[::2, 0], without[::2, 0])
    assert without.shape == (2000, 1) and set(without.flatten().tolist()) == set(range(2, 40))
    assert without.float().mean() == pytest.approx(20.5, abs=1)
    assert not torch.equal(own_text.beginnings(model, chatty, 2000, 4, 1, "never"), without)
    chatty.bos_token = None  # Its token is no special one then.
    assert set(own_text.beginnings(model, chatty, 2000, 4, 0, "never").flatten().tolist()) == {0, *range(2, 40)}


def test_a_run_calibrates_and_evaluates_on_text_of_the_dense_model(prune, checkpoint_folder, tokenizer, tmp_path,
                                                                  monkeypatch):
    seen, distils = {}, opening.distributed.prepared

    def look():
        frame = __import__("inspect").currentframe().f_back
        seen.update(run=frame.f_locals["run"])
        distils()

    monkeypatch.setattr(opening.distributed, "prepared", look)
    out = prune("llama", f"--sparsity .5 --extra 1 --distill .5 --eval self --dense --seed 3 --save {tmp_path / 'out'}",
                data="builtin:0.5,self:0.5")
    stages = re.findall(r"^stage    (\d+) of (\d+): ", out, re.MULTILINE)
    assert [int(number) for number, _ in stages] == list(range(1, int(stages[0][1]) + 1))
    assert len({count for _, count in stages}) == 1
    run, record = seen["run"], record_of(tmp_path / "out")
    model = make("llama").eval()
    own = own_text.write_text(model, tokenizer, CPU, 2 * 32 + 2 * 32, 3, "never").view(4, 32).tolist()
    calibrated, further = run.calibration.tolist(), run.further.tolist()
    assert [len(calibrated), len(further)] == [4, 4 + 2]
    assert [row for row in own if row in calibrated] == own[:2]
    assert [row for row in own if row in further[:4]] == own[2:]
    taught, _ = datautils.calibration_samples("builtin", 2, 32, "3, distillation", tokenizer)
    assert further[4:] == taught.tolist()
    assert [part["dataset"] for part in record["data"]["calibration"]["parts"]] == ["builtin", "self"]
    test = own_text.write_text(model, tokenizer, CPU, datautils.OWN_TOKENS, "test", "never")
    assert torch.equal(run.tests["self"].flatten(), test[:run.tests["self"].numel()])


def test_time_to_write_a_test_text_is_none_of_pruning(prune, tmp_path):
    for data, expected in (("builtin", False), ("self", True)):
        record = tmp_path / f"{data}.json"
        prune("llama", f"--sparsity .5 --eval self --record {record}", data=data)
        assert ("own text" in json.loads(record.read_text())["seconds"]) == expected


@pytest.mark.parametrize("kind", ["on disk", "in memory"])
def test_weights_are_where_they_were_behind_the_text(kind, checkpoint_folder, tokenizer):
    folder = checkpoint_folder("llama")
    config = opening.load.read_config(folder)
    model = (opening.load.open_model if kind == "on disk" else lambda name, _, dtype: opening.load.load_model(
        name, dtype))(folder, config, "auto")
    places = locations_of(model)
    own_text.write_text(model, tokenizer, CPU, 100, 0, "never")
    assert locations_of(model) == places and bool(places) == (kind == "on disk")
    assert all(weight.is_meta == (kind == "on disk") for weight in model.parameters())


def test_without_room_for_the_model_others_take_its_place(prune, monkeypatch, tmp_path):
    monkeypatch.setattr(own_text.memory, "free", lambda device: 1000)
    options = "--sparsity .5 --gmp --sensitivity fisher --sparsity-way weight-level"
    out = prune("llama", options, f"--save {tmp_path / 'out'}", data="builtin:0.4,self:0.6")
    assert "warning  dataset builtin:0.4,self:0.6: without self, as cpu has no room for the whole model" in out
    assert record_of(tmp_path / "out")["data"]["calibration"]["dataset"] == "builtin"
    line = prune("llama", options, data="self", status=2)
    assert "dataset self: cannot be written, as cpu has no room for the whole model; give another text" in line
    assert "--eval self: cannot be written" in prune("llama", options, "--eval self", status=2)


def test_without_a_run_there_is_no_text_of_the_model(tokenizer):
    for read in (partial(datautils.calibration_samples, "self", 2, 8, 0), partial(datautils.test_tokens, "self", 8)):
        with pytest.raises(InputError, match="self: is text that a model writes, which only a run has"):
            read(tokenizer)


def test_only_what_has_a_probability_is_drawn(tokenizer, monkeypatch):
    """Rounding must not choose tokens of probability 0, or none, at either end of what a generator gives."""
    model = make("llama").eval()
    kept = [3, 200, 371]
    monkeypatch.setattr(own_text, "BLOCK", 7)

    class Bias(nn.Linear):
        def forward(self, h):
            return torch.full((*h.shape[:-1], 384), -torch.inf).index_fill_(-1, torch.tensor(kept), 1.5)

    model.lm_head = Bias(32, 384)
    for u in (0.0, 1 - 2**-24, 0.4, 2 / 3):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **_: torch.full(shape, u))
        text = own_text.write_text(model, tokenizer, CPU, own_text.PIECE, f"{u}", "never")
        assert set(text[1:].tolist()) == {kept[min(int(3 * u), 2)]}, u
