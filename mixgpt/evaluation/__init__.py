"""What a model is worth: perplexity, tasks, sparsity, text, speed. Nothing here changes weights."""
