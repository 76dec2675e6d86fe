"""Prune OPT (arXiv 2205.01068) in one shot and report perplexity.

python opt.py facebook/opt-125m c4                                # dense baseline
python opt.py facebook/opt-125m c4 --sparsity .5 --gmp            # magnitude pruning
python opt.py facebook/opt-125m c4 --sparsity .5                  # SparseGPT, 50% in every matrix
python opt.py facebook/opt-125m c4 --sparsity .5 --sparsity-way weight-level --saliency isc  # MixGPT
python opt.py facebook/opt-125m c4 --prunen 2 --prunem 4          # 2 pruned of every 4
python opt.py facebook/opt-125m c4 --sparsity .5 --wbits 4        # the kept half in 4 bits, in the same pass
python opt.py facebook/opt-125m c4 --sparsity .5 --save pruned    # a checkpoint for from_pretrained
"""

import sys

from mixgpt.app.cli import main

if __name__ == "__main__":
    sys.exit(main(__file__))
