"""Collect the records of many runs into one table, and plot perplexity against sparsity by method.

python results.py runs/*.json                            # what --record wrote, or folders of --save
python results.py runs/*.json --markdown                 # for a README
python results.py runs/*.json --csv runs.csv             # for a spreadsheet: all digits, and the file names
python results.py runs/*.json --plot tradeoff.png        # paper figure 3 (arXiv 2310.09499), bars at one sparsity
"""

import sys

from mixgpt.app.cli import Parser, reported
from mixgpt.app.comparison import csv_of, files_of, picture_of, read, text_of
from mixgpt.common.errors import InputError
from mixgpt.common.files import check_outputs, write_output


def _parse(argv):
    parser = Parser(prog="results.py", description="Compare the records of runs in one table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="file of --record, folder of --save, or a pattern such "
                                                               "as 'runs/*'")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--csv", metavar="FILE", help="also write the table as comma-separated values")
    parser.add_argument("--plot", metavar="FILE", help="also plot perplexity against sparsity by method, or bars if "
                                                       "all runs have the same sparsity; mean and range over seeds "
                                                       "(.png, .pdf, .svg)")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --csv and --plot if they exist")
    return parser.parse_args(argv)


def _run(argv):
    options, runs, status = _parse(argv), [], 0
    paths = {flag: path for flag, path in {"--csv": options.csv, "--plot": options.plot}.items() if path is not None}
    check_outputs(paths, options.overwrite)
    for file in files_of(options.runs):
        try:
            runs.append(read(file))
        except InputError as error:
            print(f"results.py: error: {error}", file=sys.stderr)
            status = 2
    if runs:
        print(text_of(runs, options.markdown))
        for flag, path in paths.items():
            write_output(flag, path, csv_of(runs) if flag == "--csv" else picture_of(runs, path))
            print(f"\n{'written' if flag == '--csv' else 'picture'}  {path}")
    return status


def main(argv=None):
    """Run the command line. Returns the exit status, see `reported`; 2 also if a file was unusable."""
    argv = sys.argv[1:] if argv is None else argv
    with reported("results.py", argv, "give fewer files") as end:
        end.status = _run(argv)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
