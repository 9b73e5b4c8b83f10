"""Copies and backups put back: of a replica's directory, of the server's store, and servers that are others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import msgpack
import pytest
from tests.builders import collect, contents, quick_folder

from tidelog import Entity, FailureReason, ForeignServer, Integer, LogCorrupt, MassRemoval, Schema, String
from tidelog._keys import POSITION_BYTES, pack_position
from tidelog_client import Phase, Progress, Replica, Report, _file_exchange, _publication
from tidelog_client._connection import Stream
from tidelog_client._lineage import FORMER_IDENTITIES_MAX
from tidelog_server import Application, HookContext, HookObject, Reject, Server, verify_store
from tidelog_server._indexes import twins_prefix
from tidelog_server._lmdb_store import LmdbStore
from tidelog_server._session import server_time_us


class Site:
    """A server and devices whose directories can be copied away and put back."""

    def __init__(self, folder: Path, application: Application | None = None) -> None:
        self.folder = folder
        self.application = application or Application()
        self._devices: dict[str, Replica] = {}
        self._stack = ExitStack()
        self.start()

    def start(self, data: str = "server") -> None:
        """Start the server on a folder."""
        self.store = LmdbStore(self.folder / data)
        self.server = Server(self.application, store=self.store)
        self.server.start()

    def stop(self) -> None:
        """Stop the server."""
        self.server.stop(grace_seconds=0)
        self.store.close()

    def device(self, name: str, **options: Any) -> Replica:
        """Open a device, or return it if it is open; it speaks to the server that runs now."""
        self.shut(name)
        self._devices[name] = Replica(self.folder / name, server=self.server.address, **options)
        return self._devices[name]

    def shut(self, name: str) -> None:
        """Close a device."""
        if (opened := self._devices.pop(name, None)) is not None:
            assert list(opened.verify()) == []
            opened.close()

    def copy(self, name: str, to: str) -> None:
        """Copy the directory of a device that is closed, or of a server that is stopped."""
        shutil.rmtree(self.folder / to, ignore_errors=True)
        shutil.copytree(self.folder / name, self.folder / to)

    def back_up(self) -> None:
        """Keep a copy of the server's store."""
        self.stop()
        self.copy("server", "backup")
        self.start()

    def adopt(self, application: Application) -> None:
        """Start the server with another application."""
        self.stop()
        self.application = application
        self.start()

    def restore(self, application: Application | None = None) -> None:
        """Put the copy of the server's store back, without telling anybody; perhaps with another application."""
        self.stop()
        self.application = application or self.application
        self.copy("backup", "server")
        self.start()

    def close(self) -> None:
        """Close everything."""
        for name in list(self._devices):
            self.shut(name)
        self.stop()
        assert list(verify_store(self.store.path)) == []

    def sync(self, name: str, **options: Any) -> Report:
        """Open a device anew, at the present server, and synchronize all."""
        return self.device(name).synchronize_all(**options)

    def truth(self, entity: str = "Task") -> dict[str, dict[str, Any]]:
        """Return what a new device gets from the server."""
        shutil.rmtree(self.folder / "fresh", ignore_errors=True)
        self.sync("fresh")
        found = contents(self._devices["fresh"], entity)
        self.shut("fresh")
        return found


@pytest.fixture
def site() -> Iterator[Site]:
    """Give a server whose application rejects tasks that are bad."""
    application = Application()

    @application.before_commit("Task")
    def rejects(task: HookObject, context: HookContext) -> None:
        if task["bad"]:
            raise Reject("bad")

    with quick_folder() as folder:
        found = Site(folder, application)
        yield found
        found.close()


class TestCopiedReplicas:
    """A directory that was put back, or copied to another device, goes on under an id of its own."""

    def test_an_old_copy_put_back_after_a_synchronization(self, site: Site) -> None:
        """New edits of an old copy are applied as new ones, and what the lost directory had uploaded stays."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.copy("a", "old")
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 1})
        a.create("Task", {}, "lost from the device")
        a.synchronize_all()
        former = a.replica_id
        site.shut("a")
        site.copy("old", "a")
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 10})
        a.create("Task", {"bad": True}, "refused")

        report = a.synchronize_all()

        assert report.former_replica_id == former != a.replica_id
        assert (report.applied, report.rejected, a.pending_count()) == (1, 1, 0)
        assert contents(a) == site.truth() == {"t1": {"n": 11}, "lost from the device": {}}

    def test_an_old_copy_with_operations_that_were_settled_since(self, site: Site) -> None:
        """What was pending in the copy and has been settled meanwhile is recognized, refusals too."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        a.update("Task", "t1", increment={"n": 1})
        a.create("Task", {"bad": True}, "refused")
        site.shut("a")
        site.copy("a", "old")
        a = site.device("a")
        failure = a.synchronize_all().failures[0]
        a.update("Task", "t1", increment={"n": 100})
        a.synchronize_all()
        site.shut("a")
        site.copy("old", "a")

        a = site.device("a")
        a.update("Task", "t1", increment={"n": 10})
        report = a.synchronize_all()

        assert report.former_replica_id
        assert [one.id for one in report.failures] == [failure.id]
        assert contents(a) == site.truth() == {"t1": {"n": 111}}
        assert not a.synchronize_all().former_replica_id

    def test_two_devices_go_on_from_one_directory(self, site: Site) -> None:
        """What both copies hold is applied once, what each added is applied; both have ids of their own in the end."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        a.update("Task", "t1", increment={"n": 1})
        with a.transaction(atomic=True) as transaction:
            transaction.create("Task", {}, "both 1")
            transaction.create("Task", {}, "both 2")
        site.shut("a")
        site.copy("a", "b")
        a, b = site.device("a"), site.device("b")
        a.update("Task", "t1", increment={"n": 10})
        b.update("Task", "t1", increment={"n": 100})
        b.create("Task", {}, "of b")

        for _ in range(2):
            a.synchronize_all()
            b.synchronize_all()
        a.synchronize_all()

        expected = {"t1": {"n": 111}, "both 1": {}, "both 2": {}, "of b": {}}
        assert contents(a) == contents(b) == site.truth() == expected
        assert a.replica_id != b.replica_id
        assert a.pending_count() == b.pending_count() == 0
        assert not list(a.failures())
        assert not list(b.failures())

    def test_the_copy_uploads_first(self, site: Site) -> None:
        """An operation that the copy settled under its new id is not applied again when the original sends it."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        a.update("Task", "t1", increment={"n": 1})  # in both
        site.shut("a")
        site.copy("a", "b")
        a, b = site.device("a"), site.device("b")
        a.create("Task", {}, "t2")
        a.synchronize_selected([("Task", "t2")])  # leaves the increment behind
        assert a.pending_count() == 1

        assert b.synchronize_all().former_replica_id == a.replica_id
        a.synchronize_all()

        assert contents(a) == site.truth() == {"t1": {"n": 1}, "t2": {}}

    def test_it_goes_on_by_itself_in_every_mode(self, site: Site) -> None:
        """Sessions of the other modes fork too, and upload what they were asked to."""
        for mode in ("unsynchronized", "selected"):
            a = site.device(f"a {mode}")
            a.create("Task", {}, f"t1 {mode}")
            site.shut(f"a {mode}")
            site.copy(f"a {mode}", "old")
            a = site.device(f"a {mode}")
            a.create("Task", {}, f"t2 {mode}")
            a.synchronize_all()
            site.shut(f"a {mode}")
            site.copy("old", f"a {mode}")
            a = site.device(f"a {mode}")
            a.create("Task", {}, f"t3 {mode}")
            if mode == "selected":
                report = a.synchronize_selected([("Task", f"t3 {mode}")])
            else:
                report = a.synchronize_unsynchronized()
            assert report.former_replica_id
            a.synchronize_all()
            assert {f"t{number} {mode}" for number in (1, 2, 3)} <= contents(a).keys()
            assert a.pending_count() == 0

    def test_later_operations_on_a_recognized_creation(self, site: Site) -> None:
        """An object that the former id created counts as the replica's own: its edits made before it knew pass."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        site.shut("a")
        site.copy("a", "b")
        a = site.device("a")
        a.create("Task", {}, "of a")
        a.synchronize_all()
        b = site.device("b")
        b.update("Task", "t1", {"n": 5})  # has never seen a version of it

        report = b.synchronize_all()

        assert report.former_replica_id
        assert not report.rejected
        assert site.truth() == {"t1": {"n": 5}, "of a": {}}

    def test_an_edit_after_what_a_copy_brought(self, site: Site) -> None:
        """What another copy uploaded of the common log is no conflict to the one that made it too."""
        site.application.on_conflict("Task", "reject_stale")
        a = site.device("a")
        a.create("Task", {"n": 0}, "x")
        a.synchronize_all()
        a.update("Task", "x", {"n": 1})
        site.shut("a")
        site.copy("a", "b")
        site.sync("b")
        b = site.device("b")
        b.create("Task", {}, "another")
        b.synchronize_all()
        a = site.device("a")
        a.update("Task", "x", {"n": 2})

        report = a.synchronize_all()

        assert report.former_replica_id
        assert (report.applied, list(report.failures)) == (2, [])
        assert contents(a)["x"] == {"n": 2}

    def test_what_copies_brought_is_forgotten_in_the_end(self, site: Site) -> None:
        """Notes of what copies settled go with the history; who repeats it then is told that nobody knows any more."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "x")
        a.synchronize_all()
        former = a.replica_id
        a.update("Task", "x", increment={"n": 1})
        site.shut("a")
        site.copy("a", "b")
        later_us = server_time_us() + 10**13
        collect(site.store, later_us, replicas=timedelta(0))
        assert site.sync("a").former_replica_id == former
        assert list(verify_store(site.store.path)) == []

        notes = partial(_notes_about, site.store, former)
        assert len(notes()) == 1
        site.device("a").create("Task", {}, "later")
        site.sync("a")
        collect(site.store, later_us, replicas=timedelta(0))

        assert [len(value) for value in notes()] == [POSITION_BYTES]
        assert list(verify_store(site.store.path)) == []
        assert [one.reason for one in site.sync("b").failures] == [FailureReason.SUPERSEDED]
        assert site.truth()["x"] == {"n": 1}

    def test_what_a_copy_brought_is_not_forgotten_while_the_original_may_come(self, site: Site) -> None:
        """What a copy settled is recognized however late the original brings it, and though history is forgotten."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "x")
        a.synchronize_all()
        a.update("Task", "x", increment={"n": 1})
        site.shut("a")
        site.copy("a", "b")
        a = site.device("a")
        a.create("Task", {}, "of a")
        a.synchronize_selected([("Task", "of a")])
        site.shut("a")
        site.device("b").create("Task", {}, "of b")
        assert site.sync("b").former_replica_id
        site.device("c").create("Task", {}, "of c")
        site.sync("c")
        assert collect(site.store, server_time_us() + 10**13, history=timedelta(0)).changes

        report = site.sync("a")

        assert list(report.failures) == []
        assert site.device("a").pending_count() == 0
        assert site.truth() == {"x": {"n": 1}, "of a": {}, "of b": {}, "of c": {}}

    def test_copies_of_a_copy(self, site: Site) -> None:
        """What two copies of a copy hold is applied once, though another operation has its place in the log."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.copy("a", "b")
        a, b = site.device("a"), site.device("b")
        a.update("Task", "t1", increment={"n": 1})
        a.synchronize_all()
        b.update("Task", "t1", increment={"n": 10})
        site.shut("b")
        site.copy("b", "c")

        reports = [site.sync("b"), site.sync("c")]

        assert all(one.former_replica_id for one in reports)
        assert site.truth() == {"t1": {"n": 11}}

    def test_an_object_that_another_copy_created(self, site: Site) -> None:
        """What another copy created under the same id is not one's own: an edit meant for the own one is refused."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.copy("a", "b")
        a, b = site.device("a"), site.device("b")
        a.create("Task", {"owner": "a"}, "1")
        a.synchronize_all()
        b.create("Task", {"owner": "b"}, "1")
        b.update("Task", "1", {"x": 2})

        report = b.synchronize_all()

        reasons = [FailureReason.ALREADY_EXISTS, FailureReason.DEPENDENCY_FAILED]
        assert [one.reason for one in report.failures] == reasons
        assert site.truth() == {"t1": {}, "1": {"owner": "a"}}

    def test_what_waited_behind_is_not_in_force_under_a_former_id(self, site: Site) -> None:
        """What settled only after a device had forked, below what settled before, is offered again if it is lost."""
        a = site.device("a")
        a.create("Task", {}, "one")
        a.create("Task", {}, "two")
        a.synchronize_selected([("Task", "two")])
        site.shut("a")
        site.copy("a", "b")
        for name in ("b", "a"):
            device = site.device(name)
            device.create("Task", {}, f"of {name}")
            report = device.synchronize_selected([("Task", f"of {name}")])
            site.shut(name)
        assert report.former_replica_id
        site.back_up()
        assert site.sync("a").applied == 1
        site.shut("a")
        site.restore()

        assert site.sync("a").reoffered == 1
        assert site.truth().keys() == {"one", "two", "of a", "of b"}
        assert contents(site.device("a")) == site.truth()

    @pytest.mark.parametrize("forks_again", [False, True])
    @pytest.mark.parametrize("is_retired", [False, True])
    def test_what_is_in_force_under_a_former_id(self, site: Site, *, is_retired: bool, forks_again: bool) -> None:
        """What a restored server has settled under a former id is not offered again, though it forgot how."""
        a = site.device("a")
        for number in range(5):
            a.create("Task", {}, f"t{number}")
        a.create("Task", {"bad": True}, "refused")
        a.synchronize_all()
        later_us = server_time_us() + 10**13
        if is_retired:
            collect(site.store, later_us, replicas=timedelta(0))
        else:
            site.shut("a")
            site.copy("a", "old")
            site.device("a").create("Task", {}, "of the lost directory")
            site.sync("a")
            site.shut("a")
            site.copy("old", "a")
        site.device("a").create("Task", {}, "t5")
        assert site.sync("a").former_replica_id
        b = site.device("b")
        b.create("Task", {}, "of b")
        b.synchronize_all()
        assert collect(site.store, later_us).outcomes
        if forks_again:
            site.device("a")._storage.fork()
            site.device("a").create("Task", {}, "of the third id")
            site.sync("a")
        site.shut("a")
        site.back_up()
        site.device("a").create("Task", {}, "t6")
        site.sync("a")
        site.shut("a")
        site.restore()

        report = site.sync("a")

        assert report.server_restored
        assert (report.reoffered, report.rejected, list(report.failures)) == (1, 0, [])
        assert contents(site.device("a")) == site.truth()
        assert {f"t{number}" for number in range(7)} <= site.truth().keys()

    def test_what_waits_and_a_copy_brought_counts_once(self, tmp_path: Path) -> None:
        """What a replica could not offer again yet, and a copy of it did, is not replayed on top of itself."""
        schemas = _task_schema(1), _task_schema(2)
        former, newer = (Application(schema=schema) for schema in schemas)
        with closing(Site(tmp_path, former)) as site:
            c = site.device("c", schema=schemas[0])
            c.create("Task", {"n": 0}, "t0")
            c.synchronize_all()
            site.shut("c")
            site.back_up()
            site.adopt(newer)
            c = site.device("c", schema=schemas[1])
            for _ in range(60):  # so that the versions of the former life are far ahead
                c.create("Task", {"n": 0})
            c.synchronize_all()
            site.shut("c")
            a = site.device("a", schema=schemas[1])
            a.synchronize_all()
            a.update("Task", "t0", {"z": "new"}, increment={"n": 1})
            a.synchronize_all()
            site.shut("a")
            site.copy("a", "b")
            site.restore(former)
            for name in ("a", "b"):
                device = site.device(name, schema=schemas[0])
                device.create("Task", {"n": 9}, f"of {name}")
                device.synchronize_all(accept_mass_removal=True)
                device.synchronize_all()
                site.shut(name)
            site.adopt(newer)
            site.device("a", schema=schemas[1]).synchronize_all()
            b = site.device("b", schema=schemas[1])
            b.synchronize_all()

            b.update("Task", "t0", {"z": "later"})
            b.synchronize_all()

            assert site.truth()["t0"] == {"n": 1, "z": "later"}
            assert contents(b) == site.truth()

    @pytest.mark.parametrize("kind", ["create", "update"])
    def test_what_is_selected_waits_for_what_waits(self, tmp_path: Path, kind: str) -> None:
        """A selected edit behind an operation that cannot be offered again yet is neither refused nor overtakes it."""
        schemas = _task_schema(1), _task_schema(2)
        former, newer = (Application(schema=schema) for schema in schemas)
        with closing(Site(tmp_path, former)) as site:
            c = site.device("c", schema=schemas[0])
            c.create("Task", {"n": 0}, "t0")
            c.synchronize_all()
            site.shut("c")
            site.back_up()
            site.adopt(newer)
            a = site.device("a", schema=schemas[1])
            a.synchronize_all()
            if kind == "create":
                a.create("Task", {"n": 0, "z": "own"}, "t1")
            else:
                a.update("Task", "t0", {"z": "own"})
            a.synchronize_all()
            site.shut("a")
            site.restore(former)
            a = site.device("a", schema=schemas[0])
            a.synchronize_all()
            id_ = "t1" if kind == "create" else "t0"
            a.update("Task", id_, {"n": 7})

            report = a.synchronize_selected([("Task", id_)])

            assert (report.applied, report.rejected, a.pending_count()) == (0, 0, 1)
            site.shut("a")
            site.adopt(newer)
            report = site.device("a", schema=schemas[1]).synchronize_all()
            assert (report.applied, report.reoffered, report.rejected) == (1, 1, 0)
            assert site.truth()[id_] == {"n": 7, "z": "own"}

    def test_a_fork_of_an_older_version(self, site: Site) -> None:
        """A replica that forked before nonces were noted with former ids goes on, and is recognized as before."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_selected([("Task", "t1")])
        a.create("Task", {"n": 1}, "both")
        site.shut("a")
        site.copy("a", "b")
        site.sync("a")
        b = site.device("b")
        former = b._storage.fork()
        b._storage.set_meta(former_identities=cast("bytes", msgpack.packb([(former, 2, 1)])))
        b.update("Task", "both", increment={"n": 1})

        report = b.synchronize_all()

        assert (report.applied, report.rejected) == (2, 0)
        assert contents(b) == site.truth() == {"t1": {}, "both": {"n": 2}}

    @pytest.mark.parametrize("is_noticed", [True, False])
    @pytest.mark.parametrize("is_forgotten", [False, True])
    def test_what_a_copy_settled_in_ones_place_under_a_former_id(
        self, site: Site, *, is_forgotten: bool, is_noticed: bool
    ) -> None:
        """What another copy has in the place of what was lost is not taken for it, however late that is noticed."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.copy("a", "b")
        site.back_up()
        a = site.device("a")
        a.create("Task", {}, "t2")
        a.create("Task", {}, "t3")
        a.synchronize_all()
        if is_noticed:
            site.sync("c")
            site.shut("c")
        site.shut("a")
        site.restore()
        if is_noticed:
            assert site.sync("c").server_restored
        b = site.device("b")
        for number in range(3):
            b.create("Task", {}, f"of b {number}")
        b.synchronize_all()
        if is_forgotten:
            site.device("c").create("Task", {}, "of c")
            site.sync("c")
            assert collect(site.store, server_time_us() + 10**13).outcomes

        report = site.sync("a")

        assert report.former_replica_id
        assert report.reoffered == 3
        assert report.server_restored
        found = {one.object_id for one in report.failures} if is_forgotten else site.truth().keys()
        assert {"t2", "t3"} <= found

    def test_refusals_that_nobody_else_knows_of(self, site: Site) -> None:
        """What was refused is recorded again, though a copy went on in its place and all history is forgotten."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.copy("a", "b")
        site.back_up()
        a = site.device("a")
        a.create("Task", {"bad": True}, "refused")
        (lost,) = a.synchronize_all().failures
        site.shut("a")
        site.restore()
        b = site.device("b")
        for number in range(3):
            b.create("Task", {}, f"of b {number}")
        b.synchronize_all()
        assert collect(site.store, server_time_us() + 10**13).outcomes

        report = site.sync("a")

        assert report.server_restored
        assert report.former_replica_id
        with site.store.read("default") as reader:
            recorded = reader.failures(b"", 10, 1 << 20)
        assert any(lost.operation_bytes in data for _, data in recorded)

    def test_an_edit_while_it_forks(self, site: Site) -> None:
        """What is edited after the new id was taken, and before the server's state came, is one's own as before."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        site.shut("a")
        site.copy("a", "b")
        a = site.device("a")
        a.create("Task", {}, "of a")
        a.synchronize_all()
        b = site.device("b")
        b.create("Task", {"n": 0}, "t2")
        edited = False

        def edit(progress: Progress) -> None:
            nonlocal edited
            if progress.phase is Phase.DOWNLOAD and not edited:
                edited = True
                b.update("Task", "t1", {"n": 1})
                b.update("Task", "t2", {"n": 2})

        assert b.synchronize_all(on_progress=edit).former_replica_id
        report = b.synchronize_all()

        assert edited
        assert not report.failures
        assert site.truth() == {"t1": {"n": 1}, "t2": {"n": 2}, "of a": {}}

    def test_very_many_forks(self, site: Site) -> None:
        """However often a directory was copied, an operation that waits all the time is uploaded in the end."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        a.create("Task", {}, "waits")
        for _ in range(FORMER_IDENTITIES_MAX + 1):
            a._storage.fork()

        assert a.synchronize_all().applied == 1


class TestRestoredServers:
    """A server's store that is put back from a backup gets again what devices had been told was settled."""

    def test_nobody_else_wrote_since(self, site: Site) -> None:
        """Acknowledged operations that the backup lacks are applied once more, refusals recorded once more."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 1})
        a.create("Task", {"x": 1}, "t2")
        a.create("Task", {"bad": True}, "refused")
        failure = a.synchronize_all().failures[0]
        a.delete("Task", "t2")
        a.synchronize_all()
        a.create("Task", {}, "t3")
        a.synchronize_all()
        a.update("Task", "t1", increment={"n": 10})  # pending
        site.shut("a")

        site.restore()
        report = site.sync("a")

        a = site.device("a")
        assert report.server_restored
        assert (report.reoffered, report.applied, report.rejected) == (5, 1, 0)
        assert contents(a) == site.truth() == {"t1": {"n": 11}, "t3": {}}
        with site.store.read("default") as reader:
            [(_, recorded)] = reader.failures(b"", 10, 1 << 20)
        assert failure.operation_bytes in recorded
        again = a.synchronize_all()
        assert (again.server_restored, again.reoffered, a.pending_count()) == (False, 0, 0)

    @pytest.mark.parametrize("is_small", [True, False])
    def test_contents_of_files_are_offered_again(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, *, is_small: bool
    ) -> None:
        """With the operations that a backup lacks the contents come again that they refer to, large ones too."""
        monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", 1000 if is_small else 1)
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.attach("Task", "t1", "photo", b"a photo")
        a.create("Task", {"photo": a.add_file(b"bad"), "bad": True}, "refused")
        a.synchronize_all()
        site.shut("a")

        site.restore()
        report = site.sync("a")
        assert report.server_restored
        assert report.reoffered == 2
        assert (report.files_uploaded, report.skipped) == (2, [])
        site.sync("b")
        with site.device("b").open_file("Task", "t1", "photo") as file:
            assert file.read() == b"a photo"

    def test_contents_that_nobody_has_any_more(self, site: Site) -> None:
        """What is offered again is applied without the files whose contents went with the server and the device."""
        a = site.device("a")
        a.create("Task", {}, "other")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.create("Task", {"title": "important", "photo": a.add_file(b"first")}, "t1")
        a.attach("Task", "t1", "scan", b"a scan")
        a.synchronize_all()
        a.attach("Task", "t1", "photo", b"retaken")
        a.update("Task", "t1", {"title": "very important"}, unset=["scan"])
        a.synchronize_all()
        for content in list(a._storage.files.contents.contents()):
            a._storage.files.contents.renew(content.sha256, 1.0)
        a.synchronize_all()
        site.shut("a")

        site.restore()
        report = site.sync("a")

        assert (report.server_restored, report.reoffered, list(report.failures)) == (True, 4, [])
        site.sync("b")
        task = site.device("b").get("Task", "t1")
        assert task is not None
        assert task["title"] == "very important"
        with site.device("b").open_file("Task", "t1", "photo") as file:
            assert file.read() == b"retaken"
        assert contents(site.device("a"))["t1"].keys() == {"title", "photo"}

    @pytest.mark.parametrize("mode", ["unsynchronized", "selected"])
    def test_other_modes_offer_contents_again(self, site: Site, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        """Where operations offered again wait for their contents, the other modes lose sight of nothing either."""
        monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", 1)
        a = site.device("a")
        a.create("Task", {}, "other")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.create("Task", {"photo": a.add_file(b"a photo"), "n": 1}, "t1")
        a.synchronize_all()
        a.update("Task", "t1", {"n": 2})
        site.shut("a")

        site.restore()
        a = site.device("a")
        report = a.synchronize_selected([("Task", "t1")]) if mode == "selected" else a.synchronize_unsynchronized()

        assert (report.reoffered, report.skipped, a.pending_count()) == (1, [], 0)
        assert {one.id: one["n"] for one in a.query("Task")} == {"other": None, "t1": 2}
        assert site.truth()["t1"]["n"] == 2

    def test_others_wrote_since(self, site: Site) -> None:
        """What somebody else changed since the restore is not overwritten but becomes a failure; the rest goes."""
        a, b = site.device("a"), site.device("b")
        a.create("Task", {"title": "x", "n": 0}, "t1")
        a.create("Task", {"title": "x", "n": 0}, "t2")
        a.synchronize_all()
        b.synchronize_all()
        site.shut("a")
        site.shut("b")
        site.back_up()
        a = site.device("a")
        a.update("Task", "t1", {"title": "of a, lost"})
        a.update("Task", "t2", {"title": "of a, kept"})
        a.update("Task", "t1", {"n": 7})
        a.synchronize_all()
        site.shut("a")
        site.restore()
        b = site.device("b")
        b.update("Task", "t1", {"title": "of b"})
        assert not b.synchronize_all().server_restored  # it has seen nothing that the backup lacks
        site.shut("b")

        report = site.sync("a")

        assert report.server_restored
        assert [one.reason for one in report.failures] == [FailureReason.SUPERSEDED]
        assert report.failures[0].attributes == {"title": "of a, lost"}
        truth = site.truth()
        assert truth == {"t1": {"title": "of b", "n": 7}, "t2": {"title": "of a, kept", "n": 0}}
        assert contents(site.device("a")) == truth
        site.sync("b")
        assert contents(site.device("b")) == truth

    def test_the_report_counts_what_became_a_failure(self, site: Site) -> None:
        """Of what is settled anew the report counts what is refused now as such; a former refusal is no news."""
        a, b = site.device("a"), site.device("b")
        a.create("Task", {"title": "x"}, "t1")
        a.synchronize_all()
        b.synchronize_all()
        site.shut("a")
        site.shut("b")
        site.back_up()
        a = site.device("a")
        a.update("Task", "t1", {"title": "of a"})
        a.create("Task", {}, "t2")
        a.create("Task", {"bad": True}, "refused")
        with a.transaction(atomic=True) as transaction:
            transaction.update("Task", "t1", {"title": "of a, in a group"})
            transaction.create("Task", {}, "t3")
        a.synchronize_all()
        a.create("Task", {}, "pending")
        a.create("Task", {"bad": True}, "refused as well")
        site.shut("a")
        site.restore()
        b = site.device("b")
        b.update("Task", "t1", {"title": "of b"})
        b.synchronize_all()

        report = site.sync("a")

        reasons = {one.object_id: one.reason for one in report.failures}
        assert reasons == {"t1": FailureReason.SUPERSEDED, "refused as well": FailureReason.HOOK_REJECTED}
        assert (report.reoffered, report.applied, report.rejected) == (5, 1, 4)
        assert report.rejected == sum(len(one.group_operations) or 1 for one in report.failures)
        again = site.sync("a")
        assert (again.reoffered, again.applied, again.rejected, list(again.failures)) == (0, 0, 0, [])

    @pytest.mark.parametrize("bad", [False, True])
    def test_a_commit_group_at_the_end_of_what_is_kept(self, site: Site, *, bad: bool) -> None:
        """The log forgets commit groups whole: what it has of one is offered again whole, refused ones too."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.create("Task", {}, "forgotten")
        for group in range(2):
            with a.transaction(atomic=True) as transaction:
                for number in range(3):
                    transaction.create("Task", {"bad": bad and number == 1}, f"{group} {number}")
        known = [one.id for one in a.synchronize_all().failures]
        with a._storage.environment.read() as reader:
            size_bytes = a._storage.log.size_bytes(reader)
        assert a._storage.trim(1e18, size_bytes, count_max=3) == 5
        assert [one.operation.seq for one in a.log()] == [6, 7, 8]
        site.shut("a")

        site.restore()
        report = site.sync("a")

        assert (report.reoffered, report.rejected) == (3, 0)
        expected = {"t1"} if bad else {"t1", "1 0", "1 1", "1 2"}
        assert contents(site.device("a")).keys() == site.truth().keys() == expected
        with site.store.read("default") as reader:
            assert [id_.hex() for id_, _ in reader.failures(b"", 10, 1 << 20)] == [UUID(one).hex for one in known[1:]]

    def test_what_waits_to_be_offered_again_stays_in_view(self, site: Site) -> None:
        """What a server cannot take yet that was put back stays in view, with later edits, until it is settled."""
        former, newer = (Application(schema=_task_schema(version)) for version in (1, 2))
        schema = _task_schema(2)
        site.adopt(former)
        b = site.device("b", schema=_task_schema(1))
        b.create("Task", {"n": 0}, "t0")
        b.create("Task", {"n": 0}, "goes")
        b.synchronize_all()
        site.shut("b")
        site.back_up()
        site.adopt(newer)
        a = site.device("a", schema=schema)
        a.synchronize_all()
        a.update("Task", "t0", {"z": "new"}, increment={"n": 1})
        a.create("Task", {"n": 5}, "t1")
        a.delete("Task", "goes")
        a.create("Task", {"n": 0}, "theirs")
        a.synchronize_all()
        a.update("Task", "t0", increment={"n": 10})
        a.update("Task", "t1", {"z": "x"})
        before = {one.id: one.to_dict() for one in a.query("Task")}
        assert before.keys() == {"t0", "t1", "theirs"}
        site.shut("a")
        site.restore(former)
        b = site.device("b", schema=_task_schema(1))
        b.create("Task", {"n": 7}, "theirs")
        b.synchronize_all()

        a = site.device("a", schema=schema)
        for _ in range(2):
            report = a.synchronize_all()
            assert (report.reoffered, report.applied, report.removed) == (0, 0, 0)
            assert {one.id: one.to_dict() for one in a.query("Task")} == before
            assert list(a.verify()) == []
        site.shut("a")
        site.shut("b")
        site.restore()  # once more: it all begins anew
        a = site.device("a", schema=schema)
        a.synchronize_unsynchronized()
        assert {one.id: one.to_dict() for one in a.query("Task")} == before
        assert site.device("b", schema=_task_schema(1)).synchronize_all().reoffered == 1
        site.shut("a")
        site.shut("b")
        site.adopt(newer)

        report = site.device("a", schema=schema).synchronize_all()

        assert (report.reoffered, report.applied, report.rejected) == (4, 2, 1)
        assert [one.object_id for one in report.failures] == ["theirs"]
        a = site.device("a", schema=schema)
        expected = before | {"theirs": {"n": 7}}
        assert {one.id: one.to_dict() for one in a.query("Task")} == expected
        c = site.device("c", schema=schema)
        c.synchronize_all()
        assert {one.id: one.to_dict() for one in c.query("Task")} == expected

    @pytest.mark.parametrize("at_once", [True, False])
    @pytest.mark.parametrize("lags", [True, False])
    def test_objects_that_wait_for_contents_stay_in_view(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, *, lags: bool, at_once: bool
    ) -> None:
        """Objects whose contents have to be uploaded again are in view all the time, and are no mass removal."""
        monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", 1)
        if not at_once:
            monkeypatch.setattr(_publication, "PUBLISH_OBJECTS_MAX", 0)
            monkeypatch.setattr(_publication, "END_STEP_OBJECTS", 1)
        a = site.device("a")
        a.create("Task", {}, "other")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        for number in range(30):
            a.create("Task", {"photo": a.add_file(b"a photo %d" % number), "n": 1}, f"t{number}")
        a.synchronize_all()
        before = contents(a)
        site.shut("a")
        site.restore()
        seen = []

        def look(progress: Progress) -> None:
            seen.append(len(contents(a)))

        a = site.device("a")
        if lags:
            with monkeypatch.context() as patch:
                patch.setattr(_file_exchange.FileExchange, "exchange", lambda *_, **__: False)
                assert a.synchronize_all(on_progress=look).reoffered == 0
            assert list(a.verify()) == []
        step = _publication.Publication._end_step

        def end_step(*args: Any) -> Any:
            look(Progress(Phase.PUBLISH, 0, None))
            return step(*args)

        monkeypatch.setattr(_publication.Publication, "_end_step", end_step)
        report = a.synchronize_all(on_progress=look)

        assert set(seen) == {31}
        assert (report.reoffered, report.rejected, report.removed) == (30, 0, 0)
        assert contents(a) == site.truth() == before

    def test_what_waits_for_contents_shows_in_every_step(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a new timeline's state comes into view in steps, none shows without what is to be offered again."""
        for name, value in (("PUBLISH_OBJECTS_MAX", 0), ("PUBLISH_STEP_PAGES", 1), ("END_STEP_OBJECTS", 1)):
            monkeypatch.setattr(_publication, name, value)
        a = site.device("a")
        a.create("Task", {"n": 0}, "there")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.create("Task", {"n": 0, "photo": a.add_file(b"a photo")}, "new")
        for id_ in ("there", "new"):
            a.update("Task", id_, {"photo": a.add_file(b"a photo of %s" % id_.encode()), "n": 1})
            a.update("Task", id_, {"n": 2})
        a.synchronize_all()
        before = contents(a)
        site.shut("a")
        site.restore()
        monkeypatch.setattr(_file_exchange, "SMALL_UPLOADS_BYTES", 0)
        a = site.device("a")
        shown = []
        write = a._storage.environment.write

        def watched(work: Any) -> Any:
            result = write(work)
            shown.append(contents(a))
            return result

        monkeypatch.setattr(a._storage.environment, "write", watched)

        assert a.synchronize_all().reoffered == 5

        assert [one for one in shown if one != before] == []
        assert site.truth() == before

    def test_what_was_to_be_offered_again_is_damaged(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """An operation that cannot be read any more and is set aside does not keep the others from being offered."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        for number in range(3):
            a.create("Task", {}, f"new {number}")
        a.synchronize_all()
        site.shut("a")
        site.restore()
        a = site.device("a")
        assert not cut_session(a, monkeypatch, after_messages=1)
        storage = a._storage
        storage.environment.write(lambda writer: writer.put(pack_position(3), b"damaged", db=storage.log._database))
        with pytest.raises(LogCorrupt):
            a.synchronize_all()
        assert list(a.set_aside_damaged().files) == [3]

        assert a.synchronize_all().reoffered == 2
        assert contents(a) == site.truth() == {"t1": {}, "new 0": {}, "new 2": {}}

    def test_two_devices_offer_again(self, site: Site) -> None:
        """Operations of two devices come together again, in the order they had, whichever of the two comes first."""
        for first, second in (("a", "b"), ("b", "a")):
            a, b = site.device("a"), site.device("b")
            key = f"t {first}"
            a.create("Task", {"title": "", "n": 0}, key)
            a.synchronize_all()
            b.synchronize_all()
            site.shut("a")
            site.shut("b")
            site.back_up()
            a = site.device("a")
            a.update("Task", key, {"title": "of a"}, increment={"n": 1})
            a.synchronize_all()
            b = site.device("b")
            b.synchronize_all()
            b.update("Task", key, {"note": "of b"}, increment={"n": 10})
            b.synchronize_all()
            site.shut("a")
            site.shut("b")
            site.restore()
            reports = [site.sync(first), site.sync(second)]
            site.sync(first)
            assert [one.reoffered for one in reports] == [1, 1]
            assert not any(len(one.failures) for one in reports)
            assert site.truth()[key] == {"title": "of a", "note": "of b", "n": 11}
            assert contents(site.device("a")) == contents(site.device("b")) == site.truth()

    def test_cuts_while_offering_again(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut at whatever message, nothing is lost or applied twice, and what is shown never loses an own edit."""
        a, b = site.device("a"), site.device("b")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        b = site.device("b")
        for number in range(20):
            b.create("Task", {}, f"of b {number}")
        b.synchronize_all()
        a = site.device("a")
        for number in range(5):
            a.update("Task", "t1", increment={"n": 1})
            a.create("Task", {}, f"new {number}")
        a.synchronize_all()
        a.update("Task", "t1", increment={"n": 100})  # pending
        site.shut("a")
        site.copy("a", "before")
        cut_at = 0
        done = False
        while not done:
            cut_at += 1
            site.shut("a")
            site.copy("before", "a")
            site.restore()
            a = site.device("a")
            done = cut_session(a, monkeypatch, after_messages=cut_at)
            assert a.get("Task", "t1")["n"] == 105  # type: ignore[index]
            a.synchronize_all()
            expected = {"t1": {"n": 105}, **{f"new {number}": {} for number in range(5)}}
            assert contents(a) == site.truth() == expected
            assert a.pending_count() == 0
        assert cut_at > 5

    def test_put_back_while_offering_again(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a device was told while it adopted a timeline is evidence too, should that timeline be put back."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 1})
        a.synchronize_all()
        site.shut("a")
        site.restore()
        assert not cut_session(site.device("a"), monkeypatch, after_messages=1)  # a new timeline began
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 10})
        assert not cut_session(a, monkeypatch, after_messages=3)
        assert a.pending_count() == 0
        site.shut("a")

        site.restore()
        site.sync("a")

        assert contents(site.device("a")) == site.truth() == {"t1": {"n": 11}}

    def test_results_of_which_the_state_never_came(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was applied before the restore, and never downloaded, shows once only after it was offered again."""
        a, b = site.device("a"), site.device("b")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        b = site.device("b")
        for number in range(20):
            b.create("Task", {}, f"of b {number}")
        b.synchronize_all()
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 1})
        assert not cut_session(a, monkeypatch, after_messages=2)
        assert a.pending_count() == 0
        site.shut("a")

        site.restore()
        site.sync("a")

        assert contents(site.device("a")) == site.truth() == {"t1": {"n": 1}}

    def test_objects_that_are_not_downloaded(self, site: Site) -> None:
        """Whoever keeps an object that it never downloads does not take an older version for one it has seen."""
        site.application.on_conflict("Note", "reject_stale")
        options: dict[str, Any] = {"download": {"Note": "nothing_preserve"}}
        a = site.device("a", **options)
        a.create("Note", {"text": "1"}, "n1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        c = site.device("c")
        for number in range(20):
            c.create("Task", {}, f"t{number}")
        c.synchronize_all()
        a = site.device("a", **options)
        a.update("Note", "n1", {"text": "2"})
        a.synchronize_all()
        a.synchronize_selected([("Note", "n1")])
        site.shut("a")
        site.restore()
        a = site.device("a", **options)
        a.synchronize_all()
        b = site.device("b")
        b.synchronize_all()
        b.update("Note", "n1", {"text": "of b"})
        for number in range(30):
            b.create("Task", {}, f"of b {number}")
        b.synchronize_all()

        a.update("Note", "n1", {"text": "3"})
        report = a.synchronize_all()

        assert [one.reason for one in report.failures] == [FailureReason.CONFLICT]
        assert site.truth("Note") == {"n1": {"text": "of b"}}

    def test_what_waits_keeps_its_meaning(self, site: Site) -> None:
        """A pending operation whose base is newer than the backup is judged by what its author can have seen."""
        site.application.on_conflict("Task", "reject_stale")
        a, b = site.device("a"), site.device("b")
        a.create("Task", {"title": "1"}, "t1")
        a.synchronize_all()
        b.synchronize_all()
        site.shut("a")
        site.shut("b")
        site.back_up()
        a = site.device("a")
        for number in range(5):
            a.create("Task", {}, f"more {number}")
        a.update("Task", "t1", {"title": "2"})
        a.synchronize_all()
        a.update("Task", "t1", {"title": "3"})  # pending, on top of what the backup lacks
        site.shut("a")
        site.restore()
        b = site.device("b")
        b.update("Task", "t1", {"title": "of b"})
        b.synchronize_all()
        site.shut("b")

        report = site.sync("a")

        assert sorted(one.reason for one in report.failures) == [FailureReason.CONFLICT, FailureReason.SUPERSEDED]
        assert site.truth()["t1"] == {"title": "of b"}

    def test_a_copy_took_the_place_of_what_was_lost(self, site: Site) -> None:
        """That a copy settled something else at the same place does not hide what the server has lost."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.copy("a", "b")
        a = site.device("a")
        a.create("Task", {}, "t2")
        a.create("Task", {}, "t3")
        a.synchronize_selected([("Task", "t3")])  # leaves t2 behind
        site.shut("a")
        site.back_up()
        site.sync("a")
        site.shut("a")
        site.restore()
        b = site.device("b")
        b.create("Task", {}, "of b")
        assert b.synchronize_all().former_replica_id

        report = site.sync("a")

        assert report.reoffered == 1
        assert site.truth() == {"t1": {}, "t2": {}, "t3": {}, "of b": {}}

    def test_a_copy_took_the_place_of_a_lost_refusal(self, site: Site) -> None:
        """A refusal that the server has lost is offered again too, if a copy settled something in its place."""
        c = site.device("c")
        c.create("Task", {}, "t1")
        c.synchronize_all()
        site.device("a")
        site.shut("a")
        site.copy("a", "b")
        site.back_up()
        site.device("a").create("Task", {}, "t1")
        assert site.sync("a").rejected == 1
        site.shut("a")
        site.restore()
        site.device("b").create("Task", {}, "of b")
        site.sync("b")

        report = site.sync("a")

        assert report.former_replica_id
        assert report.server_restored
        assert report.reoffered == 1

    @pytest.mark.parametrize("order", ["bc", "cb"])
    @pytest.mark.parametrize("is_told", [True, False])
    def test_versions_of_two_lives(self, site: Site, order: str, is_told: bool) -> None:  # noqa: FBT001
        """Versions of two lives of a store do not compare: whoever comes second gets a failure."""
        b, c = site.device("b"), site.device("c")
        b.create("Task", {"title": "x"}, "t1")
        b.synchronize_all()
        if not is_told:
            c.synchronize_all()
        site.shut("b")
        site.shut("c")
        site.back_up()
        b = site.device("b")
        for number in range(20):
            b.create("Task", {}, f"t{number + 2}")
        b.update("Task", "t1", {"title": "of b"})
        b.synchronize_all()
        site.shut("b")
        if is_told:
            site.sync("c")
            site.shut("c")
        site.restore()
        site.sync("c")
        c = site.device("c")
        c.update("Task", "t1", {"title": "of c"})
        c.synchronize_all()
        site.shut("c")
        site.restore()

        reports = [site.sync(name) for name in order]

        assert [[one.reason for one in report.failures] for report in reports] == [[], [FailureReason.SUPERSEDED]]
        assert site.truth()["t1"] == {"title": f"of {order[0]}"}

    def test_a_download_goes_on_in_its_own_history_only(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was downloaded of a history that is gone does not mix with that of another one of the same length."""
        w = site.device("w")
        w.create("Task", {"p": 1}, "base")
        w.synchronize_all()
        site.shut("w")
        site.back_up()
        w = site.device("w")
        for number in range(200):
            w.create("Task", {"p": "x" * 20_000}, f"lost {number}")
        w.synchronize_all()
        site.shut("w")
        shutil.rmtree(site.folder / "w")
        assert not cut_session(site.device("r"), monkeypatch, after_messages=3)
        site.shut("r")
        site.restore()
        v = site.device("v")
        v.synchronize_all()
        for number in range(250):
            v.create("Task", {}, f"new {number}")
        v.synchronize_all()

        site.sync("r")

        assert contents(site.device("r")) == site.truth()

    def test_restored_twice(self, site: Site) -> None:
        """A device that missed two restores offers again what the last one lacks."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 1})
        a.synchronize_all()
        site.shut("a")
        site.restore()
        site.sync("a")
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 10})
        a.synchronize_all()
        site.shut("a")
        site.restore()
        report = site.sync("a")
        assert report.reoffered == 2
        assert contents(site.device("a")) == site.truth() == {"t1": {"n": 11}}

    def test_other_modes_adopt_it_first(self, site: Site) -> None:
        """A session that was asked for less first takes in the new timeline whole, then does what it was asked for."""
        a = site.device("a")
        a.create("Task", {"n": 0}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        a.update("Task", "t1", increment={"n": 1})
        a.synchronize_all()
        a.create("Task", {}, "t2")
        site.shut("a")
        site.restore()
        a = site.device("a")
        report = a.synchronize_selected([("Task", "t2")])
        assert (report.server_restored, report.reoffered, report.applied) == (True, 1, 1)
        assert contents(a) == site.truth() == {"t1": {"n": 1}, "t2": {}}

    def test_it_asks_before_much_goes(self, site: Site) -> None:
        """What others had made since the backup and nobody offers again goes only with consent if it is most."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        for number in range(30):
            a.create("Task", {}, f"of a {number}")
        a.synchronize_all()
        b = site.device("b")
        b.synchronize_all()
        b.create("Task", {}, "of b")
        site.shut("a")
        site.shut("b")
        site.restore()
        b = site.device("b")
        before = contents(b)

        with pytest.raises(MassRemoval) as caught:
            b.synchronize_all()

        assert (caught.value.removed, caught.value.present) == ({"Task": 30}, {"Task": 31})
        assert contents(b) == before
        with pytest.raises(MassRemoval):
            b.synchronize_unsynchronized()
        b.synchronize_all(accept_mass_removal=True)
        assert contents(b) == site.truth() == {"t1": {}, "of b": {}}
        site.sync("a")
        b.synchronize_all()
        assert len(contents(b)) == 32

    @pytest.mark.parametrize("wish", ["nothing_preserve", "never"])
    def test_it_asks_whatever_is_wished_meanwhile(self, site: Site, wish: str) -> None:
        """Not wanting an entity for one session is no way round the question, nor is a fork after that."""
        a = site.device("a")
        a.create("Task", {}, "t1")
        a.synchronize_all()
        site.shut("a")
        site.back_up()
        a = site.device("a")
        for number in range(30):
            a.create("Task", {}, f"of a {number}")
        a.synchronize_all()
        site.sync("b")
        site.shut("a")
        site.shut("b")
        site.restore()
        with pytest.raises(MassRemoval):
            site.sync("b")

        site.device("b", download={"Task": wish}).synchronize_all()

        b = site.device("b")
        for _ in range(2):
            with pytest.raises(MassRemoval) as caught:
                b.synchronize_all()
            assert (caught.value.removed, caught.value.present) == ({"Task": 30}, {"Task": 31})
            b._storage.fork()
        assert len(contents(b)) == 31
        b.synchronize_all(accept_mass_removal=True)
        assert contents(b) == site.truth() == {"t1": {}}
        for number in range(30):
            b.create("Task", {}, f"of b {number}")
        b.synchronize_all()
        c = site.device("c")
        c.synchronize_all()
        for number in range(30):
            c.delete("Task", f"of b {number}")
        c.synchronize_all()
        site.device("b", download={"Task": wish}).synchronize_all()
        assert site.sync("b").removed == 30  # it is not asked for ever


class TestForeignServers:
    """A server with another store changes nothing unless that is agreed to."""

    def test_an_empty_server(self, site: Site) -> None:
        """Nothing is exchanged with an empty server; with consent it gets everything that the log keeps."""
        a = site.device("a")
        for number in range(30):
            a.create("Task", {"n": number}, f"t{number}")
        a.synchronize_all()
        a.update("Task", "t1", increment={"n": 100})
        site.shut("a")
        before = site.truth()
        site.stop()
        site.start("empty")
        a = site.device("a")
        for synchronize in (a.synchronize_all, a.synchronize_unsynchronized):
            with pytest.raises(ForeignServer):
                synchronize()
        assert (a.pending_count(), len(contents(a))) == (1, 30)
        assert site.truth() == {}

        report = a.synchronize_all(accept_foreign_server=True)

        assert (report.reoffered, report.applied) == (30, 1)
        before["t1"] = {"n": 101}
        assert contents(a) == site.truth() == before
        assert not a.synchronize_all().server_restored

    def test_a_foreign_server_with_data(self, site: Site) -> None:
        """What a foreign server has already is not overwritten, and what is not offered goes only with consent."""
        a, b = site.device("a"), site.device("b")
        for number in range(30):
            a.create("Task", {}, f"of a {number}")
        a.synchronize_all()
        b.synchronize_all()
        b.update("Task", "of a 1", {"pending": True})
        b.create("Task", {}, "new")
        b.create("Task", {}, "there")
        site.shut("a")
        site.shut("b")
        site.stop()
        site.start("other")
        c = site.device("c")
        c.create("Task", {"of": "c"}, "there")
        c.synchronize_all()
        b = site.device("b")
        with pytest.raises(MassRemoval):
            b.synchronize_all(accept_foreign_server=True)
        assert len(contents(b)) > 30
        report = b.synchronize_all(accept_mass_removal=True)
        assert contents(b) == site.truth() == {"there": {"of": "c"}, "new": {}}
        assert b.pending_count() == 0
        assert {one.reason for one in b.failures()} == {FailureReason.OBJECT_GONE, FailureReason.ALREADY_EXISTS}
        assert not report.failures


def _task_schema(version: int) -> Schema:
    later = {"z": String()} if version > 1 else {}
    return Schema([Entity("Task", {"n": Integer(), **later})], version=version)


def _notes_about(store: LmdbStore, replica_id: str) -> list[bytes]:
    with store.read("default") as reader:
        return [value for _, value in reader.index_range(twins_prefix(UUID(replica_id).bytes), b"", 10)]


class Cut(Exception):
    """The program ended in the middle."""


def cut_session(replica: Replica, monkeypatch: pytest.MonkeyPatch, *, after_messages: int) -> bool:
    """Synchronize, and break off for good after so many messages from the server; tell whether that was too late."""
    left = after_messages

    def counted(stream: Stream) -> bytes | None:
        nonlocal left
        if not left:
            raise Cut
        left -= 1
        return receive(stream)

    receive = Stream.receive
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "receive", counted)
        try:
            replica.synchronize_all()
        except Cut:
            return False
    return True
