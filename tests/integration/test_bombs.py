"""
Messages that are small on their way and large when they are unpacked, in either direction.

Who gets one is a process of its own, whose memory is looked at.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from tests.builders import contents

from tidelog import ServerUnavailable
from tidelog_client import Replica
from tidelog_server import Application, Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak memory of one process"),
]

BOMB: Final = bytes(128 * 1024 * 1024)
# What gRPC and Python may take besides: buffers of the connection, several messages as large as they may be.
GROWTH_BYTES_MAX: Final = len(BOMB) // 4
COMPRESSIONS: Final = [grpc.Compression.Gzip, grpc.Compression.Deflate]
OPTIONS: Final = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
STREAMED: Final = ["SyncService/Synchronize", "FileService/UploadFile"]
PLAIN: Final = [
    "SyncService/UploadOperations",
    "SyncService/DownloadSnapshots",
    "SchemaService/GetSchema",
    "ObjectService/GetObject",
    "ObjectService/ListObjects",
    "FailureService/ListFailures",
    "FailureService/GetFailure",
    "FailureService/RetryFailure",
    "FailureService/DismissFailure",
    "FileService/StatFiles",
    "FileService/DownloadFile",
]

_PEAK: Final = """
import sys
def peak():
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], flush=True)
"""
_SERVER: Final = """
from tidelog_server import Application, Server
with Server(Application(), store=sys.argv[1]) as server:
    print(server.address, flush=True)
    for _ in sys.stdin:
        peak()
"""
_REPLICA: Final = """
from tidelog import TidelogError
from tidelog_client import Replica
print("ready", flush=True)
for address in sys.stdin:
    with Replica(sys.argv[1], server=address.strip()) as replica:
        try:
            replica.synchronize_all(timeout=3)
            print("done")
        except TidelogError as error:
            print(type(error).__name__)
        peak()
"""


class Process:
    """A process of the product, which says how much memory it had at the most."""

    def __init__(self, code: str, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PEAK + code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.first_line = self._line()

    def peak_bytes(self) -> int:
        """Return how much memory it has had at the most."""
        self._tell("")
        return int(self._line()) * 1024

    def synchronize(self, address: str) -> tuple[str, int]:
        """Let a replica synchronize; return what came of it, and the memory."""
        self._tell(address)
        return self._line(), int(self._line()) * 1024

    def end(self) -> None:
        """End it."""
        with suppress(BrokenPipeError):
            self._process.communicate(timeout=30)

    def _tell(self, order: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def process(code: str, path: Path) -> Iterator[Process]:
    """Give a process, and end it."""
    found = Process(code, path)
    try:
        yield found
    finally:
        found.end()


def send(channel: grpc.Channel, method: str, message: bytes) -> Any:
    """Send a message, and return what a server answers. Raises RpcError."""
    call: Any
    path = f"/tidelog.v1.{method}"
    if method in STREAMED:
        call = channel.stream_stream(path)
        return next(call(iter([message]), timeout=60), None)
    call = channel.unary_stream(path)
    return next(call(message, timeout=60), None)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_server_gets_bombs(tmp_path: Path, compression: grpc.Compression) -> None:
    """Each call refuses a message that is unpacked beyond the limit, in a memory that does not follow it."""
    with (
        process(_SERVER, tmp_path / "server") as server,
        Replica(tmp_path / "replica", server=server.first_line) as replica,
    ):
        replica.create("Task", {"n": 1}, "t1")
        replica.synchronize_all()
        before = server.peak_bytes()
        with grpc.insecure_channel(server.first_line, options=OPTIONS, compression=compression) as channel:
            for method in (*STREAMED, *PLAIN):
                with pytest.raises(grpc.RpcError) as caught:
                    send(channel, method, BOMB)
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, method
                assert "larger than max" in (caught.value.details() or ""), method

        assert server.peak_bytes() - before < GROWTH_BYTES_MAX
        replica.update("Task", "t1", {"n": 2})
        assert replica.synchronize_all().applied == 1


class Bombs(grpc.GenericRpcHandler):
    """Answers each call with a bomb, as far as the caller takes it."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return what answers a call."""
        self.called.append(handler_call_details.method)
        if handler_call_details.method.endswith(("Synchronize", "DownloadFile", "DownloadSnapshots")):
            return grpc.stream_stream_rpc_method_handler(lambda _messages, _context: iter([BOMB]))
        return grpc.stream_unary_rpc_method_handler(lambda _messages, _context: BOMB)


@contextmanager
def hostile_server(compression: grpc.Compression) -> Iterator[tuple[str, Bombs]]:
    """Give the address of a server that answers with bombs, and what it was asked."""
    bombs = Bombs()
    with ThreadPoolExecutor() as pool:
        server = grpc.server(pool, handlers=[bombs], options=OPTIONS, compression=compression)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}", bombs
        finally:
            server.stop(0).wait()


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("has_file", [False, True])
def test_a_replica_gets_bombs(tmp_path: Path, compression: grpc.Compression, *, has_file: bool) -> None:
    """A server that answers with bombs is not available, takes no memory, and the replica goes on with a good one."""
    with Replica(tmp_path / "replica") as replica:
        replica.create("Task", {"n": 1}, "t1")
    with (
        Server(Application(), store=tmp_path / "server") as good,
        hostile_server(compression) as (hostile, bombs),
        process(_REPLICA, tmp_path / "replica") as child,
    ):
        outcome, before = child.synchronize(good.address)
        assert outcome == "done"
        with Replica(tmp_path / "replica") as replica:
            photo = replica.add_file(b"photo", name="photo.jpg") if has_file else None
            replica.update("Task", "t1", {"n": 2, "photo": photo})

        outcome, peak = child.synchronize(hostile)

        assert outcome == ServerUnavailable.__name__
        assert bombs.called[0].rpartition("/")[2] == ("StatFiles" if has_file else "Synchronize")
        assert peak - before < GROWTH_BYTES_MAX
        assert child.synchronize(good.address)[0] == "done"
        with Replica(tmp_path / "replica") as replica:
            assert contents(replica)["t1"]["n"] == 2
            assert not list(replica.pending())
