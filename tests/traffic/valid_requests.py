"""Random valid requests, whose results are checked against independent computations."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from service.codecs.zstandard import zstd
from tests import reference
from tests.sample_files import COMPRESS_BY_CODING, JPEG, JSON, NPY, NPZ, PNG, SAFETENSORS, TIFF, WEBP, save_npy
from tests.traffic.exchanges import Request

Array = NDArray[Any]

MAX_IMAGE_SIDE = 256
"""Largest number of rows and columns of an image; most images are much smaller."""

BOUNDARIES = ("zeros", "replicate", "reflect", "symmetric", "circular")
PADDING_MODES = ("zeros", "replicate", "reflect", "circular")

HTML_PATHS = ("/", "/docs", "/guide", "/guide/formats")


def draw_request(rng: np.random.Generator) -> Request:
    """Draw a request to any endpoint, most often a correlation."""
    kind: Callable[[np.random.Generator], Request] = rng.choice(
        [draw_correlate, draw_conv2d, draw_train_kernel, draw_get_request],  # type: ignore[arg-type]
        p=[0.5, 0.25, 0.15, 0.1],
    )
    return kind(rng)


def draw_correlate(rng: np.random.Generator) -> Request:
    """Draw a correlation of one plane, or of three colour planes, in any format."""
    media_type = choose(rng, JSON, JSON, NPY, NPZ, SAFETENSORS, PNG, JPEG, WEBP, TIFF)
    rows, columns = draw_side(rng), draw_side(rng)
    if media_type in (PNG, JPEG, WEBP, TIFF):
        pixels = rng.integers(0, 256, (rows, columns, 3)[: choose(rng, 2, 3)], np.uint8)
        content = save_image(pixels, media_type)
        shown = np.asarray(Image.open(io.BytesIO(content)))
        image = shown if shown.ndim == 2 else np.moveaxis(shown, 2, 0)
    else:
        image = rng.normal(size=(rows, columns)).astype(np.float32)
        content = b""
    kernel = rng.integers(-3, 4, (int(rng.integers(1, min(rows, 7) + 1)), int(rng.integers(1, min(columns, 7) + 1))))
    mode = choose(rng, "valid", "same", "full")
    boundary = "zeros" if mode == "valid" else choose(rng, *BOUNDARIES)
    options: dict[str, Any] = {"mode": mode, "boundary": boundary}
    arrays = {"input": image, "kernel": kernel.astype(np.float32)}
    body, query = encode_body(rng, media_type, arrays, options, content)

    planes = image[None] if image.ndim == 2 else image
    expected = np.stack(
        [
            reference.correlate_valid_by_windows(
                reference.pad_for_mode(plane.astype(float), kernel.shape, mode, boundary), kernel.astype(float)
            )
            for plane in planes
        ]
    )
    expected = expected.reshape(*image.shape[:-2], *expected.shape[-2:])
    accept = choose(rng, JSON, NPY, NPZ, SAFETENSORS, PNG, JPEG, WEBP, TIFF)
    return build_request(
        rng, "/correlate", media_type, body, query, accept, lambda response: assert_output(response, expected)
    )


def draw_conv2d(rng: np.random.Generator) -> Request:
    """Draw a small layer with all options."""
    media_type = choose(rng, JSON, NPZ, SAFETENSORS)
    groups, depth = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    filters = groups * int(rng.integers(1, 3))
    h, w = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    images = rng.normal(size=(int(rng.integers(1, 3)), groups * depth, 4 + draw_side(rng, 60), 4 + draw_side(rng, 60)))
    weight, bias = rng.normal(size=(filters, depth, h, w)), rng.normal(size=filters)
    stride, padding = int(rng.integers(1, 4)), int(rng.integers(0, 3))
    boundary = choose(rng, *PADDING_MODES)
    options = {"stride": stride, "padding": padding, "groups": groups, "padding_mode": boundary}
    arrays = {name: array.astype(np.float32) for name, array in (("input", images), ("weight", weight), ("bias", bias))}
    body, query = encode_body(rng, media_type, arrays, options)

    sides = (padding, padding)
    bordered = np.stack([[reference.pad(plane, sides, sides, boundary, 0.0) for plane in image] for image in images])
    windows = np.lib.stride_tricks.sliding_window_view(bordered, (h, w), (2, 3))[:, :, ::stride, ::stride]
    per_group = [
        np.einsum("nchwab,ocab->nohw", windows[:, group * depth : (group + 1) * depth], part)
        for group, part in enumerate(np.split(weight, groups))
    ]
    expected = np.concatenate(per_group, 1) + bias[:, None, None]
    accept = choose(rng, JSON, NPY, NPZ, SAFETENSORS)
    return build_request(
        rng, "/conv2d", media_type, body, query, accept, lambda response: assert_output(response, expected)
    )


def draw_train_kernel(rng: np.random.Generator) -> Request:
    """Draw a fit of an image and its correlation with a kernel, by the exact solver or some steps of descent."""
    media_type = choose(rng, JSON, NPZ, SAFETENSORS)
    kernel = rng.normal(size=(int(rng.integers(1, 5)), int(rng.integers(1, 5))))
    image = rng.normal(size=(12 + draw_side(rng, 80), 12 + draw_side(rng, 80)))
    target = reference.correlate_valid_by_windows(image, kernel)
    arrays = {"input": image, "target": target}
    exact = bool(rng.random() < 0.5)
    options: dict[str, Any] = {"solver": "exact"}
    if not exact:
        solver, loss = choose(rng, "sgd", "momentum", "adam"), choose(rng, "sum", "mean", "huber", "l1")
        options = {"solver": solver, "loss": loss, "learning_rate": 1e-4, "steps": 20, "seed": 0}
    body, query = encode_body(rng, media_type, arrays, options)
    forms = (JSON, NPZ, SAFETENSORS, "text/event-stream", "application/x-ndjson", "image/svg+xml", PNG)
    accept = choose(rng, *forms)
    if accept in ("image/svg+xml", PNG):
        beginning = b"\x89PNG" if accept == PNG else b"<"
        return build_request(
            rng,
            "/train-kernel",
            media_type,
            body,
            query,
            accept,
            lambda response: assert_starts_with(response, beginning),
        )
    return build_request(
        rng,
        "/train-kernel",
        media_type,
        body,
        query,
        accept,
        lambda response: assert_kernel(response, kernel) if exact else assert_steps(response, 20),
    )


def draw_get_request(rng: np.random.Generator) -> Request:
    """Draw a GET request."""
    path = choose(rng, "/kernels", "/info", "/livez", "/readyz", "/openapi.json", *HTML_PATHS)
    check_response = assert_starts_with if path in HTML_PATHS else httpx.Response.json
    return Request(f"GET {path}", path, method="GET", check_response=check_response)


PROBE_REQUEST = Request(
    "the next good request",
    "/correlate",
    b'{"input": [[0,1,2],[3,4,5],[6,7,8]], "kernel": [[0,1],[2,3]]}',
    {"Content-Type": JSON},
    check_response=lambda response: assert_output(response, np.array([[19.0, 25.0], [37.0, 43.0]])),
)
"""A small request, which runs inline on the event loop."""


def choose(rng: np.random.Generator, *choices: Any) -> Any:
    """Draw one of the choices."""
    return choices[int(rng.integers(len(choices)))]


def draw_side(rng: np.random.Generator, most: int = MAX_IMAGE_SIDE) -> int:
    """Draw a side from 1 to `most`, with a log-uniform distribution."""
    return round(float(most ** rng.random()))


def encode_body(
    rng: np.random.Generator,
    media_type: str,
    arrays: Mapping[str, Array],
    options: Mapping[str, Any],
    content: bytes = b"",
) -> tuple[bytes, dict[str, str]]:
    """Encode a body; return it with the options that go into the query string."""
    query = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    if media_type == JSON:
        fields = {
            name: encode_json_array(array, choose(rng, "nested", "flat", "base64")) for name, array in arrays.items()
        }
        return json.dumps({**fields, **options}).encode(), {}
    if media_type == NPZ:
        file = io.BytesIO()
        choose(rng, np.savez, np.savez_compressed)(file, **arrays)
        return file.getvalue(), query
    if media_type == SAFETENSORS:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return safetensors.numpy.save(contiguous, metadata=query), {}
    query["kernel"] = json.dumps(arrays["kernel"].tolist())
    return content or save_npy(arrays["input"]), query


def encode_json_array(array: Array, form: str) -> Any:
    """Encode an array as nested lists, or as an object with flat numbers or base64."""
    if form == "nested":
        return array.tolist()
    described: dict[str, Any] = {"shape": array.shape, "dtype": array.dtype.name}
    if form == "flat":
        return {**described, "data": array.ravel().tolist()}
    return {**described, "data": base64.b64encode(array.tobytes()).decode()}


def save_image(pixels: Array, media_type: str) -> bytes:
    """Save pixels with Pillow."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, media_type.removeprefix("image/"))
    return file.getvalue()


def build_request(
    rng: np.random.Generator,
    path: str,
    media_type: str,
    body: bytes,
    query: Mapping[str, str],
    accept: str,
    check_response: Callable[[httpx.Response], object],
) -> Request:
    """Return a request whose body and response may be compressed."""
    headers = {"Content-Type": media_type, "Accept": accept, "Accept-Encoding": choose(rng, "identity", "gzip", "zstd")}
    coding = choose(rng, None, None, *COMPRESS_BY_CODING)
    if coding is not None:
        body, headers["Content-Encoding"] = COMPRESS_BY_CODING[coding](body), coding
    if accept == JSON and rng.random() < 0.5:
        query = {**query, "arrays": choose(rng, "flat", "base64")}
    where = f"{path}?{urlencode(query)}" if query else path
    return Request(f"{path} {media_type} to {accept}", where, body, headers, check_response=check_response)


def decode_content(response: httpx.Response) -> bytes:
    """Decode the content coding; httpx supports zstd only with an additional package."""
    coded = response.headers.get("content-encoding") == "zstd" and response.content[:4] == b"\x28\xb5\x2f\xfd"
    return zstd.decompress(response.content) if coded else response.content


def parse_arrays(response: httpx.Response) -> dict[str, Any]:
    """Return the fields of a response, with numpy arrays."""
    content, media_type = decode_content(response), response.headers["content-type"]
    if media_type == NPY:
        return {"output": np.load(io.BytesIO(content))}
    if media_type == TIFF:
        pages = [np.array(page) for page in ImageSequence.Iterator(Image.open(io.BytesIO(content)))]
        return {"output": np.stack(pages) if len(pages) > 1 else pages[0]}
    if media_type == NPZ:
        return dict(np.load(io.BytesIO(content)))
    if media_type == SAFETENSORS:
        return dict(safetensors.numpy.load(content))
    if media_type == "text/event-stream":
        fields = json.loads(content.rpartition(b"event: result\ndata: ")[2])
    elif media_type == "application/x-ndjson":
        fields = json.loads(content.splitlines()[-1])
    else:
        fields = json.loads(content)
    return {name: decode_json_array(value) if name in ("output", "kernel") else value for name, value in fields.items()}


def decode_json_array(value: Any) -> Array:
    """Decode an array from any of the forms that `encode_json_array` writes."""
    if not isinstance(value, dict):
        return np.array(value)
    data = value["data"]
    flat = np.frombuffer(base64.b64decode(data), value["dtype"]) if isinstance(data, str) else np.array(data)
    return flat.reshape(value["shape"])


def assert_output(response: httpx.Response, expected: Array) -> None:
    """Assert that the output is right to float32 accuracy, in a PNG to half a grey level and a margin.

    Of JPEG and WebP, only the size is checked.
    """
    media_type = response.headers["content-type"]
    if media_type in (JPEG, WEBP):
        # Both are lossy, and WebP has no grey.
        shown = np.asarray(Image.open(io.BytesIO(decode_content(response))))
        assert shown.shape[:2] == expected.shape[-2:]
        return
    if media_type == PNG:
        expected = expected - expected.min()
        if expected.max() > 0:
            expected = expected * (255 / expected.max())
        shown = np.asarray(Image.open(io.BytesIO(decode_content(response))))
        output = shown if shown.ndim == 2 else np.moveaxis(shown, 2, 0)
        if expected.max() == 0:
            expected = output.astype(float)
        np.testing.assert_allclose(output, expected, rtol=0, atol=0.6)
        return
    output = parse_arrays(response)["output"]
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


def assert_kernel(response: httpx.Response, kernel: Array) -> None:
    """Assert that the fit found the kernel that made the target."""
    np.testing.assert_allclose(parse_arrays(response)["kernel"], kernel, rtol=0, atol=1e-3)


def assert_steps(response: httpx.Response, steps: int) -> None:
    """Assert that all steps ran, each with a finite loss."""
    history = np.array(parse_arrays(response)["loss_history"], float)
    assert history.shape == (steps,)
    assert np.isfinite(history).all()


def assert_starts_with(response: httpx.Response, beginning: bytes = b"<!doctype html>") -> None:
    """Assert that the content begins with these bytes."""
    assert decode_content(response).lstrip().startswith(beginning), response.content[:100]
