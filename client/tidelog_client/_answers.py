"""
What a replica asks of the server's messages before it acts on them.

A server is another program, of another version, or not the one that it should be. What
it sends ends in the replica's own files, so everything is looked at when it comes:
names and positions that no file could hold, states that nobody could read. The attempt
then ends with `ProtocolViolated`, and nothing of the message was taken in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from tidelog import _limits
from tidelog._errors import InvalidSchema, InvalidValue, ProtocolViolated
from tidelog._limits import ID_BYTES_MAX
from tidelog._schema import Schema
from tidelog._values import check_encoded_map, check_id, check_name
from tidelog.v1 import operation_pb2, sync_pb2

# All that a session begins with must fit a message.
TOKEN_BYTES_MAX: Final = 256 * 1024


def check_started(started: sync_pb2.SessionStarted) -> None:
    """Check the answer to the start of a session. Raises ProtocolViolated."""
    with _violations("the start of the session"):
        check_id(started.epoch, "the store's name")
        check_id(started.timeline, "the timeline's name")
        for whose in filter(None, (started.tenant, started.user_id)):
            check_id(whose, "whose replica it is")
        _check_position("the newest settled seq", started.settled.newest_seq)
        _check_position("the common version", started.common_version)
        if started.HasField("schema"):
            Schema.from_message(started.schema)


def batch_limits(limits: sync_pb2.Limits) -> sync_pb2.Limits:
    """Return what a server takes, as far as this side sends it at all."""
    return sync_pb2.Limits(
        batch_operation_count=min(limits.batch_operation_count, _limits.BATCH_OPERATIONS_MAX),
        batch_bytes=min(limits.batch_bytes, _limits.BATCH_BYTES_MAX),
        batches_in_flight=max(1, min(limits.batches_in_flight, _limits.BATCHES_IN_FLIGHT_MAX)),
    )


def check_final(results: Iterable[operation_pb2.OperationResult]) -> None:
    """Check results that settle operations. Raises ProtocolViolated."""
    with _violations("a result"):
        for result in results:
            if result.status == operation_pb2.OPERATION_STATUS_APPLIED:
                if result.version < 1:
                    raise InvalidValue(f"seq {result.seq} was applied at version {result.version}")
            elif result.status == operation_pb2.OPERATION_STATUS_REJECTED:
                check_id(result.failure_id, "a failure id")
            else:
                raise InvalidValue(f"status {result.status} settles nothing of seq {result.seq}")


def check_page(page: sync_pb2.SnapshotPage) -> None:
    """Check a page of a download. Raises ProtocolViolated."""
    with _violations("a page"):
        _check_objects(page.snapshots)
        for snapshot in page.snapshots:
            check_encoded_map(snapshot.attributes)
        _check_objects(page.removals)
        _check_objects(page.confirmations)
    check_token(page.resume_token)


def check_complete(complete: sync_pb2.SessionComplete) -> None:
    """Check the end of a session. Raises ProtocolViolated."""
    with _violations("the end of the session"):
        _check_position("the version", complete.version)
        for token in (complete.cursor, complete.checkpoint):
            check_token(token)


def _check_objects(
    objects: Sequence[operation_pb2.Snapshot] | Sequence[operation_pb2.Removal] | Sequence[operation_pb2.Confirmation],
) -> None:
    ids = [one.id for one in objects]
    text = "".join(ids)
    # All at once: a call for each costs more than all the rest. Only what looks odd is looked at one by one.
    if not (text.isascii() and "\0" not in text and all(ids) and len(max(ids, key=len, default="")) <= ID_BYTES_MAX):
        for id_ in ids:
            check_id(id_)
    for entity in {one.entity for one in objects}:
        check_name(entity, "an entity name")
    _check_position("the version of an object", min([one.version for one in objects], default=0))


def check_token(token: bytes) -> None:
    """Check a token that is to be kept and sent back. Raises ProtocolViolated."""
    if len(token) > TOKEN_BYTES_MAX:
        raise ProtocolViolated(f"the server sent a token of {len(token)} bytes: the limit is {TOKEN_BYTES_MAX}")


def _check_position(what: str, position: int) -> None:
    if position < 0:
        raise InvalidValue(f"{what} is {position}")


@contextmanager
def _violations(what: str) -> Iterator[None]:
    try:
        yield
    except (InvalidValue, InvalidSchema) as error:
        raise ProtocolViolated(f"the server sent {what} as it cannot be: {error}") from error
