"""Bad binary and compressed bodies, by the numbers of the project's list of hazards; the next request works."""

import gzip
import io
import json
import pickle
import socket
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import safetensors.numpy
from backports import zstd
from PIL import Image

from service.codecs.content_coding import MAX_MEMBERS
from tests.problem import first_error, problem_of
from tests.serving import Send

JSON = "application/json"
NPY = "application/x-npy"
NPZ = "application/x-npz"
SAFETENSORS = "application/x-safetensors"
PNG = "image/png"
JPEG = "image/jpeg"

IMAGE = np.arange(9, dtype=np.float32).reshape(3, 3)
LIMIT = 64_000_000
MEGABYTE = 1_000_000


@pytest.fixture(autouse=True)
def the_next_request_works(send: Send) -> Iterator[None]:
    yield
    answer = post(send, saved(IMAGE))
    assert answer.json()["output"] == IMAGE.tolist()


def post(
    send: Send, body: bytes, content_type: str = NPY, coding: str | None = None, query: str = "kernel=identity"
) -> httpx.Response:
    headers = {"Content-Type": content_type} | ({} if coding is None else {"Content-Encoding": coding})
    return send("POST", f"/correlate?{query}", content=body, headers=headers)


def detail_of(response: httpx.Response, status: int) -> str:
    detail: str = problem_of(response, status)["detail"]
    return detail


def saved(array: np.ndarray[Any, Any], *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def npy(shape: str, data: bytes = b"", *, descr: str = "'<f4'", fortran_order: str = "False") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n".encode("latin-1")
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + data


def npz(**named: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **named)
    return buffer.getvalue()


def zipped(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def chunk(kind: bytes, said: bytes = b"") -> bytes:
    return struct.pack(">I", len(said)) + kind + said + struct.pack(">I", zlib.crc32(kind + said))


def png(width: int, height: int, lines: bytes, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND")


def picture(mode: str = "L", form: str = "png") -> bytes:
    pixels = np.random.default_rng(46).integers(0, 256, (12, 10, 4)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGBA" if mode in ("LA", "RGBA") else "RGB").convert(mode).save(buffer, form)
    return buffer.getvalue()


def grown(call: Callable[[], object]) -> int:
    """The bytes that this process allocates for a call, the server's thread included, at most at one time."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def refused_at_no_cost(send: Send, status: int, body: bytes, content_type: str = NPY) -> str:
    """The detail of a refusal for which next to nothing is allocated, and which comes at once."""
    details: list[str] = []
    start = time.perf_counter()
    assert grown(lambda: details.append(detail_of(post(send, body, content_type), status))) < MEGABYTE + 4 * len(body)
    assert time.perf_counter() - start < 2
    return details[0]


UNPICKLED: list[str] = []


class Trap:
    """What leaves a trace where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return UNPICKLED.append, ("unpickled",)


def test_37_objects_are_never_unpickled(send: Send) -> None:
    trap = np.array([[Trap()]], dtype=object)
    for body, content_type in ((saved(trap, allow_pickle=True), NPY), (npz(input=trap), NPZ)):
        error = first_error(post(send, body, content_type), 422)
        assert error["field"] == "input"
        assert "never unpickled" in error["message"]
    assert "not a .npy file" in detail_of(post(send, pickle.dumps(trap)), 400)
    assert UNPICKLED == []


@pytest.mark.parametrize("side", [50_000, 10**9])
def test_38_a_shape_without_data_allocates_nothing(send: Send, side: int) -> None:
    shape, size = [side, side], 4 * side**2
    sent = {
        NPY: npy(f"({side}, {side})"),
        NPZ: zipped(("input.npy", npy(f"({side}, {side})"))),
        SAFETENSORS: tensors({"input": tensor(shape, 0, size)}),
    }
    for content_type, body in sent.items():
        assert "CORR2D_MAX_BODY_MB" in refused_at_no_cost(send, 413, body, content_type)
    described = {"input": {"shape": shape, "dtype": "float32", "data": []}}
    assert "needs 2500000000" in refused_at_no_cost(send, 422, json.dumps(described).encode(), JSON) or side > 50_000


def test_38_a_shape_within_the_limit_without_data_allocates_nothing(send: Send) -> None:
    sent = {
        NPY: npy("(4000, 4000)"),
        NPZ: zipped(("input.npy", npy("(4000, 4000)"))),
        SAFETENSORS: tensors({"input": tensor([4000, 4000], 0, LIMIT)}),
    }
    for content_type, body in sent.items():
        refused_at_no_cost(send, 400, body, content_type)
    described = {"input": {"shape": [4000, 4000], "dtype": "float32", "data": "AAAA"}}
    refused_at_no_cost(send, 422, json.dumps(described).encode(), JSON)


@pytest.mark.parametrize("sides", [(2**32, 2**32), (2**62, 4), (2**31, 2**31, 2**31), (3037000500, 3037000500)])
def test_39_products_that_overflow_allocate_nothing(send: Send, sides: tuple[int, ...]) -> None:
    refused_at_no_cost(send, 413, npy(str(sides), bytes(16)))
    refused_at_no_cost(send, 413, zipped(("input.npy", npy(str(sides), bytes(16)))), NPZ)
    refused_at_no_cost(send, 413, tensors({"input": tensor(list(sides), 0, 16)}, bytes(16)), SAFETENSORS)
    described = {"input": {"shape": sides, "dtype": "float32", "data": [1, 2]}}
    refused_at_no_cost(send, 422, json.dumps(described).encode(), JSON)


@pytest.mark.parametrize(
    "shape", ["(-3, -3)", "(-1, 3)", "(True, True)", "(3.0, 3)", "(9)", "3", "(3, None)", "(1e9,)"]
)
def test_40_shapes_that_are_none(send: Send, shape: str) -> None:
    assert "header" in detail_of(post(send, npy(shape, bytes(36))), 400)


@pytest.mark.parametrize("sides", [[-3, -3], [True, True], [3.0, 3], ["3", 3], [None], [2**63 * 1.0]])
def test_40_shapes_of_tensors_that_are_none(send: Send, sides: list[Any]) -> None:
    detail_of(post(send, tensors({"input": tensor(sides, 0, 36)}, bytes(36)), SAFETENSORS), 400)
    described = {"input": {"shape": sides, "dtype": "float32", "data": [1] * 9}, "kernel": [[1]]}
    assert first_error(post(send, json.dumps(described).encode(), JSON, query=""), 422)["field"] == "input.shape"


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((1,) * 65, "65 dimensions"),
        ((1,) * 1000, "1000 dimensions"),
        ((0, 2**62), "no values"),
        ((2**62, 0), "no values"),
        ((0,), "no values"),
        ((), "a single number"),
    ],
)
def test_40_too_many_sides_and_sides_of_nothing(send: Send, sides: tuple[int, ...], message: str) -> None:
    data = bytes(4 * int(np.prod(sides, dtype=object)))
    assert message in refused_at_no_cost(send, 422, npy(str(sides), data))
    assert message in refused_at_no_cost(send, 422, zipped(("input.npy", npy(str(sides), data))), NPZ)
    sent = tensors({"input": tensor(list(sides), 0, len(data))}, data)
    assert message in refused_at_no_cost(send, 422, sent, SAFETENSORS)


@pytest.mark.parametrize("length", [60_000, 2**32 - 1])
@pytest.mark.parametrize("there", [0, 60_000])
def test_41_long_headers_are_refused_by_their_length(send: Send, length: int, there: int) -> None:
    body = b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + b" " * there
    assert f"header of {length:,} bytes" in refused_at_no_cost(send, 400, body)
    assert "header of" in refused_at_no_cost(send, 400, zipped(("input.npy", body)), NPZ)


def test_41_a_header_is_never_evaluated(send: Send) -> None:
    for text in (b"__import__('os').abort()", b"(" * 9000, b"{'descr': " * 900, b"-" * 9000 + b"1", bytes(500)):
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
        assert "header" in detail_of(post(send, body), 400)


@pytest.mark.parametrize("send", ["sent_to_a_port"], indirect=True)
def test_41_a_body_takes_no_more_memory_than_has_come_of_it(address: str) -> None:
    url = urlsplit(address)
    head = f"POST /correlate HTTP/1.1\r\nHost: corr2d\r\nContent-Type: {NPY}\r\nContent-Length: 60000000\r\n\r\n"

    def declare_much_and_send_little() -> None:
        connections = [socket.create_connection((url.hostname, url.port), timeout=5) for _ in range(4)]
        for connection in connections:
            connection.sendall(head.encode() + b"\x93NUMPY")
        time.sleep(0.2)
        for connection in connections:
            connection.close()

    assert grown(declare_much_and_send_little) < 4 * MEGABYTE


@pytest.mark.parametrize(
    ("content_type", "body", "advice"),
    [
        (NPY, npz(input=IMAGE), "application/x-npz"),
        (NPZ, saved(IMAGE), "application/x-npy"),
        (SAFETENSORS, saved(IMAGE), "application/x-npy"),
        (SAFETENSORS, npz(input=IMAGE), "application/x-npz"),
        (NPY, picture(), "image/png"),
        (JPEG, picture(), "image/png"),
        (PNG, picture(form="jpeg"), "image/jpeg"),
        (NPY, b'{"input": [[1]]}', "application/json"),
        (PNG, b'{"input": [[1]], "kernel": [[1]]}', "application/json"),
        (NPY, gzip.compress(saved(IMAGE)), "gzip"),
        (PNG, picture(form="gif"), "GIF"),
        (PNG, picture(form="webp"), "WebP"),
        (JPEG, picture(form="tiff"), "TIFF"),
    ],
)
def test_42_46_a_format_that_is_called_another_is_named(
    send: Send, content_type: str, body: bytes, advice: str
) -> None:
    detail = detail_of(post(send, body, content_type), 400)
    assert "begins like" in detail
    assert advice in detail


@pytest.mark.parametrize("content_type", [JSON, NPY, NPZ, SAFETENSORS, PNG, JPEG])
@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff" * 100, bytes(5000)])
def test_42_bodies_of_nothing_and_noise(send: Send, content_type: str, body: bytes) -> None:
    detail = detail_of(post(send, body, content_type), 400)
    assert body or "empty" in detail


def test_42_a_bomb_in_an_archive_stops_at_the_limit(send: Send) -> None:
    bomb = npz(input=np.zeros((8100, 8000), np.uint8))
    assert len(bomb) < MEGABYTE
    assert "64,800,128 bytes" in refused_at_no_cost(send, 413, bomb, NPZ)
    many = zipped(*((f"array_{number}.npy", saved(np.zeros((1100, 1000), np.uint8))) for number in range(60)))
    assert "CORR2D_MAX_BODY_MB" in refused_at_no_cost(send, 413, many, NPZ)


def test_42_a_bomb_that_lies_about_its_size_stops_at_the_size_it_gives(send: Send) -> None:
    bomb = bytearray(zipped(("input.npy", saved(np.zeros((9000, 9000), np.uint8)))))
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", bomb, bomb.index(signature) + at, 1000)
    assert "damaged" in refused_at_no_cost(send, 400, bytes(bomb), NPZ)


@pytest.mark.parametrize(
    "name", ["../input.npy", "/input.npy", "folder/input.npy", "..\\input.npy", "input", "input.txt", ".npy", "a\n.npy"]
)
def test_42_entries_are_plain_names(send: Send, name: str) -> None:
    body = zipped(("input.npy", saved(IMAGE)), (name, saved(IMAGE)))
    assert "plain names" in detail_of(post(send, body, NPZ), 400)


def test_42_entries_come_once(send: Send) -> None:
    body = zipped(("input.npy", saved(IMAGE)), ("input.npy", saved(IMAGE)))
    assert "two entries" in detail_of(post(send, body, NPZ), 400)
    many = zipped(*((f"array_{number}.npy", saved(IMAGE)) for number in range(65)))
    assert "65 entries" in detail_of(post(send, many, NPZ), 400)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (NPY, saved(IMAGE)),
        (NPZ, npz(input=IMAGE)),
        (SAFETENSORS, safetensors.numpy.save({"input": IMAGE})),
        (PNG, picture()),
        (JSON, b'{"input": [[1]], "kernel": [[1]]}'),
    ],
)
@pytest.mark.parametrize("more", [b"\x00", b"PK\x05\x06", b"x" * 1000])
def test_43_trailing_bytes_are_refused(send: Send, content_type: str, body: bytes, more: bytes) -> None:
    query = "" if content_type == JSON else "kernel=identity"
    assert post(send, body, content_type, query=query).status_code == 200
    detail_of(post(send, body + more, content_type, query=query), 400)


@pytest.mark.parametrize(
    "array",
    [
        IMAGE.astype(">f4"),
        np.asfortranarray(IMAGE),
        np.asfortranarray(IMAGE.astype(">f8")),
        IMAGE.astype(np.float16),
        IMAGE.astype(">i2"),
        IMAGE.astype(np.uint64),
        IMAGE[::-1, ::-1],
    ],
)
def test_44_byte_orders_layouts_and_float16_are_converted(send: Send, array: np.ndarray[Any, Any]) -> None:
    assert post(send, saved(array)).json()["output"] == array.tolist()
    assert post(send, npz(input=array), NPZ).json()["output"] == array.tolist()


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.ones((3, 3), np.complex64), "complex"),
        (np.ones((3, 3), [("x", "<f4"), ("y", "<f4")]), "named fields"),
        (np.ones((3, 3), np.bool_), "boolean"),
        (np.full((3, 3), "text"), "text"),
        (np.full((3, 3), b"text"), "byte strings"),
        (np.ones((3, 3), "M8[s]"), "dates"),
        (np.ones((3, 3), "m8[s]"), "durations"),
        (np.ones((3, 3), np.longdouble), "size that other machines do not have"),
        (np.ones((3, 3), "V8"), "raw bytes"),
    ],
)
def test_44_what_is_no_plain_real_number_is_refused(send: Send, array: np.ndarray[Any, Any], kind: str) -> None:
    for body, content_type in ((saved(array), NPY), (npz(input=array), NPZ)):
        error = first_error(post(send, body, content_type), 422)
        assert error["field"] == "input"
        assert kind in error["message"]


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 300_000])
def test_45_a_header_of_any_length_allocates_nothing(send: Send, length: int) -> None:
    body = tensors({"input": tensor([1], 0, 4)}, bytes(4), length=length)
    assert f"{length:,} bytes" in refused_at_no_cost(send, 400, body, SAFETENSORS)


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"input": tensor([3, 3], 0, 36), "kernel": tensor([1, 1], 32, 36)}, 36, "overlaps"),
        ({"input": tensor([3, 3], 0, 36), "kernel": tensor([3, 3], 0, 36)}, 36, "overlaps"),
        ({"input": tensor([3, 3], 4, 40)}, 40, "hole"),
        ({"input": tensor([3, 3], 0, 36), "kernel": tensor([1, 1], 40, 44)}, 44, "hole"),
        ({"input": tensor([3, 3], 0, 36)}, 37, "37 follow"),
        ({"input": tensor([3, 3], 0, 36)}, 35, "35 follow"),
        ({"input": tensor([3, 3], 0, 35)}, 35, "has 36 bytes"),
        ({"input": tensor([3, 3], 36, 0)}, 36, "has 36 bytes"),
        ({"input": tensor([3, 3], -36, 0)}, 36, "integers from 0 on"),
        ({"input": {**tensor([3, 3], 0, 36), "more": 1}}, 36, "is not an object of"),
        ({"input": []}, 0, "is not an object of"),
        ([], 0, "not a JSON object"),
        (b'{"input": NaN}', 0, "not JSON"),
        (b"{" * 5000, 0, "not JSON"),
        (b'{"input": 1, "input": 1}', 0, "twice"),
        (json.dumps({"input": tensor([3, 3], 0, 36)})[:-1].encode() + b', "input": {}}', 36, "twice"),
        ({f"array_{number}": tensor([1], 4 * number, 4 * number + 4) for number in range(257)}, 1028, "257 tensors"),
        ({"__metadata__": {"mode": 1}, "input": tensor([3, 3], 0, 36)}, 36, "object of strings"),
    ],
)
def test_45_a_header_names_every_byte_once(send: Send, header: object, size: int, message: str) -> None:
    assert message in detail_of(post(send, tensors(header, bytes(size)), SAFETENSORS), 400)


@pytest.mark.parametrize("dtype", ["BF16", "BOOL", "F8_E4M3", "C64", "f32", "", "F" * 5000])
def test_45_other_dtypes_are_refused_with_those_that_are_taken(send: Send, dtype: str) -> None:
    error = first_error(post(send, tensors({"input": tensor([1, 1], 0, 2, dtype)}, bytes(2)), SAFETENSORS), 422)
    assert error["field"] == "input"
    assert "float32" in error["limit"]


@pytest.mark.parametrize(
    ("width", "height"), [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (1, 2**31 - 1)]
)
def test_46_a_bomb_is_refused_by_its_header(send: Send, width: int, height: int) -> None:
    assert f"{width} x {height}" in refused_at_no_cost(send, 413, png(width, height, bytes(50_000)), PNG)
    jpeg = bytearray(picture(form="jpeg"))
    if max(width, height) < 2**16:
        struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, height, width)
        assert f"{width} x {height}" in refused_at_no_cost(send, 413, bytes(jpeg), JPEG)


def test_46_pixels_that_are_not_there_allocate_nothing(send: Send) -> None:
    assert "damaged" in refused_at_no_cost(send, 400, png(7000, 7000, bytes(100)), PNG)
    assert "damaged" in refused_at_no_cost(send, 400, png(10, 10, bytes(10**7)), PNG)


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_46_a_picture_that_is_cut_off_is_refused(send: Send, form: str) -> None:
    whole = picture("RGB", form)
    for share in (0.2, 0.5, 0.8, 0.99):
        detail_of(post(send, whole[: int(share * len(whole))], f"image/{form}"), 400)


def test_46_a_damaged_picture_is_refused(send: Send) -> None:
    for at in range(8, len(picture()), 7):
        damaged = bytearray(picture())
        damaged[at] ^= 255
        detail_of(post(send, bytes(damaged), PNG), 400)


@pytest.mark.parametrize(
    ("mode", "shape"),
    [("L", [12, 10]), ("LA", [12, 10]), ("P", [3, 12, 10]), ("RGB", [3, 12, 10]), ("RGBA", [3, 12, 10])],
)
def test_46_palettes_are_resolved_and_alpha_is_dropped(send: Send, mode: str, shape: list[int]) -> None:
    answer = post(send, picture(mode), PNG).json()
    assert answer["shape"] == shape
    flattened = Image.open(io.BytesIO(picture(mode))).convert("L" if len(shape) == 2 else "RGB")
    expected = np.asarray(flattened)
    np.testing.assert_array_equal(answer["output"], expected if len(shape) == 2 else np.moveaxis(expected, 2, 0))


def test_46_16_bits_are_kept_where_the_picture_is_grey(send: Send) -> None:
    lines = b"\0" + struct.pack(">3H", 0, 256, 65535) + b"\0" + struct.pack(">3H", 1, 2, 3)
    assert post(send, png(3, 2, lines, depth=16), PNG).json()["output"] == [[0, 256, 65535], [1, 2, 3]]
    colours = b"\0" + struct.pack(">3H", 0, 0x8000, 65535)
    assert post(send, png(1, 1, colours, depth=16, colour=2), PNG).json()["output"] == [[[0]], [[128]], [[255]]]


CODERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}

by_every_coding = pytest.mark.parametrize(("coding", "compress"), CODERS.items(), ids=CODERS)


@by_every_coding
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (NPY, saved(IMAGE)),
        (NPZ, npz(input=IMAGE)),
        (SAFETENSORS, safetensors.numpy.save({"input": IMAGE})),
        (JSON, json.dumps({"input": IMAGE.tolist()}).encode()),
        (JSON, json.dumps({"input": IMAGE.tolist()}).encode() + b" " * 100_000),
    ],
)
def test_20_a_compressed_body_is_what_it_was(
    send: Send, coding: str, compress: Callable[[bytes], bytes], content_type: str, body: bytes
) -> None:
    for name in (coding, coding.upper(), f" {coding}"[1:]):
        assert post(send, compress(body), content_type, name).json()["output"] == IMAGE.tolist()
    assert post(send, picture(), PNG, None).json() == post(send, compress(picture()), PNG, coding).json()


@pytest.mark.parametrize("coding", ["identity", "", "Identity"])
def test_20_no_coding_is_one_too(send: Send, coding: str) -> None:
    assert post(send, saved(IMAGE), coding=coding).status_code == 200


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, gzip", "gzip, identity", "zstd;q=1", "x" * 3000, "\xff"])
def test_20_an_unknown_content_coding_is_415_and_names_what_is_served(send: Send, coding: str) -> None:
    headers = {b"Content-Type": NPY.encode(), b"Content-Encoding": coding.encode("latin-1")}
    response: Any = send("POST", "/correlate?kernel=identity", content=saved(IMAGE), headers=headers)
    assert "gzip, deflate, zstd" in problem_of(response, 415)["detail"]
    assert response.headers["accept-encoding"] == "gzip, deflate, zstd"


@cache
def bomb_of(coding: str) -> bytes:
    """Nothing but zeros, nearly five times as many as there may be."""
    return CODERS[coding](bytes(300_000_000))


@pytest.mark.parametrize("coding", CODERS)
def test_21_a_bomb_is_413_at_the_limit_and_quickly(send: Send, coding: str) -> None:
    bomb = bomb_of(coding)
    assert len(bomb) < MEGABYTE
    for content_type in (NPY, JSON, PNG):
        start = time.perf_counter()
        detail = detail_of(post(send, bomb, content_type, coding), 413)
        assert time.perf_counter() - start < 3
        assert "64,000,000 bytes" in detail
        assert "CORR2D_MAX_BODY_MB" in detail
    assert grown(lambda: post(send, bomb, NPY, coding)) < 1.5 * LIMIT


@by_every_coding
def test_21_the_limit_is_on_what_comes_out_of_both(send: Send, coding: str, compress: Callable[[bytes], bytes]) -> None:
    nested = compress(npz(input=np.zeros((8100, 8000), np.uint8)))
    assert "64,800,128 bytes" in detail_of(post(send, nested, NPZ, coding), 413)


@by_every_coding
def test_a_compressed_body_that_is_cut_off_or_damaged_is_400(
    send: Send, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(saved(np.random.default_rng(1).normal(size=(30, 30))))
    for end in (1, 2, len(whole) // 2, len(whole) - 1):
        assert coding in detail_of(post(send, whole[:end], coding=coding), 400)
    for body in (b"", b"\x00", saved(IMAGE), whole[::-1], b"\x1f\x8b" + bytes(100)):
        assert coding in detail_of(post(send, body, coding=coding), 400)
    for at in range(0, len(whole), len(whole) // 10):
        damaged = bytearray(whole)
        damaged[at] ^= 255
        assert post(send, bytes(damaged), coding=coding).status_code in (200, 400, 413, 422)


@by_every_coding
def test_43_bytes_behind_a_compressed_body_are_refused(
    send: Send, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    for more in (b"\x00", b"more", bytes(1000)):
        assert coding in detail_of(post(send, compress(saved(IMAGE)) + more, coding=coding), 400)


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_21_thousands_of_members_are_refused_quickly(send: Send, coding: str) -> None:
    start = time.perf_counter()
    detail = detail_of(post(send, CODERS[coding](b"") * 100_000, coding=coding), 400)
    assert time.perf_counter() - start < 2
    assert f"{MAX_MEMBERS} ends" in detail


def test_21_a_body_in_several_members_is_one(send: Send) -> None:
    whole = saved(IMAGE)
    for coding in ("gzip", "zstd"):
        members = b"".join(CODERS[coding](whole[at : at + 50]) for at in range(0, len(whole), 50))
        assert post(send, members, coding=coding).json()["output"] == IMAGE.tolist()


def slowest_livez(address: str, body: bytes, content_type: str, coding: str | None) -> float:
    """The longest time, in seconds, that the health check takes while a body is read that is then refused."""
    url = urlsplit(address)
    coded = f"Content-Encoding: {coding}\r\n" if coding else ""
    # Refused for its device once it is decoded: nothing is computed, and nothing large is sent.
    head = f"POST /correlate?kernel=identity&device=none HTTP/1.1\r\nHost: corr2d\r\n{coded}Connection: close\r\n"
    head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        httpx.Client(base_url=address, timeout=30) as client,
        socket.create_connection((url.hostname, url.port)) as connection,
    ):
        client.get("/livez")
        connection.sendall(head.encode() + body)
        slowest, deadline = 0.0, time.perf_counter() + 0.2
        while time.perf_counter() < deadline:
            start = time.perf_counter()
            assert client.get("/livez").status_code == 200
            slowest = max(slowest, time.perf_counter() - start)
        assert connection.makefile("rb").read(12) == b"HTTP/1.1 422"
    return slowest


ZEROS = np.zeros((7500, 7500), np.uint8)

SLOW_TO_DECODE: dict[str, Callable[[], tuple[bytes, str, str | None]]] = {
    "a picture": lambda: (png(7500, 7500, bytes(7501 * 7500)), PNG, None),
    "an archive": lambda: (npz(input=ZEROS), NPZ, None),
    "zstd": lambda: (zstd.compress(saved(ZEROS)), NPY, "zstd"),
    "gzip": lambda: (gzip.compress(saved(ZEROS), 1), NPY, "gzip"),
    "columns": lambda: (saved(np.asfortranarray(ZEROS)), NPY, None),
}


@pytest.mark.parametrize("send", ["sent_to_a_port"], indirect=True)
@pytest.mark.parametrize("body", SLOW_TO_DECODE)
def test_52_a_body_that_takes_long_to_decode_delays_nobody(address: str, body: str) -> None:
    asked = SLOW_TO_DECODE[body]()
    # A loop that is held up is held up each time; a busy machine, now and then.
    assert min(slowest_livez(address, *asked) for _ in range(3)) < 0.1
