from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from filelock import FileLock
from tests.builders import (
    REPLICA_B,
    World,
    contents,
    create,
    delete,
    quick_folder,
    references_schema,
    said,
    update,
)

from tidelog import (
    DiskFull,
    FailureReason,
    ForeignServer,
    InvalidValue,
    LimitExceeded,
    ObjectNotFound,
    attribute,
)
from tidelog._environment import Environment, LmdbTransaction, scan_keys
from tidelog._values import decode_map
from tidelog.v1 import (
    failure_pb2,
    failure_pb2_grpc,
    object_pb2,
    object_pb2_grpc,
    operation_pb2,
    sync_pb2,
    sync_pb2_grpc,
)
from tidelog_client import Phase, Progress, Replica, Report, SkipReason
from tidelog_client import _publication as publication
from tidelog_client import _synchronization as synchronization
from tidelog_client._publication import Publication
from tidelog_client._view import StateLost
from tidelog_server import Application, HookContext, HookObject, Reject, Server
from tidelog_server import _download as download
from tidelog_server._principal import ANONYMOUS

ORDERS = references_schema({"Line": {"order": "Order", "orders": ["Order"]}, "Order": {"parent": "Order"}})


class Broken(Exception):
    """The network breaks off."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for a server and its replicas."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    """Give a server without rules."""
    with World(folder) as found:
        yield found


@pytest.fixture
def orders(folder: Path) -> Iterator[World]:
    """Give a server that knows orders and their lines."""
    with World(folder, Application(schema=ORDERS)) as found:
        yield found


def synchronize(replica: Replica, mode: str, keys: list[tuple[str, str]] | None = None, **options: Any) -> Report:
    """Synchronize in a mode; in mode selected, the objects of *keys*."""
    if mode == "selected":
        return replica.synchronize_selected(keys or [("Task", "t1")], **options)
    return replica.synchronize_all(**options) if mode == "all" else replica.synchronize_unsynchronized(**options)


MODES = ["all", "unsynchronized", "selected"]


class TestAll:
    def test_everything_pending_goes_up_and_everything_comes_down(self, world: World) -> None:
        """Creations, updates and deletions are uploaded, and what others did is downloaded."""
        world.lab.settle(create(1, "theirs"), create(2, "t3"), create(3, "old"), delete(4, "old"), replica=REPLICA_B)
        a = world.replica()
        with a.transaction() as tx:
            tx.create("Task", {"n": 1}, "t1")
            tx.update("Task", "t1", {"n": 2})
            tx.create("Task", {}, "t2")
            tx.delete("Task", "t2")

        report = a.synchronize_all()

        assert (report.applied, report.rejected, report.attempts) == (4, 0, 1)
        assert (report.downloaded, report.confirmed, report.removed) == (2, 1, 0)
        assert a.pending_count() == 0
        assert contents(a) == {
            "t1": {"n": 2},
            "t3": {"title": "Buy milk"},
            "theirs": {"title": "Buy milk"},
        }
        assert world.lab.attributes("t1") == {"n": 2}
        assert world.lab.attributes("t2") is None

    def test_two_replicas_converge(self, world: World) -> None:
        """After both have synchronized twice, two replicas with conflicting edits are equal to the server."""
        a, b = world.replica("a"), world.replica("b")
        a.create("Task", {"x": 0, "y": 0}, "t1")
        a.synchronize_all()
        b.synchronize_all()
        a.update("Task", "t1", {"x": 1, "z": "a"})
        b.update("Task", "t1", {"y": 2, "z": "b"})
        b.create("Task", {"by": "b"}, "t2")

        for replica in (a, b, a):
            replica.synchronize_all()

        assert contents(a) == contents(b) == {"t1": {"x": 1, "y": 2, "z": "b"}, "t2": {"by": "b"}}

    def test_a_second_time_there_is_nothing_to_do(self, world: World) -> None:
        """A synchronization with nothing to do exchanges nothing and writes nothing on the server."""
        a = world.replica()
        a.create("Task", {})
        a.synchronize_all()
        with world.store.read("default") as reader:
            before = reader.replica(bytes.fromhex(a.replica_id.replace("-", "")))

        report = a.synchronize_all()

        assert (report.applied, report.downloaded, report.confirmed, report.removed) == (0, 0, 0, 0)
        with world.store.read("default") as reader:
            assert reader.replica(bytes.fromhex(a.replica_id.replace("-", ""))) == before

    def test_what_was_deleted_elsewhere_goes(self, world: World) -> None:
        """A deletion on the server removes the object, and its handle becomes empty."""
        a = world.replica()
        a.create("Task", {}, "t1")
        a.synchronize_all()
        handle = a.get("Task", "t1")
        assert handle is not None
        world.lab.settle(delete(1, base_version=1), replica=REPLICA_B)

        report = a.synchronize_all()

        assert report.removed == 1
        assert a.get("Task", "t1") is None
        assert not handle.exists
        with pytest.raises(ObjectNotFound):
            handle["title"]

    def test_only_what_changed_comes_down(self, world: World) -> None:
        """A second download brings the objects that changed since the first, each once."""
        a = world.replica()
        world.lab.settle(*[create(n, f"t{n}") for n in range(1, 51)], replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(update(51, "t7", {"n": 1}), update(52, "t7", {"n": 2}), replica=REPLICA_B)

        report = a.synchronize_all()

        assert (report.downloaded, report.removed) == (1, 0)
        assert contents(a)["t7"] == {"title": "Buy milk", "n": 2}

    def test_what_came_and_went_is_not_spoken_of(self, world: World) -> None:
        """No removal, and so no id, is sent of an object that was created and deleted since the last time."""
        a = world.replica()
        world.lab.settle(create(1, "t1"), replica=REPLICA_B)
        a.synchronize_all()
        cursor = a._storage.meta("cursor")
        world.lab.settle(create(2, "secret"), delete(3, "secret"), create(4, "t4"), replica=REPLICA_B)

        pages = list(_pages(world, cursor))
        report = a.synchronize_all()

        assert b"secret" not in b"".join(page.SerializeToString() for page in pages)
        assert [one.id for page in pages for one in page.snapshots] == ["t4"]
        assert (report.downloaded, report.removed) == (1, 0)

    def test_what_went_and_came_again_comes_as_it_is(self, world: World) -> None:
        """An object that was deleted and created anew since the last time is downloaded in its new form."""
        a = world.replica()
        world.lab.settle(create(1, set={"old": 1}), replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(delete(2), create(3, set={"new": 1}), replica=REPLICA_B)

        a.synchronize_all()

        assert contents(a) == {"t1": {"new": 1}}

    def test_own_objects_come_back_as_versions_only(self, world: World) -> None:
        """What nobody but the replica ever wrote is confirmed, not sent back."""
        a = world.replica()
        with a.transaction() as tx:
            for n in range(100):
                tx.create("Task", {"text": "x" * 1000}, f"t{n}")

        report = a.synchronize_all()

        assert (report.confirmed, report.downloaded) == (100, 0)
        assert report.sent_bytes > 100_000
        assert report.received_bytes < 20_000
        a.update("Task", "t0", {"n": 1})
        assert next(a.pending()).operation.base_version == 1

    def test_an_object_with_two_writers_comes_back_whole(self, world: World) -> None:
        """Once somebody else has written an object, its state is sent to its creator."""
        a = world.replica()
        a.create("Task", {"a": 1}, "t1")
        a.synchronize_all()
        world.lab.settle(update(1, set={"b": 2}, base_version=1), replica=REPLICA_B)
        a.update("Task", "t1", {"c": 3})

        report = a.synchronize_all()

        assert (report.confirmed, report.downloaded) == (0, 1)
        assert contents(a) == {"t1": {"a": 1, "b": 2, "c": 3}}

    def test_intents_are_answered_with_the_sum(self, world: World) -> None:
        """Increments of two replicas add up, and each sees the sum."""
        a, b = world.replica("a"), world.replica("b")
        a.create("Counter", {"n": 10}, "c")
        a.synchronize_all()
        b.synchronize_all()
        a.update("Counter", "c", increment={"n": 1})
        b.update("Counter", "c", increment={"n": 2}, add={"tags": ["b"]})

        for replica in (a, b, a):
            replica.synchronize_all()

        assert contents(a, "Counter") == contents(b, "Counter") == {"c": {"n": 13, "tags": ["b"]}}

    def test_many_operations_in_many_batches(self, world: World) -> None:
        """More operations than a batch holds arrive all, in order, each once."""
        a = world.replica()
        with a.transaction() as tx:
            for n in range(1, 1_801):
                tx.create("Task", {"n": n}, f"t{n:04}")

        report = a.synchronize_all()

        assert (report.applied, report.confirmed) == (1_800, 1_800)
        assert [change.seq for change in world.lab.changes()] == list(range(1, 1_801))
        assert world.lab.replica(bytes.fromhex(a.replica_id.replace("-", ""))).settled_ranges == ((1, 1_800),)

    def test_a_group_larger_than_a_batch(self, world: World) -> None:
        """A commit group travels whole although it exceeds the size of a batch."""
        a = world.replica()
        a.create("Task", {}, "first")
        with a.transaction(atomic=True) as tx:
            for n in range(999):
                tx.create("Task", {"n": n}, f"t{n}")

        assert a.synchronize_all().applied == 1_000

    def test_lost_answers(self, world: World) -> None:
        """Operations whose answers were lost are sent again, and are applied once."""
        a = world.replica()
        a.create("Counter", {"n": 1}, "c")
        a.update("Counter", "c", increment={"n": 1})
        world.lose_answers(a)

        report = a.synchronize_all()

        assert report.applied == 2
        assert contents(a, "Counter") == {"c": {"n": 2}}
        assert world.lab.version() == 2

    def test_the_log_remembers_what_became_of_each_operation(self, world: World) -> None:
        """After a synchronization the log tells the version or the failure of each operation."""
        a = world.replica()
        a.create("Task", {}, "t1")
        a.create("Task", {}, "theirs")
        world.lab.settle(create(1, "theirs"), replica=REPLICA_B)

        report = a.synchronize_all()

        applied, failed = a.log()
        assert (applied.status, applied.version, applied.failure_id) == ("applied", 2, "")
        assert (failed.status, failed.version, failed.failure_id) == ("failed", 0, report.failures[0].id)
        assert [logged.status for logged in a.history("Task", "t1")] == ["applied"]

    def test_the_report_measures(self, world: World) -> None:
        """A report counts bytes and durations, and progress was told phase by phase."""
        a = world.replica()
        a.create("Task", {})
        told: list[Progress] = []

        report = a.synchronize_all(on_progress=told.append)

        assert report.sent_bytes > 0
        assert report.received_bytes > 0
        assert report.upload_seconds > 0
        assert report.download_seconds > 0
        phases = list(dict.fromkeys(progress.phase for progress in told))
        assert phases == [Phase.CONNECT, Phase.UPLOAD, Phase.DOWNLOAD, Phase.PUBLISH]
        assert Progress(Phase.UPLOAD, 1, 1) in told

    def test_a_state_that_was_lost_is_sent_again(self, world: World) -> None:
        """A replica that lacks a state that the server confirms asks for all states, in the same synchronization."""
        world.lab.settle(create(1, "t0", {}), replica=REPLICA_B)
        a = world.replica()
        a.synchronize_all()
        a.create("Task", {"title": "x"}, "t1")
        a.synchronize_unsynchronized()
        objects = a._storage.environment.database("objects")
        a._storage.environment.write(lambda transaction: transaction.drop(objects, delete=False))
        assert contents(a) == {}

        report = a.synchronize_all()

        assert contents(a) == {"t0": {}, "t1": {"title": "x"}}
        assert report.attempts == 2

    def test_a_lost_cursor_is_a_reconciliation(self, world: World) -> None:
        """A replica whose cursor the server cannot use gets everything, and loses what the server does not have."""
        a = world.replica()
        world.lab.settle(create(1, "t1"), create(2, "gone"), replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(delete(3, "gone"), create(4, "new"), replica=REPLICA_B)
        a._storage.set_meta(cursor=b"no cursor of any server")
        a.create("Task", {"mine": 1}, "mine")

        report = a.synchronize_all()

        assert sorted(contents(a)) == ["mine", "new", "t1"]
        assert report.removed == 1


class TestUnsynchronized:
    def test_everything_pending_goes_up_and_only_that_comes_down(self, world: World) -> None:
        """Everything pending is uploaded, deletions included; what others changed stays for later."""
        a = world.replica()
        world.lab.settle(create(1, "shared", {"a": 1}), create(2, "doomed"), replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(update(3, "shared", {"b": 2}), create(4, "theirs"), replica=REPLICA_B)
        a.update("Task", "shared", {"c": 3})
        a.delete("Task", "doomed")
        a.create("Task", {}, "mine")

        report = a.synchronize_unsynchronized()

        assert report.applied == 3
        assert world.lab.attributes("doomed") is None
        assert contents(a) == {"shared": {"a": 1, "b": 2, "c": 3}, "mine": {}}
        assert a.pending_count() == 0
        a.synchronize_all()
        assert sorted(contents(a)) == ["mine", "shared", "theirs"]

    def test_with_nothing_pending(self, world: World) -> None:
        """With nothing to upload, nothing is downloaded either."""
        a = world.replica()
        world.lab.settle(create(1), replica=REPLICA_B)

        report = a.synchronize_unsynchronized()

        assert (report.applied, report.downloaded) == (0, 0)
        assert contents(a) == {}

    def test_what_its_operations_changed_elsewhere_comes_too(self, folder: Path) -> None:
        """Objects that hooks changed, created or deleted on behalf of the operations come in the same session."""
        application = Application()

        @application.before_delete("Order")
        def cascades(order: HookObject, context: HookContext) -> None:
            for id_, _ in context.query("Line", {"order": order.id}):
                context.delete("Line", id_)
            context.update("Counter", "c", {"n": 0})
            context.create("Audit", {"deleted": order.id}, id="audit")

        with World(folder, application) as world:
            world.lab.settle(
                create(1, "o1", entity="Order"),
                create(2, "l1", {"order": "o1"}, entity="Line"),
                create(3, "l2", {"order": "o2"}, entity="Line"),
                create(4, "c", {"n": 5}, entity="Counter"),
                replica=REPLICA_B,
            )
            a = world.replica()
            a.synchronize_all()
            a.delete("Order", "o1")

            report = a.synchronize_unsynchronized()

            assert report.applied == 1
            assert report.removed == 1
            assert sorted(contents(a, "Line")) == ["l2"]
            assert contents(a, "Counter") == {"c": {"n": 0}}
            assert contents(a, "Audit") == {"audit": {"deleted": "o1"}}

    def test_lost_answers(self, folder: Path) -> None:
        """What operations changed whose answers were lost comes down when they are sent again."""
        application = Application()

        @application.after_commit("Task")
        def counts(task: HookObject, context: HookContext) -> None:
            context.create("Audit", {"of": task.id}, id=f"audit-{task.id}")

        with World(folder, application) as world:
            a = world.replica()
            a.create("Task", {}, "t1")
            world.lose_answers(a)
            world.lab.settle(create(1, "theirs", entity="Note"), replica=REPLICA_B)

            report = a.synchronize_unsynchronized()

            assert report.applied == 1
            assert contents(a, "Audit") == {"audit-t1": {"of": "t1"}}
            assert contents(a, "Note") == {}

    def test_many_changed_objects_come_in_pages(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """More changed objects than a page holds come all, each once, as they are in the end."""
        monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 3)
        a = world.replica()
        with a.transaction() as tx:
            for n in range(10):
                tx.create("Task", {}, f"t{n}")
            for n in range(0, 10, 2):
                tx.update("Task", f"t{n}", increment={"n": 1})
            tx.delete("Task", "t1")

        report = a.synchronize_unsynchronized()

        assert (report.downloaded, report.confirmed) == (5, 4)
        assert contents(a) == {f"t{n}": {"n": 1} if n % 2 == 0 else {} for n in range(10) if n != 1}

    def test_what_all_batches_changed_comes(self, folder: Path) -> None:
        """What hooks made of objects of the first batch comes like that of the last one."""
        application = Application()

        @application.before_commit("Task")
        def stamps(task: HookObject, context: HookContext) -> None:
            task["stamp"] = 1

        with World(folder, application) as world:
            a = world.replica()
            with a.transaction() as tx:
                for n in range(1_100):
                    tx.create("Task", {}, f"t{n:04}")

            report = a.synchronize_unsynchronized()

            assert (report.applied, report.downloaded) == (1_100, 1_100)
            assert a.count("Task", {"stamp": 1}) == 1_100

    def test_an_object_fetched_ahead_of_the_cursor_and_deleted_later(self, world: World) -> None:
        """What was downloaded ahead of the cursor and deleted elsewhere since is removed by the next *all*."""
        a = world.replica()
        a.synchronize_all()
        a.create("Task", {}, "t1")
        a.synchronize_unsynchronized()
        world.lab.settle(delete(1, base_version=1), replica=REPLICA_B)

        report = a.synchronize_all()

        assert contents(a) == {}
        assert report.removed == 1


class TestSelected:
    def test_what_is_selected_goes_up_and_comes_down(self, world: World) -> None:
        """Only the selected objects' operations are uploaded, and only these objects are downloaded."""
        a = world.replica()
        world.lab.settle(create(1, "t1", {"a": 1}), create(2, "t2", {"a": 1}), replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(update(3, "t1", {"b": 2}), update(4, "t2", {"b": 2}), replica=REPLICA_B)
        a.update("Task", "t1", {"c": 3})
        a.update("Task", "t2", {"c": 3})
        a.create("Task", {}, "t3")

        report = a.synchronize_selected([("Task", "t1")])

        assert (report.applied, report.downloaded, report.removed) == (1, 1, 0)
        assert list(report.skipped) == []
        assert list(report.added) == []
        assert contents(a) == {"t1": {"a": 1, "b": 2, "c": 3}, "t2": {"a": 1, "c": 3}, "t3": {}}
        assert [logged.operation.id for logged in a.pending()] == ["t2", "t3"]
        assert world.lab.attributes("t2") == {"a": 1, "b": 2}

    def test_what_is_gone_is_removed(self, world: World) -> None:
        """Selected objects that the server does not have any more leave the replica, those selected only."""
        a = world.replica()
        world.lab.settle(create(1, "t1"), create(2, "t2"), replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(delete(3, "t1"), delete(4, "t2"), replica=REPLICA_B)

        report = a.synchronize_selected([("Task", "t1")])

        assert report.removed == 1
        assert sorted(contents(a)) == ["t2"]

    def test_handles_and_pairs_and_repetitions(self, world: World) -> None:
        """Objects may be given as handles or pairs, and more than once."""
        a = world.replica()
        a.create("Task", {}, "t1")
        a.create("Task", {}, "t2")
        handle = a.get("Task", "t1")
        assert handle is not None

        report = a.synchronize_selected([handle, ("Task", "t1"), ("Task", "t2"), handle])

        assert report.applied == 2

    @pytest.mark.parametrize("wrong", ["t1", ("Task",), ("Task", ""), ("", "t1"), ("Task", 5), None, ["Task", "t1"]])
    def test_what_is_no_object(self, world: World, wrong: Any) -> None:
        """Selecting what is neither a handle nor a pair is an error before anything is done."""
        with pytest.raises(InvalidValue):
            world.replica().synchronize_selected([wrong])

    def test_more_than_may_be_selected(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """A selection over the limit is an error before anything is done."""
        monkeypatch.setattr("tidelog_client._replica.SELECTION_OBJECTS_MAX", 3)
        a = world.replica()
        a.create("Task", {}, "t1")

        with pytest.raises(LimitExceeded):
            a.synchronize_selected([("Task", f"t{n}") for n in range(4)])

        assert a.pending_count() == 1
        assert a.synchronize_selected([("Task", "t1"), ("Task", "t1"), ("Task", "t2"), ("Task", "t3")]).applied == 1

    def test_nothing_selected(self, world: World) -> None:
        """An empty selection does nothing."""
        a = world.replica()
        a.create("Task", {})

        report = a.synchronize_selected([])

        assert (report.applied, report.downloaded) == (0, 0)
        assert a.pending_count() == 1

    def test_what_is_not_here_yet_is_fetched(self, world: World) -> None:
        """Selecting an object that only the server has brings it."""
        world.lab.settle(create(1, "t1"), create(2, "t2"), replica=REPLICA_B)
        a = world.replica()

        report = a.synchronize_selected([("Task", "t1"), ("Task", "nowhere")])

        assert (report.downloaded, report.removed) == (1, 0)
        assert sorted(contents(a)) == ["t1"]

    def test_what_was_fetched_and_deleted_later(self, world: World) -> None:
        """What *selected* fetched ahead of the cursor and somebody deleted since is removed by the next *all*."""
        a = world.replica()
        a.synchronize_all()
        world.lab.settle(create(1), replica=REPLICA_B)
        a.synchronize_selected([("Task", "t1")])
        world.lab.settle(delete(2), replica=REPLICA_B)

        report = a.synchronize_all()

        assert contents(a) == {}
        assert report.removed == 1

    def test_a_deleted_object_cannot_be_selected(self, world: World) -> None:
        """An object whose deletion is pending is skipped and reported; its operations stay pending."""
        a = world.replica()
        a.create("Task", {}, "t1")
        a.create("Task", {}, "t2")
        a.delete("Task", "t1")

        report = a.synchronize_selected([("Task", "t1"), ("Task", "t2")])

        [skipped] = report.skipped
        assert (skipped.entity, skipped.id, skipped.reason, skipped.seq) == ("Task", "t1", SkipReason.DELETED, None)
        assert report.applied == 1
        assert [logged.operation.id for logged in a.pending()] == ["t1", "t1"]

    def test_an_uncommitted_object_cannot_be_selected(self, world: World) -> None:
        """An object that was never committed is skipped and reported, and stays as it is."""
        a = world.replica()
        new = a.new("Task", {"title": "draft"}, "t1")

        report = a.synchronize_selected([new])

        [skipped] = report.skipped
        assert (skipped.id, skipped.reason) == ("t1", SkipReason.UNCOMMITTED)
        assert new.is_new
        assert new["title"] == "draft"
        assert world.lab.version() == 0

    def test_all_operations_on_an_object_go(self, world: World) -> None:
        """With an object all its pending operations are uploaded, in log order."""
        a = world.replica()
        a.create("Task", {"n": 1}, "t1")
        a.create("Task", {}, "t2")
        a.update("Task", "t1", increment={"n": 1})
        a.update("Task", "t1", {"done": True})

        report = a.synchronize_selected([("Task", "t1")])

        assert report.applied == 3
        assert [change.seq for change in world.lab.changes()] == [1, 3, 4]
        assert list(report.added) == []

    def test_a_commit_group_goes_whole(self, world: World) -> None:
        """Selecting one member of a commit group takes the group, and what its other objects need; all is named."""
        a = world.replica()
        a.create("Task", {"n": 0}, "t1")
        a.create("Task", {}, "t9")
        with a.transaction(atomic=True) as tx:
            tx.update("Task", "t1", {"n": 1})
            tx.create("Task", {}, "t2")
            tx.create("Task", {}, "t3")
        a.update("Task", "t2", {"later": True})

        report = a.synchronize_selected([("Task", "t3")])

        # t1's creation comes before its place in the group; t2's later update need not come along.
        assert [change.seq for change in world.lab.changes()] == [1, 3, 4, 5]
        assert sorted(report.added) == [("Task", "t1"), ("Task", "t2")]
        assert [logged.operation.seq for logged in a.pending()] == [2, 6]
        assert contents(a)["t2"] == {"later": True}

    def test_a_group_with_a_deletion_in_it(self, world: World) -> None:
        """A deletion that belongs to a selected object's commit group goes with it."""
        a = world.replica()
        world.lab.settle(create(1, "old"), replica=REPLICA_B)
        a.synchronize_all()
        with a.transaction(atomic=True) as tx:
            tx.create("Task", {}, "new")
            tx.delete("Task", "old")

        report = a.synchronize_selected([("Task", "new")])

        assert report.applied == 2
        assert world.lab.attributes("old") is None
        assert contents(a) == {"new": {}}

    def test_creations_of_referenced_objects_go_along(self, orders: World) -> None:
        """Pending creations that a selected object refers to are uploaded first, over any number of steps."""
        a = orders.replica(schema=ORDERS)
        a.create("Order", {}, "o2")
        a.create("Order", {"parent": "o2"}, "o1")
        a.create("Order", {}, "unrelated")
        a.create("Line", {"order": "o1"}, "l1")
        a.update("Order", "o1", {"note": "later"})

        report = a.synchronize_selected([("Line", "l1")])

        assert report.applied == 3
        assert sorted(report.added) == [("Order", "o1"), ("Order", "o2")]
        assert [change.key[1] for change in orders.lab.changes()] == ["o2", "o1", "l1"]
        assert [logged.operation.seq for logged in a.pending()] == [3, 5]
        assert contents(a, "Order")["o1"] == {"parent": "o2", "note": "later"}

    def test_references_in_a_circle(self, orders: World) -> None:
        """Objects that refer to each other in a circle go together."""
        a = orders.replica(schema=ORDERS)
        a.create("Order", {"parent": "o2"}, "o1")
        a.create("Order", {"parent": "o1"}, "o2")

        report = a.synchronize_selected([("Order", "o2")])

        assert report.applied == 2
        assert list(report.added) == [("Order", "o1")]

    @pytest.mark.parametrize("how", [{"attributes": {"order": "o1"}}, {"add": {"orders": ["o1"]}}])
    def test_references_that_an_update_sets(self, orders: World, how: dict[str, Any]) -> None:
        """References count wherever they are written: set by an update, or added to a list."""
        a = orders.replica(schema=ORDERS)
        orders.lab.settle(create(1, "l1", {"orders": []}, entity="Line"), replica=REPLICA_B)
        a.synchronize_all()
        a.create("Order", {}, "o1")
        a.update("Line", "l1", **how)

        report = a.synchronize_selected([("Line", "l1")])

        assert report.applied == 2
        assert list(report.added) == [("Order", "o1")]

    def test_the_server_says_what_refers_to_what(self, orders: World) -> None:
        """A replica without a schema of its own follows the references that the server named at first contact."""
        a = orders.replica()
        a.synchronize_all()
        a.create("Order", {}, "o1")
        a.create("Line", {"order": "o1"}, "l1")

        report = a.synchronize_selected([("Line", "l1")])

        assert report.applied == 2
        assert list(report.added) == [("Order", "o1")]

    def test_what_an_operation_left_behind_would_provide_is_awaited(self, orders: World) -> None:
        """Where the replica cannot know a reference, what is missing is not ready: reported, pending, no failure."""
        a = orders.replica()
        a.create("Order", {}, "o1")
        a.create("Line", {"order": "o1"}, "l1")

        first = a.synchronize_selected([("Line", "l1")])

        assert (first.applied, first.rejected) == (0, 0)
        [skipped] = first.skipped
        assert (skipped.entity, skipped.id, skipped.reason, skipped.seq) == ("Line", "l1", SkipReason.NOT_READY, 2)
        assert contents(a, "Line") == {"l1": {"order": "o1"}}
        second = a.synchronize_selected([("Line", "l1")])
        assert second.applied == 2

    def test_out_of_log_order_and_then_all(self, world: World) -> None:
        """What was selected out of log order and what *all* brings later is settled once, and leaves no gap."""
        a = world.replica()
        for n in range(1, 7):
            a.create("Task", {"n": n}, f"t{n}")

        applied = [
            a.synchronize_selected([("Task", "t5")]).applied,
            a.synchronize_selected([("Task", "t2"), ("Task", "t3")]).applied,
            a.synchronize_all().applied,
            a.synchronize_all().applied,
        ]

        assert applied == [1, 2, 3, 0]
        assert [change.seq for change in world.lab.changes()] == [5, 2, 3, 1, 4, 6]
        replica = world.lab.replica(bytes.fromhex(a.replica_id.replace("-", "")))
        assert replica.settled_ranges == ((1, 6),)
        assert replica.newest_seq == 6
        assert contents(a) == {f"t{n}": {"n": n} for n in range(1, 7)}

    def test_a_selection_in_pages(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """More selected objects than a page or a message holds come all."""
        monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 3)
        monkeypatch.setattr(synchronization, "SELECTION_KEYS_A_MESSAGE", 4)
        world.lab.settle(*[create(n, f"t{n}") for n in range(1, 21)], replica=REPLICA_B)
        a = world.replica()

        report = a.synchronize_selected([("Task", f"t{n}") for n in range(1, 30, 2)])

        assert report.downloaded == 10
        assert sorted(contents(a)) == sorted(f"t{n}" for n in range(1, 20, 2))

    def test_the_cursor_stays(self, world: World) -> None:
        """What *selected* passes over comes with the next *all*."""
        a = world.replica()
        a.synchronize_all()
        world.lab.settle(create(1, "t1"), create(2, "t2"), replica=REPLICA_B)
        a.synchronize_selected([("Task", "t2")])

        a.synchronize_all()

        assert sorted(contents(a)) == ["t1", "t2"]


class TestEveryMode:
    @pytest.mark.parametrize("mode", MODES)
    def test_what_a_hook_changed_comes_back_at_once(self, folder: Path, mode: str) -> None:
        """What a hook made of an uploaded object comes in the same synchronization."""
        application = Application()

        @application.before_commit("Task")
        def tidies(task: HookObject, context: HookContext) -> None:
            task["slug"] = task["title"].lower()

        with World(folder, application) as world:
            a = world.replica()
            a.create("Task", {"title": "Milk"}, "t1")

            synchronize(a, mode)

            assert contents(a) == {"t1": {"title": "Milk", "slug": "milk"}}

    @pytest.mark.parametrize("mode", MODES)
    def test_a_refusal_reaches_its_author(self, folder: Path, mode: str) -> None:
        """A refused operation is in the report, in the replica's own store and on the server, with its payload."""
        application = Application()

        @application.before_commit("Task")
        def needs_a_title(task: HookObject, context: HookContext) -> None:
            if not task["title"]:
                raise Reject("a task needs a title")

        with World(folder, application) as world:
            a = world.replica()
            a.create("Task", {"title": "", "note": "keep me"}, "t1")
            sent = next(a.pending()).operation

            report = synchronize(a, mode)

            assert (report.applied, report.rejected) == (0, 1)
            [failure] = report.failures
            assert (failure.entity, failure.object_id) == ("Task", "t1")
            assert (failure.reason, failure.message) == (FailureReason.HOOK_REJECTED, "a task needs a title")
            assert failure.operation == sent
            assert failure.operation_bytes == sent.encode()
            assert failure.attributes == {"title": "", "note": "keep me"}
            assert failure.replica_id == a.replica_id
            assert [found.id for found in a.failures()] == [failure.id]
            assert contents(a) == {}
            assert a.pending_count() == 0
            service = failure_pb2_grpc.FailureServiceStub(world.channel())
            listed = service.ListFailures(failure_pb2.ListFailuresRequest(replica_id=a.replica_id)).failures
            got = service.GetFailure(failure_pb2.GetFailureRequest(id=failure.id)).failure
            assert list(listed) == [got]
            assert got.operation == sent.encode()
            assert got.reason == operation_pb2.FAILURE_REASON_HOOK_REJECTED
            assert '"note": "keep me"' in got.operation_json

    @pytest.mark.parametrize("mode", MODES)
    def test_an_edit_that_lost_against_a_deletion(self, world: World, mode: str) -> None:
        """An update of an object that somebody deleted meanwhile is a failure that keeps what was written."""
        a = world.replica()
        a.create("Task", {"title": "x"}, "t1")
        a.synchronize_all()
        world.lab.settle(delete(1, base_version=1), replica=REPLICA_B)
        a.update("Task", "t1", {"title": "hours of work"})

        report = synchronize(a, mode)

        [failure] = report.failures
        assert failure.reason is FailureReason.OBJECT_GONE
        assert failure.attributes == {"title": "hours of work"}
        a.synchronize_all()
        assert contents(a) == {}

    def test_a_refused_group_comes_back_whole(self, folder: Path) -> None:
        """A refused commit group leaves the view whole: one failure about the culprit, with all members."""
        application = Application()

        @application.before_commit("Task")
        def rejects(task: HookObject, context: HookContext) -> None:
            if task["bad"]:
                raise Reject("bad")

        with World(folder, application) as world:
            a = world.replica()
            a.create("Task", {"n": 1}, "t1")
            with a.transaction(atomic=True) as tx:
                tx.update("Task", "t1", {"n": 2})
                tx.create("Task", {"bad": True}, "t2")
                tx.create("Task", {}, "t3")

            report = a.synchronize_all()

            assert (report.applied, report.rejected) == (1, 3)
            [failure] = report.failures
            assert (failure.object_id, failure.reason) == ("t2", FailureReason.HOOK_REJECTED)
            assert [one.id for one in failure.group_operations] == ["t1", "t2", "t3"]
            assert contents(a) == {"t1": {"n": 1}}

    @pytest.mark.parametrize("mode", MODES)
    def test_a_refused_operation_does_not_block(self, folder: Path, mode: str) -> None:
        """Everything that can be settled is settled in one synchronization, whatever is refused before it."""
        application = Application()

        @application.before_commit("Task")
        def rejects(task: HookObject, context: HookContext) -> None:
            if task["bad"]:
                raise Reject("bad")

        with World(folder, application) as world:
            a = world.replica()
            a.create("Task", {}, "t1")
            a.update("Task", "t1", {"bad": True})
            a.update("Task", "t1", {"good": True})

            report = synchronize(a, mode)

            assert (report.applied, report.rejected) == (2, 1)
            assert contents(a) == {"t1": {"good": True}}

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("phase", [Phase.CONNECT, Phase.UPLOAD, Phase.DOWNLOAD])
    def test_edits_go_on_meanwhile(self, world: World, mode: str, phase: Phase) -> None:
        """What is committed while a synchronization runs stays in the view on top of what comes, and is sent next."""
        a = world.replica()
        world.lab.settle(create(1, set={"theirs": 1, "both": 1}), replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(update(2, set={"theirs": 2, "both": 2}), replica=REPLICA_B)
        a.update("Task", "t1", {"mine": 1})
        edits = iter([{"mine": 2, "both": "mine"}])

        def edits_once(progress: Progress) -> None:
            if progress.phase is phase and (edit := next(edits, None)):
                a.update("Task", "t1", edit)
                a.create("Task", {}, "t2")

        synchronize(a, mode, on_progress=edits_once)

        assert contents(a) == {"t1": {"theirs": 2, "both": "mine", "mine": 2}, "t2": {}}
        a.synchronize_all()
        assert world.lab.attributes() == {"theirs": 2, "both": "mine", "mine": 2}
        assert world.lab.attributes("t2") == {}
        assert a.pending_count() == 0

    @pytest.mark.parametrize("mode", MODES)
    def test_a_deletion_meanwhile(self, world: World, mode: str) -> None:
        """An object that is deleted while its snapshot comes stays deleted, and the deletion is sent next."""
        a = world.replica()
        world.lab.settle(create(1), replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(update(2, set={"n": 1}), replica=REPLICA_B)
        a.update("Task", "t1", {"n": 2})
        pending = iter([True])

        def deletes_once(progress: Progress) -> None:
            if progress.phase is Phase.DOWNLOAD and next(pending, False):
                a.delete("Task", "t1")

        synchronize(a, mode, on_progress=deletes_once)

        assert contents(a) == {}
        assert a.synchronize_all().applied == 1
        assert world.lab.attributes() is None

    @pytest.mark.parametrize("mode", MODES)
    def test_uncommitted_changes_survive(self, world: World, mode: str) -> None:
        """What a handle has not committed survives a synchronization and stands in front of what it brings."""
        a = world.replica()
        world.lab.settle(create(1, set={"title": "old", "note": "old"}), replica=REPLICA_B)
        a.synchronize_all()
        handle = a.get("Task", "t1")
        assert handle is not None
        handle["title"] = "mine"
        new = a.new("Task", {"title": "draft"})
        world.lab.settle(update(2, set={"title": "theirs", "note": "new"}), replica=REPLICA_B)
        a.update("Task", "t1", {"n": 1})

        synchronize(a, mode)

        assert handle.to_dict() == {"title": "mine", "note": "new", "n": 1}
        assert handle.uncommitted == {"title": "mine"}
        assert new.is_new
        assert new.to_dict() == {"title": "draft"}
        handle.commit()
        committed = next(a.pending()).operation
        # What the author looked at is what was there when the change was begun.
        assert (committed.base_version, decode_map(committed.patch)) == (1, {"set": {"title": "mine"}})
        a.synchronize_all()
        assert world.lab.attributes() == {"title": "mine", "note": "new", "n": 1}

    @pytest.mark.parametrize("mode", MODES)
    def test_uncommitted_changes_of_a_removed_object(self, world: World, mode: str) -> None:
        """A handle whose object was removed hands its unsaved changes over with the error."""
        a = world.replica()
        world.lab.settle(create(1), replica=REPLICA_B)
        a.synchronize_all()
        handle = a.get("Task", "t1")
        assert handle is not None
        handle["title"] = "mine"
        world.lab.settle(delete(2), replica=REPLICA_B)
        a.synchronize_selected([handle]) if mode == "selected" else a.synchronize_all()

        assert not handle.exists
        with pytest.raises(ObjectNotFound) as caught:
            handle.commit()
        assert caught.value.unsaved == {"title": "mine"}
        with pytest.raises(ObjectNotFound):
            handle["title"]

    @pytest.mark.parametrize("mode", MODES)
    def test_another_server(self, world: World, folder: Path, mode: str) -> None:
        """A replica that has met one server refuses another one's data; nothing is lost and nothing is sent."""
        a = world.replica()
        a.create("Task", {}, "t1")
        a.synchronize_all()
        a.create("Task", {}, "t2")
        with Server(Application(), store=folder / "other") as other:
            a.close()
            b = world.replica(server=other.address)

            with pytest.raises(ForeignServer) as caught:
                synchronize(b, mode)

            assert (caught.value.expected, caught.value.actual) == (
                world.store.identity.epoch,
                other._store.identity.epoch,
            )
            assert sorted(contents(b)) == ["t1", "t2"]
            assert b.pending_count() == 1
            with other._store.read("default") as reader:
                assert reader.head().version == 0

    @pytest.mark.parametrize("mode", MODES)
    def test_a_creation_that_another_replica_was_first_with(self, world: World, mode: str) -> None:
        """Who comes second with an id gets a failure with the payload, and then sees the first one's object."""
        a = world.replica()
        a.create("Task", {"by": "a"}, "t1")
        world.lab.settle(create(1, set={"by": "b"}), replica=REPLICA_B)

        report = synchronize(a, mode)

        assert [failure.reason for failure in report.failures] == [FailureReason.ALREADY_EXISTS]
        a.synchronize_all()
        assert contents(a) == {"t1": {"by": "b"}}

    @pytest.mark.parametrize("mode", MODES)
    def test_children_before_their_parent(self, orders: World, mode: str) -> None:
        """Operations that refer to what comes later in the log all apply, in every mode."""
        a = orders.replica(schema=ORDERS)
        with a.transaction() as tx:
            for n in range(105):
                tx.create("Line", {"order": "o1"}, f"l{n}")
            tx.create("Order", {}, "o1")

        report = synchronize(a, mode, [("Line", f"l{n}") for n in range(105)])

        assert (report.applied, report.held, report.rejected) == (106, 105, 0)
        assert a.pending_count() == 0

    @pytest.mark.parametrize("mode", MODES)
    def test_a_download_that_breaks_off_shows_nothing(
        self, world: World, monkeypatch: pytest.MonkeyPatch, mode: str
    ) -> None:
        """A connection that breaks off before the download is complete changes nothing that is visible."""
        monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 2)
        a = world.replica()
        world.lab.settle(*[create(n, f"t{n}", {"n": 1}) for n in range(1, 9)], replica=REPLICA_B)
        a.synchronize_all()
        world.lab.settle(*[update(8 + n, f"t{n}", {"n": 2}) for n in range(1, 9)], replica=REPLICA_B)
        with a.transaction() as tx:
            for n in range(1, 9):
                tx.update("Task", f"t{n}", {"m": 1})

        with pytest.raises(Broken):
            synchronize(a, mode, [("Task", f"t{n}") for n in range(1, 9)], on_progress=_break_after(4))

        assert contents(a) == {f"t{n}": {"n": 1, "m": 1} for n in range(1, 9)}
        assert a.pending_count() == 0
        synchronize(a, mode, [("Task", f"t{n}") for n in range(1, 9)])
        a.synchronize_all()
        assert contents(a) == {f"t{n}": {"n": 2, "m": 1} for n in range(1, 9)}


class TestDurability:
    @pytest.mark.parametrize("durability", ["full", "relaxed"])
    def test_the_log_is_on_disk_before_it_is_sent(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, durability: str
    ) -> None:
        """What the server has seen a crash cannot take from the log, in relaxed durability neither."""
        happened: list[str] = []
        application = Application()
        application.before_commit("Task")(lambda task, context: happened.append("applied"))
        sync = Environment.sync

        def syncs(self: Environment) -> None:
            happened.append("synced")
            sync(self)

        with World(folder, application) as world:
            a = world.replica(durability=durability)
            a.create("Task", {})
            monkeypatch.setattr(Environment, "sync", syncs)

            a.synchronize_all()

        assert happened[:2] == ["synced", "applied"]


class TestDeletionsMeanwhile:
    """What happens on the server while a download is under way."""

    @pytest.mark.parametrize("known", [True, False])
    def test_an_object_deleted_between_two_pages(
        self, world: World, monkeypatch: pytest.MonkeyPatch, *, known: bool
    ) -> None:
        """An object that was sent and is deleted before the download ends does not stay behind."""
        monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 2)
        a = world.replica()
        if known:
            a.synchronize_all()
        world.lab.settle(*[create(n, f"t{n}") for n in range(1, 9)], replica=REPLICA_B)
        deletions = iter([delete(9, "t1")])

        def deletes_once(progress: Progress) -> None:
            if progress.phase is Phase.DOWNLOAD and progress.done >= 2 and (data := next(deletions, None)):
                world.lab.settle(data, replica=REPLICA_B)

        a.synchronize_all(on_progress=deletes_once)
        a.synchronize_all()

        assert sorted(contents(a)) == [f"t{n}" for n in range(2, 9)]

    def test_an_object_changed_between_two_pages(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """An object that is changed while the download runs arrives in its last state."""
        monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 2)
        a = world.replica()
        world.lab.settle(*[create(n, f"t{n}", {}) for n in range(1, 9)], replica=REPLICA_B)
        changes = iter(range(9, 100))

        def changes_often(progress: Progress) -> None:
            if progress.phase is Phase.DOWNLOAD and progress.done < 20:
                seq = next(changes)
                world.lab.settle(update(seq, f"t{1 + seq % 8}", {"n": seq}), replica=REPLICA_B)

        a.synchronize_all(on_progress=changes_often)
        a.synchronize_all()

        assert contents(a) == {f"t{n}": world.lab.attributes(f"t{n}") for n in range(1, 9)}


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pages of 5 objects, stage each, publish at most 10 objects at once and else 2 pages a step."""
    monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 5)
    monkeypatch.setattr(synchronization, "STAGE_BYTES", 1)
    monkeypatch.setattr(publication, "PUBLISH_OBJECTS_MAX", 10)
    monkeypatch.setattr(publication, "PUBLISH_STEP_PAGES", 2)


def _break_after(count: int) -> Any:
    """Return an observer that breaks the synchronization off after so many downloaded objects."""

    def breaks(progress: Progress) -> None:
        if progress.phase is Phase.DOWNLOAD and progress.done >= count:
            raise Broken

    return breaks


def _damage_pages(replica: Replica) -> None:
    """Put something else in the place of what was downloaded and is not published."""
    incoming = replica._storage.publication._incoming

    def damage(transaction: LmdbTransaction) -> None:
        for key in list(scan_keys(transaction, incoming)):
            transaction.put(key, b"\xff no page", db=incoming)

    replica._storage.environment.write(damage)


def _pages(world: World, cursor: bytes) -> Iterator[sync_pb2.SnapshotPage]:
    """Download as a client without streams of both directions does."""
    request = sync_pb2.DownloadSnapshotsRequest(protocol_version=1, cursor=cursor)
    for response in sync_pb2_grpc.SyncServiceStub(world.channel()).DownloadSnapshots(request):
        if response.WhichOneof("message") == "page":
            yield response.page


@pytest.mark.usefixtures("staged")
class TestStagedDownload:
    def fill(self, world: World, count: int = 40) -> dict[str, Any]:
        """Put objects on the server and return them."""
        world.lab.settle(*[create(n, f"t{n:03}", {"n": n}) for n in range(1, count + 1)], replica=REPLICA_B)
        return {f"t{n:03}": {"n": n} for n in range(1, count + 1)}

    def test_a_download_in_steps_is_whole(self, world: World) -> None:
        """A first download that is published in steps brings everything."""
        everything = self.fill(world)
        a = world.replica()

        report = a.synchronize_all()

        assert contents(a) == everything
        assert (report.downloaded, report.removed) == (40, 0)
        assert a.synchronize_all().downloaded == 0

    def test_a_delta_in_steps_is_whole(self, world: World) -> None:
        """A large delta that is published in steps brings changes and removals."""
        everything = self.fill(world)
        a = world.replica()
        a.synchronize_all()
        world.lab.settle(
            *[update(40 + n, f"t{n:03}", {"m": n}) for n in range(1, 31)],
            *[delete(70 + n, f"t{n + 30:03}") for n in range(1, 11)],
            replica=REPLICA_B,
        )

        report = a.synchronize_all()

        assert contents(a) == {f"t{n:03}": everything[f"t{n:03}"] | {"m": n} for n in range(1, 31)}
        assert (report.downloaded, report.removed) == (30, 10)

    def test_a_reconciliation_in_steps_removes_what_is_gone(self, world: World) -> None:
        """A reconciliation that is published in steps removes exactly what the server does not have."""
        everything = self.fill(world)
        a = world.replica()
        a.synchronize_all()
        a.create("Task", {"mine": True}, "mine")
        world.lab.settle(delete(41, "t001"), delete(42, "t040"), replica=REPLICA_B)
        a._storage.set_meta(cursor=b"")

        report = a.synchronize_all()

        del everything["t001"], everything["t040"]
        assert contents(a) == everything | {"mine": {"mine": True}}
        assert report.removed == 2

    def test_a_download_that_was_cut_goes_on(self, world: World) -> None:
        """What was staged before a connection broke is not downloaded again, and shows only when all is there."""
        everything = self.fill(world)
        a = world.replica()
        with pytest.raises(Broken):
            a.synchronize_all(on_progress=_break_after(20))
        assert contents(a) == {}
        told: list[Progress] = []

        report = a.synchronize_all(on_progress=told.append)

        assert contents(a) == everything
        assert report.downloaded == 40
        assert max(progress.done for progress in told if progress.phase is Phase.DOWNLOAD) <= 25

    def test_a_replica_that_was_closed_goes_on(self, world: World) -> None:
        """What was staged survives the end of the program."""
        everything = self.fill(world)
        a = world.replica()
        with pytest.raises(Broken):
            a.synchronize_all(on_progress=_break_after(20))
        a.close()
        told: list[Progress] = []

        b = world.replica()
        b.synchronize_all(on_progress=told.append)

        assert contents(b) == everything
        assert max(progress.done for progress in told if progress.phase is Phase.DOWNLOAD) <= 25

    @pytest.mark.parametrize("known", [True, False])
    def test_what_changed_between_the_two_halves(self, world: World, *, known: bool) -> None:
        """Objects that were staged, and then changed or deleted on the server, come out right in the end."""
        a = world.replica()
        if known:
            a.synchronize_all()
        everything = self.fill(world)
        with pytest.raises(Broken):
            a.synchronize_all(on_progress=_break_after(20))
        world.lab.settle(
            delete(41, "t001"),
            update(42, "t002", {"n": "changed"}),
            delete(43, "t040"),
            create(44, "t041", {"n": 41}),
            delete(45, "t003"),
            create(46, "t003", {"n": "again"}),
            replica=REPLICA_B,
        )

        a.synchronize_all()

        del everything["t001"], everything["t040"]
        everything |= {"t002": {"n": "changed"}, "t003": {"n": "again"}, "t041": {"n": 41}}
        assert contents(a) == everything
        assert a.synchronize_all().downloaded == 0

    def test_edits_between_the_two_halves(self, world: World) -> None:
        """Local commits go on while half a download is staged, and are uploaded before it goes on."""
        everything = self.fill(world)
        a = world.replica()
        with pytest.raises(Broken):
            a.synchronize_all(on_progress=_break_after(20))
        a.create("Task", {"mine": True}, "mine")

        report = a.synchronize_all()

        assert report.applied == 1
        assert contents(a) == everything | {"mine": {"mine": True}}

    @pytest.mark.parametrize("mode", ["unsynchronized", "selected"])
    def test_other_modes_between_the_two_halves(self, world: World, mode: str) -> None:
        """Another synchronization between the halves of a download harms neither."""
        everything = self.fill(world)
        a = world.replica()
        with pytest.raises(Broken):
            a.synchronize_all(on_progress=_break_after(20))
        a.create("Task", {"mine": True}, "mine")
        synchronize(a, mode, [("Task", "mine"), ("Task", "t005")])

        a.synchronize_all()

        assert contents(a) == everything | {"mine": {"mine": True}}

    @pytest.mark.parametrize("steps_done", [0, 1, 2, 3])
    @pytest.mark.parametrize("known", [True, False])
    def test_a_crash_while_it_is_published(
        self, world: World, monkeypatch: pytest.MonkeyPatch, steps_done: int, *, known: bool
    ) -> None:
        """A publication that a crash interrupts is rolled forward when the replica is opened, without a network."""
        a = world.replica()
        if known:
            world.lab.settle(create(100, "old"), replica=REPLICA_B)
            a.synchronize_all()
            world.lab.settle(delete(101, "old"), replica=REPLICA_B)
        world.lab.settle(*[create(n, f"t{n:03}", {"n": n}) for n in range(1, 41)], replica=bytes(15) + b"d")
        steps = iter(range(steps_done))
        original = Publication._publish_step

        def crashes(self: Publication, *args: Any, **options: Any) -> Any:
            if next(steps, None) is None:
                raise Broken
            return original(self, *args, **options)

        monkeypatch.setattr(Publication, "_publish_step", crashes)
        with pytest.raises(Broken):
            a.synchronize_all()
        a.close()
        monkeypatch.setattr(Publication, "_publish_step", original)

        with Replica(a.path) as offline:
            assert contents(offline) == {f"t{n:03}": {"n": n} for n in range(1, 41)}
        b = world.replica()
        b.create("Task", {"mine": True}, "mine")
        b.synchronize_unsynchronized()
        b.synchronize_all()

        assert contents(b) == {f"t{n:03}": {"n": n} for n in range(1, 41)} | {"mine": {"mine": True}}
        assert b.synchronize_all().downloaded == 0

    @pytest.mark.parametrize("hindrance", ["a full disk", "a state that is missing", "a synchronization", "damage"])
    def test_what_cannot_be_rolled_forward_when_a_replica_is_opened(
        self, world: World, monkeypatch: pytest.MonkeyPatch, hindrance: str
    ) -> None:
        """A replica opens though the rest of a publication cannot come into view yet; synchronizing does that."""
        everything = self.fill(world)
        a = world.replica()
        errors: list[Exception] = [Broken()]
        original = Publication._publish_step

        def fails(self: Publication, *args: Any, **options: Any) -> Any:
            counts = original(self, *args, **options)
            if errors:
                raise errors[0]
            return counts

        monkeypatch.setattr(Publication, "_publish_step", fails)
        with pytest.raises(Broken):
            a.synchronize_all()
        if hindrance == "damage":
            _damage_pages(a)
        a.close()
        errors[0] = DiskFull("no room left") if hindrance == "a full disk" else StateLost()
        if hindrance == "damage":
            errors.clear()
        lock = FileLock(a.path / "synchronize.lock", is_singleton=False)
        if hindrance == "a synchronization":
            errors.clear()
            lock.acquire()

        b = world.replica()

        assert contents(b) == {}
        b.create("Task", {"mine": True}, "mine")
        errors.clear()
        lock.release()
        b.synchronize_all()
        assert contents(b) == everything | {"mine": {"mine": True}}

    def test_a_confirmed_state_that_is_missing_in_a_later_step(self, world: World) -> None:
        """A missing state that shows while a download is published in steps is sent again, and nothing is removed."""
        self.fill(world)
        a = world.replica()
        a.create("Task", {"mine": True}, "zz")
        a.synchronize_unsynchronized()
        objects = a._storage.environment.database("objects")
        a._storage.environment.write(lambda transaction: transaction.drop(objects, delete=False))

        a.synchronize_all()

        assert len(contents(a)) == 41
        assert contents(a)["zz"] == {"mine": True}


class TestSimpleClients:
    """The two calls for clients without streams of both directions."""

    def test_an_upload_settles_everything_at_once(self, orders: World) -> None:
        """`UploadOperations` answers with final results, in order, held operations included."""
        stub = sync_pb2_grpc.SyncServiceStub(orders.channel())
        batch = [
            create(1, "l1", {"order": "o1"}, entity="Line"),
            update(2, "nothing"),
            create(3, "o1", entity="Order"),
        ]
        request = sync_pb2.UploadOperationsRequest(
            protocol_version=1,
            replica_id="00000000-0000-4000-8000-000000000001",
            operations=[operation_pb2.Operation.FromString(data) for data in batch],
        )

        first = stub.UploadOperations(request)
        again = stub.UploadOperations(request)

        assert [(result.seq, result.status) for result in first.results] == [
            (1, operation_pb2.OPERATION_STATUS_APPLIED),
            (2, operation_pb2.OPERATION_STATUS_REJECTED),
            (3, operation_pb2.OPERATION_STATUS_APPLIED),
        ]
        assert first.version == again.version == 2
        assert list(again.results) == list(first.results)

    @pytest.mark.parametrize("more_follow", [True, False])
    def test_what_follows_is_awaited(self, orders: World, *, more_follow: bool) -> None:
        """With `more_follow` a missing reference is not ready, without it it dangles."""
        stub = sync_pb2_grpc.SyncServiceStub(orders.channel())
        operation = operation_pb2.Operation.FromString(create(1, "l1", {"order": "o1"}, entity="Line"))

        response = stub.UploadOperations(
            sync_pb2.UploadOperationsRequest(
                protocol_version=1,
                replica_id="00000000-0000-4000-8000-000000000001",
                operations=[operation],
                more_follow=more_follow,
            )
        )

        expected = operation_pb2.OPERATION_STATUS_NOT_READY if more_follow else operation_pb2.OPERATION_STATUS_REJECTED
        assert [result.status for result in response.results] == [expected]

    def test_a_download_from_a_cursor(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """`DownloadSnapshots` streams what changed since a cursor, and goes on from a resume token."""
        monkeypatch.setattr(download, "PAGE_OBJECTS_MAX", 2)
        world.lab.settle(*[create(n, f"t{n}") for n in range(1, 7)], replica=REPLICA_B)
        stub = sync_pb2_grpc.SyncServiceStub(world.channel())

        def ask(**request: Any) -> tuple[list[str], sync_pb2.DownloadStarted, sync_pb2.SessionComplete, bytes]:
            responses = list(stub.DownloadSnapshots(sync_pb2.DownloadSnapshotsRequest(protocol_version=1, **request)))
            pages = [one.page for one in responses[1:-1]]
            ids = [one.id for page in pages for one in page.snapshots]
            token = pages[1].resume_token if len(pages) > 1 else b""
            return ids, responses[0].started, responses[-1].complete, token

        ids, started, complete, token = ask()
        assert ids == [f"t{n}" for n in range(1, 7)]
        assert (started.resumed, started.reconcile) == (False, True)
        assert started.epoch == world.store.identity.epoch
        assert complete.version == 6
        ids, started, _, _ = ask(resume_token=token)
        assert ids == ["t5", "t6"]
        assert (started.resumed, started.reconcile) == (True, True)
        ids, started, _, _ = ask(cursor=complete.cursor)
        assert (ids, started.reconcile) == ([], False)

    def test_reading_online(self, world: World) -> None:
        """`ObjectService` reads objects as they are now, with a constraint, page by page."""
        world.lab.settle(*[create(n, f"t{n}", {"even": n % 2 == 0}) for n in range(1, 10)], delete(10, "t4"))
        stub = object_pb2_grpc.ObjectServiceStub(world.channel())

        found = stub.GetObject(object_pb2.GetObjectRequest(entity="Task", id="t3")).object
        ids = []
        token = ""
        while True:
            page = stub.ListObjects(
                object_pb2.ListObjectsRequest(
                    entity="Task",
                    where=(attribute("even") != True).to_message(),  # noqa: E712 - builds a constraint
                    page_size=2,
                    page_token=token,
                )
            )
            assert len(page.objects) <= 2
            ids += [one.id for one in page.objects]
            token = page.next_page_token
            if not token:
                break

        assert (found.version, decode_map(found.attributes)) == (3, {"even": False})
        assert ids == ["t1", "t3", "t5", "t7", "t9"]
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetObject(object_pb2.GetObjectRequest(entity="Task", id="t4"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    def test_failures_page_by_page(self, world: World) -> None:
        """`ListFailures` gives all failures once, oldest first, whatever the page size."""
        results = world.lab.session(principal=ANONYMOUS).settle(*[update(n, "gone") for n in range(1, 8)])
        stub = failure_pb2_grpc.FailureServiceStub(world.channel())
        ids = []
        token = ""
        while True:
            page = stub.ListFailures(failure_pb2.ListFailuresRequest(page_size=3, page_token=token))
            ids += [one.id.replace("-", "") for one in page.failures]
            token = page.next_page_token
            if not token:
                break

        assert said(results) == ["OBJECT_GONE"] * 7
        assert ids == [result.failure_id.hex() for result in results]
