"""Run a 2:4 sparse model on the GPU's semi-structured kernels, and compare these with the dense kernels.

python benchmarks/semistructured.py pruned --eval wikitext2      # what a run with --prunen 2 --prunem 4 has saved

torch stores half of the values of such a matrix with two index bits each, and multiplies by it at up to twice the speed
(arXiv 2104.08378). The shapes required here suit its backend cuSPARSELt; other matrices stay dense.
"""

import contextlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from mixgpt.app.cli import Parser, reported
from mixgpt.checkpoints import load
from mixgpt.common.errors import InputError, reading
from mixgpt.common.runtime import DEFAULT_SEQLEN, Clock, choose_device, position_limit
from mixgpt.datautils import resolve_bos, test_tokens
from mixgpt.modeling.decoder import layers_of
from mixgpt.modeling.experts import RoutedLinear
from mixgpt.modeling.linears import linears
from mixgpt.modeling.placing import in_turn
from mixgpt.modeling.running import StreamedModel

ROWS, COLUMNS = 32, 64  # required divisors of the dimensions of a 16-bit matrix


def check_kernels(device, dtype):
    """Raise InputError if the kernels cannot run on a device with weights of a dtype."""
    if device.type != "cuda":
        raise InputError(f"--device {device}: must be a CUDA GPU, which has the kernels")
    W = torch.eye(COLUMNS, dtype=dtype, device=device)
    with reading(f"--device {device}: does not run the kernels"):  # which need cuSPARSELt, and a GPU that it knows
        torch.nn.functional.linear(W, torch.sparse.to_sparse_semi_structured(W))


def fits(W):
    """Return whether a matrix (out, in) is 2:4 sparse and of a shape supported by the kernels."""
    rows, columns = W.shape
    return rows % ROWS == 0 and columns % COLUMNS == 0 and bool(((W.reshape(-1, 4) != 0).sum(1) <= 2).all())


@contextlib.contextmanager
def compressed(layer):
    """Keep the supported linears of a layer compressed within the block. Yields their number."""
    dense = {module: module.weight for module in linears(layer).values()
             if fits(module.weight) and not isinstance(module, RoutedLinear)}  # whose input may have no row
    with contextlib.ExitStack() as stack:
        for module, weight in dense.items():
            stack.callback(setattr, module, "weight", weight)
            sparse = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
            module.weight = torch.nn.Parameter(sparse, requires_grad=False)
        yield len(dense)


@torch.no_grad()
def compare(model, tokens, batch_size, device):
    """Measure a model's layers with both kinds of kernels on the same inputs. tokens: (N, T).

    Returns seconds of the forward passes, the number of compressed matrices, the largest relative difference of a
    layer's output and the perplexity on sparse kernels.
    """
    stream = StreamedModel(model, device, batch_size).embed(tokens)
    clock, matrices, differences = Clock(device), 0, []

    def timed(kind, layer, index):
        batches = stream.batches()
        output = stream.forward(layer, index, batches[0]).float()  # warms up
        with clock.part(kind):
            for rows in batches:
                stream.forward(layer, index, rows)
        return output

    for index, layer in in_turn(layers_of(model), device, "layers"):
        dense = timed("dense", layer, index)
        with compressed(layer) as count:
            sparse = timed("semi_structured", layer, index)
            stream.advance(layer, index)
        matrices += count
        differences.append(((sparse - dense).norm() / dense.norm()).item())
    seconds = clock.seconds()
    return {"seconds": seconds, "matrices": matrices, "difference": max(differences),
            "perplexity": _perplexity(model, stream, tokens), "speed_up": seconds["dense"] / seconds["semi_structured"]}


def _perplexity(model, stream, tokens):
    """Return that of tokens (N, T), from the hidden states behind the last layer."""
    with stream.head(model) as head:
        losses = [torch.nn.functional.cross_entropy(head(hidden[:-1].to(stream.device)).float(), row[1:].to(
            stream.device)).item() for hidden, row in zip(stream.hidden, tokens, strict=True)]
    return math.exp(sum(losses) / len(losses))


def main(argv=None):
    """Run the command line. Returns the exit status, see `reported`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="semistructured.py", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of --save, hub id or local folder")
    parser.add_argument("--eval", nargs="+", default=["builtin"], help="test sets, as of the family scripts")
    parser.add_argument("--data-dir", help="folder with local copies of the texts")
    parser.add_argument("--seqlen", type=int, help="tokens per sequence (default: 2048, or the model's limit)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--device", default="cuda")
    with reported("semistructured.py", argv, "lower --batch-size or --seqlen") as end:
        given = parser.parse_args(argv)
        device, dtype = choose_device(given.device), getattr(torch, given.dtype)
        check_kernels(device, dtype)
        config, tokenizer = load.read_config(given.model), load.load_tokenizer(given.model)
        bos = resolve_bos("auto", config.model_type, tokenizer)
        seqlen = given.seqlen or min(DEFAULT_SEQLEN, position_limit(config) or math.inf)
        model = load.open_model(given.model, config, dtype)
        for name in given.eval:
            tokens, _ = test_tokens(name, seqlen, tokenizer, given.data_dir, bos)
            found = compare(model, tokens, given.batch_size, device)
            if not found["matrices"]:
                raise InputError(f"model {given.model}: no matrix has at most 2 of 4 weights and sizes that {ROWS} and "
                                 f"{COLUMNS} divide; give what --prunen 2 --prunem 4 --save has saved as dense")
            seconds = found["seconds"]
            print(f"{name}: layers run {found['speed_up']:.2f} times as fast as on dense kernels ("
                  f"{seconds['semi_structured']:.2f} s, {seconds['dense']:.2f} s), {found['matrices']} matrices "
                  f"compressed; their outputs differ by {found['difference']:.2%} at most; perplexity "
                  f"{found['perplexity']:.2f}", flush=True)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
