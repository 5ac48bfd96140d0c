"""What every error response has to look like, whatever went wrong."""

import re
import sys
from typing import Any

import httpx

import core
import service
from service.problems import ProblemDetails

INTERNAL_DETAILS = ["Traceback", 'File "', "site-packages", sys.prefix, *core.__path__, *service.__path__]
"""What no answer may show: a stack trace, or where the server's files lie."""


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem details of a response that must be one, of that status."""
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
    """The first entry of its `errors`."""
    errors: list[dict[str, Any]] = assert_problem(response, status)["errors"]
    return errors[0]


def assert_detail(response: httpx.Response, status: int) -> str:
    """Its sentence."""
    detail: str = assert_problem(response, status)["detail"]
    return detail
