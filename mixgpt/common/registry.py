"""A registry of a flag's choices, from which help, checks and error messages are derived."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixgpt.common.errors import InputError


@dataclass(frozen=True)
class Choice:
    """One value of a flag.

    Its code is "module:name", imported on use, so that the command line is parsed and checked before PyTorch is
    imported; or the object itself.
    """

    help: str  # what it does, in a few words
    code: Any = None  # "module:name", or the object itself
    title: str = ""  # name in tables and progress (default: its name)
    refuses: Callable | None = None  # function of app.settings.Settings: why it does not support them, or ""

    def load(self):
        """Return the code behind this choice."""
        if not isinstance(self.code, str):
            return self.code
        module, _, name = self.code.partition(":")
        return getattr(importlib.import_module(module), name)


class Registry(dict):
    """{name: Choice} of one flag."""

    def __init__(self, flag, choices):
        super().__init__(choices)
        self.flag = flag

    def check(self, name):
        """Raise InputError if there is no such choice."""
        if name not in self:
            raise InputError(f"{self.flag} {name}: must be one of {', '.join(self)}")
        return self[name]

    def title(self, name):
        """Return the name of a choice in tables and progress."""
        return self[name].title or name

    @property
    def help(self):
        """What each choice does, escaped for argparse's formatting."""
        return "; ".join(f"{name}: {choice.help}" for name, choice in self.items()).replace("%", "%%")
