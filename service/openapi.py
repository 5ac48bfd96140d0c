"""What /openapi.json says beyond what FastAPI reads off the routes: errors, and the bodies that we decode ourselves."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.codecs import json
from service.problems import MEDIA_TYPE, ProblemDetails

REF_TEMPLATE = "#/components/schemas/{model}"

COMPUTING_ERRORS = (400, 413, 415, 422, 503, 504)


def body(model: type[BaseModel], examples: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes a `model`; examples by their summary."""
    content = {
        "schema": {"$ref": REF_TEMPLATE.format(model=model.__name__)},
        "examples": {summary: {"value": value} for summary, value in examples.items()},
    }
    return {"requestBody": {"required": True, "content": {json.MEDIA_TYPE: content}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: problem details for each status."""
    schema = {"$ref": REF_TEMPLATE.format(model=ProblemDetails.__name__)}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def describe(app: FastAPI, *models: type[BaseModel]) -> None:
    """Put the bodies' schemas, and that of problem details, among the components of the app's description."""
    from_routes = app.openapi

    def with_models() -> dict[str, Any]:
        if app.openapi_schema is None:
            described: list[type[BaseModel]] = [*models, ProblemDetails]
            _, definitions = models_json_schema(
                [(model, "validation") for model in described], ref_template=REF_TEMPLATE
            )
            schemas = from_routes().setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
        return from_routes()

    app.openapi = with_models  # type: ignore[method-assign]  # FastAPI's own way to extend the description
