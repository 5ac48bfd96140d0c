"""Request parsing: receive body and query within the limits, decode by media type, validate as a model."""

import asyncio
from collections.abc import KeysView, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar, get_args
from urllib.parse import parse_qsl

import numpy as np
from fastapi import Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo

from service.app_state import get_app_state
from service.codecs.buffers import Buffer
from service.codecs.content_coding import decompress
from service.codecs.decode_limits import DecodeCheck
from service.codecs.images.options import ImageOptions
from service.codecs.registry import Format, MetadataOption, check_image_options, predict_decode_seconds
from service.codecs.response_options import OutputResponseOptions, ResponseOptions, parse_option
from service.context import get_context, get_reservation
from service.errors import BodyTooLarge, Busy, ClientDisconnected, FieldError, InvalidRequest
from service.negotiation import HeaderFields, get_body_coding, get_body_format
from service.pydantic_errors import Location, convert_errors
from service.scheduling.admission import MIN_TRACKED_BYTES, Reservation
from service.scheduling.body_memory import BodyBuffer, BodyMemory
from service.scheduling.codec_jobs import run_codec
from service.scheduling.threads import INLINE_THRESHOLD_S

MAX_QUERY_OPTIONS = 100

_POSITIVE_INTEGER_SCHEMA = {"type": "integer", "minimum": 1}
_PADDING_SIDE_SCHEMA = {"type": "integer", "minimum": 0}

IntegerOrPair = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _POSITIVE_INTEGER_SCHEMA,
                {"type": "array", "items": _POSITIVE_INTEGER_SCHEMA, "minItems": 2, "maxItems": 2},
            ]
        }
    ),
]
"""An integer, or [rows, columns]. Validated by core, which has the error messages."""

Padding = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _PADDING_SIDE_SCHEMA,
                {"type": "array", "items": _PADDING_SIDE_SCHEMA, "minItems": 2, "maxItems": 2},
                {"type": "array", "items": _PADDING_SIDE_SCHEMA, "minItems": 4, "maxItems": 4},
                {"enum": ["valid", "same"]},
            ]
        }
    ),
    Field(
        description='padding on each side: an integer, [rows, columns], [top, bottom, left, right], "same" or "valid"'
    ),
]
"""An integer, [rows, columns], [top, bottom, left, right], "valid" or "same". Validated by core."""

Stride = Annotated[IntegerOrPair, Field(description="step of the kernel: an integer, or [rows, columns]")]
Dilation = Annotated[
    IntegerOrPair, Field(description="distance between kernel entries: an integer, or [rows, columns]")
]
Groups = Annotated[
    int,
    Field(
        description="number of groups of channels, each with filters of its own",
        json_schema_extra={"minimum": 1},
    ),
]
Device = Annotated[
    str,
    Field(
        description="device of the computation: auto, cpu, cuda, cuda:1 or mps",
        # Syntax only: core checks which devices are available.
        json_schema_extra={"pattern": "^(auto|cpu|mps|cuda(:[0-9]+)?)$"},
    ),
]


class RequestModel(BaseModel):
    """Base class of request models: strict types, no unknown fields; field names are core's argument names."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)

    RESPONSE_OPTIONS: ClassVar[type[ResponseOptions]] = OutputResponseOptions
    """Model of the query parameters that select the form of the response."""

    def count_array_bytes(self) -> int:
        """Return the bytes of the decoded arrays. Views of the body are counted too, an overestimate."""
        size = 0
        for name in self.__pydantic_fields__:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                size += value.nbytes
            elif isinstance(value, list):
                size += sum(part.count_array_bytes() for part in value if isinstance(part, RequestModel))
        return size

    def arguments(self) -> dict[str, object]:
        """Return the fields as keyword arguments of a core function."""
        # Not model_fields, a property that takes a microsecond.
        return {name: getattr(self, name) for name in self.__pydantic_fields__}


Model = TypeVar("Model", bound=RequestModel)
Validated = TypeVar("Validated", bound=BaseModel)
OptionsModel = TypeVar("OptionsModel", bound=BaseModel)


def check_admission(request: Request, headers: HeaderFields, *, always_queued: bool = False) -> None:
    """Make the reservation of a request, with its deadline; reject it from its headers if it cannot be served now.

    Called before any other work, so that rejections stay cheap under overload. always_queued: requests of this endpoint
    never run inline. After a rejection, the server closes the connection if much of the body is still to be received.
    Raises BodyTooLarge and Busy.
    """
    state, context = get_app_state(request.app), get_context(request.scope)
    context.reservation = reservation = Reservation(state.admission, context.path, context.timing)
    limit = state.max_body_bytes
    length = headers.get(b"content-length", b"")
    declared = int(length) if length.isdigit() else 0
    if declared > limit:
        raise _body_too_large_error(f"{declared:,} bytes", limit)
    if always_queued or declared > MIN_TRACKED_BYTES:
        state.admission.check_capacity(context.path, declared)
        reservation.declared = declared


async def read_request(
    request: Request,
    headers: HeaderFields,
    options: Mapping[str, Any],
    model: type[Model],
    *,
    always_queued: bool = False,
) -> Model:
    """Return the body and the query parameters of a request as a `model`.

    The request must have passed `check_admission`. always_queued: as there. A request that does not run inline takes a
    slot after its body is received and before it is decoded, so that slow senders hold no slots. Raises
    UnsupportedMediaType, BodyTooLarge, NotParseable, InvalidRequest and Busy.
    """
    reservation = get_reservation(request.scope)
    served, coding = get_body_format(headers), get_body_coding(headers)
    limit = get_app_state(request.app).max_body_bytes
    body = await _read_body(request, reservation, limit)
    seconds = predict_decode_seconds(served, coding, body, limit)
    in_thread = seconds >= INLINE_THRESHOLD_S
    if always_queued or in_thread:
        reservation.take_slot()
    work = partial(_decode_and_validate, model, served, coding, body, limit, options)
    try:
        parsed = await run_codec(request, seconds, work, "parse")
    except Busy as rejection:
        reservation.cache_rejection(rejection.detail)
        raise
    if in_thread:
        reservation.reserve_body(len(body) + parsed.count_array_bytes())
    return parsed


def parse_query(request: Request) -> dict[str, Any]:
    """Return the query parameters by name: numbers, lists, true, false and null are parsed as JSON, the rest is text.

    Raises InvalidRequest for a repeated name.
    """
    query: bytes = request.scope["query_string"]
    if not query:
        return {}
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_QUERY_OPTIONS)
    except ValueError as error:
        raise InvalidRequest(f"the query string has more than {MAX_QUERY_OPTIONS} options, the maximum") from error
    options = {name: parse_option(text) for name, text in pairs}
    if len(options) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidRequest(
            "an option is repeated in the query string: send it once",
            errors=[
                FieldError(name, f'"{name}" occurs {names.count(name)} times in the query string', None, "once")
                for name in options
                if names.count(name) > 1
            ],
        )
    return options


def take_options(options: dict[str, Any], model: type[OptionsModel]) -> OptionsModel:
    """Remove the fields of a model from `options` and return them as that model. Raises InvalidRequest."""
    taken = {name: options.pop(name) for name in model.__pydantic_fields__ if name in options}
    return _validate(model, taken)


async def _read_body(request: Request, reservation: Reservation, limit: int) -> Buffer:
    """Receive the body. Raises BodyTooLarge as soon as it exceeds the limit, and RequestTimeout at the deadline."""
    bodies = get_app_state(request.app).admission.bodies
    bodies.begin(reservation.body)
    try:
        return await _receive_body(request, reservation, bodies, limit)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if reservation.body.abort_error is None or (task is not None and task.uncancel() > 0):
            raise
        raise reservation.body.abort_error from None
    finally:
        bodies.end(reservation.body)


async def _receive_body(request: Request, reservation: Reservation, bodies: BodyMemory, limit: int) -> Buffer:
    """Receive the body and join its chunks."""
    metrics, context = get_app_state(request.app).metrics, get_context(request.scope)
    buffer: BodyBuffer | None = None
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("the client closed the connection before the body was complete")
        # The server stopped receiving the body.
        if context.protocol_error is not None:
            raise context.protocol_error
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        context.bytes_in += len(chunk)
        metrics.add_received_bytes(len(chunk))
        size = len(chunk) if buffer is None else buffer.size + len(chunk)
        if size > limit:
            raise _body_too_large_error(f"more than {limit:,} bytes", limit)
        if size > MIN_TRACKED_BYTES:
            bodies.grow(reservation.body, size)
        if buffer is None:
            if not more:
                return chunk
            buffer = BodyBuffer(reservation.declared or limit)
        buffer.add(chunk)
        if not more:
            return buffer.getbuffer()


def _body_too_large_error(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has {size}; at most {limit:,} are allowed (limit: CORR2D_MAX_BODY_MB)",
        errors=[FieldError("(body)", "the body exceeds the size limit", size, f"{limit:,} bytes")],
        # The server closes the connection instead of receiving the rest of the body.
        headers={"Connection": "close"},
    )


def _decode_and_validate(
    model: type[Model],
    served: Format,
    coding: str | None,
    body: Buffer,
    limit: int,
    options: Mapping[str, Any],
    check: DecodeCheck,
) -> Model:
    if coding is not None:
        body = decompress(coding, body, limit, check)
    assert served.decode is not None  # noqa: S101 - get_body_format returns decodable formats only
    if served.is_image:
        try:
            fields = served.decode(body, limit, check, options)
        except ValidationError as error:
            raise _convert_validation_error(error, ImageOptions) from error
        options = {name: value for name, value in options.items() if name not in ImageOptions.model_fields}
    else:
        if options:
            check_image_options(served, options)
        fields = served.decode(body, limit, check)
    response_options = model.RESPONSE_OPTIONS.__pydantic_fields__.keys()
    if served.has_metadata and isinstance(fields, dict):
        fields = _select_metadata(fields, {*_list_accepted_names(model), *response_options})
    return _validate(model, _merge_options(fields, options, response_options))


def _select_metadata(fields: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the fields without the entries of a file's metadata that are not options."""
    return {
        name: value.value if isinstance(value, MetadataOption) else value
        for name, value in fields.items()
        if name in names or not isinstance(value, MetadataOption)
    }


def _merge_options(fields: Any, options: Mapping[str, Any], response_options: KeysView[str]) -> Any:
    """Return the fields of body and query. Raises InvalidRequest for a name that is in both, or in the wrong one."""
    if not isinstance(fields, dict):
        return fields
    misplaced = fields.keys() & response_options
    if both := misplaced.union(fields.keys() & options.keys()):
        errors = []
        for name in sorted(both):
            problem = "belongs in the query string" if name in misplaced else "is in the body and in the query string"
            hint = f"?{name}=..." if name in misplaced else "send it once"
            errors.append(FieldError(name, f'"{name}" {problem}: {hint}'))
        raise InvalidRequest(errors[0].message, errors=errors)
    return {**fields, **options} if options else fields


def _validate(model: type[Validated], fields: Any) -> Validated:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _convert_validation_error(error, model) from error


def _convert_validation_error(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    errors = convert_errors(error.errors(include_url=False), partial(_list_accepted_names, model))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return InvalidRequest(errors[0].message + more, errors=errors)


def _list_accepted_names(model: type[BaseModel], location: Location = ()) -> list[str]:
    """Return the accepted field names, including aliases, of the object at a location in a model; [] if unknown."""
    for part in location:
        if isinstance(part, str):
            fields = (field for name, field in model.model_fields.items() if part in _list_aliases(name, field))
            nested = next((_find_model(field.annotation) for field in fields), None)
            if nested is None:
                return []
            model = nested
    return [alias for name, field in model.model_fields.items() for alias in _list_aliases(name, field)]


def _list_aliases(name: str, field: FieldInfo) -> list[str]:
    """Return the names under which a field is accepted."""
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name]


def _find_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as list[TrainingPair] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_find_model, get_args(annotation))), None)
