"""Check the files of finished layers: what they hold, what the model reads of them, and a full disk."""

import errno
import os
from unittest import mock

import pytest
import torch
from conftest import make
from safetensors.torch import load_file

from mixgpt.checkpoints import load
from mixgpt.checkpoints.layer_files import LayerFiles
from mixgpt.common.errors import InputError
from mixgpt.modeling import streaming
from modelutils import on_device

UP = "mlp.up_proj.weight"


@pytest.fixture
def model(checkpoint_folder):
    """Give (family, a tiny LLaMA whose weights stay on disk)."""
    family, _ = make("llama")
    folder = checkpoint_folder("llama")
    return family, load.open_model(folder, load.load_config(folder, family), family, "auto")


def opened(path, model):
    """Return LayerFiles that are open."""
    path.mkdir(exist_ok=True)
    files = LayerFiles(path, "--save folder", "free some space")
    files.open(model[1], model[0])
    files.resume_from(3)
    return files


def save_layer(files, index, value=None, kind="layer"):
    """Save a layer with all weights 1 + index, or another value."""
    layer = files.layers[index]
    with on_device([layer], "cpu"):
        for weight in layer.parameters():
            weight.fill_(1 + index if value is None else value)
        files.save_layer(index, layer, {}, kind)


def written(folder, index):
    tensors = load_file(folder / f"layer-{index:05d}.safetensors")
    return {float(value) for tensor in tensors.values() for value in tensor.unique()}


def test_a_full_disk_is_reported_in_one_line_and_another_attempt_goes_on(model, tmp_path, monkeypatch):
    files = opened(tmp_path, model)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "save_file", mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(InputError, match="^--save folder: layer-00000.safetensors needs 0.000 GB.*No space left on "
                                             "device.*; free some space$"):
            save_layer(files, 0)
    assert files.resume_from(3) == []
    save_layer(files, 0)
    assert written(tmp_path, 0) == {1.0}


def test_resuming_gives_the_dense_weights_back_and_loading_a_finished_layer_those_saved(model, tmp_path):
    files = opened(tmp_path, model)
    dense = files.layers[0].disk_weights.tensor(UP)
    save_layer(files, 0)
    assert files.resume_from(3) == [{}]
    assert torch.equal(files.layers[0].disk_weights.tensor(UP), dense)
    files.load_layer(0)
    for weights, name in ((files.layers[0].disk_weights, UP), (model[1].disk_weights, f"model.layers.0.{UP}")):
        assert torch.equal(weights.tensor(name), torch.ones(48, 32))


@pytest.mark.parametrize("killed", [False, True])
def test_distilled_layers_count_when_all_are_written_and_the_pruned_ones_before(killed, model, tmp_path):
    """killed: while they replace the pruned ones."""
    files = opened(tmp_path, model)
    for index in range(3):
        save_layer(files, index)
    for index in range(3):
        save_layer(files, index, -1, "distilled")
        assert not files.distilled and (files.layers[0].disk_weights.tensor(UP) == 1).all()
    if killed:
        (tmp_path / "distilled.json").write_text('{"divergence": 0.5}')
        (tmp_path / "distilled-00001.safetensors").replace(tmp_path / "layer-00001.safetensors")
    else:
        files.finish_distillation({"divergence": 0.5})
    files = opened(tmp_path, model)
    assert len(files.resume_from(3)) == 3 and files.distilled == {"divergence": 0.5}
    assert [written(tmp_path, index) for index in range(3)] == 3 * [{-1.0}]
    assert not list(tmp_path.glob("distilled-*"))
