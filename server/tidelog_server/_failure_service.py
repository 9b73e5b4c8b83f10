"""FailureService: synchronization failures over gRPC. See `_failures` for what working them off means."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import uuid_utils

from tidelog._errors import InvalidValue
from tidelog._failure import operation_as_data
from tidelog._limits import PAGE_BYTES_MAX, REASON_BYTES_MAX
from tidelog._operation import decode_operation
from tidelog._patch import decode_patch
from tidelog._values import as_json, decode_trusted, encode
from tidelog.v1 import failure_pb2, operation_pb2
from tidelog_server import _failures
from tidelog_server._application import Application
from tidelog_server._errors import NotFound, OperatorRequired, RequestInvalid
from tidelog_server._principal import Principal
from tidelog_server._requests import page_size, parsed, uuid_bytes
from tidelog_server._session import Clock, parse_replica_id, server_time_us
from tidelog_server._store import Reader, Store

# With its JSON a record must still fit a message.
JSON_OPERATION_BYTES_MAX: Final = 128 * 1024
DEPENDENTS_NAMED_MAX: Final = 1_000


class FailureService:
    """The methods of the service: serialized request and principal in, response out."""

    def __init__(self, application: Application, store: Store, clock: Clock = server_time_us) -> None:
        self._application = application
        self._store = store
        self._clock = clock

    def list_failures(self, data: bytes, principal: Principal) -> failure_pb2.ListFailuresResponse:
        """List failures. Reads one page of the scan: what is filtered out is read too."""
        request = parsed(failure_pb2.ListFailuresRequest, data)
        matches = self._filter(request, principal)
        after = uuid_bytes(request.page_token, "a page token") if request.page_token else b""
        limit = page_size(request.page_size)
        response = failure_pb2.ListFailuresResponse()
        with self._store.read(principal.tenant) as reader:
            found = reader.failures(after, limit, PAGE_BYTES_MAX)
        for _id, record in found:
            failure = failure_pb2.SynchronizationFailure.FromString(record)
            if matches(failure):
                response.failures.append(_for_people(failure))
        if found:
            response.next_page_token = str(uuid_utils.UUID(bytes=found[-1][0]))
        return response

    def get_failure(self, data: bytes, principal: Principal) -> failure_pb2.GetFailureResponse:
        """Get one failure, beside the present object as far as the principal may read it."""
        request = parsed(failure_pb2.GetFailureRequest, data)
        failure_id = uuid_bytes(request.id, "a failure id")
        with self._store.read(principal.tenant) as reader:
            failure = _failures.load(reader, failure_id)
            if not self._may_see(failure, principal):
                raise NotFound(f"there is no failure {request.id}", reason="FAILURE_NOT_FOUND")
            response = failure_pb2.GetFailureResponse(failure=_for_people(failure))
            present = self._present(reader, failure, principal)
            if present is not None:
                response.present.CopyFrom(present)
            for one in _failures.dependents(reader, failure_id):
                if len(response.dependents) == DEPENDENTS_NAMED_MAX:
                    break
                response.dependents.append(str(uuid_utils.UUID(bytes=one)))
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
        response = failure_pb2.RetryFailureResponse()
        for one in outcomes:
            response.results.add(
                # The payloads are known; without them any number of dependents fits a message.
                failure=_without_payload(one.failure) if response.results else _for_people(one.failure),
                version=one.version,
                reason=one.reason.number if one.reason is not None else operation_pb2.FAILURE_REASON_UNSPECIFIED,
                message=one.message,
            )
        return response

    async def dismiss_failure(self, data: bytes, principal: Principal) -> failure_pb2.DismissFailureResponse:
        """Dismiss a failure."""
        request = parsed(failure_pb2.DismissFailureRequest, data)
        self._check_operator(principal, request.note)
        failure_id = uuid_bytes(request.id, "a failure id")
        decision = _failures.Decision(principal, self._clock(), request.note)
        failure = await asyncio.wrap_future(
            self._store.submit(principal.tenant, lambda reader: _failures.dismiss(reader, failure_id, decision))
        )
        return failure_pb2.DismissFailureResponse(failure=_for_people(failure))

    def _filter(
        self, request: failure_pb2.ListFailuresRequest, principal: Principal
    ) -> Callable[[failure_pb2.SynchronizationFailure], bool]:
        replica_id = str(uuid_utils.UUID(bytes=parse_replica_id(request.replica_id))) if request.replica_id else ""
        cause = (
            str(uuid_utils.UUID(bytes=uuid_bytes(request.cause_failure_id, "a failure id")))
            if (request.cause_failure_id)
            else ""
        )
        statuses, reasons = frozenset(request.statuses), frozenset(request.reasons)
        since = request.since.ToMicroseconds() if request.HasField("since") else None
        before = request.before.ToMicroseconds() if request.HasField("before") else None

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

    def _check_operator(self, principal: Principal, note: str) -> None:
        if not self._application.is_operator(principal):
            raise OperatorRequired("only an operator retries and dismisses failures")
        if len(note.encode()) > REASON_BYTES_MAX:
            raise RequestInvalid(f"a note is at most {REASON_BYTES_MAX} bytes long")

    def _present(
        self, reader: Reader, failure: failure_pb2.SynchronizationFailure, principal: Principal
    ) -> operation_pb2.Snapshot | None:
        key = (failure.entity, failure.object_id)
        state = reader.objects((key,)).get(key) if failure.entity else None
        if state is None or state.deleted:
            return None
        attributes = decode_trusted(state.attributes)
        readable = self._application.rights(principal).entity(failure.entity).readable(attributes)
        if readable is None:
            return None
        encoded = state.attributes if readable is attributes else encode(readable)
        return operation_pb2.Snapshot(
            entity=failure.entity, id=failure.object_id, version=state.version, attributes=encoded
        )


def _for_people(failure: failure_pb2.SynchronizationFailure) -> failure_pb2.SynchronizationFailure:
    if len(failure.operation) > JSON_OPERATION_BYTES_MAX:
        return failure  # with its JSON it might not fit a message
    try:
        failure.operation_json = as_json(operation_as_data(decode_operation(failure.operation)))
    except InvalidValue:
        failure.operation_json = ""
    return failure


def _without_payload(failure: failure_pb2.SynchronizationFailure) -> failure_pb2.SynchronizationFailure:
    slim = failure_pb2.SynchronizationFailure()
    slim.CopyFrom(failure)
    for name in ("operation", "group_operations", "actions"):
        slim.ClearField(name)
    return slim
