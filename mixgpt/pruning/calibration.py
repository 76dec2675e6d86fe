"""Calibrate a layer: linears that share an input, the Hessian of each input, forward passes that pause at linears."""

import contextlib
from collections import defaultdict
from functools import partial

import torch
from greenlet import getcurrent, greenlet

from mixgpt.common import distributed
from mixgpt.common.errors import InputError
from mixgpt.modeling.experts import RoutedLinear, is_split
from mixgpt.pruning.dense_target import DenseTwin
from mixgpt.pruning.hessian import InputHessian, activation_order
from modelutils import hooked, linears, on_device, shared_inputs


def groups_of(layer, index, stream, plan):
    """Return the inputs of the planned matrices, in order, each as a tuple of the names of the linears that read it."""
    names = [name for planned, name in plan if planned == index]
    if not names:
        return []
    groups = [tuple(name for name in group if name in names) for group in shared_inputs(layer, index, stream)]
    groups = [group for group in groups if group]
    if unused := set(names).difference(*groups):
        raise InputError(f"layer {index} {', '.join(sorted(unused))}: not called as a module, cannot be calibrated; "
                         "leave it out with --prune-only")
    return groups


class LayerHessians:
    """The Hessian of each input of a layer's planned matrices, and of all tokens that enter its experts together.

    The latter fill up those of experts that few tokens reach.
    """

    def __init__(self, layer, stream, groups, nsequences, clock, twin=None):
        """groups: of `groups_of`. nsequences: over all processes. twin: a DenseTwin, which runs each batch first."""
        modules, self.stream, self.clock, self.twin = linears(layer), stream, clock, twin
        self.names = {module: name for name, module in modules.items()}
        self.hessians = {module: InputHessian(module.in_features, nsequences, stream.device)  # first reader of an input
                         for module in (modules[group[0]] for group in groups)}
        pools = {module: InputHessian(module.get_submodule("0").up_proj.in_features, nsequences, stream.device)
                 for module in layer.modules() if groups and is_split(module)}
        self.readers = {module: pool.add_batch for module, pool in pools.items()}
        self.pools = {linear: pool for experts, pool in pools.items()  # of those that read its tokens
                      for name, linear in experts.named_modules() if name.endswith(("gate_proj", "up_proj"))}
        self.undersampled = []  # names and tokens of linears with fewer tokens than columns

    def read(self, module, X):
        """Add a batch to the Hessian of a module's input."""
        with self.clock.part("Hessian"):
            self.hessians[module].add_batch(X, **self.twin.gaps(module, X) if self.twin else {})
            if not isinstance(module, RoutedLinear):  # whose tokens are of several sequences
                of_sequence = X.shape[-1] * self.stream.hidden.shape[1]
                # cheap; read only if the Hessian is not finite
                self.hessians[module].sequence_sums.append(X.reshape(-1, of_sequence).sum(1, dtype=torch.float32))

    def take(self, module):
        """Return the Hessian of a module's input, topped up if it is an expert's and rank-deficient, and forget it.

        That is done as if the expert had seen as many tokens as it has columns: for gate and up projections by the mean
        over all tokens that enter the layer's experts, else by a multiple of the identity.
        """
        hessian = self.hessians.pop(module)
        H = hessian.H  # first, as only then its tokens are those of all processes
        if isinstance(module, RoutedLinear) and (missing := hessian.columns - hessian.tokens) > 0:
            if pool := self.pools.get(module):  # all tokens have entered the experts before the first one is pruned
                H.add_(pool.H, alpha=missing / pool.tokens)
            else:
                mean = H.diagonal().mean() / max(hessian.tokens, 1)
                H.diagonal().add_(missing * torch.where(mean > 0, mean, 1.0))
            self.undersampled.append(f"{self.names[module]} ({hessian.tokens})")
        return hessian


class Calibration:
    """The calibration hidden states before the next layer of a model that is pruned layer by layer.

    With recipe.dense_target these are those of the dense model too, `dense`.
    """

    def __init__(self, streamed, plan, tokens, recipe):
        """tokens: (N, T). plan and recipe: as in `layerwise.prune_layerwise`."""
        self.streamed, self.plan, self.recipe, self.clock = streamed, plan, recipe, streamed.clock
        with self.clock.part("forward"):
            self.stream = streamed.embed(tokens[distributed.share(len(tokens))], 2 if recipe.dense_target else 1)
            self.dense = self.stream.twin() if recipe.dense_target else None
        self.nsequences = len(tokens)  # over all processes

    def pass_finished(self, index, layer, files):
        """Take a layer that an interrupted run has pruned, and advance the hidden states through it as that run did."""
        device = self.streamed.device
        if self.dense:
            with on_device([layer], device), self.clock.part("forward"):
                self.dense.advance(layer, index)
        files.load_layer(index)
        with on_device([layer], device), self.clock.part("forward"):
            self.stream.advance(layer, index)

    def inputs(self, index, layer, last, bar):
        """Yield (names of linears, factored InputHessian of the input that they read) in the order in which they run.

        The caller prunes these linears before it asks for the next input. With recipe.true_sequential, all batches
        pause in front of them meanwhile, so that later inputs come from pruned linears. At the end the hidden states
        are the layer's output, unless it is the last layer. Raises InputError if an input is not finite.
        """
        stream, recipe = self.stream, self.recipe
        groups = groups_of(layer, index, stream, self.plan)
        twin = DenseTwin(layer, index, stream, self.dense, groups) if self.dense else None
        hessians = LayerHessians(layer, stream, groups, self.nsequences, self.clock, twin)
        in_turn, stops, runs = recipe.true_sequential and groups, list(hessians.hessians), []
        with contextlib.ExitStack() as recording:
            recording.enter_context(hooked(hessians.readers))
            if twin:
                recording.enter_context(twin.recording())
            if in_turn:
                runs = [paused_forwards(layer, index, stream, stops, hessians.read)]
                if twin:  # it pauses at the same modules, before the layer does
                    runs.insert(0, paused_forwards(twin.layer, index, self.dense, list(twin.stops), twin.record_input))
            else:
                with self.clock.part("forward"):
                    self._collect(layer, index, twin, stops, hessians.read)
                recording.close()
            for group, module in zip(groups, stops, strict=True):
                self._proceed(runs)
                yield group, self._factored(index, group, hessians.take(module), bar)
            for run in runs if last else []:
                run.close()
            self._proceed(runs)
        if not in_turn and not last:
            with self.clock.part("forward"):
                stream.advance(layer, index)
        if few := hessians.undersampled:
            others = f" and {len(few) - 3} more" if len(few) > 3 else ""
            bar.write(f"layer {index}: {', '.join(few[:3])}{others} got fewer tokens than they have columns; "
                      "their Hessians are filled up with the mean over the layer's experts")

    def _proceed(self, runs):
        """Run all batches up to the next pause, or to the end of the layer."""
        for run in runs:
            with self.clock.part("forward"):
                next(run, None)

    def _collect(self, layer, index, twin, stops, read):
        """Accumulate a layer's Hessians over all sequences, and advance the dense hidden states."""
        for rows in self.stream.batches():
            if twin:
                with hooked({module: partial(twin.record_input, module) for module in twin.stops}):
                    output = self.dense.forward(twin.layer, index, rows)
            if stops:
                with hooked({module: partial(read, module) for module in stops}):
                    self.stream.forward(layer, index, rows)
            if twin:
                self.dense.hidden[rows] = output  # not earlier: a linear may read the hidden states themselves

    def _factored(self, index, group, hessian, bar):
        recipe, order = self.recipe, None
        if recipe.act_order:
            order = activation_order(hessian.H.diagonal(), self.plan[index, group[0]].prunem)
        try:
            with self.clock.part("factorisation"):
                percdamp = hessian.factor(recipe.percdamp, order)
        except torch.linalg.LinAlgError as error:
            finite = [bool(each) for sums in hessian.sequence_sums for each in sums.isfinite()]  # of this process
            bad = "" if all(finite) else f", from calibration sequence {finite.index(False)} on"
            raise InputError(f"layer {index} {group[0]}: {error}{bad}") from error
        if percdamp != recipe.percdamp:
            bar.write(f"layer {index} {', '.join(group)}: Hessian not positive definite at --percdamp "
                      f"{recipe.percdamp:g}, raised to {percdamp:g}")
        return hessian


def one_pass_bytes(streamed, selected, shape, dense_target, admm):
    """Estimate, on the high side, the bytes that pruning takes if all batches pause inside a layer at a time.

    selected: {(layer, name): (out, in)}. shape: (sequences of this process, tokens). While a batch waits in front of a
    linear, it holds the residual stream, its norm, and the linear's input or outputs of others that read the norm.
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
        waiting += 3 * getattr(model.config, "num_attention_heads", 0) * T
    tokens = (sequences + 2 * streamed.batch_size) * T * model.dtype.itemsize
    squares, stacks = (8, 9) if admm else (3 + dense_target, 6)  # matrices like H and like W while one is pruned
    solving = max(4 * (squares * columns**2 + stacks * columns * sum(outs)) for (_, _, columns), outs in inputs.items())
    layer = max(sum(weight.nbytes for weight in layer.parameters()) for layer in streamed.layers)
    return int(tokens * (sets * (width + waiting) + 2 * dense_target * width)
               + sets * max(hessians.values()) + (2 + dense_target) * layer + solving)


@torch.no_grad()
def paused_forwards(layer, index, stream, stops, read):
    """Run all batches through layer number `index` concurrently, pausing at each module of `stops`.

    stops: modules in the order in which the layer runs them. Calls read(module, input) for each batch, and yields the
    module once all batches wait before it, so that its weights can be changed given all its inputs. When the generator
    is exhausted, the stream holds the layer's output. Every batch is a greenlet, and resumes where it paused.
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
