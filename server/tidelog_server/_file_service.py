"""FileService: contents of files over gRPC. See `_files` for what is done, and for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

from tidelog._limits import FILES_STAT_MAX
from tidelog._values import check_id, check_name
from tidelog.v1 import file_pb2
from tidelog_server._errors import RequestInvalid
from tidelog_server._file_questions import FileQuestions
from tidelog_server._files import Files, Standing, Wanted
from tidelog_server._incoming import Incoming
from tidelog_server._peer import Peer
from tidelog_server._principal import Principal
from tidelog_server._requests import parsed

# They wait for disks, or for an object store. Chunks do not wait behind contents that are being made of
# what came, which takes the longer the larger they are.
FILE_THREADS: Final = 8
# What a download sends at a time. Of a message that has not come whole a client has nothing: on a slow path it would
# not get ahead with large ones, and pay for the same bytes again and again.
DOWNLOAD_CHUNK_BYTES: Final = 32 * 1024

UPLOADER_CHARS_MAX: Final = 36

T = TypeVar("T")


class FileService:
    """The methods of the service: messages of a principal in, messages out."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._pool = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="tidelog-files")
        self._completing = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="tidelog-files-completed")
        self._questions = FileQuestions()

    def close(self) -> None:
        """Let what is under way end."""
        for pool in (self._pool, self._completing):
            pool.shutdown(wait=True, cancel_futures=True)
        self._questions.close()

    async def stat_files(self, data: bytes, principal: Principal) -> file_pb2.StatFilesResponse:
        """Tell how contents stand."""
        request = parsed(file_pb2.StatFilesRequest, data)
        if not 1 <= len(request.contents) <= FILES_STAT_MAX:
            raise RequestInvalid(f"{len(request.contents)} contents: 1 to {FILES_STAT_MAX} are asked about at once")
        wanted = [_wanted(content) for content in request.contents]
        standings = await self._questions.ask(principal, partial(self._files.stat, principal, wanted))
        return file_pb2.StatFilesResponse(statuses=map(_status, standings), room_bytes=self._files.room_bytes or 0)

    async def upload_file(self, peer: Peer, principal: Principal) -> file_pb2.UploadFileResponse:
        """Upload a content."""
        start = (await _received(peer, "start")).start
        wanted = _wanted(start.content)
        if len(start.uploader) > UPLOADER_CHARS_MAX:
            raise RequestInvalid(
                f"an uploader of {len(start.uploader)} characters: it has {UPLOADER_CHARS_MAX} at most"
            )
        begun = self._pool.submit(self._files.begin_upload, principal, wanted, start.offset, start.uploader)
        try:
            incoming = await asyncio.wrap_future(begun)
            while not incoming.is_whole:
                chunk = (await _received(peer, "chunk")).chunk
                await self._pooled(incoming.append, chunk)
            await _run(self._completing, incoming.complete)
        finally:
            # Behind what may still be under way of it, should the client be gone.
            begun.add_done_callback(self._leave)
        return file_pb2.UploadFileResponse()

    async def download_file(self, data: bytes, peer: Peer, principal: Principal) -> None:
        """Download a content."""
        request = parsed(file_pb2.DownloadFileRequest, data)
        Wanted(request.sha256, 0).check()
        key = (request.object.entity, request.object.id)
        check_name(key[0], "an entity name")
        check_id(key[1])
        pieces = await self._pooled(
            self._files.download, principal, request.sha256, key, request.offset, request.length
        )
        try:
            while (piece := await self._pooled(_next, pieces)) is not None:
                for first in range(0, len(piece), DOWNLOAD_CHUNK_BYTES):
                    chunk = piece[first : first + DOWNLOAD_CHUNK_BYTES]
                    await peer.send(file_pb2.DownloadFileResponse(chunk=chunk).SerializeToString())
        finally:
            with suppress(RuntimeError):
                self._pool.submit(pieces.close)

    def _leave(self, begun: Future[Incoming]) -> None:
        if not begun.cancelled() and begun.exception() is None:
            with suppress(RuntimeError):  # the server stops
                self._completing.submit(begun.result().leave)

    async def _pooled(self, function: Callable[..., T], *arguments: object) -> T:
        return await _run(self._pool, function, *arguments)


async def _run(pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


async def _received(peer: Peer, which: str) -> file_pb2.UploadFileRequest:
    """Return the next message of an upload, which is to be of one kind."""
    data = await peer.receive()
    if data is None:
        raise RequestInvalid(f"the upload ended where `{which}` was expected")
    request = parsed(file_pb2.UploadFileRequest, data)
    if request.WhichOneof("message") != which:
        raise RequestInvalid(f"`{request.WhichOneof('message')}` came where `{which}` was expected")
    return request


def _next(pieces: Iterator[bytes]) -> bytes | None:
    return next(pieces, None)


def _wanted(content: file_pb2.FileContent) -> Wanted:
    wanted = Wanted(content.sha256, content.size)
    wanted.check()
    return wanted


def _status(standing: Standing) -> file_pb2.FileStatus:
    if standing.is_present:
        state = file_pb2.FILE_STATE_PRESENT
    elif standing.is_too_large:
        state = file_pb2.FILE_STATE_TOO_LARGE
    else:
        state = file_pb2.FILE_STATE_MISSING
    return file_pb2.FileStatus(state=state, received_bytes=standing.received_bytes, takes_room=standing.takes_room)
