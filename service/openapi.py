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

from service.codecs import DECODABLE_MEDIA_TYPES, ENCODABLE_FORMATS, FORMATS, Format, json
from service.codecs.content_coding import COMPRESSORS
from service.middleware.auth import is_public
from service.negotiation import CONTENT_CODINGS
from service.problems import PROBLEM_MEDIA_TYPE, ProblemDetails
from service.requests import RequestModel

REF_TEMPLATE = "#/components/schemas/{model}"

COMPUTE_ERROR_STATUSES = (400, 406, 413, 415, 422, 503, 504)

CONNECTION_ERROR_STATUSES = (400, 408, 414, 421, 431, 501, 503, 505)
"""What any request may meet before it comes to a route: a head that is none, is slow or large, or no room for it."""

INPUT_FIELD = "input"
"""What a format of one array carries; every other field may come in the query string."""

BINARY_SCHEMA = {"type": "string", "format": "binary"}


def endpoint_docs(
    request_model: type[RequestModel],
    response_model: type[BaseModel],
    examples: Mapping[str, Mapping[str, Any]],
    *,
    path: str,
    served: Mapping[str, Format] = ENCODABLE_FORMATS,
    links: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a route's decorator is told of an endpoint that computes; examples by their summary, links by their name.

    The first example is shown in all formats.
    """
    return {
        "responses": {
            200: _document_response(response_model, served, links or {}),
            **problem_docs(*COMPUTE_ERROR_STATUSES),
        },
        "openapi_extra": {
            "operationId": make_operation_id(path),
            "parameters": list(_document_parameters(request_model)),
            "requestBody": _document_body(request_model, examples, path),
        },
    }


def make_operation_id(path: str) -> str:
    """What generated clients call it."""
    return path.strip("/").replace("-", "_")


def make_link(path: str, description: str, **mapping: Any) -> dict[str, Any]:
    """What an answer is good for at another endpoint: expressions in what is sent `there`, as the specification says.

    `parameters` go into the query string, `requestBody` is a body's fields.
    """
    return {"operationId": make_operation_id(path), "description": description, **mapping}


def success_docs(links: Mapping[str, Mapping[str, Any]] | None = None) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that FastAPI describes: the headers of every answer, and its links by name."""
    return {200: {"headers": COMMON_HEADERS, **({"links": links} if links else {})}}


def problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: problem details for each status."""
    schema = {"$ref": REF_TEMPLATE.format(model=ProblemDetails.__name__)}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "headers": {**COMMON_HEADERS, **ERROR_HEADERS.get(status, {})},
            "content": {PROBLEM_MEDIA_TYPE: {"schema": schema}},
        }
        for status in statuses
    }


def extend_schema(app: FastAPI, *models: type[BaseModel], requires_api_key: bool) -> None:
    """Put the bodies' schemas, that of problem details, and what any request may meet into the app's description.

    `locked`: what is not open needs an API key.
    """
    from_routes = app.openapi

    def with_models() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = from_routes()
            schemas = described.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_collect_definitions(*models, ProblemDetails))
            for model in models:
                _make_options_optional(schemas[model.__name__])
            for operations in described["paths"].values():
                for operation in operations.values():
                    for status, problem in problem_docs(*CONNECTION_ERROR_STATUSES).items():
                        operation["responses"].setdefault(str(status), problem)
            if requires_api_key:
                _require_api_key(described)
        return from_routes()

    app.openapi = with_models  # type: ignore[method-assign]  # FastAPI's own way to extend the description


def _require_api_key(description: dict[str, Any]) -> None:
    """Say of every operation whether it needs a key, and how it is refused without."""
    description["components"]["securitySchemes"] = SECURITY_SCHEMES
    description["security"] = [{name: []} for name in SECURITY_SCHEMES]
    for path, operations in description["paths"].items():
        for operation in operations.values():
            if is_public(path):
                operation["security"] = []
            else:
                operation["responses"].update({str(status): said for status, said in problem_docs(401).items()})


def _collect_definitions(*models: type[BaseModel]) -> dict[str, Any]:
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF_TEMPLATE)
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _make_options_optional(body: dict[str, Any]) -> None:
    """A body lacks what stands in the query string."""
    for name in set(body.get("required", ())) - {INPUT_FIELD}:
        body["required"].remove(name)
        described = body["properties"][name]
        described["description"] += "; required, here or in the query string"


def _string_header(description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string", **more}}


COMMON_HEADERS = {
    "X-Request-ID": {
        **_string_header("the request's own, or one that was made for it", pattern="^[!-~]{1,128}$"),
        "required": True,
    },
    "Server-Timing": {**_string_header("milliseconds of parse, wait, compute and encode"), "required": True},
}

SECURITY_SCHEMES = {
    "Bearer": {"type": "http", "scheme": "bearer"},
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""Either will do."""

ERROR_HEADERS = {
    401: {"WWW-Authenticate": _string_header("what an API key is sent as")},
    415: {
        "Accept": _string_header("the media types that are served, where that of the body is not"),
        "Accept-Encoding": _string_header("the content codings that are served, where that of the body is not"),
    },
    503: {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}},
}

SUCCESS_HEADERS = {
    **COMMON_HEADERS,
    "Content-Encoding": _string_header("where Accept-Encoding asks for it and it is worth it", enum=list(COMPRESSORS)),
    "Corr2d-Result": _string_header(
        "what a binary answer has no room for: the other fields of the JSON answer", contentMediaType=json.MEDIA_TYPE
    ),
}


def _document_response(
    model: type[BaseModel], served: Mapping[str, Format], links: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    headers = dict(SUCCESS_HEADERS)
    for media_type, form in served.items():
        headers.update(
            {name.decode().title(): _string_header(f"where the answer is {media_type}") for name, _ in form.headers}
        )
        # FastAPI fills in JSON's from the model.
        is_json = media_type == json.MEDIA_TYPE
        content[media_type] = {} if is_json else {"schema": {**BINARY_SCHEMA, "description": form.content_doc}}
    described = {"model": model, "description": "The result", "headers": headers, "content": content}
    return {**described, "links": links} if links else described


def _document_parameters(model: type[RequestModel]) -> Iterator[dict[str, Any]]:
    """The query string's options, and the headers that are read.

    Defaults are told in words: Swagger UI and some generated clients send the default of a schema, and an option that
    comes in the body as well is refused.
    """
    arrays = _list_array_fields(model)
    for name, schema in _collect_definitions(model)[model.__name__]["properties"].items():
        if name != INPUT_FIELD and not _contains_model(model.model_fields[name].annotation):
            yield _document_option(name, schema, is_array=name in arrays)
    for name, schema in model.RESPONSE_OPTIONS.model_json_schema()["properties"].items():
        yield _document_option(name, schema)
    yield {"name": "X-Request-ID", "in": "header", **_string_header("up to 128 visible ASCII characters, sent back")}
    yield {
        "name": "Content-Encoding",
        "in": "header",
        **_string_header("of the body", enum=[*CONTENT_CODINGS.split(", "), "identity"]),
    }


def _document_option(name: str, schema: Mapping[str, Any], *, is_array: bool = False) -> dict[str, Any]:
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
        words.append(f"default: `{_format_query_value(schema['default'])}`")
    described = {"description": "; ".join(words)} if words else {}
    return {"name": name, "in": "query", **described, "schema": said}


def _document_body(model: type[BaseModel], examples: Mapping[str, Mapping[str, Any]], path: str) -> dict[str, Any]:
    arrays = _list_array_fields(model)
    first = next(iter(examples.values()))
    content: dict[str, Any] = {}
    for media_type in DECODABLE_MEDIA_TYPES:
        if media_type == json.MEDIA_TYPE:
            content[media_type] = {
                "schema": {"$ref": REF_TEMPLATE.format(model=model.__name__)},
                "examples": {summary: {"value": value} for summary, value in examples.items()},
            }
            continue
        carried = arrays if FORMATS[media_type].has_named_arrays else [INPUT_FIELD]
        named = ", ".join(f"`{name}`" for name in carried)
        options = {name: value for name, value in first.items() if name not in carried}
        content[media_type] = {
            "schema": {**BINARY_SCHEMA, "description": f"{named}: `{_format_curl_command(media_type, path, options)}`"},
        }
    return {"required": True, "content": content}


def _format_curl_command(media_type: str, path: str, options: Mapping[str, Any]) -> str:
    """How curl sends a body of that type."""
    file = f"{INPUT_FIELD}.{media_type.rpartition('/')[2].removeprefix('x-')}"
    query = "&".join(f"{name}={quote(_format_query_value(value), safe='[],')}" for name, value in options.items())
    address = shlex.quote(f"localhost:8000{path}" + (f"?{query}" if query else ""))
    return f"curl -g --data-binary @{file} -H 'Content-Type: {media_type}' {address}"


def _format_query_value(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _list_array_fields(model: type[BaseModel]) -> list[str]:
    """The fields that are arrays, in their order."""
    return [name for name, field in model.model_fields.items() if _contains_array(field.annotation)]


def _contains_array(annotation: Any) -> bool:
    return get_origin(annotation) is np.ndarray or any(map(_contains_array, get_args(annotation)))


def _contains_model(annotation: Any) -> bool:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return True
    return any(map(_contains_model, get_args(annotation)))
