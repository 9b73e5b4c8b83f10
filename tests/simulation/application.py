"""The application that simulated replicas work with: hooks of every kind, and what a seed makes of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Literal, get_args

from tests.simulation.model import Attributes, Misfit, patched, same
from tests.simulation.rights import Granted, allow

from tidelog import (
    Constraint,
    Download,
    DownloadMode,
    Entity,
    FailureReason,
    Integer,
    Operation,
    OperationKind,
    Reference,
    Schema,
    String,
    attribute,
    claim,
)
from tidelog._attributes import AttributeType, OnDelete
from tidelog_server import Application, HookContext, HookObject, Principal, Reject, TransientError

ENTITIES = ("Note", "Task", "Order", "Line", "Node", "Counter", "Audit")
# What all work on in some worlds.
CONTENDED: Final = ("Note", "Node")
REFERENCES: Final[dict[str, dict[str, str | list[str]]]] = {
    "Line": {"order": "Order", "also": ["Order"]},
    "Node": {"next": "Node", "friends": ["Node"]},
}


ROLES: Final = ("clerk", "boss")
HOOK_SECONDS_MAX: Final = 600.0  # a slow machine must not decide anything
SMALL: Final = 20


@dataclass(frozen=True)
class Business:
    """
    What a seed makes of the application.

    Attributes:
        on_delete: What becomes of an object when one that it refers to is deleted, by (entity, attribute).
        is_strict: Whether the schema has rules that the replicas' programs do not know.
        policies: What happens to stale edits, by entity.
        granted: Access rules. None: everything is allowed.
        offers: How much of each entity is downloaded.
        is_contended: Whether all work on the same few objects.
    """

    on_delete: Mapping[tuple[str, str], OnDelete] = field(default_factory=dict)
    is_strict: bool = False
    policies: Mapping[str, Literal["reject_stale", "merge"]] = field(default_factory=dict)
    granted: tuple[Granted, ...] = ()
    offers: Mapping[str, Download] = field(default_factory=dict)
    is_contended: bool = False

    @classmethod
    def drawn(cls, random: Random) -> Business:
        """Draw one: half of them say nothing but what refers to what."""
        if random.random() < 0.4:
            return cls()
        behaviours = get_args(OnDelete)
        return cls(
            {
                (entity, name): random.choice([*behaviours, "restrict"])
                for entity, targets in REFERENCES.items()
                for name in targets
                if random.random() < 0.6
            },
            random.random() < 0.5,
            {entity: random.choice(["reject_stale", "merge"]) for entity in ("Note", "Node") if random.random() < 0.8},
            _rules(random) if random.random() < 0.5 else (),
            {
                entity: _offer(random)
                for entity in ("Note", "Task", "Node", "Counter", "Audit")
                if random.random() < 0.2
            },
        )

    @classmethod
    def contended(cls, random: Random) -> Business:
        """Draw one with rules of every kind about the objects that all work on."""
        behaviours: list[OnDelete] = ["clear", "cascade", "restrict"]
        policies: list[Literal["reject_stale", "merge"]] = ["reject_stale", "merge"]
        return cls(
            {
                ("Node", "next"): random.choices(behaviours[:2], [1, 2])[0],
                ("Node", "friends"): random.choices(behaviours, [1, 1, 3])[0],
            },
            random.random() < 0.5,
            {entity: random.choices(policies, [3, 1])[0] for entity in CONTENDED},
            _rules(random, CONTENDED) if random.random() < 0.6 else (),
            is_contended=True,
        )

    def schema(self, version: int, *, is_servers: bool = True) -> Schema:
        """Return the schema, as the server or as the replicas' programs know it."""
        declared: dict[str, dict[str, AttributeType]] = {
            entity: {
                name: Reference(target, on_delete=self.on_delete.get((entity, name), "keep"))
                if isinstance(target, str)
                else Reference(target[0], many=True, on_delete=self.on_delete.get((entity, name), "keep"))
                for name, target in targets.items()
            }
            for entity, targets in REFERENCES.items()
        }
        if version > 1 and is_servers:
            declared["Node"]["mate"] = Reference("Node", on_delete="clear")
        unique: dict[str, tuple[str, ...]] = {}
        indexes: dict[str, tuple[str, ...]] = {}
        if self.is_strict and is_servers:
            declared["Note"] = {"n": Integer(minimum=-SMALL, maximum=SMALL)}
            declared["Task"] = {"title": String(required=True)}
            unique["Note"] = ("n",)
            indexes = {"Note": ("n",), "Task": ("title",)}
        return Schema(
            [
                Entity(name, attributes, unique=unique.get(name, ()), indexes=indexes.get(name, ()))
                for name, attributes in declared.items()
            ],
            version=version,
            open=True,
        )

    def principal(self, random: Random, user_id: str) -> Principal:
        """Draw who somebody is."""
        return Principal(user_id, roles=frozenset([random.choice(ROLES)]), claims={"least": random.randint(-3, 1)})

    def names(self) -> Iterator[str]:
        """Name what was drawn."""
        yield from (f"on_delete {behaviour}" for behaviour in self.on_delete.values())
        yield from (f"policy {policy}" for policy in self.policies.values())
        yield from (f"download {offer.mode.value}" for offer in self.offers.values())
        if self.is_strict:
            yield "strict schema"
        if self.granted:
            yield "access rules"

    def wishes(self, random: Random) -> dict[str, Download]:
        """Draw how much a replica wants."""
        return {entity: _offer(random) for entity in ENTITIES if random.random() < 0.15}

    def narrow_wishes(self, random: Random) -> dict[str, Download]:
        """Draw how much a replica wants that wants something else of most entities than before."""
        return {
            entity: Download(DownloadMode.WHERE, _constraint(random)) for entity in ENTITIES if random.random() < 0.6
        }

    def breaks_rules(self, entity: str, attributes: Attributes) -> bool:
        """Tell whether an object does not fit the server's schema."""
        if not self.is_strict:
            return False
        if entity == "Note":
            n = attributes.get("n")
            return n is not None and (type(n) is not int or not -SMALL <= n <= SMALL)
        return entity == "Task" and type(attributes.get("title")) is not str

    def unique_value(self, entity: str, attributes: Attributes | None) -> int | None:
        """Return the value of an object that no other one of its entity may have, or None."""
        return attributes.get("n") if self.is_strict and entity == "Note" and attributes is not None else None

    def refuses(self, entity: str, attributes: Attributes) -> str:
        """Tell why an object can never be written like this, whoever writes it; empty: it can."""
        if self.breaks_rules(entity, attributes):
            return "it does not fit the schema"
        if entity in {"Task", "Order"} and attributes.get("title") == "":
            return "it has no title"
        return "its hook breaks" if entity == "Task" and attributes.get("boom") else ""

    def refuses_deletion(self, entity: str, attributes: Attributes) -> str:
        """Tell why an object can never be deleted, whoever deletes it; empty: it can."""
        return "it is locked" if entity == "Task" and attributes.get("locked") else ""

    def restricts(self, entity: str) -> bool:
        """Tell whether the deletion of an object of an entity may be refused for the sake of others."""
        return any(
            behaviour == "restrict" and _target(*reference) in {entity, *self._cascaded(entity)}
            for reference, behaviour in self.on_delete.items()
        )

    def _cascaded(self, entity: str) -> Iterator[str]:
        """Yield the entities of which objects may be deleted along with one of *entity*."""
        found = [entity]
        for one in found:
            # An order's lines are deleted by a hook, whatever the schema says.
            sources = [source for source, name in self.on_delete if _target(source, name) == one]
            found += [source for source in [*sources, *(["Line"] if one == "Order" else [])] if source not in found]
        yield from found


def _target(entity: str, name: str) -> str:
    target = REFERENCES[entity][name]
    return target if isinstance(target, str) else target[0]


def _rules(random: Random, special: Sequence[str] = ()) -> tuple[Granted, ...]:
    """Draw access rules: everybody may do everything, but for clerks with an entity or two."""
    clerks = _contending_clerks if special else _clerks
    special = special or random.sample(["Note", "Task", "Node", "Line"], random.randint(1, 2))
    free = [Granted("*", entity, True, True, None, None, None, None) for entity in ENTITIES if entity not in special]
    bosses = [Granted("boss", entity, True, True, None, None, None, None) for entity in special]
    return (*free, *bosses, *(clerks(random, entity) for entity in special))


def _clerks(random: Random, entity: str) -> Granted:
    return Granted(
        "clerk",
        entity,
        random.random() < 0.8,
        random.random() < 0.6,
        random.choice([None, None, frozenset({"n", "title", "order", "next", "tags"})]),
        random.choice([None, None, frozenset({"n", "x", "title", "tags", "order", "next"})]),
        random.choice([None, _constraint(random)]),
        random.choice([None, None, _constraint(random)]),
    )


def _contending_clerks(random: Random, entity: str) -> Granted:
    return Granted(
        "clerk",
        entity,
        random.random() < 0.9,
        random.random() < 0.8,
        random.choice([None, frozenset({"x", "tags", "next", "friends"})]),
        random.choice([None, None, frozenset({"x", "y", "tags", "next", "friends"})]),
        random.choice([None, _constraint(random), _constraint(random)]),
        random.choice([None, None, _constraint(random)]),
    )


def _constraint(random: Random) -> Constraint:
    return random.choice(
        [
            attribute("n") >= 0,
            attribute("n") >= claim("least"),
            ~(attribute("x") == 1),
            attribute("n").is_in([0, 1, 2]),
        ]
    )


def _offer(random: Random) -> Download:
    mode = random.choice([DownloadMode.WHERE, DownloadMode.NOTHING_CLEAR, DownloadMode.NOTHING_PRESERVE])
    return Download(mode, _constraint(random) if mode is DownloadMode.WHERE else None)


@dataclass
class Weather:
    """What hooks depend on besides their data."""

    is_service_down: bool = False


def make_application(weather: Weather, *, schema_version: int, business: Business | None = None) -> Application:
    """
    Return an application whose hooks reject, fail, change the object and write others.

    - Task: without a title rejected; a `tidy` one gets a slug; `boom` breaks the hook; `wait` needs a
      service that may be down; `counted` changes a counter; an `ephemeral` one is deleted by its own hook;
      a `locked` one cannot be deleted.
    - Order: without a title rejected; its deletion deletes its lines and leaves an audit record.
    - Line: touches its order.
    - Note: where all work on the same few objects its deletion marks the Node of the same id.

    A newer schema has another reference, and makes its Nodes anew that have an x.
    """
    business = business or Business()
    app = Application(schema=business.schema(schema_version), hook_seconds_max=HOOK_SECONDS_MAX)
    allow(app, business.granted)
    for entity, offer in business.offers.items():
        app.synchronize(entity, offer)
    for entity, policy in business.policies.items():
        app.on_conflict(entity, "reject_stale" if policy == "reject_stale" else _merged)
    if schema_version > 1:
        app.migration("Node", version=schema_version)(_second_edition)

    @app.before_commit("Task")
    @app.before_commit("Order")
    def needs_a_title(thing: HookObject, context: HookContext) -> None:
        if thing["title"] == "":
            raise Reject(f"{thing.entity} needs a title")

    @app.before_commit("Task")
    def breaks(task: HookObject, context: HookContext) -> None:
        if task["boom"]:
            raise ValueError("boom")

    @app.before_commit("Task")
    def asks_a_service(task: HookObject, context: HookContext) -> None:
        if task["wait"] and weather.is_service_down:
            raise TransientError("the service is down")

    @app.before_commit("Task")
    def tidies_up(task: HookObject, context: HookContext) -> None:
        if task["tidy"]:
            task["slug"] = str(task["title"]).lower()
            del task["y"]

    @app.after_commit("Task")
    def counts(task: HookObject, context: HookContext) -> None:
        if task["counted"]:
            _count(context, task.id)

    @app.after_commit("Task")
    def vanishes(task: HookObject, context: HookContext) -> None:
        if task["ephemeral"]:
            context.delete("Task", task.id)

    @app.before_delete("Task")
    def is_locked(task: HookObject, context: HookContext) -> None:
        if task["locked"]:
            raise Reject("the task is locked")

    @app.before_delete("Order")
    def deletes_its_lines(order: HookObject, context: HookContext) -> None:
        for id_, _ in context.query("Line", {"order": order.id}):
            context.delete("Line", id_)

    @app.after_delete("Order")
    def leaves_a_record(order: HookObject, context: HookContext) -> None:
        if context.get("Audit", order.id) is None:
            context.create("Audit", order.to_dict(), id=order.id)
        else:
            context.update("Audit", order.id, {"again": context.operation.seq})

    @app.after_delete("Note")
    def marks_its_node(note: HookObject, context: HookContext) -> None:
        if business.is_contended and context.get("Node", note.id) is not None:
            context.update("Node", note.id, {"x": context.operation.seq})

    @app.after_commit("Line")
    def touches_its_order(line: HookObject, context: HookContext) -> None:
        order = line["order"]
        if isinstance(order, str) and context.get("Order", order) is not None:
            context.update("Order", order, {"touched": context.operation.seq})

    return app


def _second_edition(node: Attributes) -> Attributes:
    """Say of a Node with an x that it is of the second edition, and no more what its x is."""
    kept = {name: value for name, value in node.items() if name != "x"}
    return {**kept, "edition": 2} if "x" in node else node


def _merged(base: Attributes, theirs: Attributes, mine: Attributes | None) -> Attributes | None:
    """Merge a stale edit: theirs is kept, but for what only the author has changed; a deletion loses."""
    if mine is None:
        return theirs
    changed = {name: value for name, value in mine.items() if name not in base or not same(value, base[name])}
    return {**changed, **theirs}


def tidied(entity: str, attributes: Attributes) -> Attributes:
    """Return what the hooks make of an object that is written."""
    if entity != "Task" or not attributes.get("tidy"):
        return attributes
    kept = {name: value for name, value in attributes.items() if name != "y"}
    return {**kept, "slug": str(attributes.get("title")).lower()}


def may_hooks_refuse(reason: FailureReason, operation: Operation, states: list[Attributes | None]) -> bool:
    """Tell whether the hooks have a reason to refuse an operation on an object that was in one of *states*."""
    entity = operation.entity
    if operation.group is not None:
        # What earlier operations of its commit group had made of the object is gone without a trace.
        return entity in {"Task", "Order"}
    if operation.kind is OperationKind.DELETE:
        return entity == "Task" and any(state is not None and state.get("locked") for state in states)
    results = [result for state in states if (result := _result(operation, state)) is not None]
    if reason is FailureReason.HOOK_REJECTED:
        # An ephemeral task may be locked as well: then it is its hook's deletion that is refused.
        return (entity in {"Task", "Order"} and any(one.get("title") == "" for one in results)) or (
            entity == "Task" and any(one.get("ephemeral") and one.get("locked") for one in results)
        )
    return entity == "Task" and any(one.get("boom") for one in results)


def _result(operation: Operation, state: Attributes | None) -> Attributes | None:
    patch = operation.decoded_patch()
    if operation.kind is OperationKind.CREATE:
        return patch.set
    if state is None:
        return None
    try:
        return patched(state, patch)
    except Misfit:
        return patch.set


def _count(context: HookContext, id_: str) -> None:
    counter = context.get("Counter", id_)
    if counter is None:
        context.create("Counter", {"count": 1}, id=id_)
        return
    count: Any = counter.get("count")
    context.update("Counter", id_, {"count": count + 1 if type(count) is int else 1})
