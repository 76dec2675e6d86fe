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
COLUMNS = 64  # of an iteration: steps of one way, added to two sums in turn
WAYS = {"codes": 64, "vbmi2": 32, "avx512": 16, "avx2": 8}  # columns of a step, the fastest way first
FLAGS = {  # that the CPU must have
    "codes": {"avx512f", "avx512bw", "avx512vbmi", "avx512vbmi2"}, "vbmi2": {"avx512f", "avx512bw", "avx512vbmi2"},
    "avx512": {"avx512f", "f16c"}, "avx2": {"avx2", "fma", "f16c"}}
HERE = {name for name, present in binding.get_host_cpu_features().items() if present}
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
    bfloat16: bool = False  # x is bfloat16, not float32


@functools.cache
def ways(dtype, wbits, width):
    """Return the ways that this CPU has for a matrix, the fastest first; none take times as long as the dense product.

    width: columns of a group, which lie side by side.
    """
    if dtype not in STORED or wbits not in (0, 2, 3, 4) or width % COLUMNS:
        return []
    able = {"codes": wbits and dtype == torch.bfloat16, "vbmi2": not wbits and dtype == torch.bfloat16,
            "avx512": not wbits, "avx2": True}
    return [way for way in WAYS if able[way] and FLAGS[way] <= HERE]


def multiplies_bfloat16(way):
    """Return whether x may be bfloat16."""
    return WAYS[way] >= 32 and "avx512bf16" in HERE


def arrange(x, kernel):
    """Return x (…, columns) in the order in which the steps of a kernel take it."""
    if kernel.way == "codes":  # even columns, then odd ones
        x = x.view(-1, 32, 2).transpose(1, 2).contiguous()
    if kernel.way in ("codes", "vbmi2") and not kernel.bfloat16:
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
        self.width = WAYS[kernel.way]
        self.bits = kernel.wbits or 8 * kernel.dtype.itemsize  # of a packed number
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64]), "run")
        self.b = b = ir.IRBuilder(function.append_basic_block())
        self.at = {name: self._load(I64, function.args[0], I64(place), 8) for place, name in enumerate(ARGUMENTS)}
        take, work, done = (b.append_basic_block() for _ in range(3))
        b.branch(take)
        b.position_at_end(take)
        next_row = b.inttoptr(function.args[0], ir.PointerType())
        first = b.atomic_rmw("add", next_row, I64(CHUNK), "monotonic")
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
        b, kernel, at, width = self.b, self.kernel, self.at, self.width
        take = self._look_up if kernel.way == "codes" else self._expand
        kind = ir.VectorType(F32, min(width, 16))
        start = b.zext(self._load(I32, at["offsets"], b.mul(row, at["blocks"]), 4), I64)
        place = alloca_once_value(b, start)
        sums = [[alloca_once_value(b, _all(kind, 0)) for _ in range(2)] for _ in range(kernel.tokens)]
        size = b.udiv(at["columns"], at["groups"])
        with for_range_slice(b, I64(0), at["groups"], I64(1)) as (group, _):
            table = self._table(b.add(b.mul(row, at["groups"]), group)) if kernel.wbits else None
            start = b.mul(group, size)
            with for_range_slice(b, start, b.add(start, size), I64(COLUMNS)) as (first, _):
                flat = b.add(b.mul(row, at["columns"]), first)
                for done in range(0, COLUMNS, width):
                    parts = take(flat, done, place, table)
                    if not kernel.tokens:
                        self._write(b.add(flat, I64(done)), parts)
                    for token, totals in enumerate(sums):
                        x = b.add(b.mul(I64(token), at["columns"]), first)
                        for number, part in enumerate(parts):
                            total = totals[(done // width + number) % 2]
                            part_x = b.add(x, I64(done + 32 * number))
                            b.store(self._dot(b.load(total), part, part_x), total)
        for token, totals in enumerate(sums):
            total = functools.reduce(b.fadd, map(b.load, totals))
            total = self._call(f"llvm.vector.reduce.fadd.v{kind.count}f32", F32, F32(-0.0), total,
                               fastmath=("reassoc",))
            self._store(total, b.add(b.mul(I64(token), at["rows"]), row), 4)

    # steps: each returns the weights of the next columns, 0 where pruned, and moves `place` on. The iteration starts at
    # weight `flat` of the matrix; `done` columns precede the step in it.

    def _look_up(self, flat, done, place, table):
        """As `codes` are below 16, 16 stands for a pruned one. Returns those of even columns, and of odd ones."""
        b, wbits, bytes_, words = self.b, self.kernel.wbits, ir.VectorType(I8, 64), ir.VectorType(I16, 32)
        mask, bit = self._kept(flat, done, place)
        packed = self._load(bytes_, self.at["data"], b.lshr(bit, I64(3)))
        eights = ir.Constant(bytes_, [wbits * eight + byte for eight in range(8) for byte in range(8)])
        packed = self._call("llvm.x86.avx512.permvar.qi.512", bytes_, packed, eights)  # 8 codes to 8 bytes
        shifts = self._load(bytes_, I64(SHIFTS[wbits].ctypes.data), b.and_(bit, I64(7)), 64)
        codes = b.and_(self._call("llvm.x86.avx512.pmultishift.qb.512", bytes_, shifts, packed),
                       _all(bytes_, 2**wbits - 1))
        even = b.bitcast(self._spread(codes, mask, 16), words)
        # the upper halves of the table's 16 numbers, then zeros
        places = ir.Constant(ir.VectorType(I32, 32), [*range(1, 32, 2), *[32] * 16])
        weights = b.shuffle_vector(b.bitcast(table, words), _all(words, 0), places)
        return [self._call("llvm.x86.avx512.permvar.hi.512", words, weights, index)
                for index in (even, b.lshr(even, _all(words, 8)))]

    def _expand(self, flat, done, place, table):
        mask, bit = self._kept(flat, done, place)
        if self.kernel.wbits:
            return [self._spread(self._eight_weights(bit, table), mask)]
        kind = ir.VectorType(STORED[self.kernel.dtype], self.width)
        values = self._load(kind, self.at["data"], self.b.lshr(bit, I64(3)))
        return [self._spread(values if self.width == 32 else self._floats(values), mask)]

    def _eight_weights(self, bit, table):
        """Return the weights of 8 packed codes, from two halves of the table."""
        b, words = self.b, ir.VectorType(I32, 8)
        packed = b.lshr(self._load(I64, self.at["data"], b.lshr(bit, I64(3))), b.and_(bit, I64(7)))
        places = ir.Constant(words, [self.bits * code for code in range(8)])
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
        scale = self._floats(self._splat(ir.VectorType(scale.type, 16), scale))
        return self._floats(self._round(b.fmul(units, scale)))

    def _kept(self, flat, done, place):
        """Return the mask of the next columns and the first bit of the first kept weight, and move the place on."""
        b, byte = self.b, self.b.add(self.b.lshr(flat, I64(3)), I64(done // 8))
        index, mask = b.load(place), self._load(ir.IntType(self.width), self.at["mask"], byte)
        b.store(b.add(index, b.zext(b.ctpop(mask), I64)), place)
        bit = b.mul(index, I64(self.bits))
        for name, offset in (("mask", byte), ("data", b.lshr(bit, I64(3)))) if done % 32 == 0 else ():
            ahead = b.inttoptr(b.add(b.add(self.at[name], offset), I64(AHEAD)), ir.PointerType())
            self._call("llvm.prefetch.p0", ir.VoidType(), ahead, I32(0), I32(3), I32(1))
        return mask, bit

    def _spread(self, values, mask, other=0):
        """Return the first values at the bits of a mask, `other` elsewhere."""
        b, words = self.b, ir.VectorType(I32, 8)
        if self.width == 8:
            order = self._load(words, I64(ORDERS.ctypes.data), b.zext(mask, I64), 32)
            moved = b.bitcast(self._call("llvm.x86.avx2.permps", values.type, values, order), words)
            return b.bitcast(b.and_(moved, b.ashr(order, _all(words, 31))), values.type)
        # an instruction that loads and expands would take a microcoded form: hide the load from the compiler
        kind = values.type
        values = b.asm(ir.FunctionType(kind, [kind]), "", "=v,0", [values], False)
        return self._call(f"llvm.x86.avx512.mask.expand.v{kind.count}{kind.element.intrinsic_name}", kind, values,
                          _all(kind, other), b.bitcast(mask, ir.VectorType(I1, kind.count)))

    def _floats(self, values):
        """Return values, as they are stored, in float32."""
        b, wide = self.b, ir.VectorType(F32, values.type.count)
        if self.kernel.dtype == torch.bfloat16:
            bits = b.zext(values, ir.VectorType(I32, wide.count))
            return b.bitcast(b.shl(bits, _all(bits.type, 16)), wide)
        return b.fpext(values, wide) if self.kernel.dtype == torch.float16 else values

    def _round(self, values):
        """Return float32 values as they are stored, rounded to the nearest, ties to even."""
        b, stored = self.b, ir.VectorType(STORED[self.kernel.dtype], values.type.count)
        if self.kernel.dtype != torch.bfloat16:
            return b.fptrunc(values, stored) if self.kernel.dtype == torch.float16 else values
        bits = b.bitcast(values, ir.VectorType(I32, stored.count))
        all_ = functools.partial(_all, bits.type)
        odd = b.and_(b.lshr(bits, all_(16)), all_(1))
        rounded = b.lshr(b.add(b.add(bits, all_(0x7FFF)), odd), all_(16))  # NaN stays: only its upper bits are set
        return b.trunc(rounded, stored)

    def _dot(self, total, weights, x):
        """Return a sum plus the products of weights with x from a place on."""
        b = self.b
        if self.kernel.bfloat16:
            pairs = ir.VectorType(BF16, 32)
            return self._call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, b.bitcast(weights, pairs),
                              self._load(pairs, self.at["x"], x, 2))
        parts = [weights]
        if self.width >= 32:  # 32 in bfloat16: even ones, and odd ones
            bits = b.bitcast(weights, ir.VectorType(I32, 16))
            parts = [b.bitcast(half, total.type) for half in (
                b.shl(bits, _all(bits.type, 16)), b.and_(bits, _all(bits.type, -65536)))]
        for place, part in enumerate(parts):
            x_part = self._load(total.type, self.at["x"], b.add(x, I64(16 * place)), 4)
            total = b.fadd(b.fmul(part, x_part, flags=["contract"]), total, flags=["contract"])
        return total

    def _write(self, flat, parts):
        """Write weights to the expanded matrix."""
        weights = parts[0]
        if len(parts) > 1:
            pairs = [half for column in range(32) for half in (column, column + 32)]
            weights = self.b.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 64), pairs))
        self._store(weights if self.width >= 32 else self._round(weights), flat, self.kernel.dtype.itemsize)

    def _load(self, kind, base, index, size=1):
        address = self.b.add(base, self.b.mul(index, I64(size)))
        return self.b.load(self.b.inttoptr(address, ir.PointerType()), typ=kind, align=1)

    def _store(self, value, index, size):
        address = self.b.add(self.at["y"], self.b.mul(index, I64(size)))
        self.b.store(value, self.b.inttoptr(address, ir.PointerType()), align=1)

    def _call(self, name, kind, *values, **options):
        function = ir.FunctionType(kind, [value.type for value in values])
        return self.b.call(self.module.declare_intrinsic(name, fnty=function), values, **options)

    def _splat(self, kind, value):
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def _all(kind, value):
    return ir.Constant(kind, [value] * kind.count)
