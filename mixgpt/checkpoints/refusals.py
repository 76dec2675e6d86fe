"""Turn what libraries raise for damaged, inconsistent or unsupported model files into one line."""

import contextlib
import pickle
import struct
import textwrap
import warnings
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from mixgpt.common.errors import InputError
from mixgpt.text import hub
from mixgpt.text.tokenizing import rust_error

# What transformers, torch and gguf raise. ImportError: what a file asks for is not installed.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, EOFError,
           ArithmeticError, AssertionError, ImportError, MemoryError, struct.error, pickle.UnpicklingError,
           SafetensorError, StrictDataclassError)
# Whose messages say nothing without their class.
TERSE = (KeyError, TypeError, AttributeError, ArithmeticError)


@contextlib.contextmanager
def refusing(model, part="", terse=""):
    """Turn errors on loading a model, or a part of it, into a one-line InputError; suppress other logging.

    part: comes before the reason. terse: before one that alone would say nothing.
    """
    try:
        with hub.unlogged("transformers"), hub.barred(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, DAMAGED) and not rust_error(error):
            raise
        if not Path(model).exists() and not hub.reachable():
            raise InputError(f"model {model}: not a folder or .gguf file here, not in the cache of the Hugging Face "
                             "hub, and the hub cannot be reached") from error
        part += terse if isinstance(error, TERSE) else ""
        raise InputError(f"model {model}: {part}{_reason(error)}") from error


def _reason(error):
    """Return in one line why a model cannot be loaded: a message's first line, and the detail it introduces."""
    if isinstance(error, pickle.UnpicklingError):
        return "its .bin file is damaged or holds more than tensors, which is not executed; give safetensors files"
    if isinstance(error, EOFError):
        return "its .bin file is damaged: it ends too early"
    if "trust_remote_code" in str(error):
        return "it needs code from its repository, which is never executed here"
    if ".gguf' is not a valid JSON file" in str(error):  # what transformers says of text that is not UTF-8
        return "the text in its header is not UTF-8"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = next((number for number, line in enumerate(lines, 1) if not line.endswith((":", ",", " or"))), len(lines))
    text = textwrap.shorten(" ".join(lines[:count]), 400)
    if rust_error(error) and " at line " in text:
        return f"tokenizer.json: {text}"
    return text if text and not isinstance(error, TERSE) else f"{type(error).__name__} {text}".strip()
