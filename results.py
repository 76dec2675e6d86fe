"""Collect the records of many runs into one table, and plot perplexity against sparsity by method.

python results.py runs/*.json                            # what --record wrote, or folders of --save
python results.py runs/*.json --markdown                 # for a README
python results.py runs/*.json --csv runs.csv             # for a spreadsheet: all digits, and the file names
python results.py runs/*.json --plot tradeoff.png        # paper figure 3 (arXiv 2310.09499), bars at one sparsity
"""

import sys

from mixgpt.app import exit_status
from mixgpt.app.comparison import csv_of, draw, read, text_of
from mixgpt.app.record_files import files_of
from mixgpt.app.settings import Parser, refuse_empty
from mixgpt.common.errors import InputError
from mixgpt.common.outputs import PICTURE, TABLE, check_places, check_writable, write


def _parse(argv):
    parser = Parser(prog="results.py", description="Compare the records of runs in one table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="file of --record, folder of --save, or a pattern such "
                                                               "as 'runs/*'")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--csv", metavar="FILE", help="also write the table as comma-separated values")
    parser.add_argument("--plot", metavar="FILE", help="also plot perplexity against sparsity by method, or bars if "
                                                       "all runs have the same sparsity; mean and range over seeds "
                                                       "(.png, .pdf, .svg)")
    return parser.parse_args(argv)


def _check(options, files):
    """Raise InputError for arguments that are empty, and for files that may not be written."""
    written = {flag: path for flag, path in {"--csv": options.csv, "--plot": options.plot}.items() if path is not None}
    refuse_empty(written)
    for run in options.runs:
        refuse_empty({"RUN": run})
    check_places(written, [("RUN", file) for file in files])
    for flag, path in written.items():
        check_writable(flag, path, {"--csv": TABLE, "--plot": PICTURE}[flag])


def _read(files, problems):
    """Return the runs of the record files; appends to `problems` a line for each that is none."""
    runs = []
    for file in files:
        try:
            runs.append(read(file))
        except InputError as error:
            problems.append(str(error))
    return runs


def main(argv=None):
    """Run the command line. Returns the exit status: 2 also after a line about each unusable file."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status.run("results.py", argv, lambda: _run(argv), "give fewer files")


def _run(argv):
    options, problems = _parse(argv), []
    try:
        files = files_of(options.runs)
        _check(options, files)
        if runs := _read(files, problems):
            print(text_of(runs, options.markdown))
            if options.csv:
                write("--csv", options.csv, csv_of(runs), TABLE)
                print(f"\nwritten  {options.csv}")
            if options.plot:
                draw(options.plot, runs)
                print(f"\npicture  {options.plot}")
    except InputError as error:
        problems.append(str(error))
    for problem in problems:
        exit_status.say(f"results.py: error: {problem}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
