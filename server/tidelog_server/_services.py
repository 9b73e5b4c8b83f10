"""
The gRPC services: messages in, messages out, nothing decided.

Requests of `SyncService` are taken as bytes and read with the mirror messages, so
that operations stay serialized on their way to the engine. Jobs run on the store's
writer thread, whatever reads the store in small pools; the event loop waits for neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus
from grpc_status import rpc_status

from tidelog import _limits
from tidelog._clock import Clock
from tidelog._contents import SHA256_BYTES
from tidelog._errors import StorageError
from tidelog._logging import get_logger
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_server._admission import Admission, ServerLimits
from tidelog_server._application import Application
from tidelog_server._attempts import Suspects
from tidelog_server._callers import Callers
from tidelog_server._calls import let_go
from tidelog_server._download import Download, Start, cursor_at
from tidelog_server._errors import NothingRead, RequestInvalid, ServerBusy, ServerOutdated, StoreUnavailable
from tidelog_server._failure_service import FailureService
from tidelog_server._file_service import FileService
from tidelog_server._files import Files
from tidelog_server._object_service import ObjectService
from tidelog_server._outcomes import Result, Status, Uploader
from tidelog_server._peer import Peer
from tidelog_server._principal import Principal
from tidelog_server._projection import Projection
from tidelog_server._records import ReplicaState
from tidelog_server._requests import parsed
from tidelog_server._room import HeldPages, PageRoom, QueueRoom
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
from tidelog_server._slow_links import SlowLinks
from tidelog_server._status import status_of
from tidelog_server._store import Store

ERROR_DOMAIN: Final = "tidelog"
PAGE_THREADS: Final = 4
CALL_THREADS: Final = 2
STANDING_THREADS: Final = 4

_log = get_logger("tidelog.services")


T = TypeVar("T")

_Method: TypeAlias = Callable[[bytes, Principal], Awaitable[Message]]
_Place: TypeAlias = Callable[[], AbstractContextManager[None]]


class Load(NamedTuple):
    """
    What a server has to do at a moment.

    Attributes:
        sessions: Sessions that are open.
        uploads: Those of them that upload.
        calls: Other calls: online reads, work on failures.
        queued_batches: Batches that the store's writer has before it.
        queued_bytes: How large they are.
        waiting_batches: Batches for which there is no room in its queue, one of a session.
        page_bytes: How large the pages are that were read for clients who have not taken them yet.
        waiting_pages: Sessions whose next object is large, and which wait until there is room for it.
        put_off_count: How many were told to come again later, since the start.
        file_transfers: Contents of files that are on their way.
    """

    sessions: int
    uploads: int
    calls: int
    queued_batches: int
    queued_bytes: int
    waiting_batches: int
    page_bytes: int
    waiting_pages: int
    put_off_count: int
    file_transfers: int


class Services:
    """
    All services of one server, over one application and one store.

    Args:
        application: The rules.
        store: The store.
        callers: Tell who is calling.
        limits: How many are served at once. None: as many as `ServerLimits()` says.
        files: The contents of files. None: there is no `FileService`.
        clock: The server's clock.
    """

    def __init__(
        self,
        application: Application,
        store: Store,
        callers: Callers,
        limits: ServerLimits | None = None,
        files: Files | None = None,
        *,
        clock: Clock = server_time_us,
    ) -> None:
        self._application = application
        self._store = store
        self._callers = callers
        self._clock = clock
        self._suspects = Suspects(store)
        self._limits = limits or ServerLimits()
        self._admission = Admission(self._limits)
        self._queue_room = QueueRoom()
        self._page_room = PageRoom()
        self._slow_links = SlowLinks()
        self._failures = FailureService(application, store, clock)
        self._objects = ObjectService(application, store)
        self._files = FileService(files) if files is not None else None
        # Calls have a pool of their own: they must not wait behind the pages of a thousand sessions.
        self._page_pool = ThreadPoolExecutor(PAGE_THREADS, thread_name_prefix="tidelog-pages")
        self._call_pool = ThreadPoolExecutor(CALL_THREADS, thread_name_prefix="tidelog-calls")
        self._standing_pool = ThreadPoolExecutor(STANDING_THREADS, thread_name_prefix="tidelog-standing")
        self._stopping = False

    @property
    def load(self) -> Load:
        """What there is to do now."""
        admission, queue_room = self._admission, self._queue_room
        return Load(
            sessions=admission.sessions.taken,
            uploads=admission.uploads.taken,
            calls=admission.calls.taken,
            queued_batches=queue_room.count,
            queued_bytes=queue_room.bytes,
            waiting_batches=queue_room.waiting,
            page_bytes=self._page_room.bytes,
            waiting_pages=self._page_room.waiting,
            put_off_count=admission.put_off_count,
            file_transfers=admission.file_transfers.taken,
        )

    def stop(self) -> None:
        """Drop what sessions have submitted, when they end, unless it has begun: nobody will be told of it."""
        self._stopping = True

    def close(self) -> None:
        """Let the reads under way end."""
        for pool in (self._page_pool, self._call_pool, self._standing_pool):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._files is not None:
            self._files.close()

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Return the handlers to be added to a gRPC server."""
        call, session = self._admission.call, self._admission.session
        return [
            *self._file_handlers(),
            grpc.method_handlers_generic_handler(
                "tidelog.v1.SyncService",
                {
                    "Synchronize": grpc.stream_stream_rpc_method_handler(self._synchronize),
                    "UploadOperations": self._unary(self._upload_operations, session),
                    "DownloadSnapshots": grpc.unary_stream_rpc_method_handler(self._download_snapshots),
                },
            ),
            grpc.method_handlers_generic_handler(
                "tidelog.v1.FailureService",
                {
                    "ListFailures": self._unary(self._pooled(self._failures.list_failures), call),
                    "GetFailure": self._unary(self._pooled(self._failures.get_failure), call),
                    "RetryFailure": self._unary(self._failures.retry_failure, call),
                    "DismissFailure": self._unary(self._failures.dismiss_failure, call),
                },
            ),
            grpc.method_handlers_generic_handler(
                "tidelog.v1.ObjectService",
                {
                    "GetObject": self._unary(self._pooled(self._objects.get_object), call),
                    "ListObjects": self._unary(self._pooled(self._objects.list_objects), call),
                },
            ),
            grpc.method_handlers_generic_handler(
                "tidelog.v1.SchemaService", {"GetSchema": self._unary(self._pooled(self._objects.get_schema), call)}
            ),
        ]

    def _file_handlers(self) -> list[grpc.GenericRpcHandler]:
        if self._files is None:
            return []
        return [
            grpc.method_handlers_generic_handler(
                "tidelog.v1.FileService",
                {
                    "StatFiles": self._unary(partial(self._stat_files, self._files), self._admission.file_question),
                    "UploadFile": grpc.stream_unary_rpc_method_handler(partial(self._upload_file, self._files)),
                    "DownloadFile": grpc.unary_stream_rpc_method_handler(partial(self._download_file, self._files)),
                },
            )
        ]

    def _pooled(self, method: Callable[[bytes, Principal], Message]) -> _Method:
        """Return a method that reads, as one that does so in the pool."""
        return lambda data, principal: asyncio.get_running_loop().run_in_executor(
            self._call_pool, method, data, principal
        )

    def _unary(self, method: _Method, place: _Place) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def handle(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return await _served(answered(data, context), context)

        async def answered(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            with place():
                response = await method(data, await self._callers.principal_of(context))
            return response.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(handle)

    # --- SyncService ----------------------------------------------------------

    async def _synchronize(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        incoming = cast("AsyncGenerator[bytes, None]", aiter(requests))
        try:
            session = self._session(Peer(context, self._limits.idle_seconds, incoming), context)
            await _served(_streamed(session, context), context)
        finally:
            with suppress(RuntimeError):  # somebody is still reading
                await incoming.aclose()  # else it holds the call until the garbage is collected

    async def _session(self, peer: Peer, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        async with self._admitted(context) as principal:
            start = await _received_start(peer)
            with self._pages_for(principal, start.replica_id) as held:
                session = await self._standing(
                    partial(
                        Session,
                        self._application,
                        self._store,
                        principal,
                        start,
                        self._clock,
                        suspects=self._suspects,
                        page_bytes=held.page_bytes,
                        file_bytes_max=self._limits.file_bytes,
                    )
                )
                with self._admission.upload() if start.uploading else nullcontext():
                    await self._upload_phase(peer, session)
                await self._send_pages(peer, session.pages(), held, lambda page: _response(page=page))
            await peer.send(_response(complete=session.complete().SerializeToString()))

    @asynccontextmanager
    async def _admitted(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[Principal]:
        """Let a session in, and find out whose it is."""
        with self._admission.session():
            principal = await self._callers.principal_of(context)
            with self._admission.session_of(principal):
                yield principal

    async def _upload_phase(self, peer: Peer, session: Session) -> None:
        started = await asyncio.wrap_future(await self._standing(session.open))
        await peer.send(_response(started=started.SerializeToString()))
        answers: asyncio.Queue[_Answer] = asyncio.Queue(_limits.BATCHES_IN_FLIGHT_MAX)
        reading = asyncio.create_task(self._read_uploads(peer, session, answers))
        try:
            while (answer := await answers.get()) is not None:
                if isinstance(answer, BaseException):
                    raise answer
                settled_now = await asyncio.wrap_future(answer)
                results = sync_pb2.BatchResults(checkpoint=await self._standing(session.checkpoint))
                put_results(settled_now, results.results)
                await peer.send(_response(batch_results=results.SerializeToString()))
                peer.owed -= 1
            held = await asyncio.wrap_future(session.settle_held())
        finally:
            reading.cancel()
            if self._stopping:
                session.abandon()
        checkpoint = await self._standing(session.checkpoint) if held else b""
        for settled in settled_messages(held, checkpoint):
            await peer.send(_response(upload_settled=settled.SerializeToString()))

    async def _read_uploads(self, peer: Peer, session: Session, answers: asyncio.Queue[_Answer]) -> None:
        """Submit the batches as they come; what comes of them is awaited by whoever reads *answers*."""
        try:
            while (data := await peer.receive()) is not None:
                request = parsed(splice_pb2.SynchronizeRequestSplice, data)
                which = request.WhichOneof("message")
                if which == "batch":
                    operations = list(request.batch.operations)
                    _check_batch(operations)
                    peer.owed += 1
                    await answers.put(
                        await self._queued(
                            len(data),
                            partial(
                                session.upload,
                                operations,
                                request.batch.former_outcomes,
                                _checked_hashes(request.batch.lost_contents),
                            ),
                        )
                    )
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

    async def _queued(self, size: int, submit: Callable[[], Future[T]]) -> Future[T]:
        """Submit a batch of so many bytes to the store, once there is room for it."""
        room, loop = self._queue_room, asyncio.get_running_loop()
        await room.take(size)
        try:
            submitted = submit()
        except BaseException:
            room.give_back(size)
            raise

        def give_back(_done: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(room.give_back, size)

        submitted.add_done_callback(give_back)
        return submitted

    async def _upload_operations(self, data: bytes, principal: Principal) -> sync_pb2.UploadOperationsResponse:
        request = parsed(splice_pb2.UploadOperationsRequestSplice, data)
        check_protocol_version(request.protocol_version)
        replica = parse_replica_id(request.replica_id)
        operations = list(request.operations)
        _check_batch(operations)
        with self._admission.session_of(principal), self._admission.upload():
            begun: ReplicaState = await asyncio.wrap_future(
                self._store.submit(
                    principal.tenant, lambda reader: begin_upload(reader, replica, principal, self._clock())
                )
            )
            upload = Upload(
                self._application,
                self._store,
                Uploader(
                    replica,
                    principal,
                    begun.session_number,
                    leaves_earlier=request.more_follow,
                    file_bytes_max=self._limits.file_bytes,
                ),
                self._clock,
                suspects=self._suspects,
            )
            submit = partial(upload.submit, operations, lost_contents=_checked_hashes(request.lost_contents))
            first = await self._queued(len(data), submit)
            held = upload.settle_held()  # right behind, in the same group of the writer
            results = await asyncio.wrap_future(first)
            settled = await asyncio.wrap_future(held)
        final = iter(settled)
        merged = [next(final) if result.status == Status.HELD else result for result in results]
        version = await self._standing(partial(self._version, principal.tenant))
        response = sync_pb2.UploadOperationsResponse(version=version)
        put_results(merged, response.results)
        return response

    async def _download_snapshots(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        download = self._download(data, Peer(context, self._limits.idle_seconds), context)
        await _served(_streamed(download, context), context)

    async def _download(self, data: bytes, peer: Peer, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        async with self._admitted(context) as principal:
            request = parsed(sync_pb2.DownloadSnapshotsRequest, data)
            check_protocol_version(request.protocol_version)
            projection = Projection(self._application, principal, wishes_of(request.downloads))
            with self._pages_for(principal) as held:
                download, start = await self._standing(partial(self._begun_download, request, projection, held))
                identity = download.identity
                started = sync_pb2.DownloadStarted(
                    resumed=start.resumed,
                    reconcile=start.reconcile,
                    epoch=identity.epoch,
                    timeline=identity.timeline,
                    entities=projection.plans(self._clock(), start.reconciled),
                )
                if self._application.has_schema:
                    started.schema.CopyFrom(self._application.schema.to_message())
                await peer.send(sync_pb2.DownloadSnapshotsResponse(started=started).SerializeToString())
                await self._send_pages(
                    peer,
                    download.everything_since(start),
                    held,
                    lambda page: splice_pb2.DownloadSnapshotsResponseSplice(page=page).SerializeToString(),
                )
            complete = sync_pb2.SessionComplete(
                cursor=cursor_at(identity, download.head, projection.scope), version=download.head.version
            )
            await peer.send(sync_pb2.DownloadSnapshotsResponse(complete=complete).SerializeToString())

    def _begun_download(
        self, request: sync_pb2.DownloadSnapshotsRequest, projection: Projection, held: HeldPages
    ) -> tuple[Download, Start]:
        download = Download(self._store, projection, page_bytes=held.page_bytes)
        with self._store.read(projection.principal.tenant) as reader:
            return download, download.start_of(reader, request.cursor, request.resume_token)

    def _version(self, tenant: str) -> int:
        with self._store.read(tenant) as reader:
            return reader.head().version

    async def _standing(self, look: Callable[[], T]) -> T:
        """Look where something stands in the store: the event loop waits for none, however far away it is."""
        return await asyncio.get_running_loop().run_in_executor(self._standing_pool, look)

    @contextmanager
    def _pages_for(self, principal: Principal, replica_id: str = "") -> Iterator[HeldPages]:
        """Hold the pages of a session. If the last one came to a halt, the link may be too slow for large pages."""
        slow_links, room = self._slow_links, self._page_room
        with (
            slow_links.session(principal.tenant, principal.user_id, replica_id) as page_bytes_max,
            HeldPages(room, page_bytes_max) as held,
        ):
            yield held

    async def _send_pages(
        self,
        peer: Peer,
        pages: Iterator[sync_pb2.SnapshotPage],
        held: HeldPages,
        response: Callable[[bytes], bytes],
    ) -> None:
        """Send pages; while one is on its way the next is read, if there is room for it."""
        loop = asyncio.get_running_loop()

        def read() -> bytes | None:
            page = next(pages, None)
            if page is None:
                return None
            data = page.SerializeToString()
            del page  # each of them may be large
            return response(data) if data else b""

        async def next_message() -> bytes | None:
            message = await loop.run_in_executor(self._page_pool, read)
            if message:
                held.add(len(message))
            return message

        coming = loop.create_task(next_message())
        try:
            while (message := await coming) is not None:
                is_ahead = False
                if message:
                    is_ahead = held.may_read_ahead
                    if is_ahead:
                        coming = loop.create_task(next_message())
                    await peer.send(message)
                    held.drop()
                else:
                    await held.wait()
                if not is_ahead:
                    del message
                    coming = loop.create_task(next_message())
        finally:
            coming.cancel()

    # --- FileService ----------------------------------------------------------

    async def _upload_file(
        self, files: FileService, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        return await _served(
            self._file_upload(files, Peer(context, self._limits.idle_seconds, requests), context), context
        )

    async def _file_upload(
        self, files: FileService, peer: Peer, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        async with self._admitted_transfer(context) as principal:
            response = await files.upload_file(peer, principal)
        return response.SerializeToString()

    async def _stat_files(self, files: FileService, data: bytes, principal: Principal) -> Message:
        with self._admission.file_question_of(principal):
            return await files.stat_files(data, principal)

    async def _download_file(
        self, files: FileService, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        download = self._file_download(files, data, Peer(context, self._limits.idle_seconds), context)
        await _served(_streamed(download, context), context)

    async def _file_download(
        self, files: FileService, data: bytes, peer: Peer, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        async with self._admitted_transfer(context) as principal:
            await files.download_file(data, peer, principal)

    @asynccontextmanager
    async def _admitted_transfer(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[Principal]:
        """Let a transfer in, and find out whose it is."""
        with self._admission.file_transfer():
            principal = await self._callers.principal_of(context)
            with self._admission.file_transfer_of(principal):
                yield principal


# What the reader of a session hands to its writer: the results to come of a batch, an error, or the end.
_Answer = Future[list[Result]] | Exception | None


def _response(**message: bytes) -> bytes:
    return splice_pb2.SynchronizeResponseSplice(**message).SerializeToString()


async def _received_start(peer: Peer) -> sync_pb2.SessionStart:
    if (data := await peer.receive()) is not None:
        request = parsed(splice_pb2.SynchronizeRequestSplice, data)
        if request.WhichOneof("message") == "start":
            return parsed(sync_pb2.SessionStart, request.start)
    raise RequestInvalid("a session begins with `start`")


def _checked_hashes(hashes: Sequence[bytes]) -> Sequence[bytes]:
    if any(len(one) != SHA256_BYTES for one in hashes):
        raise RequestInvalid(f"a SHA-256 has {SHA256_BYTES} bytes: among the lost contents is something else")
    return hashes


def _check_batch(operations: list[bytes]) -> None:
    if len(operations) > _limits.GROUP_OPERATIONS_MAX:
        raise RequestInvalid(
            f"a batch of {len(operations)} operations: at most {_limits.BATCH_OPERATIONS_MAX}, or one commit group"
        )


async def _served(answer: Coroutine[Any, Any, T], context: grpc.aio.ServicerContext[bytes, bytes]) -> T:
    """Await the answer to a call. An error becomes the status of the call."""
    failed: Exception
    try:
        return await answer
    except Exception as error:  # noqa: BLE001 - whatever it is
        failed = error
    return await _abort(context, failed)


async def _streamed(answer: Coroutine[Any, Any, None], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    """Await the answer to a call that is a stream. If nothing of it is read, the call goes, and all that it holds."""
    try:
        await answer
    except NothingRead as error:
        _log.info("call dropped", detail=str(error))
        status = _status_of(error)
        # No exception: gRPC would keep that, and with it all that led to it.
        context.set_code(status.code)
        context.set_details(status.details)
        context.set_trailing_metadata(status.trailing_metadata)
        let_go()


async def _abort(context: grpc.aio.ServicerContext[bytes, bytes], error: Exception) -> NoReturn:
    """End the call with the error's status, and `ErrorInfo` for programs."""
    code, reason, message = status_of(error)
    status = _status_of(error)
    if isinstance(error, StoreUnavailable | ServerOutdated):
        _log.warning("call refused", reason=reason, detail=str(error))  # it is not here that something is wrong
    elif code is grpc.StatusCode.INTERNAL or isinstance(error, StorageError):
        _log.error("call failed", reason=reason, exc_info=error)
    elif isinstance(error, ServerBusy):
        _log.debug("call refused", reason=reason, detail=message)  # there are many then; admission tells how many
    else:
        _log.info("call refused", reason=reason, detail=message)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort does not return")


def _status_of(error: Exception) -> grpc.Status:
    code, reason, message = status_of(error)
    details: list[Message] = [ErrorInfo(domain=ERROR_DOMAIN, reason=reason)]
    if isinstance(error, ServerBusy):
        delay = Duration()
        delay.FromMicroseconds(int(error.retry_after_seconds * 1_000_000))
        details.append(RetryInfo(retry_delay=delay))
    return rpc_status.to_status(
        RpcStatus(code=Code.Value(code.name), message=message, details=[_packed(one) for one in details])
    )


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
