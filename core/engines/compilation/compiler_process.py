"""The child process that compiles pipelines, as seen by its parent: start, requests and shutdown.

The child runs the module compile_pipelines.
"""

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import threading

from core.engines.compilation.pipeline_cache import ObjectFile

COMPILER_COMMAND = (sys.executable, "-P", "-m", "core.engines.compilation.compile_pipelines")

HALIDE_RUNTIME_KEY = ("", "runtime", ())
"""The key of Halide's runtime, used like the module, name and arguments of a pipeline."""


class CompilerProcess:
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


compiler = CompilerProcess()


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
