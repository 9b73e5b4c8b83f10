"""A server and a replica that were given a clock keep what they keep by it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from tests.builders import contents, quick_folder

from tidelog import InvalidValue
from tidelog.testing import ManualClock
from tidelog.v1 import failure_pb2, failure_pb2_grpc
from tidelog_client import Replica
from tidelog_server import Application, HookContext, HookObject, Reject, Server

DAY = timedelta(days=1)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for everything."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def clock() -> ManualClock:
    """Give a clock that stands still, far from what time it is."""
    return ManualClock(datetime(2040, 1, 1, tzinfo=UTC))


@pytest.fixture
def server(folder: Path, clock: ManualClock) -> Iterator[Server]:
    """Give a server that goes by the clock, and keeps everything for a month."""
    application = Application()

    @application.before_commit("Task")
    def rejects(task: HookObject, context: HookContext) -> None:
        if task["bad"]:
            raise Reject("bad")

    month = timedelta(days=30)
    with Server(
        application,
        store=folder / "server",
        history_retention=month,
        replica_retention=2 * month,
        failure_retention=month,
        clock=clock,
    ) as running:
        yield running


@pytest.fixture
def replica(folder: Path, server: Server, clock: ManualClock) -> Iterator[Replica]:
    """Give a replica that goes by the clock too."""
    with Replica(folder / "a", server=server.address, clock=clock) as opened:
        yield opened


def test_deletions_are_forgotten(folder: Path, server: Server, replica: Replica, clock: ManualClock) -> None:
    """A tombstone goes 40 days after the deletion, with the history; who was away meanwhile reconciles."""
    replica.create("Task", {}, "kept")
    replica.create("Task", {}, "deleted")
    replica.synchronize_all()
    with Replica(folder / "away", server=server.address) as away:
        away.synchronize_all()
    replica.delete("Task", "deleted")
    replica.synchronize_all()
    clock.advance(29 * DAY)
    assert not any(server.collect())

    clock.advance(11 * DAY)
    collected = server.collect()

    assert (collected.tombstones, collected.changes) == (1, 3)
    with Replica(folder / "away", server=server.address) as away:
        away.synchronize_all()
        assert list(contents(away)) == ["kept"]


def test_replicas_are_retired(server: Server, replica: Replica, clock: ManualClock) -> None:
    """A replica from which nothing came for longer than the server waits goes on under another id."""
    replica.create("Task", {}, "x")
    replica.synchronize_all()
    former = replica.replica_id
    clock.advance(61 * DAY)
    assert server.collect().replicas == 1
    replica.update("Task", "x", {"n": 1})

    report = replica.synchronize_all()

    assert (report.former_replica_id, report.applied) == (former, 1)


def test_payloads_of_failures_go(server: Server, replica: Replica, clock: ManualClock) -> None:
    """The payload of a failure goes a month after it was dealt with, and the times on record are the clock's."""
    replica.create("Task", {"bad": True})
    (failure,) = replica.synchronize_all().failures
    assert failure.time == clock.now
    clock.advance(31 * DAY)
    assert server.collect().payloads == 0
    with grpc.insecure_channel(server.address) as channel:
        stub = failure_pb2_grpc.FailureServiceStub(channel)
        dismissed = stub.DismissFailure(failure_pb2.DismissFailureRequest(id=failure.id)).failure
    assert dismissed.settle_time.ToDatetime(UTC) == clock.now

    clock.advance(31 * DAY)

    assert server.collect().payloads == 1


def test_contents_go_from_the_server(server: Server, replica: Replica, clock: ManualClock) -> None:
    """A content to which nothing refers any more goes from the server when its grace is over."""
    replica.create("Photo", {"image": replica.add_file(b"some bytes")}, "p")
    replica.synchronize_all()
    replica.delete("Photo", "p")
    replica.synchronize_all()
    server.tenant().add_file(b"never referred to", name="x")
    assert server.collect().contents == 0

    clock.advance(2 * DAY)

    assert server.collect().contents == 2


def test_contents_go_from_the_replica(folder: Path, server: Server) -> None:
    """A content to which nothing refers any more goes from a replica an hour after it came, which files remember."""
    clock = ManualClock()
    with Replica(folder / "a", server=server.address, clock=clock) as replica:
        replica.create("Photo", {"image": replica.add_file(b"some bytes")}, "p")
        replica.synchronize_all()
        replica.delete("Photo", "p")
        replica.synchronize_all()
        assert kept(folder / "a") == 1

        clock.advance(timedelta(hours=2))
        replica.synchronize_all()

    assert kept(folder / "a") == 0


def test_the_log_is_trimmed(replica: Replica, clock: ManualClock) -> None:
    """Settled operations leave the log when they are past its retention; their times are the clock's."""
    replica.create("Task", {}, "x")
    replica.synchronize_all()
    assert [one.operation.client_time for one in replica.log()] == [clock.now]
    clock.advance(29 * DAY)
    assert replica.trim_log() == 0

    clock.advance(2 * DAY)

    assert replica.trim_log() == 1
    assert list(replica.log()) == []


def test_order_does_not_depend_on_it(server: Server, replica: Replica, clock: ManualClock) -> None:
    """A clock that goes back changes nothing about what is applied, and in which order."""
    replica.create("Task", {"n": 1}, "x")
    replica.synchronize_all()
    clock.advance(-400 * DAY)
    replica.update("Task", "x", {"n": 2})

    assert replica.synchronize_all().applied == 1
    assert server.tenant().get("Task", "x") == {"n": 2}


def test_it_shows_what_it_is_told() -> None:
    """A clock begins where it is told to, in whatever time zone, and moves by what it is told."""
    clock = ManualClock(datetime(2030, 1, 1, 1, tzinfo=UTC))

    clock.advance(timedelta(hours=-1, microseconds=5))

    assert clock.now == datetime(2030, 1, 1, 0, 0, 0, 5, tzinfo=UTC)
    assert clock() == 1_893_456_000_000_005


def test_it_wants_to_know_the_time_zone() -> None:
    """A time that may be any of twenty-four is refused."""
    with pytest.raises(InvalidValue, match="time zone"):
        ManualClock(datetime(2030, 1, 1))  # noqa: DTZ001 - that is the mistake


def kept(folder: Path) -> int:
    """Return how many contents there are in a replica's directory."""
    return sum(1 for path in (folder / "files").rglob("*") if path.is_file() and len(path.name) == 64)
