"""Check where BOS stands against ids put together by hand, and that nothing moves for models that do not need it."""

import copy
import json

import pytest
import torch
from conftest import make
from tokenizers import processors

from mixgpt import datautils
from mixgpt.datautils import resolve_bos, token_ids
from mixgpt.evaluation.generation import complete
from mixgpt.evaluation.tasks import StreamedLM

TEXT = "Names refer to objects; they are introduced by name binding operations. " * 6
BOS, END = 0, 1
TEMPLATE = "{% for part in messages %}<s>{{ part.content }}</s>{% endfor %}"
ADDED = {"BOS": ("<s> $A", [BOS], []), "nothing": ("$A", [], []), "an end": ("$A </s>", [], [END]),
         "both": ("<s> $A </s>", [BOS], [END]), "another token": ("</s> $A", [END], [])}


@pytest.fixture
def adding(tokenizer):
    """Return a function that gives a tokenizer which puts tokens of its own around a text, see ADDED."""
    def make(added):
        changed = copy.deepcopy(tokenizer)
        changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
            ADDED[added][0], special_tokens=[("<s>", BOS), ("</s>", END)])
        return changed

    return make


@pytest.fixture
def names(tmp_path):
    """Return {kind of text: name of a dataset}, for each way to draw from a text."""
    (tmp_path / "own.txt").write_text(TEXT * 3)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"{number} {TEXT}"}]}) + "\n" for number in range(3)))
    return {"joined": "builtin", "own": str(tmp_path / "own.txt"), "chats": str(tmp_path / "chats.jsonl"),
            "documents": "c4", "mixture": f"builtin:0.5,{tmp_path}/own.txt:0.5"}


@pytest.mark.parametrize("model_type, added, expected", [
    ("llama", "BOS", "once"), ("opt", "both", "once"), ("bloom", "nothing", "never"), ("baichuan", "an end", "never"),
    ("glm", "another token", "never"), ("gemma", "BOS", "each"), ("gemma2", "nothing", "each"),
    ("gemma3_text", "BOS", "each"), ("gemma4_text", "BOS", "each"), ("recurrent_gemma", "nothing", "each")])
def test_auto_is_each_for_models_that_need_it_and_else_what_the_tokenizer_does(model_type, added, expected, adding):
    assert resolve_bos("auto", model_type, adding(added)) == expected
    for chosen in ("each", "once", "never"):
        assert resolve_bos(chosen, model_type, adding(added)) == chosen


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("text", [TEXT, "", "<s>chat", " "])
def test_ids_are_those_of_the_tokenizer_but_for_bos(added, text, adding):
    tokenizer, (_, before, after) = adding(added), ADDED[added]
    inner = tokenizer(text, add_special_tokens=False).input_ids
    if text.startswith("<s>"):  # as chats do by their templates: one BOS is enough
        assert all(token_ids(tokenizer, text, bos) == inner for bos in ("each", "once", "never"))
        return
    others = [token for token in before if token != BOS]
    assert token_ids(tokenizer, text, "never") == [*others, *inner, *after]
    assert token_ids(tokenizer, text, "once") == token_ids(tokenizer, text, "each") == [BOS, *others, *inner, *after]
    assert token_ids(tokenizer, text) == tokenizer(text).input_ids
    assert not text or token_ids(tokenizer, text, "once", goes_on=True) == [BOS, *others, *inner]


def test_prompts_and_contexts_go_on_without_an_end_that_the_tokenizer_adds(adding):
    model, (plain, ending) = make("llama"), map(adding, ("BOS", "both"))
    assert complete(model, ending, TEXT, 4).text == complete(model, plain, TEXT, 4).text
    ours, other = (StreamedLM(model, each, 64, torch.device("cpu")) for each in (ending, plain))
    assert ours.tok_encode(TEXT) == other.tok_encode(TEXT)


@pytest.mark.parametrize("added", ["BOS", "nothing"])
@pytest.mark.parametrize("kind", ["joined", "own", "chats", "documents", "mixture"])
def test_every_segment_begins_with_bos_in_place_of_its_first_token(added, kind, adding, names, texts):
    tokenizer = adding(added)
    tokenizer.chat_template = TEMPLATE
    arguments = names[kind], 6, 16, 0, tokenizer, texts
    samples, _ = datautils.calibration_samples(*arguments, "each")
    once, _ = datautils.calibration_samples(*arguments, "once")
    assert (samples[:, 0] == BOS).all() and torch.equal(samples[:, 1:], once[:, 1:])
    assert (once[:, 0] != BOS).any(), "the segments would begin with BOS anyhow"
    if kind != "mixture":
        tokens, _ = datautils.test_tokens(names[kind], 16, tokenizer, texts, "each")
        rows, _ = datautils.load_rows(names[kind], "test", texts)
        rows = [row if isinstance(row, str) else f"<s>{row[0]['content']}</s>" for row in rows]
        text = (" " if kind == "documents" else "\n\n").join(rows)
        ids = tokenizer(text.removeprefix("<s>"), add_special_tokens=False).input_ids
        expected = torch.tensor([BOS, *ids])[:tokens.numel()].view(-1, 16)
        assert (tokens[:, 0] == BOS).all() and torch.equal(tokens[:, 1:], expected[:, 1:])
