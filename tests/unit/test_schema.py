from __future__ import annotations

from typing import Any

import pytest

from tidelog import InvalidSchema, Reference, Schema
from tidelog.v1 import schema_pb2


class TestReferences:
    def test_of_an_entity(self) -> None:
        """A schema names the references of its entities; an entity that it does not name has none."""
        schema = Schema({"Line": {"order": "Order", "item": "Item"}})

        assert schema.references("Line") == (Reference("order", "Order"), Reference("item", "Item"))
        assert schema.references("Order") == ()
        assert schema.has_references
        assert not Schema().has_references

    @pytest.mark.parametrize(
        ("attributes", "expected"),
        [
            ({}, []),
            ({"other": "o1"}, []),
            ({"order": "o1"}, [("order", ("Order", "o1"))]),
            ({"order": None}, []),
            ({"order": 5}, []),
            ({"order": ["o1", None, "o2", 5]}, [("order", ("Order", "o1")), ("order", ("Order", "o2"))]),
            ({"order": {"id": "o1"}}, []),
            ({"item": "i1", "order": "o1"}, [("order", ("Order", "o1")), ("item", ("Item", "i1"))]),
        ],
    )
    def test_that_attributes_set(
        self, attributes: dict[str, Any], expected: list[tuple[str, tuple[str, str]]]
    ) -> None:
        """A text names an object, a list of texts several; anything else names none."""
        schema = Schema({"Line": {"order": "Order", "item": "Item"}})

        assert list(schema.referenced("Line", attributes)) == expected
        assert list(schema.referenced("Note", attributes)) == []


class TestMaking:
    @pytest.mark.parametrize(
        "references",
        [
            {"": {}},
            {"x" * 65: {}},
            {"Line": {"": "Order"}},
            {"Line": {"order": ""}},
            {"Line": {"a\0": "Order"}},
            {5: {}},
        ],
    )
    def test_with_a_name_that_nothing_can_have(self, references: Any) -> None:
        """A name that no entity or attribute can have is an InvalidSchema."""
        with pytest.raises(InvalidSchema):
            Schema(references)

    @pytest.mark.parametrize("version", [0, -1])
    def test_with_a_version_that_cannot_be(self, version: int) -> None:
        """Versions start at 1."""
        with pytest.raises(InvalidSchema):
            Schema(version=version)

    def test_equality(self) -> None:
        """Two schemas are equal if they say the same."""
        one, same = Schema({"Line": {"order": "Order"}}, version=2), Schema({"Line": {"order": "Order"}}, version=2)

        assert one == same
        assert hash(one) == hash(same)
        assert one != Schema({"Line": {"order": "Order"}})
        assert one != Schema({"Line": {"order": "Note"}}, version=2)
        assert one != "a schema"


class TestOnTheWire:
    @pytest.mark.parametrize("schema", [Schema(), Schema({"Line": {"order": "Order"}, "Order": {}}, version=9)])
    def test_there_and_back(self, schema: Schema) -> None:
        """A schema reads back as it was written."""
        message = schema_pb2.Schema.FromString(schema.to_message().SerializeToString())

        assert Schema.from_message(message) == schema

    def test_nothing_is_the_empty_schema(self) -> None:
        """No bytes at all are a schema without references."""
        assert Schema.from_message(schema_pb2.Schema()) == Schema()

    @pytest.mark.parametrize(
        "message",
        [
            schema_pb2.Schema(version=-1),
            schema_pb2.Schema(entities=[schema_pb2.Entity()]),
            schema_pb2.Schema(entities=[schema_pb2.Entity(name="Line", references=[schema_pb2.Reference()])]),
        ],
    )
    def test_what_makes_no_sense(self, message: schema_pb2.Schema) -> None:
        """A message that contradicts itself is an InvalidSchema."""
        with pytest.raises(InvalidSchema):
            Schema.from_message(message)
