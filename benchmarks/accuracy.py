"""Compare methods by perplexity at equal sparsity: each one × target × seed on the same tokens, a cell at a time.

python benchmarks/accuracy.py FILE c4 --data-dir DIR --output accuracy.json --segments 40
python benchmarks/accuracy.py FILE c4 --data-dir DIR --output choice.json --heldout   # for choices, without test text

A run that was interrupted goes on when it is started again; methods, targets and seeds can be added (what was changed
since is measured again where its cells are removed from the file). Peers are
magnitude, Wanda, OWL (with Wanda's mask, and with the walk here) and the textbook's SparseGPT; sparsegpt, mixgpt and
best are the presets of this project. With n:m OWL is left out: its paper mixes several n, here all prune the same.
Seconds are those of pruning with the sensitivities or outliers it rests on, which are measured once per seed.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import torch
import transformers
from peers import outlier_ratios, owl_plan, prune_wanda
from scores import Scores
from textbook import prune_model

import datautils
from mixgpt.allocation.fisher import enough_of, output_gradients, squared_gradients
from mixgpt.allocation.global_threshold import global_plan
from mixgpt.allocation.plan import Budget, by_matrix
from mixgpt.allocation.synthetic import GENERATED, synthetic, windows_of
from mixgpt.allocation.traces import Sampling, Traces, hessian_traces, matrices_of
from mixgpt.app.settings import BOS, PRESETS, recipe, text, written
from mixgpt.checkpoints import load
from mixgpt.common.clock import Clock
from mixgpt.common.errors import InputError
from mixgpt.evaluation.perplexity import perplexity
from mixgpt.evaluation.sparsity import measure_sparsity, total_sparsity
from mixgpt.modeling.family import family_of
from mixgpt.modeling.streaming import digest, fingerprint
from mixgpt.pruning.distill import dense_states, distill, widened
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.magnitude import prune_magnitude
from mixgpt.pruning.solvers import Recipe, admm
from mixgpt.pruning.targets import Target, select
from mixgpt.text.bos import first_token, resolve
from mixgpt.text.mixture import check_unseen
from modelutils import Execution
from quant import Scheme
from sparsegpt import WalkOptions, isc_saliency, obs_saliency

TARGETS = {"50%": (Target(0.5), None), "60%": (Target(0.6), None), "70%": (Target(0.7), None),
           "2:4": (Target(0.5, 2, 4), None), "4:8": (Target(0.5, 4, 8), None), "50%+4bit": (Target(0.5), Scheme(4))}
ALPHA = 0.1  # of mixgpt, the paper's
PERCDAMP = 0.01  # of all but best


class Calibration:
    """What all cells of a seed share: the dense model, the tokens (N, T), and what is measured once with them."""

    def __init__(self, model, family, tokens, seed, batch_size, device, first=None):
        self.model, self.family, self.tokens, self.seed = model, family, tokens, seed
        self.batch_size, self.device, self.clock, self._written = batch_size, device, Clock(device), {}
        self.first = first  # id that every sequence begins with, see bos.first_token

    def execution(self, model):
        """Return where and how a copy of the model runs."""
        return Execution(model, self.family, self.device, self.batch_size)

    @cached_property
    def selected(self):
        return select(self.model, self.family)

    @cached_property
    def sensitivity(self):
        """Fisher trace per weight of every matrix."""
        shapes = matrices_of(self.model, self.family)
        with self.clock.part("mixed"):
            samples = hessian_traces(self.execution(self.model), list(shapes), self.tokens,
                                     Sampling("fisher", squared_gradients, self.seed))
        return Traces("fisher", shapes, samples).sensitivity

    @cached_property
    def gradients(self):
        """Mean squared gradients of the loss by the outputs of every matrix, and diagonals of the inverse Hessians."""
        with self.clock.part("gradients"):
            return output_gradients(self.execution(self.model), list(self.selected), enough_of(self.tokens), self.seed,
                                    PRESETS["best"]["percdamp"])

    def written(self, count):
        """Return so many synthetic sequences, and the dense model's hidden states of their windows, and note the time.
        """
        if count not in self._written:
            with self.clock.part(f"{count} synthetic"):
                sequences, _, states = synthetic(self.execution(self.model), self.tokens, count, self.seed,
                                                 self.first)
            self._written[count] = sequences, states
        return self._written[count]

    @cached_property
    def outliers(self):
        """OWL's outlier ratio of every layer."""
        with self.clock.part("owl"):
            return outlier_ratios(self.model, self.family, self.tokens, self.batch_size, self.device)


def uniform(calibration, target):
    return dict.fromkeys(calibration.selected, target), 0.0


def mixed(calibration, target):
    plan = by_matrix(Budget(calibration.selected, target, ALPHA, calibration.sensitivity))
    return plan, calibration.clock.seconds["mixed"]


def threshold(calibration, target):
    if target.prunem:
        return uniform(calibration, target)
    gradients = calibration.gradients
    plan = global_plan(calibration.execution(calibration.model), calibration.selected, gradients.rows,
                       gradients.diagonals, target.sparsity, PRESETS["best"]["alpha"])
    return plan, calibration.clock.seconds["gradients"]


def owl(calibration, target):
    if target.prunem:
        return None, 0.0
    plan = owl_plan(calibration.selected, calibration.outliers, target.sparsity)
    return plan, calibration.clock.seconds["owl"]


def by_magnitude(calibration, model, plan, scheme):
    prune_magnitude(calibration.execution(model), plan, scheme)


def by_wanda(calibration, model, plan, scheme):
    prune_wanda(model, calibration.family, plan, calibration.tokens, calibration.batch_size, calibration.device, scheme)


def by_textbook(calibration, model, plan, scheme):
    target = next(iter(plan.values()))
    prune_model(model, calibration.family, calibration.tokens, calibration.device, Clock(calibration.device),
                target.sparsity, target.prunen, target.prunem, scheme.wbits if scheme else 16)


def by_walk(calibration, model, plan, scheme, saliency=obs_saliency):
    recipe = Recipe(options=WalkOptions(saliency=saliency, scheme=scheme), percdamp=PERCDAMP)
    prune_layerwise(calibration.execution(model), plan, calibration.tokens, recipe)


def by_admm(calibration, model, plan, scheme):
    """Prune as --preset best does. Returns what it rests on."""
    prunem, execution, N = next(iter(plan.values())).prunem, calibration.execution(model), len(calibration.tokens)
    chosen = recipe("best", prunem, scheme.wbits if scheme else 16)
    number, more = written(chosen["synthetic"], chosen["distill"], N)
    sequences, states = calibration.written(number + more)
    outcomes = prune_layerwise(execution, plan, torch.cat([calibration.tokens, sequences[:number]]), Recipe(
        admm, WalkOptions(scheme=scheme and replace(scheme, mse=chosen["mse"])), chosen["percdamp"],
        chosen.get("act_order", False), dense_target=True,
        row_weights=None if prunem else calibration.gradients.rows, title="ADMM"))
    windows = windows_of(sequences[number:], GENERATED)
    dense, wide = (widened(each, windows, sequences.shape[1]) for each in (
        calibration.execution(calibration.model), execution))
    wanted = dense_states(dense, windows) if states is None else states[-len(windows):]
    distill(wide, {key: found.grid for key, found in outcomes.items()}, windows, wanted, calibration.seed)
    return [f"{number + more} synthetic"]


@dataclass(frozen=True)
class Method:
    """How sparse each matrix shall be, and how it is pruned to that."""

    allocate: Callable  # (calibration, target) -> plan, None where it is not defined, and seconds of what it rests on
    prune: Callable  # (calibration, model, plan, scheme), in place; may return parts of the calibration's clock


METHODS = {
    "magnitude": Method(uniform, by_magnitude),
    "wanda": Method(uniform, by_wanda),
    "owl-wanda": Method(owl, by_wanda),
    "textbook": Method(uniform, by_textbook),
    "owl-sparsegpt": Method(owl, by_walk),
    "sparsegpt": Method(uniform, by_walk),
    "mixgpt": Method(mixed, partial(by_walk, saliency=isc_saliency)),
    "best": Method(threshold, by_admm),
}


def measure(method, target, calibration, tests):
    """Prune a copy of the model and evaluate it. Returns the figures of a cell, None where it is not defined."""
    target, scheme = TARGETS[target]
    (plan, seconds), clock = method.allocate(calibration, target), Clock(calibration.device)
    if plan is None:
        return None
    model, measured = copy.deepcopy(calibration.model), calibration.clock.seconds
    before = sum(measured.values())
    with clock.part("prune"):
        parts = method.prune(calibration, model, plan, scheme) or []
    seconds += sum(measured[part] for part in parts) - (sum(measured.values()) - before)
    return {"perplexity": {name: perplexity(model, calibration.family, tokens, calibration.batch_size,
                                            calibration.device, name) for name, tokens in tests.items()},
            "sparsity": total_sparsity(measure_sparsity(model, calibration.family)),
            "seconds": clock.seconds["prune"] + seconds}


def run(model, family, draw, tests, setup, *, methods, targets, seeds, batch_size, device, output,
        first=None):
    """Measure every cell that the file `output` lacks. draw: seed -> calibration tokens. Returns the `Scores`."""
    scores = Scores(output, setup)
    for name in [name for name in tests if name not in scores.dense]:
        scores.dense[name] = perplexity(model, family, tests[name], batch_size, device, name)
        scores.save()
    for seed in seeds:
        calibration = Calibration(model, family, draw(seed), seed, batch_size, device, first)
        for key in [{"method": method, "target": target, "seed": seed} for target in targets for method in methods]:
            if scores.find(**key):
                continue
            cell = measure(METHODS[key["method"]], key["target"], calibration, tests)
            if cell:
                scores.add(key | cell)
                print(*key.values(), *(f"{name} {value:.2f}" for name, value in cell["perplexity"].items()),
                      f"{cell['sparsity']:.3%}", f"{cell['seconds']:.0f} s", flush=True)
    return scores


def texts(dataset, names, heldout, nsamples, seqlen, segments, tokenizer, data_dir, bos=None):
    """Return (draw, {text: tokens (n, seqlen)}): draw(seed) gives calibration tokens, the tests are cut to `segments`.

    heldout: calibrate on the first four fifths of the train rows and test on the others, on no test text.
    """
    rows, source = datautils.load_rows(dataset, "train", data_dir)
    if heldout:
        border = len(rows) * 4 // 5
        tests = {"heldout": datautils.segments_of(rows[border:], source, seqlen, tokenizer, bos)}
        rows = rows[:border]
    else:
        check_unseen(dataset, names)
        tests = {name: datautils.test_tokens(name, seqlen, tokenizer, data_dir, bos)[0] for name in names}
    return (lambda seed: datautils.samples_of(rows, source, nsamples, seqlen, seed, tokenizer, bos),
            {name: tokens[:segments] for name, tokens in tests.items()})


def parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or .gguf file")
    parser.add_argument("dataset", type=text, help="calibration text: the name of a dataset, a file or a folder")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval", nargs="+", default=["wikitext2", "c4"], type=text, metavar="TEXT",
                        help="texts to evaluate on, named alike (default: wikitext2 c4)")
    parser.add_argument("--heldout", action="store_true",
                        help="evaluate on train documents that calibration never draws, instead of --eval")
    parser.add_argument("--segments", type=int, help="of each text to evaluate on at most (default: all)")
    parser.add_argument("--bos", default="auto", choices=["auto", *BOS], help="as of the commands (default: auto)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data-dir", help="folder with local copies of the texts, instead of the hub")
    parser.add_argument("--output", required=True, help=".json file of the cells; the tables go beside it, in .md")
    return parser


def main(argv=None):
    """Returns the exit status: 0, or 2 after one line about unusable input."""
    given = parser().parse_args(argv)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        for name, least in {"nsamples": 1, "seqlen": 2, "segments": 1, "batch_size": 1}.items():
            if (value := getattr(given, name)) is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        tokenizer = load.load_tokenizer(given.model)
        bos = resolve(given.bos, load.read_config(given.model).model_type, tokenizer)
        draw, tests = texts(given.dataset, given.eval, given.heldout, given.nsamples, given.seqlen, given.segments,
                            tokenizer, given.data_dir, bos)
        model = load.load_model(given.model, getattr(torch, given.dtype))
        family = family_of(model)
        if family is None:
            raise InputError(f"model {given.model}: this is a {type(model).__name__}, which no script here prunes")
        groups = {f"--targets {name}, groups of": TARGETS[name][0].prunem for name in given.targets}
        select(model, family, widths=groups)
        setup = {"model": Path(given.model).name, "weights": fingerprint(model), "dtype": given.dtype,
                 "calibration": given.dataset, "nsamples": given.nsamples, "seqlen": given.seqlen,
                 "texts": {"seed 0": digest(draw(0))} | {name: digest(tokens) for name, tokens in tests.items()}}
        scores = run(model, family, draw, tests, setup, methods=given.methods, targets=given.targets,
                     seeds=given.seeds, batch_size=given.batch_size, device=torch.device(given.device),
                     output=given.output, first=first_token(tokenizer, bos))
    except InputError as error:
        print(f"accuracy.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\n{scores.path.with_suffix('.md').read_text()}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
