"""Registration of the sparse format with transformers; its code, and that of the kernels, is imported on use."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixgpt.common.errors import InputError

METHOD = "mixgpt"  # The format has this name in config.json.
WEIGHTS = "model.sparse.safetensors"  # transformers looks for another name, under which it would ignore the method.


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """What config.json says of the format.

    matrices: {name of a parameter: its description}. weights: the file that holds them, or the index of several.
    dequantize: expand all matrices into ordinary linears.
    """

    def __init__(self, matrices: dict[str, dict[str, Any]], weights: str = WEIGHTS, dequantize: bool = False,
                 **_: Any) -> None:
        self.quant_method, self.matrices, self.weights, self.dequantize = METHOD, matrices, weights, dequantize


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Lets `from_pretrained` read a sparse folder into `SparseLinear`s."""

    is_trainable = False

    def is_serializable(self) -> bool:
        """Raise InputError: `save_pretrained` and `push_to_hub`, which ask first, would write what nothing can read."""
        raise InputError("save_pretrained: the model's matrices are packed; load it by mixgpt.load(folder, "
                         "packed=False), or copy its folder")

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Name the file of the weights: this is the first call in which a quantizer sees the configuration."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def param_needs_quantization(self, model: PreTrainedModel, name: str, **_: Any) -> bool:
        """Return whether a tensor is a part of a `PackedWeight`."""
        from mixgpt.checkpoints.sparse import PackedWeight
        return isinstance(model.get_submodule(name.rpartition(".")[0]), PackedWeight)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from mixgpt.checkpoints.sparse import PackedWeight, SparseLinear
        # The names in a model of AutoModel lack the prefix.
        prefix = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
        for name, description in self.quantization_config.matrices.items():
            path = name.removesuffix(".weight").removeprefix(prefix)
            dense, shape = model.get_submodule(path), tuple(description["shape"])
            if shape != tuple(dense.weight.shape):
                raise ValueError(f"{name} is {shape}, its configuration expects {tuple(dense.weight.shape)}")
            weight = PackedWeight(description, *([] if self.quantization_config.dequantize else [dense.weight.dtype]))
            model.set_submodule(path, SparseLinear(weight, dense.bias))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from mixgpt.checkpoints.sparse import SparseLinear
        expands = self.quantization_config.dequantize
        for path, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                try:
                    model.set_submodule(path, (module.expanded if expands else module.prepared)(model.dtype))
                except (ValueError, IndexError, AttributeError, RuntimeError) as error:
                    raise ValueError(f"{path}.weight: {error}") from error
        if not any(isinstance(module, SparseLinear) for module in model.modules()):
            self.remove_quantization_config(model)  # It is an ordinary model.
            del model.config.transformers_weights
