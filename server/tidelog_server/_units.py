"""
Units: the operations of a batch as they are read, and what of them is applied all or none.

What cannot be read stays whole beside the error that says why, so that it can be
refused like anything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tidelog._errors import InvalidValue
from tidelog._failure import FailureReason
from tidelog._file_reference import file_references
from tidelog._keys import ObjectKey
from tidelog._operation import Operation, OperationKind, decode_operation, identity_of
from tidelog._patch import Patch
from tidelog._schema import Schema

# A named tuple's own constructor is a Python function, and costs twice as much. Where every operation passes, the
# tuple is made directly.
_new = tuple.__new__


class FormerOutcome(NamedTuple):
    """
    What had become of an operation before the server was put back from a backup.

    Attributes:
        version: The version it was applied at; 0 if it was refused.
        failure_id: The failure's id in 16 bytes; empty if it was applied.
        reason: The failure's reason.
        message: Its message.
        code: Its code.
    """

    version: int
    failure_id: bytes = b""
    reason: FailureReason | None = None
    message: str = ""
    code: str = ""


class Member(NamedTuple):
    """
    One operation of a batch, read as far as it can be.

    Attributes:
        seq: Its seq; 0 if that cannot be read.
        nonce: Its nonce.
        operation: The operation, in the names of the present schema; None if it cannot be read.
        patch: Its patch.
        data: Its bytes, as they came.
        error: Why it cannot be applied whatever the state of its object.
        renamed: Whether it was written with names that the schema has given up.
        former: What had become of it before the server was put back from a backup, if it
            is offered again.
    """

    seq: int
    nonce: int
    operation: Operation | None
    patch: Patch
    data: bytes
    error: InvalidValue | None
    renamed: bool
    former: FormerOutcome | None = None


# What is applied all or none: one operation, or the operations of one commit group.
Unit = tuple[Member, ...]


def read_member(data: bytes, schema: Schema) -> Member:
    """Read an operation, and translate it if it was made with an older schema."""
    try:
        operation = decode_operation(data)
    except InvalidValue as error:
        seq, nonce = identity_of(data)
        return Member(seq, nonce, None, _NO_PATCH, data, error, renamed=False)
    try:
        patch = operation.decoded_patch()
        renamed = False
        if schema.renames and operation.schema_version < schema.version:
            entity, current = schema.upcast(operation.entity, patch, operation.schema_version)
            if current is not patch or entity != operation.entity:
                renamed = True
                encoded = current.encode() if operation.kind is not OperationKind.DELETE else b""
                operation = operation._replace(entity=entity, patch=encoded)
                patch = current
    except InvalidValue as error:
        return Member(operation.seq, operation.nonce, operation, _NO_PATCH, data, error, renamed=False)
    return _new(Member, (operation.seq, operation.nonce, operation, patch, data, None, renamed, None))


def split_units(members: list[Member]) -> Iterator[Unit]:
    """Split a batch into what is applied all or none. A commit group that is not whole becomes malformed."""
    position = 0
    while position < len(members):
        member = members[position]
        group = member.operation.group if member.operation is not None else None
        if group is None:
            yield (member,)
            position += 1
            continue
        unit = [member]
        place = group.position
        for candidate in members[position + 1 : position + group.size]:
            place += 1
            # Unreadable bytes between members of a group can only be one of them.
            if candidate.operation is not None:
                other = candidate.operation.group
                if other is None or other.position < place or other != group._replace(position=other.position):
                    break
                place = other.position
            unit.append(candidate)
        if len(unit) < group.size:
            error = InvalidValue(f"its commit group of {group.size} operations is not whole in this batch")
            unit[0] = member._replace(error=error)
        yield tuple(unit)
        position += len(unit)


def is_whole(unit: Unit) -> bool:
    """Tell whether nothing of a commit group is missing in a unit."""
    group = unit[0].operation.group if unit[0].operation is not None else None
    return group is None or len(unit) >= group.size


def keys_of(unit: Unit) -> list[ObjectKey]:
    """Return the keys of the objects that a unit is about."""
    return [member.operation.key for member in unit if member.operation is not None]


def created_keys(unit: Unit) -> list[ObjectKey]:
    """Return the keys of the objects that a unit would create."""
    return [
        member.operation.key
        for member in unit
        if member.operation is not None and member.operation.kind is OperationKind.CREATE
    ]


def contents_of(unit: Unit) -> set[bytes]:
    """Return the contents of files that a unit would have objects refer to."""
    return {reference.sha256 for member in unit for _, reference in file_references(member.patch.set)}


def size_bytes(unit: Iterable[Member]) -> int:
    """Return the size of a unit's operations."""
    return sum(len(member.data) for member in unit)


_NO_PATCH = Patch()
