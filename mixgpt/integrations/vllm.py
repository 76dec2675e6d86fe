"""A plugin for vLLM, by which its server keeps packed matrices packed; vLLM finds it by its entry point.

vLLM's own loaders get dense matrices, one at a time, merge those that read one input, and give each process its part.
`PackedLinearMethod` packs what a layer has got. Folders that store zeros are packed with `--quantization mixgpt`.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.utils.torch_utils import direct_register_custom_op

from mixgpt.checkpoints.quantizer import METHOD
from mixgpt.common import memory

logger = init_logger("vllm.mixgpt")  # vLLM shows what loggers of such names say.
PARTS = ("q", "k", "v")  # vLLM's names of the matrices in a layer that reads all three; else they are numbers.
_packed: dict[str, Any] = {}  # {name of a layer: its sparse.PackedWeight}

# The kernels are imported on use: the workers of vLLM 0.32 for CPUs do not start once llvmlite has been imported.


def _product(x: Tensor, bias: Tensor | None, layer: str, rows: int) -> Tensor:
    return _packed[layer].multiply(x, bias)


def _shape(x: Tensor, bias: Tensor | None, layer: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def register() -> None:
    """Make the format known to vLLM, which calls this in each of its processes."""
    if not hasattr(torch.ops.vllm, "mixgpt_product"):  # The compiler does not look into it.
        direct_register_custom_op("mixgpt_product", _product, fake_impl=_shape)
        register_quantization_config(METHOD)(PackedConfig)


class PackedConfig(QuantizationConfig):
    """What config.json says of the format. matrices: as of `quantizer.SparseConfig`; {} for a dense checkpoint."""

    def __init__(self, matrices: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.matrices = matrices or {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        """Read config.json's quantization_config."""
        return cls(config["matrices"])

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the format."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that the kernels multiply."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPUs that Triton multiplies bfloat16 on."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: a dense checkpoint has none."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> "PackedLinearMethod | None":
        """Return how a layer multiplies; embeddings, experts and the head stay dense."""
        return PackedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_checkpoint_weight_mapper(self) -> "Unpacking":
        """Return what the checkpoint's tensors go through before they reach the layers."""
        return Unpacking(self.matrices)


class Unpacking(WeightsMapper):
    """Joins the parts of each matrix, then gives tensors the names that vLLM's models have for them."""

    def __init__(self, matrices: dict[str, dict[str, Any]], names: WeightsMapper | None = None) -> None:
        super().__init__()
        self.matrices, self.names = matrices, names or WeightsMapper()

    def __or__(self, other: WeightsMapper) -> "Unpacking":
        return Unpacking(self.matrices, self.names | other)

    def __ror__(self, other: WeightsMapper) -> "Unpacking":
        return Unpacking(self.matrices, other | self.names)

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Yield (name, tensor); a matrix that was quantized knows its grid. Raises ValueError for lost parts."""
        return self.names.apply(self._joined(weights))

    def _joined(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        from mixgpt.checkpoints.packing import decode, grid_of
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights:
            matrix, _, part = name.rpartition(".")
            if matrix not in self.matrices:
                yield name, tensor
                continue
            parts, description = found.setdefault(matrix, {}), self.matrices[matrix]
            parts[part] = tensor
            if len(parts) == len(description["parts"]):
                W = decode(parts, description)
                if "wbits" in description:
                    vars(W)["grid"] = grid_of(parts, description)
                yield matrix, W
                parts.clear()
        for matrix, parts in found.items():
            if parts:
                raise ValueError(f"{matrix}: the checkpoint has only its {', '.join(sorted(parts))}")


@register_weight_loader_v2_supported_method
class PackedLinearMethod(UnquantizedLinearMethod):
    """Packs the weights of a layer once they are loaded, if that saves memory and there is a kernel for them."""

    supports_pre_processed_weights = False

    def create_weights(self, layer: nn.Module, *sizes: Any, weight_loader: Any, **more: Any) -> None:
        """Make room for the dense weights, and for the grids of those that were quantized."""
        layer.grids = {}

        def load(parameter: nn.Parameter, W: Tensor, *part: Any) -> None:
            layer.grids[part[0] if part else 0] = getattr(W, "grid", None)
            weight_loader(parameter, W, *part)

        super().create_weights(layer, *sizes, weight_loader=load, **more)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weights, which are freed."""
        weight = _pack(layer.weight.data, layer.grids)
        layer.grids.clear()
        layer.is_packed = weight is not None
        if weight is None:
            logger.info_once("mixgpt: some matrices stay dense: they have few zeros, or there is no kernel for them")
            super().process_weights_after_loading(layer)
            return
        logger.info_once("mixgpt: matrices are packed; kernel: %s", weight.kind(layer.weight.device))
        _packed[layer.prefix] = layer.packed = weight
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        memory.trim()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + bias."""
        if not layer.is_packed:
            return super().apply(layer, x, bias)
        return torch.ops.vllm.mixgpt_product(x, bias, layer.prefix, layer.packed.shape[0])


def _pack(W: Tensor, grids: dict[Any, Any]) -> Any:
    """Return a sparse.PackedWeight of W (out, in), or None if it does not pay. grids: those of what W is merged of."""
    from mixgpt.checkpoints.packing import encode
    from mixgpt.checkpoints.sparse import PackedWeight
    ordered = [grids[part] for part in sorted(grids, key=lambda part: PARTS.index(part) if part in PARTS else part)]
    try:
        parts, description = encode(W.cpu(), _merged(ordered, W))
    except ValueError:  # It has been cast since.
        parts, description = encode(W.cpu())
    weight = PackedWeight.of(parts, description).to(W.device) if "mask" in parts else None
    return weight if weight and weight.kind(W.device) else None


def _merged(grids: list[Any], W: Tensor) -> Any:
    """Return the quant.Grid of matrices one upon the other, if all have one and W is not a process's part of them."""
    first = grids[0] if grids else None
    if first is None or any(grid is None or grid.scheme != first.scheme or not torch.equal(grid.group, first.group)
                            for grid in grids):
        return None
    scale, zero = (torch.cat([getattr(grid, name) for grid in grids]) for name in ("scale", "zero"))
    whole = (len(scale), len(first.group)) == tuple(W.shape) and scale.dtype == W.dtype
    return replace(first, scale=scale, zero=zero) if whole else None
