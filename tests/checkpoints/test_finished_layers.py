"""Check the thread that writes finished layers: it works beside the next layer, loses no error and writes what was."""

import contextlib
import threading

import pytest
import torch
from conftest import full
from safetensors.torch import load_file

from mixgpt.checkpoints import load
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming
from mixgpt.modeling.placing import on_device

UP = "mlp.up_proj.weight"


@pytest.fixture
def model(checkpoint_folder):
    """Give a tiny LLaMA whose weights stay on disk."""
    folder = checkpoint_folder("llama")
    return load.open_model(folder, load.read_config(folder), "auto")


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
def opened(path, model):
    """Give a RunDir that is open, whose layers are in `path`."""
    path.mkdir(exist_ok=True)
    with RunDir(path, place="--save folder", advice="free some space") as files:
        files.folder = path
        files.open(model, {})
        files.resume_from(3)
        yield files


def save_layer(files, index, value=None, distilled=False):
    """Save a layer with all weights 1 + index, or another value."""
    layer = files.layers[index]
    with on_device([layer], "cpu"):
        for weight in layer.parameters():
            weight.fill_(1 + index if value is None else value)
        files.save_layer(index, layer, {}, distilled)


def written(folder, index):
    tensors = load_file(folder / f"layer-{index:05d}.safetensors")
    return {float(value) for tensor in tensors.values() for value in tensor.unique()}


def test_the_next_layer_does_not_wait_for_the_disk_but_the_one_behind_it_does(model, tmp_path, gate):
    with opened(tmp_path, model) as files:
        save_layer(files, 0)
        assert not list(tmp_path.glob("*.safetensors"))  # not written yet
        second = threading.Thread(target=save_layer, args=(files, 1))
        second.start()
        second.join(0.2)
        assert second.is_alive() and not list(tmp_path.glob("*.safetensors"))
        gate.set()
        second.join(30)
        files.flush()
        assert [written(tmp_path, index) for index in range(2)] == [{1.0}, {2.0}]
        assert torch.equal(streaming.read(files.layers[1])[UP], torch.full((48, 32), 2.0))


@pytest.mark.parametrize("asked", ["save_layer", "flush", "resume_from"])
def test_an_error_of_the_thread_comes_up_where_the_run_next_asks(asked, model, tmp_path, monkeypatch):
    line = "^--save folder: layer-00000.safetensors cannot be written .No space left on device.; free some space$"
    monkeypatch.setattr(streaming, "save_file", full)
    with opened(tmp_path, model) as files:
        save_layer(files, 0)
        with pytest.raises(InputError, match=line):
            {"save_layer": lambda: save_layer(files, 1), "flush": files.flush,
             "resume_from": lambda: files.resume_from(3)}[asked]()


def test_an_error_of_the_run_waits_for_the_layer_that_is_being_written(model, tmp_path, gate):
    threading.Timer(0.3, gate.set).start()
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, model) as files:
        save_layer(files, 0)
        raise KeyboardInterrupt
    assert written(tmp_path, 0) == {1.0}


def test_weights_are_checked_when_they_are_first_read_and_those_of_a_finished_layer_again(model, tmp_path, monkeypatch):
    with opened(tmp_path, model) as files:
        streaming.read(files.layers[0])
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "check_finite", lambda *_: pytest.fail("checked again"))
            streaming.read(files.layers[0])
        save_layer(files, 0, float("inf"))
        files.flush()
        with pytest.raises(InputError, match="layer-00000.safetensors: .* contains NaN or inf"):
            streaming.read(files.layers[0])


@pytest.mark.parametrize("killed", [False, True])
def test_distilled_layers_count_when_all_are_written_and_the_pruned_ones_before(killed, model, tmp_path):
    """killed: while they replace the pruned ones."""
    with opened(tmp_path, model) as files:
        for index in range(3):
            save_layer(files, index)
        for index in range(3):
            save_layer(files, index, -1, distilled=True)
            files.flush()
            assert (streaming.read(files.layers[0])[UP] == 1).all()
        if killed:
            (tmp_path / "distilled-00001.safetensors").replace(tmp_path / "layer-00001.safetensors")
        files.take_distilled()
        assert len(files.resume_from(3)) == 3 and [written(tmp_path, index) for index in range(3)] == 3 * [{-1.0}]
        assert not list(tmp_path.glob("distilled-*"))
