"""Small valid requests that the robustness tests modify: JSON fields, verbatim bodies, and files."""

from typing import Any

import httpx
import numpy as np
import pytest

from tests.robustness.raw_client import build_request_headers
from tests.sample_files import COMPRESS_BY_CODING, JSON, NPY
from tests.servers import SendFn

SMALL_INPUT = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
EXAMPLE_PAIR = {"input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6, "target": [[0, -1, 0, 0, 0, 1, 0]] * 6}
SMALL_IMAGE = np.arange(9, dtype=np.float32).reshape(3, 3)
MEGABYTE = 1_000_000
BODY_LIMIT_BYTES = 64_000_000

SMALL_BODY = b'{"input": [[1, 2], [3, 4]], "kernel": [[1]]}'
LIVEZ_LINE = "GET /livez HTTP/1.1"
SMUGGLED_REQUEST = build_request_headers("GET /kernels HTTP/1.1")

parametrize_codings = pytest.mark.parametrize(
    ("coding", "compress"), COMPRESS_BY_CODING.items(), ids=COMPRESS_BY_CODING
)


def post_correlate(send: SendFn, **changes: Any) -> httpx.Response:
    """Post a small request to /correlate with these fields changed."""
    return send("POST", "/correlate", json={"input": SMALL_INPUT, "kernel": [[1]], **changes})


def post_conv2d(send: SendFn, **changes: Any) -> httpx.Response:
    """Post a small request to /conv2d with these fields changed."""
    return send("POST", "/conv2d", json={"input": SMALL_INPUT, "weight": [[1]], **changes})


def post_train_kernel(send: SendFn, **changes: Any) -> httpx.Response:
    """Post a small request to /train-kernel with these fields changed."""
    return send("POST", "/train-kernel", json={**EXAMPLE_PAIR, **changes})


def post_body(send: SendFn, body: bytes | str, path: str = "/correlate", content_type: str = JSON) -> httpx.Response:
    """Post a verbatim body."""
    return send("POST", path, content=body, headers={"Content-Type": content_type})


def post_file(
    send: SendFn, body: bytes, content_type: str = NPY, coding: str | None = None, query: str = "kernel=identity"
) -> httpx.Response:
    """Post a file, with options in the query string."""
    headers = {"Content-Type": content_type} | ({} if coding is None else {"Content-Encoding": coding})
    return send("POST", f"/correlate?{query}", content=body, headers=headers)
