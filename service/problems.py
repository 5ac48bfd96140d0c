"""From every error to its answer: one table, one shape (RFC 9457, application/problem+json), never over 8 KiB."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core import (
    CoreError,
    DeviceUnavailable,
    InvalidArgument,
    InvalidNumbers,
    InvalidOption,
    InvalidShape,
    MethodUnavailable,
    TooLarge,
    UnknownKernel,
)
from service.errors import (
    BodyTooLarge,
    Busy,
    ClientLeft,
    CodingNotImplemented,
    DeadlinePassed,
    FieldError,
    HeaderTooLarge,
    InvalidRequest,
    Misdirected,
    NotAcceptable,
    NotParseable,
    NotReady,
    ServiceError,
    TooSlow,
    Unauthorized,
    UnsupportedMediaType,
    UriTooLong,
    VersionNotSupported,
)
from service.request_log import INTERNAL, trace_headers
from service.validation import field_errors

MEDIA_TYPE = "application/problem+json"
MAX_BYTES = 8000
MAX_ERRORS = 20
MAX_TEXT = 300

LIMIT_SETTINGS = {
    "memory": "CORR2D_MAX_COMPUTE_MB",
    "compute": "CORR2D_MAX_COMPUTE_GFLOP",
    "time": "CORR2D_REQUEST_TIMEOUT_S",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """An error's HTTP status, the last part of its `type` URN, and its title."""

    status: int
    name: str
    title: str


ERRORS: Mapping[type[Exception], Kind] = {
    CoreError: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "unacceptable", "The request cannot be computed"),
    InvalidArgument: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-argument", "An argument is not acceptable"),
    InvalidShape: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-shape", "The shapes do not fit together"),
    InvalidOption: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-option", "An option is outside its allowed values"),
    InvalidNumbers: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-numbers", "Values are not plain real numbers"),
    UnknownKernel: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "unknown-kernel", "There is no kernel of that name"),
    DeviceUnavailable: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "device-unavailable", "The device is not there"),
    MethodUnavailable: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "method-unavailable", "No engine works by that method"),
    TooLarge: Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too-large", "The computation is over a limit"),
    ServiceError: Kind(HTTPStatus.INTERNAL_SERVER_ERROR, "failed", "The request failed"),
    NotParseable: Kind(HTTPStatus.BAD_REQUEST, "not-parseable", "The body cannot be parsed"),
    InvalidRequest: Kind(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", "The request is not acceptable"),
    Unauthorized: Kind(HTTPStatus.UNAUTHORIZED, "unauthorized", "An API key is needed"),
    UnsupportedMediaType: Kind(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "The body's format is not served"
    ),
    NotAcceptable: Kind(HTTPStatus.NOT_ACCEPTABLE, "not-acceptable", "No format that is served satisfies Accept"),
    BodyTooLarge: Kind(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body-too-large", "The body is over the limit"),
    HeaderTooLarge: Kind(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "header-too-large", "The head of the request is over the limit"
    ),
    UriTooLong: Kind(HTTPStatus.REQUEST_URI_TOO_LONG, "uri-too-long", "The target of the request is over the limit"),
    Misdirected: Kind(HTTPStatus.MISDIRECTED_REQUEST, "misdirected", "The target is not of this service"),
    CodingNotImplemented: Kind(
        HTTPStatus.NOT_IMPLEMENTED, "coding-not-implemented", "The transfer coding is not served"
    ),
    VersionNotSupported: Kind(
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "version-not-supported", "The version of HTTP is not served"
    ),
    TooSlow: Kind(HTTPStatus.REQUEST_TIMEOUT, "too-slow", "The request did not come in time"),
    NotReady: Kind(HTTPStatus.SERVICE_UNAVAILABLE, "not-ready", "The service is not ready"),
    Busy: Kind(HTTPStatus.SERVICE_UNAVAILABLE, "busy", "The service is busy"),
    # Nobody reads it but the log; the number is nginx's.
    ClientLeft: Kind(499, "client-left", "The client left"),
    DeadlinePassed: Kind(HTTPStatus.GATEWAY_TIMEOUT, "deadline-passed", "The request ran out of time"),
}


REASONS = (*(kind.name for kind in ERRORS.values()), "not-found", "method-not-allowed", INTERNAL)
"""The names of all problems there are, those of the router among them."""


class ProblemEntry(BaseModel):
    """One thing that is wrong."""

    field: str = Field(description="what is at fault: a field, or a place in an array such as `input[2]`")
    message: str
    got: str | None = Field(None, description="what was sent")
    limit: str | None = Field(None, description="what is allowed")


class ProblemDetails(BaseModel):
    """What every error looks like (RFC 9457)."""

    type: str = Field(description="`urn:corr2d:error:` and the kind of error")
    title: str
    status: int
    detail: str = Field(description="what came, what is allowed, how to change it")
    request_id: str
    errors: list[ProblemEntry] = []
    errors_omitted: int | None = Field(None, description="how many more errors there were")


def add_error_handlers(app: FastAPI) -> None:
    """Answer everything that goes wrong in one shape."""
    app.add_exception_handler(CoreError, _core_error)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _query_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(HTTPStatus.INTERNAL_SERVER_ERROR, _bug)


def response_to(request: Request, error: CoreError | ServiceError) -> Response:
    """The answer to an error of the table, whose traceback is forgotten.

    Its frames hold the body and what it was decoded to, and one of them a future that holds the error: a circle, which
    lasts until the collector happens to come by.
    """
    error.__traceback__ = None
    return _core_error(request, error) if isinstance(error, CoreError) else _service_error(request, error)


async def answer_given_up(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI application: the answer to a request whose state holds the refusal already."""
    error: ServiceError = scope["state"]["given_up"]
    await response_to(Request(scope), error)(scope, receive, send)


def problem_response(
    request: Request,
    kind: Kind,
    detail: str,
    errors: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer to an error, cut to fit into MAX_BYTES; the request's state says from then on why it was refused."""
    request.state.refused = kind.name
    shown = [_entry(error) for error in errors[:MAX_ERRORS]]
    while True:
        body: dict[str, Any] = {
            "type": f"urn:corr2d:error:{kind.name}",
            "title": kind.title,
            "status": kind.status,
            "detail": _short(detail, 1000),
            "request_id": request.state.request_id,
            "errors": shown,
        }
        if len(shown) < len(errors):
            body["errors_omitted"] = len(errors) - len(shown)
        encoded = orjson.dumps(body)
        if len(encoded) <= MAX_BYTES or not shown:
            return Response(encoded, kind.status, headers, MEDIA_TYPE)
        shown.pop()


def _core_error(request: Request, error: Exception) -> Response:
    """Starlette looks a handler up by class, so the error is of the class it was registered for; likewise below."""
    error = cast("CoreError", error)
    detail, field = error.message, error.field
    if isinstance(error, TooLarge):
        detail += f"; the operator can change that by {LIMIT_SETTINGS[error.quantity]}"
        field = "(estimate)"
    errors = [FieldError(field, error.message, error.got, error.limit)] if field else []
    return problem_response(request, ERRORS[type(error)], detail, errors)


def _service_error(request: Request, error: Exception) -> Response:
    error = cast("ServiceError", error)
    return problem_response(request, ERRORS[type(error)], error.detail, error.errors, error.headers)


def _query_error(request: Request, error: Exception) -> Response:
    errors = field_errors(cast("RequestValidationError", error).errors())
    return problem_response(request, ERRORS[InvalidRequest], errors[0].message, errors)


def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: 404 and 405."""
    error = cast("HTTPException", error)
    status = HTTPStatus(error.status_code)
    kind = Kind(status, status.phrase.lower().replace(" ", "-"), status.phrase)
    paths = ", ".join(sorted(request.app.openapi()["paths"]))
    detail = {
        HTTPStatus.NOT_FOUND: f"there is nothing at {_short(request.url.path)}; there are: {paths}",
        HTTPStatus.METHOD_NOT_ALLOWED: (
            f"{request.method} is not served at {_short(request.url.path)}; "
            f"it takes {(error.headers or {}).get('Allow', 'another method')}"
        ),
    }.get(status, str(error.detail))
    return problem_response(request, kind, detail, headers=error.headers)


def fault_response(request: Request, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a fault of ours: its trace goes to the log, under the request id that the client gets."""
    kind = Kind(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL, "Internal error")
    detail = "a fault of the service; its log has the details under this request_id"
    return problem_response(request, kind, detail, headers=headers)


def _bug(request: Request, error: Exception) -> Response:
    """Starlette answers these outside of all middleware, so the headers of every response are put on here.

    Then it raises them again, for uvicorn, which closes the connection.
    """
    del error
    return fault_response(request, {**trace_headers(request.scope), "Connection": "close"})


def _entry(error: FieldError) -> dict[str, str]:
    entry = {"field": _short(error.field), "message": _short(error.message)}
    if error.got is not None:
        entry["got"] = _short(str(error.got))
    if error.limit is not None:
        entry["limit"] = _short(str(error.limit))
    return entry


def _short(text: str, length: int = MAX_TEXT) -> str:
    """Cut to length, and writable as UTF-8 whatever came in."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.encode("utf-8", "replace").decode()
