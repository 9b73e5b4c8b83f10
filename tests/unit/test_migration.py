"""A store and a new schema: what fits, what is named, what becomes of objects, and what a crash leaves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, TypeVar

import pytest
from tests.builders import REPLICA_A, REPLICA_B, TENANT, TIME_US, Lab, MemoryStore, create, delete, said, update

from tidelog import Entity, Integer, InvalidRule, List, Reference, Rename, Schema, String, attribute
from tidelog_server import (
    Application,
    HookContext,
    HookObject,
    MigrationUnfinished,
    OperationRefused,
    Principal,
    Reject,
    SchemaContradicted,
    Tenant,
)
from tidelog_server import _adoption as adoption
from tidelog_server import _failures as failures
from tidelog_server._adoption import adopt_schema, adopted_schema
from tidelog_server._attempts import Attempt, UnderWay
from tidelog_server._download import Download, cursor_at
from tidelog_server._errors import FailureStale, ServerOutdated
from tidelog_server._indexes import TABLES
from tidelog_server._projection import Projection
from tidelog_server._records import Identity, Writes
from tidelog_server._store import Reader, Store

T = TypeVar("T")


def application(
    *entities: Entity, version: int = 1, renames: list[Rename] | None = None, **options: Any
) -> Application:
    """Return an application that has nothing but a schema."""
    return Application(schema=Schema(entities, version=version, renames=renames or [], **options))


def task(attributes: dict[str, Any], **options: Any) -> Entity:
    """Return the entity Task."""
    return Entity("Task", attributes, **options)


def filled(
    served: Application, *objects: tuple[str, str, dict[str, Any]], tenants: tuple[str, ...] = (TENANT,)
) -> Lab:
    """Return a lab whose store was served with an application, and has objects."""
    lab = Lab(served)
    adopt(lab, served)
    for tenant in tenants:
        with Tenant(served, lab.store, tenant, None, lambda: TIME_US).transaction() as transaction:
            for entity, id_, attributes in objects:
                transaction.create(entity, attributes, id_)
    return lab


def adopt(lab: Lab, served: Application, *, migrate: bool = False, store: Store | None = None) -> None:
    """Serve a lab's store with an application from now on."""
    adopt_schema(served, store or lab.store, migrate=migrate, time_us=TIME_US)
    lab.application = served


def contents(lab: Lab, tenant: str = TENANT) -> dict[str, dict[str, Any]]:
    """Return all objects of a tenant, by entity and id."""
    with lab.store.read(tenant) as reader:
        entities = reader.entities()
    data = Tenant(Application(), lab.store, tenant, None, lambda: TIME_US)
    return {f"{entity}/{found.id}": found.attributes for entity in entities for found in data.query(entity)}


def indexes(lab: Lab) -> dict[bytes, bytes]:
    """Return the tables that follow from schema and objects."""
    with lab.store.read(TENANT) as reader:
        return {key: value for table in TABLES for key, value in reader.index_range(table, b"", 1_000_000)}


def contradictions(lab: Lab, served: Application, *, migrate: bool = False) -> list[str]:
    """Serve the store with an application that does not fit; return what is said, and check that nothing changed."""
    before = contents(lab), lab.version(), indexes(lab), lab.store.note("adoption")
    with pytest.raises(SchemaContradicted) as error:
        adopt(lab, served, migrate=migrate)
    assert (contents(lab), lab.version(), indexes(lab), lab.store.note("adoption")) == before
    assert str(error.value).splitlines() == [error.value.summary, *error.value.contradictions]
    return error.value.contradictions


OPEN = application(task({}), open=True)


class TestChecking:
    def test_what_is_added_is_fine(self) -> None:
        """New attributes and entities need no migration and change no object."""
        lab = filled(application(task({"title": String()})), ("Task", "t1", {"title": "a"}))
        version = lab.version()

        adopt(lab, application(task({"title": String(), "done": String(default="no")}), Entity("Note", {}), version=2))

        assert contents(lab) == {"Task/t1": {"title": "a"}}
        assert lab.version() == version

    @pytest.mark.parametrize(
        ("served", "expected"),
        [
            (
                application(task({"n": Integer(maximum=1)})),
                ["tenant 'default': Task 't1': attribute 'n' is 2, but must be at most 1"],
            ),
            (
                application(task({"n": String()})),
                ["tenant 'default': Task 't1': attribute 'n' is 2, but must be a string"],
            ),
            (
                application(task({"n": Integer(), "who": String(required=True)})),
                ["tenant 'default': Task 't1': attribute 'who' is null, but must have a value"],
            ),
            (
                application(task({})),
                ["tenant 'default': Task 't1': attribute 'n' is 2, but the schema has no such attribute"],
            ),
            (application(Entity("Note", {})), ["tenant 'default': Task 't1': the schema has no such entity"]),
        ],
        ids=["range", "type", "required", "attribute", "entity"],
    )
    def test_what_does_not_fit_is_named(self, served: Application, expected: list[str]) -> None:
        """A refused start names tenant, entity, id, attribute, value and rule, and changes nothing."""
        lab = filled(application(task({"n": Integer()})), ("Task", "t1", {"n": 2}))

        assert contradictions(lab, served) == expected

    def test_values_that_collide_are_named(self) -> None:
        """Of objects that share what is to be unique, all but the first are named, with the one that has it."""
        lab = filled(
            application(task({"a": Integer(), "b": String()})),
            *(("Task", f"t{number}", {"a": number % 2, "b": "x"}) for number in range(4)),
            ("Task", "t5", {"b": "x"}),
        )
        served = application(task({"a": Integer(), "b": String()}, unique=["a", ["a", "b"]]))

        assert contradictions(lab, served) == [
            f"tenant 'default': Task 't{number}': {what}, but must be unique: Task 't{number - 2}' has the same"
            for number, what in (
                (2, "attribute 'a' is 0"),
                (2, "attributes 'a' is 0, 'b' is 'x'"),
                (3, "attribute 'a' is 1"),
                (3, "attributes 'a' is 1, 'b' is 'x'"),
            )
        ]

    def test_references_that_lead_nowhere_are_named(self) -> None:
        """What is newly declared a reference must lead to an object, unless the reference may outlive it."""
        attributes = {"of": String(), "kept": String(), "many": List(String())}
        lab = filled(
            application(task(attributes)),
            ("Task", "t1", {"of": "t2", "many": ["t1", "t9"]}),
            ("Task", "t2", {"of": "t8", "kept": "t7"}),
        )
        served = application(
            task(
                {
                    "of": Reference("Task"),
                    "kept": Reference("Task", on_delete="keep"),
                    "many": Reference("Task", many=True),
                }
            )
        )

        assert contradictions(lab, served) == [
            "tenant 'default': Task 't1': attribute 'many' is 't9', but there is no such Task",
            "tenant 'default': Task 't2': attribute 'of' is 't8', but there is no such Task",
        ]

    def test_the_first_twenty_are_named_and_all_are_counted(self) -> None:
        """However many there are, the error stays short and says how many; those of all tenants count."""
        lab = filled(OPEN, *(("Task", f"t{number:02}", {"n": 1}) for number in range(30)), tenants=("acme", "brick"))

        with pytest.raises(SchemaContradicted) as error:
            adopt(lab, application(task({"n": String()}), version=2))

        assert error.value.count == 60
        assert len(error.value.contradictions) == 20
        assert "60 contradictions" in error.value.summary
        assert all("tenant 'acme'" in one for one in error.value.contradictions)

    def test_a_store_is_looked_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A start with the schema of the last one reads no object; one with another schema does."""
        served = application(task({"n": Integer()}))
        lab = filled(served, ("Task", "t1", {"n": 1}))

        def looked(*_: object) -> None:
            raise AssertionError("objects were looked at")

        with monkeypatch.context() as patch:
            patch.setattr(adoption, "_contradictions", looked)
            adopt(lab, application(task({"n": Integer()})))
            with pytest.raises(AssertionError, match="looked at"):
                adopt(lab, application(task({"n": Integer()}), version=2))

    def test_a_store_without_a_schema_gets_one(self) -> None:
        """What was served to everybody is held against its first schema; without one again, anything goes."""
        lab = filled(Application(), ("Task", "t1", {"n": 1}))

        assert len(contradictions(lab, application(task({"n": String()})))) == 1
        adopt(lab, application(task({"n": Integer()})))
        adopt(lab, Application())
        lab.settle(create(1, "t2", {"anything": True}))
        assert len(contradictions(lab, application(task({"n": Integer()})))) == 1

    def test_an_older_schema_is_served_if_nothing_contradicts_it(self) -> None:
        """A server that was rolled back starts on what fits; otherwise it says that a newer one was here."""
        old = application(task({"n": Integer()}))
        lab = filled(old, ("Task", "t1", {"n": 1}))
        adopt(lab, application(task({"n": Integer(), "title": String()}), version=2))
        adopt(lab, old)
        adopt(lab, application(task({"n": Integer(), "title": String()}), version=3))
        Tenant(lab.application, lab.store, TENANT, None, lambda: TIME_US).update("Task", "t1", {"title": "x"})

        with pytest.raises(SchemaContradicted, match="was served with version 3 already"):
            adopt(lab, old)

    def test_a_version_that_does_not_rise_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        """Another schema of the same or of a lower version is served, and the log says so."""
        lab = filled(application(task({"n": Integer()}), version=2), ("Task", "t1", {"n": 1}))
        said = "its version has not risen"
        adopt(lab, application(task({"n": Integer()}), version=2))
        adopt(lab, application(task({"n": Integer(), "m": Integer()}), version=3))
        assert said not in caplog.text

        for version in (3, 2):
            adopt(lab, application(task({"n": Integer()}), version=version))
            assert said in caplog.text
            caplog.clear()

        with pytest.raises(SchemaContradicted, match="another schema of this version: raise it"):
            adopt(lab, application(task({"m": Integer()}), version=2))

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No read and no job takes more than a page, whatever there is to be checked and written."""
        monkeypatch.setattr(adoption, "PAGE_OBJECTS_MAX", 7)
        lab = filled(OPEN, *(("Task", f"t{number:03}", {"n": number}) for number in range(100)))
        store = Watched(lab.store)

        adopt(lab, application(task({"m": Integer()}, unique=["m"], indexes=["m"]), version=2, renames=[RENAMED]),
              migrate=True, store=store)  # fmt: skip

        assert max(len(writes.objects) for writes in store.written) == 7
        assert max(len(writes.index_entries) for writes in store.written) <= 7 * 4
        assert contents(lab) == {f"Task/t{number:03}": {"m": number} for number in range(100)}


RENAMED = Rename(version=2, entity="Task", attribute="n", to="m")


class TestNamesThatWereGivenUp:
    def test_a_name_with_another_meaning_is_named(self) -> None:
        """What the store calls n is no longer what the schema calls n: a start that does not migrate is refused."""
        lab = filled(application(task({"n": Integer(), "m": Integer()})), ("Task", "t1", {"n": 1}), ("Task", "t2", {}))
        renames = [RENAMED_TO_K, Rename(version=3, entity="Task", attribute="m", to="n")]
        served = application(task({"k": Integer(), "n": Integer()}), version=3, renames=renames)

        assert contradictions(lab, served) == [
            "tenant 'default': Task 't1': attribute 'n' is 1, but is called 'k' now"
        ]
        adopt(lab, served, migrate=True)
        assert contents(lab) == {"Task/t1": {"k": 1}, "Task/t2": {}}

    def test_an_open_schema_does_not_leave_them_behind(self) -> None:
        """Also where any name is accepted, objects are not left under names that operations no longer lead to."""
        lab = filled(OPEN, ("Sale", "s1", {}), ("Task", "t1", {"n": 1}))
        renames = [Rename(version=2, entity="Sale", to="Order"), RENAMED_TO_K]
        served = application(task({}), Entity("Order", {}), version=2, renames=renames, open=True)

        assert contradictions(lab, served) == [
            "tenant 'default': Sale 's1': the schema calls this entity 'Order' now",
            "tenant 'default': Task 't1': attribute 'n' is 1, but is called 'k' now",
        ]
        adopt(lab, served, migrate=True)
        assert contents(lab) == {"Order/s1": {}, "Task/t1": {"k": 1}}


RENAMED_TO_K = Rename(version=2, entity="Task", attribute="n", to="k")


class TestMigrating:
    def test_attributes_are_renamed(self) -> None:
        """Objects get the new names, as changes of the system that the change log explains."""
        lab = filled(application(task({"n": Integer()})), ("Task", "t1", {"n": 1}), ("Task", "t2", {}))

        adopt(lab, application(task({"m": Integer()}), version=2, renames=[RENAMED]), migrate=True)

        assert contents(lab) == {"Task/t1": {"m": 1}, "Task/t2": {}}
        assert [(change.key[1], change.user_id) for change in lab.changes(after=2)] == [("t1", "system")]
        lab.check_history()

    def test_a_name_that_is_used_again_is_told_from_its_former_meaning(self) -> None:
        """What the store's schema called n is m now, though the schema has another n by now."""
        lab = filled(application(task({"n": Integer()})), ("Task", "t1", {"n": 1}))
        served = application(task({"m": Integer(), "n": Integer()}), version=3, renames=[RENAMED])

        adopt(lab, served, migrate=True)
        adopt(lab, application(task({"m": Integer(), "n": Integer(), "o": Integer()}), version=4, renames=[RENAMED]),
              migrate=True)  # fmt: skip

        assert contents(lab) == {"Task/t1": {"m": 1}}

    def test_entities_are_renamed(self) -> None:
        """Objects move to the new name; who has seen one by its former name has seen it, so pending changes apply."""
        lab = filled(application(Entity("Sale", {"n": Integer()})), ("Sale", "s1", {"n": 1}))
        lab.settle(create(1, "s2", {"n": 2}, entity="Sale"))
        served = application(
            Entity("Order", {"n": Integer()}), version=2, renames=[Rename(version=2, entity="Sale", to="Order")]
        )

        adopt(lab, served, migrate=True)

        assert contents(lab) == {"Order/s1": {"n": 1}, "Order/s2": {"n": 2}}
        pending = [update(seq, id_, {"n": 5}, entity="Sale", base_version=2, schema_version=1)
                   for seq, id_ in ((2, "s1"), (3, "s2"))]  # fmt: skip
        assert said(lab.settle(*pending)) == ["APPLIED", "APPLIED"]
        assert contents(lab) == {"Order/s1": {"n": 5}, "Order/s2": {"n": 5}}
        lab.check_history()

    def test_an_object_that_would_replace_another_one_is_named(self) -> None:
        """Two objects never become one."""
        lab = filled(
            application(Entity("Sale", {}), Entity("Order", {})),
            ("Sale", "x", {}),
            ("Order", "x", {}),
            ("Sale", "y", {}),
        )
        served = application(
            Entity("Order", {}), version=2, renames=[Rename(version=2, entity="Sale", to="Order")], open=True
        )

        assert contradictions(lab, served, migrate=True) == [
            "tenant 'default': Sale 'x' becomes Order 'x', which exists already"
        ]

    def test_an_object_goes_where_another_one_was_deleted(self) -> None:
        """An object that takes the key of a deleted one is a new one to those who knew that."""
        lab = filled(application(Entity("Sale", {}), Entity("Order", {})), ("Sale", "x", {}), ("Order", "x", {}))
        Tenant(lab.application, lab.store, TENANT, None, lambda: TIME_US).delete("Order", "x")
        served = application(
            Entity("Order", {"n": Integer()}),
            version=2,
            renames=[Rename(version=2, entity="Sale", to="Order")],
            open=True,
        )

        adopt(lab, served, migrate=True)

        assert contents(lab) == {"Order/x": {}}
        assert said(lab.settle(update(1, "x", {"n": 1}, entity="Order", base_version=2))) == ["OBJECT_GONE"]

    def test_an_object_goes_where_another_one_was_deleted_with_what_is_pending(self) -> None:
        """Who has seen the object after the other one was deleted can only have meant this one."""
        lab = filled(application(Entity("Sale", {"n": Integer()}), Entity("Order", {})), ("Order", "x", {}))
        tenant = Tenant(lab.application, lab.store, TENANT, None, lambda: TIME_US)
        tenant.delete("Order", "x")
        tenant.create("Sale", {"n": 1}, "x")
        renames = [Rename(version=2, entity="Sale", to="Order")]

        adopt(lab, application(Entity("Order", {"n": Integer()}), version=2, renames=renames), migrate=True)

        pending = update(1, "x", {"n": 2}, entity="Sale", base_version=3, schema_version=1)
        assert said(lab.settle(pending)) == ["APPLIED"]
        assert contents(lab) == {"Order/x": {"n": 2}}

    def test_what_must_have_a_value_gets_its_default(self) -> None:
        """A newly required attribute without a value, or null, gets its default; a merely optional one stays away."""
        lab = filled(OPEN, ("Task", "t1", {}), ("Task", "t2", {"n": None}), ("Task", "t3", {"n": 5}))
        served = application(
            task(
                {"n": Integer(required=True, default=1), "o": Integer(default=2), "l": List(required=True, default=[])}
            ),
            version=2,
        )
        assert len(contradictions(lab, served)) == 3

        adopt(lab, served, migrate=True)

        assert contents(lab) == {
            "Task/t1": {"n": 1, "l": []},
            "Task/t2": {"n": 1, "l": []},
            "Task/t3": {"n": 5, "l": []},
        }

    def test_migrations_run_in_order_and_delete(self) -> None:
        """The functions of all versions that the store has not seen run one after the other; None deletes."""
        lab = filled(OPEN, ("Task", "t1", {"n": 1}), ("Task", "t2", {"n": 2}))
        served = application(task({"n": Integer()}), version=4)

        @served.migration("Task", version=4)
        def doubles(attributes: dict[str, Any]) -> dict[str, Any]:
            return {"n": attributes["n"] * 2}

        @served.migration("Task", version=3)
        def adds(attributes: dict[str, Any]) -> dict[str, Any] | None:
            attributes["n"] += 10
            return None if attributes["n"] == 12 else attributes

        @served.migration("Task", version=1)
        def was_there(attributes: dict[str, Any]) -> None:
            raise AssertionError("the store has this version already")

        adopt(lab, served, migrate=True)

        assert contents(lab) == {"Task/t1": {"n": 22}}
        lab.check_history()
        adopt(lab, application(task({"n": Integer()}), version=5), migrate=True)
        assert contents(lab) == {"Task/t1": {"n": 22}}

    def test_without_being_told_nothing_is_migrated(self) -> None:
        """A start that was not told to migrate does not pass over a migration: it names what has not run."""
        lab = filled(application(task({"n": Integer()})), ("Task", "t1", {"n": 1}))
        served = application(task({"n": Integer()}), version=2)

        @served.migration("Task", version=2)
        def spoils(attributes: dict[str, Any]) -> dict[str, Any]:
            return {"n": 0}

        with pytest.raises(SchemaContradicted) as refused:
            adopt(lab, served)

        assert refused.value.contradictions == ["tenant 'default': Task: the migration to version 2 has not run"]
        assert contents(lab) == {"Task/t1": {"n": 1}}
        adopt(lab, served, migrate=True)
        assert contents(lab) == {"Task/t1": {"n": 0}}

    def test_there_is_no_way_back_behind_a_migration(self) -> None:
        """An older schema, or none, is refused once a migration has run: it would run again on the way forward."""
        former = application(task({"n": Integer()}))
        lab = filled(former, ("Task", "t1", {"n": 1}))
        served = application(task({"n": Integer()}), version=2)

        @served.migration("Task", version=2)
        def doubles(attributes: dict[str, Any]) -> dict[str, Any]:
            return {"n": 2 * attributes["n"]}

        adopt(lab, served, migrate=True)

        for older in (former, Application()):
            with pytest.raises(SchemaContradicted, match="migrated to version 2"):
                adopt(lab, older)
        adopt(lab, served, migrate=True)
        assert contents(lab) == {"Task/t1": {"n": 2}}

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (lambda _: 1 / 0, "ZeroDivisionError: division by zero"),
            (lambda _: 7, "InvalidValue: expected a dict of attributes or None, got int"),
            (lambda _: {"n": object()}, "InvalidValue: attribute 'n'"),
            (lambda _: {"n": 1, "t": "x" * 3_000_000}, "LimitExceeded: an object of"),
        ],
    )
    def test_a_migration_that_fails_is_named(self, result: Callable[[Any], Any], message: str) -> None:
        """Whatever a function of the application does, the object is named and the store stays as it is."""
        lab = filled(OPEN, ("Task", "t1", {"n": 1}))
        served = application(task({}), version=2, open=True)
        served.migration("Task", version=2)(result)

        [found] = contradictions(lab, served, migrate=True)

        assert found.startswith("tenant 'default': Task 't1': the migration of Task to version 2 failed: " + message)

    def test_what_a_migration_leaves_must_fit(self) -> None:
        """A value that does not fit, a reference to what is deleted, a value that is taken: named beforehand."""
        lab = filled(OPEN, ("Task", "t1", {"n": 1}), ("Task", "t2", {"n": 2, "of": "t1"}), ("Task", "t3", {"n": 3}))
        served = application(task({"n": Integer(maximum=10), "of": Reference("Task")}, unique=["n"]), version=2)

        @served.migration("Task", version=2)
        def migrate(attributes: dict[str, Any]) -> dict[str, Any] | None:
            return None if attributes["n"] == 1 else {**attributes, "n": 9}

        found = contradictions(lab, served, migrate=True)

        assert found == [
            "tenant 'default': Task 't2': attribute 'of' is 't1', but there is no such Task",
            "tenant 'default': Task 't3': attribute 'n' is 9, but must be unique: Task 't2' has the same",
        ]

    def test_references_follow_renamed_entities(self) -> None:
        """A reference to an object that gets another entity name leads to it afterwards."""
        lab = filled(
            application(Entity("Sale", {}), Entity("Line", {"sale": Reference("Sale")})),
            ("Sale", "s1", {}),
            ("Line", "l1", {"sale": "s1"}),
        )
        served = application(
            Entity("Order", {}),
            Entity("Line", {"sale": Reference("Order")}),
            version=2,
            renames=[Rename(version=2, entity="Sale", to="Order")],
        )

        adopt(lab, served, migrate=True)

        tenant = Tenant(served, lab.store, TENANT, None, lambda: TIME_US)
        with pytest.raises(OperationRefused, match="Line 'l1' refers to it"):
            tenant.delete("Order", "s1")

    def test_an_attribute_by_both_names_is_named(self) -> None:
        """An object that has the former and the present name of an attribute is a contradiction, not a loss."""
        lab = filled(OPEN, ("Task", "t1", {"n": 1, "m": 2}))

        [found] = contradictions(lab, application(task({"m": Integer()}), version=2, renames=[RENAMED]), migrate=True)

        assert "'t1'" in found
        assert "former name 'n'" in found

    def test_declarations_that_make_no_sense_are_refused(self) -> None:
        """A second function for one version, and a coroutine, are an error at once."""
        served = application(task({}), version=2)

        async def later(attributes: dict[str, Any]) -> dict[str, Any]:
            return attributes

        served.migration("Task", version=2)(dict)
        with pytest.raises(InvalidRule, match="stands twice"):
            served.migration("Task", version=2)(lambda _: None)
        with pytest.raises(InvalidRule, match="plain function"):
            served.migration("Task", version=1)(later)  # type: ignore[type-var]


class Seen(NamedTuple):
    """What a conflict policy was asked: base, theirs, mine."""

    base: dict[str, Any]
    theirs: dict[str, Any]
    mine: dict[str, Any] | None


def watched_policy(served: Application, entity: str) -> list[Seen]:
    """Let a policy decide that adds what is theirs and mine; return what it will be asked."""
    asked: list[Seen] = []

    def policy(base: dict[str, Any], theirs: dict[str, Any], mine: dict[str, Any] | None) -> dict[str, Any]:
        asked.append(Seen(base, theirs, mine))
        return {**theirs, **(mine or {})}

    served.on_conflict(entity, policy)
    return asked


def moved(*, version: int = 2) -> Application:
    """Return an application in whose schema sales are orders, and their price is in cents."""
    served = application(
        Entity(
            "Order",
            {"cents": Integer(), "note": String(), "state": String(required=True, default="open"), "who": String()},
        ),
        version=version,
        renames=[
            Rename(version=2, entity="Sale", to="Order"),
            Rename(version=2, entity="Order", attribute="price", to="cents"),
            Rename(version=2, entity="Order", attribute="text", to="note"),
        ],
    )

    @served.migration("Order", version=2)
    def in_cents(attributes: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in attributes.items() if name != "legacy"}
        return kept if "cents" not in kept else {**kept, "cents": kept["cents"] * 100}

    return served


BEFORE_THE_MOVE = application(
    Entity("Sale", {"price": Integer(), "text": String(), "who": String(), "legacy": String()})
)


def pending(seq: int, set: dict[str, Any] | None = None, **others: Any) -> bytes:  # noqa: A002 - a patch's field
    """Return an update of s1 that was made with the schema before the move."""
    return update(seq, "s1", set, entity="Sale", schema_version=1, **others)


class TestPendingOperations:
    """What a device did before a migration, and sends after it."""

    def test_a_migration_is_no_conflict(self) -> None:
        """With `reject_stale` nothing is stale because of a migration, whatever it did to the object."""
        lab = filled(BEFORE_THE_MOVE, ("Sale", "s1", {"price": 2, "text": "a"}), ("Sale", "s2", {}))
        served = moved()
        served.on_conflict("Order", "reject_stale")

        adopt(lab, served, migrate=True)

        results = lab.settle(
            pending(1, {"price": 3, "text": "b"}, base_version=1),
            delete(2, "s2", entity="Sale", schema_version=1, base_version=2),
        )
        assert said(results) == ["APPLIED", "APPLIED"]

    def test_what_others_did_before_or_after_it_still_is(self) -> None:
        """What somebody changed by its former name before a migration is told from the rest, through two of them."""
        lab = filled(BEFORE_THE_MOVE, ("Sale", "s1", {"price": 2, "text": "a", "who": "x"}))
        lab.settle(pending(1, {"text": "theirs"}, base_version=1), replica=REPLICA_B)
        adopt(lab, moved(), migrate=True)
        served = application(
            Entity("Order", {"cents": Integer(), "remark": String(), "state": String(), "owner": String()}),
            version=3,
            renames=[
                *moved().schema.renames,
                Rename(version=3, entity="Order", attribute="note", to="remark"),
                Rename(version=3, entity="Order", attribute="who", to="owner"),
            ],
        )
        served.on_conflict("Order", "reject_stale")
        adopt(lab, served, migrate=True)
        lab.settle(update(2, "s1", {"owner": "theirs"}, entity="Order", base_version=lab.version()), replica=REPLICA_B)

        results = lab.settle(
            pending(1, {"text": "mine"}, base_version=1),
            pending(2, {"who": "mine"}, base_version=1),
            pending(3, {"price": 5}, base_version=1),
            pending(4, {"text": "mine"}, base_version=2),
        )

        assert said(results) == ["CONFLICT", "CONFLICT", "APPLIED", "APPLIED"]
        assert "'remark' of Order 's1'" in results[0].message

    def test_a_policy_gets_the_object_as_its_author_would_see_it_now(self) -> None:
        """The base has the names of today, and the values that the migration made of what its author saw."""
        lab = filled(BEFORE_THE_MOVE, ("Sale", "s1", {"price": 2, "text": "a", "legacy": "z"}))
        lab.settle(pending(1, {"text": "theirs", "who": "ben", "legacy": "y"}, base_version=1), replica=REPLICA_B)
        served = moved()
        asked = watched_policy(served, "Order")
        adopt(lab, served, migrate=True)

        assert said(lab.settle(pending(1, {"text": "mine"}, base_version=1))) == ["APPLIED"]

        base = {"cents": 200, "note": "a", "state": "open"}
        assert asked == [Seen(base, {**base, "note": "theirs", "who": "ben"}, {**base, "note": "mine"})]

    def test_what_the_author_did_before_it_is_its_own(self) -> None:
        """What the author's replica did before a migration is what the migration made of it."""
        lab = filled(BEFORE_THE_MOVE)
        lab.settle(
            create(1, "s1", {"price": 1, "text": "a"}, entity="Sale"),
            pending(2, {"price": 2, "who": "ann"}, unset=["text"]),
            pending(3, increment={"price": 1}),
        )
        served = moved()
        asked = watched_policy(served, "Order")
        adopt(lab, served, migrate=True)
        lab.settle(update(1, "s1", {"note": "theirs"}, entity="Order", base_version=lab.version()), replica=REPLICA_B)

        assert said(lab.settle(pending(4, {"text": "mine"}))) == ["APPLIED"]

        [(base, theirs, mine)] = asked
        assert base == {}
        assert theirs == {"cents": 300, "note": "theirs", "state": "open", "who": "ann"}
        assert mine is not None
        assert {**mine, "cents": 0} == {"cents": 0, "note": "mine", "state": "open", "who": "ann"}

    def test_a_migration_does_not_make_a_failure_stale(self) -> None:
        """A retry after a migration needs no force, unless somebody changed the same, by whatever name."""
        lab = filled(Application(schema=BEFORE_THE_MOVE.schema), ("Sale", "s1", {"price": 2, "text": "a"}))

        @lab.application.before_commit("Sale")
        def refuses(sale: HookObject, context: HookContext) -> None:
            raise Reject("not today")

        refused = [lab.settle(pending(seq, values, base_version=1))[0].failure_id
                   for seq, values in ((1, {"text": "mine"}), (2, {"price": 3}))]  # fmt: skip
        lab.application = BEFORE_THE_MOVE
        lab.settle(pending(1, {"text": "theirs"}, base_version=1), replica=REPLICA_B)
        served = moved()
        adopt(lab, served, migrate=True)
        decision = failures.Decision(Principal("olga"), TIME_US)

        with pytest.raises(FailureStale):
            lab.store.submit(TENANT, lambda reader: failures.retry(reader, served, refused[0], decision)).result()
        lab.store.submit(TENANT, lambda reader: failures.retry(reader, served, refused[1], decision)).result()

        assert contents(lab) == {"Order/s1": {"cents": 3, "note": "theirs", "state": "open"}}

    @pytest.mark.parametrize("seed", range(20))
    def test_a_policy_is_asked_as_if_the_names_had_always_been_these(self, seed: int) -> None:
        """Whenever the names change in a history, a policy is asked the same, and decides the same."""
        outcomes = [outcome_of_history(seed, migrated_at) for migrated_at in (0, 1, 3, 6, 9, 12)]

        assert all(outcome == outcomes[0] for outcome in outcomes)


ONE_NAME = application(Entity("Sale", {"a": Integer(), "b": Integer(), "c": Integer()}))
OTHER_NAMES = application(
    Entity("Order", {"x": Integer(), "a": Integer(), "c": Integer()}),
    version=3,
    renames=[
        Rename(version=2, entity="Sale", to="Order"),
        Rename(version=2, entity="Order", attribute="a", to="x"),
        Rename(version=3, entity="Order", attribute="b", to="a"),
    ],
)


def outcome_of_history(seed: int, migrated_at: int) -> tuple[list[str], list[Seen], dict[str, dict[str, Any]]]:
    """Let two devices change an object, and migrate it meanwhile; return what became of a last operation."""
    dice = random.Random(seed)
    lab = filled(Application(schema=ONE_NAME.schema))
    watched_policy(lab.application, "Sale")
    served = Application(schema=OTHER_NAMES.schema)
    asked = watched_policy(served, "Order")
    # The migration takes versions, too: what was seen is remembered by when it was.
    versions = [0]
    for seq in range(1, 13):
        if seq == migrated_at + 1:
            adopt(lab, served, migrate=True)
        replica, operation = random_operation(dice, seq, versions)
        lab.settle(operation, replica=replica)
        versions.append(lab.version())
    if migrated_at == 12:
        adopt(lab, served, migrate=True)
    asked.clear()
    _, operation = random_operation(dice, 13, versions)
    return said(lab.settle(operation)), asked, contents(lab)


def random_operation(dice: random.Random, seq: int, versions: list[int]) -> tuple[bytes, bytes]:
    """Return some replica and what it does."""
    replica, base_version = dice.choice([REPLICA_A, REPLICA_B]), dice.choice(versions)
    said_so: dict[str, Any] = {"entity": "Sale", "schema_version": 1}
    values = {name: dice.randrange(3) for name in "abc" if dice.random() < 0.5}
    match dice.choice(["update", "update", "increment", "delete" if seq == 13 else "update"]):
        case _ if seq == 1:
            return replica, create(seq, "s1", values, **said_so)
        case "update":
            unset = [name for name in "abc" if name not in values][:1]
            return replica, update(seq, "s1", values, unset=unset, base_version=base_version, **said_so)
        case "increment":
            return replica, update(seq, "s1", increment=values, base_version=base_version, **said_so)
    return replica, delete(seq, "s1", base_version=base_version, **said_so)


class TestIndexes:
    def test_rules_that_come_later_hold_for_older_objects(self) -> None:
        """Unique values and references that are declared later bind what was there before."""
        lab = filled(
            application(task({"n": Integer(), "of": String()})),
            ("Task", "t1", {"n": 1}),
            ("Task", "t2", {"n": 2, "of": "t1"}),
        )
        served = application(task({"n": Integer(), "of": Reference("Task")}, unique=["n"]), version=2)

        adopt(lab, served)

        tenant = Tenant(served, lab.store, TENANT, None, lambda: TIME_US)
        with pytest.raises(OperationRefused, match="taken"):
            tenant.create("Task", {"n": 1})
        with pytest.raises(OperationRefused, match="Task 't2' refers to it"):
            tenant.delete("Task", "t1")

    def test_rules_that_go_leave_nothing_behind(self) -> None:
        """Entries of a rule that was given up are gone, so that they cannot mislead when it comes back."""
        ruled = application(task({"n": Integer()}, unique=["n"], indexes=["n"]))
        lab = filled(ruled, ("Task", "t1", {"n": 1}))

        adopt(lab, application(task({"n": Integer()}), version=2))
        assert indexes(lab) == {}
        Tenant(lab.application, lab.store, TENANT, None, lambda: TIME_US).update("Task", "t1", {"n": 2})
        adopt(lab, ruled)

        tenant = Tenant(ruled, lab.store, TENANT, None, lambda: TIME_US)
        tenant.create("Task", {"n": 1})
        with pytest.raises(OperationRefused):
            tenant.create("Task", {"n": 2})

    @pytest.mark.parametrize("seed", range(5))
    def test_a_table_made_later_is_the_one_that_was_kept(self, seed: int) -> None:
        """Whether an index was there from the beginning or is made from the histories, it is the same."""
        ruled = application(
            task({"n": Integer(), "m": Integer(), "of": Reference("Task", on_delete="clear")}, indexes=["n", "m"]),
            version=2,
        )
        plain = application(task({"n": Integer(), "m": Integer(), "of": String()}), version=1)
        dice = random.Random(seed)
        steps = [
            (dice.choice("cuuuud"), f"t{dice.randrange(4)}", {dice.choice("nm"): dice.choice([0, 1, 2, None])})
            for _ in range(60)
        ]
        labs = filled(ruled), filled(plain)
        for lab in labs:
            tenant = Tenant(lab.application, lab.store, TENANT, None, lambda: TIME_US)
            for kind, id_, attributes in steps:
                exists = tenant.get("Task", id_) is not None
                if not exists:
                    tenant.create("Task", {**attributes, "of": id_}, id_)
                elif kind == "d":
                    tenant.delete("Task", id_)
                else:
                    tenant.update("Task", id_, attributes)

        adopt(labs[1], ruled)

        assert indexes(labs[1]) == indexes(labs[0])
        assert any(key[:1] == b"v" for key in indexes(labs[0]))


class SharedStore(MemoryStore):
    """A store of many servers."""

    is_shared: ClassVar[bool] = True


def version_of(store: Store) -> int:
    """Return the version of the schema that a store is served with."""
    schema = adopted_schema(store.note)
    assert schema is not None
    return schema.version


class TestManyServers:
    def test_an_older_schema_does_not_take_the_store_back(self) -> None:
        """Where others may serve a newer schema an older one is refused, unless the server is told to go back."""
        older, newer = application(task({"n": Integer()})), application(task({"n": Integer()}), version=2)
        store = SharedStore()
        adopt_schema(newer, store, migrate=False, time_us=TIME_US)
        for refused in (older, Application()):
            with pytest.raises(SchemaContradicted, match="version 2 of the schema is served"):
                adopt_schema(refused, store, migrate=False, time_us=TIME_US)
            assert version_of(store) == 2

        adopt_schema(older, store, migrate=True, time_us=TIME_US)
        assert version_of(store) == 1
        adopt_schema(older, store, migrate=False, time_us=TIME_US)

    @pytest.mark.parametrize("is_ready", [True, False])
    def test_a_schema_that_is_adopted_in_between(self, *, is_ready: bool) -> None:
        """Once its store is ready, a server refuses if another one has meanwhile made it ready for another schema."""
        disk: dict[str, Any] = {}
        store, other = MemoryStore(disk), MemoryStore(disk)
        older, newer = application(task({"n": Integer()})), application(task({}), version=2)
        if is_ready:
            adopt_schema(older, store, migrate=False, time_us=TIME_US)
        name = "note" if is_ready else "set_note"
        original = getattr(store, name)

        def overtaken(*arguments: Any) -> Any:
            result = original(*arguments)
            adopt_schema(newer, other, migrate=False, time_us=TIME_US)
            return result

        setattr(store, name, overtaken)
        adopt_schema(older, store, migrate=False, time_us=TIME_US)

        with pytest.raises(ServerOutdated), store.read(TENANT) as reader:
            reader.head()


class Killed(BaseException):
    """The process was killed."""


class Watched:
    """
    A store that is killed after so many writes.

    Attributes:
        written: What was written.
    """

    is_shared: ClassVar[bool] = False

    def __init__(self, store: Store, writes_max: int = 1_000_000) -> None:
        self._store = store
        self._left = writes_max
        self.written: list[Writes] = []

    def submit(
        self, tenant: str, job: Callable[[Reader], tuple[Writes | None, T]], attempt: Attempt | None = None
    ) -> Future[T]:
        """Run a job, unless it is over."""

        def watched(reader: Reader) -> tuple[Writes | None, T]:
            writes, result = job(reader)
            if writes is not None:
                self.written.append(writes)
            return writes, result

        self._count()
        return self._store.submit(tenant, watched, attempt)

    def announce(self, tenant: str, attempt: Attempt) -> None:
        """As the store does."""
        self._store.announce(tenant, attempt)

    def left_under_way(self) -> UnderWay:
        """As the store does."""
        return self._store.left_under_way()

    def forget_under_way(self) -> None:
        """As the store does."""
        self._store.forget_under_way()

    def set_note(self, name: str, value: bytes, *, expected: bytes | None = None) -> bool:
        """Note something, unless it is over."""
        self._count()
        return self._store.set_note(name, value, expected=expected)

    def require_note(self, name: str, value: bytes) -> None:
        """As the store does."""
        self._store.require_note(name, value)

    def preparing(self) -> AbstractContextManager[None]:
        """As the store does."""
        return self._store.preparing()

    def _count(self) -> None:
        if not self._left:
            raise Killed
        self._left -= 1

    @property
    def identity(self) -> Identity:
        """Return which store this is."""
        return self._store.identity

    def read(self, tenant: str) -> AbstractContextManager[Reader]:
        """Read a tenant's data."""
        return self._store.read(tenant)

    def tenants(self) -> list[str]:
        """Return the tenants."""
        return self._store.tenants()

    def check_outside_of_jobs(self) -> None:
        """Do what the store does."""
        self._store.check_outside_of_jobs()

    def note(self, name: str) -> bytes:
        """Return what was noted."""
        return self._store.note(name)

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def shop_before() -> Lab:
    """Return two tenants with sales, priced in whole units."""
    return filled(
        application(
            Entity("Sale", {"price": Integer(), "kind": String()}), Entity("Line", {"sale": Reference("Sale")})
        ),
        *(("Sale", f"s{number}", {"price": number, "kind": "ab"[number % 2]}) for number in range(7)),
        ("Line", "l1", {"sale": "s1"}),
        tenants=("acme", TENANT),
    )


def shop_after() -> Application:
    """Return an application whose migration must not run twice on an object."""
    served = application(
        Entity("Order", {"cents": Integer(required=True), "sort": String()}, unique=["cents"], indexes=["sort"]),
        Entity("Line", {"sale": Reference("Order")}),
        version=2,
        renames=[
            Rename(version=2, entity="Sale", to="Order"),
            Rename(version=2, entity="Order", attribute="price", to="cents"),
            Rename(version=2, entity="Order", attribute="kind", to="sort"),
        ],
    )

    @served.migration("Order", version=2)
    def in_cents(attributes: dict[str, Any]) -> dict[str, Any] | None:
        return None if attributes["cents"] == 3 else {**attributes, "cents": attributes["cents"] * 100}

    return served


class TestCrashes:
    def test_a_migration_that_is_killed_anywhere_is_finished_by_the_next_start(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However often and wherever a server is killed, what comes out is what an undisturbed one leaves."""
        monkeypatch.setattr(adoption, "PAGE_OBJECTS_MAX", 2)
        whole = shop_before()
        adopt(whole, shop_after(), migrate=True)
        expected = {tenant: contents(whole, tenant) for tenant in ("acme", TENANT)}
        assert expected["acme"]["Order/s6"] == {"cents": 600, "sort": "a"}
        assert "Order/s3" not in expected["acme"]

        finished = False
        for writes_max in itertools.count():
            lab = shop_before()
            try:
                adopt(lab, shop_after(), migrate=True, store=Watched(lab.store, writes_max))
                finished = True
            except Killed:
                adopt(lab, shop_after(), migrate=True)
            assert {tenant: contents(lab, tenant) for tenant in ("acme", TENANT)} == expected
            assert indexes(lab) == indexes(whole)
            lab.check_history()
            if finished:
                assert writes_max > 20
                break

    def test_what_was_broken_off_is_finished_before_anything_else(self) -> None:
        """In the middle of a migration no other schema is served, nor the same one without being told to migrate."""
        lab = shop_before()
        former = lab.application
        with pytest.raises(Killed):
            adopt(lab, shop_after(), migrate=True, store=Watched(lab.store, 3))

        for served, migrate in ((former, False), (former, True), (shop_after(), False), (Application(), True)):
            with pytest.raises(MigrationUnfinished, match="to version 2 of the schema was broken off"):
                adopt(lab, served, migrate=migrate)

        adopt(lab, shop_after(), migrate=True)
        assert contents(lab)["Order/s6"] == {"cents": 600, "sort": "a"}

    def test_indexes_that_were_not_finished_are_made_anew(self) -> None:
        """A rebuild that was broken off leaves nothing behind, also for the schema that was served before."""
        former = application(task({"n": Integer()}, unique=["n"]))
        lab = filled(former, *(("Task", f"t{number}", {"n": number}) for number in range(3)))
        complete = indexes(lab)
        with pytest.raises(Killed):
            adopt(
                lab,
                application(task({"n": Integer()}, indexes=["n"]), version=2),
                store=Watched(lab.store, 2),
            )
        assert indexes(lab) == {}

        adopt(lab, former)

        assert indexes(lab) == complete


def test_a_replica_follows_an_index_that_was_made_anew() -> None:
    """A cursor from before a table was made, or given up and made again, still sees what left a value since."""
    indexed = application(task({"who": String()}, indexes=["who"]))
    indexed.synchronize("Task", attribute("who") == "ann")
    lab = filled(indexed, *(("Task", f"t{number}", {"who": "ann"}) for number in range(3)))
    before = download(lab, b"")
    assert before.snapshots == {"t0", "t1", "t2"}
    without = application(task({"who": String()}), version=2)
    adopt(lab, without)
    tenant = Tenant(without, lab.store, TENANT, None, lambda: TIME_US)
    tenant.update("Task", "t0", {"who": "bob"})
    tenant.delete("Task", "t1")
    tenant.create("Task", {"who": "ann"}, "t3")
    again = application(task({"who": String()}, indexes=["who"]))
    again.synchronize("Task", attribute("who") == "ann")

    adopt(lab, again)

    after = download(lab, before.cursor)
    assert (after.snapshots, after.removals) == ({"t3"}, {"t0", "t1"})


class Downloaded(NamedTuple):
    """What a replica gets."""

    snapshots: set[str]
    removals: set[str]
    cursor: bytes


def download(lab: Lab, cursor: bytes) -> Downloaded:
    """Download as a replica with a cursor does."""
    projection = Projection(lab.application, Principal("ann"), {})
    found = Download(lab.store, projection)
    with lab.store.read(TENANT) as reader:
        start = found.start_of(reader, cursor, b"")
    pages = list(found.everything_since(start))
    return Downloaded(
        {one.id for page in pages for one in page.snapshots},
        {one.id for page in pages for one in page.removals},
        cursor_at(lab.store.identity, found.head, projection.scope),
    )
