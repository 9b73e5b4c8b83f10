from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tidelog import (
    Download,
    DownloadMode,
    Entity,
    Integer,
    InvalidConstraint,
    InvalidValue,
    Schema,
    String,
    attribute,
    claim,
)
from tidelog._downloads import DownloadWish, downloads_of
from tidelog._values import decode_map, encode
from tidelog_server import Application, Principal
from tidelog_server import _projection as projection_module
from tidelog_server._indexes import by_version_prefix
from tidelog_server._projection import Projection, matching
from tidelog_server._records import ObjectState

ANN = Principal("ann", roles=frozenset({"worker"}), claims={"region": "north"})
TASK = {"who": "ann", "kind": "x", "n": 1}
SCHEMA = Schema(
    [Entity("Task", {"who": String(), "kind": String(), "n": Integer()}, indexes=["who", "kind"]), Entity("Note", {})],
    open=True,
)


def state_of(attributes: dict[str, Any] | None) -> ObjectState:
    """Return the state of an object; None: a tombstone."""
    return ObjectState(1, 1, b"r" * 16, attributes is None, False, b"" if attributes is None else encode(attributes))


def projected(application: Application, principal: Principal = ANN, **wishes: DownloadWish) -> Projection:
    """Return the projection of a principal with some wishes."""
    return Projection(application, principal, downloads_of(wishes))


def seen(encoded: bytes | None) -> dict[str, Any] | None:
    """Return what is seen of an object."""
    return None if encoded is None else decode_map(encoded)


class TestSight:
    def test_without_rules(self) -> None:
        """Without rules and modes an object is shown in the very bytes that are stored; a tombstone is not."""
        entity = projected(Application()).entity("Task")
        state = state_of(TASK)

        assert entity.shown.encoded(state) is state.attributes
        assert entity.readable.encoded(state) is state.attributes
        assert entity.shown.encoded(state_of(None)) is None
        assert entity.shown.is_whole

    def test_attributes_that_may_be_read(self) -> None:
        """Of an object those attributes are shown that some rule about it lets the principal read."""
        application = Application()
        application.allow("worker", "Task", read=["who"])
        application.allow("worker", "Task", read=["n"], where=attribute("kind") == "x")
        application.allow("boss", "Task")
        shown = projected(application).entity("Task").shown

        assert seen(shown.encoded(state_of(TASK))) == {"who": "ann", "n": 1}
        assert seen(shown.encoded(state_of({**TASK, "kind": "y"}))) == {"who": "ann"}
        assert seen(shown.encoded(state_of({"kind": "y"}))) == {}
        assert not shown.sees_whole_objects

    def test_objects_that_may_not_be_read(self) -> None:
        """What no rule lets the principal read is not shown, in whatever mode."""
        application = Application()
        application.allow("worker", "Task", where=attribute("who") == claim("user_id"))
        projection = projected(application)

        assert seen(projection.entity("Task").shown.encoded(state_of(TASK))) == TASK
        assert projection.entity("Task").shown.encoded(state_of({"who": "bob"})) is None
        assert projection.entity("Note").shown.encoded(state_of(TASK)) is None
        assert projection.entity("Task").shown.sees_whole_objects

    def test_a_wish_cannot_ask_for_the_rest(self) -> None:
        """A wish is decided on what may be read of the object at hand, not on what may be read of others."""
        application = Application()
        application.allow("worker", "Task", read=["kind"])
        application.allow("worker", "Task", read=["n"], where=attribute("who") == "ann")
        shown = projected(application, Task=attribute("n") == 1).entity("Task").shown

        assert seen(shown.encoded(state_of(TASK))) == {"kind": "x", "n": 1}
        assert shown.encoded(state_of({**TASK, "who": "bob"})) is None

    def test_offers_look_at_everything(self) -> None:
        """The application's own constraint may use what the principal may not read."""
        application = Application()
        application.allow("worker", "Task", read=["kind"])
        application.synchronize("Task", attribute("n") == 1)
        shown = projected(application).entity("Task").shown

        assert seen(shown.encoded(state_of(TASK))) == {"kind": "x"}
        assert shown.encoded(state_of({**TASK, "n": 2})) is None

    @pytest.mark.parametrize("where", [attribute("who") == claim("absent"), ~(attribute("who") == claim("absent"))])
    def test_a_claim_that_is_missing(self, where: Any) -> None:
        """A constraint that names a claim which the principal lacks means nothing, whatever stands around it."""
        application = Application()
        application.synchronize("Note", where)
        projection = projected(application, Task=where)

        assert projection.entity("Task").shown.encoded(state_of(TASK)) is None
        assert projection.entity("Note").shown.encoded(state_of(TASK)) is None


class TestModes:
    @pytest.mark.parametrize(
        ("offer", "wish", "mode"),
        [
            ("all", "all", "all"),
            ("all", "never", "never"),
            ("never", "all", "never"),
            ("nothing_clear", "all", "nothing_clear"),
            ("nothing_preserve", "nothing_clear", "nothing_clear"),
            ("nothing_clear", "nothing_preserve", "nothing_clear"),
            ("nothing_preserve", "never", "never"),
            (attribute("n") == 1, "all", "where"),
            (attribute("n") == 1, "nothing_preserve", "nothing_preserve"),
            ("nothing_clear", attribute("n") == 1, "nothing_clear"),
        ],
    )
    def test_the_offer_is_the_ceiling(self, offer: DownloadWish, wish: DownloadWish, mode: str) -> None:
        """A wish narrows what is offered and never widens it."""
        application = Application()
        application.synchronize("Task", offer)

        assert projected(application, Task=wish).entity("Task").mode == mode

    def test_both_constraints_are_required(self) -> None:
        """Where offer and wish both have a constraint, an object must match both."""
        application = Application()
        application.synchronize("Task", attribute("n") == 1)
        shown = projected(application, Task=attribute("kind") == "x").entity("Task").shown

        assert shown.encoded(state_of(TASK)) is not None
        assert shown.encoded(state_of({**TASK, "n": 2})) is None
        assert shown.encoded(state_of({**TASK, "kind": "y"})) is None

    def test_a_constraint_beside_a_mode_that_downloads_nothing(self) -> None:
        """Where nothing is downloaded nothing is shown, though it may be read."""
        entity = projected(Application(), Task="nothing_preserve").entity("Task")

        assert entity.shown.encoded(state_of(TASK)) is None
        assert seen(entity.readable.encoded(state_of(TASK))) == TASK
        assert entity.index_prefixes == ()

    @pytest.mark.parametrize(
        "where", [attribute("n") == 1, ~(attribute("n") == 2), (attribute("kind") == "x") & ~(attribute("n") == 1)]
    )
    def test_wishes_for_what_may_not_be_read(self, where: Any) -> None:
        """A wish that names what may not be read of any object matches nothing; an online read is refused."""
        application = Application(schema=SCHEMA)
        application.allow("worker", "Task", read=["kind"])

        entity = projected(application, Task=where).entity("Task")

        assert entity.shown.encoded(state_of(TASK)) is None
        assert (entity.mode, entity.index_prefixes) == (DownloadMode.WHERE, ())
        assert seen(entity.readable.encoded(state_of(TASK))) == {"kind": "x"}
        with pytest.raises(InvalidConstraint, match="the constraint on Task uses 'n', which may not be read"):
            matching(application.schema, application.rights(ANN), "Task", where)

    def test_what_may_not_be_read_any_more_is_another_projection(self) -> None:
        """Losing what a wish names changes the entity's fingerprint, so that its objects are compared anew."""
        before, after = Application(), Application()
        before.allow("worker", "Task", read=["kind", "n"])
        after.allow("worker", "Task", read=["kind"])
        wish = attribute("n") == 1

        scopes = [projected(application, Task=wish).scope.of("Task") for application in (before, after)]

        assert scopes[0] != scopes[1]

    def test_wishes_that_do_not_fit_the_schema(self) -> None:
        """Such a wish is refused, also where nothing may be read, or passed over."""
        application = Application(schema=Schema(list(SCHEMA.entities.values())))
        application.allow("boss", "*")
        wishes = downloads_of({"Note": ~(attribute("kind") == "x"), "Task": attribute("n") == "x"})

        for entity, wish in wishes.items():
            with pytest.raises(InvalidConstraint, match=r"has no attribute 'kind'|never compared with 'x'"):
                Projection(application, ANN, {entity: wish})
        boss = Principal("boss", roles=frozenset({"boss"}))
        tolerant = Projection(application, boss, wishes, tolerant=True)
        assert all(tolerant.entity(name).shown.is_whole for name in wishes)
        with pytest.raises(InvalidValue):
            Projection(application, ANN, {"": Download()}, tolerant=True)


class TestPlans:
    def test_nothing_special(self) -> None:
        """Entities that are simply downloaded are not mentioned."""
        assert projected(Application(), Task="all").plans(0) == []
        assert projected(Application(), Task="all").plans(0, None) == []

    def test_modes_and_reconciliations(self) -> None:
        """Each entity that differs is named with its mode, whether it reconciles, whether its uploads stay behind."""
        application = Application()
        application.synchronize("Gone", "never")
        projection = projected(application, Task=attribute("n") == 1, Note="nothing_clear")

        def told(*reconciling: str) -> list[tuple[str, int, bool, bool]]:
            return [
                (plan.entity, plan.mode, plan.upload_excluded, plan.reconcile)
                for plan in projection.plans(0, reconciling if reconciling != ("*",) else None)
            ]

        gone = ("Gone", DownloadMode.NEVER.number, True, False)
        note = ("Note", DownloadMode.NOTHING_CLEAR.number, False, False)
        where = DownloadMode.WHERE.number
        assert told() == [gone, note, ("Task", where, False, False)]
        assert told("Task", "Other", "Note") == [
            gone,
            note,
            ("Other", DownloadMode.ALL.number, False, True),
            ("Task", where, False, True),
        ]
        assert told("*") == [gone, note, ("Task", where, False, True)]

    def test_uploads_are_taken_until_a_date(self) -> None:
        """An entity that was turned to never keeps sending its operations until the date that was named."""
        until = datetime(2026, 1, 1, tzinfo=UTC)
        application = Application()
        application.synchronize("Task", "never", uploads_until=until)
        time_us = int(until.timestamp() * 1e6)

        assert [plan.upload_excluded for plan in projected(application).plans(time_us - 1)] == [False]
        assert [plan.upload_excluded for plan in projected(application).plans(time_us)] == [True]


class TestScope:
    def test_nothing_special(self) -> None:
        """Without rules and modes nothing leaves a fingerprint."""
        scope = projected(Application(), Task="all").scope

        assert (scope.default, dict(scope.entities)) == (b"", {})

    def test_only_what_differs_is_named(self) -> None:
        """Rules for everything are in the default; entities with rules, modes or wishes of their own are named."""
        application = Application()
        application.allow("*", "*", read=["n"])
        application.allow("worker", "Task")
        application.synchronize("Note", "nothing_clear")
        scope = projected(application, Other=attribute("n") == 1).scope

        assert scope.default != b""
        assert sorted(scope.entities) == ["Note", "Other", "Task"]
        assert scope.of("Task") == b""  # everything is seen
        assert scope.of("Unknown") == scope.default

    def test_what_changes_a_fingerprint(self) -> None:
        """Rules that apply, claims that they use, mode and constraints each leave another fingerprint."""

        def fingerprint(principal: Principal = ANN, offer: DownloadWish = "all", **wishes: DownloadWish) -> bytes:
            application = Application()
            application.allow("worker", "Task", where=attribute("region") == claim("region"))
            application.allow("boss", "Task", where=attribute("n") == 1)
            application.synchronize("Task", offer)
            return projected(application, principal, **wishes).scope.of("Task")

        south = Principal("ann", roles=frozenset({"worker"}), claims={"region": "south"})
        boss = Principal("ann", roles=frozenset({"worker", "boss"}), claims={"region": "north"})
        where = attribute("region") == "north"
        prints = [
            fingerprint(),
            fingerprint(south),
            fingerprint(boss),
            fingerprint(offer=where),
            fingerprint(Task=where),
            fingerprint(Task=attribute("region") == "south"),
            fingerprint(Task="never"),
        ]
        assert len(set(prints)) == len(prints)
        assert fingerprint(Task="never") == fingerprint(Task="nothing_clear")
        elsewhere = Principal("bob", roles=ANN.roles, claims={"region": "north", "other": "x"})
        assert fingerprint(elsewhere) == fingerprint()  # nothing that matters differs


class TestSources:
    def prefixes(self, *, offer: DownloadWish = "all", wish: DownloadWish = "all", **rule: Any) -> Any:
        """Return where tasks are found in the table of indexes."""
        application = Application(schema=SCHEMA)
        if rule:
            application.allow("worker", "Task", **rule)
        application.synchronize("Task", offer)
        return projected(application, Task=wish).entity("Task").index_prefixes

    def test_the_whole_entity(self) -> None:
        """Without a constraint that requires a value of an indexed attribute all objects are looked at."""
        assert self.prefixes() is None
        assert self.prefixes(wish=attribute("n") == 1) is None
        assert self.prefixes(wish=attribute("who") != "ann") is None
        assert self.prefixes(where=attribute("n") == 1) is None

    def test_one_value(self) -> None:
        """A value that offer, wish or rule requires leads to the objects that have it."""
        expected = (by_version_prefix("Task", "who", "ann"),)
        where = attribute("who") == "ann"

        assert self.prefixes(wish=where) == expected
        assert self.prefixes(offer=where & (attribute("n") > 1)) == expected
        assert self.prefixes(where=attribute("who") == claim("user_id")) == expected

    def test_the_fewest_values(self) -> None:
        """Of several indexes the one with the fewest values is used; values that are equal count once."""
        many = attribute("who").is_in(["a", "b", "c"])
        assert self.prefixes(wish=many) == tuple(sorted(by_version_prefix("Task", "who", one) for one in "abc"))
        assert self.prefixes(wish=many & (attribute("kind") == "x")) == (by_version_prefix("Task", "kind", "x"),)
        assert self.prefixes(wish=attribute("who").is_in(["a", "a"])) == (by_version_prefix("Task", "who", "a"),)

    def test_several_rules(self) -> None:
        """Rules add up: each must require a value, and all values are looked at."""
        application = Application(schema=SCHEMA)
        application.allow("worker", "Task", where=attribute("who") == "ann")
        application.allow("worker", "Task", read=["n", "who"], where=attribute("who") == "bob")
        both = projected(application).entity("Task").index_prefixes
        application.allow("worker", "Task", read=["n"])

        assert both == tuple(sorted(by_version_prefix("Task", "who", one) for one in ("ann", "bob")))
        assert projected(application).entity("Task").index_prefixes is None

    @pytest.mark.parametrize(("read", "is_used"), [(["n"], False), (["n", "kind"], True)])
    def test_a_value_that_may_not_be_read(self, read: list[str], is_used: bool) -> None:  # noqa: FBT001
        """By an attribute that is not read of each object at most one value is looked up: order tells nothing."""
        application = Application(schema=SCHEMA)
        application.allow("worker", "Task", read=["n", "kind"], where=attribute("n") == 1)
        application.allow("worker", "Task", read=read, where=attribute("n") == 2)

        def prefixes(*kinds: str) -> tuple[bytes, ...] | None:
            application.synchronize("Task", attribute("kind").is_in(list(kinds)))
            return projected(application).entity("Task").index_prefixes

        assert prefixes("x", "x") == (by_version_prefix("Task", "kind", "x"),)
        assert (prefixes("x", "y") is not None) == is_used

    def test_too_many_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """More values than are scanned one by one are not looked up."""
        monkeypatch.setattr(projection_module, "INDEXED_VALUES_MAX", 2)

        assert self.prefixes(wish=attribute("who").is_in(["a", "b"])) is not None
        assert self.prefixes(wish=attribute("who").is_in(["a", "b", "c"])) is None

    def test_nothing_can_be_seen(self) -> None:
        """Where nothing can match, nothing is looked at."""
        assert self.prefixes(read=[]) == ()
        assert self.prefixes(wish=attribute("who") == claim("absent")) == ()
        assert self.prefixes(wish="never") == ()
