"""Compilation, disk cache and calls of Halide pipelines, without holding Python's global interpreter lock (GIL).

Halide's Python bindings hold the GIL while they compile (0.3 to 2 s) and, in `Callable.__call__`, during a whole
computation. Therefore a child process compiles each pipeline to an object file, LLVM's loader links it into this
process, and ctypes calls it without the GIL. A call costs 1 to 2 microseconds. Object files are cached in the user's
cache folder. Their names depend on the source code of the engines, the version of Halide and the processor, so each
machine compiles a pipeline once.
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

from core.resources import usable_cores

Pipeline: TypeAlias = Callable[..., object]
"""A compiled function; its arguments are the inputs (arrays and numbers) in order, then the output arrays to fill."""

CACHE_FORMAT_VERSION = 1
"""Version of the cache's file format; part of the hash in the file names."""

CACHE_MAX_AGE_DAYS = 60
"""Days without use after which a cached file is removed."""

COMPILER_COMMAND = (sys.executable, "-P", "-m", "core.engines.compile_pipelines")

HALIDE_OUT_OF_MEMORY = -11
"""Halide's error code for a failed allocation (HalideRuntime.h)."""

WRONG_ARRAY_CODE = -1000
"""WRONG_ARRAY_CODE - n is the error code of a call whose argument n (from 0) has the wrong dtype or rank."""

HALIDE_TYPE_CODES = {"i": 0, "u": 1, "f": 2}
"""halide_type_code_t by numpy's dtype.kind."""


class NotCompiled(Exception):
    """A pipeline is not compiled yet, and the calling thread must not wait for it: see `compiled_only`."""


class Argument(NamedTuple):
    """An argument of a pipeline: the name of its numpy dtype and its number of dimensions, None for a scalar."""

    dtype: str
    dimensions: int | None


class ObjectFile(NamedTuple):
    """A compiled pipeline: its arguments and the object code."""

    arguments: Sequence[Argument]
    code: bytes


_link_lock = threading.Lock()
_thread_state = threading.local()


@contextmanager
def compiled_only() -> Iterator[None]:
    """Raise NotCompiled in this context if this thread needs a pipeline that is not loaded, instead of compiling it."""
    before = getattr(_thread_state, "compiled_only", False)
    _thread_state.compiled_only = True
    try:
        yield
    finally:
        _thread_state.compiled_only = before


def cached_pipeline(build: Callable[..., Any]) -> Callable[..., Pipeline]:
    """Return a function that returns the pipeline of `build` for given arguments and compiles it at the first call.

    The pipeline is thread-safe.
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
    """Return the size in bytes of the widest vector registers that Halide uses on this processor."""
    features = llvm.get_host_cpu_features()
    if all(features.get(name) for name in ("avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd")):
        return 64
    return 32 if features.get("avx") else 16


def pipeline_name(module: str, name: str, key: tuple[object, ...]) -> str:
    """Return the name of a pipeline's file in the cache, which is also the name of its function."""
    return "p" + hashlib.sha256(repr((_build_fingerprint(), module, name, key)).encode()).hexdigest()[:40]


def read_cached(name: str) -> ObjectFile | None:
    """Return a pipeline from the cache, or None if it is missing or its checksum is wrong."""
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
    """Write a pipeline to the cache if possible; errors of the file system are ignored."""
    folder = cache_folder()
    if folder is None:
        return
    header = json.dumps(built.arguments).encode()
    content = b"\n".join([hashlib.sha256(header + built.code).hexdigest().encode(), header, built.code])
    with contextlib.suppress(OSError):
        # Written to a temporary file and renamed, so that other processes never read an incomplete file.
        descriptor, path = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            Path(path).replace(folder / name)
        except OSError:
            Path(path).unlink()


@functools.cache
def cache_folder() -> Path | None:
    """Return the folder for compiled pipelines, writable only by this user, or None if it cannot be created.

    It is in XDG_CACHE_HOME or ~/.cache or, if that is not writable, in the system's folder for temporary files.
    """
    owner = os.getuid() if hasattr(os, "getuid") else 0
    for name in ("home", "temporary"):
        # Without a home folder expanduser raises RuntimeError; without a temporary folder gettempdir raises OSError.
        with contextlib.suppress(OSError, RuntimeError):
            if name == "home":
                folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "corr2d"
            else:
                folder = Path(tempfile.gettempdir()) / f"corr2d-{owner}"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.lstat()
            # The files are executed, so other users must not be able to write them.
            ours = not hasattr(os, "getuid") or (found.st_uid == owner and not found.st_mode & 0o022)
            if stat.S_ISDIR(found.st_mode) and ours and os.access(folder, os.W_OK):
                return folder
    return None


@contextmanager
def lock_cached(name: str) -> Iterator[None]:
    """Hold an exclusive lock between processes on a file of the cache."""
    folder = cache_folder()
    if folder is None or fcntl is None:
        yield
        return
    with (folder / "lock").open("a") as lock:
        # Each name locks one byte of the lock file.
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(name[1:9], 16))
        yield


def prune_cache() -> None:
    """Remove cached files that were not used for CACHE_MAX_AGE_DAYS: each version of the engines adds new files."""
    folder = cache_folder()
    for path in folder.iterdir() if folder is not None else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > CACHE_MAX_AGE_DAYS * 86_400:
                path.unlink()


@functools.cache
def _build_fingerprint() -> tuple[str, ...]:
    """Return everything besides name and arguments that the object code of a pipeline depends on."""
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text.update(path.read_bytes())
    features = llvm.get_host_cpu_features().flatten()
    processor = llvm.get_process_triple(), llvm.get_host_cpu_name(), features
    return (str(CACHE_FORMAT_VERSION), importlib.metadata.version("halide"), *processor, text.hexdigest())


def _load_pipeline(module: str, name: str, key: tuple[object, ...]) -> Pipeline:
    """Return a pipeline from the cache, or compiled by the child process."""
    function = pipeline_name(module, name, key)
    built = read_cached(function)
    if built is None:
        try:
            built = _compiler.build(module, name, key)
        except RuntimeError:
            return _compile_in_process(module, name, key)
        if f"{function}_argv".encode() not in built.code:
            # The files of the engines have changed since this process started: the child has read the new ones.
            return _compile_in_process(module, name, key)
    with _link_lock:
        made = _linked_pipelines.get(function)
        if made is None:
            made = _linked_pipelines[function] = _link_pipeline(function, built)
    return made


def _compile_in_process(module: str, name: str, key: tuple[object, ...]) -> Pipeline:
    """Return a pipeline compiled in this process, if the child process fails, for example because of a read-only /tmp.

    Such a pipeline holds the GIL while it is compiled and while it runs.
    """
    # By default Halide's pool has one thread per core of the host.
    os.environ.setdefault("HL_NUM_THREADS", str(usable_cores()))
    scheduled, inputs = inspect.unwrap(getattr(importlib.import_module(module), name))(*key)
    pipeline: Pipeline = scheduled.compile_to_callable(inputs)
    return pipeline


HALIDE_RUNTIME_KEY = ("", "runtime", ())
"""The key of Halide's runtime, used like the module, name and arguments of a pipeline."""


class _CompilerProcess:
    """Manager of the child process that compiles pipelines. It starts when needed and exits when idle."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def build(self, module: str, name: str, key: tuple[object, ...]) -> ObjectFile:
        """Return one compiled pipeline. Raises RuntimeError with the child's error message if compilation fails."""
        with self._lock:
            try:
                built = self._request(module, name, key)
            except (OSError, EOFError, pickle.UnpicklingError):
                # The process has exited because it was idle, or the system has killed it to free memory.
                self._stop()
                built = self._request(module, name, key)
        if isinstance(built, ObjectFile):
            return built
        raise RuntimeError(f"{module}.{name}{key} cannot be compiled: {built}")

    def close(self) -> None:
        """Stop the process."""
        with self._lock:
            self._stop()

    def _request(self, module: str, name: str, key: tuple[object, ...]) -> ObjectFile | str:
        process = self._process = self._process or _start_compiler()
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        pickle.dump((module, name, key), process.stdin)
        process.stdin.flush()
        built: ObjectFile | str = pickle.load(process.stdout)  # noqa: S301 - from our own child process
        return built

    def _stop(self) -> None:
        """Close the process's input, at which it exits, and wait for it."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                process.communicate()


_compiler = _CompilerProcess()
_linked_pipelines: dict[str, Pipeline] = {}


def _start_compiler() -> "subprocess.Popen[bytes]":
    # The child imports modules from the same places as this process, independent of the working directory.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(  # noqa: S603 - this Python interpreter and our own module
        COMPILER_COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        # Its own process group, so that Ctrl-C in a terminal reaches only the parent.
        process_group=0 if os.name == "posix" else None,
    )


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
    built = read_cached(runtime) or _compiler.build(*HALIDE_RUNTIME_KEY)
    library = llvm.JITLibraryBuilder().add_object_img(built.code).add_ir(ERROR_HANDLER_IR).add_current_process()
    for symbol in ("ignore_error", *RUNTIME_SETTERS):
        library.export_symbol(symbol)
    addresses = _prevent_free(library.link(linker, RUNTIME_LIBRARY))
    # With this handler errors become return codes; Halide's default handler aborts the process.
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(addresses["halide_set_error_handler"])(addresses["ignore_error"])
    # By default the pool has one thread per core of the host, although a container may be limited to fewer.
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(addresses["halide_set_num_threads"])(usable_cores())
    return _prevent_free(linker)


def _prevent_free(owner: Any) -> Any:
    """Return an llvmlite object, marked so that llvmlite does not free it at exit."""
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
    # Library names cannot be reused, not even after linking failed, so each has a number.
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
