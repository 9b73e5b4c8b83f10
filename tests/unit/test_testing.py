"""The proxy that tests disturb connections with does what it says."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.simulation.processes import wait_until

from tidelog.testing import Proxy

SENT = bytes(range(256)) * 4


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Something to connect to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[Proxy]:
    """A proxy before it."""
    host, port = listener.getsockname()
    with Proxy(f"{host}:{port}") as proxy:
        yield proxy


@pytest.fixture
def ends(listener: socket.socket, proxy: Proxy) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through it: the client's, the server's."""
    host, _, port = proxy.address.rpartition(":")
    with closing(socket.create_connection((host, int(port)))) as near, closing(listener.accept()[0]) as far:
        wait_until(lambda: proxy.open_count == 1, "the proxy is not ready")
        yield near, far


def received(end: socket.socket, count: int) -> bytes:
    """Receive so many bytes, or what comes until the end."""
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


def test_it_hands_on_and_counts(proxy: Proxy, ends: tuple[socket.socket, socket.socket]) -> None:
    """Bytes arrive in both directions, and are counted separately; so does the end of a connection."""
    near, far = ends
    near.sendall(SENT)
    assert received(far, len(SENT)) == SENT
    far.sendall(SENT[:10])
    far.shutdown(socket.SHUT_WR)

    assert received(near, len(SENT)) == SENT[:10]
    assert (proxy.up.byte_count, proxy.down.byte_count, proxy.connection_count) == (len(SENT), 10, 1)


@pytest.mark.parametrize("count", [0, 1, 700])
def test_it_cuts_after_a_byte(proxy: Proxy, ends: tuple[socket.socket, socket.socket], count: int) -> None:
    """So many bytes arrive, then both ends see the end."""
    near, far = ends
    proxy.up.cut_after(count)
    near.sendall(SENT)

    assert received(far, len(SENT)) == SENT[:count]
    assert received(near, 1) == b""
    assert proxy.up.cut_count == 1


def test_it_resets(proxy: Proxy, ends: tuple[socket.socket, socket.socket]) -> None:
    """Both ends see a reset if that is asked for."""
    near, far = ends
    proxy.cut(resets=True)

    for end in (near, far):
        with pytest.raises(ConnectionResetError):
            end.recv(1)


@pytest.mark.parametrize("stalls", [False, True])
def test_it_hands_on_a_reset(proxy: Proxy, ends: tuple[socket.socket, socket.socket], *, stalls: bool) -> None:
    """Where one end resets its connection, as a killed process does, the other one sees that, after a stall."""
    near, far = ends
    if stalls:
        proxy.stall()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    if stalls:
        wait_until(lambda: proxy.down.is_holding, "no reset came")
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            near.recv(1)
        near.setblocking(True)
        proxy.heal()

    with pytest.raises(ConnectionResetError):
        near.recv(1)
    wait_until(lambda: proxy.open_count == 0, "the connection is still there")


def test_it_stalls_and_heals(proxy: Proxy, ends: tuple[socket.socket, socket.socket]) -> None:
    """What comes while it stalls arrives once it has healed."""
    near, far = ends
    proxy.stall()
    near.sendall(SENT)
    wait_until(lambda: proxy.up.is_holding, "nothing came")
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    far.setblocking(True)

    proxy.heal()

    assert received(far, len(SENT)) == SENT


def test_it_strands_connections(
    proxy: Proxy, listener: socket.socket, ends: tuple[socket.socket, socket.socket]
) -> None:
    """A stranded connection stays silent in that direction, not in the other; a new one works."""
    near, far = ends
    proxy.strand(proxy.up)
    near.sendall(SENT)
    near.shutdown(socket.SHUT_WR)
    wait_until(lambda: proxy.up.is_holding, "nothing came")
    far.sendall(SENT)
    assert received(near, len(SENT)) == SENT
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)

    host, _, port = proxy.address.rpartition(":")
    with closing(socket.create_connection((host, int(port)))) as new, closing(listener.accept()[0]) as its_end:
        new.sendall(SENT)
        assert received(its_end, len(SENT)) == SENT


def test_it_takes_its_time(proxy: Proxy, ends: tuple[socket.socket, socket.socket]) -> None:
    """Slow, late and in single bytes everything arrives as it was sent."""
    near, far = ends
    proxy.up.chunk_bytes = 1
    proxy.down.bytes_per_second = 100_000
    proxy.down.delay_seconds = 0.001
    sender = threading.Thread(target=far.sendall, args=(SENT,))
    sender.start()
    near.sendall(SENT)

    assert received(far, len(SENT)) == SENT
    assert received(near, len(SENT)) == SENT
    sender.join()
