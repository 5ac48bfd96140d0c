"""Check the accuracy of the engines on a GPU, and the choice between them.

    make gpu                                         without a GPU, it reports that and exits
    .venv/bin/python benchmarks/gpu.py --device cpu  the same checks on the CPU, to test this script

First, every engine that runs on the device is compared with the float64 result of the CPU, which the tests compare with
naive loops, for all modes, boundaries, strides, dilations, groups and dtypes. The allowed error is twice that of plain
float32 sums plus a millionth of the largest output; TF32, which rounds to ten bits, would exceed it. Then each engine
is timed, and the chosen engine is compared with the fastest.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, get_args

import numpy as np
import torch

import core

PLANE_AND_KERNEL_SIZES = (((33, 47), (3, 3)), ((64, 50), (8, 5)), ((40, 90), (31, 33)), ((300, 280), (15, 15)))
LAYER_CHANNELS = ((1, 1, 1), (3, 8, 1), (8, 8, 8), (16, 32, 2))
"""Channels, filters and groups of each layer."""

TIMED_PLANES = (256, 1024, 4096)
TIMED_KERNELS = (3, 15, 63, 127)
TIMING_S = 0.3
MAX_GOOD_CHOICE_RATIO = 1.15


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """A call of core without the engine and the device."""

    name: str
    verb: Any
    arrays: tuple[Any, ...]
    options: dict[str, Any]

    def compute(self, device: str, dtype: core.Dtype, engines: tuple[str, ...]) -> Any:
        """Return the output as a float64 numpy array."""
        result = self.verb(*self.arrays, **self.options, device=device, dtype=dtype, engines=engines)
        return result.output.cpu().double().numpy()


def build_checks() -> Iterator[GpuCheck]:
    """Yield all combinations of shapes and options."""
    rng = np.random.default_rng(0)
    for (size, kernel_size), mode in itertools.product(PLANE_AND_KERNEL_SIZES, get_args(core.Mode)):
        image, kernel = rng.normal(size=size), rng.normal(size=kernel_size)
        for boundary in get_args(core.Boundary) if mode != "valid" else ("zeros",):
            options = {"mode": mode, "boundary": boundary, "fill_value": 1.5 if boundary == "constant" else 0.0}
            for operation in get_args(core.Operation):
                name = f"correlate {size} {kernel_size} {mode} {boundary} {operation}"
                yield GpuCheck(name, core.correlate, (image, kernel), {**options, "operation": operation})
    steps = ((1, 1), (2, 2), (2, 3))
    for (channels, filters, groups), stride, dilation, padding_mode in itertools.product(
        LAYER_CHANNELS, steps, steps, get_args(core.PaddingMode)
    ):
        arrays = (
            rng.normal(size=(2, channels, 40, 37)),
            rng.normal(size=(filters, channels // groups, 5, 4)),
            rng.normal(size=filters),
        )
        options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": (2, 3)}
        name = f"conv2d {channels} -> {filters} in {groups}, stride {stride}, dilation {dilation}, {padding_mode}"
        yield GpuCheck(name, core.conv2d, arrays, {**options, "padding_mode": padding_mode})


def run_checks(device: str) -> tuple[int, list[str]]:
    """Return the number of outputs compared and a description of each that exceeds the allowed error."""
    compared, failures = 0, []
    for check in build_checks():
        exact = check.compute("cpu", "float64", ("torch",))
        plain = check.compute("cpu", "float32", ("torch",))
        largest = np.abs(exact).max()
        allowed: dict[core.Dtype, float] = {
            "float32": 2 * np.abs(plain - exact).max() + 1e-6 * largest,
            "float64": 1e-13 * largest * math.sqrt(check.arrays[1].size),
        }
        for dtype, engine in itertools.product(allowed, core.ENGINES):
            try:
                output = check.compute(device, dtype, (engine,))
            except (core.MethodUnavailable, core.InvalidOption):
                continue  # the engine does not support the problem, or the device the dtype
            error = np.abs(output - exact).max()
            compared += 1
            if not error <= allowed[dtype]:
                failures.append(f"{check.name}, {dtype}, {engine}: error {error:.3g}, allowed {allowed[dtype]:.3g}")
    return compared, failures


def measure_times(device: str) -> Iterator[tuple[str, dict[str, float], str]]:
    """Yield a problem, the shortest time of each engine in seconds, and the chosen engine, for planes and a layer."""
    generator = torch.Generator(device).manual_seed(0)
    for plane, kernel in itertools.product(TIMED_PLANES, TIMED_KERNELS):
        arrays = [torch.randn(side, side, device=device, generator=generator) for side in (plane, kernel)]
        if kernel < plane:
            yield f"{plane} x {plane}, {kernel} x {kernel}", *time_best(core.correlate, arrays, device)
    images = torch.randn(8, 64, 112, 112, device=device, generator=generator)
    weight = torch.randn(64, 64, 3, 3, device=device, generator=generator)
    yield "8 x 64 -> 64, 112 x 112, 3 x 3", *time_best(core.conv2d, [images, weight], device)


def time_best(verb: Any, arrays: list[torch.Tensor], device: str) -> tuple[dict[str, float], str]:
    """Return the shortest time of each engine in seconds, with synchronization, and the chosen engine."""
    best: dict[str, float] = {}
    for engine in core.ENGINES:
        end = math.inf
        try:
            while perf_counter() < end:
                start = perf_counter()
                result = verb(*arrays, device=device, engines=(engine,))
                if result.output.is_cuda:
                    torch.cuda.synchronize()
                elapsed = perf_counter() - start
                # The first call loads and compiles, and is not counted.
                if math.isinf(end):
                    end = perf_counter() + TIMING_S
                else:
                    best[engine] = min(best.get(engine, math.inf), elapsed)
        except core.MethodUnavailable:
            continue
    return best, verb(*arrays, device=device).engine


def main() -> int:
    """Check, time and report; the exit code is 1 if an error is larger than allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first GPU)")
    requested = parser.parse_args().device or core.available_devices()[0]
    if requested == "cpu" and "--device" not in " ".join(sys.argv):
        print("skipped: this machine has no GPU; --device cpu runs the script on the CPU")
        return 0
    device = str(core.resolve_device(requested))
    model = next(entry["model"] for entry in core.describe_devices() if entry["device"] == device)
    print(f"{device}, {model or 'unknown model'}, torch {torch.__version__}\n")
    compared, failures = run_checks(device)
    print(f"{compared} outputs compared, {len(failures)} with a larger error than allowed", *failures, sep="\n")
    print("\n| problem | chosen | times in ms |\n| --- | --- | --- |")
    good = total = 0
    for name, best, chosen in measure_times(device):
        listed = ", ".join(f"{engine} {seconds * 1e3:.3g}" for engine, seconds in best.items())
        print(f"| {name} | {chosen} | {listed} |", flush=True)
        total += 1
        good += best[chosen] <= MAX_GOOD_CHOICE_RATIO * min(best.values())
    print(f"\nThe choice is within {MAX_GOOD_CHOICE_RATIO} of the fastest engine in {good} of {total} problems.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
