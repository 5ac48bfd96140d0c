"""Content codings, against Python's gzip and zlib and the zstd of its newer versions."""

import gzip
import io
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from backports import zstd
from hypothesis import example, given
from hypothesis import strategies as st

from service.codecs.content_coding import COMPRESSORS, DECOMPRESSORS, LEAST, MAX_MEMBERS, decode, encode
from service.errors import BodyTooLarge, NotParseable
from tests.service.codecs.drawn import LIMIT, peak, refused

Compress = Callable[[bytes], bytes]


def bare(content: bytes) -> bytes:
    """Deflated data without the head and the check sum of zlib's format, as some clients send them."""
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(content) + compressor.flush()


def streamed(content: bytes) -> bytes:
    """A frame of zstd that does not say how long its content is."""
    compressor = zstd.ZstdCompressor()
    return compressor.compress(content) + compressor.flush()


CODERS: dict[str, tuple[str, Compress]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip that stores": ("gzip", lambda content: gzip.compress(content, 0)),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "deflate that stores": ("deflate", lambda content: zlib.compress(content, 0)),
    "bare deflate": ("deflate", bare),
    "zstd": ("zstd", zstd.compress),
    "streamed zstd": ("zstd", streamed),
}
IN_MEMBERS = [name for name, (coding, _) in CODERS.items() if coding != "deflate"]

by_every_coder = pytest.mark.parametrize(("coding", "compress"), CODERS.values(), ids=CODERS)
in_members = pytest.mark.parametrize(("coding", "compress"), [CODERS[name] for name in IN_MEMBERS], ids=IN_MEMBERS)


def noise(length: int) -> bytes:
    return np.random.default_rng(length).bytes(length)


CONTENTS = st.one_of(
    st.binary(max_size=300),
    st.builds(noise, st.integers(0, 300_000)),
    st.builds(
        lambda unit, length: (unit * length)[:length], st.binary(min_size=1, max_size=50), st.integers(0, 300_000)
    ),
    st.builds(lambda length, zeros: noise(length) + bytes(zeros), st.integers(0, 150_000), st.integers(0, 150_000)),
)
"""Up to 300 kB: what cannot be compressed, what is nothing but repeats, and one before the other."""


@by_every_coder
@given(content=CONTENTS)
@example(content=bytes(65_536))
@example(content=noise(65_536))
@example(content=noise(65_535))
def test_what_was_compressed_comes_back(coding: str, compress: Compress, content: bytes) -> None:
    compressed = compress(content)
    assert decode(coding, compressed, LIMIT) == content
    assert decode(coding, memoryview(bytearray(compressed)), LIMIT) == content


@by_every_coder
@given(content=CONTENTS.filter(len))
def test_the_limit_is_exact(coding: str, compress: Compress, content: bytes) -> None:
    compressed = compress(content)
    assert decode(coding, compressed, len(content)) == content
    with pytest.raises(BodyTooLarge, match="CORR2D_MAX_BODY_MB"):
        decode(coding, compressed, len(content) - 1)


@by_every_coder
def test_nothing_compressed_is_nothing(coding: str, compress: Compress) -> None:
    assert bytes(decode(coding, compress(b""), 0)) == b""


@by_every_coder
@pytest.mark.parametrize("length", [1, 1000, 2**20 - 1, 2**20, 2**20 + 1, 2 * 2**20])
def test_the_limit_is_exact_wherever_pieces_end(coding: str, compress: Compress, length: int) -> None:
    compressed = compress(bytes(length))
    assert decode(coding, compressed, length) == bytes(length)
    with pytest.raises(BodyTooLarge):
        decode(coding, compressed, length - 1)


@in_members
@given(contents=st.lists(CONTENTS, min_size=1, max_size=4))
def test_members_behind_each_other_are_one_body(coding: str, compress: Compress, contents: list[bytes]) -> None:
    together = b"".join(map(compress, contents))
    whole = b"".join(contents)
    assert decode(coding, together, 4 * LIMIT) == whole
    assert decode(coding, together, len(whole)) == whole
    if whole:
        with pytest.raises(BodyTooLarge):
            decode(coding, together, len(whole) - 1)


def test_zstds_skippable_frames_are_skipped() -> None:
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    assert decode("zstd", zstd.compress(b"one") + skippable + zstd.compress(b"two"), LIMIT).tobytes() == b"onetwo"


def test_deflate_has_one_member_only() -> None:
    error = refused(lambda content, limit: decode("deflate", content, limit), zlib.compress(b"one") * 2)
    assert "goes on behind" in error.detail


@in_members
def test_as_many_members_are_taken_as_there_may_be(coding: str, compress: Compress) -> None:
    assert decode(coding, compress(b"1") * MAX_MEMBERS, LIMIT) == b"1" * MAX_MEMBERS
    with pytest.raises(NotParseable, match=f"behind {MAX_MEMBERS} ends of {coding} data"):
        decode(coding, compress(b"1") * (MAX_MEMBERS + 1), LIMIT)


@in_members
@pytest.mark.parametrize("members", [5000, 500_000])
def test_any_number_of_empty_members_is_refused_fast(coding: str, compress: Compress, members: int) -> None:
    together = compress(b"") * members
    start = time.perf_counter()
    with pytest.raises(NotParseable, match="goes on behind"):
        decode(coding, together, LIMIT)
    assert time.perf_counter() - start < 1


@by_every_coder
@given(content=CONTENTS, data=st.data())
def test_what_is_cut_off_anywhere_is_refused(
    coding: str, compress: Compress, content: bytes, data: st.DataObject
) -> None:
    compressed = compress(content)
    end = data.draw(st.integers(0, len(compressed) - 1))
    error = refused(lambda cut, limit: decode(coding, cut, limit), compressed[:end])
    assert isinstance(error, NotParseable)
    assert coding in error.detail


@by_every_coder
@given(trailing=st.binary(min_size=1, max_size=20).filter(lambda content: content[:1] not in (b"\x1f", b"\x28")))
def test_what_follows_the_end_is_refused(coding: str, compress: Compress, trailing: bytes) -> None:
    with pytest.raises(NotParseable):
        decode(coding, compress(b"content") + trailing, LIMIT)


@by_every_coder
@given(content=st.binary(max_size=100), data=st.data())
def test_damage_is_refused_or_has_no_effect_on_what_a_check_sum_covers(
    coding: str, compress: Compress, content: bytes, data: st.DataObject
) -> None:
    compressed = bytearray(compress(content))
    compressed[data.draw(st.integers(0, len(compressed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(coding, compressed, LIMIT)
    except (NotParseable, BodyTooLarge):
        return
    assert len(decoded) <= LIMIT
    if "gzip" in coding:
        assert decoded == content


@pytest.mark.parametrize("coding", DECOMPRESSORS)
@pytest.mark.parametrize("content", [b"\x00", b'{"input": [[1]], "kernel": [[2]]}', b"PK\x03\x04" + bytes(40)])
def test_what_was_never_compressed_is_refused(coding: str, content: bytes) -> None:
    error = refused(lambda body, limit: decode(coding, body, limit), content)
    assert isinstance(error, NotParseable)
    assert coding in error.detail


@pytest.mark.parametrize("coding", DECOMPRESSORS)
def test_no_bytes_at_all_are_no_compressed_data(coding: str) -> None:
    with pytest.raises(NotParseable, match="the body is empty"):
        decode(coding, b"", LIMIT)


@by_every_coder
def test_21_a_bomb_costs_no_more_than_the_limit(coding: str, compress: Compress) -> None:
    bomb = compress(bytes(100 * LIMIT))

    def explode() -> None:
        with pytest.raises(BodyTooLarge):
            decode(coding, bomb, LIMIT)

    start = time.perf_counter()
    assert peak(explode) < 4 * LIMIT
    assert time.perf_counter() - start < 1


def test_21_a_window_larger_than_128_mib_is_refused() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 28}
    compressor = zstd.ZstdCompressor(options=options)
    frame = compressor.compress(b"content") + compressor.flush()
    with pytest.raises(NotParseable, match="zstd"):
        decode("zstd", frame, LIMIT)


def unpacked(coding: str, parts: list[bytes | memoryview]) -> bytes:
    """By the tools of whoever asked for the coding."""
    content = b"".join(parts)
    return zstd.decompress(content) if coding == "zstd" else gzip.GzipFile(fileobj=io.BytesIO(content)).read()


@pytest.mark.parametrize("coding", COMPRESSORS)
@given(contents=st.lists(CONTENTS, min_size=1, max_size=4))
def test_an_answer_is_what_it_was_once_it_is_unpacked(coding: str, contents: list[bytes]) -> None:
    parts: list[bytes | memoryview] = [
        memoryview(content) if at % 2 else content for at, content in enumerate(contents)
    ]
    encoded = list(encode(coding, parts))
    whole = b"".join(contents)
    if encoded == parts:
        assert b"".join(encoded) == whole
    else:
        assert unpacked(coding, encoded) == whole
        assert sum(map(len, encoded)) <= 0.8 * len(whole)


@pytest.mark.parametrize("coding", COMPRESSORS)
def test_an_answer_is_compressed_from_1400_bytes_on(coding: str) -> None:
    assert LEAST == 1400
    small = [bytes(1399)]
    assert encode(coding, small) is small
    assert unpacked(coding, list(encode(coding, [bytes(1400)]))) == bytes(1400)
    assert unpacked(coding, list(encode(coding, [bytes(700), bytes(700)]))) == bytes(1400)


@pytest.mark.parametrize("coding", COMPRESSORS)
@pytest.mark.parametrize("length", [1400, 65_536, 65_537, 1_000_000])
def test_what_does_not_shrink_is_sent_as_it_is(coding: str, length: int) -> None:
    parts = [noise(length)]
    assert encode(coding, parts) is parts


@pytest.mark.parametrize("coding", COMPRESSORS)
@pytest.mark.parametrize(("share", "worth"), [(0.5, True), (0.75, True), (0.85, False), (1.0, False)])
def test_what_shrinks_to_four_fifths_is_worth_it(coding: str, share: float, worth: bool) -> None:
    parts = [noise(round(share * 50_000)) + bytes(round((1 - share) * 50_000))]
    assert (encode(coding, parts) is not parts) == worth


@pytest.mark.parametrize("coding", COMPRESSORS)
def test_parts_are_compressed_as_if_they_were_one(coding: str) -> None:
    whole = (b"0123456789abcdef" * 20_000)[:300_001]
    cut: list[bytes | memoryview] = [whole[:7], memoryview(whole)[7:7], memoryview(whole)[7:100_000], whole[100_000:]]
    assert unpacked(coding, list(encode(coding, cut))) == unpacked(coding, list(encode(coding, [whole]))) == whole
