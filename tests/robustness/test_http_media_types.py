"""Robustness cases 18 and 19: Content-Type and Accept."""

import json

import httpx
import numpy as np
import pytest

from service.codecs.registry import DECODABLE_MEDIA_TYPES, ENCODABLE_FORMATS
from service.routes.train_kernel import RESPONSE_FORMATS
from tests.problem_details import assert_detail, assert_problem
from tests.robustness.sample_requests import SMALL_BODY, post_body
from tests.sample_files import JSON, NPY, NPZ, PNG, save_npz
from tests.servers import SendFn

UNKNOWN_TYPES = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/mixed; boundary=x",
    "image/gif",
    "application/x-numpy",
    "application/*",
    "*/*",
    "application/json, image/png",
    "application/jsonx",
    "json",
    ";",
    "",
    "x" * 3000,
]


@pytest.mark.robustness(18)
@pytest.mark.parametrize("content_type", UNKNOWN_TYPES)
def test_unknown_media_type_is_415_with_supported_types(send: SendFn, content_type: str) -> None:
    response = post_body(send, b"{}", content_type=content_type)
    detail = assert_detail(response, 415)
    assert all(media_type in detail for media_type in DECODABLE_MEDIA_TYPES)
    assert response.headers["accept"] == ", ".join(DECODABLE_MEDIA_TYPES)


@pytest.mark.robustness(18)
@pytest.mark.parametrize(
    ("content_type", "advice"),
    [
        ("image/jpg", "the media type of JPEG is image/jpeg"),
        ("IMAGE/JPG; q=1", "the media type of JPEG is image/jpeg"),
        ("image/heic", "convert it to JPEG, PNG, WebP or TIFF"),
        ("image/avif", "convert it to JPEG, PNG, WebP or TIFF"),
    ],
)
def test_common_mistakes_get_advice(send: SendFn, content_type: str, advice: str) -> None:
    assert advice in assert_detail(post_body(send, b"image", content_type=content_type), 415)


@pytest.mark.robustness(18)
@pytest.mark.parametrize("content_type", ["image/jpeg", "image/png", "image/webp", "image/tiff", NPY])
@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_heic_under_another_media_type_is_415(send: SendFn, content_type: str, brand: bytes) -> None:
    body = b"\0\0\0\x18ftyp" + brand + bytes(99)
    detail = assert_detail(send("POST", "/correlate", content=body, headers={"Content-Type": content_type}), 415)
    assert "HEIC" in detail
    assert "convert it to JPEG, PNG, WebP or TIFF" in detail


@pytest.mark.robustness(18)
def test_missing_media_type_is_415(send: SendFn) -> None:
    assert "no Content-Type" in assert_detail(send("POST", "/correlate", content=SMALL_BODY), 415)


@pytest.mark.robustness(18)
@pytest.mark.parametrize("parameter", ["", "; charset=utf-8"])
def test_two_content_types_are_415(send: SendFn, parameter: str) -> None:
    lines = [("Content-Type", JSON + parameter), ("Content-Type", "image/png")]
    assert_problem(send("POST", "/correlate", content=SMALL_BODY, headers=lines), 415)
    assert_problem(send("POST", "/correlate", content=SMALL_BODY, headers=lines[::-1]), 415)


def post_accepting(send: SendFn, *accept: str, path: str = "/correlate", body: bytes = SMALL_BODY) -> httpx.Response:
    """Post a JSON body with one Accept header line for each given value."""
    lines = [(b"Content-Type", JSON.encode()), *((b"Accept", line.encode("latin-1")) for line in accept)]
    return send("POST", path, content=body, headers=lines)


UNACCEPTABLE_TYPES = [
    "text/html",
    "image/gif",
    "image/jpg",
    "text/*",
    "application/problem+json",
    "application/json;q=0",
    "*/*;q=0",
    "*/*;q=0.0",
    "application/*;q=0, image/*;q=0",
    "application/*;q=0",
    "json",
    "image/png/png",
    ";",
    "/",
    "\xff\xfe",
    "application/x-npyz",
    "x" * 5000,
]


@pytest.mark.robustness(19)
@pytest.mark.parametrize("accept", UNACCEPTABLE_TYPES)
def test_unsatisfiable_accept_is_406_with_supported_types(send: SendFn, accept: str) -> None:
    detail = assert_detail(post_accepting(send, accept), 406)
    assert all(media_type in detail for media_type in ENCODABLE_FORMATS)
    assert accept[:50] in detail


@pytest.mark.robustness(19)
def test_header_on_several_lines_is_one_list(send: SendFn) -> None:
    assert post_accepting(send, "text/html", "image/png").headers["content-type"] == PNG
    several = ["application/json;q=0.1", "application/x-npy;q=0.3, image/png;q=0.2"]
    assert post_accepting(send, *several).headers["content-type"] == NPY
    assert_problem(post_accepting(send, "text/html", "image/gif"), 406)


@pytest.mark.robustness(19)
def test_unsupported_format_of_a_fit_is_406(send: SendFn) -> None:
    body = json.dumps({"input": [[1, 2]], "target": [[1, 2]], "seed": 1}).encode()
    for accept in ("image/jpeg", "text/html", "video/*"):
        detail = assert_detail(post_accepting(send, accept, path="/train-kernel", body=body), 406)
        assert detail.endswith(", ".join(RESPONSE_FORMATS))
    plots = {"image/png": "image/png", "image/*": "image/svg+xml", "text/*": "text/event-stream"}
    for accept, expected in {"*/*": JSON, "image/jpeg, application/*;q=0.1": JSON, NPZ: NPZ, **plots}.items():
        response = post_accepting(send, accept, path="/train-kernel", body=body)
        assert response.headers["content-type"] == expected


@pytest.mark.robustness(19)
def test_non_image_output_is_406_with_advice(send: SendFn, rng: np.random.Generator) -> None:
    arrays = save_npz(input=rng.normal(size=(2, 3, 9, 8)), weight=rng.normal(size=(6, 3, 1, 1)))
    headers = {"Content-Type": NPZ, "Accept": PNG}
    detail = assert_detail(send("POST", "/conv2d?dtype=float64", content=arrays, headers=headers), 406)
    assert "(2, 6, 9, 8)" in detail
    assert "application/x-npy" in detail
