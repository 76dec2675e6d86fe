"""Check that the commands here take the small models, and that texts and folders are what they should be."""

import functools
import json
import sysconfig
from dataclasses import replace

import pytest
import small_models
import torch
import transformers
from conftest import CPU, saved_tensors
from small_models import FAMILIES, Size, build, documents, make_model, make_texts

from mixgpt.app import cli
from mixgpt.checkpoints import load
from mixgpt.evaluation.measures import perplexity
from mixgpt.modeling.family import family_of
from modelutils import linears

TINY = Size(width=32, layers=2, heads=2, experts=4, vocabulary=384, seqlen=32, batch=4, steps=3, train_bytes=60_000,
            test_bytes=20_000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("small-models")


@pytest.fixture(scope="module")
def trained(cache):
    """Give a function that returns the folder of the tiny model of a family."""

    @functools.cache
    def folder(name):
        make_model(name, cache, TINY, 0)
        return cache / name

    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_loaded_and_pruned_by_its_script(name, trained, cache, tmp_path, capsys):
    folder, texts = trained(name), cache / "text"
    model = load.load_model(str(folder), torch.float32)
    family = family_of(model)
    assert cli.main(family, [str(folder), str(texts / "train.jsonl"), "--sparsity", ".5", "--nsamples", "4", "--eval",
                             str(texts / "test.jsonl"), "--eval-limit", "2", "--save", str(tmp_path / "pruned")]) == 0
    assert "50.00%" in capsys.readouterr().out
    dense, pruned = saved_tensors(folder), saved_tensors(tmp_path / "pruned")
    assert dense.keys() == pruned.keys()
    key = family.path(0, next(iter(linears(family.layers_of(model)[0])))) + ".weight"
    assert (dense[key] != 0).all() and (pruned[key] == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    record = json.loads((folder / "training.json").read_text())
    assert record["parameters"] == sum(tensor.numel() for tensor in dense.values())
    assert record["tokens"] == 3 * 4 * 32 and record["seed"] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_of_a_few_million_parameters_and_can_be_pruned_in_n_of_m(name, trained):
    with torch.device("meta"):
        model = build(name, small_models.SIZE)
    assert 5e6 < model.num_parameters() < 20e6
    for each in (model, load.load_model(str(trained(name)), torch.float32)):  # whose experts stand apart
        for layer in family_of(each).layers_of(each):
            assert all(module.in_features % 4 == 0 for module in linears(layer).values())


def test_training_lowers_the_perplexity_of_text_that_it_does_not_see(tmp_path):
    figures = []
    for steps in (1, 120):
        make_model("opt", tmp_path / str(steps), replace(TINY, steps=steps), 0)
        model = load.load_model(str(tmp_path / str(steps) / "opt"), torch.float32)
        tokenizer, rows = make_texts(tmp_path / str(steps) / "text", TINY)
        ids = torch.tensor(tokenizer("\n\n".join(rows["test"])).input_ids)[:32 * 64].view(64, 32)
        figures.append(perplexity(model, family_of(model), ids, 4, CPU))
    assert figures[0] > 300 and figures[1] < figures[0] / 2


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_an_interrupted_training_leaves_no_folder_and_one_that_is_there_is_kept(tmp_path, monkeypatch):
    make_texts(tmp_path / "text", TINY)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.OPTForCausalLM, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_model("opt", tmp_path, TINY, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    record = make_model("opt", tmp_path, TINY, 0)
    monkeypatch.setattr(small_models, "train", interrupt)
    assert make_model("opt", tmp_path, TINY, 0) == record == json.loads((tmp_path / "opt/training.json").read_text())


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
    assert {"x = 3\n", "The train text of the manual.", "The test text of the manual."} <= set(both)
    for number in range(40):
        (packages / f"new{number}.py").write_text(f"z = {number}\n")
        (tmp_path / f"copy{number}.py").write_text("x = 3\n")
        (tmp_path / f"long{number}.py").write_text("x = 3\n" * 10_000)
    after = documents(10**6, 10**6)
    assert all(set(before[part]) < set(after[part]) for part in before)
    assert sum(map(len, after.values())) == sum(map(len, before.values())) + 40


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Give the folder that the command line keeps its tiny models in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(small_models, "SIZE", TINY)
    return tmp_path / "mixgpt" / "small-models"


def test_the_command_prints_a_line_for_each_model_of_a_known_family(home, capsys):
    with pytest.raises(SystemExit) as stop:
        small_models.main(["opt", "gpt"])
    assert stop.value.code == 2 and not home.exists()
    assert "family gpt: must be one of opt, bloom, baichuan, gemma3, qwen3-moe" in capsys.readouterr().err
    assert small_models.main(["opt"]) == 0
    record = json.loads((home / "opt" / "training.json").read_text())
    assert capsys.readouterr().out == (f"opt: 0.0M parameters, 0.0M tokens in {record['seconds']:.0f} s, "
                                       f"{home / 'opt'}\n")
