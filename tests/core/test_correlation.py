from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import core
from core import Boundary, Mode, correlate
from tests import precision_contract, reference
from tests.engine_properties import PLANE_ENGINES, supports_boundary
from tests.sample_files import CAMERA

KERNEL_SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 3), (3, 5), (1, 7)]
MODES_AND_BOUNDARIES = [("valid", "zeros")] + [
    (mode, boundary) for mode in ("same", "full") for boundary in get_args(Boundary)
]
ENGINES = ["auto", *PLANE_ENGINES]


def list_supported(modes: Sequence[tuple[Mode, Boundary]]) -> list[tuple[str, Mode, Boundary]]:
    """Return the engines with those of the modes and boundaries that each supports."""
    return [
        (engine, mode, boundary)
        for engine in ENGINES
        for mode, boundary in modes
        if engine == "auto" or supports_boundary(engine, boundary)
    ]


def select_engine(engine: str) -> dict[str, Any]:
    """Return the arguments that select this engine."""
    if engine == "auto":
        return {}
    return {"engines": (engine,), "method": core.ENGINES[engine].METHOD}


def draw_kernel(engine: str, size: tuple[int, int], rng: np.random.Generator) -> reference.Floats:
    """Draw a random kernel, of rank 1 for engine "separable"."""
    if engine == "separable":
        return np.outer(rng.normal(size=size[0]), rng.normal(size=size[1]))
    return rng.normal(size=size)


def build_d2l_image() -> torch.Tensor:
    image = torch.ones(6, 8)
    image[:, 2:6] = 0
    return image


def test_d2l_first_example() -> None:
    result = correlate([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 1], [2, 3]])
    assert result.output.tolist() == [[19, 25], [37, 43]]
    assert result.output.dtype == torch.float32


def test_d2l_edge_kernel_finds_vertical_edges_only() -> None:
    edges = correlate(build_d2l_image(), [[-1, 1]]).output
    assert edges.tolist() == [[0, -1, 0, 0, 0, 1, 0]] * 6
    assert correlate(build_d2l_image().T, [[-1, 1]]).output.abs().max() == 0


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
@pytest.mark.parametrize(("engine", "mode", "boundary"), list_supported(MODES_AND_BOUNDARIES))
def test_every_mode_and_boundary_matches_naive_loops(
    mode: Mode, boundary: Boundary, kernel_size: tuple[int, int], engine: str, rng: np.random.Generator
) -> None:
    image, kernel = rng.normal(size=(7, 25)), draw_kernel(engine, kernel_size, rng)
    fill = 1.5 if boundary == "constant" else 0.0
    output = correlate(
        image, kernel, mode=mode, boundary=boundary, fill_value=fill, dtype="float64", **select_engine(engine)
    ).output
    np.testing.assert_allclose(output, reference.correlate(image, kernel, mode, boundary, fill), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (2, 3)])
@pytest.mark.parametrize("kernel_size", [(1, 1), (5, 5), (8, 2), (7, 6)])
@pytest.mark.parametrize("boundary", get_args(Boundary))
@pytest.mark.parametrize("mode", ["same", "full"])
def test_kernels_larger_than_the_image_and_one_pixel_images(
    mode: Mode, boundary: Boundary, size: tuple[int, int], kernel_size: tuple[int, int], rng: np.random.Generator
) -> None:
    image, kernel = rng.normal(size=size), rng.normal(size=kernel_size)
    fill = -2.0 if boundary == "constant" else 0.0
    output = correlate(image, kernel, mode=mode, boundary=boundary, fill_value=fill, dtype="float64").output
    np.testing.assert_allclose(output, reference.correlate(image, kernel, mode, boundary, fill), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    mode_and_boundary=st.sampled_from(MODES_AND_BOUNDARIES),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_plane_of_a_batch_is_correlated(
    batch: list[int],
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    mode_and_boundary: tuple[Mode, Boundary],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    mode, boundary = mode_and_boundary
    if mode == "valid":
        size = max(size[0], kernel_size[0]), max(size[1], kernel_size[1])
    images, kernel = rng.normal(size=(*batch, *size)), rng.normal(size=kernel_size)
    output = correlate(images, kernel, mode=mode, boundary=boundary, dtype="float64").output
    assert output.shape[:-2] == tuple(batch)
    for plane in np.ndindex(*batch):
        expected = reference.correlate(images[plane], kernel, mode, boundary)
        np.testing.assert_allclose(output[plane], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_convolve_flips_the_kernel(mode: Mode, rng: np.random.Generator) -> None:
    image, kernel = rng.normal(size=(9, 7)), rng.normal(size=(3, 5))
    output = correlate(image, kernel, mode=mode, operation="convolve", dtype="float64").output
    expected = reference.correlate(image, kernel[::-1, ::-1], mode)
    np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)


def draw_random_image(rng: np.random.Generator) -> reference.Floats:
    return rng.normal(size=(64, 80))


def draw_16_bit_image(rng: np.random.Generator) -> reference.Floats:
    return np.floor(rng.uniform(0, 65536, size=(64, 80)))


def draw_smooth_image(rng: np.random.Generator) -> reference.Floats:
    """Draw values up to 65535 with nearly equal neighbours, which almost cancel under a difference kernel."""
    rows, columns = np.mgrid[0:64, 0:80]
    image: reference.Floats = np.floor(65535 * (rows + columns) / 142 + rng.uniform(0, 2, size=(64, 80)))
    return image


def draw_step_image(rng: np.random.Generator) -> reference.Floats:
    del rng
    image = np.full((64, 80), 60000.0)
    image[:, 40:] += 1
    return image


PRECISE_KERNELS = ["sobel_x", "box(5)", "laplacian", "log(1.5)", "log(3.0)", "motion(9, 30)", "gaussian(2.0)", "random"]
FULL_RANK_KERNELS = {"laplacian", "motion(9, 30)", "random"}


@pytest.mark.parametrize(
    ("engine", "kernel_name"),
    [
        (engine, name)
        for engine in ENGINES
        for name in PRECISE_KERNELS
        if engine != "separable" or name not in FULL_RANK_KERNELS
    ],
)
@pytest.mark.parametrize("image_of", [draw_random_image, draw_16_bit_image, draw_smooth_image, draw_step_image])
def test_float32_meets_the_precision_contract(
    image_of: Callable[[np.random.Generator], reference.Floats],
    kernel_name: str,
    engine: str,
    rng: np.random.Generator,
) -> None:
    image = image_of(rng).astype(np.float32).astype(np.float64)
    kernel = rng.normal(size=(15, 15)) if kernel_name == "random" else core.named_kernel(kernel_name)
    kernel = kernel.astype(np.float32).astype(np.float64)
    result = correlate(image, kernel, **select_engine(engine))
    case = precision_contract.Case(
        result.engine,
        "float32",
        image.astype(np.float32)[None, None],
        kernel.astype(np.float32)[None, None],
    )
    assert precision_contract.find_violation(case, np.asarray(result.array)[None, None]) is None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_output_is_nonfinite_exactly_where_the_direct_sum_is(
    value: float, dtype: core.Dtype, engine: str, rng: np.random.Generator
) -> None:
    image = rng.normal(size=(40, 48))
    kernel = np.array([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0], [0.0, -1.0, 0.0]])
    if engine == "separable":
        kernel = np.outer([1.0, 0.0, -2.0], [0.0, 1.0, 0.0])
    image[14, 24] = value
    image[33, 2] = np.nan
    output = correlate(image, kernel, mode="same", dtype=dtype, **select_engine(engine)).output.numpy()
    with np.errstate(invalid="ignore"):
        expected = reference.correlate(image, kernel, "same")
    np.testing.assert_array_equal(np.isfinite(output), np.isfinite(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(output[finite], expected[finite], atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_near_the_maximum_do_not_overflow(engine: str, dtype: core.Dtype) -> None:
    largest = float(torch.finfo(torch.float32 if dtype == "float32" else torch.float64).max)
    image = np.full((40, 48), largest / 8)
    image[:, ::2] *= -1
    output = correlate(image, [[0.5, 0.5]] * 6, dtype=dtype, **select_engine(engine)).output
    assert output.abs().max() <= 1e-6 * largest


@pytest.mark.parametrize("size", [(700, 300), (130, 900)])
@pytest.mark.parametrize(
    ("engine", "mode", "boundary"),
    list_supported([("valid", "zeros"), ("same", "zeros"), ("same", "reflect"), ("full", "constant")]),
)
def test_large_planes_with_separate_borders(
    engine: str, size: tuple[int, int], mode: Mode, boundary: Boundary, rng: np.random.Generator
) -> None:
    image, kernel = rng.normal(size=size), draw_kernel(engine, (12, 9), rng)
    fill = 2.0 if boundary == "constant" else 0.0
    output = correlate(
        image, kernel, mode=mode, boundary=boundary, fill_value=fill, dtype="float64", **select_engine(engine)
    )
    expected = reference.correlate_valid_by_windows(
        reference.pad_for_mode(image, kernel.shape, mode, boundary, fill), kernel
    )
    np.testing.assert_allclose(output.output, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 40), (40, 3), (5, 5), (20, 31), (31, 20)])
@pytest.mark.parametrize("kernel_size", [(1, 1), (63, 63), (2, 40), (33, 1), (7, 7)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_and_narrow_outputs_of_large_kernels(
    size: tuple[int, int], kernel_size: tuple[int, int], dtype: core.Dtype, rng: np.random.Generator
) -> None:
    image = rng.normal(size=(2, size[0] + kernel_size[0] - 1, size[1] + kernel_size[1] - 1))
    kernel = rng.normal(size=kernel_size)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    for engine in ("stencil", "auto"):
        output = correlate(image, kernel, dtype=dtype, **select_engine(engine)).output
        for plane, expected in zip(output, image, strict=True):
            exact = reference.correlate_valid_by_windows(expected, kernel)
            np.testing.assert_allclose(plane, exact, atol=tolerance * np.abs(kernel).sum())


def test_integers_are_converted_like_torch() -> None:
    image = np.array([[2**24 + 1, 2**53 + 1], [-(2**63), 2**63 - 1]])
    identity = correlate(image, [[1]]).output
    assert torch.equal(identity, torch.from_numpy(image).to(torch.float32))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="needs numbers wider than float64")
def test_wider_than_float64_is_rounded_once() -> None:
    above = np.array([[np.longdouble(16777217) + np.longdouble(2) ** -38]])
    assert correlate(above, [[1]]).output.tolist() == [[16777218]]
    assert correlate([[1]], above).output.tolist() == [[16777218]]


def test_integer_fill_value_is_rounded_once() -> None:
    for fill in (2**54 + 2**30, 2**54 + 2**30 + 1):
        output = correlate([[0]], [[1, 0]], mode="full", boundary="constant", fill_value=fill).output
        assert output[0, 0] == torch.tensor([fill]).to(torch.float32)[0]


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">f4", ">i2", "float16", "<f8"])
def test_every_plain_dtype_and_byte_order_is_accepted(dtype: str) -> None:
    image = np.arange(12).reshape(3, 4).astype(dtype)
    assert correlate(image, "box(1)", dtype="float64").output.tolist() == np.arange(12.0).reshape(3, 4).tolist()


def test_negative_strides_and_read_only_arrays_are_accepted() -> None:
    image = np.arange(12.0).reshape(3, 4)
    image.flags.writeable = False
    assert correlate(image[::-1, ::-1], "identity").output.tolist() == image[::-1, ::-1].tolist()


def test_input_is_not_modified() -> None:
    image = torch.arange(12.0).reshape(3, 4)
    output = correlate(image, "identity").output
    output += 1
    assert image.tolist() == torch.arange(12.0).reshape(3, 4).tolist()


def test_sobel_edges_of_a_photograph_match_scipy() -> None:
    photograph = np.asarray(Image.open(CAMERA)).astype(np.float64)
    edges = correlate(photograph, "sobel_x", mode="same", boundary="symmetric", dtype="float64").output.numpy()
    assert np.abs(edges - scipy.ndimage.sobel(photograph, axis=1, mode="reflect")).max() <= 1e-3 * 255


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_share_the_engines(engine: str, rng: np.random.Generator) -> None:
    images = rng.normal(size=(32, 44, 54))
    kernel = draw_kernel(engine, (7, 5), rng)
    with ThreadPoolExecutor(8) as pool:
        outputs = list(
            pool.map(lambda image: correlate(image, kernel, dtype="float64", **select_engine(engine)).output, images)
        )
    for image, output in zip(images, outputs, strict=True):
        np.testing.assert_allclose(output, reference.correlate_valid_by_windows(image, kernel), rtol=1e-11, atol=1e-11)


# Without torch_fft: the last bits of torch's transforms depend on the number of threads.
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "torch_fft"])
def test_results_do_not_depend_on_the_number_of_threads(engine: str, rng: np.random.Generator) -> None:
    image, kernel = rng.normal(size=(331, 333)), draw_kernel(engine, (27, 17), rng)
    threads = torch.get_num_threads()
    try:
        outputs = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            outputs.append(correlate(image, kernel, machine=core.Machine(number), **select_engine(engine)).output)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"input": np.ones((3, 3)), "kernel": np.ones((5, 5))},
            core.InvalidShape,
            'kernel has shape (5, 5), larger than the input (3, 3); mode "valid" requires it to fit: use mode',
        ),
        ({"input": [1, 2, 3], "kernel": [[1]]}, core.InvalidShape, "input has 1 dimension, (3): it needs at least two"),
        ({"input": [[1]], "kernel": [1]}, core.InvalidShape, "kernel has shape (1): it needs two dimensions"),
        ({"input": [[1]], "kernel": np.ones((1, 1, 1))}, core.InvalidShape, "kernel has shape (1, 1, 1)"),
        ({"input": np.ones((0, 3)), "kernel": [[1]]}, core.InvalidShape, "input is empty: its shape is (0, 3)"),
        ({"input": [[1]], "kernel": np.ones((0, 0))}, core.InvalidShape, "kernel is empty"),
        ({"input": [[1, 2], [3]], "kernel": [[1]]}, core.InvalidShape, "input is ragged"),
        ({"input": [["1"]], "kernel": [[1]]}, core.InvalidNumbers, "input has values of type"),
        ({"input": np.ones((1, 1), complex), "kernel": [[1]]}, core.InvalidNumbers, "complex"),
        ({"input": torch.ones(1, 1, dtype=torch.bool), "kernel": [[1]]}, core.InvalidNumbers, "torch.bool"),
        (
            {"input": [[1]], "kernel": [[1]], "mode": "same", "boundary": "constant", "fill_value": 1e39},
            core.InvalidOption,
            "fill_value 1e+39 does not round to a finite float32 number; the largest is 3.4028235e+38",
        ),
        ({"input": np.ones((1, 1), bool), "kernel": [[1]]}, core.InvalidNumbers, "type bool"),
        ({"input": [[1]], "kernel": "sobelx"}, core.UnknownKernel, "did you mean sobel_x"),
        ({"input": [[1]], "kernel": [[1]], "mode": "sane"}, core.InvalidOption, 'mode "sane" is not one of'),
        ({"input": [[1]], "kernel": [[1]], "boundary": "wrap"}, core.InvalidOption, 'boundary "wrap" is not one of'),
        ({"input": [[1]], "kernel": [[1]], "operation": "x"}, core.InvalidOption, 'operation "x" is not one of'),
        ({"input": [[1]], "kernel": [[1]], "dtype": "float16"}, core.InvalidOption, 'dtype "float16" is not one of'),
        ({"input": [[1]], "kernel": [[1]], "method": "magic"}, core.InvalidOption, 'method "magic" is not one of'),
        ({"input": [[1]], "kernel": [[1]], "boundary": "reflect"}, core.InvalidOption, 'no effect in mode "valid"'),
        (
            {"input": [[1]], "kernel": [[1]], "mode": "same", "boundary": "reflect", "fill_value": 2.0},
            core.InvalidOption,
            'fill_value 2 has no effect with boundary "reflect"',
        ),
        ({"input": [[1]], "kernel": [[1]], "device": "cuda:99"}, core.DeviceUnavailable, "available devices: "),
    ],
)
def test_invalid_calls_are_rejected_with_a_reason(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        correlate(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_limits_are_checked_against_the_cost_of_a_plan() -> None:
    limits = core.Limits(megabytes=1, gflop=0.001)
    with pytest.raises(core.TooLarge, match="MB of memory; at most 1 MB") as caught:
        limits.check(core.plan_correlate(np.ones((400, 400)), "box(3)").cost)
    assert caught.value.quantity == "memory"
    with pytest.raises(core.TooLarge, match="Gflop") as caught:
        limits.check(core.plan_correlate(np.ones((200, 200)), "box(15)").cost)
    assert caught.value.quantity == "compute"
    plan = core.plan_correlate(np.ones((100, 100)), "box(3)")
    limits.check(plan.cost)
    assert limits.allow(plan.cost)
    assert plan.run().output.shape == (98, 98)
    assert plan.engine == plan.cost.engine


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.float32])
def test_cost_is_predicted_from_shapes(dtype: Any) -> None:
    image = np.broadcast_to(np.zeros((), dtype), (50_000, 50_000))
    cost = core.plan_correlate(input=image, kernel="box(3)").cost
    assert cost.megabytes > 2 * 4 * 50_000**2 / 1e6
    assert cost.gflop == pytest.approx(2 * 9 * 49_998**2 / 1e9)
    assert cost.seconds > 1
    with pytest.raises(core.InvalidShape):
        core.plan_correlate(image[:2], "box(3)")


def test_plans_of_a_layer_and_a_fit_have_a_cost() -> None:
    image = np.zeros((64, 64))
    assert core.plan_conv2d(input=image, weight=np.zeros((8, 1, 3, 3))).cost.gflop > 0
    few, many = (core.plan_fit_kernel(input=image, target=image[2:, 2:], steps=steps).cost for steps in (1, 10**6))
    assert many.seconds > few.seconds + 1
