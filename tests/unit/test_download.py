from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from tests.builders import REPLICA_A, REPLICA_B, TENANT, TIME_US, USER, MemoryStore, Step, collect, write_steps

from tidelog import Entity, InvalidConstraint, Schema, String, attribute
from tidelog._downloads import DownloadWish, downloads_of
from tidelog._keys import ObjectKey
from tidelog._values import decode_map
from tidelog.internal.v1 import splice_pb2
from tidelog.v1 import sync_pb2
from tidelog_server import Application, Principal
from tidelog_server import _download as download_module
from tidelog_server._errors import HistoryCollected, ReplicaOwned
from tidelog_server._indexes import Written, by_version_prefix, index_writes, rebuilt
from tidelog_server._outcomes import Uploader
from tidelog_server._records import Writes
from tidelog_server._sealing import Sealer
from tidelog_server._session import Session, Upload
from tidelog_server._store import Reader

ALL = sync_pb2.SYNCHRONIZE_MODE_ALL
UNSYNCHRONIZED = sync_pb2.SYNCHRONIZE_MODE_UNSYNCHRONIZED
SELECTED = sync_pb2.SYNCHRONIZE_MODE_SELECTED

INDEXED = Schema([Entity("Task", {"who": String()}, indexes=["who"])], open=True)


def task(id: str) -> ObjectKey:  # noqa: A002 - the glossary's word
    """Return the key of a task."""
    return ("Task", id)


def told(pages: Sequence[sync_pb2.SnapshotPage]) -> list[tuple[Any, ...]]:
    """Return what pages say, in order: (id, attributes), (id, "gone"), (id, "confirmed")."""
    found: list[tuple[Any, ...]] = []
    for page in pages:
        found += [(one.id, decode_map(one.attributes)) for one in page.snapshots]
        found += [(one.id, "gone") for one in page.removals]
        found += [(one.id, "confirmed") for one in page.confirmations]
    return found


@dataclass
class Desk:
    """A server of one tenant, and one replica's sessions with it."""

    application: Application = field(default_factory=Application)
    store: Any = field(default_factory=MemoryStore)
    principal: Principal = USER
    schema: Schema | None = None
    cursor: bytes = b""

    def write(self, *steps: Step) -> int:
        """Write in one transaction."""
        return write_steps(self.store, steps, schema=self.schema, tenant=self.principal.tenant)

    def put(self, id: str, replica: bytes = REPLICA_B, **attributes: Any) -> int:  # noqa: A002
        """Write a task."""
        return self.write(Step(task(id), attributes, replica))

    def delete(self, id: str, replica: bytes = REPLICA_B) -> int:  # noqa: A002
        """Delete a task."""
        return self.write(Step(task(id), None, replica))

    def session(self, mode: sync_pb2.SynchronizeMode.ValueType = ALL, **fields: Any) -> Session:
        """Return a session of the replica."""
        wishes: dict[str, DownloadWish] = fields.pop("wishes", {})
        start = sync_pb2.SessionStart(
            protocol_version=1,
            replica_id=str(UUID(bytes=REPLICA_A)),
            mode=mode,
            cursor=self.cursor,
            accepts_confirmations=True,
            downloads=[wish.to_message(entity) for entity, wish in downloads_of(wishes).items()],
        )
        start.MergeFrom(sync_pb2.SessionStart(**fields))
        return Session(self.application, self.store, self.principal, start)

    def download(self, **fields: Any) -> list[tuple[Any, ...]]:
        """Download everything, move the cursor, and return what was told."""
        session = self.session(**fields)
        self.started = session.open().result()
        pages = list(session.pages())
        self.cursor = session.complete().cursor
        return told(pages)

    def selecting(self, *ids: str, **fields: Any) -> Session:
        """Return a session that is to download selected tasks."""
        session = self.session(SELECTED, **fields)
        session.open().result()
        session.select(sync_pb2.Selection(keys=[sync_pb2.ObjectKey(entity="Task", id=id_) for id_ in ids]))
        return session

    def select(self, *ids: str, **fields: Any) -> list[sync_pb2.SnapshotPage]:
        """Download selected tasks."""
        return list(self.selecting(*ids, **fields).pages())

    def uploaded(self, first_version: int, first_seq: int = 1, **fields: Any) -> Session:
        """Return a session whose operations were applied from a version on, and that is to download what they did."""
        session = self.session(UNSYNCHRONIZED, **fields)
        session.open().result()
        upload = Upload(self.application, self.store, Uploader(REPLICA_A, self.principal, 1, leaves_earlier=False))
        upload.first_seq, upload.first_version = first_seq, first_version
        session._upload = upload
        return session

    def unsynchronized(self, first_version: int, first_seq: int = 1, **fields: Any) -> list[tuple[Any, ...]]:
        """Return what a session tells of the operations that were applied from a version on."""
        return told(list(self.uploaded(first_version, first_seq, **fields).pages()))


class TestDelta:
    def test_what_changed(self) -> None:
        """After the first download only what changed is told, and nothing if nothing did."""
        desk = Desk()
        desk.put("a", n=1)
        desk.put("b", n=1)

        assert desk.download() == [("a", {"n": 1}), ("b", {"n": 1})]
        assert desk.started.reconcile
        assert desk.download() == []
        desk.put("b", n=2)
        desk.delete("a")
        assert desk.download() == [("b", {"n": 2}), ("a", "gone")]
        assert not desk.started.reconcile

    def test_entities_share_a_page(self) -> None:
        """Objects of several entities come in one page as long as they fit."""
        desk = Desk()
        desk.write(*(Step((entity, "x"), {}) for entity in ("Task", "Note", "Line")))
        session = desk.session()
        session.open().result()

        assert [len(page.snapshots) for page in session.pages()] == [3]

    def test_moving_out_of_a_constraint_and_into_it(self) -> None:
        """What no longer matches is removed, what matches now is sent, and of the others nothing is said."""
        desk = Desk()
        wishes: dict[str, DownloadWish] = {"Task": attribute("who") == "ann"}
        for id_, who in (("out", "ann"), ("in", "bob"), ("never", "bob"), ("stays", "ann")):
            desk.put(id_, who=who)
        assert desk.download(wishes=wishes) == [("out", {"who": "ann"}), ("stays", {"who": "ann"})]

        desk.put("out", who="bob")
        desk.put("in", who="ann")
        desk.put("never", who="eve")
        desk.delete("never")
        assert desk.download(wishes=wishes) == [("in", {"who": "ann"}), ("out", "gone")]

    def test_what_came_and_went(self) -> None:
        """Of an object that matched in between two downloads only, nothing is said."""
        desk = Desk()
        desk.put("x", who="bob")
        wishes: dict[str, DownloadWish] = {"Task": attribute("who") == "ann"}
        desk.download(wishes=wishes)

        desk.put("x", who="ann")
        desk.put("x", who="bob")
        desk.put("y", who="ann")
        desk.delete("y")
        desk.write(Step(("Note", "z"), {}))
        desk.write(Step(("Note", "z"), None))
        assert desk.download(wishes=wishes) == []

    @pytest.mark.parametrize("where", [attribute("who") == "ann", attribute("who").is_in(["ann", "eve"])])
    def test_the_same_by_an_index(self, where: Any) -> None:
        """Where an index leads to the objects, moves in and out are told as well."""
        desk = Desk(Application(schema=INDEXED), schema=INDEXED)
        wishes: dict[str, DownloadWish] = {"Task": where}
        for id_, who in (("out", "ann"), ("in", "bob"), ("gone", "ann"), ("stays", "ann")):
            desk.put(id_, who=who)
        assert sorted(one[0] for one in desk.download(wishes=wishes)) == ["gone", "out", "stays"]

        desk.put("out", who="bob")
        desk.put("out", who="carl")
        desk.put("in", who="ann")
        desk.delete("gone")
        assert sorted(desk.download(wishes=wishes)) == [("gone", "gone"), ("in", {"who": "ann"}), ("out", "gone")]

    def test_a_value_that_changes_into_another_one_of_the_wish(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An object that moves between two values that are both wanted is no removal, and comes as it is now."""
        desk = Desk(Application(schema=INDEXED), schema=INDEXED)
        wishes: dict[str, DownloadWish] = {"Task": attribute("who").is_in(["ann", "eve"])}
        desk.put("x", who="ann")
        desk.download(wishes=wishes)

        desk.put("x", who="eve")
        assert desk.download(wishes=wishes) == [("x", {"who": "eve"})]
        desk.put("x", who="ann")
        desk.put("x", who="ann", n=1)
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 1)
        assert desk.download(wishes=wishes) == [("x", {"who": "ann", "n": 1})]

    def test_attributes_that_may_not_be_read(self) -> None:
        """What may not be read of an object is not in its snapshot, whoever wrote it."""
        application = Application()
        application.allow("*", "Task", read=["title"])
        desk = Desk(application)
        desk.put("x", REPLICA_A, title="t", salary=7)

        assert desk.download() == [("x", {"title": "t"})]

    def test_own_objects_are_confirmed(self) -> None:
        """What this replica alone wrote comes as a confirmation, unless it may have seen a part only."""
        desk = Desk()
        desk.put("x", REPLICA_A, n=1)
        desk.put("y", REPLICA_A, n=1)
        desk.put("y", REPLICA_B, n=2)
        assert desk.download() == [("y", {"n": 2}), ("x", "confirmed")]

        desk.application.allow("*", "Task", where=attribute("n") == 3)
        desk.application.allow("*", "Task", read=["n"])
        desk.put("z", REPLICA_A, n=3)
        assert desk.download() == [("x", {"n": 1}), ("y", {"n": 2}), ("z", {"n": 3})]
        desk.put("z", REPLICA_A, n=3, m=1)
        assert desk.download() == [("z", {"n": 3, "m": 1})]  # whole now, but it need not have been


class TestReconciliation:
    def test_only_the_entity_that_changed(self) -> None:
        """Another wish for one entity reconciles that one; the others stay on delta."""
        desk = Desk()
        desk.write(Step(task("x"), {"n": 1}), Step(("Note", "y"), {"n": 1}))
        desk.download()

        assert desk.download(wishes={"Task": attribute("n") == 1}) == [("x", {"n": 1})]
        assert not desk.started.reconcile
        assert [(plan.entity, plan.reconcile) for plan in desk.started.entities] == [("Task", True)]
        assert desk.download(wishes={"Task": attribute("n") == 1}) == []
        assert [(plan.entity, plan.reconcile) for plan in desk.started.entities] == [("Task", False)]
        assert desk.download() == [("x", {"n": 1})]

    def test_access_that_is_lost_and_regained(self) -> None:
        """A principal that loses a role gets nothing of what it saw, and all of it with the role again."""
        application = Application()
        application.allow("worker", "Task")
        application.allow("*", "Note")
        desk = Desk(application, principal=Principal("ann", roles=frozenset({"worker"})))
        desk.write(Step(task("x"), {}), Step(("Note", "y"), {}))
        desk.download()

        desk.principal = Principal("ann")
        assert desk.download() == []
        assert [(plan.entity, plan.reconcile) for plan in desk.started.entities] == [("Task", True)]
        desk.principal = Principal("ann", roles=frozenset({"worker"}))
        assert desk.download() == [("x", {})]
        assert desk.download() == []

    def test_an_entity_that_was_not_downloaded(self) -> None:
        """An entity that one download left out reconciles when it is downloaded again."""
        desk = Desk()
        desk.put("x", n=1)
        desk.download()

        assert desk.download(wishes={"Task": "nothing_preserve"}) == []
        assert desk.download() == [("x", {"n": 1})]
        assert [(plan.entity, plan.reconcile) for plan in desk.started.entities] == [("Task", True)]

    def test_rules_for_everything(self) -> None:
        """When what holds for entities that nobody named changes, each of them is named and reconciled."""
        application = Application()
        desk = Desk(application)
        desk.write(Step(task("x"), {}), Step(("Note", "y"), {}))
        desk.download()

        application.allow("*", "*", where=attribute("n") == 1)
        assert desk.download() == []
        assert [(plan.entity, plan.reconcile) for plan in desk.started.entities] == [("Note", True), ("Task", True)]

    def test_indexes_made_anew(self) -> None:
        """An index that was made after the replica's cursor cannot tell what left: the entity reconciles."""
        desk = Desk(Application(schema=INDEXED))
        wishes: dict[str, DownloadWish] = {"Task": attribute("who") == "ann"}
        desk.put("x", who="ann")
        desk.put("y", who="ann")
        desk.download(wishes=wishes)
        desk.put("x", who="bob")

        def job(reader: Reader) -> Any:
            states = reader.objects([task("x"), task("y")])
            written = [Written(key, None, decode_map(one.attributes), one.version) for key, one in states.items()]
            index = {**index_writes(INDEXED, written, reader.index), **rebuilt(reader.head().version)}
            return Writes({}, [], None, [], [], reader.head().version, index), None

        desk.store.submit(TENANT, job).result()
        assert desk.download(wishes=wishes) == [("y", {"who": "ann"})]
        assert [plan.reconcile for plan in desk.started.entities] == [True]
        assert desk.download(wishes=wishes) == []

    @pytest.mark.parametrize(
        "changed",
        [
            {"epoch": "another"},
            {"timeline": "another"},
            {"version": 2},
            {"version": -1},
            {"commit_id": b"another"},
            {"version": 0},
        ],
    )
    def test_a_cursor_that_does_not_fit(self, changed: dict[str, Any]) -> None:
        """A cursor of another store, history or commit leads to a reconciliation, in which nothing is confirmed."""
        desk = Desk()
        desk.put("x", REPLICA_A, n=1)
        assert desk.download() == [("x", "confirmed")]
        cursor = splice_pb2.Cursor.FromString(desk.cursor)
        cursor.MergeFrom(splice_pb2.Cursor(**changed))
        if changed == {"version": 0}:
            cursor.version = 0
        desk.cursor = cursor.SerializeToString()

        assert desk.download() == [("x", {"n": 1})]
        assert desk.started.reconcile

    def test_a_cursor_of_another_tenant(self) -> None:
        """A cursor counts in its own tenant alone, though the other one stands at the same version."""
        desk = Desk()
        desk.put("x", n=1)
        desk.download()
        desk.principal = Principal(USER.user_id, tenant="other")
        desk.put("y", n=1)

        assert desk.download() == [("y", {"n": 1})]
        assert desk.started.reconcile

    def test_a_change_log_that_does_not_reach_back(self) -> None:
        """A cursor older than the change log leads to a reconciliation."""
        desk = Desk()
        desk.put("x", n=1)
        desk.download()
        desk.put("y", n=1)
        collect(desk.store, TIME_US + 1)

        assert [one[0] for one in desk.download()] == ["x", "y"]
        assert desk.started.reconcile

    def test_a_change_log_that_is_cut_meanwhile(self) -> None:
        """If the change log is collected above the cursor, a download that has begun ends rather than guess."""
        desk = Desk()
        wishes: dict[str, DownloadWish] = {"Task": attribute("n") == 1}
        desk.put("x", n=1)
        desk.download(wishes=wishes)
        desk.put("x", n=2)
        desk.put("x", n=3)
        session = desk.session(wishes=wishes)
        session.open().result()
        collect(desk.store, TIME_US + 1)

        with pytest.raises(HistoryCollected, match="begin again"):
            list(session.pages())


class TestCollected:
    @pytest.fixture
    def desk(self) -> Desk:
        """Give a replica that has a task, which was deleted since, and another one that was created since."""
        desk = Desk()
        desk.put("x", n=1)
        desk.download()
        desk.delete("x")
        desk.put("y", n=1)
        return desk

    def collect(self, desk: Desk) -> None:
        """Let all that was done until now be forgotten."""
        collect(desk.store, TIME_US + 1)

    def test_who_stands_below_is_reconciled(self, desk: Desk) -> None:
        """A replica that was away for longer than history is kept gets everything, and is told why by the start."""
        self.collect(desk)
        session = desk.session()

        assert session.open().result().reconcile
        assert session._start.collected
        assert told(list(session.pages())) == [("y", {"n": 1})]

    def test_who_stands_there_is_not(self, desk: Desk) -> None:
        """A replica that has all that is collected goes on from there."""
        desk.download()
        self.collect(desk)
        desk.put("z", n=1)
        session = desk.session()

        assert not session.open().result().reconcile
        assert not session._start.collected
        assert told(list(session.pages())) == [("z", {"n": 1})]
        assert not desk.session(cursor=desk.cursor)._start.collected

    def test_who_never_had_anything(self, desk: Desk) -> None:
        """That history is collected is no reason for who has no state, or one of another store."""
        self.collect(desk)
        foreign = splice_pb2.Cursor(epoch="elsewhere").SerializeToString()
        for cursor in (b"", foreign):
            desk.cursor = cursor
            session = desk.session()
            assert session.open().result().reconcile
            assert not session._start.collected

    def test_an_empty_tenant_is_a_state_too(self) -> None:
        """A replica that saw an empty tenant was away like any other."""
        desk = Desk()
        desk.download()
        desk.put("x", n=1)
        self.collect(desk)
        session = desk.session()

        assert session.open().result().reconcile
        assert session._start.collected

    def test_own_objects_come_whole(self, desk: Desk) -> None:
        """What the replica wrote alone is not confirmed but sent: how it saw things then is no longer known."""
        desk.put("mine", REPLICA_A, n=1)
        self.collect(desk)

        assert desk.download() == [("y", {"n": 1}), ("mine", {"n": 1})]

    @pytest.mark.parametrize("has_cursor", [True, False])
    def test_what_is_deleted_and_forgotten_during_a_download(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch, *, has_cursor: bool
    ) -> None:
        """If what was sent is deleted and forgotten before the download ends, it ends rather than miss that."""
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 1)
        desk.put("z", n=1)
        if not has_cursor:
            desk.cursor = b""
        session = desk.session()
        session.open().result()
        pages = session.pages()
        assert told([next(pages), next(pages)])[-1] == (("y", {"n": 1}) if has_cursor else ("z", {"n": 1}))
        desk.delete("y")
        self.collect(desk)

        with pytest.raises(HistoryCollected):
            list(pages)

    def test_a_download_that_stands_above_goes_on(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is collected below the state that a download starts from does not concern it."""
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 1)
        desk.cursor = b""
        desk.put("z", n=1)
        session = desk.session()
        session.open().result()
        pages = session.pages()
        first = next(pages)
        self.collect(desk)
        desk.put("y", n=2)

        assert told([first, *pages]) == [("y", {"n": 1}), ("z", {"n": 1}), ("y", {"n": 2})]

    def test_a_token_of_before(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """A download that was broken off goes on unless what was done since its begin is collected."""
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 1)
        desk.cursor = b""
        desk.put("z", n=1)
        session = desk.session()
        session.open().result()
        token = next(session.pages()).resume_token
        self.collect(desk)

        assert desk.session(resume_token=token).open().result().resumed
        desk.delete("y")
        assert desk.session(resume_token=token).open().result().resumed
        self.collect(desk)

        assert desk.download(resume_token=token) == [("z", {"n": 1})]
        assert not desk.started.resumed

    def test_a_token_with_a_cursor_of_before(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """A delta that was broken off cannot go on if its cursor is below what is collected."""
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 1)
        session = desk.session()
        session.open().result()
        token = next(session.pages()).resume_token
        assert desk.session(resume_token=token).open().result().resumed
        self.collect(desk)

        assert desk.download(resume_token=token) == [("y", {"n": 1})]
        assert (desk.started.resumed, desk.started.reconcile) == (False, True)

    def test_by_an_index(self) -> None:
        """Where an index leads to the objects, a delta tells of what left since, whatever was forgotten before."""
        desk = Desk(Application(schema=INDEXED), schema=INDEXED)
        wishes: dict[str, DownloadWish] = {"Task": attribute("who") == "ann"}
        for id_ in ("early", "late", "stays"):
            desk.put(id_, who="ann")
        desk.download(wishes=wishes)
        desk.put("early", who="bob")
        desk.download(wishes=wishes)
        self.collect(desk)
        desk.put("late", who="bob")
        desk.put("early", who="carl")

        assert desk.download(wishes=wishes) == [("late", "gone")]
        desk.put("early", who="ann")
        assert desk.download(wishes=wishes) == [("early", {"who": "ann"})]
        self.collect(desk)
        assert desk.download(wishes=wishes) == []
        desk.cursor = b""
        assert [one[0] for one in desk.download(wishes=wishes)] == ["stays", "early"]

    def test_what_its_operations_did_long_ago(self, desk: Desk) -> None:
        """A session of mode unsynchronized tells what its operations did as far as that is kept."""
        first = desk.put("a", REPLICA_A, n=1)
        self.collect(desk)
        desk.write(Step(task("b"), {"n": 1}, REPLICA_A, seq=2), Step(task("c"), {"n": 1}))

        assert desk.unsynchronized(first) == [("b", {"n": 1})]

    def test_what_its_operations_hid(self, desk: Desk) -> None:
        """What a hook of theirs made disappear is told as gone, though it is not known how it came about."""
        desk.application.allow("*", "Task", where=attribute("n") == 1)
        self.collect(desk)
        first = desk.write(Step(task("y"), {"n": 2}, REPLICA_A, by_hook=True))

        assert desk.unsynchronized(first) == [("y", "gone")]

    def test_selected_objects(self, desk: Desk) -> None:
        """Objects that were deleted and forgotten are told as gone when they are asked for."""
        self.collect(desk)

        assert told(desk.select("x", "y")) == [("y", {"n": 1}), ("x", "gone")]


class TestResuming:
    def cut(self, desk: Desk, pages: int, **fields: Any) -> bytes:
        """Break a download off after some pages; return the last token."""
        session = desk.session(**fields)
        session.open().result()
        return list(itertools.islice(session.pages(), pages))[-1].resume_token

    @pytest.fixture
    def desk(self, monkeypatch: pytest.MonkeyPatch) -> Desk:
        """Give a tenant of three tasks and two notes, read one to a page."""
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 1)
        desk = Desk()
        desk.write(*(Step(task(id_), {}) for id_ in "abc"), *(Step(("Note", id_), {}) for id_ in "de"))
        return desk

    def test_it_goes_on(self, desk: Desk) -> None:
        """What the pages that were kept hold does not come again; what changed since does."""
        token = self.cut(desk, 3)
        desk.put("a", n=2)
        desk.write(Step(("Note", "d"), None))

        assert desk.download(resume_token=token) == [("b", {}), ("c", {}), ("d", "gone"), ("a", {"n": 2})]
        assert desk.started.resumed

    def test_a_token_that_does_not_fit(self, desk: Desk) -> None:
        """A token of another cursor, scope, tenant or of no sense is disregarded."""
        token = self.cut(desk, 3)
        sealer = Sealer(desk.store, "resume")
        opened = sealer.open(token, TENANT)
        assert opened is not None
        read = splice_pb2.ResumeToken.FromString(opened)
        unsound = []  # as from before the store was put back
        for name, value in (("position", 99), ("round_head", 99), ("previous_round_head", 9), ("first_head", 0)):
            other = splice_pb2.ResumeToken.FromString(opened)
            setattr(other, name, value)
            unsound.append(sealer.seal(other.SerializeToString(), TENANT))

        for bad in (*unsound, opened, sealer.seal(b"\xff", TENANT), b"\xff", token[:-1]):
            desk.cursor = b""
            assert len(desk.download(resume_token=bad)) == 5
            assert not desk.started.resumed
        desk.put("z")
        desk.download(resume_token=token)  # the replica has a cursor by now
        assert not desk.started.resumed
        desk.cursor = b""
        desk.download(resume_token=token, wishes={"Task": attribute("n") == 1})
        assert not desk.started.resumed
        assert read.round_head == 5
        desk.cursor, desk.principal = b"", Principal(USER.user_id, tenant="other")
        desk.write(*(Step(task(id_), {}) for id_ in "abcde"))
        assert len(desk.download(resume_token=token)) == 5
        assert not desk.started.resumed

    def test_a_token_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token does not show by which value of an attribute that may not be read an object was found."""
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 1)
        application = Application(schema=INDEXED)
        application.allow("*", "Task", read=["title"], where=attribute("who") == "ann")
        desk = Desk(application, schema=INDEXED)
        for id_ in "abc":
            desk.put(id_, who="ann", title=id_)
        found_by = by_version_prefix("Task", "who", "ann")

        token = self.cut(desk, 2)
        assert not any(part in token for part in (found_by, b"Task", b"who"))
        opened = Sealer(desk.store, "resume").open(token, TENANT)
        assert opened is not None
        assert found_by in opened
        assert desk.download(resume_token=token) == [("c", {"title": "c"})]

    def test_a_tenant_that_never_rests(self, desk: Desk) -> None:
        """A download that is overtaken by writes page after page ends all the same, at a head that it has seen."""
        session = desk.session()
        session.open().result()
        count = 0
        for count, _page in enumerate(session.pages(), start=1):
            desk.put(f"new{count}")
            assert count < 100

        assert count > 5
        desk.cursor = session.complete().cursor
        assert desk.download() != []
        assert desk.download() == []

    def test_an_entity_that_appears_meanwhile(self, desk: Desk) -> None:
        """The first object of an entity, written while pages are read, is not missed, wherever it sorts."""
        session = desk.session()
        session.open().result()
        pages = session.pages()
        seen = [next(pages)]
        desk.write(Step(("Aaa", "early"), {}), Step(("Zzz", "late"), {}))
        seen += list(pages)

        assert {"early", "late"} <= {one[0] for one in told(seen)}


class TestSelected:
    def test_by_rights(self) -> None:
        """Selected objects come by what may be read, whatever the mode; others as removals that all look alike."""
        application = Application()
        application.allow("*", "Task", read=["n"], where=attribute("n") == 1)
        desk = Desk(application)
        desk.put("seen", n=1, salary=7)
        desk.put("hidden", n=2)
        desk.put("deleted", n=2)
        desk.delete("deleted")
        desk.put("last", n=1)
        (page,) = desk.select("seen", "hidden", "deleted", "absent", wishes={"Task": "never"})

        assert told([page]) == [("seen", {"n": 1}), ("hidden", "gone"), ("deleted", "gone"), ("absent", "gone")]
        assert {one.version for one in page.removals} == {5}

    def test_what_mode_all_would_not_bring(self) -> None:
        """A snapshot says whether it lies outside of what mode all downloads."""
        desk = Desk()
        desk.put("in", n=1)
        desk.put("out", n=2)

        for wish, outside in ((attribute("n") == 1, ["out"]), ("all", []), ("nothing_clear", ["in", "out"])):
            (page,) = desk.select("in", "out", wishes={"Task": wish})
            assert [one.id for one in page.snapshots if one.outside_projection] == outside


class TestUnsynchronized:
    def test_own_changes_and_those_of_hooks(self) -> None:
        """Each object that the operations changed comes as it is, by hooks too; others' changes do not come."""
        desk = Desk()
        desk.put("other", n=1)
        first = desk.write(
            Step(task("x"), {"n": 1}, REPLICA_A), Step(("Note", "h"), {"n": 1}, REPLICA_A, by_hook=True)
        )
        desk.put("other", n=2)

        assert desk.unsynchronized(first - 1) == [("h", {"n": 1}), ("x", "confirmed")]

    def test_what_is_outside_now(self) -> None:
        """Own objects that are not seen come as removals, others only if they were seen before the operations."""
        application = Application()
        application.allow("*", "*", where=attribute("n") == 1)
        desk = Desk(application)
        desk.write(*(Step(("Note", id_), {"n": n}) for id_, n in (("was", 1), ("never", 2))))
        first = desk.write(
            Step(task("own"), {"n": 2}, REPLICA_A),
            *(Step(("Note", id_), {"n": 3}, REPLICA_A, by_hook=True) for id_ in ("was", "never", "new")),
            Step(("Note", "was"), {"n": 4}, REPLICA_A, by_hook=True),
        )

        assert desk.unsynchronized(first - 4) == [("own", "gone"), ("was", "gone")]

    def test_what_others_took_outside_before(self) -> None:
        """What the operations' hooks changed and the replica had at its cursor is removed, whoever took it outside."""
        application = Application()
        application.allow("*", "*", where=attribute("n") == 1)
        desk = Desk(application)
        desk.put("had", n=1)
        desk.put("never", n=2)
        desk.download()
        desk.put("had", n=2)
        desk.write(Step(task("between"), {"n": 1}))
        desk.write(Step(task("between"), {"n": 2}))
        first = desk.write(
            Step(task("own"), {"n": 1}, REPLICA_A),
            *(Step(task(id_), {"n": 3}, REPLICA_A, by_hook=True) for id_ in ("had", "never", "between")),
        )

        assert desk.unsynchronized(first - 3) == [("had", "gone"), ("own", "confirmed")]

    def test_modes(self) -> None:
        """Of an entity that is never synchronized nothing comes; where nothing is downloaded, what may be read."""
        desk = Desk()
        first = desk.put("x", REPLICA_A, n=1)

        assert desk.unsynchronized(first, wishes={"Task": "never"}) == []
        assert desk.unsynchronized(first, wishes={"Task": "nothing_clear"}) == [("x", "confirmed")]
        assert desk.unsynchronized(first, wishes={"Task": attribute("n") == 1}) == [("x", "confirmed")]
        assert desk.unsynchronized(first, wishes={"Task": attribute("n") == 2}) == [("x", "gone")]


@dataclass
class Moments(Desk):
    """
    A desk that knows what a replica had to see at each version.

    Attributes:
        seen: By version, what may be read of the tasks a, b and c; "gone" for what may not.
    """

    seen: dict[int, dict[str, Any]] = field(default_factory=dict)

    def write(self, *steps: Step) -> int:
        """Write in one transaction."""
        version = super().write(*steps)
        with self.store.read(TENANT) as reader:
            states = reader.objects(map(task, "abc"))
        held = {id_: decode_map(one.attributes) for (_, id_), one in states.items() if not one.deleted}
        self.seen[version] = {id_: held[id_] if "hidden" not in held.get(id_, HIDDEN) else "gone" for id_ in "abc"}
        return version


HIDDEN = {"hidden": 1}


class TestOneMoment:
    """Downloads of single objects, while somebody writes between their pages."""

    @pytest.fixture
    def desk(self, monkeypatch: pytest.MonkeyPatch) -> Moments:
        """Give tasks of which those that are not hidden may be read, one to a page; this replica has written them."""
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 1)
        application = Application()
        application.allow("*", "*", where=~attribute("hidden").exists())
        desk = Moments(application)
        desk.write(*(Step(task(id_), {}, REPLICA_B) for id_ in "abc"))
        desk.write(*(Step(task(id_), {"n": 0}, REPLICA_A) for id_ in "abc"))
        return desk

    def session(self, desk: Moments, mode: str) -> Session:
        """Return a session that is to download all three tasks."""
        return desk.selecting(*"abc") if mode == "selected" else desk.uploaded(4)

    def holds(self, pages: Sequence[sync_pb2.SnapshotPage]) -> dict[str, Any]:
        """Return what a replica has that takes in pages in order; nothing comes twice at one version."""
        held: dict[str, Any] = {}
        versions: dict[str, int] = {}
        for page in pages:
            told_now = [(one.id, one.version) for one in page.snapshots]
            told_now += [(one.id, one.version) for one in page.removals]
            for id_, version in told_now:
                assert version > versions.get(id_, 0)
                versions[id_] = version
            held.update(told([page]))
        return held

    @pytest.mark.parametrize("mode", ["selected", "unsynchronized"])
    @pytest.mark.parametrize("first", [0, 1, 2, 3])
    @pytest.mark.parametrize("second", [0, 1, 2])
    def test_no_part_of_a_group(self, desk: Moments, mode: str, first: int, second: int) -> None:
        """Whatever groups are applied between which pages, all that is told was so at one moment, that of the end."""
        session = self.session(desk, mode)
        pages = session.pages()
        seen = list(itertools.islice(pages, first))
        desk.write(Step(task("a"), {"n": 1}), Step(task("b"), None), Step(task("c"), HIDDEN), Step(task("x"), {}))
        seen += itertools.islice(pages, second)
        desk.write(Step(task("a"), {"n": 2}), Step(task("c"), {"n": 2}), Step(("Note", "x"), {}))
        desk.write(Step(task("b"), {"n": 3}), Step(task("c"), None))
        seen += pages

        assert self.holds(seen) == desk.seen[session.complete().version]

    @pytest.mark.parametrize("mode", ["selected", "unsynchronized"])
    def test_a_tenant_that_never_rests(self, desk: Moments, mode: str) -> None:
        """A download that is overtaken by groups page after page ends all the same, with what one moment had."""
        session = self.session(desk, mode)
        seen = []
        for page in session.pages():
            seen.append(page)
            desk.write(*(Step(task(id_), {"n": len(seen)}) for id_ in "abc"))
            assert len(seen) < 100

        assert len(seen) > 3
        assert self.holds(seen) == desk.seen[session.complete().version]

    def test_what_stays_hidden(self, desk: Moments) -> None:
        """That a hidden object was changed meanwhile is not told to who selected it, nor that it was created."""
        desk.put("b", hidden=1)
        pages = desk.selecting("a", "b", "x").pages()
        seen = list(itertools.islice(pages, 3))
        desk.write(Step(task("b"), {**HIDDEN, "n": 1}), Step(task("x"), HIDDEN))

        assert told([*seen, *pages]) == [("a", {"n": 0}), ("b", "gone"), ("x", "gone")]

    def test_what_a_hook_let_be_seen(self, desk: Moments) -> None:
        """What only a hook of ours made visible is removed if somebody hides it after it was sent."""
        desk.put("h", hidden=1)
        first = desk.write(
            Step(task("a"), {"n": 1}, REPLICA_A),
            Step(task("h"), {"n": 1}, REPLICA_A, by_hook=True),
            Step(task("b"), {"n": 1}, REPLICA_A),
        )
        pages = desk.uploaded(first - 2).pages()
        seen = list(itertools.islice(pages, 2))
        assert told(seen)[-1] == ("h", {"n": 1})
        desk.put("h", hidden=1)

        assert self.holds([*seen, *pages])["h"] == "gone"

    def test_a_change_log_that_is_cut_meanwhile(self, desk: Moments) -> None:
        """If the change log is collected above the first page, the download ends rather than miss a change."""
        pages = desk.selecting("a").pages()
        next(pages)
        desk.put("a", n=1)
        desk.put("a", n=2)
        collect(desk.store, TIME_US + 1)

        with pytest.raises(HistoryCollected, match="does not reach back to version 7"):
            list(pages)


class TestSession:
    def test_who_the_replica_is_bound_to(self) -> None:
        """A session names tenant and user; a replica that is bound to others is refused."""
        desk = Desk()
        started = desk.session(bound_tenant=TENANT, bound_user_id="ann").open().result()
        assert (started.tenant, started.user_id) == (TENANT, "ann")

        with pytest.raises(ReplicaOwned, match="another tenant"):
            desk.session(bound_tenant="other")
        with pytest.raises(ReplicaOwned, match="another user"):
            desk.session(bound_user_id="bob")

    def test_a_wish_that_is_refused(self) -> None:
        """A wish that does not fit the schema ends a session of mode all before it begins, and no other."""
        desk = Desk(Application(schema=INDEXED))
        wish = attribute("who") == 1

        with pytest.raises(InvalidConstraint, match="'who' is a string"):
            desk.session(wishes={"Task": wish})
        for mode in (UNSYNCHRONIZED, SELECTED):
            assert not desk.session(mode, wishes={"Task": wish}).open().result().entities

    @pytest.mark.parametrize("mode", [UNSYNCHRONIZED, SELECTED])
    def test_other_modes_reconcile_nothing(self, mode: sync_pb2.SynchronizeMode.ValueType) -> None:
        """Sessions of other modes than all name the modes of entities and reconcile none."""
        started = Desk().session(mode, wishes={"Task": attribute("n") == 1, "Note": "never"}).open().result()

        assert not started.reconcile
        assert [(plan.entity, plan.upload_excluded, plan.reconcile) for plan in started.entities] == [
            ("Note", True, False),
            ("Task", False, False),
        ]


class _CountingReader:
    """A reader that counts what it hands out."""

    def __init__(self, reader: Any, counts: Counter[str]) -> None:
        self._reader = reader
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._reader, name)

        def counted(*arguments: Any) -> Any:
            result = method(*arguments)
            handed = result.objects if name == "latest_objects" else result
            self._counts[name] += len(handed) if isinstance(handed, list | dict) else 1
            return result

        return counted


class CountingStore(MemoryStore):
    """A store that counts what is read of it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @contextmanager
    def read(self, tenant: str) -> Iterator[Any]:
        """Read, and count."""
        self.counts["transactions"] += 1
        with super().read(tenant) as reader:
            yield _CountingReader(reader, self.counts)


class TestCost:
    def read(self, desk: Desk, **fields: Any) -> Counter[str]:
        """Download everything and return what was read for it."""
        desk.store.counts.clear()
        desk.download(**fields)
        return Counter(desk.store.counts)

    @pytest.mark.parametrize("others", [10, 500])
    def test_it_follows_what_the_replica_sees(self, others: int) -> None:
        """With an index, what is read for a first download and a delta does not depend on the tenant's size."""
        desk = Desk(Application(schema=INDEXED), CountingStore(), schema=INDEXED)
        wishes: dict[str, DownloadWish] = {"Task": attribute("who") == "ann"}
        desk.write(*(Step(task(f"other{number}"), {"who": "bob"}) for number in range(others)))
        desk.write(*(Step(task(f"mine{number}"), {"who": "ann"}) for number in range(5)))

        first = self.read(desk, wishes=wishes)
        assert (first["objects"], first["index_range"], first["latest_objects"], first["change"]) == (5, 5, 0, 0)

        desk.write(*(Step(task(f"other{number}"), {"who": "eve"}) for number in range(others)))
        desk.write(Step(task("mine0"), {"who": "bob"}), Step(task("mine1"), {"who": "ann", "n": 1}))
        delta = self.read(desk, wishes=wishes)
        assert (delta["objects"], delta["index_range"], delta["latest_objects"]) == (2, 2, 0)
        assert delta["change"] <= 2

    def test_it_does_not_follow_what_once_was_seen(self) -> None:
        """What had a value and lost it before the first download is not looked at."""
        desk = Desk(Application(schema=INDEXED), CountingStore(), schema=INDEXED)
        desk.write(*(Step(task(f"done{number}"), {"who": "ann"}) for number in range(200)))
        desk.write(*(Step(task(f"done{number}"), {"who": "bob"}) for number in range(200)))
        desk.write(Step(task("mine"), {"who": "ann"}))

        first = self.read(desk, wishes={"Task": attribute("who") == "ann"})

        assert (first["objects"], first["index_range"]) == (1, 1)

    def test_nothing_to_do(self) -> None:
        """Where nothing changed, one transaction looks at the head and no scan is made."""
        desk = Desk(store=CountingStore())
        desk.put("x")
        desk.download()
        counts = self.read(desk)

        assert counts["transactions"] == 3  # who the replica is, what the session does, and the download
        assert {"latest_objects", "index_range", "entities", "objects", "change"}.isdisjoint(counts)

    def test_hidden_objects_keep_transactions_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A transaction reads a page's worth, however little of that the replica sees."""
        monkeypatch.setattr(download_module, "PAGE_OBJECTS_MAX", 10)
        desk = Desk(store=CountingStore())
        desk.write(*(Step(task(f"other{number:03}"), {"n": 2}) for number in range(100)))
        desk.put("mine", n=1)
        counts = self.read(desk, wishes={"Task": attribute("n") == 1})

        assert counts["latest_objects"] == 101
        assert counts["transactions"] >= 10
