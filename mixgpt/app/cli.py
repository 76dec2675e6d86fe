"""The command line of the family scripts: parse and check it, and only then import PyTorch and run."""

import contextlib
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from mixgpt.app import exit_status
from mixgpt.app.settings import parse
from mixgpt.common import program
from mixgpt.common.errors import InputError

REMEDY = "lower --batch-size, --nsamples or --seqlen, or give --no-true-sequential"
RESUME = "what is in the folder of --save goes on with --resume"


def main(family, argv=None):
    """Run a family's command line. Returns the exit status, see `exit_status.run`.

    argv: its arguments (default: sys.argv, including the script's name).
    """
    if argv is None:
        family, argv = replace(family, script=Path(sys.argv[0]).name), sys.argv[1:]
    return exit_status.run(family.script, argv, lambda: _run(family, argv), REMEDY)


def _run(family, argv):
    settings = parse(family, argv)
    settings.check_paths()
    with contextlib.ExitStack() as stack:
        _silence(stack)
        stack.enter_context(_resumable(settings))
        from mixgpt.app import pipeline  # slow import

        pipeline.run(family, settings, shlex.join(["python", family.script, *argv]))


@contextlib.contextmanager
def _resumable(settings):
    """Add to what ends a run that it can go on, if that is so."""
    try:
        yield
    except InputError:  # says so itself
        raise
    except (Exception, KeyboardInterrupt) as error:
        if settings.save:
            error.add_note(RESUME)
        raise


def _silence(stack):
    """Silence all processes but the first, until `stack` is closed."""
    if program.rank():
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
