"""From every error to its answer: one table, one shape (RFC 9457, application/problem+json), never over 8 KiB."""

import re
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
    ClientDisconnected,
    DeadlineExceeded,
    FieldError,
    HeaderTooLarge,
    HTTPVersionNotSupported,
    InvalidRequest,
    MisdirectedRequest,
    NotAcceptable,
    NotParseable,
    NotReady,
    OutOfMemory,
    RequestTimeout,
    ServiceError,
    TargetTooLong,
    TransferCodingNotSupported,
    Unauthorized,
    UnsupportedMediaType,
)
from service.middleware.request_log import INTERNAL_PROBLEM, get_common_headers
from service.pydantic_errors import convert_errors

PROBLEM_MEDIA_TYPE = "application/problem+json"
MAX_PROBLEM_BYTES = 8000
MAX_PROBLEM_ERRORS = 20
MAX_TEXT_CHARS = 300

LIMIT_SETTINGS = {
    "memory": "CORR2D_MAX_COMPUTE_MB",
    "compute": "CORR2D_MAX_COMPUTE_GFLOP",
    "time": "CORR2D_REQUEST_TIMEOUT_S",
}


@dataclass(frozen=True, slots=True)
class ProblemType:
    """An error's HTTP status, the last part of its `type` URN, and its title."""

    status: int
    name: str
    title: str


PROBLEM_TYPES: Mapping[type[Exception], ProblemType] = {
    CoreError: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "unacceptable", "The request cannot be computed"),
    InvalidArgument: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-argument", "An argument is not acceptable"),
    InvalidShape: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-shape", "The shapes do not fit together"),
    InvalidOption: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-option", "An option is outside its allowed values"
    ),
    InvalidNumbers: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-numbers", "Values are not plain real numbers"
    ),
    UnknownKernel: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "unknown-kernel", "There is no kernel of that name"),
    DeviceUnavailable: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "device-unavailable", "The device is not there"),
    MethodUnavailable: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "method-unavailable", "No engine works by that method"
    ),
    TooLarge: ProblemType(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too-large", "The computation is over a limit"),
    ServiceError: ProblemType(HTTPStatus.INTERNAL_SERVER_ERROR, "failed", "The request failed"),
    NotParseable: ProblemType(HTTPStatus.BAD_REQUEST, "not-parseable", "The body cannot be parsed"),
    InvalidRequest: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", "The request is not acceptable"),
    Unauthorized: ProblemType(HTTPStatus.UNAUTHORIZED, "unauthorized", "An API key is needed"),
    UnsupportedMediaType: ProblemType(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "The body's format is not served"
    ),
    NotAcceptable: ProblemType(
        HTTPStatus.NOT_ACCEPTABLE, "not-acceptable", "No format that is served satisfies Accept"
    ),
    BodyTooLarge: ProblemType(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body-too-large", "The body is over the limit"),
    HeaderTooLarge: ProblemType(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "header-too-large", "The head of the request is over the limit"
    ),
    TargetTooLong: ProblemType(
        HTTPStatus.REQUEST_URI_TOO_LONG, "uri-too-long", "The target of the request is over the limit"
    ),
    MisdirectedRequest: ProblemType(HTTPStatus.MISDIRECTED_REQUEST, "misdirected", "The target is not of this service"),
    TransferCodingNotSupported: ProblemType(
        HTTPStatus.NOT_IMPLEMENTED, "coding-not-implemented", "The transfer coding is not served"
    ),
    HTTPVersionNotSupported: ProblemType(
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "version-not-supported", "The version of HTTP is not served"
    ),
    RequestTimeout: ProblemType(HTTPStatus.REQUEST_TIMEOUT, "too-slow", "The request did not come in time"),
    NotReady: ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "not-ready", "The service is not ready"),
    Busy: ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "busy", "The service is busy"),
    OutOfMemory: ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "out-of-memory", "The system has no memory left"),
    # Nobody reads it but the log; the number is nginx's.
    ClientDisconnected: ProblemType(499, "client-left", "The client left"),
    DeadlineExceeded: ProblemType(HTTPStatus.GATEWAY_TIMEOUT, "deadline-passed", "The request ran out of time"),
}


PROBLEM_NAMES = (
    *(problem_type.name for problem_type in PROBLEM_TYPES.values()),
    "not-found",
    "method-not-allowed",
    INTERNAL_PROBLEM,
)
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
    app.add_exception_handler(CoreError, _handle_core_error)
    app.add_exception_handler(ServiceError, _handle_service_error)
    for lack in (MemoryError, RuntimeError):
        app.add_exception_handler(lack, _handle_out_of_memory)
    app.add_exception_handler(RequestValidationError, _handle_query_error)
    app.add_exception_handler(HTTPException, _handle_http_error)
    app.add_exception_handler(HTTPStatus.INTERNAL_SERVER_ERROR, _handle_internal_error)


HANDLED_ERRORS = CoreError, ServiceError, MemoryError, RuntimeError
"""What `response_to` answers: of RuntimeErrors, those by which libraries say that there is no memory."""

OUT_OF_MEMORY_MESSAGE = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


def respond_to_error(request: Request, error: Exception) -> Response:
    """The answer to an error of the table, whose traceback is forgotten; raises what is none.

    Its frames hold the body and what it was decoded to, and one of them a future that holds the error: a circle, which
    lasts until the collector happens to come by.
    """
    if not isinstance(error, CoreError | ServiceError):
        return _handle_out_of_memory(request, error)
    error.__traceback__ = None
    return _handle_core_error(request, error) if isinstance(error, CoreError) else _handle_service_error(request, error)


def _handle_out_of_memory(request: Request, error: Exception) -> Response:
    if not isinstance(error, MemoryError) and not OUT_OF_MEMORY_MESSAGE.search(str(error)):
        raise error
    error.__traceback__ = None
    lack = OutOfMemory(
        "the system has no memory left for this: try again later; "
        "the operator can limit what requests take together by CORR2D_MEMORY_MB",
        headers={"Retry-After": "1"},
    )
    return _handle_service_error(request, lack)


async def respond_to_protocol_error(scope: Scope, receive: Receive, send: Send) -> None:
    """ASGI application: the answer to a request whose state holds the refusal already."""
    error: ServiceError = scope["state"]["given_up"]
    await respond_to_error(Request(scope), error)(scope, receive, send)


def create_problem_response(
    request: Request,
    problem_type: ProblemType,
    detail: str,
    errors: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer to an error, cut to fit into MAX_BYTES; the request's state says from then on why it was refused."""
    request.state.refused = problem_type.name
    shown = [_format_entry(error) for error in errors[:MAX_PROBLEM_ERRORS]]
    while True:
        body: dict[str, Any] = {
            "type": f"urn:corr2d:error:{problem_type.name}",
            "title": problem_type.title,
            "status": problem_type.status,
            "detail": _truncate(detail, 1000),
            "request_id": request.state.request_id,
            "errors": shown,
        }
        if len(shown) < len(errors):
            body["errors_omitted"] = len(errors) - len(shown)
        encoded = orjson.dumps(body)
        if len(encoded) <= MAX_PROBLEM_BYTES or not shown:
            return Response(encoded, problem_type.status, headers, PROBLEM_MEDIA_TYPE)
        shown.pop()


def _handle_core_error(request: Request, error: Exception) -> Response:
    """Starlette looks a handler up by class, so the error is of the class it was registered for; likewise below."""
    error = cast("CoreError", error)
    detail, field = error.message, error.field
    if isinstance(error, TooLarge):
        detail += f"; the operator can change that by {LIMIT_SETTINGS[error.quantity]}"
        field = "(estimate)"
    errors = [FieldError(field, error.message, error.got, error.limit)] if field else []
    return create_problem_response(request, PROBLEM_TYPES[type(error)], detail, errors)


def _handle_service_error(request: Request, error: Exception) -> Response:
    error = cast("ServiceError", error)
    return create_problem_response(request, PROBLEM_TYPES[type(error)], error.detail, error.errors, error.headers)


def _handle_query_error(request: Request, error: Exception) -> Response:
    errors = convert_errors(cast("RequestValidationError", error).errors())
    return create_problem_response(request, PROBLEM_TYPES[InvalidRequest], errors[0].message, errors)


def _handle_http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: 404 and 405."""
    error = cast("HTTPException", error)
    status = HTTPStatus(error.status_code)
    problem_type = ProblemType(status, status.phrase.lower().replace(" ", "-"), status.phrase)
    paths = ", ".join(sorted(request.app.openapi()["paths"]))
    detail = {
        HTTPStatus.NOT_FOUND: f"there is nothing at {_truncate(request.url.path)}; there are: {paths}",
        HTTPStatus.METHOD_NOT_ALLOWED: (
            f"{request.method} is not served at {_truncate(request.url.path)}; "
            f"it takes {(error.headers or {}).get('Allow', 'another method')}"
        ),
    }.get(status, str(error.detail))
    return create_problem_response(request, problem_type, detail, headers=error.headers)


def create_internal_error_response(request: Request, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a fault of ours: its trace goes to the log, under the request id that the client gets."""
    problem_type = ProblemType(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_PROBLEM, "Internal error")
    detail = "a fault of the service; its log has the details under this request_id"
    return create_problem_response(request, problem_type, detail, headers=headers)


def _handle_internal_error(request: Request, error: Exception) -> Response:
    """Starlette answers these outside of all middleware, so the headers of every response are put on here.

    Then it raises them again, for uvicorn, which closes the connection.
    """
    del error
    return create_internal_error_response(request, {**get_common_headers(request.scope), "Connection": "close"})


def _format_entry(error: FieldError) -> dict[str, str]:
    entry = {"field": _truncate(error.field), "message": _truncate(error.message)}
    if error.got is not None:
        entry["got"] = _truncate(str(error.got))
    if error.limit is not None:
        entry["limit"] = _truncate(str(error.limit))
    return entry


def _truncate(text: str, length: int = MAX_TEXT_CHARS) -> str:
    """Cut to length, and writable as UTF-8 whatever came in."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.encode("utf-8", "replace").decode()
