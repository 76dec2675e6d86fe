"""Time this project against the textbook in one process, on the same weights, tokens, dtype and device.

python benchmarks/bench.py matrices      # single matrices, random
python benchmarks/bench.py model FILE --seqlen 512 --nsamples 32
"""

import argparse
import copy
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from textbook import Textbook, prune_model

from mixgpt import datautils
from mixgpt.checkpoints import load
from mixgpt.common.progress import table
from mixgpt.common.runtime import Clock, peak_memory
from mixgpt.evaluation.measures import perplexities
from mixgpt.modeling.running import StreamedModel
from mixgpt.pruning.hessian import InputHessian, factor
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.solvers import Recipe
from mixgpt.pruning.targets import Target, select
from mixgpt.quant import Scheme
from mixgpt.sparsegpt import Walk

WARMUP = "256x256"  # loads libraries and compiled code, and is not printed
MATRICES = ["4096x4096", "4096x11008", "11008x4096"]
TARGETS = {"50%": (0.5, 0, 0, 16), "2:4": (0.0, 2, 4, 16), "50% + 4 bit": (0.5, 0, 0, 4)}
BATCH_SIZE = 2
PARTS = ("forward", "Hessian", "factorisation", "walk")


def machine(device):
    """Name what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def calibrated(columns, device):
    """Return the Hessian of correlated random inputs of very different sizes, as models have them."""
    generator = torch.Generator(device).manual_seed(0)
    mix = torch.randn(columns, columns, device=device, generator=generator) / 2 / columns**0.5
    mix.diagonal().add_(1)
    mix *= 10 ** torch.randn(columns, device=device, generator=generator).mul_(0.3)
    hessian = InputHessian(columns, 1, device)
    for _ in range(2):
        hessian.add_batch(torch.randn(columns, columns, device=device, generator=generator) @ mix)
    return hessian


def compare_matrix(hessian, W, name, device):
    """Return a row of the table: seconds of both, their ratio, and how far masks and errors agree."""
    *target, wbits = TARGETS[name]
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta").to_empty(device=device)
    linear.weight.data.copy_(W)
    book, clock = Textbook(linear), Clock(device)
    book.H = hessian.H
    with clock.part("textbook factorisation"):
        U = book.inverse(0.01)
    with clock.part("textbook walk"):
        book.prune(U, *target, wbits)
    theirs, ours = linear.weight.data, W.clone()
    del U
    scheme = Scheme(wbits) if wbits < 16 else None
    with clock.part("factorisation"):
        hessian.factor(0.01)
    with clock.part("walk"):
        (ours, _), = Walk([ours], hessian.R, hessian.H.diagonal(), [Target(*target)], scheme=scheme).run()
    H = hessian.H.double()
    (exact, _), = Walk([W.double()], factor(H, 0.01)[0], H.diagonal(), [Target(*target)], scheme=scheme).run()
    errors = (W.double() - Y.double() for Y in (ours, exact))
    error, expected = (torch.linalg.vecdot(E @ H, E).sum().item() for E in errors)
    seconds, (out, columns) = clock.seconds(), W.shape
    total = seconds["textbook factorisation"] + seconds["textbook walk"]
    return [f"{out}x{columns} {name}", *(f"{value:.2f}" for value in seconds.values()),
            f"{total / (seconds['factorisation'] + seconds['walk']):.1f}x",
            f"{((ours == 0) == (theirs == 0)).float().mean().item():.3%}",
            f"{((ours == 0) == (exact == 0)).float().mean().item():.3%}", f"{error / expected - 1:+.4%}"]


def bench_matrices(device, arguments):
    rows = []
    for size in (WARMUP, *arguments.sizes):
        out, columns = map(int, size.split("x"))
        hessian = calibrated(columns, device)
        W = torch.randn(out, columns, device=device, generator=torch.Generator(device).manual_seed(1))
        for _ in range(2 if device.type == "cuda" else 1):  # at first kernels are compiled for these shapes
            of_size = [compare_matrix(hessian, W, name, device) for name in TARGETS]
        rows += of_size
    print(table(["matrix", "textbook: factor", "walk", "here: factor", "walk", "ratio", "same mask",
                 "as in float64", "error against float64"], rows[len(TARGETS):]))


def prune(name, model, tokens, tests, device, batch_size):
    """Prune a copy to 50%, here or by the textbook. Returns what a record says of seconds, memory and perplexity."""
    pruned, clock = copy.deepcopy(model), Clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if name == "textbook":
        prune_model(pruned, tokens, device, clock)
    else:
        plan = dict.fromkeys(select(model), Target(0.5))
        prune_layerwise(StreamedModel(pruned, device, batch_size, clock), plan, tokens, Recipe())
    return {"seconds": clock.seconds(), "peak_memory": peak_memory(device), "sparsity": 0.5,
            "perplexity": {name: perplexities(pruned, {"builtin": tests}, batch_size, device)}}


def bench_model(device, arguments):
    """Print seconds of both by part, their ratio, peak memory so far and perplexity."""
    tokenizer, size = load.load_tokenizer(arguments.file), BATCH_SIZE
    tokens, _ = datautils.calibration_samples(arguments.dataset, arguments.nsamples, arguments.seqlen, 0, tokenizer,
                                              arguments.data_dir)
    tests, _ = datautils.test_tokens(arguments.eval, arguments.seqlen, tokenizer, arguments.data_dir)
    for dtype in ("float32", "bfloat16"):
        model, columns = load.load_model(arguments.file, getattr(torch, dtype)), {}
        for name in ("here", "textbook"):  # peak memory only grows on the host: the smaller one first
            if device.type == "cuda":
                prune(name, model, tokens[:size], tests[:size], device, size)  # compiles kernels, loads libraries
            record = prune(name, model, tokens, tests[:40], device, size)
            seconds = [record["seconds"][part] for part in PARTS]
            columns[name] = [*seconds, sum(seconds), *record["perplexity"][name].values(),
                             "/".join(f"{nbytes / 1e9:.2f}" for nbytes in record["peak_memory"].values())]
        rows = [[part, f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}x"] for part, theirs, ours in zip(
            (*PARTS, "total", "perplexity"), columns["textbook"], columns["here"], strict=False)]
        rows.append(["peak memory so far, GB", columns["textbook"][-1], columns["here"][-1], ""])
        print(f"\n{Path(arguments.file).name}, {dtype}, {len(tokens)} sequences of {arguments.seqlen} tokens of "
              f"{arguments.dataset}, perplexity on 40 segments of {arguments.eval}\n"
              + table(["seconds", "textbook", "here", "ratio"], rows), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["matrices", "model"])
    parser.add_argument("file", nargs="?", help="model to prune")
    parser.add_argument("--sizes", nargs="+", default=MATRICES, help="out x in of the matrices")
    parser.add_argument("--dataset", default="builtin", help="calibration text")
    parser.add_argument("--eval", default="builtin", help="test text")
    parser.add_argument("--data-dir", help="folder with local copies of the texts")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    print(f"{arguments.what} on {machine(device)}")
    with torch.no_grad():
        (bench_matrices if arguments.what == "matrices" else bench_model)(device, arguments)


if __name__ == "__main__":
    main()
