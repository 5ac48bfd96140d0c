"""Tests of content codings against Python's gzip and zlib, and the zstd of its newer versions."""

import gzip
import io
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.codecs import content_coding
from service.codecs.content_coding import (
    COMPRESSORS,
    DECOMPRESSORS,
    MAX_COMPRESSED_MEMBERS,
    MIN_BYTES_TO_COMPRESS,
)
from service.codecs.zstandard import zstd
from service.errors import BodyTooLarge, NotParseable
from tests.service.codecs.strategies import DECODE_LIMIT_BYTES, assert_decode_rejected, measure_peak_bytes

Compress = Callable[[bytes], bytes]


def compress_raw_deflate(content: bytes) -> bytes:
    """Return deflated data without zlib's header and checksum, as some clients send it."""
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(content) + compressor.flush()


def compress_unsized_zstd(content: bytes) -> bytes:
    """Return a zstd frame without the size of its content."""
    compressor = zstd.ZstdCompressor()
    return compressor.compress(content) + compressor.flush()


COMPRESS_BY_NAME: dict[str, tuple[str, Compress]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip that stores": ("gzip", lambda content: gzip.compress(content, 0)),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "deflate that stores": ("deflate", lambda content: zlib.compress(content, 0)),
    "bare deflate": ("deflate", compress_raw_deflate),
    "zstd": ("zstd", zstd.compress),
    "streamed zstd": ("zstd", compress_unsized_zstd),
}
MULTI_MEMBER_NAMES = [name for name, (coding, _) in COMPRESS_BY_NAME.items() if coding != "deflate"]

parametrize_coders = pytest.mark.parametrize(("coding", "compress"), COMPRESS_BY_NAME.values(), ids=COMPRESS_BY_NAME)
parametrize_multi_member = pytest.mark.parametrize(
    ("coding", "compress"), [COMPRESS_BY_NAME[name] for name in MULTI_MEMBER_NAMES], ids=MULTI_MEMBER_NAMES
)


def draw_noise(length: int) -> bytes:
    return np.random.default_rng(length).bytes(length)


CONTENTS = st.one_of(
    st.binary(max_size=300),
    st.builds(draw_noise, st.integers(0, 300_000)),
    st.builds(
        lambda unit, length: (unit * length)[:length], st.binary(min_size=1, max_size=50), st.integers(0, 300_000)
    ),
    st.builds(
        lambda length, zeros: draw_noise(length) + bytes(zeros), st.integers(0, 150_000), st.integers(0, 150_000)
    ),
)
"""Up to 300 kB: incompressible bytes, repeated bytes, and one followed by the other."""


@parametrize_coders
@given(content=CONTENTS)
@example(content=bytes(65_536))
@example(content=draw_noise(65_536))
@example(content=draw_noise(65_535))
def test_compressed_content_is_restored(coding: str, compress: Compress, content: bytes) -> None:
    compressed = compress(content)
    assert content_coding.decompress(coding, compressed, DECODE_LIMIT_BYTES) == content
    assert content_coding.decompress(coding, memoryview(bytearray(compressed)), DECODE_LIMIT_BYTES) == content


@parametrize_coders
@given(content=CONTENTS.filter(len))
def test_limit_is_exact(coding: str, compress: Compress, content: bytes) -> None:
    compressed = compress(content)
    assert content_coding.decompress(coding, compressed, len(content)) == content
    with pytest.raises(BodyTooLarge, match="CORR2D_MAX_BODY_MB"):
        content_coding.decompress(coding, compressed, len(content) - 1)


@parametrize_coders
def test_empty_content_is_restored(coding: str, compress: Compress) -> None:
    assert bytes(content_coding.decompress(coding, compress(b""), 0)) == b""


@parametrize_coders
@pytest.mark.parametrize("length", [1, 1000, 2**20 - 1, 2**20, 2**20 + 1, 2 * 2**20])
def test_limit_is_exact_at_every_chunk_boundary(coding: str, compress: Compress, length: int) -> None:
    compressed = compress(bytes(length))
    assert content_coding.decompress(coding, compressed, length) == bytes(length)
    with pytest.raises(BodyTooLarge):
        content_coding.decompress(coding, compressed, length - 1)


@pytest.mark.slow
@parametrize_multi_member
@given(contents=st.lists(CONTENTS, min_size=1, max_size=4))
def test_consecutive_members_are_one_body(coding: str, compress: Compress, contents: list[bytes]) -> None:
    together = b"".join(map(compress, contents))
    whole = b"".join(contents)
    assert content_coding.decompress(coding, together, 4 * DECODE_LIMIT_BYTES) == whole
    assert content_coding.decompress(coding, together, len(whole)) == whole
    if whole:
        with pytest.raises(BodyTooLarge):
            content_coding.decompress(coding, together, len(whole) - 1)


def test_zstd_skippable_frames_are_skipped() -> None:
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    assert (
        content_coding.decompress(
            "zstd", zstd.compress(b"one") + skippable + zstd.compress(b"two"), DECODE_LIMIT_BYTES
        ).tobytes()
        == b"onetwo"
    )


def test_deflate_has_one_member_only() -> None:
    error = assert_decode_rejected(
        lambda content, limit: content_coding.decompress("deflate", content, limit), zlib.compress(b"one") * 2
    )
    assert "continues after" in error.detail


@parametrize_multi_member
def test_maximum_number_of_members_is_accepted(coding: str, compress: Compress) -> None:
    assert (
        content_coding.decompress(coding, compress(b"1") * MAX_COMPRESSED_MEMBERS, DECODE_LIMIT_BYTES)
        == b"1" * MAX_COMPRESSED_MEMBERS
    )
    with pytest.raises(NotParseable, match=f"after {MAX_COMPRESSED_MEMBERS} ends of {coding} data"):
        content_coding.decompress(coding, compress(b"1") * (MAX_COMPRESSED_MEMBERS + 1), DECODE_LIMIT_BYTES)


@parametrize_multi_member
@pytest.mark.parametrize("members", [5000, 500_000])
def test_many_empty_members_are_rejected_quickly(coding: str, compress: Compress, members: int) -> None:
    together = compress(b"") * members
    start = time.perf_counter()
    with pytest.raises(NotParseable, match="continues after"):
        content_coding.decompress(coding, together, DECODE_LIMIT_BYTES)
    assert time.perf_counter() - start < 1


@parametrize_coders
@given(content=CONTENTS, data=st.data())
def test_truncation_anywhere_is_rejected(coding: str, compress: Compress, content: bytes, data: st.DataObject) -> None:
    compressed = compress(content)
    end = data.draw(st.integers(0, len(compressed) - 1))
    error = assert_decode_rejected(lambda cut, limit: content_coding.decompress(coding, cut, limit), compressed[:end])
    assert isinstance(error, NotParseable)
    assert coding in error.detail


@parametrize_coders
@given(trailing=st.binary(min_size=1, max_size=20).filter(lambda content: content[:1] not in (b"\x1f", b"\x28")))
def test_bytes_after_the_end_are_rejected(coding: str, compress: Compress, trailing: bytes) -> None:
    with pytest.raises(NotParseable):
        content_coding.decompress(coding, compress(b"content") + trailing, DECODE_LIMIT_BYTES)


@parametrize_coders
@given(content=st.binary(max_size=100), data=st.data())
def test_damage_is_rejected_or_outside_the_checksum(
    coding: str, compress: Compress, content: bytes, data: st.DataObject
) -> None:
    compressed = bytearray(compress(content))
    compressed[data.draw(st.integers(0, len(compressed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = content_coding.decompress(coding, compressed, DECODE_LIMIT_BYTES)
    except (NotParseable, BodyTooLarge):
        return
    assert len(decoded) <= DECODE_LIMIT_BYTES
    if "gzip" in coding:
        assert decoded == content


@pytest.mark.parametrize("coding", DECOMPRESSORS)
@pytest.mark.parametrize("content", [b"\x00", b'{"input": [[1]], "kernel": [[2]]}', b"PK\x03\x04" + bytes(40)])
def test_uncompressed_bytes_are_rejected(coding: str, content: bytes) -> None:
    error = assert_decode_rejected(lambda body, limit: content_coding.decompress(coding, body, limit), content)
    assert isinstance(error, NotParseable)
    assert coding in error.detail


@pytest.mark.parametrize("coding", DECOMPRESSORS)
def test_zero_bytes_are_rejected(coding: str) -> None:
    with pytest.raises(NotParseable, match="the body is empty"):
        content_coding.decompress(coding, b"", DECODE_LIMIT_BYTES)


@pytest.mark.slow
@pytest.mark.robustness(21)
@parametrize_coders
def test_bomb_costs_no_more_than_the_limit(coding: str, compress: Compress) -> None:
    bomb = compress(bytes(100 * DECODE_LIMIT_BYTES))

    def explode() -> None:
        with pytest.raises(BodyTooLarge):
            content_coding.decompress(coding, bomb, DECODE_LIMIT_BYTES)

    start = time.perf_counter()
    assert measure_peak_bytes(explode) < 4 * DECODE_LIMIT_BYTES
    assert time.perf_counter() - start < 1


@pytest.mark.robustness(21)
def test_window_larger_than_128_mib_is_rejected() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 28}
    compressor = zstd.ZstdCompressor(options=options)
    frame = compressor.compress(b"content") + compressor.flush()
    with pytest.raises(NotParseable, match="zstd"):
        content_coding.decompress("zstd", frame, DECODE_LIMIT_BYTES)


def decompress_parts(coding: str, parts: list[bytes | memoryview]) -> bytes:
    """Decompress a response body with an independent library."""
    content = b"".join(parts)
    return zstd.decompress(content) if coding == "zstd" else gzip.GzipFile(fileobj=io.BytesIO(content)).read()


@pytest.mark.parametrize("coding", COMPRESSORS)
@given(contents=st.lists(CONTENTS, min_size=1, max_size=4))
def test_response_is_restored_by_decompression(coding: str, contents: list[bytes]) -> None:
    parts: list[bytes | memoryview] = [
        memoryview(content) if at % 2 else content for at, content in enumerate(contents)
    ]
    encoded = list(content_coding.compress(coding, parts))
    whole = b"".join(contents)
    if encoded == parts:
        assert b"".join(encoded) == whole
    else:
        assert decompress_parts(coding, encoded) == whole
        assert sum(map(len, encoded)) <= 0.8 * len(whole)


@pytest.mark.parametrize("coding", COMPRESSORS)
def test_response_is_compressed_from_1400_bytes(coding: str) -> None:
    assert MIN_BYTES_TO_COMPRESS == 1400
    small = [bytes(1399)]
    assert content_coding.compress(coding, small) is small
    assert decompress_parts(coding, list(content_coding.compress(coding, [bytes(1400)]))) == bytes(1400)
    assert decompress_parts(coding, list(content_coding.compress(coding, [bytes(700), bytes(700)]))) == bytes(1400)


@pytest.mark.parametrize("coding", COMPRESSORS)
@pytest.mark.parametrize("length", [1400, 65_536, 65_537, 1_000_000])
def test_incompressible_response_is_sent_uncompressed(coding: str, length: int) -> None:
    parts = [draw_noise(length)]
    assert content_coding.compress(coding, parts) is parts


@pytest.mark.parametrize("coding", COMPRESSORS)
@pytest.mark.parametrize(("share", "worth"), [(0.5, True), (0.75, True), (0.85, False), (1.0, False)])
def test_compression_to_four_fifths_is_enough(coding: str, share: float, worth: bool) -> None:
    parts = [draw_noise(round(share * 50_000)) + bytes(round((1 - share) * 50_000))]
    assert (content_coding.compress(coding, parts) is not parts) == worth


@pytest.mark.parametrize("coding", COMPRESSORS)
def test_parts_are_compressed_as_one_stream(coding: str) -> None:
    whole = (b"0123456789abcdef" * 20_000)[:300_001]
    cut: list[bytes | memoryview] = [whole[:7], memoryview(whole)[7:7], memoryview(whole)[7:100_000], whole[100_000:]]
    assert (
        decompress_parts(coding, list(content_coding.compress(coding, cut)))
        == decompress_parts(coding, list(content_coding.compress(coding, [whole])))
        == whole
    )
