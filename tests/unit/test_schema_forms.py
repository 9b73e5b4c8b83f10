"""The forms of a schema: files, JSON text, the wire."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

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
    Reference,
    Rename,
    Schema,
    String,
    Timestamp,
)
from tidelog._attributes import ATTRIBUTE_TYPES, MEMBER_TYPES
from tidelog._values import encode
from tidelog.v1 import schema_pb2

MOMENT = datetime(2024, 5, 1, 12, 30, 15, 123456, tzinfo=UTC)
EVERYTHING: dict[str, Attribute] = {
    "any": AnyValue(required=True),
    "string": String(default="ä\"\n'", min_length=1, max_length=9, pattern=r"[^\d\\]+"),
    "empty": String(default=""),
    "integer": Integer(default=0, minimum=-(2**63), maximum=2**63 - 1),
    "float": Float(default=1.0, minimum=-0.1, maximum=1e300),
    "decimal": DecimalNumber(default=Decimal("1.10"), minimum=Decimal("-1E+5"), maximum=Decimal("1E+2")),
    "boolean": Boolean(default=False, required=True),
    "timestamp": Timestamp(default=MOMENT, minimum=datetime(1, 1, 1, tzinfo=UTC), maximum=MOMENT),
    "bytes": Bytes(default=b"\0\xff", min_length=1, max_length=2),
    "list": List(default=["a", 1, 1.0, True, [], {"b": [2.5]}], min_length=1, max_length=9),
    "map": Map(default={"a": {"b": ["c"]}}, min_length=1, max_length=2),
    "enumeration": Enumeration(["open", "äh"], default="äh"),
    "reference": Reference("Other", required=True, on_delete="cascade"),
    "many": Reference("Thing", many=True, on_delete="clear"),
    "kept": Reference("Thing", on_delete="keep"),
    "file": File(required=True),
    "odd name.with 'quotes'": String(),
    **{f"list of {kind.__name__}": List(kind()) for kind in MEMBER_TYPES},
}
SCHEMA = Schema(
    [Entity("Thing", EVERYTHING, unique=["string", ("integer", "decimal")], indexes=["float"]), Entity("Other", {})],
    version=7,
    renames=[Rename(version=3, entity="Old", to="Thing"), Rename(version=7, entity="Thing", attribute="o", to="any")],
)


def attribute_message(**fields: Any) -> schema_pb2.Schema:
    """Return the wire form of a schema with one attribute."""
    return schema_pb2.Schema(
        version=1, entities=[schema_pb2.Entity(name="A", attributes=[schema_pb2.Attribute(name="a", **fields)])]
    )


class TestAllForms:
    def test_everything_is_in_the_sample(self) -> None:
        """The schema that goes there and back has each type, and each option with a value."""
        assert {type(declared) for declared in EVERYTHING.values()} == set(ATTRIBUTE_TYPES)
        special: dict[Any, list[Any]] = {Enumeration: [["x"]], Reference: ["A"]}
        for kind in ATTRIBUTE_TYPES:
            plain = kind(*special.get(kind, []))
            for option in kind.__struct_fields__:
                values = [getattr(declared, option) for declared in EVERYTHING.values() if type(declared) is kind]
                assert any(value != getattr(plain, option) for value in values) or option == "required", option

    @pytest.mark.parametrize("schema", [SCHEMA, Schema(), Schema(open=True, version=2**63 - 1)])
    def test_there_and_back(self, schema: Schema, tmp_path: Path) -> None:
        """A schema reads back as it was written, to the types and digits of its values."""
        for name in ("schema.json", "schema.toml", "SCHEMA.JSON"):
            schema.save(tmp_path / name)
            assert Schema.load(str(tmp_path / name)) == schema
        message = schema_pb2.Schema.FromString(schema.to_message().SerializeToString())
        for back in (
            Schema.load(tmp_path / "schema.toml"),
            Schema.from_json(schema.to_json()),
            Schema.from_message(message),
        ):
            assert back == schema
            assert back.fingerprint == schema.fingerprint
            assert back.renames == schema.renames
            for entity in schema.entities.values():
                assert repr(dict(back.entities[entity.name].attributes)) == repr(dict(entity.attributes))
                assert back.entities[entity.name].unique == entity.unique


class TestFiles:
    def test_written_by_hand(self, tmp_path: Path) -> None:
        """A file says what is declared in Python, and leaves out what is not."""
        path = tmp_path / "schema.toml"
        path.write_text(
            """
            version = 2
            renames = [{ version = 2, entity = "Client", to = "Customer" }]

            [entities.Customer]
            unique = ["number", ["name", "born"]]
            indexes = ["name"]

            [entities.Customer.attributes]
            number = { type = "integer", required = true, minimum = 1 }
            name = { type = "string", max_length = 100 }
            born = { type = "timestamp", maximum = 2024-05-01T00:00:00+02:00 }
            credit = { type = "decimal", default = "0.00", minimum = 0 }
            score = { type = "float", minimum = 0 }
            tags = { type = "list", member = { type = "string" } }

            [entities.Note]
            """,
            encoding="utf-8",
        )

        assert Schema.load(path) == Schema(
            [
                Entity(
                    "Customer",
                    {
                        "number": Integer(required=True, minimum=1),
                        "name": String(max_length=100),
                        "born": Timestamp(maximum=datetime(2024, 4, 30, 22, tzinfo=UTC)),
                        "credit": DecimalNumber(default=Decimal("0.00"), minimum=Decimal(0)),
                        "score": Float(minimum=0.0),
                        "tags": List(String()),
                    },
                    unique=["number", ("name", "born")],
                    indexes=["name"],
                ),
                Entity("Note", {}),
            ],
            version=2,
            renames=[Rename(version=2, entity="Client", to="Customer")],
        )

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "line 1, column 1: Expecting value"),
            ('{\n"version": 1,\n}', "line 3, column 1"),
            ("[]", "Expected `object`, got `array`"),
            ("{}", "Object missing required field `version`"),
            ('{"version": "1", "entities": {}}', r"Expected `int`, got `str` - at `\$.version`"),
            ('{"version": 0, "entities": {}}', "a schema's version starts at 1, got 0"),
            ('{"version": 1, "entities": {}, "more": 1}', "Object contains unknown field `more`"),
            ('{"version": 1, "version": 2, "entities": {}}', "'version' stands twice in one place"),
            ('{"version": 1, "entities": {"A": {}, "A": {}}}', "'A' stands twice"),
            ('{"version": 1, "entities": {"A": []}}', "A: Expected `object`, got `array`"),
            ('{"version": 1, "entities": {"A": {"attribute": {}}}}', "A: Object contains unknown field `attribute`"),
            ('{"version": 1, "entities": {"": {}}}', "an entity name must be a string that is not empty"),
            ('{"version": 1, "entities": {}, "renames": [{"version": 1, "to": "A"}]}', r"renames\[0\]: .*`entity`"),
            ('{"version": NaN, "entities": {}}', "NaN is no number"),
            ("[" * 100_000, "nested too deeply"),
            (" " * 1_048_577, "a schema of 1048577 bytes: the limit is 1048576"),
        ],
    )
    def test_that_make_no_schema(self, text: str, said: str, tmp_path: Path) -> None:
        """The message names the file and the place of the fault."""
        path = tmp_path / "shop.json"
        path.write_text(text, encoding="utf-8")

        with pytest.raises(InvalidSchema, match=rf"shop\.json: {said}"):
            Schema.load(path)
        with pytest.raises(InvalidSchema, match=said):
            Schema.from_json(text)

    @pytest.mark.parametrize(
        ("declared", "said"),
        [
            (5, "Expected `object`, got `int`"),
            ({}, "missing required field `type`"),
            ({"type": "text"}, "Invalid value 'text'"),
            ({"type": "string", "length": 3}, "unknown field `length`"),
            ({"type": "integer", "minimum": "1"}, r"Expected `int . null`, got `str` - at `\$.minimum`"),
            ({"type": "integer", "minimum": True}, "Expected `int . null`, got `bool`"),
            ({"type": "integer", "minimum": 2, "maximum": 1}, "Integer: minimum 2 is above maximum 1"),
            ({"type": "decimal", "default": "x"}, "Invalid decimal string"),
            ({"type": "decimal", "default": "NaN"}, "DecimalNumber: the default is a decimal that is not finite"),
            ({"type": "float", "default": 1e999}, "Infinity is no number"),
            ({"type": "timestamp", "default": "2024-05-01T00:00:00"}, "without a time zone"),
            ({"type": "bytes", "default": "?"}, "Invalid base64"),
            ({"type": "reference"}, "missing required field `target`"),
            ({"type": "reference", "target": "B", "on_delete": "drop"}, "Invalid enum value 'drop'"),
            ({"type": "enumeration", "values": "ab"}, "Expected `array`, got `str`"),
            ({"type": "list", "member": {"type": "file"}}, "Invalid value 'file'"),
            ({"type": "map", "default": {"a": None}}, "Map: the default holds null"),
        ],
    )
    def test_with_an_attribute_that_makes_no_sense(self, declared: Any, said: str) -> None:
        """The message names entity and attribute."""
        text = json.dumps({"version": 1, "entities": {"A": {"attributes": {"a b": declared}}}})

        with pytest.raises(InvalidSchema, match=said) as caught:
            Schema.from_json(text)
        if "Infinity" not in said:
            assert str(caught.value).startswith("A.a b: ")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"version = \n", "at line 1, column 11"),
            (b"version = 1\nversion = 2\n", "at line 2"),
            (b"entities = {}", "missing required field `version`"),
            (
                b"version = 1\n[entities.A.attributes]\na = { type = 'timestamp', default = 2024-05-01 }",
                "A.a: .*`date`",
            ),
            (b"\xff", "is no UTF-8 text"),
            (b"a=" + b"[" * 100_000, "nested too deeply|at line 1"),
        ],
    )
    def test_in_toml_that_make_no_schema(self, text: bytes, said: str, tmp_path: Path) -> None:
        """The message names the file and the place of the fault, in TOML too."""
        path = tmp_path / "shop.toml"
        path.write_bytes(text)

        with pytest.raises(InvalidSchema, match=rf"shop\.toml.*({said})"):
            Schema.load(path)

    def test_that_cannot_be_read(self, tmp_path: Path) -> None:
        """A file that is not there, and one of another kind, are told by name."""
        with pytest.raises(InvalidSchema, match=r"none\.json cannot be read: No such file"):
            Schema.load(tmp_path / "none.json")
        for path in (tmp_path / "schema.yaml", tmp_path / "schema"):
            with pytest.raises(InvalidSchema, match=r"schema.*: a schema file ends in \.json or \.toml"):
                Schema.load(path)
            with pytest.raises(InvalidSchema, match=r"ends in \.json or \.toml"):
                SCHEMA.save(path)
            assert not path.exists()


class TestOnTheWire:
    def test_older_clients_are_told_the_references(self) -> None:
        """References stand where clients look that know nothing else."""
        [thing, _] = SCHEMA.to_message().entities

        assert [(one.attribute, one.target) for one in thing.references] == [
            ("reference", "Other"), ("many", "Thing"), ("kept", "Thing"),
        ]  # fmt: skip

    def test_of_an_older_server(self) -> None:
        """A schema that has only references is open, and lets them lead anywhere."""
        message = schema_pb2.Schema(
            version=3,
            entities=[
                schema_pb2.Entity(name="Line", references=[schema_pb2.Reference(attribute="order", target="Order")]),
                schema_pb2.Entity(name="Order"),
            ],
        )

        assert Schema.from_message(message) == Schema(
            [Entity("Line", {"order": Reference("Order", on_delete="keep")}), Entity("Order", {})],
            version=3,
            open=True,
        )

    def test_nothing_is_the_open_schema(self) -> None:
        """No bytes at all are a schema that accepts everything."""
        assert Schema.from_message(schema_pb2.Schema()) == Schema(open=True)

    def test_of_a_newer_server(self) -> None:
        """A type or behaviour of later is read as the least that it can mean."""
        for message, expected in (
            (attribute_message(type=99, required=True), AnyValue(required=True)),
            (attribute_message(type="ATTRIBUTE_TYPE_LIST", member_type=99), List()),
            (attribute_message(type="ATTRIBUTE_TYPE_LIST", member_type="ATTRIBUTE_TYPE_FILE"), List()),
            (attribute_message(type="ATTRIBUTE_TYPE_REFERENCE", target="A", on_delete=99), Reference("A")),
            (attribute_message(type="ATTRIBUTE_TYPE_REFERENCE", target="A"), Reference("A")),
        ):
            assert Schema.from_message(message).entities["A"].attributes["a"] == expected

    @pytest.mark.parametrize(
        ("message", "said"),
        [
            (schema_pb2.Schema(version=-1), "starts at 1"),
            (schema_pb2.Schema(entities=[schema_pb2.Entity()]), "an entity name"),
            (
                schema_pb2.Schema(entities=[schema_pb2.Entity(name="A", references=[schema_pb2.Reference()])]),
                "an entity name",
            ),
            (
                schema_pb2.Schema(
                    entities=[schema_pb2.Entity(name="A", attributes=[schema_pb2.Attribute(name="a")] * 2)]
                ),
                "A: attribute 'a' stands twice",
            ),
            (schema_pb2.Schema(renames=[schema_pb2.Rename()]), "the rename of  to  in version 0"),
            (attribute_message(type="ATTRIBUTE_TYPE_INTEGER", default_value=b"\xc1"), "A.a: not a MessagePack value"),
            (attribute_message(type="ATTRIBUTE_TYPE_INTEGER", minimum=encode("x")), "A.a: Integer: minimum is 'x'"),
            (attribute_message(type="ATTRIBUTE_TYPE_STRING", max_length=-1), "A.a: String: max_length is -1"),
            (attribute_message(type="ATTRIBUTE_TYPE_STRING", pattern="("), "A.a: String: pattern"),
            (attribute_message(type="ATTRIBUTE_TYPE_ENUMERATION"), "A.a: Enumeration: values is"),
            (attribute_message(type="ATTRIBUTE_TYPE_REFERENCE"), "A.a: Reference: an entity name"),
        ],
    )
    def test_what_makes_no_sense(self, message: schema_pb2.Schema, said: str) -> None:
        """A message that contradicts itself is an InvalidSchema that names the attribute."""
        with pytest.raises(InvalidSchema, match=said):
            Schema.from_message(message)
