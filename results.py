"""Collect the records of many runs into one table, and plot perplexity against sparsity by method.

python results.py runs/*.json                            # what --record wrote, or folders of --save
python results.py runs/*.json --markdown                 # for a README
python results.py runs/*.json --csv runs.csv             # for a spreadsheet: all digits, and the file names
python results.py runs/*.json --plot tradeoff.png        # paper figure 3 (arXiv 2310.09499), bars at one sparsity
"""

import sys

from mixgpt.app import ending
from mixgpt.app.comparison import csv_of, draw, files_of, read, text_of
from mixgpt.app.settings import Parser
from mixgpt.common.errors import InputError
from mixgpt.common.files import check_writable, write


def main(argv=None):
    """Run the command line. Returns the exit status, see `ending.run`; 2 also after a line about each unusable file."""
    argv = sys.argv[1:] if argv is None else argv
    return ending.run("results.py", argv, lambda: _run(argv), "give fewer files")


def _run(argv):
    parser = Parser(prog="results.py", description="Compare the records of runs in one table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="file of --record, folder of --save, or a pattern such "
                                                               "as 'runs/*'")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--csv", metavar="FILE", help="also write the table as comma-separated values")
    parser.add_argument("--plot", metavar="FILE", help="also plot perplexity against sparsity by method, or bars if "
                                                       "all runs have the same sparsity; mean and range over seeds "
                                                       "(.png, .pdf, .svg)")
    options = parser.parse_args(argv)
    problems, runs = [], []
    try:
        if options.csv:
            check_writable("--csv", options.csv)
        if options.plot:
            from mixgpt.app import plots  # imports PyTorch and matplotlib

            plots.check(options.plot)
        for file in files_of(options.runs):
            try:
                runs.append(read(file))
            except InputError as error:
                problems.append(str(error))
        if runs:
            print(text_of(runs, options.markdown))
            if options.csv:
                write("--csv", options.csv, csv_of(runs))
                print(f"\nwritten  {options.csv}")
            if options.plot:
                draw(options.plot, runs)
                print(f"\npicture  {options.plot}")
    except InputError as error:
        problems.append(str(error))
    for problem in problems:
        ending.say(f"results.py: error: {problem}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
