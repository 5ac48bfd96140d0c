"""Logging for the service, uvicorn and Python itself, as readable text or JSON."""

import json
import logging
import os
import sys
import threading
import time
from functools import lru_cache, partial
from types import TracebackType
from typing import Literal, NoReturn, TextIO, TypeAlias, cast

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from service.log_stream import LogStream

LogFormat: TypeAlias = Literal["console", "json"]

STDERR_FD = 2
"""File descriptor of stderr; Python has no stream for it if it was closed at startup."""

TRACEBACK_TRANSFORMER = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
"""Tracebacks without local variables, which structlog includes by default: they contain bodies and API keys."""


def configure_logging(log_format: LogFormat, replica: str | None = None) -> None:
    """Send structlog's lines, the standard library's (uvicorn's), warnings and tracebacks to stderr in one format.

    Every line has the name of the replica, unless that is None. No caller waits for the reader of stderr: `sys.stderr`
    is a LogStream from then on.
    """
    if not isinstance(sys.stderr, LogStream):
        sys.stderr = LogStream(STDERR_FD)
    stream = sys.stderr
    stream.report = _report_dropped
    if log_format == "json":
        renderers: list[Processor] = [structlog.processors.ExceptionRenderer(TRACEBACK_TRANSFORMER), _render_json]
    elif stream.isatty():
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(pad_event_to=0, sort_keys=False, exception_formatter=plain)]
    else:
        renderers = [_render_plain]
    additions: list[Processor] = [_add_timestamp]
    if replica is not None:
        additions.append(partial(_add_replica, replica))
    structlog.configure(
        processors=[*additions, *renderers],
        # Not through the standard library's logging, which takes longer than the rest of a small request.
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", stream)),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*additions, _strip_message],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)  # noqa: FBT003 - it takes no name
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda uncaught: _log_uncaught(uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback)
    sys.unraisablehook = lambda uncaught: _log_uncaught(uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback)


def is_json_log() -> bool:
    """Return whether `configure_logging` has selected JSON."""
    return structlog.get_config()["processors"][-1] is _render_json


def count_dropped_lines() -> int:
    """Return how many lines of this process were not written to stderr."""
    return sys.stderr.dropped if isinstance(sys.stderr, LogStream) else 0


def exit_now(code: int) -> NoReturn:
    """End the process without cleanup, after waiting at most DRAIN_S for its last log lines to be written."""
    if isinstance(sys.stderr, LogStream):
        sys.stderr.drain()
    os._exit(code)


def _report_dropped(lines: int) -> None:
    structlog.get_logger("corr2d").warning("log lines dropped: the reader of stderr fell behind", lines=lines)


def _log_uncaught(
    exception_type: type[BaseException], exception: BaseException | None, traceback: TracebackType | None
) -> None:
    """Log an exception that no code handles, instead of Python's own lines."""
    exception = exception or exception_type()
    structlog.get_logger("corr2d").critical("uncaught exception", exc_info=(exception_type, exception, traceback))


def _strip_message(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Return the event without the line break at the end of its message; some of uvicorn's have one."""
    del logger, method
    event["event"] = event["event"].rstrip()
    return event


def _add_timestamp(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Return the event with its timestamp and level added."""
    del logger
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    event["timestamp"] = f"{_format_second(seconds)}.{nanoseconds // 1000:06}Z"
    event["level"] = method
    return event


def _add_replica(replica: str, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Return the event with the name of the replica added."""
    del logger, method
    event["replica"] = replica
    return event


@lru_cache(maxsize=2)
def _format_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _render_json(logger: WrappedLogger, method: str, event: EventDict) -> str:
    del logger, method
    rounded = {name: round(value, 3) if type(value) is float else value for name, value in event.items()}
    try:
        return orjson.dumps(rounded, default=str).decode()
    except orjson.JSONEncodeError:
        # A text that UTF-8 cannot encode, or a larger integer than 64 bits.
        return json.dumps(rounded, default=str)


def _render_plain(logger: WrappedLogger, method: str, event: EventDict) -> str:
    """Return a line such as `2026-11-23T15:46:46.150270Z [info] request method=POST path=/correlate ...`."""
    traceback = (
        structlog.processors.format_exc_info(logger, method, event).pop("exception", "") if "exc_info" in event else ""
    )
    line = f"{event.pop('timestamp')} [{event.pop('level')}] {event.pop('event')}"
    for name, value in event.items():
        # Kept simple: every request logs one line, which counts in the latency of small requests.
        if value is None:
            continue
        if type(value) is float:
            line += f" {name}={value:.3f}"
        else:
            line += f" {name}={_quote_word(value) if type(value) is str else value}"
    return f"{line}\n{traceback}" if traceback else line


def _quote_word(text: str) -> str:
    """Return the text, quoted if it is empty or contains spaces or unprintable characters."""
    return text if text.isprintable() and " " not in text and text else repr(text)
