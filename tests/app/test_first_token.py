"""Run models that need BOS in front of every sequence, and check all that they read, predict and record."""

import json
import shutil
from functools import partial

import pytest
import torch
from conftest import CPU, make, record_of
from pruning.test_layerwise import plan_of, sparsegpt, weights
from test_generate import go_on
from transformers import AutoModelForCausalLM

import mixgpt
from mixgpt import datautils
from mixgpt.app import generate
from mixgpt.evaluation import selfcheck
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import distill

BOS = 0


@pytest.fixture(scope="session")
def folder(once, plain):
    """Return a function that gives the folder of a model, whose tokenizer adds no BOS by itself."""
    def save(name, path):
        make(name).save_pretrained(path)
        plain.save_pretrained(path)

    return lambda name: once(f"without-bos-{name}", partial(save, name))


@pytest.mark.parametrize("name, bos, resolved", [
    ("gemma2", "auto", "each"), ("llama", "each", "each"), ("gemma2", "once", "once"), ("gemma2", "never", "never"),
    ("llama", "auto", "never")])
def test_perplexity_is_that_of_a_forward_of_the_sequences_with_bos(name, bos, resolved, prune, folder, tokenizer,
                                                                   tmp_path):
    options = "" if bos == "auto" else f"--bos {bos}"
    printed = prune("llama", options, "--record", tmp_path / "record.json", model=folder(name))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["settings"]["bos"] == resolved
    said = {"each": "data     BOS at the start of each sequence", "once": "data     BOS at the start of each text"}
    assert said.get(resolved, "") in printed
    rows, _ = datautils.load_rows("builtin", "test", None)  # as the fixture `prune` leaves it
    ids = torch.tensor(tokenizer("\n\n".join(rows), add_special_tokens=False).input_ids)
    ids = ids if resolved == "never" else torch.cat([torch.tensor([BOS]), ids])
    tokens, model = ids[:4 * 32].view(4, 32).clone(), AutoModelForCausalLM.from_pretrained(folder(name)).eval()
    if resolved == "each":
        tokens[:, 0] = BOS
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.exp().item()
    assert record["perplexity"]["dense"]["builtin"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", ["--preset best", "--sparsity-way weight-level"])
def test_all_that_a_run_reads_begins_with_bos(options, prune, folder, tmp_path, monkeypatch):
    """Also the text that the model is distilled on, and what is compared when saved."""
    sequences, embed = [], StreamedModel.embed

    def embedded(streamed, tokens, *args):
        sequences.append(tokens.clone())
        return embed(streamed, tokens, *args)

    monkeypatch.setattr(StreamedModel, "embed", embedded)
    monkeypatch.setattr(selfcheck, "check", lambda *_: (1.0, []))  # which reads random ones
    monkeypatch.setattr(distill, "PIECE", 16)
    prune("llama", "--sparsity .5", options, "--save", tmp_path / "saved", model=folder("gemma2"))
    record = record_of(tmp_path / "saved")
    assert all((tokens[:, 0] == BOS).all() for tokens in sequences)
    assert record["settings"]["bos"] == record["identity"]["--bos"] == "each"
    shapes = {tuple(tokens.shape) for tokens in sequences}
    assert {(4, 32), (1, 32)} <= shapes  # the test text, and what is compared
    if "best" in options:
        calibrated = next(tokens for tokens in sequences if tokens.shape == (6, 32))
        assert (calibrated[4:, ::16] == BOS).all() and (4, 16) in shapes  # those for distillation


@pytest.mark.parametrize("bos, light_first", [("each", False), ("once", True), ("never", True)])
def test_a_huge_first_token_counts_less_unless_it_is_the_bos_of_each_sequence(bos, light_first, tokenizer):
    tokens = torch.randint(1, 99, (6, 24), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = BOS  # so that it changes no text
    model, expected = make("llama"), make("llama")
    for each in (model, expected):
        each.get_input_embeddings().weight.data[BOS] *= 30
    mixgpt.prune(model, tokens, tokenizer, sparsity=0.5, target="dense", bos=bos, eval=(), device="cpu")
    sparsegpt(expected, plan_of(expected), tokens, blocksize=128, true_sequential=True, fits_dense=True,
              light_first=light_first)
    assert all(map(torch.equal, weights(model).values(), weights(expected).values()))


def test_bos_that_is_not_there_is_refused_in_one_line(folder, prune, tmp_path, capsys):
    path = shutil.copytree(folder("gemma2"), tmp_path / "model")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    message = f"--bos each: the tokenizer of model {path} has no BOS; must be never\n"
    for options in ([], ["--bos", "each"]):
        assert prune("llama", *options, model=path, status=2) == f"llama.py: error: {message}"
        assert generate.main("generate.py", [str(path), "def", "--device", "cpu", *options]) == 2
        assert capsys.readouterr().err == f"generate.py: error: {message}"
    prune("llama", "--bos never", model=path)


@pytest.mark.parametrize("name, options, begins", [("gemma2", [], True), ("llama", [], False),
                                                   ("llama", ["--bos", "once"], True),
                                                   ("gemma2", ["--bos", "never"], False)])
@pytest.mark.parametrize("prompt", ["def", "<s>user: a chat", "one two three four " * 60])
def test_a_prompt_begins_with_bos_also_where_it_is_cut(name, options, begins, prompt, folder, tokenizer, capsys):
    prompted = [str(folder(name)), prompt, "--max-new-tokens", "8", "--device", CPU.type, *options]
    assert generate.main("generate.py", prompted) == 0
    text = capsys.readouterr().out.split("\n\n")[1].strip()
    ids = tokenizer(prompt.removeprefix("<s>"), add_special_tokens=False).input_ids
    ids = [BOS, *ids] if begins or prompt.startswith("<s>") else ids
    ids = ids[-(128 - 8):]  # of the model's context
    if name == "gemma2" and begins:
        ids[0] = BOS
    model = AutoModelForCausalLM.from_pretrained(folder(name)).eval()
    expected = tokenizer.decode(go_on(model, ids, 8), skip_special_tokens=True)
    assert "".join(text.split()) == "".join(expected.split())
