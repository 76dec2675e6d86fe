"""Prune Baichuan (arXiv 2309.10305) in one shot and report perplexity.

python baichuan.py baichuan-inc/Baichuan-7B c4                              # dense baseline
python baichuan.py baichuan-inc/Baichuan-7B c4 --sparsity .5                # SparseGPT, 50% in every matrix
python baichuan.py baichuan-inc/Baichuan-7B c4 --sparsity .5 --save pruned  # a checkpoint in the published layout

Baichuan-7B, Baichuan-13B, Baichuan2-7B and Baichuan2-13B, Base and Chat. The checkpoints' own code is never
run: mixgpt/modeling/baichuan.py replaces it. W_pack holds q, k and v, and is pruned as one matrix.
"""

import sys

from mixgpt.app.cli import main

if __name__ == "__main__":
    sys.exit(main(__file__))
