"""Failures worked off: retry, edit and retry, dismiss, forget. Over a store in memory, without transport."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import pytest
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TENANT,
    TIME_US,
    Lab,
    MemoryStore,
    create,
    delete,
    group,
    make_operation,
    said,
    update,
)

from tidelog import Entity, Integer, Reference, Rename, Schema, String
from tidelog._failure import FailureReason
from tidelog._operation import decode_operation
from tidelog._patch import Patch
from tidelog.v1 import failure_pb2
from tidelog_server import Application, HookContext, HookObject, Principal, Reject, TransientError
from tidelog_server import _failures as failures
from tidelog_server._errors import FailureSettled, FailureStale, NotFound, RequestInvalid
from tidelog_server._failures import Decision, RetryOutcome
from tidelog_server._outcomes import Result
from tidelog_server._retention import Periods, Retention

OPERATOR: Final = Principal("olga", roles=frozenset({"operator"}))

JOBS_ARE_TASKS: Final = Rename(entity="Job", to="Task", version=2)
TASKS_ARE_NOTES: Final = Rename(entity="Task", to="Note", version=2)

OPEN, RETRIED, DISMISSED = (
    failure_pb2.FAILURE_STATUS_OPEN,
    failure_pb2.FAILURE_STATUS_RETRIED,
    failure_pb2.FAILURE_STATUS_DISMISSED,
)


@dataclass
class Desk:
    """
    A lab with an application that refuses what a test says, and an operator at work.

    Attributes:
        refused: Ids of the objects whose creations and updates a hook refuses.
    """

    application: Application = field(default_factory=Application)
    refused: set[str] = field(default_factory=set)
    lab: Lab = field(init=False)

    def __post_init__(self) -> None:
        self.lab = Lab(self.application)

        def refuse(found: HookObject, _context: HookContext) -> None:
            if found.id in self.refused:
                raise Reject(f"not {found.id}", code="not-now")

        for entity in ("Task", "Order", "Line"):
            if self.application.schema.open or self.application.schema.entity(entity) is not None:
                self.application.before_commit(entity)(refuse)

    def settle(self, *operations: bytes, replica: bytes = REPLICA_A) -> list[Result]:
        """Upload operations; return the results."""
        return self.lab.settle(*operations, replica=replica)

    def fail(self, *operations: bytes, refused: str = "t1") -> Result:
        """Upload operations of which the one on *refused* is refused by the hook, from now on allowed."""
        self.refused.add(refused)
        results = self.settle(*operations)
        self.refused.discard(refused)
        return next(one for one in results if one.reason is FailureReason.HOOK_REJECTED)

    def retry(
        self,
        failure: Result | bytes,
        *,
        operator: Principal = OPERATOR,
        force: bool = False,
        patch: bytes = b"",
        note: str = "",
    ) -> list[RetryOutcome]:
        """Retry a failure."""
        failure_id = failure if isinstance(failure, bytes) else failure.failure_id
        decision = Decision(operator, TIME_US, note, force, patch)
        job = self.lab.store.submit(
            TENANT, lambda reader: failures.retry(reader, self.application, failure_id, decision)
        )
        outcomes = job.result()
        self.lab.check_history()
        return outcomes

    def dismiss(self, failure: Result, note: str = "") -> failure_pb2.SynchronizationFailure:
        """Dismiss a failure."""
        decision = Decision(OPERATOR, TIME_US, note)
        return self.lab.store.submit(
            TENANT, lambda reader: failures.dismiss(reader, failure.failure_id, decision)
        ).result()

    def status(self, failure: Result) -> int:
        """Return where a failure stands."""
        return self.lab.failure(failure).status


@pytest.fixture
def desk() -> Desk:
    """Give a desk without schema."""
    return Desk()


def orders() -> Desk:
    """Return a desk whose application knows orders and their lines."""
    schema = Schema(
        [
            Entity("Order", {"name": String()}),
            Entity(
                "Line", {"order": Reference("Order", on_delete="keep"), "next": Reference("Line", on_delete="keep")}
            ),
        ],
        open=True,
    )
    return Desk(Application(schema=schema))


def order(seq: int, id: str = "o1", **others: Any) -> bytes:  # noqa: A002
    """Return the creation of an order."""
    return create(seq, id, {}, entity="Order", **others)


def line(seq: int, id: str, **set: Any) -> bytes:  # noqa: A002
    """Return the creation of a line."""
    return create(seq, id, set, entity="Line")


class TestRetry:
    def test_applies_what_was_refused(self, desk: Desk) -> None:
        """What a hook refused yesterday and takes today is applied, and the record says by whom, when and why."""
        failure = desk.fail(create(1))

        [outcome] = desk.retry(failure, note="the hook was wrong")

        assert (outcome.version, outcome.reason) == (1, None)
        assert desk.lab.attributes() == {"title": "Buy milk"}
        record = desk.lab.failure(failure)
        assert record == outcome.failure
        assert (record.status, record.settled_by) == (RETRIED, "olga")
        assert record.settle_time.ToMicroseconds() == TIME_US
        [action] = record.actions
        assert action.kind == failure_pb2.FAILURE_ACTION_KIND_RETRIED
        assert (action.user_id, action.acted_as, action.note) == ("olga", "olga", "the hook was wrong")
        assert action.outcome == "applied at version 1"

    def test_happens_once(self, desk: Desk) -> None:
        """Of two who retry the same failure one is told that the other has done it."""
        failure = desk.fail(update(2, increment={"n": 1}), refused="t1") if desk.settle(create(1)) else None
        assert failure is not None
        desk.retry(failure)

        with pytest.raises(FailureSettled, match="was retried already, by olga"):
            desk.retry(failure)

        assert desk.lab.attributes() == {"title": "Buy milk", "n": 1}

    def test_of_what_is_not_there(self, desk: Desk) -> None:
        """An unknown failure is named."""
        failure_id = uuid.uuid4()
        with pytest.raises(NotFound, match=str(failure_id)):
            desk.retry(failure_id.bytes)

    def test_refused_again_stays_open(self, desk: Desk) -> None:
        """What is refused by today's rules too stays open, with the attempt on record, and can be tried again."""
        failure = desk.fail(create(1))
        desk.refused.add("t1")

        [outcome] = desk.retry(failure, note="hoping")

        assert (outcome.version, outcome.reason, outcome.message) == (0, FailureReason.HOOK_REJECTED, "not t1")
        record = desk.lab.failure(failure)
        assert (record.status, record.settled_by) == (OPEN, "")
        assert not record.HasField("settle_time")
        [action] = record.actions
        assert action.kind == failure_pb2.FAILURE_ACTION_KIND_REFUSED
        assert (action.outcome, action.note) == ("HOOK_REJECTED: not t1", "hoping")
        assert desk.lab.version() == 0
        desk.refused.clear()
        assert desk.retry(failure)[0].version == 1
        assert len(desk.lab.failure(failure).actions) == 2

    def test_with_a_hook_that_cannot_tell_does_nothing(self, desk: Desk) -> None:
        """A transient error leaves the failure as it was."""
        failure = desk.fail(create(1))

        @desk.application.before_commit("Task")
        def cannot_tell(_task: HookObject, _context: HookContext) -> None:
            raise TransientError("down")

        with pytest.raises(TransientError):
            desk.retry(failure)

        assert not desk.lab.failure(failure).actions

    def test_of_unreadable_bytes_stays_open(self, desk: Desk) -> None:
        """Bytes that cannot be read are refused again as long as they cannot; they cannot be edited."""
        [garbage, headless] = desk.settle(b"\xff\xff", make_operation("create", seq=2, entity="").encode())
        for failure in (garbage, headless):
            [outcome] = desk.retry(failure)
            assert (outcome.version, outcome.reason) == (0, FailureReason.MALFORMED)
            with pytest.raises(RequestInvalid, match="cannot be read"):
                desk.retry(failure, patch=Patch({"n": 1}).encode())
            assert desk.status(failure) == OPEN
            assert len(desk.lab.failure(failure).actions) == 1

    def test_of_a_group_that_was_not_whole_stays_open(self, desk: Desk) -> None:
        """A part of a commit group is not applied without the rest, however often it is retried."""
        members = group(make_operation(seq=1, id="a"), make_operation(seq=2, id="b"), make_operation(seq=3, id="c"))
        parts = [desk.settle(*members[:2])[0], desk.settle(members[2])[0]]

        for failure in parts:
            [outcome] = desk.retry(failure, force=True)
            assert (outcome.version, outcome.reason) == (0, FailureReason.MALFORMED)
        assert desk.lab.version() == 0

    def test_of_a_group_that_is_too_large_stays_open(self, desk: Desk) -> None:
        """The limit of commit groups holds for retries."""
        members = [make_operation(seq=n, id=f"t{n}", set={"x": "x" * 900_000}) for n in (1, 2, 3)]
        failure = desk.settle(*group(*members))[0]
        assert failure.reason is FailureReason.TOO_LARGE

        [outcome] = desk.retry(failure)

        assert (outcome.version, outcome.reason) == (0, FailureReason.TOO_LARGE)

    def test_keeps_the_newest_actions(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """However often somebody tries, a record has room for the newest attempts only."""
        monkeypatch.setattr(failures, "ACTIONS_KEPT_MAX", 3)
        failure = desk.fail(create(1))
        desk.refused.add("t1")
        for n in range(5):
            desk.retry(failure, note=str(n))

        assert [action.note for action in desk.lab.failure(failure).actions] == ["2", "3", "4"]


class TestRights:
    @staticmethod
    def application(*roles: str) -> Application:
        """Return an application where clerks may write tasks, and ann has these roles today."""
        application = Application(operators=["operator"])
        application.allow("clerk", "Task", create=True, write="*")

        @application.users
        def users(_tenant: str, user_id: str) -> Principal | None:
            return Principal(user_id, roles=frozenset(roles)) if roles else None

        return application

    def test_are_those_of_the_author_today(self) -> None:
        """What ann was not allowed is applied once she is, as her change, whatever the operator may do."""
        desk = Desk(self.application("clerk"))
        [failure] = desk.settle(create(1))
        assert failure.reason is FailureReason.ACCESS_DENIED

        [outcome] = desk.retry(failure)

        assert outcome.version == 1
        assert outcome.failure.actions[0].acted_as == "ann"
        [change] = desk.lab.changes()
        assert change.user_id == "ann"

    def test_are_not_those_of_the_operator_if_the_author_is_known(self) -> None:
        """An operator who may do anything cannot do it in the name of somebody who may not."""
        desk = Desk(self.application("guest"))
        [failure] = desk.settle(create(1))

        [outcome] = desk.retry(failure, operator=Principal("olga", roles=frozenset({"operator", "clerk"})))

        assert (outcome.version, outcome.reason) == (0, FailureReason.ACCESS_DENIED)

    def test_are_the_operators_if_the_author_is_not_known(self) -> None:
        """Without a known author the operator answers for the change, which is audited."""
        desk = Desk(self.application())
        [failure] = desk.settle(create(1))

        [refused] = desk.retry(failure)
        [applied] = desk.retry(failure, operator=Principal("otto", roles=frozenset({"operator", "clerk"})))

        assert refused.reason is FailureReason.ACCESS_DENIED
        assert applied.version == 1
        assert [action.acted_as for action in applied.failure.actions] == ["olga", "otto"]
        assert desk.lab.changes()[0].user_id == "otto"


class TestRules:
    def test_unique_value_given_free(self) -> None:
        """A value that was taken is available after its owner gave it up."""
        schema = Schema([Entity("Task", {"code": String()}, unique=[("code",)])])
        desk = Desk(Application(schema=schema))
        desk.settle(create(1, "first", {"code": "a"}))
        [failure] = desk.settle(create(2, "second", {"code": "a"}))
        assert failure.reason is FailureReason.UNIQUE_VIOLATED
        assert desk.retry(failure)[0].reason is FailureReason.UNIQUE_VIOLATED

        desk.settle(update(3, "first", {"code": "b"}))

        assert desk.retry(failure)[0].version == 3
        [late] = desk.settle(create(4, "third", {"code": "a"}))
        assert late.reason is FailureReason.UNIQUE_VIOLATED

    def test_reference_that_leads_somewhere_now(self) -> None:
        """A reference that led nowhere is resolved by an object that came later."""
        desk = orders()
        [failure] = desk.settle(line(1, "l1", order="o1"))
        assert failure.reason is FailureReason.DANGLING_REFERENCE
        assert desk.retry(failure)[0].reason is FailureReason.DANGLING_REFERENCE

        desk.settle(order(1), replica=REPLICA_B)

        assert desk.retry(failure)[0].version == 2

    def test_renames_between(self) -> None:
        """An operation of an older schema is retried in the names of today."""
        store = MemoryStore()
        former = Lab(Application(schema=Schema([Entity("Job", {"name": String(max_length=3)})], version=1)), store)
        [failure] = former.settle(create(1, "j1", {"name": "long"}, entity="Job", schema_version=1))
        assert failure.reason is FailureReason.VALIDATION_FAILED
        today = Schema(
            [Entity("Task", {"title": String()})],
            version=2,
            renames=[
                Rename(entity="Job", to="Task", version=2),
                Rename(entity="Task", attribute="name", to="title", version=2),
            ],
        )
        desk = Desk(Application(schema=today))
        desk.lab = Lab(desk.application, store)

        assert desk.retry(failure)[0].version == 1

        assert desk.lab.attributes("j1") == {"title": "long"}

    def test_edit_in_the_names_of_today(self) -> None:
        """What replaces the patch of an older operation is in the names of today."""
        store = MemoryStore()
        former = Lab(Application(schema=Schema([Entity("Job", {"name": String(max_length=3)})], version=1)), store)
        [failure] = former.settle(create(1, "j1", {"name": "long"}, entity="Job", schema_version=1))
        today = Schema(
            [Entity("Task", {"title": String(max_length=3)})],
            version=2,
            renames=[
                Rename(entity="Job", to="Task", version=2),
                Rename(entity="Task", attribute="name", to="title", version=2),
            ],
        )
        desk = Desk(Application(schema=today))
        desk.lab = Lab(desk.application, store)

        [mismatch] = desk.retry(failure, patch=Patch({"name": "abc"}).encode())
        [outcome] = desk.retry(failure, patch=Patch({"title": "abc"}).encode())

        assert mismatch.reason is FailureReason.SCHEMA_MISMATCH
        assert outcome.version == 1
        assert desk.lab.attributes("j1") == {"title": "abc"}


class TestStale:
    def test_changed_since_is_refused(self, desk: Desk) -> None:
        """What somebody has changed since the refusal is not overwritten without a person saying so."""
        desk.settle(create(1), update(2, set={"n": 1}))
        failure = desk.fail(update(3, set={"n": 2}, base_version=2))
        desk.settle(update(1, set={"n": 3}, base_version=2), replica=REPLICA_B)

        with pytest.raises(FailureStale, match="Task 't1' was changed since"):
            desk.retry(failure)
        assert not desk.lab.failure(failure).actions

        [outcome] = desk.retry(failure, force=True)

        assert outcome.version == 4
        assert outcome.failure.actions[0].forced
        assert desk.lab.attributes() == {"title": "Buy milk", "n": 2}

    def test_other_attributes_do_not_count(self, desk: Desk) -> None:
        """Changes of other attributes, and intents of the same kind, leave a retry as it is."""
        desk.settle(create(1))
        failure = desk.fail(update(2, set={"n": 2}, increment={"m": 1}, base_version=1))
        desk.settle(update(1, set={"title": "x"}, increment={"m": 1}, base_version=1), replica=REPLICA_B)

        assert desk.retry(failure)[0].version == 3

        assert desk.lab.attributes() == {"title": "x", "n": 2, "m": 2}

    def test_what_came_before_the_refusal_does_not_count(self, desk: Desk) -> None:
        """An author who overwrote somebody's change at the time does so today."""
        desk.settle(create(1))
        desk.settle(update(1, set={"n": 3}, base_version=1), replica=REPLICA_B)
        failure = desk.fail(update(2, set={"n": 2}, base_version=1))

        assert desk.retry(failure)[0].version == 3

    def test_any_change_counts_for_a_deletion(self, desk: Desk) -> None:
        """What was touched since is not deleted without a person saying so."""
        schema = Schema([Entity("Line", {"order": Reference("Order", on_delete="restrict")})], open=True)
        desk = Desk(Application(schema=schema))
        desk.settle(order(1), line(2, "l1", order="o1"))
        [failure] = desk.settle(delete(3, "o1", entity="Order"))
        assert failure.reason is FailureReason.REFERENCED
        desk.settle(delete(4, "l1", entity="Line"), update(5, "o1", {"n": 1}, entity="Order"))

        with pytest.raises(FailureStale):
            desk.retry(failure)

        assert desk.retry(failure, force=True)[0].version == 5
        assert desk.lab.attributes("o1", "Order") is None

    def test_the_authors_own_later_change_counts(self, desk: Desk) -> None:
        """What the author wrote after the refused operation is newer than it."""
        desk.settle(create(1))
        failure = desk.fail(update(2, set={"n": 2}))
        desk.settle(update(3, set={"n": 3}))

        with pytest.raises(FailureStale):
            desk.retry(failure)

    def test_the_authors_own_earlier_change_does_not_count(self, desk: Desk) -> None:
        """Of several edits that a hook refused while it was broken each is retried behind the one before it."""
        desk.settle(create(1))
        desk.refused.add("t1")
        refused = desk.settle(update(2, set={"n": 2}), update(3, set={"n": 3}))
        desk.refused.clear()

        assert [desk.retry(one)[0].version for one in refused] == [2, 3]

    def test_the_authors_own_later_change_counts_if_it_was_retried(self, desk: Desk) -> None:
        """Retried the other way round, the earlier edit does not overwrite the later one unasked."""
        desk.settle(create(1))
        desk.refused.add("t1")
        earlier, later = desk.settle(update(2, set={"n": 2}), update(3, set={"n": 3}))
        desk.refused.clear()
        desk.retry(later)

        with pytest.raises(FailureStale):
            desk.retry(earlier)

    def test_a_conflict_stays_one_unless_forced(self, desk: Desk) -> None:
        """The entity's conflict policy judges a retry too; to force it is to have looked at the present."""
        desk.application.on_conflict("Task", "reject_stale")
        desk.settle(create(1))
        desk.settle(update(1, set={"n": 3}, base_version=1), replica=REPLICA_B)
        [failure] = desk.settle(update(2, set={"n": 2}, base_version=1))
        assert failure.reason is FailureReason.CONFLICT

        [again] = desk.retry(failure)
        [forced] = desk.retry(failure, force=True)

        assert again.reason is FailureReason.CONFLICT
        assert forced.version == 3

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("is_group", [False, True])
    def test_what_a_retry_does_itself_is_no_conflict(self, desk: Desk, *, force: bool, is_group: bool) -> None:
        """Where stale edits are refused, a group and a dependent may change what was created right before them."""
        desk.application.on_conflict("Task", "reject_stale")
        members = [make_operation(seq=1), make_operation("update", seq=2, set={"title": "x"})]
        failure = desk.fail(*(group(*members) if is_group else [member.encode() for member in members]))

        outcomes = desk.retry(failure, force=force)

        assert outcomes[-1].version == 2
        assert desk.lab.attributes() == {"title": "x"}

    @staticmethod
    def held() -> tuple[Desk, Result]:
        """Return a desk with a refused group that waited for an object among others that did, and writes a task."""
        desk = orders()
        desk.settle(create(1, "t1", {"n": 0}))
        results = desk.settle(
            line(2, "l1", next="l2"),
            line(3, "l3", next="l1"),
            *group(
                make_operation("update", seq=4, id="t1", set={"n": 1}, base_version=1),
                make_operation(seq=5, id="l2", entity="Line", set={"order": "o1"}),
            ),
        )
        assert said(results[:2]) == ["DEPENDENCY_FAILED", "DEPENDENCY_FAILED"]
        assert FailureReason.DANGLING_REFERENCE in {one.reason for one in results[2:]}
        return desk, results[3]

    def test_what_waited_was_refused_at_a_version_that_was(self) -> None:
        """The record of a held operation names the version at its refusal, not one of an attempt that was undone."""
        desk, _failure = self.held()

        assert [record.version for record in desk.lab.failures()] == [1, 1, 1]

    def test_what_waited_is_stale_once_it_was_changed(self) -> None:
        """What others write right after the refusal of held operations is not overwritten unasked."""
        desk, failure = self.held()
        desk.settle(order(1), update(2, "t1", {"n": 2}, base_version=1), replica=REPLICA_B)

        with pytest.raises(FailureStale):
            desk.retry(failure)

        assert [bool(one.version) for one in desk.retry(failure, force=True)] == [True, True, True]
        assert desk.lab.attributes("t1") == {"n": 1}

    def test_what_waited_is_not_stale_by_what_came_before_it(self) -> None:
        """Changes before the refusal, and those that the author made before it in the same go, do not count."""
        desk = orders()
        desk.settle(create(1, "t1", {"n": 0}))
        members = [
            make_operation("update", seq=3, id="t1", set={"n": 1}, base_version=1),
            make_operation(seq=4, id="l1", entity="Line", set={"next": "l2"}),
        ]
        late = [
            make_operation("update", seq=6, id="t1", set={"n": 2}, base_version=1),
            make_operation(seq=7, id="l3", entity="Line", set={"order": "o1"}),
        ]
        session = desk.lab.session()
        session.batch(*group(*members), line(5, "l2"), *group(*late))
        desk.settle(update(1, "t1", {"n": 3}, base_version=1), replica=REPLICA_B)
        [*applied, _, failure] = session.held()
        assert said(applied) == ["APPLIED", "APPLIED"]
        desk.settle(order(2), replica=REPLICA_B)

        assert desk.retry(failure)[0].version

        assert desk.lab.attributes("t1") == {"n": 2}

    def test_another_incarnation_needs_force(self, desk: Desk) -> None:
        """An edit of an object that was deleted and made anew since reaches the new one only by force."""
        desk.settle(create(1))
        failure = desk.fail(update(2, set={"n": 2}, base_version=1))
        desk.settle(delete(1, base_version=1), create(2), replica=REPLICA_B)

        with pytest.raises(FailureStale):
            desk.retry(failure)

        assert desk.retry(failure, force=True)[0].version == 4

    def test_force_does_not_raise_the_dead(self, desk: Desk) -> None:
        """An update of an object that is gone stays refused, forced or not."""
        desk.settle(create(1))
        failure = desk.fail(update(2, set={"n": 2}, base_version=1))
        desk.settle(delete(3))

        assert desk.retry(failure, force=True)[0].reason is FailureReason.OBJECT_GONE
        assert desk.status(failure) == OPEN


class TestEdit:
    def test_replaces_the_patch(self, desk: Desk) -> None:
        """What an operator writes instead is applied, and kept beside what was refused."""
        failure = desk.fail(create(1, set={"title": ""}))

        [outcome] = desk.retry(failure, patch=Patch({"title": "Milk"}).encode())

        assert desk.lab.attributes() == {"title": "Milk"}
        assert decode_operation(outcome.failure.operation).decoded_patch().set == {"title": ""}
        edited = decode_operation(outcome.failure.actions[0].edited_operation)
        assert (edited.decoded_patch().set, edited.seq, edited.key) == ({"title": "Milk"}, 1, ("Task", "t1"))

    def test_of_a_group_replaces_the_culprits_patch_only(self, desk: Desk) -> None:
        """The other operations of the group are applied as they came, all together."""
        members = group(
            make_operation(seq=1, id="a", set={"n": 1}),
            make_operation(seq=2, id="b", set={"n": 2}),
            make_operation(seq=3, id="c", set={"n": 3}),
        )
        failure = desk.fail(*members, refused="b")

        [outcome] = desk.retry(failure, patch=Patch({"n": 20}).encode())

        assert outcome.version == 3
        assert [desk.lab.attributes(id_) for id_ in "abc"] == [{"n": 1}, {"n": 20}, {"n": 3}]
        assert list(outcome.failure.group_operations) == members

    def test_mends_an_unreadable_patch(self, desk: Desk) -> None:
        """An operation whose patch makes no sense is applied with one that does."""
        [failure] = desk.settle(create(1, patch=b"\xc1"))
        assert failure.reason is FailureReason.MALFORMED

        assert desk.retry(failure, patch=Patch({"n": 1}).encode())[0].version == 1

        assert desk.lab.attributes() == {"n": 1}

    @pytest.mark.parametrize(
        ("operation", "patch"),
        [
            (create(2), Patch(increment={"n": 1})),
            (delete(2), Patch({"n": 1})),
            (create(2), Patch({"x": "x" * 1024 * 1024})),
        ],
    )
    def test_that_cannot_be_is_an_error(self, desk: Desk, operation: bytes, patch: Patch) -> None:
        """A patch that does not belong to the operation's kind, or makes it too large, is told to the operator."""

        @desk.application.before_delete("Task")
        def keep(_task: HookObject, _context: HookContext) -> None:
            raise Reject("kept")

        desk.settle(create(1))
        [failure] = desk.settle(operation)

        with pytest.raises(RequestInvalid, match="the edited operation"):
            desk.retry(failure, patch=patch.encode())

        assert not desk.lab.failure(failure).actions

    def test_refused_again_is_kept_with_its_patch(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """The record has what was tried, as far as there is room for it: the newest first."""
        monkeypatch.setattr(failures, "EDITS_KEPT_BYTES_MAX", 2_500)
        failure = desk.fail(create(1))
        desk.refused.add("t1")
        for n in range(4):
            desk.retry(failure, patch=Patch({"n": n, "x": "x" * 1_000}).encode())

        actions = desk.lab.failure(failure).actions
        assert [bool(action.edited_operation) for action in actions] == [False, False, True, True]
        assert desk.status(failure) == OPEN


class TestGroups:
    def test_are_retried_whole(self, desk: Desk) -> None:
        """All operations of a commit group are applied, in one go."""
        members = group(make_operation(seq=1, id="a"), make_operation("update", seq=2, id="a", set={"n": 1}))
        failure = desk.fail(*members, refused="a")

        [outcome] = desk.retry(failure)

        assert outcome.version == 2
        assert desk.lab.attributes("a") == {"n": 1}
        assert {change.failure for change in desk.lab.changes()} == {failure.failure_id}

    def test_are_refused_whole(self, desk: Desk) -> None:
        """If one operation is refused again none is applied."""
        members = group(make_operation(seq=1, id="a"), make_operation(seq=2, id="b"))
        failure = desk.fail(*members, refused="a")
        desk.refused.add("b")

        [outcome] = desk.retry(failure)

        assert (outcome.version, outcome.message) == (0, "not b")
        assert desk.lab.version() == 0

    def test_with_one_stale_operation_are_stale(self, desk: Desk) -> None:
        """It is enough that one object was changed since."""
        desk.settle(create(1, "b"))
        members = group(make_operation(seq=2, id="a"), make_operation("update", seq=3, id="b", set={"n": 1}))
        failure = desk.fail(*members, refused="a")
        desk.settle(update(1, "b", {"n": 2}, base_version=1), replica=REPLICA_B)

        with pytest.raises(FailureStale, match="'b'"):
            desk.retry(failure)
        assert desk.lab.attributes("a") is None


class TestDependents:
    def test_follow(self) -> None:
        """What was refused because of a failure is applied behind it: children, and changes of the same object."""
        desk = orders()
        failure = desk.fail(
            order(1), line(2, "l1", order="o1"), update(3, "o1", {"n": 1}, entity="Order"), refused="o1"
        )

        outcomes = desk.retry(failure, note="go")

        assert [(one.failure.object_id, one.version) for one in outcomes] == [("o1", 1), ("l1", 2), ("o1", 3)]
        assert all(record.status == RETRIED for record in desk.lab.failures())
        assert all(record.actions[0].note == "go" for record in desk.lab.failures())
        assert [change.seq for change in desk.lab.changes()] == [1, 2, 3]
        assert desk.lab.attributes("o1", "Order") == {"n": 1}

    def test_of_dependents_follow_in_the_order_of_the_log(self) -> None:
        """Down a chain everything comes in the order in which its author did it."""
        desk = orders()
        operations = [
            order(1),
            line(2, "l1", order="o1"),
            line(3, "l2", order="o1", next="l1"),
            update(4, "l1", {"n": 1}, entity="Line"),
            update(5, "o1", {"n": 2}, entity="Order"),
            update(6, "l2", {"n": 3}, entity="Line"),
            delete(7, "l1", entity="Line"),
        ]
        failure = desk.fail(*operations, refused="o1")
        assert len(desk.lab.failures()) == 7

        outcomes = desk.retry(failure)

        assert [change.seq for change in desk.lab.changes()] == [1, 2, 3, 4, 5, 6, 7]
        assert len(outcomes) == 7
        assert desk.lab.attributes("l1", "Line") is None

    def test_that_are_refused_stay_open(self) -> None:
        """The rest goes on without a dependent that is refused, and without what depends on that."""
        desk = orders()
        failure = desk.fail(
            order(1),
            line(2, "l1", order="o1"),
            line(3, "l2", next="l1"),
            line(4, "l3", order="o1"),
            refused="o1",
        )
        desk.refused.add("l1")

        outcomes = desk.retry(failure)

        assert [(one.failure.object_id, bool(one.version)) for one in outcomes] == [
            ("o1", True),
            ("l1", False),
            ("l3", True),
        ]
        by_id = {record.object_id: record for record in desk.lab.failures()}
        assert {id_: record.status for id_, record in by_id.items()} == {
            "o1": RETRIED,
            "l1": OPEN,
            "l2": OPEN,
            "l3": RETRIED,
        }
        assert not by_id["l2"].actions
        desk.refused.clear()
        again = desk.retry(uuid.UUID(by_id["l1"].id).bytes)
        assert [one.failure.object_id for one in again] == ["l1", "l2"]

    def test_that_are_stale_stay_open(self) -> None:
        """A dependent that would overwrite what somebody changed since does not undo what it depends on."""
        desk = orders()
        desk.settle(create(1, "t1", {"n": 0}))
        failure = desk.fail(
            order(2),
            *group(
                make_operation(seq=3, id="l1", entity="Line", set={"order": "o1"}),
                make_operation("update", seq=4, id="t1", set={"n": 1}, base_version=1),
            ),
            line(5, "l2", order="o1"),
            refused="o1",
        )
        desk.settle(update(1, "t1", {"n": 2}, base_version=1), replica=REPLICA_B)

        outcomes = desk.retry(failure)

        assert [(one.failure.object_id, one.reason) for one in outcomes] == [
            ("o1", None),
            ("l1", FailureReason.CONFLICT),
            ("l2", None),
        ]
        assert "was changed since" in outcomes[1].failure.actions[0].outcome
        assert desk.lab.attributes("t1") == {"n": 2}

    def test_do_not_make_each_other_stale(self) -> None:
        """Changes of one and the same retry are no changes since the refusal."""
        desk = orders()
        desk.settle(create(1, "t1", {"n": 0}))
        groups = [
            group(
                make_operation(seq=seq, id=f"l{seq}", entity="Line", set={"order": "o1"}),
                make_operation("update", seq=seq + 1, id="t1", set={"n": seq}, base_version=1),
            )
            for seq in (3, 5)
        ]
        failure = desk.fail(order(2), *groups[0], *groups[1], refused="o1")

        outcomes = desk.retry(failure)

        assert all(one.version for one in outcomes)
        assert desk.lab.attributes("t1") == {"n": 5}

    def test_need_their_cause(self) -> None:
        """A dependent that is retried on its own is refused for the same cause."""
        desk = orders()
        desk.refused.add("o1")
        [_, child] = desk.settle(order(1), line(2, "l1", order="o1"))
        [_, late] = desk.settle(update(3, "o1", {}, entity="Order"), update(4, "o1", {}, entity="Order"))

        assert desk.retry(child)[0].reason is FailureReason.DEPENDENCY_FAILED
        assert desk.retry(late)[0].reason is FailureReason.DEPENDENCY_FAILED

    @pytest.mark.parametrize("sequence", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("is_update", [False, True])
    def test_of_two_causes_follow_the_last(self, *, is_update: bool, sequence: tuple[int, int]) -> None:
        """What lacks two objects comes with the one that is retried last, and is named as its dependent until then."""
        desk = orders()
        desk.refused |= {"o1", "o2"}
        members = [make_operation(seq=3, id="l1", entity="Line", set={"order": "o1"})]
        if is_update:
            members.append(make_operation("update", seq=4, id="o2", entity="Order", set={"n": 1}))
        else:
            members.append(make_operation(seq=4, id="l2", entity="Line", set={"order": "o2"}))
        [*parents, child, _] = desk.settle(order(1, "o1"), order(2, "o2"), *group(*members))
        desk.refused.clear()
        first, last = (parents[place] for place in sequence)

        desk.retry(first)

        assert desk.status(child) == OPEN
        assert desk.lab.failure(child).cause_failure_id == desk.lab.failure(last).id
        with desk.lab.store.read(TENANT) as reader:
            assert list(failures.dependents(reader, last.failure_id)) == [child.failure_id]
            assert not list(failures.dependents(reader, first.failure_id))
        assert [one.failure.object_id for one in desk.retry(last)][1:] == ["l1"]
        assert desk.status(child) == RETRIED

    def test_that_an_operator_edits_keep_their_cause(self) -> None:
        """What an edited operation lacks is not what the recorded one waits for."""
        desk = orders()
        desk.refused |= {"o1", "o2"}
        [parent, other, child] = desk.settle(order(1, "o1"), order(2, "o2"), line(3, "l1", order="o1"))
        desk.refused.clear()

        [outcome] = desk.retry(child, patch=Patch({"order": "o2"}).encode())

        assert outcome.reason is FailureReason.DEPENDENCY_FAILED
        assert len(desk.retry(other)) == 1
        assert [one.failure.object_id for one in desk.retry(parent)] == ["o1", "l1"]

    def test_that_were_dismissed_do_not_follow(self) -> None:
        """Nobody asks twice about what a person has decided."""
        desk = orders()
        desk.refused.add("o1")
        [parent, child] = desk.settle(order(1), line(2, "l1", order="o1"))
        desk.dismiss(child)
        desk.refused.clear()

        assert len(desk.retry(parent)) == 1

        assert desk.status(child) == DISMISSED
        assert desk.lab.attributes("l1", "Line") is None

    def test_of_sessions_in_between_follow(self) -> None:
        """What later sessions sent is found as well."""
        desk = orders()
        desk.refused.add("o1")
        [parent] = desk.settle(order(1))
        desk.settle(line(2, "l1", order="o1"))
        desk.settle(update(3, "l1", {"n": 1}, entity="Line"))
        desk.refused.clear()

        assert [one.version for one in desk.retry(parent)] == [1, 2, 3]

    def test_of_another_replica_do_not(self) -> None:
        """Somebody else's reference to the same id was refused for itself."""
        desk = orders()
        desk.refused.add("o1")
        [parent] = desk.settle(order(1))
        [other] = desk.settle(line(1, "l1", order="o1"), replica=REPLICA_B)
        desk.refused.clear()

        assert len(desk.retry(parent)) == 1
        assert (other.reason, desk.status(other)) == (FailureReason.DANGLING_REFERENCE, OPEN)

    def test_are_followed_so_many_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A transaction has an end: what is beyond it stays open, and can be retried like any failure."""
        monkeypatch.setattr(failures, "RETRIED_AT_ONCE_MAX", 4)
        desk = orders()
        children = [line(n, f"l{n}", order="o1") for n in range(2, 12)]
        failure = desk.fail(order(1), *children, refused="o1")

        outcomes = desk.retry(failure)

        assert [one.failure.object_id for one in outcomes] == ["o1", "l2", "l3", "l4"]
        waiting = [record for record in desk.lab.failures() if record.status == OPEN]
        assert len(waiting) == 7
        for record in waiting:
            assert desk.retry(uuid.UUID(record.id).bytes)[0].version

    def test_are_found_page_by_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All dependents are found, however they lie in the index."""
        monkeypatch.setattr(failures, "DEPENDENTS_PAGE", 3)
        desk = orders()
        failure = desk.fail(order(1), *[line(n, f"l{n}", order="o1") for n in range(2, 12)], refused="o1")

        outcomes = desk.retry(failure)

        assert [one.version for one in outcomes] == list(range(1, 12))

    def test_are_named(self) -> None:
        """The failures that one caused directly are listed in the order of their ids."""
        desk = orders()
        failure = desk.fail(order(1), line(2, "l1", order="o1"), line(3, "l2", next="l1"), refused="o1")
        with desk.lab.store.read(TENANT) as reader:
            [child] = failures.dependents(reader, failure.failure_id)
            [grandchild] = failures.dependents(reader, child)
            assert failures.load(reader, grandchild).object_id == "l2"
            assert not list(failures.dependents(reader, grandchild))


class TestCircles:
    """What refers to objects that come behind it is retried with them."""

    @pytest.mark.parametrize("force", [False, True])
    def test_of_a_group_with_the_child_first(self, *, force: bool) -> None:
        """A commit group may name what it creates further down, when it is retried as when it was uploaded."""
        desk = orders()
        members = group(
            make_operation(seq=1, id="l1", entity="Line", set={"order": "o1"}),
            make_operation(seq=2, id="o1", entity="Order"),
        )
        failure = desk.fail(*members, refused="o1")

        [outcome] = desk.retry(failure, force=force)

        assert outcome.version == 2
        assert desk.lab.attributes("l1", "Line") == {"order": "o1"}

    @staticmethod
    def lines(*refused: str) -> tuple[Desk, list[Result]]:
        """Return a desk with an order refused until now, two lines that need it and each other, and one more."""
        desk = orders()
        desk.refused.add("o1")
        results = desk.settle(
            order(1),
            line(2, "l1", order="o1", next="l2"),
            line(3, "l2", next="l1"),
            line(4, "l3", order="o1"),
        )
        desk.refused = set(refused)
        return desk, results

    def test_of_dependents_follow(self) -> None:
        """Dependents that refer to each other follow together, in the order of the log."""
        desk, [failure, *_] = self.lines()

        outcomes = desk.retry(failure)

        assert [one.failure.object_id for one in outcomes] == ["o1", "l1", "l2", "l3"]
        assert [one.version for one in outcomes] == [1, 2, 3, 4]
        assert [change.seq for change in desk.lab.changes()] == [1, 2, 3, 4]

    def test_without_one_that_is_refused(self) -> None:
        """What relied on a creation that is refused again stays open, and follows it later; the rest goes on."""
        desk, [failure, first, second, other] = self.lines("l2")

        outcomes = desk.retry(failure)

        assert [(one.failure.object_id, one.reason) for one in outcomes] == [
            ("o1", None),
            ("l1", FailureReason.DEPENDENCY_FAILED),
            ("l3", None),
        ]
        assert [desk.status(one) for one in (failure, first, second, other)] == [RETRIED, OPEN, OPEN, RETRIED]
        assert desk.lab.attributes("l1", "Line") is None
        [action] = desk.lab.failure(first).actions
        assert action.outcome.startswith("DEPENDENCY_FAILED: Line 'l1': attribute 'next' refers to Line 'l2'")
        assert desk.retry(second)[0].message == "not l2"
        desk.refused.clear()
        assert [one.failure.object_id for one in desk.retry(second)] == ["l2", "l1"]

    def test_retried_by_themselves(self) -> None:
        """Each of the two takes the other along, whichever is retried, also if their cause is long settled."""
        for place in (1, 2):
            desk, results = self.lines("l2")
            desk.retry(results[0])
            desk.refused.clear()

            outcomes = desk.retry(results[place])

            assert {one.failure.object_id for one in outcomes} == {"l1", "l2"}
            assert all(one.version for one in outcomes)

    def test_tell_why_each_was_refused(self) -> None:
        """What a commit group creates for itself is not missing when it is refused for another reason."""
        desk = orders()
        desk.refused.add("o1")
        failure, *_ = desk.settle(
            order(1),
            line(2, "l1", order="o1", next="l3"),
            *group(
                make_operation(seq=3, id="l2", entity="Line", set={"order": "o1", "next": "l3"}),
                make_operation(seq=4, id="l3", entity="Line", set={"order": "o1"}),
                make_operation(seq=5, id="o2", entity="Order"),
            ),
        )
        desk.refused = {"o2"}

        outcomes = desk.retry(failure)

        assert [bool(one.version) for one in outcomes] == [True, False, False]
        assert outcomes[1].reason is FailureReason.DEPENDENCY_FAILED
        assert outcomes[2].message == "not o2"

    def test_fall_with_what_they_need(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chain of any length falls with its end, and nothing else does."""
        monkeypatch.setattr(failures, "RETRY_ROUNDS_MAX", 3)
        desk = orders()
        chain = [line(n, f"l{n}", order="o1", next=f"l{n + 1}") for n in range(2, 9)]
        circle = [line(10, "l10", order="o1", next="l11"), line(11, "l11", next="l10")]
        failure = desk.fail(order(1), *chain, line(9, "l9", order="o1"), *circle, refused="o1")
        desk.refused.add("l9")

        outcomes = desk.retry(failure)

        assert [one.failure.object_id for one in outcomes if one.version] == ["o1", "l10", "l11"]
        assert "not l9" in [one.message for one in outcomes]
        assert not any(desk.lab.attributes(f"l{n}", "Line") for n in range(2, 10))

    def test_end_after_some_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However entangled failures are, a retry comes to an end: then nothing is taken for granted any more."""
        monkeypatch.setattr(failures, "RETRY_ROUNDS_MAX", 2)
        desk = orders()
        circle = [line(4, "l4", order="o1", next="l5"), line(5, "l5", next="l4")]
        failure = desk.fail(
            order(1), line(2, "l2", order="o1", next="l3"), line(3, "l3", order="o1"), *circle, refused="o1"
        )
        desk.refused.add("l3")

        outcomes = desk.retry(failure)

        assert [(one.failure.object_id, bool(one.version)) for one in outcomes] == [
            ("o1", True),
            ("l2", False),
            ("l3", False),
            ("l4", False),
        ]

    def test_beyond_what_is_retried_at_once_do_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody relies on what is not tried."""
        monkeypatch.setattr(failures, "RETRIED_AT_ONCE_MAX", 2)
        desk, [failure, first, *_] = self.lines()

        outcomes = desk.retry(failure)

        assert [bool(one.version) for one in outcomes] == [True, False]
        assert desk.lab.attributes("l1", "Line") is None
        assert len(desk.retry(first)) == 2


class TestTraces:
    def test_changes_name_their_failure(self, desk: Desk) -> None:
        """What a retry writes, hooks included, can be told from what was uploaded; it is nobody's own state."""

        @desk.application.after_commit("Task")
        def note(_task: HookObject, context: HookContext) -> None:
            context.create("Note", {}, "n1")

        failure = desk.fail(create(1))

        desk.retry(failure)

        changes = desk.lab.changes()
        assert [change.failure for change in changes] == [failure.failure_id] * 2
        assert [change.replica for change in changes] == [REPLICA_A] * 2
        state = desk.lab.state()
        assert state is not None
        assert not state.sole_writer

    def test_update_ends_sole_ownership(self, desk: Desk) -> None:
        """An object that its creator alone wrote is no longer confirmed as such after a retry."""
        desk.settle(create(1))
        failure = desk.fail(update(2, set={"n": 1}))
        before = desk.lab.state()
        assert before is not None
        assert before.sole_writer

        desk.retry(failure)

        state = desk.lab.state()
        assert state is not None
        assert not state.sole_writer

    @pytest.mark.parametrize("settle", ["retry", "dismiss", "forget"])
    def test_repetition_is_answered_as_before(self, desk: Desk, settle: str) -> None:
        """Whatever became of a failure, the device that repeats the operation hears what it would have heard."""
        readable, unreadable = make_operation("create", seq=1).encode(), b"\xff\xff"
        desk.refused.add("t1")
        first = desk.settle(unreadable, readable)
        desk.refused.clear()
        for failure in reversed(first):
            if settle == "retry" and failure.seq:
                desk.retry(failure)
            else:
                desk.dismiss(failure)
        if settle == "forget":
            forget(desk)
        version = desk.lab.version()

        again = desk.settle(unreadable, readable)

        assert again == first
        assert said(again) == ["MALFORMED", "HOOK_REJECTED"]
        assert again[1].code == "not-now"
        assert desk.lab.version() == version
        assert len(desk.lab.failures()) == 2

    def test_later_operations_of_the_device_go_on(self, desk: Desk) -> None:
        """The device that has downloaded what a retry made works on it as on anything."""
        failure = desk.fail(create(1))
        desk.retry(failure)

        assert said(desk.settle(update(2, set={"n": 1}, base_version=1), delete(3, base_version=1))) == [
            "APPLIED",
            "APPLIED",
        ]


class TestDismiss:
    def test_closes(self, desk: Desk) -> None:
        """A dismissed failure says by whom and why; nothing else changes."""
        failure = desk.fail(create(1))

        record = desk.dismiss(failure, note="entered twice")

        assert record == desk.lab.failure(failure)
        assert (record.status, record.settled_by) == (DISMISSED, "olga")
        [action] = record.actions
        assert action.kind == failure_pb2.FAILURE_ACTION_KIND_DISMISSED
        assert (action.note, action.acted_as) == ("entered twice", "")
        assert desk.lab.version() == 0

    def test_is_the_end(self, desk: Desk) -> None:
        """What was dismissed is neither retried nor dismissed, and what was retried not dismissed."""
        dismissed = desk.fail(create(1))
        desk.dismiss(dismissed)
        retried = desk.fail(create(2))
        desk.retry(retried)

        for again in (desk.retry, desk.dismiss):
            with pytest.raises(FailureSettled, match="dismissed already"):
                again(dismissed)
        with pytest.raises(FailureSettled, match="retried already"):
            desk.dismiss(retried)

    def test_of_what_is_not_there(self, desk: Desk) -> None:
        """An unknown failure is named."""
        with pytest.raises(NotFound):
            desk.dismiss(Result(1, 2, failure_id=uuid.uuid4().bytes))


def forget(desk: Desk, *, now_us: int = TIME_US + 1, kept: timedelta = timedelta(0)) -> None:
    """Collect once, payloads only."""
    periods = Periods(history=timedelta.max, replicas=timedelta.max, failures=kept)
    Retention(desk.lab.store, periods, lambda: now_us).collect()


class TestRetention:
    def test_takes_payloads_of_what_was_settled_long_ago(self, desk: Desk) -> None:
        """The payloads of settled failures go when their time has come; open ones keep theirs."""
        retried, dismissed, waiting = [desk.fail(create(seq)) for seq in (1, 2, 3)]
        desk.retry(retried, patch=Patch({"n": 1}).encode())
        desk.dismiss(dismissed)
        day = timedelta(days=1)

        forget(desk, now_us=TIME_US + day // timedelta(microseconds=1), kept=day)
        assert all(desk.lab.failure(one).operation for one in (retried, dismissed, waiting))

        forget(desk, now_us=TIME_US + day // timedelta(microseconds=1) + 1, kept=day)
        for one in (retried, dismissed):
            record = desk.lab.failure(one)
            assert record.payload_removed
            assert not record.operation
            assert not any(action.edited_operation for action in record.actions)
            assert record.actions
            assert record.message
        assert desk.lab.failure(waiting).operation

    def test_takes_groups_too(self, desk: Desk) -> None:
        """All operations of a group are payload."""
        failure = desk.fail(*group(make_operation(seq=1, id="a"), make_operation(seq=2, id="b")), refused="a")
        desk.dismiss(failure)

        forget(desk)

        assert not desk.lab.failure(failure).group_operations

    def test_writes_only_what_is_due(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """Page by page everything is looked at; the writer is asked where something is to be forgotten, and once."""
        monkeypatch.setattr("tidelog_server._retention.PAGE_FAILURES", 2)
        found = [desk.fail(create(seq)) for seq in range(1, 6)]
        desk.dismiss(found[3])
        jobs: list[str] = []
        submit = desk.lab.store.submit

        def counted(tenant: str, job: Callable[[Any], Any]) -> Any:
            jobs.append(tenant)
            return submit(tenant, job)

        monkeypatch.setattr(desk.lab.store, "submit", counted)

        forget(desk)
        forget(desk)

        assert jobs == [TENANT]
        assert [desk.lab.failure(one).payload_removed for one in found] == [False, False, False, True, False]

    def test_forgotten_failure_can_be_looked_at(self, desk: Desk) -> None:
        """A record without payload still says what object it was about."""
        failure = desk.fail(create(1))
        desk.dismiss(failure)
        forget(desk)

        record = desk.lab.failure(failure)

        assert failures.key_of(record, desk.application.schema) == ("Task", "t1")


def test_key_in_the_names_of_today(desk: Desk) -> None:
    """The object of a failure is looked for by the name that its entity has today."""
    failure = desk.fail(create(1, schema_version=1))
    today = Schema(
        [Entity("Job", {"n": Integer()})], version=2, open=True, renames=[Rename(entity="Task", to="Job", version=2)]
    )

    assert failures.key_of(desk.lab.failure(failure), today) == ("Job", "t1")
