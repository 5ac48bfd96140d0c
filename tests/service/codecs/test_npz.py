"""Tests of the .npz codec against numpy and zipfile."""

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codecs.npz import decode, encode
from service.errors import BodyTooLarge, InvalidRequest, NotAcceptable, NotParseable
from tests.service.codecs.strategies import (
    ARRAY_NAMES,
    ARRAYS_OF_ANY_LAYOUT,
    DECODE_LIMIT_BYTES,
    LITTLE_ENDIAN_ARRAYS,
    Array,
    assert_decode_rejected,
    assert_identical_array,
    assert_single_error,
    measure_peak_bytes,
)

CENTRAL_SIGNATURE, END_SIGNATURE = b"PK\x01\x02", b"PK\x05\x06"
SMALL_ARRAYS = {"input": np.arange(12.0).reshape(3, 4), "kernel": np.ones((2, 2), np.int16)}


def save_npz(arrays: Mapping[str, Array], save: Callable[..., None] = np.savez) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def save_npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def build_zip(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file, warnings.catch_warnings(action="ignore"):
        file.comment = comment
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def replace_integer(content: bytes, field: str, value: int, *, after: bytes = CENTRAL_SIGNATURE, at: int = 0) -> bytes:
    """Return the content with the integer at offset `at` of a record replaced by `value`."""
    patched = bytearray(content)
    struct.pack_into(field, patched, content.index(after) + at, value)
    return bytes(patched)


DICTIONARIES = st.dictionaries(ARRAY_NAMES, ARRAYS_OF_ANY_LAYOUT, max_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(arrays=DICTIONARIES)
def test_numpy_archives_decode_bit_for_bit(save: Callable[..., None], arrays: dict[str, Array]) -> None:
    arrays.pop("file", None)
    decoded = decode(save_npz(arrays, save), DECODE_LIMIT_BYTES)
    assert decoded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_identical_array(decoded[name], array)


@pytest.mark.slow
@given(arrays=DICTIONARIES)
def test_numpy_loads_encoded_archives(arrays: dict[str, Array]) -> None:
    content = b"".join(encode(arrays))
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert file.testzip() is None
        assert file.namelist() == [f"{name}.npy" for name in arrays]
    with np.load(io.BytesIO(content)) as loaded:
        for name, array in arrays.items():
            assert_identical_array(loaded[name], array)


@pytest.mark.slow
@given(arrays=st.dictionaries(ARRAY_NAMES, LITTLE_ENDIAN_ARRAYS, min_size=1, max_size=3))
def test_round_trip_makes_no_copy(arrays: dict[str, Array]) -> None:
    parts = encode(arrays)
    for array in arrays.values():
        assert any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in parts)
    content = bytearray().join(parts)
    for name, decoded in decode(content, DECODE_LIMIT_BYTES).items():
        assert_identical_array(decoded, arrays[name])
        assert np.shares_memory(decoded, np.frombuffer(content, np.uint8))
        assert decoded.flags.writeable


def test_streamed_numpy_archive_is_decoded() -> None:
    """Test an archive that was written to a stream: its local headers do not contain the sizes."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as file, file.open("input.npy", "w") as member:
        member.write(save_npy(SMALL_ARRAYS["input"]))
    content = stream.getvalue()
    assert struct.unpack_from("<H", content, 6)[0] & 8
    assert_identical_array(decode(content, DECODE_LIMIT_BYTES)["input"], SMALL_ARRAYS["input"])


def test_archive_without_arrays_is_empty() -> None:
    assert decode(b"".join(encode({})), DECODE_LIMIT_BYTES) == decode(build_zip(), DECODE_LIMIT_BYTES) == {}


def test_archive_of_64_arrays_is_accepted_and_65_rejected() -> None:
    arrays = {f"a{index}": np.ones(1) for index in range(65)}
    error = assert_decode_rejected(decode, b"".join(encode(arrays)))
    assert isinstance(error, NotParseable)
    assert "has 65 entries: at most 64 are read" in error.detail
    del arrays["a64"]
    assert len(decode(b"".join(encode(arrays)), DECODE_LIMIT_BYTES)) == 64


def test_limit_applies_to_all_members_together() -> None:
    content = b"".join(encode({"a": np.zeros(100), "b": np.zeros(100)}))
    size = 2 * (128 + 800)
    assert len(decode(content, size)) == 2
    error = assert_decode_rejected(decode, content, limit=size - 1)
    assert isinstance(error, BodyTooLarge)
    assert "the archive's content would be 1,856 bytes when decoded: at most 1,855 are allowed" in error.detail


def test_more_than_4_gb_suggests_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.codecs.npz.MAX_ARCHIVE_BYTES", 1000)
    with pytest.raises(NotAcceptable, match="request application/x-safetensors instead"):
        encode({"a": np.zeros(100), "b": np.zeros(100)})


@pytest.mark.robustness(37)
@pytest.mark.parametrize("array", [np.array([{}]), np.zeros((2, 0)), np.float64(1), np.ones(3, complex)])
def test_unsupported_array_is_named_in_the_error(array: Array) -> None:
    error = assert_decode_rejected(decode, save_npz({"kernel": np.ones((2, 2)), "weights": array}))
    assert isinstance(error, InvalidRequest)
    assert assert_single_error(error).field == "weights"
    assert error.detail.startswith("weights has the ")


@pytest.mark.robustness(42)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_bomb_stops_at_the_limit_before_inflation(save: Callable[..., None]) -> None:
    content = save_npz({"input": np.zeros((2000, 2000))}, save)
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, content)) < 100_000
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, BodyTooLarge)
    assert "the archive's content would be 32,000,128 bytes when decoded" in error.detail


@pytest.mark.robustness(42)
def test_bomb_with_a_false_size_stops_at_that_size() -> None:
    content = build_zip(("input.npy", bytes(20_000_000)), method=zipfile.ZIP_DEFLATED)
    lying = replace_integer(replace_integer(content, "<I", 1000, at=24), "<I", 1000, after=b"PK\x03\x04", at=22)
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, lying)) < 1_000_000
    error = assert_decode_rejected(decode, lying)
    assert isinstance(error, NotParseable)
    assert error.detail == (
        "'input.npy' in the archive is damaged: the compressed data expand to more than the declared 1,000 bytes"
    )


@pytest.mark.robustness(42)
def test_size_beyond_deflate_ratio_allocates_nothing() -> None:
    content = build_zip(("input.npy", bytes(1000)), method=zipfile.ZIP_DEFLATED)
    lying = replace_integer(replace_integer(content, "<I", 900_000, at=24), "<I", 900_000, after=b"PK\x03\x04", at=22)
    assert measure_peak_bytes(lambda: assert_decode_rejected(decode, lying)) < 100_000
    assert "cannot be 900,000 bytes" in assert_decode_rejected(decode, lying).detail


@pytest.mark.robustness(42)
def test_overlapping_members_are_rejected() -> None:
    content = build_zip(("a.npy", save_npy(np.ones(9))), ("b.npy", save_npy(np.ones(9))))
    same = bytearray(content)
    struct.pack_into("<I", same, content.rindex(CENTRAL_SIGNATURE) + 42, 0)
    assert "contradicts the directory" in assert_decode_rejected(decode, bytes(same)).detail
    # The method of "A better zip bomb" (Fifield, 2019): the first member contains the header of the second.
    longer = len(content[: content.index(CENTRAL_SIGNATURE)]) - content.index(b"\x93NUMPY")
    quoted = replace_integer(replace_integer(content, "<I", longer, at=20), "<I", longer, after=b"PK\x03\x04", at=18)
    assert assert_decode_rejected(decode, quoted).detail == "the archive has entries that overlap"


@pytest.mark.robustness(42)
@pytest.mark.parametrize(
    "name",
    [
        "../input.npy",
        "/etc/input.npy",
        "a/b.npy",
        "a\\b.npy",
        "..npy",
        "..",
        "input",
        "input.txt",
        ".npy",
        "inp\nut.npy",
    ],
)
def test_non_plain_names_are_rejected(name: str) -> None:
    error = assert_decode_rejected(decode, build_zip((name, save_npy(np.ones((2, 2))))))
    assert isinstance(error, NotParseable)
    assert "only plain names such as input.npy are read" in error.detail


@pytest.mark.robustness(42)
def test_long_names_are_truncated_in_messages() -> None:
    error = assert_decode_rejected(
        decode, build_zip(("x" * 60_000 + ".npy", save_npy(np.ones((2, 2)).astype(complex))))
    )
    assert len(assert_single_error(error).field) == 60
    assert len(assert_decode_rejected(decode, build_zip(("/" * 60_000, b""))).detail) < 200


@pytest.mark.robustness(42)
def test_names_are_utf_8_or_ascii() -> None:
    assert list(decode(build_zip(("größe.npy", save_npy(np.ones(1)))), DECODE_LIMIT_BYTES)) == ["größe"]
    other = replace_integer(build_zip(("größe.npy", save_npy(np.ones(1)))), "<H", 0, at=8)
    assert isinstance(assert_decode_rejected(decode, other), NotParseable)


@pytest.mark.robustness(42)
def test_duplicates_are_rejected() -> None:
    file = save_npy(np.ones((2, 2)))
    error = assert_decode_rejected(decode, build_zip(("input.npy", file), ("input.npy", file)))
    assert isinstance(error, NotParseable)
    assert "has two entries 'input.npy'" in error.detail


@pytest.mark.robustness(42)
def test_non_npy_entry_is_rejected() -> None:
    error = assert_decode_rejected(decode, build_zip(("input.npy", b"1 2 3")))
    assert isinstance(error, NotParseable)
    assert error.detail == "'input.npy' in the archive is not a .npy file: its first bytes are b'1 2 3'"
    assert assert_decode_rejected(decode, build_zip(("input.npy", b""))).detail == (
        "'input.npy' in the archive is empty: it must be a .npy file"
    )


@pytest.mark.robustness(42)
@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_methods_are_named(method: int) -> None:
    error = assert_decode_rejected(decode, build_zip(("input.npy", save_npy(np.ones((2, 2)))), method=method))
    assert isinstance(error, NotParseable)
    assert f"is compressed by method {method}: stored (0) and deflated (8) members are read" in error.detail


STORED_ARCHIVE, DEFLATED_ARCHIVE = save_npz(SMALL_ARRAYS), save_npz(SMALL_ARRAYS, np.savez_compressed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be an .npz file"),
        (save_npy(np.ones(3)), "it begins like a .npy file; send it as application/x-npy"),
        (STORED_ARCHIVE + b"\n", "bytes or a comment follow its end"),
        (b"#!/bin/sh\n" + STORED_ARCHIVE, "the body is not an .npz file"),
        (build_zip(("input.npy", b""), comment=b"hello"), "bytes or a comment follow its end"),
        (STORED_ARCHIVE[:22], "does not end as a zip archive does"),
        (END_SIGNATURE, "does not end as a zip archive does"),
        (
            replace_integer(STORED_ARCHIVE, "<H", 1, after=END_SIGNATURE, at=4),
            "the archive's end does not fit its directory",
        ),
        (
            replace_integer(STORED_ARCHIVE, "<H", 1, after=END_SIGNATURE, at=8),
            "the archive's end does not fit its directory",
        ),
        (
            replace_integer(STORED_ARCHIVE, "<I", 0, after=END_SIGNATURE, at=16),
            "the archive's end does not fit its directory",
        ),
        (
            replace_integer(
                replace_integer(STORED_ARCHIVE, "<H", 3, after=END_SIGNATURE, at=8), "<H", 3, after=END_SIGNATURE, at=10
            ),
            "fewer entries than it declares",
        ),
        (
            replace_integer(
                replace_integer(STORED_ARCHIVE, "<H", 1, after=END_SIGNATURE, at=8), "<H", 1, after=END_SIGNATURE, at=10
            ),
            "bytes more than its 1 ent",
        ),
        (replace_integer(STORED_ARCHIVE, "<H", 60_000, at=28), "an entry is longer than the directory"),
        (replace_integer(STORED_ARCHIVE, "<H", 1, at=8), "'input.npy' in the archive is encrypted, or patch data"),
        (replace_integer(STORED_ARCHIVE, "<H", 32, at=8), "'input.npy' in the archive is encrypted, or patch data"),
        (
            replace_integer(STORED_ARCHIVE, "<I", 7, at=16),
            "'input.npy' in the archive has a header that contradicts the directory",
        ),
        (
            replace_integer(STORED_ARCHIVE, "<I", 2**31, at=42),
            "'input.npy' in the archive is not where the directory says",
        ),
        (replace_integer(STORED_ARCHIVE, "<I", 1, at=42), "'input.npy' in the archive is not where the directory says"),
        (
            replace_integer(STORED_ARCHIVE, "<I", 2**20, at=20),
            "'input.npy' in the archive is cut off: it declares 1,048,576 bytes",
        ),
        (
            replace_integer(STORED_ARCHIVE, "<I", 100, at=20),
            "'input.npy' in the archive is stored with 100 bytes, but declares 224",
        ),
        (
            replace_integer(STORED_ARCHIVE, "<I", 7, after=b"\x93NUMPY", at=128),
            "'input.npy' in the archive is damaged: its CRC",
        ),
        (
            replace_integer(DEFLATED_ARCHIVE, "<I", 0, after=b"input.npy", at=29 + 30),
            "'input.npy' in the archive is damaged: ",
        ),
        (
            replace_integer(DEFLATED_ARCHIVE, "<H", 8, after=b"PK\x03\x04", at=26),
            "has a header that contradicts the directory",
        ),
    ],
)
def test_non_archives_and_damaged_archives_are_reported(content: bytes, message: str) -> None:
    error = assert_decode_rejected(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


def test_deflated_data_must_end_with_its_member() -> None:
    file = save_npy(SMALL_ARRAYS["input"])
    packed = zlib.compress(file, wbits=-15)

    def member(stream: bytes, size: int) -> bytes:
        content = build_zip(("input.npy", stream))
        for signature, method, crc in ((b"PK\x03\x04", 8, 14), (CENTRAL_SIGNATURE, 10, 16)):
            content = replace_integer(content, "<H", 8, after=signature, at=method)
            content = replace_integer(content, "<I", zlib.crc32(file), after=signature, at=crc)
            content = replace_integer(content, "<I", size, after=signature, at=crc + 8)
        return content

    assert_identical_array(decode(member(packed, len(file)), DECODE_LIMIT_BYTES)["input"], SMALL_ARRAYS["input"])
    assert "bytes follow the end" in assert_decode_rejected(decode, member(packed + b"!", len(file))).detail
    assert (
        "bytes before the declared"
        in assert_decode_rejected(decode, member(packed[: len(packed) // 2], len(file))).detail
    )
    assert "more than the declared 223 bytes" in assert_decode_rejected(decode, member(packed, len(file) - 1)).detail
    assert "end 1 bytes before the declared 225" in assert_decode_rejected(decode, member(packed, len(file) + 1)).detail


def test_large_members_are_inflated_in_chunks(rng: np.random.Generator) -> None:
    arrays: dict[str, Any] = {"noise": rng.normal(size=(400, 400)), "zeros": np.zeros((400, 400))}
    decoded = decode(save_npz(arrays, np.savez_compressed), 3_000_000)
    for name, array in arrays.items():
        assert_identical_array(decoded[name], array)
