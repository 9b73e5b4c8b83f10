from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import IntEnum
from typing import Any

import msgpack
import pytest
from tests.builders import nested, packed

from tidelog import InvalidValue, LimitExceeded
from tidelog._values import (
    as_json,
    check,
    check_id,
    check_name,
    copied,
    decode,
    decode_flat_map,
    decode_map,
    decode_trusted,
    encode,
    equal,
    literal,
    sort_key,
)

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63 - 1,
    -(2**63),
    0.0,
    -0.0,
    1.0,
    1e308,
    math.inf,
    "",
    "a",
    "\0",
    "Grüße \U0001f600",
    b"",
    b"\x00\xff",
    datetime(1970, 1, 1, tzinfo=UTC),
    datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    Decimal(0),
    Decimal("-12.50"),
    Decimal("1E+20"),
    Decimal("1E-20"),
    Decimal("9" * 128),
    [],
    [1, [2, [3]]],
    {},
    {"a": {"b": [None]}},
]


class NoOffset(tzinfo):
    """A time zone that knows nothing of itself."""

    def utcoffset(self, _moment: datetime | None) -> None:
        """Return nothing."""

    dst = utcoffset
    tzname = utcoffset


class Number(IntEnum):
    """A subclass of int."""

    ONE = 1


class TestEncoding:
    @pytest.mark.parametrize("value", VALUES, ids=repr)
    def test_there_and_back(self, value: Any) -> None:
        """A value comes back with its type, from outside and from storage."""
        check(value)
        data = encode(value)

        for found in (decode(data), decode_trusted(data)):
            assert equal(found, value)
            assert type(found) is type(value)

    def test_is_what_others_understand(self) -> None:
        """The encoding is plain MessagePack, with the standard timestamp and one extension for decimals."""
        assert encode({"a": [1, "x", None]}) == packed({"a": [1, "x", None]})
        assert encode(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)) == packed(msgpack.Timestamp(1))
        assert encode(Decimal("12.50")) == packed(msgpack.ExtType(1, b"12.50"))

    def test_a_time_in_another_zone(self) -> None:
        """A time is a moment: whatever zone it is given in, it comes back in UTC."""
        tokyo = datetime(2024, 1, 1, 9, tzinfo=timezone(timedelta(hours=9)))

        assert decode(encode(tokyo)) == datetime(2024, 1, 1, tzinfo=UTC)
        assert decode(encode(tokyo)).tzinfo is UTC

    def test_a_time_of_nanoseconds(self) -> None:
        """What another language sends in nanoseconds reads as whole microseconds."""
        assert decode(packed(msgpack.Timestamp(1, 1_999))) == datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=UTC)

    @pytest.mark.parametrize("value", [object(), {1, 2}, (1,), Number.ONE, 2**64, 1j, "\ud800", range(3)])
    def test_what_is_no_value(self, value: Any) -> None:
        """What is no value cannot be encoded, and the next value can."""
        with pytest.raises(InvalidValue):
            encode({"a": value})

        assert encode(1) == b"\x01"


class TestDecoding:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xc1",
            b"\x92\x01",
            packed(1) + packed(2),
            packed({1: 2}),
            packed({b"a": 2}),
            packed({"a": {None: 1}}),
            b"\x82\xa1a\x01\xa1a\x02",
            b"\x81\xa1a\x82\xa1b\x01\xa1b\x02",
            b"\xa1\xff",
            packed(2**63),
            packed([2**64 - 1]),
            packed({"a": [2**63]}),
            packed(msgpack.ExtType(0, b"")),
            packed(msgpack.ExtType(2, b"x")),
            packed(msgpack.ExtType(127, b"x")),
            b"\xc7\x05\xff12345",
            packed(msgpack.Timestamp(2**62)),
            packed(msgpack.Timestamp(-(2**62))),
            packed(msgpack.ExtType(1, b"")),
            packed(msgpack.ExtType(1, b"x")),
            packed(msgpack.ExtType(1, b"NaN")),
            packed(msgpack.ExtType(1, b"-Infinity")),
            packed(msgpack.ExtType(1, b" 1")),
            packed(msgpack.ExtType(1, b"1_0")),
            packed(msgpack.ExtType(1, b"+1")),
            packed(msgpack.ExtType(1, b".5")),
            packed(msgpack.ExtType(1, "\u0661".encode())),
            packed(msgpack.ExtType(1, b"1" * 129)),
            packed(msgpack.ExtType(1, b"1E+99999999999999999999")),
            b"\xdd\xff\xff\xff\xff",
            b"\xdf\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
            b"\x91" * 100_000 + b"\x01",
            b"\x81\xa1a" * 100_000 + b"\x01",
            b"\x81" * 100_000 + b"\x01",
        ],
    )
    def test_what_is_no_value(self, data: bytes) -> None:
        """Whatever is wrong with bytes is an InvalidValue with a sentence."""
        with pytest.raises(InvalidValue, match=r"."):
            decode(data)

    def test_nesting_is_bounded(self) -> None:
        """32 levels can be read, 33 are over the limit, as lists and as maps."""
        maps = b"\x81\xa1a"

        assert decode(packed(nested(32))) == nested(32)
        assert decode(maps * 32 + b"\x01")
        for data in (packed(nested(33)), maps * 33 + b"\x01", packed({"a": [nested(31)]})):
            with pytest.raises(LimitExceeded):
                decode(data)

    def test_a_map_that_must_be_one(self) -> None:
        """Where a map is wanted nothing else will do."""
        assert decode_map(packed({"a": 1})) == {"a": 1}
        others: list[Any] = [None, 1, "a", [], [{}]]
        for value in others:
            with pytest.raises(InvalidValue):
                decode_map(packed(value))


class TestFlatMaps:
    @pytest.mark.parametrize(
        "value", [{}, {"a": 1}, {"a": None, "b": [1, "x", Decimal(1)]}, {f"k{n}": n % 100 for n in range(300)}]
    )
    def test_plain_ones(self, value: dict[str, Any]) -> None:
        """A map of scalars and lists of scalars is read at once."""
        found = decode_flat_map(encode(value))

        assert found is not None
        assert equal(found, value)

    @pytest.mark.parametrize(
        "data",
        [
            packed({"a": {"b": 1}}),
            packed({"a": [[1]]}),
            packed({"a": [{}]}),
            packed([1]),
            packed({"a": 2**63}),
            packed({"a": 1}) + b"\x01",
            b"\x82\xa1a\x01\xa1a\x02",
            b"\xde\x00\x02\xa1a\x01\xa1a\x02",
            b"\x81\xa1a",
            b"",
            b"\xde",
            packed({"a": msgpack.ExtType(9, b"")}),
        ],
    )
    def test_others_are_left_to_the_full_reading(self, data: bytes) -> None:
        """Whatever is not plain, or is wrong, is not decided here."""
        assert decode_flat_map(data) is None

    def test_keys_are_the_callers_to_check(self) -> None:
        """A key that is no string does not get past a caller who knows its names."""
        found = decode_flat_map(packed({b"a": 1}))

        assert found is None or found.keys() == {b"a"}


class TestChecking:
    @pytest.mark.parametrize(
        "value",
        [
            object(),
            {1, 2},
            (1,),
            bytearray(b"x"),
            Number.ONE,
            2**63,
            -(2**63) - 1,
            "\ud800",
            ["\udfff"],
            {"\ud800": 1},
            {1: 1},
            {None: 1},
            datetime(2024, 1, 1),  # noqa: DTZ001 - it lacks a zone
            datetime(2024, 1, 1, tzinfo=NoOffset()),
            datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
            datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-2))),
            Decimal("NaN"),
            Decimal("sNaN"),
            Decimal("Infinity"),
            Decimal("1" * 129),
            [[object()]],
        ],
        ids=repr,
    )
    def test_what_cannot_be_stored(self, value: Any) -> None:
        """What cannot be stored is an InvalidValue that names where it was found."""
        with pytest.raises(InvalidValue, match=r"^attribute 'x'"):
            check(value, "attribute 'x'")

    def test_nesting_is_bounded(self) -> None:
        """32 levels can be stored; what lies inside of something else has fewer."""
        check(nested(32))
        check(nested(30), depth=3)
        for value, depth in ((nested(33), 1), (nested(31), 3), ({"a": nested(32)}, 1)):
            with pytest.raises(LimitExceeded):
                check(value, depth=depth)

    def test_a_list_in_itself(self) -> None:
        """A list that holds itself is nested too deeply, not an endless loop."""
        loop: list[Any] = []
        loop.append(loop)

        with pytest.raises(LimitExceeded):
            check(loop)


class TestNames:
    @pytest.mark.parametrize("name", ["a", "Task", "é" * 32, "x" * 64, "with space", "\n", "ключ"])
    def test_that_are_fine(self, name: str) -> None:
        """A name is 1 to 64 bytes of text; asking twice gives the same."""
        check_name(name, "a name")
        check_name(name, "a name")

    @pytest.mark.parametrize("name", ["", "\0", "a\0b", "\ud800", None, 5, b"a", ["a"], {}])
    def test_that_nothing_can_have(self, name: Any) -> None:
        """What is empty, holds a NUL or half a character, or is no text, is no name."""
        with pytest.raises(InvalidValue):
            check_name(name, "a name")
        with pytest.raises(InvalidValue):
            check_id(name)

    @pytest.mark.parametrize("name", ["x" * 65, "é" * 32 + "x", "\U0001f600" * 17])
    def test_that_are_too_long(self, name: str) -> None:
        """Names are bounded in bytes, not in characters."""
        with pytest.raises(LimitExceeded):
            check_name(name, "a name")

    def test_ids(self) -> None:
        """An id is 1 to 128 bytes of text."""
        for id_ in ("a", "x" * 128, "é" * 64, "\U0001f600" * 32):
            check_id(id_)
        for id_ in ("x" * 129, "é" * 65, "\U0001f600" * 32 + "x"):
            with pytest.raises(LimitExceeded):
                check_id(id_)


class TestEquality:
    def test_is_type_plus_value(self) -> None:
        """1, 1.0, True and Decimal(1) are four values, in containers too."""
        ones: list[Any] = [1, 1.0, True, Decimal(1), "1", b"1", [1], {"a": 1}, None, 0]
        for left in ones:
            for right in ones:
                assert equal(left, right) is (left is right)
                assert equal([left], [right]) is (left is right)
                assert equal({"a": left}, {"a": right}) is (left is right)

    def test_of_containers(self) -> None:
        """Lists are equal in order, maps in whatever order, both in length."""
        assert equal({"a": 1, "b": 2}, {"b": 2, "a": 1})
        assert not equal({"a": 1}, {"a": 1, "b": None})
        assert not equal({"a": None}, {"b": None})
        assert not equal([1, 2], [2, 1])
        assert not equal([1], [1, 1])

    def test_of_odd_numbers(self) -> None:
        """NaN equals itself; equal decimals may be written differently."""
        assert equal(math.nan, float("nan"))
        assert not equal(math.nan, 1.0)
        assert equal(Decimal("1.0"), Decimal("1.00"))
        assert equal(0.0, -0.0)


class TestOrder:
    def test_is_total(self) -> None:
        """Any values can be put into one order, and numbers compare by magnitude."""
        ordered: list[Any] = [
            None,
            False,
            True,
            -math.inf,
            -1,
            Decimal("-0.5"),
            0,
            0.5,
            Decimal(1),
            2,
            Decimal("1E+500"),
            math.inf,
            "",
            "Z",
            "a",
            "\uffff",
            "\U0001f600",
            b"",
            b"a",
            datetime(2024, 1, 1, tzinfo=UTC),
            datetime(2024, 1, 2, tzinfo=UTC),
            [1],
            [2],
            {"a": 1},
        ]

        backwards = list(reversed(ordered))
        assert sorted(backwards, key=sort_key) == ordered
        assert sort_key(True) < sort_key(math.nan) < sort_key(-1e308)

    def test_equal_numbers_of_different_types_are_neighbours(self) -> None:
        """1, 1.0 and Decimal(1) stand together in the order."""
        assert sort_key(1) == sort_key(1.0) == sort_key(Decimal(1))
        assert sort_key(1) != sort_key(True)


class TestForPeople:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, None),
            ("ä", "ä"),
            (1.5, 1.5),
            (math.inf, "inf"),
            (math.nan, "nan"),
            (b"\x00\xff", "AP8="),
            (Decimal("1.50"), "1.50"),
            (datetime(2024, 1, 1, tzinfo=UTC), "2024-01-01T00:00:00+00:00"),
            ({"a": [b"", (1, 2)]}, {"a": ["", [1, 2]]}),
        ],
    )
    def test_json(self, value: Any, expected: Any) -> None:
        """Whatever JSON lacks is written as text."""
        assert json.loads(as_json(value)) == expected

    def test_literals(self) -> None:
        """A literal of a constraint tells every type from every other; a timestamp is the instant, in UTC."""
        noon = datetime(2026, 1, 31, 13, tzinfo=timezone(timedelta(hours=1)))
        value = {"b": [1, 1.0, True, None, Decimal("1.0"), "1"], "a": noon, "c": b"1"}

        assert literal(value) == ('{"a": t"2026-01-31T12:00:00Z", "b": [1, 1.0, true, null, 1.0d, "1"], "c": b"MQ=="}')

    def test_copies(self) -> None:
        """A copy has lists and maps of its own, at every level."""
        value: dict[str, Any] = {"a": [1, {"b": [2]}], "c": "x"}
        copy = copied(value)
        value["a"][1]["b"].append(3)
        value["a"].append(4)
        value["d"] = 5

        assert copy == {"a": [1, {"b": [2]}], "c": "x"}
