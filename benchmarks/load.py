"""
Load: a server with many sessions, and what that costs it and those who go on.

The server is a process of its own, so that its memory is its own; so are the visitors,
whose sessions are made by hand, and a replica that goes on working. Each figure of a
situation stands beside the same of the server when it was warm and alone, measured in
the same run.
"""

from __future__ import annotations

import itertools
import queue
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.children import Child, status_bytes
from benchmarks.workers import ReplicaWorker, ServerWorker
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_client import Replica
from tidelog_server import ServerLimits

STORE_OBJECTS: Final = 20_000
WARM_SESSIONS: Final = 300
PINGS: Final = 200
OTHERS: Final = 100
# The usual map is so large that a process has addresses for a hundred of them only.
CROWD_MAP_BYTES: Final = 16 * 1024 * 1024
STORM_PLACES: Final = 50
SETTLE_SECONDS: Final = 5.0
VISITOR_PROCESSES: Final = 2
# A page of one after the other, in each process.
SLOW_SECONDS: Final = 0.02
STANDING_STILL_ONE_IN: Final = 5

_SYNCHRONIZE: Final = "/tidelog.v1.SyncService/Synchronize"
_COMPLETE: Final = splice_pb2.SynchronizeRequestSplice(upload_complete=b"").SerializeToString()
# A connection for each, on which nothing is taken ahead of what the visitor reads.
_OWN_CONNECTION: Final = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 * 1024),
)


class Situation(NamedTuple):
    """
    A server in a situation.

    Attributes:
        name: The situation.
        own_bytes: Memory of the server's process without pages of files.
        files: Files, and connections, that it has open.
        store_bytes: Size of the store's file.
        seconds: How long synchronizations of a replica take that has a change to send: median and most.
        ping_seconds: How long health checks take: median and most.
    """

    name: str
    own_bytes: int
    files: int
    store_bytes: int
    seconds: tuple[float, float]
    ping_seconds: tuple[float, float]


class Storm(NamedTuple):
    """
    How a crowd was served that came at once.

    Attributes:
        clients: How many came.
        places: How many sessions the server had places for.
        put_off: How often one was told to come again.
        seconds: How long they took, sorted.
        failed: How many got an error.
    """

    clients: int
    places: int
    put_off: int
    seconds: list[float]
    failed: int


class VisitorsWorker:
    """Sessions by hand, each over a connection of its own."""

    def __init__(self, address: str, first: int) -> None:
        self._address = address
        self._number = first
        self._open: list[tuple[grpc.Channel, Any, queue.SimpleQueue[bytes | None]]] = []
        self._reader: threading.Thread | None = None
        self._is_over = threading.Event()

    def read_slowly(self, count: int) -> None:
        """Begin downloads, and read a page of one of them now and then; of one in so many nothing at all."""
        for _ in range(count):
            self._begin(_COMPLETE)
        calls = [call for number, (_, call, _) in enumerate(self._open) if number % STANDING_STILL_ONE_IN]

        def read() -> None:
            for call in itertools.cycle(calls):
                if self._is_over.wait(SLOW_SECONDS):
                    return
                with suppress(StopIteration, grpc.RpcError):
                    next(call)

        self._reader = threading.Thread(target=read)
        self._reader.start()

    def come_and_go(self, count: int) -> None:
        """Begin sessions and cut them, one after the other."""
        for number in range(count):
            self._begin(*((_COMPLETE,) if number % 2 else ()))
            self.close()

    def close(self) -> None:
        self._is_over.set()
        for channel, call, requests in self._open:
            requests.put(None)
            call.cancel()
            channel.close()
        self._open.clear()
        if self._reader is not None:
            self._reader.join()

    def _begin(self, *messages: bytes) -> None:
        self._number += 1
        start = sync_pb2.SessionStart(
            protocol_version=1,
            replica_id=f"00000000-0000-4000-8000-{self._number:012d}",
            mode=sync_pb2.SYNCHRONIZE_MODE_ALL,
        )
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for message in (
            splice_pb2.SynchronizeRequestSplice(start=start.SerializeToString()).SerializeToString(),
            *messages,
        ):
            requests.put(message)
        channel = grpc.insecure_channel(self._address, options=_OWN_CONNECTION)
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_SYNCHRONIZE)
        call: Any = method(iter(requests.get, None))
        self._open.append((channel, call, requests))
        next(call)


class CrowdWorker:
    """Replicas that synchronize at the same moment."""

    def __init__(self, folder: str, address: str, first: int, count: int) -> None:
        self._replicas = [
            Replica(f"{folder}/{number}", server=address, durability="relaxed", map_bytes=CROWD_MAP_BYTES)
            for number in range(first, first + count)
        ]
        for replica in self._replicas:
            replica.create("Task", {"title": "x" * 100})

    def arrive(self) -> tuple[list[float], int]:
        """Return how long each one took that completed, and how many did not."""
        with ThreadPoolExecutor(len(self._replicas)) as pool:
            took = list(pool.map(_timed, self._replicas))
        return [seconds for seconds in took if seconds is not None], took.count(None)

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()


def _timed(replica: Replica) -> float | None:
    began = time.perf_counter()
    with suppress(Exception):
        if replica.synchronize_all().applied == 1:
            return time.perf_counter() - began
    return None


def measure_situations(folder: Path, readers: int, reconnects: int) -> Iterator[Situation]:
    """Measure a server that is warm, with readers that are slow, when they have left, and after reconnects."""
    limits = ServerLimits(sessions=readers + OTHERS)
    with Child(ServerWorker, str(folder / "store"), None, limits) as server:
        address = server.call("address")
        with Child(ReplicaWorker, str(folder / "writer"), address) as writer:
            writer.call("create", 0, STORE_OBJECTS, 1_000)
            writer.call("synchronize")
            measure = _Measure(folder, server, writer, address)
            with Child(VisitorsWorker, address, 0) as visitors:
                visitors.call("come_and_go", WARM_SESSIONS)
            yield measure.situation("warm")
            crowd = [Child(VisitorsWorker, address, 10_000 * number) for number in range(1, VISITOR_PROCESSES + 1)]
            try:
                for child in crowd:
                    child.call("read_slowly", readers // VISITOR_PROCESSES)
                yield measure.situation(f"{readers:,} read slowly")
            finally:
                for child in crowd:
                    child.__exit__(None, None, None)
            yield measure.situation("they have left")
            with Child(VisitorsWorker, address, 900_000) as visitors:
                visitors.call("come_and_go", reconnects)
            yield measure.situation(f"{reconnects:,} came and went")


def measure_storm(folder: Path, clients: int) -> Storm:
    """Let replicas come at once to a server that has places for a few of them."""
    with Child(ServerWorker, str(folder / "stormed"), None, ServerLimits(sessions=STORM_PLACES)) as server:
        address, each = server.call("address"), clients // VISITOR_PROCESSES
        crowds = [
            Child(CrowdWorker, str(folder / "crowd"), address, number * each, each)
            for number in range(VISITOR_PROCESSES)
        ]
        try:
            with ThreadPoolExecutor(len(crowds)) as pool:
                came = list(pool.map(lambda crowd: crowd.call("arrive"), crowds))
        finally:
            for crowd in crowds:
                crowd.__exit__(None, None, None)
        put_off = server.call("put_off_count")
    seconds = sorted(seconds for one, _failed in came for seconds in one)
    return Storm(each * len(crowds), STORM_PLACES, put_off, seconds, sum(failed for _one, failed in came))


def measure_pings(folder: Path, operations: int) -> tuple[list[float], list[float]]:
    """Return how long health checks take, sorted: of a server at rest, and of one that takes an upload."""
    with Child(ServerWorker, str(folder / "pinged")) as server:
        address = server.call("address")
        with Child(ReplicaWorker, str(folder / "busy"), address) as writer:
            writer.call("create", 0, operations, 1_000)
            alone = sorted(_pings(address, PINGS))
            with ThreadPoolExecutor(1) as pool:
                going = pool.submit(writer.call, "synchronize")
                beside = []
                while not going.done():
                    beside += _pings(address, 1)
                going.result()
    return alone, sorted(beside)


class _Measure:
    def __init__(self, folder: Path, server: Child[ServerWorker], writer: Child[ReplicaWorker], address: str) -> None:
        self._store = folder / "store" / "data.mdb"
        self._process = Path(f"/proc/{server.pid}")
        self._writer = writer
        self._address = address
        self._written = STORE_OBJECTS

    def situation(self, name: str) -> Situation:
        time.sleep(SETTLE_SECONDS)  # what was set off comes to its end
        seconds = sorted(self._synchronize() for _ in range(50))
        pings = sorted(_pings(self._address, PINGS))
        return Situation(
            name,
            status_bytes(self._process / "status", "RssAnon"),
            len(list((self._process / "fd").iterdir())),
            self._store.stat().st_size,
            (statistics.median(seconds), seconds[-1]),
            (statistics.median(pings), pings[-1]),
        )

    def _synchronize(self) -> float:
        self._writer.call("create", self._written, self._written + 1, 1)
        self._written += 1
        return float(self._writer.call("synchronize").seconds)


def _pings(address: str, count: int) -> list[float]:
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest())  # connects
        took = []
        for _ in range(count):
            began = time.perf_counter()
            stub.Check(health_pb2.HealthCheckRequest())
            took.append(time.perf_counter() - began)
    return took
