"""Compilation, disk cache and calls of Halide pipelines, without holding Python's global interpreter lock (GIL).

Halide's Python bindings hold the GIL while they compile (0.3 to 2 s) and, in `Callable.__call__`, during a whole
computation. Therefore a child process compiles each pipeline to an object file, LLVM's loader links it into this
process, and ctypes calls it without the GIL. A call costs 1 to 2 microseconds. Object files are cached in the user's
cache folder. Their names depend on the source code of the engines, the version of Halide and the processor, so each
machine compiles a pipeline once.
"""

import functools
import importlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm

from core.engines.compilation import compiler_process
from core.engines.compilation.pipeline_cache import pipeline_name, read_cached
from core.engines.compilation.pipeline_linker import Pipeline, link_pipeline
from core.resources import usable_cores


class NotCompiled(Exception):
    """A pipeline is not compiled yet, and the calling thread must not wait for it: see `compiled_only`."""


_linked_pipelines: dict[str, Pipeline] = {}
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


def _load_pipeline(module: str, name: str, key: tuple[object, ...]) -> Pipeline:
    """Return a pipeline from the cache, or compiled by the child process."""
    function = pipeline_name(module, name, key)
    built = read_cached(function)
    if built is None:
        try:
            built = compiler_process.compiler.build(module, name, key)
        except RuntimeError:
            return _compile_in_process(module, name, key)
        if f"{function}_argv".encode() not in built.code:
            # The files of the engines have changed since this process started: the child has read the new ones.
            return _compile_in_process(module, name, key)
    with _link_lock:
        made = _linked_pipelines.get(function)
        if made is None:
            made = _linked_pipelines[function] = link_pipeline(function, built)
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
