"""Robustness cases 20 and 21: compressed bodies and compression bombs."""

import json
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from service.codecs.content_coding import MAX_COMPRESSED_MEMBERS
from tests.problem_details import assert_detail
from tests.robustness.memory import measure_peak_bytes
from tests.robustness.sample_requests import BODY_LIMIT_BYTES, MEGABYTE, SMALL_IMAGE, parametrize_codings, post_file
from tests.sample_files import COMPRESS_BY_CODING, JSON, NPY, NPZ, PNG, SAFETENSORS, save_image, save_npy, save_npz
from tests.servers import SendFn


@pytest.mark.robustness(20)
@parametrize_codings
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (NPY, save_npy(SMALL_IMAGE)),
        (NPZ, save_npz(input=SMALL_IMAGE)),
        (SAFETENSORS, safetensors.numpy.save({"input": SMALL_IMAGE})),
        (JSON, json.dumps({"input": SMALL_IMAGE.tolist()}).encode()),
        (JSON, json.dumps({"input": SMALL_IMAGE.tolist()}).encode() + b" " * 100_000),
    ],
)
def test_compressed_body_is_decoded(
    send: SendFn, coding: str, compress: Callable[[bytes], bytes], content_type: str, body: bytes
) -> None:
    for name in (coding, coding.upper(), f" {coding}"[1:]):
        assert post_file(send, compress(body), content_type, name).json()["output"] == SMALL_IMAGE.tolist()
    assert (
        post_file(send, save_image(), PNG, None).json() == post_file(send, compress(save_image()), PNG, coding).json()
    )


@pytest.mark.robustness(20)
@pytest.mark.parametrize("coding", ["identity", "", "Identity"])
def test_identity_coding_is_accepted(send: SendFn, coding: str) -> None:
    assert post_file(send, save_npy(SMALL_IMAGE), coding=coding).status_code == 200


@pytest.mark.robustness(20)
@pytest.mark.parametrize(
    "coding", ["br", "compress", "x", "gzip, gzip", "gzip, identity", "zstd;q=1", "x" * 3000, "\xff"]
)
def test_unknown_coding_is_415_with_supported_codings(send: SendFn, coding: str) -> None:
    headers = {b"Content-Type": NPY.encode(), b"Content-Encoding": coding.encode("latin-1")}
    response: Any = send("POST", "/correlate?kernel=identity", content=save_npy(SMALL_IMAGE), headers=headers)
    detail = assert_detail(response, 415)
    assert f'Content-Encoding "{coding[:50]}' in detail
    assert "gzip, deflate, zstd" in detail
    assert response.headers["accept-encoding"] == "gzip, deflate, zstd"


@pytest.mark.robustness(20)
@parametrize_codings
def test_truncated_or_damaged_compressed_body_is_400(
    send: SendFn, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(save_npy(np.random.default_rng(1).normal(size=(30, 30))))
    for end in (1, 2, len(whole) // 2, len(whole) - 1):
        assert coding in assert_detail(post_file(send, whole[:end], coding=coding), 400)
    for body in (b"", b"\x00", save_npy(SMALL_IMAGE), whole[::-1], b"\x1f\x8b" + bytes(100)):
        assert coding in assert_detail(post_file(send, body, coding=coding), 400)
    for at in range(0, len(whole), len(whole) // 10):
        damaged = bytearray(whole)
        damaged[at] ^= 255
        assert post_file(send, bytes(damaged), coding=coding).status_code in (200, 400, 413, 422)


@cache
def build_bomb(coding: str) -> bytes:
    """Return compressed zeros that expand to nearly five times the body limit."""
    return COMPRESS_BY_CODING[coding](bytes(300_000_000))


@pytest.mark.robustness(21)
@pytest.mark.parametrize("coding", COMPRESS_BY_CODING)
def test_compression_bomb_is_413_quickly(send: SendFn, coding: str) -> None:
    bomb = build_bomb(coding)
    assert len(bomb) < MEGABYTE
    for content_type in (NPY, JSON, PNG):
        start = time.perf_counter()
        detail = assert_detail(post_file(send, bomb, content_type, coding), 413)
        assert time.perf_counter() - start < 3
        assert "64,000,000 bytes" in detail
        assert "CORR2D_MAX_BODY_MB" in detail
    assert measure_peak_bytes(lambda: post_file(send, bomb, NPY, coding)) < 1.5 * BODY_LIMIT_BYTES


@pytest.mark.robustness(21)
@parametrize_codings
def test_limit_applies_to_the_fully_decoded_size(send: SendFn, coding: str, compress: Callable[[bytes], bytes]) -> None:
    nested = compress(save_npz(input=np.zeros((8100, 8000), np.uint8)))
    assert "64,800,128 bytes" in assert_detail(post_file(send, nested, NPZ, coding), 413)


@pytest.mark.robustness(21)
@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_thousands_of_members_are_rejected_quickly(send: SendFn, coding: str) -> None:
    start = time.perf_counter()
    detail = assert_detail(post_file(send, COMPRESS_BY_CODING[coding](b"") * 100_000, coding=coding), 400)
    assert time.perf_counter() - start < 2
    assert f"{MAX_COMPRESSED_MEMBERS} ends" in detail


@pytest.mark.robustness(21)
def test_body_in_several_members_is_accepted(send: SendFn) -> None:
    whole = save_npy(SMALL_IMAGE)
    for coding in ("gzip", "zstd"):
        members = b"".join(COMPRESS_BY_CODING[coding](whole[at : at + 50]) for at in range(0, len(whole), 50))
        assert post_file(send, members, coding=coding).json()["output"] == SMALL_IMAGE.tolist()
