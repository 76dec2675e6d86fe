"""Check the thread that writes finished layers: it works beside the next layer, loses no error and writes what was."""

import contextlib
import errno
import os
import threading

import pytest
import torch
from conftest import make
from makebelieve import Gpu
from safetensors.torch import load_file

from mixgpt.checkpoints import layer_files, load
from mixgpt.checkpoints.layer_files import LayerFiles
from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming
from modelutils import on_device


@pytest.fixture
def model(checkpoint_folder):
    """Give (family, a tiny LLaMA whose weights stay on disk)."""
    family, _ = make("llama")
    folder = checkpoint_folder("llama")
    return family, load.open_model(folder, load.load_config(folder, family), family, "auto")


@pytest.fixture
def gate(monkeypatch):
    """Give an event without which no thread writes a file."""
    gate, save_file = threading.Event(), streaming.save_file

    def waiting(*given, **options):
        assert gate.wait(30)
        save_file(*given, **options)

    monkeypatch.setattr(streaming, "save_file", waiting)
    return gate


@contextlib.contextmanager
def kept(path, model):
    """Give LayerFiles that have started."""
    path.mkdir(exist_ok=True)
    with LayerFiles(path, "--save folder", "free some space") as folder:
        folder.start(model[1], model[0])
        folder.begin(3)
        yield folder


def finish(folder, index, states=None, device="cpu"):
    """Finish a layer with all weights 1 + index."""
    layer = folder.layers[index]
    with on_device([layer], device):
        for weight in layer.parameters():
            weight.fill_(1 + index)
        folder.finish(index, layer, {}, states)


def written(folder, index):
    return {float(value) for tensor in load_file(folder._layer(index)).values() for value in tensor.unique()}


def test_the_next_layer_does_not_wait_for_the_disk_but_the_one_behind_it_does(model, tmp_path, gate):
    with kept(tmp_path / "folder", model) as folder:
        finish(folder, 0)
        assert not folder._layer(0).exists()  # not written yet
        second = threading.Thread(target=finish, args=(folder, 1))
        second.start()
        second.join(0.2)
        assert second.is_alive() and not folder._layer(1).exists()
        gate.set()
        second.join(30)
        folder.settle()
        assert [written(folder, index) for index in range(2)] == [{1.0}, {2.0}]
        assert torch.equal(folder.layers[1].source.tensor("mlp.up_proj.weight"), torch.full((48, 32), 2.0))


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("asked", ["finish", "settle", "begin", "exit"])
def test_an_error_of_the_thread_comes_up_once_where_the_run_next_asks(asked, model, tmp_path, monkeypatch):
    line = "^--save folder: layer-00000.safetensors needs 0.000 GB.*No space left on device.*; free some space$"
    with pytest.raises(InputError, match=line) if asked == "exit" else contextlib.nullcontext(), kept(
            tmp_path / "folder", model) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "save_file", full)
            finish(folder, 0)
            asking = {"finish": lambda: finish(folder, 1), "settle": folder.settle, "begin": lambda: folder.begin(3)}
            if asked == "exit":
                folder.thread.shutdown()
                return
            with pytest.raises(InputError, match=line):
                asking[asked]()
        folder.begin(3)  # as another attempt does
        finish(folder, 0)
        folder.settle()
        assert written(folder, 0) == {1.0}


def test_any_other_error_of_the_thread_comes_up_too(model, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "save_file", lambda *_, **__: {}["surprise"])
    with kept(tmp_path, model) as folder:
        finish(folder, 0)
        with pytest.raises(KeyError, match="surprise"):
            folder.settle()


def test_an_error_of_the_run_waits_for_the_layer_that_is_being_written(model, tmp_path, gate):
    threading.Timer(0.3, gate.set).start()
    with pytest.raises(KeyboardInterrupt), kept(tmp_path / "folder", model) as folder:
        finish(folder, 0)
        raise KeyboardInterrupt
    assert written(folder, 0) == {1.0} and folder._layer(0).with_suffix(".json").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_hidden_states_are_kept_as_they_were_though_the_run_overwrites_them(device, model, tmp_path, gate, monkeypatch):
    """On a GPU they are copied, and the run goes on; on the host it waits for them."""
    monkeypatch.setattr(layer_files, "STATES_EVERY", 0)
    with Gpu() if device != "cpu" else contextlib.nullcontext() as gpu, kept(tmp_path / "folder", model) as folder:
        states = {"hidden": torch.arange(24.0, device=device).view(2, 3, 4)}
        if device == "cpu":
            gate.set()
        finish(folder, 0, states, device)
        states["hidden"].zero_()
        gate.set()
        if gpu:
            assert gpu.synchronisations.total() == 1  # the copy
        folder.settle()
        held = load_file(tmp_path / "folder" / "state-00001-0.safetensors")["hidden"]
        assert torch.equal(held, torch.arange(24.0).view(2, 3, 4))
        assert written(folder, 0) == {1.0}


def test_distilled_layers_count_when_all_are_written_and_the_pruned_ones_before(model, tmp_path):
    with kept(tmp_path, model) as folder:
        for index in range(3):
            finish(folder, index)
        folder.settle()
        for index in range(3):
            with on_device([folder.layers[index]], "cpu"):
                for weight in folder.layers[index].parameters():
                    weight.fill_(-1)
                folder.finish(index, folder.layers[index], {}, kind="distilled")
            folder._wait()
            assert folder.begin(3)[0] == 3 and not folder.distilled
            assert (folder.layers[0].source.tensor("mlp.up_proj.weight") == 1).all()
        folder.settle_distilled({"divergence": 0.5})
        assert folder.begin(3)[0] == 3 and folder.distilled == {"divergence": 0.5}
        assert all((layer.source.tensor("mlp.up_proj.weight") == -1).all() for layer in folder.layers)
        assert not list(tmp_path.glob("layer-*.safetensors"))


def test_hidden_states_count_if_all_processes_have_written_them(model, tmp_path, monkeypatch):
    """The second of two processes was killed before it wrote those behind the second layer."""
    monkeypatch.setattr(layer_files, "STATES_EVERY", 0)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: value)
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [value, {1}])
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    with kept(tmp_path, model) as folder:
        for index in range(2):
            finish(folder, index, {"hidden": torch.full((2, 3, 4), 1.0 + index)})
            if index == 0:
                folder.settle()
                (tmp_path / "state-00001-1.safetensors").write_text("")
        folder.settle()
        states = {"hidden": torch.zeros(2, 3, 4)}
        assert folder.begin(3, states)[0] == 1 and (states["hidden"] == 1).all()


def test_only_the_latest_hidden_states_are_left(model, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_files, "STATES_EVERY", 0)
    with kept(tmp_path / "folder", model) as folder:
        for index in range(2):
            finish(folder, index, {"hidden": torch.ones(2, 3, 4)})
        folder.settle()
        assert [file.name for file in folder.folder.glob("state-*")] == ["state-00002-0.safetensors"]


def test_a_layer_leaves_a_gpu_without_a_wait_and_its_memory_is_free_then():
    with Gpu() as gpu:
        weights = {"a": torch.arange(6.0, device="cuda:0").view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16,
                                                                                      device="cuda:0")}
        arrived, found = streaming.leaving(weights), {}
        del weights
        thread = threading.Thread(target=lambda: found.update(arrived()))
        thread.start()
        thread.join()
        assert gpu.used == 0 and not gpu.synchronisations
    assert torch.equal(found["a"], torch.arange(6.0).view(2, 3)) and found["b"].tolist() == [1, 1, 1]
    assert type(found["a"]) is torch.Tensor
