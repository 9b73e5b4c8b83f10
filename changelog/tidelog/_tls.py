"""Files for TLS: certificates and keys in PEM, read and checked before anybody connects."""

from __future__ import annotations

import ssl
from pathlib import Path

from tidelog._errors import InvalidValue


def read_authorities(path: str | Path) -> bytes:
    """
    Return the certificates of the authorities in a file.

    Raises:
        InvalidValue: The file cannot be read, or holds none.
    """
    data = _read(path, "certificates of authorities")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise InvalidValue(f"{path} holds no certificates of authorities in PEM") from error
    return data


def read_identity(certificate: str | Path, key: str | Path) -> tuple[bytes, bytes]:
    """
    Return a certificate, with its chain, and its private key.

    Raises:
        InvalidValue: A file cannot be read, is not what it should be, or the key belongs
            to another certificate.
    """
    found = _read(certificate, "a certificate"), _read(key, "a private key")
    try:
        # An encrypted key must not make OpenSSL ask at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        raise InvalidValue(
            f"{certificate} and {key} are no certificate and its private key, without a password, in PEM"
        ) from error
    return found


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidValue(f"{path} should hold {what}: {error.strerror}") from error
