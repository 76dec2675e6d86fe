"""Evaluation: perplexity, tasks, sparsity, generated text, speed. Nothing here changes weights."""
