"""Invalid requests with their expected responses, numbered as in docs/robustness.md."""

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from tests.sample_files import (
    COMPRESS_BY_CODING,
    JPEG,
    JSON,
    NPY,
    NPZ,
    PNG,
    SAFETENSORS,
    build_npy,
    build_png,
    build_safetensors,
    build_tensor_entry,
    build_zip,
    save_npy,
)
from tests.traffic.exchanges import Disconnection, Exchange, MalformedRequest, PipelinedRequests, Request
from tests.traffic.valid_requests import save_image

SMALL_IMAGE = np.arange(9, dtype=np.float32).reshape(3, 3)
EXAMPLE_PAIR = {"input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6, "target": [[0, -1, 0, 0, 0, 1, 0]] * 6}
LONG_FIT_REQUEST = {**EXAMPLE_PAIR, "loss": "huber", "steps": 100_000, "learning_rate": 1e-9}
"""A fit that takes seconds."""

BINARY_PATH = "/correlate?kernel=identity"
OVERSIZED_BYTES = 70_000_000
"""A size over the limit of a body, before and after decoding."""


def build_rejected_request(
    name: str, status: int, body: bytes | str, media_type: str = JSON, path: str = "/correlate", **headers: str
) -> Request:
    """Return a POST request and the status of its rejection; `headers` are given with _ for -."""
    fields = {"Content-Type": media_type} | {field.replace("_", "-"): value for field, value in headers.items()}
    return Request(name, path, body if isinstance(body, bytes) else body.encode(), fields, status=status)


def http_errors() -> Iterator[Request]:
    """Yield robustness cases 17 to 22."""
    for method, path in (("GET", "/correlate"), ("PUT", "/conv2d"), ("DELETE", "/train-kernel"), ("POST", "/livez")):
        yield Request(f"17 {method} {path}", path, method=method, status=405)
    for path in ("/nope", "/correlate/", "/%ff%fe", "/..%2f..%2fetc/passwd", "/" + "x" * 5000):
        yield Request(f"no path {path[:20]}", path, method="GET", status=404)
    good = '{"input": [[1]], "kernel": [[1]]}'
    for media_type in ("text/plain", "multipart/mixed; boundary=x", "image/gif", ";"):
        yield build_rejected_request(f"18 {media_type}", 415, good, media_type)
    for accept in ("text/html", "image/avif", "application/pdf;q=1"):
        yield build_rejected_request(f"19 {accept}", 406, good, Accept=accept)
    for coding in ("br", "compress", "gzip, gzip"):
        yield build_rejected_request(f"20 {coding}", 415, good, Content_Encoding=coding)
    for coding, compress in COMPRESS_BY_CODING.items():
        yield build_rejected_request(
            f"21 {coding} bomb", 413, compress(bytes(OVERSIZED_BYTES)), Content_Encoding=coding
        )
        yield build_rejected_request(
            f"{coding} cut off", 400, compress(save_npy(SMALL_IMAGE))[:-5], NPY, BINARY_PATH, Content_Encoding=coding
        )
        yield build_rejected_request(f"{coding} that is none", 400, good, Content_Encoding=coding)


def invalid_json_bodies() -> Iterator[Request]:
    """Yield robustness cases 23 to 36."""
    for number, text in (
        (23, "NaN"),
        (23, "-Infinity"),
        (24, "1e999"),
        (25, "[" * 100_000),
        (26, "1" * 5000),
        (28, '"\\ud800"'),
    ):
        yield build_rejected_request(f"{number} {text[:9]}", 400, f'{{"input": [[1, {text}]], "kernel": [[1]]}}')
    yield build_rejected_request("24 past float32", 422, '{"input": [[1e39]], "kernel": [[1]]}')
    yield build_rejected_request("27 twice", 422, '{"input": [[1]], "input": [[1]], "kernel": [[1]]}')
    yield build_rejected_request("29 UTF-16", 400, '{"input": [[1]], "kernel": [[1]]}'.encode("utf-16"))
    yield build_rejected_request("29 BOM", 400, b'\xef\xbb\xbf{"input": [[1]], "kernel": [[1]]}')
    for number, value in (
        (30, [[1, 2], [3], [4, 5, 6]]),
        (31, [["x"] * 250] * 200),
        (32, [[1, True]]),
        (32, [["1"]]),
        (32, [[None]]),
        (34, []),
        (34, [[]]),
        (34, 1),
        (35, [[1], [[2]]]),
        (36, {"shape": [2, 3], "dtype": "float32", "data": [1, 2]}),
        (36, {"shape": [1, 1], "dtype": "float32", "data": "*"}),
        (36, {"shape": [1, 1], "dtype": "float31", "data": [1]}),
        (38, {"shape": [50_000, 50_000], "dtype": "float32", "data": []}),
        (40, {"shape": [-1, True], "dtype": "float32", "data": [1]}),
    ):
        yield build_rejected_request(f"{number} {str(value)[:30]}", 422, json.dumps({"input": value, "kernel": [[1]]}))
    yield build_rejected_request("33 near miss", 422, '{"input": [[1]], "kernel": [[1]], "bondary": "reflect"}')
    yield build_rejected_request("31 unknown fields", 422, json.dumps({f"field_{number}": 1 for number in range(500)}))
    yield build_rejected_request("34 nothing", 400, b"")
    yield build_rejected_request("34 not an object", 422, "[]")


def invalid_binary_bodies() -> Iterator[Request]:
    """Yield robustness cases 37 to 46."""
    plain, pixels = save_npy(SMALL_IMAGE), np.arange(300, dtype=np.uint8).reshape(20, 15)
    files: Sequence[tuple[str, int, str, bytes]] = (
        ("37 objects", 422, NPY, build_npy("(1,)", b"\x80\x04N.", descr="'|O'")),
        ("38 no data", 413, NPY, build_npy("(50000, 50000)")),
        ("38 no data", 413, NPZ, build_zip(("input.npy", build_npy("(50000, 50000)")))),
        (
            "38 no data",
            413,
            SAFETENSORS,
            build_safetensors({"input": build_tensor_entry([50_000, 50_000], 0, 4 * 50_000**2)}),
        ),
        ("39 overflow", 413, NPY, build_npy(f"({2**32}, {2**32})", bytes(16))),
        (
            "39 overflow",
            413,
            SAFETENSORS,
            build_safetensors({"input": build_tensor_entry([2**62, 4], 0, 16)}, bytes(16)),
        ),
        ("40 negative", 400, NPY, build_npy("(-3, -3)", bytes(36))),
        ("40 booleans", 400, NPY, build_npy("(True, True)", bytes(4))),
        ("40 65 dimensions", 422, NPY, build_npy(str((1,) * 65), bytes(4))),
        ("40 nothing by much", 422, NPY, build_npy(f"(0, {2**62})")),
        ("41 a long header", 400, NPY, b"\x93NUMPY\x02\x00" + struct.pack("<I", 60_000) + b" " * 60_000),
        ("41 a header of 4 GB", 400, NPY, b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 99),
        ("42 a zip", 400, NPY, build_zip(("input.npy", plain))),
        ("42 a bomb", 413, NPZ, build_zip(("input.npy", save_npy(np.zeros((8750, 8000), np.uint8))))),
        ("42 ../", 400, NPZ, build_zip(("../input.npy", plain))),
        ("42 twice", 400, NPZ, build_zip(("input.npy", plain), ("input.npy", plain))),
        ("43 trailing", 400, NPY, plain + b"\x00"),
        ("44 complex", 422, NPY, save_npy(np.ones((3, 3), np.complex64))),
        ("44 named fields", 422, NPY, save_npy(np.ones((3, 3), [("x", "<f4"), ("y", "<f4")]))),
        ("45 2^63", 400, SAFETENSORS, build_safetensors({"input": build_tensor_entry([1], 0, 4)}, bytes(4), 2**63)),
        (
            "45 an overlap",
            400,
            SAFETENSORS,
            build_safetensors(
                {"input": build_tensor_entry([1], 0, 4), "kernel": build_tensor_entry([1], 0, 4)}, bytes(4)
            ),
        ),
        ("45 a hole", 400, SAFETENSORS, build_safetensors({"input": build_tensor_entry([1, 1], 4, 8)}, bytes(8))),
        ("45 BF16", 422, SAFETENSORS, build_safetensors({"input": build_tensor_entry([1, 1], 0, 2, "BF16")}, bytes(2))),
        ("46 a bomb", 413, PNG, build_png(50_000, 50_000, bytes(50_000))),
        ("46 pixels missing", 400, PNG, build_png(1000, 1000, bytes(100))),
        ("46 cut off", 400, PNG, save_image(pixels, PNG)[:-30]),
        ("46 cut off", 400, JPEG, save_image(pixels, JPEG)[:-100]),
        ("46 a JPEG", 400, PNG, save_image(pixels, JPEG)),
        ("noise", 400, NPZ, bytes(5000)),
        ("noise", 400, JPEG, b"\xff" * 500),
    )
    for name, status, media_type, body in files:
        yield build_rejected_request(f"{name} as {media_type}", status, body, media_type, BINARY_PATH)


def invalid_computations() -> Iterator[Request]:
    """Yield robustness cases 47 to 49 and 55 to 57."""
    image = SMALL_IMAGE.tolist()
    yield build_rejected_request("47 a kernel too large", 422, json.dumps({"input": image, "kernel": [[1] * 5] * 5}))
    yield build_rejected_request("47 a kernel of nothing", 422, json.dumps({"input": image, "kernel": [[]]}))
    yield build_rejected_request("57 no device", 422, json.dumps({"input": image, "kernel": [[1]], "device": "cuda:7"}))
    yield build_rejected_request("no kernel of that name", 422, json.dumps({"input": image, "kernel": "gaussain(2)"}))
    options: Sequence[tuple[str, Any]] = (
        ("stride", 0),
        ("padding", -1),
        ("dilation", 0),
        ("dilation", "wide"),
        ("groups", 2),
        ("bias", [1, 2]),
    )
    for option, value in options:
        body = json.dumps({"input": image, "weight": [[1]], option: value})
        yield build_rejected_request(f"48 {option} {value}", 422, body, path="/conv2d")
    body = json.dumps({"input": image, "weight": [[1]], "padding": 10**9})
    yield build_rejected_request("48 padding of a billion", 413, body, path="/conv2d")
    costly = f"/correlate?kernel={quote('gaussian(200, 1001)')}&mode=full&method=direct"
    yield build_rejected_request("49 tiny and costly", 413, save_npy(np.ones((1000, 1000), np.uint8)), NPY, costly)
    for option, value in (
        ("steps", 0),
        ("steps", 10**9),
        ("learning_rate", -1),
        ("seed", 2**63),
        ("target", [[1] * 9]),
    ):
        body = json.dumps({**EXAMPLE_PAIR, option: value})
        yield build_rejected_request(f"55 {option} {str(value)[:20]}", 422, body, path="/train-kernel")
    diverging = json.dumps({**EXAMPLE_PAIR, "learning_rate": 1e30}).encode()
    yield Request("55 a rate of 1e30", "/train-kernel", diverging, {"Content-Type": JSON})
    nothing = json.dumps({**EXAMPLE_PAIR, "input": [[0] * 8] * 6, "solver": "exact"}).encode()
    yield Request("56 zeros", "/train-kernel", nothing, {"Content-Type": JSON})


def build_request_headers(*lines: str, path: str = "/correlate") -> bytes:
    """Return the request line and headers of a JSON POST."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: corr2d", f"Content-Type: {JSON}", *lines, "", ""]).encode()


def malformed_http() -> Iterator[Exchange]:
    """Yield robustness cases 5 to 16."""
    get, declared = b"GET /livez HTTP/1.1\r\nHost: corr2d\r\n", "Content-Length: 10000000000"
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(10_000))
    chunks, small = b"1\r\n \r\n" * 300_000, b"GET /livez HTTP/1.1\r\nHost: corr2d\r\n\r\n"
    yield MalformedRequest(
        "5 a header of 1 MB", get + b"X: " + b"x" * 1_000_000 + b"\r\n\r\n", (400, 431), may_be_truncated=True
    )
    yield MalformedRequest("6 ten thousand headers", get + many + b"\r\n", (400, 431), may_be_truncated=True)
    yield MalformedRequest(
        "7 a URL of 200 kB", b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n", (400, 414), may_be_truncated=True
    )
    yield MalformedRequest(
        "8 two lengths", build_request_headers("Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n\r\n", (400,)
    )
    yield MalformedRequest(
        "9 a length twice", build_request_headers("Content-Length: 3", "Content-Length: 4") + b"[1]", (400,)
    )
    yield MalformedRequest("9 a negative length", build_request_headers("Content-Length: -1"), (400,))
    yield MalformedRequest("10 a length of 30 digits", build_request_headers("Content-Length: " + "9" * 30), (400, 413))
    yield MalformedRequest("11 10 GB", build_request_headers(declared), (413,))
    yield MalformedRequest(
        "12 10 GB with Expect: 100-continue", build_request_headers(declared, "Expect: 100-continue"), (413,)
    )
    yield MalformedRequest(
        "13 small chunks",
        build_request_headers("Transfer-Encoding: chunked") + chunks,
        (400, 413),
        may_be_truncated=True,
    )
    yield MalformedRequest(
        "14 a chunk of z bytes", build_request_headers("Transfer-Encoding: chunked") + b"z\r\n", (400,)
    )
    yield MalformedRequest("15 TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), (400,))
    yield MalformedRequest("not HTTP", b"what is this\r\n\r\n", (400,))
    yield MalformedRequest("unsupported HTTP version", small.replace(b"HTTP/1.1", b"HTTP/9.9"), (400, 505))
    yield PipelinedRequests("16 a hundred at once", "/livez", 100)


def disconnections() -> Iterator[Disconnection]:
    """Yield robustness case 53 and disconnections at every earlier point of a request."""
    long = json.dumps(LONG_FIT_REQUEST).encode()
    waits = build_request_headers(f"Content-Length: {len(long)}", path="/train-kernel") + long
    streams = (
        build_request_headers(f"Content-Length: {len(long)}", "Accept: text/event-stream", path="/train-kernel") + long
    )
    yield Disconnection("disconnects at once", b"")
    yield Disconnection("disconnects in the header", build_request_headers("Content-Length: 999")[:60])
    yield Disconnection("disconnects in the body", build_request_headers("Content-Length: 999") + b'{"input": [[1, 2')
    yield Disconnection(
        "disconnects in a large body",
        build_request_headers("Content-Length: 40000000") + b'{"input": [[' + b"1, " * 30_000,
    )
    yield Disconnection(
        "resets the connection in the body", build_request_headers("Content-Length: 999") + b'{"input"', reset=True
    )
    yield Disconnection("53 disconnects during the computation", waits, seconds=0.05)
    yield Disconnection("53 resets the connection during the computation", waits, seconds=0.05, reset=True)
    yield Disconnection("53 disconnects from a stream", streams, until=b"event: step")
    yield Disconnection("53 disconnects from a stream at its beginning", streams, until=b"HTTP/1.1 200")


INVALID_REQUESTS: Sequence[Exchange] = (
    *http_errors(),
    *invalid_json_bodies(),
    *invalid_binary_bodies(),
    *invalid_computations(),
    *malformed_http(),
    *disconnections(),
)
