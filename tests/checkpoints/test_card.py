"""Check the card of a saved model against its record and its folder, and what a run says of these."""

import re
import shutil

import pytest
import torch
import yaml
from conftest import record_of, saved_tensors
from transformers import AutoModelForCausalLM

import mixgpt
from mixgpt.checkpoints import card

HALF = "--sparsity .5 --gmp"


def read(folder):
    """Return the front matter of a card, its text, and {language: code} of its blocks."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text, dict(re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL))


@pytest.mark.parametrize("save_format, options, tags, served", [
    ("dense", HALF, ["pruned", "sparsity"], True),
    ("sparse", f"{HALF} --wbits 4", ["pruned", "sparsity", "quantized"], False),
    ("compressed-tensors", "--wbits 4 --sym", ["quantized", "gptq", "compressed-tensors"], True)])
def test_a_card_says_what_the_record_does_and_its_code_loads_the_model(save_format, options, tags, served, prune,
                                                                       checkpoint_folder, tmp_path, monkeypatch):
    base = shutil.copytree(checkpoint_folder("wide llama"), tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: open\ntags: [a]\n---\n# Base\n")
    monkeypatch.chdir(tmp_path)
    out = prune("llama", options, "--dense --save-format", save_format, "--save=small_one", model=base)
    folder, record = tmp_path / "small_one", record_of(tmp_path / "small_one")
    front, text, code = read(folder)
    assert front["tags"] == ["mixgpt", *tags] and (front["license"], front["license_name"]) == ("other", "open")
    assert "base_model" not in front and front["pipeline_tag"] == "text-generation"
    assert f"{record['sparsity']:.2%} of the weights in 21 matrices are 0" in text and "# small_one\n" in text
    for method, found in record["perplexity"].items():
        assert f"| {method} | {found['builtin']:.2f} |" in text
    assert len(record["perplexity"]) == 2 and ("vllm serve small_one" in text) == served
    exec(code["python"], names := {})
    assert torch.equal(*(model.get_input_embeddings().weight for model in (names["model"], mixgpt.load(folder)[0])))
    assert out.count("\nhf upload small_one small_one\n") == 1
    assert "hf upload" not in prune("llama", HALF, "--quiet --save", tmp_path / "quiet")


def test_the_base_model_and_its_licence_come_from_the_hub_or_from_the_card_of_a_saved_folder(
        prune, checkpoint_folder, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "card.md").write_text("---\nlicense: mit\nbase_model: org/older\n---\n")
    asked = []
    monkeypatch.setattr(card, "cached_file", lambda *names, **_: asked.append(names) or tmp_path / "card.md")
    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder("llama"))
    model.config.name_or_path = "org/base"
    mixgpt.prune(model, "builtin", tokenizer, sparsity=0.5, gmp=True, nsamples=2, seqlen=32, eval=(), device="cpu",
                 save=tmp_path / "first")
    prune("llama", "--wbits 4 --save", tmp_path / "second", model=tmp_path / "first")
    for folder, relation in ("first", "finetune"), ("second", "quantized"):
        front, text, code = read(tmp_path / folder)
        assert (front["license"], front["base_model"], front["base_model_relation"]) == ("mit", "org/base", relation)
    assert asked == [("org/base", "README.md")]
    for content in ("", "---\n[\n---\n", "---\n- a\n---\n", "\udcff"):
        (tmp_path / "card.md").write_bytes(content.encode(errors="surrogateescape"))
        assert card._base("org/base") == ("org/base", {})


def test_a_card_of_the_users_own_stays_until_another_model_takes_its_place(prune, tmp_path):
    folder, options = tmp_path / "saved", f"{HALF} --save"
    prune("llama", options, folder)
    (folder / "README.md").write_text("my own")
    prune("llama", "--resume", options, folder)
    prune("llama", model=folder)
    assert (folder / "README.md").read_text() == "my own"
    prune("llama", "--overwrite", options, folder)
    assert "# saved" in (folder / "README.md").read_text()


def test_a_run_says_what_smaller_formats_would_take(prune, tmp_path):
    lines = prune("wide llama", HALF, "--wbits 4 --sym --save", tmp_path / "dense").splitlines()
    said = next(line for line in lines if line.startswith("saved in "))
    found = dict(re.findall(r"--save-format ([\w-]+): ([\d.]+) MB, (?:loads in vLLM, too|needs mixgpt to load)", said))
    sizes = record_of(tmp_path / "dense")["sizes"]
    assert f": {sizes['dense'] / 1e6:.1f} MB; " in said
    assert found == {name: f"{sizes[name] / 1e6:.1f}" for name in ("compressed-tensors", "sparse")}
    for name in found:
        prune("llama", "--save-format", name, HALF, "--wbits 4 --sym --save", tmp_path / name,
              model=tmp_path / "dense")
        assert sizes[name] == pytest.approx(sum(t.nbytes for t in saved_tensors(tmp_path / name).values()), rel=0.02)
    assert "--save-format" not in prune("qwen3-moe", HALF, "--save", tmp_path / "experts")
