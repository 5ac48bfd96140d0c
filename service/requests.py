"""From a request's body to a validated model: read within the limit, decode by media type, validate."""

from collections.abc import Awaitable, Callable
from email.message import Message
from functools import partial
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import Request
from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError, WithJsonSchema
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from service.codecs import REQUEST_DECODERS
from service.errors import BodyTooLarge, FieldError, InvalidRequest, NotParseable, UnsupportedMediaType
from service.request_log import Timing
from service.validation import field_errors

INLINE_BYTES = 16_384
"""A body up to this size is parsed on the event loop: in less time than a thread takes to be woken."""

_INTEGER = {"type": "integer", "minimum": 1}
_SIDE = {"type": "integer", "minimum": 0}

IntegerOrPair = Annotated[
    Any, WithJsonSchema({"anyOf": [_INTEGER, {"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 2}]})
]
"""An integer, or [rows, columns]. core checks it: the rule and its message stand there."""

Padding = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _SIDE,
                {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2},
                {"type": "array", "items": _SIDE, "minItems": 4, "maxItems": 4},
                {"enum": ["valid", "same"]},
            ]
        }
    ),
]
"""An integer, [rows, columns], [top, bottom, left, right], "valid" or "same". core checks it."""


class RequestModel(BaseModel):
    """What all request bodies share: strict types, no unknown fields, names that are core's own arguments."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)

    def arguments(self) -> dict[str, object]:
        """The fields as keyword arguments of a core function."""
        return {name: getattr(self, name) for name in type(self).model_fields}


Model = TypeVar("Model", bound=RequestModel)


def decoded(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that gives a route its request's body as a `model`.

    Raises UnsupportedMediaType, BodyTooLarge, NotParseable and InvalidRequest.
    """

    async def decode(request: Request) -> Model:
        decoder = _decoder(request.headers)
        body = await _read(request)
        timing: Timing = request.state.timing
        with timing.measure("parse"):
            if len(body) <= INLINE_BYTES:
                return _parse(model, decoder, body)
            parse = partial(_parse, model, decoder, body)
            return await anyio.to_thread.run_sync(parse, limiter=request.app.state.codec_threads)

    return decode


def _decoder(headers: Headers) -> Callable[[bytes], Any]:
    served = ", ".join(REQUEST_DECODERS)
    content_type = Message()
    content_type["Content-Type"] = headers.get("content-type", "")
    decoder = REQUEST_DECODERS.get(content_type.get_content_type())
    if decoder is None:
        sent = f'Content-Type "{headers["content-type"][:100]}"' if "content-type" in headers else "no Content-Type"
        raise UnsupportedMediaType(
            f"the request has {sent}; served is {served} (with curl: --json '{{...}}' instead of -d)",
            headers={"Accept": served},
        )
    if headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType(
            f'Content-Encoding "{headers["content-encoding"][:100]}" is not served: send the body as it is',
            headers={"Accept-Encoding": "identity"},
        )
    return decoder


async def _read(request: Request) -> bytes:
    """The body; refused before it is read where its declared length is over the limit, else as soon as it is."""
    limit = int(request.app.state.settings.max_body_mb * 1e6)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(f"{int(declared):,} bytes", limit)
    body = bytearray()
    try:
        async for chunk in request.stream():
            if len(body) + len(chunk) > limit:
                raise _too_large(f"more than {limit:,} bytes", limit)
            body += chunk
    except ClientDisconnect as error:
        raise NotParseable("the connection was closed before the body was whole") from error
    return bytes(body)


def _too_large(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has {size}; at most {limit:,} are allowed; the operator can change that by CORR2D_MAX_BODY_MB",
        errors=[FieldError("(body)", "the body is over the limit", size, f"{limit:,} bytes")],
        # What is left of the body is not wanted: the server closes the connection instead of reading it.
        headers={"Connection": "close"},
    )


def _parse(model: type[Model], decoder: Callable[[bytes], Any], body: bytes) -> Model:
    try:
        value = decoder(body)
    except ValueError as error:
        raise NotParseable(str(error)) from error
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = field_errors(error.errors(include_url=False), known=_names(model))
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise InvalidRequest(errors[0].message + more, errors=errors) from error


def _names(model: type[BaseModel]) -> list[str]:
    """The names that a body may use, aliases included."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        names += [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name]
    return names
