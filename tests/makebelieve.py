"""A make-believe GPU: tensors that say they lie on cuda:0, hold a CPU tensor, and refuse what a GPU refuses.

    with Gpu(memory=2**30) as gpu:
        cli.main(script, [..., "--device", "cuda:0"])
    gpu.synchronisations, gpu.peak

What it refuses: operands on two devices, `numpy()` of what lies on the GPU, and more bytes at a time than it has memory
(torch.OutOfMemoryError). What it counts: every place where the host would wait for the GPU, in the thread that launches
its work; threads that move weights may wait. Kernels of Triton run in its interpreter, on the CPU tensors behind, with
the layouts that they have.

Technique: a wrapper subclass of torch.Tensor with __torch_dispatch__, and a TorchDispatchMode for what makes new
tensors (https://docs.pytorch.org/docs/stable/notes/extending.html). To PyTorch's C++ a tensor here lies on the CPU, so
that no CUDA build is needed; what asks in Python is told cuda:0.
"""

import collections
import concurrent.futures
import contextlib
import functools
import sys
import threading
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
           aten.is_nonzero.default, aten.bincount.default, aten._unique2.default, aten.repeat_interleave.Tensor,
           aten.allclose.default}  # whose result, or its size, the host reads
ROOT = str(Path(__file__).parent.parent)
with torch.device("meta"):
    torch.empty(0)  # PyTorch lists its constructors at this moment, and not while another function is torch.tensor


class GpuTensor(torch.Tensor):
    """A tensor on the make-believe GPU. `held`: the same on the CPU, where its operators run."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU,
            requires_grad=requires_grad)

    def __init__(self, held, requires_grad=False):
        self.held = held
        Gpu.current.hold(self)

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Gpu.current.run(function, args, kwargs or {})

    def to(self, *args, **kwargs):
        device, dtype, copy = _destination(self, args, kwargs)
        if device.type == "cpu":
            Gpu.current.wait("copy to the host")
            return self.held.detach().to(dtype, copy=True)
        return torch.Tensor.to(self, dtype, copy=copy) if dtype != self.dtype or copy else self

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.to("cpu").tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):  # what Triton's interpreter works on
        return self.held.untyped_storage()

    def __deepcopy__(self, memo):
        copy = GpuTensor(self.held.detach().clone(memory_format=torch.preserve_format))
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy


def _destination(tensor, args, kwargs):
    """Return the device, the dtype and whether a copy is wanted, of Tensor.to's arguments."""
    device, dtype, copy = kwargs.get("device"), kwargs.get("dtype"), kwargs.get("copy", False)
    for value in args:
        if isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = value
    return torch.device(tensor.device if device is None else device), dtype or tensor.dtype, copy


def _on_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def held(value):
    """Return the CPU tensor behind a tensor on the GPU, anything else as it is."""
    return value.held if isinstance(value, GpuTensor) else value


class _Factories(TorchDispatchMode):
    """Sees the operators whose operands do not lie on the GPU: those that make a tensor there, and transfers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return Gpu.current.run(function, args, kwargs or {})


class Gpu:
    """The make-believe GPU, as a context; one at a time.

    memory: its bytes. free: of these, as `torch.cuda.mem_get_info` tells them; default: those not in use.
    synchronisations: {(what waited, "file:line in the product"): count}. peak: the most bytes in use so far. pinned:
    tensors that were made in pinned memory of the host.
    """

    current = None

    def __init__(self, memory=80 << 30, free=None):
        self.memory, self._free = memory, free
        self.synchronisations = collections.Counter()
        self.thread = threading.get_ident()
        self.used, self.peak, self.pinned, self.attends = 0, 0, 0, None
        self._holders = collections.Counter()  # address of a storage -> tensors that keep it

    def hold(self, tensor):
        storage = tensor.held.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if not address or tensor.held.is_meta:
            return
        if not self._holders[address]:
            if self.used + nbytes > self.memory:
                del self._holders[address]
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes (make-believe)")
            self.used += nbytes
            self.peak = max(self.peak, self.used)
        self._holders[address] += 1
        # the number of bytes goes along: a storage that was resized has another one in the end
        weakref.finalize(tensor, self._release, address, nbytes)

    def _release(self, address, nbytes):
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.used -= nbytes

    def wait(self, what):
        """Note that the host waits for the GPU here."""
        if threading.get_ident() != self.thread:
            return
        frame = sys._getframe(1)
        while frame and not (frame.f_code.co_filename.startswith(ROOT) and frame.f_code.co_filename != __file__
                             and "site-packages" not in frame.f_code.co_filename  # an environment may lie below
                             and frame.f_code.co_name != "__torch_function__"):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"
        self.synchronisations[what, place] += 1

    def run(self, function, args, kwargs):
        """Run an operator on the CPU tensors behind its operands. Returns what it returns, where it would lie."""
        operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        args_, kwargs_ = tree_map(held, (args, kwargs))
        self.pinned += bool(kwargs_.pop("pin_memory", None))  # which needs a GPU's driver
        here = any(isinstance(value, GpuTensor) for value in operands)
        if here:
            self._check(function, args, operands)
        if kwargs.get("device") is not None:
            # of an operand on the GPU C++ says that it lies on the CPU, and asks for a copy there
            here = (_on_gpu(kwargs["device"]) or self.attends == threading.get_ident()
                    or here and function is aten._to_copy.default)
            meta = torch.device(kwargs["device"]).type == "meta"
            kwargs_["device"] = "meta" if meta else CPU
        if function is aten.copy_.default:
            here = isinstance(args[0], GpuTensor)
        result = self.execute(function, args_, kwargs_)
        written = _written(function, args, kwargs)
        if written:  # the very operands are given back
            for tensor in written:
                if isinstance(tensor, GpuTensor) and tensor.shape != tensor.held.shape:
                    raise NotImplementedError(f"{function} gives its operand another shape")
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map(lambda value: GpuTensor(value) if type(value) is torch.Tensor else value,
                        result) if here else result

    def _attend(self, attention, query, *args, **kwargs):
        with mock.patch.object(self, "attends", threading.get_ident() if isinstance(query, GpuTensor) else None):
            return attention(query, *args, **kwargs)  # C++ makes a mask where the query lies

    def execute(self, function, args, kwargs):
        """Return what an operator gives for the CPU tensors behind its operands."""
        if function is aten.mm.dtype:  # products of bfloat16 or float16 with float32 sums, which no CPU has
            return args[0].float() @ args[1].float()
        if function is aten.addmm.dtype_out:
            return kwargs["out"].copy_(args[0] + args[1].float() @ args[2].float())
        return function(*args, **kwargs)

    def _check(self, function, args, operands):
        elsewhere = [value for value in operands if not isinstance(value, GpuTensor) and value.dim()]
        if function is aten.copy_.default:
            if elsewhere:
                self.wait("copy between host and GPU")
            return
        if function in INDEXING:  # indices may lie on the host, and are copied
            indices = [value for value in tree_leaves(args[1]) if isinstance(value, torch.Tensor)]
            if any(index is value for index in indices for value in elsewhere):
                self.wait("indices from the host")
            if any(held(index).dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("indexing by a mask")
            elsewhere = [value for value in elsewhere if not any(value is index for index in indices)]
        if elsewhere:
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                               f"and cpu! (make-believe, {function}, {[tuple(value.shape) for value in operands]})")
        if function in WAITING:
            self.wait(str(function))

    @property
    def free(self):
        return self.memory - self.used if self._free is None else self._free

    def __enter__(self):
        assert Gpu.current is None
        Gpu.current = self
        self._stack = contextlib.ExitStack()
        for name, value in self._functions().items():
            self._stack.enter_context(mock.patch(f"torch.cuda.{name}", value))
        self._stack.enter_context(mock.patch("torch.Generator", _generator(torch.Generator)))
        self._stack.enter_context(mock.patch("torch.tensor", _tensor(torch.tensor)))
        self._stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", functools.partial(
            self._attend, torch.nn.functional.scaled_dot_product_attention)))
        self._stack.enter_context(mock.patch.object(concurrent.futures.ThreadPoolExecutor, "submit", _submit(
            concurrent.futures.ThreadPoolExecutor.submit)))
        # a module moved there gets new parameters, as those of another class cannot be overwritten
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        self._stack.enter_context(_Factories())
        return self

    def __exit__(self, *_):
        self._stack.close()
        Gpu.current = None

    def _functions(self):
        """Return what stands for the functions of torch.cuda."""
        nothing = contextlib.nullcontext()
        return {
            "is_available": lambda: True, "device_count": lambda: 1, "is_initialized": lambda: True,
            "_lazy_init": lambda: None, "init": lambda: None, "current_device": lambda: 0,
            "get_device_name": lambda *_: "make-believe GPU", "get_device_capability": lambda *_: (9, 0),
            "mem_get_info": lambda *_: (self.free, self.memory), "memory_allocated": lambda *_: self.used,
            "memory_reserved": lambda *_: self.used, "max_memory_allocated": lambda *_: self.peak,
            "reset_peak_memory_stats": lambda *_: vars(self).update(peak=self.used),
            "empty_cache": lambda: None, "synchronize": lambda *_: self.wait("torch.cuda.synchronize"),
            "Event": functools.partial(Event, self), "current_stream": mock.MagicMock(),
            "device_of": lambda _: nothing, "device": lambda _: nothing,
        }


class Event:
    """An event on the make-believe GPU, which gets there when the host next waits."""

    def __init__(self, gpu, enable_timing=False):
        self.gpu, self.timed, self.time = gpu, enable_timing, None

    def record(self, stream=None):
        self.time, self.waits = time.perf_counter(), self.gpu.synchronisations.total()

    def query(self):
        return self.time is not None and self.gpu.synchronisations.total() > self.waits

    def synchronize(self):
        self.gpu.wait("torch.cuda.Event.synchronize")

    def elapsed_time(self, end):
        assert self.timed and end.timed and self.query() and end.query(), "not ready"
        return 1000 * (end.time - self.time)


@functools.cache
def _outputs(function):
    """Return (place, name) of the arguments that an operator writes to and gives back."""
    schema = function._schema
    places = [(place, each.name) for place, each in enumerate(schema.arguments)
              if each.alias_info is not None and each.alias_info.is_write]
    return places if len(places) == len(schema.returns) else []


def _written(function, args, kwargs):
    """Return the operands that an operator writes to and gives back."""
    return [kwargs[name] if name in kwargs else args[place] for place, name in _outputs(function)]


def _generator(original):
    class Generator(original):
        """A generator of the CPU that says it is on the GPU, where what asks for its device makes the numbers."""

        device = property(lambda self: CUDA)

    return lambda device="cpu": Generator("cpu") if _on_gpu(device) else original("cpu")


def _tensor(original):
    def tensor(data, *args, device=None, **kwargs):
        made = original(data, *args, **kwargs)
        if _on_gpu(device):
            Gpu.current.wait("copy to the GPU")  # of pageable memory, for which CUDA waits
        return made.to(CUDA) if _on_gpu(device) else made if device is None else made.to(device)

    return tensor


def _submit(original):
    """Let threads see the make-believe GPU, too: dispatch modes belong to one thread."""
    def submit(executor, function, *args, **kwargs):
        def inside():
            with _Factories():
                return function(*args, **kwargs)

        return original(executor, inside)

    return submit
