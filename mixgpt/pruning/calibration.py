"""Calibrate a layer: linears that share an input, the Hessian of each input, forward passes that pause at linears."""

from collections import defaultdict

import torch
from greenlet import getcurrent, greenlet

from mixgpt.common.errors import InputError
from mixgpt.modeling.experts import RoutedLinear, is_split
from mixgpt.pruning.hessian import InputHessian
from modelutils import hooked, linears, shared_inputs


def groups_of(layer, index, stream, plan, shared):
    """Return the inputs of the planned matrices, in order, each as a tuple of the names of the linears that read it.

    shared: {names of a layer's linears: its inputs}, a cache: layers with the same linears share inputs alike.
    """
    names = [name for planned, name in plan if planned == index]
    if not names:
        return []
    kind = tuple(linears(layer))
    if kind not in shared:
        shared[kind] = shared_inputs(layer, index, stream)
    groups = [tuple(name for name in group if name in names) for group in shared[kind]]
    groups = [group for group in groups if group]
    unused = set(names).difference(*groups)
    if unused:
        raise InputError(f"layer {index} {', '.join(sorted(unused))}: not called as a module, cannot be calibrated; "
                         "leave it out with --prune_only")
    return groups


def hessians_of(layer, stream, groups, nsequences, clock, twin=None, token_weights=None):
    """Return {first module to read an input: InputHessian of that input}, in order, and a function that adds a batch.

    nsequences: over all processes. twin: a DenseTwin, run on each batch before the layer itself.
    token_weights: per input, (n, T).
    """
    modules = linears(layer)
    firsts = [modules[group[0]] for group in groups]
    hessians = {module: InputHessian(module.in_features, nsequences, stream.device) for module in firsts}
    weights = {module: iter(of_tokens.split(stream.batch_size))  # batch by batch
               for module, of_tokens in zip(firsts, token_weights or [], strict=bool(token_weights))}

    def read(module, X):
        routed = isinstance(module, RoutedLinear)
        with clock.part("Hessian"):
            more = twin.fit_targets(module, X) if twin else {}
            if weights:
                of_tokens = next(weights[module]).flatten().to(X.device)
                more["weights"] = of_tokens[module.tokens] if routed else of_tokens
            hessians[module].add_batch(X, **more)
            # cheap; read only if the Hessian is not finite
            sequences = 1 if routed else X.numel() // (stream.hidden.shape[1] * X.shape[-1])
            hessians[module].sequence_sums.append(X.reshape(sequences, -1).sum(1, dtype=torch.float32))

    return hessians, read


def pools_of(layer, nsequences, device):
    """Return {experts of a layer: InputHessian of all tokens that enter them}, for experts that few tokens reach."""
    return {module: InputHessian(module.get_submodule("0").up_proj.in_features, nsequences, device)
            for module in layer.modules() if is_split(module)}


def strengthen(hessian, module, pools):
    """Add to an expert's Hessian, in place, what it lacks of tokens: as many as it has columns.

    Gate and up projections get the mean over all tokens that enter the layer's experts, down projections a multiple of
    the identity. Returns whether any were lacking.
    """
    missing = hessian.columns - hessian.tokens
    if missing <= 0:
        return False
    pool = next((pool for experts, pool in pools.items() for name, linear in experts.named_modules()
                 if linear is module and not name.endswith("down_proj")), None)
    if pool:
        hessian.H.add_(pool.H, alpha=missing / pool.tokens)
    else:
        mean = hessian.H.diagonal().mean() / max(hessian.tokens, 1)
        hessian.H.diagonal().add_(missing * torch.where(mean > 0, mean, 1.0))
    return True


def one_pass_bytes(streamed, selected, shape, dense_target, admm):
    """Estimate the bytes that pruning takes if all batches pause inside a layer at a time, rather more than less.

    selected: {(layer, name): (out, in)}. shape: (sequences of this process, tokens). In front of a linear wait the
    residual stream, its norm, and its input or what other linears made of the norm: queries, keys and values, gates.
    """
    model, (sequences, T), sets = streamed.model, shape, 1 + dense_target
    inputs, hessians = defaultdict(list), defaultdict(int)
    for (index, name), (out, columns) in selected.items():
        inputs[index, name.rpartition(".")[0], columns].append(out)  # of the linears that may read one input
    for index, _, columns in inputs:
        hessians[index] += 4 * columns**2
    width = model.get_input_embeddings().embedding_dim
    waiting = 3 * width + max(max(columns, sum(outs) - min(outs)) for (_, _, columns), outs in inputs.items())
    if model.config._attn_implementation == "eager":
        waiting += 3 * model.config.num_attention_heads * T
    tokens = (sequences + 2 * streamed.batch_size) * T * model.dtype.itemsize
    squares, stacks = (8, 9) if admm else (1.3 + dense_target, 6)  # matrices like H and like W while one is pruned
    solving = max(4 * (squares * columns**2 + stacks * columns * sum(outs)) for (_, _, columns), outs in inputs.items())
    layer = max(sum(weight.nbytes for weight in layer.parameters()) for layer in streamed.layers)
    return int(tokens * (sets * (width + waiting) + 2 * dense_target * width)
               + sets * max(hessians.values()) + (2 + dense_target) * layer + solving)


@torch.no_grad()
def paused_forwards(layer, index, stream, stops, read):
    """Run all batches through layer number `index` concurrently, pausing at each module of `stops`.

    stops: modules in the order in which the layer runs them. Calls read(module, input) for each batch, and yields the
    module once all batches wait before it, so that its weights can be changed given all its inputs. When the generator
    is exhausted, the stream holds the layer's output. Every batch is a greenlet, all in one thread, and resumes where
    it paused.
    """
    def run(rows):
        stream.hidden[rows] = stream.forward(layer, index, rows)

    def pause(module, X):
        read(module, X)
        getcurrent().parent.switch()

    batches = [(greenlet(run), rows) for rows in stream.batches()]
    with hooked({module: lambda X, module=module: pause(module, X) for module in stops}):
        for number, module in enumerate(stops):
            for batch, rows in batches:
                batch.switch(*([] if number else [rows]))
            yield module
        for batch, _ in batches:
            batch.switch()
