"""Texts: copies of the datasets in a folder, and the Hugging Face hub."""
