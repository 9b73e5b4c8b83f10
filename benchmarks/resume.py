"""
An initial download that is interrupted again and again, beside one that is not.

What an interruption costs is what was on its way, and what the replica had in memory:
a bounded part of a page or two, however large the download is. Until all of it is there
nothing shows, and in the end nothing tells the two replicas apart.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple, Self

from benchmarks.children import Child, ChildFailed
from benchmarks.records import ENTITY, tasks
from benchmarks.workers import ReplicaWorker, ServerWorker
from tidelog.testing import Proxy
from tidelog_client import Replica

INTERRUPTIONS: Final = 20
KINDS: Final = (
    "connection cut",
    "replica killed",
    "connection reset",
    "connection cut",
    "server killed",
    "connection reset",
)
PUBLISHING: Final = "replica killed while publishing"
WAIT_SECONDS_MAX: Final = 300.0
# What a million objects may cost with 20 interruptions, of what they cost without.
RESUMED_RATIO_MAX: Final = 1.05
POLL_SECONDS: Final = 0.001
# How often somebody looks whether anything shows. Whoever looks keeps the proxy waiting, which is in the same process.
LOOK_SECONDS: Final = 0.05

Attributes = Callable[[int, int], Iterator[dict[str, Any]]]


class HalfState(Exception):
    """A replica showed a part of a download."""


class Resumed(NamedTuple):
    """
    What the interruptions cost.

    Attributes:
        objects: How many objects there were.
        interruptions: What was done, in order.
        whole_bytes: Bytes that reached the replica that was not interrupted.
        resumed_bytes: Bytes that reached the one that was.
        whole_seconds: What the first one took.
        resumed_seconds: What the second one took, processes started anew included.
        states: The hash of what each of them shows in the end.
    """

    objects: int
    interruptions: list[str]
    whole_bytes: int
    resumed_bytes: int
    whole_seconds: float
    resumed_seconds: float
    states: tuple[str, str]

    @property
    def ratio(self) -> float:
        """Bytes with interruptions, to bytes without."""
        return self.resumed_bytes / self.whole_bytes

    @property
    def lost_bytes(self) -> int:
        """What one interruption cost on average."""
        return (self.resumed_bytes - self.whole_bytes) // len(self.interruptions)


def measure_resume(
    objects: int,
    *,
    folder: Path | None = None,
    seed: int = 1,
    interruptions: int = INTERRUPTIONS,
    attributes: Attributes = tasks,
) -> Resumed:
    """
    Download everything twice: at one go, and interrupted.

    Raises:
        HalfState: Something showed before all did; or not all, once a replica was opened that had it all.
    """
    with (
        tempfile.TemporaryDirectory(prefix="tidelog-benchmark-", dir=folder) as name,
        _Servers(Path(name) / "server") as servers,
    ):
        servers.call("fill", objects, attributes)
        proxy = servers.proxy
        began = time.perf_counter()
        with Child(ReplicaWorker, f"{name}/whole", proxy.address) as replica:
            _synchronized(replica.call("synchronize"), objects)
            whole_bytes, whole_seconds = proxy.down.byte_count, time.perf_counter() - began
            whole_state = replica.call("state")
        began = time.perf_counter()
        with _Interrupted(Path(name) / "resumed", servers, objects) as interrupted:
            dice = Random(seed)
            done = []
            for number in range(interruptions):
                kind = KINDS[number % len(KINDS)]
                interrupted.wait_for(int(whole_bytes / (interruptions + 1) * dice.uniform(0.5, 1.0)))
                interrupted.interrupt(kind)
                done.append(kind)
            if interrupted.wait_until_published(part=dice.random()):
                interrupted.interrupt(PUBLISHING)
                done.append(PUBLISHING)
            interrupted.complete()
            resumed_bytes = proxy.down.byte_count - whole_bytes
            seconds = time.perf_counter() - began
            return Resumed(
                objects, done, whole_bytes, resumed_bytes, whole_seconds, seconds, (whole_state, interrupted.state())
            )


class _Servers:
    """A server in a process of its own, behind a proxy; another one over its store when it was killed."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._open = ExitStack()
        self._child: Child[ServerWorker] = Child(ServerWorker, str(store))
        self.proxy = Proxy(self.call("address"))

    def call(self, method: str, *arguments: Any) -> Any:
        return self._child.call(method, *arguments)

    def restart(self) -> None:
        """Kill the server and start another one."""
        self._child.kill()
        self._child = Child(ServerWorker, str(self._store))
        self.proxy.target = self.call("address")

    def __enter__(self) -> Self:
        self._open.enter_context(self.proxy)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._child.kill()


class _Interrupted:
    """A replica that synchronizes in a process of its own, and one who watches what it shows."""

    def __init__(self, path: Path, servers: _Servers, objects: int) -> None:
        self._path = path
        self._servers = servers
        self._objects = objects
        self._watching = Replica(path)
        self._pool = ThreadPoolExecutor(1)
        self._begin()

    def wait_for(self, more_bytes: int) -> None:
        """Wait until so many more bytes have come. Nothing of them shows meanwhile."""
        way = self._servers.proxy.down
        wanted = way.byte_count + more_bytes

        look_at = 0.0

        def is_enough() -> bool:
            nonlocal look_at
            if (now := time.monotonic()) >= look_at:
                look_at = now + LOOK_SECONDS
                self._check_shown(0)
            return way.byte_count >= wanted

        self._wait(is_enough)

    def wait_until_published(self, *, part: float) -> bool:
        """Wait until a part of what was downloaded is prepared, and nothing shows. Return False if all does."""
        wanted = max(1, int(part * self._objects))

        self._wait(lambda: self._check_shown(0, self._objects) > 0 or self._prepared() >= wanted)
        return self._shown() == 0

    def interrupt(self, kind: str) -> None:
        """Interrupt the download, and see to it that it goes on."""
        if kind == "connection cut":
            self._servers.proxy.cut()
        elif kind == "connection reset":
            self._servers.proxy.cut(resets=True)
        elif kind == "server killed":
            self._servers.restart()
        else:
            self._replica.kill()
            if self._done.exception() is None:
                raise RuntimeError("the replica had come to its end before it was interrupted")
        if kind != PUBLISHING:
            self._check_shown(0)
        else:
            self._check_shown(0, self._objects)
            with Replica(self._path):  # without a network
                self._check_shown(self._objects)
        if kind.startswith("replica"):
            self._begin()

    def complete(self) -> None:
        """Wait for the end."""
        self._done.result(WAIT_SECONDS_MAX)
        self._check_shown(self._objects)

    def state(self) -> str:
        state: str = self._replica.call("state")
        return state

    def _begin(self) -> None:
        self._replica: Child[ReplicaWorker] = Child(ReplicaWorker, str(self._path), self._servers.proxy.address)
        self._done: Future[Any] = self._pool.submit(self._replica.call, "synchronize")

    def _shown(self) -> int:
        return self._watching.count(ENTITY)

    def _prepared(self) -> int:
        environment = self._watching._storage.environment  # noqa: SLF001 - it shows nowhere
        with environment.read() as transaction:
            return int(transaction.stat(environment.database("objects"))["entries"])

    def _check_shown(self, *expected: int) -> int:
        """Return how many objects show. Raise HalfState if it is another number than was expected."""
        if (shown := self._shown()) not in expected:
            raise HalfState(f"{shown} of {self._objects} objects showed, expected {' or '.join(map(str, expected))}")
        return shown

    def _wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_SECONDS_MAX
        while not condition():
            if self._done.done() and self._done.exception() is not None:
                self._done.result()
            if time.monotonic() > end:
                raise TimeoutError("the download makes no progress")
            time.sleep(POLL_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._replica.kill()
        self._pool.shutdown()
        self._watching.close()


def _synchronized(work: Any, objects: int) -> None:
    if work.operations != objects:
        raise ChildFailed(f"{work.operations} objects came, expected {objects}")
