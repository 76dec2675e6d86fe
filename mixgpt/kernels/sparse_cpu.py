"""Products of packed sparse matrices with a few vectors on the CPU, without expanding the matrix.

The code is emitted as LLVM IR for the instructions that the CPU has, so that users need no compiler. One step takes the
next columns of a row: it loads the packed values, moves them to the columns whose bits are set in the mask, and
multiplies; the number of set bits says where the values of the next step begin. Each row is summed in a fixed order,
so that the number of threads does not change the result.
"""

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import binding, ir
from numba.core.cgutils import alloca_once_value, for_range_slice

REACH = 64  # packed numbers that a step may read
AHEAD = 2048  # bytes from the packed values and masks in use to those that are prefetched
CHUNK = 64  # rows that a thread takes at a time


class Way(NamedTuple):
    """A way to take a step."""

    flags: set  # that the CPU must have
    width: int  # columns of a step
    steps: int  # in an iteration of the loop, added to two sums in turn
    step: str  # what emits one


WAYS = {  # the fastest first
    "codes": Way({"avx512f", "avx512bw", "avx512vbmi", "avx512vbmi2"}, 64, 1, "_look_up"),
    "vbmi2": Way({"avx512f", "avx512bw", "avx512vbmi2"}, 32, 2, "_expand"),
    "avx512": Way({"avx512f", "f16c"}, 16, 4, "_expand"),
    "avx2": Way({"avx2", "fma", "f16c"}, 8, 8, "_expand"),
}
TENSORS = ("mask", "data", "offsets", "units", "zero", "scale", "x", "y")
ARGUMENTS = ("next_row", "rows", "columns", "blocks", "groups", *TENSORS)
I1, I8, I16, I32, I64, F16, F32 = *map(ir.IntType, (1, 8, 16, 32, 64)), ir.HalfType(), ir.FloatType()
BF16 = type("BFloatType", (ir.types.Type,), {"__str__": lambda self: "bfloat"})()  # llvmlite has none
STORED = {torch.float32: F32, torch.bfloat16: I16, torch.float16: F16}
_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (masks, columns)
SHIFTS = {wbits: np.arange(8, dtype=np.uint8)[:, None] + np.tile(wbits * np.arange(8, dtype=np.uint8), 8)
          for wbits in (2, 3, 4)}  # of 8 codes in 8 bytes, by the first bit: (8, 64)
ORDERS = _SET * (_SET.cumsum(1, dtype=np.int32) - 9)  # of 8 values, by a mask: place - 8 if kept, else 0


class Kernel(NamedTuple):
    """A function to emit."""

    way: str  # in WAYS
    dtype: torch.dtype  # of the weights
    wbits: int  # of a code; 0: values
    tokens: int  # 0: writes the expanded matrix to y
    bfloat16: bool = False  # x and y are bfloat16, not float32


@functools.cache
def ways(dtype, wbits, columns, width, consecutive):
    """Return the ways that this CPU has for a matrix, the fastest first; none take times as long as the dense product.

    width: columns of a group. consecutive: whether those of a group lie side by side.
    """
    table = wbits in (2, 3, 4) and consecutive and width % 64 == 0
    able = {"codes": table and dtype == torch.bfloat16, "vbmi2": not wbits and dtype == torch.bfloat16,
            "avx512": not wbits, "avx2": table or not wbits}
    return [name for name, way in WAYS.items()
            if able[name] and way.flags <= _flags() and columns % (way.width * way.steps) == 0]


def multiplies_bfloat16(way):
    """Return whether x may be bfloat16."""
    return WAYS[way].width >= 32 and "avx512bf16" in _flags()


def arrange(x, kernel):
    """Return x (…, columns) in the order in which the steps of a kernel take it."""
    if kernel.way == "codes":  # even columns, then odd ones
        x = x.view(-1, 32, 2).transpose(1, 2).contiguous()
    if WAYS[kernel.way].width >= 32 and not kernel.bfloat16:
        x = x.view(-1, 16, 2).transpose(1, 2).contiguous()
    return x


def padded(data):
    """Return packed numbers with room for REACH more behind them in memory, as the last steps read these."""
    has_room = data.untyped_storage().nbytes() >= (data.storage_offset() + len(data) + REACH) * data.itemsize
    return data if has_room else torch.nn.functional.pad(data, (0, REACH))[:len(data)]


def run(kernel, rows, columns, block, groups, tensors):
    """Call a kernel on all rows.

    block: columns to an offset. tensors: those that the kernel needs, by their names in TENSORS; data: `padded`.
    """
    # a tensor without numbers has no address itself
    addresses = [tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.itemsize
                 if (tensor := tensors.get(name)) is not None else 0 for name in TENSORS]
    numbers = 0, rows, columns, -(-columns // block), groups
    values = (ctypes.c_int64 * len(ARGUMENTS))(*numbers, *addresses)
    _parallel()(_compiled(kernel), values, torch.get_num_threads(), 0)


@functools.cache
def _flags():
    return {name for name, present in binding.get_host_cpu_features().items() if present}


@functools.cache
def _parallel():
    """Return what runs a function in PyTorch's own threads, as others would compete with them; or else in this one."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return lambda function, values, threads, flags: function(values)


@functools.cache
def _compiled(kernel):
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(str(_Emitter(kernel).module))
    machine = binding.Target.from_default_triple().create_target_machine(
        binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), opt=3)
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("run"))
    function.engine = engine  # which owns the code
    return function


class _Emitter:
    """The code of a kernel."""

    def __init__(self, kernel):
        self.kernel, self.module = kernel, ir.Module()
        self.way = WAYS[kernel.way]
        self.size = 1 if kernel.wbits else kernel.dtype.itemsize  # bytes of a packed number
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [ir.PointerType()]), "run")
        self.b = b = ir.IRBuilder(function.append_basic_block())
        at = {name: b.gep(function.args[0], [I64(place)], source_etype=I64) for place, name in enumerate(ARGUMENTS)}
        self.at = {name: b.load(address, typ=I64) for name, address in at.items()}
        take, work, done = (b.append_basic_block() for _ in range(3))
        b.branch(take)
        b.position_at_end(take)
        first = b.atomic_rmw("add", at["next_row"], I64(CHUNK), "monotonic")
        b.cbranch(b.icmp_signed("<", first, self.at["rows"]), work, done)
        b.position_at_end(work)
        stop = b.add(first, I64(CHUNK))
        stop = b.select(b.icmp_signed("<", stop, self.at["rows"]), stop, self.at["rows"])
        with for_range_slice(b, first, stop, I64(1)) as (row, _):
            self._row(row)
        b.branch(take)
        b.position_at_end(done)
        b.ret_void()

    def _row(self, row):
        b, kernel, at, (_, width, steps, step_of_way) = self.b, self.kernel, self.at, self.way
        kind = ir.VectorType(F32, min(width, 16))
        start = b.zext(self._load(I32, at["offsets"], b.mul(row, at["blocks"]), 4), I64)
        place = alloca_once_value(b, start)
        sums = [[alloca_once_value(b, _all(kind, 0)) for _ in range(2)] for _ in range(kernel.tokens)]
        groups = at["groups"] if kernel.wbits else I64(1)
        size = b.udiv(at["columns"], groups)
        with for_range_slice(b, I64(0), groups, I64(1)) as (group, _):
            table = self._table(b.add(b.mul(row, groups), group)) if kernel.wbits else None
            start = b.mul(group, size)
            with for_range_slice(b, start, b.add(start, size), I64(width * steps)) as (first, _):
                flat = b.add(b.mul(row, at["columns"]), first)
                for step in range(steps):
                    parts = getattr(self, step_of_way)(flat, step * width, place, table)
                    if not kernel.tokens:
                        self._write(b.add(flat, I64(step * width)), parts)
                    for token, totals in enumerate(sums):
                        x = b.add(b.mul(I64(token), at["columns"]), first)
                        for number, part in enumerate(parts):
                            total = totals[(step + number) % 2]
                            part_x = b.add(x, I64(step * width + 32 * number))
                            b.store(self._dot(b.load(total), part, part_x), total)
        for token, totals in enumerate(sums):
            total = functools.reduce(b.fadd, map(b.load, totals))
            total = self._call(f"llvm.vector.reduce.fadd.{_name(kind)}", F32, F32(-0.0), total, fastmath=("reassoc",))
            self._store(self._round(total) if kernel.bfloat16 else total, b.add(b.mul(I64(token), at["rows"]), row),
                        2 if kernel.bfloat16 else 4)

    # steps: each returns the weights of the next columns, 0 where pruned, and moves `place` on. The iteration starts at
    # weight `flat` of the matrix; `done` columns precede the step in it.

    def _look_up(self, flat, done, place, table):
        """As `codes` are below 16, 16 stands for a pruned one. Returns those of even columns, and of odd ones."""
        b, wbits, bytes_ = self.b, self.kernel.wbits, ir.VectorType(I8, 64)
        mask, index = self._kept(flat, done, place)
        bit = b.mul(index, I64(wbits))
        packed = self._load(bytes_, self.at["data"], b.lshr(bit, I64(3)), self.size)
        eights = ir.Constant(bytes_, [wbits * eight + byte for eight in range(8) for byte in range(8)])
        packed = self._call("llvm.x86.avx512.permvar.qi.512", bytes_, packed, eights)  # 8 codes to 8 bytes
        shifts = self._load(bytes_, I64(SHIFTS[wbits].ctypes.data), b.and_(bit, I64(7)), 64)
        codes = b.and_(self._call("llvm.x86.avx512.pmultishift.qb.512", bytes_, shifts, packed),
                       _all(bytes_, 2**wbits - 1))
        words = ir.VectorType(I16, 32)
        even = b.bitcast(self._spread(codes, mask, 16), words)
        bits, order = b.bitcast(table, ir.VectorType(I32, 16)), ir.Constant(ir.VectorType(I32, 32), list(range(32)))
        weights = b.trunc(b.lshr(bits, _all(bits.type, 16)), ir.VectorType(I16, 16))
        weights = b.shuffle_vector(weights, ir.Constant(weights.type, [0] * 16), order)
        return [self._call("llvm.x86.avx512.permvar.hi.512", words, weights, index)
                for index in (even, b.lshr(even, _all(words, 8)))]

    def _expand(self, flat, done, place, table):
        mask, index = self._kept(flat, done, place)
        if self.kernel.wbits:
            return [self._spread(self._eight_weights(index, table), mask)]
        values = self._load(ir.VectorType(STORED[self.kernel.dtype], self.way.width), self.at["data"], index, self.size)
        return [self._spread(values if self.way.width == 32 else self._floats(values), mask)]

    def _eight_weights(self, index, table):
        """Return the weights of 8 packed codes, from two halves of the table."""
        b, wbits, words = self.b, self.kernel.wbits, ir.VectorType(I32, 8)
        bit = b.mul(index, I64(wbits))
        packed = b.lshr(self._load(I64, self.at["data"], b.lshr(bit, I64(3)), self.size), b.and_(bit, I64(7)))
        places = ir.Constant(words, [wbits * code for code in range(8)])
        codes = b.lshr(self._splat(words, b.trunc(packed, I32)), places)
        halves = (b.shuffle_vector(table, table, ir.Constant(words, list(half))) for half in (range(8), range(8, 16)))
        low, high = (self._call("llvm.x86.avx2.permps", half.type, half, codes) for half in halves)
        is_high = b.icmp_signed("<", b.shl(codes, _all(words, 28)), _all(words, 0))
        return b.select(is_high, high, low)

    # parts of steps

    def _table(self, group):
        """Return the weights of all codes in a group, rounded to the dtype of the scale, in float32."""
        b, kind = self.b, ir.VectorType(F32, 16)
        zero = b.zext(self._load(I8, self.at["zero"], group), I64)
        units = self._load(kind, self.at["units"], b.mul(zero, I64(16)), 4)
        scale = self._load(STORED[self.kernel.dtype], self.at["scale"], group, self.kernel.dtype.itemsize)
        return self._floats(self._round(b.fmul(units, self._splat(kind, self._floats(scale)))))

    def _kept(self, flat, done, place):
        """Return the mask of the next columns and the index of their first kept weight, and move the place on."""
        b, byte = self.b, self.b.add(self.b.lshr(flat, I64(3)), I64(done // 8))
        index, mask = b.load(place), self._load(ir.IntType(self.way.width), self.at["mask"], byte)
        b.store(b.add(index, b.zext(b.ctpop(mask), I64)), place)
        bits = b.mul(index, I64(self.kernel.wbits or 1))
        offsets = {"mask": byte, "data": b.lshr(bits, I64(3)) if self.kernel.wbits else b.mul(bits, I64(self.size))}
        for name in [] if done % 32 else ["data"] if done else offsets:
            ahead = b.inttoptr(b.add(b.add(self.at[name], offsets[name]), I64(AHEAD)), ir.PointerType())
            self._call("llvm.prefetch.p0", ir.VoidType(), ahead, I32(0), I32(3), I32(1))
        return mask, index

    def _spread(self, values, mask, other=0):
        """Return the first values at the bits of a mask, `other` elsewhere."""
        b, words = self.b, ir.VectorType(I32, 8)
        if self.way.width == 8:
            order = self._load(words, I64(ORDERS.ctypes.data), b.zext(mask, I64), 32)
            moved = b.bitcast(self._call("llvm.x86.avx2.permps", values.type, values, order), words)
            return b.bitcast(b.and_(moved, b.ashr(order, _all(words, 31))), values.type)
        # an instruction that loads and expands would take a microcoded form: hide the load from the compiler
        values = b.asm(ir.FunctionType(values.type, [values.type]), "", "=v,0", [values], False)
        return self._call(f"llvm.x86.avx512.mask.expand.{_name(values.type)}", values.type, values,
                          _all(values.type, other), b.bitcast(mask, ir.VectorType(I1, values.type.count)))

    def _floats(self, values):
        stored, wide = self.kernel.dtype, lambda kind: _like(values.type, kind)
        if stored == torch.bfloat16:
            bits = self.b.shl(self.b.zext(values, wide(I32)), _all(wide(I32), 16))
            return self.b.bitcast(bits, wide(F32))
        return self.b.fpext(values, wide(F32)) if stored == torch.float16 else values

    def _round(self, values):
        """Return float32 values as they are stored, rounded to the nearest, ties to even."""
        if self.kernel.dtype != torch.bfloat16:
            return self.b.fptrunc(values, _like(values.type, F16)) if self.kernel.dtype == torch.float16 else values
        b, all_ = self.b, functools.partial(_all, _like(values.type, I32))
        bits = b.bitcast(values, _like(values.type, I32))
        odd = b.and_(b.lshr(bits, all_(16)), all_(1))
        rounded = b.lshr(b.add(b.add(bits, all_(0x7FFF)), odd), all_(16))  # NaN stays: only its upper bits are set
        return b.trunc(rounded, _like(values.type, I16))

    def _dot(self, total, weights, x):
        """Return a sum plus the products of weights with x from a place on."""
        b, size = self.b, 2 if self.kernel.bfloat16 else 4
        if self.kernel.bfloat16:
            pairs = ir.VectorType(BF16, 32)
            return self._call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, b.bitcast(weights, pairs),
                              self._load(pairs, self.at["x"], x, size))
        parts = [weights]
        if self.way.width >= 32:  # 32 in bfloat16: even ones, and odd ones
            bits = b.bitcast(weights, ir.VectorType(I32, 16))
            parts = [b.bitcast(half, total.type) for half in (
                b.shl(bits, _all(bits.type, 16)), b.and_(bits, _all(bits.type, -65536)))]
        for part in parts:
            product = b.fmul(part, self._load(total.type, self.at["x"], x, size), flags=["contract"])
            total, x = b.fadd(product, total, flags=["contract"]), b.add(x, I64(16))
        return total

    def _write(self, flat, parts):
        """Write weights to the expanded matrix."""
        weights = parts[0]
        if len(parts) > 1:
            pairs = [half for column in range(32) for half in (column, column + 32)]
            weights = self.b.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 64), pairs))
        self._store(weights if self.way.width >= 32 else self._round(weights), flat, self.kernel.dtype.itemsize)

    def _load(self, kind, base, index, size=1):
        address = self.b.add(base, self.b.mul(index, I64(size)))
        return self.b.load(self.b.inttoptr(address, ir.PointerType()), typ=kind, align=1)

    def _store(self, value, index, size):
        address = self.b.add(self.at["y"], self.b.mul(index, I64(size)))
        self.b.store(value, self.b.inttoptr(address, ir.PointerType()), align=1)

    def _call(self, name, kind, *values, **options):
        function = self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(kind, [value.type for value in values]), name)
        return self.b.call(function, values, **options)

    def _splat(self, kind, value):
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def _all(kind, value):
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _like(kind, element):
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _name(kind):
    return f"v{kind.count}{'f32' if kind.element == F32 else kind.element}"
