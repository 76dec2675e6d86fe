"""Prune a model in memory in several processes, for test_distributed.py, and keep what each of them made of it."""

import torch
from conftest import CPU, VOCABULARY, as_rank, make

from mixgpt.allocation.fisher import output_gradients
from mixgpt.allocation.global_threshold import global_plan, inverse_diagonals
from mixgpt.allocation.plan import make_plan
from mixgpt.allocation.traces import hessian_traces
from mixgpt.common import distributed
from mixgpt.common.clock import Clock
from mixgpt.evaluation.perplexity import perplexity
from mixgpt.pruning.layerwise import prune_sparsegpt
from mixgpt.pruning.targets import Target, select
from quant import Scheme


def made(name, true_sequential, wbits, best=None):
    """Return traces, weights, outcomes and perplexity of a tiny model, as this process has them."""
    family, model = make(name)
    tokens = torch.randint(0, VOCABULARY, (7, 24), generator=torch.Generator().manual_seed(1))
    selected = select(model, family, 0, -1, 0, 1000, "", False)
    traces = [hessian_traces(model, family, list(selected), tokens, estimator, seed=1, nprobes=1, batch_size=2,
                             device=CPU) for estimator in ("hutchinson", "fisher")]
    plan, options = make_plan(selected, Target(0.5)), {"saliency": "isc"}
    if best:
        gradients = output_gradients(model, family, list(selected), tokens, seed=1, batch_size=2, device=CPU)
        diagonals = inverse_diagonals(model, family, list(selected), tokens, 0.01, 2, CPU, Clock(CPU))
        plan = global_plan(model, family, selected, gradients.rows, diagonals, 0.5, 0.15)
        options = {"saliency": "fisher", "solver": "admm", "to_dense": True, "row_weights": gradients.rows,
                   "token_weights": gradients.tokens}
    outcomes = prune_sparsegpt(
        model, family, plan, tokens, blocksize=16, percdamp=0.01, true_sequential=true_sequential,
        batch_size=2, device=CPU, clock=Clock(CPU), scheme=Scheme(wbits) if wbits < 16 else None, **options)
    return {"traces": traces, "state": model.state_dict(),
            "outcomes": {key: (outcome.error, outcome.percdamp, outcome.grid and outcome.grid.scale)
                         for key, outcome in outcomes.items()},
            "perplexity": [perplexity(model, family, part, 2, CPU) for part in (tokens, tokens[:1])]}


def made_of_all():
    """Return what `made` gives, {case: …}."""
    return {case: made(*case) for case in [("llama", True, 16), ("opt", False, 4), ("bloom", True, 4),
                                           ("llama", True, 16, "best")]}


def run(rank, world, port, file):
    """Make all as process `rank` of as many as torchrun would have started, and save it."""
    torch.set_num_threads(1)
    as_rank(rank, world, port)
    with distributed.joined(CPU):
        torch.save(made_of_all(), file)
