"""The benchmark problems, and the encoding of request and response for each server."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import signal

WireFormat: TypeAlias = Literal["JSON", "base64", "npy", "PNG"]
Array: TypeAlias = NDArray[Any]

KERNEL = np.array([[1.0, 0.0, -1.0]] * 3)

JSON, NPY, PNG = "application/json", "application/x-npy", "image/png"

OUTPUT_TOLERANCE = 1e-5
"""Absolute tolerance, for outputs up to 3 in float32."""


@dataclass(frozen=True, eq=False)
class ImageProblem:
    """A square image of random float64 numbers from 0 to 1; the seed is the side."""

    side: int

    @cached_property
    def image(self) -> Array:
        """The image in float64."""
        return np.random.default_rng(self.side).random((self.side, self.side))

    @cached_property
    def grey_image(self) -> Array:
        """The image in 256 levels of grey, as uint8."""
        return (self.image * 256).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Dialect:
    """A server's dialect of a format: the path, the function that writes a body, and the check of a response."""

    path: str
    write: Callable[[ImageProblem], bytes]
    is_right: Callable[[bytes, ImageProblem], bool]
    media_type: str = JSON


def compute_expected(image: Array) -> Array:
    """Return the correct output."""
    output: Array = signal.correlate2d(image, KERNEL, mode="valid")
    return output


def matches_expected(array: ArrayLike, problem: ImageProblem) -> bool:
    """Return whether the array is the output of the problem."""
    output, expected = np.asarray(array), compute_expected(problem.image)
    return output.shape == expected.shape and np.allclose(output, expected, rtol=0, atol=OUTPUT_TOLERANCE)


# JSON as nested lists.


def write_nested(problem: ImageProblem) -> bytes:
    """Return a body with both arrays as nested lists."""
    return json.dumps({"input": problem.image.tolist(), "kernel": KERNEL.tolist()}).encode()


def nested_dialect(path: str) -> Dialect:
    """Return the dialect of corr2d and most others: the response is an object with an output."""
    return Dialect(
        path, write_nested, lambda content, problem: matches_expected(json.loads(content)["output"], problem)
    )


def rows_dialect(path: str) -> Dialect:
    """Return the dialect in which the response is the output itself."""
    return Dialect(path, write_nested, lambda content, problem: matches_expected(json.loads(content), problem))


def v2_dialect(path: str) -> Dialect:
    """Return the open inference protocol, version 2: tensors with names, types, shapes and flat data."""
    return Dialect(path, write_v2, lambda content, problem: matches_expected(parse_v2(content), problem))


def write_v2(problem: ImageProblem) -> bytes:
    """Return a body with two tensors."""
    arrays = {"input": problem.image, "kernel": KERNEL}
    tensors = [
        {"name": name, "datatype": "FP32", "shape": array.shape, "data": array.ravel().tolist()}
        for name, array in arrays.items()
    ]
    return json.dumps({"inputs": tensors}).encode()


def parse_v2(content: bytes) -> Array:
    """Return the first tensor."""
    tensor = json.loads(content)["outputs"][0]
    return np.reshape(tensor["data"], tensor["shape"])


# The other formats. If the body is one array, the kernel is in the query string.


def base64_dialect(path: str) -> Dialect:
    """Return JSON with float32 bytes in base64, in request and response."""
    return Dialect(
        f"{path}?arrays=base64", write_base64, lambda content, problem: matches_expected(parse_base64(content), problem)
    )


def write_base64(problem: ImageProblem) -> bytes:
    """Return a body with both arrays in base64."""
    arrays = {"input": problem.image, "kernel": KERNEL}
    fields = {
        name: {
            "shape": array.shape,
            "dtype": "float32",
            "data": base64.b64encode(array.astype("<f4").tobytes()).decode(),
        }
        for name, array in arrays.items()
    }
    return json.dumps(fields).encode()


def parse_base64(content: bytes) -> Array:
    """Return the output."""
    output = json.loads(content)["output"]
    return np.frombuffer(base64.b64decode(output["data"]), output["dtype"]).reshape(output["shape"])


def npy_dialect(path: str) -> Dialect:
    """Return float32 in the format of np.save, in request and response."""
    return Dialect(
        add_kernel_query(path),
        write_npy,
        lambda content, problem: matches_expected(np.load(io.BytesIO(content)), problem),
        NPY,
    )


def write_npy(problem: ImageProblem) -> bytes:
    """Return the image as npy."""
    file = io.BytesIO()
    np.save(file, problem.image.astype(np.float32))
    return file.getvalue()


def png_dialect(path: str) -> Dialect:
    """Return a grey PNG image, in request and response."""
    return Dialect(add_kernel_query(path), write_png, matches_stretched_image, PNG)


def write_png(problem: ImageProblem) -> bytes:
    """Return the image as PNG."""
    file = io.BytesIO()
    Image.fromarray(problem.grey_image).save(file, "PNG")
    return file.getvalue()


def matches_stretched_image(content: bytes, problem: ImageProblem) -> bool:
    """Return whether the PNG is the output scaled from its minimum and maximum to 0..255, with a tolerance of 0.51."""
    expected = compute_expected(problem.grey_image.astype(np.float64))
    expected -= expected.min()
    if expected.max() > 0:
        expected *= 255 / expected.max()
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    return pixels.shape == expected.shape and (expected.size == 1 or np.allclose(pixels, expected, rtol=0, atol=0.51))


def add_kernel_query(path: str) -> str:
    """Return the path with the kernel in the query string."""
    return f"{path}?kernel={quote(json.dumps(KERNEL.tolist(), separators=(',', ':')))}"


def echo_dialect(path: str, write: Callable[[ImageProblem], bytes], media_type: str) -> Dialect:
    """Return the dialect in which the response equals the request."""
    return Dialect(path, write, partial(_matches_sent_bytes, write), media_type)


def _matches_sent_bytes(write: Callable[[ImageProblem], bytes], content: bytes, problem: ImageProblem) -> bool:
    return content == write(problem)
