"""Check the answers of the streamed model against plain forwards and against lm-eval's own model."""

import pytest
import torch
from conftest import CPU, make
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mixgpt.checkpoints.load import open_model, read_config
from mixgpt.evaluation import tasks
from mixgpt.evaluation.tasks import StreamedLM

LIMIT = 128  # tokens that the tiny models take
PAIRS = [("Question: what is it?\nAnswer:", " a list"), ("Question: what is it?\nAnswer:", " a tuple of numbers"),
         ("", "no context at all"), ("trailing space ", "goes to the continuation"), ("x", " y"), ("x", " z"),
         ("<s>begins with a special token", " here"), ("long " * 90, "after a context that is cut"),
         ("import this module and call the function " * 2, " with the arguments")]
TEXTS = ["a short text", "", "some words of the language reference, " * 12, "one"]


def asked(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=tuple(each), idx=0) for each in arguments]


@torch.no_grad()
def by_hand(model, ids, count):
    """Return (log-likelihood, greedy) of the last `count` of ids, from a forward of these tokens alone, in float64."""
    scores = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double().log_softmax(-1)[-count:]
    wanted = torch.tensor(ids[-count:])
    return scores.gather(1, wanted[:, None]).sum().item(), bool((scores.argmax(-1) == wanted).all())


def pair_by_hand(model, tokenizer, context, continuation, bos=False):
    """Return what `by_hand` does for the continuation. bos: whether BOS stands in front of a context that is cut."""
    if not context:
        ids = [tokenizer.bos_token_id, *tokenizer(continuation, add_special_tokens=False).input_ids]
        return by_hand(model, ids, len(ids) - 1)
    stripped = context.rstrip()
    special = not stripped.startswith("<s>")
    whole = tokenizer(context + continuation, add_special_tokens=special).input_ids
    count = len(whole) - len(tokenizer(stripped, add_special_tokens=special).input_ids)
    whole = whole[-(LIMIT + 1):]
    return by_hand(model, [tokenizer.bos_token_id, *whole[1:]] if bos else whole, count)


def text_by_hand(model, tokenizer, text, limit=LIMIT):
    """Count each token once, in windows of `limit` tokens of which the last one is full."""
    ids, total, done = [tokenizer.bos_token_id, *tokenizer(text).input_ids], 0.0, 1
    while done < len(ids):
        end = min(done + limit, len(ids))
        total += by_hand(model, ids[max(0, end - limit - 1):end], end - done)[0]
        done = end
    return total


def limited(name):
    """Make a model that takes LIMIT tokens, also where nothing in it says so."""
    model = make(name)
    if name == "bloom":
        model.config.max_position_embeddings = LIMIT
    return model


@pytest.mark.parametrize("name", ["opt", "opt-350m", "llama", "bloom"])
def test_answers_are_those_of_the_model_that_lm_eval_has(name, tokenizer):
    model = limited(name)
    theirs = HFLM(model, tokenizer=tokenizer, device="cpu", batch_size=1)
    ours = StreamedLM(model, tokenizer, 300, CPU)
    assert theirs.max_length == ours.max_length == LIMIT
    pairs, texts = asked("loglikelihood", PAIRS), asked("loglikelihood_rolling", ([text] for text in TEXTS if text))
    for answer, expected in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert answer == (pytest.approx(expected[0], rel=1e-4, abs=1e-3), expected[1])
    assert ours.cut == 1
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    for options in ({"until": ["\n", " a"], "max_gen_toks": 12}, {"until": [], "max_new_tokens": 9}):
        texts = asked("generate_until", [(context, options) for context, _ in PAIRS if context])
        assert ours.generate_until(texts) == theirs.generate_until(texts, disable_tqdm=True)
    repeats = asked("generate_until", [("x", {"max_gen_toks": 9, "do_sample": True, "temperature": 2.0})] * 3)
    assert len(set(ours.generate_until(repeats))) == 3


def test_with_bos_for_each_sequence_cut_contexts_and_windows_of_texts_begin_with_it(tokenizer, plain):
    model = make("gemma2")
    ours, bos = StreamedLM(model, plain, 300, CPU, "each"), tokenizer.bos_token_id
    for answer, pair in zip(ours.loglikelihood(asked("loglikelihood", PAIRS)), PAIRS, strict=True):
        expected, same = pair_by_hand(model, tokenizer, *pair, bos=True)
        assert answer == (pytest.approx(expected, rel=1e-5, abs=1e-4), same)

    answers = ours.loglikelihood_rolling(asked("loglikelihood_rolling", ([text] for text in TEXTS)))
    for answer, text in zip(answers, TEXTS, strict=True):
        ids, expected, done = plain(text).input_ids, 0.0, 0
        while done < len(ids):
            end = min(done + LIMIT, len(ids))
            before = ids[max(0, end - LIMIT):done] if done else []
            expected += by_hand(model, [bos, *before, *ids[done:end]], end - done)[0]
            done = end
        assert answer == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert any(len(plain(text).input_ids) > 2 * LIMIT for text in TEXTS)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_model_on_disk_answers_as_one_in_memory_in_any_groups(name, checkpoint_folder, tokenizer, monkeypatch):
    model = make(name)
    folder = checkpoint_folder(name)
    on_disk = open_model(folder, read_config(folder), "auto")
    assert all(parameter.is_meta for parameter in on_disk.parameters())
    pairs, texts = asked("loglikelihood", PAIRS), asked("generate_until", [("x", {"max_gen_toks": 5})])
    lms = [StreamedLM(each, tokenizer, 300, CPU) for each in (model, on_disk)]
    expected = lms[0].loglikelihood(pairs, disable_tqdm=True)
    assert lms[1].loglikelihood(pairs, disable_tqdm=True) == expected
    assert lms[1].generate_until(texts) == lms[0].generate_until(texts)
    assert all(parameter.is_meta for parameter in on_disk.parameters())
    monkeypatch.setattr(tasks, "RESIDENT", 40)
    for tokens in (1, 300):
        answers = StreamedLM(on_disk, tokenizer, tokens, CPU).loglikelihood(pairs, disable_tqdm=True)
        assert [answer[0] for answer in answers] == pytest.approx([answer[0] for answer in expected], rel=1e-5)
