"""The infrastructure of MixGPT; scripts and method are in the repository root."""
