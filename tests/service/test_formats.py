"""Arrays in every format, there and back through the whole service, against the formats' own libraries."""

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

from service.codecs.layout import DTYPES
from tests.files import JPEG, JSON, NPY, NPZ, PNG, SAFETENSORS, npz, saved
from tests.problem import first_error, problem_of
from tests.serving import Send

Array = NDArray[Any]
Fields = dict[str, Any]

EXACT = 2**53
"""Up to here every integer is a float64."""


def flat(array: Array) -> Fields:
    return {"shape": array.shape, "dtype": array.dtype.name, "data": array.ravel().tolist()}


def packed(array: Array) -> Fields:
    little = array.astype(array.dtype.newbyteorder("<"))
    return {"shape": array.shape, "dtype": array.dtype.name, "data": base64.b64encode(little.tobytes()).decode()}


def unpacked(described: Fields) -> Array:
    data = described["data"]
    dtype = np.dtype(described["dtype"])
    if isinstance(data, str):
        return np.frombuffer(base64.b64decode(data), dtype.newbyteorder("<")).reshape(described["shape"])
    return np.array(data, dtype).reshape(described["shape"])


def npz_stored(**named: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **named)
    return buffer.getvalue()


def picture(array: Array, form: str = "png") -> bytes:
    """By Pillow, which keeps colours last."""
    buffer = io.BytesIO()
    Image.fromarray(array if array.ndim == 2 else np.moveaxis(array, 0, 2)).save(buffer, form)
    return buffer.getvalue()


def pixels(content: bytes) -> Array:
    lines = np.asarray(Image.open(io.BytesIO(content)))
    return lines if lines.ndim == 2 else np.moveaxis(lines, 2, 0)


BODIES: dict[str, tuple[str, Callable[[Array], bytes]]] = {
    "nested": (JSON, lambda array: json.dumps({"input": array.tolist()}).encode()),
    "flat": (JSON, lambda array: json.dumps({"input": flat(array)}).encode()),
    "base64": (JSON, lambda array: json.dumps({"input": packed(array)}).encode()),
    "npy": (NPY, saved),
    "npy in columns": (NPY, lambda array: saved(np.asfortranarray(array))),
    "npy, big-endian": (NPY, lambda array: saved(array.astype(array.dtype.newbyteorder(">")))),
    "npz": (NPZ, lambda array: npz_stored(input=array)),
    "compressed npz": (NPZ, lambda array: npz(input=array)),
    "safetensors": (SAFETENSORS, lambda array: safetensors.numpy.save({"input": np.ascontiguousarray(array)})),
}
"""How an input is sent: the media type, and its own library's writer."""

ANSWERS: dict[str, tuple[str, str, Callable[[bytes], Array]]] = {
    "nested": (JSON, "nested", lambda content: np.array(json.loads(content)["output"], json.loads(content)["dtype"])),
    "flat": (JSON, "flat", lambda content: unpacked(json.loads(content)["output"])),
    "base64": (JSON, "base64", lambda content: unpacked(json.loads(content)["output"])),
    "npy": (NPY, "nested", lambda content: np.asarray(np.load(io.BytesIO(content)))),
    "npz": (NPZ, "nested", lambda content: np.asarray(np.load(io.BytesIO(content))["output"])),
    "safetensors": (SAFETENSORS, "nested", lambda content: safetensors.numpy.load(content)["output"]),
}
"""How an output comes back: the media type, the form of arrays in JSON, and its own library's reader."""

ENDPOINTS: dict[str, dict[str, str]] = {
    "/correlate": {"kernel": "identity"},
    "/conv2d": {"weight": "[[1]]"},
    "/train-kernel": {"target": "[[1]]"},
}
"""What each needs beside its input."""


def post(send: Send, body: bytes, content_type: str, accept: str = JSON, path: str = "/correlate", **query: str) -> Any:
    headers = {"Content-Type": content_type, "Accept": accept}
    return send("POST", path, content=body, headers=headers, params=query)


def answered(send: Send, body: bytes, content_type: str, answer: str, path: str = "/correlate", **query: str) -> Array:
    """The output, read by the format's own library."""
    media_type, form, read = ANSWERS[answer]
    response = post(send, body, content_type, media_type, path, arrays=form, **query)
    assert response.status_code == 200, response.text[:1000]
    assert response.headers["content-type"] == media_type
    return read(response.content)


def representable(dtype: str) -> st.SearchStrategy[Array]:
    """Arrays of values that float64 holds too, of any finite bits; no -0.0, which a sum that begins with 0.0 loses."""
    kind = np.dtype(dtype)
    shapes = array_shapes(min_dims=2, max_dims=4, max_side=5)
    if kind.kind == "f":
        bits = arrays(np.dtype(f"u{kind.itemsize}"), shapes).map(lambda array: array.view(kind))
        return bits.map(lambda array: np.where(np.isfinite(array), array, 1).astype(kind) + kind.type(0))
    limits = np.iinfo(kind)
    least, most = max(-EXACT, int(limits.min)), min(EXACT, int(limits.max))
    return arrays(kind, shapes, elements=st.integers(least, most))


def assert_identical(output: Array, expected: Array) -> None:
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape
    assert output.tobytes() == expected.tobytes()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=4)
@given(data=st.data())
def test_an_array_of_any_dtype_comes_back_bit_for_bit_in_every_format(
    sent_in_process: Send, body: str, dtype: str, data: st.DataObject
) -> None:
    array = data.draw(representable(dtype))
    content_type, write = BODIES[body]
    for answer in ANSWERS:
        output = answered(sent_in_process, write(array), content_type, answer, kernel="identity", dtype="float64")
        assert_identical(output, array.astype(np.float64))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int16", "uint8", "uint16"])
@settings(max_examples=3)
@given(data=st.data())
def test_what_float32_holds_comes_back_bit_for_bit_without_asking(
    sent_in_process: Send, body: str, dtype: str, data: st.DataObject
) -> None:
    array = data.draw(representable(dtype))
    content_type, write = BODIES[body]
    for answer in ANSWERS:
        output = answered(sent_in_process, write(array), content_type, answer, kernel="identity")
        assert_identical(output, array.astype(np.float32))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_large_arrays_come_back_bit_for_bit(
    sent_to_a_port: Send, body: str, answer: str, rng: np.random.Generator
) -> None:
    array = rng.normal(size=(3, 130, 101))
    content_type, write = BODIES[body]
    output = answered(sent_to_a_port, write(array), content_type, answer, kernel="identity", dtype="float64")
    assert_identical(output, array)


@pytest.mark.parametrize("answer", ANSWERS)
@settings(max_examples=12)
@given(data=st.data())
def test_pictures_come_back_pixel_for_pixel(sent_in_process: Send, answer: str, data: st.DataObject) -> None:
    sides = st.tuples(st.integers(1, 20), st.integers(1, 20))
    shape = data.draw(st.one_of(sides, sides.map(lambda side: (3, *side))))
    array = data.draw(arrays(np.uint8, shape))
    assert_identical(
        answered(sent_in_process, picture(array), PNG, answer, kernel="identity"), array.astype(np.float32)
    )
    clipped = post(sent_in_process, picture(array), PNG, PNG, kernel="identity", png="clip")
    assert clipped.headers["content-type"] == PNG
    assert_identical(pixels(clipped.content), array)


@pytest.mark.parametrize("body", BODIES)
def test_any_format_becomes_a_picture(send: Send, body: str, rng: np.random.Generator) -> None:
    content_type, write = BODIES[body]
    for shape in ((7, 9), (3, 7, 9), (1, 3, 7, 9)):
        array = rng.integers(0, 256, shape).astype(np.uint8)
        response = post(send, write(array), content_type, PNG, kernel="identity", png="clip")
        np.testing.assert_array_equal(pixels(response.content), array[0] if len(shape) == 4 else array)


def test_a_jpeg_is_what_pillow_sees_in_it(send: Send, rng: np.random.Generator) -> None:
    for shape in ((20, 30), (3, 20, 30)):
        content = picture(rng.integers(0, 256, shape).astype(np.uint8), "jpeg")
        np.testing.assert_array_equal(answered(send, content, JPEG, "npy", kernel="identity"), pixels(content))


def test_a_picture_of_16_bits_keeps_them(send: Send, rng: np.random.Generator) -> None:
    array = rng.integers(0, 2**16, (9, 7)).astype(np.uint16)
    np.testing.assert_array_equal(answered(send, picture(array), PNG, "npy", kernel="identity"), array)


SINGLE_NUMBERS: dict[str, tuple[str, bytes]] = {
    "nested": (JSON, b'{"input": 5}'),
    "flat": (JSON, b'{"input": {"shape": [], "dtype": "float32", "data": [5]}}'),
    "base64": (JSON, json.dumps({"input": packed(np.array(5.0))}).encode()),
    "npy": (NPY, saved(np.array(5.0))),
    "npz": (NPZ, npz_stored(input=np.array(5.0))),
    "safetensors": (SAFETENSORS, safetensors.numpy.save({"input": np.array(5.0)})),
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(("content_type", "body"), SINGLE_NUMBERS.values(), ids=SINGLE_NUMBERS)
def test_a_single_number_is_no_input(sent_in_process: Send, path: str, content_type: str, body: bytes) -> None:
    response = post(sent_in_process, body, content_type, path=path, **ENDPOINTS[path])
    assert first_error(response, 422)["field"].startswith("input")


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_an_empty_array_is_no_input(sent_in_process: Send, path: str, body: str, shape: tuple[int, ...]) -> None:
    content_type, write = BODIES[body]
    response = post(sent_in_process, write(np.empty(shape)), content_type, path=path, **ENDPOINTS[path])
    assert first_error(response, 422)["field"].startswith("input")


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("array", [np.empty((0, 1, 1, 1)), np.array(5.0)])
def test_other_arrays_are_not_empty_either(sent_in_process: Send, name: str, array: Array) -> None:
    named = {"input": np.ones((1, 3, 3)), "weight": np.ones((1, 1, 1, 1)), name: array}
    for content_type, content in ((NPZ, npz_stored(**named)), (SAFETENSORS, safetensors.numpy.save(named))):
        assert first_error(post(sent_in_process, content, content_type, path="/conv2d"), 422)["field"] == name


@pytest.mark.parametrize("body", BODIES)
def test_a_line_of_numbers_is_no_input(sent_in_process: Send, body: str) -> None:
    content_type, write = BODIES[body]
    error = first_error(post(sent_in_process, write(np.ones(3)), content_type, kernel="identity"), 422)
    assert error["field"] == "input"
    assert "1 dimension" in error["message"]


def layer(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    shapes = {"input": (2, 4, 9, 8), "weight": (6, 2, 3, 2), "bias": (6,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


OPTIONS: dict[str, str] = {"stride": "[2, 1]", "padding": "1", "dilation": "2", "groups": "2"}


def torchs_answer(named: dict[str, NDArray[np.float32]]) -> Array:
    input, weight, bias = (torch.from_numpy(named[name]) for name in ("input", "weight", "bias"))
    output: Array = torch.nn.functional.conv2d(input, weight, bias, (2, 1), (1, 1), (2, 2), 2).numpy()
    return output


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("save", [npz_stored, npz])
def test_a_layer_in_an_npz_is_torchs(
    send: Send, answer: str, save: Callable[..., bytes], rng: np.random.Generator
) -> None:
    named = layer(rng)
    output = answered(send, save(**named), NPZ, answer, "/conv2d", **OPTIONS)
    np.testing.assert_allclose(output, torchs_answer(named), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_metadata", [[], ["groups"], ["stride", "dilation"], list(OPTIONS)])
def test_the_options_of_safetensors_come_in_its_metadata_or_in_the_query_string(
    send: Send, in_metadata: list[str], rng: np.random.Generator
) -> None:
    named = layer(rng)
    content = safetensors.numpy.save(named, metadata={name: OPTIONS[name] for name in in_metadata})
    query = {name: value for name, value in OPTIONS.items() if name not in in_metadata}
    output = answered(send, content, SAFETENSORS, "safetensors", "/conv2d", **query)
    np.testing.assert_allclose(output, torchs_answer(named), rtol=1e-5, atol=1e-5)


def test_words_and_numbers_of_metadata_are_options_of_every_endpoint(send: Send, rng: np.random.Generator) -> None:
    image = rng.normal(size=(6, 7)).astype(np.float32)
    metadata = {
        "kernel": "gaussian(1.0)",
        "mode": "same",
        "boundary": "constant",
        "fill_value": "0.5",
        "dtype": "float64",
        "explain": "true",
    }
    response = post(send, safetensors.numpy.save({"input": image}, metadata=metadata), SAFETENSORS)
    assert response.status_code == 200, response.text
    expected = scipy.ndimage.gaussian_filter(image.astype(np.float64), 1.0, mode="constant", cval=0.5)
    np.testing.assert_allclose(response.json()["output"], expected, rtol=1e-9)
    assert "explanation" in response.json()
    pair = {"input": image, "target": image}
    metadata = {"kernel_size": "1", "steps": "3", "learning_rate": "0.001", "seed": "1", "bias": "true"}
    learned = post(send, safetensors.numpy.save(pair, metadata=metadata), SAFETENSORS, path="/train-kernel").json()
    assert (learned["steps"], learned["learning_rate"], learned["seed"]) == (3, 0.001, 1)
    assert len(learned["bias"]) == 1


def test_what_torch_writes_into_metadata_is_no_option(send: Send) -> None:
    content = safetensors.numpy.save({"input": np.ones((2, 2))}, metadata={"format": "pt"})
    assert post(send, content, SAFETENSORS, kernel="identity").json()["output"] == [[1, 1], [1, 1]]


def test_an_option_in_metadata_and_in_the_query_string_is_refused(send: Send) -> None:
    content = safetensors.numpy.save({"input": np.ones((2, 2))}, metadata={"mode": "same"})
    error = first_error(post(send, content, SAFETENSORS, kernel="identity", mode="same"), 422)
    assert error["field"] == "mode"
    assert "in the body and in the query string" in error["message"]


@pytest.mark.parametrize(
    ("content_type", "write"), [(NPZ, npz), (SAFETENSORS, lambda **named: safetensors.numpy.save(named))]
)
def test_an_array_that_no_field_takes_is_refused_with_the_name_it_is_near(
    send: Send, content_type: str, write: Callable[..., bytes]
) -> None:
    content = write(input=np.ones((2, 2)), wieght=np.ones((1, 1)))
    error = first_error(post(send, content, content_type, path="/conv2d"), 422)
    assert error["field"] == "wieght"
    assert 'did you mean "weight"?' in error["message"]
    assert first_error(post(send, write(input=np.ones((2, 2))), content_type, path="/conv2d"), 422)["field"] == "weight"


def test_an_archive_of_the_lessons_names_is_taken(send: Send) -> None:
    content = npz_stored(X=np.arange(9.0).reshape(3, 3), K=np.arange(4.0).reshape(2, 2))
    np.testing.assert_array_equal(answered(send, content, NPZ, "npy"), [[19, 25], [37, 43]])


EDGES = {
    "input": np.array([[1, 1, 0, 0, 0, 0, 1, 1]] * 6, np.float32),
    "target": np.array([[0, -1, 0, 0, 0, 1, 0]] * 6, np.float32),
}


@pytest.mark.parametrize("bias", ["false", "true"])
def test_a_learned_kernel_comes_in_every_format(send: Send, bias: str) -> None:
    query = {"seed": "1", "steps": "5", "learning_rate": "0.01", "bias": bias}

    def learned(accept: str) -> httpx.Response:
        response: httpx.Response = post(send, npz_stored(**EDGES), NPZ, accept, "/train-kernel", **query)
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
    said = json.loads(learned(NPZ).headers["corr2d-result"])
    without = {name: value for name, value in plain.items() if name not in names}
    assert {name: said[name] for name in without} == without


def test_one_array_and_a_query_string_are_enough_to_learn(send: Send) -> None:
    response = post(send, saved(np.ones((2, 3))), NPY, path="/train-kernel", target="[[1, 1], [1, 1]]", steps="1")
    assert response.json()["kernel_shape"] == [1, 2]


CAMERA = "docs/images/camera.png"


def camera() -> tuple[bytes, NDArray[np.float64]]:
    with open(CAMERA, "rb") as file:  # noqa: PTH123 - as curl --data-binary @camera.png
        return file.read(), np.asarray(Image.open(CAMERA)).astype(np.float64)


def test_a_pictures_edges_are_scipys_scaled_from_their_own_minimum_and_maximum(send: Send) -> None:
    content, image = camera()
    response = post(send, content, PNG, PNG, kernel="sobel_x", mode="same", boundary="symmetric")
    edges = scipy.ndimage.sobel(image, axis=1, mode="reflect")
    scaled = 255 * (edges - edges.min()) / (edges.max() - edges.min())
    drawn = pixels(response.content)
    assert (drawn.min(), drawn.max()) == (0, 255)
    assert np.abs(drawn - scaled).max() <= 0.501
    assert json.loads(response.headers["corr2d-result"])["shape"] == list(image.shape)


def test_a_picture_that_is_clipped_is_scipys_between_0_and_255(send: Send) -> None:
    content, image = camera()
    response = post(send, content, PNG, PNG, kernel="sharpen", mode="same", boundary="symmetric", png="clip")
    sharp = scipy.ndimage.correlate(image, [[0, -1, 0], [-1, 5, -1], [0, -1, 0]], mode="reflect")
    assert sharp.min() < 0
    assert sharp.max() > 255
    np.testing.assert_array_equal(pixels(response.content), np.clip(sharp, 0, 255))


def test_colour_planes_are_filtered_apart_and_scaled_together(send: Send, rng: np.random.Generator) -> None:
    planes = rng.integers(0, 256, (3, 31, 47)).astype(np.uint8)
    planes[1] //= 2
    query = {"kernel": "gaussian(1.5)", "mode": "same", "boundary": "symmetric", "dtype": "float64"}
    smooth = np.stack(
        [scipy.ndimage.gaussian_filter(plane, 1.5, mode="reflect") for plane in planes.astype(np.float64)]
    )
    scaled = 255 * (smooth - smooth.min()) / (smooth.max() - smooth.min())
    drawn = pixels(post(send, picture(planes), PNG, PNG, **query).content)
    assert drawn.shape == (3, 31, 47)
    assert np.abs(drawn - scaled).max() <= 0.501
    clipped = pixels(post(send, picture(planes), PNG, PNG, png="clip", **query).content)
    assert np.abs(clipped - smooth).max() <= 0.501


@pytest.mark.parametrize("body", ["npy", "npz", "safetensors", "base64", "nested"])
def test_values_past_float32_are_refused_with_their_place_unless_float64_is_asked_for(send: Send, body: str) -> None:
    content_type, write = BODIES[body]
    array = np.ones((3, 4))
    array[1, 2] = -1e39
    error = first_error(post(send, write(array), content_type, kernel="identity"), 422)
    assert error["field"] == "input[1][2]"
    assert "float64" in error["message"]
    assert_identical(answered(send, write(array), content_type, "npy", kernel="identity", dtype="float64"), array)


@pytest.mark.parametrize("body", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_carried_as_by_torch(send: Send, body: str, dtype: str, value: float) -> None:
    content_type, write = BODIES[body]
    image = np.arange(42, dtype=dtype).reshape(6, 7)
    image[2, 3] = value
    kernel = np.array([[1, 2], [3, 4]], dtype)
    expected = torch.nn.functional.conv2d(torch.from_numpy(image)[None], torch.from_numpy(kernel)[None, None])[
        0
    ].numpy()
    query = {"kernel": "[[1, 2], [3, 4]]", "dtype": dtype}
    np.testing.assert_array_equal(answered(send, write(image), content_type, "npy", **query), expected)
    plain = post(send, write(image), content_type, **query).json()
    assert plain["nonfinite"] == 4
    nulls = np.array([[number is None for number in row] for row in plain["output"]])
    np.testing.assert_array_equal(nulls, ~np.isfinite(expected))


def test_what_is_not_finite_is_no_picture(send: Send) -> None:
    problem = problem_of(post(send, saved(np.array([[np.nan, 1]])), NPY, PNG, kernel="identity"), 406)
    assert "not finite" in problem["detail"]
    assert "application/x-npy" in problem["detail"]


@pytest.mark.parametrize("accept", [NPY, NPZ, SAFETENSORS, PNG])
@pytest.mark.parametrize("explain", ["false", "true"])
def test_what_a_binary_answer_has_no_room_for_stands_in_a_header(send: Send, accept: str, explain: str) -> None:
    query = {"kernel": "box(3)", "dtype": "float64", "explain": explain}
    image = saved(np.arange(30.0).reshape(5, 6))
    header = post(send, image, NPY, accept, **query).headers["corr2d-result"]
    assert header.isascii()
    assert header.isprintable()
    said = json.loads(header)
    plain = post(send, image, NPY, JSON, **query).json()
    assert (said["shape"], said["dtype"], said["device"]) == ([3, 4], "float64", "cpu")
    assert set(said) == set(plain) - {"output"}
    assert said["engine"] == plain["engine"]
    assert ("explanation" in said) == (explain == "true")
    if explain == "true":
        assert said["engine"] in said["explanation"]["predicted_ms"]


@pytest.mark.parametrize("accept", [NPY, NPZ, SAFETENSORS])
def test_how_many_values_are_not_finite_stands_in_the_header_as_in_json(send: Send, accept: str) -> None:
    image = saved(np.array([[np.nan, 1], [np.inf, 2]]))
    said = json.loads(post(send, image, NPY, accept, kernel="identity").headers["corr2d-result"])
    assert said["nonfinite"] == post(send, image, NPY, JSON, kernel="identity").json()["nonfinite"] == 2


def test_a_long_history_is_left_out_of_the_header_and_stands_in_the_archive(send: Send) -> None:
    query = {"steps": "2000", "seed": "1", "learning_rate": "0.001"}
    response = post(send, npz_stored(**EDGES), NPZ, NPZ, "/train-kernel", **query)
    assert len(response.headers["corr2d-result"]) < 5000
    assert "loss_history" not in json.loads(response.headers["corr2d-result"])
    assert np.load(io.BytesIO(response.content))["loss_history"].shape == (2000,)


def test_json_has_no_result_header(send: Send) -> None:
    assert "corr2d-result" not in post(send, saved(np.ones((2, 2))), NPY, kernel="identity").headers
