"""Work in steps: a generator that yields where it may be ended, and returns what it computes."""

from collections.abc import Generator, Iterable, Iterator
from typing import Protocol, TypeAlias, TypeVar

import numpy as np

Value = TypeVar("Value")
Event = TypeVar("Event")

Steps: TypeAlias = Generator[None, None, Value]
"""Work that yields at least about every SECONDS, and its value at the end."""

SECONDS = 0.1
"""The most predicted time between two yields."""

OPERATIONS = 4e9
"""Multiplications and additions of a matrix product of one thread that take about as long."""


class Timed(Protocol):
    """Something with a predicted time, in seconds."""

    @property
    def seconds(self) -> float:
        """Predicted."""


Work = TypeVar("Work", bound=Timed)


def paced(works: Iterable[Work]) -> Iterator[Work | None]:
    """Each of the works, and None after about every SECONDS of them, if more follow."""
    waited = 0.0
    for work in works:
        if waited + work.seconds > SECONDS and waited:
            waited = 0.0
            yield None
        waited += work.seconds
        yield work


def quietly(steps: Generator[Event, None, Value]) -> Generator[Event, None, Value]:
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
