"""Robustness cases 72, 73, 76 and 82: memory estimates, extreme values, bounded caches, and no Halide."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import core
from core import ENGINES, PaddingMode, Problem
from core.engines import slices
from core.engines.layers import implicit_gemm
from core.engines.run import run_engine
from tests.conftest import WITHOUT_HALIDE_PATH
from tests.engine_properties import (
    AVAILABLE_ENGINES,
    AVAILABLE_FFT_ENGINES,
    supports_boundary,
    supports_layers,
    supports_steps,
)
from tests.robustness.server_process import start_server_process
from tests.sample_files import JSON, NPY, NPZ, PNG, SAFETENSORS

ONE_THREAD_MACHINE = core.Machine(1)

MEMORY_SCRIPT = """
import ctypes, sys
import numpy as np
import core

def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1000

for engine, shape, weight_shape, options in {cases}:
    options = {{**options, "engines": (engine,), "method": core.ENGINES[engine].METHOD}}
    rng = np.random.default_rng(0)
    dtype = options["dtype"]
    images, weight = rng.normal(size=shape).astype(dtype), rng.normal(size=weight_shape).astype(dtype)
    if engine == "separable":
        weight = weight[:, :, :, :1] * weight[:, :, :1]
    cost = core.plan_conv2d(input=images, weight=weight, **options).cost
    core.conv2d(images, weight, **options)
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    core.conv2d(images, weight, **options)
    print(engine, peak() - before, cost.megabytes)
"""


def draw_layers(rng: np.random.Generator) -> list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    cases = []
    for number, engine in enumerate(AVAILABLE_ENGINES * 2):
        groups = int(rng.choice([1, 1, 2, 8]))
        depth, each = (int(rng.integers(1, 64 // groups)) for _ in range(2))
        stride, dilation = (tuple(int(step) for step in rng.choice([1, 2], 2)) for _ in range(2))
        if not supports_steps(engine):
            stride = dilation = (1, 1)
        if not supports_layers(engine):
            groups = depth = each = 1
        side = 1200 if depth == 1 else 200
        shape = int(rng.integers(1, 9)), groups * depth, *(int(size) for size in rng.integers(side // 3, side, 2))
        padding = tuple(int(border) for border in rng.choice([0, 1, 5], 4))
        mode: PaddingMode = "reflect" if rng.random() < 0.5 else "zeros"
        options = {
            "stride": stride,
            "dilation": dilation,
            "padding": padding,
            "padding_mode": mode if supports_boundary(engine, mode) else "zeros",
            "groups": groups,
            "dtype": ("float32", "float64")[number % 2],
        }
        kernel = tuple(int(size) for size in rng.integers(1, 8, 2))
        cases.append((engine, shape, (groups * each, depth, *kernel), options))
    # A request of 2.9 kB that once took 2 GB instead of an estimated 40 MB.
    cases.append(("torch_fft", (1, 64, 200, 200), (64, 64, 3, 3), {"dtype": "float32"}))
    return cases


@pytest.mark.robustness(72)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_every_engine_stays_within_its_memory_estimate(rng: np.random.Generator) -> None:
    cases = draw_layers(rng)
    script = MEMORY_SCRIPT.format(cases=cases)
    # Makes malloc return freed memory to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout
    lines = [line.split() for line in output.splitlines()]
    assert len(lines) == len(cases)
    for (engine, measured, estimated), case in zip(lines, cases, strict=True):
        assert float(measured) <= 1.2 * float(estimated) + 50, (engine, measured, estimated, case)


@pytest.mark.robustness(72)
def test_fft_layer_estimate_includes_its_spectra() -> None:
    images, weight = np.zeros((1, 64, 200, 200), np.float32), np.zeros((64, 64, 3, 3), np.float32)
    cost = core.plan_conv2d(input=images, weight=weight, method="fft", engines=("torch_fft",)).cost
    assert cost.engine == "torch_fft"
    assert cost.result_megabytes == pytest.approx(64 * 198 * 198 * 4 / 1e6)
    assert 60 < cost.megabytes < 400


def measure_cpu_seconds(call: Callable[[], object]) -> float:
    """Return the least CPU time of three runs, in seconds; other processes affect it little."""
    times = []
    for _ in range(3):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def make_hostile(kind: str, image: NDArray[Any], kernel: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    image, kernel = image.copy(), kernel.copy()
    largest = np.finfo(image.dtype).max
    match kind:
        case "one infinity":
            image[..., 5, 7] = np.inf
        case "many":
            for place, value in ((0, np.inf), (37, -np.inf), (90, np.nan)):
                image.reshape(-1)[place::1009] = value
        case "huge":
            image *= largest / 100 / np.abs(image).max()
        case "overflowing":
            image *= largest / np.abs(image).max()
            kernel *= 100
        case "subnormal":
            image *= np.finfo(image.dtype).tiny / 100
        case "subnormal kernel":
            kernel *= np.finfo(image.dtype).tiny / 100
        case "infinite kernel":
            kernel[..., 0, 0] = -np.inf
        case "all":
            kernel[..., 0, 0] = np.inf
            image[..., 2, 2] = np.inf
            image[np.abs(image) < 0.5] = 0
    return image, kernel


HOSTILE_KINDS = (
    "one infinity",
    "many",
    "huge",
    "overflowing",
    "subnormal",
    "subnormal kernel",
    "infinite kernel",
    "all",
)


def correlate_directly(image: NDArray[Any], kernel: NDArray[Any]) -> NDArray[Any]:
    """Return the correlation of (N, C, H, W) with (O, C, h, w), summed tap by tap in more than float64."""
    image, kernel = image.astype(np.longdouble), kernel.astype(np.longdouble)
    rows, columns = (size - taps + 1 for size, taps in zip(image.shape[2:], kernel.shape[2:], strict=True))
    sums = np.zeros((len(image), len(kernel), rows, columns), np.longdouble)
    with np.errstate(all="ignore"):
        for channel, a, b in np.ndindex(*kernel.shape[1:]):
            sums += image[:, None, channel, a : a + rows, b : b + columns] * kernel[None, :, channel, a, b, None, None]
    return sums


def classify_values(values: NDArray[Any]) -> NDArray[Any]:
    return np.select([np.isnan(values), values == np.inf, values == -np.inf], [3, 2, 1], 0)


@pytest.mark.robustness(73)
@pytest.mark.parametrize("engine", AVAILABLE_FFT_ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", HOSTILE_KINDS)
def test_outputs_are_finite_exactly_as_the_direct_sum(
    kind: str, dtype: core.Dtype, engine: str, rng: np.random.Generator
) -> None:
    channels, filters = (3, 4) if supports_layers(engine) else (1, 1)
    image = rng.normal(size=(2, channels, 90, 110)).astype(dtype)
    image[1] += 3
    kernel = rng.normal(size=(filters, channels, 7, 9)).astype(dtype)
    kernel[0, 0, 3, 4] = 0
    image, kernel = make_hostile(kind, image, kernel)
    output = np.asarray(
        core.conv2d(image, kernel, dtype=dtype, method="fft", engines=(engine,), machine=ONE_THREAD_MACHINE).array
    )
    exact = correlate_directly(image, kernel)
    finite_image, finite_kernel = (np.where(np.isfinite(values), values, 0) for values in (image, kernel))
    size = correlate_directly(np.abs(finite_image), np.abs(finite_kernel))
    with np.errstate(over="ignore"):
        expected = exact.astype(dtype)
    # For other elements, overflow depends on the order of the sum.
    largest = np.finfo(np.dtype(dtype)).max
    sure = (size < largest / 2) | ~np.isfinite(exact) | (np.abs(exact) / 2 > largest)
    np.testing.assert_array_equal(classify_values(output)[sure], classify_values(expected)[sure])
    finite = np.isfinite(output) & np.isfinite(expected)
    for of_output, of_exact, some, of_size in zip(output, exact, finite, size, strict=True):
        if some.any():
            numbers = np.finfo(np.dtype(dtype))
            allowed = (20 * numbers.eps) * np.abs(of_exact[some]).max() + 4 * np.sqrt(
                kernel[0].size
            ) * numbers.eps * of_size.max()
            error = np.abs(of_output[some].astype(np.longdouble) - of_exact[some]).max()
            assert error <= allowed + kernel[0].size * numbers.smallest_subnormal


@pytest.mark.robustness(73)
@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("engine", AVAILABLE_FFT_ENGINES)
@pytest.mark.parametrize("kind", HOSTILE_KINDS)
def test_hostile_values_take_a_few_times_longer(kind: str, engine: str, rng: np.random.Generator) -> None:
    image, kernel = (
        rng.normal(size=(1, 1, 700, 700)).astype(np.float32),
        rng.normal(size=(1, 1, 31, 31)).astype(np.float32),
    )

    def run(image: NDArray[Any], kernel: NDArray[Any]) -> None:
        core.conv2d(image, kernel, method="fft", engines=(engine,), machine=ONE_THREAD_MACHINE)

    changed = make_hostile(kind, image, kernel)
    run(image, kernel)
    run(*changed)
    ordinary = measure_cpu_seconds(lambda: run(image, kernel))
    # With direct sums, these values took 50 to 1350 times as long.
    assert measure_cpu_seconds(lambda: run(*changed)) < 12 * ordinary + 0.005


LONG_PROBLEMS = (
    Problem(2, 256, 130, 130, 512, 5, 5),
    Problem(1, 64, 500, 500, 64, 5, 5),
    Problem(1, 1, 5000, 5000, 1, 63, 63),
    Problem(1, 1, 6000, 6000, 1, 201, 201, rank=3),
    Problem(1, 1, 8000, 8000, 1, 101, 101),
)
"""For every engine, at least one of these problems takes much longer than one slice."""


def choose_long_problem(engine: str) -> Problem:
    """Return the problem in LONG_PROBLEMS that takes the engine least time, but more than five slices."""
    supported = [problem for problem in LONG_PROBLEMS if ENGINES[engine].unsupported_reason(problem) is None]
    seconds = {problem: ENGINES[engine].seconds(problem, ONE_THREAD_MACHINE) for problem in supported}
    long = [problem for problem in supported if seconds[problem] > 5 * slices.TARGET_SLICE_S]
    assert long, "add a problem to LONG_PROBLEMS"
    return min(long, key=seconds.__getitem__)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread: threads that wait actively for each other take CPU time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.robustness(73)
@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("engine", AVAILABLE_ENGINES)
def test_computation_stops_soon_after_its_check_raises(engine: str) -> None:
    problem = choose_long_problem(engine)
    whole = (problem.batch, problem.channels, problem.height, problem.width)
    images = np.zeros(whole, np.float32)
    weight = np.ones((problem.filters, problem.channels, problem.kernel_height, problem.kernel_width), np.float32)
    calls: list[float] = []

    class Ended(Exception):
        """Error that stands for a passed deadline."""

    def check() -> None:
        calls.append(time.process_time())
        if len(calls) == 3:
            raise Ended

    shape = problem.batch, problem.filters, *problem.output_size
    with pytest.raises(Ended):
        run_engine(problem, images, weight, None, shape, machine=ONE_THREAD_MACHINE, engines=(engine,), check=check)
    # The first slice may include a compilation; the second must be short.
    assert len(calls) == 3
    assert calls[2] - calls[1] < 1


@pytest.mark.robustness(73)
@pytest.mark.needs_halide
def test_deadline_stops_a_computation_from_another_thread() -> None:
    abandoned = threading.Event()

    class Ended(Exception):
        """Error that stands for a disconnected client."""

    def check() -> None:
        if abandoned.is_set():
            raise Ended

    threading.Timer(0.3, abandoned.set).start()
    image, kernel = np.ones((6000, 6000), np.float32), np.random.default_rng(0).normal(size=(63, 63))
    with pytest.raises(Ended):
        core.correlate(image, kernel, engines=("stencil",), check=check)


@pytest.mark.robustness(76)
@pytest.mark.needs_halide
def test_offset_tables_are_bounded_in_bytes() -> None:
    implicit_gemm.cached_offset_table.cache_clear()
    rng = np.random.default_rng(0)
    for channels in range(1000, 1010):
        images, weight = rng.normal(size=(1, channels, 5, 5)), rng.normal(size=(4, channels, 3, 3))
        core.conv2d(images, weight, engines=("implicit_gemm",))
    assert implicit_gemm.cached_offset_table.cache_info().currsize == 0
    assert (
        4 * implicit_gemm.MAX_CACHED_TABLE_TAPS * (implicit_gemm.cached_offset_table.cache_info().maxsize or 0) < 10e6
    )


MEDIA_TYPES = (JSON, NPY, NPZ, SAFETENSORS, PNG)


@pytest.mark.robustness(82)
def test_every_format_works_without_halide(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plane, kernel = rng.normal(size=(90, 70)).tolist(), rng.normal(size=(3, 3)).tolist()
    layer, weight = rng.normal(size=(1, 8, 60, 60)).tolist(), rng.normal(size=(3, 8, 3, 3)).tolist()
    with (
        start_server_process(tmp_path / "log", PYTHONPATH=str(WITHOUT_HALIDE_PATH)) as server_process,
        httpx.Client(base_url=server_process.address, timeout=60) as client,
    ):
        assert "halide" not in Path(f"/proc/{server_process.process.pid}/maps").read_text().lower()
        for path, body in (
            ("/correlate", {"input": plane, "kernel": kernel}),
            ("/correlate", {"input": plane, "kernel": "gaussian(2.0)", "method": "fft", "dtype": "float64"}),
            ("/conv2d", {"input": layer, "weight": weight, "padding": 1}),
            ("/conv2d", {"input": layer, "weight": weight, "stride": 2, "dtype": "float64"}),
        ):
            for media_type in MEDIA_TYPES:
                fields = {**body, "input": layer[0]} if path == "/conv2d" and media_type == PNG else body
                response = client.post(path, json=fields, headers={"Accept": media_type})
                assert response.status_code == 200, (path, media_type, response.text)
                assert response.headers["content-type"] == media_type
                if media_type == NPY:
                    assert np.isfinite(np.load(io.BytesIO(response.content))).all()
                if media_type == PNG:
                    assert Image.open(io.BytesIO(response.content)).size[0] >= 29
            for form in ("nested", "flat", "base64"):
                result = client.post(f"{path}?arrays={form}&explain=true", json=body).json()
                assert "needs Halide" in " ".join(result["explanation"]["unsupported"].values())
        assert client.get("/info").json()["engines"]
