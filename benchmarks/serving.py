"""Time vLLM's engine on a packed model against a dense one, in alternation, at several numbers of sequences.

.venv-vllm/bin/python benchmarks/serving.py PACKED DENSE --sequences 1 8 32

It runs where `make serve-test` has installed vLLM, and prints medians of tokens per second and of the ratios of rounds.
"""

import argparse
import os
import statistics
import time

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING", "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}


def tokens_per_second(engine, sequences, tokens):
    """Return how many tokens of so many sequences an engine makes in a second."""
    from vllm import SamplingParams
    prompts = [f"{number} and" for number in range(sequences)]
    start = time.perf_counter()
    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    return sequences * tokens / (time.perf_counter() - start)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed")
    parser.add_argument("dense")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 4, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=48, help="of each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(argv)
    os.environ.update(SETTINGS)
    from vllm import LLM
    # Both are in this process: an engine in a process of its own computes, or waits in a loop, beside the other one.
    dense, packed = (LLM(folder, max_model_len=512, max_num_seqs=64) for folder in (given.dense, given.packed))
    print("sequences  packed tokens/s  dense tokens/s  ratio (least, most)", flush=True)
    for sequences in given.sequences:
        rounds = [[tokens_per_second(engine, sequences, given.tokens) for engine in (packed, dense)]
                  for _ in range(given.rounds + 1)][1:]
        ratios = [packed / dense for packed, dense in rounds]
        medians = [statistics.median(speeds) for speeds in zip(*rounds, strict=True)]
        print(f"{sequences:9}  {medians[0]:15.1f}  {medians[1]:14.1f}  {statistics.median(ratios):5.2f} "
              f"({min(ratios):.2f}, {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
