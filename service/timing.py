"""Time spent in the phases of a request."""

import time
from typing import Literal

RequestPhase = Literal["parse", "wait", "compute", "encode"]
"""Phases of a request: the names of Timing's fields."""


class Timing:
    """Milliseconds spent in each phase of one request."""

    __slots__ = ("compute", "encode", "parse", "wait")

    def __init__(self) -> None:
        self.parse = self.wait = self.compute = self.encode = 0.0

    def header(self) -> str:
        """Return the value of the Server-Timing header (W3C)."""
        return (
            f"parse;dur={self.parse:.3f}, wait;dur={self.wait:.3f}, "
            f"compute;dur={self.compute:.3f}, encode;dur={self.encode:.3f}"
        )


def milliseconds_since(start: float) -> float:
    """Return the milliseconds since a value of time.perf_counter."""
    return 1000 * (time.perf_counter() - start)
