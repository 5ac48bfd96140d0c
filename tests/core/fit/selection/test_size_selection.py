"""kernel_size "auto": every candidate is compared with lstsq on all windows, and the true size is found."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import core
from core import FitResult, Progress, Reading, fit_kernel, plan_fit_kernel, run_to_end
from core.fit import diagnostics
from core.fit.selection import size_range
from tests.core.fit.layers import Layer
from tests.reference import Floats
from tests.sample_files import CAMERA

Pairs = list[tuple[Floats, Floats, Floats | None]]


@pytest.fixture(scope="module")
def photograph() -> Floats:
    return np.asarray(Image.open(CAMERA).convert("L")).astype(np.float64)


def list_candidate_sizes(side: int) -> list[int]:
    return list(range(2 - side % 2, side + 1, 2))


def select_centred_taps(layer: Layer, size: tuple[int, int]) -> Floats:
    """Return a flat mask of a filter's taps (C/groups, h, w) that belong to a centred smaller kernel."""
    (h, w), depth = layer.kernel_size, layer.channels // layer.groups
    mask = np.zeros((depth, h, w), bool)
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    mask[:, top : top + size[0], left : left + size[1]] = True
    return mask.ravel()


def compute_residual_squares(layer: Layer, pairs: Pairs, size: tuple[int, int]) -> float:
    """Return the smallest sum of squares for a kernel size, by lstsq on the windows of the largest size."""
    total = 0.0
    for filter_ in range(layer.filters):
        group = filter_ // (layer.filters // layer.groups)
        rows = np.concatenate([layer.windows(x, group) for x, _, _ in pairs])[:, select_centred_taps(layer, size)]
        if layer.bias:
            rows = np.hstack([rows, np.ones((len(rows), 1))])
        target = np.concatenate([y[:, filter_].ravel() for _, y, _ in pairs])
        root = np.sqrt(np.concatenate([(np.ones_like(y) if w is None else w)[:, filter_].ravel() for _, y, w in pairs]))
        solution = np.linalg.lstsq(rows * root[:, None], target * root)[0]
        total += float(np.square((rows @ solution - target) * root).sum())
    return total


def compute_expected_table(layer: Layer, pairs: Pairs) -> list[tuple[tuple[int, int], float, float]]:
    """Return (size, sum of squares, BIC) of all candidates with at least two values per unknown."""
    counts = np.sum([((np.ones_like(y) if w is None else w) > 0).sum((0, 2, 3)) for _, y, w in pairs], axis=0)
    table = []
    for rows in list_candidate_sizes(layer.kernel_size[0]):
        for columns in list_candidate_sizes(layer.kernel_size[1]):
            unknowns = layer.channels // layer.groups * rows * columns + layer.bias
            if 2 * unknowns <= counts[counts > 0].min():
                squares, values = compute_residual_squares(layer, pairs, (rows, columns)), float(counts.sum())
                bic = values * math.log(squares / values) + layer.filters * unknowns * math.log(values)
                table.append(((rows, columns), squares, bic))
    return table


def crop_images(layer: Layer, images: Floats, fit: FitResult) -> Floats:
    """Return padded images, cropped so that the chosen size gives the same target without padding."""
    top, bottom, left, right = layer.padding
    modes = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    widths = ((0, 0), (0, 0), (top, bottom), (left, right))
    padded: Floats = np.pad(images, widths, modes[layer.padding_mode])  # type: ignore[call-overload]
    assert fit.kernel_offset is not None
    down, across = fit.kernel_offset
    return padded[:, :, down : padded.shape[2] - down, across : padded.shape[3] - across]


def assert_selection(fit: FitResult, layer: Layer, pairs: Pairs, loss: str = "sum") -> None:
    """Compare a fit of automatic size with lstsq, and with a fit of the chosen size to cropped images."""
    assert fit.kernel_sizes is not None
    assert fit.kernel_sizes_bic is not None
    assert fit.kernel_sizes_loss is not None
    table = compute_expected_table(layer, pairs)
    assert [tuple(size) for size in fit.kernel_sizes.tolist()] == [size for size, _, _ in table]
    weight = 1.0 if loss == "sum" else sum(float((np.ones_like(y) if w is None else w).sum()) for _, y, w in pairs)
    squares = [squares / weight for _, squares, _ in table]
    assert fit.kernel_sizes_loss.tolist() == pytest.approx(squares, rel=1e-8)
    assert fit.kernel_sizes_bic.tolist() == pytest.approx([bic for _, _, bic in table], rel=1e-8, abs=1e-6)
    size = min(table, key=lambda row: row[2])[0]
    shape = tuple(fit.kernel.shape[-2:])
    assert shape == size
    offset = tuple((layer.kernel_size[axis] - size[axis]) // 2 * layer.dilation[axis] for axis in (0, 1))
    assert fit.kernel_offset == offset
    plain = fit_kernel(
        pairs=[(crop_images(layer, x, fit), y, w) for x, y, w in pairs],
        kernel_size=size,
        bias=layer.bias,
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
        solver=fit.solver,  # type: ignore[arg-type]
        loss=loss,  # type: ignore[arg-type]
        seed=fit.seed,
        learning_rate="auto",
    )
    torch.testing.assert_close(fit.kernel, plain.kernel, rtol=1e-9, atol=1e-12)
    assert fit.loss_history == pytest.approx(plain.loss_history, rel=1e-9)
    assert fit.final_loss == pytest.approx(plain.final_loss, rel=1e-9)
    assert fit.message.startswith(plain.message)
    assert f"kernel_size ({size[0]}, {size[1]}) has the smallest BIC of {len(table)} size" in fit.message


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    groups, apart = draw(st.integers(1, 2)), st.tuples(st.integers(1, 2), st.integers(1, 2))
    side = st.sampled_from([0, 0, 1, 3])
    return Layer(
        kernel_size=draw(st.tuples(st.integers(1, 7), st.integers(1, 7))),
        channels=groups * draw(st.integers(1, 2)),
        filters=groups * draw(st.integers(1, 2)),
        groups=groups,
        stride=draw(apart),
        padding=draw(st.tuples(side, side, side, side)),
        dilation=draw(apart),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@pytest.mark.slow
@settings(max_examples=60)
@given(
    layer=layers(),
    sides=st.lists(st.tuples(st.integers(9, 24), st.integers(9, 24)), min_size=1, max_size=2),
    noise=st.sampled_from([0.1, 1.0]),
    weighted=st.sampled_from(["no", "no", "a plane", "each value"]),
    solver=st.sampled_from(["exact", "sgd"]),
    loss=st.sampled_from(["sum", "mean"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_candidate_matches_lstsq(
    layer: Layer, sides: list[tuple[int, int]], noise: float, weighted: str, solver: Any, loss: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=layer.kernel_shape)
    kernel *= select_centred_taps(
        layer, (rng.choice(list_candidate_sizes(layer.kernel_size[0])), layer.kernel_size[1])
    ).reshape(kernel.shape[1:])
    pairs: Pairs = []
    for size in sides:
        assume(min(layer.output_size(size)) >= 1)
        images = rng.normal(size=(rng.integers(1, 3), layer.channels, *size)) + rng.normal()
        targets = layer.output(images, kernel, rng.normal(size=layer.filters) if layer.bias else None)
        targets = targets + noise * rng.normal(size=targets.shape)
        weights = None
        if weighted != "no":
            shape = targets.shape if weighted == "each value" else targets.shape[2:]
            weights = np.broadcast_to(rng.normal(size=shape).clip(min=0), targets.shape)
        pairs.append((images, targets, weights))
    counts = np.sum([((np.ones_like(y) if w is None else w) > 0).sum((0, 2, 3)) for _, y, w in pairs], axis=0)
    smallest = layer.channels // layer.groups * math.prod(2 - side % 2 for side in layer.kernel_size) + layer.bias
    assume((counts >= 2 * smallest).all())
    # With few windows, candidates may be rank deficient; another test checks that.
    taps = layer.channels // layer.groups * math.prod(layer.kernel_size)
    assume(counts.min() >= taps + 2)
    fit = fit_kernel(
        pairs=pairs,
        **{**layer.options, "kernel_size": "auto"},
        max_kernel_size=layer.kernel_size,
        solver=solver,
        loss=loss,
        seed=5,
        learning_rate="auto",
    )
    assert_selection(fit, layer, pairs, loss)


@pytest.mark.slow
@pytest.mark.parametrize("image", ["white", "photograph"])
@pytest.mark.parametrize("seed", range(6))
def test_true_size_is_found(photograph: Floats, image: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    largest = rng.integers(10, 14, size=2)
    size = [int(rng.choice([side for side in list_candidate_sizes(most) if side <= 9])) for most in largest]
    seen = rng.normal(size=(90, 90))
    if image == "photograph":
        row, column = rng.integers(0, 400, size=2)
        seen = photograph[row : row + 90, column : column + 90]
    layer = Layer(kernel_size=(int(largest[0]), int(largest[1])))
    kernel = np.zeros(layer.kernel_size)
    mask = select_centred_taps(layer, (size[0], size[1])).reshape(layer.kernel_size)
    # Entries at the border of the true kernel are not near zero, so that its size is identifiable.
    kernel[mask] = rng.choice([-1, 1], size=size[0] * size[1]) * rng.uniform(0.5, 1.5, size=size[0] * size[1])
    target = layer.output(seen[None, None], kernel[None, None])[0, 0]
    for noise in (0.0, 0.05):
        noisy = target + noise * seen.std() * rng.normal(size=target.shape)
        fit = fit_kernel(seen, noisy, kernel_size="auto", solver="exact")
        assert list(fit.kernel.shape) == size
        assert fit.kernel_offset == ((largest[0] - size[0]) // 2, (largest[1] - size[1]) // 2)
        if not noise:
            np.testing.assert_allclose(fit.kernel, kernel[mask].reshape(size), atol=1e-6)


@pytest.mark.slow
def test_blurred_photograph_is_compared_by_factors(photograph: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    factored: list[bool] = []
    original = diagnostics.analyse_factors

    def analyse(*arguments: Any) -> Any:
        factored.append(True)
        return original(*arguments)

    monkeypatch.setattr("core.fit.example_analysis.analyse_factors", analyse)
    layer = Layer(kernel_size=(7, 9))
    mean = np.full((5, 5), 1 / 25)
    smooth = Layer(kernel_size=(5, 5)).output(photograph[None, None, 100:170, 100:170], mean[None, None])
    smooth = Layer(kernel_size=(5, 5)).output(smooth, mean[None, None]) + 1e4
    rng = np.random.default_rng(3)
    kernel = np.zeros(layer.kernel_size)
    kernel[2:5, 2:7] = rng.normal(size=(3, 5))
    target = layer.output(smooth, kernel[None, None])
    noisy: Pairs = [(smooth, target + 0.1 * rng.normal(size=target.shape), None)]
    assert_selection(fit_kernel(pairs=noisy, kernel_size="auto", solver="exact", learning_rate="auto"), layer, noisy)
    assert factored
    exact = fit_kernel(smooth, target, kernel_size="auto", solver="exact")
    assert tuple(exact.kernel.shape[-2:]) == (3, 5)


def test_unidentified_kernels_are_compared(rng: np.random.Generator) -> None:
    layer = Layer(kernel_size=(5, 5))
    image = np.add.outer(rng.normal(size=30), np.zeros(30))
    target = layer.output(image[None, None], rng.normal(size=(1, 1, 5, 5)))
    pairs: Pairs = [(image[None, None], target + rng.normal(size=target.shape), None)]
    fit = fit_kernel(pairs=pairs, kernel_size="auto", solver="exact", learning_rate="auto")
    table = compute_expected_table(layer, pairs)
    assert fit.kernel_sizes_loss is not None
    assert fit.kernel_sizes_loss.tolist() == pytest.approx([squares for _, squares, _ in table], rel=1e-9)
    # The rows of the image are constant, so that further columns of the kernel add nothing.
    assert fit.kernel.shape[-1] == 1
    for faint in (np.zeros((1, 1, 30, 30)), np.ones((1, 1, 30, 30))):
        flat: Pairs = [(faint, target, None)]
        fit = fit_kernel(pairs=flat, kernel_size="auto", solver="exact", bias=True)
        assert tuple(fit.kernel.shape[-2:]) == (1, 1)
    zero = fit_kernel(image, np.zeros((26, 26)), kernel_size="auto", solver="exact")
    assert zero.kernel_sizes_bic is not None
    assert torch.isfinite(zero.kernel_sizes_bic).all()
    assert tuple(zero.kernel.shape) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "stride"),
    [("zeros", 1), ("reflect", 1), ("circular", 1), ("zeros", 2), ("replicate", 2), ("circular", 3), ("reflect", 3)],
)
def test_padding_same(mode: Any, stride: int) -> None:
    rng = np.random.default_rng(stride)
    images = rng.normal(size=(3, 1, 22, 20))
    kernel = rng.normal(size=(2, 1, 3, 5))
    options: dict[str, Any] = {"padding": "same", "padding_mode": mode, "stride": stride}
    for dilation in (1, 2):
        # The largest candidate has the padding "same" of its own size, as in TensorFlow if the stride is above 1.
        largest = compute_same_padding(images.shape[2:], (7, 7), stride, dilation)
        layer = Layer((7, 7), 1, 2, stride=(stride, stride), dilation=(dilation, dilation), padding=largest)
        layer = Layer(**{**vars(layer), "padding_mode": mode})
        whole = np.zeros(layer.kernel_shape)
        whole[:, :, 2:5, 1:6] = kernel
        targets = layer.output(images, whole)
        noisy: Pairs = [(images, targets + 0.3 * rng.normal(size=targets.shape), None)]
        fit = fit_kernel(
            pairs=noisy, kernel_size="auto", max_kernel_size=7, dilation=dilation, solver="exact", **options
        )
        assert tuple(fit.kernel.shape) == (2, 1, 3, 5)
        assert fit.kernel_offset == (2 * dilation, dilation)
        assert "cropped" not in fit.message
        if stride == 1:
            plain = fit_kernel(pairs=noisy, kernel_size=(3, 5), dilation=dilation, solver="exact", **options)
            torch.testing.assert_close(fit.kernel, plain.kernel, rtol=1e-9, atol=1e-12)
        table = compute_expected_table(layer, noisy)
        assert fit.kernel_sizes_loss is not None
        assert fit.kernel_sizes_loss.tolist() == pytest.approx([squares for _, squares, _ in table], rel=1e-9)


def compute_same_padding(size: Any, kernel: tuple[int, int], stride: int, dilation: int) -> tuple[int, int, int, int]:
    """Return the padding "same" of TensorFlow, (top, bottom, left, right)."""
    sides: list[int] = []
    for pixels, taps in zip(size, kernel, strict=True):
        total = max((-(-pixels // stride) - 1) * stride + dilation * (taps - 1) + 1 - pixels, 0)
        sides += [total // 2, total - total // 2]
    return sides[0], sides[1], sides[2], sides[3]


@pytest.mark.slow
def test_largest_size_follows_from_shapes_or_request(rng: np.random.Generator) -> None:
    def largest(side: int, outputs: int, **options: Any) -> list[int]:
        fit = fit_kernel(
            rng.normal(size=(side, side)),
            rng.normal(size=(outputs, outputs)),
            kernel_size="auto",
            solver="exact",
            **options,
        )
        assert fit.kernel_sizes is not None
        rows: list[int] = fit.kernel_sizes.max(0).values.tolist()
        return rows

    assert largest(60, 50) == [11, 11]
    assert largest(60, 51) == [10, 10]
    assert largest(60, 50, max_kernel_size=7) == [7, 7]
    assert largest(60, 50, max_kernel_size=[6, 3]) == [5, 3]
    assert largest(60, 50, padding=1) == [13, 13]
    assert largest(60, 50, dilation=2, max_kernel_size=5) == [4, 4]
    assert largest(60, 52, dilation=2) == [5, 5]
    assert largest(60, 60, padding="same") == [13, 13]
    # 7 x 7 has too many unknowns for 64 values, 7 x 3 does not.
    assert largest(8, 8, padding="same") == [7, 7]
    assert largest(60, 60, padding="same", max_kernel_size=[4, 3]) == [4, 3]
    assert largest(60, 28, stride=2) == [5, 5]
    assert largest(60, 28, stride=2, max_kernel_size=6) == [6, 6]
    assert largest(60, 28, stride=2, max_kernel_size=3) == [3, 3]
    assert largest(61, 60, padding=[1, 0, 1, 0]) == [3, 3]


def test_message_reports_cropping_and_larger_sizes(rng: np.random.Generator) -> None:
    image = rng.normal(size=(40, 40))
    kernel = rng.normal(size=(1, 1, 3, 5))
    target = Layer(kernel_size=(3, 5)).output(image[None, None], kernel)[0, 0, 1:-1, 3:-3]
    fit = fit_kernel(image, target, kernel_size="auto", solver="exact")
    assert fit.message.endswith(
        "kernel_size (3, 5) has the smallest BIC of 18 sizes up to (5, 11), "
        "the input was cropped by 1 row and 3 columns on each side"
    )
    small = fit_kernel(image, target, kernel_size="auto", max_kernel_size=3, solver="exact")
    assert "sizes up to (3, 3)" in small.message
    assert small.message.endswith("; larger ones may be better (max_kernel_size)")
    plain = fit_kernel(image, target, kernel_size=(5, 11), solver="exact")
    names = ("kernel_sizes", "kernel_sizes_bic", "kernel_sizes_loss", "kernel_offset")
    assert [getattr(plain, name) for name in names] == [None] * 4


def test_other_options_apply_to_the_chosen_size(rng: np.random.Generator) -> None:
    layer, kernel = Layer(kernel_size=(7, 7)), np.zeros((1, 1, 7, 7))
    kernel[:, :, 2:5, 2:5] = rng.normal(size=(3, 3))
    images, others = rng.normal(size=(2, 4, 1, 30, 30))
    targets, held_out = (layer.output(seen, kernel) + rng.normal(size=(4, 1, 24, 24)) for seen in (images, others))
    options: dict[str, Any] = {"steps": 30, "seed": 2, "ridge": 0.5, "learning_rate": 1e-4, "bias": True}
    for more in ({"batch_size": 2}, {"solver": "adam", "learning_rate": 0.1}, {"solver": "momentum", "patience": 2}):
        fit = fit_kernel(images, targets, kernel_size="auto", validation=[(others, held_out)], **{**options, **more})
        inside = np.s_[:, :, 2:-2, 2:-2]
        plain = fit_kernel(
            images[inside], targets, validation=[(others[inside], held_out)], kernel_size=3, **{**options, **more}
        )
        assert tuple(fit.kernel.shape) == (1, 1, 3, 3)
        torch.testing.assert_close(fit.kernel, plain.kernel, rtol=1e-9, atol=1e-12)
        assert fit.validation_history == pytest.approx(plain.validation_history, rel=1e-9)
        assert (fit.best_step, fit.status) == (plain.best_step, plain.status)


def test_units_do_not_change_the_choice(rng: np.random.Generator) -> None:
    image = rng.normal(size=(30, 30))
    target = rng.normal(size=(24, 24))
    plain = fit_kernel(image, target, kernel_size="auto", solver="exact")
    for exponent in (-400, 400):
        fit = fit_kernel(image, target * 2.0**exponent, kernel_size="auto", solver="exact")
        assert torch.equal(fit.kernel, plain.kernel * 2.0**exponent)
        assert plain.kernel_sizes_bic is not None
        shift = 2 * exponent * math.log(2) * target.size
        torch.testing.assert_close(fit.kernel_sizes_bic, plain.kernel_sizes_bic + shift, rtol=1e-9, atol=0)


def test_readings_count_both_phases(rng: np.random.Generator) -> None:
    pairs = [(rng.normal(size=(20, 20)), rng.normal(size=(16, 16))) for _ in range(3)]
    plan = plan_fit_kernel(pairs=pairs, kernel_size="auto", batch_size=1, learning_rate=1e-4)
    seen: list[Progress] = []
    run_to_end(plan.steps(), seen.append)
    readings = [event for event in seen if isinstance(event, Reading)]
    assert {reading.of for reading in readings} == {6}
    assert [reading.done for reading in readings] == sorted(reading.done for reading in readings)
    assert readings[-1].done == 6


def test_estimate_covers_reading_selection_and_a_fit(rng: np.random.Generator) -> None:
    pair = rng.normal(size=(120, 120)), rng.normal(size=(106, 106))
    for options in ({"solver": "exact"}, {"steps": 1000}):
        arguments: dict[str, Any] = {**options, "learning_rate": 1e-6}
        auto = plan_fit_kernel(*pair, kernel_size="auto", **arguments).cost
        plain = plan_fit_kernel(*pair, **arguments).cost
        exact = plan_fit_kernel(*pair, solver="exact").cost
        assert auto.seconds > plain.seconds + exact.seconds
        assert auto.gflop > plain.gflop + exact.gflop
        assert auto.megabytes >= plain.megabytes
    with pytest.raises(core.TooLarge):
        plan_fit_kernel(*pair, kernel_size="auto", limits=core.Limits(gflop=plain.gflop))


@pytest.mark.slow
def test_comparison_can_be_stopped_between_heights(rng: np.random.Generator) -> None:
    events: list[Progress] = []
    plan = plan_fit_kernel(rng.normal(size=(50, 50)), rng.normal(size=(30, 30)), kernel_size="auto", solver="exact")
    run_to_end(plan.steps(), events.append)
    heights = len(size_range.SizeRange((21, 21), (21, 21), open=False).sizes[0])
    assert heights == 11
    # Each of the two phases has a Reading event, and each height is followed by another one.
    assert events.count(Reading(1, 2)) >= heights
