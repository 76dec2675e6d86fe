"""Whether the Hugging Face hub can be reached, asked once, doing without it, and keeping its libraries quiet."""

import contextlib
import functools
import io
import logging
import sys
import urllib.error
import urllib.request

import datasets
from huggingface_hub import constants


@functools.cache
def reachable(timeout=5):
    """Tell whether the hub answers within `timeout` seconds (HF_HUB_OFFLINE and HF_ENDPOINT are obeyed).

    Without this question `datasets` and `transformers` retry for 23 s before they give up.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError:
        return True  # an error status is an answer all the same
    except OSError:
        return False
    return True


@contextlib.contextmanager
def offline():
    """Make `datasets` and `huggingface_hub` use what is on disk and nothing else, without their retries."""
    saved = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = saved


@contextlib.contextmanager
def unlogged(library):
    """Let a library log nothing: what it raises is said in one line of ours, where it would log a table or it twice."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def barred():
    """Keep off bars that do not ask whether there is a terminal. Other lines pass, when the block is left."""
    if sys.stderr.isatty():
        yield
        return
    held, stderr = io.StringIO(), sys.stderr
    try:
        with contextlib.redirect_stderr(held):
            yield
    finally:
        stderr.writelines(f"{line}\n" for line in held.getvalue().split("\n") if line.strip() and "\r" not in line)
