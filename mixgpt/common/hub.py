"""Whether the Hugging Face hub answers, and its libraries without their logs and progress bars."""

import contextlib
import functools
import io
import logging
import sys
import warnings
from collections.abc import Generator

import datasets.config
from huggingface_hub import constants, utils


@functools.cache
def hub_reachable() -> bool:
    """Return whether the hub answers its own client within 5 seconds; with HF_HUB_OFFLINE it is not asked."""
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # what a client raises depends on its library: no name, no route, no certificate, no answer
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # its libraries would retry for 23 s each time
        return False
    return True  # an error status is an answer too


@contextlib.contextmanager
def hub_asked_anew() -> Generator[None]:
    """Let `hub_reachable` ask once within the block; behind it the hub's libraries are as they were before."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        hub_reachable.cache_clear()


@contextlib.contextmanager
def silenced() -> Generator[None]:
    """Suppress the logs and warnings of libraries, whose errors become lines, and without a terminal their bars."""
    shown = sys.stderr and sys.stderr.isatty()
    before, hidden = logging.root.manager.disable, io.StringIO()
    vars(hidden).update(behind=sys.stderr)  # to which `progress.bar` still writes
    logging.disable()
    try:
        with (contextlib.nullcontext() if shown else contextlib.redirect_stderr(hidden),
              warnings.catch_warnings(action="ignore")):
            yield
    finally:
        logging.disable(before)
