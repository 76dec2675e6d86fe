"""The main job, from the command line to the saved model: load, calibrate, prune, save, verify, evaluate, report."""

import argparse
import dataclasses
import platform
import sys
from dataclasses import dataclass

import datasets
import torch
import transformers

import checkpoint
from datautils import DATASETS, calibration_samples, test_tokens
from errors import InputError
from evaluate import logits, measure_sparsity, perplexity
from prune import Target, prune_magnitude, prune_sparsegpt, uniform_plan
from report import Clock, cost_line, peak_memory, perplexity_table, sparsity_table, total_sparsity

DEFAULT_SEQLEN = 2048
PROBE = 128  # tokens on which a saved model is compared with the one in memory


@dataclass(frozen=True)
class Settings:
    """The options of a run, named as on the command line. Raises InputError where their values cannot be used."""

    model: str
    dataset: str
    sparsity: float = 0.0
    prunen: int = 0
    prunem: int = 0
    gmp: bool = False
    blocksize: int = 128
    percdamp: float = 0.01
    true_sequential: bool = False
    minlayer: int = 0
    maxlayer: int = 1000
    prune_only: str = ""
    invert: bool = False
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    data_dir: str | None = None
    eval: tuple[str, ...] = ("wikitext2", "ptb", "c4")
    dense: bool = False
    batch_size: int = 4
    device: str | None = None
    dtype: str = "auto"
    save: str | None = None

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise InputError(f"--sparsity {self.sparsity:g}: must be at least 0 and below 1")
        if (self.prunen or self.prunem) and not 0 < self.prunen < self.prunem:
            raise InputError(f"--prunen {self.prunen} --prunem {self.prunem}: needs 0 < prunen < prunem, "
                             "for example --prunen 2 --prunem 4")
        if self.prunem and self.sparsity not in (0, self.prunen / self.prunem):
            raise InputError(f"--sparsity {self.sparsity:g}: contradicts --prunen {self.prunen} "
                             f"--prunem {self.prunem}; leave it out")
        if self.gmp and not self.prunes:
            raise InputError("--gmp: needs --sparsity or --prunen and --prunem")
        if not 0 <= self.percdamp <= 1:
            raise InputError(f"--percdamp {self.percdamp:g}: must lie between 0 and 1")
        for name, least in {"nsamples": 1, "seqlen": 2, "batch_size": 1, "blocksize": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")

    @property
    def prunes(self):
        return self.sparsity > 0 or self.prunem > 0

    @property
    def method(self):
        return "magnitude" if self.gmp else "SparseGPT"

    @property
    def target(self):
        if self.prunem:
            return Target(self.prunen / self.prunem, self.prunen, self.prunem)
        return Target(self.sparsity)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(family, argv=None):
    """Read the command line of a family script. Returns `Settings`; exits with status 2 on what it cannot read."""
    parser = _Parser(
        prog=family.script, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prune a language model in one shot and report its perplexity.\n"
                    "Without --sparsity or --prunen/--prunem: the perplexity of the dense model.")
    default = {field.name: field.default for field in dataclasses.fields(Settings)}

    def option(group, flag, text, **arguments):
        name = flag.lstrip("-").replace("-", "_")
        value = " ".join(default[name]) if isinstance(default[name], tuple) else default[name]
        if value is False:
            arguments["action"] = "store_true"
        shown = "" if value is None or value is False or value == "" else f" (default: {value})"
        group.add_argument(flag, dest=name, help=text + shown, **arguments)

    parser.add_argument("model", help="hub id, local folder or .gguf file")
    parser.add_argument("dataset", choices=DATASETS, help="calibration text: %(choices)s; builtin is CPython's own "
                                                          "reference manual and needs no download")
    group = parser.add_argument_group("what to prune")
    option(group, "--sparsity", "fraction of the weights of every matrix to prune, 0 to below 1", type=float)
    option(group, "--prunen", "n of n:m, weights pruned in every group", type=int)
    option(group, "--prunem", "m of n:m, consecutive weights of a row in a group", type=int)
    option(group, "--minlayer", "first layer to prune", type=int)
    option(group, "--maxlayer", "first layer not to prune any more", type=int)
    option(group, "--prune_only", "prune only matrices whose name contains this, such as fc1 or mlp")
    option(group, "--invert", "prune what the three options above do not select")
    group = parser.add_argument_group("how to prune")
    option(group, "--gmp", "by magnitude, without calibration (the baseline)")
    option(group, "--blocksize", "columns between two updates of the rest of the matrix", type=int)
    option(group, "--percdamp", "damping of the Hessian, as a fraction of its mean diagonal", type=float)
    option(group, "--true-sequential", "calibrate each linear on inputs from the pruned linears before it in its layer")
    group = parser.add_argument_group("calibration")
    option(group, "--nsamples", "sequences", type=int)
    option(group, "--seqlen", "tokens in a sequence, also in evaluation (default: 2048, or the model's limit "
                              "where that is lower)", type=int)
    option(group, "--seed", "of the choice of sequences", type=int)
    option(group, "--data-dir", "folder with local copies of the datasets, instead of the hub")
    group = parser.add_argument_group("evaluation")
    option(group, "--eval", "test sets to report perplexity on; none: --eval without a name", nargs="*",
           choices=DATASETS)
    option(group, "--dense", "report the dense model's perplexity too")
    group = parser.add_argument_group("where and how it runs")
    option(group, "--batch-size", "sequences that run together; changes speed and memory only", type=int)
    option(group, "--device", "cpu, cuda or cuda:N (default: cuda where there is one)")
    option(group, "--dtype", "of the weights in memory and saved; auto: as stored, but float32 for float16 on a CPU",
           choices=["auto", "float32", "bfloat16", "float16"])
    group = parser.add_argument_group("output")
    option(group, "--save", "new folder for weights, tokenizer, config and mixgpt.json, verified by loading it again")
    return Settings(**vars(parser.parse_args(argv)))


def main(family, argv=None):
    """Run a family script. Returns the exit status: 0, or 2 after one line on stderr about unusable input."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        run(family, parse(family, argv))
    except InputError as error:
        print(f"{family.script}: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(family, settings):
    """Do the main job and print its report. Returns the record of the run, as saved in mixgpt.json.

    Everything that can be refused is refused before the weights are loaded.
    """
    device = _device(settings.device)
    clock = Clock(device)
    with clock.part("load"):
        config = checkpoint.load_config(settings.model, family)
        seqlen = _seqlen(settings.seqlen, config)
        dtype = _dtype(settings.dtype, config, device)
        skeleton = checkpoint.skeleton(config)
        plan = uniform_plan(skeleton, family, settings.target, settings.minlayer, settings.maxlayer,
                            settings.prune_only, settings.invert) if settings.prunes else {}
        if settings.save:
            itemsize = 4 if dtype == "auto" else dtype.itemsize
            checkpoint.check_save(settings.save, itemsize * sum(p.numel() for p in skeleton.parameters()))
        tokenizer = checkpoint.load_tokenizer(settings.model)
    with clock.part("data"):
        calibration, tests, sources = _tokens(settings, seqlen, tokenizer, config.vocab_size)
    with clock.part("load"):
        model = checkpoint.load_model(settings.model, dtype)
    print(_heading(model, family, settings, plan, calibration, seqlen, device), flush=True)

    def evaluate():
        with clock.part("evaluation"):
            return {name: perplexity(model, family, tokens, settings.batch_size, device, name)
                    for name, tokens in tests.items()}

    perplexities = {}
    if settings.dense or not plan:
        perplexities["dense"] = evaluate()
    outcomes = {}
    if plan and settings.gmp:
        with clock.part("magnitude"):
            prune_magnitude(model, family, plan, device)
    elif plan:
        outcomes = prune_sparsegpt(
            model, family, plan, calibration, blocksize=settings.blocksize, percdamp=settings.percdamp,
            true_sequential=settings.true_sequential, batch_size=settings.batch_size, device=device, clock=clock)
    matrices = measure_sparsity(model, family)
    record = _record(settings, seqlen, model.dtype, device, sources, matrices, outcomes)
    if settings.save:
        with clock.part("save"):
            checkpoint.save(settings.save, model, tokenizer, record)
            _verify(settings.save, model, family, matrices, _probe(tests, calibration, config.vocab_size), device)
    if plan:
        perplexities[settings.method] = evaluate()
    record |= {"perplexity": perplexities, "seconds": dict(clock.seconds), "peak_memory": peak_memory(device)}
    if settings.save:
        checkpoint.write_record(settings.save, record)
    print(_result(settings, matrices, outcomes, perplexities, record))
    return record


def _device(name):
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"--device {name}: there are {count} CUDA devices here; use --device cpu" if not count else
                         f"--device {name}: there are {count} CUDA devices here, cuda:0 to cuda:{count - 1}")
    return device


def _seqlen(seqlen, config):
    limit = getattr(config, "max_position_embeddings", None)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit and seqlen > limit:
        raise InputError(f"--seqlen {seqlen}: the model's limit is {limit} tokens")
    return seqlen


def _dtype(name, config, device):
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu" and config.dtype in (torch.float16, "float16"):
        return torch.float32  # float16 on a CPU is slow and overflows
    return "auto"


def _tokens(settings, seqlen, tokenizer, vocab_size):
    """Return calibration tokens (N, T) or None, {test set: tokens (n, T)} and where the texts come from."""
    calibration, tests, sources = None, {}, {}
    if settings.prunes and not settings.gmp:
        calibration, sources["calibration"] = calibration_samples(
            settings.dataset, settings.nsamples, seqlen, settings.seed, tokenizer, settings.data_dir)
    for name in settings.eval:
        tests[name], sources[name] = test_tokens(name, seqlen, tokenizer, settings.data_dir)
    for tokens in ([calibration] if calibration is not None else []) + list(tests.values()):
        if tokens.max() >= vocab_size:
            raise InputError(f"model {settings.model}: its tokenizer gives token {tokens.max()}, its vocabulary "
                             f"has {vocab_size}")
    return calibration, tests, sources


def _probe(tests, calibration, vocab_size):
    for tokens in (*tests.values(), calibration):
        if tokens is not None:
            return tokens[:1, :PROBE]
    return torch.arange(PROBE)[None] % vocab_size


def _verify(folder, model, family, matrices, probe, device):
    """Load what was saved and compare it with the model in memory: zeros of every matrix, logits of the probe."""
    reloaded = checkpoint.load_model(folder, "auto")
    if measure_sparsity(reloaded, family) != matrices:
        raise InputError(f"--save {folder}: the zeros of the saved weights differ from those in memory")
    if not torch.equal(logits(reloaded, family, probe, 1, device), logits(model, family, probe, 1, device)):
        raise InputError(f"--save {folder}: the logits of the saved model differ from those in memory")


def _record(settings, seqlen, dtype, device, sources, matrices, outcomes):
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    rows = []
    for m in matrices:
        row = {"layer": m.layer, "name": m.name, "shape": list(m.shape), "sparsity": m.zeros / m.numel}
        if outcome := outcomes.get((m.layer, m.name)):
            row |= dataclasses.asdict(outcome)
        rows.append(row)
    versions = {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    return {"settings": dataclasses.asdict(settings) | {"seqlen": seqlen, "dtype": str(dtype).removeprefix("torch."),
                                                        "device": str(device)},
            "device_name": device_name, "versions": versions, "data": sources,
            "sparsity": total_sparsity(matrices), "matrices": rows}


def _heading(model, family, settings, plan, calibration, seqlen, device):
    parameters = sum(p.numel() for p in model.parameters())
    lines = [f"model    {settings.model}: {type(model).__name__}, {len(family.layers_of(model))} layers, "
             f"{parameters:,} parameters, {str(model.dtype).removeprefix('torch.')}, on {device}"]
    if plan:
        how = f"{settings.prunen}:{settings.prunem}" if settings.prunem else f"{settings.sparsity:.4g} of the weights"
        details = "" if settings.gmp else f", blocksize {settings.blocksize}, percdamp {settings.percdamp:g}" + (
            ", true-sequential" if settings.true_sequential else "")
        lines.append(f"pruning  {settings.method}, {how} in each of {len(plan)} matrices{details}")
    if calibration is not None:
        lines.append(f"data     {settings.dataset}: {len(calibration)} sequences of {seqlen} tokens, "
                     f"seed {settings.seed}, batches of {settings.batch_size}")
    return "\n".join(lines)


def _result(settings, matrices, outcomes, perplexities, record):
    parts = [sparsity_table(matrices, outcomes)] if settings.prunes else []
    if settings.eval:
        parts.append(perplexity_table(perplexities))
    parts.append(cost_line(record["seconds"], record["peak_memory"]))
    if settings.save:
        parts.append(f"saved in {settings.save}, loaded again and found equal")
    return "\n" + "\n\n".join(parts)
