from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import msgpack
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TENANT,
    TIME_US,
    USER,
    Lab,
    Session,
    create,
    delete,
    group,
    make_operation,
    nested,
    packed,
    references_schema,
    said,
    update,
)

from tidelog import Entity, FailureReason, Integer, Operation, OperationKind, Patch, Reference, Schema
from tidelog._limits import OBJECT_BYTES_MAX, OPERATION_BYTES_MAX
from tidelog._patch import decode_patch
from tidelog._values import decode_trusted, encode
from tidelog.v1 import failure_pb2, operation_pb2
from tidelog_server import Application, HookContext, HookObject, Principal, Reject, TransientError
from tidelog_server import _engine as engine
from tidelog_server._author import FormerIdentity
from tidelog_server._engine import evaluate_batch
from tidelog_server._errors import (
    OperationForked,
    OperationsOutOfOrder,
    ReplicaOwned,
    RequestInvalid,
    ServerOutdated,
    SessionSuperseded,
    StoreUnavailable,
)
from tidelog_server._outcomes import Status
from tidelog_server._records import ReplicaState

Hook = Callable[[HookObject, HookContext], object]

ORDERS = references_schema({"Line": {"order": "Order", "orders": ["Order"]}, "Order": {"parent": "Order"}})


def with_hook(moment: str, hook: Hook, entity: str = "Task") -> Lab:
    """Return a lab whose application has one hook."""
    application = Application()
    getattr(application, moment)(entity)(hook)
    return Lab(application)


def with_orders() -> Lab:
    """Return a lab whose application knows orders and their lines."""
    return Lab(Application(schema=ORDERS))


def line(seq: int, id: str, order: Any = "o1", **others: Any) -> Operation:  # noqa: A002
    """Return the creation of a line of an order."""
    return make_operation("create", seq=seq, entity="Line", id=id, set={"order": order}, **others)


def order(seq: int, id: str = "o1", **attributes: Any) -> Operation:  # noqa: A002
    """Return the creation of an order."""
    return make_operation("create", seq=seq, entity="Order", id=id, set=attributes)


def delete_order(seq: int, id: str) -> Operation:  # noqa: A002
    """Return the deletion of an order."""
    return make_operation("delete", seq=seq, entity="Order", id=id)


def needs_a_title(task: HookObject, context: HookContext) -> None:
    """Refuse what has no title."""
    if not task["title"]:
        raise Reject("a task needs a title")


class TestApplying:
    def test_a_creation_is_stored_as_it_came(self) -> None:
        """A creation becomes version 1 of its object, with the attributes byte for byte."""
        lab = Lab()
        # A map whose header is longer than need be: what was sent stays what it was.
        attributes = b"\xde\x00\x01" + packed("title") + packed("Buy milk")

        results = lab.settle(create(1, patch=b"\x81\xa3set" + attributes))

        assert [(result.status, result.version) for result in results] == [(Status.APPLIED, 1)]
        state = lab.state()
        assert state is not None
        assert (state.version, state.created, state.creator, state.deleted) == (1, 1, REPLICA_A, False)
        assert state.attributes == attributes

    def test_an_update_writes_what_it_names_and_nothing_else(self) -> None:
        """Attributes that an update does not name stay; what it unsets is gone."""
        lab = Lab()

        lab.settle(create(1, set={"a": 1, "b": 2, "c": 3}), update(2, set={"a": 10}, unset=["c"]))

        assert lab.attributes() == {"a": 10, "b": 2}

    def test_a_deletion_leaves_a_tombstone(self) -> None:
        """A deleted object keeps its versions and loses its attributes."""
        lab = Lab()

        results = lab.settle(create(1), delete(2))

        state = lab.state()
        assert state is not None
        assert (state.version, state.created, state.deleted, state.attributes) == (2, 1, True, b"")
        assert said(results) == ["APPLIED", "APPLIED"]

    def test_versions_follow_the_order_of_operations(self) -> None:
        """Each applied change takes the tenant's next version, whoever sent it."""
        lab = Lab()

        first = lab.settle(create(1, "t1"), create(2, "t2"))
        second = lab.settle(create(1, "t3"), replica=REPLICA_B)

        assert [result.version for result in (*first, *second)] == [1, 2, 3]
        assert lab.version() == 3
        lab.check_history()

    def test_an_empty_batch_writes_nothing(self) -> None:
        """A batch without operations has no results and changes nothing."""
        lab = Lab()

        assert lab.settle() == []
        assert lab.version() == 0

    def test_entities_without_a_schema_are_accepted(self) -> None:
        """The same id may stand for objects of several entities."""
        lab = Lab()

        results = lab.settle(create(1, entity="Task"), create(2, entity="Note"))

        assert said(results) == ["APPLIED", "APPLIED"]

    def test_a_batch_that_runs_again_gives_the_same(self) -> None:
        """Evaluating changes neither what it is given nor its own next run."""
        lab = Lab(Application(schema=ORDERS))
        session = lab.session()
        session.batch(line(1, "l1").encode())
        state = session.state
        batch = [order(2).encode(), update(3, "o1", set={"n": 1}, entity="Order")]

        def run() -> Any:
            with lab.store.read(TENANT) as reader:
                return evaluate_batch(
                    batch,
                    application=lab.application,
                    uploader=session.uploader,
                    reader=reader,
                    state=state,
                    time_us=TIME_US,
                )

        assert run() == run()


class TestRefusals:
    def test_an_update_of_an_object_that_never_was(self) -> None:
        """Updating what never was there is OBJECT_GONE."""
        lab = Lab()

        [result] = lab.settle(update(1, set={"done": True}))

        assert (result.status, result.reason, result.version) == (Status.REJECTED, FailureReason.OBJECT_GONE, 0)

    def test_an_update_of_a_deleted_object_keeps_its_payload(self) -> None:
        """An edit that lost against a deletion is recorded whole, under its object."""
        lab = Lab()
        lab.settle(create(1), delete(2))
        lost = update(1, set={"title": "Buy oat milk"}, base_version=1)

        [result] = lab.settle(lost, replica=REPLICA_B)

        assert result.reason is FailureReason.OBJECT_GONE
        record = lab.failure(result)
        assert record.operation == lost
        assert (record.entity, record.object_id) == ("Task", "t1")
        assert "t1" in record.message

    def test_a_deletion_of_an_object_that_never_was(self) -> None:
        """Deleting what never was there is OBJECT_GONE."""
        assert said(Lab().settle(delete(1))) == ["OBJECT_GONE"]

    def test_a_creation_over_an_object(self) -> None:
        """Creating what is there is ALREADY_EXISTS, and the object stays as it is."""
        lab = Lab()
        lab.settle(create(1, set={"title": "first"}))

        [result] = lab.settle(create(1, set={"title": "second"}), replica=REPLICA_B)

        assert result.reason is FailureReason.ALREADY_EXISTS
        assert lab.attributes() == {"title": "first"}

    @pytest.mark.parametrize(
        ("present", "intent"),
        [
            ("text", {"increment": {"a": 1}}),
            (1, {"increment": {"a": 1.5}}),
            (1.5, {"increment": {"a": Decimal(1)}}),
            (True, {"increment": {"a": 1}}),
            (2**63 - 1, {"increment": {"a": 1}}),
            (Decimal("9E+999999"), {"increment": {"a": 1}}),
            (1, {"add": {"a": [1]}}),
            ("abc", {"remove": {"a": ["a"]}}),
            ({}, {"add": {"a": [1]}}),
        ],
    )
    def test_an_intent_that_does_not_fit(self, present: Any, intent: dict[str, Any]) -> None:
        """An intent that the present value cannot take is VALIDATION_FAILED and changes nothing."""
        lab = Lab()

        results = lab.settle(create(1, set={"a": present}), update(2, **intent), update(3, set={"b": 1}))

        assert said(results) == ["APPLIED", "VALIDATION_FAILED", "APPLIED"]
        assert lab.attributes() == {"a": present, "b": 1}

    def test_a_hook_that_refuses(self) -> None:
        """What a hook rejects is HOOK_REJECTED with the hook's own words; what follows goes on."""
        lab = with_hook("before_commit", needs_a_title)

        results = lab.settle(create(1, "t1", {"title": ""}), create(2, "t2", {"title": "x"}))

        assert said(results) == ["HOOK_REJECTED", "APPLIED"]
        assert results[0].message == "a task needs a title"
        assert lab.state("t1") is None

    def test_a_hook_that_breaks(self, caplog: pytest.LogCaptureFixture) -> None:
        """An exception in a hook is HOOK_ERROR; its text and traceback go to the server's log only."""

        def breaks(task: HookObject, context: HookContext) -> None:
            raise ValueError("the secret word is plugh")

        lab = with_hook("before_commit", breaks)

        with caplog.at_level(logging.ERROR):
            results = lab.settle(create(1), create(1 + 1, entity="Note"))

        assert said(results) == ["HOOK_ERROR", "APPLIED"]
        record = lab.failure(results[0])
        for text in (results[0].message, record.message):
            assert "plugh" not in text
            assert "Traceback" not in text
            assert ".py" not in text
        assert "plugh" in caplog.text

    @pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), KeyError("x"), RecursionError()])
    def test_a_hook_that_raises_anything(self, error: BaseException) -> None:
        """Whatever a hook raises settles its operation: it is HOOK_ERROR and the batch goes on."""

        def breaks(task: HookObject, context: HookContext) -> None:
            raise error

        lab = with_hook("before_commit", breaks)

        assert said(lab.settle(create(1), create(2, entity="Note"))) == ["HOOK_ERROR", "APPLIED"]

    def test_a_hook_that_exits_the_program(self) -> None:
        """A hook that calls sys.exit() breaks its own operation, not the server."""
        lab = with_hook("before_commit", lambda task, context: sys.exit(3))

        assert said(lab.settle(create(1))) == ["HOOK_ERROR"]

    @pytest.mark.parametrize("message", ["", "\ud800", "x" * 5_000_000, 5, None, ValueError("no")])
    def test_a_rejection_with_any_message(self, message: Any) -> None:
        """However odd the message of a rejection, it is recorded, and short enough to be sent with many others."""

        def rejects(task: HookObject, context: HookContext) -> None:
            raise Reject(message)

        lab = with_hook("before_commit", rejects)

        [result] = lab.settle(create(1))

        assert result.reason is FailureReason.HOOK_REJECTED
        record = lab.failure(result)
        assert record.message == result.message
        assert len(record.message.encode()) <= 8_000, "500 results must fit into one message"

    def test_a_refusal_that_quotes_a_large_value(self) -> None:
        """A refusal that quotes what is there stays short enough to be sent with many others."""
        lab = Lab()

        results = lab.settle(create(1, set={"a": "x" * 900_000}), update(2, increment={"a": 1}))

        assert said(results) == ["APPLIED", "VALIDATION_FAILED"]
        assert len(results[1].message) <= 8_000

    def test_a_record_says_all_there_is_to_know(self) -> None:
        """A failure record holds who sent what when, why it was refused, and that nobody dealt with it."""
        lab = Lab()
        lab.settle(create(1), create(2, "t2"))

        [result] = lab.settle(create(3))

        record = lab.failure(result)
        assert record.replica_id == "61616161-6161-6161-6161-616161616161"
        assert record.user_id == USER.user_id
        assert record.reason == operation_pb2.FAILURE_REASON_ALREADY_EXISTS
        assert record.message == result.message
        assert record.operation == create(3)
        assert list(record.group_operations) == []
        assert record.version == 2
        assert record.create_time.ToMicroseconds() == TIME_US
        assert record.status == failure_pb2.FAILURE_STATUS_OPEN
        assert record.cause_failure_id == ""

    def test_an_object_that_grows_too_large(self) -> None:
        """An update after which one snapshot could not be sent any more is TOO_LARGE."""
        lab = Lab()
        third = "x" * (OBJECT_BYTES_MAX // 2 - 100)

        results = lab.settle(create(1, set={"a": third}), update(2, set={"b": third}), update(3, set={"c": third}))

        assert said(results) == ["APPLIED", "APPLIED", "TOO_LARGE"]
        assert lab.attributes() == {"a": third, "b": third}


def wire(**fields: Any) -> bytes:
    """Return an `Operation` message with any fields at all."""
    usual: dict[str, Any] = {
        "seq": 1,
        "nonce": 1,
        "kind": 1,
        "entity": "Task",
        "id": "t1",
        "patch": packed({"set": {}}),
    }
    return operation_pb2.Operation(**usual | fields).SerializeToString()


MALFORMED = {
    "garbage": b"\xff\xff\xff\xff",
    "nothing": b"",
    "a kind of zero": wire(kind=0),
    "an unknown kind": wire(kind=99),
    "no entity": wire(entity=""),
    "no id": wire(id=""),
    "a NUL in the entity": wire(entity="Ta\0sk"),
    "a NUL in the id": wire(id="t\0"),
    "a negative seq": wire(seq=-1),
    "a seq of zero": wire(seq=0),
    "a negative base version": wire(base_version=-1),
    "a client time of too many seconds": wire(client_time=Timestamp(seconds=2**40)),
    "a client time of too many nanoseconds": wire(client_time=Timestamp(seconds=253402300799, nanos=2**31 - 1)),
    "a client time of negative nanoseconds": wire(client_time=Timestamp(seconds=-62135596800, nanos=-1)),
    "a group of no operations": wire(group=operation_pb2.CommitGroup(id=1, position=0, size=0)),
    "a place outside of the group": wire(group=operation_pb2.CommitGroup(id=0, position=1, size=1)),
    "a group that begins elsewhere": wire(group=operation_pb2.CommitGroup(id=7, position=0, size=1)),
    "no patch": wire(patch=b""),
    "half a patch": wire(patch=packed({"set": {"title": "x"}})[:-1]),
    "two patches": wire(patch=packed({"set": {}}) * 2),
    "a patch that is no map": wire(patch=packed([1])),
    "an unknown key in the patch": wire(patch=packed({"swap": {}})),
    "a set that is no map": wire(patch=packed({"set": [1]})),
    "an unset that is no list": wire(kind=2, patch=packed({"unset": {"a": 1}})),
    "an unset of no name": wire(kind=2, patch=packed({"unset": [1]})),
    "an unset of a list": wire(kind=2, patch=packed({"unset": [["a"]]})),
    "an unset of a map": wire(kind=2, patch=packed({"unset": [{}]})),
    "an increment by no number": wire(kind=2, patch=packed({"increment": {"a": "b"}})),
    "an increment by true": wire(kind=2, patch=packed({"increment": {"a": True}})),
    "members that are no list": wire(kind=2, patch=packed({"add": {"a": 1}})),
    "an attribute under two keys": wire(kind=2, patch=packed({"set": {"a": 1}, "unset": ["a"]})),
    "an attribute unset twice": wire(kind=2, patch=packed({"unset": ["a", "a"]})),
    "a creation that unsets": wire(patch=packed({"unset": ["a"]})),
    "a creation with an intent": wire(patch=packed({"increment": {"a": 1}})),
    "a deletion with a patch": wire(kind=3, patch=packed({"set": {}})),
    "an attribute without a name": wire(patch=packed({"set": {"": 1}})),
    "a NUL in an attribute's name": wire(patch=packed({"set": {"a\0": 1}})),
    "a key twice": wire(patch=b"\x81\xa3set\x82\xa1a\x01\xa1a\x02"),
    "a key that is no string": wire(patch=packed({"set": {"a": {1: 2}}})),
    "a key that is bytes": wire(patch=packed({"set": {b"a": 2}})),
    "text that is no UTF-8": wire(patch=b"\x81\xa3set\x81\xa1a\xa1\xff"),
    "an integer of 64 bits without a sign": wire(patch=packed({"set": {"a": 2**63}})),
    "an unknown extension": wire(patch=packed({"set": {"a": msgpack.ExtType(42, b"x")}})),
    "a decimal that is none": wire(patch=packed({"set": {"a": msgpack.ExtType(1, b"twelve")}})),
    "an infinite decimal": wire(patch=packed({"set": {"a": msgpack.ExtType(1, b"Infinity")}})),
    "a time outside of all years": wire(patch=packed({"set": {"a": msgpack.Timestamp(2**60)}})),
    "the byte that means nothing": wire(patch=b"\x81\xa3set\x81\xa1a\xc1"),
}

TOO_LARGE = {
    "an operation of over 1 MiB": wire(patch=packed({"set": {"a": "x" * OPERATION_BYTES_MAX}})),
    "an id of 129 bytes": wire(id="x" * 127 + "é"),
    "an entity of 65 bytes": wire(entity="x" * 65),
    "an attribute's name of 65 bytes": wire(patch=packed({"set": {"x" * 65: 1}})),
    "too deep a value": wire(patch=packed({"set": {"a": nested(31)}})),
}


class TestMalformed:
    @pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
    def test_is_refused_whole(self, data: bytes) -> None:
        """Bytes that break a rule of the format are MALFORMED, kept as they came, and block nothing."""
        lab = Lab()

        results = lab.settle(data, create(2, "t2"))

        assert said(results) == ["MALFORMED", "APPLIED"]
        assert lab.failure(results[0]).operation == data
        assert lab.version() == 1

    @pytest.mark.parametrize("data", TOO_LARGE.values(), ids=TOO_LARGE)
    def test_over_a_limit(self, data: bytes) -> None:
        """What is over a limit is TOO_LARGE, kept as it came, and blocks nothing."""
        lab = Lab()

        results = lab.settle(data, create(2, "t2"))

        assert said(results) == ["TOO_LARGE", "APPLIED"]
        assert lab.failure(results[0]).operation == data

    def test_within_the_limits(self) -> None:
        """The longest names and the deepest value that are allowed are applied."""
        data = wire(entity="e" * 64, id="i" * 126 + "é", patch=packed({"set": {"é" * 32: nested(30)}}))

        assert said(Lab().settle(data)) == ["APPLIED"]

    def test_deeper_than_any_stack(self) -> None:
        """A value nested a hundred thousand levels deep is a refusal like any other."""
        data = wire(patch=b"\x81\xa3set\x81\xa1a" + b"\x91" * 100_000 + b"\x01")

        [result] = Lab().settle(data)

        assert result.reason in (FailureReason.MALFORMED, FailureReason.TOO_LARGE)

    def test_readable_seq_of_unreadable_operation_is_settled(self) -> None:
        """An operation that breaks a rule but shows its seq is settled: a repetition gets the same failure."""
        lab = Lab()
        first = lab.settle(wire(kind=99, seq=4, nonce=44))

        again = lab.settle(wire(kind=99, seq=4, nonce=44))

        assert again == first
        assert lab.settled(4) == [4]
        assert len(lab.failures()) == 1

    def test_bytes_without_a_seq_are_recorded_once(self) -> None:
        """Unreadable bytes sent again are the same failure, because nothing else tells them apart."""
        lab = Lab()

        first = lab.settle(b"\xff\xff")
        again = lab.settle(b"\xff\xff", b"\xff\xff", b"\xff\xfe")

        assert [result.failure_id for result in again[:2]] == [first[0].failure_id] * 2
        assert again[2].failure_id != first[0].failure_id
        assert len(lab.failures()) == 2


class TestSettledOnce:
    def test_an_applied_operation_sent_again(self) -> None:
        """A repetition of an applied operation gets its former result and changes nothing."""
        lab = Lab()
        first = lab.settle(create(1), update(2, increment={"n": 1}))

        again = lab.settle(create(1), update(2, increment={"n": 1}))

        assert again == first
        assert lab.attributes() == {"title": "Buy milk", "n": 1}
        assert lab.version() == 2

    def test_a_refused_operation_sent_again(self) -> None:
        """A stored refusal stands: a repetition gets it again even where the operation would be fine now."""
        lab = Lab()
        first = lab.settle(update(1, set={"done": True}))
        lab.settle(create(1), replica=REPLICA_B)

        again = lab.settle(update(1, set={"done": True}))

        assert again == first
        assert len(lab.failures()) == 1
        assert lab.attributes() == {"title": "Buy milk"}

    def test_a_refused_group_sent_again(self) -> None:
        """Each member of a refused commit group gets its own former result again."""
        lab = Lab()
        batch = group(make_operation(seq=1, id="t1"), make_operation("update", seq=2, id="gone"))
        first = lab.settle(*batch)

        assert lab.settle(*batch) == first
        assert said(first) == ["GROUP_REJECTED", "OBJECT_GONE"]

    def test_old_and_new_in_one_batch(self) -> None:
        """A batch may repeat settled operations before new ones."""
        lab = Lab()
        first = lab.settle(create(1), create(2))

        again = lab.settle(create(1), create(2), update(3, set={"done": True}))

        assert again[:2] == first
        assert said(again) == ["APPLIED", "ALREADY_EXISTS", "APPLIED"]

    def test_what_the_server_changed_is_remembered(self) -> None:
        """A repetition is told again that the server changed the object."""

        def stamps(task: HookObject, context: HookContext) -> None:
            task["stamped"] = True

        lab = with_hook("before_commit", stamps)
        first = lab.settle(create(1))

        assert lab.settle(create(1)) == first
        assert first[0].changed_by_server

    def test_another_nonce_is_a_fork(self) -> None:
        """Another operation at a settled position ends the session: the log is a copy."""
        lab = Lab()
        lab.settle(create(1))

        with pytest.raises(OperationForked):
            lab.settle(create(1, "other", nonce=99))

    def test_a_fork_writes_nothing(self) -> None:
        """Of a batch with a fork in it nothing is written, neither before it nor behind it."""
        lab = Lab()
        lab.settle(create(3, "t3"))

        with pytest.raises(OperationForked):
            lab.settle(create(2, "t2"), create(3, "other", nonce=99), create(4, "t4"))

        assert lab.version() == 1

    def test_a_refused_operation_with_another_nonce_is_a_fork_too(self) -> None:
        """A stored refusal is not handed to another operation that took its position."""
        lab = Lab()
        lab.settle(update(1))

        with pytest.raises(OperationForked):
            lab.settle(create(1, nonce=99))

    def test_positions_may_be_settled_out_of_order(self) -> None:
        """Operations that came later in the log may be settled first; the others find their place."""
        lab = Lab()

        lab.settle(create(5, "t5"))
        lab.settle(create(2, "t2"), create(3, "t3"))
        again = lab.settle(create(2, "t2"), create(5, "t5"))

        assert [result.version for result in again] == [2, 1]
        assert lab.replica().settled_ranges == ((2, 3), (5, 5))
        assert (lab.replica().newest_seq, lab.replica().newest_nonce) == (5, 1_000_005)

    def test_replicas_have_positions_of_their_own(self) -> None:
        """The same seq of two replicas is two operations."""
        lab = Lab()

        lab.settle(create(1, "t1"))
        results = lab.settle(create(1, "t2"), replica=REPLICA_B)

        assert said(results) == ["APPLIED"]
        assert lab.attributes("t2") is not None

    def test_part_of_a_group_settled_before(self) -> None:
        """A group of which a part was settled without it is not applied again."""
        lab = Lab()
        lab.settle(create(1))

        results = lab.settle(*group(make_operation(seq=1), make_operation(seq=2, id="t2")))

        assert said(results) == ["APPLIED", "MALFORMED"]
        assert lab.state("t2") is None


class TestBatches:
    def test_more_operations_than_a_batch_may_have(self) -> None:
        """A batch over the limit ends the session, unless it is one commit group; nothing of it is written."""
        lab = Lab()
        many = [make_operation(seq=seq, id=f"t{seq}") for seq in range(1, 502)]

        with pytest.raises(RequestInvalid):
            lab.settle(*[operation.encode() for operation in many])

        assert lab.version() == 0
        assert said(lab.settle(*group(*many))) == ["APPLIED"] * 501

    def test_a_group_of_too_many_bytes(self) -> None:
        """A commit group that no message could carry with all that belongs to it is TOO_LARGE."""
        lab = Lab()
        large = {"a": "x" * (OPERATION_BYTES_MAX - 200)}
        members = [make_operation(seq=seq, id=f"t{seq}", set=large) for seq in (1, 2, 3)]

        results = lab.settle(*group(*members), create(4, "t4"))

        assert set(said(results[:3])) == {"TOO_LARGE", "GROUP_REJECTED"}
        assert said(results[3:]) == ["APPLIED"]

    def test_a_defect_of_the_server(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """A defect that one operation shows refuses that operation, says nothing of itself, and stops no other."""
        apply = Patch.apply

        def breaks(self: Patch, attributes: dict[str, Any]) -> dict[str, Any]:
            if "trigger" in self.set:
                raise TypeError("the secret word is plugh")
            return apply(self, attributes)

        monkeypatch.setattr(Patch, "apply", breaks)
        lab = Lab()

        results = lab.settle(create(1), update(2, set={"trigger": 1}), update(3, set={"fine": 1}))

        assert said(results) == ["APPLIED", "HOOK_ERROR", "APPLIED"]
        assert "plugh" not in results[1].message
        assert "plugh" in caplog.text
        assert lab.attributes() == {"title": "Buy milk", "fine": 1}
        lab.check_history()


class TestOrder:
    @pytest.mark.parametrize("seqs", [(2, 1), (1, 1), (3, 4, 2)])
    def test_within_a_batch(self, seqs: tuple[int, ...]) -> None:
        """Positions that do not rise end the session, and nothing of the batch is written."""
        lab = Lab()

        with pytest.raises(OperationsOutOfOrder):
            lab.settle(*[create(seq, f"t{index}") for index, seq in enumerate(seqs)])

        assert lab.version() == 0

    @pytest.mark.parametrize("seq", [4, 5])
    def test_across_batches(self, seq: int) -> None:
        """Positions rise over all batches of a session."""
        session = Lab().session()
        session.batch(create(5, "t5"))

        with pytest.raises(OperationsOutOfOrder):
            session.batch(create(seq, "other"))

    def test_a_session_of_its_own_may_go_back(self) -> None:
        """Another session may send lower positions, as selected synchronizations do."""
        lab = Lab()
        lab.settle(create(5, "t5"))

        assert said(lab.settle(create(4, "t4"))) == ["APPLIED"]


class TestMerging:
    def test_different_attributes_both_count(self) -> None:
        """Two replicas that change different attributes from one base both win."""
        lab = Lab()
        lab.settle(create(1, set={"a": 0, "b": 0}))

        lab.settle(update(2, set={"a": 1}, base_version=1))
        lab.settle(update(1, set={"b": 2}, base_version=1), replica=REPLICA_B)

        assert lab.attributes() == {"a": 1, "b": 2}

    def test_the_last_arrival_wins_an_attribute(self) -> None:
        """Of two values for one attribute the one that arrives last stays, whatever its base."""
        lab = Lab()
        lab.settle(create(1, set={"a": 0}))

        lab.settle(update(1, set={"a": "theirs"}, base_version=1), replica=REPLICA_B)
        lab.settle(update(2, set={"a": "mine"}, base_version=1))

        assert lab.attributes() == {"a": "mine"}

    def test_an_unset_is_a_value_like_any_other(self) -> None:
        """Unsetting and setting one attribute: the last arrival wins too."""
        lab = Lab()
        lab.settle(create(1, set={"a": 0}))

        lab.settle(update(2, set={"a": 1}))
        lab.settle(update(1, unset=["a"], base_version=1), replica=REPLICA_B)

        assert lab.attributes() == {}

    @pytest.mark.parametrize(
        ("present", "one", "other", "expected"),
        [
            ({"n": 10}, {"increment": {"n": 1}}, {"increment": {"n": 2}}, {"n": 13}),
            ({}, {"increment": {"n": 1}}, {"increment": {"n": 2}}, {"n": 3}),
            ({"n": None}, {"increment": {"n": 1}}, {"increment": {"n": -1}}, {"n": 0}),
            ({"n": 0.5}, {"increment": {"n": 1}}, {"increment": {"n": 0.25}}, {"n": 1.75}),
            (
                {"n": Decimal("0.10")},
                {"increment": {"n": Decimal("0.20")}},
                {"increment": {"n": 1}},
                {"n": Decimal("1.30")},
            ),
            ({"l": ["a"]}, {"add": {"l": ["b"]}}, {"add": {"l": ["b", "c"]}}, {"l": ["a", "b", "c"]}),
            ({}, {"add": {"l": ["a"]}}, {"add": {"l": ["b"]}}, {"l": ["a", "b"]}),
            ({"l": None}, {"add": {"l": [1]}}, {"add": {"l": [1.0, True]}}, {"l": [1, 1.0, True]}),
            ({"l": ["a", "b", "c"]}, {"remove": {"l": ["a"]}}, {"remove": {"l": ["a", "c"]}}, {"l": ["b"]}),
            ({}, {"remove": {"l": ["a"]}}, {"remove": {"l": ["b"]}}, {"l": []}),
        ],
    )
    def test_intents_merge(
        self, present: dict[str, Any], one: dict[str, Any], other: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        """Intents of two replicas from one base both count."""
        lab = Lab()
        lab.settle(create(1, set=present))

        results = [
            *lab.settle(update(2, **one, base_version=1)),
            *lab.settle(update(1, **other, base_version=1), replica=REPLICA_B),
        ]

        assert said(results) == ["APPLIED", "APPLIED"]
        assert encode(lab.attributes()) == encode(expected)
        lab.check_history()

    def test_a_set_against_an_intent(self) -> None:
        """Against a set the order of arrival decides: what came before it is replaced, what comes later adds."""
        lab = Lab()
        lab.settle(create(1, set={"n": 1}))

        lab.settle(update(2, increment={"n": 10}))
        lab.settle(update(3, set={"n": 100}))
        lab.settle(update(4, increment={"n": 1}))

        assert lab.attributes() == {"n": 101}

    def test_a_deletion_of_a_deleted_object(self) -> None:
        """Deleting twice is applied twice and changes nothing the second time."""
        lab = Lab()
        lab.settle(create(1), delete(2), create(3, "t2"))

        [result] = lab.settle(delete(1, base_version=1), replica=REPLICA_B)

        assert (result.status, result.version) == (Status.APPLIED, 3)
        assert len(lab.changes()) == 3


class TestIncarnations:
    def recreated(self) -> Lab:
        """Return a lab in which replica A created, deleted and created t1 again (versions 1, 2, 3)."""
        lab = Lab()
        lab.settle(create(1, set={"title": "first"}), delete(2), create(3, set={"title": "second"}))
        return lab

    def test_a_creation_over_a_tombstone_begins_anew(self) -> None:
        """A deleted id may be created again: the object starts over, with nothing of the former one."""
        lab = Lab()
        lab.settle(create(1, set={"a": 1}), delete(2))

        [result] = lab.settle(create(1, set={"b": 2}), replica=REPLICA_B)

        state = lab.state()
        assert state is not None
        assert (result.version, state.created, state.creator) == (3, 3, REPLICA_B)
        assert lab.attributes() == {"b": 2}
        lab.check_history()

    @pytest.mark.parametrize("base_version", [0, 1, 2])
    @pytest.mark.parametrize("kind", ["update", "delete"])
    def test_an_operation_on_the_former_one(self, kind: str, base_version: int) -> None:
        """What was meant for a former incarnation does not touch the present one."""
        lab = self.recreated()

        [result] = lab.settle(make_operation(kind, base_version=base_version).encode(), replica=REPLICA_B)

        assert result.reason is FailureReason.OBJECT_GONE
        assert lab.attributes() == {"title": "second"}

    def test_an_operation_on_the_present_one(self) -> None:
        """Who saw the present incarnation may change it."""
        lab = self.recreated()

        assert said(lab.settle(update(1, set={"a": 1}, base_version=3), replica=REPLICA_B)) == ["APPLIED"]

    def test_its_creator_has_seen_it(self) -> None:
        """The replica that created the present incarnation may change it whatever base it names."""
        lab = self.recreated()

        assert said(lab.settle(update(4, set={"a": 1}, base_version=0))) == ["APPLIED"]


class TestHooks:
    def test_before_commit_changes_the_object(self) -> None:
        """What a before-commit hook sets or deletes is part of the change, and the author is told."""

        def tidies(task: HookObject, context: HookContext) -> None:
            task["slug"] = task["title"].lower()
            del task["draft"]

        lab = with_hook("before_commit", tidies)

        [result] = lab.settle(create(1, set={"title": "Milk", "draft": 1}))

        assert lab.attributes() == {"title": "Milk", "slug": "milk"}
        assert result.changed_by_server
        lab.check_history()

    def test_before_commit_sees_an_update_applied(self) -> None:
        """At an update the hook sees the whole object as it would become."""
        seen: list[dict[str, Any]] = []
        lab = with_hook("before_commit", lambda task, context: seen.append(task.to_dict()))

        lab.settle(create(1, set={"a": 1, "b": 2}), update(2, set={"a": 3}, unset=["b"]))

        assert seen == [{"a": 1, "b": 2}, {"a": 3}]

    def test_a_hook_that_changes_an_update(self) -> None:
        """The change log has what the hook made of an update, and what was there before."""

        def stamps(task: HookObject, context: HookContext) -> None:
            if task["done"]:
                task["title"] = "(done)"
                del task["due"]

        lab = with_hook("before_commit", stamps)
        lab.settle(create(1, set={"title": "Milk", "due": 5}), update(2, set={"done": True}))

        change = lab.changes()[1]
        patch = decode_patch(change.patch)
        assert (patch.set, patch.unset) == ({"done": True, "title": "(done)"}, ("due",))
        assert decode_trusted(change.before) == [{"title": "Milk", "due": 5}, ["done"]]

    def test_a_hook_that_changes_nothing(self) -> None:
        """A hook that sets what is there already does not count as a change by the server."""

        def repeats(task: HookObject, context: HookContext) -> None:
            task["title"] = task["title"]

        lab = with_hook("before_commit", repeats)

        [result] = lab.settle(create(1))

        assert not result.changed_by_server

    def test_a_value_of_another_type_is_a_change(self) -> None:
        """A hook that turns 1 into True or 1.0 has changed the object."""

        def converts(task: HookObject, context: HookContext) -> None:
            task["n"] = float(task["n"])

        lab = with_hook("before_commit", converts)

        [result] = lab.settle(create(1, set={"n": 1}))

        assert result.changed_by_server
        assert encode(lab.attributes()) == encode({"n": 1.0})

    def test_reading_the_object(self) -> None:
        """A hook reads attributes by name; one that is missing reads as None."""
        seen: list[Any] = []

        def reads(task: HookObject, context: HookContext) -> None:
            seen.extend([task.entity, task.id, task["title"], task["nothing"], "title" in task, "nothing" in task])

        with_hook("before_commit", reads).settle(create(1))

        assert seen == ["Task", "t1", "Buy milk", None, True, False]

    def test_hooks_run_in_the_order_of_their_declaration(self) -> None:
        """Each hook sees what the one before it made of the object."""
        lab = Lab()

        @lab.application.before_commit("Task")
        def first(task: HookObject, context: HookContext) -> None:
            task["trail"] = "1"

        @lab.application.before_commit("Task")
        def second(task: HookObject, context: HookContext) -> None:
            task["trail"] += "2"

        lab.settle(create(1))

        assert lab.attributes() == {"title": "Buy milk", "trail": "12"}

    def test_a_hook_may_serve_several_entities(self) -> None:
        """A hook runs for the entities it was declared for, and for no other."""
        seen: list[str] = []
        lab = Lab()

        @lab.application.before_commit("Task")
        @lab.application.before_commit("Note")
        def notes(thing: HookObject, context: HookContext) -> None:
            seen.append(thing.entity)

        lab.settle(create(1), create(2, entity="Note"), create(3, entity="Other"), delete(4))

        assert seen == ["Task", "Note"]

    def test_the_context_says_whose_operation_it_is(self) -> None:
        """A hook learns the principal and the operation."""
        seen: list[Any] = []

        def asks(task: HookObject, context: HookContext) -> None:
            seen.append((context.principal, context.operation.seq, context.operation.kind))

        lab = with_hook("before_commit", asks)
        lab.session(principal=Principal("bob", roles=frozenset({"clerk"}))).settle(create(7))

        assert seen == [(Principal("bob", roles=frozenset({"clerk"})), 7, OperationKind.CREATE)]

    def test_a_hook_writes_others(self) -> None:
        """What a hook creates, updates and deletes is part of the same transaction, attributed to the operation."""

        def counts(task: HookObject, context: HookContext) -> None:
            total = context.get("Counter", "tasks")
            if total is None:
                context.create("Counter", {"n": 1}, id="tasks")
            else:
                context.update("Counter", "tasks", {"n": total["n"] + 1})
            if context.get("Junk", "j"):
                context.delete("Junk", "j")

        lab = with_hook("after_commit", counts)

        lab.settle(create(1, "j", entity="Junk"), create(2, "t2"), create(3, "t3"))

        assert lab.attributes("tasks", "Counter") == {"n": 2}
        assert lab.attributes("j", "Junk") is None
        changes = lab.changes()
        assert [(change.key[0], change.seq, change.by_hook) for change in changes] == [
            ("Junk", 1, False),
            ("Task", 2, False),
            ("Counter", 2, True),
            ("Junk", 2, True),
            ("Task", 3, False),
            ("Counter", 3, True),
        ]
        assert {change.replica for change in changes} == {REPLICA_A}
        lab.check_history()

    def test_a_hook_gets_an_id_for_what_it_creates(self) -> None:
        """Without an id of its own, what a hook creates gets a new one, which it is told."""
        ids: list[str] = []
        lab = with_hook("after_commit", lambda task, context: ids.append(context.create("Audit", {"of": task.id})))

        lab.settle(create(1))

        assert lab.attributes(ids[0], "Audit") == {"of": "t1"}

    def test_a_hook_queries(self) -> None:
        """A query sees what is stored and what the batch has changed so far, and nothing deleted."""
        seen: list[list[str]] = []

        def looks(note: HookObject, context: HookContext) -> None:
            seen.append(sorted(id_ for id_, _ in context.query("Task", {"done": False})))

        lab = with_hook("before_commit", looks, "Note")
        lab.settle(*[create(n, f"t{n}", {"done": False}) for n in range(1, 5)])

        lab.settle(
            create(5, "t5", {"done": False}),
            update(6, "t1", {"done": True}),
            delete(7, "t2"),
            create(8, "n", entity="Note"),
        )

        assert seen == [["t3", "t4", "t5"]]

    def test_a_hook_changes_what_it_iterates_over(self) -> None:
        """Whatever a hook writes meanwhile, its query yields each object once."""
        seen: list[str] = []

        def shakes(note: HookObject, context: HookContext) -> None:
            for id_, _ in context.query("Task"):
                seen.append(id_)
                for other in ("t1", "t2", "t3"):
                    context.update("Task", other, {"touched_by": id_})

        lab = with_hook("before_commit", shakes, "Note")
        lab.settle(*[create(n, f"t{n}") for n in (1, 2, 3)])

        assert said(lab.settle(create(4, "n", entity="Note"))) == ["APPLIED"]
        assert sorted(seen) == ["t1", "t2", "t3"]

    def test_a_hook_deletes_what_it_iterates_over(self) -> None:
        """A hook may delete the objects of its own query."""

        def clears(note: HookObject, context: HookContext) -> None:
            for id_, _ in context.query("Task"):
                context.delete("Task", id_)

        lab = with_hook("before_commit", clears, "Note")
        lab.settle(*[create(n, f"t{n}") for n in (1, 2, 3)])

        assert said(lab.settle(create(4, "n", entity="Note"))) == ["APPLIED"]
        assert [lab.attributes(f"t{n}") for n in (1, 2, 3)] == [None] * 3

    def test_a_refusal_undoes_what_hooks_wrote(self) -> None:
        """Of a refused operation nothing stays, nor of what its hooks wrote before it was refused."""

        def writes_then_rejects(task: HookObject, context: HookContext) -> None:
            context.create("Audit", {}, id="a1")
            context.update("Counter", "c", {"n": 99})
            context.delete("Junk", "j")
            raise Reject("no")

        lab = with_hook("after_commit", writes_then_rejects)
        lab.settle(create(1, "c", {"n": 1}, entity="Counter"), create(2, "j", entity="Junk"))

        results = lab.settle(create(3), create(4, "n", entity="Note"))

        assert said(results) == ["HOOK_REJECTED", "APPLIED"]
        assert lab.attributes("c", "Counter") == {"n": 1}
        assert lab.attributes("j", "Junk") is not None
        assert lab.state("a1", "Audit") is None
        assert [change.key[0] for change in lab.changes()] == ["Counter", "Junk", "Note"]
        lab.check_history()

    def test_after_commit_sees_the_object_written(self) -> None:
        """An after-commit hook finds its object where everybody else does."""
        seen: list[Any] = []
        lab = with_hook("after_commit", lambda task, context: seen.append(context.get("Task", task.id)))

        lab.settle(create(1), update(2, set={"done": True}))

        assert seen == [{"title": "Buy milk"}, {"title": "Buy milk", "done": True}]

    def test_after_commit_may_write_its_object_through_the_context(self) -> None:
        """An after-commit hook that updates its own object makes a second change, and the author is told."""

        def stamps(task: HookObject, context: HookContext) -> None:
            if not task["stamp"]:
                context.update("Task", task.id, {"stamp": 1})

        lab = with_hook("after_commit", stamps)

        [result] = lab.settle(create(1))

        assert (result.version, result.changed_by_server) == (1, True)
        assert lab.attributes() == {"title": "Buy milk", "stamp": 1}
        assert [change.by_hook for change in lab.changes()] == [False, True]

    def test_after_commit_cannot_set_attributes(self) -> None:
        """Setting attributes after the object was written is a mistake in the hook."""

        def too_late(task: HookObject, context: HookContext) -> None:
            task["x"] = 1

        assert said(with_hook("after_commit", too_late).settle(create(1))) == ["HOOK_ERROR"]

    def test_before_commit_must_not_write_its_object_through_the_context(self) -> None:
        """A before-commit hook that goes behind its own object's back is refused, and nothing stays."""

        def behind(task: HookObject, context: HookContext) -> None:
            if not task["via"]:
                context.update("Task", task.id, {"via": "context"})

        lab = with_hook("before_commit", behind)
        lab.settle(create(1, set={"via": "set"}))

        results = lab.settle(update(2, unset=["via"]))

        assert said(results) == ["HOOK_ERROR"]
        assert lab.attributes() == {"via": "set"}

    def test_hooks_that_call_each_other_for_ever(self) -> None:
        """Hooks that run in a circle are stopped: HOOK_ERROR, and nothing stays."""

        def again(task: HookObject, context: HookContext) -> None:
            context.update("Task", task.id, {"n": (task["n"] or 0) + 1})

        lab = with_hook("after_commit", again)

        assert said(lab.settle(create(1), create(2, "n", entity="Note"))) == ["HOOK_ERROR", "APPLIED"]
        assert [change.key[0] for change in lab.changes()] == ["Note"]

    def test_a_hook_that_creates_for_ever(self) -> None:
        """Creations that breed creations are stopped too."""
        lab = with_hook("after_commit", lambda task, context: context.create("Task", {}))

        assert said(lab.settle(create(1))) == ["HOOK_ERROR"]
        assert lab.version() == 0

    def test_a_refusal_that_a_hook_catches_leaves_nothing_half(self) -> None:
        """A hook may catch the refusal of what it tried; what was tried is undone, the rest stays."""
        lab = Lab()

        @lab.application.after_commit("Audit")
        def rejects(audit: HookObject, context: HookContext) -> None:
            context.create("Echo", {}, id="e1")
            raise Reject("no audits")

        @lab.application.after_commit("Task")
        def tries(task: HookObject, context: HookContext) -> None:
            context.create("Counter", {}, id="c1")
            try:
                context.create("Audit", {}, id="a1")
            except Exception:  # noqa: BLE001 - what a careless hook does
                context.create("Plan", {}, id="b")

        results = lab.settle(create(1))

        assert said(results) == ["APPLIED"]
        assert [change.key for change in lab.changes()] == [("Task", "t1"), ("Counter", "c1"), ("Plan", "b")]
        lab.check_history()

    def test_a_hook_that_writes_what_is_not_there(self) -> None:
        """What a hook does to an object that is not there refuses the operation, unless the hook deals with it."""
        lab = with_hook("before_commit", lambda task, context: context.update("Ghost", "g", {"a": 1}))

        assert said(lab.settle(create(1))) == ["HOOK_ERROR"]

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda task, context: task.__setitem__("x", object()),
            lambda task, context: task.__setitem__("", 1),
            lambda task, context: task.__setitem__("x", 2**64),
            lambda task, context: context.create("Audit", {"x": {1}}),
            lambda task, context: context.create("", {}),
            lambda task, context: context.create("Audit", {}, id="x\0"),
            lambda task, context: context.update("Task", "other", {"x": float}),
            lambda task, context: context.query("Task", where=5).__next__(),
        ],
    )
    def test_a_hook_that_writes_what_cannot_be(self, spoil: Hook) -> None:
        """Values, names and ids that nobody may store break the hook, not the session."""
        lab = with_hook("before_commit", spoil)

        assert said(lab.settle(create(1), create(2, "n", entity="Note"))) == ["HOOK_ERROR", "APPLIED"]

    def test_a_value_that_is_spoilt_after_it_was_set(self) -> None:
        """A list that a hook spoils after it has set it breaks the hook, not the session."""

        def spoils(task: HookObject, context: HookContext) -> None:
            members: list[Any] = []
            task["l"] = members
            members.append(object())

        lab = with_hook("before_commit", spoils)

        assert said(lab.settle(create(1), create(2, "n", entity="Note"))) == ["HOOK_ERROR", "APPLIED"]

    @pytest.mark.parametrize("kind", ["create", "update"])
    def test_a_list_changed_in_place(self, kind: str) -> None:
        """A hook that appends to a list of its object has changed it like one that sets the attribute."""

        def appends(task: HookObject, context: HookContext) -> None:
            if context.operation.kind.name.lower() == kind:
                task["tags"].append("hooked")

        lab = with_hook("before_commit", appends)

        results = lab.settle(create(1, set={"tags": ["a"]}), update(2, set={"done": True}))

        assert lab.attributes() == {"tags": ["a", "hooked"], "done": True}
        assert [result.changed_by_server for result in results] == [kind == "create", kind == "update"]
        state = lab.state()
        assert state is not None
        assert not state.sole_writer
        lab.check_history()

    @pytest.mark.parametrize("reads", ["get", "query", "object"])
    def test_what_a_hook_only_reads_stays(self, reads: str) -> None:
        """A hook that changes what it was given to read changes nothing that is stored."""

        def fiddles(note: HookObject, context: HookContext) -> None:
            if reads == "get":
                found = context.get("Task", "t1")
                assert found is not None
                found["tags"].append("leak")
            elif reads == "query":
                for _, attributes in context.query("Task"):
                    attributes["tags"].append("leak")
            else:
                note.to_dict()["tags"].append("leak")

        lab = with_hook("after_commit", fiddles, "Note")
        lab.settle(
            create(1, set={"tags": ["a"]}),
            create(2, "n", {"tags": ["a"]}, entity="Note"),
            update(3, set={"done": True}),
            update(4, "n", set={"done": True}, entity="Note"),
            update(5, "n", set={"done": False}, entity="Note"),
        )

        assert lab.attributes() == {"tags": ["a"], "done": True}
        assert lab.attributes("n", "Note") == {"tags": ["a"], "done": False}
        lab.check_history()

    def test_before_delete_refuses(self) -> None:
        """A before-delete hook can keep its object."""

        def keeps(task: HookObject, context: HookContext) -> None:
            if task["locked"]:
                raise Reject("locked")

        lab = with_hook("before_delete", keeps)
        lab.settle(create(1, set={"locked": True}), create(2, "t2"))

        assert said(lab.settle(delete(3), delete(4, "t2"))) == ["HOOK_REJECTED", "APPLIED"]
        assert lab.attributes() == {"locked": True}

    def test_before_delete_cascades(self) -> None:
        """A before-delete hook can delete what belongs to its object, in the same transaction."""

        def cascades(task: HookObject, context: HookContext) -> None:
            for id_, _ in context.query("Step", {"task": task.id}):
                context.delete("Step", id_)

        lab = with_hook("before_delete", cascades)
        lab.settle(
            create(1),
            create(2, "s1", {"task": "t1"}, entity="Step"),
            create(3, "s2", {"task": "other"}, entity="Step"),
        )

        [result] = lab.settle(delete(4))

        assert lab.attributes("s1", "Step") is None
        assert lab.attributes("s2", "Step") is not None
        assert [change.key[0] for change in lab.changes(after=3)] == ["Step", "Task"]
        assert result.version == 5
        lab.check_history()

    def test_before_delete_changes_its_object_first(self) -> None:
        """What a before-delete hook writes to its object is in the deletion's before-image."""
        lab = with_hook("before_delete", lambda task, context: context.update("Task", task.id, {"last": "words"}))
        lab.settle(create(1), delete(2))

        assert lab.attributes() is None
        assert decode_trusted(lab.changes()[-1].before) == {"title": "Buy milk", "last": "words"}
        lab.check_history()

    def test_after_delete_sees_what_was(self) -> None:
        """An after-delete hook gets the attributes of the object that is gone."""
        seen: list[Any] = []

        def notes(task: HookObject, context: HookContext) -> None:
            seen.append((task.to_dict(), context.get("Task", task.id)))
            context.create("Audit", {"deleted": task.id}, id="a")

        lab = with_hook("after_delete", notes)
        lab.settle(create(1), delete(2))

        assert seen == [({"title": "Buy milk"}, None)]
        assert lab.attributes("a", "Audit") == {"deleted": "t1"}

    def test_no_hook_runs_for_a_deletion_that_changes_nothing(self) -> None:
        """Deleting what is deleted runs no hook."""
        seen: list[str] = []
        lab = with_hook("before_delete", lambda task, context: seen.append(task.id))
        lab.settle(create(1), delete(2))

        lab.settle(delete(3))

        assert seen == ["t1"]

    def test_no_hook_runs_for_a_repetition(self) -> None:
        """What is settled already runs no hook again: its effects happen once."""
        seen: list[str] = []
        lab = with_hook("before_commit", lambda task, context: seen.append(task.id))
        lab.settle(create(1))

        lab.settle(create(1))

        assert seen == ["t1"]

    @pytest.mark.parametrize("error", [StoreUnavailable, ServerOutdated])
    def test_a_store_that_a_hook_cannot_read_refuses_nothing(self, error: type[Exception]) -> None:
        """What a hook reads besides may be out of reach for a while: that is no fault of the operation."""

        def reads(task: HookObject, context: HookContext) -> None:
            raise error("the database is away")

        lab = with_hook("before_commit", reads)

        with pytest.raises(error):
            lab.settle(create(1, "t1"))

        assert lab.failures() == []
        assert lab.settled(1) == []

    @pytest.mark.parametrize("moment", ["before_commit", "after_commit"])
    def test_a_transient_error_leaves_nothing(self, moment: str) -> None:
        """A hook that cannot tell now ends the session: nothing is written, nothing is refused, all goes later."""
        down = [True]

        def asks(task: HookObject, context: HookContext) -> None:
            if down[0] and task.id == "t2":
                context.create("Audit", {}, id="a")
                raise TransientError("the service is down")

        lab = with_hook(moment, asks)
        batch = [create(1, "t1"), create(2, "t2"), create(3, "t3")]

        with pytest.raises(TransientError):
            lab.settle(*batch)

        assert lab.version() == 0
        assert lab.failures() == []
        assert lab.settled(1, 2, 3) == []
        down[0] = False
        assert said(lab.settle(*batch)) == ["APPLIED"] * 3

    def test_a_transient_error_among_held_operations_leaves_nothing(self) -> None:
        """A hook that cannot tell now while held operations are settled refuses none of them."""
        down = [True]
        lab = with_orders()

        @lab.application.before_commit("Line")
        def asks(line_: HookObject, context: HookContext) -> None:
            if down[0]:
                raise TransientError("the service is down")

        session = lab.session()
        down[0] = False
        session.batch(line(1, "l1").encode(), order(2).encode())
        down[0] = True

        with pytest.raises(TransientError):
            session.held()

        assert lab.settled(1, 2) == [2]
        down[0] = False
        assert said(session.held()) == ["APPLIED"]


class TestSoleWriter:
    def mark(self, lab: Lab) -> bool:
        """Return the mark of t1."""
        state = lab.state()
        assert state is not None
        return state.sole_writer

    def test_stays_with_the_creator(self) -> None:
        """An object that only its creator ever wrote carries the mark."""
        lab = Lab()

        lab.settle(create(1), update(2, set={"a": 1}))
        lab.settle(update(3, unset=["a"]))

        assert self.mark(lab)

    def test_is_lost_to_another_writer_for_good(self) -> None:
        """Once another replica has written, the mark does not come back."""
        lab = Lab()
        lab.settle(create(1))

        lab.settle(update(1, set={"a": 1}, base_version=1), replica=REPLICA_B)
        lab.settle(update(2, set={"a": 2}))

        assert not self.mark(lab)

    @pytest.mark.parametrize("intent", [{"increment": {"n": 1}}, {"add": {"l": [1]}}, {"remove": {"l": [1]}}])
    def test_is_lost_to_an_intent(self, intent: dict[str, Any]) -> None:
        """An intent's result depends on what is there, so the creator is told it."""
        lab = Lab()

        lab.settle(create(1), update(2, **intent), update(3, set={"a": 1}))

        assert not self.mark(lab)

    @pytest.mark.parametrize("kind", ["create", "update"])
    def test_is_lost_to_a_before_hook(self, kind: str) -> None:
        """What a before-commit hook changes is not what the creator said."""

        def stamps(task: HookObject, context: HookContext) -> None:
            if context.operation.kind.name.lower() == kind:
                task["stamp"] = 1

        lab = with_hook("before_commit", stamps)
        lab.settle(create(1), update(2, set={"a": 1}), update(3, set={"a": 2}))

        assert not self.mark(lab)

    def test_is_lost_to_an_after_hook(self) -> None:
        """What a hook writes later is not what the creator said."""
        lab = Lab()

        @lab.application.after_commit("Note")
        def touches(note: HookObject, context: HookContext) -> None:
            context.update("Task", "t1", {"touched": True})

        lab.settle(create(1), create(2, "n", entity="Note"), update(3, set={"a": 1}))

        assert not self.mark(lab)

    def test_is_not_given_to_what_a_hook_creates(self) -> None:
        """An object that a hook created is news to everybody."""
        lab = with_hook("after_commit", lambda note, context: context.create("Task", {}, id="t1"), "Note")

        lab.settle(create(1, "n", entity="Note"))

        assert not self.mark(lab)

    def test_starts_over_with_a_new_incarnation(self) -> None:
        """Who creates a deleted object anew is its sole writer from then on."""
        lab = Lab()
        lab.settle(create(1))
        lab.settle(update(1, set={"a": 1}, base_version=1), replica=REPLICA_B)

        lab.settle(delete(2), create(3))

        assert self.mark(lab)


class TestChangeLog:
    def test_holds_what_was_done_and_what_was_there(self) -> None:
        """Each change holds its patch, its before-image, its predecessor, its cause, author and time."""
        lab = Lab()

        lab.settle(
            create(1, set={"a": 1, "b": 2}),
            update(2, set={"a": 3, "c": 4}, unset=["b"]),
            delete(3),
        )

        made, changed, deleted = lab.changes()
        assert [change.kind for change in (made, changed, deleted)] == list(OperationKind)
        assert (decode_patch(made.patch).set, made.before, made.previous) == ({"a": 1, "b": 2}, b"", 0)
        assert decode_trusted(changed.before) == [{"a": 1, "b": 2}, ["c"]]
        assert changed.previous == 1
        assert (deleted.patch, decode_trusted(deleted.before), deleted.previous) == (b"", {"a": 3, "c": 4}, 2)
        for seq, change in enumerate((made, changed, deleted), 1):
            assert (change.replica, change.seq, change.by_hook) == (REPLICA_A, seq, False)
            assert (change.user_id, change.time_us) == (USER.user_id, TIME_US)

    def test_keeps_intents_as_intents(self) -> None:
        """The history has what people meant, not only what came of it."""
        lab = Lab()

        lab.settle(create(1, set={"n": 1}), update(2, increment={"n": 5}))

        assert decode_patch(lab.changes()[1].patch).increment == {"n": 5}
        assert decode_trusted(lab.changes()[1].before) == [{"n": 1}, []]

    def test_has_nothing_of_what_was_refused(self) -> None:
        """A refused operation takes no version and leaves no change."""
        lab = with_hook("before_commit", needs_a_title)

        lab.settle(create(1, "t1"), create(2, "t2", {}), create(3, "t3"))

        assert [(change.version, change.key[1]) for change in lab.changes()] == [(1, "t1"), (2, "t3")]


class TestReferences:
    def test_a_reference_to_what_is_there(self) -> None:
        """A reference that leads to an object is fine, in one batch too."""
        results = with_orders().settle(order(1).encode(), line(2, "l1").encode())

        assert said(results) == ["APPLIED", "APPLIED"]

    @pytest.mark.parametrize("targets", [None, [], ["o1"], ["o1", "o2"]])
    def test_what_is_no_dangling_reference(self, targets: Any) -> None:
        """Null and lists of names that lead somewhere do not dangle."""
        lab = with_orders()
        lab.settle(order(1).encode(), order(2, "o2").encode())

        assert said(lab.settle(create(3, "l1", {"orders": targets}, entity="Line"))) == ["APPLIED"]

    @pytest.mark.parametrize("target", [5, "", [], ["o1"]])
    def test_what_is_no_reference(self, target: Any) -> None:
        """What cannot be the id of an object is VALIDATION_FAILED."""
        lab = with_orders()
        lab.settle(order(1).encode())

        assert said(lab.settle(line(3, "l1", target).encode())) == ["VALIDATION_FAILED"]

    @pytest.mark.parametrize("targets", [{"order": "nowhere"}, {"orders": ["o1", "nowhere"]}])
    def test_a_dangling_reference(self, targets: dict[str, Any]) -> None:
        """A reference that leads nowhere is DANGLING_REFERENCE once all batches have come."""
        lab = with_orders()
        lab.settle(order(1).encode())

        [result] = lab.settle(create(2, "l1", targets, entity="Line"))

        assert result.reason is FailureReason.DANGLING_REFERENCE
        assert "'l1'" in result.message
        assert lab.state("l1", "Line") is None

    def test_a_reference_to_a_deleted_object(self) -> None:
        """A tombstone is nowhere."""
        lab = with_orders()
        lab.settle(order(1).encode(), delete(2, "o1", entity="Order"))

        assert said(lab.settle(line(3, "l1").encode())) == ["DANGLING_REFERENCE"]

    def test_a_reference_to_itself(self) -> None:
        """An object may refer to itself from the first."""
        assert said(with_orders().session().batch(order(1, "o1", parent="o1").encode())) == ["APPLIED"]

    def test_an_update_is_asked_about_what_it_writes(self) -> None:
        """A reference that dangles already does not block changes to other attributes."""
        lab = with_orders()
        lab.settle(order(1).encode(), line(2, "l1").encode(), delete(3, "o1", entity="Order"))

        results = lab.settle(
            update(4, "l1", {"amount": 2}, entity="Line"), update(5, "l1", {"order": "o9"}, entity="Line")
        )

        assert said(results) == ["APPLIED", "DANGLING_REFERENCE"]

    def test_members_added_to_a_reference_list(self) -> None:
        """A reference that comes as an added member is looked at too."""
        lab = with_orders()
        lab.settle(order(1).encode(), create(2, "l1", {"orders": ["o1"]}, entity="Line"))

        assert said(lab.settle(update(3, "l1", add={"orders": ["o9"]}, entity="Line"))) == ["DANGLING_REFERENCE"]

    def test_children_before_their_parent(self) -> None:
        """105 children that arrive before their parent all apply in the same session."""
        session = with_orders().session()

        preliminary = session.batch(*[line(n, f"l{n}").encode() for n in range(1, 106)])
        parent = session.batch(order(106).encode())
        final = session.held()

        assert said(preliminary) == ["HELD"] * 105
        assert said(parent) == ["APPLIED"]
        assert said(final) == ["APPLIED"] * 105
        assert [result.seq for result in final] == list(range(1, 106))

    def test_a_chain_in_reverse_order(self) -> None:
        """Each of 105 objects may arrive before the one that it refers to."""
        lab = with_orders()
        chain = [order(n, f"o{n}", parent=f"o{n + 1}").encode() for n in range(1, 105)]

        results = lab.settle(*chain, order(105, "o105").encode())

        assert said(results) == ["APPLIED"] * 105
        lab.check_history()

    def test_a_cycle(self) -> None:
        """Objects that refer to each other in a circle all apply."""
        results = with_orders().settle(
            order(1, "o1", parent="o2").encode(),
            order(2, "o2", parent="o3").encode(),
            order(3, "o3", parent="o1").encode(),
        )

        assert said(results) == ["APPLIED"] * 3

    @pytest.mark.parametrize("is_group", [True, False])
    def test_what_came_and_went_is_nowhere(self, *, is_group: bool) -> None:
        """A creation that was waited for counts until it has come: if it is undone, nothing can refer to it."""
        lab = with_orders()
        waits, comes = order(1, "o1", parent="o2").encode(), order(2, "o2", parent="o9").encode()
        goes = (delete_order(3, "o2"), order(4, "o3", parent="o2"), order(5, "o9"))
        behind = group(*goes) if is_group else [one.encode() for one in goes]

        results = lab.settle(waits, comes, *behind)

        assert results[3].failure_id
        assert lab.state("o3", "Order") is None

    def test_a_cycle_with_a_refused_member(self) -> None:
        """If one of a circle is refused, so are the others, each because of it; bystanders apply."""
        lab = with_orders()

        @lab.application.before_commit("Order")
        def rejects(order_: HookObject, context: HookContext) -> None:
            if order_["bad"]:
                raise Reject("bad")

        results = lab.settle(
            line(1, "l1", "fine").encode(),
            order(2, "o1", parent="o2").encode(),
            order(3, "o2", parent="o3", bad=True).encode(),
            order(4, "o3", parent="o1").encode(),
            order(5, "fine").encode(),
        )

        assert said(results)[0::2] == ["APPLIED", "HOOK_REJECTED", "APPLIED"]
        assert said(results)[1::2] == ["DEPENDENCY_FAILED", "DEPENDENCY_FAILED"]
        lab.check_history()

    def test_a_refused_parent(self) -> None:
        """Children and grandchildren of a refused creation hang under its failure."""
        lab = with_orders()

        @lab.application.before_commit("Order")
        def rejects(order_: HookObject, context: HookContext) -> None:
            if order_["bad"]:
                raise Reject("bad")

        results = lab.settle(
            order(1, "o1", bad=True).encode(),
            order(2, "o2", parent="o1").encode(),
            line(3, "l1", "o2").encode(),
            update(4, "o1", {"a": 1}, entity="Order"),
        )

        assert said(results) == ["HOOK_REJECTED", "DEPENDENCY_FAILED", "DEPENDENCY_FAILED", "DEPENDENCY_FAILED"]
        records = [lab.failure(result) for result in results]
        assert [record.cause_failure_id for record in records] == ["", records[0].id, records[1].id, records[0].id]

    def test_a_refused_parent_of_another_session(self) -> None:
        """What hangs under a refused creation does so in later sessions too."""
        lab = with_hook("before_commit", needs_a_title)
        [refused] = lab.settle(create(1, set={}))

        [result] = lab.settle(update(2, set={"title": "x"}))

        assert result.reason is FailureReason.DEPENDENCY_FAILED
        assert lab.failure(result).cause_failure_id == lab.failure(refused).id

    def test_a_creation_refused_to_one_replica_is_no_matter_of_another(self) -> None:
        """A child waits for its parent although another replica's creation of that parent was refused."""
        lab = with_orders()
        lab.application.before_commit("Order")(needs_a_title)
        lab.settle(order(1).encode())

        results = lab.settle(line(1, "l1").encode(), order(2, title="x").encode(), replica=REPLICA_B)

        assert said(results) == ["APPLIED", "APPLIED"]

    @pytest.mark.parametrize(
        ("settled_seq", "is_pending", "is_own"), [(1, False, True), (0, True, True), (0, False, False)]
    )
    def test_a_creation_refused_under_a_former_id(self, settled_seq: int, *, is_pending: bool, is_own: bool) -> None:
        """It counts if this copy made it: settled before the fork, or pending then; not if another copy did."""
        lab = with_orders()
        lab.application.before_commit("Order")(needs_a_title)
        refused = order(1).encode()
        [cause] = lab.settle(refused)
        pending = [refused] if is_pending else []
        formers = (FormerIdentity(REPLICA_A, 1, settled_seq),)

        *_, result = lab.session(REPLICA_B, formers=formers).settle(*pending, line(2, "l1").encode())

        assert said([result]) == ["DEPENDENCY_FAILED" if is_own else "DANGLING_REFERENCE"]
        assert lab.failure(result).cause_failure_id == (lab.failure(cause).id if is_own else "")

    def test_a_creation_tried_again(self) -> None:
        """Once the object exists after all, what refers to it is no longer held against the former failure."""
        lab = with_orders()
        lab.application.before_commit("Order")(needs_a_title)
        lab.settle(order(1).encode())

        results = lab.settle(line(2, "l1").encode(), order(3, title="x").encode(), line(4, "l2").encode())

        assert said(results) == ["APPLIED"] * 3
        lab.settle(delete(5, "o1", entity="Order"))
        assert said(lab.settle(line(6, "l3").encode())) == ["DANGLING_REFERENCE"]

    def test_later_operations_wait_behind_a_held_one(self) -> None:
        """Operations on an object are settled in log order although the first of them had to wait."""
        lab = with_orders()
        session = lab.session()

        first = session.batch(
            line(1, "l1").encode(),
            update(2, "l1", {"n": 1}, entity="Line"),
            update(3, "l1", {"n": 2}, entity="Line"),
            order(4, "other").encode(),
        )
        session.batch(order(5).encode(), update(6, "l1", {"m": 3}, entity="Line"))
        final = session.held()

        assert said(first) == ["HELD", "HELD", "HELD", "APPLIED"]
        assert [result.seq for result in final] == [1, 2, 3, 6]
        assert lab.attributes("l1", "Line") == {"order": "o1", "n": 2, "m": 3}
        assert [change.seq for change in lab.changes() if change.key[0] == "Line"] == [1, 2, 3, 6]

    def test_nothing_is_settled_while_it_is_held(self) -> None:
        """A held operation is neither applied nor recorded until the upload ends."""
        lab = with_orders()

        lab.session().batch(line(1, "l1").encode())

        assert lab.settled(1) == []
        assert lab.version() == 0

    def test_a_session_that_broke_off_before_its_end(self) -> None:
        """What was held when a session broke off is simply sent again."""
        lab = with_orders()
        lab.session().batch(line(1, "l1").encode(), order(2).encode())

        assert said(lab.settle(line(1, "l1").encode(), order(2).encode())) == ["APPLIED", "APPLIED"]

    def test_a_group_waits_whole(self) -> None:
        """If one member of a commit group has to wait, all do; then all apply at once."""
        lab = with_orders()
        session = lab.session()

        first = session.batch(*group(order(1, "o2"), line(2, "l1", "o1"), line(3, "l2", "o2")))
        session.batch(order(4).encode())

        assert said(first) == ["HELD"] * 3
        assert said(session.held()) == ["APPLIED"] * 3

    def test_a_group_whose_reference_never_comes(self) -> None:
        """A commit group with a dangling reference is refused whole."""
        lab = with_orders()

        results = lab.settle(*group(order(1, "o2"), line(2, "l1", "nowhere")))

        assert sorted(said(results)) == ["DANGLING_REFERENCE", "GROUP_REJECTED"]
        assert lab.version() == 0

    def test_what_a_hook_creates_may_wait_too(self) -> None:
        """A hook that creates an object with a reference to come makes its operation wait."""
        lab = with_orders()

        @lab.application.after_commit("Task")
        def adds_a_line(task: HookObject, context: HookContext) -> None:
            context.create("Line", {"order": "o1"}, id="l1")

        assert said(lab.settle(create(1), order(2).encode())) == ["APPLIED", "APPLIED"]
        assert lab.attributes("l1", "Line") == {"order": "o1"}

    def test_more_than_can_be_held(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond the bound on held operations a missing reference is not ready: pending, never a failure."""
        monkeypatch.setattr(engine, "HELD_UNITS_MAX", 2)
        lab = with_orders()

        results = lab.settle(*[line(n, f"l{n}").encode() for n in range(1, 5)], order(5).encode())

        assert said(results) == ["APPLIED", "APPLIED", "NOT_READY", "NOT_READY", "APPLIED"]
        assert lab.failures() == []
        assert lab.settled(*range(1, 6)) == [1, 2, 5]
        assert said(lab.settle(line(3, "l3").encode(), line(4, "l4").encode())) == ["APPLIED", "APPLIED"]

    def test_larger_than_can_be_held(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bound is on bytes too."""
        first, second = line(1, "l1").encode(), line(2, "l2").encode()
        monkeypatch.setattr(engine, "HELD_BYTES_MAX", len(first) + len(second) - 1)

        assert said(with_orders().settle(first, second, order(3).encode())) == ["APPLIED", "NOT_READY", "APPLIED"]

    def test_order_is_kept_beyond_the_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What comes behind an operation that is not ready, on the same object, is not ready either."""
        monkeypatch.setattr(engine, "HELD_UNITS_MAX", 1)
        lab = with_orders()

        results = lab.settle(
            line(1, "l1").encode(),
            line(2, "l2").encode(),
            order(3).encode(),
            update(4, "l2", {"n": 1}, entity="Line"),
        )

        assert said(results) == ["APPLIED", "NOT_READY", "APPLIED", "NOT_READY"]

    def test_what_refers_to_something_not_ready_is_not_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A reference to an object whose creation stays pending is no failure."""
        monkeypatch.setattr(engine, "HELD_UNITS_MAX", 1)
        lab = with_orders()

        results = lab.settle(
            line(1, "l1", "o1").encode(),
            order(2, "o1", parent="o2").encode(),
            order(3, "o2").encode(),
        )

        assert said(results) == ["NOT_READY", "NOT_READY", "APPLIED"]
        assert lab.failures() == []

    def test_earlier_operations_stay_behind(self) -> None:
        """Where the replica keeps earlier operations back, what they might create is awaited, not refused."""
        lab = with_orders()

        results = lab.session(leaves_earlier=True).settle(line(5, "l1").encode(), update(6, "l1", entity="Line"))

        assert said(results) == ["NOT_READY", "NOT_READY"]
        assert lab.failures() == []
        assert said(lab.settle(order(1).encode(), line(5, "l1").encode())) == ["APPLIED", "APPLIED"]

    def test_what_was_refused_before_it_was_known_to_stay_behind(self) -> None:
        """A refusal is taken back where what it stands behind stays pending after all; nothing of it is left."""
        schema = Schema(
            [
                Entity("Order", {}),
                Entity("Line", {"order": Reference("Order")}),
                Entity("Note", {"n": Integer()}, unique=["n"]),
            ],
            open=True,
        )
        lab = Lab(Application(schema=schema))
        lab.session(REPLICA_B).settle(create(1, "other", {"n": 1}, entity="Note"))

        results = lab.session(leaves_earlier=True).settle(
            line(5, "l1", "nowhere").encode(),
            create(6, "n1", {"n": 1}, entity="Note"),
            update(7, "n1", {"n": 2}, entity="Note"),
        )

        assert said(results) == ["NOT_READY", "NOT_READY", "NOT_READY"]
        assert lab.failures() == []

    def test_an_operation_of_a_newer_schema(self) -> None:
        """What was made with a newer schema waits for the server to be upgraded, with what comes behind it."""
        lab = with_orders()

        results = lab.settle(
            order(1)._replace(schema_version=2).encode(),
            update(2, "o1", entity="Order"),
            order(3, "o2")._replace(schema_version=1).encode(),
        )

        assert said(results) == ["NOT_READY", "NOT_READY", "APPLIED"]
        assert lab.failures() == []

    def test_a_newer_schema_behind_a_held_operation(self) -> None:
        """What was made with a newer schema is not applied by way of being held."""
        lab = with_orders()

        results = lab.settle(
            line(1, "l1").encode(),
            update(2, "l1", {"n": 1}, entity="Line", schema_version=2),
            order(3).encode(),
        )

        assert said(results) == ["APPLIED", "NOT_READY", "APPLIED"]
        assert lab.attributes("l1", "Line") == {"order": "o1"}

    def test_without_a_schema_no_version_is_newer(self) -> None:
        """An application that declares no schema takes operations of any."""
        assert said(Lab().settle(create(1, schema_version=9))) == ["APPLIED"]

    def test_a_refusal_is_not_held_against_what_was_dropped(self) -> None:
        """An operation is judged by what stays, not by a held operation that is dropped in the end."""
        lab = with_orders()

        @lab.application.before_commit("Line")
        def one_line_only(line_: HookObject, context: HookContext) -> None:
            if any(True for _ in context.query("Line")):
                raise Reject("an order has one line")

        # l1 goes first, on the assumption that o2 comes; o2 is dropped, and l1 with it. Then l2 is the only one.
        results = lab.settle(
            line(1, "l1", "o2").encode(),
            line(2, "l2", "o1").encode(),
            order(3, "o2", parent="nowhere").encode(),
            order(4, "o1").encode(),
        )

        assert said(results) == ["DEPENDENCY_FAILED", "APPLIED", "DANGLING_REFERENCE", "APPLIED"]


class TestGroups:
    def test_applies_whole(self) -> None:
        """A commit group is applied at versions in a row."""
        lab = Lab()

        results = lab.settle(*group(make_operation(seq=1, id="t1"), make_operation(seq=2, id="t2")))

        assert [result.version for result in results] == [1, 2]

    def test_is_refused_whole(self) -> None:
        """If one member is refused none is applied, hooks' writes included; what follows goes on."""
        lab = with_hook("before_commit", needs_a_title)

        @lab.application.after_commit("Task")
        def audits(task: HookObject, context: HookContext) -> None:
            context.create("Audit", {})

        results = lab.settle(
            *group(
                make_operation(seq=1, id="t1", set={"title": "x"}),
                make_operation(seq=2, id="t2", set={"title": ""}),
                make_operation(seq=3, id="t3", set={"title": "z"}),
            ),
            create(4, "n", entity="Note"),
        )

        assert said(results) == ["GROUP_REJECTED", "HOOK_REJECTED", "GROUP_REJECTED", "APPLIED"]
        assert [change.key for change in lab.changes()] == [("Note", "n")]

    def test_has_one_failure_that_names_the_culprit(self) -> None:
        """A refused group is one failure: about the member that was refused, with all of them in it."""
        lab = with_hook("before_commit", needs_a_title)
        batch = group(
            make_operation(seq=1, id="t1", set={"title": "x"}), make_operation(seq=2, id="t2", set={"title": ""})
        )

        results = lab.settle(*batch)

        assert len({result.failure_id for result in results}) == 1
        [record] = lab.failures()
        assert (record.object_id, record.operation) == ("t2", batch[1])
        assert list(record.group_operations) == batch
        assert record.reason == operation_pb2.FAILURE_REASON_HOOK_REJECTED

    def test_what_builds_on_a_refused_group(self) -> None:
        """Operations on an object that a refused group would have created depend on it."""
        lab = with_hook("before_commit", needs_a_title)

        results = lab.settle(
            *group(make_operation(seq=1, id="t1", set={"title": "x"}), make_operation(seq=2, id="t2", set={})),
            update(3, "t1", {"done": True}),
        )

        assert said(results) == ["GROUP_REJECTED", "HOOK_REJECTED", "DEPENDENCY_FAILED"]
        assert lab.failure(results[2]).cause_failure_id == lab.failure(results[0]).id

    @pytest.mark.parametrize("kept", [slice(0, 1), slice(0, 2), slice(1, 3), slice(2, 3), slice(0, 3, 2)])
    def test_that_is_not_whole_in_its_batch(self, kept: slice) -> None:
        """A group of which members are missing in the batch is MALFORMED, and blocks nothing."""
        lab = Lab()
        batch = group(*[make_operation(seq=seq, id=f"t{seq}") for seq in (1, 2, 3)])

        results = lab.settle(*batch[kept], create(4, "t4"))

        assert set(said(results[:-1])) <= {"MALFORMED", "GROUP_REJECTED"}
        assert "MALFORMED" in said(results)
        assert said(results[-1:]) == ["APPLIED"]
        assert [change.key[1] for change in lab.changes()] == ["t4"]

    def test_two_groups_behind_each_other(self) -> None:
        """A group that is cut short does not take the next one with it."""
        lab = Lab()
        cut = group(make_operation(seq=1, id="t1"), make_operation(seq=2, id="t2"))[:1]
        whole = group(make_operation(seq=3, id="t3"), make_operation(seq=4, id="t4"))

        assert said(lab.settle(*cut, *whole)) == ["MALFORMED", "APPLIED", "APPLIED"]

    @pytest.mark.parametrize("place", [1, 2])
    def test_with_an_unreadable_member(self, place: int) -> None:
        """A group with unreadable bytes among its members is refused whole, because of them."""
        lab = Lab()
        batch = group(*[make_operation(seq=seq, id=f"t{seq}") for seq in (1, 2, 3)])
        batch[place] = b"\xff\xff"

        results = lab.settle(*batch, create(4, "t4"))

        expected = ["GROUP_REJECTED"] * 3 + ["APPLIED"]
        expected[place] = "MALFORMED"
        assert said(results) == expected
        [record] = lab.failures()
        assert record.operation == b"\xff\xff"
        assert list(record.group_operations) == batch

    def test_of_one(self) -> None:
        """A group of a single operation is fine."""
        assert said(Lab().settle(*group(make_operation(seq=1)))) == ["APPLIED"]

    def test_members_see_each_other(self) -> None:
        """Members of a group build on each other like any operations."""
        lab = Lab()

        lab.settle(
            *group(
                make_operation(seq=1, set={"n": 1}),
                make_operation("update", seq=2, increment={"n": 1}),
                make_operation("delete", seq=3),
                make_operation(seq=4, set={"n": 9}),
            )
        )

        assert lab.attributes() == {"n": 9}
        lab.check_history()


class TestFencing:
    def test_an_older_session_can_do_nothing_more(self) -> None:
        """Once a newer session of a replica has begun, a batch of the older one writes nothing."""
        lab = Lab()
        older = lab.session()
        older.batch(create(1, "t1"))
        newer = lab.session()

        with pytest.raises(SessionSuperseded):
            older.batch(create(2, "t2"))

        assert lab.state("t2") is None
        assert said(newer.settle(create(2, "t2"))) == ["APPLIED"]

    def test_what_an_older_session_held_is_not_settled_by_it(self) -> None:
        """The held operations of a superseded session are left to the newer one."""
        lab = with_orders()
        older = lab.session()
        older.batch(order(1).encode())
        older.batch(line(2, "l1", "o9").encode())
        lab.session()

        with pytest.raises(SessionSuperseded):
            older.held()

        assert lab.settled(2) == []

    def test_a_session_that_never_began(self) -> None:
        """Without a session number nothing is written."""
        lab = Lab()
        session = lab.session()
        stranger = Session(lab.store, lab.application, replace(session.uploader, replica=REPLICA_B))

        with pytest.raises(SessionSuperseded):
            stranger.batch(create(1))

    def test_sessions_of_other_replicas_go_on(self) -> None:
        """A session fences its own replica only."""
        lab = Lab()
        one = lab.session()
        lab.session(REPLICA_B)

        assert said(one.batch(create(1))) == ["APPLIED"]

    def test_a_replica_belongs_to_one_user(self) -> None:
        """A replica id that one user has used is refused to another."""
        lab = Lab()
        lab.session(principal=Principal("ann"))

        with pytest.raises(ReplicaOwned):
            lab.session(principal=Principal("bob"))

    def test_sessions_are_numbered(self) -> None:
        """Each uploading session takes its replica's next number and leaves what is settled alone."""
        lab = Lab()
        lab.settle(create(1))
        before = lab.replica()

        session = lab.session()

        assert session.uploader.session_number == before.session_number + 1
        assert lab.replica() == before._replace(session_number=before.session_number + 1)
        assert lab.replica() == ReplicaState(2, USER.user_id, 1, 1_000_001, ((1, 1),), TIME_US)


def test_gaps_in_what_is_settled_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that leaves too many operations behind has to fill a gap before it can make another one."""
    monkeypatch.setattr(engine, "SETTLED_RANGES_MAX", 3)
    lab = Lab()
    for seq in (2, 4, 6):
        assert said(lab.settle(create(seq, f"t{seq}"))) == ["APPLIED"]

    assert said(lab.settle(create(8, "t8"), create(9, "t9"))) == ["NOT_READY", "NOT_READY"]
    assert said(lab.settle(create(7, "t7"), create(8, "t8"))) == ["APPLIED", "APPLIED"]
    assert said(lab.settle(create(1, "t1"), create(3, "t3"), create(10, "t10"))) == ["APPLIED", "APPLIED", "NOT_READY"]
    assert said(lab.settle(create(10, "t10"))) == ["APPLIED"]
