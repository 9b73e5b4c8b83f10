from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from tidelog import (
    AnyValue,
    Boolean,
    Constraint,
    DecimalNumber,
    Entity,
    Enumeration,
    File,
    Float,
    Integer,
    InvalidConstraint,
    List,
    Map,
    Patch,
    Reference,
    Schema,
    String,
    Timestamp,
    ValidationFailed,
    attribute,
    claim,
)

ATTRIBUTES = {
    "number": Integer(required=True, minimum=1),
    "name": String(max_length=5),
    "vip": Boolean(default=False),
    "labels": List(String(), default=["new"]),
    "loose": List(),
    "price": DecimalNumber(),
    "weight": Float(),
    "any": AnyValue(),
    "data": Map(),
    "when": Timestamp(),
    "level": Enumeration(["low", "high"]),
    "friend": Reference("Customer"),
    "friends": Reference("Customer", many=True),
    "photo": File(),
}
CLOSED = Schema([Entity("Customer", ATTRIBUTES)])
OPEN = Schema([Entity("Customer", ATTRIBUTES)], open=True)


class TestObjects:
    def test_that_fit(self) -> None:
        """An object with everything that is required, and nothing that is not declared, fits."""
        CLOSED.check_object("Customer", {"number": 1})
        CLOSED.check_object("Customer", {"number": 1, "name": None, "vip": True, "any": [1, {"a": None}]})

    @pytest.mark.parametrize(
        ("attributes", "said"),
        [
            ({"number": -3}, "Customer 'c1': attribute 'number' is -3, but must be at least 1"),
            ({}, "Customer 'c1': attribute 'number' is null, but must have a value"),
            ({"number": None}, "Customer 'c1': attribute 'number' is null, but must have a value"),
            ({"number": 1, "vip": 1}, "Customer 'c1': attribute 'vip' is 1, but must be true or false"),
        ],
    )
    def test_that_break_a_rule(self, attributes: dict[str, Any], said: str) -> None:
        """The message names entity, object, attribute, value and rule, and the error has them as attributes."""
        for schema in (CLOSED, OPEN):
            with pytest.raises(ValidationFailed) as caught:
                schema.check_object("Customer", attributes, "c1")
            assert str(caught.value) == said
            assert not caught.value.is_mismatch
            with pytest.raises(ValidationFailed, match=r"^Customer: attribute"):
                schema.check_object("Customer", attributes)

    def test_that_the_schema_does_not_have(self) -> None:
        """What is not declared is a mismatch where the schema is closed, and accepted where it is open."""
        with pytest.raises(ValidationFailed) as caught:
            CLOSED.check_object("Client", {}, "c1")
        assert (caught.value.entity, caught.value.attribute, caught.value.is_mismatch) == ("Client", "", True)
        assert str(caught.value) == "Client 'c1': the schema has no such entity"
        with pytest.raises(ValidationFailed) as caught:
            CLOSED.check_object("Customer", {"number": 1, "colour": None})
        assert (caught.value.attribute, caught.value.is_mismatch) == ("colour", True)
        assert str(caught.value) == "Customer: attribute 'colour' is null, but the schema has no such attribute"

        OPEN.check_object("Client", {"number": "x"})
        OPEN.check_object("Customer", {"number": 1, "colour": 3})


class TestDefaults:
    def test_fill_in_what_is_missing(self) -> None:
        """What a creation leaves out gets its default; a null stays, and so does the argument."""
        given = {"number": 1}

        assert CLOSED.with_defaults("Customer", given) == {"number": 1, "vip": False, "labels": ["new"]}
        assert given == {"number": 1}
        assert CLOSED.with_defaults("Customer", {"vip": None, "labels": []}) == {"vip": None, "labels": []}

    def test_give_back_what_is_complete(self) -> None:
        """Where nothing is filled in the same object comes back."""
        for schema, entity, attributes in (
            (CLOSED, "Customer", {"vip": True, "labels": []}),
            (OPEN, "Client", {}),
            (Schema([Entity("A", {"a": String()})]), "A", {}),
        ):
            assert schema.with_defaults(entity, attributes) is attributes

    def test_are_not_shared(self) -> None:
        """Changing a list that came from a default changes no other object."""
        CLOSED.with_defaults("Customer", {})["labels"].append("old")

        assert CLOSED.with_defaults("Customer", {})["labels"] == ["new"]


class TestWritten:
    def test_asks_for_nothing_else(self) -> None:
        """What was there before, right or wrong, does not stand in the way of other attributes."""
        stored = {"number": None, "name": "far too long", "gone": 1, "vip": True}

        for written in ([], ["vip"], ["vip", "level"]):
            CLOSED.check_written("Customer", stored, written)

    @pytest.mark.parametrize(
        ("attributes", "written", "said"),
        [
            ({"number": 0}, ["number"], "attribute 'number' is 0, but must be at least 1"),
            ({}, ["number"], "attribute 'number' is null, but must have a value"),
            ({"number": None}, ["vip", "number"], "attribute 'number' is null, but must have a value"),
            ({"labels": ["a", 5]}, ["labels"], "its member 1 is 5"),
            ({"colour": 1}, ["colour"], "attribute 'colour' is 1, but the schema has no such attribute"),
            ({}, ["colour"], "attribute 'colour' is null, but the schema has no such attribute"),
        ],
    )
    def test_that_break_a_rule(self, attributes: dict[str, Any], written: list[str], said: str) -> None:
        """Values written are asked what a new object's are; what is required is not removed."""
        with pytest.raises(ValidationFailed, match=f"^Customer 'c1': .*{said}") as caught:
            CLOSED.check_written("Customer", attributes, written, "c1")
        assert caught.value.is_mismatch == ("no such" in said)

    def test_of_an_entity_that_the_schema_does_not_have(self) -> None:
        """An update of what is not declared is a mismatch where the schema is closed."""
        with pytest.raises(ValidationFailed, match="no such entity"):
            CLOSED.check_written("Client", {}, [])
        OPEN.check_written("Client", {}, ["a"])
        OPEN.check_written("Customer", {}, ["colour"])


class TestPatches:
    @pytest.mark.parametrize(
        "patch",
        [
            Patch(),
            Patch({"number": 5, "name": None}, ("vip",)),
            Patch(increment={"number": -10, "price": Decimal("0.1"), "weight": 1.5, "any": 1}),
            Patch(increment={"price": 1, "weight": 1}),
            Patch(add={"labels": ["a"], "friends": ["c2"], "loose": [1, None], "any": [1]}),
            Patch(remove={"labels": [5], "friends": [None]}),
        ],
    )
    def test_that_may_fit(self, patch: Patch) -> None:
        """What may turn out well with some object is accepted."""
        CLOSED.check_patch("Customer", patch)

    @pytest.mark.parametrize(
        ("patch", "said"),
        [
            (Patch({"number": 0}), "attribute 'number' is 0, but must be at least 1"),
            (Patch({"number": None}), "attribute 'number' is null, but must have a value"),
            (Patch(unset=("number",)), "attribute 'number' is null, but must have a value"),
            (Patch(increment={"name": 1}), "attribute 'name' is incremented by 1, but must be a string"),
            (Patch(increment={"number": 1.5}), "attribute 'number' is incremented by 1.5, but must be an integer"),
            (Patch(increment={"price": 1.5}), "attribute 'price' is incremented by 1.5, but must be a decimal"),
            (Patch(add={"name": ["a"]}), r"attribute 'name' gets the members \['a'\], but must be a string"),
            (Patch(add={"labels": ["a", 5]}), "attribute 'labels' gets the member 5, but must be a string"),
            (Patch(add={"friends": [""]}), "attribute 'friends' gets the member '', but must be the id of an object"),
            (Patch(add={"friend": ["c2"]}), "attribute 'friend' gets the members .*, but must be the id of an object"),
            (Patch(remove={"vip": [1]}), r"attribute 'vip' loses the members \[1\], but must be true or false"),
        ],
    )
    def test_that_cannot_fit(self, patch: Patch, said: str) -> None:
        """What no object could take is refused without looking at one."""
        with pytest.raises(ValidationFailed, match=f"^Customer 'c1': {said}") as caught:
            CLOSED.check_patch("Customer", patch, "c1")
        assert not caught.value.is_mismatch

    @pytest.mark.parametrize(
        "patch",
        [
            Patch({"x": 1}),
            Patch(unset=("x",)),
            Patch(increment={"x": 1}),
            Patch(add={"x": []}),
            Patch(remove={"x": []}),
        ],
    )
    def test_of_what_the_schema_does_not_have(self, patch: Patch) -> None:
        """An attribute or entity that is not declared is a mismatch, whatever is done with it."""
        with pytest.raises(ValidationFailed, match="no such attribute") as caught:
            CLOSED.check_patch("Customer", patch)
        assert caught.value.is_mismatch
        with pytest.raises(ValidationFailed, match="no such entity"):
            CLOSED.check_patch("Client", patch)
        OPEN.check_patch("Customer", patch)
        OPEN.check_patch("Client", patch)


class TestRules:
    @pytest.mark.parametrize(
        ("schema", "expected"),
        [
            (Schema(), True),
            (Schema(open=True), False),
            (Schema([Entity("A", {})], open=True), False),
            (Schema([Entity("A", {"a": AnyValue()})], open=True), False),
            (Schema([Entity("A", {"a": AnyValue(required=True)})], open=True), True),
            (Schema([Entity("A", {"a": String()})], open=True), True),
            (Schema([Entity("A", {"a": Reference("B", on_delete="keep")})], open=True), True),
        ],
    )
    def test_are_there(self, schema: Schema, *, expected: bool) -> None:
        """A schema tells whether there is anything to check."""
        assert schema.has_rules is expected


A = attribute


class TestConstraints:
    @pytest.mark.parametrize(
        "constraint",
        [
            None,
            A("number") == 1,
            (A("number") > 1) & ~(A("name") == "x") | A("friend").exists(),
            A("number").is_in([1, None]),
            A("number") == None,  # noqa: E711 - builds a constraint
            A("name").contains("x"),
            A("labels").contains("x"),
            A("loose").contains(5),
            A("friends").contains("c1"),
            A("data") == {"a": 1},
            A("when") < datetime(2024, 1, 1, tzinfo=UTC),
            A("level").is_in(["low", "none"]),
            A("any") > 5,
            A("any").contains("x"),
            A("photo").exists(),
        ],
    )
    def test_that_make_sense(self, constraint: Constraint | None) -> None:
        """A constraint over declared attributes, with values that these may have, is accepted."""
        CLOSED.check_constraint("Customer", constraint)

    @pytest.mark.parametrize(
        ("constraint", "said"),
        [
            (A("nmae") == "x", "Customer has no attribute 'nmae'"),
            (A("nmae").exists(), "Customer has no attribute 'nmae'"),
            (~((A("number") == 1) & (A("nmae") == "x")), "Customer has no attribute 'nmae'"),
            (A("number") == "1", "Customer: attribute 'number' is an integer, which is never compared with '1'"),
            (A("number") < 1.0, "attribute 'number' is an integer, which is never compared with 1.0"),
            (A("weight") == 1, "attribute 'weight' is a float, which is never compared with 1"),
            (A("vip") == 1, "attribute 'vip' is true or false, which is never compared with 1"),
            (A("number").is_in([1, True]), "attribute 'number' is an integer, which is never compared with True"),
            (A("number").contains(1), "attribute 'number' is an integer, which contains nothing"),
            (A("name").contains(1), "attribute 'name' is a string, which is never compared with 1"),
            (A("labels").contains(1), "attribute 'labels' is a list in which each member is a string, which is never"),
            (A("friends") == "c1", "attribute 'friends' is a list of ids, which is never compared with 'c1'"),
        ],
    )
    def test_that_make_none(self, constraint: Constraint, said: str) -> None:
        """An unknown attribute, and a value of a type that the attribute never has, are told wherever they stand."""
        with pytest.raises(InvalidConstraint, match=said):
            CLOSED.check_constraint("Customer", constraint)

    def test_on_what_is_not_declared(self) -> None:
        """Only a closed schema knows that something is not there; types are known in either."""
        with pytest.raises(InvalidConstraint, match="the schema has no entity 'Client'"):
            CLOSED.check_constraint("Client", None)
        OPEN.check_constraint("Client", A("x") == 1)
        OPEN.check_constraint("Customer", A("x") == 1)
        with pytest.raises(InvalidConstraint, match="never compared"):
            OPEN.check_constraint("Customer", A("number") == "1")

    def test_with_a_value_that_is_not_known_yet(self) -> None:
        """A comparison with a claim of the principal's is asked for its attribute only."""
        CLOSED.check_constraint("Customer", A("number") == claim("region"))
        with pytest.raises(InvalidConstraint, match="no attribute 'x'"):
            CLOSED.check_constraint("Customer", A("x") == claim("region"))
