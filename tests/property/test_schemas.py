from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.builders import quick_folder
from tests.property.strategies import checked, decimals, few_names, integers, names, scalars, texts, values

from tidelog import (
    AnyValue,
    Attribute,
    Boolean,
    Bytes,
    DecimalNumber,
    Entity,
    Enumeration,
    File,
    Float,
    Integer,
    InvalidSchema,
    List,
    Map,
    Patch,
    Reference,
    Schema,
    String,
    Timestamp,
    ValidationFailed,
)
from tidelog._attributes import MEMBER_TYPES
from tidelog._values import equal
from tidelog.v1 import schema_pb2

ENTITIES = ["Task", "Note"]
lengths = st.none() | st.integers(0, 4)
plain = st.recursive(
    st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda members: st.lists(members, max_size=2) | st.dictionaries(texts, members, max_size=2),
    max_leaves=4,
)


@st.composite
def declarations(draw: st.DrawFn) -> Attribute:
    """Draw a declaration that makes sense; options that do not go together are left out."""

    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.none() | strategy)

    def bounds(strategy: st.SearchStrategy[Any]) -> dict[str, Any]:
        low, high = sorted([draw(strategy), draw(strategy)])
        return {"minimum": draw(st.sampled_from([None, low])), "maximum": draw(st.sampled_from([None, high]))}

    def sizes() -> dict[str, Any]:
        low, high = draw(lengths), draw(lengths)
        return {"min_length": low, "max_length": high if low is None or high is None else max(low, high)}

    finite = st.floats(allow_nan=False, allow_infinity=False)
    moments = st.datetimes(timezones=st.just(UTC))
    make: dict[Any, Any] = {
        AnyValue: dict,
        String: lambda: {**sizes(), "default": maybe(texts), "pattern": maybe(st.sampled_from(["a*", r"[^\n]+"]))},
        Integer: lambda: {**bounds(integers), "default": maybe(integers)},
        Float: lambda: {**bounds(finite), "default": maybe(finite)},
        DecimalNumber: lambda: {**bounds(decimals), "default": maybe(decimals)},
        Boolean: lambda: {"default": maybe(st.booleans())},
        Timestamp: lambda: {**bounds(moments), "default": maybe(moments)},
        Bytes: lambda: {**sizes(), "default": maybe(st.binary(max_size=4))},
        List: lambda: {
            **sizes(), "default": maybe(st.lists(plain, max_size=3)),
            "member": maybe(st.sampled_from([kind() for kind in MEMBER_TYPES])),
        },
        Map: lambda: {**sizes(), "default": maybe(st.dictionaries(texts, plain, max_size=2))},
        Enumeration: lambda: {"values": draw(st.lists(texts, min_size=1, max_size=3, unique=True))},
        Reference: lambda: {
            "target": draw(st.sampled_from(ENTITIES)), "many": draw(st.booleans()),
            "on_delete": draw(st.sampled_from(["restrict", "cascade", "keep"])),
        },
        File: dict,
    }  # fmt: skip
    kind = draw(st.sampled_from(list(make)))
    options = make[kind]()
    required = kind is not Reference and draw(st.booleans())
    try:
        return kind(**options, required=required)  # type: ignore[no-any-return]
    except InvalidSchema:
        # The default breaks one of the rules.
        return kind(**{**options, "default": None}, required=required)  # type: ignore[no-any-return]


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Draw a schema of two entities."""
    attributes = st.dictionaries(few_names | names, declarations(), max_size=4)
    return Schema(
        [Entity(name, draw(attributes)) for name in ENTITIES],
        version=draw(st.integers(1, 2**63 - 1)),
        open=draw(st.booleans()),
    )


def fits(check: Any, *arguments: Any) -> bool:
    """Tell whether a check passes."""
    try:
        check(*arguments)
    except ValidationFailed:
        return False
    return True


@checked
@given(schemas())
def test_every_form_reads_back_equal(schema: Schema) -> None:
    """JSON, TOML and the wire keep every digit of what a schema says."""
    with quick_folder() as folder:
        path = Path(folder) / "schema.toml"
        schema.save(path)
        assert Schema.load(path) == schema
    assert Schema.from_json(schema.to_json()) == schema
    assert Schema.from_message(schema_pb2.Schema.FromString(schema.to_message().SerializeToString())) == schema


@checked
@given(schemas(), st.dictionaries(few_names, values | scalars, max_size=4))
def test_all_checks_agree(schema: Schema, attributes: dict[str, Any]) -> None:
    """A value is refused when it is created exactly if it is when it is written, or said in a patch."""
    for entity in schema.entities.values():
        required = {name: None for name, declared in entity.attributes.items() if declared.required}
        whole = {**required, **attributes}
        created = fits(schema.check_object, entity.name, whole)

        assert created == fits(schema.check_written, entity.name, whole, list(whole))
        assert created == fits(schema.check_patch, entity.name, Patch(whole))


@checked
@given(schemas())
def test_defaults_fit(schema: Schema) -> None:
    """What a schema fills in by itself breaks none of its rules, and is not filled in twice."""
    for entity in schema.entities.values():
        filled = schema.with_defaults(entity.name, {})

        assert fits(schema.check_written, entity.name, filled, list(filled))
        assert schema.with_defaults(entity.name, filled) is filled
        assert all(equal(value, getattr(entity.attributes[name], "default", None)) for name, value in filled.items())
