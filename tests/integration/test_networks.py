"""Networks that lose, hold back and forget: black holes, half-open connections, slow paths."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

import pytest
from tests.builders import REPLICA_B, World, contents, create, quick_folder
from tests.simulation.processes import wait_until

from tidelog import ServerUnavailable, _channel
from tidelog.testing import Proxy, Way
from tidelog_client import Phase, Progress, _synchronizer
from tidelog_server import ServerLimits, _download, _server, _services
from tidelog_server._session import Session

pytestmark = pytest.mark.slow

OBJECTS = 150
OBJECT_BYTES = 10_000
WINDOW_BYTES = 64 * 1024
DEADLINE_SECONDS = 1.0
WAIT_SECONDS_MAX = 60.0
PING_TIMEOUT_MS = 600
SHORT_WAITS = {"grpc.http2.ping_timeout_ms": PING_TIMEOUT_MS, "grpc.http2.lookahead_bytes": WINDOW_BYTES}
QUICK_PINGS = {"grpc.keepalive_time_ms": 200, "grpc.http2.min_ping_interval_without_data_ms": 10}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A server with more data than fits on the way to a replica."""
    monkeypatch.setattr(_download, "PAGE_OBJECTS_MAX", 10)
    with quick_folder() as folder, World(folder) as world:
        _fill(world)
        yield world


@pytest.fixture
def proxy(world: World) -> Iterator[Proxy]:
    """A proxy before it."""
    with Proxy(world.server.address) as proxy:
        yield proxy


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both ends wait shortly for the answer to a ping, and have little on its way. Before `world`."""
    _set_options(
        monkeypatch, {"grpc.http2.ping_timeout_ms": PING_TIMEOUT_MS, "grpc.http2.lookahead_bytes": WINDOW_BYTES}
    )


@pytest.fixture
def quick_pings(monkeypatch: pytest.MonkeyPatch, short_waits: None) -> None:
    """Let both ends ping at once where nothing was heard, too. Before `world`."""
    _set_options(monkeypatch, QUICK_PINGS)


def _set_options(monkeypatch: pytest.MonkeyPatch, changed: dict[str, int]) -> None:
    for module in (_channel, _server):
        monkeypatch.setattr(module, "_OPTIONS", tuple({**dict(module._OPTIONS), **changed}.items()))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> WeakSet[Session]:
    """The sessions that the server has not freed."""
    kept: WeakSet[Session] = WeakSet()

    def noted(*arguments: Any, **options: Any) -> Session:
        session = Session(*arguments, **options)
        kept.add(session)
        return session

    monkeypatch.setattr(_services, "Session", noted)
    return kept


def _fill(world: World) -> None:
    operations = [create(n, f"t{n:03}", {"text": "x" * OBJECT_BYTES}) for n in range(1, OBJECTS + 1)]
    for first in range(0, OBJECTS, 50):
        world.lab.settle(*operations[first : first + 50], replica=REPLICA_B)


def _at(phase: Phase, act: Callable[[], object], *, done: int = 0) -> Callable[[Progress], None]:
    """Return an observer that acts once, in a phase, when so much of it is done."""
    acted: list[Progress] = []

    def observe(progress: Progress) -> None:
        if not acted and progress.phase is phase and progress.done >= done:
            acted.append(progress)
            act()

    return observe


@pytest.mark.parametrize("phase", [Phase.CONNECT, Phase.UPLOAD, Phase.DOWNLOAD])
def test_a_black_hole_ends_with_the_deadline(world: World, proxy: Proxy, phase: Phase) -> None:
    """A path that swallows everything, whenever it begins to, leads to a typed error, and nothing is lost."""
    a = world.replica(server=proxy.address)
    a.create("Task", {"mine": True}, "mine")

    with pytest.raises(ServerUnavailable) as caught:
        a.synchronize_all(timeout=DEADLINE_SECONDS, on_progress=_at(phase, proxy.stall))

    assert caught.value.report.attempts >= 1
    assert set(contents(a)) == {"mine"}
    assert [one.operation.id for one in a.log()] == ["mine"]
    proxy.heal()
    assert a.synchronize_all().applied in (0, 1)
    assert (len(contents(a)), a.pending_count()) == (OBJECTS + 1, 0)


def test_a_path_that_heals_is_gone_on_with(world: World, proxy: Proxy) -> None:
    """What a path held back for a while arrives in the same attempt."""
    a = world.replica(server=proxy.address)

    def heal() -> None:
        wait_until(lambda: proxy.down.is_holding, "nothing was held back")
        proxy.heal()

    healer = threading.Thread(target=heal)

    def stall() -> None:
        proxy.stall()
        healer.start()

    report = a.synchronize_all(on_progress=_at(Phase.DOWNLOAD, stall, done=10))

    healer.join()
    assert (report.attempts, report.downloaded) == (1, OBJECTS)


def test_a_connection_that_is_never_made(world: World, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is taken, and on which nothing is said, is soon given up for another one."""
    attempt_ms = dict(_channel._OPTIONS)["grpc.min_reconnect_backoff_ms"]
    _set_options(monkeypatch, {"grpc.min_reconnect_backoff_ms": attempt_ms // 20})
    a = world.replica(server=proxy.address)
    proxy.stall()

    def heals() -> None:
        wait_until(lambda: proxy.connection_count > 1, "there is no other attempt")
        proxy.heal()

    with ThreadPoolExecutor(1) as pool:
        healed = pool.submit(heals)
        # The library itself would take 20 seconds to give the first one up.
        assert a.synchronize_all(timeout=15).downloaded == OBJECTS
        healed.result(WAIT_SECONDS_MAX)


@pytest.mark.usefixtures("quick_pings")
@pytest.mark.parametrize("dead", ["up", "down", "both"])
@pytest.mark.parametrize("phase", [Phase.UPLOAD, Phase.DOWNLOAD])
class TestDeadConnections:
    """A connection that the path forgot: nothing passes in one direction or both, and no end is told."""

    @pytest.fixture
    def ways(self, proxy: Proxy, dead: str) -> list[Way]:
        """The directions that die."""
        return {"up": [proxy.up], "down": [proxy.down], "both": [proxy.up, proxy.down]}[dead]

    def test_a_replica_finds_out_and_calls_again(
        self, monkeypatch: pytest.MonkeyPatch, world: World, proxy: Proxy, ways: list[Way], phase: Phase
    ) -> None:
        """Without a deadline too: pings find out, however long that takes, and another connection does the rest."""
        monkeypatch.setattr(_synchronizer, "SILENCE_SECONDS_MAX", 0.3)  # less than the pings take
        a = world.replica(server=proxy.address)
        a.create("Task", {"mine": True}, "mine")

        report = a.synchronize_all(on_progress=_at(phase, lambda: proxy.strand(*ways)))

        assert report.attempts >= 2
        assert (len(contents(a)), a.pending_count()) == (OBJECTS + 1, 0)

    def test_a_server_finds_out_and_frees_the_session(
        self, world: World, proxy: Proxy, ways: list[Way], phase: Phase, sessions: WeakSet[Session]
    ) -> None:
        """A session whose replica vanished without a word is freed."""
        a = world.replica(server=proxy.address)
        a.create("Task", {"mine": True}, "mine")
        seen: list[int] = []

        def vanish() -> None:
            seen.append(len(sessions))
            proxy.strand(*ways)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            a.synchronize_all(on_progress=_at(phase, vanish))

        assert seen == [1]
        wait_until(lambda: gc.collect() >= 0 and not sessions, "the session is still there")


class TestSlowPaths:
    @pytest.mark.usefixtures("short_waits")
    def test_a_throttled_path(self, world: World, proxy: Proxy) -> None:
        """No ping waits in line behind the data, and makes a slow connection pass for a dead one."""
        proxy.down.bytes_per_second = 4 * WINDOW_BYTES * 1000 // PING_TIMEOUT_MS
        told: list[Progress] = []

        report = world.replica(server=proxy.address).synchronize_all(on_progress=told.append)

        assert (report.attempts, report.downloaded) == (1, OBJECTS)
        done = [progress.done for progress in told if progress.phase is Phase.DOWNLOAD]
        assert done == list(range(0, OBJECTS + 1, 10))

    def test_a_path_that_takes_longer_for_a_batch_than_a_session_lasts(self) -> None:
        """Where no full batch arrives before the server ends the session, smaller ones do, and all is uploaded."""
        limits = ServerLimits(idle_seconds=0.5)
        with quick_folder() as folder, World(folder, limits=limits) as world, Proxy(world.server.address) as proxy:
            a = world.replica(server=proxy.address)
            for number in range(40):
                a.create("Task", {"text": "x" * OBJECT_BYTES}, f"t{number:02}")
            proxy.up.bytes_per_second = 200_000  # all of it in two seconds

            report = a.synchronize_all(timeout=WAIT_SECONDS_MAX)

            assert report.attempts > 1
            assert (report.applied, a.pending_count(), world.lab.version()) == (40, 0, 40)

    def test_single_bytes(self, world: World, proxy: Proxy) -> None:
        """A path that hands on one byte at a time is as good as any."""
        a = world.replica(server=proxy.address)
        a.synchronize_all()
        a.create("Task", {"mine": True}, "mine")
        proxy.up.chunk_bytes = proxy.down.chunk_bytes = 1

        report = a.synchronize_all()

        assert (report.attempts, report.applied, a.pending_count()) == (1, 1, 0)

    def test_a_path_that_breaks_at_every_page(
        self, monkeypatch: pytest.MonkeyPatch, world: World, proxy: Proxy
    ) -> None:
        """Where each connection lives for some pages only, they are kept, and in the end all are there."""
        monkeypatch.setattr(_synchronizer, "BACKOFF_SECONDS_FIRST", 0.001)
        a = world.replica(server=proxy.address)
        done: list[int] = []

        def cut_at_each_page(progress: Progress) -> None:
            if progress.phase is Phase.DOWNLOAD and progress.done:
                done.append(progress.done)
                proxy.cut()

        report = a.synchronize_all(on_progress=cut_at_each_page)

        assert report.attempts > 2
        assert report.downloaded == len(contents(a)) == OBJECTS
        assert len(done) == OBJECTS // 10, "no page came twice"
