"""
The bare pipe: what the parts can do if nothing is checked.

A client reads records from LMDB and sends them over one gRPC stream in batches; a
server writes them to LMDB, one sync to disk for each batch, and answers each batch.
In the other direction the server reads and the client writes. A batch is a MessagePack
array of the records as they are; they are stored under the number of their arrival.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final

import grpc
import lmdb
import msgpack

from benchmarks.work import Stopwatch, Work

BATCH_RECORDS: Final = 500
BATCHES_IN_FLIGHT: Final = 4
MAP_BYTES: Final = 64 * 1024**3

_UPLOAD: Final = "Upload"
_DOWNLOAD: Final = "Download"
_number = struct.Struct(">Q").pack


class PipeServer:
    """The server's end, with its records in *folder*."""

    def __init__(self, folder: str) -> None:
        self._records = Records(folder)
        self._grpc = grpc.server(ThreadPoolExecutor(1))
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            _UPLOAD: grpc.stream_stream_rpc_method_handler(self._take),
            _DOWNLOAD: grpc.unary_stream_rpc_method_handler(self._give),
        }
        self._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Pipe", handlers),))
        self._port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()

    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def count(self) -> int:
        return self._records.count()

    def close(self) -> None:
        self._grpc.stop(None).wait()
        self._records.close()

    def _take(self, requests: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in requests:
            self._records.append(msgpack.unpackb(message))
            yield b"\1"

    def _give(self, _request: bytes, _context: grpc.ServicerContext) -> Iterator[bytes]:
        return map(_packed, self._records.batches())


class PipeClient:
    """The client's end, with its records in *folder*."""

    def __init__(self, folder: str, address: str) -> None:
        self._records = Records(folder)
        self._channel = grpc.insecure_channel(address)

    def connect(self) -> None:
        grpc.channel_ready_future(self._channel).result()

    def upload(self) -> Work:
        """Send all records; at the most so many batches are unanswered at a time."""
        sent_bytes = received_bytes = 0
        window = threading.Semaphore(BATCHES_IN_FLIGHT)

        def messages() -> Iterator[bytes]:
            nonlocal sent_bytes
            for batch in self._records.batches():
                window.acquire()
                message = _packed(batch)
                sent_bytes += len(message)
                yield message

        call: grpc.StreamStreamMultiCallable[bytes, bytes]
        call = self._channel.stream_stream(f"/bare.Pipe/{_UPLOAD}")
        with Stopwatch() as stopwatch:
            for answer in call(messages()):
                received_bytes += len(answer)
                window.release()
        return Work(self._records.count(), stopwatch.seconds, stopwatch.cpu_seconds, sent_bytes, received_bytes)

    def download(self) -> Work:
        """Take all records, into a folder that is empty."""
        received_bytes = 0
        call: grpc.UnaryStreamMultiCallable[bytes, bytes]
        call = self._channel.unary_stream(f"/bare.Pipe/{_DOWNLOAD}")
        with Stopwatch() as stopwatch:
            for message in call(b""):
                received_bytes += len(message)
                self._records.append(msgpack.unpackb(message))
        return Work(self._records.count(), stopwatch.seconds, stopwatch.cpu_seconds, 0, received_bytes)

    def close(self) -> None:
        self._channel.close()
        self._records.close()


class BareLog:
    """Records that are only appended to LMDB, without a server."""

    def __init__(self, folder: str, source: str) -> None:
        self._records = Records(folder)
        self._source = Records(source)

    def append(self, first: int, last: int, per_transaction: int) -> Work:
        """Append the source's records from *first* to before *last*, so many in each transaction."""
        records = islice((one for batch in self._source.batches() for one in batch), first, last)
        stopwatch = Stopwatch()
        while batch := list(islice(records, per_transaction)):
            with stopwatch:
                self._records.append(batch)
        return Work(last - first, stopwatch.seconds, stopwatch.cpu_seconds)

    def close(self) -> None:
        self._records.close()
        self._source.close()


class Records:
    """Numbered records in an LMDB environment; each append is on disk when it returns."""

    def __init__(self, folder: str) -> None:
        self._lmdb = lmdb.open(folder, map_size=MAP_BYTES, max_dbs=0)
        self._next = self.count()

    def append(self, records: list[bytes]) -> None:
        first = self._next
        self._next += len(records)
        keys = map(_number, range(first, self._next))
        with self._lmdb.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(zip(keys, records, strict=True), append=True)

    def batches(self) -> Iterator[list[bytes]]:
        with self._lmdb.begin() as transaction, transaction.cursor() as cursor:
            values = cursor.iternext(keys=False)
            while batch := list(islice(values, BATCH_RECORDS)):
                yield batch

    def count(self) -> int:
        return int(self._lmdb.stat()["entries"])

    def close(self) -> None:
        self._lmdb.close()


def copy_records(replica: str, database: str, target: str, *, step: int = 1, with_keys: bool = False) -> None:
    """Copy each *step*-th record of a database of a replica as it is, *with_keys* in front or without."""
    records = Records(target)
    with (
        lmdb.open(replica, readonly=True, max_dbs=1, lock=False) as source,
        source.begin(db=source.open_db(database.encode(), create=False)) as transaction,
        transaction.cursor() as cursor,
    ):
        entries = islice(cursor, 0, None, step)
        while batch := [key + value if with_keys else value for key, value in islice(entries, BATCH_RECORDS)]:
            records.append(batch)
    records.close()


def _packed(records: list[bytes]) -> bytes:
    return msgpack.packb(records)  # type: ignore[no-any-return]
