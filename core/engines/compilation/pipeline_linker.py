"""Linking of compiled pipelines into this process, by LLVM's loader, and their calls from Python.

A pipeline is called through an adapter in LLVM IR, which converts numpy arrays to Halide's buffers.
"""

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from core.engines.compilation import compiler_process
from core.engines.compilation.compiler_process import HALIDE_RUNTIME_KEY
from core.engines.compilation.pipeline_cache import Argument, ObjectFile, pipeline_name, read_cached
from core.resources import keep_freed_memory, usable_cores

Pipeline: TypeAlias = Callable[..., object]
"""A compiled function; its arguments are the inputs (arrays and numbers) in order, then the output arrays to fill."""

HALIDE_OUT_OF_MEMORY = -11
"""Halide's error code for a failed allocation (HalideRuntime.h)."""

WRONG_ARRAY_CODE = -1000
"""WRONG_ARRAY_CODE - n is the error code of a call whose argument n (from 0) has the wrong dtype or rank."""

HALIDE_TYPE_CODES = {"i": 0, "u": 1, "f": 2}
"""halide_type_code_t by numpy's dtype.kind."""

RUNTIME_LIBRARY = "halide_runtime"
RUNTIME_SETTERS = ("halide_set_error_handler", "halide_set_num_threads")

ERROR_HANDLER_IR = "define void @ignore_error(ptr %context, ptr %message) { ret void }"

YIELDS = 4
"""Number of calls of sched_yield for each call of halide_thread_yield; Halide's own function makes one.

A thread of Halide's pool that finds no work calls halide_thread_yield 40 times and then sleeps. With four calls of
sched_yield this takes about 50 us. Work that arrives in this time does not have to wait until a thread has been woken.
"""

YIELD_IR = f"""
declare i32 @sched_yield()
define void @halide_thread_yield() {{
{"call i32 @sched_yield() " * YIELDS}
ret void
}}
"""
"""Definition that takes the place of Halide's own, a weak symbol."""

INT8, INT32, INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
BYTE_POINTER = INT8.as_pointer()
SCALAR_TYPES = {"int32": INT32, "float32": ir.FloatType(), "float64": ir.DoubleType()}

NUMPY_ARRAY_STRUCT = ir.LiteralStructType(
    [
        ir.ArrayType(INT8, object.__basicsize__),
        BYTE_POINTER,
        INT32,
        INT64.as_pointer(),
        INT64.as_pointer(),
        BYTE_POINTER,
        INT64,
    ]
)
"""numpy's PyArrayObject: the fields of PyObject, then data, nd, dimensions, strides, base and descr."""

HALIDE_DIMENSION_STRUCT = ir.LiteralStructType([INT32] * 4)
"""halide_dimension_t: min, extent, stride (in values) and flags."""

HALIDE_BUFFER_STRUCT = ir.LiteralStructType(
    [INT64, BYTE_POINTER, BYTE_POINTER, INT64, INT32, INT32, HALIDE_DIMENSION_STRUCT.as_pointer(), BYTE_POINTER]
)
"""halide_buffer_t: device, device_interface, host, flags, type, dimensions, dim, padding."""

_library_numbers = itertools.count()


def link_pipeline(function: str, built: ObjectFile) -> Pipeline:
    """Link an object file into this process and return its function."""
    library = llvm.JITLibraryBuilder().add_object_img(built.code).add_ir(_build_adapter_ir(function, built.arguments))
    library.add_jit_library(RUNTIME_LIBRARY).add_current_process().export_symbol(f"{function}_call")
    linker = _llvm_linker()
    # Library names cannot be reused, not even after linking failed, so each has a number.
    addresses = _prevent_free(library.link(linker, f"{function}_{next(_library_numbers)}"))
    types = [_argument_ctype(argument) for argument in built.arguments]
    call = ctypes.CFUNCTYPE(ctypes.c_int, *types)(addresses[f"{function}_call"])

    def pipeline(*arguments: object) -> None:
        code = call(*arguments)
        if code:
            _raise_halide_error(code, arguments)

    return pipeline


@functools.cache
def _llvm_linker() -> Any:
    """Return LLVM's linker with Halide's runtime. It is never freed: the pool's threads run code that it holds."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    _check_numpy_array_layout()
    target = llvm.Target.from_default_triple().create_target_machine(jit=True)
    # JITLink places the sections of an object within the range of relative addresses and sizes its offset table (GOT)
    # correctly. The older RuntimeDyld aborts the process if a section is out of range or the table is too small.
    linker = llvm.create_lljit_compiler(target, use_jit_link=sys.platform != "win32")
    runtime = pipeline_name(*HALIDE_RUNTIME_KEY)
    built = read_cached(runtime) or compiler_process.compiler.build(*HALIDE_RUNTIME_KEY)
    library = llvm.JITLibraryBuilder().add_object_img(built.code).add_ir(ERROR_HANDLER_IR).add_current_process()
    if sys.platform != "win32":
        library.add_ir(YIELD_IR)
    for symbol in ("ignore_error", *RUNTIME_SETTERS):
        library.export_symbol(symbol)
    addresses = _prevent_free(library.link(linker, RUNTIME_LIBRARY))
    keep_freed_memory()
    # With this handler errors become return codes; Halide's default handler aborts the process.
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(addresses["halide_set_error_handler"])(addresses["ignore_error"])
    # By default the pool has one thread per core of the host, although a container may be limited to fewer.
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(addresses["halide_set_num_threads"])(usable_cores())
    return _prevent_free(linker)


def _prevent_free(owner: Any) -> Any:
    """Return an llvmlite object, marked so that llvmlite does not free it at exit."""
    owner._owned = True  # noqa: SLF001
    return owner


def _raise_halide_error(code: int, arguments: tuple[object, ...]) -> None:
    if code == HALIDE_OUT_OF_MEMORY:
        raise MemoryError("out of memory in a compiled engine")
    if code <= WRONG_ARRAY_CODE:
        array = arguments[WRONG_ARRAY_CODE - code]
        raise TypeError(
            f"argument {WRONG_ARRAY_CODE - code} of a pipeline has the wrong dtype or rank: "
            f"received {getattr(array, 'dtype', array)!r} with {getattr(array, 'ndim', 0)} dimensions"
        )
    raise RuntimeError(f"a compiled engine failed with Halide error code {code}")


def _argument_ctype(argument: Argument) -> Any:
    if argument.dimensions is not None:
        return ctypes.py_object
    return {"int32": ctypes.c_int32, "float32": ctypes.c_float, "float64": ctypes.c_double}[argument.dtype]


def _build_adapter_ir(function: str, arguments: Sequence[Argument]) -> str:
    """Return the LLVM IR of a function that takes numpy arrays and numbers and calls a pipeline.

    It builds a halide_buffer_t of each array on the stack and checks its dtype and rank, ten times as fast as Python.
    """
    module = ir.Module()
    types = [
        NUMPY_ARRAY_STRUCT.as_pointer() if argument.dimensions is not None else SCALAR_TYPES[argument.dtype]
        for argument in arguments
    ]
    adapter = ir.Function(module, ir.FunctionType(INT32, types), f"{function}_call")
    builder = ir.IRBuilder(adapter.append_basic_block())
    pointers = builder.alloca(BYTE_POINTER, len(arguments))
    for at, (argument, value) in enumerate(zip(arguments, adapter.args, strict=True)):
        if argument.dimensions is None:
            slot = builder.alloca(value.type)
            builder.store(value, slot)
        else:
            slot = _build_halide_buffer(builder, at, np.dtype(argument.dtype), argument.dimensions, value)
        builder.store(builder.bitcast(slot, BYTE_POINTER), builder.gep(pointers, [INT32(at)]))
    target = ir.Function(module, ir.FunctionType(INT32, [BYTE_POINTER.as_pointer()]), f"{function}_argv")
    builder.ret(builder.call(target, [pointers]))
    return str(module)


def _build_halide_buffer(builder: ir.IRBuilder, at: int, dtype: np.dtype[Any], rank: int, array: Any) -> Any:
    """Build a halide_buffer_t of argument number `at`; the function returns an error code if dtype or rank is wrong."""
    _, data, found_rank, sizes, steps, _, found_dtype = (
        builder.gep(array, [INT32(0), INT32(field)]) for field in range(len(NUMPY_ARRAY_STRUCT.elements))
    )
    right_rank = builder.icmp_signed("==", builder.load(found_rank), INT32(rank))
    right_dtype = builder.icmp_signed("==", builder.load(found_dtype), INT64(id(dtype)))
    with builder.if_then(builder.not_(builder.and_(right_rank, right_dtype)), likely=False):
        builder.ret(INT32(WRONG_ARRAY_CODE - at))
    dimensions = builder.alloca(HALIDE_DIMENSION_STRUCT, max(1, rank))
    for axis in range(rank):
        # Halide's first dimension is numpy's last.
        index = [INT32(rank - 1 - axis)]
        extent, step = (builder.load(builder.gep(builder.load(field), index)) for field in (sizes, steps))
        stride = builder.sdiv(step, INT64(dtype.itemsize))
        if axis == 0:
            # The step of an axis of size 1 means nothing in numpy; Halide requires adjacent values.
            is_single = builder.icmp_signed("==", extent, INT64(1))
            stride = builder.select(is_single, INT64(1), stride)
        values = INT32(0), builder.trunc(extent, INT32), builder.trunc(stride, INT32), INT32(0)
        _store_fields(builder, builder.gep(dimensions, [INT32(axis)]), values)
    # halide_type_t has 8 bits of type code, 8 bits of size in bits, and 16 bits of lanes.
    kind = INT32(HALIDE_TYPE_CODES[dtype.kind] | 8 * dtype.itemsize << 8 | 1 << 16)
    buffer, null = builder.alloca(HALIDE_BUFFER_STRUCT), BYTE_POINTER(None)
    _store_fields(builder, buffer, (INT64(0), null, builder.load(data), INT64(0), kind, INT32(rank), dimensions, null))
    return buffer


def _store_fields(builder: ir.IRBuilder, target: Any, values: Sequence[Any]) -> None:
    for index, value in enumerate(values):
        builder.store(value, builder.gep(target, [INT32(0), INT32(index)]))


def _check_numpy_array_layout() -> None:
    """Raise RuntimeError if numpy's arrays do not have the fields that _build_halide_buffer reads."""
    array = np.zeros((3, 5), np.float32)[::2, ::2]
    found = [ctypes.c_int64.from_address(id(array) + object.__basicsize__ + 8 * index).value for index in range(6)]
    data, rank, sizes, steps, _, descr = found
    right = data == array.ctypes.data and rank & 0xFFFFFFFF == array.ndim and descr == id(np.dtype(np.float32))
    if not right or [
        [ctypes.c_int64.from_address(pointer + 8 * axis).value for axis in (0, 1)] for pointer in (sizes, steps)
    ] != [list(array.shape), list(array.strides)]:
        raise RuntimeError("compiled engines do not support this numpy version: the fields of PyArrayObject differ")
