"""The options of a run, their validation and help. Nothing here imports PyTorch."""

import dataclasses
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixgpt.common.choices import ALLOCATIONS, ESTIMATORS, FORMATS, GRIDS, SALIENCIES, SOLVERS, Allocation, Registry
from mixgpt.common.errors import InputError
from mixgpt.common.files import check_outputs
from mixgpt.common.texts import check_texts, hub_copies, shares_of

if TYPE_CHECKING:
    from mixgpt.quant import Scheme

WBITS = (2, 3, 4, 8, 16)  # Weights of 16 bits are not quantized.
IN_MEMORY = "text in memory"  # This is the dataset if the caller holds the calibration text.
BOS = {"each": "BOS at the start of each sequence", "once": "BOS at the start of each text", "never": "no BOS"}
PRESETS = {  # Explicit flags override them.
    "sparsegpt": {"sparsity_way": "uniform", "saliency": "obs", "solver": "obs", "target": "layer"},
    "mixgpt": {"sparsity_way": "weight-level", "sensitivity": "fisher", "saliency": "isc", "solver": "obs",
               "target": "layer"},
    "best": {"sparsity_way": "global", "alpha": 0.15, "saliency": "fisher", "solver": "admm", "target": "dense",
             "rotate": True, "percdamp": 0.1, "extra": 0.5, "distill": 0.5},
}
WITH_OWN = "c4:0.5,self:0.5"  # This is what best calibrates on in place of C4, which may lack what a model is made for.
NEEDS = {  # These flags make properties of Settings true; others are flags themselves.
    "prunes": "--sparsity or --prunen and --prunem",
    "quantizes": f"--wbits {', '.join(map(str, WBITS[:-1]))}",
    "compresses": "--sparsity, --prunen and --prunem, or --wbits",
    "calibrates": "calibration, --sparsity, --prunen or --wbits without --gmp and --nearest",
}


def recipe(preset: str | None = None, prunem: int = 0, mask_from: str | None = None, wbits: int = 16,
           groupsize: int = -1, sym: bool = False, effort: float = 1.0, **_: object) -> dict[str, Any]:
    """Return the options of a preset, for n:m if prunem is not 0, and for grids of wbits bits, a groupsize and sym.

    In n:m all matrices and rows have one sparsity, and given masks have theirs, so best needs no gradients, and has
    time for more text. Grids need more text in the Hessians, and their scales learn from less. They are codebooks
    unless they have 8 bits or sym is set, for engines that read even grids only. Columns are quantized in the order of
    activation unless their groups would have to be stored.
    effort: of best, as a multiple of its further text; the Hessians get its root where they start with more.
    """
    options: dict[str, Any] = dict(PRESETS.get(preset, {}))
    if preset == "best" and (prunem or mask_from):
        options |= {"sparsity_way": "uniform", "saliency": "obs", "extra": 1.0, "rotate": not mask_from}
    if preset == "best" and wbits < 16:
        options |= {"mse": True, "extra": 1.0} | ({"act_order": True} if groupsize == -1 else {})
        options |= {"distill": 0.375} if effort <= 1 else {}
        options |= {"grid": "codebook"} if wbits <= 4 and not sym else {}
    if preset == "best":
        options["extra"] *= effort ** (0.5 if prunem or mask_from or wbits < 16 else 1)
        options["distill"] *= effort
    return options


# What an option affects decides whether it must match for --resume, and whether plots tell its values apart.
RESULT = "result"  # The result differs: it must match, and plots tell it apart.
METHOD = "method"  # It must match, but plots show it as method, sparsity or range, or it changes rounding alone.
EVALUATION = "evaluation"  # What is reported differs: it must match once the run has ended, and plots tell it apart.
REPORT = "report"  # How much is reported, or how it is stored, differs: it must match once the run has ended.
FREE = "free"  # It may differ.


def option(default: Any, effect: str, help: str, *, group: str | None = None, choices: Collection | None = None,
           between: tuple[float, ...] | None = None, needs: tuple[str, ...] = (), aliases: tuple[str, ...] = (),
           **arguments: Any) -> Any:
    """Describe a field of `Settings`.

    effect: one of the above. group: the option group that starts with it. choices: its values, or their `Registry`.
    between: the least and the greatest number. needs: the properties of Settings without which only the default makes
    sense. aliases: further names of the flag. arguments: further ones of argparse.
    """
    return dataclasses.field(default=default, metadata={
        "effect": effect, "help": help, "group": group, "choices": choices, "between": between, "needs": needs,
        "aliases": aliases, "arguments": arguments})


@dataclass(frozen=True, init=False)
class Settings:
    """The options of a run: those given, else the preset's, else the defaults. Raises InputError for invalid values."""

    model: str = option(None, FREE, "hub id, local folder or .gguf file")  # The identity of a run has its weights.
    dataset: str | None = option(  # It is None where nothing is calibrated.
        None, RESULT, "calibration text, by name, as a file or folder, or a mixture such as c4:0.7,my.jsonl:0.3; "
        "with --preset best c4 stands for c4:0.5,self:0.5, and c4:1 for C4 alone")

    sparsity: float = option(0.0, METHOD, "fraction of the weights to prune, below 1", group="what to prune")
    prunen: int = option(0, METHOD, "n of n:m: weights to prune in every group", between=(0,))
    prunem: int = option(0, METHOD, "m of n:m: consecutive weights of a row in a group", between=(0,))
    minlayer: int = option(0, RESULT, "first layer to prune or quantize", between=(0,))
    maxlayer: int = option(1000, RESULT, "layer to stop before", between=(0,))
    prune_only: str = option("", RESULT, "only matrices whose name contains this, such as fc1 or mlp")
    invert: bool = option(False, RESULT, "all matrices except those selected by the three options above")
    experts: float = option(0.0, METHOD, "fraction of each layer's experts to remove before pruning, those of least "
        "REAP score: mean router weight times norm of the output", between=(0, 1))

    preset: str | None = option(None, FREE,
        "a complete recipe: sparsegpt, mixgpt (the paper's, with sensitivities by fisher) or best (lowest perplexity, "
        "trains at the end); flags given beside it take precedence", group="recipe", choices=tuple(PRESETS),
        needs=("prunes",))
    effort: float = option(1.0, METHOD, "time that best may take: multiplies its --distill and the number of steps, "
        "and its --extra (with n:m or --wbits, by its square root)", between=(0.1, 100))

    sparsity_way: str = option("uniform", METHOD, "how to distribute sparsity over matrices",
        group="sparsity allocation", choices=ALLOCATIONS, needs=("prunes",))
    alpha: float = option(0.1, RESULT, "largest deviation of a matrix from the overall sparsity, before all shift "
        "alike to meet it", between=(0, 1))
    sensitivity: str = option("hutchinson", METHOD, "sensitivity estimator", choices=ESTIMATORS)
    nprobes: int = option(1, RESULT, "random probes (with fisher: sampled labels) per calibration sequence",
        between=(1,))
    sensitivity_file: str | None = option(None, FREE, "JSON file of sensitivities: read if it exists, else computed "
        "and written (default: cached in ~/.cache/mixgpt by model, data, seed and settings)")

    gmp: bool = option(False, METHOD, "magnitude pruning without calibration (the baseline)", group="pruning",
        needs=("compresses",), aliases=("--magnitude",))
    solver: str = option("obs", METHOD, "pruning solver", choices=SOLVERS, needs=("calibrates", "prunes"))
    target: str = option("layer", METHOD,
        "what outputs of a pruned matrix are fitted to; layer: the dense matrix's on the same inputs; dense: the mean "
        "of these and the dense model's, plus half the error of the hidden states they are added to",
        choices=("layer", "dense"), needs=("calibrates",))
    rotate: bool = option(False, METHOD, "first rotate the heads of attention so that pruning keeps more of them; the "
        "dense model computes the same", needs=("calibrates", "prunes"))
    mask_from: str | None = option(None, RESULT, "model with the zeros to take, a folder or hub id; the weights kept "
        "are fitted by --solver admm", needs=("calibrates", "prunes"))
    saliency: str = option("obs", METHOD, "score by which weights are ranked", choices=SALIENCIES)
    blocksize: int = option(128, RESULT, "columns whose weights to prune are chosen at once", between=(1,))
    percdamp: float = option(0.01, RESULT, "damping of the Hessian, a fraction of its mean diagonal", between=(0, 1))
    true_sequential: bool = option(True, RESULT, "calibrate each linear on the outputs of the pruned linears before it "
        "in its layer; otherwise all linears of a layer on the unpruned layer")

    wbits: int = option(16, METHOD, "bits of the kept weights, quantized by GPTQ in the same pass; 16: not quantized",
        group="quantization", choices=WBITS)
    grid: str = option("uniform", METHOD, "values to which weights are rounded", choices=GRIDS, needs=("quantizes",))
    groupsize: int = option(-1, RESULT, "consecutive weights of a row that share a scale and zero point; -1: all",
        between=(-1,), needs=("quantizes",))
    sym: bool = option(False, RESULT, "symmetric grids; otherwise from the minimum to the maximum of the weights",
        needs=("quantizes",))
    mse: bool = option(False, RESULT, "search the range of each grid for the least error on the calibration inputs",
        needs=("quantizes", "calibrates"))
    act_order: bool = option(False, RESULT,
        "process columns in order of decreasing Hessian diagonal; groups of n:m stay whole", needs=("calibrates",))
    nearest: bool = option(False, METHOD, "round to nearest without calibration (the baseline)", needs=("quantizes",))

    nsamples: int = option(128, RESULT, "calibration sequences", group="calibration", between=(1,))
    extra: float = option(0.0, RESULT, "further sequences for the Hessians alone, as a multiple of --nsamples",
        between=(0, 100), needs=("calibrates",))
    distill: float = option(0.0, RESULT,
        "further sequences for distillation, likewise: at the end the kept weights, or with --wbits the scales of "
        "their grids, are trained on the dense model's predictions and the next tokens", between=(0, 100),
        needs=("calibrates",))
    seqlen: int | None = option(None, RESULT, "tokens per sequence (default: 2048, or the model's limit if lower)",
        between=(2,), type=int)
    bos: str = option("auto", RESULT,
        "where the token for the beginning of a text stands; each: at the start of each sequence, in place of its "
        "first token; once: of each text; auto: each for models that need it (Gemma), else as the tokenizer does",
        choices=("auto", *BOS))
    seed: int = option(0, METHOD, "random seed for sequences, probes and sampled labels", between=(0, 2**64 - 1))
    data_dir: str | None = option(None, FREE, "folder with local copies of the datasets, used instead of the hub")

    eval: tuple[str, ...] = option(("wikitext2", "ptb", "c4"), REPORT, "test sets for perplexity, by name, or files or "
        "folders of text; --eval without a name: none; if the dataset is builtin, so is the default",
        group="evaluation", nargs="*", type=str, metavar="TEXT")
    eval_limit: int | None = option(None, EVALUATION,
        "evaluate only the first sequences of each test set (default: all)", between=(1,), type=int)
    dense: bool = option(False, REPORT, "also evaluate the dense model")
    tasks: tuple[str, ...] = option((), REPORT,
        "lm-eval tasks, separated by commas, such as arc_challenge,piqa; needs mixgpt[eval]", type=str)
    tasks_dir: str | None = option(None, FREE, "folder with further tasks, as .yaml files of lm-eval", needs=("tasks",))

    batch_size: int = option(2, METHOD,
        "sequences per forward pass; affects speed, memory and, by rounding, results", group="execution", between=(1,))
    device: object = option(None, FREE, "cpu, cuda or cuda:N (default: cuda if available)")  # It may be a torch.device.
    dtype: str = option("auto", RESULT, "dtype of the weights in memory and on disk; auto: as stored, but in memory "
        "float32 where the device is faster in it", choices=("auto", "float32", "bfloat16", "float16"))

    save: str | None = option(None, FREE,
        "new folder for the model and mixgpt.json; reloaded and compared after writing", group="output")
    save_format: str = option("dense", REPORT, "format of the saved weights", choices=FORMATS, needs=("save",))
    resume: bool = option(False, FREE, "continue the interrupted run in the folder of --save", needs=("save",))
    overwrite: bool = option(False, FREE, "replace the files of --record and --plot, and the model in --save")
    plot: str | None = option(None, FREE, "figure of sparsities and, if matrices are ranked, sensitivities by layer "
        "and kind (.png, .pdf, .svg)", needs=("compresses",))
    record: str | None = option(None, FREE,
        "JSON file of settings, versions, every matrix and perplexities, as mixgpt.json in --save; for results.py")
    log_wandb: bool = option(False, FREE, "log to Weights & Biases during the run (after wandb login)")
    wandb_project: str | None = option(None, FREE, "W&B project (default: WANDB_PROJECT)", needs=("log_wandb",))
    wandb_name: str | None = option(None, FREE, "W&B run name (default: WANDB_NAME)", needs=("log_wandb",))
    wandb_group: str | None = option(None, FREE, "W&B run group (default: WANDB_RUN_GROUP)", needs=("log_wandb",))
    quiet: bool = option(False, FREE, "print only results and warnings")
    dry_run: bool = option(False, FREE, "check everything, say what memory, disk and time the run takes, and end")
    device_memory: str | None = option(None, FREE, "memory of a GPU that is not here, such as 24GB, for --dry-run",
        needs=("dry_run",))

    def __init__(self, model: str, dataset: str | None = None, **options: Any) -> None:
        fields = {field.name: field for field in dataclasses.fields(self)}
        if unknown := options.keys() - fields.keys():
            raise TypeError(f"no option is called {', '.join(sorted(unknown))}")
        given = {"model": model, "dataset": dataset} | options
        given = {name: _converted(fields[name], value) for name, value in given.items()}
        if given.get("preset") == "best" and dataset == "c4" and given.get("nsamples") != 1:
            given["dataset"] = WITH_OWN  # c4:1 is C4 alone.
        preset, known = recipe(**given), {"eval": ("builtin",)} if dataset == "builtin" else {}
        for name, field in fields.items():
            object.__setattr__(self, name, (known | preset | given).get(name, field.default))  # The class is frozen.
        try:
            self._check_values()
            self._check_combinations()
        except InputError as error:
            refused, _, reason = str(error).partition(": ")
            if refused.split()[0] in (flag_of(name) for name in preset.keys() - given.keys()):
                raise InputError(f"--preset {self.preset} ({refused}): {reason}") from error
            raise

    def _check_values(self) -> None:
        for field in dataclasses.fields(self):
            value, metadata, flag = getattr(self, field.name), field.metadata, flag_of(field.name)
            if isinstance(value, str) and not value.strip() and field.default != "":
                raise InputError(f'{flag} "{value}": must not be empty')
            if value == field.default:
                continue
            if (choices := metadata["choices"]) and value not in choices:
                raise InputError(f"{flag} {value}: must be one of {', '.join(map(str, choices))}")
            if metadata["between"]:
                check_between(flag, value, *metadata["between"])
            if missing := [need for need in metadata["needs"] if not getattr(self, need)]:
                given = "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"
                raise InputError(f"{flag}{given}: needs {NEEDS.get(missing[0], flag_of(missing[0]))}")
            if reason := isinstance(choices, Registry) and choices[value].refuses(self):
                raise InputError(f"{flag} {value}: {reason}")

    def _check_combinations(self) -> None:
        n, m, groupsize, solver = self.prunen, self.prunem, self.groupsize, SOLVERS[self.solver]
        if not 0 <= self.sparsity < 1:
            raise InputError(f"--sparsity {self.sparsity:g}: must be at least 0 and below 1")
        if (n or m) and not 0 < n < m:
            raise InputError(f"--prunen {n} --prunem {m}: needs 0 < prunen < prunem, for example --prunen 2 --prunem 4")
        if m and self.sparsity not in (0, n / m):
            raise InputError(f"--sparsity {self.sparsity:g}: contradicts --prunen {n} --prunem {m}; leave it out")
        if self.effort != 1 and self.preset != "best":
            raise InputError(f"--effort {self.effort:g}: needs --preset best")
        if groupsize == 0:
            raise InputError("--groupsize 0: must be at least 1, or -1 for a whole row")
        if self.nearest and self.prunes and not self.gmp:
            raise InputError("--nearest: rounds without calibration; with --sparsity or --prunen it needs --gmp")
        if m and groupsize > 0 and m % groupsize and groupsize % m:
            raise InputError(f"--groupsize {groupsize} --prunem {m}: one must divide the other")
        if self.act_order and 0 < groupsize < m:
            raise InputError(f"--act-order --groupsize {groupsize}: must be at least {m}, as the {m} columns of an n:m "
                             "group stay together")
        if solver.saliencies is not None and self.saliency not in solver.saliencies:
            raise InputError(f"--saliency {self.saliency}: --solver {self.solver} does not support it; must be "
                             f"{' or '.join(solver.saliencies)}")
        changes = {"--solver obs": self.solver == "obs", "--rotate": self.rotate, "--experts": self.experts > 0,
                   f"--sparsity-way {self.sparsity_way}": not self.allocation.even}
        if self.mask_from and (flag := next((flag for flag, holds in changes.items() if holds), None)):
            raise InputError(f"{flag}: not with --mask-from, which takes the zeros as they are and needs --solver admm")
        if self.quantizes and not solver.quantizes:
            raise InputError(f"--wbits {self.wbits}: --solver {self.solver} does not quantize; must be "
                             f"{' or '.join(name for name, other in SOLVERS.items() if other.quantizes)}")
        if self.dataset is None and self.needs_calibration:
            raise InputError("dataset: is needed for calibration; give the name of a text, or a file or folder")
        check_texts(None if self.dataset == IN_MEMORY else self.dataset, self.eval,
                    self.nsamples * self.needs_calibration)

    @property
    def prunes(self) -> bool:
        return self.sparsity > 0 or self.prunem > 0

    @property
    def quantizes(self) -> bool:
        return self.wbits < 16

    @property
    def quantizes_last(self) -> bool:
        """Whether weights are quantized after distillation, which takes longer than scales that are trained then."""
        return self.prunes and self.quantizes and self.distill > 0 and self.effort > 1

    @property
    def scheme(self) -> "Scheme | None":
        """The quant.Scheme of the weights, None without quantization."""
        return GRIDS[self.grid].load()(self.wbits, self.groupsize, self.sym, self.mse) if self.quantizes else None

    @property
    def compresses(self) -> bool:
        return self.prunes or self.quantizes

    @property
    def calibrates(self) -> bool:
        """Whether weights are pruned or quantized on calibration sequences."""
        return self.compresses and not (self.gmp or self.nearest)

    @property
    def allocation(self) -> Allocation:
        """The `Allocation` of sparsity: uniform if ranks move n of n:m by less than 1 in all, so that it stays."""
        chosen = ALLOCATIONS[self.sparsity_way]
        return ALLOCATIONS["uniform"] if chosen.ranks and self.prunem and 2 * self.alpha * self.prunem < 1 else chosen

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients of the loss w.r.t. matrix outputs are needed."""
        return self.allocation.by_loss or SALIENCIES[self.saliency].weighs_rows and self.calibrates

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration sequences are drawn."""
        return self.allocation.ranks or self.needs_gradients or self.calibrates or self.experts > 0

    @property
    def extra_counts(self) -> tuple[int, int]:
        """The numbers of further sequences for the Hessians, and for distillation."""
        hessians, distilled = (math.ceil(round(share * self.nsamples, 6)) for share in (self.extra, self.distill))
        return hessians, distilled

    def method(self, distilled: bool = True) -> str:
        """Return the method's name in tables and records; MixGPT is the paper's: isc saliency and mixed sparsity.

        distilled: whether the model has been, or can be, distilled if that is asked for.
        """
        fewer = f", {100 * self.experts:g}% fewer experts" if self.experts else ""
        if not self.compresses:
            return f"REAP{fewer}" if fewer else "dense"
        bits = f"{self.wbits} bit" + ("" if self.grid == "uniform" else f" {self.grid}")
        mixgpt = self.allocation.ranks and self.saliency == "isc" and self.solver == "obs"
        if self.prunes:
            name = "magnitude" if self.gmp else "MixGPT" if mixgpt else SOLVERS.title(self.solver)
        else:
            name = f"{'GPTQ' if self.calibrates else 'nearest'} {bits}"
        by = f" by {ESTIMATORS.title(self.sensitivity)}" if self.allocation.ranks else ""
        choices = {ALLOCATIONS.title(self.sparsity_way) + by: not self.allocation.even,
                   SALIENCIES.title(self.saliency): self.prunes and self.saliency != "obs" and not (self.gmp or mixgpt),
                   "given masks": self.mask_from is not None,
                   "dense target": self.target == "dense", "rotated heads": self.rotate, "more text": self.extra > 0,
                   "distilled" if distilled else "not distilled": self.distill > 0,
                   f"effort {self.effort:g}": self.effort != 1}
        chosen = ", ".join(choice for choice, is_chosen in choices.items() if is_chosen)
        bits = f" + {bits}" if self.prunes and self.quantizes else ""
        return name + (f" ({chosen})" if chosen else "") + bits + fewer

    def check_paths(self) -> None:
        """Raise InputError if a given file or folder does not exist, or a file to be written may not be written."""
        check_model("model", self.model)
        check_model("--mask-from", self.mask_from or "")
        texts = () if self.dataset in (IN_MEMORY, None) else shares_of(self.dataset)
        if self.data_dir:
            hub_copies(self.data_dir, train=texts if self.needs_calibration else (), test=self.eval)
        paths = {"--plot": self.plot, "--record": self.record}
        if not os.path.isfile(self.sensitivity_file or ""):  # An existing one is read.
            paths["--sensitivity-file"] = self.sensitivity_file
        paths = {flag: path for flag, path in paths.items() if path}
        check_outputs(paths, self.overwrite or self.resume)
        reads = (self.model, self.mask_from, *texts, *self.eval, self.data_dir, self.sensitivity_file, self.tasks_dir)
        for path in (*paths.values(), *filter(os.path.exists, filter(None, reads))):
            # With --overwrite the run would remove what it reads.
            if self.save and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.save)):
                raise InputError(f"--save {self.save}: holds {path}, which this run uses; name another folder")


def _converted(field: dataclasses.Field, value: Any) -> Any:
    """Return the value of a field as Python may give it in the field's type. Raises InputError for others."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's numbers count.
    value = str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value
    value = os.path.expanduser(value) if isinstance(value, (str, Path)) else value
    if isinstance(field.default, tuple):  # A text separates names by commas or blanks.
        names = value.replace(",", " ").split() if isinstance(value, str) else map(str, value or ())
        if not (names := tuple(dict.fromkeys(map(os.path.expanduser, names)))) and isinstance(value, str):
            raise InputError(f'{flag_of(field.name)} "{value}": must not be empty')
        return names
    kind: Any = field.type
    if not isinstance(value, float | int if kind is float else kind):
        raise InputError(f"{flag_of(field.name)} {value!r}: must be {getattr(kind, '__name__', kind)}, not "
                         f"{type(value).__name__}")
    return value


def flag_of(name: str) -> str:
    """Return the flag of a field of Settings, or its name if it is positional."""
    return name if name in ("model", "dataset") else f"--{name.replace('_', '-')}"


def check_between(flag: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise InputError for a number outside of [least, most]."""
    if not least <= value <= most:
        bounds = f"must be at least {least}" if most == math.inf else f"must lie between {least} and {most}"
        raise InputError(f"{flag} {value:g}: {bounds}")


def check_model(flag: str, name: str) -> None:
    """Raise InputError for a name that cannot be a hub id and is not here."""
    if (name.startswith(("/", ".", "~")) or name.endswith(".gguf")) and not os.path.exists(name):
        raise InputError(f"{flag} {name}: no such file or folder")


def having_effect(*effects: str) -> list[str]:
    """Return the names of the fields of Settings whose effect is one of these."""
    return [field.name for field in dataclasses.fields(Settings) if field.metadata["effect"] in effects]
