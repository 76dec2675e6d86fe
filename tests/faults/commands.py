"""Arguments that a run refuses: empty, out of bounds, or at odds with each other."""

from faults.damage import Fault, nothing
from faults.traces import MIXED

PRUNED = "{root}/model builtin --sparsity .5 "
UNSET = "must not be empty; is a variable of the shell unset?"
MOST, MOST_SEED = 2**31 - 1, 2**64 - 1


def refused(options, message, command=PRUNED):
    return Fault(nothing, message, command + options)


def empty(flag, command=PRUNED):
    """An option whose value is an unset variable of the shell; commands are split at spaces, so it is written as =."""
    return refused(f"{flag}=", f'{flag} "": {UNSET}', command)


def bounded(flag, given, bound, command=PRUNED):
    return refused(f"{flag}={given}", f"{flag} {given}: must be at {bound}", command)


FAULTS = {
    "an empty --save": empty("--save"),
    "an empty --record": empty("--record"),
    "an empty --plot": empty("--plot", f"{MIXED} "),
    "an empty --sensitivity_file": empty("--sensitivity_file"),
    "an empty --data-dir": empty("--data-dir"),
    "an empty --tasks_dir": empty("--tasks_dir", PRUNED + "--tasks piqa "),
    "an empty --device": empty("--device"),
    "an empty --wandb_project": empty("--wandb_project", PRUNED + "--log_wandb "),
    "an empty --tasks": refused("--tasks=", "argument --tasks: is empty; give for example arc_challenge,hellaswag"),
    "an empty --eval": refused("--eval=", "argument --eval: invalid choice: '' (choose from …)"),
    "no test set of that name": refused("--eval wiki", "argument --eval: invalid choice: 'wiki' (choose from …)"),
    "a sparsity that is no number": bounded("--sparsity", "nan", "least 0 and below 1"),
    "an infinite sparsity": refused("--sparsity=1e400", "--sparsity inf: must be at least 0 and below 1"),
    "a negative sparsity": bounded("--sparsity", "-0.5", "least 0 and below 1"),
    "a sparsity in percent": bounded("--sparsity", "50", "least 0 and below 1"),
    "an alpha that is no number": refused("--alpha nan", "--alpha nan: must lie between 0 and 1"),
    "an infinite alpha": refused("--alpha inf", "--alpha inf: must lie between 0 and 1"),
    "a damping that is no number": refused("--percdamp nan", "--percdamp nan: must lie between 0 and 1"),
    "an infinite damping": refused("--percdamp 1e999", "--percdamp inf: must lie between 0 and 1"),
    "a negative first layer": bounded("--minlayer", -1, "least 0"),
    "a negative last layer": bounded("--maxlayer", -1, "least 0"),
    "layers beyond all numbers": bounded("--maxlayer", 10**20, f"most {MOST}"),
    "a negative seed": refused("--seed=-1", f"--seed -1: must be at least 0 and at most {MOST_SEED}"),
    "a seed of 65 bits": refused(f"--seed {2**64}", f"--seed {2**64}: must be at least 0 and at most {MOST_SEED}"),
    "a seed that is no number": refused("--seed 1e3", "argument --seed: invalid int value: '1e3'"),
    "a number of 5,000 digits": refused("--seed " + "9" * 5000, "argument --seed: invalid int value: '9…9'"),
    "blocks beyond all numbers": bounded("--blocksize", 10**12, f"most {MOST}"),
    "negative blocks": bounded("--blocksize", -128, "least 1"),
    "batches beyond all numbers": bounded("--batch-size", 10**20, f"most {MOST}"),
    "a limit beyond all numbers": bounded("--eval-limit", 10**20, f"most {MOST}"),
    "probes beyond all numbers": bounded("--nprobes", 10**12, f"most {MOST}"),
    "samples beyond all numbers": bounded("--nsamples", 10**12, f"most {MOST}"),
    "negative samples": bounded("--nsamples", -1, "least 1"),
    "n of n:m beyond all numbers": bounded("--prunem", 10**30, f"most {MOST}", "{root}/model builtin --prunen 2 "),
    "a negative n of n:m": bounded("--prunen", -2, "least 0", "{root}/model builtin --prunem 4 "),
    "grids beyond all numbers": refused(
        f"--wbits 4 --groupsize {10**20}", f"--groupsize {10**20}: must be at least 1, or -1 for a whole row"),
    "grids of a negative size": refused(
        "--wbits 4 --groupsize=-2", "--groupsize -2: must be at least 1, or -1 for a whole row"),
    "sequences beyond the model": refused(
        "--seqlen 1000000000", "--seqlen 1000000000: the model's limit is 128 tokens"),
    "samples beyond the memory": refused(
        f"--nsamples {10**9}", f"--nsamples {10**9}: sequences of 32 tokens take 512.0 GB, … GB of memory are free; "
                               "lower --nsamples or --seqlen"),
    "best without calibration": refused(
        "--preset best --gmp", "--preset best (--solver admm): needs calibration, --sparsity, --prunen or --wbits "
                               "without --gmp and --nearest"),
    "best with a saliency of its own": refused(
        "--preset best --saliency isc", "--saliency isc: --solver admm does not support it; must be obs or fisher"),
    "a model of a name that is too long": refused(
        "", "model " + "a" * 5000 + ": no such file or folder", "a" * 5000 + " builtin --sparsity .5"),
    "a file of a name that is too long": refused(
        "", "model /" + "a" * 5000 + ": no such file or folder", "/" + "a" * 5000 + " builtin --sparsity .5"),
    "data in a name that is too long": refused(
        "--data-dir " + "a" * 5000, "--data-dir " + "a" * 5000 + ": no such folder"),
}
