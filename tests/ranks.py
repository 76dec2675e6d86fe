"""Prune in memory in several processes, for test_distributed.py, and keep what each of them made of it."""

import contextlib
import itertools
import os
import tempfile
import time
from dataclasses import replace
from unittest import mock

import torch
from conftest import CPU, VOCABULARY, as_rank, make, make_plan
from safetensors.torch import load_file

from mixgpt.allocation.traces import hessian_traces
from mixgpt.app import allocating
from mixgpt.app.run import Run
from mixgpt.app.settings import Settings
from mixgpt.checkpoints import formats, run_dir
from mixgpt.checkpoints.run_dir import RunDir
from mixgpt.common import distributed
from mixgpt.common.choices import ESTIMATORS
from mixgpt.common.memory import MemoryPlan
from mixgpt.evaluation import measures, own_text
from mixgpt.evaluation.distance import Distance
from mixgpt.evaluation.measures import perplexities
from mixgpt.kernels import selection
from mixgpt.modeling import streaming
from mixgpt.modeling.experts import is_split, split_experts
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning import distill, expert_removal, training
from mixgpt.pruning.hessian import InputHessian, activation_order
from mixgpt.pruning.layerwise import magnitude_prune, prune_layerwise
from mixgpt.pruning.needs import WAYS
from mixgpt.pruning.solvers import Recipe, admm, prune_in_place, walk
from mixgpt.pruning.targets import Target, select
from mixgpt.quant import Scheme
from mixgpt.sparsegpt import isc_saliency

SOLVERS = {"walk": walk, "admm": admm}
SCHEMES = {"16 bit": None, "4 bit": Scheme(4), "3 bit mse": Scheme(3, 16, mse=True)}
ROWS = 9, 2, 1, 38  # of matrices that read one input; one has fewer than there are processes


def made(name, true_sequential, wbits, more=""):
    """Return traces, weights, outcomes and perplexity of a tiny model, as this process has them."""
    model = make(name)
    split_experts(model)
    mixture = any(map(is_split, model.modules()))  # on so few tokens that all experts lack some
    tokens = torch.randint(0, VOCABULARY, (7, 6 if mixture else 24), generator=torch.Generator().manual_seed(1))
    selected = select(model)
    streamed = StreamedModel(model, CPU, 2)
    traces = [hessian_traces(streamed, list(selected), tokens, name, 1) for name in ESTIMATORS]
    if mixture:
        traces += expert_removal.expert_scores(streamed, tokens).values()
    distance = Distance()
    perplexities(model, {"": tokens}, 2, CPU, behind=distance.keep)
    plan, options, solved = make_plan(selected, Target(0.5)), {"solver": walk}, []
    if more == "best":
        settings = Settings("tiny", "builtin", sparsity=0.5, preset=more, seqlen=24)
        run = Run(settings, CPU, streamed.clock, model.config, None, selected, [], 1.0, model, tokens[:3])
        # two of them give gradients, so that one process has none
        chosen = allocating._measure(run, {}, MemoryPlan(2))
        plan, gradients = chosen.targets, chosen.gradients
        traces += sum(gradients.values(), ())
        options = {"solver": admm, "fits_dense": True, "rotate": True,
                   "row_weights": {key: G for key, (G, _) in gradients.items()}}
    with mock.patch.object(distill, "VOCABULARY", 2 * VOCABULARY // 3):  # more than the text has
        dense = distill.reference_states(streamed, tokens) if more == "distilled" else {}
    traces += [dense["vocabulary"]] if dense else []

    def solver(problem, solve=options["solver"]):
        solved.append(sum(map(len, problem.optima)))
        return solve(problem)

    outcomes = prune_layerwise(streamed, plan, tokens, Recipe(
        blocksize=16, saliency=isc_saliency, scheme=Scheme(wbits) if wbits < 16 else None,
        true_sequential=true_sequential, **options | {"solver": solver}))
    if more == "distilled":
        with mock.patch.object(distill, "STEPS", 1):  # in which all processes take all sequences
            distill.distill(streamed, dict.fromkeys(plan), tokens, dense, 1, replace(WAYS[-1], batch_size=2))
    return {"traces": traces, "state": model.state_dict(), "rows": sum(solved),
            "outcomes": {key: (outcome.error, outcome.percdamp, outcome.grid and outcome.grid.scale)
                         for key, outcome in outcomes.items()},
            "perplexity": [perplexities(model, {"": part}, 2, CPU, behind=distance.compare)[""]
                           for part in (tokens[:1], tokens)], "distance": distance.result()[""]}


def made_of_all():
    """Return what `made` gives, {case: …}."""
    torch.set_num_threads(1)  # sums of threads round otherwise, however many processes there are
    return {case: made(*case) for case in [("llama", True, 16), ("opt", False, 4),
                                           ("llama", True, 16, "best"), ("qwen3-moe", True, 16),
                                           ("bloom", True, 16, "distilled")]}


def pruned_of_all():
    """Return what `prune_in_place` gives for matrices that read one input, {case: (weights, errors, scales)}."""
    make = torch.Generator().manual_seed(3)
    X, matrices = torch.randn(300, 48, generator=make).exp(), [torch.randn(n, 48, generator=make) for n in ROWS]
    results = {}
    for solver, groups, scheme, (ordered, weighted) in itertools.product(
            SOLVERS, [(0, 0), (2, 4)], SCHEMES, [(False, True), (True, False)]):
        targets = [Target(n / m, n, m) for n, m in (groups, (groups[0] // 2, groups[1])) * 2] if groups[1] else [
            Target(sparsity) for sparsity in (0.5, 0.3, 0.6, 0.7)]
        hessian = InputHessian(48, 1, CPU)
        hessian.add_batch(X if distributed.rank() == 0 else X[:0])  # H is the sum over all processes
        hessian.factor(0.01, activation_order(hessian.H.diagonal(), groups[1]) if ordered else None)
        weights = [W.clone() for W in matrices]
        outcomes = prune_in_place(
            hessian, weights, targets, Recipe(SOLVERS[solver], 16, scheme=SCHEMES[scheme]),
            torch.arange(1, 1.0 + sum(ROWS)) if weighted else None)
        results[solver, groups, scheme, ordered, weighted] = (
            weights, [error.item() for error, _ in outcomes], [grid and grid.scale for _, grid in outcomes])
    return results


def selected_of_all():
    """Return what the ways to select give for scores with ties, each with the rows of all processes, {case: rows}."""
    scores, results = torch.randint(-1, 4, (7, 12), generator=torch.Generator().manual_seed(1)).float(), {}
    ours = scores[distributed.share(7)]
    for k in (0, 1, 20, 40, 83, 84):
        mask, = distributed.all_gather_shares(selection.smallest([ours], [k]), [7])
        results["scores", k] = scores, mask
    magnitudes, = distributed.all_gather_shares([magnitude_prune(ours, Target(0.4))], [7])
    return results | {("magnitude", 34): (scores.abs(), magnitudes == 0)}


def written():
    """Return the text that a model writes itself, and what its cache holds of it."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, XDG_CACHE_HOME=cache), \
            mock.patch.object(own_text, "PIECE", 16):
        begins = mock.MagicMock(all_special_ids=[], chat_template=None, **{"__len__.return_value": 384})
        text = own_text.write_text(make("llama").eval(), begins, CPU, 5 * 16, 1, "never")
        return text, [load_file(file)["tokens"] for file in own_text.cache_folder().glob("*")]


def exchanged():
    """Return objects from all processes, one of them large, and how many exchanges a matrix of 3 blocks takes."""
    objects, counts = distributed.all_gather_object("." * 3000 * distributed.rank()), []
    X, W = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(4))
    for solver, target in ((walk, Target(0.5)), (walk, Target(0.5, 2, 4)), (admm, Target(0.5))):
        with mock.patch.object(distributed, "_wait", wraps=distributed._wait) as wait:
            hessian = InputHessian(48, 1, CPU)
            hessian.add_batch(X)
            hessian.factor(0.01)
            prune_in_place(hessian, [W.clone()], [target], Recipe(solver, 16))
        counts.append(wait.call_count)
    return objects, counts


def run(rank, world, port, file, make):
    """Save what `make` returns in process `rank` of as many as torchrun would have started."""
    torch.set_num_threads(1)
    as_rank(rank, world, port)
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # it outlives the runs
    with distributed.joined(CPU):
        pass
    time.sleep(rank == 0)  # the others must not find the addresses of the run before
    for call in (lambda: 1 / 0, make):  # a run that fails, and one behind it
        with contextlib.suppress(ZeroDivisionError), distributed.joined(CPU):
            torch.save(call(), file)


def impatient(rank, world, port, pause, stops):
    """Be process `rank`, with a patience of 3 s; the first one needs `pause` s for each file of the result.

    stops: whether the last one comes to a halt behind its first layer.
    """
    as_rank(rank, world, port)
    distributed.PATIENCE, formats.LARGEST = 3, 40_000
    write, save_layer = streaming.write, RunDir.save_layer
    streaming.write = lambda file, *given, **more: (time.sleep(pause * ("result" in str(file))),
                                                    write(file, *given, **more))
    if stops and rank == world - 1:
        RunDir.save_layer = lambda *given: (save_layer(*given), time.sleep(999))


def elsewhere(rank, world, port, path):
    """Be process `rank`; the last one finds another folder where the first one writes."""
    as_rank(rank, world, port)
    run_dir.SHOWN, init = 1, RunDir.__init__

    def other(files, *given, **more):
        init(files, *given, **more)
        files.folder = path / "progress" if rank == world - 1 else files.folder

    RunDir.__init__ = other


def in_way(rank, world, port, number):
    """Be process `rank` of a run that distils in a given way."""
    as_rank(rank, world, port)
    ways = distill.ways
    distill.ways = lambda *given: [replace(WAYS[number], batch_size=ways(*given)[0].batch_size)]


def poor(rank, world, port, short, late):
    """Be process `rank`; the last one counts `late` seconds later and, if short, lacks memory to distil batch two."""
    as_rank(rank, world, port)
    backward, finish, calls = training.divergence_of, measures.Survey.finish, []

    def failing(*given):
        calls.append(given)
        if len(calls) > 1:
            raise MemoryError
        return backward(*given)

    if rank == world - 1:
        training.divergence_of = failing if short else backward
        measures.Survey.finish = lambda survey: (time.sleep(late), finish(survey))[1]
