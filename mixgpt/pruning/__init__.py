"""From weights and calibration inputs to pruned and quantized weights, matrix by matrix and layer by layer."""
