from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from tests.builders import references_schema

import tidelog
from tidelog import (
    AnyValue,
    Entity,
    EntityReference,
    Enumeration,
    File,
    Float,
    Integer,
    InvalidSchema,
    List,
    Map,
    Patch,
    Reference,
    Rename,
    Schema,
    String,
    ValidationFailed,
)
from tidelog import _limits as limits

# What a program sees that is not checked for types.
untyped: Any = tidelog
NAME = {"name": String()}


def shop(**options: Any) -> Schema:
    """Return a schema of customers and their orders."""
    return Schema(
        [
            Entity("Customer", {"name": String(required=True), "number": Integer()}, unique=["number"]),
            Entity(
                "Order",
                {
                    "customer": Reference("Customer", required=True, on_delete="cascade"),
                    "also": Reference("Customer", many=True, on_delete="clear"),
                    "parent": Reference("Order"),
                    "status": Enumeration(["open", "done"]),
                },
            ),
        ],
        **options,
    )


class TestReferences:
    def test_of_an_entity(self) -> None:
        """A schema names the references of its entities; an entity that it does not name has none."""
        schema = shop()

        assert schema.references("Order") == (
            EntityReference("customer", "Customer", False, "cascade", True),
            EntityReference("also", "Customer", True, "clear", False),
            EntityReference("parent", "Order", False, "restrict", False),
        )
        assert schema.entities["Order"].references == schema.references("Order")
        assert schema.references("Customer") == schema.references("Nothing") == ()
        assert schema.has_references
        assert not Schema([Entity("Note", NAME)]).has_references

    def test_to_an_entity(self) -> None:
        """A schema tells who refers to an entity, and by which attribute."""
        customer, also, parent = shop().references("Order")

        assert shop().referrers("Customer") == (("Order", customer), ("Order", also))
        assert shop().referrers("Order") == (("Order", parent),)
        assert shop().referrers("Nothing") == ()

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
        schema = references_schema({"Line": {"order": "Order", "item": "Item"}})

        assert list(schema.referenced("Line", attributes)) == expected
        assert list(schema.referenced("Note", attributes)) == []


class TestLookingUp:
    def test_an_entity(self) -> None:
        """An entity is found by its name, with its attributes, unique sets and indexes."""
        entity = Entity("A", {"a": String(), "b": Integer()}, unique=["a", ("a", "b")], indexes=["b"])
        schema = Schema([entity])

        assert schema.entity("A") is schema.entities["A"] is entity
        assert schema.entity("B") is None
        assert list(entity.attributes) == ["a", "b"]
        assert entity.unique == (("a",), ("a", "b"))
        assert entity.indexes == ("b",)
        assert (repr(entity), repr(schema)) == ("<Entity A: a, b>", "<Schema version 1: A>")

    def test_does_not_change(self) -> None:
        """What a schema was made from may change; the schema does not."""
        attributes = dict(NAME)
        entities = [Entity("A", attributes)]
        schema = Schema(entities)

        attributes["other"] = String()
        entities.clear()

        assert list(schema.entities["A"].attributes) == ["name"]
        with pytest.raises(TypeError):
            schema.entities["B"] = Entity("B", {})  # type: ignore[index]


class TestMaking:
    @pytest.mark.parametrize("name", ["", "x" * 65, "a\0", "\ud800", 5, None])
    def test_with_a_name_that_nothing_can_have(self, name: Any) -> None:
        """A name that no entity or attribute can have is an InvalidSchema."""
        for make in (
            lambda: Entity(name, {}),
            lambda: Entity("A", {name: String()}),
            lambda: Reference(name),
            lambda: Rename(version=1, entity=name, to="A"),
            lambda: Rename(version=1, entity="A", to=name),
            lambda: Rename(version=1, entity="A", attribute=name or "", to="a"),
            lambda: Rename(version=1, entity="A", attribute="a", to=name),
        ):
            with pytest.raises(InvalidSchema):
                make()

    @pytest.mark.parametrize("version", [0, -1, 2**63, 1.0, True, "1", None])
    def test_with_a_version_that_cannot_be(self, version: Any) -> None:
        """Versions are integers from 1."""
        with pytest.raises(InvalidSchema, match="version"):
            Schema(version=version)

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: untyped.Schema(["Line"]), "'Line' is among the entities, but is no Entity"),
            (lambda: untyped.Schema({"Line": {"order": "Order"}}), "no Entity"),
            (lambda: untyped.Schema(open=1), "open is 1"),
            (lambda: Schema([Entity("A", {}), Entity("A", NAME)]), "entity 'A' stands twice"),
            (lambda: untyped.Entity("A", {"a": String}), "A: attribute 'a' is"),
            (lambda: untyped.Entity("A", {"a": None}), "A: attribute 'a' is null"),
            (lambda: untyped.Entity("A", None), "A: attributes are declared by name, as in a dict, got null"),
            (lambda: untyped.Entity("A", ["a"]), "A: attributes are declared by name"),
            (lambda: untyped.Entity(None, {}), "an entity name"),
            (lambda: untyped.Entity("A", {5: String()}), "an attribute name"),
            (lambda: untyped.Entity("A", NAME, unique="name"), "A: the unique sets must be a list, got 'name'"),
            (lambda: untyped.Entity("A", NAME, unique=5), "A: the unique sets must be a list, got 5"),
            (lambda: untyped.Entity("A", NAME, unique=[5]), "A: a unique set must be a list, got 5"),
            (lambda: untyped.Entity("A", NAME, unique=[[["name"]]]), r"A: a unique set names \['name'\]"),
            (lambda: untyped.Entity("A", NAME, indexes="name"), "A: the indexes must be a list, got 'name'"),
            (lambda: untyped.Entity("A", NAME, indexes=None), "A: the indexes must be a list, got null"),
            (lambda: untyped.Schema(Entity("A", NAME)), "the entities of a schema are a list, got <Entity A: name>"),
            (lambda: untyped.Schema([], renames=5), "renames are a list, got 5"),
            (lambda: untyped.Schema([], renames=["a"]), "'a' is among the renames, but is no Rename"),
            (lambda: Schema([Entity("A", {"b": Reference("B")})]), "A: attribute 'b' refers to 'B', which is none"),
        ],
    )
    def test_from_what_makes_no_schema(self, make: Any, said: str) -> None:
        """What contradicts itself is refused when it is made, with the entity and attribute in the message."""
        with pytest.raises(InvalidSchema, match=said):
            make()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"unique": [()]}, "A: a unique set without attributes"),
            ({"unique": [("s", "s")]}, "A: a unique set names an attribute twice: s, s"),
            ({"unique": ["s", ("s",)]}, "A: the same unique set stands twice"),
            ({"unique": [("s", "i"), ("i", "s")]}, "A: the same unique set stands twice"),
            ({"unique": [("s", "x")]}, "A: a unique set names 'x', which is none of the attributes"),
            ({"unique": ["f"]}, "A: a unique set names 'f', but nothing is looked up by a value that is a float"),
            ({"unique": ["l"]}, "that is a list"),
            ({"unique": ["m"]}, "that is a map"),
            ({"unique": ["file"]}, "that is a file"),
            ({"unique": ["any"]}, "that is any value"),
            ({"unique": ["many"]}, "that is a list of ids"),
            ({"indexes": ["x"]}, "A: an index names 'x', which is none of the attributes"),
            ({"indexes": ["l"]}, "A: an index names 'l', but nothing is looked up by a value that is a list"),
            ({"indexes": ["many"]}, "that is a list of ids"),
            ({"indexes": ["s", "s"]}, "A: an index names an attribute twice"),
        ],
    )
    def test_with_what_cannot_be_looked_up(self, options: dict[str, Any], said: str) -> None:
        """Unique sets and indexes are of declared attributes whose values are looked up as a whole."""
        attributes = {
            "s": String(), "i": Integer(), "f": Float(), "l": List(), "m": Map(), "file": File(), "any": AnyValue(),
            "one": Reference("A"), "many": Reference("A", many=True),
        }  # fmt: skip
        Entity("A", attributes, unique=["s", ("i", "one")], indexes=["f", "one"])

        with pytest.raises(InvalidSchema, match=said):
            Entity("A", attributes, **options)

    @pytest.mark.parametrize(
        ("references", "circle"),
        [
            ({"A": "A"}, {"A"}),
            ({"A": "B", "B": "A"}, {"A", "B"}),
            ({"A": "B", "B": "C", "C": "D", "D": "B"}, {"B", "C", "D"}),
        ],
    )
    def test_with_required_references_in_a_circle(self, references: dict[str, str], circle: set[str]) -> None:
        """Objects that can only be created after each other are refused; what need not be there breaks the circle."""
        with pytest.raises(InvalidSchema, match="circle") as caught:
            Schema([Entity(name, {"r": Reference(target, required=True)}) for name, target in references.items()])

        told = str(caught.value).split(": ")[1].split(" -> ")
        assert set(told) == circle
        assert told[0] == told[-1]
        assert all(references[one] == other for one, other in pairwise(told))
        for breaks in (Reference("A"), Reference("A", required=True, many=True)):
            Schema([Entity("A", {"b": Reference("B", required=True)}), Entity("B", {"a": breaks})])

    def test_beyond_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Entities, attributes and renames are counted, and the whole has a size."""
        many = [Entity(f"E{n}", {}) for n in range(limits.SCHEMA_ENTITIES_MAX + 1)]
        Schema(many[1:])
        with pytest.raises(InvalidSchema, match="1001 entities: the limit is 1000"):
            Schema(many)
        attributes = {f"a{n}": String() for n in range(limits.ENTITY_ATTRIBUTES_MAX + 1)}
        with pytest.raises(InvalidSchema, match="A has 1001 attributes: the limit is 1000"):
            Entity("A", attributes)
        renames = [Rename(version=1, entity=f"Old{n}", to="A") for n in range(limits.SCHEMA_RENAMES_MAX + 1)]
        with pytest.raises(InvalidSchema, match="1001 renames: the limit is 1000"):
            Schema([Entity("A", {})], renames=renames)
        large = [Entity(f"E{n}", {"a": Enumeration([f"{n:04}{'x' * 1000}" for n in range(1_000)])}) for n in range(2)]
        with pytest.raises(InvalidSchema, match="bytes: the limit is 1048576"):
            Schema(large)


class TestEquality:
    def test_is_of_what_is_said(self) -> None:
        """Two schemas are equal, and share a fingerprint, if they say the same."""
        one, same = shop(version=2), shop(version=2)

        assert one == same
        assert hash(one) == hash(same)
        assert one.fingerprint == same.fingerprint
        assert len(one.fingerprint) == 32
        assert one != "a schema"

    @pytest.mark.parametrize(
        "other",
        [
            shop(),
            shop(version=3),
            shop(version=2, open=True),
            shop(version=2, renames=[Rename(version=2, entity="Client", to="Customer")]),
            Schema([Entity("Customer", NAME)], version=2),
            Schema(version=2),
        ],
    )
    def test_is_not_of_what_differs(self, other: Schema) -> None:
        """Any difference counts."""
        assert shop(version=2) != other
        assert shop(version=2).fingerprint != other.fingerprint

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (Integer(minimum=1), Integer(minimum=2)),
            (Integer(default=1), Float(default=1.0)),
            (String(), String(required=True)),
            (Enumeration(["a", "b"]), Enumeration(["b", "a"])),
            (Reference("A"), Reference("A", many=True)),
            (Reference("A"), Reference("A", on_delete="keep")),
            (List(), List(String())),
        ],
    )
    def test_is_not_of_attributes_that_differ(self, one: Any, other: Any) -> None:
        """Any difference in an attribute counts."""
        assert Schema([Entity("A", {"a": one})]) != Schema([Entity("A", {"a": other})])

    def test_does_not_hang_on_the_order(self) -> None:
        """The order of entities and attributes says nothing, nor does how a word came to be."""
        one = Schema([Entity("A", {"a": String(), "b": String()}), Entity("B", {})])
        other = Schema([Entity("B", {}), Entity("A", {"b": String(), "a": String()})])
        behaviour: Any = b"restrict".decode()

        assert one == other
        assert Schema([Entity("A", {"a": Reference("A", on_delete=behaviour)})]) == Schema(
            [Entity("A", {"a": Reference("A")})]
        )


class TestUpcasting:
    # Version 2 renamed Job to WorkOrder; version 3 its state to phase; version 4 phase to status.
    SCHEMA = Schema(
        [Entity("WorkOrder", {"status": String(), "n": Integer(), "tags": List()}), Entity("Note", NAME)],
        version=4,
        renames=[
            Rename(version=4, entity="WorkOrder", attribute="phase", to="status"),
            Rename(version=3, entity="WorkOrder", attribute="state", to="phase"),
            Rename(version=2, entity="Job", to="WorkOrder"),
            Rename(version=1, entity="Job", attribute="count", to="n"),
        ],
    )

    @pytest.mark.parametrize(
        ("entity", "old", "version", "expected"),
        [
            ("Job", "state", 1, ("WorkOrder", "status")),
            ("WorkOrder", "state", 2, ("WorkOrder", "status")),
            ("WorkOrder", "phase", 3, ("WorkOrder", "status")),
            ("Job", "state", 0, ("WorkOrder", "status")),
            ("WorkOrder", "state", 0, ("WorkOrder", "status")),
            ("WorkOrder", "status", 0, ("WorkOrder", "status")),
            ("Job", "count", 0, ("WorkOrder", "n")),
            ("Job", "count", 1, ("WorkOrder", "count")),
            ("Job", "other", 1, ("WorkOrder", "other")),
            ("Job", "state", 2, ("Job", "state")),
            ("WorkOrder", "state", 3, ("WorkOrder", "state")),
            ("WorkOrder", "phase", 4, ("WorkOrder", "phase")),
            ("WorkOrder", "phase", 9, ("WorkOrder", "phase")),
            ("Note", "state", 1, ("Note", "state")),
        ],
    )
    def test_knows_which_names_an_author_used(
        self, entity: str, old: str, version: int, expected: tuple[str, str]
    ) -> None:
        """Each rename is news to authors of older versions only, one after the other."""
        name, patch = self.SCHEMA.upcast(entity, Patch({old: "x"}), version)

        assert (name, patch) == (expected[0], Patch({expected[1]: "x"}))

    def test_renames_in_each_part_of_a_patch(self) -> None:
        """Whatever a patch does with an attribute is done with the one of the new name."""
        renames = [Rename(version=2, entity="A", attribute=old, to=old.upper()) for old in "stuv"]
        schema = Schema([Entity("A", {name: AnyValue() for name in "STUVx"})], version=2, renames=renames)
        patch = Patch({"s": 1, "x": 2}, ("t",), {"u": 3}, {"v": [4]}, {})

        assert schema.upcast("A", patch, 1)[1] == Patch({"S": 1, "x": 2}, ("T",), {"U": 3}, {"V": [4]}, {})
        assert schema.upcast("A", Patch(remove={"v": [4]}), 1)[1] == Patch(remove={"V": [4]})

    @pytest.mark.parametrize("version", [0, 1, 4])
    def test_leaves_what_is_as_it_is(self, version: int) -> None:
        """Where nothing changes the same objects come back."""
        entity, patch = "WorkOrder", Patch({"status": "x"})

        name, same = self.SCHEMA.upcast(entity, patch, version)

        assert name is entity
        assert same is patch
        assert Schema(open=True).upcast(entity, patch, version)[1] is patch

    def test_refuses_both_names_at_once(self) -> None:
        """What an author says twice cannot be read: neither value is wiped, the operation is refused."""
        for patch in (
            Patch({"state": "x", "status": "y"}),
            Patch({"status": "y", "state": "x"}),
            Patch({"status": "y"}, ("state",)),
            Patch({"state": "y", "phase": "z"}),
        ):
            with pytest.raises(ValidationFailed, match=r"'status' is .*former name '(state|phase)'") as caught:
                self.SCHEMA.upcast("Job", patch, 1, "j1")
            assert caught.value.is_mismatch
            assert (caught.value.entity, caught.value.id, caught.value.attribute) == ("WorkOrder", "j1", "status")

    def test_a_name_that_is_used_again(self) -> None:
        """A name that was given up and later got another meaning has that of its author's version."""
        schema = Schema(
            [Entity("A", {"text": String(), "name": String()})],
            version=3,
            renames=[Rename(version=2, entity="A", attribute="name", to="text")],
        )

        assert schema.upcast("A", Patch({"name": "x"}), 1)[1].set == {"text": "x"}
        assert schema.upcast("A", Patch({"name": "x"}), 3)[1].set == {"name": "x"}
        assert schema.upcast("A", Patch({"name": "x"}), 0)[1].set == {"name": "x"}

    @pytest.mark.parametrize(
        ("renames", "said"),
        [
            ([(4, "A", "old", "a")], "the rename of A.old to a in version 4: the schema has version 3"),
            ([(3, "A", "old", "x")], "the schema has no attribute of A named 'x'"),
            ([(3, "X", "old", "a")], "the schema has no entity 'X'"),
            ([(3, "Old", None, "X")], "the schema has no entity named 'X'"),
            ([(3, "A", "b", "a")], "the schema still has an attribute of A named 'b'"),
            ([(3, "B", None, "A")], "the schema still has an entity named 'B'"),
            ([(2, "A", "o", "a"), (2, "A", "p", "a")], "another name became that one"),
            ([(2, "A", "o", "a"), (2, "A", "o", "b")], "given up twice"),
            ([(2, "A", "o", "p"), (2, "A", "p", "a")], "'p' is the new name of another rename of this version"),
            ([(2, "O", None, "P"), (2, "P", None, "A")], "'P' is the new name of another rename"),
        ],
    )
    def test_with_renames_that_lead_nowhere(self, renames: list[Any], said: str) -> None:
        """A rename leads to what is declared, in a version that is there, and can be told from others."""
        made = [
            Rename(version=version, entity=entity, attribute=attribute, to=to)
            for version, entity, attribute, to in renames
        ]
        with pytest.raises(InvalidSchema, match=said):
            Schema([Entity("A", {"a": String(), "b": String()}), Entity("B", {})], version=3, renames=made)

    def test_a_rename_that_is_none(self) -> None:
        """A rename names a version from 1 and two names."""
        with pytest.raises(InvalidSchema, match="start at 1, got 0"):
            Rename(version=0, entity="A", to="B")
        with pytest.raises(InvalidSchema, match="it had that name before"):
            Rename(version=1, entity="A", attribute="a", to="a")
        Rename(version=1, entity="A", attribute="a", to="A")

    def test_in_an_open_schema(self) -> None:
        """Where everything is accepted, names may be given up that nothing declares."""
        schema = Schema(
            open=True,
            version=2,
            renames=[Rename(version=2, entity="A", to="B"), Rename(version=2, entity="B", attribute="a", to="b")],
        )

        assert schema.upcast("A", Patch({"a": 1}), 1) == ("B", Patch({"b": 1}))
