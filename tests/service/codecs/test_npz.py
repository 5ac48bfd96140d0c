"""Archives in numpy's .npz format, against numpy and zipfile."""

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
from tests.service.codecs.drawn import ANY_ARRAYS, ARRAYS, LIMIT, NAMES, Array, assert_same, fault, peak, refused

CENTRAL, END = b"PK\x01\x02", b"PK\x05\x06"
SMALL = {"input": np.arange(12.0).reshape(3, 4), "kernel": np.ones((2, 2), np.int16)}


def saved(arrays: Mapping[str, Array], save: Callable[..., None] = np.savez) -> bytes:
    """The archive that numpy writes."""
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file, warnings.catch_warnings(action="ignore"):
        file.comment = comment
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def changed(content: bytes, field: str, value: int, *, after: bytes = CENTRAL, at: int = 0) -> bytes:
    """The content with one integer replaced, which stands `at` bytes behind the beginning of a record."""
    patched = bytearray(content)
    struct.pack_into(field, patched, content.index(after) + at, value)
    return bytes(patched)


DICTIONARIES = st.dictionaries(NAMES, ANY_ARRAYS, max_size=3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(arrays=DICTIONARIES)
def test_what_numpy_saves_arrives_bit_for_bit(save: Callable[..., None], arrays: dict[str, Array]) -> None:
    arrays.pop("file", None)
    decoded = decode(saved(arrays, save), LIMIT)
    assert decoded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_same(decoded[name], array)


@given(arrays=DICTIONARIES)
def test_numpy_loads_what_is_encoded(arrays: dict[str, Array]) -> None:
    content = b"".join(encode(arrays))
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert file.testzip() is None
        assert file.namelist() == [f"{name}.npy" for name in arrays]
    with np.load(io.BytesIO(content)) as loaded:
        for name, array in arrays.items():
            assert_same(loaded[name], array)


@given(arrays=st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=3))
def test_neither_encoding_nor_decoding_what_was_encoded_copies_anything(arrays: dict[str, Array]) -> None:
    parts = encode(arrays)
    for array in arrays.values():
        assert any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in parts)
    content = bytearray().join(parts)
    for name, decoded in decode(content, LIMIT).items():
        assert_same(decoded, arrays[name])
        assert np.shares_memory(decoded, np.frombuffer(content, np.uint8))
        assert decoded.flags.writeable


def test_numpys_archive_in_a_stream_is_read_too() -> None:
    """Its headers stand before its sizes are known."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as file, file.open("input.npy", "w") as member:
        member.write(npy(SMALL["input"]))
    content = stream.getvalue()
    assert struct.unpack_from("<H", content, 6)[0] & 8
    assert_same(decode(content, LIMIT)["input"], SMALL["input"])


def test_an_archive_without_arrays_has_none() -> None:
    assert decode(b"".join(encode({})), LIMIT) == decode(archive(), LIMIT) == {}


def test_an_archive_of_64_arrays_is_read_and_one_of_65_is_not() -> None:
    arrays = {f"a{index}": np.ones(1) for index in range(65)}
    error = refused(decode, b"".join(encode(arrays)))
    assert isinstance(error, NotParseable)
    assert "has 65 entries: at most 64 are read" in error.detail
    del arrays["a64"]
    assert len(decode(b"".join(encode(arrays)), LIMIT)) == 64


def test_the_limit_is_on_all_members_together() -> None:
    content = b"".join(encode({"a": np.zeros(100), "b": np.zeros(100)}))
    size = 2 * (128 + 800)
    assert len(decode(content, size)) == 2
    error = refused(decode, content, limit=size - 1)
    assert isinstance(error, BodyTooLarge)
    assert "what the archive holds would be 1,856 bytes when decoded: at most 1,855 are allowed" in error.detail


def test_more_than_4_gb_are_better_sent_in_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.codecs.npz.MAX_ARCHIVE", 1000)
    with pytest.raises(NotAcceptable, match="ask for application/x-safetensors"):
        encode({"a": np.zeros(100), "b": np.zeros(100)})


@pytest.mark.parametrize("array", [np.array([{}]), np.zeros((2, 0)), np.float64(1), np.ones(3, complex)])
def test_37_an_array_that_is_not_taken_is_named(array: Array) -> None:
    error = refused(decode, saved({"kernel": np.ones((2, 2)), "weights": array}))
    assert isinstance(error, InvalidRequest)
    assert fault(error).field == "weights"
    assert error.detail.startswith("weights has the ")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_42_a_bomb_stops_at_the_limit_before_it_is_inflated(save: Callable[..., None]) -> None:
    content = saved({"input": np.zeros((2000, 2000))}, save)
    assert peak(lambda: refused(decode, content)) < 100_000
    error = refused(decode, content)
    assert isinstance(error, BodyTooLarge)
    assert "what the archive holds would be 32,000,128 bytes when decoded" in error.detail


def test_42_a_bomb_that_lies_about_its_size_stops_at_the_size_it_gives() -> None:
    content = archive(("input.npy", bytes(20_000_000)), method=zipfile.ZIP_DEFLATED)
    lying = changed(changed(content, "<I", 1000, at=24), "<I", 1000, after=b"PK\x03\x04", at=22)
    assert peak(lambda: refused(decode, lying)) < 1_000_000
    error = refused(decode, lying)
    assert isinstance(error, NotParseable)
    assert error.detail == "'input.npy' in the archive is damaged: more than the declared 1,000 bytes come out"


def test_42_a_size_that_deflate_cannot_reach_allocates_nothing() -> None:
    content = archive(("input.npy", bytes(1000)), method=zipfile.ZIP_DEFLATED)
    lying = changed(changed(content, "<I", 900_000, at=24), "<I", 900_000, after=b"PK\x03\x04", at=22)
    assert peak(lambda: refused(decode, lying)) < 100_000
    assert "cannot be 900,000 bytes" in refused(decode, lying).detail


def test_42_members_that_share_their_bytes_are_refused() -> None:
    content = archive(("a.npy", npy(np.ones(9))), ("b.npy", npy(np.ones(9))))
    same = bytearray(content)
    struct.pack_into("<I", same, content.rindex(CENTRAL) + 42, 0)
    assert "contradicts the directory" in refused(decode, bytes(same)).detail
    # As "a better zip bomb" does it: the first member holds the second one's header.
    longer = len(content[: content.index(CENTRAL)]) - content.index(b"\x93NUMPY")
    quoted = changed(changed(content, "<I", longer, at=20), "<I", longer, after=b"PK\x03\x04", at=18)
    assert refused(decode, quoted).detail == "the archive has entries that overlap"


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
def test_42_names_that_are_not_plain_are_refused(name: str) -> None:
    error = refused(decode, archive((name, npy(np.ones((2, 2))))))
    assert isinstance(error, NotParseable)
    assert "only plain names such as input.npy are read" in error.detail


def test_42_long_names_are_cut_in_messages() -> None:
    error = refused(decode, archive(("x" * 60_000 + ".npy", npy(np.ones((2, 2)).astype(complex)))))
    assert len(fault(error).field) == 60
    assert len(refused(decode, archive(("/" * 60_000, b""))).detail) < 200


def test_42_names_are_utf_8_or_ascii() -> None:
    assert list(decode(archive(("größe.npy", npy(np.ones(1)))), LIMIT)) == ["größe"]
    other = changed(archive(("größe.npy", npy(np.ones(1)))), "<H", 0, at=8)
    assert isinstance(refused(decode, other), NotParseable)


def test_42_duplicates_are_refused() -> None:
    file = npy(np.ones((2, 2)))
    error = refused(decode, archive(("input.npy", file), ("input.npy", file)))
    assert isinstance(error, NotParseable)
    assert "has two entries 'input.npy'" in error.detail


def test_42_an_entry_that_is_no_npy_file_is_refused() -> None:
    error = refused(decode, archive(("input.npy", b"1 2 3")))
    assert isinstance(error, NotParseable)
    assert error.detail == "'input.npy' in the archive is not a .npy file: its first bytes are b'1 2 3'"
    assert refused(decode, archive(("input.npy", b""))).detail == (
        "'input.npy' in the archive is empty: it must be a .npy file"
    )


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_42_other_compressions_are_named(method: int) -> None:
    error = refused(decode, archive(("input.npy", npy(np.ones((2, 2)))), method=method))
    assert isinstance(error, NotParseable)
    assert f"is compressed by method {method}: stored (0) and deflated (8) members are read" in error.detail


STORED, DEFLATED = saved(SMALL), saved(SMALL, np.savez_compressed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty: it must be an .npz file"),
        (npy(np.ones(3)), "it begins like a .npy file; send it as application/x-npy"),
        (STORED + b"\n", "bytes or a comment follow its end"),
        (b"#!/bin/sh\n" + STORED, "the body is not an .npz file"),
        (archive(("input.npy", b""), comment=b"hello"), "bytes or a comment follow its end"),
        (STORED[:22], "does not end as a zip archive does"),
        (END, "does not end as a zip archive does"),
        (changed(STORED, "<H", 1, after=END, at=4), "the archive's end does not fit its directory"),
        (changed(STORED, "<H", 1, after=END, at=8), "the archive's end does not fit its directory"),
        (changed(STORED, "<I", 0, after=END, at=16), "the archive's end does not fit its directory"),
        (changed(changed(STORED, "<H", 3, after=END, at=8), "<H", 3, after=END, at=10), "fewer entries than it says"),
        (changed(changed(STORED, "<H", 1, after=END, at=8), "<H", 1, after=END, at=10), "bytes more than its 1 ent"),
        (changed(STORED, "<H", 60_000, at=28), "an entry is longer than the directory"),
        (changed(STORED, "<H", 1, at=8), "'input.npy' in the archive is encrypted, or a patch"),
        (changed(STORED, "<H", 32, at=8), "'input.npy' in the archive is encrypted, or a patch"),
        (changed(STORED, "<I", 7, at=16), "'input.npy' in the archive has a header that contradicts the directory"),
        (changed(STORED, "<I", 2**31, at=42), "'input.npy' in the archive is not where the directory says"),
        (changed(STORED, "<I", 1, at=42), "'input.npy' in the archive is not where the directory says"),
        (changed(STORED, "<I", 2**20, at=20), "'input.npy' in the archive is cut off: 1,048,576 bytes were to come"),
        (changed(STORED, "<I", 100, at=20), "'input.npy' in the archive is stored with 100 bytes for 224"),
        (changed(STORED, "<I", 7, after=b"\x93NUMPY", at=128), "'input.npy' in the archive is damaged: its CRC"),
        (changed(DEFLATED, "<I", 0, after=b"input.npy", at=29 + 30), "'input.npy' in the archive is damaged: "),
        (changed(DEFLATED, "<H", 8, after=b"PK\x03\x04", at=26), "has a header that contradicts the directory"),
    ],
)
def test_what_is_no_archive_or_a_damaged_one_is_named(content: bytes, message: str) -> None:
    error = refused(decode, content)
    assert isinstance(error, NotParseable)
    assert message in error.detail


def test_deflated_data_must_end_where_the_member_does() -> None:
    file = npy(SMALL["input"])
    packed = zlib.compress(file, wbits=-15)

    def member(stream: bytes, size: int) -> bytes:
        content = archive(("input.npy", stream))
        for signature, method, crc in ((b"PK\x03\x04", 8, 14), (CENTRAL, 10, 16)):
            content = changed(content, "<H", 8, after=signature, at=method)
            content = changed(content, "<I", zlib.crc32(file), after=signature, at=crc)
            content = changed(content, "<I", size, after=signature, at=crc + 8)
        return content

    assert_same(decode(member(packed, len(file)), LIMIT)["input"], SMALL["input"])
    assert "bytes follow the end" in refused(decode, member(packed + b"!", len(file))).detail
    assert "bytes before the declared" in refused(decode, member(packed[: len(packed) // 2], len(file))).detail
    assert "more than the declared 223 bytes" in refused(decode, member(packed, len(file) - 1)).detail
    assert "end 1 bytes before the declared 225" in refused(decode, member(packed, len(file) + 1)).detail


def test_large_members_are_inflated_piece_by_piece(rng: np.random.Generator) -> None:
    arrays: dict[str, Any] = {"noise": rng.normal(size=(400, 400)), "zeros": np.zeros((400, 400))}
    decoded = decode(saved(arrays, np.savez_compressed), 3_000_000)
    for name, array in arrays.items():
        assert_same(decoded[name], array)
