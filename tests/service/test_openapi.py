"""The description at /openapi.json: valid, complete, true, and good enough to make a client from."""

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
from service.codecs import DECODED, ENCODED, FORMATS
from service.codecs.options import AnswerOptions
from service.openapi import CONNECTION_ERRORS, operation_id
from service.requests import RequestModel
from service.routes import conv2d, correlate, train_kernel
from service.settings import Settings
from tests.serving import Send

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
SERVED = {"/correlate": ENCODED, "/conv2d": ENCODED, "/train-kernel": train_kernel.SERVED}

EVERYWHERE = {"connection", "content-type", "content-length", "vary", "date", "server"}
"""Headers that HTTP itself explains."""

endpoints = pytest.mark.parametrize("path", MODELS)

GENERATOR = Path(sys.executable).parent / "openapi-python-client"

CALL = """
import json, sys
from client import Client
from client.api.convolution import correlate
from client.models import CorrelateRequest

asked = CorrelateRequest.from_dict(json.loads(sys.argv[2]))
answer = correlate.sync(client=Client(base_url=sys.argv[1]), body=asked)
print(json.dumps({"shape": answer.shape, "output": answer.output}))
"""


@pytest.fixture(scope="module")
def description(sent_in_process: Send) -> dict[str, Any]:
    described: dict[str, Any] = sent_in_process("GET", "/openapi.json").json()
    return described


def operation(description: dict[str, Any], path: str) -> dict[str, Any]:
    described: dict[str, Any] = description["paths"][path]["post"]
    return described


def example_of(path: str) -> dict[str, Any]:
    example: dict[str, Any] = next(iter(EXAMPLES[path].values()))
    return example


def body_of(media_type: str, example: dict[str, Any]) -> bytes:
    """The example's arrays, or its input alone, in that format."""
    arrays = {name: np.array(value, np.float32) for name, value in example.items() if isinstance(value, list)}
    encode = FORMATS[media_type].encode
    if encode is not None:
        return b"".join(encode(arrays, AnswerOptions()))
    file = io.BytesIO()
    Image.fromarray(arrays["input"].astype(np.uint8)).save(file, media_type.rpartition("/")[2])
    return file.getvalue()


def test_the_description_is_valid(description: dict[str, Any]) -> None:
    assert description["openapi"].startswith("3.1")
    validate(description)


@endpoints
def test_every_format_is_described(description: dict[str, Any], path: str) -> None:
    described = operation(description, path)
    assert tuple(described["requestBody"]["content"]) == DECODED
    assert tuple(described["responses"]["200"]["content"]) == tuple(SERVED[path])


@endpoints
def test_every_option_is_described_and_no_client_sends_one_unasked(description: dict[str, Any], path: str) -> None:
    parameters = operation(description, path)["parameters"]
    names = [parameter["name"] for parameter in parameters if parameter["in"] == "query"]
    fields = [name for name in MODELS[path].model_fields if name not in ("input", "pairs", "validation")]
    assert names == [*fields, *MODELS[path].ANSWER.model_fields]
    for parameter in parameters:
        assert not parameter.get("required")
        assert not {"default", "example", "examples"} & (parameter.keys() | parameter["schema"].keys())


@endpoints
@pytest.mark.parametrize("media_type", [media_type for media_type in DECODED if media_type != "application/json"])
def test_every_binary_format_has_a_command_that_works(
    send: Send, description: dict[str, Any], path: str, media_type: str
) -> None:
    said = operation(description, path)["requestBody"]["content"][media_type]["schema"]["description"]
    command = re.findall("`(curl .*)`", said)[0]
    *_, content_type, address = shlex.split(command)
    assert content_type == f"Content-Type: {media_type}"
    response = send(
        "POST",
        address.removeprefix("localhost:8000"),
        headers=dict([content_type.split(": ")]),
        content=body_of(media_type, example_of(path)),
    )
    assert response.status_code == 200, response.text


@endpoints
@pytest.mark.parametrize("media_type", ENCODED)
def test_answers_have_the_formats_and_headers_that_are_described(
    send: Send, description: dict[str, Any], path: str, media_type: str
) -> None:
    response = send("POST", path, json=example_of(path), headers={"Accept": media_type, "X-Request-ID": "mine"})
    described = operation(description, path)["responses"][str(response.status_code)]
    assert response.headers["Content-Type"] in described["content"]
    assert response.headers["X-Request-ID"] == "mine"
    assert (response.status_code == 406) == (media_type not in SERVED[path])
    if response.status_code == 200 and media_type != "application/json":
        assert json.loads(response.headers["Corr2d-Result"])
        assert described["content"][media_type]["schema"]["format"] == "binary"
    named = {name.lower() for name in described["headers"]}
    assert response.headers.keys() - EVERYWHERE <= named


@endpoints
@pytest.mark.parametrize("arrays", ["nested", "base64", "flat"])
def test_answers_are_what_their_schema_says(send: Send, description: dict[str, Any], path: str, arrays: str) -> None:
    schema = operation(description, path)["responses"]["200"]["content"]["application/json"]["schema"]
    validator = OAS31Validator({**schema, "components": description["components"]})
    for example in EXAMPLES[path].values():
        validator.validate(send("POST", path, json=example, params={"arrays": arrays}).json())


def links(app_description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, link) of every one."""
    for path, operations in app_description["paths"].items():
        for method, described in operations.items():
            for link in described["responses"]["200"].get("links", {}).values():
                yield method, path, link


def evaluated(expression: str, request: Any, response: Any) -> Any:
    """The part of a request or an answer that a link's expression names."""
    source, _, pointer = expression.partition("#/")
    value = {"$request.body": request, "$response.body": response}[source]
    for key in pointer.split("/"):
        value = value[int(key) if isinstance(value, list) else key]
    return value


LINKS = list(links(create_app(Settings()).openapi()))


@pytest.mark.parametrize(("method", "path", "link"), LINKS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_an_answer_is_linked_to_can_be_done_with_it(
    send: Send, method: str, path: str, link: dict[str, Any]
) -> None:
    asked = example_of(path) if method == "post" else None
    answer = send(method.upper(), path, json=asked).json()
    body, query = (
        {name: evaluated(expression, asked, answer) for name, expression in link.get(part, {}).items()}
        for part in ("requestBody", "parameters")
    )
    to = next(to for to in MODELS if operation_id(to) == link["operationId"])
    rest = {name: value for name, value in example_of(to).items() if name not in query}
    response = send("POST", to, json={**rest, **body}, params=query)
    assert response.status_code == 200, response.text


def test_a_list_in_the_query_string_is_described_as_one_text(send: Send, description: dict[str, Any]) -> None:
    parameters = {said["name"]: said for said in operation(description, "/train-kernel")["parameters"]}
    assert parameters["betas"]["schema"]["type"] == "string"
    query = {"solver": "adam", "betas": "[0.9, 0.99]", "tolerance": "null"}
    assert parameters["tolerance"]["schema"]["type"] == ["number", "null"]
    assert send("POST", "/train-kernel", json=example_of("/train-kernel"), params=query).status_code == 200


def test_every_operation_names_what_a_connection_may_meet(description: dict[str, Any]) -> None:
    for operations in description["paths"].values():
        for described in operations.values():
            assert {str(status) for status in CONNECTION_ERRORS} <= described["responses"].keys()
            assert re.fullmatch(r"\w+", described["operationId"])
            for link in described["responses"]["200"].get("links", {}):
                assert re.fullmatch(r"[\w.-]+", link)


@pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {"Content-Encoding": "br"}])
def test_a_refusal_of_a_format_has_the_headers_that_are_described(
    send: Send, description: dict[str, Any], headers: dict[str, str]
) -> None:
    response = send("POST", "/correlate", content=b"{}", headers={"Content-Type": "application/json", **headers})
    described = operation(description, "/correlate")["responses"]["415"]["headers"]
    assert response.status_code == 415
    assert response.headers.keys() - EVERYWHERE < {name.lower() for name in described}


def test_a_generated_client_computes_the_lesson(description: dict[str, Any], address: str, tmp_path: Path) -> None:
    # Media types that it does not know, it is told to read as bytes.
    binary = {media_type: "application/octet-stream" for media_type in FORMATS if media_type != "application/json"}
    (tmp_path / "openapi.json").write_text(json.dumps(description))
    (tmp_path / "config.yml").write_text(json.dumps({"post_hooks": [], "content_type_overrides": binary}))
    generate = [str(GENERATOR), "generate", "--path", "openapi.json", "--config", "config.yml", "--meta", "none"]
    generated = subprocess.run(
        [*generate, "--output-path", "client", "--fail-on-warning"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert generated.returncode == 0, generated.stdout + generated.stderr
    arguments = [address, json.dumps(example_of("/correlate"))]
    called = subprocess.run(
        [sys.executable, "-c", CALL, *arguments], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert called.returncode == 0, called.stderr
    assert json.loads(called.stdout) == {"shape": [2, 2], "output": [[19, 25], [37, 43]]}
