"""Tests of the service against /openapi.json: schemathesis generates requests from it and checks the responses.

All of its checks are on, in its four phases. `HYPOTHESIS_PROFILE=thorough` sends thousands of requests, with a new seed
for each run.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from schemathesis import Case, HookContext

from service.app import create_app
from service.codecs import json, multipart, npy
from service.codecs.registry import FORMATS
from service.codecs.response_options import ResponseOptions
from service.codecs.zstandard import zstd
from service.configuration.settings import Settings
from tests.servers import open_client, start_server

pytestmark = pytest.mark.slow

AnyCase: TypeAlias = Case[Any]

IS_THOROUGH = settings.get_current_profile_name() == "thorough"
MAX_EXAMPLES, MAX_WALKS = (2000, 500) if IS_THOROUGH else (30, 15)

SMALL_LIMITS = Settings(
    device="cpu", threads=1, max_body_mb=1, max_compute_mb=10, max_compute_gflop=0.05, request_timeout_s=10
)

COMPUTING_OPERATIONS = [f"POST {path}" for path in ("/correlate", "/conv2d", "/train-kernel")]

api_schema = schemathesis.openapi.from_dict(
    create_app(SMALL_LIMITS).openapi(),
    config=schemathesis.Config.from_dict(
        {
            "generation": {"deterministic": not IS_THOROUGH},
            "phases": {"coverage": {"generate-duplicate-query-parameters": True}},
            "checks": {
                # 413: an invalid request may also be over a limit.
                "negative_data_rejection": {"expected-statuses": [400, 405, 406, 413, 415, 422]},
                "positive_data_acceptance": {"expected-statuses": ["2xx"]},
            },
            "operations": [
                {
                    "include-name": operation,
                    # The schema cannot say which shapes and options are compatible, which computations are too large,
                    # or which bytes are an image. JSON that fits the schema must be parsable: see `assert_parsable`.
                    "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 413, 422]}},
                }
                for operation in COMPUTING_OPERATIONS
            ],
        }
    ),
)


IMAGE = np.arange(63, dtype=np.float32).reshape(7, 9)

INPUT_FILES: Mapping[str, bytes] = {
    **{
        media_type: b"".join(served.encode({"input": IMAGE}, ResponseOptions()))
        for media_type, served in FORMATS.items()
        if served.encode and media_type != json.MEDIA_TYPE
    },
}
"""The body with `IMAGE` in every binary format, by media type."""

for media_type, file in INPUT_FILES.items():
    schemathesis.openapi.media_type(media_type, st.just(file) | st.binary())


def float32_arrays(*shape: int) -> st.SearchStrategy[NDArray[Any]]:
    return arrays(np.float32, shape, elements=st.floats(-99, 99, width=32))


@st.composite
def matching_arrays(draw: st.DrawFn, path: str, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """Draw the other arrays of a request for an input of that shape."""
    *_, height, width = shape
    size = draw(st.integers(1, height)), draw(st.integers(1, width))
    match path:
        case "/correlate":
            return {"kernel": draw(float32_arrays(*size))}
        case "/conv2d":
            filters = (draw(st.integers(1, 3)), shape[-3]) if len(shape) > 2 else ()
            return {"weight": draw(float32_arrays(*filters, *size))}
        case _:
            return {"target": draw(float32_arrays(*shape[:-2], *size))}


def draw_few(draw: st.DrawFn, options: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, Any]:
    names = sorted(options.keys() - taken.keys())
    chosen = draw(st.sets(st.sampled_from(names), max_size=2)) if names else set()
    return {name: options[name] for name in sorted(chosen)}


@st.composite
def valid_cases(draw: st.DrawFn, case: AnyCase) -> AnyCase:
    """Draw a case with arrays of compatible shapes, few options, and any response format that is served."""
    responses = case.operation.definition.raw["responses"]["200"]["content"]
    case.headers["Accept"] = draw(st.just(json.MEDIA_TYPE) | st.sampled_from(sorted(responses)))
    if isinstance(case.body, dict) and case.media_type == json.MEDIA_TYPE:
        image = draw(array_shapes(min_dims=2, max_dims=4, max_side=6).flatmap(lambda shape: float32_arrays(*shape)))
        arrays = {"input": image, **draw(matching_arrays(case.path, image.shape))}
        case.body = {**draw_few(draw, case.body, arrays), **{name: array.tolist() for name, array in arrays.items()}}
        case.query = draw_few(draw, case.query, case.body)
    else:
        if case.media_type == multipart.MEDIA_TYPE:
            form: dict[str, Any] = {"input": INPUT_FILES[npy.MEDIA_TYPE]}
            case.body = form
        in_query = {name: str(array.tolist()) for name, array in draw(matching_arrays(case.path, IMAGE.shape)).items()}
        case.query = {**draw_few(draw, case.query, in_query), **in_query}
    return case


@api_schema.hook
def map_case(_: HookContext, case: AnyCase) -> AnyCase:
    """Remove options without a value, and query options that are also in the body: the schema cannot forbid them."""
    if case.operation.label in COMPUTING_OPERATIONS and case.meta is not None:
        body = case.body if isinstance(case.body, dict) and case.meta.generation.mode.is_positive else {}
        case.query = {name: value for name, value in case.query.items() if value != "" and name not in body}
        if not case.headers.get("Content-Encoding", "identity").strip():
            del case.headers["Content-Encoding"]
    return case


@api_schema.hook
def flatmap_case(_: HookContext, case: AnyCase) -> st.SearchStrategy[AnyCase]:
    """Replace some cases by computable ones, which schemathesis alone hardly ever generates."""
    if (
        case.operation.label not in COMPUTING_OPERATIONS
        or case.meta is None
        or not case.meta.generation.mode.is_positive
    ):
        return st.just(case)
    return st.booleans().flatmap(lambda fits: valid_cases(case) if fits else st.just(case))


COMPRESS_BY_CODING: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
}


def compress_request(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Compress the body as its Content-Encoding says."""
    compress = COMPRESS_BY_CODING.get(str(request.headers.get("Content-Encoding")))
    if compress is not None and request.body:
        content = request.body.encode() if isinstance(request.body, str) else request.body
        assert isinstance(content, bytes)
        request.body = compress(content)
        request.prepare_content_length(request.body)
    return request


def assert_parsable(case: AnyCase, status: int) -> None:
    """Assert that JSON that fits the schema is never rejected as unparsable (400)."""
    fits = case.meta is not None and case.meta.generation.mode.is_positive
    assert not (fits and case.media_type == json.MEDIA_TYPE and status == 400)


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    """The address of a service with small limits, so that no request takes long."""
    # An application that has been stopped does not start again, and other tests may run between those of this module.
    with start_server(create_app(SMALL_LIMITS)) as address, open_client(address):
        yield address


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.auth = compress_request
        yield session


@pytest.fixture
def status_counts() -> Iterator[Counter[int]]:
    """The number of responses by status; without successful ones among them, the test would prove little."""
    counts: Counter[int] = Counter()
    yield counts
    assert counts[200] > 2


@api_schema.parametrize()
@settings(max_examples=MAX_EXAMPLES, suppress_health_check=list(HealthCheck))
def test_every_operation_matches_the_openapi_schema(
    case: AnyCase, small: str, session: requests.Session, status_counts: Counter[int]
) -> None:
    response = case.call_and_validate(base_url=small, session=session)
    status_counts[response.status_code] += 1
    assert_parsable(case, response.status_code)


def test_links_can_be_followed_in_sequence(small: str, session: requests.Session, status_counts: Counter[int]) -> None:
    class Walk(api_schema.as_state_machine()):  # type: ignore[misc]  # schemathesis creates the base class from the schema
        def get_call_kwargs(self, case: AnyCase) -> dict[str, Any]:
            return {"base_url": small, "session": session}

        def before_call(self, case: AnyCase) -> None:
            # The body of a link is JSON, whatever media type was drawn; its fields must not be in the query too.
            if isinstance(case.body, dict):
                # A drawn form has a file, which JSON cannot hold.
                if case.media_type == multipart.MEDIA_TYPE and not isinstance(case.body.get("input"), list | dict):
                    drawn: dict[str, Any] = {"input": IMAGE.tolist()}
                    case.body = drawn
                case.media_type = json.MEDIA_TYPE
                case.query = {name: value for name, value in case.query.items() if name not in case.body}

        def after_call(self, response: schemathesis.Response, case: AnyCase) -> None:
            super().after_call(response, case)
            status_counts[response.status_code] += 1

    Walk.run(
        settings=settings(
            max_examples=MAX_WALKS,
            stateful_step_count=12,
            derandomize=not IS_THOROUGH,
            suppress_health_check=list(HealthCheck),
        )
    )
