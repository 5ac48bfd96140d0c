"""The servers that benchmarks/wire.py measures; their applications are in the other files of this package."""

from collections.abc import Mapping
from dataclasses import dataclass

from servers.dialects import (
    JSON,
    NPY,
    Dialect,
    WireFormat,
    base64_dialect,
    echo_dialect,
    nested_dialect,
    npy_dialect,
    png_dialect,
    rows_dialect,
    v2_dialect,
    write_nested,
    write_npy,
)


@dataclass(frozen=True, slots=True)
class BenchmarkedServer:
    """A server: its command, its dialect of each format that it supports, and its pip requirement.

    A server with a requirement is installed in its own environment; the others run in that of the script. In the
    command, {bin} is the folder of the environment's programs, {apps} is this folder, and {port} a free port.
    """

    name: str
    command: str
    dialects: Mapping[WireFormat, Dialect]
    requirement: str = ""


SUBJECT_NAME = "corr2d"

UVICORN_COMMAND = "{bin}/uvicorn --app-dir {apps} --port {port} --loop uvloop --http httptools --no-access-log "

SERVERS = (
    BenchmarkedServer(
        SUBJECT_NAME,
        "{bin}/corr2d serve --port {port}",
        {
            "JSON": nested_dialect("/correlate"),
            "base64": base64_dialect("/correlate"),
            "npy": npy_dialect("/correlate"),
            "PNG": png_dialect("/correlate"),
        },
    ),
    BenchmarkedServer("FastAPI def", UVICORN_COMMAND + "plain_app:app", {"JSON": nested_dialect("/def")}),
    BenchmarkedServer("FastAPI async def", UVICORN_COMMAND + "plain_app:app", {"JSON": nested_dialect("/async")}),
    BenchmarkedServer("FastAPI response model", UVICORN_COMMAND + "plain_app:app", {"JSON": nested_dialect("/model")}),
    BenchmarkedServer(
        "echo",
        UVICORN_COMMAND + "echo_app:app",
        {"JSON": echo_dialect("/echo", write_nested, JSON), "npy": echo_dialect("/echo", write_npy, NPY)},
    ),
    BenchmarkedServer(
        "LitServe",
        "{bin}/python {apps}/litserve_app.py {port}",
        {"JSON": nested_dialect("/predict")},
        "litserve==0.2.19",
    ),
    BenchmarkedServer(
        "BentoML",
        "{bin}/bentoml serve --working-dir {apps} --host 127.0.0.1 --port {port} bentoml_app:Correlation",
        {"JSON": rows_dialect("/correlate")},
        "bentoml==1.4.39",
    ),
    BenchmarkedServer(
        "MLServer",
        "{bin}/python {apps}/mlserver_app.py {port}",
        {"JSON": v2_dialect("/v2/models/correlation/infer")},
        "mlserver==1.7.1",
    ),
)
