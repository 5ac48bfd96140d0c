"""Streaming responses that report the progress of a fit."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from core import Forecast, Progress, Reading, Step
from service.codecs import json_encoder
from service.codecs.registry import ResponseFields
from service.codecs.response_options import ResponseOptions
from service.context import get_context
from service.problems import HANDLED_ERRORS, respond_to_error
from service.responses import estimate_list_seconds
from service.scheduling.codec_jobs import run_codec
from service.scheduling.disconnect import run_until_disconnect

EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"

MIN_EVENT_INTERVAL_S = 0.05
"""Minimum seconds between progress events, except for the forecast, the first FIRST_STEPS steps and the last one."""

FIRST_STEPS = 200
"""Number of steps at the start of a descent whose events are all sent."""

KEEPALIVE_INTERVAL_S = 15.0
"""Seconds without an event after which a keep-alive is sent, so that proxies do not close the connection."""

ReportingWork = Callable[[Callable[[Progress], None]], Coroutine[Any, Any, ResponseFields]]
"""Function that gets a callback for progress reports, which any thread may call, and returns the response fields."""


def format_sse_json(name: str, content: bytes) -> bytes:
    """Return a JSON object as a server-sent event."""
    return format_sse_event(event=name, data_str=content.decode())


def format_ndjson_line(name: str, content: bytes) -> bytes:
    """Return a JSON object as a line of NDJSON, with the event's name as its first member."""
    members = content[1:]
    return b'{"event":"%s"%s%s\n' % (name.encode(), b"" if members == b"}" else b",", members)


EVENT_FORMATTERS: Mapping[str, Callable[[str, bytes], bytes]] = {
    EVENT_STREAM: format_sse_json,
    NDJSON: format_ndjson_line,
}
"""Formatters of an event, given its name and its content as a JSON object, by media type."""


class ProgressStream(StreamingResponse):
    """Stream of the events `reading`, `forecast` and `step`, then `result` or `error`.

    The response starts with the first event; errors before it are ordinary error responses.
    """

    def __init__(self, request: Request, media_type: str, options: ResponseOptions, *, wait_for_forecast: bool) -> None:
        """wait_for_forecast: send no event before the forecast, since the request may be rejected because of it."""
        headers = {
            "content-type": media_type,
            "cache-control": "no-store",
            # Buffering proxies would hold the events back until the end.
            "x-accel-buffering": "no",
            "vary": "accept, accept-encoding",
        }
        super().__init__(self._iterate_events(), HTTPStatus.OK, headers)
        self._request = request
        self._format_event = EVENT_FORMATTERS[media_type]
        self._keepalive = KEEPALIVE_COMMENT if media_type == EVENT_STREAM else format_ndjson_line("waiting", b"{}")
        self._options = options
        self._wait_for_forecast = wait_for_forecast
        self._events: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._last_event_at = 0.0
        self._skipped_step: Step | None = None
        self._is_complete = False
        self._task: asyncio.Task[ResponseFields] | None = None

    async def start(self, work: ReportingWork) -> None:
        """Start the work and wait for its first event. Raises errors of the work that precede it."""
        self._task = asyncio.create_task(work(self._report))
        self._task.add_done_callback(lambda _: self._end())
        try:
            first = await run_until_disconnect(self._request.receive, self._events.get())
        except BaseException:
            self._task.cancel()
            raise
        if first is None:
            self._task.result()
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they occur; cancel the work if the client disconnects."""
        assert self._task is not None  # noqa: S101 - start() is called first
        try:
            await super().__call__(scope, receive, send)
            # The server of `corr2d serve` records this itself; others only report it to `receive`.
            get_context(scope).is_disconnected |= not self._is_complete
        finally:
            self._task.cancel()

    async def _iterate_events(self) -> AsyncIterator[bytes]:
        assert self._task is not None  # noqa: S101
        event: bytes | None = self._first
        while event is not None:
            yield event
            event = await self._next_event()
        yield await self._format_final_event(self._task)
        self._is_complete = True

    async def _next_event(self) -> bytes | None:
        try:
            return await asyncio.wait_for(self._events.get(), KEEPALIVE_INTERVAL_S)
        except TimeoutError:
            return self._keepalive

    async def _format_final_event(self, task: "asyncio.Task[ResponseFields]") -> bytes:
        """Return the event `result`, or `error` if the work failed."""
        try:
            fields = task.result()
            # In a thread if it takes long: a history may have a million entries.
            seconds = estimate_list_seconds(fields)
            return await run_codec(self._request, seconds, lambda _: self._format_result(fields), "encode")
        except HANDLED_ERRORS as error:
            return self._format_event("error", bytes(respond_to_error(self._request, error).body))

    def _format_result(self, fields: ResponseFields) -> bytes:
        return self._format_event("result", b"".join(json_encoder.encode(fields, self._options)))

    def _report(self, progress: Progress) -> None:
        now = time.perf_counter()
        # The interval starts at the first report; before it, the work waited in the queue.
        self._last_event_at = self._last_event_at or now
        if self._wait_for_forecast and isinstance(progress, Reading):
            return
        is_kept = isinstance(progress, Forecast) or (isinstance(progress, Step) and progress.number <= FIRST_STEPS)
        if not is_kept and now - self._last_event_at < MIN_EVENT_INTERVAL_S:
            self._skipped_step = progress if isinstance(progress, Step) else None
            return
        self._last_event_at, self._skipped_step = now, None
        self._loop.call_soon_threadsafe(self._events.put_nowait, self._format_progress(progress))

    def _end(self) -> None:
        """Send the last step, if it was skipped, and end the events."""
        if self._skipped_step is not None:
            self._events.put_nowait(self._format_progress(self._skipped_step))
        self._events.put_nowait(None)

    def _format_progress(self, progress: Progress) -> bytes:
        fields = asdict(progress)
        if isinstance(progress, Step) and progress.validation_loss is None:
            del fields["validation_loss"]
        return self._format_event(type(progress).__name__.lower(), orjson.dumps(fields))
