"""
Operations: one recorded intent to change one object.

The bytes of an operation are made once, when it is committed. The operation log
stores them, the wire carries them, a failure record keeps them: nobody encodes
an operation a second time.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from tidelog._errors import InvalidValue, LimitExceeded
from tidelog._limits import GROUP_OPERATIONS_MAX, OPERATION_BYTES_MAX
from tidelog._patch import Patch, decode_patch
from tidelog._values import check_id, check_name
from tidelog.v1 import operation_pb2

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME_SECONDS_MIN = -62_135_596_800
_TIME_SECONDS_MAX = 253_402_300_799


class OperationKind(enum.IntEnum):
    """What an operation does."""

    CREATE = operation_pb2.OPERATION_KIND_CREATE
    UPDATE = operation_pb2.OPERATION_KIND_UPDATE
    DELETE = operation_pb2.OPERATION_KIND_DELETE


class CommitGroup(NamedTuple):
    """
    The place of an operation in its commit group.

    Attributes:
        id: The seq of the group's first operation.
        position: Place in the group, from 0.
        size: How many operations the group has.
    """

    id: int
    position: int
    size: int


class Operation(NamedTuple):
    """
    One recorded intent to change one object.

    Attributes:
        seq: Position in the replica's operation log, from 1.
        nonce: Random 64 bits that tell a repetition from another operation at the
            same position of a copied log.
        kind: What it does.
        entity: Type of the object.
        id: Identity of the object within its entity.
        patch: The change, encoded; empty for a deletion.
        base_version: Server version of the object that the author looked at. 0: none.
        group: Its commit group, if it belongs to one.
        schema_version: Version of the schema that the author used. 0: none.
        client_time_us: The author's clock in microseconds since 1970. Information only.
    """

    seq: int
    nonce: int
    kind: OperationKind
    entity: str
    id: str
    patch: bytes
    base_version: int = 0
    group: CommitGroup | None = None
    schema_version: int = 0
    client_time_us: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Key of the object."""
        return (self.entity, self.id)

    @property
    def client_time(self) -> datetime:
        """The author's clock at the commit. Information only."""
        return _EPOCH + timedelta(microseconds=self.client_time_us)

    def decoded_patch(self) -> Patch:
        """
        Decode the patch. A deletion has an empty one.

        Raises:
            InvalidValue: The bytes are no patch, or one that this kind of
                operation may not have.
        """
        if self.kind is OperationKind.DELETE:
            if self.patch:
                raise InvalidValue("a deletion has no patch")
            return Patch()
        patch = decode_patch(self.patch)
        if self.kind is OperationKind.CREATE and (patch.unset or patch.increment or patch.add or patch.remove):
            raise InvalidValue("a creation sets attributes and does nothing else")
        return patch

    def encode(self) -> bytes:
        """Return the serialized `tidelog.v1.Operation`."""
        seconds, microseconds = divmod(self.client_time_us, 1_000_000)
        message = operation_pb2.Operation(
            seq=self.seq,
            nonce=self.nonce,
            kind=self.kind,  # type: ignore[arg-type]  # the same numbers
            entity=self.entity,
            id=self.id,
            patch=self.patch,
            base_version=self.base_version,
            schema_version=self.schema_version,
            client_time=Timestamp(seconds=seconds, nanos=microseconds * 1000),
        )
        if self.group is not None:
            id_, position, size = self.group
            message.group.id = id_
            message.group.position = position
            message.group.size = size
        return message.SerializeToString()


_KINDS = {int(kind): kind for kind in OperationKind}


def decode_operation(data: bytes) -> Operation:
    """
    Decode an operation that came from outside. Its patch stays encoded.

    Raises:
        LimitExceeded: It is over a limit.
        InvalidValue: It cannot be read or breaks a rule of the format.
    """
    if len(data) > OPERATION_BYTES_MAX:
        raise LimitExceeded(f"an operation of {len(data)} bytes: the limit is {OPERATION_BYTES_MAX}")
    try:
        message = operation_pb2.Operation.FromString(data)
    except DecodeError as error:
        raise InvalidValue("the bytes are no operation") from error
    return _checked(message)


def identity_of(data: bytes) -> tuple[int, int]:
    """Return (seq, nonce) of an operation that `decode_operation` refuses, as far as it shows them."""
    try:
        message = operation_pb2.Operation.FromString(data)
    except DecodeError:
        return (0, 0)
    return (max(message.seq, 0), message.nonce)


def _checked(message: operation_pb2.Operation) -> Operation:
    kind = _KINDS.get(message.kind)
    if kind is None:
        raise InvalidValue(f"an operation of the unknown kind {message.kind}")
    seq, entity, id_, base_version = message.seq, message.entity, message.id, message.base_version
    check_name(entity, "an entity name")
    check_id(id_)
    if seq < 1 or base_version < 0:
        raise InvalidValue(f"seq {seq} or base version {base_version} is out of range")
    group = None
    if message.HasField("group"):
        group = CommitGroup(message.group.id, message.group.position, message.group.size)
        if not (0 <= group.position < group.size <= GROUP_OPERATIONS_MAX and group.id == seq - group.position):
            raise InvalidValue(f"a commit group that contradicts itself: {group} at seq {seq}")
    time = message.client_time
    seconds = time.seconds
    if not _TIME_SECONDS_MIN <= seconds <= _TIME_SECONDS_MAX:
        raise InvalidValue(f"a client time {seconds} seconds from 1970: years are 1 to 9999")
    nanos = time.nanos
    if not 0 <= nanos < 1_000_000_000:  # noqa: PLR2004 - a second
        raise InvalidValue(f"a client time with {nanos} nanoseconds")
    # As Operation(...) would, in half the time: its constructor is a Python function.
    return tuple.__new__(
        Operation,
        (
            seq,
            message.nonce,
            kind,
            entity,
            id_,
            message.patch,
            base_version,
            group,
            message.schema_version,
            seconds * 1_000_000 + nanos // 1000,
        ),
    )
