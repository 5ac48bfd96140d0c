"""The child process that compiles pipelines: it reads their names from its input and writes object files to its output.

Started by core.engines.pipelines as `python -m core.engines.compile_pipelines`; it ends with its input.
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

from core.engines.jit import halide
from core.engines.pipelines import RUNTIME, Argument, Built, build_name, exclusive, keep, read_kept, remove_old

IDLE_S = 10
"""Seconds without work after which the process ends, where the system knows alarms."""

NICENESS = 5
"""As that of the service's threads that compute: the event loop goes first."""


def main() -> None:
    """Compile until the input ends."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(NICENESS)
    remove_old()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        _set_alarm(IDLE_S)
        try:
            module, name, key = pickle.load(requests)  # noqa: S301 - from our own parent
        except EOFError:
            return
        finally:
            _set_alarm(0)
        answer: Built | str
        try:
            answer = _kept_or_built(module, name, key)
        except Exception as error:  # noqa: BLE001 - the parent raises it
            answer = f"{type(error).__name__}: {error}"
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            return


def _set_alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.alarm(seconds)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise SystemExit


def _kept_or_built(module: str, name: str, key: tuple[object, ...]) -> Built:
    function = build_name(module, name, key)
    with exclusive(function):
        # Another process may have compiled it meanwhile.
        built = read_kept(function)
        if built is None:
            built = _runtime() if (module, name, key) == RUNTIME else _pipeline(module, name, key, function)
            keep(function, built)
    return built


def _runtime() -> Built:
    target = halide().get_host_target()
    return Built([], _written(lambda path: halide().compile_standalone_runtime(path, target)))


def _pipeline(module: str, name: str, key: tuple[object, ...], function: str) -> Built:
    hl = halide()
    build = getattr(importlib.import_module(module), name).__wrapped__
    pipeline, inputs = build(*key)
    arguments = [_argument(parameter) for parameter in inputs]
    outputs = pipeline.outputs() if isinstance(pipeline, hl.Pipeline) else [pipeline]
    for output in outputs:
        arguments += [Argument(_numpy_name(kind), output.dimensions()) for kind in output.types()]
    target = hl.get_host_target().with_feature(hl.TargetFeature.NoRuntime)
    return Built(arguments, _written(lambda path: pipeline.compile_to_object(path, inputs, function, target)))


def _written(write: Callable[[str], object]) -> bytes:
    """Return what `write` writes to the file of the name that it is given."""
    if hasattr(os, "memfd_create"):
        # A container may have no folder to write to.
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


def _argument(parameter: Any) -> Argument:
    dimensions = parameter.dimensions() if isinstance(parameter, halide().ImageParam) else None
    return Argument(_numpy_name(parameter.type()), dimensions)


def _numpy_name(kind: Any) -> str:
    letter = "f" if kind.is_float() else "u" if kind.is_uint() else "i"
    return np.dtype(f"{letter}{kind.bits() // 8}").name


if __name__ == "__main__":
    main()
