from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from tests.builders import TIME_US, make_operation, packed

from tidelog import CommitGroup, FailureReason, SynchronizationFailure
from tidelog._failure import operation_as_data
from tidelog.v1 import failure_pb2, operation_pb2


def make_failure(**fields: object) -> SynchronizationFailure:
    """Return a failure as a program gets it."""
    message = failure_pb2.SynchronizationFailure(
        id="f1",
        replica_id="r1",
        entity="Task",
        object_id="t1",
        reason=operation_pb2.FAILURE_REASON_CONFLICT,
        message="somebody was first",
        operation=make_operation(set={"a": 1}).encode(),
        version=7,
        status=failure_pb2.FAILURE_STATUS_OPEN,
    )
    message.create_time.FromMicroseconds(TIME_US)
    for name, value in fields.items():
        setattr(message, name, value)
    return SynchronizationFailure.from_message(message)


class TestReasons:
    def test_are_those_of_the_protocol(self) -> None:
        """Python's reasons are the protocol's, one by one, but for the one that is none."""
        names = {name for name, number in operation_pb2.FailureReason.items() if number}

        assert {f"FAILURE_REASON_{reason.value}" for reason in FailureReason} == names
        assert all(FailureReason.of_number(reason.number) is reason for reason in FailureReason)

    def test_that_nobody_knows(self) -> None:
        """A reason of a later server reads as MALFORMED rather than as an error."""
        assert FailureReason.of_number(0) is FailureReason.MALFORMED
        assert FailureReason.of_number(999) is FailureReason.MALFORMED


class TestReading:
    def test_says_what_happened(self) -> None:
        """A failure has everything that its record has."""
        failure = make_failure()

        assert (failure.id, failure.replica_id, failure.version) == ("f1", "r1", 7)
        assert (failure.entity, failure.object_id) == ("Task", "t1")
        assert (failure.reason, failure.message) == (FailureReason.CONFLICT, "somebody was first")
        assert failure.operation == make_operation(set={"a": 1})
        assert failure.operation_bytes == make_operation(set={"a": 1}).encode()
        assert failure.group_operations == ()
        assert failure.time is not None
        assert failure.time == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
        assert failure.time.tzinfo is UTC

    def test_attributes_are_what_was_to_be_written(self) -> None:
        """The attributes of a failure are values set, null for those unset, amounts and members of intents."""
        operation = make_operation(
            "update", set={"a": 1}, unset=["b"], increment={"c": 2}, add={"d": [3]}, remove={"e": [4]}
        )

        assert make_failure(operation=operation.encode()).attributes == {
            "a": 1,
            "b": None,
            "c": 2,
            "d": [3],
            "e": [4],
        }
        assert make_failure(operation=make_operation("delete").encode()).attributes == {}

    @pytest.mark.parametrize("data", [b"", b"\xff\xff", make_operation(patch=b"\xc1").encode()])
    def test_of_what_cannot_be_read(self, data: bytes) -> None:
        """Of an operation that cannot be read the bytes are kept, and there are no attributes."""
        failure = make_failure(operation=data)

        assert failure.operation_bytes == data
        assert failure.attributes == {}
        if data != make_operation(patch=b"\xc1").encode():
            assert failure.operation is None

    def test_of_a_group(self) -> None:
        """A failure of a commit group has its operations in order, as far as they can be read."""
        members = [make_operation(seq=seq, id=f"t{seq}", group=CommitGroup(1, seq - 1, 3)) for seq in (1, 2, 3)]
        message = failure_pb2.SynchronizationFailure(
            operation=members[1].encode(), group_operations=[members[0].encode(), b"\xff", members[2].encode()]
        )

        failure = SynchronizationFailure.from_message(message)

        assert failure.group_operations == (members[0], members[2])
        assert failure.time is None


class TestForPeople:
    def test_an_operation_as_data(self) -> None:
        """An operation can be shown: kind, object, base, time, and what the patch does."""
        operation = make_operation(
            "update", seq=3, set={"price": Decimal("1.50")}, unset=["b"], group=CommitGroup(3, 0, 2), base_version=5
        )

        data = operation_as_data(operation)

        assert data == {
            "seq": 3,
            "kind": "update",
            "entity": "Task",
            "id": "t1",
            "base_version": 5,
            "client_time": "2023-11-14T22:13:20+00:00",
            "set": {"price": Decimal("1.50")},
            "unset": ("b",),
            "group": {"id": 3, "position": 0, "size": 2},
        }

    def test_a_patch_that_cannot_be_read(self) -> None:
        """Where the patch cannot be read, the data say so instead of failing."""
        data = operation_as_data(make_operation(patch=packed([1])))

        assert "set" not in data
        assert data["unreadable"]
