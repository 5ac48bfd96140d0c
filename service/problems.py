"""Problem details for every error (RFC 9457, application/problem+json), at most 8 KiB each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
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
from service.app_state import get_app_state
from service.context import get_common_headers, get_context
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
    is_out_of_memory,
)
from service.pydantic_errors import convert_errors

PROBLEM_MEDIA_TYPE = "application/problem+json"
MAX_PROBLEM_BYTES = 8000
MAX_PROBLEM_ERRORS = 20
MAX_TEXT_CHARS = 300

INTERNAL_PROBLEM = "internal"
"""Name of the problem type of internal errors."""


@dataclass(frozen=True, slots=True)
class ProblemType:
    """HTTP status of an error, last part of its `type` URN, and title."""

    status: int
    name: str
    title: str


PROBLEM_TYPES: Mapping[type[Exception], ProblemType] = {
    InvalidArgument: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-argument", "An argument is not valid"),
    InvalidShape: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-shape", "The shapes do not fit together"),
    InvalidOption: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-option", "An option is outside its allowed values"
    ),
    InvalidNumbers: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-numbers", "Values are not plain real numbers"
    ),
    UnknownKernel: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "unknown-kernel", "The kernel name is unknown"),
    DeviceUnavailable: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "device-unavailable", "The device is not available"
    ),
    MethodUnavailable: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "method-unavailable", "No engine supports this problem by that method"
    ),
    TooLarge: ProblemType(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too-large", "The computation exceeds a limit"),
    NotParseable: ProblemType(HTTPStatus.BAD_REQUEST, "not-parseable", "The body cannot be parsed"),
    InvalidRequest: ProblemType(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid-request", "The request is not valid"),
    Unauthorized: ProblemType(HTTPStatus.UNAUTHORIZED, "unauthorized", "A valid API key is required"),
    UnsupportedMediaType: ProblemType(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "The format of the body is not supported"
    ),
    NotAcceptable: ProblemType(HTTPStatus.NOT_ACCEPTABLE, "not-acceptable", "No response format satisfies Accept"),
    BodyTooLarge: ProblemType(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body-too-large", "The body exceeds the size limit"),
    HeaderTooLarge: ProblemType(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "header-too-large", "The request headers exceed the size limit"
    ),
    TargetTooLong: ProblemType(
        HTTPStatus.REQUEST_URI_TOO_LONG, "uri-too-long", "The request target exceeds the length limit"
    ),
    MisdirectedRequest: ProblemType(
        HTTPStatus.MISDIRECTED_REQUEST, "misdirected", "The request target does not belong to this service"
    ),
    TransferCodingNotSupported: ProblemType(
        HTTPStatus.NOT_IMPLEMENTED, "coding-not-implemented", "The transfer coding is not supported"
    ),
    HTTPVersionNotSupported: ProblemType(
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "version-not-supported", "The HTTP version is not supported"
    ),
    RequestTimeout: ProblemType(HTTPStatus.REQUEST_TIMEOUT, "too-slow", "The request was not received in time"),
    NotReady: ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "not-ready", "The service is not ready"),
    Busy: ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "busy", "The service is busy"),
    OutOfMemory: ProblemType(HTTPStatus.SERVICE_UNAVAILABLE, "out-of-memory", "The system is out of memory"),
    # Not sent, only logged and counted; the status is from nginx.
    ClientDisconnected: ProblemType(499, "client-left", "The client disconnected"),
    DeadlineExceeded: ProblemType(HTTPStatus.GATEWAY_TIMEOUT, "deadline-passed", "The request exceeded its deadline"),
}


PROBLEM_NAMES = (
    *(problem_type.name for problem_type in PROBLEM_TYPES.values()),
    "not-found",
    "method-not-allowed",
    INTERNAL_PROBLEM,
)
"""Names of all problem types, including those of the router."""


class ProblemEntry(BaseModel):
    """One invalid field or value."""

    field: str = Field(
        description='name of the field, path of a value such as `input[2]`, "(body)" for the whole body, or '
        '"(estimate)" for the predicted cost'
    )
    message: str
    got: str | None = Field(None, description="received value")
    limit: str | None = Field(None, description="allowed values")


PROBLEM_EXAMPLE: JsonDict = {
    "type": "urn:corr2d:error:invalid-shape",
    "title": "The shapes do not fit together",
    "status": 422,
    "detail": (
        'kernel has shape (1, 3), larger than the input (2, 2); mode "valid" requires it to fit: use mode "same" or '
        '"full"'
    ),
    "request_id": "4e5cf28ac7f21e41000000000000000b",
    "errors": [
        {
            "field": "kernel",
            "message": (
                'kernel has shape (1, 3), larger than the input (2, 2); mode "valid" requires it to fit: use mode '
                '"same" or "full"'
            ),
            "got": "(1, 3)",
            "limit": "(2, 2)",
        }
    ],
}
"""Response to a kernel that is larger than the input."""


class ProblemDetails(BaseModel):
    """Body of every error response (RFC 9457)."""

    model_config = ConfigDict(json_schema_extra={"examples": [PROBLEM_EXAMPLE]})

    type: str = Field(description="`urn:corr2d:error:` followed by the name of the problem type")
    title: str
    status: int
    detail: str = Field(description="what was received, what is allowed and how to fix it")
    request_id: str
    errors: list[ProblemEntry] = []
    errors_omitted: int | None = Field(None, description="number of further errors")


def add_error_handlers(app: FastAPI) -> None:
    """Register handlers that respond to every error with problem details."""
    for error_class in HANDLED_ERRORS:
        app.add_exception_handler(error_class, respond_to_error)
    app.add_exception_handler(RequestValidationError, _handle_query_error)
    app.add_exception_handler(HTTPException, _handle_http_error)
    app.add_exception_handler(HTTPStatus.INTERNAL_SERVER_ERROR, _handle_internal_error)


HANDLED_ERRORS = CoreError, ServiceError, MemoryError, RuntimeError
"""Errors handled by respond_to_error; of RuntimeErrors, only those that report a lack of memory."""


def respond_to_error(request: Request, error: Exception) -> Response:
    """Return the response to one of HANDLED_ERRORS and clear its traceback; raise other errors again.

    The frames of the traceback hold the body and the decoded arrays, and a future that holds the error: a reference
    cycle that would keep this memory until the next garbage collection.
    """
    if not isinstance(error, CoreError | ServiceError):
        return _handle_out_of_memory(request, error)
    error.__traceback__ = None
    return _handle_core_error(request, error) if isinstance(error, CoreError) else _handle_service_error(request, error)


def _handle_out_of_memory(request: Request, error: Exception) -> Response:
    if not is_out_of_memory(error):
        raise error
    error.__traceback__ = None
    out_of_memory = OutOfMemory(
        "the system is out of memory; retry later (limit: CORR2D_MEMORY_MB)",
        headers={"Retry-After": "1"},
    )
    return _handle_service_error(request, out_of_memory)


async def respond_to_protocol_error(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to a request whose context already has a protocol error of the server (an ASGI application)."""
    error = get_context(scope).protocol_error
    assert error is not None  # noqa: S101 - RequestLogMiddleware calls this only if there is one
    await respond_to_error(Request(scope), error)(scope, receive, send)


def create_problem_response(
    request: Request,
    problem_type: ProblemType,
    detail: str,
    errors: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the response to an error, cut to MAX_PROBLEM_BYTES, and store its type in the request's context."""
    context = get_context(request.scope)
    context.rejection = problem_type.name
    shown = [_format_entry(error) for error in errors[:MAX_PROBLEM_ERRORS]]
    while True:
        body: dict[str, Any] = {
            "type": f"urn:corr2d:error:{problem_type.name}",
            "title": problem_type.title,
            "status": problem_type.status,
            "detail": _truncate(detail, 1000),
            "request_id": context.request_id,
            "errors": shown,
        }
        if len(shown) < len(errors):
            body["errors_omitted"] = len(errors) - len(shown)
        encoded = orjson.dumps(body)
        if len(encoded) <= MAX_PROBLEM_BYTES or not shown:
            return Response(encoded, problem_type.status, headers, PROBLEM_MEDIA_TYPE)
        shown.pop()


def _handle_core_error(request: Request, error: Exception) -> Response:
    """Respond to a CoreError; Starlette selects handlers by class, which the cast relies on, here and below."""
    error = cast("CoreError", error)
    detail, field = error.message, error.field
    if isinstance(error, TooLarge):
        detail += f" (limit: {get_app_state(request.app).limit_settings[error.quantity]})"
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
    """Respond to the errors of the router: 404 and 405."""
    error = cast("HTTPException", error)
    status = HTTPStatus(error.status_code)
    problem_type = ProblemType(status, status.phrase.lower().replace(" ", "-"), status.phrase)
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"  # see HeadMiddleware
    scope = request.scope
    # A mounted application has a prefix of its own.
    prefix = scope.get("app_root_path", scope.get("root_path", ""))
    paths = ", ".join(prefix + path for path in sorted(request.app.openapi()["paths"]))
    detail = {
        HTTPStatus.NOT_FOUND: f"unknown endpoint {_truncate(request.url.path)}; endpoints: {paths}",
        HTTPStatus.METHOD_NOT_ALLOWED: (
            f"{request.method} is not allowed at {_truncate(request.url.path)}; "
            f"allowed: {headers.get('Allow', 'other methods')}"
        ),
    }.get(status, str(error.detail))
    return create_problem_response(request, problem_type, detail, headers=headers)


def create_internal_error_response(request: Request, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response to an internal error; the log has the traceback, with the same request id."""
    problem_type = ProblemType(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL_PROBLEM, "Internal error")
    detail = "internal error; the log of the service has the details under this request_id"
    return create_problem_response(request, problem_type, detail, headers=headers)


def _handle_internal_error(request: Request, error: Exception) -> Response:
    """Respond to an internal error, with the common headers: Starlette calls this handler outside all middleware.

    Starlette then raises the error again for uvicorn, which closes the connection.
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
    """Cut the text to the length, and replace characters that UTF-8 cannot encode."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.encode("utf-8", "replace").decode()
