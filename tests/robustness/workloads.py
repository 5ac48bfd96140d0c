"""Fits that take as long as they are told to: by a loss for which every step goes over the images again."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

ENDLESS_STEPS = 100_000
"""Steps of a fit of 32 x 32 that nobody sees the end of: half a minute at the least, of which a third is foretold."""


def build_fit_request(side: int, steps: int) -> dict[str, Any]:
    """One of a square image. At 32 a side a step takes half a millisecond; at 1000 a side it needs 96 MB."""
    image = {"shape": [side, side], "dtype": "uint8", "data": [1] * side**2}
    target = {"shape": [side - 2, side - 2], "dtype": "uint8", "data": [0] * (side - 2) ** 2}
    return {"input": image, "target": target, "loss": "l1", "learning_rate": 1e-9, "steps": steps}


@contextmanager
def start_streaming_fit(address: str, fields: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """What is told of a fit while it happens, once it has told of its first step; at the end the client leaves."""
    headers = {"Accept": "application/x-ndjson"}
    with httpx.stream("POST", f"{address}/train-kernel", json=fields, headers=headers, timeout=120) as response:
        assert response.status_code == 200, response.read()
        events = (json.loads(line) for line in response.iter_lines())
        assert any(event["event"] == "step" for event in events)
        yield events
