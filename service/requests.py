"""From a request to a validated model: body and query, read within the limits, decoded by media type, validated."""

import asyncio
from collections.abc import KeysView, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar
from urllib.parse import parse_qsl

import numpy as np
from fastapi import Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from service.admission import UNCOUNTED, Admission, Share, share_of
from service.bodies import Bodies, Pieces
from service.codec_work import run_codec
from service.codecs import Buffer, Format, predict_decode_seconds
from service.codecs.content_coding import decode as without_coding
from service.codecs.layout import Check
from service.codecs.options import AnswerOptions, OutputOptions, option_value
from service.errors import BodyTooLarge, Busy, ClientLeft, FieldError, InvalidRequest
from service.metrics import Metrics
from service.negotiation import Headers, body_coding, body_format
from service.threads import WORTH_A_THREAD
from service.validation import field_errors

MAX_OPTIONS = 100

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
    Field(description='added on each side: an integer, [rows, columns], [top, bottom, left, right], "same" or "valid"'),
]
"""An integer, [rows, columns], [top, bottom, left, right], "valid" or "same". core checks it."""

Stride = Annotated[IntegerOrPair, Field(description="how far the kernel moves at once: an integer, or [rows, columns]")]
Dilation = Annotated[IntegerOrPair, Field(description="the distance between taps: an integer, or [rows, columns]")]
Groups = Annotated[
    int,
    Field(
        description="how many parts the channels fall into, each with filters of its own",
        json_schema_extra={"minimum": 1},
    ),
]
Device = Annotated[
    str,
    Field(
        description="where to compute: auto, cpu, cuda, cuda:1, mps",
        # core says which of them are there.
        json_schema_extra={"pattern": "^(auto|cpu|mps|cuda(:[0-9]+)?)$"},
    ),
]


class RequestModel(BaseModel):
    """What all requests share: strict types, no unknown fields, names that are core's own arguments."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)

    ANSWER: ClassVar[type[AnswerOptions]] = OutputOptions
    """What a request may say about the answer's form, in the query string."""

    def bytes_of_arrays(self) -> int:
        """Memory of what was decoded. What is a view of the body counts again: that is on the safe side."""
        size = 0
        for name in self.__pydantic_fields__:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                size += value.nbytes
            elif isinstance(value, list):
                size += sum(part.bytes_of_arrays() for part in value if isinstance(part, RequestModel))
        return size

    def arguments(self) -> dict[str, object]:
        """The fields as keyword arguments of a core function."""
        # Not model_fields, which is a property that takes a microsecond to say the same.
        return {name: getattr(self, name) for name in self.__pydantic_fields__}


Model = TypeVar("Model", bound=RequestModel)
Validated = TypeVar("Validated", bound=BaseModel)
Answer = TypeVar("Answer", bound=AnswerOptions)


def require_room(request: Request, headers: Headers, *, waits: bool = False) -> None:
    """Begin a request: refuse it by its head alone, before anything else is done about it, and set its deadline.

    Requests are many when they are too many. `waits`: whatever is asked, it is not done at once. The server closes the
    connection where much of the body has not come yet. Raises BodyTooLarge and Busy.
    """
    state = request.scope["app"].state
    share = share_of(request.scope)
    limit: int = state.max_body
    length = headers.get(b"content-length", b"")
    declared = int(length) if length.isdigit() else 0
    if declared > limit:
        raise _too_large(f"{declared:,} bytes", limit)
    if waits or declared > UNCOUNTED:
        admission: Admission = state.admission
        admission.require_hope(request.scope["path"], declared)
        share.declared = declared


async def decoded(
    request: Request, headers: Headers, options: Mapping[str, Any], model: type[Model], *, waits: bool = False
) -> Model:
    """The request's body, and the options of its query string, as a `model`.

    Of a request that passed `require_room`. `waits`: whatever is asked, it is not done at once; without a place, which
    is taken only now, so that nobody has one who is slow to send, it is not even decoded. Raises UnsupportedMediaType,
    BodyTooLarge, NotParseable, InvalidRequest and Busy.
    """
    state = request.scope["app"].state
    share = share_of(request.scope)
    served, coding = body_format(headers), body_coding(headers)
    limit: int = state.max_body
    body = await _read(request, share, limit)
    seconds = predict_decode_seconds(served, coding, body, limit)
    in_thread = seconds >= WORTH_A_THREAD
    if waits or in_thread:
        share.enter()
    work = partial(_decoded, model, served, coding, body, limit, options)
    try:
        asked = await run_codec(request, seconds, work, "parse")
    except Busy as refusal:
        share.refused(refusal.detail)
        raise
    if in_thread:
        share.hold_body(len(body) + asked.bytes_of_arrays())
    return asked


def query_options(request: Request) -> dict[str, Any]:
    """The query string by name: numbers, lists, true, false and null as in JSON, everything else as text.

    Raises InvalidRequest for a name that comes twice.
    """
    query: bytes = request.scope["query_string"]
    if not query:
        return {}
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_OPTIONS)
    except ValueError as error:
        raise InvalidRequest(f"the query string has more than {MAX_OPTIONS} options") from error
    options = {name: option_value(text) for name, text in pairs}
    if len(options) < len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidRequest(
            "an option comes more than once in the query string: send it once",
            errors=[
                FieldError(name, f'"{name}" comes {names.count(name)} times in the query string', None, "once")
                for name in options
                if names.count(name) > 1
            ],
        )
    return options


def answer_options(options: dict[str, Any], model: type[Answer]) -> Answer:
    """Those of the options that are about the answer's form, taken out of them. Raises InvalidRequest."""
    taken = {name: options.pop(name) for name in model.__pydantic_fields__ if name in options}
    return _validated(model, taken)


async def _read(request: Request, share: Share, limit: int) -> Buffer:
    """The body; refused as soon as more of it has come than may, and where it does not come by the deadline."""
    bodies: Bodies = request.scope["app"].state.admission.bodies
    bodies.begin(share.body)
    try:
        return await _received(request, share, bodies, limit)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if share.body.ended is None or (task is not None and task.uncancel() > 0):
            raise
        raise share.body.ended from None
    finally:
        bodies.end(share.body)


async def _received(request: Request, share: Share, bodies: Bodies, limit: int) -> Buffer:
    """The body, put together where it comes in pieces."""
    metrics: Metrics = request.scope["app"].state.metrics
    pieces: Pieces | None = None
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft("the client closed the connection before its body was whole")
        # The server has given the rest of it up.
        if given_up := request.scope["state"].get("given_up"):
            raise given_up
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        metrics.received(len(chunk))
        size = len(chunk) if pieces is None else pieces.size + len(chunk)
        if size > limit:
            raise _too_large(f"more than {limit:,} bytes", limit)
        if size > UNCOUNTED:
            bodies.grow(share.body, size)
        if pieces is None:
            if not more:
                return chunk
            pieces = Pieces(share.declared or limit)
        pieces.add(chunk)
        if not more:
            return pieces.together()


def _too_large(size: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has {size}; at most {limit:,} are allowed; the operator can change that by CORR2D_MAX_BODY_MB",
        errors=[FieldError("(body)", "the body is over the limit", size, f"{limit:,} bytes")],
        # What is left of the body is not wanted: the server closes the connection instead of reading it.
        headers={"Connection": "close"},
    )


def _decoded(
    model: type[Model],
    served: Format,
    coding: str | None,
    body: Buffer,
    limit: int,
    options: Mapping[str, Any],
    check: Check,
) -> Model:
    if coding is not None:
        body = without_coding(coding, body, limit, check)
    assert served.decode is not None  # noqa: S101 - body_format gives no other
    return _validated(
        model, _together(served.decode(body, limit, check), options, model.ANSWER.__pydantic_fields__.keys())
    )


def _together(fields: Any, options: Mapping[str, Any], about_answer: KeysView[str]) -> Any:
    """The body's fields and the query's. Raises InvalidRequest for a name that is in both, or in the wrong one."""
    if not isinstance(fields, dict):
        return fields
    misplaced = fields.keys() & about_answer
    if both := misplaced.union(fields.keys() & options.keys()):
        errors = []
        for name in sorted(both):
            where = "belongs in the query string" if name in misplaced else "comes in the body and in the query string"
            advice = f"?{name}=..." if name in misplaced else "send it once"
            errors.append(FieldError(name, f'"{name}" {where}: {advice}'))
        raise InvalidRequest(errors[0].message, errors=errors)
    return {**fields, **options} if options else fields


def _validated(model: type[Validated], fields: Any) -> Validated:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        errors = field_errors(error.errors(include_url=False), known=_names(model))
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise InvalidRequest(errors[0].message + more, errors=errors) from error


def _names(model: type[BaseModel]) -> list[str]:
    """The names that a request may use, aliases included."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        names += [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name]
    return names
