"""Checks of the format that all error responses share."""

import re
import sys
from typing import Any

import httpx

import core
import service
from service.problems import ProblemDetails

INTERNAL_DETAILS = ["Traceback", 'File "', "site-packages", sys.prefix, *core.__path__, *service.__path__]
"""Strings of tracebacks and server paths, which no error response may contain."""


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check that the response is a valid problem of this status, and return its problem details."""
    assert response.status_code == status, response.text[:1000]
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) <= 8192
    assert not [words for words in INTERNAL_DETAILS if words in response.text]
    assert not re.search(r"\.py\b", response.text)
    problem: dict[str, Any] = response.json()
    ProblemDetails.model_validate(problem)
    assert problem["status"] == status
    assert problem["type"].startswith("urn:corr2d:error:")
    assert problem["request_id"] == response.headers["x-request-id"]
    assert len(problem["errors"]) <= 20
    return problem


def assert_first_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check the problem like `assert_problem`, and return the first entry of its `errors`."""
    errors: list[dict[str, Any]] = assert_problem(response, status)["errors"]
    return errors[0]


def assert_detail(response: httpx.Response, status: int) -> str:
    """Check the problem like `assert_problem`, and return its `detail`."""
    detail: str = assert_problem(response, status)["detail"]
    return detail
