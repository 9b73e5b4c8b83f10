"""Download modes and access, with a real server on one side and a real replica on the other."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.builders import REPLICA_B, World, contents, create, delete, quick_folder, update

from tidelog import DownloadMode, DownloadRefused, Entity, Integer, Schema, attribute
from tidelog_client import Replica, SkipReason
from tidelog_server import Application

A_LONG_TIME = datetime(2999, 1, 1, tzinfo=UTC)


@pytest.fixture
def application() -> Application:
    """Give an application without rules."""
    return Application()


@pytest.fixture
def world(application: Application) -> Iterator[World]:
    """Give a server with ten tasks."""
    with quick_folder() as folder, World(folder, application) as opened:
        opened.lab.settle(*[create(n, f"t{n}", {"n": n}) for n in range(1, 11)], replica=REPLICA_B)
        yield opened


def ids(replica: Replica, entity: str = "Task") -> list[str]:
    """Return the ids of the objects that a replica shows."""
    return sorted(contents(replica, entity))


class TestWishes:
    def test_where(self, world: World) -> None:
        """Only what matches comes, what moves out goes, what moves in comes."""
        a = world.replica(download={"Task": attribute("n") > 7})
        a.synchronize_all()
        assert ids(a) == ["t10", "t8", "t9"]
        world.lab.settle(update(11, "t8", {"n": 1}), update(12, "t1", {"n": 100}), delete(13, "t9"), replica=REPLICA_B)

        report = a.synchronize_all()

        assert ids(a) == ["t1", "t10"]
        assert report.removed == 2

    def test_changed_wishes(self, world: World) -> None:
        """A replica that is opened with another wish reconciles that entity, and only that one."""
        world.lab.settle(*[create(n, f"n{n}", {}, entity="Note") for n in range(11, 21)], replica=REPLICA_B)
        wishes: list[tuple[Any, list[str]]] = [
            ("all", [f"t{n}" for n in range(1, 11)]),
            (attribute("n") <= 2, ["t1", "t2"]),
            (attribute("n") >= 2, [f"t{n}" for n in range(2, 11)]),
            ("nothing_preserve", [f"t{n}" for n in range(2, 11)]),
            ("nothing_clear", []),
            ("never", []),
            ("all", [f"t{n}" for n in range(1, 11)]),
        ]
        for wish, expected in wishes:
            a = world.replica(download={"Task": wish})
            report = a.synchronize_all()
            assert ids(a) == sorted(expected), wish
            assert len(ids(a, "Note")) == 10
            assert a.synchronize_all().downloaded == 0
            assert report.attempts == 1
            a.close()

    def test_own_objects_that_are_wanted_after_all(self, world: World) -> None:
        """What went because it was not wanted comes with the first synchronization of everything that wants it."""
        with world.replica(download={"Task": attribute("n") > 7}) as a:
            a.create("Task", {"n": 0}, "mine")
            a.synchronize_unsynchronized()
            assert ids(a) == []

        a = world.replica()
        report = a.synchronize_all()

        assert "mine" in ids(a)
        assert report.attempts == 1

    def test_own_objects_outside(self, world: World) -> None:
        """What a replica creates outside of what it wants goes once it is synchronized; the server has it."""
        a = world.replica(download={"Task": attribute("n") > 7})
        a.create("Task", {"n": 0}, "mine")
        a.create("Task", {"n": 50}, "more")
        a.synchronize_all()

        a.update("Task", "more", {"n": 1})
        a.synchronize_all()

        assert ids(a) == ["t10", "t8", "t9"]
        assert world.lab.attributes("mine") == {"n": 0}

    def test_losing_what_a_wish_names(self, world: World, application: Application) -> None:
        """Who may not read any more what its wish names loses the objects, keeps its edits, and goes on."""
        application.allow("*", "*", create=True, write="*")
        a = world.replica(download={"Task": attribute("n") > 7})
        a.synchronize_all()
        a.update("Task", "t9", {"n": 90})
        a.create("Note", {"text": "first"}, "n1")
        application.access_rules.clear()
        application.allow("*", "Task", read=["title"], write=["title"])
        application.allow("*", "Note", create=True, write="*")

        report = a.synchronize_unsynchronized()

        assert (report.applied, [failure.attributes for failure in report.failures]) == (1, [{"n": 90}])
        a.create("Note", {"text": "second"}, "n2")
        assert a.synchronize_selected([("Note", "n2")]).applied == 1
        report = a.synchronize_all()
        assert (ids(a), report.removed) == ([], 3)
        assert ids(a, "Note") == ["n1", "n2"]
        a.close()

        application.allow("*", "Task")
        a = world.replica(download={"Task": attribute("n") > 7})
        a.synchronize_all()
        assert ids(a) == ["t10", "t8", "t9"]

    def test_a_constraint_that_does_not_fit(self) -> None:
        """A constraint that does not fit the schema stops the download with a typed error, and no upload."""
        application = Application(schema=Schema([Entity("Task", {"n": Integer()})]))
        with quick_folder() as folder, World(folder, application) as world:
            a = world.replica(download={"Task": attribute("n") == "seven"})
            a.create("Task", {"n": 1}, "mine")
            a.create("Task", {"n": 2}, "sent")

            with pytest.raises(DownloadRefused, match="which is never compared with 'seven'"):
                a.synchronize_all(timeout=10)

            assert a.synchronize_selected([("Task", "sent")]).applied == 1
            assert a.synchronize_unsynchronized().applied == 1
            assert ids(a) == ["mine", "sent"]
            assert world.lab.attributes("mine") == {"n": 1}


class TestModes:
    def test_upload_only(self, world: World, application: Application) -> None:
        """Readings go up and leave; nothing of others comes down."""
        application.synchronize("Reading", "nothing_clear")
        world.lab.settle(create(11, "r0", {}, entity="Reading"), replica=REPLICA_B)
        a = world.replica()
        for n in range(5):
            a.create("Reading", {"n": n}, f"r{n + 1}")
        a.synchronize_unsynchronized()
        assert len(ids(a, "Reading")) == 5

        report = a.synchronize_all()

        assert ids(a, "Reading") == []
        assert report.removed == 5
        assert world.lab.attributes("r5", "Reading") == {"n": 4}

    def test_kept(self, world: World) -> None:
        """Kept objects are shown on; conflicts with what was not seen are told apart."""
        a = world.replica()
        a.synchronize_all()
        a.close()
        world.lab.application.on_conflict("Task", "reject_stale")
        a = world.replica(download={"Task": "nothing_preserve"})
        world.lab.settle(update(11, "t1", {"n": 100}), replica=REPLICA_B)
        a.update("Task", "t1", {"m": 1})
        report = a.synchronize_all()
        assert (report.applied, contents(a)["t1"]) == (1, {"n": 1, "m": 1})

        a.update("Task", "t1", {"n": 2})
        report = a.synchronize_all()

        assert [failure.reason.value for failure in report.failures] == ["CONFLICT"]
        assert contents(a)["t1"] == {"n": 1, "m": 1}
        a.synchronize_selected([("Task", "t1")])
        assert contents(a)["t1"] == {"n": 100, "m": 1}
        a.synchronize_all()
        assert contents(a)["t1"] == {"n": 100, "m": 1}

    def test_never_and_the_switch(self, world: World, application: Application) -> None:
        """Never means that operations wait, until they are selected, or the switch takes them."""
        application.synchronize("Log", DownloadMode.NEVER)
        a = world.replica()
        a.create("Log", {"n": 1}, "l1")
        a.create("Task", {}, "t11")
        a.create("Log", {"n": 2}, "l2")
        report = a.synchronize_all()
        assert (report.applied, a.pending_count()) == (1, 2)
        assert [(one.entity, one.reason, one.count) for one in report.skipped] == [("Log", SkipReason.NEVER, 2)]
        assert a.synchronize_selected([("Log", "l1")]).applied == 1
        assert a.pending_count() == 1
        application.synchronize("Log", DownloadMode.NEVER, uploads_until=A_LONG_TIME)

        report = a.synchronize_all()

        assert (report.applied, report.skipped, a.pending_count()) == (1, [], 0)
        assert ids(a, "Log") == ["l1", "l2"]

    def test_a_deletion_in_never_is_selected(self, world: World, application: Application) -> None:
        """Where nothing else uploads an entity, a deleted object can be selected, so that its deletion is settled."""
        application.synchronize("Log", DownloadMode.NEVER)
        a = world.replica()
        a.create("Log", {"n": 1}, "l1")
        a.synchronize_selected([("Log", "l1")])
        a.delete("Log", "l1")
        assert a.synchronize_all().skipped[0].reason is SkipReason.NEVER

        report = a.synchronize_selected([("Log", "l1")])

        assert (report.applied, report.skipped, a.pending_count()) == (1, [], 0)
        assert world.lab.attributes("l1", "Log") is None

    def test_outside(self, world: World) -> None:
        """What was fetched from outside goes with the next session, which has nothing else to do."""
        a = world.replica(download={"Task": attribute("n") > 9})
        a.synchronize_all()
        a.synchronize_selected([("Task", "t1")])
        assert ids(a) == ["t1", "t10"]

        a.synchronize_all()

        assert ids(a) == ["t10"]


def test_access_comes_and_goes(world: World, application: Application) -> None:
    """Losing access removes objects after edits were kept as failures; regaining it brings them back."""
    a = world.replica()
    a.synchronize_all()
    found = a.get("Task", "t1")
    assert found is not None
    a.update("Task", "t1", {"title": "edited"})
    application.allow("*", "Task", read="*", write="*", where=attribute("n") > 5)

    report = a.synchronize_all()

    assert [(one.object_id, one.attributes) for one in report.failures] == [("t1", {"title": "edited"})]
    assert (ids(a), found.exists) == (["t10", "t6", "t7", "t8", "t9"], False)
    application.access_rules.clear()
    a.synchronize_all()
    assert len(ids(a)) == 10
    assert found["n"] == 1
