"""Tests of the service behind nginx, and its unit for systemd, with the files of docs/deployment.md."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from ssl import create_default_context

import httpx
import pytest

from tests.certificates import Certificate
from tests.problem_details import assert_problem
from tests.robustness.raw_client import CLIENT_TIMEOUT_S
from tests.robustness.server_process import ServerProcess, start_server_process
from tests.servers import CORR2D_COMMAND, find_free_port
from tests.service.samples.sample_requests import D2L_EXAMPLE
from tests.service.streams import assert_events_arrive_one_by_one

PAGE = (Path(__file__).parents[3] / "docs" / "deployment.md").read_text()

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
PREFIX = "/corr2d"

NGINX_ADDRESS, CLIENT_ADDRESS = "127.0.0.2", "127.0.0.3"
"""Addresses from which nginx and the client connect; the loopback interface of Linux has all of 127.0.0.0/8."""

MAX_BODY_BYTES = 3_000_000

MAIN_CONFIG = """\
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/responses;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{servers}
}}
"""


def find_blocks(language: str) -> list[str]:
    """Return the code blocks of docs/deployment.md in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def replace(text: str, *pairs: tuple[str, str]) -> str:
    """Replace texts that must occur."""
    for old, new in pairs:
        assert old in text, f"{old!r} is not in the configuration"
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class Setup:
    """A configuration of nginx and the flags of the service behind it."""

    flags: tuple[str, ...] = ("--trusted-proxies", NGINX_ADDRESS)
    nginx_tls: bool = False
    service_tls: bool = False
    unix_socket: bool = False
    replacements: tuple[tuple[str, str], ...] = ()


SETUPS = {
    "prefix kept": Setup(),
    "prefix stripped": Setup(replacements=(("proxy_pass http://corr2d;", "proxy_pass http://corr2d/;"),)),
    "prefix by setting": Setup(
        flags=("--trusted-proxies", NGINX_ADDRESS, "--root-path", PREFIX),
        # nginx passes a header of the client on, and the setting takes precedence.
        replacements=(("proxy_set_header X-Forwarded-Prefix /corr2d;", ""),),
    ),
    "TLS in front": Setup(nginx_tls=True),
    "TLS behind": Setup(service_tls=True),
    "Unix socket": Setup(flags=("--trusted-proxies", "unix"), unix_socket=True),
}


@dataclass(frozen=True)
class ServiceBehindNginx:
    """A running service and a client that sends its requests through nginx."""

    client: httpx.Client
    log: Path

    def find_client_address(self, request_id: str) -> str:
        """Wait for the log line of a request and return its client."""
        deadline = time.monotonic() + CLIENT_TIMEOUT_S
        while True:
            for line in self.log.read_text().splitlines():
                if f'"{request_id}"' in line:
                    return str(json.loads(line)["client"])
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module", params=list(SETUPS.values()), ids=list(SETUPS))
def service(
    request: pytest.FixtureRequest, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceBehindNginx]:
    if not Path(NGINX).exists() or sys.platform != "linux":
        pytest.skip("nginx is not installed (apt-get install nginx), or the system is not Linux")
    setup: Setup = request.param
    folder = tmp_path_factory.mktemp("nginx")
    log = folder / "service.log"
    with ExitStack() as stack:
        if setup.unix_socket:
            upstream = f"unix:{folder}/corr2d.sock"
            stack.enter_context(run_service_on_unix_socket(folder / "corr2d.sock", log, setup.flags))
        else:
            variables = {"CORR2D_MAX_BODY_MB": str(MAX_BODY_BYTES / 1e6)}
            variables |= certificate.variables if setup.service_tls else {}
            server: ServerProcess = stack.enter_context(start_server_process(log, *setup.flags, **variables))
            upstream = server.address.rpartition("/")[2]
        port = find_free_port()
        (folder / "nginx.conf").write_text(build_config(setup, folder, upstream, port, certificate))
        address = f"{'https' if setup.nginx_tls else 'http'}://127.0.0.1:{port}"
        stack.enter_context(run_nginx(folder, port))
        transport = httpx.HTTPTransport(local_address=CLIENT_ADDRESS, verify=create_default_context())
        yield ServiceBehindNginx(
            stack.enter_context(httpx.Client(base_url=address, transport=transport, timeout=60)), log
        )


def build_config(setup: Setup, folder: Path, upstream: str, port: int, certificate: Certificate) -> str:
    """Return a configuration of nginx from the blocks of docs/deployment.md."""
    main, unix, tls_behind = find_blocks("nginx")
    listen = f"listen {port} ssl;" if setup.nginx_tls else f"listen {port};"
    servers = replace(
        main,
        ("listen 443 ssl;", listen),
        ("/etc/nginx/corr2d.pem", str(certificate.certfile)),
        ("/etc/nginx/corr2d-key.pem", str(certificate.keyfile)),
    )
    if setup.unix_socket:
        head = main.split("\nserver {", 1)[0]
        servers = replace(servers, (head, replace(unix, ("unix:/run/corr2d/corr2d.sock", upstream))))
    else:
        # nginx connects from an address of its own, which differs from that of the client.
        bound = f"proxy_pass http://corr2d;\n        proxy_bind {NGINX_ADDRESS};"
        servers = replace(servers, ("127.0.0.1:8000", upstream), ("proxy_pass http://corr2d;", bound))
    if setup.service_tls:
        verified = replace(
            tls_behind,
            ("/etc/nginx/corr2d-ca.pem", str(certificate.certfile)),
            ("corr2d.internal", "localhost"),
        )
        servers = replace(servers, ("proxy_pass http://corr2d;", verified))
    user = "user root;" if os.geteuid() == 0 else ""
    return MAIN_CONFIG.format(user=user, folder=folder, servers=replace(servers, *setup.replacements))


@contextmanager
def run_nginx(folder: Path, port: int) -> Iterator[None]:
    command: list[str | Path] = [NGINX, "-p", folder, "-c", folder / "nginx.conf"]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + CLIENT_TIMEOUT_S
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    assert process.poll() is None, (folder / "error.log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield
        finally:
            process.terminate()


@contextmanager
def run_service_on_unix_socket(path: Path, log: Path, flags: tuple[str, ...]) -> Iterator[None]:
    command: list[str | Path] = [CORR2D_COMMAND, "serve", "--uds", path, "--log-format", "json", *flags]
    command += ["--max-body-mb", str(MAX_BODY_BYTES / 1e6)]
    with log.open("w") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        try:
            deadline = time.monotonic() + 180
            while '"ready"' not in log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield
        finally:
            process.kill()


pytestmark = pytest.mark.slow


def test_page_loads_its_files(service: ServiceBehindNginx) -> None:
    page = service.client.get(f"{PREFIX}/")
    assert page.status_code == 200
    for link in re.findall(r"""\b(?:src|href)=["']([^"'#]+)["']""", page.text):
        assert service.client.get(f"{PREFIX}/{link}").status_code == 200, link


def test_docs_load_their_files(service: ServiceBehindNginx) -> None:
    page = service.client.get(f"{PREFIX}/docs")
    links = re.findall(r"""\b(?:src|href)=["']([^"']+)["']""", page.text)
    assert {link.rsplit(".", 1)[-1] for link in links} == {"js", "css", "ico"}
    for link in links:
        assert service.client.get(f"{PREFIX}/{link}").status_code == 200, link


def test_requests_of_the_docs_page_are_served(service: ServiceBehindNginx) -> None:
    (server,) = service.client.get(f"{PREFIX}/openapi.json").json()["servers"]
    assert server == {"url": PREFIX}
    response = service.client.post(f"{server['url']}/correlate", json=D2L_EXAMPLE)
    assert response.json()["output"] == [[19, 25], [37, 43]]


def test_connections_are_reused(service: ServiceBehindNginx) -> None:
    for _ in range(100):
        assert service.client.post(f"{PREFIX}/correlate", json=D2L_EXAMPLE).status_code == 200


def test_streamed_events_arrive_one_by_one(service: ServiceBehindNginx) -> None:
    assert_events_arrive_one_by_one(service.client, f"{PREFIX}/train-kernel")


def test_errors_are_problem_details(service: ServiceBehindNginx) -> None:
    assert_problem(service.client.post(f"{PREFIX}/correlate", json={"input": [[1]]}), 422)
    assert_problem(service.client.get(f"{PREFIX}/correlate"), 405)
    detail = assert_problem(service.client.get(f"{PREFIX}/nowhere"), 404)["detail"]
    assert f"{PREFIX}/nowhere" in detail


def test_large_body_is_rejected_by_the_service(service: ServiceBehindNginx) -> None:
    body = bytes(2 * MAX_BODY_BYTES)
    # nginx may close a connection after it has discarded the rest of a body, although its response says otherwise.
    headers = {"Content-Type": "application/x-npy", "Connection": "close"}
    response = service.client.post(f"{PREFIX}/correlate?kernel=identity", content=body, headers=headers)
    assert "CORR2D_MAX_BODY_MB" in assert_problem(response, 413)["detail"]


def test_large_response_is_complete(service: ServiceBehindNginx) -> None:
    rows = 800
    body = {"input": {"shape": [rows, rows], "dtype": "float32", "data": [0] * rows**2}, "kernel": "identity"}
    response = service.client.post(
        f"{PREFIX}/correlate", json=body, headers={"Accept": "application/x-npy", "Accept-Encoding": "identity"}
    )
    assert response.status_code == 200
    assert len(response.content) > 4 * rows**2 * 0.9


@pytest.mark.parametrize("forged", [None, "6.6.6.6", "6.6.6.6, 127.0.0.2", "nonsense"])
def test_log_has_the_address_of_the_client(service: ServiceBehindNginx, forged: str | None) -> None:
    request_id = f"client-{forged}".replace(" ", "").replace(",", "-")
    headers = {"X-Request-ID": request_id, "X-Forwarded-Prefix": "/evil", "X-Forwarded-Host": "evil.example"}
    headers |= {} if forged is None else {"X-Forwarded-For": forged}
    response = service.client.get(f"{PREFIX}/openapi.json", headers=headers)
    assert response.json()["servers"] == [{"url": PREFIX}]
    assert service.find_client_address(request_id) == CLIENT_ADDRESS


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    (text,) = find_blocks("ini")
    unit = tmp_path / "corr2d.service"
    unit.write_text(replace(text, ("/opt/corr2d/bin/corr2d", str(CORR2D_COMMAND))))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert unit.name not in checked.stderr
