"""Where the published quant.py went: `Quantizer` is a `Scheme`, and what it finds for a matrix a `Grid`."""

from mixgpt.quant import Grid, Scheme, meet_sparsities, quantize_nearest

__all__ = ["Grid", "Scheme", "meet_sparsities", "quantize_nearest"]
