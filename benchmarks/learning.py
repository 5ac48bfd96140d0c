"""Compare core.fit_kernel on the CPU with a plain autograd loop and with least squares on the explicit matrix.

    make learning                                     everything, in about 10 minutes
    .venv/bin/python benchmarks/learning.py --help    fewer rounds, a Markdown file, a plot

"autograd" is the plain training loop: torch.nn.functional.conv2d in float32, the sum of the squared differences,
backward, an update. As it takes minutes, its time is the shortest time of a step times the number of steps, which
favours it. "core" is the shortest time of core.fit_kernel from float32 arrays to the complete result, in float64.
"lstsq" and "gelsy" are numpy.linalg.lstsq and scipy.linalg.lstsq(lapack_driver="gelsy") in float64 on the matrix of all
windows, whose construction is included. Each of the exact solutions runs in its own process; "memory" is its peak
resident memory above that with the images loaded.

All functions are measured in every round, after the loss history of core has been compared with that of the loop.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

import core

IMAGE_SIDE = 1024
IMAGE_SIDES = (64, 128, 256, 512, 1024, 2048, 4096)
KERNEL_SIDES = (3, 15)
STEPS = 1000
NOISE_STD = 0.1
LEARNING_RATE_BY_KERNEL = {3: 1e-8, 15: 1e-9}
"""Learning rates by kernel side, below the largest stable one."""

LOOP_STEPS_PER_TURN = 5
"""Steps of the autograd loop in each measurement."""

LEAST_SQUARES_SOLVERS = ("core", "lstsq", "gelsy")

HISTORY_TOLERANCE = 1e-3
"""Relative tolerance for the loss history of the loop, which is in float32."""


@dataclass(frozen=True, slots=True)
class SpeedTarget:
    """A target ratio and the measured one."""

    name: str
    target: float
    reached: float

    @property
    def line(self) -> str:
        """A row of Markdown."""
        return (
            f"| {self.name} | {self.target:g} | {self.reached:.3g} | {'yes' if self.reached >= self.target else 'no'} |"
        )


def draw_examples(side: int, kernel: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a random image and its correlation with a random kernel, with noise added."""
    rng = np.random.default_rng(side + kernel)
    image = rng.standard_normal((side, side), np.float32)
    taps = rng.standard_normal((kernel, kernel), np.float32)
    target = core.correlate(image, taps).output.numpy()
    return image, target + NOISE_STD * rng.standard_normal(target.shape, np.float32)


def run_autograd_loop(
    image: NDArray[np.float32], target: NDArray[np.float32], kernel: int, rate: float, steps: int
) -> list[float]:
    """Run the loop of the d2l example and return its loss history."""
    images, targets = torch.from_numpy(image)[None, None], torch.from_numpy(target)[None, None]
    weight = torch.zeros(1, 1, kernel, kernel, requires_grad=True)
    history = []
    for _ in range(steps):
        loss = (torch.nn.functional.conv2d(images, weight) - targets).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            assert weight.grad is not None  # noqa: S101 - for the type checker
            weight -= rate * weight.grad
            weight.grad.zero_()
        history.append(loss.item())
    return history


def measure_seconds(work: Callable[[], object]) -> float:
    """Return the seconds of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_fit(
    image: NDArray[np.float32], target: NDArray[np.float32], machine: core.Machine, **options: Any
) -> core.FitResult:
    """Fit a kernel with core, starting from zeros."""
    kernel = image.shape[0] - target.shape[0] + 1
    return core.fit_kernel(image, target, initial_kernel=np.zeros((kernel, kernel)), machine=machine, **options)


def compare_descents(machine: core.Machine, rounds: int) -> tuple[list[str], list[SpeedTarget]]:
    """Compare gradient descent in core with the loop: return a table and the targets."""
    lines = ["| kernel | steps | autograd, s | core, s | times as fast |", "| --- | ---: | ---: | ---: | ---: |"]
    targets = []
    for kernel in KERNEL_SIDES:
        image, target = draw_examples(IMAGE_SIDE, kernel)
        rate = LEARNING_RATE_BY_KERNEL[kernel]
        history = run_autograd_loop(image, target, kernel, rate, LOOP_STEPS_PER_TURN)
        same = run_fit(image, target, machine, learning_rate=rate, steps=LOOP_STEPS_PER_TURN).loss_history
        np.testing.assert_allclose(same, history, rtol=HISTORY_TOLERANCE)
        step, whole = np.inf, {10: np.inf, STEPS: np.inf}
        for _ in range(rounds):
            step = min(
                step,
                measure_seconds(partial(run_autograd_loop, image, target, kernel, rate, LOOP_STEPS_PER_TURN))
                / LOOP_STEPS_PER_TURN,
            )
            for steps, shortest in whole.items():
                fitted = partial(run_fit, image, target, machine, learning_rate=rate, steps=steps)
                whole[steps] = min(shortest, measure_seconds(fitted))
        for steps, seconds in whole.items():
            ratio = steps * step / seconds
            lines.append(f"| {kernel} x {kernel} | {steps} | {steps * step:.3g} | {seconds:.3g} | {ratio:.3g} |")
            if (kernel, steps) != (3, 10):
                name = f"{IMAGE_SIDE} x {IMAGE_SIDE}, {kernel} x {kernel}, {steps} steps: times as fast as autograd"
                targets.append(SpeedTarget(name, 500 if steps == STEPS else 5, ratio))
    return lines, targets


def read_status_bytes(name: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None  # noqa: S101 - every process has these fields
    return 1024 * int(found[1])


def measure_solution(name: str) -> dict[str, float]:
    """Return seconds, peak memory in bytes and first entry of the best 15 x 15 kernel, computed by the named solver."""
    image, target = draw_examples(IMAGE_SIDE, 15)
    machine = core.measure_machine(core.Machine(core.usable_cores()))
    torch.set_num_threads(machine.threads)
    if name == "core":
        # Compile first, as this happens once per process.
        run_fit(image, target, machine, solver="exact")
    # Reset the peak resident memory (VmHWM).
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status_bytes("VmRSS")
    start = time.perf_counter()
    if name == "core":
        kernel = run_fit(image, target, machine, solver="exact").kernel.numpy().ravel()
    else:
        windows = np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (15, 15)).reshape(-1, 225)
        right = target.astype(np.float64).ravel()
        if name == "lstsq":
            kernel = np.linalg.lstsq(windows, right)[0]
        else:
            from scipy.linalg import lstsq

            kernel = lstsq(windows, right, lapack_driver="gelsy", overwrite_a=True, check_finite=False)[0]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": read_status_bytes("VmHWM") - before, "first": float(kernel[0])}


def compare_solutions(rounds: int) -> tuple[list[str], list[SpeedTarget]]:
    """Compare the exact solver with least squares on the explicit matrix: return a table and the targets."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name in LEAST_SQUARES_SOLVERS:
            command = [sys.executable, __file__, "--solution", name]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    np.testing.assert_allclose(
        [best[name]["first"] for name in LEAST_SQUARES_SOLVERS], best["core"]["first"], rtol=1e-9
    )
    lines = ["| solver | seconds | memory, MB |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {one['seconds']:.3g} | {one['bytes'] / 1e6:.0f} |" for name, one in best.items()]
    name = f"exact, 15 x 15 on {IMAGE_SIDE} x {IMAGE_SIDE}"
    return lines, [
        SpeedTarget(f"{name}: times as fast as lstsq", 20, best["lstsq"]["seconds"] / best["core"]["seconds"]),
        SpeedTarget(f"{name}: memory of lstsq / core", 10, best["lstsq"]["bytes"] / best["core"]["bytes"]),
    ]


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Seconds of reading the examples, of a step, and of a step of the autograd loop."""

    reading: float
    step: float
    loop_step: float


def measure_phases(side: int, kernel: int, machine: core.Machine, rounds: int) -> PhaseTimes:
    """Measure reading and steps in core, and steps of the loop."""
    image, target = draw_examples(side, kernel)
    reading = step = loop_step = np.inf
    rate = LEARNING_RATE_BY_KERNEL[kernel] * (IMAGE_SIDE / side) ** 2
    for _ in range(rounds):
        loop_step = min(loop_step, measure_seconds(partial(run_autograd_loop, image, target, kernel, rate, 2)) / 2)
        start = time.perf_counter()
        progress = core.fit_kernel_steps(
            image, target, initial_kernel=np.zeros((kernel, kernel)), learning_rate=rate, steps=STEPS, machine=machine
        )
        while not isinstance(next(progress), core.Forecast):
            pass
        read = time.perf_counter()
        for _ in progress:
            pass
        reading, step = min(reading, read - start), min(step, (time.perf_counter() - read) / STEPS)
    return PhaseTimes(reading, step, loop_step)


def measure_growth(machine: core.Machine, rounds: int, plot: Path | None) -> list[str]:
    """Measure how reading and steps depend on the size of the image: return a table and draw the plot."""
    lines = [
        "| kernel | image | reading, ms | reading, ns per pixel | step, us | autograd step, us |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    measured = {
        kernel: [measure_phases(side, kernel, machine, rounds) for side in IMAGE_SIDES] for kernel in KERNEL_SIDES
    }
    for kernel, times in measured.items():
        for side, one in zip(IMAGE_SIDES, times, strict=True):
            lines.append(
                f"| {kernel} x {kernel} | {side} x {side} | {1e3 * one.reading:.3g} "
                f"| {1e9 * one.reading / side**2:.3g} | {1e6 * one.step:.3g} | {1e6 * one.loop_step:.3g} |"
            )
    if plot is not None:
        draw_plot(measured, plot)
    return lines


def draw_plot(measured: dict[int, list[PhaseTimes]], path: Path) -> None:
    """Draw time against image size."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (kernel, times), style in zip(measured.items(), ("-", "--"), strict=True):
        size = f"{kernel} x {kernel}"
        axes.loglog(IMAGE_SIDES, [1e3 * one.loop_step for one in times], f"C3o{style}", label=f"autograd: step, {size}")
        axes.loglog(IMAGE_SIDES, [1e3 * one.reading for one in times], f"C0s{style}", label=f"core: reading, {size}")
        axes.loglog(IMAGE_SIDES, [1e3 * one.step for one in times], f"C2^{style}", label=f"core: step, {size}")
    axes.set_xticks(IMAGE_SIDES, [str(side) for side in IMAGE_SIDES])
    axes.minorticks_off()
    axes.set_xlabel("rows and columns of the image")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def format_report(parts: Sequence[tuple[str, list[str]]], machine: core.Machine) -> str:
    """Return the report as Markdown."""
    head = (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine.threads} threads, {machine.flops / 1e9:.0f} Gflop/s each in float32; "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__} (`make learning`)"
    )
    return "\n\n".join([head, *(f"## {title}\n\n" + "\n".join(lines) for title, lines in parts)]) + "\n"


def main() -> None:
    """Measure, print the report, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--solution", choices=LEAST_SQUARES_SOLVERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.solution:
        print(json.dumps(measure_solution(options.solution)))
        return
    machine = core.measure_machine(core.Machine(core.usable_cores()))
    torch.set_num_threads(machine.threads)
    descents, targets = compare_descents(machine, options.rounds)
    exact, more = compare_solutions(max(1, options.rounds // 3))
    parts = [
        ("Gradient descent, complete fits", descents),
        (f"The best 15 x 15 kernel on {IMAGE_SIDE} x {IMAGE_SIDE}", exact),
        ("Time against image size", measure_growth(machine, options.rounds, options.plot)),
    ]
    target_table = [
        "| ratio | target | reached | holds |",
        "| --- | ---: | ---: | --- |",
        *(one.line for one in [*targets, *more]),
    ]
    text = format_report([*parts, ("Targets", target_table)], machine)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
