"""The command line: the options of a run, their checks and their help."""

import argparse
import dataclasses
from dataclasses import dataclass

from datautils import DATASETS
from mixgpt.allocation.traces import ESTIMATORS
from mixgpt.checkpoints.formats import FORMATS
from mixgpt.common.errors import InputError
from mixgpt.pruning.solvers import SOLVERS
from mixgpt.pruning.targets import Target
from quant import WBITS, Scheme
from sparsegpt import SALIENCIES

WAYS = ("uniform", "origin", "layer-level", "weight-level", "global")  # origin: what the ancestors call uniform
TARGETS = ("layer", "dense")
TOKEN_WEIGHTS = ("equal", "fisher")
PRESETS = {  # whole recipes; a flag that is given overrides them
    "sparsegpt": {"sparsity_way": "uniform", "saliency": "obs", "solver": "obs", "target": "layer"},
    "mixgpt": {"sparsity_way": "weight-level", "sensitivity": "fisher", "saliency": "isc", "solver": "obs",
               "target": "layer"},
    "best": {"sparsity_way": "global", "alpha": 0.15, "saliency": "fisher", "solver": "admm", "target": "dense",
             "percdamp": 0.1},
}


def recipe(preset, prunem=0):
    """Return the options of a preset; in n:m all matrices and rows are alike, so that best weighs tokens instead."""
    alike = {"sparsity_way": "uniform", "saliency": "obs", "token_weights": "fisher"}
    return PRESETS[preset] | (alike if prunem and preset == "best" else {})


@dataclass(frozen=True)
class Settings:
    """The options of a run, named as on the command line. Raises InputError where their values cannot be used."""

    model: str
    dataset: str
    sparsity: float = 0.0
    prunen: int = 0
    prunem: int = 0
    preset: str | None = None
    sparsity_way: str = "uniform"
    alpha: float = 0.1
    sensitivity: str = "hutchinson"
    nprobes: int = 1
    sensitivity_file: str | None = None
    wbits: int = 16
    groupsize: int = -1
    sym: bool = False
    mse: bool = False
    act_order: bool = False
    nearest: bool = False
    gmp: bool = False
    solver: str = "obs"
    target: str = "layer"
    token_weights: str = "equal"
    saliency: str = "obs"
    blocksize: int = 128
    percdamp: float = 0.01
    true_sequential: bool = True
    minlayer: int = 0
    maxlayer: int = 1000
    prune_only: str = ""
    invert: bool = False
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    data_dir: str | None = None
    eval: tuple[str, ...] = ("wikitext2", "ptb", "c4")
    eval_limit: int | None = None
    dense: bool = False
    tasks: tuple[str, ...] = ()
    tasks_dir: str | None = None
    limit: int | None = None
    semi_structured: bool = False
    batch_size: int = 2
    device: str | None = None
    dtype: str = "auto"
    save: str | None = None
    save_format: str = "dense"
    resume: bool = False
    plot: str | None = None
    record: str | None = None
    log_wandb: bool = False
    wandb_project: str | None = None
    wandb_name: str | None = None
    wandb_group: str | None = None
    quiet: bool = False

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise InputError(f"--sparsity {self.sparsity:g}: must be at least 0 and below 1")
        if (self.prunen or self.prunem) and not 0 < self.prunen < self.prunem:
            raise InputError(f"--prunen {self.prunen} --prunem {self.prunem}: needs 0 < prunen < prunem, "
                             "for example --prunen 2 --prunem 4")
        if self.prunem and self.sparsity not in (0, self.prunen / self.prunem):
            raise InputError(f"--sparsity {self.sparsity:g}: contradicts --prunen {self.prunen} "
                             f"--prunem {self.prunem}; leave it out")
        if self.gmp and not self.compresses:
            raise InputError("--gmp: needs --sparsity, --prunen and --prunem, or --wbits")
        if self.mixed and not self.prunes:
            raise InputError(f"--sparsity_way {self.sparsity_way}: needs --sparsity or --prunen and --prunem")
        if self.sparsity_way == "global" and self.prunem:
            raise InputError("--sparsity_way global: gives each matrix a fraction, not n of m; with --prunen and "
                             "--prunem it must be uniform, layer-level or weight-level")
        if self.plot and not self.mixed:
            raise InputError("--plot: draws sensitivities, needs --sparsity_way layer-level or weight-level")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"--alpha {self.alpha:g}: must lie between 0 and 1")
        if not 0 <= self.percdamp <= 1:
            raise InputError(f"--percdamp {self.percdamp:g}: must lie between 0 and 1")
        for name, least in {"nsamples": 1, "seqlen": 2, "batch_size": 1, "blocksize": 1, "nprobes": 1,
                            "eval_limit": 1, "limit": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        for name in ("wandb_project", "wandb_name", "wandb_group"):
            if getattr(self, name) and not self.log_wandb:
                raise InputError(f"--{name}: needs --log_wandb")
        if self.semi_structured and self.prunes and not (self.prunem == 4 and self.prunen >= 2):
            raise InputError("--semi-structured: needs a 2:4 sparse model: --prunen 2 --prunem 4, or one pruned before")
        if self.semi_structured and not self.eval:
            raise InputError("--semi-structured: is measured on the test sets of --eval, and none is given")
        for flag, given in {"--limit": self.limit, "--tasks_dir": self.tasks_dir}.items():
            if given is not None and not self.tasks:
                raise InputError(f"{flag} {given}: needs --tasks")
        self._check_solver()
        self._check_quantization()
        self._check_format()

    def _check_solver(self):
        if self.preset and not self.prunes:
            raise InputError(f"--preset {self.preset}: needs --sparsity or --prunen and --prunem")
        given = {"--solver admm": self.solver == "admm", "--target dense": self.target == "dense",
                 "--token_weights fisher": self.token_weights == "fisher"}
        for flag in (flag for flag, is_given in given.items() if is_given and not self.calibrates):
            raise InputError(f"{flag}: needs calibration, --sparsity, --prunen or --wbits without --gmp and --nearest")
        if self.solver == "admm" and not self.prunes:
            raise InputError("--solver admm: chooses what to prune, needs --sparsity or --prunen and --prunem")
        if self.solver == "admm" and self.saliency == "isc":
            raise InputError("--saliency isc: ranks weights in the walk of --solver obs; with admm it must be obs or "
                             "fisher")

    def _check_quantization(self):
        if self.wbits not in WBITS:
            raise InputError(f"--wbits {self.wbits}: must be one of {', '.join(map(str, WBITS))}")
        if self.groupsize != -1 and self.groupsize < 1:
            raise InputError(f"--groupsize {self.groupsize}: must be at least 1, or -1 for a whole row")
        given = {"--groupsize": self.groupsize != -1, "--sym": self.sym, "--mse": self.mse, "--nearest": self.nearest}
        for flag in (flag for flag, is_given in given.items() if is_given and not self.scheme):
            raise InputError(f"{flag}: needs --wbits {', '.join(map(str, WBITS[:-1]))}")
        if self.nearest and self.prunes and not self.gmp:
            raise InputError("--nearest: rounds without calibration; with --sparsity or --prunen it needs --gmp")
        if self.act_order and not self.calibrates:
            raise InputError("--act-order: orders the walk over the columns, which needs --sparsity, --prunen or "
                             "--wbits without --gmp and --nearest")
        m, g = self.prunem, self.groupsize
        if m and g > 0 and m % g and g % m:
            raise InputError(f"--groupsize {g} --prunem {m}: one must divide the other")
        if self.act_order and 0 < g < m:
            raise InputError(f"--act-order --groupsize {g}: the {m} columns of an n:m group are moved together, so "
                             f"--groupsize must be at least {m}")

    def _check_format(self):
        if self.save_format not in ("dense", *FORMATS):
            raise InputError(f"--save-format {self.save_format}: must be one of {', '.join(('dense', *FORMATS))}")
        if self.save_format != "dense" and not self.save:
            raise InputError(f"--save-format {self.save_format}: needs --save")
        if self.resume and not self.save:
            raise InputError("--resume: needs --save, the folder of the run that left off")
        if self.save_format != "compressed-tensors":
            return
        if not (self.wbits in (4, 8) and self.sym):
            raise InputError("--save-format compressed-tensors: holds symmetric grids of 4 or 8 bits; needs --wbits 4 "
                             "or 8, and --sym")
        if self.act_order and self.groupsize != -1:
            raise InputError("--save-format compressed-tensors: holds groups of columns that lie side by side, with "
                             "--act-order only --groupsize -1")

    @property
    def prunes(self):
        return self.sparsity > 0 or self.prunem > 0

    @property
    def scheme(self):
        """The grids of the weights, None where they stay as they are."""
        return Scheme(self.wbits, self.groupsize, self.sym, self.mse) if self.wbits < 16 else None

    @property
    def compresses(self):
        return self.prunes or self.scheme is not None

    @property
    def calibrates(self):
        return self.compresses and not (self.gmp or self.nearest)

    @property
    def mixed(self):
        return self.sparsity_way in ("layer-level", "weight-level")

    @property
    def weighs(self):
        """Whether the gradients of the loss by the outputs of matrices are needed."""
        by_loss = "fisher" in (self.saliency, self.token_weights)
        return self.sparsity_way == "global" or by_loss and self.calibrates

    @property
    def method(self):
        """Name of the recipe in tables and records; MixGPT is the paper's: isc saliency and mixed sparsity."""
        bits = f"{self.wbits} bit" if self.scheme else ""
        if not self.prunes:
            return f"{'GPTQ' if self.calibrates else 'nearest'} {bits}" + (
                " (dense target)" if self.target == "dense" else "")
        mixgpt = self.mixed and self.saliency == "isc" and not self.gmp
        name = "magnitude" if self.gmp else "ADMM" if self.solver == "admm" else "MixGPT" if mixgpt else "SparseGPT"
        choices = [f"{self.sparsity_way} by {self.sensitivity}"] if self.mixed else []
        choices += ["global"] if self.sparsity_way == "global" else []
        choices += [self.saliency] if self.saliency != "obs" and not self.gmp and not mixgpt else []
        choices += ["dense target"] if self.target == "dense" else []
        choices += ["weighted tokens"] if self.token_weights == "fisher" else []
        return name + (f" ({', '.join(choices)})" if choices else "") + (f" + {bits}" if bits else "")

    @property
    def amount(self):
        if self.prunem:
            return Target(self.prunen / self.prunem, self.prunen, self.prunem)
        return Target(self.sparsity)


def _names(text):
    names = tuple(dict.fromkeys(text.replace(",", " ").split()))
    if not names:
        raise argparse.ArgumentTypeError("names no task; give for example arc_challenge,hellaswag")
    return names


# Group -> (flag, help, further arguments of argparse); types and defaults are those of Settings.
OPTIONS = {
    "what to prune and to quantize": [
        ("--sparsity", "fraction of the weights to prune, 0 to below 1", {}),
        ("--prunen", "n of n:m, weights pruned in every group", {}),
        ("--prunem", "m of n:m, consecutive weights of a row in a group", {}),
        ("--minlayer", "first layer to change", {}),
        ("--maxlayer", "first layer not to change any more", {}),
        ("--prune_only", "change only matrices whose name contains this, such as fc1 or mlp", {}),
        ("--invert", "change what the three options above do not select", {}),
    ],
    "whole recipes": [
        ("--preset", "sparsegpt, mixgpt (the paper's) or best (what measures best); flags that are given override it",
         {"choices": PRESETS}),
    ],
    "how sparse each matrix is": [
        ("--sparsity_way", "uniform (or origin): all matrices alike; layer-level, weight-level: the less sensitive a "
                           "layer or matrix, the sparser, with the same total; global: one threshold for the weights "
                           "of all matrices, on what removing them adds to the loss", {"choices": WAYS}),
        ("--alpha", "greatest distance of a matrix from the sparsity asked for, with layer-level and weight-level "
                    "before the shift that meets the total", {}),
        ("--sensitivity", "hutchinson: trace of the exact Hessian of the loss, by random probes; fisher: trace of the "
                          "Gauss-Newton matrix, less noise in less time", {"choices": ESTIMATORS}),
        ("--nprobes", "probes, or draws of labels with fisher, per calibration sequence", {}),
        ("--sensitivity_file", "JSON file of the traces, read where it exists, else computed and written (default: "
                               "kept in ~/.cache/mixgpt by model, data, seed and settings)", {}),
    ],
    "how to prune": [
        ("--gmp", "by magnitude, without calibration (the baseline)", {}),
        ("--solver", "obs: one walk over the columns (SparseGPT); admm: masks by ADMM, and the kept weights solved for",
         {"choices": SOLVERS}),
        ("--target", "what the outputs of a pruned matrix come close to: those of the dense matrix on the same inputs "
                     "(layer), or the mean of these and those of the dense model, and half of what the hidden "
                     "states that they are added to lack (dense)", {"choices": TARGETS}),
        ("--token_weights", "what a calibration token counts in the Hessians: as much as each other one (equal), or by "
                            "the root of the loss's gradient there (fisher)", {"choices": TOKEN_WEIGHTS}),
        ("--saliency", "what ranks weights: obs (SparseGPT), isc, the improved criterion of MixGPT, or fisher, obs "
                       "with each row weighted by the loss's gradient there",
         {"choices": SALIENCIES}),
        ("--blocksize", "columns between two updates of the rest of the matrix", {}),
        ("--percdamp", "damping of the Hessian, as a fraction of its mean diagonal", {}),
        ("--true-sequential", "calibrate each linear on inputs from the pruned linears before it in its layer, in one "
                              "run of the layer; else all of a layer on its unpruned linears, in two",
         {"action": argparse.BooleanOptionalAction}),
    ],
    "how many bits a weight has": [
        ("--wbits", "bits of a weight that is kept, by GPTQ in the same walk; 16: as they are", {"choices": WBITS}),
        ("--groupsize", "columns of a row that share a grid; -1: all", {}),
        ("--sym", "grids with zero in their middle, instead of the range of the weights", {}),
        ("--mse", "search the range of each grid for the least squared error", {}),
        ("--act-order", "walk the columns in order of decreasing activations; groups of n:m stay whole", {}),
        ("--nearest", "round to the nearest value without calibration (the baseline)", {}),
    ],
    "calibration": [
        ("--nsamples", "sequences", {}),
        ("--seqlen", "tokens in a sequence, also in evaluation (default: 2048, or the model's limit where that is "
                     "lower)", {"type": int}),
        ("--seed", "of the choice of sequences, and of probes and labels", {}),
        ("--data-dir", "folder with local copies of the datasets, instead of the hub", {}),
    ],
    "evaluation": [
        ("--eval", "test sets to report perplexity on; none: --eval without a name",
         {"nargs": "*", "type": str, "choices": DATASETS}),
        ("--eval-limit", "sequences of each test set, the first ones (default: all)", {"type": int}),
        ("--dense", "report the dense model's perplexity and scores too", {}),
        ("--tasks", "tasks of lm-eval to report scores on, separated by commas, such as arc_challenge,hellaswag; needs "
                    "requirements-eval.txt", {"type": _names}),
        ("--tasks_dir", "folder with further tasks, described by lm-eval's .yaml files", {}),
        ("--limit", "examples of each task, the first ones (default: all)", {"type": int}),
        ("--semi-structured", "run the model, which must be 2:4 sparse, on the kernels that GPUs have for that too, "
                              "and report speed and difference", {}),
    ],
    "where and how it runs": [
        ("--batch-size", "sequences that run together; changes speed and memory only", {}),
        ("--device", "cpu, cuda or cuda:N (default: cuda where there is one)", {}),
        ("--dtype", "of the weights in memory and saved; auto: as stored, but float32 for float16 on a CPU",
         {"choices": ["auto", "float32", "bfloat16", "float16"]}),
    ],
    "output": [
        ("--save", "new folder for weights, tokenizer, config and mixgpt.json, verified by loading it again", {}),
        ("--save-format", "dense: every weight in its dtype; compressed-tensors: packed integers, for vLLM too; "
                          "sparse: a bit mask and the packed values of the kept weights",
         {"choices": ("dense", *FORMATS)}),
        ("--resume", "go on with the run that left off in the folder of --save, where there is one", {}),
        ("--plot", "picture of sensitivities by layer and by kind, and of the sparsities assigned (.png, .pdf, .svg)",
         {}),
        ("--record", "JSON file for what --save keeps in mixgpt.json: settings, versions, every matrix, perplexities; "
                     "results.py makes tables and plots of many", {}),
        ("--log_wandb", "log to Weights & Biases as the run goes (pip install wandb, wandb login)", {}),
        ("--wandb_project", "project there (default: WANDB_PROJECT, like all that wandb reads from its variables)", {}),
        ("--wandb_name", "name of the run there (default: WANDB_NAME)", {}),
        ("--wandb_group", "group of the run there (default: WANDB_RUN_GROUP)", {}),
        ("--quiet", "print nothing but the results and warnings", {}),
    ],
}


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what it cannot read, and exits with status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(family, argv=None):
    """Read the command line of a family script. Returns `Settings`; exits with status 2 on what it cannot read."""
    parser = Parser(
        prog=family.script, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, description="Prune and quantize a language model in one shot and report its perplexity.\n"
                                        "Without --sparsity, --prunen/--prunem or --wbits: the perplexity of the dense "
                                        "model.")
    parser.add_argument("model", help="hub id, local folder or .gguf file")
    parser.add_argument("dataset", choices=DATASETS, help="calibration text: %(choices)s; builtin is CPython's own "
                                                          "reference manual and needs no download")
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, text, arguments in options:
            name = flag.lstrip("-").replace("-", "_")
            default = defaults[name]
            if default is False:
                group.add_argument(flag, dest=name, help=text, action="store_true")
                continue
            if default not in (None, "", ()):
                text += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
            if "action" not in arguments:
                arguments = {"type": str if default is None else type(default)} | arguments
            group.add_argument(flag, dest=name, help=text, **arguments)
    given = vars(parser.parse_args(argv))
    preset = recipe(given["preset"], given.get("prunem", 0)) if "preset" in given else {}
    return Settings(**preset | given)
