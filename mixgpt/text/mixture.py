"""Several texts to calibrate on, each with its share: c4:0.7,./my.jsonl:0.3."""

import math
import os

from mixgpt.common.errors import InputError
from mixgpt.text.sets import DATASETS, hub_column


def shares(name, flag="dataset"):
    """Return {text: share} of a mixture, or of one text; the shares add up to 1.

    A text is the name of a dataset, a path, or owner/dataset:column on the hub. Raises InputError for anything else.
    """
    if known(name):
        return {name: 1.0}
    weights = {}
    for part in name.split(",") if ":" in name else []:
        text, _, share = part.rpartition(":")
        weights[text] = weights.get(text, 0) + _positive(share, part, name, flag)
    if unknown := [text for text in weights or [name] if not known(text)]:
        raise InputError(f"{flag} {name}: invalid choice: {unknown[0]!r} (choose from "
                         f"{', '.join(map(repr, DATASETS))}, or give a file or folder of text, or owner/dataset:column "
                         "on the hub)")
    return {text: weight / sum(weights.values()) for text, weight in weights.items()}


def check(name, tests, drawn):
    """Raise InputError for calibration text or test texts that do not exist, or that overlap.

    name: None for text in memory. drawn: whether calibration draws from its text. Only datasets have separate splits.
    """
    texts = shares(name) if name else ()
    paths = {os.path.realpath(text) for text in texts if text not in DATASETS}
    for test in tests:
        if len(shares(test, "--eval")) > 1:
            raise InputError(f"--eval {test}: is a mixture, which is for calibration; give its texts one by one")
        if drawn and test not in DATASETS and os.path.realpath(test) in paths:
            raise InputError(f"--eval {test}: is text that calibration draws from; give another one")


def known(text):
    """Return whether a text is the name of a dataset, a path that exists, or has the form of a column on the hub."""
    return text in DATASETS or os.path.exists(text) or bool(hub_column(text))


def _positive(share, part, name, flag):
    try:
        if 0 < (value := float(share)) < math.inf:
            return value
    except ValueError:
        pass
    raise InputError(f"{flag} {name}: {part!r}: in a mixture each text needs a share above 0, for example "
                     "c4:0.7,builtin:0.3")


def counts(name, nsamples):
    """Return {text: number of its sequences}, which sum to nsamples: largest remainders.

    Raises InputError if a text would get none, or for an unknown text.
    """
    wanted = {text: share * nsamples for text, share in shares(name).items()}
    numbers = {text: int(number) for text, number in wanted.items()}
    for text in sorted(wanted, key=lambda text: numbers[text] - wanted[text])[:nsamples - sum(numbers.values())]:
        numbers[text] += 1
    if none := [text for text, number in numbers.items() if not number]:
        raise InputError(f"--nsamples {nsamples}: gives no sequence to {none[0]} in {name}; raise it")
    return numbers
