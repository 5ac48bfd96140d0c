"""Child process that compiles pipelines: it reads their names from stdin and writes object files to stdout.

The module compiler_process starts it. It exits at the end of its input.
"""

import contextlib
import importlib
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from core.engines.compilation.compiler_process import HALIDE_RUNTIME_KEY
from core.engines.compilation.pipeline_cache import (
    Argument,
    ObjectFile,
    lock_cached,
    pipeline_name,
    prune_cache,
    read_cached,
    write_cached,
)
from core.engines.halide_jit import import_halide

IDLE_TIMEOUT_S = 10
"""Seconds without work after which the process exits, on systems that have alarm signals."""

NICENESS = 5
"""Niceness of the process, the same as that of the service's compute threads: the event loop has priority."""


def main() -> None:
    """Compile pipelines until the end of the input."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(NICENESS)
    prune_cache()
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    while True:
        _set_alarm(IDLE_TIMEOUT_S)
        try:
            module, name, key = pickle.load(requests)  # noqa: S301 - from our own parent
        except EOFError:
            return
        finally:
            _set_alarm(0)
        response: ObjectFile | str
        try:
            response = _read_or_compile(module, name, key)
        except Exception as error:  # noqa: BLE001 - the parent raises it
            response = f"{type(error).__name__}: {error}"
        try:
            pickle.dump(response, responses)
            responses.flush()
        except BrokenPipeError:
            return


def _set_alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.alarm(seconds)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise SystemExit


def _read_or_compile(module: str, name: str, key: tuple[object, ...]) -> ObjectFile:
    function = pipeline_name(module, name, key)
    with lock_cached(function):
        # Another process may have compiled the pipeline while this one waited for the lock.
        built = read_cached(function)
        if built is None:
            built = (
                _compile_runtime()
                if (module, name, key) == HALIDE_RUNTIME_KEY
                else _compile_pipeline(module, name, key, function)
            )
            write_cached(function, built)
    return built


def _compile_runtime() -> ObjectFile:
    target = import_halide().get_host_target()
    return ObjectFile([], _capture_output(lambda path: import_halide().compile_standalone_runtime(path, target)))


def _compile_pipeline(module: str, name: str, key: tuple[object, ...], function: str) -> ObjectFile:
    hl = import_halide()
    build = getattr(importlib.import_module(module), name).__wrapped__
    pipeline, inputs = build(*key)
    arguments = [_describe_argument(parameter) for parameter in inputs]
    outputs = pipeline.outputs() if isinstance(pipeline, hl.Pipeline) else [pipeline]
    for output in outputs:
        arguments += [Argument(_numpy_type_name(kind), output.dimensions()) for kind in output.types()]
    target = hl.get_host_target().with_feature(hl.TargetFeature.NoRuntime)
    return ObjectFile(
        arguments, _capture_output(lambda path: pipeline.compile_to_object(path, inputs, function, target))
    )


def _capture_output(write: Callable[[str], object]) -> bytes:
    """Call `write` with the name of a temporary file and return the bytes that it wrote to that file."""
    if hasattr(os, "memfd_create"):
        # A file in memory: a container may have no writable folder.
        descriptor = os.memfd_create("pipeline")
        try:
            write(f"/proc/self/fd/{descriptor}")
            return Path(f"/proc/self/fd/{descriptor}").read_bytes()
        finally:
            os.close(descriptor)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.o"
        write(str(path))
        return path.read_bytes()


def _describe_argument(parameter: Any) -> Argument:
    dimensions = parameter.dimensions() if isinstance(parameter, import_halide().ImageParam) else None
    return Argument(_numpy_type_name(parameter.type()), dimensions)


def _numpy_type_name(kind: Any) -> str:
    letter = "f" if kind.is_float() else "u" if kind.is_uint() else "i"
    return np.dtype(f"{letter}{kind.bits() // 8}").name


if __name__ == "__main__":
    main()
