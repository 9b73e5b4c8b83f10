"""
The gRPC services: messages in, messages out, nothing decided.

Requests of `SyncService` are taken as bytes and read with the mirror messages, so
that operations stay serialized on their way to the engine. Jobs run on the store's
writer thread, scans in a small pool; the event loop itself reads no more than a head.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NoReturn, TypeVar

import grpc
import uuid_utils
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status as RpcStatus
from grpc_status import rpc_status

from tidelog import _limits
from tidelog._constraints import constraint_from_message
from tidelog._errors import InvalidValue, StorageError
from tidelog._failure import operation_as_data
from tidelog._logging import get_logger
from tidelog._operation import decode_operation
from tidelog._values import as_json, check_id, check_name, decode_trusted
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import failure_pb2, object_pb2, operation_pb2, sync_pb2
from tidelog_server._application import Application
from tidelog_server._callers import Callers
from tidelog_server._download import Download, cursor_at, start_of
from tidelog_server._engine import Result, Status, Uploader
from tidelog_server._errors import NotFound, RequestInvalid
from tidelog_server._principal import Principal
from tidelog_server._records import ObjectState, ReplicaState
from tidelog_server._session import (
    Session,
    Upload,
    begin_upload,
    check_protocol_version,
    parse_replica_id,
    put_results,
    settled_messages,
)
from tidelog_server._status import status_of
from tidelog_server._store import Store

ERROR_DOMAIN: Final = "tidelog"
READ_THREADS: Final = 4
LIST_PAGE_DEFAULT: Final = 100
LIST_PAGE_MAX: Final = 1_000
JSON_OPERATION_BYTES_MAX: Final = 128 * 1024

_log = get_logger("tidelog.services")
_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")


class Services:
    """All services of one server, over one application and one store."""

    def __init__(self, application: Application, store: Store, callers: Callers) -> None:
        self._application = application
        self._store = store
        self._callers = callers
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="tidelog-reader")

    def close(self) -> None:
        """Let the reads under way end."""
        self._pool.shutdown(wait=True)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Return the handlers to be added to a gRPC server."""
        return [
            grpc.method_handlers_generic_handler(
                "tidelog.v1.SyncService",
                {
                    "Synchronize": grpc.stream_stream_rpc_method_handler(self._synchronize),
                    "UploadOperations": self._unary(self._upload_operations),
                    "DownloadSnapshots": grpc.unary_stream_rpc_method_handler(self._download_snapshots),
                },
            ),
            grpc.method_handlers_generic_handler(
                "tidelog.v1.FailureService",
                {"ListFailures": self._unary(self._list_failures), "GetFailure": self._unary(self._get_failure)},
            ),
            grpc.method_handlers_generic_handler(
                "tidelog.v1.ObjectService",
                {"GetObject": self._unary(self._get_object), "ListObjects": self._unary(self._list_objects)},
            ),
        ]

    def _unary(self, method: Callable[[bytes, Principal], Awaitable[Message]]) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def handle(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            try:
                response = await method(data, await self._callers.principal_of(context))
                return response.SerializeToString()
            except Exception as error:  # noqa: BLE001 - becomes the status of the call
                await _abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handle)

    # --- SyncService ----------------------------------------------------------

    async def _synchronize(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        reading: asyncio.Task[None] | None = None
        try:
            principal = await self._callers.principal_of(context)
            session = Session(self._application, self._store, principal, await _received_start(requests))
            started = await asyncio.wrap_future(session.open())
            yield splice_pb2.SynchronizeResponseSplice(started=started.SerializeToString()).SerializeToString()
            answers: asyncio.Queue[_Answer] = asyncio.Queue(_limits.BATCHES_IN_FLIGHT_MAX)
            reading = asyncio.create_task(_read_uploads(requests, session, answers))
            while (answer := await answers.get()) is not None:
                if isinstance(answer, BaseException):
                    raise answer
                results = sync_pb2.BatchResults()
                settled_now = await asyncio.wrap_future(answer)
                put_results(settled_now, results.results)
                yield splice_pb2.SynchronizeResponseSplice(
                    batch_results=results.SerializeToString()
                ).SerializeToString()
            held = await asyncio.wrap_future(session.settle_held())
            for settled in settled_messages(held):
                yield splice_pb2.SynchronizeResponseSplice(
                    upload_settled=settled.SerializeToString()
                ).SerializeToString()
            async for page in self._read_ahead(session.pages()):
                yield splice_pb2.SynchronizeResponseSplice(page=page).SerializeToString()
            complete = session.complete()
            yield splice_pb2.SynchronizeResponseSplice(complete=complete.SerializeToString()).SerializeToString()
        except Exception as error:  # noqa: BLE001 - becomes the status of the call
            await _abort(context, error)
        finally:
            if reading is not None:
                reading.cancel()

    async def _upload_operations(self, data: bytes, principal: Principal) -> sync_pb2.UploadOperationsResponse:
        request = _parsed(splice_pb2.UploadOperationsRequestSplice, data)
        check_protocol_version(request.protocol_version)
        replica = parse_replica_id(request.replica_id)
        begun: ReplicaState = await asyncio.wrap_future(
            self._store.submit(principal.tenant, lambda reader: begin_upload(reader, replica, principal))
        )
        upload = Upload(
            self._application,
            self._store,
            Uploader(replica, principal, begun.session_number, leaves_earlier=request.more_follow),
        )
        operations = list(request.operations)
        _check_batch(operations)
        first = upload.submit(operations)
        held = upload.settle_held()  # right behind, in the same group of the writer
        results = await asyncio.wrap_future(first)
        settled = await asyncio.wrap_future(held)
        final = iter(settled)
        merged = [next(final) if result.status == Status.HELD else result for result in results]
        with self._store.read(principal.tenant) as reader:
            version = reader.head().version
        response = sync_pb2.UploadOperationsResponse(version=version)
        put_results(merged, response.results)
        return response

    async def _download_snapshots(
        self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        try:
            principal = await self._callers.principal_of(context)
            request = _parsed(sync_pb2.DownloadSnapshotsRequest, data)
            check_protocol_version(request.protocol_version)
            identity = self._store.identity
            with self._store.read(principal.tenant) as reader:
                start = start_of(reader, identity, request.cursor, request.resume_token)
            download = Download(self._store, principal.tenant)
            started = sync_pb2.DownloadStarted(
                resumed=start.resumed,
                reconcile=start.reconcile,
                epoch=identity.epoch,
                timeline=identity.timeline,
            )
            if self._application.has_schema:
                started.schema.CopyFrom(self._application.schema.to_message())
            yield sync_pb2.DownloadSnapshotsResponse(started=started).SerializeToString()
            async for page in self._read_ahead(download.everything_since(start)):
                yield splice_pb2.DownloadSnapshotsResponseSplice(page=page).SerializeToString()
            complete = sync_pb2.SessionComplete(
                cursor=cursor_at(identity, download.head), version=download.head.version
            )
            yield sync_pb2.DownloadSnapshotsResponse(complete=complete).SerializeToString()
        except Exception as error:  # noqa: BLE001 - becomes the status of the call
            await _abort(context, error)

    async def _read_ahead(self, pages: Iterator[sync_pb2.SnapshotPage]) -> AsyncIterator[bytes]:
        """Yield serialized pages; while one is being sent, the next is read."""

        def read() -> bytes | None:
            page = next(pages, None)
            return None if page is None else page.SerializeToString()

        loop = asyncio.get_running_loop()
        coming = loop.run_in_executor(self._pool, read)
        while (page := await coming) is not None:
            coming = loop.run_in_executor(self._pool, read)
            yield page

    # --- FailureService -------------------------------------------------------

    async def _list_failures(self, data: bytes, principal: Principal) -> failure_pb2.ListFailuresResponse:
        request = _parsed(failure_pb2.ListFailuresRequest, data)
        limit = _page_size(request.page_size)
        replica_id = str(uuid_utils.UUID(bytes=parse_replica_id(request.replica_id))) if request.replica_id else ""
        after = _uuid_bytes(request.page_token, "a page token") if request.page_token else b""

        def read() -> failure_pb2.ListFailuresResponse:
            response = failure_pb2.ListFailuresResponse()
            with self._store.read(principal.tenant) as reader:
                # What is filtered out is read too: a page of the scan per page of the answer bounds both.
                found = reader.failures(after, limit, _limits.PAGE_BYTES_MAX)
            for _id, record in found:
                failure = failure_pb2.SynchronizationFailure.FromString(record)
                if failure.user_id == principal.user_id and replica_id in ("", failure.replica_id):
                    response.failures.append(_for_people(failure))
            if found:
                response.next_page_token = str(uuid_utils.UUID(bytes=found[-1][0]))
            return response

        return await self._in_pool(read)

    async def _get_failure(self, data: bytes, principal: Principal) -> failure_pb2.GetFailureResponse:
        request = _parsed(failure_pb2.GetFailureRequest, data)
        failure_id = _uuid_bytes(request.id, "a failure id")

        def read() -> bytes | None:
            with self._store.read(principal.tenant) as reader:
                return reader.failure(failure_id)

        record = await self._in_pool(read)
        failure = failure_pb2.SynchronizationFailure.FromString(record or b"")
        if record is None or failure.user_id != principal.user_id:
            raise NotFound(f"there is no failure {request.id}", reason="FAILURE_NOT_FOUND")
        return failure_pb2.GetFailureResponse(failure=_for_people(failure))

    # --- ObjectService --------------------------------------------------------

    async def _get_object(self, data: bytes, principal: Principal) -> object_pb2.GetObjectResponse:
        request = _parsed(object_pb2.GetObjectRequest, data)
        check_name(request.entity, "an entity name")
        check_id(request.id)
        key = (request.entity, request.id)

        def read() -> ObjectState | None:
            with self._store.read(principal.tenant) as reader:
                return reader.objects((key,)).get(key)

        state = await self._in_pool(read)
        if state is None or state.deleted:
            raise NotFound(f"there is no {request.entity} {request.id!r}", reason="OBJECT_NOT_FOUND")
        return object_pb2.GetObjectResponse(object=_snapshot(request.entity, request.id, state))

    async def _list_objects(self, data: bytes, principal: Principal) -> object_pb2.ListObjectsResponse:
        request = _parsed(object_pb2.ListObjectsRequest, data)
        check_name(request.entity, "an entity name")
        if request.page_token:
            check_id(request.page_token)
        limit = _page_size(request.page_size)
        where = constraint_from_message(request.where) if request.HasField("where") else None

        def read() -> object_pb2.ListObjectsResponse:
            response = object_pb2.ListObjectsResponse()
            position = request.page_token
            with self._store.read(principal.tenant) as reader:
                objects, has_more = reader.entity_objects(
                    request.entity, position, LIST_PAGE_MAX, _limits.PAGE_BYTES_MAX
                )
            for (entity, id_), state in objects:
                if len(response.objects) == limit:
                    response.next_page_token = position
                    return response
                position = id_
                if not state.deleted and (where is None or where.matches(decode_trusted(state.attributes))):
                    response.objects.append(_snapshot(entity, id_, state))
            if has_more:
                response.next_page_token = position
            return response

        return await self._in_pool(read)

    async def _in_pool(self, read: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, read)


# What the reader of a session hands to its writer: the results to come of a batch, an error, or the end.
_Answer = Future[list[Result]] | Exception | None


async def _received_start(requests: AsyncIterator[bytes]) -> sync_pb2.SessionStart:
    async for data in requests:
        request = _parsed(splice_pb2.SynchronizeRequestSplice, data)
        if request.WhichOneof("message") != "start":
            break
        return _parsed(sync_pb2.SessionStart, request.start)
    raise RequestInvalid("a session begins with `start`")


async def _read_uploads(requests: AsyncIterator[bytes], session: Session, answers: asyncio.Queue[_Answer]) -> None:
    """Submit the batches as they come; what comes of them is awaited by whoever reads *answers*."""
    try:
        async for data in requests:
            request = _parsed(splice_pb2.SynchronizeRequestSplice, data)
            which = request.WhichOneof("message")
            if which == "batch":
                operations = list(request.batch.operations)
                _check_batch(operations)
                await answers.put(session.upload(operations))
            elif which == "selection":
                session.select(_parsed(sync_pb2.Selection, request.selection))
            elif which == "upload_complete":
                await answers.put(None)
                return
            else:
                raise RequestInvalid(f"`{which}` came where a batch or `upload_complete` was expected")
        raise RequestInvalid("the stream ended before `upload_complete`")
    except Exception as error:  # noqa: BLE001 - the session raises it in its place among the answers
        await answers.put(error)


def _check_batch(operations: list[bytes]) -> None:
    if len(operations) > _limits.GROUP_OPERATIONS_MAX:
        raise RequestInvalid(
            f"a batch of {len(operations)} operations: at most {_limits.BATCH_OPERATIONS_MAX}, or one commit group"
        )


async def _abort(context: grpc.aio.ServicerContext[bytes, bytes], error: Exception) -> NoReturn:
    """End the call with the error's status, and `ErrorInfo` for programs."""
    code, reason, message = status_of(error)
    if code is grpc.StatusCode.INTERNAL or isinstance(error, StorageError):
        _log.error("call failed", reason=reason, exc_info=error)
    else:
        _log.info("call refused", reason=reason, detail=message)
    detail = AnyMessage()
    detail.Pack(ErrorInfo(domain=ERROR_DOMAIN, reason=reason))
    number = Code.Value(code.name)
    status = rpc_status.to_status(RpcStatus(code=number, message=message, details=[detail]))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort does not return")


def _parsed(kind: type[_M], data: bytes) -> _M:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RequestInvalid(f"the bytes are no {kind.DESCRIPTOR.name}") from error


def _page_size(requested: int) -> int:
    if requested < 0:
        raise RequestInvalid(f"a page size of {requested}")
    return min(requested or LIST_PAGE_DEFAULT, LIST_PAGE_MAX)


def _uuid_bytes(text: str, what: str) -> bytes:
    try:
        return uuid_utils.UUID(text).bytes
    except ValueError:
        raise RequestInvalid(f"{what} is a UUID, got {text[:60]!r}") from None


def _snapshot(entity: str, id_: str, state: ObjectState) -> operation_pb2.Snapshot:
    return operation_pb2.Snapshot(entity=entity, id=id_, version=state.version, attributes=state.attributes)


def _for_people(failure: failure_pb2.SynchronizationFailure) -> failure_pb2.SynchronizationFailure:
    if len(failure.operation) > JSON_OPERATION_BYTES_MAX:
        return failure  # with its JSON it might not fit a message
    try:
        failure.operation_json = as_json(operation_as_data(decode_operation(failure.operation)))
    except InvalidValue:
        failure.operation_json = ""
    return failure
