"""Check what the plugin for vLLM makes of matrices, where a few classes stand for vLLM's."""

import importlib
import platform
import sys
import tomllib
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import psutil
import pytest
import torch
from conftest import ROOT

from mixgpt.checkpoints.packing import encode
from mixgpt.quant import Codebooks, Scheme, quantize_nearest


@dataclass
class Mapper:
    """A WeightsMapper that puts one text before names."""

    before: str = ""

    def __or__(self, other):
        return Mapper(self.before + other.before)

    def apply(self, weights):
        return ((self.before + name, tensor) for name, tensor in weights)


class Method:
    """An UnquantizedLinearMethod."""

    def create_weights(self, layer, rows, columns, weight_loader):
        layer.weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.bfloat16), requires_grad=False)
        layer.weight_loader = weight_loader

    def process_weights_after_loading(self, layer):
        layer.dense = True

    def apply(self, layer, x, bias):
        return torch.nn.functional.linear(x, layer.weight, bias)


class Layer(torch.nn.Module):
    prefix = "model.layers.0.qkv_proj"


@pytest.fixture
def plugin(monkeypatch):
    """Import the plugin as vLLM does, by its entry point, and register it twice."""
    names = {"logger": {"init_logger": mock.MagicMock()},
             "model_executor.layers.linear": {"LinearBase": Layer, "UnquantizedLinearMethod": Method,
                                              "register_weight_loader_v2_supported_method": lambda method: method},
             "model_executor.layers.quantization": {"register_quantization_config": mock.MagicMock()},
             "model_executor.layers.quantization.base_config": {"QuantizationConfig": object},
             "model_executor.models.utils": {"WeightsMapper": Mapper},
             "utils.torch_utils": {"direct_register_custom_op": mock.MagicMock()}}
    for name, content in names.items():
        module = ModuleType(f"vllm.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "mixgpt.integrations.vllm", raising=False)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, _, function = project["entry-points"]["vllm.general_plugins"]["mixgpt"].partition(":")
    module = importlib.import_module(name)
    for _ in range(2):  # vLLM's processes may load it more than once
        getattr(module, function)()
    monkeypatch.setattr(torch.ops.vllm, "mixgpt_product", module._product, raising=False)
    yield module
    monkeypatch.delitem(sys.modules, name)


def matrix(rows, scheme):
    """Return a matrix (rows, 128) of which half is zero, and its grid."""
    W, grid = torch.randn(rows, 128).bfloat16(), None
    if scheme:
        W, grid = quantize_nearest(W, scheme)
    W[torch.rand(rows, 128) < 0.5] = 0
    return W, grid


@pytest.mark.parametrize("scheme", [None, Scheme(4, sym=True), Scheme(3, 64), Codebooks(4)], ids=str)
@pytest.mark.parametrize("loses_grids", [False, True])
def test_a_merged_layer_is_packed_from_the_parts_of_the_file(loses_grids, scheme, plugin):
    """loses_grids: what vLLM hands on may be a copy."""
    matrices = {name: matrix(rows, scheme) for name, rows in (("q", 48), ("k", 16), ("v", 16))}
    encoded = {f"layers.0.{name}.weight": encode(*both) for name, both in matrices.items()}
    config = plugin.PackedConfig.from_config({"matrices": {key: told for key, (_, told) in encoded.items()}})
    tensors = {f"{key}.{part}": tensor for key, (parts, _) in encoded.items() for part, tensor in parts.items()}
    mapper = Mapper("model.")
    mapper |= config.get_checkpoint_weight_mapper()
    mapper |= Mapper()
    loaded = dict(mapper.apply([("norm", torch.ones(3)), *tensors.items()]))
    assert loaded.keys() == {"model.norm", *(f"model.{key}" for key in encoded)}

    layer, W = Layer(), torch.cat([W for W, _ in matrices.values()])
    method = config.get_quant_method(layer, "")
    assert config.get_quant_method(torch.nn.Embedding(1, 1), "") is None
    method.create_weights(layer, *W.shape, weight_loader=lambda parameter, W, part: parameter[
        {"q": slice(48), "k": slice(48, 64), "v": slice(64, 80)}[part]].copy_(W))
    for part in "vkq":
        tensor = loaded[f"model.layers.0.{part}.weight"]
        layer.weight_loader(layer.weight, tensor.clone() if loses_grids else tensor, part)
    assert torch.equal(layer.weight, W)
    method.process_weights_after_loading(layer)
    assert torch.equal(layer.packed.expand(), W) and layer.weight.numel() == 0
    assert ("codes" in layer.packed.description["parts"]) == (scheme is not None and not loses_grids)
    x, bias = torch.randn(3, 128).bfloat16(), torch.randn(80).bfloat16()
    expected = torch.nn.functional.linear(x, W, bias)
    assert torch.allclose(method.apply(layer, x, bias), expected, rtol=0.02, atol=0.1)
    assert plugin._shape(x, bias, layer.prefix, 80).shape == expected.shape


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back by themselves")
def test_memory_of_the_dense_weights_goes_back_to_the_system(plugin):
    layer, process = Layer(), psutil.Process()
    method = plugin.PackedConfig().get_quant_method(layer, "")
    method.create_weights(layer, 16, 128, weight_loader=lambda parameter, W: parameter.copy_(W))
    layer.weight_loader(layer.weight, matrix(16, None)[0])
    others = [b"0" * 100_000 for _ in range(3000)]
    del others[:-1]  # The last one holds the heap's end where it is.
    before = process.memory_info().rss
    method.process_weights_after_loading(layer)
    assert layer.is_packed and process.memory_info().rss < before - 200e6 and others


def test_a_part_of_a_quantized_matrix_is_packed_as_values(plugin):
    """Tensor parallelism gives each process some of the rows, or of the columns."""
    W, grid = matrix(48, Scheme(4, 64))
    vars(whole := W.clone())["grid"] = grid
    for part in (slice(24), (slice(None), slice(64))):
        layer, method = Layer(), plugin.PackedConfig().get_quant_method(Layer(), "")
        method.create_weights(layer, *W[part].shape,
                              weight_loader=lambda parameter, W, part=part: parameter.copy_(W[part]))
        layer.weight_loader(layer.weight, whole)
        method.process_weights_after_loading(layer)
        assert torch.equal(layer.packed.expand(), W[part]) and "values" in layer.packed.description["parts"]


def test_a_dense_layer_stays_what_it_is(plugin):
    layer, method = Layer(), plugin.PackedConfig().get_quant_method(Layer(), "")
    method.create_weights(layer, 16, 64, weight_loader=None)
    layer.weight += 1
    method.process_weights_after_loading(layer)
    assert layer.dense and torch.equal(method.apply(layer, torch.ones(1, 64).bfloat16()), torch.full((1, 16), 64.0))


def test_lost_parts_are_named(plugin):
    parts, description = encode(matrix(16, None)[0])
    mapper = Mapper() | plugin.PackedConfig({"x.weight": description}).get_checkpoint_weight_mapper()
    with pytest.raises(ValueError, match="x.weight: the checkpoint has only its mask"):
        list(mapper.apply([("x.weight.mask", parts["mask"])]))
