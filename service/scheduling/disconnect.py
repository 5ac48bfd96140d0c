"""Cancellation of work when its client disconnects."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from service.errors import ClientDisconnected

Value = TypeVar("Value")

Receive = Callable[[], Awaitable[Any]]


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value:
    """Return the result of `work`; cancel it and raise ClientDisconnected if the client disconnects before."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected("the client closed the connection before the response was ready")
        return task.result()
    finally:
        task.cancel()
        disconnected.cancel()


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
