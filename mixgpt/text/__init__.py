"""Texts: local copies of the datasets, and the Hugging Face hub."""
