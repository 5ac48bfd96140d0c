"""Robustness cases 37 to 46: damaged files, false declarations, and files that expand to large arrays."""

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

from service.codecs.registry import DECODABLE_MEDIA_TYPES
from tests.problem_details import assert_detail, assert_first_error
from tests.robustness.memory import assert_rejected_cheaply, measure_peak_bytes
from tests.robustness.raw_client import RawConnection, build_request_headers
from tests.robustness.sample_requests import MEGABYTE, SMALL_IMAGE, parametrize_codings, post_file
from tests.sample_files import (
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
    save_image,
    save_npy,
    save_npz,
)
from tests.servers import SendFn

BODY_LIMIT_BYTES = 64_000_000

UNPICKLED_TRACES: list[str] = []


class PickleTrap:
    """An object that adds to `UNPICKLED_TRACES` if it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return UNPICKLED_TRACES.append, ("unpickled",)


@pytest.mark.robustness(37)
def test_objects_are_never_unpickled(send: SendFn) -> None:
    trap = np.array([[PickleTrap()]], dtype=object)
    for body, content_type in ((save_npy(trap, allow_pickle=True), NPY), (save_npz(input=trap), NPZ)):
        error = assert_first_error(post_file(send, body, content_type), 422)
        assert error["field"] == "input"
        assert "never unpickled" in error["message"]
    assert "not a .npy file" in assert_detail(post_file(send, pickle.dumps(trap)), 400)
    assert UNPICKLED_TRACES == []


@pytest.mark.robustness(38)
@pytest.mark.parametrize("side", [50_000, 10**9])
def test_shape_without_data_allocates_nothing(send: SendFn, side: int) -> None:
    shape, size = [side, side], 4 * side**2
    sent = {
        NPY: build_npy(f"({side}, {side})"),
        NPZ: build_zip(("input.npy", build_npy(f"({side}, {side})"))),
        SAFETENSORS: build_safetensors({"input": build_tensor_entry(shape, 0, size)}),
    }
    for content_type, body in sent.items():
        assert "CORR2D_MAX_BODY_MB" in assert_rejected_cheaply(send, 413, body, content_type)
    described = {"input": {"shape": shape, "dtype": "float32", "data": []}}
    assert (
        "expected 2500000000" in assert_rejected_cheaply(send, 422, json.dumps(described).encode(), JSON)
        or side > 50_000
    )


@pytest.mark.robustness(38)
def test_shape_without_data_below_the_limit_allocates_nothing(send: SendFn) -> None:
    sent = {
        NPY: build_npy("(4000, 4000)"),
        NPZ: build_zip(("input.npy", build_npy("(4000, 4000)"))),
        SAFETENSORS: build_safetensors({"input": build_tensor_entry([4000, 4000], 0, BODY_LIMIT_BYTES)}),
    }
    for content_type, body in sent.items():
        assert_rejected_cheaply(send, 400, body, content_type)
    described = {"input": {"shape": [4000, 4000], "dtype": "float32", "data": "AAAA"}}
    assert_rejected_cheaply(send, 422, json.dumps(described).encode(), JSON)


@pytest.mark.robustness(39)
@pytest.mark.parametrize("sides", [(2**32, 2**32), (2**62, 4), (2**31, 2**31, 2**31), (3037000500, 3037000500)])
def test_overflowing_products_allocate_nothing(send: SendFn, sides: tuple[int, ...]) -> None:
    assert_rejected_cheaply(send, 413, build_npy(str(sides), bytes(16)))
    assert_rejected_cheaply(send, 413, build_zip(("input.npy", build_npy(str(sides), bytes(16)))), NPZ)
    assert_rejected_cheaply(
        send, 413, build_safetensors({"input": build_tensor_entry(list(sides), 0, 16)}, bytes(16)), SAFETENSORS
    )
    described = {"input": {"shape": sides, "dtype": "float32", "data": [1, 2]}}
    assert_rejected_cheaply(send, 422, json.dumps(described).encode(), JSON)


@pytest.mark.robustness(40)
@pytest.mark.parametrize(
    "shape", ["(-3, -3)", "(-1, 3)", "(True, True)", "(3.0, 3)", "(9)", "3", "(3, None)", "(1e9,)"]
)
def test_invalid_shapes_are_rejected(send: SendFn, shape: str) -> None:
    assert "header" in assert_detail(post_file(send, build_npy(shape, bytes(36))), 400)


@pytest.mark.robustness(40)
@pytest.mark.parametrize("sides", [[-3, -3], [True, True], [3.0, 3], ["3", 3], [None], [2**63 * 1.0]])
def test_invalid_tensor_shapes_are_rejected(send: SendFn, sides: list[Any]) -> None:
    assert_detail(
        post_file(send, build_safetensors({"input": build_tensor_entry(sides, 0, 36)}, bytes(36)), SAFETENSORS), 400
    )
    described = {"input": {"shape": sides, "dtype": "float32", "data": [1] * 9}, "kernel": [[1]]}
    assert (
        assert_first_error(post_file(send, json.dumps(described).encode(), JSON, query=""), 422)["field"]
        == "input.shape"
    )


@pytest.mark.robustness(40)
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
def test_too_many_dimensions_and_empty_sides_are_rejected(send: SendFn, sides: tuple[int, ...], message: str) -> None:
    data = bytes(4 * int(np.prod(sides, dtype=object)))
    assert message in assert_rejected_cheaply(send, 422, build_npy(str(sides), data))
    assert message in assert_rejected_cheaply(send, 422, build_zip(("input.npy", build_npy(str(sides), data))), NPZ)
    sent = build_safetensors({"input": build_tensor_entry(list(sides), 0, len(data))}, data)
    assert message in assert_rejected_cheaply(send, 422, sent, SAFETENSORS)


@pytest.mark.robustness(41)
@pytest.mark.parametrize("length", [60_000, 2**32 - 1])
@pytest.mark.parametrize("there", [0, 60_000])
def test_long_headers_are_rejected_by_their_length(send: SendFn, length: int, there: int) -> None:
    body = b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + b" " * there
    assert f"header of {length:,} bytes" in assert_rejected_cheaply(send, 400, body)
    assert "header of" in assert_rejected_cheaply(send, 400, build_zip(("input.npy", body)), NPZ)


@pytest.mark.robustness(41)
def test_header_is_never_evaluated(send: SendFn) -> None:
    for text in (b"__import__('os').abort()", b"(" * 9000, b"{'descr': " * 900, b"-" * 9000 + b"1", bytes(500)):
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
        assert "header" in assert_detail(post_file(send, body), 400)


@pytest.mark.robustness(41)
def test_body_takes_no_more_memory_than_received(address: str) -> None:
    begun = (
        build_request_headers("POST /correlate HTTP/1.1", f"Content-Type: {NPY}", "Content-Length: 60000000")
        + b"\x93NUMPY"
    )

    def declare_much_and_send_little() -> None:
        connections = [RawConnection(address) for _ in range(4)]
        for connection in connections:
            connection.send(begun)
        time.sleep(0.2)
        for connection in connections:
            connection.close()

    assert measure_peak_bytes(declare_much_and_send_little) < 4 * MEGABYTE


@pytest.mark.robustness(42, 46)
@pytest.mark.parametrize(
    ("content_type", "body", "advice"),
    [
        (NPY, save_npz(input=SMALL_IMAGE), "application/x-npz"),
        (NPZ, save_npy(SMALL_IMAGE), "application/x-npy"),
        (SAFETENSORS, save_npy(SMALL_IMAGE), "application/x-npy"),
        (SAFETENSORS, save_npz(input=SMALL_IMAGE), "application/x-npz"),
        (NPY, save_image(), "image/png"),
        (JPEG, save_image(), "image/png"),
        (PNG, save_image(form="jpeg"), "image/jpeg"),
        (NPY, b'{"input": [[1]]}', "application/json"),
        (PNG, b'{"input": [[1]], "kernel": [[1]]}', "application/json"),
        (NPY, gzip.compress(save_npy(SMALL_IMAGE)), "gzip"),
        (PNG, save_image(form="gif"), "GIF"),
        (PNG, save_image(form="webp"), "WebP"),
        (JPEG, save_image(form="tiff"), "TIFF"),
    ],
)
def test_mislabelled_format_is_named_in_the_error(send: SendFn, content_type: str, body: bytes, advice: str) -> None:
    detail = assert_detail(post_file(send, body, content_type), 400)
    assert "begins like" in detail
    assert advice in detail


@pytest.mark.robustness(42)
@pytest.mark.parametrize("content_type", DECODABLE_MEDIA_TYPES)
@pytest.mark.parametrize("body", [b"", b"\x00", b"\xff" * 100, bytes(5000)])
def test_empty_and_random_bodies_are_rejected(send: SendFn, content_type: str, body: bytes) -> None:
    detail = assert_detail(post_file(send, body, content_type), 400)
    assert body or "empty" in detail


@pytest.mark.robustness(42)
def test_archive_bomb_stops_at_the_limit(send: SendFn) -> None:
    bomb = save_npz(input=np.zeros((8100, 8000), np.uint8))
    assert len(bomb) < MEGABYTE
    assert "64,800,128 bytes" in assert_rejected_cheaply(send, 413, bomb, NPZ)
    many = build_zip(*((f"array_{number}.npy", save_npy(np.zeros((1100, 1000), np.uint8))) for number in range(60)))
    assert "CORR2D_MAX_BODY_MB" in assert_rejected_cheaply(send, 413, many, NPZ)


@pytest.mark.robustness(42)
def test_bomb_with_a_false_size_stops_at_that_size(send: SendFn) -> None:
    bomb = bytearray(build_zip(("input.npy", save_npy(np.zeros((9000, 9000), np.uint8)))))
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", bomb, bomb.index(signature) + at, 1000)
    assert "damaged" in assert_rejected_cheaply(send, 400, bytes(bomb), NPZ)


@pytest.mark.robustness(42)
@pytest.mark.parametrize(
    "name", ["../input.npy", "/input.npy", "folder/input.npy", "..\\input.npy", "input", "input.txt", ".npy", "a\n.npy"]
)
def test_entry_names_must_be_plain(send: SendFn, name: str) -> None:
    body = build_zip(("input.npy", save_npy(SMALL_IMAGE)), (name, save_npy(SMALL_IMAGE)))
    assert "plain names" in assert_detail(post_file(send, body, NPZ), 400)


@pytest.mark.robustness(42)
def test_duplicate_entries_are_rejected(send: SendFn) -> None:
    body = build_zip(("input.npy", save_npy(SMALL_IMAGE)), ("input.npy", save_npy(SMALL_IMAGE)))
    assert "two entries" in assert_detail(post_file(send, body, NPZ), 400)
    many = build_zip(*((f"array_{number}.npy", save_npy(SMALL_IMAGE)) for number in range(65)))
    assert "65 entries" in assert_detail(post_file(send, many, NPZ), 400)


@pytest.mark.robustness(43)
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (NPY, save_npy(SMALL_IMAGE)),
        (NPZ, save_npz(input=SMALL_IMAGE)),
        (SAFETENSORS, safetensors.numpy.save({"input": SMALL_IMAGE})),
        (JSON, b'{"input": [[1]], "kernel": [[1]]}'),
    ],
)
@pytest.mark.parametrize("more", [b"\x00", b"PK\x05\x06", b"x" * 1000])
def test_trailing_bytes_are_rejected(send: SendFn, content_type: str, body: bytes, more: bytes) -> None:
    query = "" if content_type == JSON else "kernel=identity"
    assert post_file(send, body, content_type, query=query).status_code == 200
    assert_detail(post_file(send, body + more, content_type, query=query), 400)


@pytest.mark.robustness(43)
@parametrize_codings
def test_bytes_after_a_compressed_body_are_rejected(
    send: SendFn, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    for more in (b"\x00", b"more", bytes(1000)):
        assert coding in assert_detail(post_file(send, compress(save_npy(SMALL_IMAGE)) + more, coding=coding), 400)


@pytest.mark.robustness(44)
@pytest.mark.parametrize(
    "array",
    [
        SMALL_IMAGE.astype(">f4"),
        np.asfortranarray(SMALL_IMAGE),
        np.asfortranarray(SMALL_IMAGE.astype(">f8")),
        SMALL_IMAGE.astype(np.float16),
        SMALL_IMAGE.astype(">i2"),
        SMALL_IMAGE.astype(np.uint64),
        SMALL_IMAGE[::-1, ::-1],
    ],
)
def test_byte_orders_layouts_and_float16_are_converted(send: SendFn, array: np.ndarray[Any, Any]) -> None:
    assert post_file(send, save_npy(array)).json()["output"] == array.tolist()
    assert post_file(send, save_npz(input=array), NPZ).json()["output"] == array.tolist()


@pytest.mark.robustness(44)
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
        (np.ones((3, 3), np.longdouble), "platform-dependent size"),
        (np.ones((3, 3), "V8"), "raw bytes"),
    ],
)
def test_unsupported_dtypes_are_rejected(send: SendFn, array: np.ndarray[Any, Any], kind: str) -> None:
    for body, content_type in ((save_npy(array), NPY), (save_npz(input=array), NPZ)):
        error = assert_first_error(post_file(send, body, content_type), 422)
        assert error["field"] == "input"
        assert kind in error["message"]


@pytest.mark.robustness(45)
@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 300_000])
def test_header_of_any_length_allocates_nothing(send: SendFn, length: int) -> None:
    body = build_safetensors({"input": build_tensor_entry([1], 0, 4)}, bytes(4), length=length)
    assert f"{length:,} bytes" in assert_rejected_cheaply(send, 400, body, SAFETENSORS)


@pytest.mark.robustness(45)
@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"input": build_tensor_entry([3, 3], 0, 36), "kernel": build_tensor_entry([1, 1], 32, 36)}, 36, "overlaps"),
        ({"input": build_tensor_entry([3, 3], 0, 36), "kernel": build_tensor_entry([3, 3], 0, 36)}, 36, "overlaps"),
        ({"input": build_tensor_entry([3, 3], 4, 40)}, 40, "gap"),
        ({"input": build_tensor_entry([3, 3], 0, 36), "kernel": build_tensor_entry([1, 1], 40, 44)}, 44, "gap"),
        ({"input": build_tensor_entry([3, 3], 0, 36)}, 37, "37 follow"),
        ({"input": build_tensor_entry([3, 3], 0, 36)}, 35, "35 follow"),
        ({"input": build_tensor_entry([3, 3], 0, 35)}, 35, "has 36 bytes"),
        ({"input": build_tensor_entry([3, 3], 36, 0)}, 36, "has 36 bytes"),
        ({"input": build_tensor_entry([3, 3], -36, 0)}, 36, "nonnegative integers"),
        ({"input": {**build_tensor_entry([3, 3], 0, 36), "more": 1}}, 36, "is not an object of"),
        ({"input": []}, 0, "is not an object of"),
        ([], 0, "not a JSON object"),
        (b'{"input": NaN}', 0, "not JSON"),
        (b"{" * 5000, 0, "not JSON"),
        (b'{"input": 1, "input": 1}', 0, "twice"),
        (json.dumps({"input": build_tensor_entry([3, 3], 0, 36)})[:-1].encode() + b', "input": {}}', 36, "twice"),
        (
            {f"array_{number}": build_tensor_entry([1], 4 * number, 4 * number + 4) for number in range(257)},
            1028,
            "257 tensors",
        ),
        ({"__metadata__": {"mode": 1}, "input": build_tensor_entry([3, 3], 0, 36)}, 36, "object of strings"),
    ],
)
def test_header_must_cover_every_byte_once(send: SendFn, header: object, size: int, message: str) -> None:
    assert message in assert_detail(post_file(send, build_safetensors(header, bytes(size)), SAFETENSORS), 400)


@pytest.mark.robustness(45)
@pytest.mark.parametrize("dtype", ["BF16", "BOOL", "F8_E4M3", "C64", "f32", "", "F" * 5000])
def test_unsupported_dtype_error_lists_supported_dtypes(send: SendFn, dtype: str) -> None:
    error = assert_first_error(
        post_file(send, build_safetensors({"input": build_tensor_entry([1, 1], 0, 2, dtype)}, bytes(2)), SAFETENSORS),
        422,
    )
    assert error["field"] == "input"
    assert "float32" in error["limit"]


@pytest.mark.robustness(46)
@pytest.mark.parametrize(
    ("width", "height"), [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (1, 2**31 - 1)]
)
def test_image_bomb_is_rejected_by_its_header(send: SendFn, width: int, height: int) -> None:
    assert f"{width} x {height}" in assert_rejected_cheaply(send, 413, build_png(width, height, bytes(50_000)), PNG)
    jpeg = bytearray(save_image(form="jpeg"))
    if max(width, height) < 2**16:
        struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, height, width)
        assert f"{width} x {height}" in assert_rejected_cheaply(send, 413, bytes(jpeg), JPEG)


@pytest.mark.robustness(46)
def test_missing_pixels_allocate_nothing(send: SendFn) -> None:
    assert "damaged" in assert_rejected_cheaply(send, 400, build_png(7000, 7000, bytes(100)), PNG)
    assert "damaged" in assert_rejected_cheaply(send, 400, build_png(10, 10, bytes(10**7)), PNG)


@pytest.mark.robustness(46)
@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_truncated_image_is_rejected(send: SendFn, form: str) -> None:
    whole = save_image("RGB", form)
    for share in (0.2, 0.5, 0.8, 0.99):
        assert_detail(post_file(send, whole[: int(share * len(whole))], f"image/{form}"), 400)


@pytest.mark.robustness(46)
def test_damaged_image_is_rejected(send: SendFn) -> None:
    for at in range(8, len(save_image()), 7):
        damaged = bytearray(save_image())
        damaged[at] ^= 255
        assert_detail(post_file(send, bytes(damaged), PNG), 400)


@pytest.mark.robustness(46)
@pytest.mark.parametrize(
    ("mode", "shape"),
    [("L", [12, 10]), ("LA", [12, 10]), ("P", [3, 12, 10]), ("RGB", [3, 12, 10]), ("RGBA", [3, 12, 10])],
)
def test_palettes_are_resolved_and_alpha_is_dropped(send: SendFn, mode: str, shape: list[int]) -> None:
    result = post_file(send, save_image(mode), PNG).json()
    assert result["shape"] == shape
    flattened = Image.open(io.BytesIO(save_image(mode))).convert("L" if len(shape) == 2 else "RGB")
    expected = np.asarray(flattened)
    np.testing.assert_array_equal(result["output"], expected if len(shape) == 2 else np.moveaxis(expected, 2, 0))


@pytest.mark.robustness(46)
def test_16_bit_images_keep_their_depth(send: SendFn) -> None:
    lines = b"\0" + struct.pack(">3H", 0, 256, 65535) + b"\0" + struct.pack(">3H", 1, 2, 3)
    assert post_file(send, build_png(3, 2, lines, depth=16), PNG).json()["output"] == [[0, 256, 65535], [1, 2, 3]]
    colours = b"\0" + struct.pack(">3H", 1, 0x8001, 65535)
    assert post_file(send, build_png(1, 1, colours, depth=16, colour=2), PNG).json()["output"] == [
        [[1]],
        [[0x8001]],
        [[65535]],
    ]
    grey_and_alpha = b"\0" + struct.pack(">4H", 0x1234, 7, 65534, 0)
    assert post_file(send, build_png(2, 1, grey_and_alpha, depth=16, colour=4), PNG).json()["output"] == [
        [0x1234, 65534]
    ]
