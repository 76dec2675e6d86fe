"""The command line of the family scripts: parse and check it, and only then import PyTorch and run."""

import contextlib
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from mixgpt.app.settings import parse
from mixgpt.common.errors import InputError


def main(family, argv=None):
    """Run a family's command line. Returns the exit status: 0, 2 after a one-line input error, 130 after Ctrl-C.

    argv: its arguments (default: sys.argv, including the script's name).
    """
    if argv is None:
        family, argv = replace(family, script=Path(sys.argv[0]).name), sys.argv[1:]
    try:
        settings = parse(family, argv)
        settings.check_paths()
        with contextlib.ExitStack() as stack:
            _silence(stack)
            from mixgpt.app import pipeline  # slow import

            pipeline.run(family, settings, shlex.join(["python", family.script, *argv]))
    except InputError as error:
        print(f"{family.script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{family.script}: interrupted; what is in the folder of --save goes on with --resume", file=sys.stderr)
        return 130
    return 0


def _silence(stack):
    """Silence all processes but the first, until `stack` is closed."""
    if int(os.environ.get("RANK", 0)):
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
