"""Normal equations without rounding errors, compared with rational arithmetic and with QR factorizations."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core import fit_kernel
from core.fit.equations import autocorrelation, exact_equations, factor_accumulator
from core.fit.equations.exact_equations import ExactEquations, correlate_directly, split_into_slices
from core.fit.equations.factor_accumulator import are_equations_faster
from core.fit.interruption import finish
from core.fit.parameters import ParameterLayout
from core.fit.tiles import TileData
from core.machine import Machine
from core.problem import Problem
from tests.core.fit.layers import Layer
from tests.reference import Floats, correlate_valid_by_windows

to_fractions = np.vectorize(Fraction, otypes=[object])


def sum_exactly(matrix: Floats, values: Floats) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return gram, moments and squares as fractions."""
    windows, targets = to_fractions(matrix), to_fractions(values)
    return windows.T @ windows, windows.T @ targets, np.square(targets).sum(0)


def build_problem(layer: Layer, shape: tuple[int, int, int, int]) -> Problem:
    sizes = *shape, layer.filters, *layer.kernel_size
    return Problem(*sizes, layer.groups, layer.stride, layer.dilation, dtype="float64")


def force_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use exact equations for every tile without weights."""
    monkeypatch.setattr(factor_accumulator, "are_equations_faster", lambda *_, **__: True)


def build_layout(layer: Layer) -> ParameterLayout:
    return ParameterLayout(layer.kernel_shape, 1, layer.bias)


@pytest.mark.parametrize(("channels", "filters", "bias"), [(1, 1, False), (2, 3, False), (1, 1, True), (2, 5, True)])
@pytest.mark.parametrize("most_values", [exact_equations.MAX_SPLIT_VALUES, 150])
def test_sums_are_exact(
    channels: int, filters: int, bias: bool, most_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_equations, "MAX_SPLIT_VALUES", most_values)
    rng = np.random.default_rng(channels)
    layer = Layer((3, 2), channels=channels, filters=filters, bias=bias)
    images = 1e6 + rng.normal(size=(2, channels, 17, 9))
    targets = rng.normal(size=(2, filters, 15, 8)) * np.exp2(rng.integers(-9, 9, (2, filters, 15, 8)))
    layout = build_layout(layer)
    equations = ExactEquations(layout)
    problem = build_problem(layer, images.shape)
    finish(equations.add(TileData(torch.from_numpy(images), torch.from_numpy(targets), None), problem))
    matrix = layer.windows(images)
    if bias:
        matrix = np.hstack([matrix, np.ones((len(matrix), 1))])
    expected = sum_exactly(matrix, np.moveaxis(targets, 1, -1).reshape(-1, filters))
    accumulated = equations.blocks[0]
    found = accumulated.sums.scaled(*accumulated.exponents)
    for name, number, exact in zip(found._fields, found, expected, strict=True):
        difference = to_fractions(number.high) + to_fractions(number.low) - exact
        # Bits of the targets below 2^-64 of the largest one are left out.
        bits = 100 if name == "gram" else 62
        assert (np.abs(difference) <= Fraction(2) ** -bits * np.abs(exact).max()).all()
    assert equations.rows == 2 * 15 * 8


@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(8, 22))
def test_slices_add_up(seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(1, 2, 3, 4)) * np.exp2(rng.integers(-8, 9, (1, 2, 3, 4)))
    values[0, 0, 0, :2] = 0, 2.0 ** rng.integers(-100, 9)
    values /= np.abs(values).max()
    slices = split_into_slices(torch.from_numpy(values), bits)
    assert slices.integers.abs().max() <= 2.0**bits
    assert torch.equal(slices.integers, slices.integers.round())
    parts = np.moveaxis(slices.integers.numpy(), 2, -1)
    total = to_fractions(parts) @ [Fraction(2) ** exponent for exponent in slices.exponents]
    largest = Fraction(float(np.abs(values).max()))
    assert np.abs(total - to_fractions(values)).max() <= largest / 2**exact_equations.VALUE_BITS


def test_zeros_have_one_slice() -> None:
    slices = split_into_slices(torch.zeros((1, 1, 2, 2), dtype=torch.float64), 16)
    assert slices.integers.shape == (1, 1, 1, 2, 2)
    assert not slices.integers.any()


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    lags=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    planes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    chunk_bytes=st.sampled_from([1, 500, 4_000_000]),
)
def test_sums_at_lags_match_transforms(
    seed: int, count: int, size: tuple[int, int], lags: tuple[int, int], planes: tuple[int, int], chunk_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    first = torch.from_numpy(rng.integers(-99, 99, (count, planes[0], *size)).astype(float))
    wide = size[0] + lags[0] - 1, size[1] + lags[1] - 1
    second = torch.from_numpy(rng.integers(-99, 99, (count, planes[1], *wide)).astype(float))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_equations, "CHUNK_BYTES", chunk_bytes)
        found = finish(correlate_directly(first, second, lags))
    expected = finish(autocorrelation.correlate_at_lags(first, second, lags))
    assert torch.equal(found, expected.round())


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"solver": "sgd", "learning_rate": "auto", "seed": 0}])
@pytest.mark.parametrize("scene", ["offset", "blur", "dependent", "bands"])
def test_factor_gives_the_same_fit_as_qr(scene: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    images = {
        "offset": 1e7 + 0.1 * rng.normal(size=(2, 1, 40, 40)),
        "blur": scipy.ndimage.gaussian_filter(rng.normal(size=(2, 1, 60, 60)), (0, 0, 8, 8)),
        # Rows repeat: a third of the taps is not determined.
        "dependent": np.repeat(1e6 + rng.normal(size=(2, 1, 1, 50)), 50, 2),
        "bands": np.concatenate([rng.normal(size=(2, 1, 40, 40)), 1e6 + rng.normal(size=(2, 1, 40, 40))], 1),
    }[scene]
    layer = Layer((3, 3), channels=images.shape[1], filters=2, bias=options.get("bias", False))
    kernel, bias = rng.normal(size=layer.kernel_shape), rng.normal(size=2) if layer.bias else None
    exact = layer.output(images, kernel, bias)
    targets = exact + 1e-3 * rng.normal(size=exact.shape)

    def fit() -> Any:
        return fit_kernel(images, targets, kernel_size=(3, 3), **{"solver": "exact", "steps": 5, **options})

    with monkeypatch.context() as patch:
        patch.setattr(exact_equations, "unsupported_reason", lambda *_: "not tested here")
        by_windows = fit()
    used = []

    def choose_equations(*_: Any, **__: Any) -> bool:
        used.append(True)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(factor_accumulator, "are_equations_faster", choose_equations)
        by_equations = fit()
    assert used
    assert by_equations.rank == by_windows.rank
    # The automatic rate amplifies rounding errors.
    tolerance = 1e-6 if by_windows.solver == "exact" else 1e-2
    assert by_equations.final_loss == pytest.approx(by_windows.final_loss, rel=tolerance, abs=1e-18)
    assert by_equations.best_possible_loss == pytest.approx(by_windows.best_possible_loss, rel=1e-6, abs=1e-18)
    if by_windows.rank == by_windows.unknowns:
        torch.testing.assert_close(by_equations.kernel, by_windows.kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e200, 1e160, 1e-160, 1e-200])
def test_bias_of_extreme_images_is_found(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    force_equations(monkeypatch)
    rng = np.random.default_rng(8)
    image, kernel = rng.normal(size=(60, 60)), rng.normal(size=(3, 3))
    target = correlate_valid_by_windows(image, kernel) + 0.7
    fit = fit_kernel(image * scale, target, bias=True, solver="exact")
    assert fit.rank == 10
    assert fit.bias is not None
    assert fit.bias.item() == pytest.approx(0.7, rel=1e-9)
    np.testing.assert_allclose(fit.kernel.numpy() * scale, kernel, rtol=1e-9)


@pytest.mark.parametrize("small", [0.0, 5e-324, 1e-310, 1e-303, 1e-200])
@pytest.mark.parametrize("which", ["image", "rows", "pair"])
def test_parts_near_zero_do_not_spoil_the_rest(small: float, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force_equations(monkeypatch)
    monkeypatch.setattr(exact_equations, "MAX_SPLIT_VALUES", 2000)
    rng = np.random.default_rng(9)
    images = [1e6 + rng.normal(size=(60, 60)) for _ in range(2)]
    kernel = rng.normal(size=(3, 3))
    if which == "rows":
        images[1][30:] *= small
    elif which == "image":
        images[1] *= small
    targets = [correlate_valid_by_windows(image, kernel) for image in images]
    if which == "pair":
        images[1], targets[1] = images[1] * small, targets[1] * small
    fit = fit_kernel(pairs=list(zip(images, targets, strict=True)), solver="exact")
    assert fit.rank == 9
    np.testing.assert_allclose(fit.kernel.numpy(), kernel, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-9, 1e-15, 1e-20, 1e-30, 1e-100])
def test_channels_and_filters_of_unlike_scale_are_independent(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    force_equations(monkeypatch)
    rng = np.random.default_rng(10)
    images = scipy.ndimage.gaussian_filter(rng.normal(size=(1, 2, 80, 80)), (0, 0, 8, 8))
    layer = Layer((3, 3), channels=2, filters=2)
    kernel = rng.normal(size=layer.kernel_shape)
    targets = layer.output(images, kernel)
    factors = np.array([1.0, scale])
    fit = fit_kernel(
        images * factors[:, None, None], targets * factors[:, None, None], kernel_size=(3, 3), solver="exact"
    )
    assert fit.rank == 36
    scaled = fit.kernel.numpy() * factors[:, None, None] / factors[:, None, None, None]
    np.testing.assert_allclose(scaled, kernel, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [1e9, 1e15, 1e20, 1e30])
def test_tap_that_sees_much_larger_values_leaves_digits_to_the_others(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_equations(monkeypatch)
    rng = np.random.default_rng(11)
    image = rng.normal(size=(40, 40)) + 1e6
    kernel = rng.normal(size=(3, 3))
    kernel[:, 2] /= scale
    # Only the last column of the kernel reads the last column of the image.
    image[:, -1] *= scale
    target = correlate_valid_by_windows(image, kernel)
    fit = fit_kernel(image, target, solver="exact")
    matrix = Layer((3, 3)).windows(image[None, None])
    norms = np.linalg.norm(matrix, axis=0)
    expected = np.linalg.lstsq(matrix / norms, target.ravel())[0] / norms
    assert fit.rank == 9
    error, allowed = (np.abs((x.ravel() - kernel.ravel()) * norms).max() for x in (fit.kernel.numpy(), expected))
    assert error <= 10 * allowed + 1e-12 * np.abs(kernel.ravel() * norms).max()


def test_faster_method_is_chosen_for_each_tile() -> None:
    machine, layout = Machine(1), ParameterLayout((1, 1, 15, 15), 1, bias=False)
    large, small = (build_problem(Layer((15, 15)), (1, 1, side, side)) for side in (1024, 32))
    assert are_equations_faster(large, layout, machine, begun=False)
    assert not are_equations_faster(small, layout, machine, begun=False)


@pytest.mark.parametrize(
    ("layout", "problem", "reason"),
    [
        (
            ParameterLayout((1, 1, 17, 17), 1, bias=False),
            build_problem(Layer((17, 17)), (1, 1, 99, 99)),
            "at most 256 unknowns",
        ),
        (
            ParameterLayout((1, 1, 64, 2), 1, bias=False),
            build_problem(Layer((64, 2)), (1, 1, 300, 300)),
            "at most 32 rows and columns",
        ),
        (
            ParameterLayout((1, 1, 32, 2), 1, bias=False),
            build_problem(Layer((32, 2)), (1, 1, 300, 9000)),
            "split into slices at once",
        ),
        (
            ParameterLayout((1, 1, 3, 3), 1, bias=False),
            build_problem(Layer((3, 3), stride=(2, 2)), (1, 1, 99, 99)),
            "without stride",
        ),
    ],
)
def test_other_problems_have_a_reason(layout: ParameterLayout, problem: Any, reason: str) -> None:
    found = exact_equations.unsupported_reason(problem, layout)
    assert found is not None
    assert reason in found


def test_kernel_is_more_accurate_than_by_lstsq() -> None:
    # The matrix of the windows has a condition number of about 1e10.
    image = scipy.ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(150, 150)), 2.5)
    kernel = np.random.default_rng(4).integers(-4, 5, (5, 5)).astype(float)
    target = correlate_valid_by_windows(image, kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factor_accumulator, "are_equations_faster", lambda *_, **__: True)
        fit = fit_kernel(image, target, solver="exact")
    matrix = Layer((5, 5)).windows(image[None, None])
    expected = np.linalg.lstsq(matrix, target.ravel())[0]
    assert fit.rank == 25
    error = np.abs(fit.kernel.numpy() - kernel).max()
    assert error <= 10 * np.abs(expected.reshape(5, 5) - kernel).max()
