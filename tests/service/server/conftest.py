"""Fixture of the tests of TLS."""

from collections.abc import Iterator

import pytest

from tests.certificates import Certificate, create_certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Certificate]:
    """A certificate that httpx and RawConnection trust."""
    certificate = create_certificate(tmp_path_factory.mktemp("tls"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate.certfile))
        yield certificate
