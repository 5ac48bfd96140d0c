"""A self-signed certificate of localhost, for tests of TLS."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Certificate:
    """Files of a certificate and its private key, in PEM format."""

    certfile: Path
    keyfile: Path

    @property
    def variables(self) -> dict[str, str]:
        """The settings of a service with this certificate."""
        return {"CORR2D_SSL_CERTFILE": str(self.certfile), "CORR2D_SSL_KEYFILE": str(self.keyfile)}


def run_openssl(*arguments: object) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which creates the certificate, is not installed")
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def create_certificate(folder: Path) -> Certificate:
    certificate = Certificate(folder / "cert.pem", folder / "key.pem")
    run_openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", 2),
        *("-keyout", certificate.keyfile, "-out", certificate.certfile),
        *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
    )
    return certificate
