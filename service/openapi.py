"""What /openapi.json says beyond what FastAPI reads off the routes.

That is all that our own code reads and writes: bodies, options, answers and errors. It is made from what serves them,
the table of formats and the fields of the models: a new format or field needs nothing here.
"""

import shlex
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, get_args, get_origin
from urllib.parse import quote

import numpy as np
import orjson
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.codecs import DECODED, ENCODED, FORMATS, Format, json
from service.codecs.content_coding import COMPRESSORS
from service.doors import is_open
from service.negotiation import CODINGS
from service.problems import MEDIA_TYPE, ProblemDetails
from service.requests import RequestModel

REF_TEMPLATE = "#/components/schemas/{model}"

COMPUTING_ERRORS = (400, 406, 413, 415, 422, 503, 504)

CONNECTION_ERRORS = (400, 408, 414, 421, 431, 501, 503, 505)
"""What any request may meet before it comes to a route: a head that is none, is slow or large, or no room for it."""

INPUT = "input"
"""What a format of one array carries; every other field may come in the query string."""

BINARY = {"type": "string", "format": "binary"}


def computing(
    asked: type[RequestModel],
    answered: type[BaseModel],
    examples: Mapping[str, Mapping[str, Any]],
    *,
    path: str,
    served: Mapping[str, Format] = ENCODED,
    links: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a route's decorator is told of an endpoint that computes; examples by their summary, links by their name.

    The first example is shown in all formats.
    """
    return {
        "responses": {200: _answer(answered, served, links or {}), **problems(*COMPUTING_ERRORS)},
        "openapi_extra": {
            "operationId": operation_id(path),
            "parameters": list(_parameters(asked)),
            "requestBody": _body(asked, examples, path),
        },
    }


def operation_id(path: str) -> str:
    """What generated clients call it."""
    return path.strip("/").replace("-", "_")


def link(path: str, description: str, **there: Any) -> dict[str, Any]:
    """What an answer is good for at another endpoint: expressions in what is sent `there`, as the specification says.

    `parameters` go into the query string, `requestBody` is a body's fields.
    """
    return {"operationId": operation_id(path), "description": description, **there}


def traced(links: Mapping[str, Mapping[str, Any]] | None = None) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that FastAPI describes: the headers of every answer, and its links by name."""
    return {200: {"headers": TRACE_HEADERS, **({"links": links} if links else {})}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: problem details for each status."""
    schema = {"$ref": REF_TEMPLATE.format(model=ProblemDetails.__name__)}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "headers": {**TRACE_HEADERS, **ADVICE_HEADERS.get(status, {})},
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in statuses
    }


def describe(app: FastAPI, *models: type[BaseModel], locked: bool) -> None:
    """Put the bodies' schemas, that of problem details, and what any request may meet into the app's description.

    `locked`: what is not open needs an API key.
    """
    from_routes = app.openapi

    def with_models() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = from_routes()
            schemas = described.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_definitions(*models, ProblemDetails))
            for model in models:
                _require_no_options(schemas[model.__name__])
            for operations in described["paths"].values():
                for operation in operations.values():
                    for status, problem in problems(*CONNECTION_ERRORS).items():
                        operation["responses"].setdefault(str(status), problem)
            if locked:
                _lock(described)
        return from_routes()

    app.openapi = with_models  # type: ignore[method-assign]  # FastAPI's own way to extend the description


def _lock(description: dict[str, Any]) -> None:
    """Say of every operation whether it needs a key, and how it is refused without."""
    description["components"]["securitySchemes"] = SECURITY_SCHEMES
    description["security"] = [{name: []} for name in SECURITY_SCHEMES]
    for path, operations in description["paths"].items():
        for operation in operations.values():
            if is_open(path):
                operation["security"] = []
            else:
                operation["responses"].update({str(status): said for status, said in problems(401).items()})


def _definitions(*models: type[BaseModel]) -> dict[str, Any]:
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF_TEMPLATE)
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _require_no_options(body: dict[str, Any]) -> None:
    """A body lacks what stands in the query string."""
    for name in set(body.get("required", ())) - {INPUT}:
        body["required"].remove(name)
        described = body["properties"][name]
        described["description"] += "; required, here or in the query string"


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string", **more}}


TRACE_HEADERS = {
    "X-Request-ID": {
        **_text("the request's own, or one that was made for it", pattern="^[!-~]{1,128}$"),
        "required": True,
    },
    "Server-Timing": {**_text("milliseconds of parse, wait, compute and encode"), "required": True},
}

SECURITY_SCHEMES = {
    "Bearer": {"type": "http", "scheme": "bearer"},
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""Either will do."""

ADVICE_HEADERS = {
    401: {"WWW-Authenticate": _text("what an API key is sent as")},
    415: {
        "Accept": _text("the media types that are served, where that of the body is not"),
        "Accept-Encoding": _text("the content codings that are served, where that of the body is not"),
    },
    503: {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}},
}

ANSWER_HEADERS = {
    **TRACE_HEADERS,
    "Content-Encoding": _text("where Accept-Encoding asks for it and it is worth it", enum=list(COMPRESSORS)),
    "Corr2d-Result": _text(
        "what a binary answer has no room for: the other fields of the JSON answer", contentMediaType=json.MEDIA_TYPE
    ),
}


def _answer(
    model: type[BaseModel], served: Mapping[str, Format], links: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    headers = dict(ANSWER_HEADERS)
    for media_type, form in served.items():
        headers.update({name.decode().title(): _text(f"where the answer is {media_type}") for name, _ in form.headers})
        # FastAPI fills in JSON's from the model.
        is_json = media_type == json.MEDIA_TYPE
        content[media_type] = {} if is_json else {"schema": {**BINARY, "description": form.carries}}
    described = {"model": model, "description": "The result", "headers": headers, "content": content}
    return {**described, "links": links} if links else described


def _parameters(model: type[RequestModel]) -> Iterator[dict[str, Any]]:
    """The query string's options, and the headers that are read.

    Defaults are told in words: Swagger UI and some generated clients send the default of a schema, and an option that
    comes in the body as well is refused.
    """
    arrays = _arrays(model)
    for name, schema in _definitions(model)[model.__name__]["properties"].items():
        if name != INPUT and not _has_models(model.model_fields[name].annotation):
            yield _option(name, schema, is_array=name in arrays)
    for name, schema in model.ANSWER.model_json_schema()["properties"].items():
        yield _option(name, schema)
    yield {"name": "X-Request-ID", "in": "header", **_text("up to 128 visible ASCII characters, sent back")}
    yield {"name": "Content-Encoding", "in": "header", **_text("of the body", enum=[*CODINGS.split(", "), "identity"])}


def _option(name: str, schema: Mapping[str, Any], *, is_array: bool = False) -> dict[str, Any]:
    said = {key: value for key, value in schema.items() if key not in ("title", "default", "description")}
    kinds = [kind for kind in said.pop("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1 and kinds[0].get("type") != "array" and not is_array:
        # With the null that stood beside it.
        said.update(kinds[0] | {"type": [kinds[0]["type"], "null"]})
    elif kinds:
        # A list in a query string would be written in many ways by as many clients. Here it is a text; not one with a
        # contentMediaType, for which Swagger UI asks for a file.
        said = {"type": "string", "contentSchema": {"anyOf": kinds, **said}}
    words = [schema["description"]] if "description" in schema else []
    if kinds and "contentSchema" in said:
        words.append("in the query string as JSON where it is a number or a list")
    if schema.get("default") is not None:
        words.append(f"default: `{_in_query(schema['default'])}`")
    described = {"description": "; ".join(words)} if words else {}
    return {"name": name, "in": "query", **described, "schema": said}


def _body(model: type[BaseModel], examples: Mapping[str, Mapping[str, Any]], path: str) -> dict[str, Any]:
    arrays = _arrays(model)
    first = next(iter(examples.values()))
    content: dict[str, Any] = {}
    for media_type in DECODED:
        if media_type == json.MEDIA_TYPE:
            content[media_type] = {
                "schema": {"$ref": REF_TEMPLATE.format(model=model.__name__)},
                "examples": {summary: {"value": value} for summary, value in examples.items()},
            }
            continue
        carried = arrays if FORMATS[media_type].by_name else [INPUT]
        named = ", ".join(f"`{name}`" for name in carried)
        options = {name: value for name, value in first.items() if name not in carried}
        content[media_type] = {
            "schema": {**BINARY, "description": f"{named}: `{_command(media_type, path, options)}`"},
        }
    return {"required": True, "content": content}


def _command(media_type: str, path: str, options: Mapping[str, Any]) -> str:
    """How curl sends a body of that type."""
    file = f"{INPUT}.{media_type.rpartition('/')[2].removeprefix('x-')}"
    query = "&".join(f"{name}={quote(_in_query(value), safe='[],')}" for name, value in options.items())
    address = shlex.quote(f"localhost:8000{path}" + (f"?{query}" if query else ""))
    return f"curl -g --data-binary @{file} -H 'Content-Type: {media_type}' {address}"


def _in_query(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _arrays(model: type[BaseModel]) -> list[str]:
    """The fields that are arrays, in their order."""
    return [name for name, field in model.model_fields.items() if _has_array(field.annotation)]


def _has_array(annotation: Any) -> bool:
    return get_origin(annotation) is np.ndarray or any(map(_has_array, get_args(annotation)))


def _has_models(annotation: Any) -> bool:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return True
    return any(map(_has_models, get_args(annotation)))
