"""Fits of controllable duration: with the l1 loss, every step reads the images again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

ENDLESS_STEPS = 50_000
"""Steps of a 32 x 32 fit that no test waits for: at least 15 s. The predicted time must be below 60 s, even on a busy
machine."""


def build_fit_request(side: int, steps: int) -> dict[str, Any]:
    """Return a fit of a square image. With side 32, a step takes half a millisecond; side 1000 needs 96 MB."""
    image = {"shape": [side, side], "dtype": "uint8", "data": [1] * side**2}
    target = {"shape": [side - 2, side - 2], "dtype": "uint8", "data": [0] * (side - 2) ** 2}
    return {"input": image, "target": target, "loss": "l1", "learning_rate": 1e-9, "steps": steps}


@contextmanager
def start_streaming_fit(address: str, fields: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """Yield the events of a streaming fit after its first step; disconnect at the end of the block."""
    headers = {"Accept": "application/x-ndjson"}
    with httpx.stream("POST", f"{address}/train-kernel", json=fields, headers=headers, timeout=120) as response:
        assert response.status_code == 200, response.read()
        events = (json.loads(line) for line in response.iter_lines())
        assert any(event["event"] == "step" for event in events)
        yield events
