"""Prune BLOOM (arXiv 2211.05100) in one shot and report perplexity.

python bloom.py bigscience/bloom-560m c4                              # dense baseline
python bloom.py bigscience/bloom-560m c4 --sparsity .5                # SparseGPT, 50% in every matrix
python bloom.py bigscience/bloom-560m c4 --sparsity .5 --save pruned  # a checkpoint for from_pretrained

Positions are ALiBi biases, so the sequence length is not limited.
"""

import sys

from mixgpt.app.cli import main

if __name__ == "__main__":
    sys.exit(main(__file__))
