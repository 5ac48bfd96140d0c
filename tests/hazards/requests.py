"""The requests that hazards are put into: JSON as its fields or as it stands, and files."""

from typing import Any

import httpx
import numpy as np
import pytest

from tests.files import CODERS, JSON, NPY
from tests.serving import Send

ROWS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
PAIR = {"input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6, "target": [[0, -1, 0, 0, 0, 1, 0]] * 6}
IMAGE = np.arange(9, dtype=np.float32).reshape(3, 3)
MEGABYTE = 1_000_000

by_every_coding = pytest.mark.parametrize(("coding", "compress"), CODERS.items(), ids=CODERS)


def correlate(send: Send, **changes: Any) -> httpx.Response:
    """A small request with these fields changed."""
    return send("POST", "/correlate", json={"input": ROWS, "kernel": [[1]], **changes})


def conv2d(send: Send, **changes: Any) -> httpx.Response:
    """Likewise."""
    return send("POST", "/conv2d", json={"input": ROWS, "weight": [[1]], **changes})


def train(send: Send, **changes: Any) -> httpx.Response:
    """Likewise."""
    return send("POST", "/train-kernel", json={**PAIR, **changes})


def post(send: Send, body: bytes | str, path: str = "/correlate", content_type: str = JSON) -> httpx.Response:
    """A body as it stands."""
    return send("POST", path, content=body, headers={"Content-Type": content_type})


def upload(
    send: Send, body: bytes, content_type: str = NPY, coding: str | None = None, query: str = "kernel=identity"
) -> httpx.Response:
    """A file, its options in the query string."""
    headers = {"Content-Type": content_type} | ({} if coding is None else {"Content-Encoding": coding})
    return send("POST", f"/correlate?{query}", content=body, headers=headers)
