"""Count what pruning models of published shapes asks of a GPU. Needs no GPU, no weights and no text.

python benchmarks/count.py
python benchmarks/count.py --shapes LLaMA-7B OPT-175B --methods SparseGPT --nsamples 128 --seqlen 2048

The project's own code runs on the make-believe GPU of tests/makebelieve.py, with tensors that have shapes but no
values. Two and three layers run; their difference stands for each of the others. Counted are operators that a GPU would
launch kernels for, places where the host waits for the GPU, bytes copied each way, arithmetic, and the most bytes of
tensors on the GPU at a time while it prunes. The plan of best, two passes over the weights, is left out.

Seconds are NOT measured: they are what an H100 takes at the rates below if each operator takes the longer of its
arithmetic and its memory traffic, and nothing waits for launches, copies or the disk.
"""

import argparse
import contextlib
import copy
import math
import sys
import weakref
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from makebelieve import CUDA, Gpu, GpuTensor, aten, mapped, tensors_in
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, OPTConfig

import llama
import opt
from mixgpt.allocation import synthetic
from mixgpt.allocation.backward import chunk_size
from mixgpt.allocation.fisher import enough_of, output_gradients
from mixgpt.allocation.global_threshold import inverse_diagonals
from mixgpt.app.pipeline import recipe_of
from mixgpt.app.settings import PRESETS, Settings
from mixgpt.app.tables import table
from mixgpt.checkpoints import load
from mixgpt.common import memory
from mixgpt.common.clock import Clock
from mixgpt.common.progress import silent
from mixgpt.kernels import columns, selection
from mixgpt.modeling.streaming import Source
from mixgpt.pruning import distill
from mixgpt.pruning.calibration import one_pass_bytes
from mixgpt.pruning.layerwise import prune_layerwise
from mixgpt.pruning.targets import Target, select
from modelutils import Execution

SHAPES = {  # name: family, configuration, layers of the whole model
    "LLaMA-7B": (llama.FAMILY, LlamaConfig(), 32),
    "LLaMA-13B": (llama.FAMILY, LlamaConfig(hidden_size=5120, intermediate_size=13824, num_attention_heads=40), 40),
    "LLaMA-2-70B": (llama.FAMILY, LlamaConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                                              num_key_value_heads=8), 80),
    "OPT-175B": (opt.FAMILY, OPTConfig(hidden_size=12288, word_embed_proj_dim=12288, ffn_dim=49152,
                                       num_attention_heads=96, max_position_embeddings=2048), 96),
}
METHODS = {"SparseGPT": {}, "best": PRESETS["best"]}
MEMORY, HOST = 80e9, 128e9  # bytes
# An H100 (SXM): arithmetic by the bytes of a number, of which large products reach 65%, and memory; per second.
ARITHMETIC = {2: 0.65 * 989e12, 4: 0.65 * 67e12, 8: 0.65 * 67e12}
TRAFFIC = 3.35e12 * 0.8
LARGE = 1e7  # bytes from which tensors on the host have no values either


class Meter(Gpu):
    """A make-believe GPU whose tensors lie on meta, and which counts what runs, by the part of the run."""

    behind = torch.device("meta")

    def __init__(self):
        super().__init__(memory=MEMORY)
        self.part, self.counts = "other", defaultdict(Counter)

    def hold(self, tensor):
        storage = tensor.held.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        if not self._holders[address]:
            self.used += nbytes
            self.peak = max(self.peak, self.used)
        self._holders[address] += 1
        weakref.finalize(tensor, self._release, address, nbytes)

    def multiply(self, part, times):
        """Count a part as often as it runs, and forget the peak so far."""
        self.counts[part] = Counter({key: times * value for key, value in self.counts[part].items()})
        self.peak = self.used

    def wait(self, what):
        super().wait(what)
        self.counts[self.part]["waits"] += 1

    def run(self, function, args, kwargs):
        result = super().run(function, args, kwargs)
        if function is aten.copy_.default and isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor):
            self._link("up" if isinstance(args[0], GpuTensor) else "down", args[1])
            return result
        outputs = [each for each in (result if isinstance(result, tuple) else (result,)) if isinstance(each, GpuTensor)]
        if outputs and function is aten._to_copy.default and not isinstance(args[0], GpuTensor):
            self._link("up", outputs[0])
        elif outputs and function._schema.name not in FREE and not _is_view(function):
            self._launch(function, args, kwargs, outputs)
        return result

    def _link(self, direction, tensor):
        self.counts[self.part][direction] += tensor.numel() * tensor.element_size() / 1e9

    def fetch(self, held, dtype):
        self._link("down", held)
        return held.to(dtype) if held.nbytes > LARGE else torch.ones(held.shape, dtype=dtype)

    def _launch(self, function, args, kwargs, outputs):
        operands = [each for each in (*args, *kwargs.values()) if isinstance(each, GpuTensor)]
        nbytes = sum(each.numel() * each.element_size() for each in (*operands, *outputs))
        flops = arithmetic(function, args, kwargs, outputs[0])
        width = min((each.element_size() for each in operands if each.is_floating_point()), default=4)
        count = self.counts[self.part]
        count["launches"] += 1
        count["TFLOP"] += flops / 1e12
        count["seconds"] += max(flops / ARITHMETIC[max(width, 2)], nbytes / TRAFFIC)

    def execute(self, function, args, kwargs):
        tensors = [each for each in tensors_in((args, kwargs)) if each.is_meta]
        if function is aten.equal.default and tensors:
            return True
        if function is aten._local_scalar_dense.default and tensors:
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        if function is aten.copy_.default and tensors:
            return args[0]
        if function is aten._to_copy.default and tensors:
            return torch.empty_like(args[0], dtype=kwargs.get("dtype"))
        if function is aten.addmm.dtype_out:
            return kwargs["out"]
        if function is aten.mm.dtype:
            return args[0].new_empty(len(args[0]), args[1].shape[1], dtype=args[2])
        if tensors:
            args, kwargs = mapped(lambda each: each.to("meta") if torch.is_tensor(each) else each, (args, kwargs))
        elif function._schema.name in FREE and _numel(args) > LARGE:
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


FREE = {f"aten::{name}" for name in ("_unsafe_view", "empty", "empty_strided", "empty_like", "new_empty", "lift_fresh")}


def _numel(args):
    sizes = args[0] if args and isinstance(args[0], list | tuple) else ()
    return math.prod(sizes)


def _is_view(function):
    aliases = [each.alias_info for each in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def arithmetic(function, args, kwargs, output):
    """Return the floating-point operations of an operator, those of products and factorisations only."""
    name = function._schema.name
    if "scaled_dot_product" in name:
        if name.endswith("backward"):
            return sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        return sdpa_flop_count(*(each.shape for each in args[:3]))
    if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        A, B = args[name != "aten::mm":][:2]
        return 2 * A.numel() * B.shape[-1]
    if name.startswith("aten::linalg_cholesky"):
        return args[0].shape[-1] ** 3 / 3
    if name == "aten::linalg_solve_triangular":
        return args[0].shape[-1] * args[1].numel()
    count = flop_registry.get(function._overloadpacket)
    return count(*args, **kwargs, out_val=output) if count else 0


class Ledger(Clock):
    """Tells the Meter which part of the run it is in, the gradients as one; measures no time."""

    def __init__(self, meter):
        super().__init__(torch.device("cpu"))
        self.meter = meter

    @contextlib.contextmanager
    def part(self, name):
        before = self.meter.part
        self.meter.part = before if before == "gradients" else name
        yield
        self.meter.part = before


class Nowhere(Source):
    """Weights that are nowhere on a disk, of the shapes `places`, {name: shape}."""

    def _read(self, names, pinned=False):
        return {name: torch.empty(self.places[name], dtype=self.dtype, device="meta") for name in names}


def walk_columns(W, E, U, mask, factors, groups, grid):
    """Stand for the kernel that walks columns: one launch that reads and writes W and writes E."""
    E.copy_(W)


def mark_smallest(W, mask, marked, *_):
    """Stand for the kernels that mark the least salient weights: five launches that read W, and one that marks."""
    for _ in range(5):
        W.sum()
    marked.logical_or_(mask)


def skeleton(shape, layers):
    """Return the family and the model of a shape with so many layers, its weights to be read when it runs."""
    family, config, _ = SHAPES[shape]
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    model = load.skeleton(config, torch.bfloat16)
    for module in (*family.layers_of(model), *family.rest_of(model).values()):
        module.source = Nowhere({name: tensor.shape for name, tensor in module.state_dict().items()}, model.dtype)
    return family, model


def count(shape, method, tokens, batch_size, layers):
    """Prune the first layers of a shape. Returns the Meter, and how the memory is used in words.

    Gradients run on as many sequences at a time as the whole model has room for.
    """
    family, model = skeleton(shape, layers)
    settings = Settings(shape, "builtin", sparsity=0.5, device="cpu", nsamples=len(tokens), **METHODS[method])
    selected = select(model, family)
    plan = dict.fromkeys(selected, Target(0.5))
    host = SimpleNamespace(available=int(HOST), total=int(HOST))
    with Meter() as meter, silent(), mock.patch("psutil.virtual_memory", lambda: host), mock.patch.object(
            columns, "fastest", lambda *_: walk_columns), mock.patch.object(
            selection, "fastest", lambda *_: mark_smallest):
        whole = Execution(skeleton(shape, SHAPES[shape][2])[1], family, CUDA, batch_size)
        T = tokens.shape[1]
        windows = synthetic.windows_of(torch.zeros(settings.written()[1], T, dtype=torch.long), synthetic.GENERATED)
        wide = distill.widened(whole, windows, T)
        distills = len(windows) > 0 and distill.room_for(wide, windows) > 0
        number, more = settings.written(distills)
        together = torch.cat([tokens, torch.zeros(number, T, dtype=torch.long)])
        execution = Execution(model, family, CUDA, batch_size, Ledger(meter))
        needed = one_pass_bytes(execution, selected, together.shape, settings.target == "dense",
                                settings.solver == "admm")
        two_passes, gradients = not memory.fits(needed, CUDA), None
        line = f"{'two passes' if two_passes else 'one pass'} through each layer; one takes about {needed / 1e9:.1f} GB"
        if settings.weighs:
            enough = enough_of(tokens)
            size = min(chunk_size(whole, len(enough), tokens.shape[1], 1), len(enough))
            line += f"\ngradients of {size} of {len(enough)} sequences at a time"
            with execution.clock.part("gradients"):
                gradients = output_gradients(execution, list(plan), enough[:size], 0,
                                             settings.percdamp if size == len(enough) else None)
            meter.multiply("gradients", math.ceil(len(enough) / size))
            if size < len(enough):
                with execution.clock.part("allocation"):
                    inverse_diagonals(execution, list(plan), enough, settings.percdamp)
        if number + more:
            with execution.clock.part("synthetic"), mock.patch.object(synthetic, "has_room", lambda _: False):
                synthetic.synthetic(execution, tokens, number + more, 0)
        prune_layerwise(execution, plan, together, replace(recipe_of(settings, gradients),
                                                           true_sequential=not two_passes))
        if distills:
            wide = distill.widened(execution, windows, T)
            dense = torch.empty(*windows.shape, model.config.hidden_size, dtype=model.dtype)  # generation gives it
            with execution.clock.part("distillation"):
                distill.distill(wide, dict.fromkeys(plan), windows, dense, 0)
    return meter, line


def rows_of(shape, method, tokens, batch_size):
    """Return the rows of the table: each part of the run, and the whole."""
    (few, _), (more, line) = (count(shape, method, tokens, batch_size, layers) for layers in (2, 3))
    print(f"\n{shape}, {method}\n{line}\n", flush=True)
    left, total, rows = SHAPES[shape][2] - 2, Counter(), []
    for part, counted in more.counts.items():
        whole = Counter({key: few.counts[part][key] + left * (value - few.counts[part][key])
                         for key, value in counted.items()})
        total.update(whole)
        rows.append([part, *_cells(whole), ""])
    return [*rows, ["total", *_cells(total), f"{more.peak / 1e9:.1f}"]]


def _cells(counted):
    return [f"{counted['seconds']:.1f}", f"{counted['TFLOP']:.0f}", f"{counted['launches']:,}",
            f"{counted['waits']:,}", f"{counted['up']:.1f}", f"{counted['down']:.1f}"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--methods", nargs="*", default=["SparseGPT", "best"], choices=METHODS)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2)
    arguments = parser.parse_args(argv)
    tokens = torch.zeros(arguments.nsamples, arguments.seqlen, dtype=torch.int64)
    print(f"{arguments.nsamples} sequences of {arguments.seqlen} tokens in batches of {arguments.batch_size}; seconds "
          "are those of an H100's rates, not measured")
    for shape in arguments.shapes:
        for method in arguments.methods:
            print(table(["part", "seconds", "TFLOP", "launches", "waits", "GB up", "GB down", "peak GB"],
                        rows_of(shape, method, tokens, arguments.batch_size)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
