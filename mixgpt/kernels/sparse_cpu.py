"""Products of packed sparse matrices with a few vectors on the CPU, without expanding the matrix.

The code is emitted as LLVM IR for the instructions that the CPU has, so that users need no compiler. One step takes the
next columns of a row: it loads the packed values, moves them to the columns whose bits are set in the mask, and
multiplies; the number of set bits says where the values of the next step begin. For several vectors, the weights of 16
rows go through the matrix units (AMX), where the CPU has them: they multiply these rows by 16 vectors, of which they
take two columns of all at a time. Each row is summed in a fixed order, so that the number of threads does not change
the result.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import binding, ir
from numba.core.cgutils import alloca_once_value, for_range_slice
from torch import Tensor

REACH = 64  # A step may read so many packed numbers.
AHEAD = 4096  # Masks and packed values are prefetched so many bytes before they are used.
CHUNK = 64  # A thread takes so many rows at a time.
COLUMNS = 64  # One iteration covers so many columns in several steps, added to two sums in turn.
TILE = 16  # A tile of the matrix units has so many rows of 64 bytes.
BLOCK = 512  # An offset stands for so many columns.
LINE = 2 * BLOCK + 64  # Bytes from row to row of the weights that are expanded for the units: not a power of 2.
TILES = 4  # At most so many tiles of vectors are multiplied at a time: the units hold 8 tiles, and 2 are for factors.
KINDS = {"codes": 64, "vbmi2": 32, "avx512": 16, "avx2": 8}  # Columns per step of each kind, the fastest first.
FLAGS = {  # The CPU must have these features.
    "codes": {"avx512f", "avx512bw", "avx512vbmi", "avx512vbmi2"}, "vbmi2": {"avx512f", "avx512bw", "avx512vbmi2"},
    "avx512": {"avx512f", "f16c"}, "avx2": {"avx2", "fma", "f16c"}}
HERE = {name for name, present in binding.get_host_cpu_features().items() if present}
TENSORS = ("mask", "offsets", "units", "zero", "scale", "x", "y", "pairs", "data")
ARGUMENTS = ("next_row", "rows", "columns", "blocks", "groups", "vectors", *TENSORS)
I1, I8, I16, I32, I64, F16, F32 = *map(ir.IntType, (1, 8, 16, 32, 64)), ir.HalfType(), ir.FloatType()
BF16 = type("BFloatType", (ir.types.Type,), {"__str__": lambda self: "bfloat"})()  # llvmlite has no such type.
STORED = {torch.float32: F32, torch.bfloat16: I16, torch.float16: F16}
_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (masks, columns)
SHIFTS = {wbits: np.arange(8, dtype=np.uint8)[:, None] + np.tile(wbits * np.arange(8, dtype=np.uint8), 8)
          for wbits in (2, 3, 4)}  # (8, 64): where 8 times 8 codes start in 8 bytes each, by the first bit.
ORDERS = _SET * (_SET.cumsum(1, dtype=np.int32) - 9)  # (masks, 8): a kept value's place - 8, else 0.
ALL_TILES = np.frombuffer(b"\1" + bytes(15) + 8 * b"\100\0" + bytes(16) + 8 * bytes([TILE]) + bytes(8), np.uint8)
ARCH_PRCTL, REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18  # By these, Linux lets a process use the matrix units.


class Kernel(NamedTuple):
    """A kernel to emit: it multiplies vectors by a packed matrix, or expands the matrix."""

    kind: str  # A key of KINDS.
    dtype: torch.dtype  # The dtype of the weights.
    wbits: int  # Bits per code; 0 stands for a matrix of plain values.
    tokens: int  # Number of vectors x; with 0, the kernel writes the expanded matrix to y.
    bfloat16: bool = False  # Whether x is bfloat16, not float32.
    writes: torch.dtype = torch.float32  # The dtype of products.
    tiles: int = 0  # If not 0, it multiplies up to so many times TILE vectors in the matrix units.


@functools.cache
def kinds_for(dtype: torch.dtype, wbits: int, width: int) -> list[str]:
    """Return the kinds of kernels that this CPU can run on a matrix, the fastest first.

    width: columns per group; groups are consecutive columns. The list is empty if the dense product is much faster.
    """
    if dtype not in STORED or wbits not in (0, 2, 3, 4) or width % COLUMNS:
        return []
    able = {"codes": wbits and dtype == torch.bfloat16, "vbmi2": not wbits and dtype == torch.bfloat16,
            "avx512": not wbits, "avx2": True}
    return [kind for kind in KINDS if able[kind] and FLAGS[kind] <= HERE]


def multiplies_bfloat16(kind: str) -> bool:
    """Return whether kernels of a kind take x in bfloat16 on this CPU."""
    return KINDS[kind] >= 32 and "avx512bf16" in HERE


@functools.cache
def has_matrix_units() -> bool:
    """Return whether this process may multiply bfloat16 numbers in the CPU's matrix units."""
    if not HERE >= {"amx-tile", "amx-bf16"}:
        return False
    try:
        return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQ_XCOMP_PERM, XTILEDATA) == 0
    except (OSError, AttributeError):
        return False


def arrange(x: Tensor, kernel: Kernel) -> Tensor:
    """Return x (…, columns) in the order in which the steps of a kernel take it."""
    if kernel.tiles:
        return x
    if kernel.kind == "codes":  # Even columns come before odd ones.
        x = x.view(-1, 32, 2).transpose(1, 2).contiguous()
    if kernel.kind in ("codes", "vbmi2") and not kernel.bfloat16:
        x = x.view(-1, 16, 2).transpose(1, 2).contiguous()
    return x


def has_room(data: Tensor) -> bool:
    """Return whether memory for REACH more lies behind packed numbers: the last steps read beyond the end."""
    return data.untyped_storage().nbytes() >= (data.storage_offset() + len(data) + REACH) * data.itemsize


def launch(kernel: Kernel, rows: int, columns: int, groups: int, tensors: dict[str, Tensor]) -> None:
    """Call a kernel on all rows. tensors: what the kernel needs, by the names in TENSORS; `data` must have room.

    The matrix units need at least TILE rows.
    """
    if kernel.tiles:
        tensors["pairs"] = torch.empty(kernel.tiles * TILE * columns, dtype=torch.bfloat16)
    data = tensors["data"]
    addresses = [tensor.data_ptr() if (tensor := tensors.get(name)) is not None else 0 for name in TENSORS[:-1]]
    # An empty tensor has no address of its own.
    addresses.append(data.untyped_storage().data_ptr() + int(data.storage_offset()) * data.itemsize)
    numbers = 0, rows, columns, -(-columns // BLOCK), groups, tensors["x"].numel() // columns
    values = (ctypes.c_int64 * len(ARGUMENTS))(*numbers, *addresses)
    arrange_pairs, multiply, _ = _compiled(kernel)
    if kernel.tiles:
        arrange_pairs(values)
    _parallel()(multiply, values, torch.get_num_threads(), 0)


@functools.cache
def _parallel() -> Callable:
    """Return what calls a function in PyTorch's own threads, with which ours would compete, or else in this one."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return lambda function, values, threads, flags: function(values)


@functools.cache
def _compiled(kernel: Kernel) -> tuple[Callable, Callable, object]:
    """Compile for this CPU. Returns what arranges x, the kernel, and what owns their code, which must live as long."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(str(_Emitter(kernel).module))
    machine = binding.Target.from_default_triple().create_target_machine(
        binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), opt=3)
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    arrange_pairs, multiply = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address(name))
                               for name in ("arrange", "kernel"))
    return arrange_pairs, multiply, engine


class _Emitter:
    """The code of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.module = kernel, ir.Module()
        self.width = KINDS[kernel.kind]
        self.bits = kernel.wbits or 8 * kernel.dtype.itemsize  # Bits per packed number.
        self._begin("arrange")
        if kernel.tiles:
            self._pairs()
        self.b.ret_void()
        function = self._begin("kernel")
        b = self.b
        take, work, done = (b.append_basic_block() for _ in range(3))
        if kernel.tiles:
            self._units("ldtilecfg", self._pointer(I64(ALL_TILES.ctypes.data)))
            weights = b.alloca(ir.ArrayType(I8, TILE * LINE))
            weights.align = 64
            self.weights = b.ptrtoint(weights, I64)
        b.branch(take)
        b.position_at_end(take)
        next_row = b.inttoptr(function.args[0], ir.PointerType())
        first = b.atomic_rmw("add", next_row, I64(CHUNK), "monotonic")
        b.cbranch(b.icmp_signed("<", first, self.at["rows"]), work, done)
        b.position_at_end(work)
        stop = b.add(first, I64(CHUNK))
        stop = b.select(b.icmp_signed("<", stop, self.at["rows"]), stop, self.at["rows"])
        with for_range_slice(b, first, stop, I64(TILE if kernel.tiles else 1)) as (row, _):
            self._tile(row) if kernel.tiles else self._row(row)
        b.branch(take)
        b.position_at_end(done)
        if kernel.tiles:
            self._units("tilerelease")
        b.ret_void()

    def _begin(self, name: str) -> ir.Function:
        """Begin a function of what ARGUMENTS lie at an address."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64]), name)
        self.b = ir.IRBuilder(function.append_basic_block())
        self.at = {name: self._load(I64, function.args[0], I64(place), 8) for place, name in enumerate(ARGUMENTS)}
        return function

    def _pairs(self) -> None:
        """Emit the code that writes pairs of columns, as one number, of all vectors of a tile side by side."""
        b, at = self.b, self.at
        pairs = b.lshr(at["columns"], I64(1))
        for tile in range(self.kernel.tiles):
            to = b.add(at["pairs"], b.mul(pairs, I64(4 * TILE * tile)))
            sources = [b.add(at["x"], b.mul(b.mul(self._vector(vector), at["columns"]), I64(2)))
                       for vector in range(TILE * tile, TILE * (tile + 1))]
            with for_range_slice(b, I64(0), pairs, I64(1)) as (pair, _):
                for number, source in enumerate(sources):
                    value = self._load(I32, source, pair, 4)
                    self._store(value, to, b.add(b.mul(pair, I64(TILE)), I64(number)), 4)

    def _vector(self, number: int) -> ir.Value:
        """Return the number of a tile's vector: those behind the last vector repeat it."""
        last = self.b.sub(self.at["vectors"], I64(1))
        return self.b.select(self.b.icmp_signed("<", I64(number), last), I64(number), last)

    def _row(self, row: ir.Value) -> None:
        """Emit the code for one row: its products with all vectors, or its expansion."""
        b, kernel, at, width = self.b, self.kernel, self.at, self.width
        take = self._look_up if kernel.kind == "codes" else self._expand
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
                    for number, weights in enumerate(() if kernel.tokens else self._in_order(parts)):
                        self._write(weights, b.add(flat, I64(done + 32 * number)), kernel.dtype)
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
            total = b.insert_element(ir.Constant(ir.VectorType(F32, 1), ir.Undefined), total, I32(0))
            self._write(total, b.add(b.mul(I64(token), at["rows"]), row), kernel.writes)

    def _tile(self, first: ir.Value) -> None:
        """Emit the code for the products of TILE rows with all vectors; the last TILE rows are taken as a whole."""
        b, kernel, at, width = self.b, self.kernel, self.at, self.width
        take = self._look_up if kernel.kind == "codes" else self._expand
        last, size, weights = b.sub(at["rows"], I64(TILE)), b.udiv(at["columns"], at["groups"]), self.weights
        first = b.select(b.icmp_signed("<", first, last), first, last)
        for tile in range(kernel.tiles):
            self._units("tilezero", I8(tile))
        with for_range_slice(b, I64(0), at["columns"], I64(BLOCK)) as (start, _):
            stop = b.add(start, I64(BLOCK))
            stop = b.select(b.icmp_signed("<", stop, at["columns"]), stop, at["columns"])
            with for_range_slice(b, I64(0), I64(TILE), I64(1)) as (number, _):
                row = b.add(first, number)
                block = b.add(b.mul(row, at["blocks"]), b.udiv(start, I64(BLOCK)))
                place, line = alloca_once_value(b, I64(0)), b.add(weights, b.mul(number, I64(LINE)))
                b.store(b.zext(self._load(I32, at["offsets"], block, 4), I64), place)
                with for_range_slice(b, start, stop, I64(COLUMNS)) as (column, _):
                    group = b.add(b.mul(row, at["groups"]), b.udiv(column, size))
                    table, flat = self._table(group) if kernel.wbits else None, b.add(b.mul(row, at["columns"]), column)
                    to = b.add(line, b.mul(b.sub(column, start), I64(2)))
                    for done in range(0, COLUMNS, width):
                        for part, values in enumerate(self._in_order(take(flat, done, place, table)), done // 32):
                            b.store(values, self._pointer(b.add(to, I64(64 * part))), align=64)
            with for_range_slice(b, start, stop, I64(32)) as (column, _):
                factor, vectors = I8(TILES), I8(TILES + 1)
                source = b.add(weights, b.mul(b.sub(column, start), I64(2)))
                self._units("tileloadd64", factor, self._pointer(source), I64(LINE))
                for tile in range(kernel.tiles):
                    pairs = b.mul(b.add(b.mul(I64(tile), at["columns"]), column), I64(2 * TILE))
                    self._units("tileloadd64", vectors, self._pointer(b.add(at["pairs"], pairs)), I64(4 * TILE))
                    self._units("tdpbf16ps", I8(tile), factor, vectors)
        for tile in range(kernel.tiles):
            self._units("tilestored64", I8(tile), self._pointer(weights), I64(4 * TILE))
            products = self._transposed([self._load(ir.VectorType(F32, TILE), weights, I64(row), 4 * TILE)
                                         for row in range(TILE)])
            for vector, values in enumerate(products, TILE * tile):
                self._write(values, b.add(b.mul(self._vector(vector), at["rows"]), first), kernel.writes)

    def _transposed(self, rows: list[ir.Value]) -> list[ir.Value]:
        """Return the columns of TILE rows of as many values. A step swaps a bit of the row with one of the column."""
        for step in (1, 2, 4, 8):
            orders = ([lane if not lane & step else TILE + lane - step for lane in range(TILE)],
                      [TILE + lane if lane & step else lane + step for lane in range(TILE)])
            for row in range(TILE):
                if not row & step:
                    pair = rows[row], rows[row | step]
                    rows[row], rows[row | step] = (self.b.shuffle_vector(*pair, ir.Constant(
                        ir.VectorType(I32, TILE), order)) for order in orders)
        return rows

    def _units(self, name: str, *values: ir.Value) -> None:
        self._call(f"llvm.x86.{name}", ir.VoidType(), *values)

    def _pointer(self, address: ir.Value) -> ir.Value:
        return self.b.inttoptr(address, ir.PointerType())

    # The next two methods emit a step. It takes the weights of the next columns, 0 where pruned, and moves `place` on.
    # The iteration starts at weight `flat` of the matrix; `done` columns precede the step in it.

    def _look_up(self, flat: ir.Value, done: int, place: ir.Value, table: ir.Value) -> list[ir.Value]:
        """Return the weights of even columns and those of odd columns. Codes are below 16; 16 stands for pruned."""
        b, wbits, bytes_, words = self.b, self.kernel.wbits, ir.VectorType(I8, 64), ir.VectorType(I16, 32)
        mask, bit = self._kept(flat, done, place)
        packed = self._load(bytes_, self.at["data"], b.lshr(bit, I64(3)))
        eights = ir.Constant(bytes_, [wbits * eight + byte for eight in range(8) for byte in range(8)])
        packed = self._call("llvm.x86.avx512.permvar.qi.512", bytes_, packed, eights)  # 8 codes in 8 bytes each
        shifts = self._load(bytes_, I64(SHIFTS[wbits].ctypes.data), b.and_(bit, I64(7)), 64)
        codes = b.and_(self._call("llvm.x86.avx512.pmultishift.qb.512", bytes_, shifts, packed),
                       _all(bytes_, 2**wbits - 1))
        even = b.bitcast(self._spread(codes, mask, 16), words)
        # The table for bfloat16 is the upper halves of the 16 numbers, followed by zeros for pruned weights.
        places = ir.Constant(ir.VectorType(I32, 32), [*range(1, 32, 2), *[32] * 16])
        weights = b.shuffle_vector(b.bitcast(table, words), _all(words, 0), places)
        return [self._call("llvm.x86.avx512.permvar.hi.512", words, weights, index)
                for index in (even, b.lshr(even, _all(words, 8)))]

    def _expand(self, flat: ir.Value, done: int, place: ir.Value, table: ir.Value | None) -> list[ir.Value]:
        """Return the weights of consecutive columns: stored values, or 8 codes looked up in two halves of the table."""
        mask, bit = self._kept(flat, done, place)
        if table is None:
            kind = ir.VectorType(STORED[self.kernel.dtype], self.width)
            values = self._load(kind, self.at["data"], self.b.lshr(bit, I64(3)))
            return [self._spread(values if self.width == 32 else self._floats(values), mask)]
        b, words = self.b, ir.VectorType(I32, 8)
        packed = b.lshr(self._load(I64, self.at["data"], b.lshr(bit, I64(3))), b.and_(bit, I64(7)))
        places = ir.Constant(words, [self.bits * code for code in range(8)])
        codes = b.lshr(self._splat(words, b.trunc(packed, I32)), places)
        halves = (b.shuffle_vector(table, table, ir.Constant(words, list(half))) for half in (range(8), range(8, 16)))
        low, high = (self._call("llvm.x86.avx2.permps", half.type, half, codes) for half in halves)
        is_high = b.icmp_signed("<", b.shl(codes, _all(words, 28)), _all(words, 0))
        return [self._spread(b.select(is_high, high, low), mask)]

    def _table(self, group: ir.Value) -> ir.Value:
        """Return the weights of all codes in a group, rounded to the dtype of the scale, in float32."""
        b, kind = self.b, ir.VectorType(F32, 16)
        zero = b.zext(self._load(I8, self.at["zero"], group), I64)
        units = self._load(kind, self.at["units"], b.mul(zero, I64(16)), 4)
        scale = self._load(STORED[self.kernel.dtype], self.at["scale"], group, self.kernel.dtype.itemsize)
        scale = self._floats(self._splat(ir.VectorType(scale.type, 16), scale))
        return self._floats(self._round(b.fmul(units, scale), self.kernel.dtype))

    def _kept(self, flat: ir.Value, done: int, place: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the mask of the next columns and the first bit of the first kept weight, and move the place on."""
        b, byte = self.b, self.b.add(self.b.lshr(flat, I64(3)), I64(done // 8))
        index, mask = b.load(place), self._load(ir.IntType(self.width), self.at["mask"], byte)
        b.store(b.add(index, b.zext(b.ctpop(mask), I64)), place)
        bit = b.mul(index, I64(self.bits))
        for name, offset in (("mask", byte), ("data", b.lshr(bit, I64(3)))) if done == 0 else ():
            ahead = b.inttoptr(b.add(b.add(self.at[name], offset), I64(AHEAD)), ir.PointerType())
            self._call("llvm.prefetch.p0", ir.VoidType(), ahead, I32(0), I32(3), I32(1))
        return mask, bit

    def _spread(self, values: ir.Value, mask: ir.Value, other: int = 0) -> ir.Value:
        """Return the first values at the bits of a mask, `other` elsewhere."""
        b, words = self.b, ir.VectorType(I32, 8)
        if self.width == 8:
            order = self._load(words, I64(ORDERS.ctypes.data), b.zext(mask, I64), 32)
            moved = b.bitcast(self._call("llvm.x86.avx2.permps", values.type, values, order), words)
            return b.bitcast(b.and_(moved, b.ashr(order, _all(words, 31))), values.type)
        # LLVM would merge the load with the expansion into a slow, microcoded instruction: the empty assembly hides it.
        kind = values.type
        values = b.asm(ir.FunctionType(kind, [kind]), "", "=v,0", [values], False)
        return self._call(f"llvm.x86.avx512.mask.expand.v{kind.count}{kind.element.intrinsic_name}", kind, values,
                          _all(kind, other), b.bitcast(mask, ir.VectorType(I1, kind.count)))

    def _floats(self, values: ir.Value) -> ir.Value:
        """Convert stored values to float32."""
        b, wide = self.b, ir.VectorType(F32, values.type.count)
        if self.kernel.dtype == torch.bfloat16:
            bits = b.zext(values, ir.VectorType(I32, wide.count))
            return b.bitcast(b.shl(bits, _all(bits.type, 16)), wide)
        return b.fpext(values, wide) if self.kernel.dtype == torch.float16 else values

    def _round(self, values: ir.Value, dtype: torch.dtype) -> ir.Value:
        """Convert float32 values to a stored dtype, rounding to the nearest, ties to even."""
        b, stored = self.b, ir.VectorType(STORED[dtype], values.type.count)
        if dtype != torch.bfloat16:
            return b.fptrunc(values, stored) if dtype == torch.float16 else values
        bits = b.bitcast(values, ir.VectorType(I32, stored.count))
        all_ = functools.partial(_all, bits.type)
        odd = b.and_(b.lshr(bits, all_(16)), all_(1))
        rounded = b.lshr(b.add(b.add(bits, all_(0x7FFF)), odd), all_(16))  # A NaN stays one: it has upper bits only.
        return b.trunc(rounded, stored)

    def _dot(self, total: ir.Value, weights: ir.Value, x: ir.Value) -> ir.Value:
        """Return a sum plus the products of weights with the vector from its index x on."""
        b = self.b
        if self.kernel.bfloat16:
            pairs = ir.VectorType(BF16, 32)
            return self._call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, b.bitcast(weights, pairs),
                              self._load(pairs, self.at["x"], x, 2))
        parts = [weights]
        if self.width >= 32:  # 32 bfloat16 weights are split into even and odd ones.
            bits = b.bitcast(weights, ir.VectorType(I32, 16))
            parts = [b.bitcast(half, total.type) for half in (
                b.shl(bits, _all(bits.type, 16)), b.and_(bits, _all(bits.type, -65536)))]
        for place, part in enumerate(parts):
            x_part = self._load(total.type, self.at["x"], b.add(x, I64(16 * place)), 4)
            total = b.fadd(b.fmul(part, x_part, flags=["contract"]), total, flags=["contract"])
        return total

    def _in_order(self, parts: list[ir.Value]) -> list[ir.Value]:
        """Return the weights of consecutive columns, given a step's, or those of its even and of its odd columns."""
        if len(parts) == 1:
            return parts
        orders = [[half for column in range(start, start + 16) for half in (column, column + 32)] for start in (0, 16)]
        return [self.b.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 32), order)) for order in orders]

    def _write(self, values: ir.Value, index: ir.Value, dtype: torch.dtype) -> None:
        """Write numbers of a dtype to y, rounded to it if they are float32."""
        values = self._round(values, dtype) if values.type.element == F32 else values
        self._store(values, self.at["y"], index, dtype.itemsize)

    def _load(self, kind: ir.Type, base: ir.Value, index: ir.Value, size: int = 1) -> ir.Value:
        address = self.b.add(base, self.b.mul(index, I64(size)))
        return self.b.load(self.b.inttoptr(address, ir.PointerType()), typ=kind, align=1)

    def _store(self, value: ir.Value, base: ir.Value, index: ir.Value, size: int) -> None:
        address = self.b.add(base, self.b.mul(index, I64(size)))
        self.b.store(value, self.b.inttoptr(address, ir.PointerType()), align=1)

    def _call(self, name: str, kind: ir.Type, *values: ir.Value, **options: Sequence[str]) -> ir.Value:
        function = ir.FunctionType(kind, [value.type for value in values])
        return self.b.call(self.module.declare_intrinsic(name, fnty=function), values, **options)

    def _splat(self, kind: ir.VectorType, value: ir.Value) -> ir.Value:
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def _all(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)
