"""Compare the estimates of time and memory with measurements of random requests: planes and layers, on every engine.

    python benchmarks/estimates.py [--requests 200] [--seed 0] [--engines torch_fft,torch] [--kinds plane,layer]
        [--seconds 2] [--values normal]

Each request runs twice in this process; the first run compiles and is not counted. The time is the wall time of the
second run, or its CPU time divided by the cores if that is shorter because other programs use the cores. The memory is
the increase of the peak resident size (VmHWM in /proc). A request that is off runs twice more, because another program
may have interfered, and the least time and memory count. `--values` selects the values of the images. A request is off
if it takes more than 50 ms and its time differs from the prediction by more than a factor of 5, or if its peak memory
exceeds 1.2 times the estimate plus 50 MB. Such requests are printed, and the exit code is 1 if there are any. The last
lines are the worst ratios of each engine.
"""

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import core
from service.server.malloc import limit_malloc_arenas
from tests.engine_properties import supports_steps

VALUE_KINDS = ("normal", "infinite", "huge", "subnormal", "offset")
MAX_REQUEST_S = 3.0
MIN_CHECKED_S = 0.05
MAX_TIME_RATIO = 5
MAX_MEMORY_RATIO = 1.2
MEMORY_SLACK_MB = 50.0
REMEASUREMENTS = 2


class Request(NamedTuple):
    """A call of correlate or conv2d without its arrays."""

    verb: str
    input: tuple[int, ...]
    kernel: tuple[int, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        """Shapes and options in one line."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items() if name != "machine")
        return f"{self.verb} {self.input} {self.kernel} {options}"


class Outcome(NamedTuple):
    """Estimates and measurements of one request, in seconds and megabytes."""

    request: Request
    engine: str
    predicted: float
    seconds: float
    estimated: float
    megabytes: float

    @property
    def times(self) -> float:
        """The measured time divided by the predicted time."""
        return self.seconds / self.predicted

    @property
    def off(self) -> bool:
        """True if a measurement exceeds the tolerance of its estimate."""
        wrong = max(self.times, 1 / self.times) > MAX_TIME_RATIO and max(self.seconds, self.predicted) > MIN_CHECKED_S
        return wrong or self.megabytes > MAX_MEMORY_RATIO * self.estimated + MEMORY_SLACK_MB


def draw_plane(rng: np.random.Generator, engine: str, dtype: str) -> Request:
    """Draw a request for one kernel and one or several planes."""
    height, width = (int(side) for side in np.exp(rng.uniform(np.log(16), np.log(3000), 2)))
    h, w = (int(side) for side in np.exp(rng.uniform(0, np.log(100), 2)))
    batch = int(rng.choice([1, 1, 1, 3, 20]))
    mode = str(rng.choice(["valid", "same", "full"]))
    boundary = "zeros" if mode == "valid" else str(rng.choice(["zeros", "reflect", "circular", "replicate"]))
    options = {"mode": mode, "boundary": boundary, "dtype": dtype, "engines": (engine,)}
    return Request("correlate", (batch, max(height, h), max(width, w)), (h, w), options)


def draw_layer(rng: np.random.Generator, engine: str, dtype: str) -> Request:
    """Draw a request for a Conv2d layer."""
    groups = int(rng.choice([1, 1, 1, 2, 8, 32]))
    depth, each = (int(channels) for channels in np.exp(rng.uniform(0, np.log(128 if groups == 1 else 8), 2)))
    height, width = (int(side) for side in np.exp(rng.uniform(np.log(8), np.log(500), 2)))
    h, w = (int(side) for side in np.exp(rng.uniform(0, np.log(9), 2)))
    steps = [1, 1, 2, 3] if supports_steps(engine) else [1]
    stride, dilation = (tuple(map(int, rng.choice(steps, 2))) for _ in range(2))
    padding = tuple(int(side) for side in rng.choice([0, 1, 2, 5], 4))
    size = max(height, dilation[0] * h), max(width, dilation[1] * w)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    options |= {"padding_mode": str(rng.choice(["zeros", "zeros", "reflect", "circular"]))}
    options |= {"dtype": dtype, "engines": (engine,)}
    shape = int(rng.choice([1, 1, 2, 8, 32])), groups * depth, *size
    return Request("conv2d", shape, (groups * each, depth, h, w), options)


DRAW_BY_KIND = {"plane": draw_plane, "layer": draw_layer}


def build_arrays(rng: np.random.Generator, request: Request, values: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return input and kernel; the kernel has rank 1 for engine `separable`."""
    dtype = np.dtype(request.options["dtype"])
    image = rng.standard_normal(request.input, dtype=np.float32).astype(dtype, copy=False)
    if request.options["engines"] == ("separable",):
        kernel = np.outer(rng.normal(size=request.kernel[0]), rng.normal(size=request.kernel[1])).astype(dtype)
    else:
        kernel = rng.normal(size=request.kernel).astype(dtype)
    make_hostile(image, values, rng)
    return image, kernel


def make_hostile(image: NDArray[Any], values: str, rng: np.random.Generator) -> None:
    """Change the values of an image in place to the given kind (VALUE_KINDS)."""
    numbers = np.finfo(image.dtype)
    if values == "infinite":
        image.flat[rng.integers(0, image.size, 1 + image.size // 1000)] = np.inf
    elif values == "offset":
        image += 1e5
    elif values != "normal":
        image *= numbers.max / 10 if values == "huge" else numbers.tiny / 10


def measure_request(
    request: Request, values: str, rng: np.random.Generator, longest: float, machine: core.Machine
) -> Outcome | None:
    """Measure a request; None if its engine cannot compute it, or is predicted to take more than `longest` seconds."""
    verb: Callable[..., core.Result] = core.correlate if request.verb == "correlate" else core.conv2d
    name = "kernel" if request.verb == "correlate" else "weight"
    shapes: dict[str, Any] = {
        "input": np.broadcast_to(np.float32(0), request.input),
        name: np.broadcast_to(np.float32(0), request.kernel),
    }
    options = {**request.options, "method": core.ENGINES[request.options["engines"][0]].METHOD, "machine": machine}
    try:
        make_plan = core.plan_correlate if request.verb == "correlate" else core.plan_conv2d
        cost = make_plan(**shapes, **options).cost
    except core.CoreError:
        return None
    if cost.seconds > longest or cost.megabytes > 4000:
        return None
    image, kernel = build_arrays(rng, request, values)
    call: Callable[[], core.Result] = partial(verb, image, kernel, **options)
    try:
        call()
    except core.CoreError:
        return None
    arrays_mb = (image.nbytes + kernel.nbytes) / 1e6
    outcome = measure_call(request, call, cost, arrays_mb)
    for _ in range(REMEASUREMENTS if outcome.off else 0):
        again = measure_call(request, call, cost, arrays_mb)
        outcome = outcome._replace(
            seconds=min(outcome.seconds, again.seconds), megabytes=min(outcome.megabytes, again.megabytes)
        )
    return outcome


def measure_call(request: Request, call: Callable[[], core.Result], cost: core.Cost, arrays_mb: float) -> Outcome:
    """Measure one call; arrays_mb: megabytes of its arguments, which the estimate includes."""
    trim_heap()
    before = read_peak_mb(reset=True)
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    seconds = min(wall, max(processor / core.usable_cores(), wall / 20))
    return Outcome(request, result.engine, cost.seconds, seconds, cost.megabytes, read_peak_mb() - before + arrays_mb)


def read_peak_mb(*, reset: bool = False) -> float:
    """Return the peak resident size in megabytes, after resetting it if requested."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def trim_heap() -> None:
    """Return freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> int:
    """Draw, measure and report requests; the exit code is 1 if an estimate is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default=",".join(core.ENGINES))
    parser.add_argument("--kinds", default="plane,layer")
    parser.add_argument("--dtypes", default="float32,float64")
    parser.add_argument("--values", default="normal", choices=VALUE_KINDS)
    parser.add_argument(
        "--seconds",
        type=float,
        default=MAX_REQUEST_S,
        help="longest predicted time of a request (default: %(default)s)",
    )
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    outcomes: list[Outcome] = []
    drawn = 0
    np.seterr(all="ignore")
    # The same as the service at its start.
    limit_malloc_arenas()
    machine = core.measure_machine(core.Machine(core.usable_cores()))
    print(f"{machine.flops / 1e9:.0f} Gflop/s and {machine.bandwidth / 1e9:.1f} GB/s per thread", flush=True)
    while len(outcomes) < options.requests and drawn < 20 * options.requests:
        drawn += 1
        draw = DRAW_BY_KIND[str(rng.choice(options.kinds.split(",")))]
        request = draw(rng, str(rng.choice(options.engines.split(","))), str(rng.choice(options.dtypes.split(","))))
        outcome = measure_request(request, options.values, rng, options.seconds, machine)
        if outcome is None:
            continue
        outcomes.append(outcome)
        if outcome.off:
            print(format_outcome(outcome), flush=True)
    print()
    print(f"{len(outcomes)} requests; worst by engine: time / predicted (at least {MIN_CHECKED_S} s), memory")
    for engine in core.ENGINES:
        own = [outcome for outcome in outcomes if outcome.engine == engine]
        long = [outcome.times for outcome in own if max(outcome.seconds, outcome.predicted) > MIN_CHECKED_S]
        excess = max((outcome.megabytes - MAX_MEMORY_RATIO * outcome.estimated for outcome in own), default=0.0)
        slowest, fastest = (f"{found:.2f}" if long else "-" for found in (max(long, default=0), min(long, default=0)))
        print(f"{engine:14} {len(own):4} slowest {slowest:>6} fastest {fastest:>6} memory over 1.2 x: {excess:7.1f} MB")
    off = [outcome for outcome in outcomes if outcome.off]
    print(f"{len(off)} are off")
    return 1 if off else 0


def format_outcome(outcome: Outcome) -> str:
    """Format an outcome as one line."""
    return (
        f"{outcome.seconds * 1000:8.1f} ms of {outcome.predicted * 1000:8.1f}  {outcome.megabytes:7.1f} MB of "
        f"{outcome.estimated:7.1f}  {outcome.request}"
    )


if __name__ == "__main__":
    sys.exit(main())
