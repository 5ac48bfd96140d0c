"""Tests of arrays in every format, sent to and returned by the whole service, against the formats' own libraries."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

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
from tests.problem_details import assert_first_error, assert_problem
from tests.sample_files import JPEG, JSON, NPY, NPZ, PNG, SAFETENSORS, save_npy, save_npz
from tests.servers import SendFn

Array = NDArray[Any]
Fields = dict[str, Any]

MAX_EXACT_INTEGER = 2**53
"""The largest integer up to which float64 represents every integer."""


def encode_flat(array: Array) -> Fields:
    return {"shape": array.shape, "dtype": array.dtype.name, "data": array.ravel().tolist()}


def encode_base64(array: Array) -> Fields:
    little = array.astype(array.dtype.newbyteorder("<"))
    return {"shape": array.shape, "dtype": array.dtype.name, "data": base64.b64encode(little.tobytes()).decode()}


def decode_array(described: Fields) -> Array:
    data = described["data"]
    dtype = np.dtype(described["dtype"])
    if isinstance(data, str):
        return np.frombuffer(base64.b64decode(data), dtype.newbyteorder("<")).reshape(described["shape"])
    return np.array(data, dtype).reshape(described["shape"])


def save_stored_npz(**named: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **named)
    return buffer.getvalue()


def save_image(array: Array, form: str = "png") -> bytes:
    """Save an image with Pillow, which needs colours last."""
    buffer = io.BytesIO()
    Image.fromarray(array if array.ndim == 2 else np.moveaxis(array, 0, 2)).save(buffer, form)
    return buffer.getvalue()


def read_image(content: bytes) -> Array:
    lines = np.asarray(Image.open(io.BytesIO(content)))
    return lines if lines.ndim == 2 else np.moveaxis(lines, 2, 0)


BODIES: dict[str, tuple[str, Callable[[Array], bytes]]] = {
    "nested": (JSON, lambda array: json.dumps({"input": array.tolist()}).encode()),
    "flat": (JSON, lambda array: json.dumps({"input": encode_flat(array)}).encode()),
    "base64": (JSON, lambda array: json.dumps({"input": encode_base64(array)}).encode()),
    "npy": (NPY, save_npy),
    "npy in columns": (NPY, lambda array: save_npy(np.asfortranarray(array))),
    "npy, big-endian": (NPY, lambda array: save_npy(array.astype(array.dtype.newbyteorder(">")))),
    "npz": (NPZ, lambda array: save_stored_npz(input=array)),
    "compressed npz": (NPZ, lambda array: save_npz(input=array)),
    "safetensors": (SAFETENSORS, lambda array: safetensors.numpy.save({"input": np.ascontiguousarray(array)})),
}
"""Formats of an input: the media type, and a function that writes it with the format's own library."""

RESPONSES: dict[str, tuple[str, str, Callable[[bytes], Array]]] = {
    "nested": (JSON, "nested", lambda content: np.array(json.loads(content)["output"], json.loads(content)["dtype"])),
    "flat": (JSON, "flat", lambda content: decode_array(json.loads(content)["output"])),
    "base64": (JSON, "base64", lambda content: decode_array(json.loads(content)["output"])),
    "npy": (NPY, "nested", lambda content: np.asarray(np.load(io.BytesIO(content)))),
    "npz": (NPZ, "nested", lambda content: np.asarray(np.load(io.BytesIO(content))["output"])),
    "safetensors": (SAFETENSORS, "nested", lambda content: safetensors.numpy.load(content)["output"]),
}
"""Formats of a response: the media type, the form of arrays in JSON, and a reader from the format's own library."""

ENDPOINTS: dict[str, dict[str, str]] = {
    "/correlate": {"kernel": "identity"},
    "/conv2d": {"weight": "[[1]]"},
    "/train-kernel": {"target": "[[1]]"},
}
"""Arrays and options that each endpoint requires in addition to its input."""


def post_file(
    send: SendFn, body: bytes, content_type: str, accept: str = JSON, path: str = "/correlate", **query: str
) -> Any:
    headers = {"Content-Type": content_type, "Accept": accept}
    return send("POST", path, content=body, headers=headers, params=query)


def post_and_decode(
    send: SendFn, body: bytes, content_type: str, response_format: str, path: str = "/correlate", **query: str
) -> Array:
    """Post a body and return the output, decoded by the format's own library."""
    media_type, form, read = RESPONSES[response_format]
    response = post_file(send, body, content_type, media_type, path, arrays=form, **query)
    assert response.status_code == 200, response.text[:1000]
    assert response.headers["content-type"] == media_type
    return read(response.content)


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


def test_torch_metadata_is_not_an_option(send: SendFn) -> None:
    content = safetensors.numpy.save({"input": np.ones((2, 2))}, metadata={"format": "pt"})
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


D2L_PAIR = {
    "input": np.array([[1, 1, 0, 0, 0, 0, 1, 1]] * 6, np.float32),
    "target": np.array([[0, -1, 0, 0, 0, 1, 0]] * 6, np.float32),
}


@pytest.mark.parametrize("bias", ["false", "true"])
def test_fitted_kernel_is_returned_in_every_format(send: SendFn, bias: str) -> None:
    query = {"seed": "1", "steps": "5", "learning_rate": "0.01", "bias": bias}

    def learned(accept: str) -> httpx.Response:
        response: httpx.Response = post_file(send, save_stored_npz(**D2L_PAIR), NPZ, accept, "/train-kernel", **query)
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


def test_nonfinite_output_is_not_an_image(send: SendFn) -> None:
    problem = assert_problem(post_file(send, save_npy(np.array([[np.nan, 1]])), NPY, PNG, kernel="identity"), 406)
    assert "not finite" in problem["detail"]
    assert "application/x-npy" in problem["detail"]


@pytest.mark.parametrize("accept", [NPY, NPZ, SAFETENSORS, PNG])
@pytest.mark.parametrize("explain", ["false", "true"])
def test_binary_responses_put_other_fields_in_a_header(send: SendFn, accept: str, explain: str) -> None:
    query = {"kernel": "box(3)", "dtype": "float64", "explain": explain}
    image = save_npy(np.arange(30.0).reshape(5, 6))
    header = post_file(send, image, NPY, accept, **query).headers["corr2d-result"]
    assert header.isascii()
    assert header.isprintable()
    metadata = json.loads(header)
    plain = post_file(send, image, NPY, JSON, **query).json()
    assert (metadata["shape"], metadata["dtype"], metadata["device"]) == ([3, 4], "float64", "cpu")
    assert set(metadata) == set(plain) - {"output"}
    assert metadata["engine"] == plain["engine"]
    assert ("explanation" in metadata) == (explain == "true")
    if explain == "true":
        assert metadata["engine"] in metadata["explanation"]["predicted_ms"]


@pytest.mark.parametrize("accept", [NPY, NPZ, SAFETENSORS])
def test_nonfinite_count_in_the_header_matches_json(send: SendFn, accept: str) -> None:
    image = save_npy(np.array([[np.nan, 1], [np.inf, 2]]))
    metadata = json.loads(post_file(send, image, NPY, accept, kernel="identity").headers["corr2d-result"])
    assert metadata["nonfinite"] == post_file(send, image, NPY, JSON, kernel="identity").json()["nonfinite"] == 2


def test_long_history_is_in_the_archive_not_the_header(send: SendFn) -> None:
    query = {"steps": "2000", "seed": "1", "learning_rate": "0.001"}
    response = post_file(send, save_stored_npz(**D2L_PAIR), NPZ, NPZ, "/train-kernel", **query)
    assert len(response.headers["corr2d-result"]) < 5000
    assert "loss_history" not in json.loads(response.headers["corr2d-result"])
    assert np.load(io.BytesIO(response.content))["loss_history"].shape == (2000,)


def test_json_has_no_result_header(send: SendFn) -> None:
    assert "corr2d-result" not in post_file(send, save_npy(np.ones((2, 2))), NPY, kernel="identity").headers
