"""Tests of settings next to the variables that Kubernetes sets for a Service named corr2d."""

import pytest

from service.configuration.kubernetes_variables import is_kubernetes_variable
from service.configuration.settings import Settings, SettingsError, list_variables, load_settings

SERVICE_VARIABLES = {
    "CORR2D_SERVICE_HOST": "10.0.0.7",
    "CORR2D_SERVICE_PORT": "8000",
    "CORR2D_SERVICE_PORT_HTTP": "8000",
    "CORR2D_SERVICE_PORT_HTTP_METRICS": "9000",
    "CORR2D_PORT": "tcp://10.0.0.7:8000",
    "CORR2D_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "CORR2D_PORT_8000_TCP_PROTO": "tcp",
    "CORR2D_PORT_8000_TCP_PORT": "8000",
    "CORR2D_PORT_8000_TCP_ADDR": "10.0.0.7",
    "CORR2D_PORT_53_UDP": "udp://[fd00::7]:53",
    "CORR2D_PORT_53_UDP_ADDR": "fd00::7",
    "CORR2D_GPU_SERVICE_HOST": "10.0.0.8",
    "CORR2D_GPU_PORT": "tcp://10.0.0.8:8000",
    "CORR2D_PORT_9000_SCTP": "sctp://10.0.0.7:9000",
}
"""Variables of the Services corr2d, with the ports http, http-metrics, 53/UDP and 9000/SCTP, and corr2d-gpu."""

SERVICE_NAMES = [
    *("corr2d", "corr2d-2", "corr2d-gpu-a100", "corr2d--blue", "corr2d-service", "corr2d-service-port", "corr2d-port"),
    *(
        "corr2d-port-8000-tcp",
        "corr2d-service-host",
        *(f"corr2d-{name.replace('_', '-')}" for name in Settings.model_fields),
    ),
]
"""Names of Services whose variables are similar to those of other Services, or to settings."""


def list_variables_of_service(service: str, address: str, ports: dict[str, tuple[str, int]]) -> dict[str, str]:
    """Return the variables of a Service with these protocols and numbers of ports by name, as the kubelet sets them.

    Reference: Kubernetes 1.34, pkg/kubelet/envvars.
    """
    prefix = service.upper().replace("-", "_")
    host = f"[{address}]" if ":" in address else address
    found = {f"{prefix}_SERVICE_HOST": address}
    for at, (name, (protocol, number)) in enumerate(ports.items()):
        url, link = f"{protocol}://{host}:{number}", f"{prefix}_PORT_{number}_{protocol.upper()}"
        if at == 0:
            found |= {f"{prefix}_SERVICE_PORT": str(number), f"{prefix}_PORT": url}
        found[f"{prefix}_SERVICE_PORT_{name.upper().replace('-', '_')}"] = str(number)
        found |= {link: url, f"{link}_PROTO": protocol, f"{link}_PORT": str(number), f"{link}_ADDR": address}
    return found


@pytest.mark.parametrize("address", ["10.96.0.7", "fd00::7"])
@pytest.mark.parametrize("service", SERVICE_NAMES)
def test_variables_of_every_service_are_ignored(service: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {"http": ("tcp", 8000), "8000-tcp": ("tcp", 80), "dns": ("udp", 53), "signals": ("sctp", 9000)}
    for name, value in list_variables_of_service(service, address, ports).items():
        monkeypatch.setenv(name, value)
    assert list_variables() == {}
    assert load_settings() == Settings()


def test_variables_of_kubernetes_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_VARIABLES.items():
        assert is_kubernetes_variable(name, value)
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CORR2D_QUEUE", "5")
    settings = load_settings()
    assert (settings.port, settings.queue) == (8000, 5)
    assert list_variables() == {"CORR2D_QUEUE": "5"}
    assert load_settings(port="81").port == 81


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CORR2D_PORT", "8000x"),
        ("CORR2D_PORT", "tcp://"),
        ("CORR2D_PORT", "tcp://corr2d:8000"),
        ("CORR2D_PORT", "http://10.0.0.7:8000"),
        ("CORR2D_PORT", "tcp://10.0.0.7:8000/"),
        ("CORR2D_HOST", "tcp://10.0.0.7:8000"),
        ("CORR2D_WORKERS", "tcp://10.0.0.7:8000"),
        ("CORR2D_SERVICE_HOST", "corr2d"),
        ("CORR2D_SERVICE_PORT", "http"),
        ("CORR2D_SERVICE_PORT", "http://10.0.0.7:8000"),
        ("CORR2D_SERVICE_PORT_8000_TCP", "8000x"),
        ("CORR2D_SERVICE_PROT", "8000"),
        ("CORR2D_PORT_8000_TCP", "tcp://10.0.0.7:8001"),
        ("CORR2D_PORT_8000_TCP", "udp://10.0.0.7:8000"),
        ("CORR2D_PORT_8000_TCP_PROTO", "udp"),
        ("CORR2D_PORT_8000_TCP_PORT", "8001"),
        ("CORR2D_PORT_8000_HTTP", "http://10.0.0.7:8000"),
        ("corr2d_service_host", "10.0.0.7"),
    ],
)
def test_other_variables_are_still_errors(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    if name != "CORR2D_HOST":
        with pytest.raises(SettingsError, match=name.upper()):
            load_settings()
    assert not is_kubernetes_variable(name, value)


def test_kubernetes_url_as_a_flag_is_an_error() -> None:
    with pytest.raises(SettingsError, match="--port"):
        load_settings(port="tcp://10.0.0.7:8000")
