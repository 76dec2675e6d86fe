"""Where the published modelutils.py went: `find_layers` is `linears`, and models run by layers in `mixgpt.modeling`."""

from mixgpt.modeling.linears import hooked, linears, other_weights, shared_inputs
from mixgpt.modeling.placing import in_turn, on_device, whole
from mixgpt.modeling.running import HiddenStates, StreamedModel

__all__ = ["HiddenStates", "StreamedModel", "hooked", "in_turn", "linears", "on_device", "other_weights",
           "shared_inputs", "whole"]
