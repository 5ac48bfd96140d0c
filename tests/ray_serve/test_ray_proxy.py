"""Tests of the middleware of Ray's proxies and of the replicas, and of the manifests for KubeRay."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import orjson
import pytest
import yaml
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from service.app import create_app
from service.app_state import get_app_state
from service.configuration.settings import Settings
from service.metrics.prometheus import render_metrics
from service.middleware.ray_proxy import MAX_HELD_BYTES, PROBLEMS, RayProblemMiddleware
from service.problems import PROBLEM_TYPES
from tests.problem_details import assert_problem

MANIFESTS = sorted((Path(__file__).parents[2] / "deploy" / "ray").glob("*.yaml"))

WITHOUT_RAY = "Ray is not installed (pip install 'corr2d[ray]')"

App = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]


async def request(app: App, path: str = "/correlate") -> httpx.Response:
    """Send a request with the request id r-1 to an application behind the middleware."""
    transport = httpx.ASGITransport(RayProblemMiddleware(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://ray") as client:
        return await client.get(path, headers={"X-Request-ID": "r-1"})


@pytest.mark.anyio
async def test_error_of_ray_becomes_problem_details() -> None:
    headers = {"X-Request-ID": "r-1", "Retry-After": "1"}
    response = await request(PlainTextResponse("Request dropped due to backpressure", 503, headers))
    problem = assert_problem(response, 503)
    assert (problem["type"], problem["request_id"]) == ("urn:corr2d:error:busy", "r-1")
    assert problem["detail"] == "Request dropped due to backpressure"
    assert response.headers["retry-after"] == "1"


@pytest.mark.anyio
@pytest.mark.parametrize(("status", "name"), [(404, "not-found"), (408, "too-slow"), (500, "internal")])
async def test_other_errors_of_ray_become_problem_details(status: int, name: str) -> None:
    response = await request(PlainTextResponse("a text of Ray", status, {"X-Request-ID": "r-1"}))
    assert assert_problem(response, status)["type"] == f"urn:corr2d:error:{name}"


@pytest.mark.anyio
async def test_lost_replica_becomes_503() -> None:
    async def send_nothing(scope: Scope, receive: Receive, send: Send) -> None:
        """Ray sends no response if the replica of a request has ended."""

    response = await request(send_nothing)
    assert assert_problem(response, 503)["request_id"] == "r-1"
    assert response.headers["retry-after"] == "1"


async def send_half(headers: list[tuple[bytes, bytes]], sent: bytes) -> list[Message]:
    """Return the messages of the proxy if the replica ends after these headers and bytes of the body."""

    async def end_in_the_middle(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(sent), 1 << 18):
            await send({"type": "http.response.body", "body": sent[start : start + (1 << 18)], "more_body": True})

    messages: list[Message] = []

    async def receive() -> Message:
        raise NotImplementedError

    async def append(message: Message) -> None:
        messages.append(message)

    scope = {"type": "http", "path": "/correlate", "headers": []}
    await RayProblemMiddleware(end_in_the_middle)(scope, receive, append)
    return messages


@pytest.mark.anyio
@pytest.mark.parametrize("size", [0, 128, MAX_HELD_BYTES])
async def test_replica_lost_within_its_response_becomes_503(size: int) -> None:
    headers = [(b"content-length", b"%d" % (2 * MAX_HELD_BYTES)), (b"x-request-id", b"r-2")]
    start, body = await send_half(headers, bytes(size))
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    assert orjson.loads(body["body"])["request_id"] == "r-2"


@pytest.mark.anyio
async def test_long_response_of_a_lost_replica_is_not_complete() -> None:
    content = np.random.default_rng(0).bytes(3 * MAX_HELD_BYTES // 2)
    start, *rest = await send_half([(b"content-length", b"%d" % (2 * MAX_HELD_BYTES))], content)
    assert start["status"] == 200
    assert b"".join(message["body"] for message in rest) == content
    assert all(message["more_body"] for message in rest)


@pytest.mark.anyio
async def test_stream_is_not_held() -> None:
    start, *rest = await send_half([], b"event: step")
    assert start["status"] == 200
    assert rest == [{"type": "http.response.body", "body": b"event: step", "more_body": True}]


@pytest.mark.anyio
@pytest.mark.parametrize("status", [200, 422])
async def test_response_of_the_service_is_unchanged(status: int) -> None:
    original = Response(b"content", status, {"Server-Timing": "parse", "X-Request-ID": "mine"})
    original.raw_headers.append((b"X-Request-ID", b"of Ray"))
    response = await request(original)
    assert (response.status_code, response.content) == (status, b"content")
    assert response.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.anyio
async def test_paths_of_ray_are_unchanged() -> None:
    response = await request(PlainTextResponse("draining", 503), "/-/healthz")
    assert (response.status_code, response.text) == (503, "draining")


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")
@pytest.mark.parametrize("name", ["TaskCancelledError", "ActorDiedError"])
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_request_that_ray_cancels_is_counted_as_499(name: str, accept: str) -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason=WITHOUT_RAY)
    from service.ray import DisconnectMiddleware

    app = create_app(Settings(device="cpu"))
    app.add_middleware(DisconnectMiddleware)
    fit = {"input": [[0, 1], [2, 3]], "target": [[1]], "steps": 1_000_000, "learning_rate": 1e-9}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/train-kernel",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"accept", accept.encode())],
    }
    messages = [{"type": "http.request", "body": orjson.dumps(fit), "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await anyio.sleep(0.05)
        raise getattr(exceptions, name)

    async def ignore(message: Message) -> None:
        """The client has disconnected."""

    async with app.router.lifespan_context(app):
        await app(scope, receive, ignore)
    text, _ = render_metrics(get_app_state(app).metrics, "", None)
    assert b'corr2d_requests_total{route="/train-kernel",status="499"} 1.0' in text


def test_problem_types_are_those_of_the_service() -> None:
    served = {(kind.status, kind.name, kind.title) for kind in PROBLEM_TYPES.values()}
    listed = {(status, name, title) for status, (name, title) in PROBLEMS.items() if status != 404}
    assert listed <= served


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_has_a_valid_configuration(path: Path) -> None:
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    from ray.serve.schema import ServeDeploySchema

    from service.ray import NAME

    (manifest,) = yaml.safe_load_all(path.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "corr2d.service.ray:app"
    assert [deployment.name for deployment in application.deployments] == [NAME]
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    options = application.deployments[0].ray_actor_options
    assert int(container["resources"]["limits"]["cpu"]) >= 2 * options.num_cpus
    assert options.num_gpus == (0.5 if "gpu" in path.name else None)
