"""The normal equations, by lags and by windows, against products of all windows."""

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
from core.borders import pad
from core.fit import gram, lags, windows
from core.fit import layout as layouts
from core.fit.parts import split
from core.fit.problem import Layer, Pairing, load_examples
from core.fit.steps import finish
from tests.core.fit.layers import Lesson, lessons
from tests.reference import Floats

MACHINE = core.Machine(threads=1)
CPU = torch.device("cpu")


def drawn(seed: int, *shape: int) -> torch.Tensor:
    # Not centred: sums that cancel would hide what is missing.
    return torch.from_numpy(np.random.default_rng(seed).normal(1, 1, shape))


def all_windows(images: torch.Tensor, size: tuple[int, int]) -> Floats:
    """(N oh ow, C h w)."""
    seen = np.lib.stride_tricks.sliding_window_view(images.numpy(), size, (2, 3))
    return seen.transpose(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * size[0] * size[1])


def assert_same(found: torch.Tensor | Floats, expected: Floats) -> None:
    """To 1e-12 of the largest sum."""
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@st.composite
def stacks(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, int]]:
    """Images and a kernel's size that lags can do."""
    size = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    sides = [draw(st.integers(3 * taps - 1, 40)) for taps in size]
    return drawn(draw(st.integers(0, 2**32)), draw(st.integers(1, 3)), draw(st.integers(1, 3)), *sides), size


CUTS: dict[str, dict[str, object]] = {
    "whole images": {},
    "many blocks": {"SIDES": (16,)},
    "one image, one column at a time": {"WORTH_A_CALL": 8, "TOGETHER_BYTES": 1},
}
cuts = st.sampled_from(list(CUTS))


@contextmanager
def cut(how: str) -> Iterator[None]:
    """The transforms and strips of small images cut up as those of large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CUTS[how].items():
            patch.setattr(lags, name, value)
        yield


@given(stack=stacks(), how=cuts)
def test_all_products_of_windows_come_out_of_lagged_sums(stack: tuple[torch.Tensor, tuple[int, int]], how: str) -> None:
    images, size = stack
    expected = all_windows(images, size)
    with cut(how):
        assert_same(finish(lags.gram(images, size)), expected.T @ expected)
        assert_same(lags.window_sums(images, size), expected.sum(0))


@given(stack=stacks(), filters=st.integers(1, 3), how=cuts)
def test_windows_times_targets_come_out_of_lagged_sums(
    stack: tuple[torch.Tensor, tuple[int, int]], filters: int, how: str
) -> None:
    images, size = stack
    planes = drawn(1, len(images), filters, images.shape[2] - size[0] + 1, images.shape[3] - size[1] + 1)
    by_filter = planes.numpy().transpose(0, 2, 3, 1).reshape(-1, filters)
    with cut(how):
        assert_same(finish(lags.moments(images, planes, size)), all_windows(images, size).T @ by_filter)


@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 40), st.integers(1, 40)),
    apart=st.tuples(st.integers(1, 8), st.integers(1, 15)),
    how=cuts,
)
def test_lagged_sums_are_those_of_the_definition(shape: tuple[int, ...], apart: tuple[int, int], how: str) -> None:
    count, one, other, rows, columns = shape
    first = drawn(0, count, one, rows, columns)
    second = drawn(1, count, other, rows + apart[0] - 1, columns + apart[1] - 1)
    expected = np.zeros((one, other, *apart))
    for y, x in np.ndindex(apart):
        seen = second[:, :, y : y + rows, x : x + columns].numpy()
        expected[:, :, y, x] = np.tensordot(first.numpy(), seen, ((0, 2, 3), (0, 2, 3)))
    with cut(how):
        assert_same(finish(lags.lag_sums(first, second, apart)), expected)


@pytest.mark.parametrize("size", [(5, 5), (1, 9), (7, 1), (1, 1)])
def test_a_picture_of_several_blocks_gives_the_same_products(size: tuple[int, int]) -> None:
    images = drawn(0, 1, 1, 300, 200)
    expected = all_windows(images, size)
    assert_same(finish(lags.gram(images, size)), expected.T @ expected)
    planes = drawn(1, 1, 2, 301 - size[0], 201 - size[1])
    assert_same(finish(lags.moments(images, planes, size)), expected.T @ planes.numpy().reshape(2, -1).T)


def test_a_value_that_one_tap_sees_leaves_the_sums_of_the_others_exact() -> None:
    images = drawn(0, 1, 1, 40, 40)
    images[0, 0, 0, 0] = 1e12
    windows = all_windows(images, (3, 3))
    np.testing.assert_allclose(finish(lags.gram(images, (3, 3))).numpy(), windows.T @ windows, rtol=1e-12)


def laid(lesson: Lesson) -> Layer:
    """core's own description of the layer."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return Layer(**{name: lesson.layer.options[name] for name in names})


def equations(lesson: Lesson, *, by_lags: bool) -> list[gram.NormalEquations]:
    """Those of every pair, by one way or the other."""
    layer = lesson.layer
    examples = load_examples([Pairing(*pair) for pair in lesson.pairs])
    layout = layouts.Layout(layer.kernel_shape, layer.groups, layer.bias, examples.filters_weighted_apart)
    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "by_lags", lambda *_, **__: by_lags)
        for example in examples.pairs:
            problem = laid(lesson).problem(example.images, layer.kernel_shape, device="cpu", kernel_name="kernel")
            (part,) = split(example, problem, lambda _: 0.0)
            assume(not by_lags or lags.obstacle(part.problem) is None)
            sums = gram.Sums.zeros(layout, MACHINE, CPU)
            finish(sums.add(part.load(CPU), part.problem))
            built.append(sums.equations)
    return built


def multiplied_out(lesson: Lesson, pair: int, filter_: int) -> tuple[Floats, Floats]:
    """A'WA and A'Wy of one filter."""
    layer = lesson.layer
    images, targets, weights = lesson.pairs[pair]
    matrix = layer.windows(images, filter_ // (layer.filters // layer.groups))
    if layer.bias:
        matrix = np.hstack([matrix, np.ones((len(matrix), 1))])
    weight = np.ones(len(matrix)) if weights is None else weights[:, filter_].ravel()
    return (matrix.T * weight) @ matrix, (matrix.T * weight) @ targets[:, filter_].ravel()


def assert_equations(lesson: Lesson, *, by_lags: bool) -> None:
    for pair, built in enumerate(equations(lesson, by_lags=by_lags)):
        blocks, _, columns = built.moments.shape
        assert blocks * columns == lesson.layer.filters
        for filter_ in range(lesson.layer.filters):
            block, column = divmod(filter_, columns)
            products, moments = multiplied_out(lesson, pair, filter_)
            assert_same(built.gram[block], products)
            np.testing.assert_allclose(
                built.moments[block, :, column], moments, rtol=1e-12, atol=1e-12 * (1 + np.abs(products).max())
            )


@given(lesson=lessons(plain=True, weighted=False, largest=30))
def test_the_equations_by_lags_are_those_of_all_windows(lesson: Lesson) -> None:
    assert_equations(lesson, by_lags=True)


@given(lesson=lessons(), chunk=st.sampled_from([1, 300, windows.CHUNK_BYTES]))
def test_the_equations_by_windows_are_the_same_however_few_at_a_time(lesson: Lesson, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "CHUNK_BYTES", chunk)
        assert_equations(lesson, by_lags=False)


@given(lesson=lessons(weighted=False), chunk=st.sampled_from([1, 500, windows.CHUNK_BYTES]))
def test_no_window_is_left_out_and_no_chunk_too_large(lesson: Lesson, chunk: int) -> None:
    layer = lesson.layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "CHUNK_BYTES", chunk)
        for images, targets, _ in lesson.pairs:
            problem = laid(lesson).problem(
                torch.from_numpy(images), layer.kernel_shape, device="cpu", kernel_name="kernel"
            )
            parts = list(windows.chunks(pad(torch.from_numpy(images), problem.padding, problem.boundary), problem))
            assert sum(part.windows.shape[1] for part in parts) * layer.filters == targets.size
            window = 8 * layer.channels * problem.kernel_height * problem.kernel_width
            assert all(8 * part.windows.numel() <= max(chunk, window) for part in parts)


def test_a_photograph_is_summed_by_lags_and_a_small_image_by_windows() -> None:
    def by_lags(side: int, kernel: int, **options: Any) -> bool:
        problem = core.Problem(1, 1, side, side, 1, kernel, kernel, dtype="float64", **options)
        return gram.by_lags(problem, MACHINE, weighted=False)

    assert by_lags(1024, 15)
    assert not by_lags(12, 3)
    assert not by_lags(1024, 15, stride=(2, 1))
    assert not by_lags(1024, 15, dilation=(1, 2))
    assert not by_lags(40, 15)
    assert not by_lags(4096, 300)
    problem = core.Problem(1, 1, 1024, 1024, 1, 15, 15, dtype="float64")
    assert not gram.by_lags(problem, MACHINE, weighted=True)


GROWTH = """
import re
from pathlib import Path
import numpy as np
from core import fit_kernel

def peak():
    # Not getrusage: its maximum is that of the process before exec, the tests' own.
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its own peak")
def test_ten_times_as_many_pairs_take_no_more_memory() -> None:
    # What is freed goes back to the system at once, whatever else lies beside it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    # In float64 the other 18 pairs would take 75 MB.
    assert int(ran.stdout) < 25
