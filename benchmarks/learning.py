"""How long core.fit_kernel takes on the CPU beside the plain autograd loop and least squares on the explicit matrix.

    make learning                                     everything, in about 15 minutes
    .venv/bin/python benchmarks/learning.py --help    fewer rounds, a Markdown file, a picture

How to read it. "autograd" is the loop that everybody writes first: torch.nn.functional.conv2d in float32, the sum of
the squared differences, backward, an update. It takes minutes, so a step of it is timed many times and the shortest
counts, times the number of steps: that flatters it. "core" is the whole of core.fit_kernel from float32 arrays to the
result, all that it says included, in float64; the shortest of several. "lstsq" and "gelsy" are numpy.linalg.lstsq and
scipy.linalg.lstsq(lapack_driver="gelsy") in float64 on the matrix of all windows, which is made first; each runs in a
process of its own, whose peak of resident memory above what it had with the images loaded is "memory".

How it is measured. Rounds: in each, everybody has a turn. Before, core's history is held against the loop's.
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
"""Of gradient descent, below the largest stable one for both kernels."""

LOOP_STEPS_PER_TURN = 5
"""Of the loop, in a turn."""

LEAST_SQUARES_SOLVERS = ("core", "lstsq", "gelsy")

HISTORY_TOLERANCE = 1e-3
"""What float32 may cost the loop's history."""


@dataclass(frozen=True, slots=True)
class SpeedTarget:
    """What is to be shown, and what was."""

    what: str
    asked: float
    reached: float

    @property
    def line(self) -> str:
        """A row of Markdown."""
        return (
            f"| {self.what} | {self.asked:g} | {self.reached:.3g} | {'yes' if self.reached >= self.asked else 'no'} |"
        )


def draw_examples(side: int, kernel: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Noise as an image, what a random kernel makes of it, and noise on top."""
    rng = np.random.default_rng(side + kernel)
    image = rng.standard_normal((side, side), np.float32)
    taps = rng.standard_normal((kernel, kernel), np.float32)
    target = core.correlate(image, taps).output.numpy()
    return image, target + NOISE_STD * rng.standard_normal(target.shape, np.float32)


def run_autograd_loop(
    image: NDArray[np.float32], target: NDArray[np.float32], kernel: int, rate: float, steps: int
) -> list[float]:
    """The lesson's loop: its loss history."""
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
    """Of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_fit(
    image: NDArray[np.float32], target: NDArray[np.float32], machine: core.Machine, **options: Any
) -> core.FitResult:
    """core's, from a kernel of zeros."""
    kernel = image.shape[0] - target.shape[0] + 1
    return core.fit_kernel(image, target, initial_kernel=np.zeros((kernel, kernel)), machine=machine, **options)


def compare_descents(machine: core.Machine, rounds: int) -> tuple[list[str], list[SpeedTarget]]:
    """Core beside the loop: a table and what it shows."""
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
        for steps, took in whole.items():
            ratio = steps * step / took
            lines.append(f"| {kernel} x {kernel} | {steps} | {steps * step:.3g} | {took:.3g} | {ratio:.3g} |")
            if (kernel, steps) != (3, 10):
                what = f"{IMAGE_SIDE} x {IMAGE_SIDE}, {kernel} x {kernel}, {steps} steps: times as fast as autograd"
                targets.append(SpeedTarget(what, 500 if steps == STEPS else 5, ratio))
    return lines, targets


def read_status_bytes(name: str) -> int:
    """What the system says of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None  # noqa: S101 - there is one for every process
    return 1024 * int(found[1])


def measure_solution(name: str) -> dict[str, float]:
    """Seconds, peak memory in bytes and the residual of one way to the best 15 x 15 kernel; in a process of its own."""
    image, target = draw_examples(IMAGE_SIDE, 15)
    machine = core.measure_machine(core.Machine(core.usable_cores()))
    torch.set_num_threads(machine.threads)
    if name == "core":
        # Compiling happens once a process: it is not part of a solution.
        run_fit(image, target, machine, solver="exact")
    # Linux keeps a process's peak of resident memory; 5 makes it begin again.
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
    took = time.perf_counter() - start
    return {"seconds": took, "bytes": read_status_bytes("VmHWM") - before, "first": float(kernel[0])}


def compare_solutions(rounds: int) -> tuple[list[str], list[SpeedTarget]]:
    """The exact solver beside least squares on the explicit matrix."""
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
    lines = ["| way | seconds | memory, MB |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {one['seconds']:.3g} | {one['bytes'] / 1e6:.0f} |" for name, one in best.items()]
    what = f"exact, 15 x 15 on {IMAGE_SIDE} x {IMAGE_SIDE}"
    return lines, [
        SpeedTarget(f"{what}: times as fast as lstsq", 20, best["lstsq"]["seconds"] / best["core"]["seconds"]),
        SpeedTarget(f"{what}: lstsq's memory by core's", 10, best["lstsq"]["bytes"] / best["core"]["bytes"]),
    ]


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Seconds until the forecast, of a step after it, and of a step of the loop."""

    reading: float
    step: float
    loop_step: float


def measure_phases(side: int, kernel: int, machine: core.Machine, rounds: int) -> PhaseTimes:
    """How long core reads, and then steps."""
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
        foretold = time.perf_counter()
        for _ in progress:
            pass
        reading, step = min(reading, foretold - start), min(step, (time.perf_counter() - foretold) / STEPS)
    return PhaseTimes(reading, step, loop_step)


def measure_growth(machine: core.Machine, rounds: int, picture: Path | None) -> list[str]:
    """What depends on the image's size, and what does not."""
    lines = [
        "| kernel | image | reading, ms | reading, ns a pixel | a step, us | a step of autograd, us |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    measured = {
        kernel: [measure_phases(side, kernel, machine, rounds) for side in IMAGE_SIDES] for kernel in KERNEL_SIDES
    }
    for kernel, taken in measured.items():
        for side, one in zip(IMAGE_SIDES, taken, strict=True):
            lines.append(
                f"| {kernel} x {kernel} | {side} x {side} | {1e3 * one.reading:.3g} "
                f"| {1e9 * one.reading / side**2:.3g} | {1e6 * one.step:.3g} | {1e6 * one.loop_step:.3g} |"
            )
    if picture is not None:
        draw_plot(measured, picture)
    return lines


def draw_plot(measured: dict[int, list[PhaseTimes]], picture: Path) -> None:
    """Time against the image's side."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (kernel, taken), style in zip(measured.items(), ("-", "--"), strict=True):
        named = f"{kernel} x {kernel}"
        axes.loglog(
            IMAGE_SIDES, [1e3 * one.loop_step for one in taken], f"C3o{style}", label=f"a step of autograd, {named}"
        )
        axes.loglog(IMAGE_SIDES, [1e3 * one.reading for one in taken], f"C0s{style}", label=f"core reads, {named}")
        axes.loglog(IMAGE_SIDES, [1e3 * one.step for one in taken], f"C2^{style}", label=f"a step of core, {named}")
    axes.set_xticks(IMAGE_SIDES, [str(side) for side in IMAGE_SIDES])
    axes.minorticks_off()
    axes.set_xlabel("pixels on a side")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=110)


def format_report(parts: Sequence[tuple[str, list[str]]], machine: core.Machine) -> str:
    """A Markdown file."""
    head = (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine.threads} threads, {machine.flops / 1e9:.0f} Gflop/s each in float32; "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, numpy {np.__version__} (`make learning`)"
    )
    return "\n\n".join([head, *(f"## {title}\n\n" + "\n".join(lines) for title, lines in parts)]) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--solution", choices=LEAST_SQUARES_SOLVERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.solution:
        print(json.dumps(measure_solution(options.solution)))
        return
    machine = core.measure_machine(core.Machine(core.usable_cores()))
    torch.set_num_threads(machine.threads)
    fast, targets = compare_descents(machine, options.rounds)
    exact, more = compare_solutions(max(1, options.rounds // 3))
    parts = [
        ("Gradient descent, to the result", fast),
        (f"The best 15 x 15 kernel on {IMAGE_SIDE} x {IMAGE_SIDE}", exact),
        ("What grows with the image", measure_growth(machine, options.rounds, options.picture)),
    ]
    shown = [
        "| what | target | reached | holds |",
        "| --- | ---: | ---: | --- |",
        *(one.line for one in [*targets, *more]),
    ]
    text = format_report([*parts, ("What it must show", shown)], machine)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
