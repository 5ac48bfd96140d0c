"""Whether whoever asked still waits for the answer."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from service.errors import ClientLeft

Value = TypeVar("Value")

Receive = Callable[[], Awaitable[Any]]


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value:
    """The work's value; cancels it and raises ClientLeft as soon as the client closes the connection."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(left_by(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft("the client closed the connection before its answer was ready")
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def left_by(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
