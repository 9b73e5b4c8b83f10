"""`identity` stands for `equal`, which it makes quick."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tidelog._values import equal, identity

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf")]),
    st.sampled_from(["", "a", "1"]), st.sampled_from([b"", b"a"]), st.decimals(-1, 1, places=1),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
)


@given(values, values)
def test_equal_values_share_their_identity(left: Any, right: Any) -> None:
    """Two values have one identity exactly if they are equal."""
    assert (identity(left) == identity(right)) == equal(left, right)


@given(values)
def test_a_value_is_itself(value: Any) -> None:
    """A value is equal to itself, not-a-number too."""
    assert equal(value, value)
    assert identity(value) == identity(value)
