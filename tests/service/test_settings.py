import pytest
from pydantic import BaseModel

from service.settings import Settings, SettingsError, load_settings


def test_flags_override_environment_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings() == Settings()
    monkeypatch.setenv("CORR2D_PORT", "9001")
    monkeypatch.setenv("CORR2D_QUEUE", "7")
    settings = load_settings(port="9002", queue=None)
    assert (settings.port, settings.queue, settings.host) == (9002, 7, "127.0.0.1")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CORR2D_PORT", "http", "CORR2D_PORT 'http': input should be a valid integer"),
        ("CORR2D_PORT", "65536", "less than or equal to 65535"),
        ("CORR2D_PORT", "", "valid integer"),
        ("CORR2D_WORKERS", "0", "greater than or equal to 1"),
        ("CORR2D_THREADS", "-1", "greater than or equal to 1"),
        ("CORR2D_MAX_BODY_MB", "0", "greater than 0"),
        ("CORR2D_MAX_BODY_MB", "nan", "CORR2D_MAX_BODY_MB"),
        ("CORR2D_REQUEST_TIMEOUT_S", "inf", "CORR2D_REQUEST_TIMEOUT_S"),
        ("CORR2D_LOG_FORMAT", "xml", "'console' or 'json'"),
        ("CORR2D_HOST", "", "at least 1 character"),
        ("CORR2D_PROT", "8000", "CORR2D_PROT is not a setting; did you mean CORR2D_PORT?"),
        ("CORR2D_API_KEY", "secret", "CORR2D_API_KEY is not a setting; did you mean CORR2D_API_KEYS?"),
    ],
)
def test_invalid_setting_is_reported_in_one_line(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert message in str(caught.value)
    assert variable in str(caught.value)
    assert "\n" not in str(caught.value)


def test_invalid_flag_is_named_in_the_error() -> None:
    with pytest.raises(SettingsError, match=r"--max-body-mb '-1'"):
        load_settings(max_body_mb="-1")


def test_every_setting_is_described() -> None:
    assert issubclass(Settings, BaseModel)
    for field in Settings.model_fields.values():
        assert field.description
