"""Interruptible computations: generators that yield wherever they may be stopped, and return their result."""

from collections.abc import Generator, Iterable, Iterator
from typing import Protocol, TypeAlias, TypeVar

import numpy as np

Value = TypeVar("Value")
Event = TypeVar("Event")

Interruptible: TypeAlias = Generator[None, None, Value]
"""A computation that yields about every YIELD_INTERVAL_S seconds, and returns its value."""

YIELD_INTERVAL_S = 0.1
"""Maximum predicted seconds between two yields."""

YIELD_INTERVAL_OPERATIONS = 4e9
"""Multiplications and additions of a single-threaded matrix product that takes about YIELD_INTERVAL_S."""


class Timed(Protocol):
    """An item with a predicted time."""

    @property
    def seconds(self) -> float:
        """Predicted seconds."""


TimedItem = TypeVar("TimedItem", bound=Timed)


def pace(items: Iterable[TimedItem]) -> Iterator[TimedItem | None]:
    """Yield the items, and None whenever the next one would exceed YIELD_INTERVAL_S since the last None."""
    elapsed = 0.0
    for item in items:
        if elapsed + item.seconds > YIELD_INTERVAL_S and elapsed:
            elapsed = 0.0
            yield None
        elapsed += item.seconds
        yield item


def ignore_overflow() -> np.errstate:
    """Return a context without numpy's warnings of overflow; a fit checks for values that are not finite."""
    return np.errstate(over="ignore", invalid="ignore")


def suppress_overflow_warnings(steps: Generator[Event, None, Value]) -> Generator[Event, None, Value]:
    """Run the steps without numpy's warnings of overflow, and the code between them with its own settings."""
    while True:
        with ignore_overflow():
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
