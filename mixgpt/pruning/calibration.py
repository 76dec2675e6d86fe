"""Calibrate a layer: which linears read the same input, the Hessian of each input, runs that pause at linears."""

import torch
from greenlet import getcurrent, greenlet

from mixgpt.common.errors import InputError
from modelutils import hooked, linears, shared_inputs
from sparsegpt import SparseGPT


def groups_of(layer, index, stream, plan, shared):
    """Return the inputs that planned matrices read, in order, each as a tuple of the names of its readers.

    shared: {names of a layer's linears: its inputs}, as found in the layers before of the same making.
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
    """Return {module that reads an input first: SparseGPT of that input}, in order, and what adds an input to it.

    nsequences: in all processes together. twin: a DenseTwin, whose batches come before the layer's.
    token_weights: of each input, (n, T).
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
            # one pass; asked for only where the Hessian is not finite
            hessians[module].sums.append(X.reshape(-1, T * X.shape[-1]).sum(1, dtype=torch.float32))

    return hessians, read


@torch.no_grad()
def paused_forwards(layer, index, stream, stops, read):
    """Run every batch through layer number `index` once, all of them side by side, and pause at each module of `stops`.

    stops: modules in the order in which the layer runs them. Calls read(module, input) for each batch and yields the
    module when all batches wait in front of it, so that it can be changed from all of its inputs; with the generator's
    end the hidden states are those behind the layer. Every batch is a greenlet: one thread, which goes on where it
    left off.
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
