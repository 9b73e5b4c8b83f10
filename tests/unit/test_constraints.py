from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from tests.builders import nested, packed

from tidelog import Constraint, InvalidConstraint, attribute
from tidelog._constraints import (
    CONSTRAINT_DEPTH_MAX,
    All,
    Any_,
    Comparison,
    Not,
    constraint_from_message,
    constraint_of,
)
from tidelog.v1 import constraint_pb2

A = attribute("a")
EARLY, LATE = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 2, tzinfo=UTC)


class TestMatching:
    @pytest.mark.parametrize(
        ("constraint", "yes", "no"),
        [
            (A == 1, [1], [2, 1.0, True, "1", Decimal(1), None, [1]]),
            (A == True, [True], [1, False, "true"]),  # noqa: E712 - builds a constraint
            (A == None, [], [None, 0, ""]),  # noqa: E711 - builds a constraint
            (A == [1, 2], [[1, 2]], [[2, 1], [1], [1.0, 2]]),
            (A == {"b": 1}, [{"b": 1}], [{}, {"b": 1.0}, {"b": 1, "c": 2}]),
            (A != 1, [2, -5], [1, "x", 2.0, True, None]),
            (A != "x", ["y"], ["x", 1, None]),
            (A < 2, [1, -(2**63)], [2, 3, 1.0, "1", None, False]),
            (A <= 2, [2, 1], [3, 2.0]),
            (A > 2, [3], [2, 3.5, "3"]),
            (A >= 2, [2, 3], [1, Decimal(2)]),
            (A < 2.5, [2.4], [2, 2.5]),
            (Decimal("2.5") > A, [Decimal("2.4999")], [2, 2.4, Decimal("2.5")]),
            (A < "b", ["a", "B", ""], ["b", "ä", b"a"]),
            (A > "\uffff", ["\U0001f600"], ["\uffff", "z"]),
            (A < b"b", [b"a", b""], [b"b", "a"]),
            (A < LATE, [EARLY], [LATE, "2024"]),
            (A.is_in([1, "x", None]), [1, "x"], [1.0, True, "y", None]),
            (A.is_in([]), [], [1, None]),
            (A.contains(1), [[1], [2, 1]], [[], [1.0], [[1]], "1", 1, {1: 1}, None]),
            (A.contains("x"), ["x", "axb", ["x"]], ["a", [b"x"], None, b"x"]),
            (A.contains([1]), [[[1]]], [[1]]),
            (A.exists(), [0, False, "", [], {}], [None]),
            (~(A == 1), [2, "x", None], [1]),
            (~~(A == 1), [1], [2]),
            ((A > 1) & (A < 5), [2], [1, 5, None]),
            ((A < 1) | (A > 5), [0, 6], [1, 5, None]),
        ],
    )
    def test_what_is_meant(self, constraint: Constraint, yes: list[Any], no: list[Any]) -> None:
        """A comparison holds for values of one type only; null and what is missing never compare."""
        for form in (constraint, constraint_from_message(constraint.to_message())):
            for value in yes:
                assert form.matches({"a": value, "b": 0}), value
            for value in no:
                assert not form.matches({"a": value, "b": 0}), value

    def test_what_is_missing(self) -> None:
        """An attribute that is not there is like null: only its opposite holds."""
        for constraint in (A == 1, A != 1, A < 1, A.exists(), A.contains(1), A.is_in([1, None])):
            assert not constraint.matches({})
            assert (~constraint).matches({})

    def test_nothing_and_everything(self) -> None:
        """All of nothing is true, any of nothing is false."""
        assert All(()).matches({})
        assert not Any_(()).matches({})


class TestBuilding:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: attribute("") == 1,
            lambda: attribute("a\0") == 1,
            lambda: attribute("x" * 65) == 1,
            lambda: object() == A,
            lambda: A == (1,),
            lambda: A == 2**63,
            lambda: datetime(2024, 1, 1) == A,  # noqa: DTZ001 - it lacks a zone
            lambda: A < None,
            lambda: A < True,
            lambda: A >= [1],
            lambda: A > {"a": 1},
            lambda: A.is_in([object()]),
            lambda: nested(33) == A,
            lambda: Comparison("a", "~", 1),
            lambda: Comparison("a", "in", "abc"),
        ],
    )
    def test_what_makes_no_sense(self, build: Any) -> None:
        """A comparison that could never be evaluated is an error when it is built."""
        with pytest.raises(InvalidConstraint):
            build()

    def test_combining_with_words(self) -> None:
        """`and`, `or` and `not` would drop a part of the constraint, so they are an error."""
        for combine in (
            lambda: (A == 1) and (A == 2),
            lambda: (A == 1) or attribute("b").exists(),
            lambda: not (A == 1),  # noqa: SIM201 - the point
            lambda: 1 < A < 5,
        ):
            with pytest.raises(TypeError, match="truth value"):
                combine()

    def test_what_where_accepts(self) -> None:
        """A mapping means that all its attributes are equal; a constraint means itself; None means everything."""
        constraint = A == 1

        assert constraint_of(None) is None
        assert constraint_of(constraint) is constraint
        both = constraint_of({"a": 1, "b": "x"})
        assert both is not None
        assert both.matches({"a": 1, "b": "x", "c": 0})
        assert not both.matches({"a": 1})
        wrong: list[Any] = [5, "a = 1", [A == 1], lambda: True]
        for where in wrong:
            with pytest.raises(InvalidConstraint):
                constraint_of(where)


def comparison(**fields: Any) -> constraint_pb2.Constraint:
    """Return the message of a comparison."""
    return constraint_pb2.Constraint(comparison=constraint_pb2.Comparison(**fields))


class TestOnTheWire:
    @pytest.mark.parametrize(
        "constraint",
        [
            A == 1,
            Decimal("1.5") != A,
            A < EARLY,
            A <= b"\xff",
            A > "x",
            A >= 1.5,
            A.is_in([1, "x", None, [2]]),
            A.contains({"b": 1}),
            A.exists(),
            A == None,  # noqa: E711 - builds a constraint
            ~(A == 1) & ((A < 1) | A.exists()),
            All(()),
            Any_(()),
            Not(All((Not(Any_((A == 1,))),))),
        ],
    )
    def test_there_and_back(self, constraint: Constraint) -> None:
        """A constraint reads back as it was written."""
        data = constraint.to_message().SerializeToString()

        assert constraint_from_message(constraint_pb2.Constraint.FromString(data)) == constraint

    @pytest.mark.parametrize(
        "message",
        [
            constraint_pb2.Constraint(),
            comparison(),
            comparison(attribute="a"),
            comparison(attribute="a", operator=99, value=packed(1)),
            comparison(attribute="", operator=1, value=packed(1)),
            comparison(attribute="a", operator=1),
            comparison(attribute="a", operator=1, value=b"\xc1"),
            comparison(attribute="a", operator=1, value=packed(1) * 2),
            comparison(attribute="a", operator=1, value=packed(nested(33))),
            comparison(attribute="a", operator=3, value=packed(None)),
            comparison(attribute="a", operator=7, value=packed("abc")),
            constraint_pb2.Constraint(all=constraint_pb2.ConstraintList(constraints=[constraint_pb2.Constraint()])),
        ],
        ids=str,
    )
    def test_what_makes_no_sense(self, message: constraint_pb2.Constraint) -> None:
        """A message that makes no sense is an InvalidConstraint."""
        with pytest.raises(InvalidConstraint):
            constraint_from_message(message)

    def test_the_value_of_exists_is_not_looked_at(self) -> None:
        """`exists` has no value; whatever is sent with it is disregarded."""
        assert constraint_from_message(comparison(attribute="a", operator=9, value=b"\xc1")) == A.exists()

    def test_depth_is_bounded(self) -> None:
        """A constraint nested too deeply is refused, not evaluated."""
        constraint: Constraint = A == 1
        for _ in range(CONSTRAINT_DEPTH_MAX - 1):
            constraint = ~constraint

        assert constraint_from_message(constraint.to_message()) == constraint
        with pytest.raises(InvalidConstraint):
            constraint_from_message((~constraint).to_message())
