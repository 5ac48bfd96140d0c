"""A fit that takes seconds, and a check that its events are received while it runs."""

import json
import time
from itertools import pairwise
from typing import Any

import httpx

SLOW_FIT_REQUEST: dict[str, Any] = {
    "input": [[1, 1, 0, 0, 0, 0, 1, 1]] * 6,
    "target": [[0, -1, 0, 0, 0, 1, 0]] * 6,
    "seed": 1,
    "loss": "huber",
    "steps": 1_000_000,
    "learning_rate": 1e-9,
}
"""A fit that takes minutes, unless it has fewer `steps`."""


def assert_events_arrive_one_by_one(client: httpx.Client, path: str) -> None:
    """Assert that the events of a fit are received at many different times, and that the stream is complete."""
    body = {**SLOW_FIT_REQUEST, "steps": 15_000}
    headers = {"Accept": "text/event-stream"}
    times, name = [], ""
    with client.stream("POST", path, params={"history": "thin"}, json=body, headers=headers) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
                times.append(time.monotonic())
            elif line:
                content = json.loads(line.removeprefix("data: "))
    assert name == "result"
    assert content["steps"] == 15_000
    # At most twenty events are sent per second: with a buffer on the way, they would arrive together.
    seconds = times[-1] - times[0]
    assert seconds > 0.5
    assert sum(later - earlier > 0.01 for earlier, later in pairwise(times)) > 5
