"""What the property tests draw: values, attributes, patches, operations, constraints."""

from __future__ import annotations

from datetime import UTC
from decimal import Decimal
from typing import Any, Final

from hypothesis import settings
from hypothesis import strategies as st
from tests.builders import make_operation

from tidelog import CommitGroup, Constraint, Operation, Patch
from tidelog._constraints import RESERVED_WORDS, All, Any_, Comparison, Not
from tidelog._values import DECIMAL_BYTES_MAX

# The same examples every time: a test fails today or never.
checked: Final = settings(derandomize=True, database=None, deadline=None, max_examples=100)

texts = st.text(max_size=8)
names = st.text("abcXYZ 09-_/.é中\U0001f600\n", min_size=1, max_size=8)
few_names = st.sampled_from(["a", "b", "c", "d"])
integers = st.integers(-(2**63), 2**63 - 1)
decimals = st.decimals(allow_nan=False, allow_infinity=False).filter(
    lambda value: len(str(value)) <= DECIMAL_BYTES_MAX
)
scalars: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | integers
    | st.integers(-3, 3)
    | st.floats()
    | texts
    | st.binary(max_size=12)
    | st.datetimes(timezones=st.just(UTC))
    | decimals
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda members: st.lists(members, max_size=3) | st.dictionaries(names, members, max_size=3),
    max_leaves=8,
)
attributes = st.dictionaries(few_names | names, values, max_size=4)
sums: st.SearchStrategy[list[Any]] = st.one_of(
    st.lists(st.integers(-(2**40), 2**40), min_size=3, max_size=6),
    st.lists(st.decimals(-(10**9), 10**9, places=3), min_size=3, max_size=6),
    st.lists(st.integers(-(10**30), 10**30).map(Decimal), min_size=3, max_size=6),
)


@st.composite
def patches(draw: st.DrawFn) -> Patch:
    """Draw a patch in which each attribute stands once."""
    fields: dict[str, dict[str, Any]] = {"set": {}, "increment": {}, "add": {}, "remove": {}}
    unset: list[str] = []
    for name in draw(st.lists(few_names | names, unique=True, max_size=5)):
        field = draw(st.sampled_from(["set", "set", "unset", "increment", "add", "remove"]))
        if field == "unset":
            unset.append(name)
        elif field == "increment":
            fields[field][name] = draw(integers | st.floats() | decimals)
        else:
            fields[field][name] = draw(values if field == "set" else st.lists(values, max_size=3))
    return Patch(fields["set"], tuple(unset), fields["increment"], fields["add"], fields["remove"])


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    """Draw an operation that a replica could have committed."""
    kind = draw(st.sampled_from(["create", "update", "delete"]))
    patch = Patch(draw(attributes)) if kind == "create" else draw(patches())
    seq = draw(st.integers(1, 2**63 - 1))
    size = draw(st.integers(1, min(seq, 1_000)))
    position = draw(st.integers(0, size - 1))
    operation = make_operation(
        kind,
        seq=seq,
        nonce=draw(st.integers(0, 2**64 - 1)),
        entity=draw(names),
        id=draw(names),
        patch=b"" if kind == "delete" else patch.encode(),
        base_version=draw(st.integers(0, 2**63 - 1)),
        schema_version=draw(st.integers(0, 2**31)),
        group=draw(st.none() | st.just(CommitGroup(seq - position, position, size))),
    )
    return operation._replace(client_time_us=draw(st.integers(-(10**15), 10**17)))


awkward_names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8
) | st.sampled_from([*sorted(RESERVED_WORDS), "claim", "inf", "nan", "t", "`", "due date", "É", "_1"])
constraint_names = few_names | few_names | awkward_names
constants: st.SearchStrategy[Any] = (
    st.integers(-3, 3) | st.sampled_from([None, "", "a", "ab", True, False, 1.0, float("nan")]) | values
)
ordered: st.SearchStrategy[Any] = (
    st.integers(-3, 3)
    | integers
    | st.floats()
    | texts
    | st.binary(max_size=4)
    | decimals
    | st.datetimes(timezones=st.just(UTC))
)
comparisons: st.SearchStrategy[Constraint] = st.one_of(
    st.builds(Comparison, constraint_names, st.sampled_from(["==", "!="]), constants),
    st.builds(Comparison, constraint_names, st.sampled_from(["<", "<=", ">", ">="]), ordered),
    st.builds(Comparison, constraint_names, st.just("in"), st.lists(constants, max_size=4)),
    st.builds(Comparison, constraint_names, st.just("contains"), constants | texts),
    st.builds(Comparison, constraint_names, st.just("exists")),
)
few_claims = st.sampled_from(["user_id", "regions", "https://example.com/level"])
claimed: st.SearchStrategy[Constraint] = st.builds(
    Comparison,
    constraint_names,
    st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "in", "contains"]),
    st.none(),
    few_claims | awkward_names,
)
claims: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    few_claims,
    constants
    | st.lists(constants, max_size=3)
    | st.lists(texts, max_size=3).map(tuple)
    | st.frozensets(texts | st.integers(-3, 3), max_size=3),
)


def _combined(members: st.SearchStrategy[Constraint]) -> st.SearchStrategy[Constraint]:
    return st.one_of(
        st.builds(Not, members),
        st.builds(All, st.lists(members, max_size=3).map(tuple)),
        st.builds(Any_, st.lists(members, max_size=3).map(tuple)),
    )


constraints: st.SearchStrategy[Constraint] = st.recursive(comparisons, _combined, max_leaves=6)
claiming: st.SearchStrategy[Constraint] = st.recursive(comparisons | claimed, _combined, max_leaves=6)


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes]) -> bytes:
    """Draw bytes that were well-formed before a few of them were changed, dropped or inserted."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 4))
        data[place : place + length] = draw(st.binary(max_size=4))
    return bytes(data)
