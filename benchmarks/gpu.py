"""Measure time, memory and perplexity on a GPU, in under eight minutes.

make gpu      # and the tests that need one
python benchmarks/gpu.py --output gpu.json --shapes LLaMA-7B OPT-1.3B --nsamples 128 --seqlen 2048

Neither internet nor text is needed: the weights are random, of published shapes, and the text is Python's own. What
runs is the command line of each family, streamed from disk and saved, after a warm-up that compiles kernels; the
textbook prunes the same weights on the same tokens in memory. Seconds of a shape with fewer layers than the model has
are multiplied up. Perplexities of random weights say only that nothing broke.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import semistructured
import torch
from bench import BATCH_SIZE, machine, prune
from scores import NOT_PRUNING
from small_models import train_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from mixgpt.app import pipeline
from mixgpt.app.cli import parse
from mixgpt.checkpoints import load
from mixgpt.common.errors import InputError
from mixgpt.common.progress import table
from mixgpt.datautils import calibration_samples, load_rows, test_tokens

SHAPES = {  # name: configuration, layers of the whole model
    "OPT-1.3B": (OPTConfig(hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_attention_heads=32,
                           num_hidden_layers=24, max_position_embeddings=2048), 24),
    "LLaMA-7B": (LlamaConfig(num_hidden_layers=2), 32),
    "LLaMA-13B": (LlamaConfig(hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=2),
                  40),
}
METHODS = {"SparseGPT": "--sparsity .5", "MixGPT": "--sparsity .5 --preset mixgpt",
           "best": "--sparsity .5 --preset best", "2:4": "--prunen 2 --prunem 4"}


def run(folder, method, nsamples, tests, arguments):
    """Run a method's command line. Returns its record, for 2:4 with what the kernels gain on test tokens (N, T)."""
    with tempfile.TemporaryDirectory(prefix="mixgpt") as place, contextlib.redirect_stdout(sys.stderr):
        words = [folder, "builtin", "--eval", "builtin", "--nsamples", nsamples, "--seqlen", arguments.seqlen,
                 "--batch-size", BATCH_SIZE, "--device", arguments.device, "--quiet", "--save",
                 f"{place}/saved", *METHODS[method].split()]
        words += ["--sensitivity-file", f"{place}/traces.json"] if method == "MixGPT" else []  # none from the cache
        record = pipeline.execute(parse("llama.py", list(map(str, words))))
        if method == "2:4":
            record["semi_structured"] = kernels(f"{place}/saved", tests, torch.device(arguments.device))
        return record


def kernels(saved, tests, device):
    """Return what the 2:4 kernels gain on a saved model, or why they cannot run."""
    model = load.open_model(saved, load.read_config(saved), "auto")
    try:
        semistructured.check_kernels(device, model.dtype)
    except InputError as error:
        return {"skipped": str(error)}
    return semistructured.compare(model, tests, BATCH_SIZE, device)


def measure(name, arguments):
    """Run all methods on one shape, each after a warm-up. Yields (method, record)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[name][0]).bfloat16().eval()
    tokenizer = train_tokenizer(load_rows("builtin", "train", None)[0][:100], 384)  # short tokens, so many of them
    device, seqlen, size = torch.device(arguments.device), arguments.seqlen, BATCH_SIZE
    tests, _ = test_tokens("builtin", seqlen, tokenizer)
    with tempfile.TemporaryDirectory(prefix="mixgpt") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for method in (*METHODS, "textbook"):
            for nsamples in (size, arguments.nsamples):
                tokens, _ = calibration_samples("builtin", nsamples, seqlen, 0, tokenizer)
                record = run(folder, method, nsamples, tests, arguments) if method in METHODS else prune(
                    method, model, tokens, tests, device, size)
            yield method, record


def rows_of(records, factor):
    """Return the rows of the table for the records of one shape, {method: record}. factor: of all seconds."""
    rows = []
    parts_of = {method: {part: factor * value for part, value in record["seconds"].items() if part not in NOT_PRUNING}
                for method, record in records.items()}
    pruning = {method: sum(parts.values()) for method, parts in parts_of.items()}
    for method, record in records.items():
        *_, figures = record["perplexity"].values()
        gain, memory = record.get("semi_structured", {}), record["peak_memory"]
        rows.append([method, f"{pruning[method]:.1f}", f"{pruning['textbook'] / pruning[method]:.1f}x",
                     f"{factor * record['seconds'].get('save', 0):.1f}",
                     f"{memory.get('device', memory['host']) / 1e9:.1f}", f"{record['sparsity']:.2%}",
                     f"{figures['builtin']:.1f}", f"{gain['speed_up']:.2f}x" if "speed_up" in gain else "-",
                     ", ".join(f"{part} {value:.1f}" for part, value in parts_of[method].items() if value >= 0.05)])
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu.json", help="file for all records, as JSON")
    parser.add_argument("--shapes", nargs="*", default=["LLaMA-7B", "OPT-1.3B"], choices=SHAPES)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: there is no CUDA device here")
    results = {"machine": machine(torch.device(arguments.device))}
    print(results["machine"], flush=True)
    for name in arguments.shapes:
        config, layers = SHAPES[name]
        records = results[name] = {}
        for method, record in measure(name, arguments):
            records[method] = record
            Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")  # if it ends early
        print(f"\n{name}, bfloat16, {arguments.nsamples} sequences of {arguments.seqlen} tokens, measured on "
              f"{config.num_hidden_layers} of {layers} layers\n")
        print(table(["method", "seconds", "ratio", "save", "GB", "sparsity", "perplexity", "2:4 kernels",
                     "seconds by part"], rows_of(records, layers / config.num_hidden_layers)), flush=True)


if __name__ == "__main__":
    main()
