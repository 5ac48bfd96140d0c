"""Tests that errors are problem details, whatever the path, method and Accept header."""

import pytest
from structlog.testing import LogCapture

from service.app import create_app
from service.configuration.settings import Settings
from tests.problem_details import assert_problem
from tests.servers import SendFn, serve_in_process
from tests.service.samples.json_requests import post_json


@pytest.mark.parametrize("path", ["/nope", "/correlate/", "/" + "x" * 5000, "/%ff%fe", "/..%2f..%2fetc/passwd"])
def test_unknown_path_is_404_with_the_existing_paths(send: SendFn, path: str) -> None:
    assert "/correlate" in assert_problem(send("GET", path), 404)["detail"]


@pytest.mark.parametrize("accept", ["image/png", "text/html", "application/x-npy", "application/json;q=0"])
def test_errors_are_problem_details_for_any_accept(send: SendFn, accept: str) -> None:
    assert_problem(send("GET", "/nope", headers={"Accept": accept}), 404)
    assert_problem(send("GET", "/correlate", headers={"Accept": accept}), 405)
    response = post_json(send, {"Accept": accept}, body=b"{")
    assert_problem(response, 406 if accept.startswith(("text", "application/json")) else 400)


def test_internal_error_shows_only_the_request_id(log: LogCapture) -> None:
    app = create_app(Settings())

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("an internal secret")

    with serve_in_process(app) as send:
        log.entries.clear()
        response = send("GET", "/bug")
        (line,) = log.entries
    problem = assert_problem(response, 500)
    assert "secret" not in response.text
    assert problem["request_id"] == line["request_id"]
    assert line["status"] == 500
    assert "server-timing" in response.headers
