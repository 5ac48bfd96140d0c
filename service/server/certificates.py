"""Check of the certificate and the private key for TLS, at the start."""

import os
import ssl
from pathlib import Path
from typing import NoReturn


def check_certificate(certfile: Path, keyfile: Path | None) -> None:
    """Raise ValueError unless TLS can be served with these files; without `keyfile`, the key is in `certfile`."""
    for setting, path in (("CORR2D_SSL_CERTFILE", certfile), ("CORR2D_SSL_KEYFILE", keyfile)):
        if path is not None:
            _check_readable(setting, path)
    key_setting, key_path = ("CORR2D_SSL_CERTFILE", certfile) if keyfile is None else ("CORR2D_SSL_KEYFILE", keyfile)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, _reject_encrypted_key)
    except _EncryptedKeyError as error:
        raise ValueError(
            f"{key_setting} {key_path}: the private key is encrypted, which is not supported: decrypt it, for example "
            "with openssl pkey"
        ) from error
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"{key_setting} {key_path}: the private key does not belong to the certificate in "
                f"CORR2D_SSL_CERTFILE {certfile}: use the key with which the certificate was requested"
            ) from error
        raise ValueError(
            f"CORR2D_SSL_CERTFILE {certfile} must contain a certificate, and {key_setting} {key_path} its private "
            "key, both in PEM format: text that begins with -----BEGIN"
        ) from error


class _EncryptedKeyError(Exception):
    """The private key has a password."""


def _reject_encrypted_key() -> NoReturn:
    """Raise an error instead of the default of OpenSSL, which asks for the password at the terminal."""
    raise _EncryptedKeyError


def _check_readable(setting: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(f"{setting} {path} cannot be read: {os.strerror(error.errno or 0).lower()}") from error
