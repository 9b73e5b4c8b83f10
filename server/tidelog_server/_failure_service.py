"""FailureService: synchronization failures over gRPC. See `_failures` for what working them off means."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Final

import uuid_utils
from google.protobuf.timestamp_pb2 import Timestamp

from tidelog._clock import Clock
from tidelog._errors import InvalidValue
from tidelog._failure import operation_as_data
from tidelog._limits import MESSAGE_BYTES_MAX, PAGE_BYTES_MAX, REASON_BYTES_MAX
from tidelog._operation import decode_operation
from tidelog._patch import decode_patch
from tidelog._values import as_json, decode_trusted, encode
from tidelog.v1 import failure_pb2, operation_pb2
from tidelog_server import _failures
from tidelog_server._application import Application
from tidelog_server._errors import NotFound, OperatorRequired, RequestInvalid
from tidelog_server._principal import Principal
from tidelog_server._requests import LIST_PAGE_MAX, page_size, parsed, uuid_bytes
from tidelog_server._sealing import PageTokens
from tidelog_server._session import parse_replica_id, server_time_us
from tidelog_server._store import Reader, Store

# With room for the framing, and for the fields around what is counted.
FRAMING_BYTES_MAX: Final = 16
RESPONSE_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 1024

JSON_OPERATION_BYTES_MAX: Final = 128 * 1024
DEPENDENTS_NAMED_MAX: Final = 1_000


class FailureService:
    """The methods of the service: serialized request and principal in, response out."""

    def __init__(self, application: Application, store: Store, clock: Clock = server_time_us) -> None:
        self._application = application
        self._store = store
        self._clock = clock
        self._tokens = PageTokens(store, "ListFailures")

    def list_failures(self, data: bytes, principal: Principal) -> failure_pb2.ListFailuresResponse:
        """List failures. Reads one page of the scan: what is filtered out is read too."""
        request = parsed(failure_pb2.ListFailuresRequest, data)
        matches = self._filter(request, principal)
        position = self._tokens.position(request.page_token, principal.tenant)
        limit = page_size(request.page_size)
        response = failure_pb2.ListFailuresResponse()
        room_bytes = RESPONSE_BYTES_MAX
        with self._store.read(principal.tenant) as reader:
            found = reader.failures(position, LIST_PAGE_MAX, PAGE_BYTES_MAX)
        for failure_id, record in found:
            failure = failure_pb2.SynchronizationFailure.FromString(record)
            if matches(failure):
                told = self._told(failure, principal, RESPONSE_BYTES_MAX)
                room_bytes -= told.ByteSize() + FRAMING_BYTES_MAX
                if len(response.failures) == limit or (response.failures and room_bytes < 0):
                    break
                response.failures.append(told)
            position = failure_id
        response.next_page_token = self._tokens.token(position if found else b"", principal.tenant)
        return response

    def get_failure(self, data: bytes, principal: Principal) -> failure_pb2.GetFailureResponse:
        """Get one failure, beside the present object as far as the principal may read it."""
        request = parsed(failure_pb2.GetFailureRequest, data)
        failure_id = uuid_bytes(request.id, "a failure id")
        with self._store.read(principal.tenant) as reader:
            failure = _failures.load(reader, failure_id)
            if not self._may_see(failure, principal):
                raise NotFound(f"there is no failure {uuid_utils.UUID(bytes=failure_id)}", reason="FAILURE_NOT_FOUND")
            dependents = islice(_failures.dependents(reader, failure_id), DEPENDENTS_NAMED_MAX)
            response = failure_pb2.GetFailureResponse(
                present=self._present(reader, failure, principal),
                dependents=[str(uuid_utils.UUID(bytes=one)) for one in dependents],
            )
        response.failure.CopyFrom(self._told(failure, principal, RESPONSE_BYTES_MAX - response.ByteSize()))
        return response

    async def retry_failure(self, data: bytes, principal: Principal) -> failure_pb2.RetryFailureResponse:
        """Retry a failure, and those that depend on it."""
        request = parsed(failure_pb2.RetryFailureRequest, data)
        self._check_operator(principal, request.note)
        if request.patch:
            decode_patch(request.patch)
        failure_id = uuid_bytes(request.id, "a failure id")
        decision = _failures.Decision(principal, self._clock(), request.note, request.force, request.patch)
        outcomes = await asyncio.wrap_future(
            self._store.submit(
                principal.tenant, lambda reader: _failures.retry(reader, self._application, failure_id, decision)
            )
        )
        return failure_pb2.RetryFailureResponse(
            results=[
                failure_pb2.RetryResult(
                    failure=_without_payload(one.failure),
                    version=one.version,
                    reason=operation_pb2.FAILURE_REASON_UNSPECIFIED if one.reason is None else one.reason.number,
                    message=one.message,
                )
                for one in outcomes
            ]
        )

    async def dismiss_failure(self, data: bytes, principal: Principal) -> failure_pb2.DismissFailureResponse:
        """Dismiss a failure."""
        request = parsed(failure_pb2.DismissFailureRequest, data)
        self._check_operator(principal, request.note)
        failure_id = uuid_bytes(request.id, "a failure id")
        decision = _failures.Decision(principal, self._clock(), request.note)
        failure = await asyncio.wrap_future(
            self._store.submit(principal.tenant, lambda reader: _failures.dismiss(reader, failure_id, decision))
        )
        return failure_pb2.DismissFailureResponse(failure=_without_payload(failure))

    def _filter(
        self, request: failure_pb2.ListFailuresRequest, principal: Principal
    ) -> Callable[[failure_pb2.SynchronizationFailure], bool]:
        replica_id = str(uuid_utils.UUID(bytes=parse_replica_id(request.replica_id))) if request.replica_id else ""
        cause = request.cause_failure_id
        cause = cause and str(uuid_utils.UUID(bytes=uuid_bytes(cause, "a failure id")))
        statuses, reasons = frozenset(request.statuses), frozenset(request.reasons)
        since = _microseconds(request.since) if request.HasField("since") else None
        before = _microseconds(request.before) if request.HasField("before") else None

        def matches(failure: failure_pb2.SynchronizationFailure) -> bool:
            time_us = failure.create_time.ToMicroseconds()
            return (
                self._may_see(failure, principal)
                and replica_id in ("", failure.replica_id)
                and cause in ("", failure.cause_failure_id)
                and request.entity in ("", failure.entity)
                and request.object_id in ("", failure.object_id)
                and request.user_id in ("", failure.user_id)
                and (not statuses or failure.status in statuses)
                and (not reasons or failure.reason in reasons)
                and (since is None or time_us >= since)
                and (before is None or time_us < before)
            )

        return matches

    def _may_see(self, failure: failure_pb2.SynchronizationFailure, principal: Principal) -> bool:
        return failure.user_id == principal.user_id or self._application.is_operator(principal)

    def _told(
        self, failure: failure_pb2.SynchronizationFailure, principal: Principal, bytes_max: int
    ) -> failure_pb2.SynchronizationFailure:
        """
        Return a record as a principal is told of it.

        What operators did, and what came of it, may speak of what only they may read.
        """
        if not self._application.is_operator(principal):
            actions = [failure_pb2.FailureAction(kind=one.kind, time=one.time) for one in failure.actions]
            del failure.actions[:]
            failure.actions.extend(actions)
        return _for_people(failure, bytes_max)

    def _check_operator(self, principal: Principal, note: str) -> None:
        if not self._application.is_operator(principal):
            raise OperatorRequired("only an operator retries and dismisses failures")
        if len(note.encode()) > REASON_BYTES_MAX:
            raise RequestInvalid(f"a note is at most {REASON_BYTES_MAX} bytes long")

    def _present(
        self, reader: Reader, failure: failure_pb2.SynchronizationFailure, principal: Principal
    ) -> operation_pb2.Snapshot | None:
        if not failure.entity:
            return None
        key = _failures.key_of(failure, self._application.schema)
        state = reader.objects((key,)).get(key)
        if state is None or state.deleted:
            return None
        attributes = decode_trusted(state.attributes)
        readable = self._application.rights(principal).entity(key[0]).readable(attributes)
        if readable is None:
            return None
        encoded = state.attributes if readable is attributes else encode(readable)
        return operation_pb2.Snapshot(entity=key[0], id=key[1], version=state.version, attributes=encoded)


def _microseconds(time: Timestamp) -> int:
    try:
        return time.ToMicroseconds()
    except ValueError as error:
        raise RequestInvalid(f"a time that is none: {error}") from error


def _for_people(failure: failure_pb2.SynchronizationFailure, bytes_max: int) -> failure_pb2.SynchronizationFailure:
    """Return a record with its operation as JSON, and without what a response has no room for."""
    if failure.ByteSize() > bytes_max:
        for action in failure.actions:
            action.ClearField("edited_operation")
    for name in ("group_operations", "operation"):
        if failure.ByteSize() > bytes_max:
            failure.ClearField(name)
    if len(failure.operation) <= JSON_OPERATION_BYTES_MAX:
        try:
            text = as_json(operation_as_data(decode_operation(failure.operation)))
        except InvalidValue:
            return failure
        if failure.ByteSize() + len(text.encode()) + FRAMING_BYTES_MAX <= bytes_max:
            failure.operation_json = text
    return failure


def _without_payload(failure: failure_pb2.SynchronizationFailure) -> failure_pb2.SynchronizationFailure:
    """Return a record without what is known already: so any number that is retried at once fits a message."""
    for name in ("operation", "group_operations", "actions"):
        failure.ClearField(name)
    return failure
