"""JSON requests to the computing endpoints, with given headers or query strings."""

import http.client
import json
from urllib.parse import urlsplit

import httpx

from tests.sample_files import JSON
from tests.servers import SendFn
from tests.service.samples.sample_requests import SMALL_BODY

ARRAYS = {
    "/correlate": {"input": [[1, 2], [3, 4]], "kernel": [[1]]},
    "/conv2d": {"input": [[1, 2], [3, 4]], "weight": [[1]]},
    "/train-kernel": {"input": [[1, 2], [3, 4]], "target": [[1, 2], [3, 4]]},
}

Headers = dict[str, str]
Lines = list[tuple[str, str]]


def post_json(
    send: SendFn, headers: Headers | Lines, path: str = "/correlate", body: bytes = SMALL_BODY
) -> httpx.Response:
    """Post a JSON body, unless `headers` declares another type."""
    lines = list(headers.items()) if isinstance(headers, dict) else headers
    if not any(name.lower() == "content-type" for name, _ in lines):
        lines = [("Content-Type", JSON), *lines]
    return send("POST", path, content=body, headers=[(name, value.encode("latin-1")) for name, value in lines])


def post_with_query(send: SendFn, query: str, path: str = "/correlate", **changes: object) -> httpx.Response:
    """Post the endpoint's arrays as JSON, changed by `changes` (None: left out), with a verbatim query string."""
    fields = {name: value for name, value in {**ARRAYS[path], **changes}.items() if value is not None}
    return send("POST", f"{path}?{query}", json=fields)


def send_raw_request(
    address: str, lines: Lines, body: bytes = SMALL_BODY
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request with exactly these header fields: the client adds none."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.putrequest("POST", "/correlate", skip_accept_encoding=True)
    for name, value in [("Content-Length", str(len(body))), *lines]:
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


COMPRESSIBLE_BODY = json.dumps({"input": [[0] * 60] * 60, "kernel": "identity"}).encode()
