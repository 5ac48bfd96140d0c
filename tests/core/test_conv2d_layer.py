import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional

import core
from core import conv2d
from core.engines import torch_conv
from tests import reference

PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]
INTEGER_PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the sizes of a Conv2d layer and its input, including kernels larger than the image and all groupings."""
    groups = draw(st.integers(1, 3))
    return {
        "images": (
            draw(st.integers(1, 3)),
            groups * draw(st.integers(1, 2)),
            *draw(st.tuples(*[st.integers(1, 8)] * 2)),
        ),
        "filters": groups * draw(st.integers(1, 2)),
        "kernel": draw(st.tuples(*[st.integers(1, 4)] * 2)),
        "stride": draw(INTEGER_PAIRS),
        "dilation": draw(INTEGER_PAIRS),
        "padding": draw(st.tuples(*[st.integers(0, 4)] * 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def draw_tensors(layer: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(layer["seed"])

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    filters = layer["filters"]
    weight = draw(filters, layer["images"][1] // layer["groups"], *layer["kernel"])
    return draw(*layer["images"]), weight, draw(filters) if layer["bias"] else None


def compute_spans(layer: dict[str, Any]) -> list[int]:
    return [apart * (taps - 1) + 1 for taps, apart in zip(layer["kernel"], layer["dilation"], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", core.ENGINES)
@given(layer=layers(), more=st.integers(20, 40), mode=st.sampled_from(PADDING_MODES))
def test_every_engine_gives_the_same_layer(
    engine: str, layer: dict[str, Any], more: int, mode: core.PaddingMode
) -> None:
    """Use enlarged images, so that outputs contain at least one tile with any stride and dilation."""
    layer = {**layer, "images": (*layer["images"][:2], layer["images"][2] + 12, layer["images"][3] + 2 * more)}
    images, weight, bias = draw_tensors(layer)
    options = {name: layer[name] for name in ("stride", "dilation", "padding", "groups")}
    try:
        output = conv2d(images, weight, bias, **options, padding_mode=mode, dtype="float64", engines=(engine,)).output
    except (core.MethodUnavailable, core.InvalidShape):
        return
    expected = conv2d(images, weight, bias, **options, padding_mode=mode, dtype="float64", engines=("torch",)).output
    torch.testing.assert_close(output, expected.contiguous(), rtol=1e-10, atol=1e-11)


@pytest.mark.slow
@given(layer=layers(), mode=st.sampled_from(PADDING_MODES), dtype=st.sampled_from(["float32", "float64"]))
def test_conv2d_matches_torch(layer: dict[str, Any], mode: core.PaddingMode, dtype: core.Dtype) -> None:
    rows, columns = layer["padding"]
    height, width = layer["images"][2:]
    assume(compute_spans(layer)[0] <= height + 2 * rows)
    assume(compute_spans(layer)[1] <= width + 2 * columns)
    # torch rejects borders that need more than one reflection or more than one circular repetition.
    assume(mode not in ("reflect", "circular") or (rows < height and columns < width))
    images, weight, bias = draw_tensors(layer)
    options = layer["stride"], 0, layer["dilation"], layer["groups"]
    torch_mode = "constant" if mode == "zeros" else mode
    bordered = functional.pad(images, (columns, columns, rows, rows), torch_mode)
    expected = functional.conv2d(bordered, weight, bias, *options)
    output = conv2d(
        images,
        weight,
        bias,
        stride=layer["stride"],
        padding=layer["padding"],
        dilation=layer["dilation"],
        groups=layer["groups"],
        padding_mode=mode,
        dtype=dtype,
    ).output
    assert output.dtype == getattr(torch, dtype)
    tolerance = 1e-12 if dtype == "float64" else 1e-4
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@given(
    layer=layers(),
    mode=st.sampled_from(PADDING_MODES),
    sides=st.tuples(*[st.integers(0, 9)] * 4),
)
def test_four_sided_padding_matches_naive_loops(
    layer: dict[str, Any], mode: core.PaddingMode, sides: tuple[int, int, int, int]
) -> None:
    top, bottom, left, right = sides
    height, width = layer["images"][2:]
    assume(compute_spans(layer)[0] <= height + top + bottom)
    assume(compute_spans(layer)[1] <= width + left + right)
    images, weight, bias = draw_tensors(layer)
    options = {"stride": layer["stride"], "dilation": layer["dilation"], "groups": layer["groups"]}
    output = conv2d(images, weight, bias, padding=sides, padding_mode=mode, dtype="float64", **options).output
    offsets = np.zeros(layer["filters"]) if bias is None else bias.numpy()
    expected = reference.conv2d(images.numpy(), weight.numpy(), offsets, padding=sides, boundary=mode, **options)
    np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch warns that it copies the input
@pytest.mark.parametrize("mode", PADDING_MODES)
@given(layer=layers())
def test_same_padding_gives_one_output_per_stride(mode: core.PaddingMode, layer: dict[str, Any]) -> None:
    images, weight, bias = draw_tensors(layer)
    options = {"stride": layer["stride"], "dilation": layer["dilation"], "groups": layer["groups"]}
    output = conv2d(images, weight, bias, padding="same", padding_mode=mode, dtype="float64", **options).output
    height, width = layer["images"][2:]
    assert output.shape[2:] == (-(-height // layer["stride"][0]), -(-width // layer["stride"][1]))
    if layer["stride"] == (1, 1) and mode == "zeros":
        expected = functional.conv2d(images, weight, bias, padding="same", **options)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_strided_same_padding_matches_tensorflow() -> None:
    # tf.nn.conv2d with kernel [1, 1, 1] and stride 2 pads 1..7 with a zero on each side, 1..6 with one at the end.
    row = np.arange(1.0, 8.0)[None]
    assert conv2d(row, [[1, 1, 1]], stride=[1, 2], padding="same").output.tolist() == [[3, 9, 15, 13]]
    assert conv2d(row[:, :6], [[1, 1, 1]], stride=[1, 2], padding="same").output.tolist() == [[6, 12, 11]]


def test_d2l_layer() -> None:
    images = torch.ones(1, 1, 6, 8)
    images[..., 2:6] = 0
    output = conv2d(images, torch.tensor([[[[-1.0, 1.0]]]])).output
    assert output.tolist() == [[[[0, -1, 0, 0, 0, 1, 0]] * 6]]


@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "output_shape"),
    [
        ((5, 6), (2, 3), (4, 4)),
        ((5, 6), (1, 1, 2, 3), (4, 4)),
        ((5, 6), (7, 1, 2, 3), (7, 4, 4)),
        ((1, 5, 6), (2, 3), (1, 4, 4)),
        ((2, 5, 6), (7, 2, 2, 3), (7, 4, 4)),
        ((3, 1, 5, 6), (2, 3), (3, 1, 4, 4)),
        ((3, 2, 5, 6), (7, 2, 2, 3), (3, 7, 4, 4)),
    ],
)
def test_output_has_the_rank_of_the_input(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> None:
    assert conv2d(np.ones(input_shape), np.ones(weight_shape)).output.shape == output_shape


@pytest.mark.parametrize("padding", [0, 2, "same", (3, 0, 1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("unrolled_bytes", [3000, 300_000, 100_000_000])
def test_strips_do_not_change_the_output(
    unrolled_bytes: int, padding: Any, stride: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    images, weight, bias = rng.normal(size=(5, 3, 23, 17)), rng.normal(size=(4, 3, 5, 3)), rng.normal(size=4)
    whole = conv2d(images, weight, bias, stride=stride, padding=padding, dtype="float64").output
    monkeypatch.setattr(torch_conv, "MAX_UNROLLED_BYTES", unrolled_bytes)
    strips = conv2d(images, weight, bias, stride=stride, padding=padding, dtype="float64").output
    torch.testing.assert_close(strips, whole, rtol=1e-13, atol=1e-13)


def test_options_may_be_numpy_integers() -> None:
    options: dict[str, Any] = dict.fromkeys(("stride", "padding", "dilation"), np.int64(2))
    output = conv2d(np.ones((6, 6)), [[1]], **options).output
    assert output.shape == (5, 5)


@pytest.mark.slow
def test_float64_batch_takes_little_extra_memory() -> None:
    script = (
        "import resource, numpy as np, core\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "core.conv2d(np.ones((9, 9)), np.ones((3, 3)), dtype='float64')\n"
        "before = peak()\n"
        "core.conv2d(np.ones((60, 1, 120, 120)), np.ones((15, 15)), dtype='float64')\n"
        "core.conv2d(np.ones((400, 400)), np.ones((40, 40)), dilation=2, dtype='float64')\n"
        "print((peak() - before) / 1024)"
    )
    megabytes = float(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout)
    assert megabytes < 300


@pytest.mark.parametrize("option", ["stride", "dilation"])
def test_largest_strides_and_dilations_are_accepted(option: str) -> None:
    options: dict[str, Any] = {option: 2**31 - 1}
    assert conv2d([[5]], [[2]], padding=0, **options).output.tolist() == [[10]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": np.ones((5, 5))}, core.InvalidShape, "weight (5, 5) is larger than the input (3, 4)"),
        (
            {"weight": np.ones((2, 2)), "dilation": 3, "padding": (0, 0)},
            core.InvalidShape,
            "weight (2, 2) with dilation (3, 3) spans (4, 4) and is larger than the input (3, 4)",
        ),
        (
            {"weight": np.ones((9, 9)), "padding": 1},
            core.InvalidShape,
            "weight (9, 9) is larger than the padded input (5, 6)",
        ),
        ({"input": np.ones((1, 1, 1, 3, 4))}, core.InvalidShape, "input has shape (1, 1, 1, 3, 4): it needs (H, W)"),
        ({"weight": np.ones((1, 2, 2))}, core.InvalidShape, "weight has shape (1, 2, 2): it needs (O, C/groups, h, w)"),
        (
            {"input": np.ones((3, 3, 4))},
            core.InvalidShape,
            "weight (1, 1, 1, 1) reads 1 channels in 1 group, the input has 3: (1, 3, 1, 1) would fit",
        ),
        (
            {"input": np.ones((3, 3, 4)), "weight": np.ones((4, 1, 1, 1)), "groups": 2},
            core.InvalidShape,
            "groups 2 must divide both the channels of the input (3) and the filters (4)",
        ),
        ({"bias": [1.0, 2.0]}, core.InvalidShape, "bias has shape (2); 1 filter needs (1)"),
        *[
            ({option: value}, core.InvalidOption, f"{option} {value!r} is neither an integer nor [rows, columns]")
            for option in ("stride", "dilation")
            for value in (0, -1, 2**31, [1], [1, 2, 3], [1, 0], True, 1.5, "2", None)
        ],
        *[
            ({"padding": value}, core.InvalidOption, f"padding {value!r} is not one of")
            for value in (-1, 2**31, [1], [1, 2, 3], [1, -1], True, 1.5, "full", None)
        ],
        *[({"groups": value}, core.InvalidOption, f"groups {value!r} is not an integer") for value in (0, -1, True)],
        ({"padding_mode": "symmetric"}, core.InvalidOption, 'padding_mode "symmetric" is not one of'),
    ],
)
def test_invalid_calls_are_rejected_with_a_reason(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        conv2d(**{"input": np.ones((3, 4)), "weight": [[1]], **arguments})
    assert message in str(caught.value)


def test_padding_of_a_billion_is_rejected_by_its_estimate() -> None:
    with pytest.raises(core.TooLarge, match="MB of memory"):
        core.Limits(megabytes=2000).check(core.plan_conv2d([[1]], [[1]], padding=10**9).cost)


@pytest.mark.parametrize("method", ["auto", "direct"])
@pytest.mark.parametrize("shape", [(2, 24, 20, 21), (24, 33, 9), (1, 24, 9, 16)])
def test_layer_returns_what_conv2d_returns(method: core.Method, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(40, 24, 3, 3)).astype("f4"), rng.normal(size=40).astype("f4")
    layer = core.Conv2d(weight, bias, padding="same", method=method)
    for _ in range(2):
        images = rng.normal(size=shape).astype("f4")
        result = layer(images)
        expected = conv2d(images, weight, bias, padding="same", method=method, engines=(result.engine,))
        np.testing.assert_array_equal(result.array, expected.array)


def test_layer_takes_inputs_of_any_rank_and_type() -> None:
    layer = core.Conv2d([[[[1, 2], [3, 4]]]])
    plane = np.arange(12).reshape(3, 4)
    for planes in (plane, plane[np.newaxis], plane[np.newaxis, np.newaxis]):
        for images in (planes, planes.tolist(), torch.from_numpy(planes), planes.astype(np.float64)):
            expected = conv2d(images, [[[[1, 2], [3, 4]]]])
            for _ in range(2):
                output = layer(images).array
                assert output.shape == tuple(expected.array.shape)
                np.testing.assert_array_equal(output, expected.array)
        with pytest.raises(core.InvalidNumbers, match="complex"):
            layer(planes * 1j)
    with pytest.raises(core.InvalidShape, match="input is empty"):
        layer(np.ones((1, 0, 4)))


def test_sparse_tensors_are_rejected_and_matrices_are_arrays() -> None:
    with pytest.raises(core.InvalidNumbers, match="sparse"):
        conv2d(torch.eye(4).to_sparse(), [[1]])
    matrix = np.ones((3, 3)).view(np.matrix)
    np.testing.assert_array_equal(conv2d(matrix, [[2]]).array, np.full((3, 3), 2))


def test_layer_transforms_its_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64, 3, 3)).astype("f4")
    layer, images = core.Conv2d(weight, method="winograd"), np.ones((64, 30, 30), "f4")
    if "winograd" not in core.choose(layer.plan(images).problem, "auto").predictions:
        pytest.skip("needs Halide")
    first = layer(images)

    def fail(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr("core.engines.layers.winograd.transform_kernels", fail)
    np.testing.assert_array_equal(layer(images).array, first.array)


def test_layer_keeps_its_weight_if_the_array_changes() -> None:
    weight = np.ones((2, 1, 1, 1), "f4")
    layer = core.Conv2d(weight)
    weight[...] = 2
    np.testing.assert_array_equal(layer(np.ones((1, 3, 3))).array, np.ones((2, 3, 3)))


def test_layer_slices_long_computations_as_conv2d_does() -> None:
    checks: list[None] = []
    layer = core.Conv2d(np.ones((16, 16, 3, 3), "f4"), padding=1, machine=core.Machine(1, flops=1e8))
    output = layer(np.ones((1, 16, 64, 64), "f4"), check=lambda: checks.append(None)).array
    assert len(checks) > 1
    assert output[0, 0, 5, 5] == 144


def test_layer_checks_its_arguments() -> None:
    with pytest.raises(core.InvalidShape, match="weight has shape"):
        core.Conv2d(np.ones(3))
    with pytest.raises(core.InvalidShape, match="reads 2 channels"):
        core.Conv2d(np.ones((1, 2, 3, 3)))(np.ones((3, 9, 9)))


def test_rows_of_an_expanded_tensor() -> None:
    images, weight = torch.randn(1, 16, 1, 16).expand(1, 16, 10, 16), torch.randn(4, 16, 1, 1)
    for engine in core.ENGINES:
        method: Any = core.ENGINES[engine].METHOD
        try:
            output = conv2d(images, weight, method=method, engines=(engine,)).output
        except core.MethodUnavailable:
            continue
        torch.testing.assert_close(output, functional.conv2d(images, weight), rtol=1e-5, atol=1e-5)
