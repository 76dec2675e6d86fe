"""Beyond transformers: models streamed from disk, and Baichuan."""
