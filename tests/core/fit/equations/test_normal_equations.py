"""The normal equations, by autocorrelation and by windows, compared with products of all windows."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import core
from core.fit import parameters as layouts
from core.fit.equations import autocorrelation, im2col, normal_equations
from core.fit.examples import Layer, RawExample, load_examples
from core.fit.interruption import finish
from core.fit.tiles import split_example
from core.padding import pad
from tests.core.fit.layers import FitCase, fit_cases
from tests.reference import Floats

MACHINE = core.Machine(threads=1)
CPU = torch.device("cpu")


def draw_tensor(seed: int, *shape: int) -> torch.Tensor:
    # Use a mean of 1: sums that cancel would hide missing terms.
    return torch.from_numpy(np.random.default_rng(seed).normal(1, 1, shape))


def build_windows(images: torch.Tensor, size: tuple[int, int]) -> Floats:
    """Return all windows as rows, (N oh ow, C h w)."""
    seen = np.lib.stride_tricks.sliding_window_view(images.numpy(), size, (2, 3))
    return seen.transpose(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * size[0] * size[1])


def assert_nearly_equal(found: torch.Tensor | Floats, expected: Floats) -> None:
    """Compare to within 1e-12 of the largest sum."""
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@st.composite
def image_stacks(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, int]]:
    """Draw images and a kernel size that the autocorrelation method supports."""
    size = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    sides = [draw(st.integers(3 * taps - 1, 40)) for taps in size]
    return draw_tensor(draw(st.integers(0, 2**32)), draw(st.integers(1, 3)), draw(st.integers(1, 3)), *sides), size


BLOCK_SIZES: dict[str, dict[str, object]] = {
    "whole images": {},
    "many blocks": {"TRANSFORM_SIDES": (16,)},
    "one image, one column at a time": {"MIN_TRANSFORM_SIDE": 8, "MAX_CHUNK_SPECTRA_BYTES": 1},
}
block_size_names = st.sampled_from(list(BLOCK_SIZES))


@contextmanager
def use_block_sizes(how: str) -> Iterator[None]:
    """Cut small images into blocks and strips, as large ones are by default."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in BLOCK_SIZES[how].items():
            patch.setattr(autocorrelation, name, value)
        yield


@given(stack=image_stacks(), how=block_size_names)
def test_window_products_follow_from_autocorrelation(stack: tuple[torch.Tensor, tuple[int, int]], how: str) -> None:
    images, size = stack
    expected = build_windows(images, size)
    with use_block_sizes(how):
        assert_nearly_equal(finish(autocorrelation.compute_gram(images, size)), expected.T @ expected)
        assert_nearly_equal(autocorrelation.sum_windows(images, size), expected.sum(0))


@given(stack=image_stacks(), filters=st.integers(1, 3), how=block_size_names)
def test_window_target_products_follow_from_autocorrelation(
    stack: tuple[torch.Tensor, tuple[int, int]], filters: int, how: str
) -> None:
    images, size = stack
    planes = draw_tensor(1, len(images), filters, images.shape[2] - size[0] + 1, images.shape[3] - size[1] + 1)
    by_filter = planes.numpy().transpose(0, 2, 3, 1).reshape(-1, filters)
    with use_block_sizes(how):
        assert_nearly_equal(
            finish(autocorrelation.compute_moments(images, planes, size)), build_windows(images, size).T @ by_filter
        )


@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 40), st.integers(1, 40)),
    apart=st.tuples(st.integers(1, 8), st.integers(1, 15)),
    how=block_size_names,
)
def test_autocorrelation_matches_its_definition(shape: tuple[int, ...], apart: tuple[int, int], how: str) -> None:
    count, one, other, rows, columns = shape
    first = draw_tensor(0, count, one, rows, columns)
    second = draw_tensor(1, count, other, rows + apart[0] - 1, columns + apart[1] - 1)
    expected = np.zeros((one, other, *apart))
    for y, x in np.ndindex(apart):
        seen = second[:, :, y : y + rows, x : x + columns].numpy()
        expected[:, :, y, x] = np.tensordot(first.numpy(), seen, ((0, 2, 3), (0, 2, 3)))
    with use_block_sizes(how):
        assert_nearly_equal(finish(autocorrelation.correlate_at_lags(first, second, apart)), expected)


@pytest.mark.parametrize("size", [(5, 5), (1, 9), (7, 1), (1, 1)])
def test_image_of_several_blocks_gives_the_same_products(size: tuple[int, int]) -> None:
    images = draw_tensor(0, 1, 1, 300, 200)
    expected = build_windows(images, size)
    assert_nearly_equal(finish(autocorrelation.compute_gram(images, size)), expected.T @ expected)
    planes = draw_tensor(1, 1, 2, 301 - size[0], 201 - size[1])
    assert_nearly_equal(
        finish(autocorrelation.compute_moments(images, planes, size)), expected.T @ planes.numpy().reshape(2, -1).T
    )


def test_value_seen_by_one_tap_keeps_other_sums_exact() -> None:
    images = draw_tensor(0, 1, 1, 40, 40)
    images[0, 0, 0, 0] = 1e12
    windows = build_windows(images, (3, 3))
    np.testing.assert_allclose(
        finish(autocorrelation.compute_gram(images, (3, 3))).numpy(), windows.T @ windows, rtol=1e-12
    )


def describe_layer(fit_case: FitCase) -> Layer:
    """Return the layer as core's `Layer`."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return Layer(**{name: fit_case.layer.options[name] for name in names})


def compute_equations(fit_case: FitCase, *, by_lags: bool) -> list[normal_equations.NormalEquations]:
    """Return the normal equations of every pair, by autocorrelation or by windows."""
    layer = fit_case.layer
    examples = load_examples([RawExample(*pair) for pair in fit_case.pairs])
    layout = layouts.ParameterLayout(layer.kernel_shape, layer.groups, layer.bias, examples.has_weights_per_filter)
    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normal_equations, "is_autocorrelation_faster", lambda *_, **__: by_lags)
        for example in examples.pairs:
            problem = describe_layer(fit_case).problem(
                example.images, layer.kernel_shape, device="cpu", kernel_name="kernel"
            )
            (part,) = split_example(example, problem, lambda _: 0.0)
            assume(not by_lags or autocorrelation.unsupported_reason(part.problem) is None)
            sums = normal_equations.EquationsAccumulator.zeros(layout, MACHINE, CPU)
            finish(sums.add(part.load(CPU), part.problem))
            built.append(sums.equations)
    return built


def multiply_explicitly(fit_case: FitCase, pair: int, filter_: int) -> tuple[Floats, Floats]:
    """Return A'WA and A'Wy of one filter."""
    layer = fit_case.layer
    images, targets, weights = fit_case.pairs[pair]
    matrix = layer.windows(images, filter_ // (layer.filters // layer.groups))
    if layer.bias:
        matrix = np.hstack([matrix, np.ones((len(matrix), 1))])
    weight = np.ones(len(matrix)) if weights is None else weights[:, filter_].ravel()
    return (matrix.T * weight) @ matrix, (matrix.T * weight) @ targets[:, filter_].ravel()


def assert_equations(fit_case: FitCase, *, by_lags: bool) -> None:
    for pair, built in enumerate(compute_equations(fit_case, by_lags=by_lags)):
        blocks, _, columns = built.moments.shape
        assert blocks * columns == fit_case.layer.filters
        for filter_ in range(fit_case.layer.filters):
            block, column = divmod(filter_, columns)
            products, moments = multiply_explicitly(fit_case, pair, filter_)
            assert_nearly_equal(built.gram[block], products)
            np.testing.assert_allclose(
                built.moments[block, :, column], moments, rtol=1e-12, atol=1e-12 * (1 + np.abs(products).max())
            )


@given(fit_case=fit_cases(plain=True, weighted=False, largest=30))
def test_equations_by_autocorrelation_match_all_windows(fit_case: FitCase) -> None:
    assert_equations(fit_case, by_lags=True)


@given(fit_case=fit_cases(), chunk=st.sampled_from([1, 300, im2col.MAX_CHUNK_BYTES]))
def test_equations_by_windows_do_not_depend_on_chunk_size(fit_case: FitCase, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(im2col, "MAX_CHUNK_BYTES", chunk)
        assert_equations(fit_case, by_lags=False)


@given(fit_case=fit_cases(weighted=False), chunk=st.sampled_from([1, 500, im2col.MAX_CHUNK_BYTES]))
def test_chunks_cover_all_windows_within_the_limit(fit_case: FitCase, chunk: int) -> None:
    layer = fit_case.layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(im2col, "MAX_CHUNK_BYTES", chunk)
        for images, targets, _ in fit_case.pairs:
            problem = describe_layer(fit_case).problem(
                torch.from_numpy(images), layer.kernel_shape, device="cpu", kernel_name="kernel"
            )
            parts = list(
                im2col.iterate_chunks(pad(torch.from_numpy(images), problem.padding, problem.boundary), problem)
            )
            assert sum(part.windows.shape[1] for part in parts) * layer.filters == targets.size
            window = 8 * layer.channels * problem.kernel_height * problem.kernel_width
            assert all(8 * part.windows.numel() <= max(chunk, window) for part in parts)


def test_equations_are_built_by_the_cheaper_method() -> None:
    def by_lags(side: int, kernel: int, **options: Any) -> bool:
        problem = core.Problem(1, 1, side, side, 1, kernel, kernel, dtype="float64", **options)
        return normal_equations.is_autocorrelation_faster(problem, MACHINE, weighted=False)

    assert by_lags(1024, 15)
    assert not by_lags(12, 3)
    assert not by_lags(1024, 15, stride=(2, 1))
    assert not by_lags(1024, 15, dilation=(1, 2))
    assert not by_lags(40, 15)
    assert not by_lags(4096, 300)
    problem = core.Problem(1, 1, 1024, 1024, 1, 15, 15, dtype="float64")
    assert not normal_equations.is_autocorrelation_faster(problem, MACHINE, weighted=True)


MEMORY_SCRIPT = """
import re
from pathlib import Path
import numpy as np
from core import fit_kernel

def peak():
    # Not getrusage: its maximum includes the process before exec, that of the tests.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

rng = np.random.default_rng(0)
images = rng.random((20, 512, 512), np.float32)
targets = rng.random((20, 510, 510), np.float32)
pairs = [(image, target) for image, target in zip(images, targets)]
weights = np.ones((510, 510), np.float32)
fit_kernel(pairs=pairs[:2], solver="exact")
fit_kernel(pairs=[(*pair, weights) for pair in pairs[:2]], solver="exact")
before = peak()
fit_kernel(pairs=pairs, solver="exact")
fit_kernel(pairs=[(*pair, weights) for pair in pairs], solver="exact")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_ten_times_as_many_pairs_take_no_more_memory() -> None:
    # Freed blocks return to the system at once, independent of fragmentation.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    # In float64 the other 18 pairs would need 75 MB.
    assert int(ran.stdout) < 25
