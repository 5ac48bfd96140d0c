"""Tests that the OpenAPI schema is valid, complete, correct, and sufficient to generate a client."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from PIL import Image

from service.app import create_app
from service.codecs.images.options import ImageOptions
from service.codecs.registry import DECODABLE_MEDIA_TYPES, ENCODABLE_FORMATS, FORMATS
from service.codecs.response_options import ResponseOptions
from service.configuration.settings import Settings
from service.middleware.security_headers import SECURITY_HEADERS
from service.openapi import CONNECTION_ERROR_STATUSES, make_operation_id
from service.requests import RequestModel
from service.routes import conv2d, correlate, train_kernel
from tests.servers import SendFn

ROOT = Path(__file__).parents[2]

MODELS: dict[str, type[RequestModel]] = {
    "/correlate": correlate.CorrelateRequest,
    "/conv2d": conv2d.Conv2dRequest,
    "/train-kernel": train_kernel.TrainKernelRequest,
}
EXAMPLES = {
    "/correlate": correlate.EXAMPLES,
    "/conv2d": conv2d.EXAMPLES,
    "/train-kernel": train_kernel.EXAMPLES,
}
SERVED_FORMATS = {
    "/correlate": ENCODABLE_FORMATS,
    "/conv2d": ENCODABLE_FORMATS,
    "/train-kernel": train_kernel.RESPONSE_FORMATS,
}

COMMON_HEADERS = {
    *("connection", "content-type", "content-length", "vary", "date", "server"),
    *(name.decode() for name, _ in SECURITY_HEADERS),
}
"""Headers of HTTP and browsers, which the schema need not describe."""

parametrize_endpoints = pytest.mark.parametrize("path", MODELS)

GENERATOR_COMMAND = Path(sys.executable).parent / "openapi-python-client"

CLIENT_SCRIPT = """
import json, sys
from client import Client
from client.api.convolution import correlate
from client.models import CorrelateRequest

body = CorrelateRequest.from_dict(json.loads(sys.argv[2]))
response = correlate.sync(client=Client(base_url=sys.argv[1]), body=body)
print(json.dumps({"shape": response.shape, "output": response.output}))
"""


@pytest.fixture(scope="module")
def api_description(send_in_process: SendFn) -> dict[str, Any]:
    described: dict[str, Any] = send_in_process("GET", "/openapi.json").json()
    return described


def get_operation(api_description: dict[str, Any], path: str) -> dict[str, Any]:
    described: dict[str, Any] = api_description["paths"][path]["post"]
    return described


def get_example(path: str) -> dict[str, Any]:
    example: dict[str, Any] = next(iter(EXAMPLES[path].values()))
    return example


def encode_example(media_type: str, example: dict[str, Any]) -> bytes:
    """Encode the example's arrays in a format, or only its input if the format holds one array."""
    arrays = {name: np.array(value, np.float32) for name, value in example.items() if isinstance(value, list)}
    encode = FORMATS[media_type].encode
    if encode is not None:
        return b"".join(encode(arrays, ResponseOptions()))
    file = io.BytesIO()
    Image.fromarray(arrays["input"].astype(np.uint8)).save(file, media_type.rpartition("/")[2])
    return file.getvalue()


@pytest.mark.slow
def test_openapi_schema_is_valid(api_description: dict[str, Any]) -> None:
    assert api_description["openapi"].startswith("3.1")
    validate(api_description)


@parametrize_endpoints
def test_every_format_is_described(api_description: dict[str, Any], path: str) -> None:
    described = get_operation(api_description, path)
    assert tuple(described["requestBody"]["content"]) == DECODABLE_MEDIA_TYPES
    assert tuple(described["responses"]["200"]["content"]) == tuple(SERVED_FORMATS[path])


@parametrize_endpoints
def test_every_option_is_described_without_sent_defaults(api_description: dict[str, Any], path: str) -> None:
    parameters = get_operation(api_description, path)["parameters"]
    names = [parameter["name"] for parameter in parameters if parameter["in"] == "query"]
    fields = [name for name in MODELS[path].model_fields if name not in ("input", "pairs", "validation")]
    assert names == [*fields, *ImageOptions.model_fields, *MODELS[path].RESPONSE_OPTIONS.model_fields]
    for parameter in parameters:
        assert not parameter.get("required")
        assert not {"default", "example", "examples"} & (parameter.keys() | parameter["schema"].keys())


@parametrize_endpoints
@pytest.mark.parametrize(
    "media_type",
    [name for name in DECODABLE_MEDIA_TYPES if name not in ("application/json", "multipart/form-data")],
)
def test_every_binary_format_has_a_working_command(
    send: SendFn, api_description: dict[str, Any], path: str, media_type: str
) -> None:
    description = get_operation(api_description, path)["requestBody"]["content"][media_type]["schema"]["description"]
    command = re.findall("`(curl .*)`", description)[0]
    *_, content_type, address = shlex.split(command)
    assert content_type == f"Content-Type: {media_type}"
    response = send(
        "POST",
        address.removeprefix("localhost:8000"),
        headers=dict([content_type.split(": ")]),
        content=encode_example(media_type, get_example(path)),
    )
    # WebP has no grey, so the input has three channels, which the weight of the example does not fit.
    expected = 422 if (media_type, path) == ("image/webp", "/conv2d") else 200
    assert response.status_code == expected, response.text


@parametrize_endpoints
def test_form_has_a_working_command(send: SendFn, api_description: dict[str, Any], path: str) -> None:
    described = get_operation(api_description, path)["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert described["properties"]["input"]["format"] == "binary"
    _, *parts, address = shlex.split(re.findall("`(curl .*)`", described["description"])[0])
    file, *fields = [part.removeprefix("-F").partition("=")[::2] for part in parts]
    assert file == ("input", "@input.npy")
    content = encode_example("application/x-npy", get_example(path))
    response = send(
        "POST", address.removeprefix("localhost:8000"), files={"input": ("input.npy", content)}, data=dict(fields)
    )
    assert response.status_code == 200, response.text


@parametrize_endpoints
@pytest.mark.parametrize("media_type", ENCODABLE_FORMATS)
def test_responses_have_the_described_formats_and_headers(
    send: SendFn, api_description: dict[str, Any], path: str, media_type: str
) -> None:
    response = send("POST", path, json=get_example(path), headers={"Accept": media_type, "X-Request-ID": "mine"})
    described = get_operation(api_description, path)["responses"][str(response.status_code)]
    assert response.headers["Content-Type"] in described["content"]
    assert response.headers["X-Request-ID"] == "mine"
    assert (response.status_code == 406) == (media_type not in SERVED_FORMATS[path])
    if response.status_code == 200 and media_type != "application/json":
        assert json.loads(response.headers["Corr2d-Result"])
        assert described["content"][media_type]["schema"]["format"] == "binary"
    named = {name.lower() for name in described["headers"]}
    assert response.headers.keys() - COMMON_HEADERS <= named


@parametrize_endpoints
@pytest.mark.parametrize("arrays", ["nested", "base64", "flat"])
def test_responses_match_their_schema(send: SendFn, api_description: dict[str, Any], path: str, arrays: str) -> None:
    schema = get_operation(api_description, path)["responses"]["200"]["content"]["application/json"]["schema"]
    validator = OAS31Validator({**schema, "components": api_description["components"]})
    for example in EXAMPLES[path].values():
        validator.validate(send("POST", path, json=example, params={"arrays": arrays}).json())


def iter_links(app_description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (method, path, link) of every link."""
    for path, operations in app_description["paths"].items():
        for method, described in operations.items():
            for link in described["responses"]["200"].get("links", {}).values():
                yield method, path, link


def evaluate_expression(expression: str, request: Any, response: Any) -> Any:
    """Return the part of a request or response that a link's runtime expression names."""
    source, _, pointer = expression.partition("#/")
    value = {"$request.body": request, "$response.body": response}[source]
    for key in pointer.split("/"):
        value = value[int(key) if isinstance(value, list) else key]
    return value


LINKS = list(iter_links(create_app(Settings()).openapi()))


@pytest.mark.parametrize(("method", "path", "link"), LINKS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_response_link_can_be_followed(send: SendFn, method: str, path: str, link: dict[str, Any]) -> None:
    request_body = get_example(path) if method == "post" else None
    result = send(method.upper(), path, json=request_body).json()
    body, query = (
        {name: evaluate_expression(expression, request_body, result) for name, expression in link.get(part, {}).items()}
        for part in ("requestBody", "parameters")
    )
    to = next(to for to in MODELS if make_operation_id(to) == link["operationId"])
    rest = {name: value for name, value in get_example(to).items() if name not in query}
    response = send("POST", to, json={**rest, **body}, params=query)
    assert response.status_code == 200, response.text


def test_query_list_is_described_as_text(send: SendFn, api_description: dict[str, Any]) -> None:
    parameters = {
        parameter["name"]: parameter for parameter in get_operation(api_description, "/train-kernel")["parameters"]
    }
    assert parameters["betas"]["schema"]["type"] == "string"
    query = {"solver": "adam", "betas": "[0.9, 0.99]", "tolerance": "null"}
    assert parameters["tolerance"]["schema"]["type"] == ["number", "null"]
    assert send("POST", "/train-kernel", json=get_example("/train-kernel"), params=query).status_code == 200


def test_every_operation_lists_connection_errors(api_description: dict[str, Any]) -> None:
    for path, operations in api_description["paths"].items():
        for described in operations.values():
            assert {str(status) for status in CONNECTION_ERROR_STATUSES} <= described["responses"].keys()
            assert described["operationId"] == path.strip("/").replace("-", "_")
            for link in described["responses"]["200"].get("links", {}):
                assert re.fullmatch(r"[\w.-]+", link)


@pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {"Content-Encoding": "br"}])
def test_format_rejection_has_the_described_headers(
    send: SendFn, api_description: dict[str, Any], headers: dict[str, str]
) -> None:
    response = send("POST", "/correlate", content=b"{}", headers={"Content-Type": "application/json", **headers})
    described = get_operation(api_description, "/correlate")["responses"]["415"]["headers"]
    assert response.status_code == 415
    assert response.headers.keys() - COMMON_HEADERS < {name.lower() for name in described}


@pytest.mark.slow
def test_generated_client_computes_the_d2l_example(
    api_description: dict[str, Any], address: str, tmp_path: Path
) -> None:
    # The generator does not know these media types: configure them as bytes.
    binary = {media_type: "application/octet-stream" for media_type in FORMATS if media_type != "application/json"}
    (tmp_path / "openapi.json").write_text(json.dumps(api_description))
    (tmp_path / "config.yml").write_text(json.dumps({"post_hooks": [], "content_type_overrides": binary}))
    generate = [
        str(GENERATOR_COMMAND),
        "generate",
        "--path",
        "openapi.json",
        "--config",
        "config.yml",
        "--meta",
        "none",
    ]
    generated = subprocess.run(
        [*generate, "--output-path", "client", "--fail-on-warning"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert generated.returncode == 0, generated.stdout + generated.stderr
    arguments = [address, json.dumps(get_example("/correlate"))]
    called = subprocess.run(
        [sys.executable, "-c", CLIENT_SCRIPT, *arguments], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert called.returncode == 0, called.stderr
    assert json.loads(called.stdout) == {"shape": [2, 2], "output": [[19, 25], [37, 43]]}


def test_every_schema_reference_resolves(api_description: dict[str, Any]) -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for value in node for found in references(value)] if isinstance(node, list) else []

    schemas = api_description["components"]["schemas"]
    assert {"CorrelateRequest", "Conv2dRequest", "TrainKernelRequest", "ProblemDetails"} <= schemas.keys()
    for reference in references(api_description):
        assert reference.removeprefix("#/components/schemas/") in schemas


@pytest.mark.parametrize("path", ["/correlate", "/conv2d", "/train-kernel"])
def test_every_endpoint_has_working_examples(send: SendFn, api_description: dict[str, Any], path: str) -> None:
    operation = api_description["paths"][path]["post"]
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    assert examples
    for example in examples.values():
        response = send("POST", path, json=example["value"])
        assert response.status_code == 200
        assert response.json().keys() <= set(
            api_description["components"]["schemas"][
                operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            ]["properties"]
        )
    assert {"400", "413", "415", "422", "503", "504"} <= operation["responses"].keys()
