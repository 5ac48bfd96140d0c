"""Compiled pipelines: Halide builds them in a child process, the disk keeps them, and calls release Python's lock.

Halide's Python bindings hold the lock while they compile (0.3 to 2 s) and, in `Callable.__call__`, for a whole
computation. So a child process compiles each pipeline to an object file, LLVM's loader links it into this process, and
ctypes calls it: another thread runs meanwhile. A call costs 1 to 2 microseconds. Object files are kept in the user's
cache folder, by the text of the engines, the version of Halide and the processor, so that each machine compiles once.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import itertools
import json
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from core.device import usable_cores

Pipeline: TypeAlias = Callable[..., object]
"""Arrays and numbers in the order of the inputs, then the arrays to fill."""

CACHE_FORMAT_VERSION = 1
"""Version of the format of the files in the cache; part of their names."""

CACHE_MAX_AGE_DAYS = 60
"""Days without use after which a file of the cache is removed."""

COMPILER_COMMAND = (sys.executable, "-P", "-m", "core.engines.compile_pipelines")

HALIDE_OUT_OF_MEMORY = -11
"""Halide's error code (HalideRuntime.h)."""

WRONG_ARRAY_CODE = -1000
"""Error code of a call whose array number n (from 0) has another type or number of dimensions: WRONG_ARRAY - n."""

HALIDE_TYPE_CODES = {"i": 0, "u": 1, "f": 2}
"""halide_type_code_t, by numpy's kinds of types."""


class NotCompiled(Exception):
    """A pipeline has to be compiled first, in a thread that must not wait for it: see `compiled_only`."""


class Argument(NamedTuple):
    """An argument of a pipeline: numpy's name of its type, and its dimensions; None for a number."""

    dtype: str
    dimensions: int | None


class ObjectFile(NamedTuple):
    """A pipeline as an object file."""

    arguments: Sequence[Argument]
    code: bytes


_link_lock = threading.Lock()
_thread_state = threading.local()


@contextmanager
def compiled_only() -> Iterator[None]:
    """Within this context, this thread compiles and loads nothing: a missing pipeline raises NotCompiled."""
    before = getattr(_thread_state, "compiled_only", False)
    _thread_state.compiled_only = True
    try:
        yield
    finally:
        _thread_state.compiled_only = before


def cached_pipeline(build: Callable[..., Any]) -> Callable[..., Pipeline]:
    """Return a function that gives the pipeline of `build` for a list of arguments, compiled when first needed.

    Any number of threads may call the pipeline at a time.
    """
    pipelines: dict[tuple[object, ...], Pipeline] = {}

    @functools.wraps(build)
    def pipeline(*key: object) -> Pipeline:
        made = pipelines.get(key)
        if made is None:
            if getattr(_thread_state, "compiled_only", False):
                raise NotCompiled(f"{build.__module__}.{build.__name__}{key} is not compiled yet")
            made = pipelines[key] = _load_pipeline(build.__module__, build.__name__, key)
        return made

    return pipeline


@functools.cache
def vector_bytes() -> int:
    """Return the bytes of this processor's widest vectors, as Halide counts them."""
    features = llvm.get_host_cpu_features()
    if all(features.get(name) for name in ("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd")):
        return 64
    return 32 if features.get("avx") else 16


def pipeline_name(module: str, name: str, key: tuple[object, ...]) -> str:
    """Return the name of a pipeline's file in the cache, and of its function."""
    return "p" + hashlib.sha256(repr((_build_fingerprint(), module, name, key)).encode()).hexdigest()[:40]


def read_cached(name: str) -> ObjectFile | None:
    """Return a pipeline from the cache; None if it is not there, or damaged."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        path = folder / name
        digest, header, code = path.read_bytes().split(b"\n", 2)
        path.touch()
        if hashlib.sha256(header + code).hexdigest().encode() != digest:
            return None
        return ObjectFile([Argument(*argument) for argument in json.loads(header)], code)
    except (OSError, ValueError, TypeError):
        return None


def write_cached(name: str, built: ObjectFile) -> None:
    """Write a pipeline to the cache, unless that is not possible."""
    folder = cache_folder()
    if folder is None:
        return
    header = json.dumps(built.arguments).encode()
    content = b"\n".join([hashlib.sha256(header + built.code).hexdigest().encode(), header, built.code])
    with contextlib.suppress(OSError):
        # Never half a file, however many processes write it.
        descriptor, path = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            Path(path).replace(folder / name)
        except OSError:
            Path(path).unlink()


@functools.cache
def cache_folder() -> Path | None:
    """Return the folder for compiled pipelines, which only this user can write to; None if there is none.

    It is below XDG_CACHE_HOME or ~/.cache; if neither can be written to, in the system's folder for temporary files.
    """
    owner = os.getuid() if hasattr(os, "getuid") else 0
    for name in ("home", "temporary"):
        # Without a home folder, expanduser raises RuntimeError; without one for temporary files, gettempdir an OSError.
        with contextlib.suppress(OSError, RuntimeError):
            if name == "home":
                folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "corr2d"
            else:
                folder = Path(tempfile.gettempdir()) / f"corr2d-{owner}"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
            # Its files are run as code: another user must not be able to write them.
            ours = not hasattr(os, "getuid") or (found.st_uid == owner and not found.st_mode & 0o022)
            if stat.S_ISDIR(found.st_mode) and ours and os.access(folder, os.W_OK):
                return folder
    return None


@contextmanager
def lock_cached(name: str) -> Iterator[None]:
    """Let one process at a time make a file of the cache."""
    folder = cache_folder()
    if folder is None or fcntl is None:
        yield
        return
    with (folder / "lock").open("a") as lock:
        # A byte of the lock file stands for each name.
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(name[1:9], 16))
        yield


def prune_cache() -> None:
    """Remove the files of the cache that were not read for KEPT_DAYS: each version of the engines adds some."""
    folder = cache_folder()
    for path in folder.iterdir() if folder is not None else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > CACHE_MAX_AGE_DAYS * 86_400:
                path.unlink()


@functools.cache
def _build_fingerprint() -> tuple[str, ...]:
    """Return all that decides what a pipeline compiles to, beside its own name and arguments."""
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text.update(path.read_bytes())
    features = llvm.get_host_cpu_features().flatten()
    processor = llvm.get_process_triple(), llvm.get_host_cpu_name(), features
    return (str(CACHE_FORMAT_VERSION), importlib.metadata.version("halide"), *processor, text.hexdigest())


def _load_pipeline(module: str, name: str, key: tuple[object, ...]) -> Pipeline:
    """Load a pipeline from the cache, or from the child process."""
    function = pipeline_name(module, name, key)
    built = read_cached(function)
    if built is None:
        try:
            built = _compiler.build(module, name, key)
        except RuntimeError:
            return _compile_in_process(module, name, key)
    with _link_lock:
        made = _linked_pipelines.get(function)
        if made is None:
            made = _linked_pipelines[function] = _link_pipeline(function, built)
    return made


def _compile_in_process(module: str, name: str, key: tuple[object, ...]) -> Pipeline:
    """Compile in this process, if the child cannot: to write an object file, Halide needs a /tmp that it can write to.

    Such a pipeline keeps Python's lock while it is compiled and whenever it runs.
    """
    # The pool would have as many threads as the host has cores.
    os.environ.setdefault("HL_NUM_THREADS", str(usable_cores()))
    scheduled, inputs = inspect.unwrap(getattr(importlib.import_module(module), name))(*key)
    pipeline: Pipeline = scheduled.compile_to_callable(inputs)
    return pipeline


HALIDE_RUNTIME_KEY = ("", "runtime", ())
"""Halide's runtime, in place of the module, name and arguments of a pipeline."""


class _CompilerProcess:
    """A child process that compiles pipelines; it is started for the first, and ends when it has been idle."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def build(self, module: str, name: str, key: tuple[object, ...]) -> ObjectFile:
        """Compile one pipeline. Raises RuntimeError with the child's words if that fails."""
        with self._lock:
            try:
                built = self._request(module, name, key)
            except (OSError, EOFError, pickle.UnpicklingError):
                # It has been idle, or the system has ended it to have its memory.
                self._stop()
                built = self._request(module, name, key)
        if isinstance(built, ObjectFile):
            return built
        raise RuntimeError(f"{module}.{name}{key} cannot be compiled: {built}")

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _request(self, module: str, name: str, key: tuple[object, ...]) -> ObjectFile | str:
        process = self._process = self._process or _start_compiler()
        assert process.stdin is not None  # noqa: S101 - they are pipes
        assert process.stdout is not None  # noqa: S101
        pickle.dump((module, name, key), process.stdin)
        process.stdin.flush()
        built: ObjectFile | str = pickle.load(process.stdout)  # noqa: S301 - from a process of ours
        return built

    def _stop(self) -> None:
        """Close its input, with which it ends."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                process.communicate()


_compiler = _CompilerProcess()
_linked_pipelines: dict[str, Pipeline] = {}


def _start_compiler() -> "subprocess.Popen[bytes]":
    # It finds the modules where this process does, not where its working directory is.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(  # noqa: S603 - this Python, and a module of ours
        COMPILER_COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        # A terminal's Ctrl-C is for the parent.
        process_group=0 if os.name == "posix" else None,
    )


@functools.cache
def _llvm_linker() -> Any:
    """Return LLVM's linker with Halide's runtime in it. It lasts as long as the process: threads run in its code."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    _check_numpy_array_layout()
    target = llvm.Target.from_default_triple().create_target_machine(jit=True)
    # JITLink places the sections of an object within reach of each other and reserves its whole offset table. The older
    # RuntimeDyld ends the process if a section is out of reach, or if it has counted too few entries of that table.
    linker = llvm.create_lljit_compiler(target, use_jit_link=sys.platform != "win32")
    runtime = pipeline_name(*HALIDE_RUNTIME_KEY)
    built = read_cached(runtime) or _compiler.build(*HALIDE_RUNTIME_KEY)
    library = llvm.JITLibraryBuilder().add_object_img(built.code).add_ir(ERROR_HANDLER_IR).add_current_process()
    for symbol in ("ignore_error", *RUNTIME_SETTERS):
        library.export_symbol(symbol)
    addresses = _prevent_free(library.link(linker, RUNTIME_LIBRARY))
    # Errors become return codes; by default they end the process.
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(addresses["halide_set_error_handler"])(addresses["ignore_error"])
    # The pool would have as many threads as the host has cores, of which a container may have a part.
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(addresses["halide_set_num_threads"])(usable_cores())
    return _prevent_free(linker)


def _prevent_free(owner: Any) -> Any:
    """Return an object of llvmlite of which nothing is freed at exit."""
    owner._owned = True  # noqa: SLF001
    return owner


_library_numbers = itertools.count()

RUNTIME_LIBRARY = "halide_runtime"
RUNTIME_SETTERS = ("halide_set_error_handler", "halide_set_num_threads")

ERROR_HANDLER_IR = "define void @ignore_error(ptr %context, ptr %message) { ret void }"


def _link_pipeline(function: str, built: ObjectFile) -> Pipeline:
    """Link an object file into this process and return its function."""
    library = llvm.JITLibraryBuilder().add_object_img(built.code).add_ir(_build_adapter_ir(function, built.arguments))
    library.add_jit_library(RUNTIME_LIBRARY).add_current_process().export_symbol(f"{function}_call")
    linker = _llvm_linker()
    # A name is taken for good, also by a library that could not be linked.
    addresses = _prevent_free(library.link(linker, f"{function}_{next(_library_numbers)}"))
    types = [_argument_ctype(argument) for argument in built.arguments]
    call = ctypes.CFUNCTYPE(ctypes.c_int, *types)(addresses[f"{function}_call"])

    def pipeline(*arguments: object) -> None:
        code = call(*arguments)
        if code:
            _raise_halide_error(code, arguments)

    return pipeline


def _raise_halide_error(code: int, arguments: tuple[object, ...]) -> None:
    if code == HALIDE_OUT_OF_MEMORY:
        raise MemoryError("a compiled engine found no memory")
    if code <= WRONG_ARRAY_CODE:
        array = arguments[WRONG_ARRAY_CODE - code]
        raise TypeError(
            f"argument {WRONG_ARRAY_CODE - code} of a pipeline is {getattr(array, 'dtype', array)!r}, or its rank"
        )
    raise RuntimeError(f"a compiled engine failed with Halide's error {code}")


def _argument_ctype(argument: Argument) -> Any:
    if argument.dimensions is not None:
        return ctypes.py_object
    return {"int32": ctypes.c_int32, "float32": ctypes.c_float, "float64": ctypes.c_double}[argument.dtype]


def _build_adapter_ir(function: str, arguments: Sequence[Argument]) -> str:
    """Return LLVM's text of a function that takes numpy's arrays and numbers and calls a pipeline.

    It makes a halide_buffer_t of each array on the stack and checks its type and rank: Python needs ten times as long.
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
"""numpy's PyArrayObject: the object's own fields, then data, nd, dimensions, strides, base and descr."""

HALIDE_DIMENSION_STRUCT = ir.LiteralStructType([INT32] * 4)
"""halide_dimension_t: min, extent, stride (in values) and flags."""

HALIDE_BUFFER_STRUCT = ir.LiteralStructType(
    [INT64, BYTE_POINTER, BYTE_POINTER, INT64, INT32, INT32, HALIDE_DIMENSION_STRUCT.as_pointer(), BYTE_POINTER]
)
"""halide_buffer_t: device, its interface, host, flags, type, number of dimensions, dimensions, padding."""


def _build_halide_buffer(builder: ir.IRBuilder, at: int, dtype: np.dtype[Any], rank: int, array: Any) -> Any:
    """Make a halide_buffer_t of argument number `at`, or return from the function if its type or rank is wrong."""
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
        place = [INT32(rank - 1 - axis)]
        extent, step = (builder.load(builder.gep(builder.load(field), place)) for field in (sizes, steps))
        stride = builder.sdiv(step, INT64(dtype.itemsize))
        values = INT32(0), builder.trunc(extent, INT32), builder.trunc(stride, INT32), INT32(0)
        _store_fields(builder, builder.gep(dimensions, [INT32(axis)]), values)
    # halide_type_t is 8 bits of code, 8 of size, and 16 of lanes.
    kind = INT32(HALIDE_TYPE_CODES[dtype.kind] | 8 * dtype.itemsize << 8 | 1 << 16)
    buffer, null = builder.alloca(HALIDE_BUFFER_STRUCT), BYTE_POINTER(None)
    _store_fields(builder, buffer, (INT64(0), null, builder.load(data), INT64(0), kind, INT32(rank), dimensions, null))
    return buffer


def _store_fields(builder: ir.IRBuilder, target: Any, values: Sequence[Any]) -> None:
    for place, value in enumerate(values):
        builder.store(value, builder.gep(target, [INT32(0), INT32(place)]))


def _check_numpy_array_layout() -> None:
    """Raise RuntimeError if numpy's arrays do not have the fields that _buffer reads."""
    array = np.zeros((3, 5), np.float32)[::2, ::2]
    found = [ctypes.c_int64.from_address(id(array) + object.__basicsize__ + 8 * place).value for place in range(6)]
    data, rank, sizes, steps, _, descr = found
    right = data == array.ctypes.data and rank & 0xFFFFFFFF == array.ndim and descr == id(np.dtype(np.float32))
    if not right or [
        [ctypes.c_int64.from_address(pointer + 8 * axis).value for axis in (0, 1)] for pointer in (sizes, steps)
    ] != [list(array.shape), list(array.strides)]:
        raise RuntimeError("numpy keeps the fields of its arrays in another order than compiled engines read them")
