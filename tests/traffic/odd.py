"""Legal requests that would hold up others, were they looked at on the event loop: what they ask for is not small."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tests.files import JSON, NPY, NPZ, PNG, npz, png, saved
from tests.traffic.exchanges import Request

NEVER = "none"
"""A device that is not there: the request is rejected once it has been decoded, and nothing is computed."""


def odd(name: str, path: str, body: bytes, media_type: str = JSON, status: int = 200, **headers: str) -> Request:
    """A POST; header names with _ for -."""
    fields = {"Content-Type": media_type} | {field.replace("_", "-"): value for field, value in headers.items()}
    return Request(name, path, body, fields, status=status)


PATH = f"/correlate?kernel=identity&device={NEVER}"
ZEROS = np.zeros((7500, 7500), np.uint8)


def received() -> Iterator[Request]:
    """What takes long to receive, and to decode."""
    yield odd("50 MB of npy", PATH, saved(ZEROS), NPY, 422)
    yield odd("50 MB in columns", PATH, saved(np.asfortranarray(ZEROS)), NPY, 422)
    yield odd("50 MB of a picture", PATH, png(7500, 7500, bytes(7501 * 7500)), PNG, 422)
    numbers = np.random.default_rng(70).normal(size=(250, 1000))
    body = json.dumps({"input": numbers.tolist(), "kernel": [[1]], "device": NEVER}).encode()
    yield odd("numbers of many digits", "/correlate", body, status=422)


def compressed() -> Iterator[Request]:
    """What becomes large when it is decoded."""
    yield odd("50 MB in an archive", PATH, npz(input=ZEROS), NPZ, 422)
    yield odd("50 MB of gzip", PATH, gzip.compress(saved(ZEROS), 1), NPY, 422, Content_Encoding="gzip")


def fields() -> Iterator[Request]:
    """What takes long to validate, or to negotiate about."""
    body = json.dumps(dict.fromkeys(map(str, range(12_000)), 1)).encode()
    yield odd("12 000 unknown fields", "/correlate", body, status=422)
    good = b'{"input": [[1]], "kernel": [[1]]}'
    for name, count, status in (("the longest Accept", 199, 200), ("63 kB of Accept", 7000, 431)):
        accept = ", ".join(f"a/{number}" for number in range(count)) + ", */*"
        yield odd(name, "/correlate", good, status=status, Accept=accept)


def estimates() -> Iterator[Request]:
    """What takes long to look at before anything is computed."""
    image = [[1.0, 2.0], [3.0, 4.0]]
    for name in ("motion(1023,45)", "log(127)", "gaussian(100,1023)"):
        body = json.dumps({"input": image, "kernel": name, "mode": "same", "device": NEVER}).encode()
        yield odd(name, "/correlate", body, status=422)
        body = json.dumps({"input": image, "kernel": name, "mode": "same", "method": "direct"}).encode()
        yield odd(f"{name}, computed", "/correlate", body)
    kernel = np.ones((1500, 1500))
    yield odd("a large kernel", "/correlate?mode=valid", npz(input=kernel, kernel=kernel), NPZ)
    tiny = {"input": [[[[1, 2]]]] * 20_000, "target": [[[[1]]]] * 20_000, "steps": 1}
    yield odd("a fit to 20 000 images", "/train-kernel", json.dumps(tiny).encode())
    pair = {"input": [[1] * 60] * 60, "target": [[1] * 59] * 59}
    pairs = json.dumps({"pairs": [pair] * 1000, "steps": 1}).encode()
    yield odd("a fit to 1 000 pairs", "/train-kernel", gzip.compress(pairs, 1), Content_Encoding="gzip")


def responses() -> Iterator[Request]:
    """What takes long to encode, to send, or to free."""
    image = saved(np.random.default_rng(70).normal(size=(1500, 1500)).astype(np.float32))
    for accept in (JSON, NPY, NPZ, PNG):
        for coding in ("identity", "gzip", "zstd"):
            yield odd(
                f"1500 x 1500 as {accept}, {coding}",
                "/correlate?kernel=identity",
                image,
                NPY,
                Accept=accept,
                Accept_Encoding=coding,
            )
    fit = {"input": [[1, 2, 4]], "target": [[1, 3]], "steps": 60_000, "learning_rate": 1e-9}
    for accept in (JSON, NPZ, PNG, "image/svg+xml", "application/x-ndjson"):
        yield odd(f"60 000 steps as {accept}", "/train-kernel", json.dumps(fit).encode(), Accept=accept)


ODD: Mapping[str, Callable[[], Sequence[Request]]] = {
    "received": lambda: list(received()),
    "compressed": lambda: list(compressed()),
    "fields": lambda: list(fields()),
    "estimates": lambda: list(estimates()),
    "responses": lambda: list(responses()),
}
