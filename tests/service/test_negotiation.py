"""Tests of content negotiation by the headers Accept, Accept-Encoding and Content-Type."""

import json

import pytest

from tests.sample_files import JPEG, JSON, NPY, NPZ, PNG, SAFETENSORS, TIFF, WEBP
from tests.servers import SendFn
from tests.service.samples.json_requests import COMPRESSIBLE_BODY, post_json, send_raw_request

TYPE_BY_ACCEPT = {
    "": JSON,
    "*/*": JSON,
    "*": JSON,
    "application/*": JSON,
    "image/*": PNG,
    "application/json": JSON,
    "application/x-npy": NPY,
    "application/x-npz": NPZ,
    "application/x-safetensors": SAFETENSORS,
    "image/png": PNG,
    "IMAGE/PNG": PNG,
    "Application/X-NPY;Q=0.5": NPY,
    "application/json; charset=utf-8": JSON,
    "application/json;q=0.5, image/png": PNG,
    "application/json;q=0.5, image/png;q=0.6": PNG,
    "application/json;q=0.6, image/png;q=0.5": JSON,
    "application/json;q=0.1, application/x-npy;q=0.2, application/x-npz;q=0.3": NPZ,
    "application/x-npz;q=0.001": NPZ,
    "application/x-npy, application/json": JSON,
    "application/x-npz, application/x-npy": NPY,
    "*/*, image/png": PNG,
    "image/png, */*": PNG,
    "image/png, */*;q=0.1": PNG,
    "*/*;q=0.1, application/*;q=0.2": JSON,
    "application/json;q=0.1, */*;q=0.5": NPY,
    "application/json;q=0, */*": NPY,
    "application/*;q=0, */*": PNG,
    "application/*;q=0, application/x-npz;q=0.1": NPZ,
    "image/jpeg": JPEG,
    "image/webp": WEBP,
    "image/tiff": TIFF,
    "image/tiff, image/webp": WEBP,
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": JSON,
    "text/html, application/xhtml+xml, application/xml;q=0.9, image/avif, image/webp, image/apng, */*;q=0.8": WEBP,
    "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5": PNG,
    "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2": JPEG,
    "application/x-nonsense, application/x-npy;q=0.1": NPY,
    "application/json, application/problem+json": JSON,
    "  image/png  ": PNG,
    ", image/png,, ": PNG,
    "image/png;q=1.000": PNG,
    "image/png;level=9;q=0.5, application/json;q=0.4": PNG,
}
"""The response type for each Accept header (RFC 9110, 12.5.1); of equal qualities, the first that is served wins."""


@pytest.mark.parametrize(("accept", "expected"), TYPE_BY_ACCEPT.items(), ids=map(repr, TYPE_BY_ACCEPT))
def test_accept_selects_the_response_format(send_in_process: SendFn, accept: str, expected: str) -> None:
    response = post_json(send_in_process, {"Accept": accept})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == expected


def test_default_response_is_uncompressed_json(address: str) -> None:
    zeros = json.dumps({"input": [[0] * 100] * 100, "kernel": "identity"}).encode()
    status, headers, content = send_raw_request(address, [("Content-Type", JSON)], zeros)
    assert (status, headers["content-type"], headers["content-encoding"]) == (200, JSON, None)
    assert json.loads(content)["shape"] == [100, 100]


def test_content_type_is_never_guessed(address: str) -> None:
    status, headers, content = send_raw_request(address, [])
    assert (status, headers["content-type"]) == (415, "application/problem+json")
    assert b"no Content-Type" in content


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "Application/JSON",
        "APPLICATION/JSON ; charset=utf-8",
        "application/json;",
        'application/json; profile="a, b"',
    ],
)
def test_media_types_have_parameters_and_ignore_case(send: SendFn, content_type: str) -> None:
    assert post_json(send, {"Content-Type": content_type}).status_code == 200


CODING_BY_ACCEPT = {
    "": None,
    "identity": None,
    "gzip": "gzip",
    "GZIP": "gzip",
    "x-gzip": "gzip",
    "zstd": "zstd",
    "gzip, zstd": "zstd",
    "gzip, deflate, br, zstd": "zstd",
    "gzip;q=1.0, zstd;q=0.5": "gzip",
    "gzip; q=0.5 , zstd; q=0.1": "gzip",
    "zstd;q=0, gzip": "gzip",
    "*": "zstd",
    "*;q=0.5, zstd;q=0": "gzip",
    "*;q=0": None,
    "gzip;q=0": None,
    "gzip;q=0, *;q=0": None,
    "br": None,
    "deflate": None,
    "identity, gzip;q=0.5": None,
    "identity;q=0.5, gzip": "gzip",
    "identity;q=0, gzip": "gzip",
    "gzip;q=nonsense": None,
    ",,;;=": None,
    "gzip,": "gzip",
    "\xff": None,
}


@pytest.mark.parametrize(("accept", "expected"), CODING_BY_ACCEPT.items(), ids=map(repr, CODING_BY_ACCEPT))
def test_accept_encoding_selects_the_response_coding(
    send_in_process: SendFn, accept: str, expected: str | None
) -> None:
    response = post_json(send_in_process, {"Accept-Encoding": accept}, body=COMPRESSIBLE_BODY)
    assert response.status_code == 200
    assert response.headers.get("content-encoding") in ([expected, "x-gzip"] if accept == "x-gzip" else [expected])
