"""The command `mixgpt`, and `python -m mixgpt`: the name of a subcommand, then what that takes."""

import argparse
import sys
from functools import partial

from mixgpt.app import cli
from mixgpt.app.options import Evaluation
from mixgpt.common.choices import Choice, Registry
from mixgpt.common.program import __version__

SUBCOMMANDS = Registry({  # functions of (name, argv) that return the exit status, imported on use
    "prune": Choice("prune and quantize a language model, and measure its perplexity", cli.main),
    "eval": Choice("measure perplexity, and scores of tasks, of a model as it is",
                   partial(cli.main, names=Evaluation.__annotations__)),
    "plan": Choice("say what memory, disk and time a run takes, here or on another GPU", partial(cli.main, plans=True)),
    "generate": Choice("generate text with a saved model, optionally beside the dense one's",
                       "mixgpt.app.generate:main"),
    "results": Choice("compare the records of runs in one table, and plot them", "mixgpt.app.results:main"),
})


def main(argv: list[str] | None = None) -> int:
    """Run a command line that begins with a subcommand. Returns the exit status, see `reported`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in SUBCOMMANDS:
        return SUBCOMMANDS[argv[0]].load()(f"mixgpt {argv[0]}", argv[1:])
    with cli.reported("mixgpt", argv) as command:
        parser = cli.Parser(
            prog="mixgpt", formatter_class=argparse.RawDescriptionHelpFormatter,
            usage="mixgpt [-h] [--version] COMMAND …",
            description="One-shot pruning and quantization of language models.",
            epilog="commands, each with a --help of its own:\n" + "\n".join(
                f"  {name:<10} {choice.help}" for name, choice in SUBCOMMANDS.items()))
        parser.add_argument("--version", action="version", version=f"mixgpt {__version__}")
        parser.add_argument("command", metavar="COMMAND", choices=list(SUBCOMMANDS), help=argparse.SUPPRESS)
        parser.parse_args(argv or ["--help"])
    return command.status


if __name__ == "__main__":
    sys.exit(main())
