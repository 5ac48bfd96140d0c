"""Compare the time and memory of random fits of every kind with their estimates.

    python -m benchmarks.fit_estimates [--fits 120] [--seed 0] [--seconds 10]

Prints every fit whose time differs from the prediction by more than a factor of 3, whose memory is above the estimate,
or that pauses for long. The last lines are the worst of each: the measured time divided by the prediction, for fits of
more than 50 ms; the growth of the peak memory above 1.2 times the estimate, of which 50 MB are allowed; and the longest
pause between two events. numpy and torch use one thread, and times are CPU times, so that other processes have little
influence.
"""

import argparse
import ctypes
import gc
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import core

MIN_CHECKED_S = 0.05
"""Fits that take less, in seconds, are not checked."""

MAX_RIDGE_SEARCH_UNKNOWNS = 1024
"""Largest number of unknowns per filter for ridge "auto"."""

M_MMAP_THRESHOLD = -3
"""Parameter of mallopt, from malloc.h of glibc."""

MEMORY_SLACK_MB = 50.0
"""Allowed memory of a fit above 1.2 times its estimate, in MB."""

REMEASURED_RATIO = 2.0
REMEASURED_PAUSE_S = 0.3
"""Fits whose time differs by this factor, or that pause for this many seconds, are measured again."""


def draw_fit(rng: np.random.Generator) -> dict[str, Any]:
    """Draw the arguments of a fit: any solver, loss, size, number of images, weights and batches."""
    channels, filters = (int(rng.choice([1, 1, 1, 2, 3, 8, 32])) for _ in range(2))
    groups = channels if channels == filters and rng.random() < 0.2 else 1
    largest = max(2, int(math.sqrt(4500 / (channels // groups))))
    kernel = tuple(round(math.exp(rng.uniform(0, math.log(largest)))) for _ in range(2))
    stride, dilation = (int(rng.choice([1, 1, 1, 2])) for _ in range(2))
    padding = int(rng.choice([0, 0, kernel[0] // 2]))
    least = [dilation * (side - 1) + 1 for side in kernel]
    values = math.exp(rng.uniform(math.log(1e2), math.log(8e6)))
    images = round(math.exp(rng.uniform(0, math.log(300)))) if rng.random() < 0.5 else 1
    side = math.sqrt(values / images / max(channels, filters))
    size = [max(int(side * rng.uniform(0.7, 1.4)), shortest) for shortest in least]
    rows, columns = (
        (pixels + 2 * padding - shortest) // stride + 1 for pixels, shortest in zip(size, least, strict=True)
    )
    dtype = str(rng.choice(["float32", "float64", "uint8"]))
    shape, shape_out = (images, channels, *size), (images, filters, rows, columns)
    arguments: dict[str, Any] = {
        "input": (100 * rng.random(shape)).astype(dtype),
        "target": (100 * rng.random(shape_out)).astype(dtype),
        "kernel_size": kernel,
        "groups": groups,
        "stride": stride,
        "dilation": dilation,
        "padding": padding,
        "padding_mode": str(rng.choice(["zeros", "circular"])),
        "bias": bool(rng.random() < 0.3),
        "solver": str(rng.choice(["exact", "exact", "sgd", "sgd", "momentum", "nesterov", "adam"])),
        "steps": round(math.exp(rng.uniform(0, math.log(3000)))),
        "ridge": float(rng.choice([0, 0, 0, 1.0])),
        "learning_rate": 1e-9,
        "seed": 0,
    }
    if rng.random() < 0.25:
        arguments["weights"] = rng.random((rows, columns) if rng.random() < 0.5 else shape_out)
    if arguments["solver"] != "exact":
        arguments["loss"] = str(rng.choice(["sum", "sum", "mean", "huber", "l1"]))
        if arguments["solver"] != "adam" and arguments["loss"] in ("sum", "mean") and rng.random() < 0.4:
            arguments["learning_rate"] = "auto"
        if arguments["solver"] == "sgd" and images > 1 and rng.random() < 0.5:
            arguments["batch_size"] = int(rng.integers(1, images + 1))
    unknowns = kernel[0] * kernel[1] * (channels // groups) + arguments["bias"]
    if arguments.get("loss", "sum") in ("sum", "mean") and unknowns <= MAX_RIDGE_SEARCH_UNKNOWNS and rng.random() < 0.3:
        arguments["ridge"] = "auto" if rng.random() < 0.7 else arguments["ridge"]
        arguments["ridge_path"] = bool(rng.random() < 0.5)
        arguments["covariance"] = bool(rng.random() < 0.5)
    constrained = arguments["solver"] == "exact" and channels // groups * math.prod(kernel) in range(2, 1024)
    if constrained and arguments["ridge"] != "auto" and not arguments.get("ridge_path") and rng.random() < 0.4:
        options: list[dict[str, Any]] = [{"nonnegative": True}, {"sum_to": 1}, {"separable": 1}, {"smoothness": 1.0}]
        arguments |= options[rng.integers(len(options))]
    if images > 1 and rng.random() < 0.3 and "weights" not in arguments:
        arguments["pairs"] = list(zip(arguments.pop("input"), arguments.pop("target"), strict=True))
    return arguments


def read_peak_mb(*, reset: bool = False) -> float:
    """Return the peak memory of this process since the last reset, in MB."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else math.nan


def time_fit(plan: core.FitPlan) -> tuple[float, float]:
    """Return the CPU time of a fit and its longest pause between two events, in seconds."""
    pause, start = 0.0, time.process_time()
    last = start

    def listen(_: core.Progress) -> None:
        nonlocal pause, last
        now = time.process_time()
        pause, last = max(pause, now - last), now

    core.run_to_end(plan.steps(), listen)
    listen(core.Reading(0, 0))
    return last - start, pause


def describe_fit(arguments: dict[str, Any]) -> str:
    """Describe a fit in one line."""
    shapes = [f"{name} {arguments[name].shape}" for name in ("input", "target", "weights") if name in arguments]
    if "pairs" in arguments:
        shapes.append(
            f"{len(arguments['pairs'])} pairs {arguments['pairs'][0][0].shape} {arguments['pairs'][0][1].shape}"
        )
    options = {
        name: value for name, value in arguments.items() if name not in ("input", "target", "weights", "pairs", "seed")
    }
    defaults = {"groups": 1, "stride": 1, "dilation": 1, "padding": 0, "bias": False, "ridge": 0.0, "loss": "sum"}
    defaults |= {"ridge_path": False, "covariance": False}
    return ", ".join(shapes + [f"{name} {value}" for name, value in options.items() if defaults.get(name) != value])


def measure_fits(
    count: int, seed: int, longest: float, machine: core.Machine
) -> Iterator[tuple[str, core.Cost, float, float, float, str]]:
    """Yield for each fit its description, cost, CPU seconds, growth in MB, longest pause in seconds, and method."""
    rng = np.random.default_rng(seed)
    done = 0
    while done < count:
        arguments = draw_fit(rng)
        try:
            plan = core.plan_fit_kernel(**arguments, machine=machine)
        except core.InvalidOption:
            # The equations are too large for ridge "auto".
            continue
        if plan.cost.seconds > longest or plan.cost.megabytes > 2000:
            continue
        before = read_peak_mb(reset=True)
        seconds, pause = time_fit(plan)
        grown = read_peak_mb() - before
        off = not 1 / REMEASURED_RATIO < seconds / plan.cost.seconds < REMEASURED_RATIO or pause > REMEASURED_PAUSE_S
        if off or grown > 1.2 * plan.cost.megabytes:
            # A compilation or another process may have interfered.
            before = read_peak_mb(reset=True)
            seconds, pause = (min(pair) for pair in zip((seconds, pause), time_fit(plan), strict=True))
            grown = read_peak_mb() - before
        yield describe_fit(arguments), plan.cost, seconds, grown, pause, plan.method
        done += 1


def main() -> None:
    """Measure random fits and print those whose estimates are off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Large blocks are returned to the system when freed; malloc would retain more than some fits use.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 22)
    machine = core.measure_machine(core.Machine(1))
    # Compile the pipelines before measuring.
    list(measure_fits(20, options.seed + 1, 0.2, machine))
    slow, fast, memory, longest = 0.0, math.inf, -math.inf, 0.0
    for text, cost, seconds, megabytes, pause, method in measure_fits(
        options.fits, options.seed, options.seconds, machine
    ):
        ratio, above = seconds / cost.seconds, megabytes - 1.2 * cost.megabytes
        worth = max(seconds, cost.seconds) > MIN_CHECKED_S
        if worth:
            slow, fast = max(slow, ratio), min(fast, ratio)
        memory, longest = max(memory, above), max(longest, pause)
        if (worth and not 1 / 3 < ratio < 3) or above > MEMORY_SLACK_MB / 2 or pause > REMEASURED_PAUSE_S:
            measured = f"{ratio:6.2f} x {cost.seconds:7.3f} s  {megabytes:6.0f} of {cost.megabytes:6.0f} MB"
            print(f"{measured}  pause {pause:5.2f} s  {method}: {text}", flush=True)
    print(f"time: {fast:.2f} to {slow:.2f} times the prediction; longest pause {longest:.2f} s")
    print(f"memory: {memory:.0f} MB above 1.2 times the estimate (allowed: {MEMORY_SLACK_MB:.0f} MB)")


if __name__ == "__main__":
    main()
