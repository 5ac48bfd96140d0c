"""Tests of multipart/form-data requests to the whole service, as HTML forms, browsers and curl send them."""

import io
import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from service.codecs import multipart
from service.codecs.registry import ENCODABLE_FORMATS, FORMATS
from service.codecs.response_options import ResponseOptions
from tests.problem_details import assert_detail, assert_first_error
from tests.sample_files import JPEG, JSON, NPY, NPZ, PNG, SAFETENSORS, save_image, save_npy, save_npz
from tests.servers import SendFn

IMAGE = np.arange(12, dtype=np.float32).reshape(3, 4) ** 2
OCTETS = "application/octet-stream"


def post_form(
    send: SendFn,
    files: Mapping[str, tuple[str, bytes, str]],
    fields: Mapping[str, str],
    path: str = "/correlate",
    **headers: str,
) -> httpx.Response:
    return send("POST", path, files=files, data=fields, headers=headers)


@pytest.mark.parametrize("media_type", ENCODABLE_FORMATS)
@pytest.mark.parametrize("is_named", [True, False])
def test_form_is_the_same_as_the_file_alone(send: SendFn, media_type: str, is_named: bool) -> None:
    encode = FORMATS[media_type].encode
    assert encode is not None
    content = b"".join(encode({"input": IMAGE}, ResponseOptions()))
    sent_type = media_type if is_named else OCTETS
    options = {"kernel": "[[1, -1]]", "mode": "same", "boundary": "reflect"}
    form = post_form(send, {"input": ("image.bin", content, sent_type)}, options)
    alone = send("POST", "/correlate", content=content, headers={"Content-Type": media_type}, params=options)
    assert form.status_code == 200, form.text
    assert form.json()["output"] == alone.json()["output"]


def test_html_form_of_a_browser_works(send: SendFn) -> None:
    """Test the bytes that Chromium sends for a form with a file, a select, two text inputs and an unset one."""
    boundary = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
    parts = [
        ('name="input"; filename="pho%22to.png"\r\nContent-Type: image/png', save_image("L")),
        ('name="mode"', b"same"),
        ('name="kernel"', b"sobel_x"),
        ('name="dtype"', b"float64"),
        ('name="fill_value"', b""),
    ]
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {headers}\r\n\r\n".encode() + content + b"\r\n"
        for headers, content in parts
    )
    response = send(
        "POST",
        "/correlate",
        content=body + f"--{boundary}--\r\n".encode(),
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}", "Accept": PNG},
    )
    assert response.status_code == 200, response.text
    assert Image.open(io.BytesIO(response.content)).size == (10, 12)
    assert json.loads(response.headers["Corr2d-Result"])["dtype"] == "float64"


def test_arrays_by_name_and_options_work_together(send: SendFn) -> None:
    arrays: dict[str, Any] = {"input": IMAGE[None], "weight": np.ones((2, 1, 2, 2), np.float32)}
    fields = {"stride": "[1, 2]", "bias": "[0, 10]"}
    for content, media_type in (
        (save_npz(**arrays), "application/x-zip-compressed"),
        (safetensors.numpy.save(arrays, metadata={"format": "pt"}), OCTETS),
    ):
        response = post_form(send, {"file": ("a", content, media_type)}, fields, "/conv2d")
        assert response.status_code == 200, response.text
        assert response.json()["shape"] == [2, 2, 2]


def test_array_of_a_file_is_named_by_its_part(send: SendFn) -> None:
    response = post_form(send, {"kernel": ("k.npy", save_npy(np.ones((1, 1))), OCTETS)}, {"input": "[[1, 2], [3, 4]]"})
    assert response.json()["output"] == [[1, 2], [3, 4]]


def test_form_without_a_file_works(send: SendFn) -> None:
    content = b'--b\r\nContent-Disposition: form-data; name="input"\r\n\r\n[[1, 2]]\r\n--b\r\n'
    content += b'Content-Disposition: form-data; name="kernel"\r\n\r\nidentity\r\n--b--\r\n'
    response = send("POST", "/correlate", content=content, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert response.json()["output"] == [[1, 2]]


def test_options_of_images_are_fields_or_in_the_query_string(send: SendFn) -> None:
    files = {"input": ("a.png", save_image("RGBA"), PNG)}
    for fields, path in (({"alpha": "keep"}, "/correlate"), ({}, "/correlate?alpha=keep")):
        response = post_form(send, files, {"kernel": "identity", **fields}, path)
        assert response.json()["shape"] == [4, 12, 10]
    repeated = post_form(send, files, {"kernel": "identity", "alpha": "keep"}, "/correlate?alpha=drop")
    assert assert_first_error(repeated, 422)["field"] == "alpha"
    invalid = post_form(send, files, {"kernel": "identity", "alpha": "pink"})
    assert "'drop', 'keep', 'white' or 'black'" in assert_first_error(invalid, 422)["message"]


@pytest.mark.parametrize("query", ["alpha=keep", "orientation=ignore"])
def test_options_of_images_are_rejected_for_other_bodies(send: SendFn, query: str) -> None:
    content = b'{"input": [[1]], "kernel": [[1]]}'
    alone = send("POST", f"/correlate?{query}", content=content, headers={"Content-Type": JSON})
    form = post_form(send, {"input": ("a.npy", save_npy(IMAGE), NPY)}, {"kernel": "identity"}, f"/correlate?{query}")
    for response in (alone, form):
        assert "applies to images only" in assert_first_error(response, 422)["message"]


@pytest.mark.parametrize(
    ("fields", "path", "field", "message"),
    [
        ({"kernel": "identity", "mode": "same"}, "/correlate?mode=same", "mode", "in the body and in the query string"),
        ({"kernel": "identity", "mod": "same"}, "/correlate", "mod", 'unknown field "mod"; did you mean "mode"?'),
        ({"kernel": "identity", "png": "clip"}, "/correlate", "png", "belongs in the query string: ?png=..."),
        ({"kernel": "identity", "input": "[[1]]"}, "/correlate", "input", "is in the form and in its file"),
        ({}, "/correlate", "kernel", '"kernel" is required'),
    ],
)
def test_invalid_fields_are_named(send: SendFn, fields: dict[str, str], path: str, field: str, message: str) -> None:
    error = assert_first_error(post_form(send, {"input": ("a.npy", save_npy(IMAGE), NPY)}, fields, path), 422)
    assert error["field"] == field
    assert message in error["message"]


@pytest.mark.parametrize(
    ("content", "media_type", "status", "message"),
    [
        (b"GIF89a", OCTETS, 400, "the file is not in a supported format: it begins like a GIF image"),
        (b"noise", OCTETS, 400, "its first bytes are b'noise'"),
        (b"noise", "text/csv", 415, "the file has Content-Type 'text/csv'; supported: application/json"),
        (b"noise", multipart.MEDIA_TYPE, 415, "the file has Content-Type"),
        (b"\0\0\0\x18ftypheic", OCTETS, 415, "is a HEIC or AVIF image"),
        (b"noise", JPEG, 400, "is not a JPEG image"),
    ],
)
def test_files_in_other_formats_are_rejected(
    send: SendFn, content: bytes, media_type: str, status: int, message: str
) -> None:
    response = post_form(send, {"input": ("a", content, media_type)}, {"kernel": "identity"})
    assert message in assert_detail(response, status)


def test_size_limit_applies_to_the_decoded_file(send: SendFn) -> None:
    bomb = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(bomb, "png")
    response = post_form(send, {"input": ("a.png", bomb.getvalue(), PNG)}, {"kernel": "identity"})
    assert "CORR2D_MAX_BODY_MB" in assert_detail(response, 413)


def test_kernel_is_fitted_to_a_form(send: SendFn) -> None:
    pair = save_npz(input=IMAGE, target=IMAGE[:, 1:] - IMAGE[:, :-1])
    response = post_form(send, {"pair": ("pair.npz", pair, NPZ)}, {"solver": "exact"}, "/train-kernel")
    np.testing.assert_allclose(response.json()["kernel"], [[-1, 1]], atol=1e-6)


def test_safetensors_metadata_is_read_but_fields_are_checked(send: SendFn) -> None:
    content = safetensors.numpy.save({"input": IMAGE}, metadata={"kernel": "identity", "title": "x"})
    assert post_form(send, {"input": ("a", content, SAFETENSORS)}, {}).status_code == 200
    assert_first_error(post_form(send, {"input": ("a", content, SAFETENSORS)}, {"title": "x"}), 422)
