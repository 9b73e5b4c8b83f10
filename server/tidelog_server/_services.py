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
from typing import Final, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status as RpcStatus
from grpc_status import rpc_status

from tidelog import _limits
from tidelog._errors import StorageError
from tidelog._logging import get_logger
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_server._application import Application
from tidelog_server._callers import Callers
from tidelog_server._download import Download, cursor_at
from tidelog_server._errors import RequestInvalid
from tidelog_server._failure_service import FailureService
from tidelog_server._object_service import ObjectService
from tidelog_server._outcomes import Result, Status, Uploader
from tidelog_server._principal import Principal
from tidelog_server._projection import Projection
from tidelog_server._records import ReplicaState
from tidelog_server._requests import parsed
from tidelog_server._session import (
    Session,
    Upload,
    begin_upload,
    check_protocol_version,
    parse_replica_id,
    put_results,
    server_time_us,
    settled_messages,
    wishes_of,
)
from tidelog_server._status import status_of
from tidelog_server._store import Store

ERROR_DOMAIN: Final = "tidelog"
READ_THREADS: Final = 4

_log = get_logger("tidelog.services")


_Method = Callable[[bytes, Principal], Awaitable[Message]]


class Services:
    """All services of one server, over one application and one store."""

    def __init__(self, application: Application, store: Store, callers: Callers) -> None:
        self._application = application
        self._store = store
        self._callers = callers
        self._failures = FailureService(application, store)
        self._objects = ObjectService(application, store)
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
                {
                    "ListFailures": self._unary(self._pooled(self._failures.list_failures)),
                    "GetFailure": self._unary(self._pooled(self._failures.get_failure)),
                    "RetryFailure": self._unary(self._failures.retry_failure),
                    "DismissFailure": self._unary(self._failures.dismiss_failure),
                },
            ),
            grpc.method_handlers_generic_handler(
                "tidelog.v1.ObjectService",
                {
                    "GetObject": self._unary(self._pooled(self._objects.get_object)),
                    "ListObjects": self._unary(self._pooled(self._objects.list_objects)),
                },
            ),
            grpc.method_handlers_generic_handler(
                "tidelog.v1.SchemaService", {"GetSchema": self._unary(self._pooled(self._objects.get_schema))}
            ),
        ]

    def _pooled(
        self, method: Callable[[bytes, Principal], Message]
    ) -> Callable[[bytes, Principal], Awaitable[Message]]:
        """Return a method that reads, as one that does so in the pool."""
        return lambda data, principal: asyncio.get_running_loop().run_in_executor(self._pool, method, data, principal)

    def _unary(self, method: _Method) -> grpc.RpcMethodHandler[bytes, bytes]:
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
                settled_now = await asyncio.wrap_future(answer)
                results = sync_pb2.BatchResults(checkpoint=session.checkpoint())
                put_results(settled_now, results.results)
                yield splice_pb2.SynchronizeResponseSplice(
                    batch_results=results.SerializeToString()
                ).SerializeToString()
            held = await asyncio.wrap_future(session.settle_held())
            for settled in settled_messages(held, session.checkpoint() if held else b""):
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
        request = parsed(splice_pb2.UploadOperationsRequestSplice, data)
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
            request = parsed(sync_pb2.DownloadSnapshotsRequest, data)
            check_protocol_version(request.protocol_version)
            identity = self._store.identity
            projection = Projection(self._application, principal, wishes_of(request.downloads))
            download = Download(self._store, projection)
            with self._store.read(principal.tenant) as reader:
                start = download.start_of(reader, request.cursor, request.resume_token)
            started = sync_pb2.DownloadStarted(
                resumed=start.resumed,
                reconcile=start.reconcile,
                epoch=identity.epoch,
                timeline=identity.timeline,
                entities=projection.plans(server_time_us(), start.reconciled),
            )
            if self._application.has_schema:
                started.schema.CopyFrom(self._application.schema.to_message())
            yield sync_pb2.DownloadSnapshotsResponse(started=started).SerializeToString()
            async for page in self._read_ahead(download.everything_since(start)):
                yield splice_pb2.DownloadSnapshotsResponseSplice(page=page).SerializeToString()
            complete = sync_pb2.SessionComplete(
                cursor=cursor_at(identity, download.head, projection.scope), version=download.head.version
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


# What the reader of a session hands to its writer: the results to come of a batch, an error, or the end.
_Answer = Future[list[Result]] | Exception | None


async def _received_start(requests: AsyncIterator[bytes]) -> sync_pb2.SessionStart:
    async for data in requests:
        request = parsed(splice_pb2.SynchronizeRequestSplice, data)
        if request.WhichOneof("message") != "start":
            break
        return parsed(sync_pb2.SessionStart, request.start)
    raise RequestInvalid("a session begins with `start`")


async def _read_uploads(requests: AsyncIterator[bytes], session: Session, answers: asyncio.Queue[_Answer]) -> None:
    """Submit the batches as they come; what comes of them is awaited by whoever reads *answers*."""
    try:
        async for data in requests:
            request = parsed(splice_pb2.SynchronizeRequestSplice, data)
            which = request.WhichOneof("message")
            if which == "batch":
                operations = list(request.batch.operations)
                _check_batch(operations)
                await answers.put(session.upload(operations, request.batch.former_outcomes))
            elif which == "selection":
                session.select(parsed(sync_pb2.Selection, request.selection))
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
