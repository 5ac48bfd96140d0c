"""Work in steps: a generator that yields where it may be ended, and returns what it computes."""

from collections.abc import Generator, Iterable, Iterator
from typing import Protocol, TypeAlias, TypeVar

import numpy as np

Value = TypeVar("Value")
Event = TypeVar("Event")

Interruptible: TypeAlias = Generator[None, None, Value]
"""Work that yields at least about every SECONDS, and its value at the end."""

YIELD_INTERVAL_S = 0.1
"""The most predicted time between two yields."""

YIELD_INTERVAL_OPERATIONS = 4e9
"""Multiplications and additions of a matrix product of one thread that take about as long."""


class Timed(Protocol):
    """Something with a predicted time, in seconds."""

    @property
    def seconds(self) -> float:
        """Predicted."""


TimedItem = TypeVar("TimedItem", bound=Timed)


def pace(items: Iterable[TimedItem]) -> Iterator[TimedItem | None]:
    """Each of the works, and None after about every SECONDS of them, if more follow."""
    elapsed = 0.0
    for item in items:
        if elapsed + item.seconds > YIELD_INTERVAL_S and elapsed:
            elapsed = 0.0
            yield None
        elapsed += item.seconds
        yield item


def suppress_overflow_warnings(steps: Generator[Event, None, Value]) -> Generator[Event, None, Value]:
    """The same steps without numpy's warnings of overflow: what comes of it is checked for."""
    while True:
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                event = next(steps)
            except StopIteration as finished:
                value: Value = finished.value
                return value
        yield event


def finish(steps: Generator[object, None, Value]) -> Value:
    """Run to the end and return the value."""
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            value: Value = finished.value
            return value
