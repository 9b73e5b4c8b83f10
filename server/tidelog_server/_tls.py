"""TLS on the server's side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from tidelog._tls import read_authorities, read_identity


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """
    How a server speaks TLS. The files are PEM, and read when the `Server` is made.

    Attributes:
        certificate: The server's certificate, with its chain.
        key: The private key of *certificate*, without a password.
        client_ca: Certificates of the authorities that sign the clients' certificates: every
            client must then have one (mutual TLS). None: no client is asked for one.
    """

    certificate: str | Path
    key: str | Path
    client_ca: str | Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files. Raises InvalidValue if one is not what it should be."""
        certificate, key = read_identity(self.certificate, self.key)
        authorities = None if self.client_ca is None else read_authorities(self.client_ca)
        return grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates=authorities, require_client_auth=authorities is not None
        )
