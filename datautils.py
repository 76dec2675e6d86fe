"""Where the published datautils.py went: `get_loaders` is `calibration_samples` and `test_tokens`, in `mixgpt`."""

from mixgpt.datautils import calibration_samples, load_rows, resolve_bos, test_tokens, token_ids

__all__ = ["calibration_samples", "load_rows", "resolve_bos", "test_tokens", "token_ids"]
