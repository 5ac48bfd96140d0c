"""Tests of the traces that a collector receives from `corr2d serve`, configured as in docs/monitoring.md."""

import http.server
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.app import create_app
from service.configuration.settings import Settings
from service.middleware.fast_path import FastPathMiddleware
from tests.servers import open_client, run_serve_command
from tests.service.samples.sample_requests import D2L_EXAMPLE

pytestmark = pytest.mark.slow

LAYER_REQUEST = {"input": [[1, 2], [3, 4]], "weight": [[1]]}
FIT_REQUEST = {"input": [[0, 1, 2], [3, 4, 5]], "target": [[0, 1], [3, 4]], "steps": 3}

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@contextmanager
def start_collector() -> Iterator[tuple[str, list[Span]]]:
    """Yield the address of a collector and the list of spans that it has received."""
    spans: list[Span] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                export = ExportTraceServiceRequest.FromString(body)
                scopes = [scope for resource in export.resource_spans for scope in resource.scope_spans]
                spans.extend(span for scope in scopes for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", spans
        finally:
            server.shutdown()


def test_collector_receives_every_request_by_route(tmp_path: Path) -> None:
    with start_collector() as (collector, spans):
        variables = {
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        }
        with run_serve_command(tmp_path / "log", **variables) as (process, address):
            with open_client(address) as send:
                caller = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
                assert send("POST", "/correlate", json=D2L_EXAMPLE, headers=caller).json()["output"] == [
                    [19, 25],
                    [37, 43],
                ]
                assert send("POST", "/conv2d", json=LAYER_REQUEST).status_code == 200
                assert send("POST", "/train-kernel", json=FIT_REQUEST).status_code == 200
                assert send("POST", "/correlate", json={}).status_code == 422
            # The server exports the remaining spans before it exits.
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    by_name = {span.name: span for span in spans}
    assert {"POST /correlate", "POST /conv2d", "POST /train-kernel", "GET /readyz"} <= by_name.keys()
    (traced,) = [span for span in spans if span.trace_id.hex() == TRACE_ID and span.kind == Span.SPAN_KIND_SERVER]
    attributes = {attribute.key: attribute.value for attribute in traced.attributes}
    assert traced.name == "POST /correlate"
    assert attributes["http.route"].string_value == "/correlate"
    assert attributes["http.response.status_code"].int_value == 200
    statuses = [
        attribute.value.int_value
        for span in spans
        for attribute in span.attributes
        if span.name == "POST /correlate" and attribute.key == "http.response.status_code"
    ]
    assert sorted(statuses) == [200, 422]


@pytest.mark.parametrize("variable", ["", "OTEL_EXPORTER_OTLP_ENDPOINT"])
def test_fast_path_is_bypassed_only_with_telemetry(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    if variable:
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    added = [getattr(middleware.cls, "__name__", "") for middleware in create_app(Settings()).user_middleware]
    assert (FastPathMiddleware.__name__ in added) is not bool(variable)
