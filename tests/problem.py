"""What every error response has to look like, whatever went wrong."""

from typing import Any

import httpx

from service.problems import ProblemDetails


def problem_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem details of a response that must be one, of that status."""
    assert response.status_code == status, response.text[:1000]
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) <= 8192
    assert "Traceback" not in response.text
    assert "site-packages" not in response.text
    problem: dict[str, Any] = response.json()
    ProblemDetails.model_validate(problem)
    assert problem["status"] == status
    assert problem["type"].startswith("urn:corr2d:error:")
    assert problem["request_id"] == response.headers["x-request-id"]
    assert len(problem["errors"]) <= 20
    return problem


def first_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The first entry of its `errors`."""
    errors: list[dict[str, Any]] = problem_of(response, status)["errors"]
    return errors[0]
