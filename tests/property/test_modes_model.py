"""
A replica against a model of download modes.

The server here has a projection and computes deltas from cursors as any server would;
the model of the replica knows nothing of deltas: after a session of mode all an entity
that is downloaded *is* the projection, one that is cleared has what is pending, one
that is kept has what it had. Both are compared after each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.builders import contents, quick_folder
from tests.sessions import LIMITS, ServerEnd, applied, page, plan, refused, synchronize

from tidelog import InvalidValue, Operation, OperationKind
from tidelog._keys import ObjectKey
from tidelog.v1 import operation_pb2, sync_pb2
from tidelog_client import Replica, Report, SkipReason
from tidelog_client import _publication as publication
from tidelog_client import _synchronization as synchronization
from tidelog_client._view import StateLost

pytestmark = pytest.mark.slow

ENTITIES = ["A", "B", "C"]
DOWNLOADED = ("all", "where")
KEYS = st.tuples(st.sampled_from(ENTITIES), st.sampled_from(["1", "2", "3"]))
MODES = st.sampled_from(["all", "where", "where", "nothing_clear", "nothing_preserve", "never"])

Attributes = dict[str, int]
Projection = dict[ObjectKey, int]


class Broken(Exception):
    """Raised to break a session off."""


class State(NamedTuple):
    """An object on the server. Deleted: no attributes."""

    version: int
    attributes: Attributes | None
    is_only_ours: bool


class Cursor(NamedTuple):
    """What a cursor stands for: versions of what was in the projection, and the modes it was made with."""

    version: int
    projection: Projection
    modes: dict[str, str]


NOWHERE = Cursor(0, {}, {})


@dataclass
class ModelServer(ServerEnd):
    """A server with objects, some of them hidden from the replica, and entities in modes."""

    version: int = 1
    objects: dict[ObjectKey, State] = field(default_factory=dict)
    hidden: set[ObjectKey] = field(default_factory=set)
    modes: dict[str, str] = field(default_factory=dict)
    lenient: bool = False
    known: Cursor = NOWHERE
    reconciled: set[str] = field(default_factory=set)
    settled: dict[int, operation_pb2.OperationResult] = field(default_factory=dict)
    cursors: dict[bytes, Cursor] = field(default_factory=dict)
    mode: int = 0
    selection: list[ObjectKey] = field(default_factory=list)
    touched: dict[ObjectKey, None] = field(default_factory=dict)
    interrupted: tuple[Any, list[sync_pb2.SnapshotPage]] | None = None
    salt: int = 0

    def visible(self, key: ObjectKey) -> Attributes | None:
        """Return what the replica may see of an object."""
        state = self.objects.get(key)
        return None if state is None or key in self.hidden else state.attributes

    def shown(self, key: ObjectKey) -> Attributes | None:
        """Return what a session of mode all downloads of an object."""
        attributes = self.visible(key)
        match self.modes.get(key[0], "all"):
            case "all":
                return attributes
            case "where":
                return attributes if attributes is not None and attributes["n"] % 2 == 0 else None
            case _:
                return None

    def change(self, key: ObjectKey, attributes: Attributes | None, *, is_ours: bool = False) -> int:
        """Give an object another state, or delete it; return the version."""
        self.version += 1
        before = self.objects.get(key)
        is_new = before is None or before.attributes is None
        is_only_ours = is_ours and (is_new or (before is not None and before.is_only_ours))
        self.objects[key] = State(self.version, attributes, is_only_ours)
        return self.version

    def started(self) -> sync_pb2.SessionStarted:
        """Answer `start`: what is reconciled follows from the cursor."""
        self.mode, self.selection, self.touched = self.start.mode, [], {}
        is_all = self.mode == sync_pb2.SYNCHRONIZE_MODE_ALL
        self.known = self.cursors.get(self.start.cursor, NOWHERE)
        self.reconcile = is_all and self.known is NOWHERE
        self.reconciled = {
            entity
            for entity in ENTITIES
            if is_all and self.known.modes.get(entity, "all") != self.modes.get(entity, "all")
        }
        self.plans = [
            plan(
                entity,
                self.modes.get(entity, "all"),
                excluded=self.modes.get(entity) == "never" and not self.lenient,
                reconcile=entity in self.reconciled,
            )
            for entity in ENTITIES
            if entity in self.modes or entity in self.reconciled
        ]
        self.resumed = (
            self.interrupted is not None and bool(self.start.resume_token) and self.interrupted[0] == self.outlook()
        )
        return super().started()

    def outlook(self) -> Any:
        """Return what an interrupted download must still agree with."""
        return self.version, self.start.cursor, dict(self.modes), set(self.hidden)

    def settle(self, operations: Sequence[Operation]) -> list[operation_pb2.OperationResult]:
        """Answer a batch: a group at a time, with the former result where there is one."""
        results = []
        for unit in units(operations):
            if unit[0].seq not in self.settled:
                self._settle_unit(unit)
            results += [self.settled[one.seq] for one in unit]
        for operation in operations:
            self.touched[operation.key] = None
        return results

    def _settle_unit(self, unit: list[Operation]) -> None:
        before = dict(self.objects), self.version
        for one in unit:
            seen = self.visible(one.key)
            is_there = one.key in self.objects and self.objects[one.key].attributes is not None
            if one.kind is OperationKind.CREATE:
                is_refused = is_there
            else:
                is_refused = seen is None and (is_there or one.kind is OperationKind.UPDATE)
            if is_refused:
                self.objects, self.version = before
                self.settled.update({member.seq: refused(member, culprit=one) for member in unit})
                return
            is_change = seen is not None or one.kind is OperationKind.CREATE
            version = self.change(one.key, replayed(seen, one), is_ours=True) if is_change else self.version
            self.settled[one.seq] = applied(one, version)

    def answer(self, request: sync_pb2.SynchronizeRequest) -> list[sync_pb2.SynchronizeResponse]:
        """Answer one message."""
        self.selection += [(key.entity, key.id) for key in request.selection.keys]
        return super().answer(request)

    def download(self) -> Sequence[sync_pb2.SnapshotPage]:
        """Answer the end of the upload."""
        if self.mode == sync_pb2.SYNCHRONIZE_MODE_SELECTED:
            return list(self._selected())
        if self.mode == sync_pb2.SYNCHRONIZE_MODE_UNSYNCHRONIZED:
            return list(self._changed_by_operations())
        pages = list(self._everything())
        if self.resumed and self.interrupted is not None:
            before = self.interrupted[1]
            # Of what an earlier page brought, this session's upload may have deleted something.
            brought = [(one.entity, one.id) for earlier in before for one in earlier.snapshots]
            brought += [(one.entity, one.id) for earlier in before for one in earlier.confirmations]
            removals = [(*key, self.version) for key in brought if self.shown(key) is None]
            pages = [*before[int(self.start.resume_token) :], *pages, page(removals=removals)]
        for number, one in enumerate(pages, start=1):
            one.resume_token = str(number).encode()
        self.interrupted = self.outlook(), pages
        return pages

    def _everything(self) -> Iterator[sync_pb2.SnapshotPage]:
        for key, state in sorted(self.objects.items(), key=lambda item: item[1].version):
            if self.modes.get(key[0], "all") not in DOWNLOADED:
                continue
            attributes = self.shown(key)
            reconciled = self.reconcile or key[0] in self.reconciled
            if attributes is None:
                if key in self.known.projection and not reconciled:
                    yield page(removals=[(*key, state.version)])
            elif reconciled or key not in self.known.projection or state.version > self.known.version:
                yield self._page(key, state, attributes, confirms=key[0] not in self.reconciled)

    def _changed_by_operations(self) -> Iterator[sync_pb2.SnapshotPage]:
        for key in self.touched:
            mode = self.modes.get(key[0], "all")
            if mode == "never" or key not in self.objects:
                continue
            attributes = self.shown(key) if mode in DOWNLOADED else self.visible(key)
            if attributes is None:
                yield page(removals=[(*key, self.version)])
            else:
                yield self._page(key, self.objects[key], attributes)

    def _selected(self) -> Iterator[sync_pb2.SnapshotPage]:
        for key in self.selection:
            attributes = self.visible(key)
            if attributes is None:
                yield page(removals=[(*key, self.version)])
            else:
                outside = [key[1]] if self.shown(key) is None else []
                yield page((*key, self.objects[key].version, attributes), outside=outside)

    def _page(
        self, key: ObjectKey, state: State, attributes: Attributes, *, confirms: bool = True
    ) -> sync_pb2.SnapshotPage:
        if state.is_only_ours and self.start.accepts_confirmations and confirms:
            return page(confirmations=[(*key, state.version)])
        return page((*key, state.version, attributes))

    def cursor(self) -> bytes:
        """Return where the replica then stands; it is the same while nothing changes."""
        projection = {key: self.objects[key].version for key in self.objects if self.shown(key) is not None}
        cursor = Cursor(self.version, projection, dict(self.modes))
        name = repr((self.salt, cursor.version, sorted(projection.items()), sorted(self.modes.items()))).encode()
        self.cursors[name] = cursor
        return name


def units(operations: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Put together what is of one commit group."""
    unit: list[Operation] = []
    for one in operations:
        unit.append(one)
        if one.group is None or len(unit) == one.group.size:
            yield unit
            unit = []


def replayed(attributes: Attributes | None, operation: Operation) -> Attributes | None:
    """Return what an operation makes of an object."""
    if operation.kind is OperationKind.DELETE:
        return None
    written = operation.decoded_patch().set
    if operation.kind is OperationKind.CREATE:
        return written
    return None if attributes is None else {**attributes, **written}


@dataclass
class Local:
    """An object on the replica: what the server last said of it, and what was done since."""

    base: Attributes | None = None
    operations: list[Operation] = field(default_factory=list)

    def shown(self) -> Attributes | None:
        """Return the object as it should be seen."""
        attributes = self.base
        for operation in self.operations:
            attributes = replayed(attributes, operation)
        return attributes


class ModesAgainstAModel(RuleBasedStateMachine):
    """Whatever the modes, and whatever breaks off, a replica shows what the model shows."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.folder = self.stack.enter_context(quick_folder())
        self.server = ModelServer()
        self.local: dict[ObjectKey, Local] = {}
        self.logged: list[Operation] = []
        self.tick = 0

    @initialize(
        stage=st.sampled_from([1, 1_000_000]),
        at_once=st.sampled_from([0, 2, 1_000]),
        steps=st.sampled_from([1, 2, 1_000]),
        batch=st.sampled_from([1, 3, 500]),
    )
    def open(self, stage: int, at_once: int, steps: int, batch: int) -> None:
        """Open the replica, with small limits."""
        for module, name, value in (
            (synchronization, "STAGE_BYTES", stage),
            (publication, "PUBLISH_OBJECTS_MAX", at_once),
            (publication, "PUBLISH_STEP_PAGES", steps),
            (publication, "END_STEP_OBJECTS", steps),
        ):
            self.stack.enter_context(mock.patch.object(module, name, value))
        self.limits = sync_pb2.Limits(batch_operation_count=batch, batch_bytes=LIMITS.batch_bytes, batches_in_flight=2)
        self.stack.enter_context(mock.patch("tests.sessions.LIMITS", self.limits))
        self.replica = Replica(self.folder / "a", durability="relaxed")

    def teardown(self) -> None:
        """Close the replica."""
        self.replica.close()
        self.stack.close()

    # --- what people do ----------------------------------------------------------------

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3), deletes=st.booleans(), atomic=st.booleans())
    def commit(self, keys: list[ObjectKey], *, deletes: bool, atomic: bool) -> None:
        """Create, change or delete objects on the replica."""
        entities = {entity for entity, _ in keys}
        with self.replica._storage.environment.read() as transaction:
            never = self.replica._storage.never(transaction) & entities
        try:
            with self.replica.transaction(atomic=atomic) as tx:
                for entity, id_ in keys:
                    self.tick += 1
                    if tx.get(entity, id_) is None:
                        tx.create(entity, {"n": self.tick}, id_)
                    elif deletes:
                        tx.delete(entity, id_)
                    else:
                        tx.update(entity, id_, {"n": self.tick, f"m{self.tick % 3}": self.tick})
        except InvalidValue:
            assert atomic
            assert never not in (set(), entities)
            return
        assert not atomic or len(keys) == 1 or never in (set(), entities)
        self.note_commits()

    @rule(key=KEYS, deletes=st.booleans())
    def others(self, key: ObjectKey, *, deletes: bool) -> None:
        """Somebody else creates, changes or deletes an object."""
        self.tick += 1
        state = self.server.objects.get(key)
        attributes = state.attributes if state is not None else None
        if attributes is None:
            self.server.change(key, {"n": self.tick})
        elif deletes:
            self.server.change(key, None)
        else:
            self.server.change(key, {**attributes, "n": self.tick})

    @rule(key=KEYS)
    def access(self, key: ObjectKey) -> None:
        """The replica's user loses access to an object, or regains it."""
        self.server.hidden ^= {key}
        # Whatever decides about access changes the fingerprint of the entity: it is reconciled.
        self.server.cursors = {
            name: cursor._replace(modes={**cursor.modes, key[0]: "other access"})
            for name, cursor in self.server.cursors.items()
        }

    @rule(entity=st.sampled_from(ENTITIES), mode=MODES, lenient=st.booleans())
    def configure(self, entity: str, mode: str, *, lenient: bool) -> None:
        """An administrator changes a mode, or the switch that takes operations all the same."""
        self.server.modes[entity] = mode
        self.server.lenient = lenient

    # --- sessions ----------------------------------------------------------------------

    @rule(edits=st.integers(0, 8))
    def synchronize_all(self, edits: int) -> None:
        """Synchronize everything, with a local commit while the session goes on."""
        self.synchronized("all", edits=edits)
        self.take_download()
        with self.replica._storage.environment.read() as transaction:
            # Whatever was applied is part of what is there: the log is free to forget it.
            assert not list(self.replica._storage.view.stale_keys(transaction, self.server.version))

    @rule(edits=st.integers(0, 8))
    def synchronize_unsynchronized(self, edits: int) -> None:
        """Upload, and download what this changed."""
        self.synchronized("unsynchronized", edits=edits)
        for key in self.server.touched:
            mode = self.server.modes.get(key[0], "all")
            if mode != "never" and key in self.server.objects:
                is_downloaded = mode in DOWNLOADED
                self.take(key, self.server.shown(key) if is_downloaded else self.server.visible(key))

    @rule(keys=st.lists(KEYS, max_size=3))
    def synchronize_selected(self, keys: list[ObjectKey]) -> None:
        """Synchronize some objects."""
        self.synchronized("selected", keys)
        for key in self.server.selection:
            self.take(key, self.server.visible(key))

    @rule(answers=st.integers(0, 6))
    def cut(self, answers: int) -> None:
        """The connection breaks after so many answers."""
        left = iter(range(answers))

        def cuts() -> None:
            if next(left, None) is None:
                raise Broken

        self.broken(on_answer=cuts)

    @rule(writes=st.integers(0, 12), after=st.booleans())
    def crash(self, writes: int, *, after: bool) -> None:
        """The program dies at a write of a session, before or after it, and starts again."""
        environment = self.replica._storage.environment
        write, left = environment.write, iter(range(writes))

        def burns(work: Any) -> Any:
            is_last = next(left, None) is None
            if is_last and not after:
                raise Broken
            result = write(work)
            if is_last:
                raise Broken
            return result

        environment.write = burns  # type: ignore[method-assign]  # the replica is opened anew
        self.broken()

    def broken(self, **options: Any) -> None:
        """Begin a session that may break off, and find out whether it is to be completed."""
        self.server.salt += 1  # its cursor is one of its own
        with suppress(Broken):
            synchronize(self.replica, self.server, **options)
        self.reopen()
        storage = self.replica._storage
        try:
            storage.publication.finish()
        except StateLost:
            storage.publication.start_over()
        if storage.meta("state_lost"):
            # A part of what it brought is there already: the next session brings all of it.
            self.synchronize_all(edits=0)
            return
        self.note_results()
        if storage.meta("cursor") == self.server.cursor():
            self.take_download()

    def reopen(self) -> None:
        """Close the replica and open it again."""
        self.replica.close()
        self.replica = Replica(self.folder / "a", durability="relaxed")

    def synchronized(self, mode: str, selected: Sequence[ObjectKey] = (), *, edits: int = 0) -> Report:
        """Synchronize to the end, committing before the answer of that number (0: not at all)."""
        pending = [one.operation for one in self.replica.pending()]
        answers = count(1)

        def commits() -> None:
            if next(answers) == edits:
                self.commit([("A", "1"), ("B", "2")], deletes=edits % 2 == 0, atomic=edits % 3 == 0)

        report = synchronize(self.replica, self.server, mode, selected, on_answer=commits)
        self.note_results()
        if mode != "selected":
            self.check_upload(pending, report)
        return report

    # --- the model ---------------------------------------------------------------------

    def note_commits(self) -> None:
        """Take over what is new in the log."""
        for one in self.replica.log(after=len(self.logged)):
            self.logged.append(one.operation)
            self.local.setdefault(one.operation.key, Local()).operations.append(one.operation)

    def note_results(self) -> None:
        """Take back what the replica knows to be refused; it knows what the server said."""
        for one in self.replica.log():
            if one.status == "pending":
                continue
            said = self.server.settled[one.operation.seq]
            assert (one.version, one.failure_id) == (said.version, said.failure_id)
            if one.status == "failed" and one.operation.key in self.local:
                operations = self.local[one.operation.key].operations
                operations[:] = [other for other in operations if other.seq != one.operation.seq]

    def take(self, key: ObjectKey, attributes: Attributes | None) -> None:
        """Make what the server says of an object its base; only what is pending stays on top."""
        pending = self.pending_seqs()
        local = self.local.setdefault(key, Local())
        local.base = attributes
        local.operations = [one for one in local.operations if one.seq in pending]

    def take_download(self) -> None:
        """Do what a session of mode all does, by the mode of each entity."""
        pending = self.pending_seqs()
        for key in {*self.local, *self.server.objects}:
            mode = self.server.modes.get(key[0], "all")
            local = self.local.setdefault(key, Local())
            is_pending = any(one.seq in pending for one in local.operations)
            if mode in DOWNLOADED:
                self.take(key, self.server.shown(key))
            elif mode == "nothing_clear" and not is_pending:
                del self.local[key]
            else:
                self.take(key, Local(local.base, [one for one in local.operations if one.seq not in pending]).shown())

    def pending_seqs(self) -> set[int]:
        """Return the positions of what is pending."""
        return {one.operation.seq for one in self.replica.pending()}

    def left_behind(self, operations: Sequence[Operation]) -> list[Operation]:
        """Return which of some pending operations are not to be sent."""
        excluded = {one.entity for one in self.server.plans if one.upload_excluded}
        left = {one.seq for one in operations if one.entity in excluded}
        while True:
            groups = {one.group.id for one in operations if one.seq in left and one.group is not None}
            more = {
                one.seq
                for one in operations
                if (one.group is not None and one.group.id in groups)
                or any(other.seq in left and other.key == one.key and other.seq < one.seq for other in operations)
            }
            if more <= left:
                return [one for one in operations if one.seq in left]
            left |= more

    def check_upload(self, pending: Sequence[Operation], report: Report) -> None:
        """What stays behind is told; everything else is settled."""
        left = self.left_behind(pending)
        still = [one.operation for one in self.replica.pending()]
        assert [one for one in still if one in pending] == left
        seqs = [one.seq for one in self.server.uploaded]
        assert seqs == sorted(set(seqs))
        leaves_earlier = any(one.seq < max(seqs, default=0) for one in left)
        assert self.server.start.leaves_earlier_operations == leaves_earlier
        told = {one.entity: one.count for one in report.skipped if one.reason is SkipReason.NEVER}
        assert Counter(one.entity for one in left) <= Counter(told) <= Counter(one.entity for one in still)

    @invariant()
    def shows_the_model(self) -> None:
        """The replica has exactly the objects of the model."""
        if hasattr(self, "replica"):
            expected = {key: state for key, local in self.local.items() if (state := local.shown()) is not None}
            found = {
                (entity, id_): state for entity in ENTITIES for id_, state in contents(self.replica, entity).items()
            }
            assert found == expected, (found, expected)


TestModes = ModesAgainstAModel.TestCase
TestModes.settings = settings(derandomize=True, database=None, deadline=None, max_examples=60, stateful_step_count=40)
