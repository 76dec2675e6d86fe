"""Models beyond transformers: weights that stay on disk, and Baichuan."""
