"""Check once whether the Hugging Face hub is reachable, work offline, and silence its libraries."""

import contextlib
import functools
import logging

import datasets
from huggingface_hub import constants
from huggingface_hub.utils import get_session


@functools.cache
def reachable(timeout=5):
    """Return whether the hub answers its own client within `timeout` seconds; with HF_HUB_OFFLINE it is not asked.

    Without this check `datasets` and `transformers` retry for 23 s before giving up. The client has the endpoint,
    certificates and proxies of all later requests.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # what a client raises depends on its library: no name, no route, no certificate, no answer
        return False
    return True  # an error status is an answer too


@contextlib.contextmanager
def reached():
    """Make `datasets` and `huggingface_hub` use only what is on disk, without retries, if the hub does not answer.

    Yields whether it does.
    """
    if reachable():
        yield True
        return
    saved = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield False
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = saved


@contextlib.contextmanager
def unlogged(library):
    """Suppress a library's logs: we report its exceptions in one line, where it would log a table or repeat them."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
