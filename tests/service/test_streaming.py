"""Tests of streamed fits: server-sent events, JSON lines, and clients that disconnect."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from service.app_state import get_app_state
from service.streaming import EVENT_STREAM, FIRST_STEPS, NDJSON
from tests.problem_details import assert_first_error
from tests.servers import SendFn, create_unlimited_app, start_server
from tests.service.streams import SLOW_FIT_REQUEST

D2L_PAIR = {"input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6, "target": [[0, -1, 0, 0, 0, 1, 0]] * 6, "seed": 1}


def parse_events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, content) of each event, from either stream format."""
    if response.headers["Content-Type"] == NDJSON:
        for line in response.text.splitlines():
            content = json.loads(line)
            yield content.pop("event"), content
        return
    for event in response.text.strip().split("\n\n"):
        name, data = event.split("\n")
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@pytest.mark.parametrize("media_type", [EVENT_STREAM, NDJSON])
def test_stream_ends_with_the_json_response(send: SendFn, media_type: str) -> None:
    response = send("POST", "/train-kernel", json=D2L_PAIR, headers={"Accept": media_type})
    assert response.status_code == 200
    assert response.headers["Content-Type"] == media_type
    assert response.headers["Cache-Control"] == "no-store"
    # On a slow machine, the stream may also report the reading phase.
    names, contents = zip(*(event for event in parse_events(response) if event[0] != "reading"), strict=True)
    assert names[0] == "forecast"
    assert contents[0]["prediction"] == "converges"
    assert contents[0]["largest_stable_learning_rate"] == pytest.approx(1 / 30)
    assert names[-1] == "result"
    assert contents[-1] == send("POST", "/train-kernel", json=D2L_PAIR).json()


@pytest.mark.slow
@pytest.mark.parametrize("media_type", [EVENT_STREAM, NDJSON])
def test_long_descent_sends_first_and_last_steps_and_twenty_a_second(send: SendFn, media_type: str) -> None:
    body = {**D2L_PAIR, "steps": 60_000, "learning_rate": 1e-6}
    start = time.perf_counter()
    response = send("POST", "/train-kernel?history=thin", json=body, headers={"Accept": media_type})
    seconds = time.perf_counter() - start
    steps = [content for name, content in parse_events(response) if name == "step"]
    numbers = [step["number"] for step in steps]
    assert numbers == sorted(set(numbers))
    assert numbers[:FIRST_STEPS] == list(range(1, FIRST_STEPS + 1))
    assert numbers[-1] == 60_000
    assert len(steps) <= FIRST_STEPS + 20 * seconds + 2
    *_, (name, result) = parse_events(response)
    assert name == "result"
    assert result["steps"] == 60_000
    by_number = dict(zip(result["loss_history_steps"], result["loss_history"], strict=True))
    assert all(by_number.get(step["number"], step["loss"]) == step["loss"] for step in steps)


@pytest.mark.parametrize("steps", [1, 10, FIRST_STEPS])
def test_short_descent_sends_every_step(send: SendFn, steps: int) -> None:
    response = send("POST", "/train-kernel", json={**D2L_PAIR, "steps": steps}, headers={"Accept": NDJSON})
    events = list(parse_events(response))
    losses = [content["loss"] for name, content in events if name == "step"]
    assert losses == events[-1][1]["loss_history"]
    assert len(losses) == steps


def test_streamed_arrays_have_the_requested_form(send: SendFn) -> None:
    response = send("POST", "/train-kernel?arrays=flat", json=D2L_PAIR, headers={"Accept": NDJSON})
    *_, (_, result) = parse_events(response)
    assert result["kernel"]["shape"] == [1, 2]


@pytest.mark.parametrize("media_type", [EVENT_STREAM, NDJSON])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"solver": "newton"}, "solver"),
        ({"kernel_size": 9}, "kernel_size"),
        ({"bias": True, "refuse_divergence": True}, "learning_rate"),
    ],
)
def test_rejection_before_the_first_event_is_a_problem(
    send: SendFn, media_type: str, change: dict[str, Any], field: str
) -> None:
    response = send("POST", "/train-kernel", json={**D2L_PAIR, **change}, headers={"Accept": media_type})
    assert assert_first_error(response, 422)["field"] == field


@pytest.mark.slow
def test_deadline_in_a_stream_is_its_last_event() -> None:
    with start_server(create_unlimited_app(timeout_s=1)) as address:
        response = httpx.post(f"{address}/train-kernel", json=SLOW_FIT_REQUEST, headers={"Accept": NDJSON}, timeout=60)
    *_, (name, problem) = parse_events(response)
    assert name == "error"
    assert problem["status"] == 504
    assert problem["type"] == "urn:corr2d:error:deadline-passed"


@pytest.mark.slow
@pytest.mark.parametrize("accept", ["application/json", EVENT_STREAM])
def test_disconnected_client_stops_the_fit_within_a_step(accept: str) -> None:
    app = create_unlimited_app()
    with start_server(app) as address:
        with httpx.Client(base_url=address, timeout=0.5) as client:
            request = client.build_request("POST", "/train-kernel", json=SLOW_FIT_REQUEST, headers={"Accept": accept})
            # A stream starts at once; a JSON response would arrive after minutes.
            with suppress(httpx.ReadTimeout):
                client.send(request, stream=True)
                assert get_app_state(app).pool.busy
        deadline = time.monotonic() + 10
        while get_app_state(app).pool.busy:
            assert time.monotonic() < deadline, "the fit still runs after its client disconnected"
            time.sleep(0.01)
        assert httpx.post(f"{address}/train-kernel", json=D2L_PAIR).status_code == 200
