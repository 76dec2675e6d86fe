"""Run 2:4 sparse models on the GPU's semi-structured kernels, and compare these with the dense kernels.

torch stores half of the values of such a matrix with two index bits each, and multiplies by it at up to twice the speed
(arXiv 2104.08378). The shapes required here suit its backend cuSPARSELt.
"""

import contextlib

import torch

from mixgpt.common.errors import one_line
from mixgpt.common.runtime import Clock
from mixgpt.evaluation.measures import perplexities
from mixgpt.modeling.experts import RoutedLinear
from modelutils import linears

ROWS, COLUMNS = 32, 64  # required divisors of the dimensions of a 16-bit matrix


def obstacle(device, dtype):
    """Return why the kernels cannot run on a device with weights of a dtype; None if they can."""
    if device.type != "cuda":
        return f"the kernels need a CUDA GPU, this runs on the {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"the kernels need weights in 16 bits, these are {name}; give --dtype bfloat16"
    W = torch.eye(COLUMNS, dtype=dtype, device=device)
    try:  # they need cuSPARSELt, and a GPU that it knows
        torch.nn.functional.linear(W, torch.sparse.to_sparse_semi_structured(W))
    except Exception as error:
        return f"the kernels do not run on this GPU ({one_line(error):.200})"
    return None


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


def compare(model, tests, batch_size, device):
    """Measure a model's layers with both kinds of kernels on the same inputs. tests: {test set: tokens (N, T)}.

    Returns seconds of the forward passes, the number of compressed matrices, the largest relative difference of a
    layer's output and the perplexities on sparse kernels; or {"skipped": reason} if no matrix fits.
    """
    clock, counts, differences = Clock(device), [], []

    def timed(kind, stream, layer, index):
        batches = stream.batches()
        output = stream.forward(layer, index, batches[0]).float()  # warms up
        with clock.part(kind):
            for rows in batches:
                stream.forward(layer, index, rows)
        return output

    def step(stream, layer, index):
        dense = timed("dense", stream, layer, index)
        with compressed(layer) as count:
            sparse = timed("semi_structured", stream, layer, index)
            stream.advance(layer, index)
        counts.append(count)
        differences.append(((sparse - dense).norm() / dense.norm()).item())

    found = perplexities(model, tests, batch_size, device, step)
    if not any(counts):
        return {"skipped": f"no matrix has at most 2 of 4 weights, and sizes that {ROWS} and {COLUMNS} divide"}
    seconds = clock.seconds()
    return {"seconds": seconds, "matrices": sum(counts) // len(tests), "difference": max(differences),
            "perplexity": found, "speed_up": seconds["dense"] / seconds["semi_structured"]}
