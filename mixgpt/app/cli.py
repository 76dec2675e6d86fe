"""Command lines that prune or evaluate: parse and check them, then import PyTorch and run; and how any one ends."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from mixgpt.app.settings import Settings, flag_of
from mixgpt.common import program
from mixgpt.common.choices import Registry
from mixgpt.common.errors import InputError, Terminated, is_disk_full, is_out_of_memory, one_line, status_of
from mixgpt.common.texts import DATASETS

REMEDY = "lower --batch-size, --nsamples or --seqlen, or give --no-true-sequential"
RESUME = "what is in the folder of --save goes on with --resume"
AMOUNTS = ("sparsity", "prunen", "wbits", "experts")  # Each of these options says what to do.
if "OMP_WAIT_POLICY" not in os.environ:
    # Beside other programs, threads that spin at barriers for long (GNU's 300,000 turns) wait for each other's time
    # slices. Short spinning costs little then, and nothing when idle. OpenMP reads this when PyTorch is imported.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # which GNU's library heeds first
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "safetensors", "numba", "numpy")


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError. Flags with underscores, as in the published code, are those with hyphens."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("type", None, os.path.expanduser)  # Shells leave the ~ of --csv=~/runs.csv.

    def parse_args(self, argv: Sequence[str]) -> argparse.Namespace:  # ty: ignore[incompatible-method-override]
        return super().parse_args([re.sub(r"^--[^=]*", lambda flag: flag[0].replace("_", "-"), part) for part in argv])

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(script: str, argv: list[str], names: Collection[str] | None = None, plans: bool = False) -> Settings:
    """Parse the command line of a script. Raises InputError.

    names: the options it takes, None for all. plans: whether it is a dry run; what is pruned, and on which text, may
    then be left out.
    """
    parser = Parser(
        prog=script, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Say what memory, disk and time a run takes. Without an amount: of --preset best --sparsity .5."
                    if plans else
                    "Measure the perplexity of a language model as it is, and its scores in tasks." if names else
                    "Prune and quantize a language model in one shot and report its perplexity.\n"
                    "Without --sparsity, --prunen/--prunem, --wbits or --experts: that of the dense model.")
    group = parser
    for field in dataclasses.fields(Settings):
        if names and field.name not in ("model", *names):
            continue
        if (title := field.metadata["group"]) and not names:
            group = parser.add_argument_group(title)
        default, text, choices = field.default, field.metadata["help"], field.metadata["choices"]
        arguments: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if not isinstance(default, bool):
            arguments = {"type": str if default is None else type(default), **field.metadata["arguments"]}
            arguments |= {"choices": choices} if choices else {}
            text += f"; {choices.help}" if isinstance(choices, Registry) else ""
        if default not in (None, "", ()) and default is not False:
            text += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
        if field.name == "dataset":
            text += f"; {DATASETS.help}"
            arguments |= {"nargs": "?"} if plans else {}
        group.add_argument(flag_of(field.name), *field.metadata["aliases"], help=text, **arguments)
    given: dict[str, Any] = vars(parser.parse_args(argv))
    if plans:
        given = {"dataset": "builtin", "dry_run": True} | given
        given |= {} if given.keys() & AMOUNTS else {"preset": "best", "sparsity": 0.5} | given
    return Settings(**given)


def main(script: str, argv: list[str] | None = None, names: Collection[str] | None = None, plans: bool = False) -> int:
    """Run the command line of a script, see `reported`. names, plans: see `parse`. Returns the exit status."""
    with reported(script, argv, "lower --batch-size or --seqlen" if names else REMEDY) as command:
        settings = parse(command.name, command.argv, names, plans)
        settings.check_paths()
        command.advice = f"; {RESUME}" if settings.save else ""
        from mixgpt.app import pipeline  # It imports PyTorch.
        pipeline.execute(settings, command.typed)
    return command.status


@contextlib.contextmanager
def reported(script: str, argv: list[str] | None, remedy: str = "") -> Generator[SimpleNamespace]:
    """Turn what ends the block, a whole command line, into one line on stderr and an exit status.

    script: a path, or `mixgpt` and a subcommand. Yields their `name`, `argv`, what was `typed`, and a `status`: 0, or
    what the block has set. 1: a bug, whose traceback is in the file that the line names. 2: InputError, a full disk, or
    out of memory; remedy says what to lower. 130: Ctrl-C. 141, without a line: stdout was closed, as by `| head`. 143:
    SIGTERM or SIGHUP. `advice` ends all lines but that of an InputError.
    """
    name, argv = Path(script).name, sys.argv[1:] if argv is None else argv
    start = ["python", name] if name.endswith(".py") else name.split()
    command = SimpleNamespace(name=name, argv=argv, typed=shlex.join([*start, *argv]), status=0, advice="")
    if program.UNSUPPORTED:
        sys.exit(f"{name}: error: {program.UNSUPPORTED}")
    try:
        with _terminable():
            yield command
        print(end="", flush=True)  # sys.stdout may be None.
    except SystemExit as stop:  # argparse raises it after --help.
        command.status = stop.code or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its exit.
        command.status = 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        command.status = status_of(error)
        if isinstance(error, InputError):
            line, command.advice = f"error: {one_line(error)}", ""
        elif isinstance(error, KeyboardInterrupt):
            line = "terminated" if isinstance(error, Terminated) else "interrupted"
        elif is_out_of_memory(error):
            line = f"error: out of memory; {remedy}"
        elif is_disk_full(error):  # The flags do not name the file.
            line = "error: the disk of the output or of TMPDIR is full; free some space"
        elif lost := re.search("pair.cc.*(by peer|Broken pipe)|another process does not answer", str(error)):
            line = f"error: another process {'has ended' if lost[1] else 'does not answer'}"  # gloo says the first.
        else:
            versions = (f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
            with tempfile.NamedTemporaryFile("w", prefix=f"{name}-".replace(" ", "-"), suffix=".txt",
                                             delete=False) as file:
                print(command.typed, f"Python {platform.python_version()} on {platform.platform()}", *versions,
                      sep="\n", file=file)
                traceback.print_exception(error, file=file)
            line = (f"error: unexpected {type(error).__name__}: {one_line(error):.300}; please report it with "
                   f"{file.name}, which has the traceback")
        process = f" (process {program.rank()})" if program.rank() else ""
        print(f"{name}: {line}{command.advice}{process}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _terminable() -> Generator[None]:
    """Let SIGTERM and SIGHUP raise `Terminated` within the block, so that temporary files are removed.

    Only in the first process: the others keep no files. A signal that is ignored, as under nohup, stays so.
    """
    def terminate(*_: object) -> None:
        for number in handled:  # A terminal that closes sends two.
            signal.signal(number, signal.SIG_IGN)
        raise Terminated

    handled = [number for number in (signal.SIGTERM, signal.SIGHUP)
               if program.rank() == 0 and signal.getsignal(number) == signal.SIG_DFL]
    with contextlib.ExitStack() as stack:
        for number in handled:
            stack.callback(signal.signal, number, signal.SIG_DFL)
            signal.signal(number, terminate)
        yield


if __name__ == "__main__":
    sys.exit(main("mixgpt prune"))
