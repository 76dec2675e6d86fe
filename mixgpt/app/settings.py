"""The options of a run, their validation and help. Nothing here imports PyTorch."""

import argparse
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

from mixgpt.app.choices import ALLOCATIONS, DATASETS, ESTIMATORS, FORMATS, SALIENCIES, SOLVERS
from mixgpt.checkpoints.names import RECORD
from mixgpt.common import outputs
from mixgpt.common.errors import InputError
from mixgpt.text import mixture

WBITS = (2, 3, 4, 8, 16)  # 16: not quantized
TARGETS = ("layer", "dense")
BOS = {"each": "BOS at the start of each sequence", "once": "BOS at the start of each text", "never": "no BOS"}
TOKEN_WEIGHTS = ("equal", "fisher")
LEAST = {"nsamples": 1, "seqlen": 2, "batch_size": 1, "blocksize": 1, "nprobes": 1, "eval_limit": 1, "limit": 1,
         "minlayer": 0, "maxlayer": 0, "prunen": 0, "prunem": 0}
MOST = 2**31 - 1  # of whole numbers: none needs more, and PyTorch's sizes end at 2**63
MOST_WRITTEN = 100  # synthetic sequences for each calibration sequence
LONGEST_ID = 200  # characters of a hub id; the hub takes 96 on each side of the slash
MOST_SEED = 2**64 - 1  # as PyTorch's
PRESETS = {  # complete recipes; explicit flags override them
    "sparsegpt": {"sparsity_way": "uniform", "saliency": "obs", "solver": "obs", "target": "layer"},
    "mixgpt": {"sparsity_way": "weight-level", "sensitivity": "fisher", "saliency": "isc", "solver": "obs",
               "target": "layer"},
    "best": {"sparsity_way": "global", "alpha": 0.15, "saliency": "fisher", "solver": "admm", "target": "dense",
             "percdamp": 0.1, "synthetic": 0.5, "distill": 0.75},
}


def recipe(preset, prunem=0, wbits=16, groupsize=-1):
    """Return the options of a preset, for n:m if prunem is not 0, and for grids of wbits bits and a groupsize.

    In n:m all matrices and rows have one sparsity, so best needs no gradients, and has time for more synthetic
    sequences. Grids have few scales to learn. Columns are quantized in the order of activation unless their groups
    would have to be stored.
    """
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    chosen = dict(PRESETS[preset])
    if preset == "best" and prunem:
        chosen |= {"sparsity_way": "uniform", "saliency": "obs", "synthetic": 0.75, "distill": 1.0}
    if preset == "best" and wbits < 16:
        chosen |= {"distill": 0.5, "mse": True} | ({"act_order": True} if groupsize == -1 else {})
    return chosen


def written(synthetic, distill, nsamples, distills=True):
    """Return the numbers of synthetic sequences for the Hessians, and for distillation.

    distills: whether there is room for that. If not, the Hessians take of those, too, up to one for each calibration
    sequence.
    """
    number, more = (math.ceil(round(share * nsamples, 6)) for share in (synthetic, distill))
    if distills or not number:
        return number, more if distills else 0
    return min(number + more, max(number, nsamples)), 0


# What an option affects.
RESULT = "result"  # the result: must match for --resume, distinguished in plots
METHOD = "method"  # the result, already shown in plots as method, sparsity or range over seeds
ROUNDING = "rounding"  # only summation order or files: must match for --resume, one point in plots
EVALUATION = "evaluation"  # what is reported, not saved: may differ for --resume, distinguished in plots
FREE = "free"  # none of these: may differ for --resume


def option(default, effect, help="", *, flag=None, group=None, registry=None, writes=None, **arguments):
    """Describe a field of `Settings`: its effect, help and flag, the option group that starts with it, the registry of
    its values, the outputs.Kind of the file that it names, and further argparse arguments."""
    return dataclasses.field(default=default, metadata={
        "effect": effect, "help": help, "flag": flag, "group": group, "registry": registry, "writes": writes,
        "arguments": arguments})


def names(text):
    """Split a list of names."""
    found = tuple(dict.fromkeys(text.replace(",", " ").split()))
    if not found:
        raise argparse.ArgumentTypeError("is empty; give for example arc_challenge,hellaswag")
    return found


def texts(name):
    """Check that a name is that of a dataset, a path, or a mixture of these."""
    try:
        mixture.shares(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from error
    return name


def text(name):
    """Check that a name is that of a dataset, or a path."""
    if len(mixture.shares(texts(name))) > 1:
        raise argparse.ArgumentTypeError(f"{name!r}: is a mixture, which is for calibration; give its texts one by one")
    return name


@dataclass(frozen=True, init=False)
class Settings:
    """The options of a run, named as on the command line. Raises InputError for invalid values.

    An option that is not given has the value of the preset's recipe, else its default.
    """

    model: str = dataclasses.field(metadata={"effect": FREE})  # compared by weights, see records.identity
    dataset: str = dataclasses.field(metadata={"effect": RESULT})

    sparsity: float = option(0.0, METHOD,
        "fraction of the weights to prune, at least 0 and below 1", group="what to prune")
    prunen: int = option(0, METHOD, "n of n:m: weights to prune in every group")
    prunem: int = option(0, METHOD, "m of n:m: consecutive weights of a row in a group")
    minlayer: int = option(0, RESULT, "first layer to prune or quantize")
    maxlayer: int = option(1000, RESULT, "layer to stop before")
    prune_only: str = option("", RESULT, "only matrices whose name contains this, such as fc1 or mlp")
    invert: bool = option(False, RESULT, "all matrices except those selected by the three options above")

    preset: str | None = option(None, FREE,
        "a complete recipe: sparsegpt, mixgpt (as in the paper) or best (lowest perplexity); flags given beside it "
        "take precedence", group="recipe", choices=PRESETS)

    sparsity_way: str = option("uniform", METHOD,
        "how to distribute sparsity over matrices", group="sparsity allocation", registry=ALLOCATIONS)
    alpha: float = option(0.1, RESULT,
        "largest deviation of a matrix from the overall sparsity; with layer-level and weight-level before the shift "
        "that meets the total")
    sensitivity: str = option("hutchinson", METHOD, "sensitivity estimator", registry=ESTIMATORS)
    nprobes: int = option(1, RESULT, "random probes (with fisher: sampled labels) per calibration sequence")
    sensitivity_file: str | None = option(None, FREE,
        "JSON file of sensitivities: read if it exists, else computed and written (default: cached in ~/.cache/mixgpt "
        "by model, data, seed and settings)", writes=outputs.TRACES)

    gmp: bool = option(False, METHOD, "magnitude pruning without calibration (the baseline)", group="pruning")
    solver: str = option("obs", METHOD, "pruning solver", registry=SOLVERS)
    target: str = option("layer", METHOD,
        "regression target for the outputs of a pruned matrix; layer: the dense matrix on the same inputs; dense: "
        "the mean of these and the dense model's outputs, plus half the error of the hidden states they are added to",
        choices=TARGETS)
    token_weights: str = option("equal", METHOD,
        "weights of calibration tokens in the Hessians; equal: all alike; fisher: by the square root of the "
        "loss gradient at the token", choices=TOKEN_WEIGHTS)
    saliency: str = option("obs", METHOD, "score by which weights are ranked", registry=SALIENCIES)
    blocksize: int = option(128, RESULT, "columns per block; the rest of the matrix is updated after each block")
    percdamp: float = option(0.01, RESULT, "damping of the Hessian, as a fraction of its mean diagonal")
    true_sequential: bool = option(True, RESULT,
        "calibrate each linear on the outputs of the pruned linears before it in its layer; otherwise all linears of "
        "a layer on the unpruned layer",
        flag="--true-sequential", action=argparse.BooleanOptionalAction)

    wbits: int = option(16, METHOD,
        "bits of the kept weights, quantized by GPTQ in the same pass; 16: not quantized",
        group="quantization", choices=WBITS)
    groupsize: int = option(-1, RESULT,
        "consecutive weights of a row that share a scale and zero point; -1: the whole row")
    sym: bool = option(False, RESULT, "symmetric grids; otherwise from the minimum to the maximum of the weights")
    mse: bool = option(False, RESULT,
        "search the range of each grid for the smallest rounding error on the calibration inputs",
        action=argparse.BooleanOptionalAction)
    act_order: bool = option(False, RESULT,
        "process columns in order of decreasing Hessian diagonal; groups of n:m stay whole",
        flag="--act-order", action=argparse.BooleanOptionalAction)
    nearest: bool = option(False, METHOD, "round to nearest without calibration (the baseline)")

    nsamples: int = option(128, RESULT, "calibration sequences", group="calibration")
    synthetic: float = option(0.0, METHOD,
        "sequences that the dense model writes for each of these, for the Hessians beside them; 0.5: for every second")
    distill: float = option(0.0, METHOD,
        "further ones, likewise, on which the kept weights, or with --wbits the scales of their grids, are trained at "
        "the end to predict what the dense model does")
    seqlen: int | None = option(None, RESULT,
        "tokens per sequence, in calibration and evaluation (default: 2048, or the model's limit if that is lower)",
        type=int)
    bos: str = option("auto", RESULT,
        "where the token for the beginning of a text stands, in calibration and evaluation; each: at the start of each "
        "sequence, in place of its first token; once: at the start of each text; never: nowhere; auto: each for models "
        "that need it (Gemma), else what the tokenizer does by itself", choices=["auto", *BOS])
    seed: int = option(0, METHOD, "random seed for calibration sequences, probes and sampled labels")
    data_dir: str | None = option(None, FREE,
        "folder with local copies of the datasets, used instead of the hub", flag="--data-dir")

    eval: tuple[str, ...] = option(("wikitext2", "ptb", "c4"), FREE,
        "test sets for perplexity, by name, or files or folders of text; --eval without a name: none",
        group="evaluation", nargs="*", type=text, metavar="TEXT")
    eval_limit: int | None = option(None, EVALUATION,
        "evaluate only the first sequences of each test set (default: all)", flag="--eval-limit", type=int)
    dense: bool = option(False, FREE, "also evaluate the dense model")
    tasks: tuple[str, ...] = option((), FREE,
        "lm-eval tasks to report, separated by commas, such as arc_challenge,hellaswag; needs requirements-eval.txt",
        type=names)
    tasks_dir: str | None = option(None, FREE, "folder with further tasks, as .yaml files of lm-eval")
    limit: int | None = option(None, FREE, "evaluate only the first examples of each task (default: all)", type=int)
    semi_structured: bool = option(False, FREE,
        "also run the model, which must be 2:4 sparse, on the GPU's sparse kernels, and report speed and difference",
        flag="--semi-structured")

    batch_size: int = option(2, ROUNDING,
        "sequences per forward pass; affects speed and memory only",
        flag="--batch-size", group="execution")
    device: str | None = option(None, FREE, "cpu, cuda or cuda:N (default: cuda if available)")
    dtype: str = option("auto", RESULT,
        "dtype of the weights in memory and on disk; auto: as stored, but float32 where a CPU is faster in it",
        choices=['auto', 'float32', 'bfloat16', 'float16'])

    save: str | None = option(None, FREE,
        "new folder for the weights, tokenizer, configuration and mixgpt.json; reloaded and compared after writing",
        group="output")
    save_format: str = option("dense", ROUNDING, "format of the saved weights", flag="--save-format", registry=FORMATS)
    resume: bool = option(False, FREE, "continue the interrupted run in the folder of --save, if there is one")
    plot: str | None = option(None, FREE,
        "figure of the assigned sparsities by layer and kind of matrix, and of the sensitivities, if they are ranked "
        "(.png, .pdf, .svg)",
        writes=outputs.PICTURE)
    record: str | None = option(None, FREE,
        "JSON file of settings, versions, every matrix and perplexities, as in mixgpt.json of --save; results.py "
        "compares such files", writes=outputs.RECORD)
    log_wandb: bool = option(False, FREE, "log to Weights & Biases during the run (pip install wandb, wandb login)")
    wandb_project: str | None = option(None, FREE,
        "W&B project (default: WANDB_PROJECT)")
    wandb_name: str | None = option(None, FREE, "W&B run name (default: WANDB_NAME)")
    wandb_group: str | None = option(None, FREE, "W&B run group (default: WANDB_RUN_GROUP)")
    quiet: bool = option(False, FREE, "print only results and warnings")

    def __init__(self, model, dataset, **given):
        defaults = {field.name: field.default for field in dataclasses.fields(self) if "help" in field.metadata}
        if unknown := given.keys() - defaults.keys():
            raise TypeError(f"Settings has no {', '.join(sorted(unknown))}")
        shape = {name: given[name] for name in ("prunem", "wbits", "groupsize") if name in given}
        preset = recipe(given["preset"], **shape) if given.get("preset") is not None else {}
        for name, value in ({"model": model, "dataset": dataset} | defaults | preset | given).items():
            object.__setattr__(self, name, value)  # frozen
        try:
            self._check()
        except InputError as error:
            refused, _, reason = str(error).partition(": ")
            if refused.split()[0] in (flags()[name] for name in preset.keys() - given.keys()):
                raise InputError(f"--preset {self.preset} ({refused}): {reason}") from error
            raise

    def _check(self):
        refuse_empty({flags()[field.name]: getattr(self, field.name) for field in dataclasses.fields(self)
                      if field.default != ""})
        self._check_numbers()
        chosen = [(registry, getattr(self, field.name)) for field in dataclasses.fields(self)
                  if (registry := field.metadata.get("registry"))]
        for registry, name in chosen:
            registry.check(name)
        if (self.prunen or self.prunem) and not 0 < self.prunen < self.prunem:
            raise InputError(f"--prunen {self.prunen} --prunem {self.prunem}: needs 0 < prunen < prunem, "
                             "for example --prunen 2 --prunem 4")
        if self.prunem and self.sparsity not in (0, self.prunen / self.prunem):
            raise InputError(f"--sparsity {self.sparsity:g}: contradicts --prunen {self.prunen} "
                             f"--prunem {self.prunem}; leave it out")
        if self.gmp and not self.compresses:
            raise InputError("--gmp: needs --sparsity, --prunen and --prunem, or --wbits")
        if self.preset and not self.prunes:
            raise InputError(f"--preset {self.preset}: needs --sparsity or --prunen and --prunem")
        if self.spreads and not self.prunes:
            raise InputError(f"--sparsity_way {self.sparsity_way}: needs --sparsity or --prunen and --prunem")
        if self.plot and not self.spreads:
            raise InputError("--plot: shows how sparsity is spread over the matrices, needs --sparsity_way "
                             f"{' or '.join(name for name, each in ALLOCATIONS.items() if not each.even)}")
        mixture.check_unseen(self.dataset, self.eval if self.draws else ())
        self._check_solver()
        self._check_quantization()
        self._check_format()
        self._check_reports()
        for registry, name in chosen:
            if registry[name].refuses and (reason := registry[name].refuses(self)):
                raise InputError(f"{registry.flag} {name}: {reason}")

    def _check_numbers(self):
        if not 0 <= self.sparsity < 1:
            raise InputError(f"--sparsity {self.sparsity:g}: must be at least 0 and below 1")
        for flag, value in {"--alpha": self.alpha, "--percdamp": self.percdamp}.items():
            if not 0 <= value <= 1:
                raise InputError(f"{flag} {value:g}: must lie between 0 and 1")
        for flag, value in {"--synthetic": self.synthetic, "--distill": self.distill}.items():
            if not 0 <= value <= MOST_WRITTEN:
                raise InputError(f"{flag} {value:g}: must lie between 0 and {MOST_WRITTEN}")
        check_seed(self.seed)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                bound = f"least {least}" if value < least else f"most {MOST}"
                raise InputError(f"{flags()[name]} {value}: must be at {bound}")

    def _check_reports(self):
        for name in ("wandb_project", "wandb_name", "wandb_group"):
            if getattr(self, name) and not self.log_wandb:
                raise InputError(f"--{name}: needs --log_wandb")
        if self.semi_structured and self.prunes and not (self.prunem == 4 and self.prunen >= 2):
            raise InputError("--semi-structured: needs a 2:4 sparse model: --prunen 2 --prunem 4, or one pruned before")
        if self.semi_structured and not self.eval:
            raise InputError("--semi-structured: is measured on the test sets of --eval, but none is given")
        for flag, given in {"--limit": self.limit, "--tasks_dir": self.tasks_dir}.items():
            if given is not None and not self.tasks:
                raise InputError(f"{flag} {given}: needs --tasks")

    def _check_solver(self):
        given = {f"--solver {self.solver}": self.solver != "obs", "--target dense": self.target == "dense",
                 "--token_weights fisher": self.token_weights == "fisher",
                 f"--synthetic {self.synthetic:g}": self.synthetic > 0, f"--distill {self.distill:g}": self.distill > 0}
        for flag in (flag for flag, is_given in given.items() if is_given and not self.calibrates):
            raise InputError(f"{flag}: needs calibration, --sparsity, --prunen or --wbits without --gmp and --nearest")
        if self.solver != "obs" and not self.prunes:
            raise InputError(f"--solver {self.solver}: is a pruning solver, needs --sparsity or --prunen and --prunem")
        solver = SOLVERS[self.solver]
        if solver.saliencies is not None and self.saliency not in solver.saliencies:
            raise InputError(f"--saliency {self.saliency}: --solver {self.solver} does not support it; must "
                             f"be {' or '.join(solver.saliencies)}")
        if self.quantizes and not solver.quantizes:
            others = [name for name, other in SOLVERS.items() if other.quantizes]
            raise InputError(f"--wbits {self.wbits}: --solver {self.solver} does not quantize; must be "
                             f"{' or '.join(others)}")

    def _check_quantization(self):
        if self.wbits not in WBITS:
            raise InputError(f"--wbits {self.wbits}: must be one of {', '.join(map(str, WBITS))}")
        if self.groupsize != -1 and not 1 <= self.groupsize <= MOST:
            raise InputError(f"--groupsize {self.groupsize}: must be at least 1, or -1 for a whole row")
        given = {"--groupsize": self.groupsize != -1, "--sym": self.sym, "--mse": self.mse, "--nearest": self.nearest}
        for flag in (flag for flag, is_given in given.items() if is_given and not self.quantizes):
            raise InputError(f"{flag}: needs --wbits {', '.join(map(str, WBITS[:-1]))}")
        if self.nearest and self.prunes and not self.gmp:
            raise InputError("--nearest: rounds without calibration; with --sparsity or --prunen it needs --gmp")
        for flag in (flag for flag, given in {"--act-order": self.act_order, "--mse": self.mse}.items() if given):
            if not self.calibrates:
                raise InputError(f"{flag}: needs calibration, --sparsity, --prunen or --wbits without --gmp and "
                                 "--nearest")
        m, g = self.prunem, self.groupsize
        if m and g > 0 and m % g and g % m:
            raise InputError(f"--groupsize {g} --prunem {m}: one must divide the other")
        if self.act_order and 0 < g < m:
            raise InputError(f"--act-order --groupsize {g}: must be at least {m}, as the {m} columns of an n:m "
                             "group stay together")

    def _check_format(self):
        if self.save_format != "dense" and not self.save:
            raise InputError(f"--save-format {self.save_format}: needs --save")
        if self.resume and not self.save:
            raise InputError("--resume: needs --save, the folder of the interrupted run")

    @property
    def prunes(self):
        return self.sparsity > 0 or self.prunem > 0

    @property
    def quantizes(self):
        return self.wbits < 16

    @property
    def scheme(self):
        """The quant.Scheme of the weights, None without quantization."""
        from quant import Scheme  # imports PyTorch

        return Scheme(self.wbits, self.groupsize, self.sym, self.mse) if self.quantizes else None

    @property
    def compresses(self):
        return self.prunes or self.quantizes

    @property
    def calibrates(self):
        return self.compresses and not (self.gmp or self.nearest)

    @property
    def spreads(self):
        """Whether matrices differ in their sparsity."""
        return not ALLOCATIONS[self.sparsity_way].even

    @property
    def mixed(self):
        """Whether matrices or layers are ranked by sensitivity."""
        return ALLOCATIONS[self.sparsity_way].ranks

    @property
    def weighs(self):
        """Whether gradients of the loss w.r.t. matrix outputs are needed."""
        weighted = SALIENCIES[self.saliency].weighs_rows or self.token_weights == "fisher"
        return ALLOCATIONS[self.sparsity_way].by_loss or weighted and self.calibrates

    @property
    def draws(self):
        """Whether calibration sequences are drawn."""
        return self.mixed or self.weighs or self.calibrates

    def written(self, distills=True):
        """The numbers of synthetic sequences, as `written`."""
        return written(self.synthetic, self.distill, self.nsamples, distills)

    @property
    def method(self):
        """Name of the method in tables and records; MixGPT is the paper's: isc saliency and mixed sparsity."""
        bits = f"{self.wbits} bit" if self.quantizes else ""
        if not self.prunes:
            return f"{'GPTQ' if self.calibrates else 'nearest'} {bits}" + _in_brackets(self._calibration_choices())
        mixgpt = self.mixed and self.saliency == "isc" and not self.gmp
        name = "magnitude" if self.gmp else "MixGPT" if mixgpt and self.solver == "obs" else SOLVERS.title(self.solver)
        way = ALLOCATIONS.title(self.sparsity_way)
        choices = [f"{way} by {ESTIMATORS.title(self.sensitivity)}" if self.mixed else way] if self.spreads else []
        choices += [SALIENCIES.title(self.saliency)] if self.saliency != "obs" and not self.gmp and not mixgpt else []
        choices += self._calibration_choices()
        return name + _in_brackets(choices) + (f" + {bits}" if bits else "")

    def _calibration_choices(self):
        """Name the choices of any solver that differ from the defaults."""
        chosen = {"dense target": self.target == "dense", "weighted tokens": self.token_weights == "fisher",
                  "synthetic text": self.synthetic > 0, "distilled": self.distill > 0}
        return [name for name, is_chosen in chosen.items() if is_chosen]

    def check_paths(self):
        """Raise InputError if a given file or directory does not exist, or a file to be written may not be written."""
        check_model("model", self.model)
        if self.data_dir and not os.path.isdir(self.data_dir):
            raise InputError(f"--data-dir {self.data_dir}: no such folder")
        self._check_outputs()

    def _check_outputs(self):
        kinds = {field.name: kind for field in dataclasses.fields(self) if (kind := field.metadata.get("writes"))}
        written = {flags()[name]: (path, kind) for name, kind in kinds.items() if (path := getattr(self, name))}
        taken = [("model", self.model)] if os.path.exists(self.model) else []  # else a hub id
        taken += [("--save", self.save)] if self.save else []
        outputs.check_places({flag: path for flag, (path, _) in written.items()}, taken)
        record = Path(os.path.realpath(self.record or ""))
        if record.name == RECORD and os.path.exists(record.with_name("config.json")):
            raise InputError(f"--record {self.record}: belongs to the model saved beside it; name another file")
        for flag, (path, kind) in written.items():
            only_read = kind is outputs.TRACES and os.path.exists(path)
            (outputs.check_file if only_read else outputs.check_writable)(flag, path, kind)


def flags():
    """Return {name of a field of Settings: its flag, or its name if positional}."""
    return {field.name: field.metadata.get("flag") or (
        f"--{field.name}" if "help" in field.metadata else field.name) for field in dataclasses.fields(Settings)}


def refuse_empty(given):
    """Raise InputError for an empty text among the arguments {flag: value}."""
    for flag, value in given.items():
        if isinstance(value, str) and not value.strip():
            raise InputError(f'{flag} "{value}": must not be empty; is a variable of the shell unset?')


def _in_brackets(choices):
    """List choices behind a name, if there are any."""
    return f" ({', '.join(choices)})" if choices else ""


def check_model(flag, name):
    """Raise InputError for a name that cannot be a hub id and is not here."""
    if Path(name).suffix == ".gguf" and not os.path.isfile(name):
        raise InputError(f"{flag} {name}: no such file")
    if (os.path.isabs(name) or name.startswith((".", "~")) or len(name) > LONGEST_ID) and not os.path.exists(name):
        raise InputError(f"{flag} {name}: no such file or folder")


def check_seed(seed):
    """Raise InputError for a seed that PyTorch does not take, or that Python takes for another one, as -1 for 1."""
    if not 0 <= seed <= MOST_SEED:
        raise InputError(f"--seed {seed}: must be at least 0 and at most {MOST_SEED}")


def having_effect(*effects):
    """Return the names of the fields of Settings whose effect is one of these."""
    return [field.name for field in dataclasses.fields(Settings) if field.metadata["effect"] in effects]


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError, and OSError where its help cannot be printed."""

    def error(self, message):
        raise InputError(message)

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file)


def parse(family, argv=None):
    """Parse the command line of a family script. Returns `Settings`. Raises InputError."""
    parser = Parser(
        prog=family.script, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, description="Prune and quantize a language model in one shot and report its perplexity.\n"
                                        "Without --sparsity, --prunen/--prunem or --wbits: the perplexity of the dense "
                                        "model.")
    parser.add_argument("model", help="hub id, local folder or .gguf file")
    parser.add_argument("dataset", type=texts, help=(
        f"calibration text, by name, as a file or folder, or a mixture such as c4:0.7,my.jsonl:0.3; {DATASETS.help}"))
    for field in dataclasses.fields(Settings):
        if "help" in field.metadata:
            if title := field.metadata["group"]:
                group = parser.add_argument_group(title)
            add_option(group, field)
    return Settings(**vars(parser.parse_args(argv)))


def add_option(group, field):
    """Add the option of a field of Settings to an argparse group or parser."""
    default, text, arguments = field.default, field.metadata["help"], field.metadata["arguments"]
    flag = flags()[field.name]
    if default is False and "action" not in arguments:
        group.add_argument(flag, dest=field.name, help=text, action="store_true")
        return
    if registry := field.metadata["registry"]:
        text = "; ".join(filter(None, [text, registry.help]))
        arguments = {"choices": registry} | arguments
    if default not in (None, "", ()):
        text += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
    if "action" not in arguments:
        arguments = {"type": str if default is None else type(default)} | arguments
    group.add_argument(flag, dest=field.name, help=text, **arguments)
