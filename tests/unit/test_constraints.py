from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from tests.builders import nested, packed

from tidelog import Constraint, InvalidConstraint, attribute, claim
from tidelog._constraints import (
    NEVER,
    All,
    Any_,
    Comparison,
    Not,
    constraint_from_message,
    constraint_of,
    required_values,
)
from tidelog._limits import CONSTRAINT_BYTES_MAX, CONSTRAINT_DEPTH_MAX, CONSTRAINT_PARTS_MAX
from tidelog._values import identity
from tidelog.v1 import constraint_pb2

A = attribute("a")
NAN = float("nan")
USER, REGIONS, LEVEL = claim("user_id"), claim("regions"), claim("level")
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
            (A <= 2.5, [2.5, 2.4, float("-inf")], [2.6, 2, NAN]),
            (Comparison("a", "<=", NAN), [NAN], [1.0, 1, float("inf")]),
            (Comparison("a", ">=", NAN), [NAN], [1.0]),
            (Comparison("a", ">", NAN), [], [NAN, 1.0]),
            (A < "b", ["a", "B", ""], ["b", "ä", b"a"]),
            (A > "\uffff", ["\U0001f600"], ["\uffff", "z"]),
            (A < b"b", [b"a", b""], [b"b", "a"]),
            (A < LATE, [EARLY], [LATE, "2024"]),
            (A.is_in([1, "x", None]), [1, "x"], [1.0, True, "y", None]),
            (A.is_in([]), [], [1, None]),
            (A.contains(1), [[1], [2, 1]], [[], [1.0], [[1]], "1", 1, {1: 1}, None]),
            (A.contains("x"), ["x", "axb", ["x"]], ["a", [b"x"], None, b"x"]),
            (A.contains([1]), [[[1]]], [[1]]),
            (A.contains(None), [], [[None], [], None]),
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
            lambda: A.is_in("abc"),
            lambda: A.is_in(b"abc"),
            lambda: A.is_in([USER]),
            lambda: claim(""),
            lambda: claim("a\0"),
            lambda: claim("x" * 65),
            lambda: Comparison("a", "==", 1, "user_id"),
            lambda: Comparison("a", "==", None, "x" * 65),
            lambda: Comparison("a", "exists", 1),
            lambda: Comparison("a", "exists", claim="user_id"),
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

    @pytest.mark.parametrize("other", [True, None, {"a": 1}, "a == 1"])
    def test_combining_with_something_else(self, other: Any) -> None:
        """Only constraints combine with constraints."""
        for combine in (operator.and_, operator.or_):
            with pytest.raises(TypeError):
                combine(A == 1, other)

    def test_a_chain_is_one_combination(self) -> None:
        """However many are joined by one operator, they do not nest; what is grouped otherwise stays so."""
        one, two, three = (attribute(name).exists() for name in "abc")

        assert one & two & three == one & (two & three) == All((one, two, three))
        assert one | two | three == one | (two | three) == Any_((one, two, three))
        assert (one | two) & three == All((Any_((one, two)), three))
        assert functools.reduce(operator.and_, [one] * 500).matches({"a": 1})

    def test_equality_is_type_plus_value(self) -> None:
        """Constraints are equal, and hash alike, where the same expression compares with equal values."""
        for value, same, others in (
            (1, 1, [1.0, True, Decimal(1), "1", [1]]),
            (Decimal("1.50"), Decimal("1.5"), [1.5]),
            (NAN, -NAN, [0.0]),
            (0.0, -0.0, [0]),
            ([1, {"a": None}], [1, {"a": None}], [[1.0, {"a": None}], [1, {"a": False}]]),
            (EARLY, EARLY.astimezone(timezone(timedelta(hours=3))), [LATE]),
        ):
            assert Comparison("a", "==", value) == Comparison("a", "==", same)
            assert hash(Comparison("a", "==", value)) == hash(Comparison("a", "==", same))
            for other in others:
                assert Comparison("a", "==", value) != Comparison("a", "==", other)
        assert Comparison("a", "==", 1) != Comparison("a", "!=", 1)
        assert Comparison("a", "==", 1) != Comparison("b", "==", 1)
        assert Comparison("a", "==", claim="b") != Comparison("a", "==", claim="c")
        assert len({All(()), Any_(()), All((NEVER,)), Any_((NEVER,)), ~NEVER}) == 5

    def test_a_constraint_is_a_value(self) -> None:
        """What happens later to a list that a constraint was made from does not change it."""
        values = [1]
        constraint = Comparison("a", "==", values)
        values.append(2)

        assert constraint.matches({"a": [1]})
        assert constraint == (A == [1])

    def test_what_where_accepts(self) -> None:
        """A mapping means that all its attributes are equal; a constraint means itself; None means everything."""
        constraint = A == 1

        assert constraint_of(None) is None
        assert constraint_of(constraint) is constraint
        both = constraint_of({"a": 1, "b": "x"})
        assert both is not None
        assert both.matches({"a": 1, "b": "x", "c": 0})
        assert not both.matches({"a": 1})
        assert constraint_of({"a": USER}) == All((A == USER,))
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
            A == USER,
            A.is_in(REGIONS) | (A >= LEVEL),
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
            comparison(attribute="a", operator=1, value=packed(1), claim="user_id"),
            comparison(attribute="a", operator=9, claim="user_id"),
            comparison(attribute="a", operator=1, claim="a\0"),
            comparison(operator=1, claim="user_id"),
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


class TestLimits:
    def test_depth(self) -> None:
        """A constraint is nested so deep and no deeper, built or received."""
        deepest = self.nested(CONSTRAINT_DEPTH_MAX)
        message = constraint_pb2.Constraint()
        getattr(message, "not").CopyFrom(deepest.to_message())

        assert constraint_from_message(deepest.to_message()) == deepest
        builds: list[Callable[[], Constraint]] = [
            lambda: ~deepest,
            lambda: All((deepest,)),
            lambda: constraint_from_message(message),
        ]
        for build in builds:
            with pytest.raises(InvalidConstraint, match="nested deeper than 32 levels"):
                build()

    def test_parts(self) -> None:
        """A constraint has so many comparisons and combinations and no more, built or received."""
        most = All((A.exists(),) * (CONSTRAINT_PARTS_MAX - 1))
        message = most.to_message()
        message.all.constraints.append(A.exists().to_message())

        assert constraint_from_message(most.to_message()) == most
        builds: list[Callable[[], Constraint]] = [
            lambda: most & A.exists(),
            lambda: ~most,
            lambda: constraint_from_message(message),
        ]
        for build in builds:
            with pytest.raises(InvalidConstraint, match="more than 1000 comparisons"):
                build()

    def test_size(self) -> None:
        """A constraint takes so many bytes and no more, built or received."""
        size = CONSTRAINT_BYTES_MAX - (A == "x" * 60_000).to_message().ByteSize() + 60_000
        largest = Comparison("a", "==", "x" * size)
        message = comparison(attribute="a", operator=1, value=packed("x" * (size + 1)))
        disregarded = comparison(attribute="a", operator=9, value=b"x" * CONSTRAINT_BYTES_MAX)

        assert largest.to_message().ByteSize() == CONSTRAINT_BYTES_MAX
        assert constraint_from_message(largest.to_message()) == largest
        builds: list[Callable[[], Constraint]] = [
            lambda: Comparison("a", "==", "x" * (size + 1)),
            lambda: ~largest,
            lambda: largest | A.exists(),
            lambda: constraint_from_message(message),
            lambda: constraint_from_message(disregarded),
            lambda: (A == USER).bind({"user_id": "x" * (size + 1)}),
        ]
        for build in builds:
            with pytest.raises(InvalidConstraint, match=f"the limit is {CONSTRAINT_BYTES_MAX}"):
                build()

    @staticmethod
    def nested(depth: int) -> Constraint:
        """Return a constraint of so many levels."""
        constraint: Constraint = A == 1
        for _ in range(depth - 1):
            constraint = ~constraint
        return constraint


class TestClaims:
    @pytest.mark.parametrize(
        ("constraint", "claims", "bound"),
        [
            (A == USER, {"user_id": "ada"}, A == "ada"),
            (A == USER, {"user_id": 7}, A == 7),
            (A != USER, {"user_id": True}, A != True),  # noqa: E712 - builds a constraint
            (A < USER, {"user_id": 3}, A < 3),
            (A > USER, {"user_id": 3}, A > 3),
            (USER < A, {"user_id": 3}, A > 3),
            (USER == A, {"user_id": 3}, A == 3),
            (A.contains(USER), {"user_id": "ada"}, A.contains("ada")),
            (A.is_in(REGIONS), {"regions": ["n", "s"]}, A.is_in(["n", "s"])),
            (A.is_in(REGIONS), {"regions": ("n", "s")}, A.is_in(["n", "s"])),
            (A.is_in(REGIONS), {"regions": frozenset(("s", "n"))}, A.is_in(["n", "s"])),
            (A.is_in(REGIONS), {"regions": {"s", "n"}}, A.is_in(["n", "s"])),
            (A.is_in(REGIONS), {"regions": []}, A.is_in([])),
            (A == REGIONS, {"regions": ("n", "s")}, A == ["n", "s"]),
            (A == USER, {}, NEVER),
            (A != USER, {"other": 1}, NEVER),
            (A == USER, {"user_id": None}, NEVER),
            (A.contains(USER), {"user_id": None}, NEVER),
            (A.is_in(REGIONS), {"regions": "north"}, NEVER),
            (A.is_in(REGIONS), {"regions": {"north": 1}}, NEVER),
            (A < USER, {"user_id": True}, NEVER),
            (A < USER, {"user_id": ["a"]}, NEVER),
            (A == USER, {"user_id": object()}, NEVER),
            (A == USER, {"user_id": 2**64}, NEVER),
            (A == USER, {"user_id": nested(33)}, NEVER),
            (A.is_in(REGIONS), {"regions": [object()]}, NEVER),
            (~(A == USER), {}, ~NEVER),
            ((A == USER) & (A == 1), {}, NEVER & (A == 1)),
            ((A == USER) | (A == 1), {"user_id": 2}, (A == 2) | (A == 1)),
            (A == 1, {"user_id": 2}, A == 1),
        ],
    )
    def test_binding(self, constraint: Constraint, claims: dict[str, Any], bound: Constraint) -> None:
        """A claim's value takes the place of its name; without one that can be compared the comparison is false."""
        assert constraint.bind(claims) == bound

    def test_a_set_has_one_order(self) -> None:
        """Equal sets of claims make the same constraint, to the last character of its text."""
        names = [f"region-{number}" for number in range(50)]
        constraint = A.is_in(REGIONS)

        assert constraint.bind({"regions": set(names)}) == constraint.bind({"regions": frozenset(reversed(names))})

    @pytest.mark.parametrize(
        "constraint",
        [
            A == USER,
            ~(A == USER),
            A.exists() & (A == USER),
            (A == 1) | A.is_in(USER),
        ],
    )
    def test_without_values_nothing_is_decided(self, constraint: Constraint) -> None:
        """Evaluating claims without their values is an error, even where the answer would not depend on them."""
        for attributes in ({}, {"a": 1}):
            with pytest.raises(InvalidConstraint, match="before its claims have values: user_id"):
                constraint.matches(attributes)

    def test_names(self) -> None:
        """A constraint names all attributes and claims that it looks at."""
        constraint = (A == USER) | ~(attribute("b").is_in(REGIONS) & attribute("c").exists())

        assert constraint.attributes() == {"a", "b", "c"}
        assert constraint.claims() == {"user_id", "regions"}
        assert All(()).attributes() == All(()).claims() == frozenset()


B = attribute("b")


class TestPlanning:
    @pytest.mark.parametrize(
        ("constraint", "required"),
        [
            (A == 1, {"a": [1]}),
            (A.is_in([1, "x"]), {"a": [1, "x"]}),
            (A.is_in([]), {"a": []}),
            (A != 1, {}),
            (A > 1, {}),
            (A.contains(1), {}),
            (A.exists(), {}),
            (~(A == 1), {}),
            (A == USER, {}),
            (All(()), {}),
            (NEVER, {}),
            ((A == 1) & (B == 2), {"a": [1], "b": [2]}),
            ((A == 1) & (B > 2), {"a": [1]}),
            (A.is_in([1, 2]) & (A == 1), {"a": [1]}),
            ((A == 1) & A.is_in([1, 2]), {"a": [1]}),
            ((A == 1) | (A == 2), {"a": [1, 2]}),
            ((A == 1) | A.is_in([1, 1.0]), {"a": [1, 1.0]}),
            ((A == 1) | (B == 2), {}),
            ((A == 1) | B.exists(), {}),
            (((A == 1) & (B == 2)) | (A == 3), {"a": [1, 3]}),
            (Any_((NEVER, A == 1)), {"a": [1]}),
            (Any_((NEVER, NEVER)), {}),
            (((A == USER) | (A == 1)).bind({}), {"a": [1]}),
        ],
    )
    def test_required_values(self, constraint: Constraint, required: dict[str, list[Any]]) -> None:
        """What an attribute must equal is what `==` and `in` say, in all of and, and on each side of or."""
        assert [(name, list(map(identity, found))) for name, found in required_values(constraint).items()] == [
            (name, list(map(identity, values))) for name, values in required.items()
        ]
