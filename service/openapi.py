"""Additions to the OpenAPI schema that FastAPI generates from the routes.

FastAPI does not see the bodies, options, responses and errors of RawRoute endpoints. They are documented from the table
of formats and the fields of the models, so a new format or field needs no change here.
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

from service.codecs import json, multipart
from service.codecs.content_coding import COMPRESSORS
from service.codecs.images.options import ImageOptions
from service.codecs.registry import DECODABLE_MEDIA_TYPES, ENCODABLE_FORMATS, FORMATS, Format
from service.middleware.auth import is_public
from service.negotiation import CONTENT_CODINGS
from service.problems import PROBLEM_MEDIA_TYPE, ProblemDetails
from service.requests import RequestModel

REF_TEMPLATE = "#/components/schemas/{model}"

COMPUTE_ERROR_STATUSES = (400, 406, 413, 415, 422, 503, 504)

CONNECTION_ERROR_STATUSES = (400, 408, 414, 421, 431, 501, 503, 505)
"""Errors before routing: invalid, slow or oversized requests, and a lack of capacity."""

INPUT_FIELD = "input"
"""The field in a body format that holds one array; all other fields can be query parameters."""

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
    """Return the documentation arguments of the route decorator of a compute endpoint.

    `examples` are keyed by summary, `links` by name. The first example is shown in all formats.
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
    """Return the operationId of a path, which generated clients use as the function name."""
    return path.strip("/").replace("-", "_")


def make_link(path: str, description: str, **mapping: Any) -> dict[str, Any]:
    """Return an OpenAPI link: how values of a response are used in a request to `path`, as runtime expressions.

    mapping: `parameters` for the query string, `requestBody` for fields of the body.
    """
    return {"operationId": make_operation_id(path), "description": description, **mapping}


def success_docs(links: Mapping[str, Mapping[str, Any]] | None = None) -> dict[int | str, dict[str, Any]]:
    """Return `responses` for a route that FastAPI documents: the common headers, and the links by name."""
    return {200: {"headers": COMMON_HEADERS, **({"links": links} if links else {})}}


def problem_docs(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return `responses` for a route: problem details for each status."""
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
    """Add the schemas of bodies and problem details, and the connection errors, to the OpenAPI schema of the app.

    requires_api_key: paths that are not public need an API key.
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

    app.openapi = with_models  # type: ignore[method-assign]  # the documented way to extend the schema


def _require_api_key(schema: dict[str, Any]) -> None:
    """Add security requirements and the 401 response to every operation that needs an API key."""
    schema["components"]["securitySchemes"] = SECURITY_SCHEMES
    schema["security"] = [{name: []} for name in SECURITY_SCHEMES]
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            if is_public(path):
                operation["security"] = []
            else:
                operation["responses"].update({str(status): problem for status, problem in problem_docs(401).items()})


def _collect_definitions(*models: type[BaseModel]) -> dict[str, Any]:
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF_TEMPLATE)
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _make_options_optional(body: dict[str, Any]) -> None:
    """Make all fields but the input optional in the body, since they can be query parameters."""
    for name in set(body.get("required", ())) - {INPUT_FIELD}:
        body["required"].remove(name)
        described = body["properties"][name]
        described["description"] += "; required, in the body or in the query string"


def _string_header(description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string", **more}}


COMMON_HEADERS = {
    "X-Request-ID": {
        **_string_header("the ID sent with the request, or a generated one", pattern="^[!-~]{1,128}$"),
        "required": True,
    },
    "Server-Timing": {**_string_header("milliseconds spent in parse, wait, compute and encode"), "required": True},
}

SECURITY_SCHEMES = {
    "Bearer": {"type": "http", "scheme": "bearer"},
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
"""Alternative ways to send an API key."""

ERROR_HEADERS = {
    401: {"WWW-Authenticate": _string_header("authentication scheme for the API key")},
    415: {
        "Accept": _string_header("supported media types, if that of the body is not supported"),
        "Accept-Encoding": _string_header("supported content codings, if that of the body is not supported"),
    },
    503: {"Retry-After": {"description": "seconds after which to retry", "schema": {"type": "integer", "minimum": 1}}},
}

SUCCESS_HEADERS = {
    **COMMON_HEADERS,
    "Content-Encoding": _string_header(
        "present if the response is compressed, which Accept-Encoding must allow", enum=list(COMPRESSORS)
    ),
    "Corr2d-Result": _string_header(
        "binary responses: the other fields of the JSON response, as JSON", contentMediaType=json.MEDIA_TYPE
    ),
}


def _document_response(
    model: type[BaseModel], served: Mapping[str, Format], links: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    headers = dict(SUCCESS_HEADERS)
    for media_type, form in served.items():
        headers.update(
            {
                name.decode().title(): _string_header(f"present if the response is {media_type}")
                for name, _ in form.headers
            }
        )
        # FastAPI adds the schema for JSON from the model.
        is_json = media_type == json.MEDIA_TYPE
        content[media_type] = {} if is_json else {"schema": {**BINARY_SCHEMA, "description": form.content_doc}}
    described = {"model": model, "description": "The result", "headers": headers, "content": content}
    return {**described, "links": links} if links else described


def _document_parameters(model: type[RequestModel]) -> Iterator[dict[str, Any]]:
    """Yield the query parameters and the request headers of an endpoint.

    Defaults are given in the description only: Swagger UI and some generated clients send the default of a schema, and
    an option that is also in the body is rejected.
    """
    arrays = _list_array_fields(model)
    for name, schema in _collect_definitions(model)[model.__name__]["properties"].items():
        if name != INPUT_FIELD and not _contains_model(model.model_fields[name].annotation):
            yield _document_option(name, schema, is_array=name in arrays)
    for options in (ImageOptions, model.RESPONSE_OPTIONS):
        for name, schema in options.model_json_schema()["properties"].items():
            yield _document_option(name, schema)
    yield {
        "name": "X-Request-ID",
        "in": "header",
        **_string_header("up to 128 visible ASCII characters, returned in the response"),
    }
    yield {
        "name": "Content-Encoding",
        "in": "header",
        **_string_header("content coding of the body", enum=[*CONTENT_CODINGS.split(", "), "identity"]),
    }


def _document_option(name: str, schema: Mapping[str, Any], *, is_array: bool = False) -> dict[str, Any]:
    option_schema = {key: value for key, value in schema.items() if key not in ("title", "default", "description")}
    kinds = [kind for kind in option_schema.pop("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1 and kinds[0].get("type") != "array" and not is_array:
        # The alternative was null.
        option_schema.update(kinds[0] | {"type": [kinds[0]["type"], "null"]})
    elif kinds:
        # Clients serialize lists in query strings differently, so the parameter is a string that contains JSON. Without
        # contentMediaType: Swagger UI shows a file picker for it.
        option_schema = {"type": "string", "contentSchema": {"anyOf": kinds, **option_schema}}
    words = [schema["description"]] if "description" in schema else []
    if kinds and "contentSchema" in option_schema:
        words.append("in the query string, numbers and lists are JSON")
    if schema.get("default") is not None:
        words.append(f"default: `{_format_query_value(schema['default'])}`")
    described = {"description": "; ".join(words)} if words else {}
    return {"name": name, "in": "query", **described, "schema": option_schema}


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
        if media_type == multipart.MEDIA_TYPE:
            content[media_type] = {"schema": _document_form(path, first)}
            continue
        carried = arrays if FORMATS[media_type].has_named_arrays else [INPUT_FIELD]
        named = ", ".join(f"`{name}`" for name in carried)
        options = {name: value for name, value in first.items() if name not in carried}
        content[media_type] = {
            "schema": {**BINARY_SCHEMA, "description": f"{named}: `{_format_curl_command(media_type, path, options)}`"},
        }
    return {"required": True, "content": content}


def _document_form(path: str, example: Mapping[str, Any]) -> dict[str, Any]:
    fields = " ".join(
        shlex.quote(f"-F{name}={_format_query_value(value)}") for name, value in example.items() if name != INPUT_FIELD
    )
    command = f"curl -F{INPUT_FIELD}=@{INPUT_FIELD}.npy {fields} {shlex.quote(f'localhost:8000{path}')}"
    return {
        "type": "object",
        "properties": {INPUT_FIELD: {**BINARY_SCHEMA, "description": "a file in any of the other formats"}},
        "description": f"one file, and options as text fields, as an HTML form sends them: `{command}`",
    }


def _format_curl_command(media_type: str, path: str, options: Mapping[str, Any]) -> str:
    """Return the curl command that sends a body of that media type."""
    file = f"{INPUT_FIELD}.{media_type.rpartition('/')[2].removeprefix('x-')}"
    query = "&".join(f"{name}={quote(_format_query_value(value), safe='[],')}" for name, value in options.items())
    address = shlex.quote(f"localhost:8000{path}" + (f"?{query}" if query else ""))
    return f"curl -g --data-binary @{file} -H 'Content-Type: {media_type}' {address}"


def _format_query_value(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _list_array_fields(model: type[BaseModel]) -> list[str]:
    """Return the names of the array fields, in order."""
    return [name for name, field in model.model_fields.items() if _contains_array(field.annotation)]


def _contains_array(annotation: Any) -> bool:
    return get_origin(annotation) is np.ndarray or any(map(_contains_array, get_args(annotation)))


def _contains_model(annotation: Any) -> bool:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return True
    return any(map(_contains_model, get_args(annotation)))
