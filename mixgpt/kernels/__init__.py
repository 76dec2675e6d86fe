"""Fast computation on matrices, which knows nothing of models."""
