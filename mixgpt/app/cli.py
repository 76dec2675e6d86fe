"""The command line of the family scripts: parse and check it, and only then import PyTorch and run."""

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from mixgpt.app import exit_status
from mixgpt.app.choices import DATASETS
from mixgpt.app.settings import Settings, flag_of
from mixgpt.common import program
from mixgpt.common.errors import InputError

REMEDY = "lower --batch-size, --nsamples or --seqlen, or give --no-true-sequential"
RESUME = "what is in the folder of --save goes on with --resume"


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError, and OSError where its help cannot be printed.

    Flags have hyphens; with underscores, as in the published code, they are the same flags.
    """

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        return super().parse_args([re.sub(r"^--[^=]*", lambda flag: flag[0].replace("_", "-"), part) for part in argv])

    def error(self, message):
        raise InputError(message)

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file)


def parse(family, argv=None):
    """Parse the command line of a family script. Returns `Settings`. Raises InputError."""
    parser = Parser(
        prog=family.script, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, description="Prune and quantize a language model in one shot and report its perplexity.\n"
                                        "Without --sparsity, --prunen/--prunem or --wbits: the perplexity of the dense "
                                        "model.")
    parser.add_argument("model", help="hub id, local folder or .gguf file")
    parser.add_argument("dataset", help=(
        f"calibration text, by name, as a file or folder, or a mixture such as c4:0.7,my.jsonl:0.3; {DATASETS.help}"))
    for field in dataclasses.fields(Settings):
        if "help" in field.metadata:
            if title := field.metadata["group"]:
                group = parser.add_argument_group(title)
            add_option(group, field)
    return Settings(**vars(parser.parse_args(argv)))


def add_option(group, field):
    """Add the option of a field of Settings to an argparse group or parser."""
    default, text, arguments = field.default, field.metadata["help"], field.metadata["arguments"]
    if isinstance(default, bool):
        group.add_argument(flag_of(field.name), dest=field.name, help=text, action=argparse.BooleanOptionalAction)
        return
    if choices := field.metadata["registry"] or field.metadata["choices"]:
        arguments = {"choices": choices} | arguments
    if registry := field.metadata["registry"]:
        text = "; ".join(filter(None, [text, registry.help]))
    if default not in (None, "", ()):
        text += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
    arguments = {"type": str if default is None else type(default)} | arguments
    group.add_argument(flag_of(field.name), dest=field.name, help=text, **arguments)


def main(family, argv=None):
    """Run a family's command line. Returns the exit status, see `exit_status.reported`.

    argv: its arguments (default: sys.argv, including the script's name).
    """
    if argv is None:
        family, argv = replace(family, script=Path(sys.argv[0]).name), sys.argv[1:]
    with exit_status.reported(family.script, argv, REMEDY) as end, contextlib.ExitStack() as stack:
        settings = parse(family, argv)
        settings.check_paths()
        _silence(stack)
        stack.enter_context(_resumable(settings))
        from mixgpt.app import pipeline  # slow import

        pipeline.run(family, settings, shlex.join(["python", family.script, *argv]))
    return end.status


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
