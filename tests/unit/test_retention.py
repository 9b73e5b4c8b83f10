from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TENANT,
    TIME_US,
    USER,
    Lab,
    MemoryStore,
    Step,
    create,
    delete,
    group,
    make_operation,
    said,
    update,
    write_steps,
)

from tidelog import (
    Entity,
    FailureReason,
    InvalidValue,
    OperationKind,
    Rename,
    ResourceClosed,
    Schema,
    String,
    attribute,
)
from tidelog._operation import decode_operation
from tidelog._values import Attributes
from tidelog_server import (
    Application,
    Collected,
    DirectoryContents,
    HookContext,
    HookObject,
    Principal,
    Reject,
    Server,
    _collection,
)
from tidelog_server import _failures as failures
from tidelog_server._adoption import adopt_schema
from tidelog_server._attempts import Attempt
from tidelog_server._errors import FailureStale, ReplicaOwned, ReplicaRetired, SessionSuperseded
from tidelog_server._failures import Decision
from tidelog_server._indexes import by_version_prefix, left_prefix, versions_of
from tidelog_server._outcomes import Result
from tidelog_server._records import Writes
from tidelog_server._session import begin_upload
from tidelog_server._store import Reader

DAY_US = 24 * 3600 * 1_000_000
DAY = timedelta(days=1)
INDEXED = Schema([Entity("Task", {"who": String()}, indexes=["who"])], open=True)


def later(lab: Lab, *, days: int = 1) -> None:
    """Let time pass."""
    lab.time_us += days * DAY_US


def forget_all(lab: Lab) -> Collected:
    """Let everything be forgotten that was done until now."""
    later(lab)
    return lab.collect()


def write_something(lab: Lab) -> None:
    """Let something else be changed, so that a change stands behind all that was done."""
    write_steps(lab.store, [Step(("Note", "n"), {"n": lab.version()})], time_us=lab.time_us)


def collected(lab: Lab) -> int:
    """Return the highest version collected."""
    with lab.store.read(TENANT) as reader:
        return reader.collected()


def counting(lab: Lab) -> list[Writes]:
    """Let what is written be counted from now on."""
    written: list[Writes] = []
    submit = lab.store.submit

    def counted(
        tenant: str, job: Callable[[Reader], tuple[Writes | None, Any]], attempt: Attempt | None = None
    ) -> Any:
        def work(reader: Reader) -> tuple[Writes | None, Any]:
            writes, result = job(reader)
            if writes is not None:
                written.append(writes)
            return writes, result

        return submit(tenant, work, attempt)

    lab.store.submit = counted  # type: ignore[method-assign]
    return written


class TestHistory:
    def test_the_oldest_changes_go(self) -> None:
        """Changes older than the period go, the others stay, and what was changed stays as it is."""
        lab = Lab()
        for seq in (1, 2, 3):
            lab.settle(create(seq, f"t{seq}"))
            later(lab)

        counts = lab.collect(history=DAY)

        assert counts == Collected(changes=2, outcomes=1)
        assert (collected(lab), [change.version for change in lab.changes()]) == (2, [3])
        assert [lab.attributes(f"t{seq}") for seq in (1, 2, 3)] == [{"title": "Buy milk"}] * 3

    def test_a_clock_that_was_set_back(self) -> None:
        """Changes go from the oldest version on: one that says it is newer keeps those behind it."""
        lab = Lab()
        lab.settle(create(1, "a"))
        lab.time_us += 10 * DAY_US
        lab.settle(create(2, "b"))
        lab.time_us -= 9 * DAY_US
        lab.settle(create(3, "c"))
        later(lab)

        assert lab.collect().changes == 1
        assert collected(lab) == 1

    def test_never_goes_back(self) -> None:
        """What is collected never becomes less, whatever period is asked for."""
        lab = Lab()
        lab.settle(create(1, "a"))
        forget_all(lab)

        assert lab.collect(history=100 * DAY) == Collected()
        assert collected(lab) == 1

    def test_nothing_due_writes_nothing(self) -> None:
        """If there is nothing to be forgotten, the writer is not asked."""
        lab = Lab()
        lab.settle(create(1), delete(2))
        forget_all(lab)
        lab.settle(create(3))
        written = counting(lab)

        assert lab.collect() == Collected()
        assert not written

    def test_goes_in_small_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However much is due, no transaction forgets more than a step of it."""
        monkeypatch.setattr(_collection, "STEP_ENTRIES", 2)
        lab = Lab()
        lab.settle(
            *(create(seq, f"t{seq}") for seq in range(1, 6)), *(delete(5 + seq, f"t{seq}") for seq in range(1, 6))
        )
        written = counting(lab)

        assert forget_all(lab) == Collected(changes=10, tombstones=5, outcomes=9)
        assert [writes.forgotten.version for writes in written if writes.forgotten.version] == [2, 4, 6, 8, 10]
        assert all(len(writes.forgotten.settled) <= 2 for writes in written)
        assert all(len(writes.forgotten.tombstones) <= 2 for writes in written)

    def test_tombstones_go_with_their_deletion(self) -> None:
        """A tombstone goes with the deletion that left it; what was created anew since is none."""
        lab = Lab()
        lab.settle(create(1, "gone"), delete(2, "gone"), create(3, "back"), delete(4, "back"), create(5, "back"))
        later(lab)
        lab.settle(create(6, "late"), delete(7, "late"))

        assert lab.collect().tombstones == 1
        assert lab.state("gone") is None
        assert lab.attributes("back") is not None
        late = lab.state("late")
        assert late is not None
        assert late.deleted

    def test_a_tombstone_that_is_replaced_meanwhile(self) -> None:
        """What is created anew between the look and the write stays."""
        lab = Lab()
        lab.settle(create(1), delete(2))
        with lab.store.read(TENANT) as reader:
            past = _collection.past_before(reader, TIME_US + 1)
        assert past is not None
        lab.settle(create(3))

        lab.store.submit(TENANT, lambda reader: _collection.without_past(reader, past)).result()

        assert lab.attributes() is not None
        assert collected(lab) == 2

    def test_tenants_are_collected_each(self) -> None:
        """Each tenant's history is collected, up to a version of its own."""
        lab = Lab()
        for tenant, count in (("one", 1), ("two", 2)):
            for number in range(count):
                write_steps(lab.store, [Step(("Task", f"t{number}"), {})], tenant=tenant)

        assert forget_all(lab).changes == 3
        for tenant, version in (("one", 1), ("two", 2)):
            with lab.store.read(tenant) as reader:
                assert reader.collected() == version

    def test_entries_of_those_that_left_a_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of objects that lost an indexed value long ago the table of indexes tells nothing more."""
        monkeypatch.setattr(_collection, "STEP_ENTRIES", 2)
        store = MemoryStore()
        people = "abc"

        def hand_on(first: str, second: str, time_us: int) -> None:
            for number in range(3):
                for who in (first, second):
                    step = Step(("Task", f"{first}{number}"), {"who": who})
                    write_steps(store, [step], schema=INDEXED, time_us=time_us)

        for who in people:
            hand_on(who, "x", TIME_US)
        hand_on("x", "y", TIME_US + DAY_US)
        write_steps(store, [Step(("Task", "a0"), None)], schema=INDEXED)
        store_lab = Lab(store=store, time_us=TIME_US + DAY_US)

        def entries() -> list[bytes]:
            with store.read(TENANT) as reader:
                return [key[:1] for table in (b"v", b"l", b"p") for key, _ in reader.index_range(table, b"", 1_000)]

        assert sorted(entries()) == [b"l"] * 13 + [b"p"] * 24 + [b"v"] * 11
        store_lab.collect()
        # Those of the second day, and the deletion behind them.
        assert sorted(entries()) == [b"l"] * 4 + [b"p"] * 15 + [b"v"] * 11


class TestObjectsWithoutTombstone:
    @pytest.fixture
    def lab(self) -> Lab:
        """Give a tenant in which a task was deleted so long ago that nothing is left of it."""
        lab = Lab()
        lab.settle(create(1), update(2, set={"n": 1}), delete(3), replica=REPLICA_B)
        forget_all(lab)
        assert lab.state() is None
        return lab

    def test_an_update_is_refused_with_its_payload(self, lab: Lab) -> None:
        """An update of it becomes a failure that holds it whole, and creates nothing."""
        operation = update(1, set={"n": 2}, base_version=2)

        (result,) = lab.settle(operation)

        assert said([result]) == ["OBJECT_GONE"]
        assert lab.failure(result).operation == operation
        assert lab.state() is None

    def test_a_deletion_by_who_saw_it(self, lab: Lab) -> None:
        """Who saw it may delete it still, as if there were a tombstone; nothing changes."""
        (result,) = lab.settle(delete(1, base_version=1))

        assert (said([result]), result.version, lab.version()) == (["APPLIED"], 3, 3)
        assert not lab.changes()

    @pytest.mark.parametrize("base_version", [0, 4])
    def test_a_deletion_by_who_did_not(self, lab: Lab, base_version: int) -> None:
        """A deletion of what its author never saw is refused."""
        assert said(lab.settle(delete(1, base_version=base_version))) == ["OBJECT_GONE"]

    def test_a_deletion_where_something_may_be_hidden(self, lab: Lab) -> None:
        """Where objects may be hidden, a deletion tells nothing of whether there was one."""
        lab.settle(create(4, "hidden"), replica=REPLICA_B)
        lab.application.allow("*", "Task", delete=True, where=attribute("mine") == 1)
        forget_all(lab)

        results = lab.settle(delete(1, base_version=1), delete(2, "hidden", base_version=1))

        assert said(results) == ["OBJECT_GONE", "OBJECT_GONE"]

    def test_a_creation_begins_anew(self, lab: Lab) -> None:
        """A creation under its id is another object: no earlier operation reaches it."""
        assert said(lab.settle(create(1, set={"n": 9}))) == ["APPLIED"]

        late = lab.settle(update(4, set={"n": 7}, base_version=2), delete(5, base_version=2), replica=REPLICA_B)

        assert said(late) == ["OBJECT_GONE", "OBJECT_GONE"]
        assert lab.attributes() == {"n": 9}


class TestConflicts:
    def lab(self, policy: Any = "reject_stale") -> Lab:
        """Give a tenant with a task that was changed long ago at version 2 by another replica."""
        lab = Lab()
        lab.application.on_conflict("Task", policy)
        lab.settle(create(1), replica=REPLICA_B)
        later(lab)
        lab.settle(update(2, set={"n": 2}), replica=REPLICA_B)
        return lab

    def test_what_cannot_be_told_counts_as_changed(self) -> None:
        """Where the log does not reach back to what the author saw, a change since is a conflict, whatever it was."""
        lab = self.lab()
        forget_all(lab)

        (result,) = lab.settle(update(1, set={"other": 1}, base_version=1))

        assert said([result]) == ["CONFLICT"]
        assert lab.failure(result).operation == update(1, set={"other": 1}, base_version=1)

    def test_an_object_that_was_not_changed_since(self) -> None:
        """Where nothing was changed since, nothing needs to be told."""
        lab = self.lab()
        forget_all(lab)

        assert said(lab.settle(update(1, set={"n": 1}, base_version=2))) == ["APPLIED"]

    def test_as_far_as_the_log_reaches(self) -> None:
        """What is kept is enough if the author has seen what is not."""
        lab = self.lab()
        later(lab)
        lab.settle(update(3, set={"m": 1}), replica=REPLICA_B)
        lab.collect(history=DAY)
        assert collected(lab) == 1

        results = lab.settle(update(1, set={"k": 1}, base_version=1), update(2, set={"m": 2}, base_version=1))

        assert said(results) == ["APPLIED", "CONFLICT"]

    def test_own_changes_are_none(self) -> None:
        """Who alone ever wrote an object has no conflict with anybody, however long ago it was."""
        lab = self.lab()
        forget_all(lab)

        assert said(lab.settle(update(3, set={"n": 1}, base_version=1), replica=REPLICA_B)) == ["APPLIED"]

    def test_a_function_needs_a_base(self) -> None:
        """A policy of the application is not asked where nobody can tell what the author saw."""

        def policy(base: Attributes, theirs: Attributes, mine: Attributes | None) -> Attributes:
            raise AssertionError("asked")

        lab = self.lab(policy)
        forget_all(lab)

        assert said(lab.settle(update(1, set={"other": 1}, base_version=1))) == ["CONFLICT"]

    def test_the_last_arrival_needs_none(self) -> None:
        """Without a policy the last arrival wins, attribute by attribute, however old it is."""
        lab = Lab()
        lab.settle(create(1, set={"a": 1, "b": 1}), update(2, set={"a": 2}), replica=REPLICA_B)
        forget_all(lab)

        assert said(lab.settle(update(1, set={"b": 3}, base_version=1))) == ["APPLIED"]
        assert lab.attributes() == {"a": 2, "b": 3}


class TestOutcomes:
    def test_old_ones_go(self) -> None:
        """What became of operations is forgotten with the changes they made; of refused ones after the same time."""
        lab = Lab()
        lab.settle(create(1), update(2, "no"), update(3, set={"n": 1}))
        later(lab)
        lab.settle(update(4, set={"n": 2}), update(5, "no"))

        assert lab.collect().outcomes == 2
        assert lab.settled(1, 2, 3, 4, 5) == [3, 4, 5]  # there is nothing old behind the third one
        assert lab.replica().settled_ranges == ((1, 5),)
        write_something(lab)
        assert forget_all(lab).outcomes == 3

    def test_what_changed_nothing(self) -> None:
        """What became of an operation that changed nothing is not forgotten before a later change is."""
        lab = Lab()
        lab.settle(create(1), delete(2), replica=REPLICA_B)
        later(lab)
        repeated = delete(1, base_version=1)
        lab.settle(repeated)

        assert lab.collect(history=DAY // 2).changes == 2
        assert said(lab.settle(repeated)) == ["APPLIED"]
        write_something(lab)
        forget_all(lab)
        assert said(lab.settle(repeated)) == ["SUPERSEDED"]

    def test_those_behind_a_gap_stay(self) -> None:
        """Of operations behind one that is not settled, nothing is forgotten."""
        lab = Lab()
        lab.settle(create(1))
        lab.settle(create(3, "t3"))

        assert forget_all(lab).outcomes == 1
        assert lab.settled(1, 3) == [3]

        assert said(lab.settle(create(2, "t2"), create(3, "t3"))) == ["APPLIED", "APPLIED"]
        write_something(lab)
        assert forget_all(lab).outcomes == 2

    def test_a_repetition_is_not_applied_again(self) -> None:
        """What is repeated after that becomes a failure with its payload, and the same one if repeated again."""
        lab = Lab()
        add = make_operation("update", seq=2, increment={"n": 5}).encode()
        lab.settle(create(1, set={"n": 1}), add)
        write_something(lab)
        forget_all(lab)

        (first,) = lab.settle(add)
        (again,) = lab.settle(add)

        assert lab.attributes() == {"n": 6}
        assert said([first, again]) == ["SUPERSEDED", "SUPERSEDED"]
        assert first.failure_id == again.failure_id
        assert lab.failure(first).operation == add
        assert len(lab.failures()) == 1
        assert lab.replica().settled_ranges == ((1, 2),)
        assert lab.replica().newest_seq == 2

    def test_what_comes_behind_is_applied(self) -> None:
        """New operations in the same batch are applied, also on the same object."""
        lab = Lab()
        lab.settle(create(1))
        write_something(lab)
        forget_all(lab)

        assert said(lab.settle(create(1), update(2, set={"n": 1}))) == ["SUPERSEDED", "APPLIED"]
        assert lab.attributes() == {"title": "Buy milk", "n": 1}

    def test_a_repeated_group(self) -> None:
        """A repeated commit group becomes one failure with all of it; none of it is applied."""
        lab = Lab()
        both = group(make_operation(seq=1, id="a"), make_operation(seq=2, id="b"))
        lab.settle(*both)
        lab.settle(delete(3, "a"), delete(4, "b"))
        forget_all(lab)

        results = lab.settle(*both)

        assert said(results) == ["SUPERSEDED", "GROUP_REJECTED"]
        assert list(lab.failure(results[0]).group_operations) == both
        assert (lab.state("a"), lab.state("b")) == (None, None)

    def test_a_group_of_which_a_part_is_known(self) -> None:
        """Of a group of which a part is still known, each operation is told by itself."""
        lab = Lab()
        both = group(make_operation(seq=1, id="a"), make_operation(seq=2, id="b"))
        lab.settle(*both)
        forgotten = [1]
        lab.store.submit(TENANT, lambda reader: _collection.without_outcomes(reader, REPLICA_A, forgotten)).result()

        assert said(lab.settle(*both)) == ["SUPERSEDED", "APPLIED"]
        assert lab.version() == 2


class TestReplicas:
    def uploading(self, lab: Lab, replica: bytes = REPLICA_A) -> Any:
        """Begin to upload."""
        return lab.store.submit(TENANT, lambda reader: begin_upload(reader, replica, USER, lab.time_us)).result()

    def test_one_that_stays_away_is_retired(self) -> None:
        """A replica that uploads nothing for a long time is retired, and of its operations little is kept."""
        lab = Lab()
        lab.settle(create(1), update(2, "no"), update(4, set={"n": 1}))
        lab.settle(create(1, "t1"), replica=REPLICA_B)
        later(lab, days=10)
        lab.settle(create(2, "t2"), replica=REPLICA_B)
        before = lab.replica()

        counts = lab.collect(history=timedelta.max, replicas=10 * DAY)
        assert counts == Collected()
        later(lab)
        counts = lab.collect(history=10 * DAY, replicas=10 * DAY)

        assert (counts.replicas, counts.outcomes) == (1, 4)
        assert lab.replica() == before._replace(retired=True, session_number=before.session_number + 1)
        assert lab.settled(1, 2, 4) == []
        assert not lab.replica(REPLICA_B).retired

    def test_what_it_could_not_create_is_forgotten(self) -> None:
        """So is what a retired replica could not create, and only that."""
        lab = Lab()
        lab.settle(create(1), replica=REPLICA_B)
        lab.settle(create(1))
        lab.settle(create(2), replica=REPLICA_B)
        with lab.store.read(TENANT) as reader:
            assert reader.refused_creations(REPLICA_A, 10)
        later(lab, days=2)
        self.uploading(lab, REPLICA_B)

        lab.collect(history=DAY, replicas=DAY)

        with lab.store.read(TENANT) as reader:
            assert not reader.refused_creations(REPLICA_A, 10)
            assert reader.refused_creations(REPLICA_B, 10)

    def test_it_cannot_upload(self) -> None:
        """Under its id a retired replica cannot upload any more; somebody else still cannot at all."""
        lab = Lab()
        lab.settle(create(1))
        later(lab, days=2)
        lab.collect(history=DAY, replicas=DAY)

        with pytest.raises(ReplicaRetired):
            self.uploading(lab)
        with pytest.raises(ReplicaOwned):
            lab.session(principal=Principal("eve"))

    def test_a_session_that_is_still_open_is_fenced(self) -> None:
        """A session that was begun before can do nothing more."""
        lab = Lab()
        session = lab.session()
        later(lab, days=2)
        lab.collect(history=DAY, replicas=DAY)

        with pytest.raises(SessionSuperseded):
            session.settle(create(1))

    def test_who_came_back_in_time(self) -> None:
        """A replica that begins to upload between the look and the write is not retired."""
        lab = Lab()
        lab.settle(create(1))
        later(lab, days=2)
        self.uploading(lab)

        job = lab.store.submit(TENANT, lambda reader: _collection.retired(reader, REPLICA_A, lab.time_us - DAY_US))

        assert job.result() == 0
        assert not lab.replica().retired

    def test_one_of_which_nothing_is_known(self) -> None:
        """A replica of which it was not noted when it was heard of is not retired."""
        lab = Lab()
        lab.settle(create(1))
        lab.store.submit(
            TENANT,
            lambda reader: (
                Writes({}, [], (REPLICA_A, lab.replica()._replace(heard_us=0)), [], [], reader.head().version),
                None,
            ),
        ).result()
        later(lab, days=2)

        assert lab.collect(history=DAY, replicas=DAY).replicas == 0


class TestFailures:
    def lab(self) -> tuple[Lab, Result]:
        """Give a tenant with a refused update of a task."""
        lab = Lab()
        lab.settle(create(1, set={"n": 1}), replica=REPLICA_B)
        refusing = [True]

        @lab.application.before_commit("Task")
        def refuse(task: HookObject, context: HookContext) -> None:
            if refusing:
                raise Reject("not today")

        (failed,) = lab.settle(update(1, set={"n": 2}, base_version=1))
        refusing.clear()
        return lab, failed

    def retry(self, lab: Lab, failed: Result, *, force: bool = False) -> list[failures.RetryOutcome]:
        """Retry a failure."""
        decision = Decision(Principal("root"), lab.time_us, force=force)
        return lab.store.submit(
            TENANT, lambda reader: failures.retry(reader, lab.application, failed.failure_id, decision)
        ).result()

    def test_an_object_that_was_not_changed_since(self) -> None:
        """A failure is retried as ever if its object was not changed since, however long ago that was."""
        lab, failed = self.lab()
        forget_all(lab)

        assert self.retry(lab, failed)[0].version == 2
        assert lab.attributes() == {"n": 2}

    def test_one_that_was_changed_nobody_knows_how(self) -> None:
        """Where the log does not tell what was changed since, it counts as changed, unless it is forced."""
        lab, failed = self.lab()
        lab.settle(update(2, set={"other": 1}), replica=REPLICA_B)
        forget_all(lab)

        with pytest.raises(FailureStale):
            self.retry(lab, failed)
        assert lab.failure(failed).operation
        assert self.retry(lab, failed, force=True)[0].version == 3
        assert lab.attributes() == {"n": 2, "other": 1}

    def test_one_that_is_gone(self) -> None:
        """The retry of an update whose object left no trace is refused again, and the failure stays open."""
        lab, failed = self.lab()
        lab.settle(delete(2), replica=REPLICA_B)
        forget_all(lab)

        assert self.retry(lab, failed, force=True)[0].reason is FailureReason.OBJECT_GONE
        assert decode_operation(lab.failure(failed).operation).kind is OperationKind.UPDATE

    def test_one_that_was_created_anew(self) -> None:
        """An object that was created anew since is another one: it counts as changed."""
        lab, failed = self.lab()
        lab.settle(delete(2), create(3, set={"n": 5}), replica=REPLICA_B)
        forget_all(lab)

        with pytest.raises(FailureStale):
            self.retry(lab, failed)


class TestSchemas:
    def test_an_index_is_made_of_what_is_left(self) -> None:
        """Where a schema asks for another index, objects are found by it whose history is forgotten."""
        lab = Lab()
        adopt_schema(lab.application, lab.store, migrate=False, time_us=TIME_US)
        lab.settle(create(1, "a", {"who": "ann"}), create(2, "b", {"who": "bob"}), create(3, "gone", {"who": "ann"}))
        lab.settle(delete(4, "gone"))
        forget_all(lab)
        lab.settle(update(5, "b", {"who": "ann"}), replica=REPLICA_A)
        lab.settle(update(6, "b", {"who": "eve"}), replica=REPLICA_A)

        adopt_schema(Application(schema=INDEXED), lab.store, migrate=False, time_us=lab.time_us)

        with lab.store.read(TENANT) as reader:

            def found(table: str, who: str) -> list[tuple[int, str]]:
                prefix = by_version_prefix("Task", "who", who)
                prefix = left_prefix(prefix) if table == "left" else prefix
                return list(versions_of(reader.index_range(prefix, b"", 10), prefix))

            assert [found("has", who) for who in ("ann", "bob", "eve")] == [[(1, "a")], [], [(6, "b")]]
            assert [found("left", who) for who in ("ann", "bob", "eve")] == [[(6, "b")], [(5, "b")], []]

    def test_a_migration_after_that(self) -> None:
        """Objects whose history is forgotten are migrated like others; what was renamed is told by its new name."""
        lab = Lab()
        lab.settle(create(1, "a", {"title": "x", "n": 1}), replica=REPLICA_B)
        forget_all(lab)
        renamed = Rename(entity="Task", attribute="title", to="name", version=2)
        schema = Schema([Entity("Task", {"name": String()})], version=2, open=True, renames=[renamed])
        lab.application = Application(schema=schema)
        lab.application.on_conflict("Task", "reject_stale")

        adopt_schema(lab.application, lab.store, migrate=True, time_us=lab.time_us)

        assert lab.attributes("a") == {"name": "x", "n": 1}
        # Nobody meant what a migration does: the author has seen all that anybody did.
        assert said(lab.settle(update(1, "a", {"name": "y"}, base_version=1, schema_version=2))) == ["APPLIED"]
        forget_all(lab)
        # Nobody knows any more that it was a migration.
        assert said(lab.settle(update(2, "a", {"n": 2}, base_version=1, schema_version=2))) == ["CONFLICT"]


class TestServer:
    def test_collects_when_told_to(self, tmp_path: Path) -> None:
        """A running server forgets at once what is due when it is told to."""
        lab = Lab()
        contents = DirectoryContents(tmp_path)
        with Server(
            Application(), store=lab.store, contents=contents, history_retention=DAY, replica_retention=DAY
        ) as server:
            lab.settle(create(1), delete(2))  # of long ago, by the server's clock

            assert server.collect() == Collected(changes=2, tombstones=1, outcomes=2, replicas=1)
            assert server.collect() == Collected()

    def test_one_that_does_not_run(self, tmp_path: Path) -> None:
        """A server that does not run says so."""
        server = Server(Application(), store=MemoryStore(), contents=DirectoryContents(tmp_path))
        with pytest.raises(ResourceClosed):
            server.collect()
        with server:
            pass
        with pytest.raises(ResourceClosed):
            server.collect()

    def test_collects_by_itself(self, tmp_path: Path) -> None:
        """A server that starts forgets what is due."""
        lab = Lab()
        lab.settle(create(1), delete(2))
        done = threading.Event()
        with (
            mock.patch("tidelog_server._retention._log.info", side_effect=lambda *_, **__: done.set()),
            Server(Application(), store=lab.store, contents=DirectoryContents(tmp_path)),
        ):
            assert done.wait(30)

        assert collected(lab) == 2

    @pytest.mark.parametrize(
        ("history", "replicas"), [(timedelta(days=2), timedelta(days=1)), (timedelta(-1), timedelta(1))]
    )
    def test_periods_that_make_no_sense(self, history: timedelta, replicas: timedelta) -> None:
        """A period is not negative, and replicas are not retired before history is forgotten."""
        with pytest.raises(InvalidValue):
            Server(Application(), store="x", history_retention=history, replica_retention=replicas)
