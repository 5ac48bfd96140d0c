"""Tests of settings next to the variables that Kubernetes sets for a Service named corr2d."""

import pytest

from service.kubernetes_variables import is_kubernetes_variable
from service.settings import SettingsError, list_variables, load_settings

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
}
"""Variables of the Services corr2d, with the ports http, http-metrics and 53/UDP, and corr2d-gpu."""


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
