"""Check that the commands here take the small models, that they learn, and that test text is not trained on."""

import sysconfig
from dataclasses import replace

import small_models
import torch
from commands import run, short_builtin  # noqa: F401, a fixture
from conftest import CPU
from small_models import Size, documents, make_model, make_texts

from mixgpt.checkpoints import load
from mixgpt.evaluation.measures import perplexity
from mixgpt.modeling.family import family_of

TINY = Size(width=32, layers=2, heads=2, experts=4, vocabulary=384, seqlen=32, batch=4, steps=3, train_bytes=60_000,
            test_bytes=20_000)


def test_training_lowers_the_perplexity_of_text_that_it_does_not_see(tmp_path):
    figures = []
    for steps in (1, 120):
        make_model("opt", tmp_path / str(steps), replace(TINY, steps=steps), 0)
        model = load.load_model(str(tmp_path / str(steps) / "opt"), torch.float32)
        tokenizer, rows = make_texts(tmp_path / str(steps) / "text", TINY)
        ids = torch.tensor(tokenizer("\n\n".join(rows["test"])).input_ids)[:32 * 64].view(64, 32)
        figures.append(perplexity(model, family_of(model), ids, 4, CPU))
    assert figures[0] > 300 and figures[1] < figures[0] / 2


def test_train_and_test_text_are_disjoint_and_further_packages_move_no_file_to_the_other_part(tmp_path, monkeypatch):
    packages = tmp_path / "site-packages"
    packages.mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": tmp_path, "purelib": packages, "platlib": packages})
    monkeypatch.setattr(small_models, "builtin_rows", lambda part: ([f"The {part} text of the manual."], {}))
    for number in range(20):
        (tmp_path / f"module{number}.py").write_text(f"x = {number}\n")
    before = documents(10**6, 10**6)
    both = before["train"] + before["test"]
    assert len(both) == len(set(both)) == 22 and len(before["train"]) > 3 * len(before["test"]) > 0
    for number in range(40):
        (packages / f"new{number}.py").write_text(f"z = {number}\n")
        (tmp_path / f"copy{number}.py").write_text("x = 3\n")
    after = documents(10**6, 10**6)
    assert all(set(before[part]) < set(after[part]) for part in before)
    assert sum(map(len, after.values())) == sum(map(len, before.values())) + 40
