"""Check what of a model's folder is looked at before anything is built: links, sizes, the bytes of weights."""

import json
import shutil
import time

import pytest
from conftest import FAMILIES
from makegguf import write_gguf
from safetensors.torch import load_file, save_file

import llama
from mixgpt.checkpoints import load, soundness
from mixgpt.common.errors import InputError


@pytest.fixture
def model(checkpoint_folder, tmp_path):
    """Give the folder of a copy of a tiny LLaMA."""
    return shutil.copytree(checkpoint_folder("llama"), tmp_path / "model")


def as_snapshot(folder, root):
    """Arrange the files of a folder as the hub's cache does. Returns the folder of the snapshot."""
    snapshot, blobs = root / "models--a--b" / "snapshots" / "0123", root / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_links_of_the_hub_cache_are_followed(model, tmp_path):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    snapshot = as_snapshot(model, tmp_path)
    (tmp_path / "elsewhere").symlink_to(snapshot)  # a cache on another disk
    for folder in (snapshot, tmp_path / "elsewhere"):
        load.load_config(folder, llama.FAMILY)
        tokenizer = load.load_tokenizer(folder)
        assert tokenizer.chat_template == "{{ messages }}"


def test_a_link_among_the_blobs_of_the_hub_cache_may_not_lead_out_of_it(model, tmp_path):
    snapshot = as_snapshot(model, tmp_path)
    blob = (snapshot / "tokenizer_config.json").resolve()
    blob.rename(tmp_path / "secret")
    blob.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"tokenizer_config.json is a link out of its folder, to .*secret; replace it"):
        load.load_config(snapshot, llama.FAMILY)


def test_a_link_within_the_folder_and_weights_elsewhere_are_fine(model, tmp_path):
    (model / "config.json").rename(model / "settings")
    (model / "config.json").symlink_to("settings")
    (model / "model.safetensors").rename(tmp_path / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    config = load.load_config(model, llama.FAMILY)
    assert hasattr(load.open_model(model, config, llama.FAMILY, "auto"), "source")


def test_a_chat_template_beside_a_gguf_file_may_not_be_a_link_out_of_the_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    write_gguf(tmp_path / "folder" / "a.gguf", tokenizer)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="chat_template.jinja is a link out of its folder"):
        load.load_config(tmp_path / "folder" / "a.gguf", llama.FAMILY)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hundred_thousand_layers_are_refused_within_a_second(name, checkpoint_folder, tmp_path):
    model = shutil.copytree(checkpoint_folder(name), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    config = {key: value for key, value in config.items() if key not in ("layer_types", "max_window_layers")}
    (model / "config.json").write_text(json.dumps(config | {key: 100_000}))
    start = time.process_time()
    with pytest.raises(InputError, match="weights in 100000 layers, more than its files of .* GB can hold"):
        load.load_config(model, FAMILIES[name][0])
    assert time.process_time() - start < 1


def test_a_shard_that_is_missing_is_named_and_not_the_size(model):
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file({"lm_head.weight": state["model.norm.weight"]}, model / "one.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(state, "two.safetensors") | {"x": "one.safetensors"}}))
    assert soundness.stored_bytes(model) is None
    config = load.load_config(model, llama.FAMILY)
    with pytest.raises(InputError, match="No such file or directory: .*two.safetensors"):
        load.open_model(model, config, llama.FAMILY, "auto")


def test_the_bytes_of_all_shards_count(model):
    (model / "other.safetensors").write_bytes(bytes(1000))
    assert soundness.stored_bytes(model) == (model / "model.safetensors").stat().st_size + 1000
    (model / "config.json").rename(model.parent / "config.json")
    assert soundness.stored_bytes(model.parent / "config.json") == (model.parent / "config.json").stat().st_size
    (model / "other.safetensors").unlink()
    (model / "model.safetensors").unlink()
    assert soundness.stored_bytes(model) is None


@pytest.mark.parametrize("templates", [None, "text", {"default": "text", "tool_use": "text"},
                                       [{"name": "a b", "template": ""}]])
def test_chat_templates_as_they_are_published_are_accepted(templates):
    soundness.check_templates("model", templates)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../a", "/a", 3])
def test_names_of_chat_templates_that_are_no_plain_names_are_refused(name):
    for templates in ({name: "text"}, [{"name": name, "template": "text"}]):
        with pytest.raises(InputError, match="chat.template"):
            soundness.check_templates("model", templates)
