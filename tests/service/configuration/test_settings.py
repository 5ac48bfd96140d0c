"""Tests of settings from flags and environment variables, and of errors that do not show secrets."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr

from service.app import create_app
from service.configuration.settings import Settings, SettingsError, load_settings
from tests.servers import CORR2D_COMMAND, get_startup_error, serve_in_process
from tests.service.locked_app import ALICE_KEY, PAGE_ORIGIN


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


@pytest.mark.robustness(62)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_keys": ""}, "CORR2D_API_KEYS: key 1 is not a valid key"),
        ({"api_keys": "tooshort-secret"}, "CORR2D_API_KEYS: key 1 is not a valid key: a key has 16 to 256"),
        ({"api_keys": f"{ALICE_KEY},"}, "key 2"),
        ({"api_keys": f"{ALICE_KEY}, two words-of-a-secret"}, "key 2"),
        ({"api_keys": "geheimschlüssel-secret"}, "key 1"),
        ({"api_keys_file": "/nowhere/keys"}, "CORR2D_API_KEYS_FILE '/nowhere/keys': cannot be read: no such file"),
        ({"api_keys_file": ""}, "is not a regular file"),
        ({"api_keys_file": "/dev/null"}, "is not a regular file"),
        ({"cors_origins": "*", "cors_credentials": "true"}, "CORR2D_CORS_ORIGINS is *"),
        ({"cors_credentials": "true", "api_keys": f"{ALICE_KEY}-secret"}, "CORR2D_CORS_ORIGINS is unset"),
        ({"cors_headers": "X-A, X B"}, "'X B' is not a valid header name"),
        ({"cors_headers": ""}, "'' is not a valid header name"),
        ({"cors_credentials": "maybe"}, "CORR2D_CORS_CREDENTIALS 'maybe'"),
        *(
            ({"cors_origins": origins}, "is not a valid origin")
            for origins in (
                *("", "example.org", "https://example.org/", "https://example.org/app", "null", "HTTPS://EXAMPLE.ORG"),
                *("https://*.example.org", "https://example.org:443", "http://localhost:80", "*, https://example.org"),
                *(
                    "https://a.example.org https://b.example.org",
                    f"{PAGE_ORIGIN},",
                    "https://me@example.org",
                    "file://",
                ),
            )
        ),
    ],
)
def test_invalid_security_settings_do_not_show_the_secret(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"CORR2D_{name.upper()}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # The cause of the error does not contain it either.
    assert "secret" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        PAGE_ORIGIN,
        f"{PAGE_ORIGIN}, http://localhost:3000",
        "http://[::1]:8080",
        "http://127.0.0.1",
        "app://corr2d_page",
    ],
)
def test_browser_origins_are_accepted(origins: str) -> None:
    assert load_settings(cors_origins=origins).origins == origins.split(", ")


@pytest.mark.slow
@pytest.mark.robustness(61)
def test_wildcard_origin_with_credentials_is_rejected_at_start() -> None:
    line = get_startup_error("--port", "0", CORR2D_CORS_ORIGINS="*", CORR2D_CORS_CREDENTIALS="true")
    assert "CORR2D_CORS_CREDENTIALS requires a list of origins" in line


@pytest.mark.slow
@pytest.mark.robustness(60)
def test_invalid_keys_are_rejected_at_start_and_not_shown(tmp_path: Path) -> None:
    assert "short" not in get_startup_error("--port", "0", "--api-keys", f"{ALICE_KEY},short").replace("16 to 256", "")
    assert "no such file" in get_startup_error("--port", "0", "--api-keys-file", str(tmp_path / "none"))


@pytest.mark.slow
@pytest.mark.robustness(60)
def test_settings_show_no_secret() -> None:
    settings = Settings(api_keys=SecretStr(ALICE_KEY))
    assert ALICE_KEY not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    with serve_in_process(create_app(Settings(device="cpu", api_keys=SecretStr(ALICE_KEY)))) as send:
        info = send("GET", "/info", headers={"X-API-Key": ALICE_KEY})
    assert info.status_code == 200
    assert ALICE_KEY not in info.text
    variables = {**os.environ, "CORR2D_API_KEYS": ALICE_KEY, "COLUMNS": "500"}
    shown = subprocess.run([CORR2D_COMMAND, "config"], capture_output=True, text=True, check=True, env=variables)
    assert ALICE_KEY not in shown.stdout
    assert re.search(r"CORR2D_API_KEYS +\*+ +environment", shown.stdout)


@pytest.mark.slow
def test_environment_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("CORR2D_PORT=nonsense\n")
    process = subprocess.run([CORR2D_COMMAND, "config"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "nonsense" not in process.stdout
