"""Tests of the security headers of responses and pages."""

import re
from typing import Any

import pytest

from tests.servers import SendFn
from tests.service.locked_app import OPEN_PATHS
from tests.service.samples.sample_requests import D2L_EXAMPLE


def parse_policy(response: Any) -> dict[str, str]:
    parts = response.headers["content-security-policy"].split(";")
    return {name: sources for name, _, sources in (part.strip().partition(" ") for part in parts)}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        *(("GET", path, None) for path in (*OPEN_PATHS, "/kernels", "/nowhere")),
        ("POST", "/correlate", D2L_EXAMPLE),
        ("POST", "/correlate", {}),
    ],
)
def test_security_headers_forbid_sniffing_frames_and_scripts(send: SendFn, method: str, path: str, body: Any) -> None:
    response = send(method, path, json=body)
    assert response.headers.get_list("x-content-type-options") == ["nosniff"]
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert len(response.headers.get_list("content-security-policy")) == 1
    policy = parse_policy(response)
    assert (policy["default-src"], policy["frame-ancestors"]) == ("'none'", "'none'")
    assert "unsafe" not in str(policy)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_allow_only_files_of_the_service(send: SendFn, path: str) -> None:
    page = send("GET", path)
    policy = parse_policy(page)
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert not re.search(r"""<script>|<style|<[^>]+ (?:style|on\w+)=""", page.text)


@pytest.mark.slow
def test_svg_response_forbids_scripts(send: SendFn) -> None:
    body = {"input": [[1, 2, 3]], "target": [[1, 2]], "seed": 0}
    response = send("POST", "/train-kernel", json=body, headers={"Accept": "image/svg+xml"})
    assert response.headers["x-content-type-options"] == "nosniff"
    assert parse_policy(response) == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "frame-ancestors": "'none'",
        "sandbox": "",
    }
