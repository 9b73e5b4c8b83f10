from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import grpc
import pytest
from tests.builders import REPLICA_B, World, collect, contents, create, delete, quick_folder, update

from tidelog import FailureReason, ReplicaRetired
from tidelog.v1 import sync_pb2, sync_pb2_grpc
from tidelog_client import Phase, Progress, Replica, Report
from tidelog_client import _publication as publication
from tidelog_client import _synchronization as synchronization
from tidelog_client._call_errors import error_of
from tidelog_server import _download as download
from tidelog_server import verify_store
from tidelog_server._download import Download
from tidelog_server._session import server_time_us

DAY = timedelta(days=1)
# Some time after whatever a test has done.
LATER_US = 10 * 24 * 3600 * 1_000_000
MODES = ["all", "unsynchronized", "selected"]


class Broken(Exception):
    """The network breaks off."""


@pytest.fixture
def world() -> Iterator[World]:
    """Give a server without rules."""
    with quick_folder() as folder, World(folder) as found:
        yield found


def forget(world: World) -> None:
    """Let the server forget all history there is."""
    collect(world.store, server_time_us() + LATER_US)


def synchronize(replica: Replica, mode: str, **options: Any) -> Report:
    """Synchronize in a mode; in mode selected, five tasks."""
    if mode == "selected":
        return replica.synchronize_selected([("Task", f"t{number}") for number in range(5)], **options)
    return replica.synchronize_all(**options) if mode == "all" else replica.synchronize_unsynchronized(**options)


class TestReturn:
    def test_a_replica_that_was_away_for_too_long(self, world: World) -> None:
        """Stale objects go, edits of them become failures, other operations are applied, and nothing comes back."""
        a, b = world.replica("a"), world.replica("b")
        for id_ in ("edited", "gone", "both", "stays"):
            a.create("Task", {"n": 1}, id_)
        a.synchronize_all()
        b.synchronize_all()
        b.update("Task", "edited", {"n": 2})
        b.update("Task", "stays", {"n": 2})
        b.delete("Task", "both")
        b.create("Task", {"n": 2}, "new")
        for id_ in ("edited", "gone", "both"):
            a.delete("Task", id_)
        a.create("Task", {"n": 3}, "late")
        a.synchronize_all()
        forget(world)

        report = b.synchronize_all()

        assert (report.applied, report.rejected, report.attempts) == (3, 1, 1)
        (failure,) = b.failures()
        assert (failure.reason, failure.object_id, failure.attributes) == (
            FailureReason.OBJECT_GONE,
            "edited",
            {"n": 2},
        )
        assert b.pending_count() == 0
        a.synchronize_all()
        assert contents(a) == contents(b) == {"stays": {"n": 2}, "new": {"n": 2}, "late": {"n": 3}}
        assert world.lab.state("edited") is None

    def test_its_own_creation_under_a_former_id(self, world: World) -> None:
        """What another device creates under the id of a forgotten object is a new one; older edits do not reach it."""
        a, b, c = world.replica("a"), world.replica("b"), world.replica("c")
        a.create("Task", {"n": 1}, "x")
        a.synchronize_all()
        b.synchronize_all()
        b.update("Task", "x", {"n": 2})
        a.delete("Task", "x")
        a.synchronize_all()
        forget(world)
        c.create("Task", {"new": True}, "x")
        c.synchronize_all()

        assert b.synchronize_all().rejected == 1
        assert contents(b) == contents(c) == {"x": {"new": True}}

    def test_history_that_goes_during_a_download(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """If history is forgotten while a replica downloads, it begins again by itself, and misses nothing."""
        monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 1)
        world.lab.settle(*(create(number, f"t{number}") for number in range(1, 6)), replica=REPLICA_B)
        pages = Download.everything_since
        sessions: list[int] = []

        def interrupted(self: Download, start: Any) -> Iterator[sync_pb2.SnapshotPage]:
            sessions.append(1)
            for page in pages(self, start):
                yield page
                if len(sessions) == 1:
                    sessions.append(1)
                    world.lab.settle(delete(6, "t1"), replica=REPLICA_B)
                    forget(world)

        monkeypatch.setattr(Download, "everything_since", interrupted)
        a = world.replica("a")

        assert a.synchronize_all().attempts == 2
        assert sorted(contents(a)) == ["t2", "t3", "t4", "t5"]

    def test_an_answer_that_was_lost_long_ago(self, world: World) -> None:
        """What is repeated after its outcome is forgotten becomes a failure; it is not applied twice."""
        a = world.replica("a")
        a.create("Task", {"n": 1}, "x")
        a.synchronize_all()
        a.update("Task", "x", increment={"n": 5})
        world.lose_answers(a)
        world.lab.settle(create(1, "other", {}), replica=REPLICA_B)
        forget(world)

        assert a.synchronize_all().rejected == 1

        (failure,) = a.failures()
        assert failure.reason is FailureReason.SUPERSEDED
        assert contents(a) == {"x": {"n": 6}, "other": {}}
        assert world.lab.attributes("x") == {"n": 6}

    def test_a_refusal_that_was_lost_long_ago(self, world: World) -> None:
        """What is repeated after its refusal is forgotten has two failures, and the store is sound with them."""
        a, b = world.replica("a"), world.replica("b")
        b.create("Task", {}, "x")
        b.synchronize_all()
        a.create("Task", {}, "x")
        world.lose_answers(a)
        b.update("Task", "x", {"n": 1})
        b.synchronize_all()
        forget(world)

        a.synchronize_all()

        reasons = [one.reason for one in world.lab.failures()]
        assert reasons == [FailureReason.ALREADY_EXISTS.number, FailureReason.SUPERSEDED.number]
        assert list(verify_store(world.store.path)) == []

    @pytest.mark.parametrize("answered", ["y", "z"])
    def test_some_of_it_comes_again(self, world: World, answered: str) -> None:
        """Where some forgotten operations are repeated, and others between or behind are not, the store is sound."""
        a, b = world.replica("a"), world.replica("b")
        for name in ("x", "y", "z"):
            a.create("Task", {}, name)
        a.synchronize_selected([("Task", answered)])
        world.lose_answers(a)
        b.create("Task", {}, "later")
        b.synchronize_all()
        forget(world)

        assert a.synchronize_all().rejected == 2

        assert list(verify_store(world.store.path)) == []

    @pytest.mark.parametrize("mode", MODES)
    def test_in_other_modes_too(self, world: World, mode: str) -> None:
        """Whatever the first session of a replica that was away is, the next one of mode all makes it whole."""
        a, b = world.replica("a"), world.replica("b")
        for number in range(5):
            a.create("Task", {"n": number}, f"t{number}")
        a.synchronize_all()
        b.synchronize_all()
        for number in range(3):
            a.delete("Task", f"t{number}")
        a.synchronize_all()
        forget(world)
        b.update("Task", "t0", {"n": 9})
        b.update("Task", "t4", {"n": 9})

        report = synchronize(b, mode)

        assert (report.applied, report.rejected) == (1, 1)
        b.synchronize_all()
        assert contents(b) == {"t3": {"n": 3}, "t4": {"n": 9}}


class TestRetired:
    def retire(self, world: World) -> None:
        """Let all replicas be retired."""
        counts = collect(world.store, server_time_us() + LATER_US, history=DAY, replicas=DAY)
        assert counts.replicas

    @pytest.mark.parametrize("mode", ["all", "unsynchronized"])
    def test_it_goes_on_under_another_id(self, world: World, mode: str) -> None:
        """A retired replica downloads as before; as soon as it uploads it takes another id, and goes on."""
        a = world.replica("a")
        a.create("Task", {"n": 0}, "x")
        a.synchronize_all()
        former = a.replica_id
        self.retire(world)
        world.lab.settle(create(1, "theirs"), replica=REPLICA_B)

        assert a.synchronize_all().downloaded == 1
        a.create("Task", {}, "y")
        a.update("Task", "x", increment={"n": 1})
        report = synchronize(a, mode)

        assert report.former_replica_id == former != a.replica_id
        assert (report.applied, a.pending_count()) == (2, 0)
        a.synchronize_all()
        assert contents(a) == {"theirs": {"title": "Buy milk"}, "x": {"n": 1}, "y": {}}

    def test_what_it_does_not_know_to_be_settled(self, world: World) -> None:
        """An operation whose outcome was lost on its way, and is forgotten, is not applied again: it is a failure."""
        a = world.replica("a")
        a.create("Task", {"n": 0}, "x")
        a.synchronize_all()
        a.update("Task", "x", increment={"n": 1})
        world.lose_answers(a)
        self.retire(world)

        report = a.synchronize_all()

        assert report.former_replica_id
        assert [one.reason for one in report.failures] == [FailureReason.SUPERSEDED]
        assert contents(a) == {"x": {"n": 1}}

    def test_cannot_upload_by_a_single_call(self, world: World) -> None:
        """The call without a stream is refused for the same reason."""
        a = world.replica("a")
        a.create("Task", {}, "x")
        a.synchronize_all()
        self.retire(world)
        stub = sync_pb2_grpc.SyncServiceStub(world.channel())

        with pytest.raises(grpc.RpcError) as refused:
            stub.UploadOperations(sync_pb2.UploadOperationsRequest(protocol_version=1, replica_id=a.replica_id))

        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert isinstance(error_of(refused.value, "x"), ReplicaRetired)

    def test_one_that_uploads_is_not(self, world: World) -> None:
        """An upload is noted with the time of the server's clock; a synchronization without one writes nothing."""
        a = world.replica("a")
        a.create("Task", {}, "x")
        a.synchronize_all()
        heard = world.lab.replica(UUID(a.replica_id).bytes)

        a.synchronize_all()

        assert world.lab.replica(UUID(a.replica_id).bytes) == heard
        assert heard.heard_us > 0
        assert collect(world.store, heard.heard_us, history=timedelta(0), replicas=timedelta(0)).replicas == 0


class TestLeftovers:
    """What a download that was broken off leaves in a replica."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let each object be a page that is kept on disk, and published in a step of its own."""
        monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 1)
        monkeypatch.setattr(synchronization, "STAGE_BYTES", 1)
        monkeypatch.setattr(publication, "PUBLISH_OBJECTS_MAX", 0)
        monkeypatch.setattr(publication, "PUBLISH_STEP_PAGES", 1)
        monkeypatch.setattr(publication, "END_STEP_OBJECTS", 1)

    def kept(self, replica: Replica) -> dict[str, int]:
        """Return how many entries each place has that a download uses on its way."""
        environment = replica._storage.environment
        with environment.read() as transaction:
            return {
                name: transaction.stat(environment.database(name))["entries"]
                for name in ("incoming", "merging", "seen")
            }

    def breaks(self, progress: Progress) -> None:
        """Break a synchronization off after three objects."""
        if progress.phase is Phase.DOWNLOAD and progress.done >= 3:
            raise Broken

    @pytest.mark.parametrize("following", MODES)
    @pytest.mark.parametrize("broken", MODES)
    def test_are_discarded(self, world: World, broken: str, following: str) -> None:
        """Whatever was broken off, and whatever comes next, nothing of it stays once history was forgotten."""
        a, b = world.replica("a"), world.replica("b")
        for number in range(5):
            a.create("Task", {"n": number}, f"t{number}")
        a.synchronize_all()
        b.synchronize_all()
        for number in range(5):
            b.update("Task", f"t{number}", {"m": number})
            a.update("Task", f"t{number}", {"k": number})
        a.synchronize_all()
        with pytest.raises(Broken):
            synchronize(b, broken, on_progress=self.breaks)
        assert self.kept(b)["incoming" if broken == "all" else "merging"]
        world.lab.settle(
            delete(1, "t0", base_version=99), update(2, "t1", {"late": True}, base_version=99), replica=REPLICA_B
        )
        forget(world)

        synchronize(b, following)

        kept = self.kept(b)
        assert (kept["merging"], kept["seen"]) == (0, 0)
        b.synchronize_all()
        assert self.kept(b) == {"incoming": 0, "merging": 0, "seen": 0}
        assert b._storage.meta("resume_token") == b""
        a.synchronize_all()
        assert contents(a) == contents(b)
        assert sorted(contents(b)) == ["t1", "t2", "t3", "t4"]
