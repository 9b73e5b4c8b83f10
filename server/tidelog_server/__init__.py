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
from tidelog_server._content_store import ContentLost, ContentStore, DirectoryContents
from tidelog_server._errors import (
    AddressUnavailable,
    AuthenticationFailed,
    AuthenticationUnavailable,
    BackupDamaged,
    ChangedMeanwhile,
    ExtraMissing,
    MigrationUnfinished,
    OperationRefused,
    SchemaContradicted,
    ServerOutdated,
    StoreUnavailable,
)
from tidelog_server._jwt import JwtAuthenticator
from tidelog_server._lmdb_backup import Restored, backup_store, restore_store
from tidelog_server._lmdb_store import LmdbStore
from tidelog_server._object_store_contents import ObjectStoreContents
from tidelog_server._postgres_store import PostgresStore
from tidelog_server._principal import Principal
from tidelog_server._retention import Collected
from tidelog_server._server import Server
from tidelog_server._services import Load
from tidelog_server._stores import begin_timeline, verify_store
from tidelog_server._tenant import Found, Tenant, TenantTransaction
from tidelog_server._tls import ServerTls

__all__ = [
    "AddressUnavailable",
    "Application",
    "AuthenticationFailed",
    "AuthenticationUnavailable",
    "Authenticator",
    "BackupDamaged",
    "CertificateAuthenticator",
    "ChangedMeanwhile",
    "Collected",
    "ContentLost",
    "ContentStore",
    "Credentials",
    "DirectoryContents",
    "ExtraMissing",
    "Found",
    "HookContext",
    "HookObject",
    "JwtAuthenticator",
    "LmdbStore",
    "Load",
    "MigrationUnfinished",
    "ObjectStoreContents",
    "OperationRefused",
    "PeerCertificate",
    "PostgresStore",
    "Principal",
    "Reject",
    "Restored",
    "SchemaContradicted",
    "Server",
    "ServerLimits",
    "ServerOutdated",
    "ServerTls",
    "StaticTokens",
    "StoreUnavailable",
    "Tenant",
    "TenantTransaction",
    "TransientError",
    "backup_store",
    "begin_timeline",
    "restore_store",
    "verify_store",
]
