"""Models on meta whose weights stay on disk: each module reads its own from safetensors files when it runs."""

import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from mixgpt.common.errors import InputError
from mixgpt.common.files import replacing
from mixgpt.modeling.experts import Part
from mixgpt.modeling.layout import layout_of

# dtypes by their safetensors names
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
            "BOOL": torch.bool}
NARROW = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # read, and converted on reading
NAMES = {dtype: name for name, dtype in {**FLOATS, **INTEGERS}.items()}
TYPES = FLOATS | INTEGERS | NARROW
# For each dtype, an unsigned one of numpy of the same width, and the bits of the exponent in it.
EXPONENTS = {torch.float64: (np.uint64, np.uint64(0x7FF << 52)), torch.float32: (np.uint32, np.uint32(0xFF << 23)),
             torch.float16: (np.uint16, np.uint16(0x1F << 10)), torch.bfloat16: (np.uint16, np.uint16(0xFF << 7))}
PIECE = 1 << 22  # bytes that are read and checked at a time: less than a core's cache
CHECKING = 8  # threads at most: so many read as fast as a disk gives


class Place(NamedTuple):
    """Where a tensor is on disk."""

    file: str
    key: str  # in the file
    part: Part | None = None  # if it is one of several in the tensor of this key


@dataclass
class Source:
    """Where a module's parameters and buffers are on disk."""

    places: dict  # name in the module -> Place
    dtype: torch.dtype  # of the weights in memory
    ahead: Future | None = field(default=None, init=False)  # tensors being read
    empty: dict = field(default_factory=dict, init=False)  # those on meta, whose place the tensors take while loaded

    def tensor(self, name):
        """Read one tensor."""
        return self._read([name])[name]

    def mapped(self, name):
        """Return one tensor as it is stored, read only where it is looked at."""
        file, key, part = self.places[name]
        with safe_open(file, "pt") as tensors:
            return part.of(tensors.get_slice(key)[part.expert]) if part else tensors.get_tensor(key)

    def _read(self, names, pinned=False):
        return {name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
                for name, tensor in read({name: self.places[name] for name in names}, pinned).items()}

    def pieces(self, name):
        """Yield the values of a tensor in order, as vectors of about PIECE bytes that are valid until the next one."""
        if self.places[name].part:
            yield self.tensor(name).flatten()
            return
        for piece in _pieces(self.places[name]):
            yield piece.to(self.dtype) if piece.is_floating_point() else piece

    def prefetch(self, device):
        """Start reading the tensors for `load`, in a thread."""
        self.ahead = ThreadPoolExecutor(1).submit(self._fetch, device)

    def _fetch(self, device):
        if torch.device(device).type != "cuda":
            return self._read(self.places)
        tensors = self._read(self.places, pinned=True)
        stream = _transfers(torch.device(device))  # of its own, to overlap with computation
        with torch.cuda.stream(stream):
            tensors = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
        stream.synchronize()
        return tensors

    def load(self, module, device):
        """Put the tensors of the module, which is on meta, on a device."""
        self.empty = dict(module.state_dict(keep_vars=True))
        tensors = self.ahead.result() if self.ahead else self._fetch(device)
        self.ahead = None
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(device))
            if isinstance(self.empty[name], torch.nn.Parameter):
                tensor = torch.nn.Parameter(tensor, requires_grad=False)
            _assign(module, name, tensor)
        module.to(device)  # buffers not on disk

    def unload(self, module):
        """Free the module's tensors; buffers not on disk go to the host."""
        for name, tensor in self.empty.items():
            _assign(module, name, tensor)
        for name, buffer in module.named_buffers():
            if not buffer.is_meta:
                _assign(module, name, buffer.to("cpu"))


def read(places, pinned=False):
    """Read {name: tensor} from places, {name: Place}. pinned: into memory that GPUs copy from.

    Into memory, not mapped: a process dies if it touches a mapped file that was truncated meanwhile. Raises InputError
    if a file is not what it was.
    """
    tensors, files = {}, {}
    for name, (file, key, part) in places.items():
        files.setdefault(file, []).append((name, key, part))
    for file, wanted in files.items():
        with _reading(file) as (stream, entries, start):
            tensors |= {name: _tensor(stream, entries[key], start, pinned, part) for name, key, part in wanted}
    return tensors


@contextlib.contextmanager
def _reading(file):
    """Open a safetensors file: give its stream, the entries of its header and where the data start.

    Raises InputError if it is not what it was.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            yield stream, *_header(stream)
    except OSError as error:
        raise InputError(f"{file}: cannot be read during the run ({error.strerror})") from error
    except (EOFError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{file}: was truncated or changed during the run") from error


def _pieces(place):
    """Yield the values of a whole tensor in order, in one buffer that is filled again and again."""
    with _reading(place.file) as (stream, entries, start):
        dtype, (begin, end) = TYPES[entries[place.key]["dtype"]], entries[place.key]["data_offsets"]
        buffer = torch.empty(min(PIECE, end - begin), dtype=torch.uint8)
        stream.seek(start + begin)
        for left in range(end - begin, 0, -PIECE):
            content = buffer[:left]
            _exactly(stream, content.numpy())
            yield content.view(dtype)


def _header(stream):
    """Return the header of an open safetensors file, {key: entry}, and where the data start."""
    size = int.from_bytes(_exactly(stream, bytearray(8)), "little")
    if size > os.fstat(stream.fileno()).st_size:
        raise EOFError
    return json.loads(_exactly(stream, bytearray(size))), 8 + size


def _tensor(stream, entry, start, pinned, part):
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    if part:
        size, shape = (end - begin) // shape[0], shape[1:]
        begin, end = begin + part.expert * size, begin + (part.expert + 1) * size
    content = torch.empty(end - begin, dtype=torch.uint8, pin_memory=pinned)
    stream.seek(start + begin)
    _exactly(stream, content.numpy())
    tensor = content.view(TYPES[entry["dtype"]]).view(shape)
    return part.of(tensor).contiguous() if part else tensor


def _exactly(stream, buffer):
    """Fill a buffer from an unbuffered file, which may give less than asked for. Raises EOFError at its end."""
    left = memoryview(buffer).cast("B")
    while left:
        if not (count := stream.readinto(left)):
            raise EOFError
        left = left[count:]
    return buffer


@functools.cache
def _transfers(device):
    """Return the one stream for copying weights to a GPU: PyTorch's allocator caches memory per stream."""
    return torch.cuda.Stream(device)


def _assign(module, name, tensor):
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, tensor)


def attach(model, family, places):
    """Make modules of a model on meta read their tensors from places {name: Place}; `model.source` has all."""
    model.source = Source(places, model.dtype)
    layers = {f"{family.layers}.{index}": layer for index, layer in enumerate(family.layers_of(model))}
    for path, module in (layers | family.rest_of(model)).items():
        module.source = Source({name.removeprefix(f"{path}."): place for name, place in places.items()
                                       if name.startswith(f"{path}.")}, model.dtype)


def prefetch(layers, index, device):
    """Start reading layer number `index`, if it exists and is on disk, for `on_device`."""
    if index < len(layers) and (source := getattr(layers[index], "source", None)):
        source.prefetch(device)


def files_of(name, **arguments):
    """Return the safetensors files of a directory or hub id, none if its weights are in another format.

    Raises ValueError if the index is damaged or points outside the directory.
    """
    found = {file: cached_file(name, file, _raise_exceptions_for_missing_entries=False, **arguments)
             for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)}
    if found[SAFE_WEIGHTS_NAME]:
        return [found[SAFE_WEIGHTS_NAME]]
    if not found[SAFE_WEIGHTS_INDEX_NAME]:
        return []
    check_index(found[SAFE_WEIGHTS_INDEX_NAME])
    return get_checkpoint_shard_files(name, found[SAFE_WEIGHTS_INDEX_NAME], **arguments)[0]


def check_index(index):
    """Raise ValueError if a shard index is damaged or points outside its directory."""
    try:
        content = json.loads(Path(index).read_text())
        files = set(content["weight_map"].values())
        dict(content.get("metadata") or {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{Path(index).name} is damaged ({type(error).__name__}: {error})") from error
    if not files:
        raise ValueError(f"{Path(index).name} is damaged (it names no files)")
    for file in files:
        if not isinstance(file, str) or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or (
                not PurePosixPath(file).parts):
            raise ValueError(f"its index names {file}, which is not in the folder")


def check_header(file):
    """Raise ValueError if the header of a safetensors file is damaged, or does not fit the file's size."""
    with _opened(file):
        pass


def dtype_of(files):
    """Return the dtype of the first floating-point tensor of safetensors files; float32 if there is none."""
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118, not a dict
                name = tensors.get_slice(key).get_dtype()
                if name in FLOATS:
                    return FLOATS[name]
    return torch.float32


def stream(model, family, files):
    """Make a model on meta read its weights from safetensors files. Returns whether these hold all, unchanged.

    Keys may lack or add the base model prefix, as `from_pretrained` allows, or be those of a model whose text part this
    is. Raises ValueError if a shape differs from the configuration; OSError or SafetensorError if a file is damaged.
    """
    held = {}  # key -> (file, dtype, shape)
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118, not a dict
                tensor = tensors.get_slice(key)
                held[key] = file, tensor.get_dtype(), tuple(tensor.get_shape())
    base, tied, places = model.base_model_prefix + ".", model.all_tied_weights_keys, {}

    layout = layout_of(model)

    def find(name):
        """Return the Place of a tensor under its published key or its own name, or None."""
        for key, part in (layout.get(name, (name, None)), (name, None)):
            inside = key.removeprefix(base)
            for stored in (key, inside, base + key, f"language_model.{key}", f"{base}language_model.{inside}"):
                if stored in held:
                    return Place(held[stored][0], stored, part)

    experts = Counter(key for key, part in layout.values() if part and not part.part)
    for name, tensor in model.state_dict().items():
        place = find(tied.get(name, name))
        if place is None:
            return False
        for _, key, part in filter(None, (place, find(name))):
            shape = part.whole(tensor.shape, experts[layout[name][0]]) if part else tuple(tensor.shape)
            _check(key, *held[key][1:], shape, tensor.is_floating_point())
        places[name] = place
    # `from_pretrained` does not tie tensors that are both stored and differ
    own = Source({name: place for name in tied if (place := find(name))}, model.dtype)
    together = Source(places, model.dtype)
    if not all(torch.equal(own.tensor(name), together.tensor(name)) for name in own.places):
        return False
    attach(model, family, places)
    _compute_buffers(model)
    return True


def _check(key, dtype, shape, expected, floating):
    """Raise ValueError if a stored tensor cannot be that of a model."""
    if shape != expected:
        raise ValueError(f"{key} is {_times(shape)}, its configuration expects {_times(expected)}")
    if floating and dtype not in FLOATS and dtype not in NARROW:
        raise ValueError(f"{key} is stored as {dtype}, must be a floating-point dtype")


@contextlib.contextmanager
def _opened(file):
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{Path(file).name} is damaged ({error})") from error


def _times(shape):
    return " x ".join(map(str, shape)) or "a single number"


def _compute_buffers(model):
    """Compute on the host the buffers that are in no file, such as rotary frequencies; weights stay on meta."""
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False)
                 if buffer.is_meta and name in module._non_persistent_buffers_set]
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if names:
            model._init_weights(module)


def tensors_of(model):
    """Yield (name, tensor) of every parameter, read from disk if the model is streamed."""
    source = getattr(model, "source", None)
    for name, parameter in model.named_parameters():
        yield name, source.tensor(name) if source else parameter


def check_weights(model, sums=None):
    """Yield (name, whether it is finite) of every parameter, checked in pieces by several threads.

    sums: dict that takes {name: checksum} of all of them.
    """
    source, parameters = getattr(model, "source", None), dict(model.named_parameters())

    def check(name):
        parameter = parameters[name].detach()
        pieces = source.pieces(name) if source else parameter.flatten().split(PIECE)
        found = _begin_checksum(source.dtype if source else parameter.dtype, parameter.shape)
        for piece in pieces:
            if not is_finite(piece):
                return name, False, None
            if sums is not None:
                found.update(_bytes(piece))
        return name, True, found.hexdigest()

    pool = ThreadPoolExecutor(min(CHECKING, torch.get_num_threads()))
    try:
        for name, finite, checksum in pool.map(check, parameters):
            if sums is not None:
                sums[name] = checksum
            yield name, finite
    finally:
        pool.shutdown(cancel_futures=True)


def is_finite(values):
    """Return whether no value of a floating-point vector on the host is NaN or inf.

    By their bits, in one thread, so that several can check at a time: all bits of the exponent are set in these only.
    """
    kind, exponent = EXPONENTS[values.dtype]
    bits = values.view(torch.uint8).numpy().view(kind)
    return not bits.size or np.bitwise_and(bits, exponent).max() < exponent


def fingerprint(model):
    """Return a digest of 64 values of every parameter, the same whether stored as bfloat16 or wider.

    Of files only these are read.
    """
    result, source = hashlib.sha256(type(model).__name__.encode()), getattr(model, "source", None)
    for name, parameter in model.named_parameters():
        numbers = (source.mapped(name) if source else parameter.detach()).flatten()
        values = numbers[:: -(-numbers.numel() // 64)].to(source.dtype if source else parameter.dtype)
        result.update(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return result.hexdigest()


def digest(tokens):
    """Return a digest of tokens (N, T)."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def checksum(tensor):
    """Return a checksum of a tensor, XXH3 of its dtype, shape and bytes: as fast as memory is read."""
    found = _begin_checksum(tensor.dtype, tensor.shape)
    found.update(_bytes(tensor))
    return found.hexdigest()


def _begin_checksum(dtype, shape):
    return xxhash.xxh3_64(f"{dtype} {tuple(shape)}".encode())


def _bytes(tensor):
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()


def write(file, tensors, metadata=None):
    """Write {key: tensor} as a safetensors file, atomically and flushed to disk. metadata: {key: text} for its header.
    """
    with replacing(file) as partial:
        save(partial, tensors, tensors.get, metadata)


def save(file, tensors, read, metadata=None):
    """Write the same safetensors file as `save_file`, but with one tensor in memory at a time.

    tensors: {key: tensor}, possibly on meta. read: returns the tensor of a key. metadata: {key: text} for its header.
    """
    keys = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # aligns tensors to their element size
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for key in keys:
        start, end = end, end + tensors[key].nbytes
        header[key] = {"dtype": NAMES[tensors[key].dtype], "shape": list(tensors[key].shape),
                       "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            tensor = read(key)
            if (tensor.dtype, tensor.shape) != (tensors[key].dtype, tensors[key].shape):
                raise ValueError(f"{key} is {tensor.dtype} {_times(tensor.shape)}, the model asks for "
                                 f"{tensors[key].dtype} {_times(tensors[key].shape)}")
            _append(stream, tensor)


def _append(stream, tensor):
    """Write the bytes of a tensor to an open file."""
    stream.write(_bytes(tensor))


def leaving(tensors):
    """Return a function with which another thread gets {key: tensor} on the host; nobody may change them until then.

    What lies on a GPU is copied into pinned memory, once the GPU has done what it was asked to do so far, and is then
    free there; this thread waits for none of it. Tensors on the host are given as they are.
    """
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: tensors
    ready, left = torch.cuda.Event(), dict(tensors)
    ready.record(torch.cuda.current_stream(device))

    def arrived():
        ready.synchronize()
        stream = _transfers(device)
        with torch.cuda.stream(stream):
            held = {key: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                    if tensor.is_cuda else tensor for key, tensor in left.items()}
        stream.synchronize()
        left.clear()
        return held

    return arrived
