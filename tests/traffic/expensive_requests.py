"""Valid requests that would block others if the event loop processed them: they are large or expensive."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tests.sample_files import JSON, NPY, NPZ, PNG, build_png, save_npy, save_npz
from tests.traffic.exchanges import Request

ABSENT_DEVICE = "none"
"""A device that does not exist: the request is rejected after decoding, without a computation."""


def build_request(
    name: str, path: str, body: bytes, media_type: str = JSON, status: int = 200, **headers: str
) -> Request:
    """Return a POST request; `headers` are given with _ for -."""
    fields = {"Content-Type": media_type} | {field.replace("_", "-"): value for field, value in headers.items()}
    return Request(name, path, body, fields, status=status)


REJECTED_PATH = f"/correlate?kernel=identity&device={ABSENT_DEVICE}"
LARGE_ZEROS = np.zeros((7500, 7500), np.uint8)


def large_bodies() -> Iterator[Request]:
    """Yield requests that take long to receive and to decode."""
    yield build_request("50 MB of npy", REJECTED_PATH, save_npy(LARGE_ZEROS), NPY, 422)
    yield build_request("50 MB in columns", REJECTED_PATH, save_npy(np.asfortranarray(LARGE_ZEROS)), NPY, 422)
    yield build_request("50 MB of PNG", REJECTED_PATH, build_png(7500, 7500, bytes(7501 * 7500)), PNG, 422)
    numbers = np.random.default_rng(70).normal(size=(250, 1000))
    body = json.dumps({"input": numbers.tolist(), "kernel": [[1]], "device": ABSENT_DEVICE}).encode()
    yield build_request("numbers of many digits", "/correlate", body, status=422)


def compressed_bodies() -> Iterator[Request]:
    """Yield requests whose bodies are large after decompression."""
    yield build_request("50 MB in an archive", REJECTED_PATH, save_npz(input=LARGE_ZEROS), NPZ, 422)
    yield build_request(
        "50 MB of gzip", REJECTED_PATH, gzip.compress(save_npy(LARGE_ZEROS), 1), NPY, 422, Content_Encoding="gzip"
    )


def many_fields() -> Iterator[Request]:
    """Yield requests that take long to validate or to negotiate."""
    body = json.dumps(dict.fromkeys(map(str, range(12_000)), 1)).encode()
    yield build_request("12 000 unknown fields", "/correlate", body, status=422)
    good = b'{"input": [[1]], "kernel": [[1]]}'
    for name, count, status in (("the longest Accept", 199, 200), ("63 kB of Accept", 7000, 431)):
        accept = ", ".join(f"a/{number}" for number in range(count)) + ", */*"
        yield build_request(name, "/correlate", good, status=status, Accept=accept)


def expensive_estimates() -> Iterator[Request]:
    """Yield requests whose cost takes long to estimate."""
    image = [[1.0, 2.0], [3.0, 4.0]]
    for name in ("motion(1023,45)", "log(127)", "gaussian(100,1023)"):
        body = json.dumps({"input": image, "kernel": name, "mode": "same", "device": ABSENT_DEVICE}).encode()
        yield build_request(name, "/correlate", body, status=422)
        body = json.dumps({"input": image, "kernel": name, "mode": "same", "method": "direct"}).encode()
        yield build_request(f"{name}, computed", "/correlate", body)
    kernel = np.ones((1500, 1500))
    yield build_request("a large kernel", "/correlate?mode=valid", save_npz(input=kernel, kernel=kernel), NPZ)
    tiny = {"input": [[[[1, 2]]]] * 20_000, "target": [[[[1]]]] * 20_000, "steps": 1}
    yield build_request("a fit to 20 000 images", "/train-kernel", json.dumps(tiny).encode())
    pair = {"input": [[1] * 60] * 60, "target": [[1] * 59] * 59}
    pairs = json.dumps({"pairs": [pair] * 1000, "steps": 1}).encode()
    yield build_request("a fit to 1 000 pairs", "/train-kernel", gzip.compress(pairs, 1), Content_Encoding="gzip")


def large_responses() -> Iterator[Request]:
    """Yield requests whose responses take long to encode, to send or to free."""
    image = save_npy(np.random.default_rng(70).normal(size=(1500, 1500)).astype(np.float32))
    for accept in (JSON, NPY, NPZ, PNG):
        for coding in ("identity", "gzip", "zstd"):
            yield build_request(
                f"1500 x 1500 as {accept}, {coding}",
                "/correlate?kernel=identity",
                image,
                NPY,
                Accept=accept,
                Accept_Encoding=coding,
            )
    fit = {"input": [[1, 2, 4]], "target": [[1, 3]], "steps": 60_000, "learning_rate": 1e-9}
    for accept in (JSON, NPZ, PNG, "image/svg+xml", "application/x-ndjson"):
        yield build_request(f"60 000 steps as {accept}", "/train-kernel", json.dumps(fit).encode(), Accept=accept)


EXPENSIVE_REQUESTS: Mapping[str, Callable[[], Sequence[Request]]] = {
    "received": lambda: list(large_bodies()),
    "compressed": lambda: list(compressed_bodies()),
    "fields": lambda: list(many_fields()),
    "estimates": lambda: list(expensive_estimates()),
    "responses": lambda: list(large_responses()),
}
