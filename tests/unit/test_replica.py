from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.builders import contents, nested, quick_folder

from tidelog import (
    CommitGroup,
    FormatUnsupported,
    InvalidConstraint,
    InvalidValue,
    LimitExceeded,
    LogCorrupt,
    ObjectExists,
    ObjectNotFound,
    OperationKind,
    Patch,
    ResourceClosed,
    Schema,
    StorageError,
    attribute,
)
from tidelog._environment import Environment
from tidelog._keys import pack_position
from tidelog._operation import decode_operation
from tidelog._values import encode
from tidelog.v1 import operation_pb2, sync_pb2
from tidelog_client import Object, Replica
from tidelog_client import _view as view
from tidelog_client._commit import _Commit, checked_intent
from tidelog_server import LmdbStore

MIB = 1024 * 1024


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for replicas."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def replica(folder: Path) -> Iterator[Replica]:
    """Give an empty replica."""
    with Replica(folder / "a") as opened:
        yield opened


def the(replica: Replica, id: str = "t1", entity: str = "Task") -> Object:  # noqa: A002 - the glossary's word
    """Return a handle on an object that is there."""
    found = replica.get(entity, id)
    assert found is not None
    return found


def logged(replica: Replica) -> list[tuple[str, str]]:
    """Return what the log holds, as (kind, id)."""
    return [(one.operation.kind.name, one.operation.id) for one in replica.log()]


def receive(replica: Replica, version: int, attributes: dict[str, Any], id: str = "t1") -> None:  # noqa: A002
    """Take in a snapshot as a download does."""
    page = sync_pb2.SnapshotPage()
    page.snapshots.add(entity="Task", id=id, version=version, attributes=encode(attributes))
    replica._storage.publication.merge([page.SerializeToString()])


def remove(replica: Replica, version: int, id: str = "t1") -> None:  # noqa: A002
    """Take in a removal as a download does."""
    page = sync_pb2.SnapshotPage()
    page.removals.add(entity="Task", id=id, version=version)
    replica._storage.publication.merge([page.SerializeToString()])


def settle(replica: Replica, *seqs: int, refused: bool = False) -> None:
    """Take in answers of the server: each operation refused, or applied at its seq plus 100."""
    replica._storage.settle(
        [
            operation_pb2.OperationResult(
                seq=seq, status=operation_pb2.OPERATION_STATUS_REJECTED, failure_id=str(uuid.uuid4())
            )
            if refused
            else operation_pb2.OperationResult(
                seq=seq, status=operation_pb2.OPERATION_STATUS_APPLIED, version=100 + seq
            )
            for seq in seqs
        ],
        b"",
    )


class TestChanging:
    def test_a_creation_gets_an_id(self, replica: Replica) -> None:
        """An object that is created without an id gets a UUIDv7, so that ids rise with time."""
        ids = [replica.create("Task", {}) for _ in range(3)]

        assert [uuid.UUID(id_).version for id_ in ids] == [7, 7, 7]
        assert sorted(ids) == ids

    def test_a_creation_keeps_the_id_it_is_given(self, replica: Replica) -> None:
        """Whatever text the caller gives is the id."""
        assert replica.create("Task", {"a": 1}, "Ünïcode/id #1") == "Ünïcode/id #1"
        assert the(replica, "Ünïcode/id #1").to_dict() == {"a": 1}

    def test_a_creation_of_what_is_there(self, replica: Replica) -> None:
        """An id is given once."""
        replica.create("Task", {"a": 1}, "t1")

        with pytest.raises(ObjectExists) as caught:
            replica.create("Task", {"a": 2}, "t1")

        assert (caught.value.entity, caught.value.id) == ("Task", "t1")
        assert contents(replica) == {"t1": {"a": 1}}

    def test_every_kind_of_value(self, replica: Replica) -> None:
        """Each type of value comes back as itself."""
        attributes = {
            "null": None,
            "true": True,
            "integer": -(2**63),
            "float": 1.0,
            "text": "Grüße \U0001f600",
            "bytes": b"\x00\xff",
            "time": datetime(2024, 2, 29, 12, 30, 0, 123456, tzinfo=UTC),
            "decimal": Decimal("12.50"),
            "list": [1, 1.0, True, [None]],
            "map": {"a": {"b": Decimal(1)}},
        }

        replica.create("Task", attributes, "t1")

        assert encode(the(replica).to_dict()) == encode(attributes)

    def test_an_update(self, replica: Replica) -> None:
        """An update sets, unsets, increments, adds and removes; what it does not name stays."""
        replica.create("Task", {"a": 1, "b": 2, "n": 1, "l": ["x"], "m": ["x", "y"]}, "t1")

        replica.update("Task", "t1", {"a": 10}, unset=["b"], increment={"n": 5}, add={"l": ["y"]}, remove={"m": ["x"]})

        assert contents(replica) == {"t1": {"a": 10, "n": 6, "l": ["x", "y"], "m": ["y"]}}

    def test_a_deletion(self, replica: Replica) -> None:
        """A deleted object is gone at once, and its id may be used anew."""
        replica.create("Task", {"a": 1}, "t1")

        replica.delete("Task", "t1")

        assert replica.get("Task", "t1") is None
        replica.create("Task", {"b": 2}, "t1")
        assert contents(replica) == {"t1": {"b": 2}}
        assert logged(replica) == [("CREATE", "t1"), ("DELETE", "t1"), ("CREATE", "t1")]

    @pytest.mark.parametrize("change", ["update", "delete"])
    @pytest.mark.parametrize("history", ["never", "deleted"])
    def test_a_change_of_what_is_not_there(self, replica: Replica, change: str, history: str) -> None:
        """Updating or deleting what is not there is a typed error at once, and nothing is logged."""
        if history == "deleted":
            replica.create("Task", {}, "t1")
            replica.delete("Task", "t1")
        before = logged(replica)

        with pytest.raises(ObjectNotFound) as caught:
            replica.update("Task", "t1", {"a": 1}) if change == "update" else replica.delete("Task", "t1")

        assert (caught.value.entity, caught.value.id, caught.value.unsaved) == ("Task", "t1", {})
        assert logged(replica) == before

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda replica: replica.create("", {}),
            lambda replica: replica.create("Ta\0sk", {}),
            lambda replica: replica.create("Task", {}, ""),
            lambda replica: replica.create("Task", {}, "t\0"),
            lambda replica: replica.create("Task", {}, "\ud800"),
            lambda replica: replica.create("Task", {"": 1}),
            lambda replica: replica.create("Task", {1: 1}),
            lambda replica: replica.create("Task", {"a": object()}),
            lambda replica: replica.create("Task", {"a": {1, 2}}),
            lambda replica: replica.create("Task", {"a": (1, 2)}),
            lambda replica: replica.create("Task", {"a": 2**63}),
            lambda replica: replica.create("Task", {"a": "\ud800"}),
            lambda replica: replica.create("Task", {"a": {1: 2}}),
            lambda replica: replica.create("Task", {"a": datetime(2024, 1, 1)}),  # noqa: DTZ001 - it lacks a zone
            lambda replica: replica.create("Task", {"a": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))}),
            lambda replica: replica.create("Task", {"a": Decimal("NaN")}),
            lambda replica: replica.create("Task", {"a": Decimal("1" * 200)}),
            lambda replica: replica.update("Task", "t1", {"a": 1}, unset=["a"]),
            lambda replica: replica.update("Task", "t1", unset=["a", "a"]),
            lambda replica: replica.update("Task", "t1", unset=[1]),
            lambda replica: replica.update("Task", "t1", increment={"n": "1"}),
            lambda replica: replica.update("Task", "t1", increment={"n": True}),
            lambda replica: replica.update("Task", "t1", increment={"text": 1}),
            lambda replica: replica.update("Task", "t1", increment={"n": 0.5}),
            lambda replica: replica.update("Task", "t1", increment={"n": 2**63 - 1}),
            lambda replica: replica.update("Task", "t1", increment={"large": Decimal(1)}),
            lambda replica: replica.update("Task", "t1", add={"text": ["x"]}),
            lambda replica: replica.update("Task", "t1", add={"l": [object()]}),
        ],
    )
    def test_what_cannot_be_stored(self, replica: Replica, wrong: Callable[[Replica], Any]) -> None:
        """What nobody could store is refused at once, and nothing is logged."""
        replica.create("Task", {"n": 1, "text": "x", "large": Decimal("9E+999999")}, "t1")

        with pytest.raises(InvalidValue):
            wrong(replica)

        assert logged(replica) == [("CREATE", "t1")]


class TestTransactions:
    def test_all_is_committed_at_the_end(self, replica: Replica) -> None:
        """Nothing shows outside before the block ends, then everything does."""
        with replica.transaction() as tx:
            tx.create("Task", {"a": 1}, "t1")
            tx.update("Task", "t1", {"a": 2})
            tx.create("Task", {}, "t2")
            assert replica.count("Task") == 0
            assert replica.pending_count() == 0

        assert contents(replica) == {"t1": {"a": 2}, "t2": {}}
        assert logged(replica) == [("CREATE", "t1"), ("UPDATE", "t1"), ("CREATE", "t2")]

    def test_an_exception_undoes_it(self, replica: Replica) -> None:
        """If the block raises, nothing of it is committed, and the exception goes on."""

        def work() -> None:
            with replica.transaction() as tx:
                tx.create("Task", {}, "t1")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            work()

        assert logged(replica) == []
        assert contents(replica) == {}

    def test_it_sees_its_own_changes(self, replica: Replica) -> None:
        """Within the block objects read as the block would leave them."""
        replica.create("Task", {"a": 1}, "old")

        with replica.transaction() as tx:
            tx.create("Task", {"b": 1}, "new")
            tx.update("Task", "old", increment={"a": 1})
            assert tx.get("Task", "new") == {"b": 1}
            assert tx.get("Task", "old") == {"a": 2}
            assert tx.get("Task", "nothing") is None
            tx.delete("Task", "old")
            assert tx.get("Task", "old") is None
            tx.create("Task", {"c": 1}, "old")
            assert tx.get("Task", "old") == {"c": 1}
            with pytest.raises(ObjectExists):
                tx.create("Task", {}, "new")

        assert contents(replica) == {"new": {"b": 1}, "old": {"c": 1}}

    def test_a_refused_step_may_be_caught(self, replica: Replica) -> None:
        """A step that cannot be raises at once; who catches it commits the others."""
        with replica.transaction() as tx:
            tx.create("Task", {}, "t1")
            with pytest.raises(ObjectNotFound):
                tx.update("Task", "nothing", {"a": 1})
            with pytest.raises(InvalidValue):
                tx.update("Task", "t1", {"a": object()})
            tx.update("Task", "t1", {"a": 1})

        assert contents(replica) == {"t1": {"a": 1}}

    def test_what_others_did_meanwhile(self, replica: Replica) -> None:
        """If somebody else took the ground away meanwhile, the commit fails whole."""
        replica.create("Task", {}, "t1")

        def work() -> None:
            with replica.transaction() as tx:
                tx.create("Task", {}, "t2")
                tx.update("Task", "t1", {"a": 1})
                replica.delete("Task", "t1")

        with pytest.raises(ObjectNotFound):
            work()
        assert contents(replica) == {}

    def test_what_others_did_meanwhile_is_built_upon(self, replica: Replica) -> None:
        """What a transaction commits is applied to the objects as they are then."""
        replica.create("Counter", {"n": 0}, "c")

        with replica.transaction() as tx:
            tx.update("Counter", "c", increment={"n": 1})
            replica.update("Counter", "c", increment={"n": 10})

        assert contents(replica, "Counter") == {"c": {"n": 11}}

    def test_once_it_has_ended(self, replica: Replica) -> None:
        """An ended transaction takes nothing more."""
        with replica.transaction() as tx:
            pass

        with pytest.raises(ResourceClosed):
            tx.create("Task", {})
        assert logged(replica) == []

    def test_a_caller_may_reuse_what_it_passed(self, replica: Replica) -> None:
        """What a caller does to its dictionaries later does not reach what it handed over."""
        attributes = {"tags": ["a"]}
        with replica.transaction() as tx:
            tx.create("Task", attributes, "t1")
            attributes["tags"].append("b")
            attributes["more"] = []

        assert contents(replica) == {"t1": {"tags": ["a"]}}

    def test_an_atomic_one_is_a_commit_group(self, replica: Replica) -> None:
        """The operations of an atomic transaction know their group, its size and their places."""
        replica.create("Task", {}, "t0")
        with replica.transaction(atomic=True) as tx:
            for n in (1, 2, 3):
                tx.create("Task", {}, f"t{n}")
        with replica.transaction(atomic=True) as tx:
            tx.create("Task", {}, "alone")
        with replica.transaction() as tx:
            tx.create("Task", {}, "x")
            tx.create("Task", {}, "y")

        groups = [one.operation.group for one in replica.log()]
        assert groups == [None, *(CommitGroup(2, position, 3) for position in range(3)), None, None, None]

    def test_one_that_does_not_fit_leaves_others_alone(self, replica: Replica) -> None:
        """Of several commits that share one write, one that cannot be fails alone."""
        replica.create("Task", {}, "taken")
        commits = [
            _Commit([checked_intent(OperationKind.CREATE, "Task", id_, Patch(), schema=None)], atomic=False)
            for id_ in ("t1", "taken", "t2")
        ]

        replica._committer._write(commits)

        assert [type(commit.error) for commit in commits] == [type(None), ObjectExists, type(None)]
        assert sorted(contents(replica)) == ["t1", "t2", "taken"]

    def test_many_threads(self, replica: Replica) -> None:
        """Commits of many threads are all there, each once, in one order."""

        def work(name: int) -> None:
            for n in range(20):
                with replica.transaction() as tx:
                    tx.create("Task", {}, f"t{name}-{n}")
                    tx.update("Counter", "c", increment={"n": 1})

        replica.create("Counter", {"n": 0}, "c")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

        assert replica.count("Task") == 160
        assert contents(replica, "Counter") == {"c": {"n": 160}}
        assert [one.operation.seq for one in replica.log()] == list(range(1, 322))


class TestLimits:
    """Nothing is ever logged that no server would take."""

    @pytest.mark.parametrize(
        ("fits", "exceeds"),
        [
            (("Task", {}, "x" * 128), ("Task", {}, "x" * 129)),
            (("Task", {}, "é" * 64), ("Task", {}, "é" * 64 + "x")),
            (("x" * 64, {}, "t1"), ("x" * 65, {}, "t1")),
            (("é" * 32, {}, "t1"), ("é" * 32 + "x", {}, "t1")),
            (("Task", {"x" * 64: 1}, "t1"), ("Task", {"x" * 65: 1}, "t1")),
            (("Task", {"a": nested(30)}, "t1"), ("Task", {"a": nested(31)}, "t1")),
            (("Task", {"a": "x" * (MIB - 100)}, "t1"), ("Task", {"a": "x" * MIB}, "t1")),
        ],
        ids=["id", "id in bytes", "entity", "entity in bytes", "attribute", "nesting", "operation"],
    )
    def test_of_one_operation(
        self,
        replica: Replica,
        fits: tuple[str, dict[str, Any], str],
        exceeds: tuple[str, dict[str, Any], str],
    ) -> None:
        """Ids, names, nesting and size are bounded, in bytes; what fits can be read by the other side."""
        with pytest.raises(LimitExceeded):
            replica.create(*exceeds)
        assert logged(replica) == []

        replica.create(*fits)

        [one] = replica.pending()
        assert decode_operation(one.operation.encode()).decoded_patch().set == fits[1]

    def test_of_a_group(self, replica: Replica) -> None:
        """A commit group has 1,000 operations at the most; a transaction that is none may have more."""
        with pytest.raises(LimitExceeded):
            self.create(replica, 1_001, {}, atomic=True)
        assert logged(replica) == []

        self.create(replica, 1_000, {}, atomic=True)
        self.create(replica, 1_001, {}, atomic=False)

        assert replica.count("Task") == 2_001

    def test_of_a_groups_size(self, replica: Replica) -> None:
        """A commit group has 2 MiB at the most."""
        large = {"a": "x" * (MIB - 200)}
        with pytest.raises(LimitExceeded):
            self.create(replica, 3, large, atomic=True)
        assert logged(replica) == []

        self.create(replica, 2, large, atomic=True)

        assert replica.count("Task") == 2

    def create(self, replica: Replica, count: int, attributes: dict[str, Any], *, atomic: bool) -> None:
        """Create many objects in one transaction."""
        with replica.transaction(atomic=atomic) as tx:
            for _ in range(count):
                tx.create("Task", attributes)

    def test_of_an_object(self, replica: Replica) -> None:
        """Many updates cannot make an object larger than one snapshot may be."""
        large = "x" * (MIB - 200)
        replica.create("Task", {"a": large}, "t1")
        replica.update("Task", "t1", {"b": large})

        with pytest.raises(LimitExceeded):
            replica.update("Task", "t1", {"c": large})

        assert sorted(the(replica)) == ["a", "b"]

    def test_of_a_handle(self, replica: Replica) -> None:
        """A handle is held to the same limits, and keeps its changes when it exceeds them."""
        replica.create("Task", {}, "t1")
        handle = the(replica)
        handle["a"] = "x" * MIB

        with pytest.raises(LimitExceeded):
            handle.commit()

        assert handle.uncommitted == {"a": "x" * MIB}
        assert logged(replica) == [("CREATE", "t1")]


class TestQueries:
    @pytest.fixture(autouse=True)
    def some(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put some objects into the replica, several pages of them."""
        monkeypatch.setattr(view, "PAGE_OBJECTS", 3)
        with replica.transaction() as tx:
            for n in range(8):
                tx.create("Task", {"n": n, "even": n % 2 == 0}, f"t{n}")
            tx.create("Task2", {"n": 100}, "x")
            tx.create("Tas", {"n": 100}, "kx")

    def ids(self, replica: Replica, *args: Any, **options: Any) -> list[str]:
        """Return the ids that a query gives."""
        return [found.id for found in replica.query("Task", *args, **options)]

    def test_all(self, replica: Replica) -> None:
        """Without conditions a query gives the objects of its entity, and of no other, in the order of their ids."""
        assert self.ids(replica) == [f"t{n}" for n in range(8)]
        assert self.ids(replica, limit=4) == ["t0", "t1", "t2", "t3"]
        assert self.ids(replica, limit=0) == []
        assert list(replica.query("Nothing")) == []

    def test_where(self, replica: Replica) -> None:
        """A query gives what matches a constraint, or has the attributes of a mapping."""
        assert self.ids(replica, {"even": True}) == ["t0", "t2", "t4", "t6"]
        assert self.ids(replica, {"even": True, "n": 2}) == ["t2"]
        assert self.ids(replica, attribute("n") > 5) == ["t6", "t7"]
        assert self.ids(replica, {}) == [f"t{n}" for n in range(8)]

    def test_ordered(self, replica: Replica) -> None:
        """A query orders by attributes, ascending or descending; what is equal stays in the order of ids."""
        assert self.ids(replica, order_by="-n") == [f"t{n}" for n in reversed(range(8))]
        assert self.ids(replica, order_by=["even", "-n"]) == ["t7", "t5", "t3", "t1", "t6", "t4", "t2", "t0"]
        assert self.ids(replica, order_by="even") == ["t1", "t3", "t5", "t7", "t0", "t2", "t4", "t6"]
        assert self.ids(replica, order_by="-n", limit=2) == ["t7", "t6"]
        assert self.ids(replica, {"even": True}, order_by="-n", limit=1) == ["t6"]

    def test_ordered_by_anything(self, replica: Replica) -> None:
        """Values of all types have one order: missing ones first, then false and true, numbers, text, the rest."""
        values: list[Any] = [
            None,
            False,
            True,
            -1.5,
            0,
            Decimal("0.5"),
            1,
            "",
            "Z",
            "a",
            "ä",
            b"",
            b"\xff",
            [1],
            {"a": 1},
        ]
        for n, value in enumerate(values):
            replica.create("Mixed", {"v": value}, f"m{n:02}")

        ids = [found.id for found in replica.query("Mixed", order_by="v")]

        assert ids == [f"m{n:02}" for n in range(len(values))]
        assert [found.id for found in replica.query("Mixed", order_by="-v")] == ids[::-1]

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"where": 5}, InvalidConstraint),
            ({"where": {"": 1}}, InvalidConstraint),
            ({"where": {"a": object()}}, InvalidConstraint),
            ({"order_by": ""}, InvalidValue),
            ({"order_by": "-"}, InvalidValue),
            ({"order_by": ["a", 5]}, Exception),
            ({"limit": -1}, InvalidValue),
        ],
    )
    def test_that_make_no_sense(self, replica: Replica, options: dict[str, Any], error: type[Exception]) -> None:
        """A query that makes no sense is an error when it is asked, not when it is read."""
        with pytest.raises(error):
            replica.query("Task", **options)

    def test_a_query_without_an_entity(self, replica: Replica) -> None:
        """A query names an entity."""
        with pytest.raises(InvalidValue):
            replica.query("")

    def test_counting(self, replica: Replica) -> None:
        """A count is the number of objects that a query would give."""
        assert replica.count("Task") == 8
        assert replica.count("Task", {"even": True}) == 4
        assert replica.count("Nothing") == 0

    def test_while_objects_change(self, replica: Replica) -> None:
        """A query that is being read sees what changes ahead of it, and holds up nobody."""
        found = replica.query("Task")
        first = [next(found).id for _ in range(3)]
        replica.delete("Task", "t4")
        replica.create("Task", {}, "t9")

        assert [*first, *(one.id for one in found)] == ["t0", "t1", "t2", "t3", "t5", "t6", "t7", "t9"]

    def test_gives_live_handles(self, replica: Replica) -> None:
        """What a query gives can be changed and committed."""
        for found in replica.query("Task", {"even": True}):
            found["done"] = True
            found.commit()

        assert replica.count("Task", {"done": True}) == 4


class TestHandles:
    def test_reading(self, replica: Replica) -> None:
        """A handle reads like a mapping; an attribute that is not there reads as None."""
        replica.create("Task", {"a": 1, "b": None}, "t1")
        handle = the(replica)

        assert (handle.entity, handle.id, handle.exists, handle.is_new) == ("Task", "t1", True, False)
        assert (handle["a"], handle["b"], handle["c"]) == (1, None, None)
        assert ("b" in handle, "c" in handle) == (True, False)
        assert sorted(handle) == ["a", "b"]
        assert "t1" in repr(handle)

    def test_nothing_to_get(self, replica: Replica) -> None:
        """There is no handle on what is not there; a name that nothing can have is an error."""
        assert replica.get("Task", "t1") is None
        with pytest.raises(InvalidValue):
            replica.get("Task", "")

    def test_changes_stay_in_the_handle(self, replica: Replica) -> None:
        """Setting and deleting attributes changes the handle only, until its commit, which logs one operation."""
        replica.create("Task", {"a": 1, "b": 2}, "t1")
        handle, other = the(replica), the(replica)

        handle["a"] = 10
        handle["c"] = 3
        del handle["b"]

        assert handle.to_dict() == {"a": 10, "c": 3}
        assert handle.uncommitted == {"a": 10, "c": 3, "b": None}
        assert other.to_dict() == {"a": 1, "b": 2}
        assert replica.pending_count() == 1
        handle.commit()
        assert other.to_dict() == {"a": 10, "c": 3}
        assert handle.uncommitted == {}
        assert logged(replica) == [("CREATE", "t1"), ("UPDATE", "t1")]

    def test_the_last_word_counts(self, replica: Replica) -> None:
        """Deleting what was set, and setting what was deleted, leaves the last of the two."""
        replica.create("Task", {"a": 1, "b": 2}, "t1")
        handle = the(replica)

        handle["a"] = 5
        del handle["a"]
        del handle["b"]
        handle["b"] = 6
        handle.commit()

        assert contents(replica) == {"t1": {"b": 6}}

    def test_rollback(self, replica: Replica) -> None:
        """Rolling back drops what was not committed."""
        replica.create("Task", {"a": 1}, "t1")
        handle = the(replica)
        handle["a"] = 2
        del handle["a"]

        handle.rollback()

        assert handle.to_dict() == {"a": 1}
        handle.commit()
        assert replica.pending_count() == 1

    def test_it_shows_the_object_as_it_is(self, replica: Replica, folder: Path) -> None:
        """A handle shows what anybody commits: another handle, a transaction, another opener of the replica."""
        replica.create("Task", {"a": 1}, "t1")
        handle = the(replica)
        seen = [handle["a"]]

        replica.update("Task", "t1", {"a": 2})
        seen.append(handle["a"])
        with Replica(folder / "a") as same:
            same.update("Task", "t1", {"a": 3})
        seen.append(handle["a"])

        assert seen == [1, 2, 3]

    def test_what_is_read_is_the_readers_own(self, replica: Replica) -> None:
        """Changing what was read, or the dictionary made of it, changes nothing in the replica."""
        replica.create("Task", {"tags": ["a"]}, "t1")
        handle = the(replica)

        handle["tags"].append("b")
        handle.to_dict()["tags"].append("c")
        handle.to_dict()["x"] = 1

        assert handle.to_dict() == {"tags": ["a"]}
        assert handle.uncommitted == {}

    @pytest.mark.parametrize(("name", "value"), [("", 1), ("a", object()), ("a", 2**63), ("a\0", 1), ("a", [{1}])])
    def test_what_cannot_be_stored(self, replica: Replica, name: str, value: Any) -> None:
        """An attribute that nobody could store is refused when it is set."""
        replica.create("Task", {}, "t1")
        handle = the(replica)

        with pytest.raises(InvalidValue):
            handle[name] = value

        assert handle.uncommitted == {}

    def test_base_version_is_that_of_the_first_change(self, replica: Replica) -> None:
        """An operation names the version that its author looked at when the change was begun."""
        receive(replica, 5, {"a": 1})
        handle = the(replica)
        handle["a"] = 2
        receive(replica, 7, {"a": 1, "b": 1})
        handle["c"] = 3

        handle.commit()
        handle["d"] = 4
        handle.commit()
        replica.update("Task", "t1", {"e": 5})
        replica.delete("Task", "t1")

        assert [one.operation.base_version for one in replica.pending()] == [5, 7, 7, 7]

    def test_base_version_starts_over_after_a_rollback(self, replica: Replica) -> None:
        """A change that was dropped does not count as having looked."""
        receive(replica, 5, {"a": 1})
        handle = the(replica)
        handle["a"] = 2
        handle.rollback()
        receive(replica, 7, {"a": 1})
        handle["a"] = 3

        handle.commit()

        assert next(replica.pending()).operation.base_version == 7

    def test_what_no_server_has_seen(self, replica: Replica) -> None:
        """An object that the server does not have yet has the base version 0."""
        replica.create("Task", {}, "t1")
        replica.update("Task", "t1", {"a": 1})
        handle = the(replica)
        handle["a"] = 2
        handle.commit()

        assert [one.operation.base_version for one in replica.pending()] == [0, 0, 0]

    @pytest.mark.parametrize("by", ["deletion", "removal"])
    def test_a_removed_object(self, replica: Replica, by: str) -> None:
        """A handle whose object was removed is empty: every use says so and hands the unsaved changes over."""
        receive(replica, 5, {"a": 1})
        handle = the(replica)
        handle["a"] = 2
        del handle["b"]
        replica.delete("Task", "t1") if by == "deletion" else remove(replica, 6)

        assert not handle.exists
        assert "removed" in repr(handle)
        for use in (handle.commit, handle.to_dict, lambda: handle["a"], lambda: "a" in handle, lambda: list(handle)):
            with pytest.raises(ObjectNotFound) as caught:
                use()
            assert caught.value.unsaved == {"a": 2, "b": None}
        assert handle.uncommitted == {"a": 2, "b": None}

    def test_a_removed_object_without_changes(self, replica: Replica) -> None:
        """A handle whose object was removed cannot be changed or committed."""
        replica.create("Task", {}, "t1")
        handle = the(replica)
        replica.delete("Task", "t1")

        with pytest.raises(ObjectNotFound):
            handle["a"] = 1
        with pytest.raises(ObjectNotFound):
            del handle["a"]
        with pytest.raises(ObjectNotFound):
            handle.commit()

    def test_a_removed_object_that_comes_back(self, replica: Replica) -> None:
        """A handle fills again when its object does."""
        replica.create("Task", {"a": 1}, "t1")
        handle = the(replica)
        replica.delete("Task", "t1")
        replica.create("Task", {"a": 2}, "t1")

        assert handle.exists
        assert handle["a"] == 2


class TestNewObjects:
    def test_are_nobodys_business_before_their_commit(self, replica: Replica) -> None:
        """A new object is in no query and in no log until it is committed."""
        new = replica.new("Task", {"a": 1}, "t1")
        new["b"] = 2
        del new["a"]

        assert (new.is_new, new.exists, new.to_dict()) == (True, False, {"b": 2})
        assert replica.get("Task", "t1") is None
        assert logged(replica) == []
        new.commit()
        assert (new.is_new, new.exists) == (False, True)
        assert contents(replica) == {"t1": {"b": 2}}

    def test_get_an_id(self, replica: Replica) -> None:
        """A new object has an id at once."""
        new = replica.new("Task")

        assert uuid.UUID(new.id).version == 7
        new.commit()
        assert the(replica, new.id).to_dict() == {}

    def test_rolled_back(self, replica: Replica) -> None:
        """A new object that is rolled back is empty."""
        new = replica.new("Task", {"a": 1}, "t1")

        new.rollback()

        assert not new.exists
        with pytest.raises(ObjectNotFound):
            new.commit()
        assert logged(replica) == []

    def test_whose_id_was_taken_meanwhile(self, replica: Replica) -> None:
        """A new object whose id somebody took is not committed, and keeps its attributes."""
        new = replica.new("Task", {"a": 1}, "t1")
        replica.create("Task", {"a": 2}, "t1")

        with pytest.raises(ObjectExists):
            new.commit()

        assert new.is_new
        assert new.to_dict() == {"a": 1}
        assert contents(replica) == {"t1": {"a": 2}}

    def test_are_checked_at_once(self, replica: Replica) -> None:
        """A new object cannot begin with what cannot be stored."""
        for entity, attributes, id_ in (("", {}, None), ("Task", {"a": object()}, None), ("Task", {}, "")):
            with pytest.raises(InvalidValue):
                replica.new(entity, attributes, id_)

    def test_own_their_attributes(self, replica: Replica) -> None:
        """What a caller does to its dictionary later does not reach the new object."""
        attributes: dict[str, Any] = {"tags": ["a"]}
        new = replica.new("Task", attributes, "t1")
        attributes["tags"].append("b")
        attributes["x"] = object()

        new.commit()

        assert contents(replica) == {"t1": {"tags": ["a"]}}


class TestLog:
    def test_pending_and_log_and_history(self, replica: Replica) -> None:
        """The log has every operation in order; pending those not settled; history those on one object."""
        replica.create("Task", {}, "t1")
        replica.create("Task", {}, "t2")
        replica.update("Task", "t1", {"a": 1})
        settle(replica, 1)
        settle(replica, 2, refused=True)

        assert [(one.operation.seq, one.status, one.version) for one in replica.log()] == [
            (1, "applied", 101),
            (2, "failed", 0),
            (3, "pending", 0),
        ]
        assert [one.operation.seq for one in replica.pending()] == [3]
        assert replica.pending_count() == 1
        assert [(one.operation.seq, one.status) for one in replica.history("Task", "t1")] == [
            (1, "applied"),
            (3, "pending"),
        ]
        assert [failure.object_id for failure in replica.failures()] == ["t2"]
        assert contents(replica) == {"t1": {"a": 1}}

    def test_from_any_position(self, replica: Replica) -> None:
        """The log can be read from any position on."""
        for n in range(5):
            replica.create("Task", {}, f"t{n}")

        assert [one.operation.id for one in replica.log(after=3)] == ["t3", "t4"]
        assert list(replica.log(after=5)) == []

    def test_in_pages(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        """A log of many pages reads whole; pending operations too."""
        monkeypatch.setattr("tidelog._log._SCAN_PAGE_ENTRIES", 2)
        monkeypatch.setattr("tidelog_client._storage.READ_PAGE_ENTRIES", 2)
        for n in range(7):
            replica.create("Task", {}, f"t{n}")

        assert [one.operation.seq for one in replica.log()] == list(range(1, 8))
        assert [one.operation.seq for one in replica.pending()] == list(range(1, 8))

    def test_tail_sees_what_is_appended(self, replica: Replica) -> None:
        """A tail goes on with what is appended while it is read, and ends when nothing comes for long enough."""
        replica.create("Task", {}, "t1")
        tail = replica.tail(after=0, timeout=0)

        seen = [next(tail).operation.id]
        replica.create("Task", {}, "t2")
        seen.append(next(tail).operation.id)

        assert seen == ["t1", "t2"]
        assert list(tail) == []

    def test_tail_waits_for_another_thread(self, replica: Replica) -> None:
        """A tail that has nothing to give waits for what another thread appends."""
        waiting = threading.Event()

        def read() -> str:
            tail = replica.tail()
            waiting.set()
            return next(tail).operation.id

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            assert waiting.wait(10)
            replica.create("Task", {}, "t1")
            assert reading.result(10) == "t1"

    def test_operations_say_which_schema_they_were_made_with(self, folder: Path) -> None:
        """Operations carry the version of the program's schema, a nonce of their own and the author's clock."""
        with Replica(folder / "s", schema=Schema(version=7, open=True)) as replica:
            replica.create("Task", {}, "t1")
            replica.create("Task", {}, "t2")
            first, second = [one.operation for one in replica.log()]

        assert (first.schema_version, second.schema_version) == (7, 7)
        assert first.nonce != second.nonce
        assert abs(datetime.now(UTC) - first.client_time) < timedelta(minutes=1)

    def test_it_survives_the_program(self, folder: Path) -> None:
        """What was committed is there when the replica is opened again, under the same id."""
        with Replica(folder / "a") as replica:
            replica.create("Task", {"a": 1}, "t1")
            id_ = replica.replica_id

        with Replica(folder / "a") as replica:
            assert replica.replica_id == id_
            assert contents(replica) == {"t1": {"a": 1}}
            replica.create("Task", {}, "t2")
            assert [one.operation.seq for one in replica.pending()] == [1, 2]


class TestView:
    """Snapshots under operations that the server has not settled, or settled at a later version."""

    def test_pending_operations_stand_on_top(self, replica: Replica) -> None:
        """A snapshot replaces what lies below; pending operations are replayed on it, intents too."""
        receive(replica, 1, {"a": 1, "b": 1, "n": 10})
        replica.update("Task", "t1", {"a": "mine"}, increment={"n": 1})

        receive(replica, 2, {"a": 2, "b": 2, "n": 20})

        assert contents(replica) == {"t1": {"a": "mine", "b": 2, "n": 21}}

    def test_an_own_edit_neither_vanishes_nor_counts_twice(self, replica: Replica) -> None:
        """Between its acknowledgement and its snapshot an operation stays on top; then it is in the base."""
        receive(replica, 1, {"n": 10})
        replica.update("Task", "t1", increment={"n": 1})
        settle(replica, 1)
        assert contents(replica) == {"t1": {"n": 11}}

        receive(replica, 50, {"n": 20})
        assert contents(replica) == {"t1": {"n": 21}}
        receive(replica, 101, {"n": 21})
        assert contents(replica) == {"t1": {"n": 21}}
        receive(replica, 102, {"n": 30})

        assert contents(replica) == {"t1": {"n": 30}}

    def test_an_older_snapshot_is_passed_over(self, replica: Replica) -> None:
        """A snapshot older than what is there changes nothing."""
        receive(replica, 5, {"a": 5})

        receive(replica, 4, {"a": 4})

        assert contents(replica) == {"t1": {"a": 5}}

    def test_a_refused_operation_leaves_the_view(self, replica: Replica) -> None:
        """What the server refused is taken out of the view; what was built on it stays on the base."""
        receive(replica, 1, {"a": 1})
        replica.update("Task", "t1", {"a": 2})
        replica.update("Task", "t1", {"b": 3})

        settle(replica, 1, refused=True)

        assert contents(replica) == {"t1": {"a": 1, "b": 3}}

    def test_a_refused_deletion_brings_the_object_back(self, replica: Replica) -> None:
        """An object whose deletion the server refused is there again."""
        receive(replica, 1, {"a": 1})
        replica.delete("Task", "t1")
        receive(replica, 2, {"a": 2})
        assert contents(replica) == {}

        settle(replica, 1, refused=True)

        assert contents(replica) == {"t1": {"a": 2}}

    def test_an_intent_that_no_longer_fits(self, replica: Replica) -> None:
        """A pending intent that the server's new value cannot take changes nothing here; the server decides."""
        receive(replica, 1, {"n": 1})
        replica.update("Task", "t1", increment={"n": 1})

        receive(replica, 2, {"n": "text"})

        assert contents(replica) == {"t1": {"n": "text"}}

    def test_a_removal_below_pending_operations(self, replica: Replica) -> None:
        """An object that is gone on the server goes, whatever updates are pending on it; a pending creation stays."""
        receive(replica, 1, {"a": 1})
        replica.update("Task", "t1", {"a": 2})
        replica.create("Task", {}, "t2")

        remove(replica, 2)
        remove(replica, 2, "t2")

        assert contents(replica) == {"t2": {}}


class TestTrimming:
    def fill(self, replica: Replica, count: int = 4) -> None:
        """Log creations, all settled and downloaded."""
        for n in range(1, count + 1):
            replica.create("Task", {"text": "x" * 5_000}, f"t{n}")
            settle(replica, n)
            receive(replica, 100 + n, {"text": ""}, f"t{n}")

    def test_by_age(self, folder: Path) -> None:
        """Settled operations past the retention leave the log; younger ones stay."""
        with Replica(folder / "a", log_retention=timedelta(days=1)) as replica:
            self.fill(replica)
            assert replica.trim_log() == 0
        with Replica(folder / "a", log_retention=timedelta(0)) as replica:
            assert replica.trim_log() == 4
            assert list(replica.log()) == []
            assert replica.count("Task") == 4

    def test_by_size(self, folder: Path) -> None:
        """While the log is larger than it may get, the oldest settled operations leave it."""
        with Replica(folder / "a", log_retention_bytes=100_000) as replica:
            self.fill(replica, 40)

            trimmed = replica.trim_log()

            assert 15 < trimmed < 40
            assert [one.operation.seq for one in replica.log()] == list(range(trimmed + 1, 41))

    @pytest.mark.parametrize("options", [{"log_retention": timedelta(0)}, {"log_retention_bytes": 1}])
    def test_never_what_is_needed(self, folder: Path, options: dict[str, Any]) -> None:
        """Pending operations, and settled ones that the view still needs, stay however old or large they are."""
        with Replica(folder / "a", **options) as replica:
            self.fill(replica, 2)
            replica.create("Task", {"a": 1}, "t3")
            settle(replica, 3)  # applied, and not downloaded yet
            replica.create("Task", {"a": 1}, "t4")
            self.settled_behind(replica)

            assert replica.trim_log() == 2
            assert [one.operation.seq for one in replica.log()] == [3, 4, 5]
            receive(replica, 2, {}, "t3")
            assert contents(replica)["t3"] == {"a": 1}

    def settled_behind(self, replica: Replica) -> None:
        """Log one more operation, settled and downloaded, behind those that must stay."""
        replica.create("Task", {}, "t5")
        settle(replica, 5)
        receive(replica, 105, {}, "t5")

    def test_positions_go_on_after_a_full_trim(self, folder: Path) -> None:
        """A position is never given twice, even where the log is empty, and the program was started anew."""
        with Replica(folder / "a", log_retention=timedelta(0)) as replica:
            self.fill(replica, 3)
            assert replica.trim_log() == 3
            replica.create("Task", {}, "t4")
            settle(replica, 4)
            receive(replica, 104, {}, "t4")
            assert replica.trim_log() == 1
        with Replica(folder / "a") as replica:
            replica.create("Task", {}, "t5")

            assert [one.operation.seq for one in replica.log()] == [5]


USES: dict[str, Callable[[Replica], Any]] = {
    "create": lambda replica: replica.create("Task", {}),
    "update": lambda replica: replica.update("Task", "t1", {}),
    "delete": lambda replica: replica.delete("Task", "t1"),
    "get": lambda replica: replica.get("Task", "t1"),
    "query": lambda replica: list(replica.query("Task")),
    "count": lambda replica: replica.count("Task"),
    "pending": lambda replica: list(replica.pending()),
    "pending_count": lambda replica: replica.pending_count(),
    "log": lambda replica: list(replica.log()),
    "history": lambda replica: list(replica.history("Task", "t1")),
    "failures": lambda replica: list(replica.failures()),
    "trim_log": lambda replica: replica.trim_log(),
    "new": lambda replica: replica.new("Task", {}).commit(),
}


class TestOpening:
    @pytest.mark.parametrize("use", USES.values(), ids=USES)
    def test_a_closed_replica(self, folder: Path, use: Callable[[Replica], Any]) -> None:
        """Using a replica that you closed says so, whoever else has the directory open."""
        replica = Replica(folder / "a")
        replica.create("Task", {}, "t1")
        with Replica(folder / "a"):
            replica.close()

            with pytest.raises(ResourceClosed):
                use(replica)
        with pytest.raises(ResourceClosed):
            use(replica)

    def test_a_handle_of_a_closed_replica(self, folder: Path) -> None:
        """A handle is closed with its replica."""
        replica = Replica(folder / "a")
        replica.create("Task", {}, "t1")
        handle = the(replica)
        replica.close()

        with pytest.raises(ResourceClosed):
            handle["a"]

    def test_closing_twice(self, folder: Path) -> None:
        """Closing again does nothing, and nothing to another one on the same path."""
        first, second = Replica(folder / "a"), Replica(folder / "a")
        first.close()
        first.close()

        second.create("Task", {}, "t1")
        assert second.count("Task") == 1
        second.close()
        second.close()

    def test_two_on_one_path(self, folder: Path) -> None:
        """Two objects on one directory are one replica: each sees the other's commits, positions are given once."""
        with Replica(folder / "a") as one, Replica(folder / "a") as other:
            one.create("Task", {"a": 1}, "t1")
            other.update("Task", "t1", {"b": 2})
            one.create("Task", {}, "t2")

            assert one.replica_id == other.replica_id
            assert contents(one) == contents(other) == {"t1": {"a": 1, "b": 2}, "t2": {}}
            assert [logged.operation.seq for logged in other.log()] == [1, 2, 3]

    def test_another_path_is_another_replica(self, folder: Path) -> None:
        """Each directory has an id of its own."""
        with Replica(folder / "a") as one, Replica(folder / "b") as other:
            assert one.replica_id != other.replica_id

    def test_relaxed(self, folder: Path) -> None:
        """A relaxed replica works like any other."""
        with Replica(folder / "a", durability="relaxed") as replica:
            replica.create("Task", {"a": 1}, "t1")
        with Replica(folder / "a") as replica:
            assert contents(replica) == {"t1": {"a": 1}}

    def test_full_durability_beside_a_relaxed_opener(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who opens a replica with full durability gets it, although somebody else has it open relaxed."""
        synced: list[str] = []
        original = Environment.sync

        def sync(self: Environment) -> None:
            synced.append("sync")
            original(self)

        monkeypatch.setattr(Environment, "sync", sync)
        with Replica(folder / "a", durability="relaxed") as relaxed, Replica(folder / "a") as full:
            synced.clear()
            relaxed.create("Task", {})
            assert synced == []
            full.create("Task", {})
            assert synced == ["sync"]

    def test_a_durability_that_is_none(self, folder: Path) -> None:
        """Durability is full or relaxed."""
        with pytest.raises(InvalidValue):
            Replica(folder / "a", durability="most")  # type: ignore[arg-type]

    @pytest.mark.parametrize("mark", [b"tidelog-replica-0\n", b"\xff\xfe\x00", b"", b"tidelog-server-store-1"])
    def test_another_format(self, folder: Path, mark: bytes) -> None:
        """A directory of another format is refused, and left alone."""
        Replica(folder / "a").close()
        (folder / "a" / "FORMAT").write_bytes(mark)

        with pytest.raises(FormatUnsupported) as caught:
            Replica(folder / "a")

        assert caught.value.supported == "tidelog-replica-1"
        assert (folder / "a" / "FORMAT").read_bytes() == mark

    def test_the_directory_of_a_server(self, folder: Path) -> None:
        """The directory of a store is no replica, nor the other way round, even while it is open here."""
        store = LmdbStore(folder / "store")
        with pytest.raises(FormatUnsupported):
            Replica(folder / "store")
        store.close()
        with pytest.raises(FormatUnsupported):
            Replica(folder / "store")
        with Replica(folder / "a"), pytest.raises(FormatUnsupported):
            LmdbStore(folder / "a")

    def test_data_without_a_mark(self, folder: Path) -> None:
        """LMDB data that nobody marked is not taken for a replica."""
        Replica(folder / "a").close()
        (folder / "a" / "FORMAT").unlink()

        with pytest.raises(FormatUnsupported):
            Replica(folder / "a")

    def test_what_is_no_directory(self, folder: Path) -> None:
        """A path that cannot be a directory is a typed error."""
        (folder / "file").write_text("x")

        for path in (folder / "file", folder / "file" / "below"):
            with pytest.raises(StorageError):
                Replica(path)

    def test_a_damaged_file(self, folder: Path) -> None:
        """A data file that LMDB cannot read is a typed error."""
        Replica(folder / "a").close()
        (folder / "a" / "data.mdb").write_bytes(b"garbage" * 5_000)

        with pytest.raises(StorageError):
            Replica(folder / "a")


class TestDamage:
    def damage(self, replica: Replica, seq: int, flip: Callable[[bytes], bytes]) -> None:
        """Change an entry of the log behind the replica's back."""
        environment = replica._storage.environment
        database = environment.database("log")

        def work(transaction: Any) -> None:
            entry = transaction.get(pack_position(seq), db=database)
            transaction.put(pack_position(seq), flip(entry), db=database)

        environment.write(work)

    @pytest.mark.parametrize(
        "flip",
        [
            lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]),
            lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
            lambda entry: entry[:20],
            lambda entry: b"",
            lambda entry: entry + b"\0",
        ],
        ids=["value", "check sum", "cut short", "emptied", "more"],
    )
    def test_a_corrupt_entry(self, replica: Replica, flip: Callable[[bytes], bytes]) -> None:
        """A damaged entry is found by its check sum and named; what lies before it reads, and work goes on."""
        for n in (1, 2, 3):
            replica.create("Task", {"n": n}, f"t{n}")
        self.damage(replica, 2, flip)

        for read in (replica.log, replica.pending, lambda: replica.history("Task", "t2")):
            with pytest.raises(LogCorrupt) as caught:
                list(read())
            assert caught.value.seq == 2
        assert [one.operation.seq for one in replica.log(after=2)] == [3]
        replica.create("Task", {}, "t4")
        assert sorted(contents(replica)) == ["t1", "t2", "t3", "t4"]

    def test_a_view_that_needs_a_corrupt_entry(self, replica: Replica) -> None:
        """Rebuilding an object on top of a damaged operation stops, and changes nothing."""
        receive(replica, 1, {"n": 0})
        replica.update("Task", "t1", {"n": 1})
        self.damage(replica, 1, lambda entry: entry[:-1] + b"\0")

        with pytest.raises(LogCorrupt):
            receive(replica, 2, {"n": 5})

        assert contents(replica) == {"t1": {"n": 1}}


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from tidelog import DiskFull
    from tidelog_client import Replica

    path = Path(sys.argv[1])
    replica = Replica(path, durability=sys.argv[2])
    replica.create("Task", {"n": 0}, "t0")
    size = (path / "data.mdb").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100_000, limits[1]))
    committed = 1
    try:
        while committed < 1_000:
            replica.create("Task", {"n": committed, "text": "x" * 5_000}, f"t{committed}")
            committed += 1
    except DiskFull as error:
        assert str(path) in str(error), error
    else:
        raise SystemExit("the disk never got full")
    assert 1 < committed, committed
    assert replica.count("Task") == committed == replica.pending_count()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    replica.create("Task", {"n": committed}, f"t{committed}")
    replica.close()
    with Replica(path) as again:
        assert sorted(found["n"] for found in again.query("Task")) == list(range(committed + 1))
        assert [one.operation.seq for one in again.log()] == list(range(1, committed + 2))
    print("fine")
"""

FORKED = """
    import os, sys
    from tidelog import InheritedEnvironment
    from tidelog_client import Replica

    replica = Replica(sys.argv[1])
    replica.create("Task", {}, "of the parent")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        found = []
        for use in (lambda: replica.count("Task"), lambda: replica.create("Task", {})):
            try:
                use()
            except InheritedEnvironment:
                found.append("refused")
        replica.close()
        with Replica(sys.argv[1]) as own:
            own.create("Task", {}, "of the child")
        os.write(writer, ",".join(found).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 100) == b"refused,refused"
    assert sorted(found.id for found in replica.query("Task")) == ["of the child", "of the parent"]
    replica.close()
    print("fine")
"""


def run(script: str, *arguments: str) -> str:
    """Run a script in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("durability", ["full", "relaxed"])
    def test_a_full_disk(self, tmp_path: Path, durability: str) -> None:
        """A full disk is a typed error before anything is acknowledged; with room again, work goes on."""
        assert run(FULL_DISK, str(tmp_path / "a"), durability) == "fine"

    @pytest.mark.slow
    def test_a_forked_child(self, tmp_path: Path) -> None:
        """A forked child cannot use what its parent opened; opening it again works, in both."""
        assert run(FORKED, str(tmp_path / "a")) == "fine"
