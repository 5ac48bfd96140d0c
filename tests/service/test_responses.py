"""Tests of responses: compression, and the header with the fields that a file cannot hold."""

import gzip
import io
import json
from collections.abc import Callable

import numpy as np
import pytest

from service.codecs.registry import ENCODABLE_FORMATS
from service.codecs.zstandard import zstd
from tests.problem_details import assert_problem
from tests.sample_files import JSON, NPY, NPZ, PNG, SAFETENSORS, save_npy
from tests.servers import SendFn
from tests.service.samples.array_formats import FIT_ARRAYS, post_file, save_stored_npz
from tests.service.samples.json_requests import COMPRESSIBLE_BODY, post_json, send_raw_request


@pytest.mark.parametrize("accept", ENCODABLE_FORMATS)
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_every_response_has_vary(send: SendFn, accept: str, coding: str) -> None:
    vary = post_json(send, {"Accept": accept, "Accept-Encoding": coding}).headers["vary"]
    assert {name.strip().lower() for name in vary.split(",")} == {"accept", "accept-encoding"}


@pytest.mark.parametrize("accept", [JSON, NPY, NPZ, SAFETENSORS])
@pytest.mark.parametrize(("coding", "unpack"), [("gzip", gzip.decompress), ("zstd", zstd.decompress)])
def test_compressed_response_is_the_same_response(
    address: str, accept: str, coding: str, unpack: Callable[[bytes], bytes]
) -> None:
    lines = [("Content-Type", JSON), ("Accept", accept)]
    _, plain, content = send_raw_request(address, lines, COMPRESSIBLE_BODY)
    assert plain["content-encoding"] is None
    _, headers, compressed = send_raw_request(address, [*lines, ("Accept-Encoding", coding)], COMPRESSIBLE_BODY)
    assert headers["content-encoding"] == coding
    assert headers["content-type"] == accept
    assert int(headers["content-length"]) == len(compressed) <= 0.8 * len(content)
    assert unpack(compressed) == content
    assert headers["corr2d-result"] == plain["corr2d-result"]


def test_small_or_incompressible_response_is_not_compressed(send: SendFn, rng: np.random.Generator) -> None:
    headers = {"Accept": NPY, "Accept-Encoding": "gzip, zstd"}
    assert "content-encoding" not in post_json(send, headers).headers
    noise = {"input": rng.normal(size=(100, 100)).tolist(), "kernel": "identity", "dtype": "float64"}
    response = post_json(send, headers, body=json.dumps(noise).encode())
    assert "content-encoding" not in response.headers
    assert len(response.content) == 128 + 80_000


def test_nonfinite_output_is_not_an_image(send: SendFn) -> None:
    problem = assert_problem(post_file(send, save_npy(np.array([[np.nan, 1]])), NPY, PNG, kernel="identity"), 406)
    assert "not finite" in problem["detail"]
    assert "application/x-npy" in problem["detail"]


@pytest.mark.parametrize("accept", [media_type for media_type in ENCODABLE_FORMATS if media_type != JSON])
@pytest.mark.parametrize("explain", ["false", "true"])
def test_binary_responses_put_other_fields_in_a_header(send: SendFn, accept: str, explain: str) -> None:
    query = {"kernel": "box(3)", "dtype": "float64", "explain": explain}
    image = save_npy(np.arange(30.0).reshape(5, 6))
    header = post_file(send, image, NPY, accept, **query).headers["corr2d-result"]
    assert header.isascii()
    assert header.isprintable()
    metadata = json.loads(header)
    plain = post_file(send, image, NPY, JSON, **query).json()
    assert (metadata["shape"], metadata["dtype"], metadata["device"]) == ([3, 4], "float64", "cpu")
    assert set(metadata) == set(plain) - {"output"}
    assert metadata["engine"] == plain["engine"]
    assert ("explanation" in metadata) == (explain == "true")
    if explain == "true":
        assert metadata["engine"] in metadata["explanation"]["predicted_ms"]


@pytest.mark.parametrize("accept", [NPY, NPZ, SAFETENSORS])
def test_nonfinite_count_in_the_header_matches_json(send: SendFn, accept: str) -> None:
    image = save_npy(np.array([[np.nan, 1], [np.inf, 2]]))
    metadata = json.loads(post_file(send, image, NPY, accept, kernel="identity").headers["corr2d-result"])
    assert metadata["nonfinite"] == post_file(send, image, NPY, JSON, kernel="identity").json()["nonfinite"] == 2


def test_long_history_is_in_the_archive_not_the_header(send: SendFn) -> None:
    query = {"steps": "2000", "seed": "1", "learning_rate": "0.001"}
    response = post_file(send, save_stored_npz(**FIT_ARRAYS), NPZ, NPZ, "/train-kernel", **query)
    assert len(response.headers["corr2d-result"]) < 5000
    assert "loss_history" not in json.loads(response.headers["corr2d-result"])
    assert np.load(io.BytesIO(response.content))["loss_history"].shape == (2000,)


def test_json_has_no_result_header(send: SendFn) -> None:
    assert "corr2d-result" not in post_file(send, save_npy(np.ones((2, 2))), NPY, kernel="identity").headers
