from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.property.strategies import attributes, checked, integers, patches, sums, values

from tidelog import InvalidValue, Patch
from tidelog._values import copied, encode, equal
from tidelog_server._action import _difference
from tidelog_server._records import merged_ranges

pytestmark = pytest.mark.slow


class TestIntents:
    @checked
    @given(st.booleans(), sums, st.randoms(use_true_random=False))
    def test_increments_commute(self, there: bool, amounts: list[Any], dice: Any) -> None:  # noqa: FBT001
        """Increments of numbers of one kind add up to the same, in whatever order they arrive."""
        present = amounts.pop() if there else None
        shuffled = list(amounts)
        dice.shuffle(shuffled)

        assert equal(after(present, "increment", amounts), after(present, "increment", shuffled))
        exact = sum(map(Fraction, amounts), Fraction(present or 0))
        assert Fraction(after(present, "increment", amounts)) == exact

    @checked
    @given(
        st.none() | st.lists(values, max_size=4),
        st.lists(st.lists(st.integers(-2, 2) | values, max_size=3), min_size=2, max_size=4),
        st.randoms(use_true_random=False),
    )
    @pytest.mark.parametrize("kind", ["add", "remove"])
    def test_members_commute(self, kind: str, present: Any, changes: list[Any], dice: Any) -> None:
        """Members that several authors add, or that several remove, come to the same set in whatever order."""
        shuffled = list(changes)
        dice.shuffle(shuffled)

        one, other = after(present, kind, changes), after(present, kind, shuffled)

        assert sorted(map(encode, _canonical(one))) == sorted(map(encode, _canonical(other)))

    @checked
    @given(st.none() | st.lists(values, max_size=4), st.lists(values, max_size=3))
    def test_doing_it_twice_changes_nothing(self, present: Any, members: list[Any]) -> None:
        """Adding what is there and removing what is not leave a list as it is."""
        for kind in ("add", "remove"):
            once = after(present, kind, [members])
            assert equal(after(once, kind, [members]), once)
        added = after(present, "add", [members])
        assert all(any(equal(member, one) for one in added) for member in members)
        removed = after(present, "remove", [members])
        assert not any(equal(member, one) for one in removed for member in members)


INTENTS: dict[str, Callable[[Any], Patch]] = {
    "increment": lambda amount: Patch(increment={"x": amount}),
    "add": lambda members: Patch(add={"x": members}),
    "remove": lambda members: Patch(remove={"x": members}),
}


def after(present: Any, kind: str, arguments: list[Any]) -> Any:
    """Return what becomes of an attribute when intents of one kind arrive one after the other."""
    state = {} if present is None else {"x": present}
    for argument in arguments:
        state = INTENTS[kind](argument).apply(state)
    return state["x"]


def _canonical(members: list[Any]) -> list[Any]:
    # 1.0 and 1.00 are one decimal in two spellings, 0.0 and -0.0 one float: which one stays depends on the order.
    seen: list[Any] = []
    for member in sorted(members, key=encode):
        if not any(equal(member, one) for one in seen):
            seen.append(member)
    return [_plain(member) for member in seen]


def _plain(value: Any) -> Any:
    if type(value) is Decimal:
        return value.normalize() if value else Decimal(0)
    if type(value) is float:
        return value + 0.0
    if type(value) is list:
        return [_plain(member) for member in value]
    if type(value) is dict:
        return {key: _plain(value[key]) for key in sorted(value)}
    return value


class TestPatches:
    @checked
    @given(attributes, patches())
    def test_the_argument_stays(self, before: dict[str, Any], patch: Patch) -> None:
        """Applying a patch leaves what it was given alone, and writes nothing but what it names."""
        untouched = copied(before)
        try:
            result = patch.apply(before)
        except InvalidValue:
            assert equal(before, untouched)
            return

        assert equal(before, untouched)
        for name in before.keys() | result.keys():
            if name not in patch.written:
                assert equal(result[name], before[name])

    @checked
    @given(attributes, attributes)
    def test_a_difference_leads_from_one_to_the_other(self, before: dict[str, Any], wanted: dict[str, Any]) -> None:
        """The patch between two states makes the second of the first, and is empty between equal ones."""
        patch = _difference(before, wanted)

        assert equal(patch.apply(before), wanted)
        assert _difference(before, before) == Patch()


def _ranges_of(seqs: set[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for seq in sorted(seqs):
        if ranges and ranges[-1][1] == seq - 1:
            ranges[-1] = (ranges[-1][0], seq)
        else:
            ranges.append((seq, seq))
    return tuple(ranges)


class TestRanges:
    @checked
    @given(st.sets(st.integers(1, 40)), st.sets(st.integers(1, 60)))
    def test_against_a_set(self, known: set[int], added: set[int]) -> None:
        """Ranges with positions added are the ranges of all of them, whether they overlap, touch or lie apart."""
        assert merged_ranges(_ranges_of(known), sorted(added)) == _ranges_of(known | added)

    @checked
    @given(st.lists(st.sets(st.integers(1, 50), min_size=1), max_size=6))
    def test_bit_by_bit(self, batches: list[set[int]]) -> None:
        """In whatever portions positions arrive, the ranges end up the same."""
        ranges: tuple[tuple[int, int], ...] = ()
        for batch in batches:
            ranges = merged_ranges(ranges, sorted(batch))

        assert ranges == _ranges_of(set().union(*batches))

    @checked
    @given(integers.filter(lambda seq: seq > 0), st.integers(1, 5))
    def test_of_large_positions(self, first: int, count: int) -> None:
        """Positions may be as large as a log can get."""
        seqs = list(range(first, first + count))

        assert merged_ranges((), seqs) == ((first, first + count - 1),)
