"""Formats of bodies and responses, written and read by the formats' own libraries."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image

from tests.sample_files import JSON, NPY, NPZ, SAFETENSORS, save_npy, save_npz
from tests.servers import SendFn

Array = NDArray[Any]
Fields = dict[str, Any]


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


FIT_ARRAYS = {
    "input": np.array([[1, 1, 0, 0, 0, 0, 1, 1]] * 6, np.float32),
    "target": np.array([[0, -1, 0, 0, 0, 1, 0]] * 6, np.float32),
}
