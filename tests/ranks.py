"""Prune a model in memory in several processes, for test_distributed.py, and keep what each of them made of it."""

from unittest import mock

import torch
from conftest import CPU, VOCABULARY, as_rank, make, make_plan

from mixgpt.allocation.fisher import output_gradients
from mixgpt.allocation.global_threshold import global_plan
from mixgpt.allocation.traces import Sampling, hessian_traces
from mixgpt.app.choices import ESTIMATORS
from mixgpt.common import distributed
from mixgpt.evaluation.perplexity import perplexity
from mixgpt.modeling.experts import split_experts
from mixgpt.pruning import distill
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.solvers import Recipe, admm
from mixgpt.pruning.targets import Target, select
from modelutils import Execution
from quant import Scheme
from sparsegpt import WalkOptions, isc_saliency


def made(name, true_sequential, wbits, more=""):
    """Return traces, weights, outcomes and perplexity of a tiny model, as this process has them."""
    family, model = make(name)
    mixture = split_experts(model)  # on so few tokens that all experts lack some
    tokens = torch.randint(0, VOCABULARY, (7, 6 if mixture else 24), generator=torch.Generator().manual_seed(1))
    selected = select(model, family)
    execution = Execution(model, family, CPU, 2)
    traces = [hessian_traces(execution, list(selected), tokens, Sampling(name, estimator.load(), 1))
              for name, estimator in ESTIMATORS.items()]
    plan, options = make_plan(selected, Target(0.5)), {}
    walk = WalkOptions(16, isc_saliency, Scheme(wbits) if wbits < 16 else None)
    if more == "best":
        gradients = output_gradients(execution, list(selected), tokens, 3, 0.01)
        plan = global_plan(execution, selected, gradients.rows, gradients.diagonals, 0.5, 0.15)
        options = {"solver": admm, "dense_target": True, "row_weights": gradients.rows,
                   "token_weights": gradients.tokens}
    dense = distill.dense_states(execution, tokens) if more == "distilled" else None
    outcomes = prune_layerwise(execution, plan, tokens, Recipe(
        options=walk, true_sequential=true_sequential, **options))
    if more == "distilled":
        with mock.patch.object(distill, "STEPS", 1):  # in which all processes take all sequences
            distill.distill(execution, dict.fromkeys(plan), tokens, dense, 1)
    return {"traces": traces, "state": model.state_dict(),
            "outcomes": {key: (outcome.error, outcome.percdamp, outcome.grid and outcome.grid.scale)
                         for key, outcome in outcomes.items()},
            "perplexity": [perplexity(model, family, part, 2, CPU) for part in (tokens, tokens[:1])]}


def made_of_all():
    """Return what `made` gives, {case: …}."""
    return {case: made(*case) for case in [("llama", True, 16), ("opt", False, 4), ("bloom", True, 4),
                                           ("llama", True, 16, "best"), ("qwen3-moe", True, 16),
                                           ("bloom", True, 16, "distilled")]}


def run(rank, world, port, file):
    """Make all as process `rank` of as many as torchrun would have started, and save it."""
    torch.set_num_threads(1)
    as_rank(rank, world, port)
    with distributed.joined(CPU):
        torch.save(made_of_all(), file)


def poor(rank, world, port, short):
    """Be process `rank`; if it is the last, run out of memory in the second batch that distillation takes, if short."""
    as_rank(rank, world, port)
    backward, calls = distill._backward, []

    def failing(*given):
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError
        return backward(*given)

    if short and rank == world - 1:
        distill._backward = failing
