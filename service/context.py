"""State of one request."""

import itertools
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.types import Scope

from service.errors import ServiceError
from service.timing import Timing

if TYPE_CHECKING:  # the supervisor, which imports this, does not load numpy
    from service.scheduling.admission import Reservation

CONTEXT_KEY = "corr2d"
"""Key of the context in the state of the ASGI scope."""

REQUEST_ID_PREFIX = secrets.token_hex(8)
REQUEST_NUMBERS = itertools.count()
"""A request ID is a random prefix per process and a number: a random ID takes longer to create than its log line."""

REQUEST_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True, eq=False)
class RequestContext:
    """State of one request, from its headers to the end of its response."""

    request_id: str
    timing: Timing = field(default_factory=Timing)

    path: str = ""
    """Path below the prefix of the service; RequestLogMiddleware sets it."""

    reservation: "Reservation | None" = None
    """Resources of the request. Created by check_admission, closed at the end of the request."""

    rejection: str | None = None
    """Name of the problem type of the error response, if the response is one."""

    bytes_in: int = 0
    """Bytes of the body received so far."""

    engine: str | None = None
    """Engine that computed the output, or method of the fit."""

    is_disconnected: bool = False
    """True if the connection was lost before the response was complete."""

    key_name: str | None = None
    """Name of the API key of the request, if it has a valid one."""

    protocol_error: ServiceError | None = None
    """Error for which the server rejects the request; the server may set it until the body is complete."""


def get_context(scope: Scope) -> RequestContext:
    """Return the context of a request; the first call, by the server or by RequestLogMiddleware, creates it."""
    try:
        context: RequestContext = scope["state"][CONTEXT_KEY]
    except KeyError:
        request_id = _read_request_id(scope) or f"{REQUEST_ID_PREFIX}{next(REQUEST_NUMBERS):016x}"
        context = scope.setdefault("state", {})[CONTEXT_KEY] = RequestContext(request_id)
    return context


def get_reservation(scope: Scope) -> "Reservation":
    """Return the reservation of a request that has passed check_admission."""
    reservation = get_context(scope).reservation
    assert reservation is not None  # noqa: S101 - endpoints call check_admission first
    return reservation


def get_common_headers(scope: Scope) -> dict[str, str]:
    """Return the headers that every response has."""
    context = get_context(scope)
    return {"X-Request-ID": context.request_id, "Server-Timing": context.timing.header()}


def _read_request_id(scope: Scope) -> str | None:
    """Return the request's own ID, or None if it has none or an invalid one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            sent: str = value.decode("latin-1")
            return sent if REQUEST_ID_PATTERN.fullmatch(sent) else None
    return None
