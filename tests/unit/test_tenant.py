"""What a service does in its own process: reading, changing, transactions, rights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.builders import REPLICA_A, TENANT, TIME_US, Lab, create, delete, said, update

from tidelog import (
    Entity,
    FailureReason,
    Integer,
    InvalidConstraint,
    InvalidValue,
    LimitExceeded,
    List,
    ObjectExists,
    ObjectNotFound,
    Reference,
    ResourceClosed,
    Schema,
    String,
    ValidationFailed,
    attribute,
    claim,
)
from tidelog_server import (
    Application,
    ChangedMeanwhile,
    Found,
    HookContext,
    HookObject,
    OperationRefused,
    Principal,
    Reject,
    Tenant,
    TenantTransaction,
    TransientError,
)
from tidelog_server import _tenant as tenant_module
from tidelog_server._records import NO_REPLICA

ANN = Principal("ann", roles=frozenset({"clerk"}), claims={"region": "north"})

SHOP = Schema(
    [
        Entity("Customer", {"number": Integer(required=True, minimum=1), "name": String()}, unique=["number"]),
        Entity(
            "Order",
            {
                "customer": Reference("Customer", required=True),
                "status": String(default="open"),
                "tags": List(String()),
                "count": Integer(),
            },
            indexes=["status"],
        ),
        Entity("Line", {"order": Reference("Order", on_delete="cascade"), "also": Reference("Line")}),
    ],
    version=3,
)


def tenant_of(lab: Lab, name: str = TENANT, principal: Principal | None = None) -> Tenant:
    """Return a tenant of a lab's store."""
    return Tenant(lab.application, lab.store, name, principal, lambda: TIME_US)


@pytest.fixture
def lab() -> Lab:
    """Give an application without rules."""
    return Lab()


@pytest.fixture
def shop() -> Lab:
    """Give a shop with the customer c1, the order o1 and its line l1."""
    lab = Lab(Application(schema=SHOP))
    with tenant_of(lab).transaction() as transaction:
        transaction.create("Customer", {"number": 1}, "c1")
        transaction.create("Order", {"customer": "c1"}, "o1")
        transaction.create("Line", {"order": "o1"}, "l1")
    return lab


class TestMethods:
    def test_an_object_is_created_read_changed_and_deleted(self, lab: Lab) -> None:
        """Each method does what it says, through the engine: the change log explains all of it."""
        tenant = tenant_of(lab)

        id_ = tenant.create("Task", {"title": "Buy milk", "n": 1, "tags": ["a"]})
        tenant.update("Task", id_, {"done": True}, unset=["title"], increment={"n": 2}, add={"tags": ["b"]})
        tenant.update("Task", id_, remove={"tags": ["a"]})

        assert tenant.get("Task", id_) == {"done": True, "n": 3, "tags": ["b"]}
        tenant.delete("Task", id_)
        assert tenant.get("Task", id_) is None
        lab.check_history()

    def test_an_entity_that_the_schema_lacks_is_told(self, shop: Lab) -> None:
        """Whoever reads or writes what can never be there has mistaken its name."""
        tenant = tenant_of(shop)
        attempts: list[Callable[[], object]] = [
            lambda: tenant.get("Ordr", "o1"),
            lambda: tenant.create("Ordr", {}),
            lambda: tenant.update("Ordr", "o1", {}),
            lambda: tenant.delete("Ordr", "o1"),
        ]

        for attempt in attempts:
            with pytest.raises(ValidationFailed, match="the schema has no such entity"):
                attempt()
        with pytest.raises(InvalidConstraint, match="the schema has no entity 'Ordr'"):
            tenant.query("Ordr")
        with tenant.transaction() as transaction, pytest.raises(ValidationFailed, match="the schema has no such"):
            transaction.get("Ordr", "o1")

    def test_ids_are_new_unless_given(self, lab: Lab) -> None:
        """`create` returns the id that was given, or one that nobody has."""
        tenant = tenant_of(lab)

        assert tenant.create("Task", {}, "t1") == "t1"
        assert len({tenant.create("Task", {}) for _ in range(3)}) == 3

    def test_changes_say_who(self, lab: Lab) -> None:
        """The change log attributes a change to the system or to the principal, and to no replica."""
        tenant_of(lab).create("Task", {}, "t1")
        tenant_of(lab, principal=ANN).update("Task", "t1", {"a": 1})

        assert [(change.user_id, change.replica, change.seq) for change in lab.changes()] == [
            ("system", NO_REPLICA, 0),
            ("ann", NO_REPLICA, 0),
        ]

    def test_a_query_gives_what_matches_in_order(self, lab: Lab) -> None:
        """Objects that match come with id, version and attributes, in the order of their ids; deleted ones do not."""
        tenant = tenant_of(lab)
        for id_, n in (("b", 2), ("a", 1), ("d", 2), ("c", 2)):
            tenant.create("Task", {"n": n}, id_)
        tenant.delete("Task", "d")

        assert list(tenant.query("Task", {"n": 2})) == [Found("b", 1, {"n": 2}), Found("c", 4, {"n": 2})]
        assert [found.id for found in tenant.query("Task", attribute("n") < 2)] == ["a"]
        assert [found.id for found in tenant.query("Task")] == ["a", "b", "c"]
        assert list(tenant.query("Note")) == []

    def test_a_query_reads_page_by_page(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """More objects than fit a page come all, each once, whatever is written meanwhile."""
        monkeypatch.setattr(tenant_module, "PAGE_OBJECTS_MAX", 3)
        tenant = tenant_of(lab)
        for number in range(10):
            tenant.create("Task", {}, f"t{number}")

        found = []
        for one in tenant.query("Task"):
            tenant.update("Task", one.id, {"seen": True})
            found.append(one.id)

        assert found == [f"t{number}" for number in range(10)]

    def test_what_is_returned_is_the_callers_own(self, lab: Lab) -> None:
        """Nobody changes what is stored, or what a transaction will store, by changing what was given or got."""
        tenant = tenant_of(lab)
        attributes = {"tags": [["a"]]}
        with tenant.transaction() as transaction:
            transaction.create("Task", attributes, "t1")
            attributes["tags"][0].append("b")
            got = transaction.get("Task", "t1")
            assert got is not None
            got["tags"].append("c")
            assert transaction.get("Task", "t1") == {"tags": [["a"]]}
        read = tenant.get("Task", "t1")
        assert read is not None
        read["tags"].append("d")

        assert tenant.get("Task", "t1") == {"tags": [["a"]]}

    @pytest.mark.parametrize(
        "misuse",
        [
            lambda tenant: tenant.create("", {}),
            lambda tenant: tenant.create("Task", {}, "x" * 129),
            lambda tenant: tenant.create("Task", {}, 7),
            lambda tenant: tenant.create("Task", {"a": object()}),
            lambda tenant: tenant.create("Task", {"": 1}),
            lambda tenant: tenant.create("Task", {"a": "x" * 1_100_000}),
            lambda tenant: tenant.update("Task", "t1", {"n": 1}, increment={"n": 1}),
            lambda tenant: tenant.update("Task", "t1", add={"tags": "abc"}),
            lambda tenant: tenant.update("Task", "t1", increment={"n": "1"}),
            lambda tenant: tenant.update("Task", "t1", unset="n"),
            lambda tenant: tenant.delete("Task", ""),
            lambda tenant: tenant.get("Task", "nul\0"),
            lambda tenant: tenant.get("x" * 65, "t1"),
            lambda tenant: tenant.query("", None),
        ],
    )
    def test_what_cannot_be_is_refused_at_once(self, lab: Lab, misuse: Callable[[Tenant], object]) -> None:
        """A name, an id or a value that cannot be stored raises InvalidValue, and nothing is done."""
        tenant = tenant_of(lab)
        tenant.create("Task", {"n": 1}, "t1")

        with pytest.raises(InvalidValue):
            misuse(tenant)

        assert lab.version() == 1

    def test_a_senseless_constraint_is_refused_before_anything_is_read(self, shop: Lab) -> None:
        """A query that the schema knows to be wrong raises when it is made, not when it is read."""
        tenant = tenant_of(shop)

        for wrong in ({"colour": "red"}, {"status": 1}):
            with pytest.raises(InvalidConstraint):
                tenant.query("Order", wrong)
        with pytest.raises(InvalidConstraint):
            tenant.query("Ghost")


class TestRules:
    def test_objects_that_are_there_or_not(self, lab: Lab) -> None:
        """Creating what exists, and changing or deleting what does not, are errors that name the object."""
        tenant = tenant_of(lab)
        tenant.create("Task", {}, "t1")

        with pytest.raises(ObjectExists) as exists:
            tenant.create("Task", {}, "t1")
        with pytest.raises(ObjectNotFound) as missing:
            tenant.update("Task", "t2", {"a": 1})
        with pytest.raises(ObjectNotFound):
            tenant.delete("Task", "t2")

        assert (exists.value.entity, exists.value.id) == ("Task", "t1")
        assert (missing.value.entity, missing.value.id) == ("Task", "t2")
        assert lab.version() == 1

    def test_a_value_that_does_not_fit_the_schema_is_refused_at_once(self, shop: Lab) -> None:
        """What can be told without the object is told when it is said, not when the block ends."""
        with tenant_of(shop).transaction() as transaction:
            with pytest.raises(ValidationFailed, match="'number' is 0"):
                transaction.create("Customer", {"number": 0})
            with pytest.raises(ValidationFailed, match="no such attribute"):
                transaction.update("Order", "o1", {"colour": "red"})
            with pytest.raises(ValidationFailed, match="no such entity"):
                transaction.delete("Ghost", "g1")

        assert shop.version() == 3

    def test_what_a_hook_may_still_mend_is_judged_at_the_end(self, shop: Lab) -> None:
        """A required attribute that is left out may come from a hook; from nowhere, it is refused with its reason."""
        with pytest.raises(OperationRefused, match="'number' is null, but must have a value") as refused:
            tenant_of(shop).create("Customer", {"name": "Ann"}, "c2")

        assert refused.value.reason is FailureReason.VALIDATION_FAILED
        assert (refused.value.entity, refused.value.id, refused.value.code) == ("Customer", "c2", "")

        @shop.application.before_commit("Customer")
        def number(customer: HookObject, context: HookContext) -> None:
            customer["number"] = customer["number"] or 7

        tenant_of(shop).create("Customer", {"name": "Ann"}, "c2")

        assert tenant_of(shop).get("Customer", "c2") == {"name": "Ann", "number": 7}

    def test_defaults_are_filled_in(self, shop: Lab) -> None:
        """A creation gets the defaults that it leaves out, and its transaction sees them."""
        with tenant_of(shop).transaction() as transaction:
            transaction.create("Order", {"customer": "c1"}, "o2")
            seen = transaction.get("Order", "o2")

        assert seen == tenant_of(shop).get("Order", "o2") == {"customer": "c1", "status": "open"}

    def test_a_hook_runs_changes_and_rejects(self, lab: Lab) -> None:
        """Hooks see the principal; what they write is part of the transaction, what they reject raises with code."""

        @lab.application.before_commit("Task")
        def checks(task: HookObject, context: HookContext) -> None:
            if task["title"] == "bad":
                raise Reject("not this one", code="BAD")
            task["by"] = context.principal.user_id
            context.create("Audit", {"task": task.id}, f"audit-{task.id}")

        tenant = tenant_of(lab)
        tenant.create("Task", {"title": "good"}, "t1")
        with pytest.raises(OperationRefused, match="not this one") as refused:
            tenant.create("Task", {"title": "bad"}, "t2")

        assert (refused.value.reason, refused.value.code) == (FailureReason.HOOK_REJECTED, "BAD")
        assert tenant.get("Task", "t1") == {"title": "good", "by": "system"}
        assert [change.by_hook for change in lab.changes()] == [True, False]
        assert [found.id for found in tenant.query("Audit")] == ["audit-t1"]

    def test_a_hook_that_fails_elsewhere_is_no_missing_object(self, lab: Lab) -> None:
        """Where a hook writes an object that is not there, the operation is refused; its own object is not missing."""

        @lab.application.after_commit("Line")
        def total(line: HookObject, context: HookContext) -> None:
            context.update("Order", "nowhere", {"total": 1})

        with pytest.raises(OperationRefused) as refused:
            tenant_of(lab).create("Line", {}, "l1")

        assert refused.value.id == "l1"
        assert "Order 'nowhere'" in str(refused.value)

    def test_hooks_that_call_each_other_are_bounded(self, lab: Lab) -> None:
        """A loop of hooks ends in a refusal, and nothing of it stays."""

        @lab.application.after_commit("Task")
        def again(task: HookObject, context: HookContext) -> None:
            context.update("Task", task.id, {"n": (task["n"] or 0) + 1})

        with pytest.raises(OperationRefused, match="16 deep") as refused:
            tenant_of(lab).create("Task", {}, "t1")

        assert refused.value.reason is FailureReason.HOOK_ERROR
        assert lab.version() == 0

    def test_a_hook_that_cannot_tell_now_refuses_nothing(self, lab: Lab) -> None:
        """TransientError comes through as it is, and nothing was applied."""

        @lab.application.before_commit("Task")
        def asks(task: HookObject, context: HookContext) -> None:
            raise TransientError("the credit bureau is down")

        with pytest.raises(TransientError, match="credit bureau"):
            tenant_of(lab).create("Task", {})

        assert lab.version() == 0

    def test_a_deletion_cascades(self, shop: Lab) -> None:
        """What refers to a deleted object goes with it, or keeps it from going, as the schema says."""
        tenant = tenant_of(shop)
        with pytest.raises(OperationRefused, match="cannot be deleted: Order 'o1' refers to it") as refused:
            tenant.delete("Customer", "c1")
        assert refused.value.reason is FailureReason.REFERENCED

        tenant.delete("Order", "o1")

        assert tenant.get("Line", "l1") is None
        tenant.delete("Customer", "c1")
        shop.check_history()

    def test_the_changes_of_a_service_are_somebody_elses_to_a_replica(self, lab: Lab) -> None:
        """With the policy `reject_stale` a pending update of what the service has changed since is a conflict."""
        lab.application.on_conflict("Task", "reject_stale")
        lab.settle(create(1, "t1", {"a": 1, "b": 1}))
        tenant_of(lab).update("Task", "t1", {"a": 2})

        assert said(
            lab.settle(update(2, "t1", {"a": 3}, base_version=1), update(3, "t1", {"b": 3}, base_version=1))
        ) == ["CONFLICT", "APPLIED"]
        assert said(lab.settle(delete(4, "t1", base_version=1))) == ["CONFLICT"]

    def test_what_hooks_of_others_write_is_somebody_elses(self, lab: Lab) -> None:
        """With the policy `reject_stale` what a hook of another replica's operation wrote is a conflict."""
        lab.application.on_conflict("Task", "reject_stale")

        @lab.application.after_commit("Line")
        def counts(line: HookObject, context: HookContext) -> None:
            context.update("Task", "t1", {"a": line["a"]})

        lab.settle(create(1, "t1", {"a": 1}))
        lab.settle(create(1, "l1", {"a": 2}, entity="Line"), replica=b"b" * 16)

        assert said(lab.settle(update(2, "t1", {"a": 3}, base_version=1))) == ["CONFLICT"]
        assert lab.attributes("t1") == {"a": 2}

    def test_the_service_itself_overlooks_nothing(self, lab: Lab) -> None:
        """No conflict policy stands in the way of a service: it writes what it wants over what is there."""
        lab.application.on_conflict("Task", "reject_stale")
        lab.settle(create(1, "t1", {"a": 1}), update(2, "t1", {"a": 2}, base_version=1))

        tenant_of(lab).update("Task", "t1", {"a": 3})

        assert lab.attributes("t1") == {"a": 3}


class TestRights:
    @pytest.fixture
    def guarded(self) -> Lab:
        """Give tasks of two regions, of which a clerk sees that of hers, and not the secret."""
        lab = Lab()
        mine = attribute("region") == claim("region")
        lab.application.allow(
            "clerk", "Task", create=True, read=["region", "title"], write=["region", "title"], where=mine
        )
        with tenant_of(lab).transaction() as transaction:
            transaction.create("Task", {"region": "north", "title": "a", "secret": 1}, "t1")
            transaction.create("Task", {"region": "south", "title": "b", "secret": 1}, "t2")
        return lab

    def test_the_system_may_do_everything(self, guarded: Lab) -> None:
        """Access rules do not bind the system."""
        tenant = tenant_of(guarded)

        tenant.update("Task", "t2", {"secret": 2})

        assert tenant.get("Task", "t2") == {"region": "south", "title": "b", "secret": 2}
        assert [found.id for found in tenant.query("Task", {"secret": 2})] == ["t2"]

    def test_what_may_not_be_read_is_as_if_it_were_not_there(self, guarded: Lab) -> None:
        """A principal gets the objects and attributes that its rules let it read; the others it cannot even change."""
        tenant = tenant_of(guarded, principal=ANN)

        assert tenant.get("Task", "t1") == {"region": "north", "title": "a"}
        assert tenant.get("Task", "t2") is None
        assert [found.id for found in tenant.query("Task")] == ["t1"]
        assert [found.id for found in tenant.query("Task", attribute("region") == claim("region"))] == ["t1"]
        assert list(tenant.query("Task", ~(attribute("region") == claim("team")))) == []
        with pytest.raises(ObjectNotFound):
            tenant.update("Task", "t2", {"title": "x"})
        with pytest.raises(ObjectNotFound):
            tenant.delete("Task", "t2")

    def test_a_constraint_cannot_find_out_what_may_not_be_read(self, guarded: Lab) -> None:
        """A query by an unreadable attribute is refused."""
        with pytest.raises(InvalidConstraint, match="'secret', which may not be read"):
            tenant_of(guarded, principal=ANN).query("Task", {"secret": 1})

    def test_what_may_not_be_written_is_refused_with_the_reason(self, guarded: Lab) -> None:
        """An attribute that is not granted, a deletion, and what leaves the rows of a rule are refused."""
        tenant = tenant_of(guarded, principal=ANN)
        changes: list[tuple[Callable[[], object], FailureReason]] = [
            (lambda: tenant.update("Task", "t1", {"secret": 2}), FailureReason.ATTRIBUTE_DENIED),
            (lambda: tenant.update("Task", "t1", {"region": "south"}), FailureReason.ACCESS_DENIED),
            (lambda: tenant.create("Task", {"region": "south"}), FailureReason.ACCESS_DENIED),
            (lambda: tenant.delete("Task", "t1"), FailureReason.ACCESS_DENIED),
        ]
        for change, reason in changes:
            with pytest.raises(OperationRefused) as refused:
                change()
            assert refused.value.reason is reason

        tenant.update("Task", "t1", {"title": "x"})
        assert guarded.attributes("t1") == {"region": "north", "title": "x", "secret": 1}

    def test_what_is_looked_for_in_vain_may_be_there_unseen(self, guarded: Lab) -> None:
        """A transaction that did not find a hidden object is applied, though somebody changes that one meanwhile."""
        with tenant_of(guarded, principal=ANN).transaction() as transaction:
            assert transaction.get("Task", "t2") is None
            tenant_of(guarded).update("Task", "t2", {"title": "c"})
            transaction.update("Task", "t1", {"title": "x"})

        assert guarded.attributes("t1") == {"region": "north", "title": "x", "secret": 1}

    def test_what_comes_into_sight_meanwhile_is_a_change(self, guarded: Lab) -> None:
        """An object that was not seen and now is makes the transaction repeat."""
        with (  # noqa: PT012 - its end raises
            pytest.raises(ChangedMeanwhile),
            tenant_of(guarded, principal=ANN).transaction() as transaction,
        ):
            assert transaction.get("Task", "t2") is None
            tenant_of(guarded).update("Task", "t2", {"region": "north"})
            transaction.update("Task", "t1", {"title": "x"})

    def test_a_principal_without_any_rule_is_bound_by_none(self, lab: Lab) -> None:
        """Where no access rules were declared, a principal may do everything."""
        tenant = tenant_of(lab, principal=ANN)
        tenant.create("Task", {"a": 1}, "t1")

        assert list(tenant.query("Task")) == [Found("t1", 1, {"a": 1})]


class TestTransactions:
    def test_all_or_nothing(self, shop: Lab) -> None:
        """If one of the changes is refused none is applied, and the error names the one."""
        with pytest.raises(OperationRefused) as refused, tenant_of(shop).transaction() as transaction:  # noqa: PT012 - its end raises
            transaction.create("Customer", {"number": 2}, "c2")
            transaction.create("Customer", {"number": 1}, "c3")
            transaction.create("Customer", {"number": 4}, "c4")

        assert (refused.value.id, refused.value.reason) == ("c3", FailureReason.UNIQUE_VIOLATED)
        assert shop.version() == 3

    def test_a_refusal_of_the_first_names_the_first(self, shop: Lab) -> None:
        """What only shows at the end is still attributed to the change that is to blame."""
        with pytest.raises(OperationRefused) as refused, tenant_of(shop).transaction() as transaction:  # noqa: PT012 - its end raises
            transaction.create("Customer", {"number": 1}, "c2")
            transaction.create("Customer", {"number": 3}, "c3")

        assert refused.value.id == "c2"

    def test_a_block_that_raises_leaves_no_trace(self, lab: Lab) -> None:
        """An error in the block is the caller's, and nothing is applied."""
        with pytest.raises(KeyError), tenant_of(lab).transaction() as transaction:  # noqa: PT012 - its end raises
            transaction.create("Task", {})
            raise KeyError

        assert lab.version() == 0

    def test_unique_values_are_swapped(self, shop: Lab) -> None:
        """What is unique counts at the end only."""
        tenant = tenant_of(shop)
        tenant.create("Customer", {"number": 2}, "c2")

        with tenant.transaction() as transaction:
            transaction.update("Customer", "c1", {"number": 2})
            transaction.update("Customer", "c2", {"number": 1})

        assert [found.attributes["number"] for found in tenant.query("Customer")] == [2, 1]

    def test_a_reference_may_lead_to_what_is_created_further_on(self, shop: Lab) -> None:
        """The order of creations does not matter; two may refer to each other."""
        tenant = tenant_of(shop)

        with tenant.transaction() as transaction:
            transaction.create("Line", {"order": "o2", "also": "l3"}, "l2")
            transaction.create("Line", {"order": "o2", "also": "l2"}, "l3")
            transaction.create("Order", {"customer": "c1"}, "o2")

        assert tenant.get("Line", "l2") == {"order": "o2", "also": "l3"}

    def test_a_reference_to_nothing_is_refused(self, shop: Lab) -> None:
        """An object that is not there, or no longer since an earlier change, cannot be referred to."""
        tenant = tenant_of(shop)
        with pytest.raises(OperationRefused, match="refers to Order 'o9', which does not exist") as refused:
            tenant.create("Line", {"order": "o9"})
        assert refused.value.reason is FailureReason.DANGLING_REFERENCE
        with pytest.raises(OperationRefused, match="which does not exist"), tenant.transaction() as transaction:  # noqa: PT012 - its end raises
            transaction.create("Order", {"customer": "c1"}, "o2")
            transaction.delete("Order", "o2")
            transaction.create("Line", {"order": "o2"})

        assert shop.version() == 3

    def test_it_sees_its_own_changes(self, lab: Lab) -> None:
        """`get` shows an object as the transaction would leave it, whether it looked before it wrote or after."""
        tenant = tenant_of(lab)
        tenant.create("Task", {"n": 1, "tags": ["a"]}, "t1")
        tenant.create("Task", {}, "t2")

        with tenant.transaction() as transaction:
            transaction.update("Task", "t1", increment={"n": 1})
            assert transaction.get("Task", "t1") == {"n": 2, "tags": ["a"]}
            transaction.update("Task", "t1", {"x": 1}, unset=["n"], add={"tags": ["b"]})
            assert transaction.get("Task", "t1") == {"x": 1, "tags": ["a", "b"]}
            transaction.delete("Task", "t2")
            assert transaction.get("Task", "t2") is None
            transaction.create("Task", {"new": True}, "t2")
            assert transaction.get("Task", "t2") == {"new": True}
            assert tenant.get("Task", "t2") == {}

        assert tenant.get("Task", "t1") == {"x": 1, "tags": ["a", "b"]}
        assert tenant.get("Task", "t2") == {"new": True}
        lab.check_history()

    def test_what_it_knows_to_be_wrong_it_says_at_once(self, lab: Lab) -> None:
        """Once an object was looked at, created or deleted, what cannot follow raises; the block may go on."""
        tenant = tenant_of(lab)
        tenant.create("Task", {"n": "x"}, "t1")

        with tenant.transaction() as transaction:
            assert transaction.get("Task", "t1")
            with pytest.raises(ObjectExists):
                transaction.create("Task", {}, "t1")
            with pytest.raises(InvalidValue, match="cannot be added"):
                transaction.update("Task", "t1", increment={"n": 1})
            transaction.create("Task", {}, "t2")
            with pytest.raises(ObjectExists):
                transaction.create("Task", {}, "t2")
            transaction.delete("Task", "t2")
            with pytest.raises(ObjectNotFound):
                transaction.update("Task", "t2", {"a": 1})
            with pytest.raises(ObjectNotFound):
                transaction.delete("Task", "t2")

        assert [change.key[1] for change in lab.changes()] == ["t1", "t2", "t2"]

    def test_an_increment_that_does_not_fit_is_refused_at_the_end(self, lab: Lab) -> None:
        """Where nobody looked, an intent that does not fit the present value is a refusal."""
        tenant = tenant_of(lab)
        tenant.create("Task", {"n": "x"}, "t1")

        with pytest.raises(OperationRefused) as refused:
            tenant.update("Task", "t1", increment={"n": 1})

        assert refused.value.reason is FailureReason.VALIDATION_FAILED

    @pytest.mark.parametrize("what", ["changed", "deleted", "recreated", "created"])
    def test_what_it_looked_at_must_be_as_it_was(self, lab: Lab, what: str) -> None:
        """If somebody has touched what the transaction read, nothing is applied and it can be repeated."""
        tenant = tenant_of(lab)
        tenant.create("Task", {"n": 1}, "t1")

        def meanwhile() -> None:
            if what == "changed":
                tenant.update("Task", "t1", {"n": 2})
            elif what == "created":
                tenant.create("Task", {}, "t9")
            else:
                tenant.delete("Task", "t1")
                if what == "recreated":
                    tenant.create("Task", {"n": 1}, "t1")

        with pytest.raises(ChangedMeanwhile, match=r"Task 't[19]'"), tenant.transaction() as transaction:  # noqa: PT012 - its end raises
            transaction.get("Task", "t1")
            transaction.get("Task", "t9")
            transaction.create("Task", {}, "t2")
            meanwhile()

        assert tenant.get("Task", "t2") is None

    def test_what_was_only_read_is_compared_too(self, lab: Lab) -> None:
        """A transaction that writes nothing says whether what it read belonged together."""
        tenant = tenant_of(lab)
        tenant.create("Task", {}, "t1")

        with tenant.transaction() as transaction:
            transaction.get("Task", "t1")
        with pytest.raises(ChangedMeanwhile), tenant.transaction() as second:  # noqa: PT012 - its end raises
            second.get("Task", "t1")
            tenant.update("Task", "t1", {"n": 2})

        assert transaction.version == 1
        assert lab.version() == 2

    def test_others_changes_of_what_it_did_not_look_at_do_not_matter(self, lab: Lab) -> None:
        """Without `get` the last one wins, and increments add up."""
        tenant = tenant_of(lab)
        tenant.create("Task", {"n": 1}, "t1")

        with tenant.transaction() as transaction:
            transaction.update("Task", "t1", increment={"n": 1})
            tenant.update("Task", "t1", increment={"n": 1})

        assert tenant.get("Task", "t1") == {"n": 3}

    def test_it_tells_the_version(self, lab: Lab) -> None:
        """After the block `version` is the tenant's version; a block that did nothing takes none."""
        with tenant_of(lab).transaction() as transaction:
            transaction.create("Task", {})
            transaction.create("Task", {})
        with tenant_of(lab).transaction() as empty:
            pass

        assert (transaction.version, empty.version) == (2, 0)

    def test_it_is_used_once_and_in_its_block(self, lab: Lab) -> None:
        """Before its block, after it, and a second time a transaction refuses."""
        transaction = tenant_of(lab).transaction()
        uses: list[Callable[[], object]] = [
            lambda: transaction.create("Task", {}),
            lambda: transaction.get("Task", "t1"),
        ]
        for use in uses:
            with pytest.raises(ResourceClosed, match="begins with its block"):
                use()
        with transaction:
            transaction.create("Task", {})
        for use in uses:
            with pytest.raises(ResourceClosed, match="has ended"):
                use()
        with pytest.raises(ResourceClosed, match="used once"), transaction:
            pass

        assert lab.version() == 1

    def test_thousands_of_operations(self, shop: Lab) -> None:
        """A transaction far larger than a commit group is applied as one."""
        with tenant_of(shop).transaction() as transaction:
            for number in range(2, 5_002):
                transaction.create("Customer", {"number": number}, f"n{number}")

        assert transaction.version == shop.version() == 5_003

    def test_it_is_bounded(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """Operations, bytes and objects looked at have limits; what goes over raises, the rest is applied."""
        monkeypatch.setattr(tenant_module, "TRANSACTION_OPERATIONS_MAX", 2)
        monkeypatch.setattr(tenant_module, "TRANSACTION_BYTES_MAX", 100)
        monkeypatch.setattr(tenant_module, "TRANSACTION_READS_MAX", 1)

        def over(transaction: TenantTransaction) -> list[Callable[[], object]]:
            return [
                lambda: transaction.create("Task", {"text": "x" * 90}),
                lambda: transaction.get("Task", "t8"),
            ]

        with tenant_of(lab).transaction() as transaction:
            transaction.create("Task", {"text": "x" * 50})
            transaction.get("Task", "t9")
            for use in over(transaction):
                with pytest.raises(LimitExceeded):
                    use()
            transaction.create("Task", {})
            with pytest.raises(LimitExceeded, match="2 operations"):
                transaction.create("Task", {})

        assert lab.version() == 2


class TestTenants:
    def test_tenants_are_apart(self, lab: Lab) -> None:
        """The same id in two tenants is two objects, and each tenant counts its own versions."""
        acme, brick = tenant_of(lab, "acme"), tenant_of(lab, "brick")
        acme.create("Task", {"of": "acme"}, "t1")
        brick.create("Task", {"of": "brick"}, "t1")
        with brick.transaction() as transaction:
            transaction.update("Task", "t1", {"n": 1})

        assert acme.get("Task", "t1") == {"of": "acme"}
        assert brick.get("Task", "t1") == {"of": "brick", "n": 1}
        assert transaction.version == 2
        with lab.store.read("acme") as reader:
            assert reader.head().version == 1
        acme.delete("Task", "t1")
        assert [found.id for found in brick.query("Task")] == ["t1"]

    def test_a_service_and_a_replica_write_to_one_history(self, lab: Lab) -> None:
        """What a replica created a service changes, and the other way round."""
        lab.settle(create(1, "t1"), replica=REPLICA_A)
        tenant_of(lab).update("Task", "t1", {"n": 1})
        tenant_of(lab).create("Task", {}, "t2")

        assert said(lab.settle(update(2, "t2", {"a": 1}, base_version=3))) == ["APPLIED"]
        lab.check_history()
