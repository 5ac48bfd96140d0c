"""Tests of arrays in every format, sent to and returned by the whole service, against the formats' own libraries."""

import io
import json
from collections.abc import Callable

import httpx
import numpy as np
import pytest
import safetensors.numpy
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from PIL import Image

from service.codecs.header_checks import DTYPES
from tests.problem_details import assert_first_error
from tests.sample_files import JPEG, JSON, NPY, NPZ, PNG, SAFETENSORS, save_npy, save_npz
from tests.servers import SendFn
from tests.service.samples.array_formats import (
    BODIES,
    ENDPOINTS,
    FIT_ARRAYS,
    RESPONSES,
    Array,
    encode_base64,
    post_and_decode,
    post_file,
    read_image,
    save_image,
    save_stored_npz,
)

MAX_EXACT_INTEGER = 2**53
"""The largest integer up to which float64 represents every integer."""


def representable_arrays(dtype: str) -> st.SearchStrategy[Array]:
    """Arrays of any finite values that float64 can represent; without -0.0, which a sum that starts with 0.0 loses."""
    kind = np.dtype(dtype)
    shapes = array_shapes(min_dims=2, max_dims=4, max_side=5)
    if kind.kind == "f":
        bits = arrays(np.dtype(f"u{kind.itemsize}"), shapes).map(lambda array: array.view(kind))
        return bits.map(lambda array: np.where(np.isfinite(array), array, 1).astype(kind) + kind.type(0))
    limits = np.iinfo(kind)
    least, most = max(-MAX_EXACT_INTEGER, int(limits.min)), min(MAX_EXACT_INTEGER, int(limits.max))
    return arrays(kind, shapes, elements=st.integers(least, most))


def assert_identical(output: Array, expected: Array) -> None:
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape
    assert output.tobytes() == expected.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=4)
@given(data=st.data())
def test_every_dtype_round_trips_in_every_format(
    send_in_process: SendFn, body: str, dtype: str, data: st.DataObject
) -> None:
    array = data.draw(representable_arrays(dtype))
    content_type, write = BODIES[body]
    for response_format in RESPONSES:
        output = post_and_decode(
            send_in_process, write(array), content_type, response_format, kernel="identity", dtype="float64"
        )
        assert_identical(output, array.astype(np.float64))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int16", "uint8", "uint16"])
@settings(max_examples=3)
@given(data=st.data())
def test_float32_values_round_trip_without_a_dtype(
    send_in_process: SendFn, body: str, dtype: str, data: st.DataObject
) -> None:
    array = data.draw(representable_arrays(dtype))
    content_type, write = BODIES[body]
    for response_format in RESPONSES:
        output = post_and_decode(send_in_process, write(array), content_type, response_format, kernel="identity")
        assert_identical(output, array.astype(np.float32))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("response_format", RESPONSES)
def test_large_arrays_round_trip_bit_for_bit(
    send_over_tcp: SendFn, body: str, response_format: str, rng: np.random.Generator
) -> None:
    array = rng.normal(size=(3, 130, 101))
    content_type, write = BODIES[body]
    output = post_and_decode(
        send_over_tcp, write(array), content_type, response_format, kernel="identity", dtype="float64"
    )
    assert_identical(output, array)


@pytest.mark.parametrize("response_format", RESPONSES)
@settings(max_examples=12)
@given(data=st.data())
def test_images_round_trip_pixel_for_pixel(send_in_process: SendFn, response_format: str, data: st.DataObject) -> None:
    sides = st.tuples(st.integers(1, 20), st.integers(1, 20))
    shape = data.draw(st.one_of(sides, sides.map(lambda side: (3, *side))))
    array = data.draw(arrays(np.uint8, shape))
    assert_identical(
        post_and_decode(send_in_process, save_image(array), PNG, response_format, kernel="identity"),
        array.astype(np.float32),
    )
    clipped = post_file(send_in_process, save_image(array), PNG, PNG, kernel="identity", png="clip")
    assert clipped.headers["content-type"] == PNG
    assert_identical(read_image(clipped.content), array)


@pytest.mark.parametrize("body", BODIES)
def test_every_format_converts_to_an_image(send: SendFn, body: str, rng: np.random.Generator) -> None:
    content_type, write = BODIES[body]
    for shape in ((7, 9), (3, 7, 9), (1, 3, 7, 9)):
        array = rng.integers(0, 256, shape).astype(np.uint8)
        response = post_file(send, write(array), content_type, PNG, kernel="identity", png="clip")
        np.testing.assert_array_equal(read_image(response.content), array[0] if len(shape) == 4 else array)


def test_jpeg_matches_pillow(send: SendFn, rng: np.random.Generator) -> None:
    for shape in ((20, 30), (3, 20, 30)):
        content = save_image(rng.integers(0, 256, shape).astype(np.uint8), "jpeg")
        np.testing.assert_array_equal(
            post_and_decode(send, content, JPEG, "npy", kernel="identity"), read_image(content)
        )


def test_16_bit_image_keeps_its_depth(send: SendFn, rng: np.random.Generator) -> None:
    array = rng.integers(0, 2**16, (9, 7)).astype(np.uint16)
    np.testing.assert_array_equal(post_and_decode(send, save_image(array), PNG, "npy", kernel="identity"), array)


SINGLE_NUMBERS: dict[str, tuple[str, bytes]] = {
    "nested": (JSON, b'{"input": 5}'),
    "flat": (JSON, b'{"input": {"shape": [], "dtype": "float32", "data": [5]}}'),
    "base64": (JSON, json.dumps({"input": encode_base64(np.array(5.0))}).encode()),
    "npy": (NPY, save_npy(np.array(5.0))),
    "npz": (NPZ, save_stored_npz(input=np.array(5.0))),
    "safetensors": (SAFETENSORS, safetensors.numpy.save({"input": np.array(5.0)})),
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(("content_type", "body"), SINGLE_NUMBERS.values(), ids=SINGLE_NUMBERS)
def test_single_number_is_not_an_input(send_in_process: SendFn, path: str, content_type: str, body: bytes) -> None:
    response = post_file(send_in_process, body, content_type, path=path, **ENDPOINTS[path])
    assert assert_first_error(response, 422)["field"].startswith("input")


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty_array_is_not_an_input(send_in_process: SendFn, path: str, body: str, shape: tuple[int, ...]) -> None:
    content_type, write = BODIES[body]
    response = post_file(send_in_process, write(np.empty(shape)), content_type, path=path, **ENDPOINTS[path])
    assert assert_first_error(response, 422)["field"].startswith("input")


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("array", [np.empty((0, 1, 1, 1)), np.array(5.0)])
def test_other_arrays_must_not_be_empty(send_in_process: SendFn, name: str, array: Array) -> None:
    named = {"input": np.ones((1, 3, 3)), "weight": np.ones((1, 1, 1, 1)), name: array}
    for content_type, content in ((NPZ, save_stored_npz(**named)), (SAFETENSORS, safetensors.numpy.save(named))):
        assert (
            assert_first_error(post_file(send_in_process, content, content_type, path="/conv2d"), 422)["field"] == name
        )


@pytest.mark.parametrize("body", BODIES)
def test_one_dimensional_array_is_not_an_input(send_in_process: SendFn, body: str) -> None:
    content_type, write = BODIES[body]
    error = assert_first_error(post_file(send_in_process, write(np.ones(3)), content_type, kernel="identity"), 422)
    assert error["field"] == "input"
    assert "1 dimension" in error["message"]


def draw_layer(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    shapes = {"input": (2, 4, 9, 8), "weight": (6, 2, 3, 2), "bias": (6,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


OPTIONS: dict[str, str] = {"stride": "[2, 1]", "padding": "1", "dilation": "2", "groups": "2"}


def convolve_with_torch(named: dict[str, NDArray[np.float32]]) -> Array:
    input, weight, bias = (torch.from_numpy(named[name]) for name in ("input", "weight", "bias"))
    output: Array = torch.nn.functional.conv2d(input, weight, bias, (2, 1), (1, 1), (2, 2), 2).numpy()
    return output


@pytest.mark.parametrize("response_format", RESPONSES)
@pytest.mark.parametrize("save", [save_stored_npz, save_npz])
def test_layer_in_npz_matches_torch(
    send: SendFn, response_format: str, save: Callable[..., bytes], rng: np.random.Generator
) -> None:
    named = draw_layer(rng)
    output = post_and_decode(send, save(**named), NPZ, response_format, "/conv2d", **OPTIONS)
    np.testing.assert_allclose(output, convolve_with_torch(named), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_metadata", [[], ["groups"], ["stride", "dilation"], list(OPTIONS)])
def test_safetensors_options_come_from_metadata_or_query(
    send: SendFn, in_metadata: list[str], rng: np.random.Generator
) -> None:
    named = draw_layer(rng)
    content = safetensors.numpy.save(named, metadata={name: OPTIONS[name] for name in in_metadata})
    query = {name: value for name, value in OPTIONS.items() if name not in in_metadata}
    output = post_and_decode(send, content, SAFETENSORS, "safetensors", "/conv2d", **query)
    np.testing.assert_allclose(output, convolve_with_torch(named), rtol=1e-5, atol=1e-5)


def test_metadata_options_work_on_every_endpoint(send: SendFn, rng: np.random.Generator) -> None:
    image = rng.normal(size=(6, 7)).astype(np.float32)
    metadata = {
        "kernel": "gaussian(1.0)",
        "mode": "same",
        "boundary": "constant",
        "fill_value": "0.5",
        "dtype": "float64",
        "explain": "true",
    }
    response = post_file(send, safetensors.numpy.save({"input": image}, metadata=metadata), SAFETENSORS)
    assert response.status_code == 200, response.text
    expected = scipy.ndimage.gaussian_filter(image.astype(np.float64), 1.0, mode="constant", cval=0.5)
    np.testing.assert_allclose(response.json()["output"], expected, rtol=1e-9)
    assert "explanation" in response.json()
    pair = {"input": image, "target": image}
    metadata = {"kernel_size": "1", "steps": "3", "learning_rate": "0.001", "seed": "1", "bias": "true"}
    learned = post_file(send, safetensors.numpy.save(pair, metadata=metadata), SAFETENSORS, path="/train-kernel").json()
    assert (learned["steps"], learned["learning_rate"], learned["seed"]) == (3, 0.001, 1)
    assert len(learned["bias"]) == 1


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"ss_tag": "{}", "title": "a kernel", "mod": "same"}])
def test_metadata_of_other_programs_is_ignored(send: SendFn, metadata: dict[str, str]) -> None:
    content = safetensors.numpy.save({"input": np.ones((2, 2))}, metadata=metadata)
    assert post_file(send, content, SAFETENSORS, kernel="identity").json()["output"] == [[1, 1], [1, 1]]


def test_option_in_metadata_and_query_is_rejected(send: SendFn) -> None:
    content = safetensors.numpy.save({"input": np.ones((2, 2))}, metadata={"mode": "same"})
    error = assert_first_error(post_file(send, content, SAFETENSORS, kernel="identity", mode="same"), 422)
    assert error["field"] == "mode"
    assert "in the body and in the query string" in error["message"]


@pytest.mark.parametrize(
    ("content_type", "write"), [(NPZ, save_npz), (SAFETENSORS, lambda **named: safetensors.numpy.save(named))]
)
def test_unknown_array_is_rejected_with_a_suggestion(
    send: SendFn, content_type: str, write: Callable[..., bytes]
) -> None:
    content = write(input=np.ones((2, 2)), wieght=np.ones((1, 1)))
    error = assert_first_error(post_file(send, content, content_type, path="/conv2d"), 422)
    assert error["field"] == "wieght"
    assert 'did you mean "weight"?' in error["message"]
    assert (
        assert_first_error(post_file(send, write(input=np.ones((2, 2))), content_type, path="/conv2d"), 422)["field"]
        == "weight"
    )


def test_archive_with_d2l_names_is_accepted(send: SendFn) -> None:
    content = save_stored_npz(X=np.arange(9.0).reshape(3, 3), K=np.arange(4.0).reshape(2, 2))
    np.testing.assert_array_equal(post_and_decode(send, content, NPZ, "npy"), [[19, 25], [37, 43]])


@pytest.mark.parametrize("bias", ["false", "true"])
def test_fitted_kernel_is_returned_in_every_format(send: SendFn, bias: str) -> None:
    query = {"seed": "1", "steps": "5", "learning_rate": "0.01", "bias": bias}

    def learned(accept: str) -> httpx.Response:
        response: httpx.Response = post_file(send, save_stored_npz(**FIT_ARRAYS), NPZ, accept, "/train-kernel", **query)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == accept
        return response

    plain = learned(JSON).json()
    kernel = np.load(io.BytesIO(learned(NPY).content))
    np.testing.assert_array_equal(kernel, np.array(plain["kernel"], kernel.dtype))
    names = {"kernel", "loss_history", "standard_errors", "confidence_intervals", "residual_std", "degrees_of_freedom"}
    names |= {"bias", "bias_standard_errors", "bias_confidence_intervals"} if bias == "true" else set()
    for named in (np.load(io.BytesIO(learned(NPZ).content)), safetensors.numpy.load(learned(SAFETENSORS).content)):
        assert set(named) == names
        for name in names:
            np.testing.assert_array_equal(named[name], np.array(plain[name], named[name].dtype))
        assert named["loss_history"].shape == (5,)
    metadata = json.loads(learned(NPZ).headers["corr2d-result"])
    without = {name: value for name, value in plain.items() if name not in names}
    assert {name: metadata[name] for name in without} == without


def test_one_array_and_a_query_are_enough_to_fit(send: SendFn) -> None:
    response = post_file(
        send, save_npy(np.ones((2, 3))), NPY, path="/train-kernel", target="[[1, 1], [1, 1]]", steps="1"
    )
    assert response.json()["kernel_shape"] == [1, 2]


CAMERA = "docs/images/camera.png"


def load_camera() -> tuple[bytes, NDArray[np.float64]]:
    with open(CAMERA, "rb") as file:  # noqa: PTH123 - the equivalent of curl --data-binary @camera.png
        return file.read(), np.asarray(Image.open(CAMERA)).astype(np.float64)


def test_image_edges_match_scipy_scaled_to_their_range(send: SendFn) -> None:
    content, image = load_camera()
    response = post_file(send, content, PNG, PNG, kernel="sobel_x", mode="same", boundary="symmetric")
    edges = scipy.ndimage.sobel(image, axis=1, mode="reflect")
    scaled = 255 * (edges - edges.min()) / (edges.max() - edges.min())
    drawn = read_image(response.content)
    assert (drawn.min(), drawn.max()) == (0, 255)
    assert np.abs(drawn - scaled).max() <= 0.501
    assert json.loads(response.headers["corr2d-result"])["shape"] == list(image.shape)


def test_clipped_image_matches_scipy_from_0_to_255(send: SendFn) -> None:
    content, image = load_camera()
    response = post_file(send, content, PNG, PNG, kernel="sharpen", mode="same", boundary="symmetric", png="clip")
    sharp = scipy.ndimage.correlate(image, [[0, -1, 0], [-1, 5, -1], [0, -1, 0]], mode="reflect")
    assert sharp.min() < 0
    assert sharp.max() > 255
    np.testing.assert_array_equal(read_image(response.content), np.clip(sharp, 0, 255))


def test_colour_planes_are_filtered_separately_scaled_together(send: SendFn, rng: np.random.Generator) -> None:
    planes = rng.integers(0, 256, (3, 31, 47)).astype(np.uint8)
    planes[1] //= 2
    query = {"kernel": "gaussian(1.5)", "mode": "same", "boundary": "symmetric", "dtype": "float64"}
    smooth = np.stack(
        [scipy.ndimage.gaussian_filter(plane, 1.5, mode="reflect") for plane in planes.astype(np.float64)]
    )
    scaled = 255 * (smooth - smooth.min()) / (smooth.max() - smooth.min())
    drawn = read_image(post_file(send, save_image(planes), PNG, PNG, **query).content)
    assert drawn.shape == (3, 31, 47)
    assert np.abs(drawn - scaled).max() <= 0.501
    clipped = read_image(post_file(send, save_image(planes), PNG, PNG, png="clip", **query).content)
    assert np.abs(clipped - smooth).max() <= 0.501


@pytest.mark.parametrize("body", ["npy", "npz", "safetensors", "base64", "nested"])
def test_values_beyond_float32_need_float64(send: SendFn, body: str) -> None:
    content_type, write = BODIES[body]
    array = np.ones((3, 4))
    array[1, 2] = -1e39
    error = assert_first_error(post_file(send, write(array), content_type, kernel="identity"), 422)
    assert error["field"] == "input[1][2]"
    assert "float64" in error["message"]
    assert_identical(
        post_and_decode(send, write(array), content_type, "npy", kernel="identity", dtype="float64"), array
    )


@pytest.mark.parametrize("body", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_match_torch(send: SendFn, body: str, dtype: str, value: float) -> None:
    content_type, write = BODIES[body]
    image = np.arange(42, dtype=dtype).reshape(6, 7)
    image[2, 3] = value
    kernel = np.array([[1, 2], [3, 4]], dtype)
    expected = torch.nn.functional.conv2d(torch.from_numpy(image)[None], torch.from_numpy(kernel)[None, None])[
        0
    ].numpy()
    query = {"kernel": "[[1, 2], [3, 4]]", "dtype": dtype}
    np.testing.assert_array_equal(post_and_decode(send, write(image), content_type, "npy", **query), expected)
    plain = post_file(send, write(image), content_type, **query).json()
    assert plain["nonfinite"] == 4
    nulls = np.array([[number is None for number in row] for row in plain["output"]])
    np.testing.assert_array_equal(nulls, ~np.isfinite(expected))
