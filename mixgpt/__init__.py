"""The infrastructure of MixGPT; scripts and method are in the repository root."""

__version__ = "1.0.0"
