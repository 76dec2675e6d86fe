"""Fast matrix kernels, independent of models."""
