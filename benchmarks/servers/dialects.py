"""The problems that are posted, and how each server wants them written: a body out, the right numbers back."""

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
"""Absolute, for outputs up to 3 in float32."""


@dataclass(frozen=True, eq=False)
class ImageProblem:
    """A square image of random numbers from 0 to 1 in all their digits, the same ones every time."""

    side: int

    @cached_property
    def image(self) -> Array:
        """In float64."""
        return np.random.default_rng(self.side).random((self.side, self.side))

    @cached_property
    def picture(self) -> Array:
        """The image in 256 greys."""
        return (self.image * 256).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server speaks a format: where to, what is written, and whether an answer is right."""

    path: str
    write: Callable[[ImageProblem], bytes]
    is_right: Callable[[bytes, ImageProblem], bool]
    media_type: str = JSON


def compute_expected(image: Array) -> Array:
    """The right numbers."""
    output: Array = signal.correlate2d(image, KERNEL, mode="valid")
    return output


def matches_expected(answer: ArrayLike, problem: ImageProblem) -> bool:
    """Whether the array is the problem's answer."""
    output, expected = np.asarray(answer), compute_expected(problem.image)
    return output.shape == expected.shape and np.allclose(output, expected, rtol=0, atol=OUTPUT_TOLERANCE)


# JSON as nested lists.


def write_nested(problem: ImageProblem) -> bytes:
    """Both arrays."""
    return json.dumps({"input": problem.image.tolist(), "kernel": KERNEL.tolist()}).encode()


def nested_dialect(path: str) -> Dialect:
    """As corr2d and most others have it: the answer is an object with an output."""
    return Dialect(path, write_nested, lambda answer, problem: matches_expected(json.loads(answer)["output"], problem))


def rows_dialect(path: str) -> Dialect:
    """The answer is the output itself."""
    return Dialect(path, write_nested, lambda answer, problem: matches_expected(json.loads(answer), problem))


def v2_dialect(path: str) -> Dialect:
    """The open inference protocol, version 2: tensors with names, types, shapes and flat data."""
    return Dialect(path, write_v2, lambda answer, problem: matches_expected(parse_v2(answer), problem))


def write_v2(problem: ImageProblem) -> bytes:
    """Two tensors."""
    arrays = {"input": problem.image, "kernel": KERNEL}
    tensors = [
        {"name": name, "datatype": "FP32", "shape": array.shape, "data": array.ravel().tolist()}
        for name, array in arrays.items()
    ]
    return json.dumps({"inputs": tensors}).encode()


def parse_v2(answer: bytes) -> Array:
    """The first tensor."""
    tensor = json.loads(answer)["outputs"][0]
    return np.reshape(tensor["data"], tensor["shape"])


# The other formats. A body of one array has the kernel in the query.


def base64_dialect(path: str) -> Dialect:
    """JSON with float32's bytes in base64, both ways."""
    return Dialect(
        f"{path}?arrays=base64", write_base64, lambda answer, problem: matches_expected(parse_base64(answer), problem)
    )


def write_base64(problem: ImageProblem) -> bytes:
    """Both arrays."""
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


def parse_base64(answer: bytes) -> Array:
    """The output."""
    output = json.loads(answer)["output"]
    return np.frombuffer(base64.b64decode(output["data"]), output["dtype"]).reshape(output["shape"])


def npy_dialect(path: str) -> Dialect:
    """float32 in the format of np.save, both ways."""
    return Dialect(
        add_kernel_query(path),
        write_npy,
        lambda answer, problem: matches_expected(np.load(io.BytesIO(answer)), problem),
        NPY,
    )


def write_npy(problem: ImageProblem) -> bytes:
    """The image."""
    file = io.BytesIO()
    np.save(file, problem.image.astype(np.float32))
    return file.getvalue()


def png_dialect(path: str) -> Dialect:
    """A grey picture, both ways."""
    return Dialect(add_kernel_query(path), write_png, matches_stretched_image, PNG)


def write_png(problem: ImageProblem) -> bytes:
    """The picture."""
    file = io.BytesIO()
    Image.fromarray(problem.picture).save(file, "PNG")
    return file.getvalue()


def matches_stretched_image(answer: bytes, problem: ImageProblem) -> bool:
    """Whether the picture is the answer, its darkest number black and its brightest white, to half a grey and a bit."""
    expected = compute_expected(problem.picture.astype(np.float64))
    expected -= expected.min()
    if expected.max() > 0:
        expected *= 255 / expected.max()
    shown = np.asarray(Image.open(io.BytesIO(answer)))
    return shown.shape == expected.shape and (expected.size == 1 or np.allclose(shown, expected, rtol=0, atol=0.51))


def add_kernel_query(path: str) -> str:
    """The path with the kernel in its query."""
    return f"{path}?kernel={quote(json.dumps(KERNEL.tolist(), separators=(',', ':')))}"


def echo_dialect(path: str, write: Callable[[ImageProblem], bytes], media_type: str) -> Dialect:
    """The same bytes back."""
    return Dialect(path, write, partial(_matches_sent_bytes, write), media_type)


def _matches_sent_bytes(write: Callable[[ImageProblem], bytes], answer: bytes, problem: ImageProblem) -> bool:
    return answer == write(problem)
