"""Measurement of core, its engines and other libraries on one layer after the other, each library in a process."""

import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from measurement.layer_peers import EACH_CALL, PEERS, Array, Call, CoreCalls, Layer

TURN_S = 0.06
WARM_UP_CALLS = 3
MIN_CALLS = 5
TURNS = 3

TOLERANCE = 1e-5
"""Largest accepted error, as a fraction of the largest output."""

CORE_ENGINES = ("stencil", "padded_stencil", "implicit_gemm", "packed_gemm", "winograd", "torch")
"""Engines that are timed alone; the others are never the fastest for these layers."""


def serve_calls(name: str, threads: int, connection: Connection) -> None:
    """Prepare and time calls in a process of its own, as the main process asks."""
    call: Call | None = None
    of_core = CoreCalls(threads) if name == "core" else None
    while True:
        layer, engine = connection.recv()
        if layer is None:
            connection.send(time_calls(call) if call is not None else [])
        elif of_core is None:
            call = PEERS[name](layer, threads)
            connection.send(call())
        elif engine == "choice":
            connection.send(of_core.choose(layer))
        else:
            call = of_core.prepare(layer, engine)
            connection.send(None if call is None else call())


def time_calls(call: Call) -> list[float]:
    """Return the seconds of each call of a turn."""
    for _ in range(WARM_UP_CALLS):
        call()
    seconds: list[float] = []
    end = time.perf_counter() + TURN_S
    while time.perf_counter() < end or len(seconds) < MIN_CALLS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


class Child:
    """A process with one library, stopped unless it works."""

    def __init__(self, name: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve_calls, args=(name, threads, other), daemon=True)
        self._process.start()

    def ask(self, layer: Layer | None = None, engine: str | None = None) -> Any:
        """Prepare a layer and return its output, or time the prepared one; the process is stopped afterwards."""
        self._signal(signal.SIGCONT)
        self._connection.send((layer, engine))
        answer = self._connection.recv()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid or 0, number)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


@contextmanager
def start_children(names: Sequence[str], threads: int) -> Iterator[dict[str, Child]]:
    """Start a process for each library."""
    children: dict[str, Child] = {}
    try:
        for name in names:
            children[name] = Child(name, threads)
        yield children
    finally:
        for child in children.values():
            child.end()


class Row(NamedTuple):
    """Median seconds of a layer: of core, of each peer, and of each engine alone; the chosen engine.

    core: a prepared layer. each_call: core.conv2d.
    """

    layer: Layer
    threads: int
    core: float
    each_call: float
    peers: dict[str, float]
    engines: dict[str, float]
    chosen: str

    @property
    def ratio(self) -> float:
        """Time of core divided by that of the fastest peer."""
        return self.core / min(self.peers.values())

    @property
    def each_call_ratio(self) -> float:
        """Time of core.conv2d divided by that of torch, which also gets the weight in each call."""
        return self.each_call / min(seconds for name, seconds in self.peers.items() if name.startswith("torch"))

    @property
    def regret(self) -> float:
        """Time of the chosen engine divided by that of the fastest."""
        return self.engines.get(self.chosen, self.core) / min(self.engines.values())


def measure_layer(layer: Layer, threads: int, children: dict[str, Child]) -> Row:
    """Check and time one layer."""
    core = children["core"]
    expected = children["torch"].ask(layer)
    peers = [name for name in children if name != "core"]
    for name in peers:
        check_output(name, layer, children[name].ask(layer), expected)
    seconds: dict[str, list[float]] = {name: [] for name in [*peers, "core", EACH_CALL, *CORE_ENGINES]}
    for _ in range(TURNS):
        for name in peers:
            seconds[name] += children[name].ask()
        for engine in (None, EACH_CALL, *CORE_ENGINES):
            output = core.ask(layer, engine)
            if output is not None:
                check_output(engine or "core", layer, output, expected)
                seconds[engine or "core"] += core.ask()
    medians = {name: statistics.median(times) for name, times in seconds.items() if times}
    return Row(
        layer,
        threads,
        medians["core"],
        medians[EACH_CALL],
        {name: medians[name] for name in peers},
        {name: medians[name] for name in CORE_ENGINES if name in medians},
        core.ask(layer, "choice"),
    )


def check_output(name: str, layer: Layer, output: Array, expected: Array) -> None:
    """Exit if an output is wrong."""
    error = float(np.abs(output - expected).max() / np.abs(expected).max())
    if error > TOLERANCE:
        sys.exit(f"{name}, {layer}: the output is off by {error:.2g} of its largest value")
