"""Tests of the check of certificates at the start: each error is one line that names the setting."""

from pathlib import Path

import pytest

from service.configuration.settings import Settings, SettingsError, load_settings
from tests.certificates import Certificate, create_certificate, run_openssl
from tests.servers import get_startup_error


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return create_certificate(tmp_path)


def load_error(certfile: Path | None, keyfile: Path | None) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(ssl_certfile=certfile, ssl_keyfile=keyfile)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_key_may_be_in_the_certificate_file(certificate: Certificate) -> None:
    both = certificate.certfile.with_name("both.pem")
    both.write_text(certificate.keyfile.read_text() + certificate.certfile.read_text())
    assert Settings(ssl_certfile=both).ssl_keyfile is None
    assert Settings(ssl_certfile=certificate.certfile, ssl_keyfile=certificate.keyfile)


def test_missing_file_is_reported(certificate: Certificate, tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    assert load_error(absent, None) == f"CORR2D_SSL_CERTFILE {absent} cannot be read: no such file or directory"
    assert load_error(certificate.certfile, tmp_path).endswith("cannot be read: is a directory")
    assert load_error(None, certificate.keyfile) == "CORR2D_SSL_KEYFILE requires CORR2D_SSL_CERTFILE: set both"


def test_key_of_another_certificate_is_reported(certificate: Certificate, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    run_openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", other)
    assert "does not belong to the certificate" in load_error(certificate.certfile, other)


def test_encrypted_key_is_reported(certificate: Certificate, tmp_path: Path) -> None:
    encrypted = tmp_path / "encrypted.pem"
    run_openssl("ec", "-in", certificate.keyfile, "-aes128", "-passout", "pass:secret", "-out", encrypted)
    assert "the private key is encrypted" in load_error(certificate.certfile, encrypted)


@pytest.mark.parametrize("text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"])
def test_file_in_another_format_is_reported(certificate: Certificate, tmp_path: Path, text: str) -> None:
    damaged = tmp_path / "damaged.pem"
    damaged.write_text(text)
    assert "must contain a certificate" in load_error(damaged, certificate.keyfile)
    assert "its private key" in load_error(certificate.certfile, damaged)
    assert "its private key" in load_error(certificate.certfile, None)


@pytest.mark.slow
def test_certificate_error_is_one_line_and_exit_code_3(tmp_path: Path) -> None:
    assert "cannot be read" in get_startup_error("--ssl-certfile", str(tmp_path / "absent.pem"))
