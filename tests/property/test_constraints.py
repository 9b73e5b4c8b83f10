from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.strategies import (
    attributes,
    checked,
    claiming,
    claims,
    comparisons,
    constants,
    constraints,
    few_names,
    mutated,
    ordered,
    texts,
)

from tidelog import Constraint, InvalidConstraint, parse_constraint
from tidelog._constraints import All, Any_, Comparison, Not, constraint_from_message, required_values
from tidelog._values import equal
from tidelog.v1 import constraint_pb2

pytestmark = pytest.mark.slow

often = settings(checked, max_examples=400)


_ONE_OF_EVERYTHING: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 2**63 - 1, -(2**63)),
    *(0.0, -0.0, 1.0, 2.0, math.nan, math.inf, -math.inf, 1e300, 5e-324),
    *("", "a", "b", "ab", "A", "é", "e\u0301", "\uffff", "\U0001f600", "1", "null"),
    *(b"", b"a", b"ab", b"\xff"),
    *(Decimal(0), Decimal("-0"), Decimal(1), Decimal("1.0"), Decimal("1.00"), Decimal("1E+3"), Decimal(1000)),
    *(Decimal("9E+999999999999999999"), Decimal("1E-999999999999999999"), Decimal("0.1")),
    *(datetime(1, 1, 1, tzinfo=UTC), datetime(2026, 1, 31, 12, 0, 0, 1, tzinfo=UTC)),
    datetime(2026, 1, 31, 13, 0, 0, 1, tzinfo=timezone(timedelta(hours=1))),
    *([], [None], [1], [1.0], [True], [1, 2], ["a"], [math.nan], [[1]], [{"a": 1}], [Decimal("1.0")], [b"a"]),
    *({}, {"a": 1}, {"a": 1.0}, {"a": None}, {"b": 1}, {"a": 1, "b": [2]}, {"b": [2], "a": 1}, {"a": math.nan}),
]


class TestOneLanguage:
    """What a constraint means does not depend on the form it comes in, nor on where it is evaluated."""

    @often
    @given(st.data())
    def test_against_a_reference(self, data: st.DataObject) -> None:
        """By whatever way a constraint comes, it holds exactly where the documented rules say so."""
        constraint = data.draw(claiming)
        brought = data.draw(claims)
        state = data.draw(_states(constraint, brought))
        expected = _reference(constraint, state, brought)

        for way in _ways(constraint):
            bound = way.bind(brought)
            for bound_way in _ways(bound):
                assert bound_way.matches(state) is expected

    @pytest.mark.parametrize("operator", ["==", "!=", "<", "<=", ">", ">=", "in", "contains", "exists"])
    def test_every_pair(self, operator: str) -> None:
        """Each comparison of one of everything with one of everything is what the documented rules say."""
        built = 0
        for value in [None] if operator == "exists" else [*_ONE_OF_EVERYTHING, _ONE_OF_EVERYTHING]:
            try:
                constraint = Comparison("a", operator, value)
            except InvalidConstraint:
                continue
            built += 1
            for present in _ONE_OF_EVERYTHING:
                state = {"a": present}
                assert constraint.matches(state) is _reference(constraint, state, {}), (present, value)
        assert built

    @checked
    @given(claiming)
    def test_there_and_back(self, constraint: Constraint) -> None:
        """Message, text and pickle give the constraint back, to the last digit."""
        for back in _ways(constraint):
            assert back == constraint
            assert hash(back) == hash(constraint)
            assert str(back) == str(constraint)
            assert back.to_message() == constraint.to_message()

    @checked
    @given(claiming)
    def test_what_is_known_of_it(self, constraint: Constraint) -> None:
        """Attributes, claims, depth, parts and size are those of the whole expression."""
        found = list(_comparisons(constraint))

        assert constraint.attributes() == {one.attribute for one in found}
        assert constraint.claims() == {one.claim for one in found if one.claim}
        assert constraint.facts.depth == _depth(constraint)
        assert constraint.facts.parts == _parts(constraint)
        assert constraint.facts.size_bytes == constraint.to_message().ByteSize()

    @checked
    @given(constraints, constraints)
    def test_equal_means_the_same_text(self, one: Constraint, other: Constraint) -> None:
        """Constraints with the same text are equal, and different ones have different texts."""
        if str(one) == str(other):
            assert one == other
        if one != other:
            assert str(one) != str(other)

    @checked
    @given(claiming, claims)
    def test_binding(self, constraint: Constraint, brought: dict[str, Any]) -> None:
        """A bound constraint has no claims left, and binding it again changes nothing."""
        bound = constraint.bind(brought)

        assert not bound.claims()
        assert bound.bind({}) == bound
        assert bound.attributes() <= constraint.attributes()


class TestPlanning:
    @often
    @given(st.data())
    def test_required_values(self, data: st.DataObject) -> None:
        """Where a constraint holds, each attribute with required values equals one of them."""
        constraint = data.draw(_selective)
        state = data.draw(_states(constraint, {}))
        if not constraint.matches(state):
            return

        for name, required in required_values(constraint).items():
            assert any(equal(state[name], value) for value in required)


class TestAnyInput:
    @checked
    @given(mutated(claiming.map(lambda one: one.to_message().SerializeToString())) | st.binary(max_size=60))
    def test_damaged_bytes(self, data: bytes) -> None:
        """A message that makes no sense is an InvalidConstraint; one that does can be evaluated."""
        message = constraint_pb2.Constraint()
        try:
            message.ParseFromString(data)
        except Exception:  # noqa: BLE001 - the transport's business
            return
        try:
            constraint = constraint_from_message(message)
        except InvalidConstraint:
            return
        _use(constraint)

    @checked
    @given(st.data())
    def test_damaged_text(self, data: st.DataObject) -> None:
        """A text that makes no sense is an InvalidConstraint; one that does can be evaluated."""
        text = data.draw(claiming.map(str))
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(text)))
            end = place + data.draw(st.integers(0, 4))
            text = text[:place] + data.draw(_fragments) + text[end:]
        try:
            constraint = parse_constraint(text)
        except InvalidConstraint:
            return
        _use(constraint)
        assert parse_constraint(str(constraint)) == constraint

    @checked
    @given(st.lists(st.sampled_from(["(", ")", "not", "and", "or", "a", "==", "1", ",", "any", " ", "exists"])))
    def test_any_words(self, words: list[str]) -> None:
        """Any words in any order are a constraint or an InvalidConstraint."""
        try:
            constraint = parse_constraint(" ".join(words))
        except InvalidConstraint:
            return
        assert parse_constraint(str(constraint)) == constraint


_fragments = texts | st.sampled_from(
    ['"', "`", "\\", "(", ")", "[", "{", " not ", " and ", "==", "in", "claim.", "claim", "1", "d", "t", "b", ".", "-"]
)

# Without Not and with equality often enough that something is required, and true.
_selective: st.SearchStrategy[Constraint] = st.recursive(
    st.builds(Comparison, few_names, st.just("=="), st.integers(0, 2))
    | st.builds(Comparison, few_names, st.just("in"), st.lists(st.integers(0, 2) | constants, max_size=3))
    | comparisons,
    lambda members: st.one_of(
        st.builds(All, st.lists(members, max_size=3).map(tuple)),
        st.builds(Any_, st.lists(members, max_size=3).map(tuple)),
        st.builds(Not, members),
    ),
    max_leaves=5,
)


def _ways(constraint: Constraint) -> list[Constraint]:
    """The constraint as it was built, and as it comes out of every form that it can travel in."""
    message = constraint_pb2.Constraint.FromString(constraint.to_message().SerializeToString())
    return [
        constraint,
        constraint_from_message(message),
        parse_constraint(str(constraint)),
        parse_constraint(f" ( {constraint}\n)\t"),
        pickle.loads(pickle.dumps(constraint)),
    ]


def _states(constraint: Constraint, brought: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Attributes that have something to do with a constraint: nearly no others would match one."""
    near: list[Any] = [None, 0, "", *brought.values()]
    for one in _comparisons(constraint):
        near.append(one.value)
        if isinstance(one.value, list):
            near += one.value
        else:
            near.append([one.value])
    listed = [list(value) if isinstance(value, tuple | frozenset) else value for value in near]
    names = sorted(constraint.attributes()) or ["a"]
    return st.dictionaries(st.sampled_from(names), st.sampled_from(listed) | constants | ordered) | attributes


def _comparisons(constraint: Constraint) -> list[Comparison]:
    if isinstance(constraint, Comparison):
        return [constraint]
    return [found for member in _members(constraint) for found in _comparisons(member)]


def _members(constraint: Constraint) -> tuple[Constraint, ...]:
    if isinstance(constraint, All | Any_):
        return constraint.members
    return (constraint.member,) if isinstance(constraint, Not) else ()


def _depth(constraint: Constraint) -> int:
    return 1 + max(map(_depth, _members(constraint)), default=0)


def _parts(constraint: Constraint) -> int:
    return 1 + sum(map(_parts, _members(constraint)))


def _use(constraint: Constraint) -> None:
    state = {"a": 1, "b": "x", "c": [1], "d": None}
    bound = constraint.bind({"user_id": "x", "regions": ["x"]})
    bound.matches(state)
    required_values(bound)
    str(constraint)
    constraint.to_message()


# The reference: the documented rules, one by one, and nothing of how tidelog does it.


def _reference(constraint: Constraint, state: Mapping[str, Any], brought: Mapping[str, Any]) -> bool:
    if isinstance(constraint, Not):
        return not _reference(constraint.member, state, brought)
    if isinstance(constraint, All):
        return False not in [_reference(member, state, brought) for member in constraint.members]
    if isinstance(constraint, Any_):
        return True in [_reference(member, state, brought) for member in constraint.members]
    one = cast("Comparison", constraint)
    if one.claim and one.claim not in brought:
        return False
    value = brought[one.claim] if one.claim else one.value
    if isinstance(value, tuple | frozenset):
        value = list(value)
    present = state.get(one.attribute)
    if one.operator == "exists":
        return present is not None
    if present is None:
        return False
    return _compares(present, one.operator, value)


def _compares(present: Any, operator: str, value: Any) -> bool:
    kinds = _kind(present), _kind(value)
    if operator == "in":
        return kinds[1] == "list" and True in [_same(present, one) for one in value]
    if operator == "contains" and kinds[0] == "list":
        return value is not None and True in [_same(one, value) for one in present]
    if kinds[0] != kinds[1]:
        return False
    if operator == "==":
        return _same(present, value)
    if operator == "!=":
        return not _same(present, value)
    if operator == "contains":
        return kinds[0] == "str" and _has_part(present, value)
    if kinds[0] in {"bool", "list", "dict"}:
        return False
    return (operator[0] == "<" and _less(present, value)) or (
        (operator[0] == ">" and _less(value, present)) or (operator.endswith("=") and _same(present, value))
    )


def _kind(value: Any) -> str:
    return type(value).__name__


def _same(one: Any, other: Any) -> bool:
    if _kind(one) != _kind(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, dict):
        return sorted(one) == sorted(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and str(one) == "nan":
        return str(other) == "nan"
    if isinstance(one, Decimal):
        return _number(one) == _number(other)
    return bool(one == other)


def _less(one: Any, other: Any) -> bool:
    if isinstance(one, str):
        return [ord(character) for character in one] < [ord(character) for character in other]
    if isinstance(one, bytes):
        return list(one) < list(other)
    if isinstance(one, Decimal):
        return _number(one) < _number(other)
    return bool(one < other)


def _number(value: Decimal) -> Decimal | Fraction:
    # Exact, unless writing the digits out would take all memory.
    return Fraction(value) if abs(value.adjusted()) < 10_000 else value


def _has_part(text: str, part: str) -> bool:
    return any(text[place:].startswith(part) for place in range(len(text) + 1))
