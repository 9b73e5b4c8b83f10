"""The rules of an application, as the engine holds them: access, schema, conflicts, references, unique values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, ClassVar

import pytest
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TIME_US,
    Lab,
    create,
    group,
    make_operation,
    said,
)
from tests.builders import delete as make_delete
from tests.builders import update as make_update

from tidelog import (
    DecimalNumber,
    Entity,
    Enumeration,
    Integer,
    InvalidRule,
    InvalidSchema,
    List,
    Patch,
    Reference,
    Rename,
    Schema,
    String,
    attribute,
    claim,
)
from tidelog_server import Application, HookContext, HookObject, Principal, Reject, TransientError

ANN = Principal("ann", roles=frozenset({"technician"}), claims={"region": "north"})
BOB = Principal("bob", roles=frozenset({"technician"}), claims={"region": "south"})
DISPATCHER = Principal("dora", roles=frozenset({"dispatcher"}))

SHOP = Schema(
    [
        Entity(
            "Customer", {"number": Integer(required=True, minimum=1), "name": String(max_length=10)}, unique=["number"]
        ),
        Entity(
            "Order",
            {
                "customer": Reference("Customer", required=True),
                "status": Enumeration(["open", "done"], default="open"),
                "owner": String(),
                "note": String(),
                "secret": String(),
                "tags": List(String()),
                "count": Integer(),
            },
            indexes=["owner"],
        ),
        Entity(
            "Line", {"order": Reference("Order", on_delete="cascade"), "also": Reference("Order", on_delete="clear")}
        ),
        Entity("Part", {"lines": Reference("Line", many=True, on_delete="clear")}),
    ],
    version=2,
    renames=[
        Rename(version=2, entity="Order", attribute="state", to="status"),
        Rename(version=2, entity="Sale", to="Order"),
    ],
)


def shop(**options: Any) -> Lab:
    """Return a lab with the shop's schema, a customer c1 and an order o1."""
    lab = Lab(Application(schema=SHOP, **options))
    lab.settle(customer(1), order(2), replica=REPLICA_B)
    return lab


def customer(seq: int, id: str = "c1", number: int = 1, schema_version: int = 0) -> bytes:  # noqa: A002 - the glossary's word
    """Return the creation of a customer."""
    return create(seq, id, {"number": number}, entity="Customer", schema_version=schema_version)


def order(seq: int, id: str = "o1", customer: str = "c1", **others: Any) -> bytes:  # noqa: A002
    """Return the creation of an order."""
    return create(seq, id, {"customer": customer, **others}, entity="Order")


def update(seq: int, id: str, set: dict[str, Any] | None = None, *, base_version: int = 1_000, **others: Any) -> bytes:  # noqa: A002
    """Return an update by an author who has seen everything, unless told otherwise."""
    return make_update(seq, id, set, base_version=base_version, **others)


def delete(seq: int, id: str, *, base_version: int = 1_000, **others: Any) -> bytes:  # noqa: A002
    """Return a deletion by an author who has seen everything, unless told otherwise."""
    return make_delete(seq, id, base_version=base_version, **others)


def line(seq: int, id: str = "l1", **others: Any) -> bytes:  # noqa: A002
    """Return the creation of a line."""
    return create(seq, id, others or {"order": "o1"}, entity="Line")


def settle(lab: Lab, principal: Principal, *operations: bytes, replica: bytes = REPLICA_A) -> list[str]:
    """Upload as somebody; return what became of the operations."""
    return said(lab.session(replica, principal=principal).settle(*operations))


class TestValidation:
    def test_a_value_that_breaks_a_rule_is_refused_and_named(self) -> None:
        """The refusal names entity, id, attribute, value and rule; nothing is written."""
        lab = shop()

        [result] = lab.settle(customer(1, "c9", number=-3))

        assert said([result]) == ["VALIDATION_FAILED"]
        assert all(part in result.message for part in ("Customer", "'c9'", "'number'", "-3", "1")), result.message
        assert lab.attributes("c9", "Customer") is None

    @pytest.mark.parametrize(
        "operation",
        [create(1, "x", {"a": 1}, entity="Ghost"), update(1, "o1", {"colour": "red"}, entity="Order")],
        ids=["entity", "attribute"],
    )
    def test_what_the_schema_does_not_have_is_a_mismatch(self, operation: bytes) -> None:
        """An unknown entity or attribute is SCHEMA_MISMATCH."""
        assert said(shop().settle(operation)) == ["SCHEMA_MISMATCH"]

    def test_a_rule_that_an_older_author_could_not_know_is_a_mismatch(self) -> None:
        """An operation of an older schema version that breaks a rule is SCHEMA_MISMATCH, with its payload kept."""
        lab = shop()

        [result] = lab.settle(customer(1, "c9", number=0, schema_version=1))

        assert said([result]) == ["SCHEMA_MISMATCH"]
        assert lab.failure(result).operation == customer(1, "c9", number=0, schema_version=1)

    def test_former_names_are_read_as_the_present_ones(self) -> None:
        """Renamed entities and attributes of an older author are applied, and the author's replica gets the result."""
        lab = shop()

        results = lab.settle(
            make_operation(
                "create", entity="Sale", id="o2", set={"customer": "c1", "state": "done"}, schema_version=1
            ).encode()
        )

        assert said(results) == ["APPLIED"]
        assert results[0].changed_by_server
        assert lab.attributes("o2", "Order") == {"customer": "c1", "status": "done"}
        state = lab.state("o2", "Order")
        assert state is not None
        assert not state.sole_writer

    def test_a_former_name_of_a_present_author_is_a_mismatch(self) -> None:
        """Who has the present schema cannot use a name that it has given up."""
        assert said(shop().settle(update(1, "o1", {"state": "done"}, entity="Order", schema_version=2))) == [
            "SCHEMA_MISMATCH"
        ]

    def test_defaults_are_filled_in(self) -> None:
        """A creation without a value gets the default, and its replica is told."""
        lab = shop()

        [result] = lab.settle(order(1, "o2"))

        assert result.changed_by_server
        assert lab.attributes("o2", "Order") == {"customer": "c1", "status": "open"}

    def test_an_intent_is_judged_by_what_results(self) -> None:
        """An increment that leads out of the range is refused."""
        lab = shop()

        results = lab.settle(update(1, "c1", entity="Customer", increment={"number": -1}))

        assert said(results) == ["VALIDATION_FAILED"]

    def test_a_hook_cannot_break_the_schema(self) -> None:
        """What a hook makes of an object is checked too."""
        lab = shop()

        @lab.application.before_commit("Order")
        def spoils(thing: HookObject, context: HookContext) -> None:
            thing["status"] = "lost"

        assert said(lab.settle(order(1, "o2"))) == ["VALIDATION_FAILED"]
        assert lab.attributes("o2", "Order") is None


class TestAccess:
    def test_without_rules_everything_is_allowed(self) -> None:
        """An application without access rules refuses nobody."""
        assert settle(shop(), ANN, update(1, "o1", {"note": "x"}, entity="Order")) == ["APPLIED"]

    def test_the_first_rule_denies_what_none_grants(self) -> None:
        """With a rule for somebody else, an object is as if it were not there."""
        lab = shop()
        lab.application.allow("dispatcher", "*", create=True, delete=True, write="*")

        assert settle(
            lab, ANN, update(1, "o1", {"note": "x"}, entity="Order"), delete(2, "o1", entity="Order"), order(3, "o2")
        ) == ["OBJECT_GONE", "OBJECT_GONE", "ACCESS_DENIED"]
        assert lab.attributes("o1", "Order") == {"customer": "c1", "status": "open"}

    def test_an_unseen_object_is_told_from_an_absent_one_by_nothing(self) -> None:
        """The refusal of an update of a hidden object has the words of one that never was."""
        lab = shop()
        lab.application.allow("technician", "Order", write="*", where={"owner": "ann"})

        results = lab.session(principal=ANN).settle(
            update(1, "o1", {"note": "x"}, entity="Order"), update(2, "o7", {"note": "x"}, entity="Order")
        )

        assert said(results) == ["OBJECT_GONE", "OBJECT_GONE"]
        assert results[0].message.replace("o1", "o7") == results[1].message

    def test_a_deleted_unseen_object_is_no_secret_given_away(self) -> None:
        """Deleting what was deleted is applied only for those who could have known it."""
        lab = shop()
        lab.application.allow("technician", "Order", delete=True, where={"owner": "ann"})
        lab.application.allow("dispatcher", "*", delete=True)
        assert settle(lab, DISPATCHER, delete(1, "o1", entity="Order")) == ["APPLIED"]

        assert settle(lab, ANN, delete(1, "o1", entity="Order"), replica=b"c" * 16) == ["OBJECT_GONE"]
        assert settle(lab, DISPATCHER, delete(2, "o1", entity="Order")) == ["APPLIED"]

    def test_who_may_not_delete_what_he_sees(self) -> None:
        """The right to see and to write an object is none to delete it."""
        lab = shop()
        lab.application.allow("technician", "Order", create=True, write="*")

        assert settle(lab, ANN, delete(1, "o1", entity="Order")) == ["ACCESS_DENIED"]
        assert lab.attributes("o1", "Order") == {"customer": "c1", "status": "open"}

    def test_attributes_are_granted_one_by_one(self) -> None:
        """Writing an attribute that no rule grants is ATTRIBUTE_DENIED, and names it."""
        lab = shop()
        lab.application.allow("technician", "Order", write=["note"])

        results = lab.session(principal=ANN).settle(
            update(1, "o1", {"note": "x"}, entity="Order"),
            update(2, "o1", {"note": "y", "status": "done"}, entity="Order"),
            update(3, "o1", unset=["status"], entity="Order"),
            update(4, "o1", entity="Order", increment={"count": 1}),
        )

        assert said(results) == ["APPLIED", *["ATTRIBUTE_DENIED"] * 3]
        assert "'status'" in results[1].message
        assert lab.attributes("o1", "Order") == {"customer": "c1", "status": "open", "note": "x"}

    def test_rules_of_several_roles_add_up(self) -> None:
        """What one role may not, another role of the same user may."""
        lab = shop()
        lab.application.allow("technician", "Order", write=["note"])
        lab.application.allow("clerk", "Order", write=["status"])
        both = Principal("ann", roles=frozenset({"technician", "clerk"}))

        assert settle(lab, both, update(1, "o1", {"note": "y", "status": "done"}, entity="Order")) == ["APPLIED"]

    def test_rows_before_and_after(self) -> None:
        """A constraint with a claim binds the object before the change, and after it unless `check` says otherwise."""
        lab = shop()
        lab.application.allow("technician", "Order", write="*", where=attribute("owner") == claim("user_id"))
        lab.application.allow("dispatcher", "*", create=True, write="*")
        lab.application.allow("technician", "Customer")
        assert settle(lab, DISPATCHER, update(1, "o1", {"owner": "ann"}, entity="Order")) == ["APPLIED"]

        assert settle(lab, ANN, update(1, "o1", {"note": "x"}, entity="Order"), replica=b"c" * 16) == ["APPLIED"]
        assert settle(lab, BOB, update(1, "o1", {"note": "x"}, entity="Order"), replica=b"d" * 16) == ["OBJECT_GONE"]
        assert settle(lab, ANN, update(2, "o1", {"owner": "bob"}, entity="Order"), replica=b"c" * 16) == [
            "ACCESS_DENIED"
        ]

        lab.application.allow(
            "technician", "Order", write=["owner"], where=attribute("owner") == claim("user_id"), check={}
        )
        assert settle(lab, ANN, update(3, "o1", {"owner": "bob"}, entity="Order"), replica=b"c" * 16) == ["APPLIED"]

    def test_a_creation_must_be_within_the_rule(self) -> None:
        """A creation needs a rule that lets create, accepts the result and grants each attribute."""
        lab = shop()
        lab.application.allow("technician", "Customer")
        lab.application.allow(
            "technician",
            "Order",
            create=True,
            write=["customer", "owner"],
            where=attribute("owner") == claim("user_id"),
        )

        assert settle(
            lab,
            ANN,
            order(1, "o2", owner="ann"),
            order(2, "o3", owner="bob"),
            order(3, "o4", owner="ann", note="x"),
        ) == ["APPLIED", "ACCESS_DENIED", "ATTRIBUTE_DENIED"]

    def test_a_missing_claim_grants_nothing(self) -> None:
        """A rule whose constraint names a claim that the caller lacks does not apply, not even under a `not`."""
        lab = shop()
        lab.application.allow("technician", "Order", write="*", where=~(attribute("owner") == claim("team")))

        assert settle(lab, ANN, update(1, "o1", {"note": "x"}, entity="Order")) == ["OBJECT_GONE"]

    def test_who_does_not_see_an_object_cannot_refer_to_it(self) -> None:
        """A new reference to a hidden object dangles; one that is there already may stay."""
        lab = shop()
        lab.application.allow("technician", "Order", write="*", create=True)

        assert settle(lab, ANN, update(1, "o1", {"customer": "c1", "note": "x"}, entity="Order"), order(2, "o2")) == [
            "APPLIED",
            "DANGLING_REFERENCE",
        ]

    def test_a_hidden_reference_cannot_be_guessed(self) -> None:
        """Who may write a reference but not read it is not told whether a guess is what it is."""
        lab = shop()
        lab.settle(customer(1, "c2", number=2))
        lab.application.allow("technician", "Order", read=["note"], write=["customer"])

        results = lab.session(b"c" * 16, principal=ANN).settle(
            update(1, "o1", {"customer": "c1"}, entity="Order"), update(2, "o1", {"customer": "c2"}, entity="Order")
        )

        assert said(results) == ["DANGLING_REFERENCE"] * 2

    def test_hidden_members_of_a_list_stay_and_are_not_told(self) -> None:
        """Adding to and removing from a list of references judges what the author names, not what is there."""
        schema = Schema(
            [
                Entity("Person", {"is_public": Integer()}),
                Entity("Team", {"name": String(), "members": Reference("Person", many=True, on_delete="clear")}),
            ]
        )
        lab = Lab(Application(schema=schema))
        lab.settle(
            create(1, "SECRET", {}, entity="Person"),
            create(2, "open", {"is_public": 1}, entity="Person"),
            create(3, "t1", {"members": ["SECRET"]}, entity="Team"),
        )
        lab.application.allow("technician", "Team", read=["name"], write=["members"])
        lab.application.allow("technician", "Person", where={"is_public": 1})

        results = lab.session(b"c" * 16, principal=ANN).settle(
            update(1, "t1", entity="Team", add={"members": ["open"]}),
            update(2, "t1", entity="Team", remove={"members": ["nobody"]}),
            update(3, "t1", entity="Team", add={"members": ["SECRET"]}),
            update(4, "t1", entity="Team", add={"members": ["nowhere"]}),
        )

        assert said(results) == ["APPLIED", "APPLIED", "DANGLING_REFERENCE", "DANGLING_REFERENCE"]
        assert results[2].message.replace("SECRET", "nowhere") == results[3].message
        assert lab.attributes("t1", "Team") == {"members": ["SECRET", "open"]}

    def test_hooks_have_the_rights_of_the_system(self) -> None:
        """What a hook writes needs no rule."""
        lab = shop()
        lab.application.allow("technician", "Order", write=["note"])

        @lab.application.after_commit("Order")
        def counts(thing: HookObject, context: HookContext) -> None:
            context.update("Customer", "c1", {"name": "counted"})

        assert settle(lab, ANN, update(1, "o1", {"note": "x"}, entity="Order")) == ["APPLIED"]
        assert lab.attributes("c1", "Customer") == {"number": 1, "name": "counted"}

    def test_a_refusal_says_nothing_of_what_may_not_be_read(self) -> None:
        """Intents on attributes that their author may not read are refused without quoting the value."""
        lab = shop()
        lab.application.allow("technician", "Order", read=["note"], write=["note", "count", "secret"])
        lab.application.allow("technician", "Customer", read=["name"], write=["number"])
        lab.application.allow("dispatcher", "*", write="*")
        assert settle(
            lab, DISPATCHER, update(1, "o1", {"secret": "moonlight", "owner": "moonlight"}, entity="Order")
        ) == ["APPLIED"]

        results = lab.session(b"c" * 16, principal=ANN).settle(
            update(1, "o1", entity="Order", increment={"secret": 1}),
            update(2, "o1", entity="Order", add={"owner": ["x"]}),
            update(3, "c1", entity="Customer", increment={"number": -777}),
        )

        assert said(results) == ["VALIDATION_FAILED", "ATTRIBUTE_DENIED", "VALIDATION_FAILED"]
        assert not any(secret in result.message for result in results for secret in ("moonlight", "776"))

    def test_who_may_not_create_is_told_nothing_of_what_is_there(self) -> None:
        """Without the right to create, an id that is taken and one that is free get the same answer."""
        lab = shop()
        lab.application.allow("technician", "Order", where={"owner": "ann"})

        results = lab.session(principal=ANN).settle(order(1, "o1"), order(2, "o7"))

        assert said(results) == ["ACCESS_DENIED", "ACCESS_DENIED"]
        assert results[0].message.replace("o1", "o7") == results[1].message

    def test_what_depends_on_a_refused_creation_is_told_nothing_of_what_is_there(self) -> None:
        """After a refused creation an update names that refusal, whether a hidden object has the id or not."""
        lab = shop()
        lab.application.allow("technician", "Order", create=True, write="*", where={"owner": "ann"})
        lab.application.allow("technician", "Customer")

        def attempt(id: str, seq: int) -> list[str]:  # noqa: A002 - the glossary's word
            members = [
                make_operation(seq=seq, entity="Order", id="bad", set={"customer": "c1", "owner": "bob"}),
                make_operation(seq=seq + 1, entity="Order", id=id, set={"customer": "c1", "owner": "ann"}),
            ]
            late = update(seq + 2, id, {"note": "x"}, entity="Order")
            return settle(lab, ANN, *group(*members), late, replica=b"c" * 16)

        assert attempt("o1", 1) == attempt("o7", 10) == ["ACCESS_DENIED", "GROUP_REJECTED", "DEPENDENCY_FAILED"]

    def test_what_was_created_after_all_is_not_held_against_a_refusal(self) -> None:
        """An edit of an object that its author created, and does not see, names no earlier refusal as its cause."""
        lab = shop()
        lab.application.allow("technician", "Order", create=True, write="*", where={"owner": "ann"}, check={})
        lab.application.allow("technician", "Customer")

        said_of = settle(
            lab,
            ANN,
            order(1, "o7", owner="ann", customer="nobody"),
            order(2, "o7", owner="bob"),
            update(3, "o7", {"note": "x"}, entity="Order"),
            replica=b"c" * 16,
        )

        assert said_of == ["DANGLING_REFERENCE", "APPLIED", "OBJECT_GONE"]

    @pytest.mark.parametrize("seen", [True, False])
    def test_a_refusal_names_no_hidden_object(self, seen: bool) -> None:  # noqa: FBT001 - a case
        """What hooks and deletion rules meet on their way is named to those who may know of it only."""
        schema = Schema(
            [
                Entity("Order", {}),
                Entity("Line", {"order": Reference("Order", on_delete="cascade")}),
                Entity("Ship", {"line": Reference("Line")}),
                Entity("Stock", {"level": Integer(minimum=0)}, unique=["level"]),
            ]
        )
        lab = Lab(Application(schema=schema))
        lab.settle(
            create(1, "o1", {}, entity="Order"),
            create(2, "o2", {}, entity="Order"),
            create(3, "SECRET-1", {"order": "o1"}, entity="Line"),
            create(4, "SECRET-2", {"line": "SECRET-1"}, entity="Ship"),
            create(5, "SECRET-3", {"level": 0}, entity="Stock"),
        )
        lab.application.allow("technician", "*" if seen else "Order", delete=True, write="*")

        @lab.application.after_delete("Order")
        def books(thing: HookObject, context: HookContext) -> None:
            context.update("Stock", "SECRET-3", {"level": -1})

        @lab.application.before_commit("Order")
        def looks(thing: HookObject, context: HookContext) -> None:
            context.update("Stock", "SECRET-4", {"level": 1})

        results = lab.session(b"d" * 16, principal=ANN).settle(
            delete(1, "o1", entity="Order"), delete(2, "o2", entity="Order"), update(3, "o2", {}, entity="Order")
        )

        assert said(results) == ["VALIDATION_FAILED", "VALIDATION_FAILED", "HOOK_ERROR"]
        assert ["SECRET" in result.message for result in results[:2]] == [seen, seen]
        assert "SECRET" not in results[2].message or seen

        lab.application.hooks("after_delete", "Order").clear()
        [restricted] = lab.session(b"c" * 16, principal=ANN).settle(delete(1, "o1", entity="Order"))
        assert said([restricted]) == ["REFERENCED"]
        assert ("SECRET" in restricted.message) is seen

    def test_a_hook_may_refer_to_what_its_author_does_not_see(self) -> None:
        """Hooks have the rights of the system on the operation's own object too."""
        lab = shop()
        lab.application.allow("technician", "Order", create=True, read=["note"], write=["note"])

        @lab.application.before_commit("Order")
        def belongs(thing: HookObject, context: HookContext) -> None:
            thing["customer"] = "c1"

        assert settle(
            lab, ANN, create(1, "o2", {"note": "x"}, entity="Order"), update(2, "o2", {"note": "y"}, entity="Order")
        ) == [
            "APPLIED",
            "APPLIED",
        ]

    def test_an_entity_that_takes_no_uploads(self) -> None:
        """A read-only entity refuses operations, but not before the date that was granted."""
        lab = shop()
        lab.application.synchronize("Order", uploads=False)
        assert said(lab.settle(update(1, "o1", {"note": "x"}, entity="Order"))) == ["ACCESS_DENIED"]

        lab.application.synchronize(
            "Order", uploads=False, uploads_until=datetime.fromtimestamp(TIME_US / 1e6 + 60, UTC)
        )
        assert said(lab.settle(update(2, "o1", {"note": "x"}, entity="Order"))) == ["APPLIED"]

        lab.application.synchronize("Order", uploads=False, uploads_until=datetime.fromtimestamp(TIME_US / 1e6, UTC))
        assert said(lab.settle(update(3, "o1", {"note": "x"}, entity="Order"))) == ["ACCESS_DENIED"]


class TestDeclarations:
    @pytest.mark.parametrize(
        "declare",
        [
            lambda app: app.allow("a", "Ghost"),
            lambda app: app.allow("", "Order"),
            lambda app: app.allow("a", "Order", read=["colour"]),
            lambda app: app.allow("a", "Order", write="note"),
            lambda app: app.allow("a", "Order", where={"colour": 1}),
            lambda app: app.allow("a", "Order", where={"note": 1}),
            lambda app: app.allow("a", "Order", check=attribute("count") > "x"),
            lambda app: app.synchronize("Ghost"),
            lambda app: app.synchronize("Order", "sometimes"),
            lambda app: app.synchronize("Order", attribute("colour") == 1),
            lambda app: app.synchronize("Order", uploads_until=datetime(2026, 1, 1)),  # noqa: DTZ001 - that is the point
            lambda app: app.on_conflict("Ghost", "reject_stale"),
            lambda app: app.on_conflict("Order", "reject"),
            lambda app: app.before_commit("Ghost"),
            lambda app: app.migration("Ghost", version=1),
            lambda app: app.migration("Order", version=3),
            lambda app: app.migration("Order", version=0),
        ],
    )
    def test_a_rule_that_does_not_fit_the_schema_is_refused_when_it_is_declared(self, declare: Any) -> None:
        """Unknown names and values of another type are an error at once."""
        with pytest.raises(InvalidRule):
            declare(Application(schema=SHOP))

    @pytest.mark.parametrize(
        ("declare", "why"),
        [
            (lambda app: app.allow(5, "Order"), "the access rule of 5 on 'Order': a role"),
            (lambda app: app.allow(["a", "b"], "Order"), "a role"),
            (lambda app: app.allow("a\0b", "Order"), "a role"),
            (lambda app: app.allow("a", None), "an entity name"),
            (lambda app: app.allow("a", "Order", create="no"), "create is 'no', but must be True or False"),
            (lambda app: app.allow("a", "Order", delete=1), "delete is 1, but must be True or False"),
            (lambda app: app.allow("a", "Order", read=None), r"a list of names or '\*', got null"),
            (lambda app: app.allow("a", "Order", write=True), r"a list of names or '\*', got True"),
            (lambda app: app.allow("a", "Order", read=attribute("note")), "a list of names"),
            (lambda app: app.allow("a", "Order", read=["note", 5]), "an attribute name"),
            (lambda app: app.allow("a", "Order", read=[["note"]]), "an attribute name"),
            (lambda app: app.allow("a", "Order", where=5), "where must be a constraint"),
            (lambda app: app.allow("a", "Order", where={5: 1}), "an attribute name"),
            (lambda app: app.allow("a", "*", read=["colour"]), r"on '\*': no entity has an attribute 'colour'"),
            (lambda app: app.allow("a", "*", write=["note", "colour"]), "no entity has an attribute 'colour'"),
            (lambda app: app.allow("a", "*", where={"colour": 1}), "no entity has an attribute 'colour'"),
            (
                lambda app: app.allow("a", "*", check=~attribute("colour").exists()),
                "no entity has an attribute 'colour'",
            ),
            (lambda app: app.allow("a", "*", where={"count": "x"}), "'count' is an integer, which is never compared"),
            (lambda app: app.synchronize("Order", uploads="no"), "uploads is 'no', but must be True or False"),
            (lambda app: app.synchronize("Order", uploads_until="2026"), "uploads_until is '2026', but must be"),
            (lambda app: app.synchronize("Order", uploads_until=date(2026, 1, 1)), "but must be a datetime with"),
            (lambda app: app.synchronize("Order", None), "a download is a constraint or one of"),
            (lambda app: app.before_commit(5), "an entity name"),
        ],
    )
    def test_a_rule_made_of_something_else_is_refused_when_it_is_declared(self, declare: Any, why: str) -> None:
        """What could never hold, or would hold for the wrong, is an InvalidRule that says what is wrong."""
        application = Application(schema=SHOP)

        with pytest.raises(InvalidRule, match=why):
            declare(application)
        assert not application.access_rules
        assert not application.synchronization

    def test_a_rule_for_every_entity_needs_one_that_it_fits(self) -> None:
        """A rule on every entity may name what only some of them have; in an open schema, anything."""
        application = Application(schema=SHOP)
        some = (attribute("owner") == "x") | (attribute("number") == 1) | (attribute("order") == claim("order"))
        application.allow("a", "*", read=["owner", "lines"], where=some)
        open_ = Application(schema=Schema(SHOP.entities.values(), open=True))
        open_.allow("a", "*", read=["colour"], where=attribute("colour") == 1)

        assert len(application.access_rules) == len(open_.access_rules) == 1

    @pytest.mark.parametrize(
        ("operators", "why"),
        [
            ("admin", "a list of roles, got 'admin'"),
            (None, "a list of roles, got null"),
            ([5], "the operators: a role"),
            ([""], "the operators: a role"),
            ([["admin"]], "the operators: a role"),
            (["*"], r"'\*' is none"),
        ],
    )
    def test_operators_are_a_list_of_roles(self, operators: Any, why: str) -> None:
        """What no principal can be is no operator; a string is a sequence of letters, but never meant as one."""
        with pytest.raises(InvalidRule, match=why):
            Application(operators=operators)

    @pytest.mark.parametrize("schema", ["shop.toml", {}, [Entity("A", {})]])
    def test_a_schema_is_a_schema(self, schema: Any) -> None:
        """An application does not take for a schema what is none."""
        with pytest.raises(InvalidSchema, match="the schema of an application is a Schema, got"):
            Application(schema=schema)


class _LaterCalled:
    async def __call__(self, first: Any, second: Any) -> None:
        """Return before anything has run."""


async def _later(first: Any, second: Any) -> None:
    """Return before anything has run."""


def _yielding(first: Any, second: Any) -> Any:
    yield first


async def _yielding_later(first: Any, second: Any) -> Any:
    yield first


class TestFunctions:
    TAKERS: ClassVar[dict[str, tuple[int, Callable[[Application, Any], object]]]] = {
        "before_commit": (2, lambda app, function: app.before_commit("Order")(function)),
        "after_commit": (2, lambda app, function: app.after_commit("Order")(function)),
        "before_delete": (2, lambda app, function: app.before_delete("Order")(function)),
        "after_delete": (2, lambda app, function: app.after_delete("Order")(function)),
        "on_conflict": (3, lambda app, function: app.on_conflict("Order", function)),
        "migration": (1, lambda app, function: app.migration("Order", version=2)(function)),
        "users": (2, lambda app, function: app.users(function)),
    }

    @pytest.mark.parametrize("taker", TAKERS)
    def test_take_the_right_number_of_arguments(self, taker: str) -> None:
        """A function that could not be called, for want of a parameter or of an argument, is refused at once."""
        count, register = self.TAKERS[taker]
        functions: list[Callable[..., Any]] = [
            lambda: None,
            lambda a: a,
            lambda a, b: (a, b),
            lambda a, b, c: (a, b, c),
            lambda a, b, c, d: (a, b, c, d),
        ]

        for number, function in enumerate(functions):
            application = Application(schema=SHOP)
            if number == count:
                register(application, function)
            else:
                with pytest.raises(InvalidRule, match=r"a plain function of \(.*\), but .*<lambda> takes \("):
                    register(application, function)
        register(Application(schema=SHOP), lambda *arguments: arguments)
        register(Application(schema=SHOP), lambda a, b=None, c=None, *, d=None: (a, b, c, d))
        register(Application(schema=SHOP), functools.partial(functions[count + 1], "first"))

    @pytest.mark.parametrize("taker", TAKERS)
    @pytest.mark.parametrize(
        "function", [_later, _LaterCalled(), _yielding, _yielding_later, functools.partial(_later)]
    )
    def test_run_when_they_are_called(self, taker: str, function: Any) -> None:
        """A function that only returns something still to be run is refused at once."""
        with pytest.raises(InvalidRule, match=r"a plain function of .*it returns before it has run"):
            self.TAKERS[taker][1](Application(schema=SHOP), function)

    @pytest.mark.parametrize("taker", TAKERS)
    @pytest.mark.parametrize("function", [5, None, "reject", []])
    def test_are_functions(self, taker: str, function: Any) -> None:
        """What cannot be called is no function."""
        with pytest.raises(InvalidRule, match="a plain function of"):
            self.TAKERS[taker][1](Application(schema=SHOP), function)

    def test_that_others_wrap_count_as_they_are(self) -> None:
        """A decorator that adds an argument of its own does not deceive."""

        def inner(found: HookObject, context: HookContext, database: object) -> None:
            raise NotImplementedError

        @functools.wraps(inner)
        def with_database(found: HookObject, context: HookContext) -> None:
            inner(found, context, None)

        application = Application(schema=SHOP)
        application.before_commit("Order")(with_database)

        assert application.hooks("before_commit", "Order") == [with_database]
        assert Application().migration("Order", version=1)(dict) is dict


class TestConflicts:
    def lab(self, policy: Any) -> Lab:
        """Return a lab where o1 was changed at version 3, after its author saw version 2."""
        lab = shop()
        lab.application.on_conflict("Order", policy)
        lab.settle(update(3, "o1", {"note": "theirs"}, entity="Order"), replica=REPLICA_B)
        return lab

    def test_reject_stale_refuses_what_somebody_else_changed(self) -> None:
        """An operation on an attribute that was changed since its author looked is CONFLICT."""
        lab = self.lab("reject_stale")

        results = lab.settle(
            update(1, "o1", {"note": "mine"}, entity="Order", base_version=2),
            update(2, "o1", {"owner": "mine"}, entity="Order", base_version=2),
            update(3, "o1", {"note": "again"}, entity="Order", base_version=3),
        )

        assert said(results) == ["CONFLICT", "APPLIED", "APPLIED"]
        assert "'note'" in results[0].message

    def test_reject_stale_and_deletions(self) -> None:
        """A deletion conflicts with any change."""
        assert said(self.lab("reject_stale").settle(delete(1, "o1", entity="Order", base_version=2))) == ["CONFLICT"]

    def test_a_version_that_nobody_has_seen_is_no_excuse(self) -> None:
        """A base version above the head does not switch the policy off."""
        lab = self.lab("reject_stale")

        results = lab.settle(update(1, "o1", {"note": "mine"}, entity="Order", base_version=2**62))

        assert said(results) == ["CONFLICT"]

    def test_own_changes_are_no_conflict(self) -> None:
        """What the same replica wrote, or a hook that ran for it, does not make it stale."""
        lab = shop()
        lab.application.on_conflict("Order", "reject_stale")

        @lab.application.after_commit("Customer")
        def touches(thing: HookObject, context: HookContext) -> None:
            context.update("Order", "o1", {"note": "touched"})

        results = lab.settle(
            update(1, "o1", {"note": "a"}, entity="Order", base_version=2),
            update(2, "c1", {"name": "x"}, entity="Customer"),
            update(3, "o1", {"note": "b"}, entity="Order", base_version=2),
        )

        assert said(results) == ["APPLIED"] * 3

    def test_intents_of_one_kind_merge(self) -> None:
        """Two increments, or two additions, are no conflict; an increment against a set is."""
        lab = shop()
        lab.application.on_conflict("Order", "reject_stale")
        lab.settle(update(3, "o1", entity="Order", increment={"count": 2}, add={"tags": ["a"]}), replica=REPLICA_B)

        results = lab.settle(
            update(1, "o1", entity="Order", increment={"count": 3}, add={"tags": ["b"]}, base_version=2),
            update(2, "o1", {"count": 0}, entity="Order", base_version=2),
            update(3, "o1", entity="Order", remove={"tags": ["a"]}, base_version=2),
        )

        assert said(results) == ["APPLIED", "CONFLICT", "CONFLICT"]
        assert lab.attributes("o1", "Order") == {"customer": "c1", "status": "open", "count": 5, "tags": ["a", "b"]}

    def test_a_function_merges(self) -> None:
        """A policy function gets base, theirs and mine, and its result is what the object becomes."""
        seen = []

        def join(base: dict[str, Any], theirs: dict[str, Any], mine: dict[str, Any] | None) -> dict[str, Any] | None:
            seen.append((base, theirs, mine))
            assert mine is not None
            return {**theirs, "note": f"{theirs['note']}+{mine['note']}"}

        lab = self.lab(join)

        [result] = lab.settle(update(1, "o1", {"note": "mine"}, entity="Order", base_version=2))

        plain = {"customer": "c1", "status": "open"}
        assert seen == [(plain, {**plain, "note": "theirs"}, {**plain, "note": "mine"})]
        assert lab.attributes("o1", "Order") == {**plain, "note": "theirs+mine"}
        assert result.changed_by_server
        lab.check_history()

    def test_mine_has_what_the_author_did_before(self) -> None:
        """Earlier operations of the same replica that the base lacks are part of mine."""
        seen = []

        def keep_mine(base: Any, theirs: Any, mine: Any) -> Any:
            seen.append((base, mine))
            return mine

        lab = shop()
        lab.application.on_conflict("Order", keep_mine)
        lab.settle(update(1, "o1", {"owner": "ann"}, entity="Order", base_version=2))
        lab.settle(update(3, "o1", {"note": "theirs"}, entity="Order"), replica=REPLICA_B)

        lab.settle(update(2, "o1", {"note": "mine"}, entity="Order", base_version=2))

        plain = {"customer": "c1", "status": "open"}
        assert seen == [(plain, {**plain, "owner": "ann", "note": "mine"})]

    def test_a_function_decides_about_deletions(self) -> None:
        """For a deletion mine is None; a dict keeps the object, None deletes it."""
        lab = self.lab(lambda base, theirs, mine: {**theirs, "status": "done"} if mine is None else None)

        assert said(lab.settle(delete(1, "o1", entity="Order", base_version=2))) == ["APPLIED"]
        assert lab.attributes("o1", "Order") == {"customer": "c1", "status": "done", "note": "theirs"}
        assert said(lab.settle(update(2, "o1", {"note": "m"}, entity="Order", base_version=2))) == ["APPLIED"]
        assert lab.attributes("o1", "Order") is None
        lab.check_history()

    @pytest.mark.parametrize(
        ("raised", "reason"), [(Reject("no", code="stale"), "CONFLICT"), (KeyError("x"), "HOOK_ERROR")]
    )
    def test_a_function_that_raises(self, raised: Exception, reason: str) -> None:
        """Reject refuses as CONFLICT with its code; anything else is a broken rule of the application."""

        def policy(base: Any, theirs: Any, mine: Any) -> Any:
            raise raised

        lab = self.lab(policy)

        [result] = lab.settle(update(1, "o1", {"note": "mine"}, entity="Order", base_version=2))

        assert said([result]) == [reason]
        assert result.code == ("stale" if reason == "CONFLICT" else "")

    def test_a_function_that_returns_nonsense(self) -> None:
        """What is no dict of attributes is a broken rule of the application."""
        lab = self.lab(lambda base, theirs, mine: ["x"])

        assert said(lab.settle(update(1, "o1", {"note": "mine"}, entity="Order", base_version=2))) == ["HOOK_ERROR"]


class TestUnique:
    def test_a_taken_value_is_refused(self) -> None:
        """Two objects cannot have a unique value, whether the other one is stored or of the same batch."""
        lab = shop()

        results = lab.settle(customer(1, "c2", number=1), customer(2, "c3", number=7), customer(3, "c4", number=7))

        assert said(results) == ["UNIQUE_VIOLATED", "APPLIED", "UNIQUE_VIOLATED"]
        assert "number" in results[0].message
        assert "c1" not in results[0].message, "who has the value is not told"

    def test_a_value_is_free_again(self) -> None:
        """After a deletion or a change the value can be taken, in the same batch and later."""
        lab = shop()

        assert (
            said(
                lab.settle(
                    update(1, "c1", {"number": 2}, entity="Customer"),
                    customer(2, "c2", number=1),
                    delete(3, "c2", entity="Customer"),
                    customer(4, "c3", number=1),
                )
            )
            == ["APPLIED"] * 4
        )
        assert said(lab.settle(customer(5, "c4", number=2), customer(6, "c5", number=3))) == [
            "UNIQUE_VIOLATED",
            "APPLIED",
        ]

    def test_a_group_may_swap_values(self) -> None:
        """Unique values are looked at when the whole commit group is applied."""
        lab = shop()
        lab.settle(customer(1, "c2", number=2))

        results = lab.settle(
            *group(
                make_operation("update", base_version=1_000, seq=2, entity="Customer", id="c1", set={"number": 2}),
                make_operation("update", base_version=1_000, seq=3, entity="Customer", id="c2", set={"number": 1}),
            )
        )

        assert said(results) == ["APPLIED", "APPLIED"]
        assert said(lab.settle(customer(4, "c5", number=1), customer(5, "c6", number=2))) == ["UNIQUE_VIOLATED"] * 2

    def test_a_group_names_the_culprit(self) -> None:
        """The operation that took the value is to blame, its siblings are refused with it."""
        lab = shop()

        results = lab.settle(
            *group(
                make_operation(seq=1, entity="Customer", id="c2", set={"number": 5}),
                make_operation(seq=2, entity="Customer", id="c3", set={"number": 1}),
                make_operation(seq=3, entity="Customer", id="c4", set={"number": 6}),
            )
        )

        assert said(results) == ["GROUP_REJECTED", "UNIQUE_VIOLATED", "GROUP_REJECTED"]

    def test_who_took_the_value_is_to_blame(self) -> None:
        """An object that had the value before and was changed otherwise is not the culprit."""
        lab = shop()
        lab.settle(customer(1, "c2", number=2))

        results = lab.settle(
            *group(
                make_operation("update", seq=2, entity="Customer", id="c1", set={"name": "x"}, base_version=99),
                make_operation("update", seq=3, entity="Customer", id="c2", set={"number": 1}, base_version=99),
            )
        )

        assert said(results) == ["GROUP_REJECTED", "UNIQUE_VIOLATED"]

    def test_null_binds_nobody(self) -> None:
        """Objects without the value do not collide."""
        schema = Schema([Entity("Tag", {"a": String(), "b": String()}, unique=[("a", "b")])])
        lab = Lab(Application(schema=schema))

        results = lab.settle(
            *(create(seq, f"t{seq}", {"a": "x", "b": None}, entity="Tag") for seq in (1, 2)),
            create(3, "t3", {"a": "x", "b": "y"}, entity="Tag"),
            create(4, "t4", {"a": "x", "b": "z"}, entity="Tag"),
            create(5, "t5", {"a": "x", "b": "y"}, entity="Tag"),
        )

        assert said(results) == [*["APPLIED"] * 4, "UNIQUE_VIOLATED"]

    def test_a_selected_session_waits_for_what_it_leaves_behind(self) -> None:
        """While earlier operations stay on the replica, a taken value is not ready, never a failure."""
        lab = shop()

        results = lab.session(leaves_earlier=True).settle(customer(2, "c2", number=1))

        assert said(results) == ["NOT_READY"]
        assert lab.failures() == []


def test_the_member_of_a_group_that_dangles_is_to_blame() -> None:
    """A group that waited in vain is refused because of the operation whose reference leads nowhere."""
    lab = shop()

    results = lab.settle(
        *group(
            make_operation("update", seq=1, entity="Order", id="o1", set={"note": "x"}, base_version=99),
            make_operation(seq=2, entity="Line", id="l1", set={"order": "nowhere"}),
        )
    )

    assert said(results) == ["GROUP_REJECTED", "DANGLING_REFERENCE"]
    assert lab.failure(results[0]).object_id == "l1"


class TestDeletionRules:
    def test_restrict(self) -> None:
        """An object that is referred to cannot be deleted; the refusal names who refers to it."""
        lab = shop()

        [result] = lab.settle(delete(1, "c1", entity="Customer"))

        assert said([result]) == ["REFERENCED"]
        assert "Order 'o1'" in result.message

    def test_restrict_does_not_name_what_is_hidden(self) -> None:
        """Who may not see the other object is not told its id."""
        lab = shop()
        lab.application.allow("technician", "Customer", delete=True)

        [result] = lab.session(principal=ANN).settle(delete(1, "c1", entity="Customer"))

        assert said([result]) == ["REFERENCED"]
        assert "o1" not in result.message

    def test_restrict_looks_at_the_end_of_the_group(self) -> None:
        """Parent and child may be deleted in one commit group, in any order."""
        lab = shop()

        assert said(
            lab.settle(
                *group(
                    make_operation("delete", base_version=1_000, seq=1, entity="Customer", id="c1"),
                    make_operation("delete", base_version=1_000, seq=2, entity="Order", id="o1"),
                )
            )
        ) == ["APPLIED", "APPLIED"]

    def test_cascade_and_clear(self) -> None:
        """Lines go with their order, references to it and to them are cleared, all caused by the one operation."""
        lab = shop()
        lab.settle(
            line(1),
            line(2, "l2", also="o1"),
            create(3, "p1", {"lines": ["l1", "l2"]}, entity="Part"),
        )
        before = lab.version()

        assert said(lab.settle(delete(4, "o1", entity="Order"))) == ["APPLIED"]

        assert lab.attributes("l1", "Line") is None
        assert lab.attributes("l2", "Line") == {}
        assert lab.attributes("p1", "Part") == {"lines": ["l2"]}
        assert {(change.seq, change.by_hook) for change in lab.changes(after=before)} == {(4, False), (4, True)}
        lab.check_history()

    def test_a_restriction_further_down_undoes_the_whole_deletion(self) -> None:
        """If what would be deleted along is itself referred to, nothing is deleted."""
        schema = Schema(
            [
                Entity("A", {}),
                Entity("B", {"a": Reference("A", on_delete="cascade")}),
                Entity("C", {"b": Reference("B", on_delete="restrict")}),
            ]
        )
        lab = Lab(Application(schema=schema))
        lab.settle(
            create(1, "a", {}, entity="A"),
            create(2, "b", {"a": "a"}, entity="B"),
            create(3, "c", {"b": "b"}, entity="C"),
        )

        assert said(lab.settle(delete(4, "a", entity="A"))) == ["REFERENCED"]
        assert lab.attributes("b", "B") == {"a": "a"}

    def test_a_long_chain_and_a_circle_go_too(self) -> None:
        """A cascade ends, however long the chain and even if it comes back to its beginning."""
        schema = Schema([Entity("Node", {"next": Reference("Node", on_delete="cascade")})])
        lab = Lab(Application(schema=schema))
        count = 300
        lab.settle(create(1, "n0", {}, entity="Node"))
        lab.settle(*(create(n + 1, f"n{n}", {"next": f"n{n - 1}"}, entity="Node") for n in range(1, count)))
        lab.settle(update(count + 1, "n0", {"next": f"n{count - 1}"}, entity="Node"))

        assert said(lab.settle(delete(count + 2, "n0", entity="Node"))) == ["APPLIED"]
        assert all(lab.attributes(f"n{n}", "Node") is None for n in range(count))

    def test_hooks_see_what_goes_along(self) -> None:
        """Deletion hooks run for cascaded objects, and may refuse them."""
        lab = shop()
        lab.settle(line(1))

        @lab.application.before_delete("Line")
        def protects(thing: HookObject, context: HookContext) -> None:
            raise Reject("the line stays", code="line.protected")

        [result] = lab.settle(delete(2, "o1", entity="Order"))

        assert said([result]) == ["HOOK_REJECTED"]
        assert result.code == "line.protected"
        assert lab.attributes("o1", "Order") is not None

    def test_a_reference_may_be_given_away_first(self) -> None:
        """What no longer refers to the object is no obstacle, in the same batch and later."""
        lab = shop()

        assert (
            said(
                lab.settle(
                    customer(1, "c2", number=2),
                    update(2, "o1", {"customer": "c2"}, entity="Order"),
                    delete(3, "c1", entity="Customer"),
                )
            )
            == ["APPLIED"] * 3
        )
        assert said(lab.settle(delete(4, "c2", entity="Customer"))) == ["REFERENCED"]


def test_a_code_is_part_of_a_rejection() -> None:
    """The application's own code reaches the result, the record, and a repetition of the operation."""
    lab = Lab()

    @lab.application.before_commit("Task")
    def refuses(task: HookObject, context: HookContext) -> None:
        raise Reject("too heavy", code="weight.over")

    [first] = lab.settle(create(1))
    [again] = lab.settle(create(1))

    assert (first.code, again.code, lab.failure(first).code) == ("weight.over",) * 3


@pytest.mark.parametrize("catches", [True, False])
def test_what_an_operation_causes_is_bounded(monkeypatch: pytest.MonkeyPatch, catches: bool) -> None:  # noqa: FBT001
    """Hooks that go on and on are refused, whether they catch what stops them or not."""
    monkeypatch.setattr("tidelog_server._action.EFFECTS_MAX", 50)
    lab = Lab()

    @lab.application.after_commit("Task")
    def spreads(task: HookObject, context: HookContext) -> None:
        for _ in range(2):
            try:
                context.create("Task", {})
            except Exception:
                if not catches:
                    raise

    [result] = lab.settle(create(1))

    assert said([result]) == ["HOOK_ERROR"]
    assert lab.version() == 0


def test_a_group_with_unreadable_bytes_keeps_its_payload_each_time() -> None:
    """The same damaged bytes in two groups make two records, each with all that came."""
    lab = Lab()

    def damaged(first: int) -> list[bytes]:
        members = group(*(make_operation(seq=first + place, id=f"t{first + place}") for place in range(3)))
        return [members[0], b"\xff\xff", members[2]]

    first, second = lab.settle(*damaged(1)), lab.settle(*damaged(11))

    assert lab.failure(first[0]).group_operations == damaged(1)
    assert lab.failure(second[0]).group_operations == damaged(11)


def test_patches_are_not_squashed_by_policies() -> None:
    """Without a conflict a policy changes nothing: the change log has the patch as it came."""
    lab = shop()
    lab.application.on_conflict("Order", "reject_stale")

    lab.settle(update(1, "o1", {"note": "x"}, entity="Order", base_version=2))

    assert lab.changes()[-1].patch == Patch({"note": "x"}).encode()


def test_what_builds_upon_a_creation_that_came_too_late_depends_on_it() -> None:
    """After ALREADY_EXISTS the author's further operations on its own object hang under that failure."""
    lab = Lab()
    lab.settle(create(1), replica=REPLICA_B)

    results = lab.settle(create(1), make_update(2, "t1", {"n": 1}), make_delete(3, "t1"))

    assert said(results) == ["ALREADY_EXISTS", "DEPENDENCY_FAILED", "DEPENDENCY_FAILED"]
    assert {lab.failure(one).cause_failure_id for one in results[1:]} == {lab.failure(results[0]).id}


def test_decimals_are_told_apart_by_all_their_digits() -> None:
    """Unique and indexed decimals of any size and precision are what they are, spelled however."""
    schema = Schema([Entity("Rate", {"value": DecimalNumber()}, unique=["value"], indexes=["value"])])
    lab = Lab(Application(schema=schema))
    long = "1." + "0" * 40

    def rate(seq: int, text: str) -> bytes:
        return create(seq, f"r{seq}", {"value": Decimal(text)}, entity="Rate")

    texts = [long + "1", long + "2", "1E+1000000", "2.50", "2.5"]
    results = lab.settle(*(rate(seq, text) for seq, text in enumerate(texts, start=1)))

    assert said(results) == ["APPLIED"] * 4 + ["UNIQUE_VIOLATED"]


class TestOperators:
    def test_without_rules_and_operators_everybody_is_one(self) -> None:
        """An application that states neither trusts everybody."""
        assert Application().is_operator(ANN)

    def test_with_rules_nobody_is_one_unless_named(self) -> None:
        """The first access rule ends that; a role that is named works off failures."""
        ruled = Application()
        ruled.allow("technician", "Order")
        named = Application(operators=["dispatcher"])

        assert not ruled.is_operator(ANN)
        assert not named.is_operator(ANN)
        assert named.is_operator(DISPATCHER)


class TestUsers:
    def test_are_looked_up(self) -> None:
        """The function says who a user is, or that it does not know."""
        application = Application()
        application.users(lambda tenant, user_id: ANN if user_id == "ann" else None)

        assert application.user("default", "ann") is ANN
        assert application.user("default", "bob") is None

    @pytest.mark.parametrize("found", [BOB, "ann", Principal("ann", "elsewhere")])
    def test_are_who_was_asked_for(self, found: Any) -> None:
        """Somebody else, or nobody at all, is not taken for the author."""
        application = Application()
        application.users(lambda tenant, user_id: found)

        with pytest.raises(TransientError):
            application.user("default", "ann")

    def test_may_be_unknown_for_now(self) -> None:
        """A function that fails settles nothing: the retry can be repeated."""
        application = Application()
        nobody: dict[str, Principal] = {}
        application.users(lambda tenant, user_id: nobody[user_id])

        with pytest.raises(TransientError, match="cannot say who 'ann' is"):
            application.user("default", "ann")


class TestEdgesOfRules:
    def test_a_rule_that_does_not_cover_the_object_vouches_for_nothing(self) -> None:
        """What an object becomes is accepted by a rule that was about it before."""
        lab = shop()
        lab.application.allow("technician", "Order", write=["note"], where={"status": "open"}, check={"note": "fine"})
        lab.application.allow("technician", "Order", read=[], write=["note"], where={"status": "done"}, check={})

        results = [
            *settle(lab, ANN, update(1, "o1", {"note": "other"}, entity="Order")),
            *settle(lab, ANN, update(2, "o1", {"note": "fine"}, entity="Order")),
        ]

        assert results == ["ACCESS_DENIED", "APPLIED"]

    def test_a_claim_that_is_null_is_missing(self) -> None:
        """A rule over a claim without a value grants nothing."""
        lab = shop()
        lab.application.allow("technician", "Order", write="*", where=~(attribute("owner") == claim("team")))
        nobody = Principal("ann", roles=frozenset({"technician"}), claims={"team": None})

        assert settle(lab, nobody, update(1, "o1", {"note": "x"}, entity="Order")) == ["OBJECT_GONE"]

    def test_a_former_incarnation_is_no_conflict(self) -> None:
        """What happened to an object of the same id before it was created anew is another story."""
        lab = shop()
        lab.application.on_conflict("Order", "reject_stale")
        lab.settle(
            update(3, "o1", {"note": "theirs"}, entity="Order"), delete(4, "o1", entity="Order"), replica=REPLICA_B
        )

        results = lab.settle(order(1, "o1"), make_update(2, "o1", {"note": "mine"}, entity="Order", base_version=2))

        assert said(results) == ["APPLIED", "APPLIED"]


@pytest.mark.parametrize(
    "intent",
    [
        {"increment": {"secret": 1}},
        {"add": {"secret": ["x"]}},
        {"remove": {"secret": ["x"]}},
    ],
)
def test_no_intent_quotes_what_its_author_may_not_read(intent: dict[str, Any]) -> None:
    """An intent that does not fit a hidden value is refused without the value."""
    lab = shop()
    lab.settle(update(3, "o1", {"secret": "moonlight"}, entity="Order"), replica=REPLICA_B)
    lab.application.allow("technician", "Order", read=["note"], write=["secret"])

    [result] = lab.session(principal=ANN).settle(update(1, "o1", entity="Order", **intent))

    assert said([result]) == ["VALIDATION_FAILED"]
    assert "moonlight" not in result.message


def test_a_taken_value_is_quoted_as_far_as_its_author_may_read_it() -> None:
    """Of values that are unique together, a hidden one is named and not told."""
    schema = Schema([Entity("Seat", {"row": String(), "plan": String()}, unique=[("row", "plan")])])
    lab = Lab(Application(schema=schema))
    lab.settle(
        create(1, "s1", {"row": "a", "plan": "moonlight"}, entity="Seat"),
        create(2, "s2", {"row": "b", "plan": "moonlight"}, entity="Seat"),
    )
    lab.application.allow("technician", "Seat", read=["row"], write=["row"])

    [result] = lab.session(b"c" * 16, principal=ANN).settle(update(1, "s2", {"row": "a"}, entity="Seat"))

    assert said([result]) == ["UNIQUE_VIOLATED"]
    assert "'a'" in result.message
    assert "plan" in result.message
    assert "moonlight" not in result.message
