"""Several texts to calibrate on, each with its share: c4:0.7,./my.jsonl:0.3."""

import math
import os

from mixgpt.common.errors import InputError
from mixgpt.text.sets import DATASETS, hub_column

MOST = 1e6  # so that sums of shares are finite


def shares(name):
    """Return {text: share} of a mixture, or of one text; the shares add up to 1.

    A text is the name of a dataset, a path, or owner/dataset:column on the hub. Raises ValueError, which says what is
    accepted.
    """
    if known(name):
        return {name: 1.0}
    found = {}
    for part in name.split(",") if ":" in name else []:
        text, _, share = part.rpartition(":")
        found[text] = found.get(text, 0) + positive(share, part)
    if unknown := [text for text in found or [name] if not known(text)]:
        raise ValueError(f"invalid choice: {unknown[0]!r} (choose from {', '.join(map(repr, DATASETS))}, or give a "
                         "file or folder of text, or owner/dataset:column on the hub)")
    return {text: share / sum(found.values()) for text, share in found.items()}


def check_unseen(name, tests):
    """Raise InputError if a test text is a path that calibration on a text or mixture draws from; datasets have parts
    for both."""
    try:
        drawn = {os.path.realpath(text) for text in shares(name) if text not in DATASETS}
    except ValueError as error:
        raise InputError(f"dataset {name}: {error}") from error
    for test in tests:
        if test not in DATASETS and os.path.realpath(test) in drawn:
            raise InputError(f"--eval {test}: is text that calibration draws from; give another one")


def known(text):
    """Return whether a text is the name of a dataset, a path that exists, or has the form of a column on the hub."""
    return text in DATASETS or os.path.exists(text) or bool(hub_column(text))


def positive(share, part):
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not 0 < value <= MOST:
        raise ValueError(f"{part!r}: in a mixture each text needs a share above 0 and at most {MOST:g}, for example "
                         "c4:0.7,builtin:0.3")
    return value


def counts(name, nsamples):
    """Return {text: number of its sequences}, together nsamples, each the nearest to its share that this allows.

    Raises InputError if a text would get none, or if it is no mixture.
    """
    try:
        wanted = {text: share * nsamples for text, share in shares(name).items()}
    except ValueError as error:
        raise InputError(f"dataset {name}: {error}") from error
    found = {text: int(number) for text, number in wanted.items()}
    for text in sorted(wanted, key=lambda text: found[text] - wanted[text])[:nsamples - sum(found.values())]:
        found[text] += 1
    if none := [text for text, number in found.items() if not number]:
        raise InputError(f"--nsamples {nsamples}: gives no sequence to {none[0]} in {name}; raise it")
    return found
