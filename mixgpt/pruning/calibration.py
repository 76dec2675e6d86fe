"""Calibrate a layer: linears that share an input, the Hessian of each input, forward passes that pause at linears."""

import torch
from greenlet import getcurrent, greenlet

from mixgpt.common.errors import InputError
from modelutils import hooked, linears, shared_inputs
from sparsegpt import SparseGPT


def groups_of(layer, index, stream, plan, shared):
    """Return the inputs of the planned matrices, in order, each as a tuple of the names of the linears that read it.

    shared: {names of a layer's linears: its inputs}, a cache: layers with the same linears share inputs alike.
    """
    wanted = [name for planned, name in plan if planned == index]
    if not wanted:
        return []
    kind = tuple(linears(layer))
    if kind not in shared:
        shared[kind] = shared_inputs(layer, index, stream)
    groups = [tuple(name for name in group if name in wanted) for group in shared[kind]]
    groups = [group for group in groups if group]
    unused = set(wanted).difference(*groups)
    if unused:
        raise InputError(f"layer {index} {', '.join(sorted(unused))}: not called as a module, cannot be calibrated; "
                         "leave it out with --prune_only")
    return groups


def hessians_of(layer, stream, groups, nsequences, clock, twin=None, token_weights=None):
    """Return {first module to read an input: SparseGPT of that input}, in order, and a function that adds a batch.

    nsequences: over all processes. twin: a DenseTwin, run on each batch before the layer itself.
    token_weights: per input, (n, T).
    """
    modules = linears(layer)
    firsts = [modules[group[0]] for group in groups]
    hessians = {module: SparseGPT(module.in_features, nsequences, stream.device) for module in firsts}
    weights = {module: iter(of_tokens.split(stream.batch_size))  # batch by batch
               for module, of_tokens in zip(firsts, token_weights or [], strict=bool(token_weights))}

    T = stream.hidden.shape[1]

    def read(module, X):
        with clock.part("Hessian"):
            more = twin.fit_targets(module, X) if twin else {}
            if weights:
                more["weights"] = next(weights[module]).flatten().to(X.device)
            hessians[module].add_batch(X, **more)
            # cheap; read only if the Hessian is not finite
            hessians[module].sums.append(X.reshape(-1, T * X.shape[-1]).sum(1, dtype=torch.float32))

    return hessians, read


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
