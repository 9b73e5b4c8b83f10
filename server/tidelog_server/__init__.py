"""
tidelog_server: keeps the shared data, checks what replicas send, tells them what changed.

Declare an `Application`, give it to a `Server`.
"""

from tidelog_server._admission import ServerLimits
from tidelog_server._application import Application, HookContext, HookObject, Reject, TransientError
from tidelog_server._authentication import (
    Authenticator,
    CertificateAuthenticator,
    Credentials,
    PeerCertificate,
    StaticTokens,
)
from tidelog_server._errors import (
    AddressUnavailable,
    AuthenticationFailed,
    AuthenticationUnavailable,
    ChangedMeanwhile,
    MigrationUnfinished,
    OperationRefused,
    SchemaContradicted,
)
from tidelog_server._jwt import JwtAuthenticator
from tidelog_server._lmdb_store import LmdbStore
from tidelog_server._principal import Principal
from tidelog_server._server import Server
from tidelog_server._services import Load
from tidelog_server._tenant import Found, Tenant, TenantTransaction
from tidelog_server._tls import ServerTls

__all__ = [
    "AddressUnavailable",
    "Application",
    "AuthenticationFailed",
    "AuthenticationUnavailable",
    "Authenticator",
    "CertificateAuthenticator",
    "ChangedMeanwhile",
    "Credentials",
    "Found",
    "HookContext",
    "HookObject",
    "JwtAuthenticator",
    "LmdbStore",
    "Load",
    "MigrationUnfinished",
    "OperationRefused",
    "PeerCertificate",
    "Principal",
    "Reject",
    "SchemaContradicted",
    "Server",
    "ServerLimits",
    "ServerTls",
    "StaticTokens",
    "Tenant",
    "TenantTransaction",
    "TransientError",
]
