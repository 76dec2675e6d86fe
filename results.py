"""Collect the records of many runs into one table, and plot perplexity against sparsity by method.

python results.py runs/*.json                            # what --record wrote, or folders of --save
python results.py runs/*.json --markdown                 # for a README
python results.py runs/*.json --csv runs.csv             # for a spreadsheet: all digits, files and settings
python results.py runs/*.json --plot tradeoff.png        # paper figure 3 (arXiv 2310.09499), bars at one sparsity
"""

import sys

from mixgpt.app.results import main

if __name__ == "__main__":
    sys.exit(main(__file__))
