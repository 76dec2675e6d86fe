"""Prune LLaMA (arXiv 2302.13971) and models of the same layout in one shot and report perplexity.

python llama.py meta-llama/Llama-2-7b-hf c4                              # dense baseline
python llama.py meta-llama/Llama-2-7b-hf c4 --sparsity .5                # SparseGPT, 50% in every matrix
python llama.py meta-llama/Llama-2-7b-hf c4 --sparsity .5 --save pruned  # a checkpoint for from_pretrained
python llama.py SmolLM2-135M-Instruct.Q4_1.gguf c4 --sparsity .5         # a GGUF file, dequantized

LLaMA-1, 2 and 3, Mistral, Qwen2, Qwen3 and SmolLM2 share this layout.
"""

import sys

from mixgpt.app.cli import main

if __name__ == "__main__":
    sys.exit(main(__file__))
