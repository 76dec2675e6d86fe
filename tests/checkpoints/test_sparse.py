"""Check products with packed matrices against dense ones, by every kind of kernel here, and what may be loaded."""

import contextlib
import copy
import ctypes
import itertools
import json
import mmap
import pickle
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import CPU, ON_GPU, ROOT, make, save
from makebelieve import Gpu
from safetensors.torch import load_file, save_file
from test_formats import assert_same, logits, matrices
from transformers import AutoModel, AutoModelForCausalLM

import mixgpt
from mixgpt.checkpoints import load
from mixgpt.checkpoints.packing import encode
from mixgpt.checkpoints.sparse import FEW, MOST, PackedWeight, SparseLinear
from mixgpt.common.errors import InputError
from mixgpt.evaluation.generation import complete
from mixgpt.evaluation.measures import perplexities
from mixgpt.kernels import sparse_cpu
from mixgpt.quant import Codebooks, Scheme, quantize_nearest

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCHEMES = [None, *(Scheme(wbits, *grid) for wbits in (2, 3, 4, 8) for grid in ((-1, True), (64, False))),
           Codebooks(4, mse=True), Codebooks(3, 64)]


def packed_and_dense(rows, columns, dtype, scheme=None, sparsity=0.5, permuted=False):
    """Return a random matrix, of which `sparsity` is 0, packed and as it was."""
    W = torch.randn(rows, columns).to(dtype)
    W[torch.rand(rows, columns) < sparsity] = 0
    W[0], grid = 0, None  # a row without weights
    if scheme:
        W, grid = quantize_nearest(W, scheme)
    if permuted:
        order = torch.randperm(columns)
        W, grid.group[:] = W[:, order], grid.group[order]
    parts, description = encode(W, grid)
    return PackedWeight.of(parts, json.loads(json.dumps(description))), W


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_and_expansions_are_those_of_the_dense_matrix_by_every_kind_of_kernel(scheme, dtype, monkeypatch):
    packed, W = packed_and_dense(70, 704, dtype, scheme)
    for kind in packed.kinds():
        monkeypatch.setattr(PackedWeight, "kinds", lambda self, kind=kind: [kind])
        assert torch.equal(packed.expand().view(torch.uint8), W.view(torch.uint8)), kind
        for x_dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
            for tokens in (1, 3, FEW, MOST):
                x = torch.randn(1, tokens, 704).to(x_dtype)
                y, exact = packed.multiply(x), x.double() @ W.double().t()
                assert y.dtype == x_dtype and y.shape == (1, tokens, 70)
                assert packed.multiply(x[0]).is_contiguous()  # which kernels of others take for granted
                rounds = tokens > FEW and x_dtype not in (dtype, torch.float32)  # the expanded matrix, like x
                most = 2**-7 if rounds else tolerance
                assert (y - exact).abs().max() <= most * exact.abs().max(), (kind, x_dtype, tokens)
                assert torch.equal(y, packed.multiply(x))


@pytest.mark.parametrize("tokens", [1, 3, FEW])  # With AMX the latter are multiplied in the matrix units.
def test_a_sum_with_a_bias_is_rounded_once(tokens):
    packed, _ = packed_and_dense(70, 128, torch.bfloat16)
    if not packed.kinds():
        pytest.skip("there is no kernel for this CPU")
    x, bias = torch.randint(-64, 64, (tokens, 128)).bfloat16(), torch.full((70,), 3.0).bfloat16()
    packed.values[:] = packed.values.sign()  # All products and sums are exact.
    exact = x.float() @ packed.expand().float().t() + bias.float()
    assert torch.equal(packed.multiply(x, bias), exact.bfloat16())


@pytest.mark.parametrize("rows, columns, sparsity", [(1, 2, 0.5), (33, 7, 0.5), (5, 100, 0.99), (64, 64, 0.07),
                                                     (3, 1100, 0.5), (3, 1152, 0.5), (3, 64, 1.0)])
@pytest.mark.parametrize("scheme", [None, Scheme(3)], ids=str)
def test_any_shape_and_any_order_of_groups_is_right(scheme, rows, columns, sparsity):
    torch.manual_seed(0)
    packed, W = packed_and_dense(rows, columns, torch.bfloat16, scheme, sparsity)
    assert torch.equal(packed.expand(), W) and packed.shape == W.shape
    x = torch.randn(2, columns)
    assert torch.allclose(packed.multiply(x), x @ W.float().t(), atol=1e-4)
    grouped, W = packed_and_dense(8, 64, torch.bfloat16, Scheme(4, 16), permuted=True)
    assert torch.equal(grouped.expand(), W) and not grouped.kinds()


def test_kinds_of_kernels_are_chosen_by_the_flags_of_the_cpu(monkeypatch):
    flags = {"avx512f", "avx512bw", "avx512vbmi", "avx512vbmi2", "avx2", "fma", "f16c"}
    for missing, values, codes in (((), "vbmi2", "codes"), (("avx512vbmi2",), "avx512", "avx2"),
                                   (("avx512vbmi",), "vbmi2", "avx2"), (("avx512f",), "avx2", "avx2"),
                                   (("avx512f", "avx2"), None, None)):
        monkeypatch.setattr(sparse_cpu, "HERE", flags - {*missing})
        kinds = sparse_cpu.kinds_for.__wrapped__
        assert next(iter(kinds(torch.bfloat16, 0, 128)), None) == values
        assert next(iter(kinds(torch.bfloat16, 4, 128)), None) == codes
        assert kinds(torch.float16, 8, 128) == kinds(torch.float64, 0, 128) == []
        assert kinds(torch.bfloat16, 4, 32) == kinds(torch.bfloat16, 0, 7) == []


def test_the_number_of_threads_changes_nothing():
    packed, _ = packed_and_dense(500, 256, torch.bfloat16)
    x, before = torch.randn(4, 256), torch.get_num_threads()
    try:
        results = [torch.set_num_threads(threads) or packed.multiply(x) for threads in (1, 2, 5)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_many_tokens_give_what_the_dense_layer_gives_bit_for_bit_and_gradients_flow_and_it_can_be_compiled():
    packed, W = packed_and_dense(96, 128, torch.bfloat16)
    layer = SparseLinear(packed, torch.randn(96).bfloat16())
    dense = torch.nn.Linear(128, 96, dtype=torch.bfloat16)
    dense.weight.data, dense.bias.data = W, layer.bias
    x = torch.randn(2, MOST, 128).bfloat16()
    assert torch.equal(layer(x), dense(x)) and layer(x[:, :0]).shape == (2, 0, 96)
    assert torch.allclose(layer(x[:1]).float(), dense(x[:1]).float(), atol=2**-5)
    assert torch.equal(torch.compile(layer, backend="eager")(x[:1]), layer(x[:1]))
    few = x[0, :2].clone().requires_grad_()
    gradients = [torch.autograd.grad(each(few).sum(), few)[0] for each in (layer, dense)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=ON_GPU) for dtype in DTYPES[not ON_GPU:]], ids=str)
@pytest.mark.parametrize("scheme", [None, Scheme(3), Scheme(4, 64, True), Scheme(8)], ids=str)
def test_the_gpu_gives_the_same(scheme, dtype):
    """On a make-believe GPU in Triton's interpreter, which cannot round to bfloat16."""
    torch.manual_seed(0)
    for rows, columns in ((7, 1152), (3, 64)):
        packed, W = packed_and_dense(rows, columns, dtype, scheme)
        with contextlib.nullcontext() if ON_GPU else Gpu():
            moved = copy.deepcopy(packed).to("cuda:0")
            assert moved.kind(moved.mask.device) == "triton" and torch.equal(moved.expand().cpu(), W)
            for tokens in (1, 3, FEW, FEW + 1):
                bias = torch.randn(rows) if tokens == 3 else None
                x = torch.randn(tokens, columns)
                y = moved.multiply(x.to("cuda:0"), None if bias is None else bias.to("cuda:0"))
                expected = torch.nn.functional.linear(x, W.float(), bias)
                assert y.is_cuda and torch.allclose(y.cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("scheme, sparsity", [(None, 0.0), (Scheme(4, 16), 0.0), (Scheme(3), 0.5)], ids=str)
def test_a_layer_on_the_gpu_is_expanded_there(scheme, sparsity):
    """After from_pretrained(folder, device_map="cuda"): one without a mask, and each with `dequantize`."""
    W = torch.randn(6, 64).bfloat16()
    W[torch.rand(6, 64) < sparsity] = 0
    W, grid = quantize_nearest(W, scheme) if scheme else (W, None)
    parts, description = encode(W, grid)
    layer = SparseLinear(PackedWeight(description), torch.nn.Parameter(torch.randn(6).bfloat16()))
    for name, part in parts.items():
        setattr(layer.weight, name, part)
    with Gpu():
        layer.to("cuda:0")
        layers = [layer.expanded(torch.bfloat16), layer.expanded(torch.float32), layer.prepared(torch.bfloat16)]
        assert (layers[-1] is layer) == ("mask" in parts) == (sparsity > 0)
        for dense in layers[:2] if sparsity else layers:
            assert type(dense) is torch.nn.Linear and dense.weight.is_cuda and dense.bias.is_cuda
            assert torch.equal(dense.weight.cpu(), W.to(dense.weight.dtype))


def check_guarded():
    """Let pages without access follow all buffers of packed matrices; whatever touches them ends the process."""
    libc, areas = ctypes.CDLL(None), []

    def guarded(tensor):
        pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        areas.append(mmap.mmap(-1, pages + mmap.PAGESIZE))
        start = ctypes.addressof(ctypes.c_char.from_buffer(areas[-1]))
        assert not libc.mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0)
        copy = torch.frombuffer(areas[-1], dtype=torch.uint8, offset=pages - tensor.nbytes, count=tensor.nbytes)
        return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    cases = (None, 192), (Scheme(3), 192), (Scheme(4, 64), 128)
    for dtype, (scheme, columns), room in itertools.product(DTYPES, cases, (0, sparse_cpu.REACH)):  # 0: room is made
        packed, W = packed_and_dense(33, columns, dtype, scheme, 0.45)
        data = torch.nn.functional.pad(getattr(packed, packed.data), (0, room))
        for name, buffer in packed._buffers.items():
            setattr(packed, name, guarded(buffer))
        for kind in packed.kinds():
            with mock.patch.object(PackedWeight, "kinds", lambda self, kind=kind: [kind]):
                for x in (None, *(torch.randn(n, columns).bfloat16() for n in (1, 17)), torch.randn(3, columns)):
                    setattr(packed, packed.data, guarded(data)[:len(data) - room])
                    packed.expand(guarded(W)) if x is None else packed.multiply(guarded(x))
                assert torch.equal(packed.expand(guarded(W)), W)


def test_nothing_is_read_or_written_behind_a_buffer(fork):
    process = fork(check_guarded)
    process.join()
    assert process.exitcode == 0


@pytest.fixture(params=["wide llama", "wide opt", "wide bloom"])
def saved(request, tokenizer, tmp_path):
    """Return a model of which half is pruned, at random or 2:4, and its sparse folder."""
    model = make(request.param)
    for W in matrices(model).values():
        scores = torch.rand_like(W, dtype=torch.float32).view(-1, 4 if request.param == "wide llama" else W.numel())
        W[(scores <= scores.median(1, keepdim=True).values).view_as(W)] = 0
    save(tmp_path / "saved", model, tokenizer, {}, "sparse", {})
    return model, tmp_path / "saved"


@pytest.mark.parametrize("gpu", [False, True])
def test_a_device_without_kernels_expands_the_matrices(gpu, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_cpu, "HERE", set())
    monkeypatch.setattr(sparse_cpu, "kinds_for", sparse_cpu.kinds_for.__wrapped__)  # which remembers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    loaded, _ = mixgpt.load(saved[1], "cpu", torch.float64)  # larger than that on disk
    assert not [module for module in loaded.modules() if isinstance(module, SparseLinear)]
    assert_same(saved[0].double(), loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_a_folder_is_read_packed_by_mixgpt_and_by_transformers(saved, tokenizer, tokens):
    model, folder = saved
    packed, _ = mixgpt.load(folder, "cpu")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert_same(packed, again)
    layers = [module for module in packed.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == len(matrices(model)) and not packed.training
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.sparse.safetensors").values())
    held = sum(tensor.nbytes for tensor in (*packed.parameters(), *packed.state_dict().values()) if tensor.dim() < 2)
    assert held < stored
    assert torch.equal(logits(packed, tokens), logits(model, tokens))
    assert_same(packed.base_model, AutoModel.from_pretrained(folder))
    assert perplexities(packed, {"": tokens}, 5, CPU) == perplexities(model, {"": tokens}, 5, CPU)
    texts = [complete(each, tokenizer, "import a", max_new_tokens=12).text for each in (packed, again, model)]
    assert texts[0] == texts[1] == texts[2]
    assert_same(mixgpt.load(folder, "cpu", packed=False)[0], load.load_model(folder, "auto"))


def test_a_packed_model_that_is_to_be_saved_says_what_to_do_and_writes_nothing(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for online in ("hf_api", "create_and_tag_model_card"):
        monkeypatch.setattr(f"transformers.utils.hub.{online}", mock.MagicMock())
    packed, before = mixgpt.load(saved[1], "cpu")[0], set(tmp_path.rglob("*"))
    for write in (packed.save_pretrained, copy.deepcopy(packed).save_pretrained, packed.push_to_hub):
        with pytest.raises(InputError, match=r"^save_pretrained: .* packed; load it by mixgpt.load\(.*packed=False\)"):
            write("again")
    assert set(tmp_path.rglob("*")) == before


def test_a_packed_model_can_be_copied_pickled_cast_and_given_a_state(saved, tokens):
    model, folder = saved
    packed = load.read_model(folder, "auto", packed=True).eval()
    with torch.inference_mode():  # which leaves nothing behind
        expected = logits(packed, tokens[:, :3])
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed):
        other.load_state_dict(packed.state_dict())
        assert torch.equal(logits(other, tokens[:, :3]), expected)
    for dtype in (torch.bfloat16, torch.float64):  # float64 has no kernel
        with torch.inference_mode():
            packed.to(dtype)(tokens)
        assert torch.equal(logits(packed, tokens), logits(model.to(dtype), tokens))


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["wide llama"], indirect=True)
def test_transformers_says_what_to_import_and_then_reads_the_folder(saved):
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(saved[-1])!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "import mixgpt" in done.stderr.splitlines()[-1]
    light = "import mixgpt, sys; assert not {'torch', 'transformers'} & sys.modules.keys(); "
    for before in (light, "from transformers import AutoModelForCausalLM; import mixgpt; "):
        subprocess.run([sys.executable, "-c", before + code], check=True, cwd=ROOT)


@pytest.mark.parametrize("part, change, message", [
    ("mask", lambda mask: mask[:-1], "mask"), ("mask", lambda mask: mask ^ 1, "values"),
    ("values", lambda values: values[:-1], "values"), ("values", lambda values: values * float("nan"), "NaN")])
def test_parts_that_do_not_fit_are_refused_in_one_line(part, change, message, saved):
    _, folder = saved
    state = load_file(folder / "model.sparse.safetensors")
    key = next(key for key in state if key.endswith(f".weight.{part}"))
    save_file(state | {key: change(state[key]).contiguous()}, folder / "model.sparse.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"model {folder}: .*{message}") as error:
        load.read_model(folder, "auto", packed=True)
    assert "\n" not in str(error.value)


def test_codes_of_too_many_bits_are_refused():
    parts, description = encode(torch.zeros(2, 8), None)
    packed = PackedWeight(description | {"wbits": 9, "parts": ["mask", "codes"]})
    packed.mask, packed.codes = parts["mask"], torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match="its codes have 9 bits"):
        packed.prepare()


def test_a_state_that_does_not_fit_its_mask_is_refused():
    packed, _ = packed_and_dense(8, 64, torch.bfloat16, Scheme(4))
    for name, change in (("mask", lambda mask: mask | 3), ("zero", lambda zero: zero + 16),
                         ("group", lambda group: group + 1), ("group", lambda group: group - 1)):
        with pytest.raises(ValueError, match="its (codes|zeros or groups)"):
            copy.deepcopy(packed).load_state_dict(packed.state_dict() | {name: change(getattr(packed, name))})
