"""Texts: datasets, files and mixtures of them, tokenizing, and the Hugging Face hub."""
