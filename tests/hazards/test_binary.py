"""Hazards 37 to 46: files that are damaged, that lie, or that would take more than they bring."""

import gzip
import io
import json
import pickle
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.files import JPEG, JSON, NPY, NPZ, PNG, SAFETENSORS, npy, npz, picture, png, saved, tensor, tensors, zipped
from tests.hazards.cost import grown, refused_at_no_cost
from tests.hazards.raw import Connection, head
from tests.hazards.requests import IMAGE, MEGABYTE, by_every_coding, upload
from tests.problem import detail_of, first_error
from tests.serving import Send

LIMIT = 64_000_000

UNPICKLED: list[str] = []


class Trap:
    """What leaves a trace where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return UNPICKLED.append, ("unpickled",)


def test_37_objects_are_never_unpickled(send: Send) -> None:
    trap = np.array([[Trap()]], dtype=object)
    for body, content_type in ((saved(trap, allow_pickle=True), NPY), (npz(input=trap), NPZ)):
        error = first_error(upload(send, body, content_type), 422)
        assert error["field"] == "input"
        assert "never unpickled" in error["message"]
    assert "not a .npy file" in detail_of(upload(send, pickle.dumps(trap)), 400)
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
    assert "header" in detail_of(upload(send, npy(shape, bytes(36))), 400)


@pytest.mark.parametrize("sides", [[-3, -3], [True, True], [3.0, 3], ["3", 3], [None], [2**63 * 1.0]])
def test_40_shapes_of_tensors_that_are_none(send: Send, sides: list[Any]) -> None:
    detail_of(upload(send, tensors({"input": tensor(sides, 0, 36)}, bytes(36)), SAFETENSORS), 400)
    described = {"input": {"shape": sides, "dtype": "float32", "data": [1] * 9}, "kernel": [[1]]}
    assert first_error(upload(send, json.dumps(described).encode(), JSON, query=""), 422)["field"] == "input.shape"


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
        assert "header" in detail_of(upload(send, body), 400)


def test_41_a_body_takes_no_more_memory_than_has_come_of_it(address: str) -> None:
    begun = head("POST /correlate HTTP/1.1", f"Content-Type: {NPY}", "Content-Length: 60000000") + b"\x93NUMPY"

    def declare_much_and_send_little() -> None:
        connections = [Connection(address) for _ in range(4)]
        for connection in connections:
            connection.send(begun)
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
    detail = detail_of(upload(send, body, content_type), 400)
    assert "begins like" in detail
    assert advice in detail


@pytest.mark.parametrize("content_type", [JSON, NPY, NPZ, SAFETENSORS, PNG, JPEG])
@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff" * 100, bytes(5000)])
def test_42_bodies_of_nothing_and_noise(send: Send, content_type: str, body: bytes) -> None:
    detail = detail_of(upload(send, body, content_type), 400)
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
    assert "plain names" in detail_of(upload(send, body, NPZ), 400)


def test_42_entries_come_once(send: Send) -> None:
    body = zipped(("input.npy", saved(IMAGE)), ("input.npy", saved(IMAGE)))
    assert "two entries" in detail_of(upload(send, body, NPZ), 400)
    many = zipped(*((f"array_{number}.npy", saved(IMAGE)) for number in range(65)))
    assert "65 entries" in detail_of(upload(send, many, NPZ), 400)


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
    assert upload(send, body, content_type, query=query).status_code == 200
    detail_of(upload(send, body + more, content_type, query=query), 400)


@by_every_coding
def test_43_bytes_behind_a_compressed_body_are_refused(
    send: Send, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    for more in (b"\x00", b"more", bytes(1000)):
        assert coding in detail_of(upload(send, compress(saved(IMAGE)) + more, coding=coding), 400)


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
    assert upload(send, saved(array)).json()["output"] == array.tolist()
    assert upload(send, npz(input=array), NPZ).json()["output"] == array.tolist()


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
        error = first_error(upload(send, body, content_type), 422)
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
    assert message in detail_of(upload(send, tensors(header, bytes(size)), SAFETENSORS), 400)


@pytest.mark.parametrize("dtype", ["BF16", "BOOL", "F8_E4M3", "C64", "f32", "", "F" * 5000])
def test_45_other_dtypes_are_refused_with_those_that_are_taken(send: Send, dtype: str) -> None:
    error = first_error(upload(send, tensors({"input": tensor([1, 1], 0, 2, dtype)}, bytes(2)), SAFETENSORS), 422)
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
        detail_of(upload(send, whole[: int(share * len(whole))], f"image/{form}"), 400)


def test_46_a_damaged_picture_is_refused(send: Send) -> None:
    for at in range(8, len(picture()), 7):
        damaged = bytearray(picture())
        damaged[at] ^= 255
        detail_of(upload(send, bytes(damaged), PNG), 400)


@pytest.mark.parametrize(
    ("mode", "shape"),
    [("L", [12, 10]), ("LA", [12, 10]), ("P", [3, 12, 10]), ("RGB", [3, 12, 10]), ("RGBA", [3, 12, 10])],
)
def test_46_palettes_are_resolved_and_alpha_is_dropped(send: Send, mode: str, shape: list[int]) -> None:
    answer = upload(send, picture(mode), PNG).json()
    assert answer["shape"] == shape
    flattened = Image.open(io.BytesIO(picture(mode))).convert("L" if len(shape) == 2 else "RGB")
    expected = np.asarray(flattened)
    np.testing.assert_array_equal(answer["output"], expected if len(shape) == 2 else np.moveaxis(expected, 2, 0))


def test_46_16_bits_are_kept(send: Send) -> None:
    lines = b"\0" + struct.pack(">3H", 0, 256, 65535) + b"\0" + struct.pack(">3H", 1, 2, 3)
    assert upload(send, png(3, 2, lines, depth=16), PNG).json()["output"] == [[0, 256, 65535], [1, 2, 3]]
    colours = b"\0" + struct.pack(">3H", 1, 0x8001, 65535)
    assert upload(send, png(1, 1, colours, depth=16, colour=2), PNG).json()["output"] == [[[1]], [[0x8001]], [[65535]]]
    grey_and_alpha = b"\0" + struct.pack(">4H", 0x1234, 7, 65534, 0)
    assert upload(send, png(2, 1, grey_and_alpha, depth=16, colour=4), PNG).json()["output"] == [[0x1234, 65534]]
