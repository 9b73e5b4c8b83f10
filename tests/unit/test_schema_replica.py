"""A replica that holds a schema: what does not fit is refused before anything is appended."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.builders import contents

from tidelog import (
    Boolean,
    Entity,
    Integer,
    InvalidConstraint,
    List,
    ObjectExists,
    ObjectNotFound,
    Reference,
    Schema,
    String,
    ValidationFailed,
    attribute,
)
from tidelog_client import Replica

CUSTOMER = {
    "name": String(required=True, max_length=5),
    "visits": Integer(default=0, minimum=0, maximum=3),
    "vip": Boolean(),
    "labels": List(String(), default=[], max_length=2),
    "friend": Reference("Customer"),
}
SCHEMA = Schema([Entity("Customer", CUSTOMER)], version=4)


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    """Give a replica with a schema and one customer."""
    with Replica(tmp_path / "a", schema=SCHEMA, durability="relaxed") as replica:
        replica.create("Customer", {"name": "Ann", "visits": 2}, "ann")
        yield replica


def refused(replica: Replica, change: Callable[[], object]) -> ValidationFailed:
    """Return what is raised; fail unless nothing was appended and nothing shown has changed."""
    before = list(replica.log()), contents(replica, "Customer")
    with pytest.raises(ValidationFailed) as caught:
        change()
    assert (list(replica.log()), contents(replica, "Customer")) == before
    return caught.value


class TestCreating:
    def test_fills_in_defaults(self, replica: Replica) -> None:
        """Defaults are part of the operation, so that the history says what the object was."""
        replica.create("Customer", {"name": "Bob"}, "bob")

        logged = list(replica.pending())[-1].operation
        assert logged.decoded_patch().set == {"name": "Bob", "visits": 0, "labels": []}
        assert logged.schema_version == 4
        assert contents(replica, "Customer")["bob"] == {"name": "Bob", "visits": 0, "labels": []}

    @pytest.mark.parametrize(
        ("entity", "attributes", "said"),
        [
            ("Customer", {}, "Customer 'x': attribute 'name' is null, but must have a value"),
            ("Customer", {"name": "Robert"}, "Customer 'x': attribute 'name' is 'Robert', but must have at most 5"),
            ("Customer", {"name": "Bob", "visits": True}, "attribute 'visits' is True, but must be an integer"),
            ("Customer", {"name": "Bob", "nmae": 1}, "attribute 'nmae' is 1, but the schema has no such attribute"),
            ("Client", {"name": "Bob"}, "Client 'x': the schema has no such entity"),
        ],
    )
    def test_what_does_not_fit(self, replica: Replica, entity: str, attributes: dict[str, Any], said: str) -> None:
        """Nothing is appended; the message names entity, object, attribute, value and rule."""
        failed = refused(replica, lambda: replica.create(entity, attributes, "x"))

        assert said in str(failed)
        assert failed.is_mismatch == ("no such" in said)


class TestUpdating:
    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ({"attributes": {"visits": -1}}, "attribute 'visits' is -1, but must be at least 0"),
            ({"attributes": {"name": None}}, "attribute 'name' is null, but must have a value"),
            ({"unset": ["name"]}, "attribute 'name' is null, but must have a value"),
            ({"increment": {"visits": 2}}, "attribute 'visits' is 4, but must be at most 3"),
            ({"increment": {"name": 1}}, "attribute 'name' is incremented by 1, but must be a string"),
            ({"add": {"labels": ["a", "b", "c"]}}, "attribute 'labels' is .*, but must have at most 2 members"),
            ({"add": {"labels": [1]}}, "attribute 'labels' gets the member 1, but must be a string"),
            ({"attributes": {"colour": "red"}}, "the schema has no such attribute"),
        ],
    )
    def test_what_does_not_fit(self, replica: Replica, how: dict[str, Any], said: str) -> None:
        """The object is asked as the update would leave it, intents included."""
        failed = refused(replica, lambda: replica.update("Customer", "ann", **how))

        assert re.match(f"Customer 'ann': .*{said}", str(failed))

    def test_what_fits(self, replica: Replica) -> None:
        """An update writes what it says, and fills in no defaults."""
        replica.update("Customer", "ann", {"vip": True}, unset=["labels"], increment={"visits": 1})

        assert contents(replica, "Customer")["ann"] == {"name": "Ann", "visits": 3, "vip": True}

    def test_what_is_not_there(self, replica: Replica) -> None:
        """An update of an unknown object is that, however well it fits."""
        with pytest.raises(ObjectNotFound):
            replica.update("Customer", "bob", {"vip": True})
        with pytest.raises(ObjectExists):
            replica.create("Customer", {"name": "Ann"}, "ann")

    def test_deleting_what_no_schema_has(self, replica: Replica) -> None:
        """An entity that the schema does not have has nothing to delete."""
        assert "no such entity" in str(refused(replica, lambda: replica.delete("Client", "x")))
        replica.delete("Customer", "ann")
        assert replica.count("Customer") == 0

    def test_after_the_object_has_changed(self, replica: Replica) -> None:
        """What fitted when it was said, and fits no longer when it is committed, is refused as a whole."""
        transaction = replica.transaction()

        def change() -> None:
            with transaction:
                transaction.create("Customer", {"name": "Bob"}, "bob")
                transaction.update("Customer", "ann", increment={"visits": 1})
                replica.update("Customer", "ann", increment={"visits": 1})

        with pytest.raises(ValidationFailed, match="attribute 'visits' is 4, but must be at most 3"):
            change()
        assert list(contents(replica, "Customer")) == ["ann"]
        assert replica.pending_count() == 2

    def test_within_a_transaction(self, replica: Replica) -> None:
        """A transaction goes on after a change that it was refused, and sees its own."""
        with replica.transaction() as transaction:
            bob = transaction.create("Customer", {"name": "Bob"})
            with pytest.raises(ValidationFailed):
                transaction.update("Customer", bob, increment={"visits": 4})
            transaction.update("Customer", bob, increment={"visits": 3})

        assert contents(replica, "Customer")[bob]["visits"] == 3


class TestHandles:
    def test_of_a_new_object(self, replica: Replica) -> None:
        """A new object has its defaults from the first, and is asked for what it lacks at the commit."""
        bob = replica.new("Customer", id="bob")
        assert (bob["visits"], bob["labels"]) == (0, [])
        assert "'name' is null" in str(refused(replica, bob.commit))
        bob["name"] = "Bob"
        bob.commit()

        assert contents(replica, "Customer")["bob"] == {"name": "Bob", "visits": 0, "labels": []}

    def test_of_a_new_object_that_does_not_fit(self, replica: Replica) -> None:
        """What can never fit is refused when the handle is made."""
        assert "'visits' is -1" in str(refused(replica, lambda: replica.new("Customer", {"visits": -1})))
        assert "no such entity" in str(refused(replica, lambda: replica.new("Client")))

    def test_refuse_a_value_when_it_is_set(self, replica: Replica) -> None:
        """The line that sets a wrong value is the one that raises, and the handle keeps what it had."""
        ann = replica.get("Customer", "ann")
        assert ann is not None

        for name, value in (("visits", "x"), ("name", None), ("colour", "red")):
            refused(replica, lambda name=name, value=value: ann.__setitem__(name, value))  # type: ignore[misc]

        assert ann.uncommitted == {}

    def test_keep_changes_that_do_not_fit_together(self, replica: Replica) -> None:
        """A commit that is refused leaves the changes in the handle, to be mended."""
        ann = replica.get("Customer", "ann")
        assert ann is not None
        ann["vip"] = True
        del ann["name"]

        assert "'name' is null" in str(refused(replica, ann.commit))
        assert ann.uncommitted == {"vip": True, "name": None}
        ann["name"] = "Anna"
        ann.commit()
        assert contents(replica, "Customer")["ann"]["name"] == "Anna"


class TestAsking:
    def test_for_what_the_schema_does_not_have(self, replica: Replica) -> None:
        """A query that can find nothing because it is misspelt is refused at once."""
        for ask in (
            lambda: replica.query("Client"),
            lambda: replica.count("Client"),
            lambda: replica.query("Customer", {"nmae": "Ann"}),
            lambda: replica.count("Customer", attribute("visits") == "2"),
            lambda: replica.query("Customer", order_by="nmae"),
            lambda: replica.query("Customer", order_by=["name", "-nmae"]),
        ):
            with pytest.raises(InvalidConstraint):
                ask()

    def test_for_what_it_has(self, replica: Replica) -> None:
        """A query over declared attributes finds what is there."""
        replica.create("Customer", {"name": "Bob"}, "bob")

        found = replica.query("Customer", attribute("visits") < 3, order_by=["-visits", "name"])

        assert [one.id for one in found] == ["ann", "bob"]
        assert replica.count("Customer", {"visits": 0}) == 1


class TestWithout:
    def test_a_schema_everything_is_accepted(self, tmp_path: Path) -> None:
        """A replica that holds no schema checks nothing, and its operations name none."""
        with Replica(tmp_path / "a") as replica:
            replica.create("Customer", {"name": 5, "colour": None}, "x")
            replica.update("Customer", "x", increment={"name": 1})
            assert contents(replica, "Customer") == {"x": {"name": 6, "colour": None}}
            assert replica.count("Nothing", {"nowhere": 1}) == 0
            assert {logged.operation.schema_version for logged in replica.log()} == {0}

    def test_a_declaration_in_an_open_schema(self, tmp_path: Path) -> None:
        """An open schema checks what it declares and accepts the rest."""
        with Replica(tmp_path / "a", schema=Schema([Entity("Customer", CUSTOMER)], open=True)) as replica:
            replica.create("Note", {"text": 1}, "n")
            replica.create("Customer", {"name": "Bob", "colour": "red"}, "bob")
            assert "'name' is 5" in str(refused(replica, lambda: replica.update("Customer", "bob", {"name": 5})))
            assert replica.count("Note", {"anything": 1}) == 0
