"""Perplexity of `small_models.py`'s Qwen3-MoE with fewer experts, removed by three rules, mean of three seeds."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from scores import spread, table_of_markdown

import mixgpt
from mixgpt.common.files import cache_folder
from mixgpt.pruning import expert_removal

RULES = {"REAP": expert_removal.reap_score, "frequency": lambda norms, tokens: tokens,
         "random": lambda norms, tokens: torch.rand(len(tokens))}
MODEL, TRAIN, TEST = (cache_folder() / "small-models" / name for name in ("qwen3-moe", "text/train.jsonl",
                                                                          "text/test.jsonl"))


def perplexity(rule, experts, seed):
    torch.manual_seed(seed)
    expert_removal.reap_score = RULES[rule]
    return mixgpt.prune(MODEL, TRAIN, experts=experts, seed=seed, nsamples=32, seqlen=256, eval=[str(TEST)],
                        eval_limit=128, quiet=True).perplexity[str(TEST)]


print(table_of_markdown(["rule", "25%", "50%"], [[rule, *(spread([perplexity(rule, experts, seed) for seed in range(
    3)]) for experts in (0.25, 0.5))] for rule in RULES]))
