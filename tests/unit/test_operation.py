from __future__ import annotations

from datetime import UTC, datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tests.builders import TIME_US, make_operation, packed

from tidelog import CommitGroup, InvalidValue, LimitExceeded, OperationKind, Patch
from tidelog._limits import GROUP_OPERATIONS_MAX, OPERATION_BYTES_MAX
from tidelog._operation import decode_operation, identity_of
from tidelog.v1 import operation_pb2


class TestSpelling:
    @pytest.mark.parametrize("kind", ["create", "update", "delete"])
    def test_there_and_back(self, kind: str) -> None:
        """An operation reads back as it was written, whatever its numbers."""
        operation = make_operation(
            kind,
            seq=2**62,
            nonce=2**64 - 1,
            base_version=2**63 - 1,
            schema_version=2**31,
            id="é",
            group=CommitGroup(2**62 - 999, 999, 1_000),
        )

        assert decode_operation(operation.encode()) == operation

    @pytest.mark.parametrize("time_us", [0, -1, -62_135_596_800_000_000, 253_402_300_799_999_999, TIME_US])
    def test_the_authors_clock(self, time_us: int) -> None:
        """Any time of the years 1 to 9999 is kept to the microsecond."""
        operation = decode_operation(make_operation()._replace(client_time_us=time_us).encode())

        assert operation.client_time_us == time_us
        assert operation.client_time.tzinfo is UTC

    def test_is_what_the_wire_carries(self) -> None:
        """The bytes are the public message, field by field."""
        operation = make_operation("update", seq=3, set={"a": 1}, group=CommitGroup(3, 0, 2), base_version=7)

        message = operation_pb2.Operation.FromString(operation.encode())

        assert (message.seq, message.nonce, message.entity, message.id) == (3, 1_000_003, "Task", "t1")
        assert message.kind == operation_pb2.OPERATION_KIND_UPDATE
        assert message.patch == packed({"set": {"a": 1}})
        assert (message.group.id, message.group.position, message.group.size) == (3, 0, 2)
        assert message.base_version == 7
        assert message.client_time.ToDatetime(tzinfo=UTC) == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)

    def test_its_key(self) -> None:
        """An operation names its object by entity and id."""
        assert make_operation(entity="Note", id="n1").key == ("Note", "n1")


class TestReading:
    def message(self, **fields: object) -> bytes:
        """Return an operation's message with some fields replaced."""
        message = operation_pb2.Operation.FromString(make_operation().encode())
        for name, value in fields.items():
            if isinstance(value, Timestamp | operation_pb2.CommitGroup):
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)
        return message.SerializeToString()

    @pytest.mark.parametrize(
        "fields",
        [
            {"kind": 0},
            {"kind": 4},
            {"kind": -1},
            {"seq": 0},
            {"seq": -5},
            {"base_version": -1},
            {"entity": ""},
            {"entity": "a\0"},
            {"id": ""},
            {"id": "\0"},
            {"client_time": Timestamp(seconds=-62_135_596_801)},
            {"client_time": Timestamp(seconds=253_402_300_800)},
            {"client_time": Timestamp(nanos=-1)},
            {"client_time": Timestamp(nanos=1_000_000_000)},
            {"group": operation_pb2.CommitGroup(id=1, position=0, size=0)},
            {"group": operation_pb2.CommitGroup(id=1, position=1, size=1)},
            {"group": operation_pb2.CommitGroup(id=2, position=-1, size=1)},
            {"group": operation_pb2.CommitGroup(id=2, position=0, size=1)},
            {"group": operation_pb2.CommitGroup(id=1, position=0, size=GROUP_OPERATIONS_MAX + 1)},
            {"group": operation_pb2.CommitGroup(id=1, position=0, size=-1)},
        ],
        ids=str,
    )
    def test_what_breaks_a_rule(self, fields: dict[str, object]) -> None:
        """A field that breaks a rule of the format is an InvalidValue."""
        with pytest.raises(InvalidValue):
            decode_operation(self.message(**fields))

    @pytest.mark.parametrize("data", [b"\xff", b"\x08", b"\x22\x02\xff\xfe", b"garbage garbage"])
    def test_what_is_no_message(self, data: bytes) -> None:
        """Bytes that are no message are an InvalidValue, and show no identity."""
        with pytest.raises(InvalidValue):
            decode_operation(data)
        assert identity_of(data) == (0, 0)

    @pytest.mark.parametrize(
        "fields", [{"id": "x" * 129}, {"entity": "x" * 65}, {"patch": bytes(OPERATION_BYTES_MAX)}]
    )
    def test_what_is_over_a_limit(self, fields: dict[str, object]) -> None:
        """What is over a limit is told from what breaks a rule."""
        with pytest.raises(LimitExceeded):
            decode_operation(self.message(**fields))

    def test_the_largest(self) -> None:
        """An operation of exactly 1 MiB can be read."""
        operation = make_operation()
        room = OPERATION_BYTES_MAX - len(operation._replace(patch=bytes(OPERATION_BYTES_MAX)).encode())
        largest = operation._replace(patch=bytes(OPERATION_BYTES_MAX + room))

        assert len(largest.encode()) == OPERATION_BYTES_MAX
        assert decode_operation(largest.encode()) == largest
        with pytest.raises(LimitExceeded):
            decode_operation(largest._replace(patch=largest.patch + b"x").encode())

    def test_the_identity_of_what_cannot_be_read(self) -> None:
        """Seq and nonce show as far as the bytes show them; a seq that cannot be is none."""
        assert identity_of(self.message(kind=99)) == (1, 1_000_001)
        assert identity_of(self.message(seq=-3)) == (0, 1_000_001)

    def test_what_nobody_knows_is_passed_over(self) -> None:
        """A field of a later version of the protocol does not make an operation unreadable."""
        assert decode_operation(make_operation().encode() + b"\xf8\x07\x01") == make_operation()


class TestPatches:
    def test_of_each_kind(self) -> None:
        """Creations set, updates do anything, deletions have no patch."""
        assert make_operation(set={"a": 1}).decoded_patch() == Patch({"a": 1})
        update = make_operation("update", unset=["a"], increment={"b": 1})
        assert update.decoded_patch() == Patch(unset=("a",), increment={"b": 1})
        assert make_operation("delete").decoded_patch() == Patch()

    @pytest.mark.parametrize(
        ("kind", "patch"),
        [
            ("create", packed({"unset": ["a"]})),
            ("create", packed({"increment": {"a": 1}})),
            ("create", packed({"add": {"a": [1]}})),
            ("create", packed({"remove": {"a": [1]}})),
            ("create", b""),
            ("update", b""),
            ("update", packed(5)),
            ("delete", packed({})),
            ("delete", packed({"set": {}})),
        ],
    )
    def test_that_a_kind_may_not_have(self, kind: str, patch: bytes) -> None:
        """A patch that its kind of operation may not have is an InvalidValue."""
        with pytest.raises(InvalidValue):
            make_operation(kind, patch=patch).decoded_patch()


def test_kinds_are_those_of_the_protocol() -> None:
    """The kinds have the numbers of the protocol, all but the one that is never sent."""
    numbers = {name: number for name, number in operation_pb2.OperationKind.items() if number}

    assert {f"OPERATION_KIND_{kind.name}": int(kind) for kind in OperationKind} == numbers
