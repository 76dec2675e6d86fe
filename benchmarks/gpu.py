"""Check this project on a GPU: the tests that need one, then time, memory and perplexity. Under eight minutes.

make gpu
python benchmarks/gpu.py --output gpu.json --shapes LLaMA-7B OPT-1.3B --nsamples 128 --seqlen 2048

Neither internet nor text is needed: the weights are random, of published shapes, and the text is Python's own. What
runs is the command line of each family, streamed from disk and saved, after a warm-up that compiles kernels; the
textbook prunes the same weights on the same tokens in memory. Seconds of a shape with fewer layers than the model has
are multiplied up. Perplexities of random weights say only that nothing broke.
"""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from bench import LAYERS, SHAPES, machine
from textbook import prune_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datautils import calibration_samples
from mixgpt.app import pipeline
from mixgpt.app.report import table
from mixgpt.app.settings import PRESETS, Settings
from mixgpt.common.clock import Clock, peak_memory
from mixgpt.common.outputs import Kind, write
from mixgpt.evaluation.perplexity import perplexity

ROOT = Path(__file__).parent.parent
KIND = Kind("a file of this benchmark", rb'\{\s*"machine": ')
METHODS = {"SparseGPT": {"sparsity": 0.5}, "MixGPT": {"sparsity": 0.5} | PRESETS["mixgpt"],
           "best": {"sparsity": 0.5} | PRESETS["best"], "2:4": {"prunen": 2, "prunem": 4, "semi_structured": True}}
OURS = ("load", "save", "evaluation", "data", "W&B")  # parts of a run that the textbook does not have


@dataclass(frozen=True)
class Job:
    """What runs, on which device."""

    nsamples: int
    seqlen: int
    batch_size: int
    device: torch.device


def byte_tokenizer():
    """Return a tokenizer whose tokens are bytes, which needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model(name, folder, tokenizer):
    """Save a model of random weights. Returns (family, model, layers of the whole model)."""
    family, kind, config, layers = SHAPES[name]
    config = copy.deepcopy(config)
    if not name.startswith("LLaMA"):
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = kind(config).bfloat16().eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return family, model, layers


def run(family, folder, job, options):
    """Run the command line's main job. Returns its record."""
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    with tempfile.TemporaryDirectory(prefix="mixgpt") as place, contextlib.redirect_stdout(sys.stderr):
        return pipeline.run(family, Settings(
            str(folder), "builtin", eval=("builtin",), nsamples=job.nsamples, seqlen=job.seqlen, quiet=True,
            batch_size=job.batch_size, device=str(job.device), save=f"{place}/saved",
            sensitivity_file=f"{place}/traces.json" if "sensitivity" in options else None, **options))


def run_textbook(family, model, tokenizer, job):
    """Prune a copy by the published algorithm. Returns what a record says of seconds, memory and perplexity."""
    tokens, _ = calibration_samples("builtin", job.nsamples, job.seqlen, 0, tokenizer)
    tests, _ = pipeline.test_tokens("builtin", job.seqlen, tokenizer)
    pruned, clock = copy.deepcopy(model), Clock(job.device)
    prune_model(pruned, family, tokens, job.device, clock, sparsity=0.5)
    return {"seconds": dict(clock.seconds), "peak_memory": peak_memory(job.device), "sparsity": 0.5, "perplexity": {
        "textbook": {"builtin": perplexity(pruned, family, tests, job.batch_size, job.device)}}}


def measure(name, job):
    """Run all methods on one shape, after a warm-up. Yields (method, record, how many layers one stands for)."""
    tokenizer, warm = byte_tokenizer(), Job(job.batch_size, job.seqlen, job.batch_size, job.device)
    with tempfile.TemporaryDirectory(prefix="mixgpt") as folder:
        family, model, layers = make_model(name, folder, tokenizer)
        times = layers / len(family.layers_of(model))
        for method, options in METHODS.items():
            run(family, folder, warm, options)
            yield method, run(family, folder, job, options), times
        run_textbook(family, model, tokenizer, warm)
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.device)
        yield "textbook", run_textbook(family, model, tokenizer, job), times


def rows_of(results):
    """Return the rows of the table for the records of one shape, {method: (record, layers that one stands for)}."""
    rows, pruning = [], {}
    for method, (record, times) in results.items():
        parts = {part: times * value for part, value in record["seconds"].items() if part not in OURS}
        pruning[method] = sum(parts.values())
        *_, value = record["perplexity"].values()
        kernels = record.get("semi_structured", {})
        rows.append([method, f"{pruning[method]:.1f}", f"{times * record['seconds'].get('save', 0):.1f}",
                     f"{record['peak_memory'].get('device', record['peak_memory']['host']) / 1e9:.1f}",
                     f"{record['sparsity']:.2%}", f"{value['builtin']:.1f}",
                     f"{kernels['speed_up']:.2f}x" if "speed_up" in kernels else "-",
                     ", ".join(f"{part} {value:.1f}" for part, value in parts.items() if value >= 0.05)])
    for row in rows:
        row.insert(2, f"{pruning['textbook'] / pruning[row[0]]:.1f}x")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu.json", help="file for all records, as JSON")
    parser.add_argument("--shapes", nargs="*", default=["LLaMA-7B", "OPT-1.3B"], choices=SHAPES)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave out the tests marked gpu")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {device}: there is no CUDA device here")
    results = {"machine": machine(device)}
    print(results["machine"], flush=True)
    if arguments.tests:
        results["tests"] = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-q"], cwd=ROOT).returncode
    job = Job(arguments.nsamples, arguments.seqlen, arguments.batch_size, device)
    for name in arguments.shapes:
        found = {}
        for method, record, times in measure(name, job):
            found[method] = record, times
            results.setdefault(name, {})[method] = record
            write("--output", arguments.output, json.dumps(results, indent=1) + "\n", KIND)  # if it ends early
        print(f"\n{name}, bfloat16, {job.nsamples} sequences of {job.seqlen} tokens, "
              f"measured on {LAYERS if found['best'][1] > 1 else 'all'} layers\n")
        print(table(["method", "seconds", "ratio", "save", "GB", "sparsity", "perplexity", "2:4 kernels",
                     "seconds by part"], rows_of(found)), flush=True)
    return 1 if results.get("tests") else 0


if __name__ == "__main__":
    sys.exit(main())
