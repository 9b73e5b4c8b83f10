"""
The download against a model: what a replica holds is what a naive reading of the rules says.

Two writers change a small tenant, the rules and wishes change, downloads are cut and go
on, writes fall between their pages, history is forgotten. The replica is modelled by what the protocol tells
it to do with a page; what it may see is computed object by object, without any of the
server's machinery. What goes wrong is cut down to the fewest actions that still do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar
from unittest import mock
from uuid import UUID

import pytest
from tests.builders import REPLICA_A, TENANT, TIME_US, MemoryStore, Step, collect, write_steps

from tidelog import (
    Constraint,
    Download,
    DownloadMode,
    Entity,
    Integer,
    Schema,
    String,
    attribute,
    claim,
)
from tidelog._keys import ObjectKey
from tidelog._values import decode_map, equal
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_server import Application, Principal, _download
from tidelog_server._errors import HistoryCollected
from tidelog_server._indexes import Written, index_writes, rebuilt
from tidelog_server._records import Writes
from tidelog_server._session import Session
from tidelog_server._store import Reader

pytestmark = pytest.mark.slow

FOREIGN_CURSOR = splice_pb2.Cursor(epoch="elsewhere", version=7).SerializeToString()
SEEDS = 40
ACTIONS = 300

Attributes = dict[str, Any]

ENTITIES = ("Task", "Note")
KEYS = [(entity, id_) for entity in ENTITIES for id_ in "abcd"]


def schema_with(indexes: Iterable[str]) -> Schema:
    """Return a schema that indexes attributes of tasks."""
    attributes = {"who": String(), "kind": String(), "n": Integer()}
    return Schema([Entity("Task", attributes, indexes=sorted(indexes)), Entity("Note", attributes)], open=True)


# The table always has all indexes: a server that is started with fewer of them uses those.
INDEXED = schema_with(("who", "kind"))


@dataclass(frozen=True)
class Granted:
    """An access rule."""

    role: str
    entity: str
    read: frozenset[str] | None
    where: Constraint | None


@dataclass(frozen=True)
class Rules:
    """All that shapes a projection."""

    granted: tuple[Granted, ...] = ()
    offers: dict[str, Download] = field(default_factory=dict)
    wishes: dict[str, Download] = field(default_factory=dict)
    roles: frozenset[str] = frozenset()
    me: str | None = None
    indexes: frozenset[str] = frozenset(("who", "kind"))

    @property
    def principal(self) -> Principal:
        """Who reads."""
        return Principal("ann", roles=self.roles, claims={} if self.me is None else {"me": self.me})

    def application(self) -> Application:
        """Return the application with these rules."""
        application = Application(schema=schema_with(self.indexes))
        for one in self.granted:
            application.allow(one.role, one.entity, read="*" if one.read is None else one.read, where=one.where)
        for entity, offer in self.offers.items():
            application.synchronize(entity, offer)
        return application

    def mode(self, entity: str) -> DownloadMode:
        """Return how much of an entity is downloaded."""
        modes = [one[entity].mode for one in (self.offers, self.wishes) if entity in one]
        for mode in ("never", "nothing_clear", "nothing_preserve", "where"):
            if DownloadMode(mode) in modes:
                return DownloadMode(mode)
        return DownloadMode.ALL

    def readable(self, entity: str, attributes: Attributes) -> Attributes | None:
        """Return what may be read of an object, or None."""
        if not self.granted:
            return attributes
        names: set[str] = set()
        seen = False
        for one in self.granted:
            mine = one.role == "*" or one.role in self.roles
            if not mine or one.entity not in ("*", entity) or one.read == frozenset():
                continue
            if one.where is None or self._matches(one.where, attributes):
                seen = True
                names |= set(attributes) if one.read is None else one.read
        return {name: value for name, value in attributes.items() if name in names} if seen else None

    def shown(self, entity: str, attributes: Attributes | None) -> Attributes | None:
        """Return what the replica has of an object, or None."""
        if attributes is None or self.mode(entity) not in (DownloadMode.ALL, DownloadMode.WHERE):
            return None
        offer, wish = self.offers.get(entity), self.wishes.get(entity)
        if offer is not None and offer.where is not None and not self._matches(offer.where, attributes):
            return None
        seen = self.readable(entity, attributes)
        if seen is None or wish is None or wish.where is None:
            return seen
        return seen if self._may_name(entity, wish.where) and self._matches(wish.where, seen) else None

    def _may_name(self, entity: str, where: Constraint) -> bool:
        """Tell whether each attribute in a constraint may be read of some object."""
        if not self.granted:
            return True
        readable = [
            where.attributes() if one.read is None else one.read
            for one in self.granted
            if (one.role == "*" or one.role in self.roles)
            and one.entity in ("*", entity)
            and (one.where is None or not (one.where.claims() - self._claims().keys()))
        ]
        return where.attributes() <= frozenset().union(*readable)

    def _matches(self, where: Constraint, attributes: Attributes) -> bool:
        claims = self._claims()
        return not (where.claims() - claims.keys()) and where.bind(claims).matches(attributes)

    def _claims(self) -> dict[str, Any]:
        return {"user_id": "ann", **({} if self.me is None else {"me": self.me})}


class ReplicaModel:
    """What a replica does with what it is told."""

    def __init__(self) -> None:
        self.cursor = b""
        self.staged: list[sync_pb2.SnapshotPage] = []
        self.held: dict[ObjectKey, tuple[int, Attributes]] = {}
        # What came of its own operations one by one, until a download tells of it.
        self.own: dict[ObjectKey, list[tuple[int, Attributes | None]]] = {}

    def view(self, key: ObjectKey) -> Attributes | None:
        """Return an object as the replica shows it."""
        if self.own.get(key):
            return self.own[key][-1][1]
        return self.held[key][1] if key in self.held else None

    def publish(self, started: sync_pb2.SessionStarted, cursor: bytes) -> None:
        """Take in the pages of a complete download."""
        plans = {plan.entity: plan for plan in started.entities}
        modes = {
            name: DownloadMode.of_number(plans[name].mode) if name in plans else DownloadMode.ALL for name in ENTITIES
        }
        reconciled = {name for name in ENTITIES if (plans[name].reconcile if name in plans else started.reconcile)}
        assert not {name for name in reconciled if not modes[name].downloads}
        seen: set[ObjectKey] = set()
        for page in self.staged:
            for one in page.snapshots:
                key = (one.entity, one.id)
                seen.add(key)
                self.held[key] = (one.version, decode_map(one.attributes))
                self._forget_own(key, one.version)
            for confirmation in page.confirmations:
                key = (confirmation.entity, confirmation.id)
                seen.add(key)
                contained = self._forget_own(key, confirmation.version)
                confirmed = contained[-1][1] if contained else self.held.get(key, (0, None))[1]
                assert confirmed is not None, f"the replica has no state of {key} to be confirmed"
                self.held[key] = (confirmation.version, confirmed)
            for removal in page.removals:
                key = (removal.entity, removal.id)
                seen.discard(key)
                self.held.pop(key, None)
                self._forget_own(key, removal.version)
        for key, states in self.own.items():
            if states and not modes[key[0]].downloads:  # stays as the replica shows it
                version, attributes = states[-1]
                self.held.pop(key, None)
                if attributes is not None:
                    self.held[key] = (version, attributes)
        self.own.clear()
        for key in list(self.held):
            if (key[0] in reconciled and key not in seen) or modes[key[0]] is DownloadMode.NOTHING_CLEAR:
                del self.held[key]
        self.cursor, self.staged = cursor, []

    def _forget_own(self, key: ObjectKey, version: int) -> list[tuple[int, Attributes | None]]:
        """Return the states that its own operations up to a version made, which are then told."""
        states = self.own.pop(key, [])
        self.own[key] = [one for one in states if one[0] > version]
        return [one for one in states if one[0] <= version]


class World:
    """Writes, rules that change, and downloads, in any order."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.replica = ReplicaModel()
        self.history: dict[ObjectKey, list[tuple[int, Attributes | None]]] = {key: [(0, None)] for key in KEYS}
        self.rules = Rules()
        self.application = self.rules.application()
        self.began = 0
        self.is_broken_off = False

    def others_write(self, batch: list[Step]) -> None:
        """Somebody else changes objects."""
        self._write(batch)

    def replica_writes(self, key: ObjectKey, patch: Attributes | None) -> None:
        """The replica changes what it has, or creates an object, and has uploaded that."""
        view, stored = self.replica.view(key), self.history[key][-1][1]
        if (view is None) is not (stored is None):
            return  # the server would refuse
        if patch is None:
            if view is not None:
                version = self._write([Step(key, None, REPLICA_A)])
                self.replica.own.setdefault(key, []).append((version, None))
            return
        version = self._write([Step(key, {**(stored or {}), **patch}, REPLICA_A)])
        self.replica.own.setdefault(key, []).append((version, {**(view or {}), **patch}))

    def change_rules(self, rules: Rules) -> None:
        """The application is started with other rules, the principal has other roles, the replica other wishes."""
        self.rules = rules
        self.application = rules.application()

    def change_wish(self, wish: Download, entity: str) -> None:
        """The replica wants another part of one entity."""
        now = self.rules
        wishes = {**now.wishes, entity: wish}
        self.rules = Rules(now.granted, now.offers, wishes, now.roles, now.me, now.indexes)

    def make_indexes_anew(self) -> None:
        """The server makes the indexes anew from what is there: they forget who left a value."""

        def job(reader: Reader) -> tuple[Writes, None]:
            head = reader.head().version
            index: dict[bytes, bytes | None] = {key: None for key, _ in reader.index_range(b"", b"", 1_000)}
            written = [
                Written(key, None, states[-1][1], states[-1][0])
                for key, states in self.history.items()
                if states[-1][1] is not None
            ]
            index.update(index_writes(INDEXED, written, lambda key: None))
            return Writes({}, [], None, [], [], head, {**index, **rebuilt(head)}), None

        self.store.submit(TENANT, job).result()

    def collect(self, but: int) -> None:
        """The server forgets its history but for some changes."""
        collect(self.store, TIME_US + 1 + self._version() - but)

    def lose_cursor(self) -> None:
        """The server does not know the replica's cursor any more."""
        self.replica.cursor, self.replica.staged = FOREIGN_CURSOR, []

    def download(
        self, limits: dict[str, int], meanwhile: list[list[Step]], kept: int | None, collects: int | None
    ) -> None:
        """
        Download everything, while somebody writes between the pages.

        Args:
            limits: Sizes that differ from the server's.
            meanwhile: What is written after each page.
            kept: Break off with so many pages kept. None: complete.
            collects: How many changes of its history the server remembers after the second page. None: all.
        """
        replica, rules = self.replica, self.rules
        session = Session(self.application, self.store, rules.principal, self._start())
        with ExitStack() as stack:
            for name, value in limits.items():
                stack.enter_context(mock.patch.object(_download, name, value))
            started = session.open().result()
            if not started.resumed:
                replica.staged = []
                self.began = started.version
            staged = list(replica.staged)
            for number, page in enumerate(self._pages(session)):
                self._check_page(page, started)
                staged.append(page)
                if kept is not None and number + 1 >= kept:
                    break
                if number < len(meanwhile):
                    self._write(meanwhile[number])
                if number == 1 and collects is not None:
                    self.collect(collects)
            else:
                if self.is_broken_off:
                    replica.staged = staged
                    self.download(limits, [], kept, None)
                    return
                if kept is None:
                    replica.staged = staged
                    complete = session.complete()
                    replica.publish(started, complete.cursor)
                    self._check_replica(complete.version)
                    return
        replica.staged = staged if kept else replica.staged

    def _pages(self, session: Session) -> Iterator[sync_pb2.SnapshotPage]:
        self.is_broken_off = False
        try:
            yield from session.pages()
        except HistoryCollected:
            self.is_broken_off = True

    def _start(self) -> sync_pb2.SessionStart:
        replica = self.replica
        return sync_pb2.SessionStart(
            protocol_version=1,
            replica_id=str(UUID(bytes=REPLICA_A)),
            mode=sync_pb2.SYNCHRONIZE_MODE_ALL,
            cursor=replica.cursor,
            resume_token=replica.staged[-1].resume_token if replica.staged else b"",
            accepts_confirmations=True,
            downloads=[wish.to_message(entity) for entity, wish in self.rules.wishes.items()],
        )

    def _write(self, steps: Sequence[Step]) -> int:
        version = self._version()
        for step in steps:
            if step.attributes is not None or self.history[step.key][-1][1] is not None:
                version += 1
                self.history[step.key].append((version, step.attributes))
        assert write_steps(self.store, steps, schema=INDEXED, time_us=TIME_US + version) == version
        return version

    def _version(self) -> int:
        with self.store.read(TENANT) as reader:
            return reader.head().version

    def _check_page(self, page: sync_pb2.SnapshotPage, started: sync_pb2.SessionStarted) -> None:
        """Compare a page with what the principal may know."""
        keys = [
            *((one.entity, one.id) for one in page.snapshots),
            *((one.entity, one.id) for one in page.removals),
            *((one.entity, one.id) for one in page.confirmations),
        ]
        assert keys, "no page is empty"
        assert len(keys) == len(set(keys)), "a page tells of each object once"
        for one in page.snapshots:
            states = dict(self.history[one.entity, one.id])
            assert equal(decode_map(one.attributes), self.rules.shown(one.entity, states[one.version]))
        plans = {plan.entity: plan for plan in started.entities}
        for removal in page.removals:
            plan = plans.get(removal.entity)
            reconciled = plan.reconcile if plan is not None else started.reconcile
            since = self.began if reconciled else self._cursor_version()
            assert any(
                self.rules.shown(removal.entity, attributes) is not None
                for attributes in self._states_since((removal.entity, removal.id), since)
            ), "a removal names what the principal has seen"

    def _states_since(self, key: ObjectKey, version: int) -> list[Attributes | None]:
        states = self.history[key]
        newest = max(at for at, _ in states if at <= version)
        return [attributes for at, attributes in states if at >= newest]

    def _cursor_version(self) -> int:
        return int(splice_pb2.Cursor.FromString(self.replica.cursor).version)

    def _check_replica(self, version: int) -> None:
        """Compare what the replica holds with its projection at the version that the download reached."""
        for entity in ENTITIES:
            if self.rules.mode(entity) not in (DownloadMode.ALL, DownloadMode.WHERE):
                continue
            expected = {}
            for key, states in self.history.items():
                at, attributes = [one for one in states if one[0] <= version][-1]
                if key[0] == entity and (shown := self.rules.shown(entity, attributes)) is not None:
                    expected[key] = (at, shown)
            assert {key: one for key, one in self.replica.held.items() if key[0] == entity} == expected


Action = tuple[str, dict[str, Any]]


class Draw:
    """What a seed makes of a world."""

    _KINDS: ClassVar = {
        "others_write": 30,
        "replica_writes": 20,
        "download": 35,
        "change_rules": 6,
        "change_wish": 4,
        "make_indexes_anew": 3,
        "collect": 12,
        "lose_cursor": 1,
    }

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def actions(self, count: int) -> list[Action]:
        """Draw what happens."""
        kinds = self._random.choices(list(self._KINDS), list(self._KINDS.values()), k=count)
        return [(kind, getattr(self, f"_{kind}")()) for kind in kinds]

    def _others_write(self) -> dict[str, Any]:
        return {"batch": self._batch()}

    def _replica_writes(self) -> dict[str, Any]:
        return {"key": self._random.choice(KEYS), "patch": self._attributes() if self._random.random() < 0.8 else None}

    def _change_rules(self) -> dict[str, Any]:
        random = self._random
        granted = tuple(
            Granted(
                random.choice(["r", "r", "*", "s"]),
                random.choice(["Task", "Task", "*", "Note"]),
                random.choice([None, None, None, frozenset({"who"}), frozenset({"who", "kind"}), frozenset()]),
                random.choice([None, self._constraint()]),
            )
            for _ in range(random.choice([0, 0, 1, 2, 3]))
        )
        offers, wishes = (
            {entity: self._some_download() for entity in ENTITIES if random.random() < 0.4} for _ in range(2)
        )
        roles = frozenset(random.choice([["r"], ["r", "s"], []]))
        indexes = frozenset(random.choice([["who"], ["who", "kind"], ["kind"], []]))
        return {"rules": Rules(granted, offers, wishes, roles, random.choice(["a", "b", None]), indexes)}

    def _change_wish(self) -> dict[str, Any]:
        return {"wish": self._some_download(), "entity": self._random.choice(ENTITIES)}

    def _make_indexes_anew(self) -> dict[str, Any]:
        return {}

    def _collect(self) -> dict[str, Any]:
        return {"but": self._random.choice([0, 1, 2, 3, 5, 10])}

    def _lose_cursor(self) -> dict[str, Any]:
        return {}

    def _download(self) -> dict[str, Any]:
        random = self._random
        return {
            "limits": {
                "PAGE_OBJECTS_MAX": random.choice([1, 2, 3, 100]),
                "INDEXED_OBJECTS_MAX": random.choice([1, 2, 100]),
                "CATCH_UP_ROUNDS_MAX": random.choice([1, 3]),
            },
            "meanwhile": [self._batch() for _ in range(random.choice([0, 0, 1, 2, 6]))],
            "kept": random.choice([None, None, None, 0, 1, 2, 3]),
            "collects": random.choice([None, None, None, 0, 3]),
        }

    def _batch(self) -> list[Step]:
        random = self._random
        return [
            Step(random.choice(KEYS), self._attributes() if random.random() < 0.8 else None)
            for _ in range(random.choice([1, 1, 2, 4]))
        ]

    def _attributes(self) -> Attributes:
        values: dict[str, Sequence[Any]] = {"who": "abc", "kind": "xy", "n": (0, 1, 2)}
        return {name: self._random.choice(some) for name, some in values.items() if self._random.random() < 0.9}

    def _constraint(self) -> Constraint:
        simple = [
            attribute("who") == "a",
            attribute("who") == claim("me"),
            attribute("who").is_in(["a", "b"]),
            attribute("kind") == "x",
            attribute("n") >= 1,
        ]
        one, other = self._random.choices(simple, k=2)
        return self._random.choice([one, one, one & other, one | ~other])

    def _some_download(self) -> Download:
        mode = self._random.choice([*DownloadMode, DownloadMode.WHERE, DownloadMode.WHERE])
        return Download(mode, self._constraint() if mode is DownloadMode.WHERE else None)


def error_of(actions: list[Action]) -> Exception | None:
    """Return what goes wrong if all this happens, or None."""
    world = World()
    try:
        for kind, arguments in actions:
            getattr(world, kind)(**arguments)
    except Exception as error:  # noqa: BLE001 - any will do
        return error
    return None


def shrunk(actions: list[Action]) -> list[Action]:
    """Return as few of the actions as still go wrong."""
    size = len(actions) // 2
    while size:
        first = 0
        while first < len(actions):
            fewer = actions[:first] + actions[first + size :]
            if error_of(fewer) is None:
                first += size
            else:
                actions = fewer
        size //= 2
    return actions


@pytest.mark.parametrize("seed", range(SEEDS))
def test_downloads(seed: int) -> None:
    """After each download the replica holds its projection, and no page told of anything else."""
    actions = Draw(seed).actions(ACTIONS)
    if error_of(actions) is not None:
        few = shrunk(actions)
        raise AssertionError("\n".join(["the fewest actions that go wrong:", *map(repr, few)])) from error_of(few)
