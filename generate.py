"""Generate text with a saved model, optionally side by side with the dense one.

python generate.py pruned "The capital of France is"
python generate.py pruned "The capital of France is" --dense facebook/opt-125m --max-new-tokens 40
python generate.py SmolLM2-135M-Instruct.Q4_1.gguf "Once upon a time" --temperature 0.8 --seed 1

A model is a checkpoint saved by these scripts in any of their formats, a hub id, a local checkpoint or a .gguf file.
"""

import sys

from mixgpt.app.generate import main

if __name__ == "__main__":
    sys.exit(main(__file__))
