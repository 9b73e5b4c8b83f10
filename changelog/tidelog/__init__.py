"""
tidelog: an event-sourced change log synchronizer.

What replicas (`tidelog_client`) and servers (`tidelog_server`) share: values,
operations, constraints, the schema and the errors.
"""

from tidelog._constraints import Constraint, attribute
from tidelog._errors import (
    DiskFull,
    DownloadRefused,
    ForeignServer,
    FormatUnsupported,
    InheritedEnvironment,
    InvalidConstraint,
    InvalidSchema,
    InvalidValue,
    LimitExceeded,
    LogCorrupt,
    NotConfigured,
    ObjectExists,
    ObjectNotFound,
    PermissionRefused,
    ProtocolUnsupported,
    ProtocolViolated,
    ReplicaForked,
    ResourceClosed,
    ServerUnavailable,
    StorageError,
    StoreInUse,
    SynchronizationError,
    SynchronizationInProgress,
    TidelogError,
    Unauthenticated,
)
from tidelog._failure import FailureReason, SynchronizationFailure
from tidelog._operation import CommitGroup, Operation, OperationKind
from tidelog._patch import Patch
from tidelog._schema import Reference, Schema
from tidelog._values import Value

__all__ = [
    "CommitGroup",
    "Constraint",
    "DiskFull",
    "DownloadRefused",
    "FailureReason",
    "ForeignServer",
    "FormatUnsupported",
    "InheritedEnvironment",
    "InvalidConstraint",
    "InvalidSchema",
    "InvalidValue",
    "LimitExceeded",
    "LogCorrupt",
    "NotConfigured",
    "ObjectExists",
    "ObjectNotFound",
    "Operation",
    "OperationKind",
    "Patch",
    "PermissionRefused",
    "ProtocolUnsupported",
    "ProtocolViolated",
    "Reference",
    "ReplicaForked",
    "ResourceClosed",
    "Schema",
    "ServerUnavailable",
    "StorageError",
    "StoreInUse",
    "SynchronizationError",
    "SynchronizationFailure",
    "SynchronizationInProgress",
    "TidelogError",
    "Unauthenticated",
    "Value",
    "attribute",
]
