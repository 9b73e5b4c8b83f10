"""
Synchronization failures: what the server refused, kept whole.

The server's record and the replica's copy of it are the same message,
`tidelog.v1.SynchronizationFailure`; this is how Python reads it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from tidelog._errors import InvalidValue
from tidelog._operation import Operation, OperationKind, decode_operation
from tidelog._values import as_json
from tidelog.v1 import failure_pb2, operation_pb2


class FailureReason(enum.StrEnum):
    """Why an operation was refused. The names are those of the protocol, without prefix."""

    OBJECT_GONE = "OBJECT_GONE"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    ACCESS_DENIED = "ACCESS_DENIED"
    ATTRIBUTE_DENIED = "ATTRIBUTE_DENIED"
    VALIDATION_FAILED = "VALIDATION_FAILED"
    UNIQUE_VIOLATED = "UNIQUE_VIOLATED"
    DANGLING_REFERENCE = "DANGLING_REFERENCE"
    REFERENCED = "REFERENCED"
    CONFLICT = "CONFLICT"
    HOOK_REJECTED = "HOOK_REJECTED"
    HOOK_ERROR = "HOOK_ERROR"
    SCHEMA_MISMATCH = "SCHEMA_MISMATCH"
    GROUP_REJECTED = "GROUP_REJECTED"
    DEPENDENCY_FAILED = "DEPENDENCY_FAILED"
    SUPERSEDED = "SUPERSEDED"
    MALFORMED = "MALFORMED"
    TOO_LARGE = "TOO_LARGE"
    FILE_MISSING = "FILE_MISSING"

    @property
    def number(self) -> operation_pb2.FailureReason.ValueType:
        """The reason on the wire."""
        return operation_pb2.FailureReason.Value(f"FAILURE_REASON_{self.value}")

    @classmethod
    def of_number(cls, number: int) -> FailureReason:
        """Return the reason that stands for *number* on the wire; an unknown one reads as MALFORMED."""
        return _REASONS.get(number, cls.MALFORMED)


_REASONS = {int(reason.number): reason for reason in FailureReason}


@dataclass(frozen=True, slots=True)
class SynchronizationFailure:
    """
    The durable record of an operation that the server refused.

    Attributes:
        id: Its id.
        entity: Type of the object. Empty if the operation could not be read.
        object_id: Id of the object. Empty if the operation could not be read.
        reason: Why it was refused.
        message: The refusal in a sentence for people.
        code: The application's own code for it, for programs; empty: none.
        operation: The operation, or None if it cannot be read.
        operation_bytes: The operation as it was sent.
        group_operations: All operations of its commit group in order; empty without one.
        replica_id: The replica that sent it.
        version: The tenant's version when it was refused; 0 in a replica's own record,
            which is made from the result alone.
        time: The recorder's clock then; None if it was not recorded.
    """

    id: str
    entity: str
    object_id: str
    reason: FailureReason
    message: str
    code: str
    operation: Operation | None
    operation_bytes: bytes
    group_operations: tuple[Operation, ...]
    replica_id: str
    version: int
    time: datetime | None

    @property
    def attributes(self) -> dict[str, Any]:
        """
        The attributes that the operation would have written: values set, amounts and members of intents.

        Unset attributes are None. Empty for a deletion and for an operation that
        cannot be read.
        """
        if self.operation is None:
            return {}
        try:
            patch = self.operation.decoded_patch()
        except InvalidValue:
            return {}
        return {**patch.set, **dict.fromkeys(patch.unset), **patch.increment, **patch.add, **patch.remove}

    @classmethod
    def from_message(cls, message: failure_pb2.SynchronizationFailure) -> SynchronizationFailure:
        """Read the wire form."""
        return cls(
            id=message.id,
            entity=message.entity,
            object_id=message.object_id,
            reason=FailureReason.of_number(message.reason),
            message=message.message,
            code=message.code,
            operation=_decoded(message.operation),
            operation_bytes=message.operation,
            group_operations=tuple(
                operation for data in message.group_operations if (operation := _decoded(data)) is not None
            ),
            replica_id=message.replica_id,
            version=message.version,
            time=moment_of(message.create_time) if message.HasField("create_time") else None,
        )


def moment_of(time: Timestamp) -> datetime | None:
    """Return a time of a record; None if it lies outside the years 1 to 9999."""
    try:
        return time.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def _decoded(data: bytes) -> Operation | None:
    try:
        return decode_operation(data)
    except InvalidValue:
        return None


def operation_as_data(operation: Operation) -> dict[str, Any]:
    """Return an operation as plain data for people and for JSON: kind, key and the patch decoded."""
    data: dict[str, Any] = {
        "seq": operation.seq,
        "kind": OperationKind(operation.kind).name.lower(),
        "entity": operation.entity,
        "id": operation.id,
        "base_version": operation.base_version,
        "client_time": operation.client_time.isoformat(),
    }
    try:
        patch = operation.decoded_patch()
    except InvalidValue as error:
        data["unreadable"] = str(error)
    else:
        data.update({name: value for name, value in patch._asdict().items() if value})
    if operation.group is not None:
        data["group"] = operation.group._asdict()
    return data


def operation_in_short(operation: Operation) -> str:
    """Return what an operation does to the attributes, in a line for people."""
    data = operation_as_data(operation)
    parts = [f"{name}={as_json(value)}" for name, value in data.get("set", {}).items()]
    parts += [f"-{name}" for name in data.get("unset", ())]
    parts += [f"{name}+={as_json(value)}" for name, value in data.get("increment", {}).items()]
    parts += [f"{name} add {as_json(value)}" for name, value in data.get("add", {}).items()]
    parts += [f"{name} remove {as_json(value)}" for name, value in data.get("remove", {}).items()]
    return ", ".join(parts) or data.get("unreadable", "")
