"""The machinery of MixGPT; the scripts and the method stand beside it, at the root."""
