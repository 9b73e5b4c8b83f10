"""
tidelog_server: keeps the shared data, checks what replicas send, tells them what changed.

Declare an `Application`, give it to a `Server`.
"""

from tidelog_server._application import Application, HookContext, HookObject, Reject, TransientError
from tidelog_server._errors import AddressUnavailable, ChangedMeanwhile, OperationRefused
from tidelog_server._lmdb_store import LmdbStore
from tidelog_server._principal import Principal
from tidelog_server._server import Server
from tidelog_server._tenant import Found, Tenant, TenantTransaction

__all__ = [
    "AddressUnavailable",
    "Application",
    "ChangedMeanwhile",
    "Found",
    "HookContext",
    "HookObject",
    "LmdbStore",
    "OperationRefused",
    "Principal",
    "Reject",
    "Server",
    "Tenant",
    "TenantTransaction",
    "TransientError",
]
