from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.builders import contents, quick_folder
from tests.sessions import ServerEnd, begin, page, plan, synchronize

from tidelog import (
    InvalidConstraint,
    InvalidValue,
    LimitExceeded,
    MassRemoval,
    ObjectNotFound,
    PermissionRefused,
    TidelogError,
    attribute,
)
from tidelog._constraints import Constraint
from tidelog._downloads import Download, DownloadMode
from tidelog._keys import pack_object_key, unpack_position
from tidelog.v1 import sync_pb2
from tidelog_client import Object, Replica, Report, SkipReason
from tidelog_client import _publication as publication
from tidelog_client import _replica as replica_module
from tidelog_client import _synchronization as synchronization
from tidelog_client import _view as view

KEPT = ["nothing_preserve", "never"]


ENTITIES = ["Task", "Keep", "Clear", "Note"]


class Broken(Exception):
    """Raised to break a session off."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for replicas."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def replica(folder: Path) -> Iterator[Replica]:
    """Give an empty replica."""
    with Replica(folder / "a") as opened:
        yield opened


@pytest.fixture
def server() -> ServerEnd:
    """Give a server that takes everything and sends nothing."""
    return ServerEnd()


def the(replica: Replica, id: str = "t1", entity: str = "Task") -> Object:  # noqa: A002 - the glossary's word
    """Return a handle on an object that is there."""
    found = replica.get(entity, id)
    assert found is not None
    return found


def fill(replica: Replica, server: ServerEnd, entity: str = "Task") -> None:
    """Let a replica download two objects of an entity."""
    server.reconcile, server.pages = True, [page((entity, "t1", 1, {"n": 1}), (entity, "t2", 2, {"n": 2}))]
    synchronize(replica, server)
    server.reconcile, server.pages = False, []


class TestWishes:
    """What a replica wants to have of each entity."""

    def test_go_with_every_session(self, folder: Path, server: ServerEnd) -> None:
        """Each session, of whatever mode, says how much of which entity is wanted."""
        where = attribute("n") > 1
        wishes: dict[str, Any] = {
            "A": "all",
            "B": where,
            "C": DownloadMode.NEVER,
            "D": Download(DownloadMode.NOTHING_CLEAR),
        }

        with Replica(folder / "a", download=wishes) as replica:
            for mode in ("all", "unsynchronized", "selected"):
                synchronize(replica, server, mode)

                told = {one.entity: Download.from_message(one) for one in server.start.downloads}
                assert told == {
                    "A": Download(),
                    "B": Download(DownloadMode.WHERE, where),
                    "C": Download(DownloadMode.NEVER),
                    "D": Download(DownloadMode.NOTHING_CLEAR),
                }

    @pytest.mark.parametrize(
        ("wishes", "error"),
        [
            ({"Task": "nothing"}, InvalidValue),
            ({"Task": 1}, InvalidValue),
            ({"Task": None}, InvalidValue),
            ({"": "all"}, InvalidValue),
            ({"Task": "where"}, InvalidConstraint),
        ],
    )
    def test_that_make_no_sense(self, folder: Path, wishes: Any, error: type[Exception]) -> None:
        """A wish that is none is refused when the replica is opened, before its directory is made."""
        with pytest.raises(error):
            Replica(folder / "a", download=wishes)

        assert not (folder / "a").exists()

    def test_that_are_too_large(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wishes that would not fit the first message are refused when the replica is opened."""
        monkeypatch.setattr(replica_module, "DOWNLOADS_BYTES_MAX", 100)

        with pytest.raises(LimitExceeded):
            Replica(folder / "a", download={"Task": attribute("title") == "x" * 100})


class TestOwner:
    """A replica belongs to the tenant and the user of its first session."""

    def test_is_remembered(self, replica: Replica, server: ServerEnd) -> None:
        """The first session binds the replica, and later ones say to whom."""
        server.tenant, server.user_id = "acme", "ann"
        synchronize(replica, server)
        assert (server.start.bound_tenant, server.start.bound_user_id) == ("", "")

        synchronize(replica, server)

        assert (server.start.bound_tenant, server.start.bound_user_id) == ("acme", "ann")

    def test_is_not_said_by_an_older_server(self, replica: Replica, server: ServerEnd) -> None:
        """A server that does not say whom it takes the caller for binds nobody, and unbinds nobody."""
        synchronize(replica, server)
        synchronize(replica, server)
        assert (server.start.bound_tenant, server.start.bound_user_id) == ("", "")
        server.tenant, server.user_id = "acme", "ann"
        synchronize(replica, server)
        server.tenant, server.user_id = "", ""
        synchronize(replica, server)

        synchronize(replica, server)

        assert (server.start.bound_tenant, server.start.bound_user_id) == ("acme", "ann")

    @pytest.mark.parametrize(("tenant", "user_id"), [("other", "ann"), ("acme", "bob")])
    def test_that_is_somebody_else(self, replica: Replica, server: ServerEnd, tenant: str, user_id: str) -> None:
        """If the server takes the caller for somebody else, nothing is sent and nothing changes."""
        server.tenant, server.user_id = "acme", "ann"
        fill(replica, server)
        replica.update("Task", "t1", {"n": 10})
        server.tenant, server.user_id = tenant, user_id
        server.plans = [plan("Task", "never")]

        with pytest.raises(PermissionRefused, match=r"'acme'|'ann'"):
            synchronize(replica, server)

        assert server.uploaded == []
        assert contents(replica) == {"t1": {"n": 10}, "t2": {"n": 2}}
        server.tenant, server.user_id, server.plans = "acme", "ann", []
        assert synchronize(replica, server).applied == 1


class TestStayingBehind:
    """Operations on entities that are never synchronized stay behind, unless they are selected."""

    @pytest.fixture(autouse=True)
    def never(self, server: ServerEnd) -> None:
        """Let the server take no operations on a log."""
        server.plans = [plan("Log", "never")]

    @pytest.mark.parametrize("mode", ["all", "unsynchronized"])
    def test_they_are_not_sent(self, replica: Replica, server: ServerEnd, mode: str) -> None:
        """What is on another entity is sent, the rest stays pending, and the report says how much of what."""
        for n in range(3):
            replica.create("Log", {"n": n}, f"l{n}")
            replica.create("Task", {"n": n}, f"t{n}")

        report = synchronize(replica, server, mode)

        assert [one.id for one in server.uploaded] == ["t0", "t1", "t2"]
        assert (report.applied, replica.pending_count()) == (3, 3)
        [skipped] = report.skipped
        assert (skipped.entity, skipped.id, skipped.reason, skipped.count) == ("Log", "", SkipReason.NEVER, 3)
        assert skipped.message.startswith("operations that wait to be selected: 3;")

    def test_the_session_says_that_it_leaves_something(self, replica: Replica, server: ServerEnd) -> None:
        """The session that sends later operations says that earlier ones stay behind, from the first one on."""
        replica.create("Task", {}, "t1")
        replica.create("Log", {}, "l1")
        synchronize(replica, server)
        assert not server.start.leaves_earlier_operations
        replica.create("Task", {}, "t2")

        synchronize(replica, server)

        assert server.start.leaves_earlier_operations
        assert [one.id for one in server.uploaded] == ["t2"]

    @pytest.mark.parametrize("ids", [["l1"], ["l1", "t1"]], ids=["nothing to send", "something to send"])
    def test_what_was_not_known_at_the_start(self, replica: Replica, server: ServerEnd, ids: list[str]) -> None:
        """A session that was begun on what the server said before is begun again, once, and sends nothing wrong."""
        for id_ in ids:
            replica.create("Log" if id_[0] == "l" else "Task", {}, id_)

        report = synchronize(replica, server)

        assert (report.attempts, server.session_count) == (2, 2)
        assert (server.start.uploading, server.start.leaves_earlier_operations) == (len(ids) > 1, len(ids) > 1)
        assert [one.id for one in server.uploaded] == ids[1:]
        assert synchronize(replica, server).attempts == 1
        assert [one.count for one in report.skipped] == [1]

    def test_they_go_when_the_server_takes_them(self, replica: Replica, server: ServerEnd) -> None:
        """What stayed behind is sent, in order, once the server takes it, although the session began without."""
        replica.create("Log", {"n": 1}, "l1")
        replica.update("Log", "l1", {"n": 2})
        synchronize(replica, server)
        server.plans = [plan("Log", "never", excluded=False)]

        report = synchronize(replica, server)

        assert [one.seq for one in server.uploaded] == [1, 2]
        assert (report.applied, report.skipped, replica.pending_count()) == (2, [], 0)
        assert contents(replica, "Log") == {"l1": {"n": 2}}

    def test_what_was_committed_together_stays_together(self, folder: Path, server: ServerEnd) -> None:
        """A commit group with one of them stays behind whole, and so do later operations on its objects."""
        with Replica(folder / "a") as replica:
            replica.create("Task", {}, "before")
            with replica.transaction(atomic=True) as tx:
                tx.create("Task", {}, "grouped")
                tx.create("Log", {}, "l1")
            with replica.transaction(atomic=True) as tx:
                tx.create("Note", {}, "n1")
                tx.update("Task", "grouped", {"n": 1})
            replica.update("Note", "n1", {"n": 1})
            replica.update("Task", "before", {"n": 1})

            report = synchronize(replica, server)

            assert [one.seq for one in server.uploaded] == [1, 7]
            assert server.start.leaves_earlier_operations
            assert {one.entity: one.count for one in report.skipped} == {"Task": 2, "Log": 1, "Note": 2}
            assert [one.operation.seq for one in replica.pending()] == [2, 3, 4, 5, 6]

    def test_selected_ones_are_sent(self, replica: Replica, server: ServerEnd) -> None:
        """A selection uploads and downloads what is otherwise never synchronized."""
        replica.create("Log", {"n": 1}, "l1")
        replica.create("Log", {"n": 2}, "l2")
        synchronize(replica, server)
        server.pages = [page(("Log", "l1", 101, {"n": 1}), ("Log", "far", 7, {}), outside=["l1", "far"])]

        report = synchronize(replica, server, "selected", [("Log", "l1"), ("Log", "far")])

        assert [one.id for one in server.uploaded] == ["l1"]
        assert (report.applied, report.skipped) == (1, [])
        server.pages = []
        synchronize(replica, server)
        assert contents(replica, "Log") == {"l1": {"n": 1}, "l2": {"n": 2}, "far": {}}

    def test_a_group_that_could_never_be_sent(self, folder: Path, server: ServerEnd) -> None:
        """What is known to be never synchronized cannot be committed in one group with anything else."""
        with Replica(folder / "a", download={"Wish": "never"}) as replica:
            synchronize(replica, server)

            for entity in ("Log", "Wish"):
                with pytest.raises(InvalidValue, match=f"over {entity}, Task|over Task, {entity}"):
                    self.commit(replica, entity, "Task")
            assert replica.pending_count() == 0
            self.commit(replica, "Log", "Wish")
            self.commit(replica, "Task", "Note")
            with replica.transaction() as tx:
                tx.create("Log", {})
                tx.create("Task", {})
            assert replica.pending_count() == 6

    def commit(self, replica: Replica, *entities: str) -> None:
        """Commit a group that creates an object of each entity."""
        with replica.transaction(atomic=True) as tx:
            for entity in entities:
                tx.create(entity, {})


class TestNothingClear:
    """An entity that is uploaded only leaves the replica once nothing is pending on it."""

    @pytest.fixture(autouse=True)
    def clear(self, server: ServerEnd) -> None:
        """Let the server take readings and send none."""
        server.plans = [plan("Reading", "nothing_clear")]

    def test_what_was_uploaded_goes(self, replica: Replica, server: ServerEnd) -> None:
        """Objects go with the session that settled their last operation; live handles become empty."""
        replica.create("Reading", {"n": 1}, "r1")
        replica.create("Task", {}, "t1")
        handle = the(replica, "r1", "Reading")
        server.pages = [page(confirmations=[("Task", "t1", 102)])]

        report = synchronize(replica, server)

        assert (contents(replica, "Reading"), contents(replica)) == ({}, {"t1": {}})
        assert not handle.exists
        assert (report.applied, report.removed) == (2, 1)
        assert replica.trim_log() == 0
        with replica._storage.environment.read() as transaction:
            assert replica._storage.view.all_clean(transaction)

    def test_what_was_there_before_goes(self, replica: Replica, server: ServerEnd) -> None:
        """Objects that were downloaded before the entity was uploaded only go, other entities stay."""
        plans, server.plans = server.plans, []
        fill(replica, server, "Reading")
        replica.create("Task", {}, "t1")
        replica.delete("Reading", "t2")
        server.plans, server.refuses = plans, [1]

        report = synchronize(replica, server)

        assert contents(replica, "Reading") == {}
        assert report.removed == 1
        replica.create("Reading", {}, "t2")

    def test_what_is_pending_stays(self, replica: Replica, server: ServerEnd) -> None:
        """What was committed while the session went on stays as it is shown, whole, until it is settled too."""
        replica.create("Reading", {"n": 1}, "r1")

        def commits() -> None:
            if replica.pending_count() == 0:
                replica.update("Reading", "r1", {"m": 2})

        synchronize(replica, server, on_answer=commits)

        assert contents(replica, "Reading") == {"r1": {"n": 1, "m": 2}}
        assert replica.pending_count() == 1
        synchronize(replica, server)
        assert contents(replica, "Reading") == {}

    def test_what_is_refused_goes_and_is_kept_as_a_failure(self, replica: Replica, server: ServerEnd) -> None:
        """An object whose creation was refused is gone; the failure has the payload."""
        replica.create("Reading", {"n": 1}, "r1")
        server.refuses = [1]

        report = synchronize(replica, server)

        assert contents(replica, "Reading") == {}
        assert [failure.attributes for failure in report.failures] == [{"n": 1}]

    @pytest.mark.parametrize("mode", ["unsynchronized", "selected"])
    def test_other_modes_clear_nothing(self, replica: Replica, server: ServerEnd, mode: str) -> None:
        """Only a session of mode all clears; it does so even if it brings nothing and the cursor stays."""
        synchronize(replica, server)
        version = server.version
        replica.create("Reading", {"n": 1}, "r1")
        server.pages = [page(("Reading", "r1", 101, {"n": 1}), outside=["r1"])]
        synchronize(replica, server, mode, [("Reading", "r1")])
        assert contents(replica, "Reading") == {"r1": {"n": 1}}

        server.pages, server.version = [], version
        synchronize(replica, server)

        assert contents(replica, "Reading") == {}

    def test_what_was_fetched_from_before_the_cursor(self, replica: Replica, server: ServerEnd) -> None:
        """What a selection fetched goes with the next session of mode all, although that brings nothing new."""
        synchronize(replica, server)
        server.pages = [page(("Reading", "far", 1, {}))]
        synchronize(replica, server, "selected", [("Reading", "far")])
        server.pages = []

        synchronize(replica, server)

        assert contents(replica, "Reading") == {}


class TestKept:
    """Of an entity that is not downloaded but kept, the replica shows what it showed."""

    @pytest.mark.parametrize("mode", KEPT)
    @pytest.mark.parametrize("reconcile", [True, False])
    def test_objects_stay(self, replica: Replica, server: ServerEnd, mode: str, *, reconcile: bool) -> None:
        """Objects stay, whatever the download lacks, and whether it is a reconciliation."""
        fill(replica, server)
        fill_other = page(("Note", "n1", 3, {}))
        server.plans, server.reconcile, server.pages = [plan("Task", mode)], reconcile, [fill_other]

        synchronize(replica, server)

        assert contents(replica) == {"t1": {"n": 1}, "t2": {"n": 2}}
        assert contents(replica, "Note") == {"n1": {}}

    def test_what_was_applied_is_kept(self, replica: Replica, server: ServerEnd) -> None:
        """What was uploaded is shown on, though no snapshot of it ever comes, and the log may let go of it."""
        fill(replica, server)
        replica.update("Task", "t1", {"m": 1})
        replica.update("Task", "t1", increment={"m": 1})
        replica.create("Task", {"n": 3}, "t3")
        replica.delete("Task", "t2")
        server.plans = [plan("Task", "nothing_preserve")]

        report = synchronize(replica, server)

        assert contents(replica) == {"t1": {"n": 1, "m": 2}, "t3": {"n": 3}}
        assert (report.applied, report.removed) == (4, 0)
        with replica._storage.environment.read() as transaction:
            assert replica._storage.view.all_clean(transaction)

    def test_what_is_pending_on_top_of_it(self, replica: Replica, server: ServerEnd) -> None:
        """What is committed meanwhile stays on top, and is taken back alone if it is refused."""
        replica.create("Task", {"n": 1}, "t1")
        server.plans = [plan("Task", "nothing_preserve")]

        def commits() -> None:
            if replica.pending_count() == 0:
                replica.update("Task", "t1", {"n": 2})

        synchronize(replica, server, on_answer=commits)
        assert contents(replica) == {"t1": {"n": 2}}
        server.refuses = [2]

        synchronize(replica, server)

        assert contents(replica) == {"t1": {"n": 1}}

    def test_what_others_did_was_not_seen(self, replica: Replica, server: ServerEnd) -> None:
        """An edit says it was made on what the replica had seen of the object, not on what others made of it since."""
        fill(replica, server)
        replica.update("Task", "t1", {"m": 1})
        replica.create("Task", {}, "t3")
        server.plans = [plan("Task", "nothing_preserve")]
        synchronize(replica, server)

        replica.update("Task", "t1", {"m": 2})
        replica.update("Task", "t3", {"m": 2})

        assert [one.operation.base_version for one in replica.pending()] == [1, 102]

    @pytest.mark.parametrize("refused", [True, False])
    def test_a_confirmation_later(self, replica: Replica, server: ServerEnd, *, refused: bool) -> None:
        """What was kept may be confirmed later, whatever was refused meanwhile: the replica made it all."""
        fill(replica, server)
        replica.update("Task", "t1", {"m": 1})
        server.plans = [plan("Task", "nothing_preserve")]
        synchronize(replica, server)
        if refused:
            replica.update("Task", "t1", {"m": 2})
            server.refuses = [2]
        server.plans, server.pages = [], [page(confirmations=[("Task", "t1", 101)])]

        report = synchronize(replica, server)

        assert (report.attempts, contents(replica)["t1"]) == (1, {"n": 1, "m": 1})
        replica.update("Task", "t1", {"m": 2})
        assert [one.operation.base_version for one in replica.pending()] == [101]

    def test_downloading_it_again(self, replica: Replica, server: ServerEnd) -> None:
        """Once the entity is downloaded again, it is reconciled: what the server does not send is gone."""
        fill(replica, server)
        replica.create("Task", {}, "t3")
        server.plans = [plan("Task", "nothing_preserve")]
        synchronize(replica, server)
        server.plans = [plan("Task", reconcile=True)]
        server.pages = [page(("Task", "t2", 2, {"n": 2}))]

        report = synchronize(replica, server)

        assert contents(replica) == {"t2": {"n": 2}}
        assert report.removed == 2


class TestReconcilingOneEntity:
    """A changed mode, constraint or access concerns one entity, and so does the reconciliation."""

    def test_only_what_is_missing_of_it_goes(self, replica: Replica, server: ServerEnd) -> None:
        """What the download lacks of the entity is removed; other entities are on delta."""
        fill(replica, server)
        server.pages = [page(("Note", "t1", 3, {}), ("Taskforce", "t1", 4, {}))]
        synchronize(replica, server)
        server.plans = [plan("Task", "where", reconcile=True)]
        server.pages = [page(("Task", "t2", 2, {"n": 2})), page(("Note", "n2", 5, {}))]

        report = synchronize(replica, server)

        assert contents(replica) == {"t2": {"n": 2}}
        assert sorted(contents(replica, "Note")) == ["n2", "t1"]
        assert sorted(contents(replica, "Taskforce")) == ["t1"]
        assert report.removed == 1

    def test_its_versions_need_not_rise(self, replica: Replica, server: ServerEnd) -> None:
        """What the reconciliation brings stands, whatever its version; elsewhere an older state is passed over."""
        server.pages = [page(("Task", "t1", 50, {"n": "new"}), ("Note", "n1", 50, {"n": "new"}))]
        synchronize(replica, server)
        server.plans = [plan("Task", reconcile=True)]
        server.pages = [page(("Task", "t1", 4, {"n": "old"}), ("Note", "n1", 4, {"n": "old"}))]

        synchronize(replica, server)

        assert (contents(replica), contents(replica, "Note")) == ({"t1": {"n": "old"}}, {"n1": {"n": "new"}})

    def test_access_comes_and_goes(self, replica: Replica, server: ServerEnd) -> None:
        """Objects that may no longer be seen are removed, edits become failures; regained, they are back."""
        fill(replica, server)
        handle = the(replica)
        unsaved = the(replica)
        unsaved["title"] = "unsaved"
        replica.update("Task", "t1", {"title": "edited"})
        server.refuses = [1]
        server.plans, server.pages = [plan("Task", reconcile=True)], []

        report = synchronize(replica, server)

        assert contents(replica) == {}
        assert [(one.object_id, one.attributes) for one in report.failures] == [("t1", {"title": "edited"})]
        assert [one.attributes for one in replica.failures()] == [{"title": "edited"}]
        assert not handle.exists
        with pytest.raises(ObjectNotFound):
            handle.to_dict()
        with pytest.raises(ObjectNotFound) as caught:
            unsaved.commit()
        assert caught.value.unsaved == {"title": "unsaved"}
        server.pages = [page(("Task", "t1", 1, {"n": 1}), ("Task", "t2", 2, {"n": 2}))]
        synchronize(replica, server)
        assert handle.to_dict() == {"n": 1}
        assert sorted(contents(replica)) == ["t1", "t2"]

    def test_a_removal_under_an_edit_that_is_still_pending(self, replica: Replica, server: ServerEnd) -> None:
        """The object is gone at once; an edit that was committed meanwhile becomes a failure with the next session."""
        fill(replica, server)
        server.pages = [page(removals=[("Task", "t1", 100)])]

        def commits() -> None:
            if replica.pending_count() == 0:
                replica.update("Task", "t1", {"title": "edited"})

        synchronize(replica, server, on_answer=commits)
        assert sorted(contents(replica)) == ["t2"]
        server.pages, server.refuses = [], [1]

        report = synchronize(replica, server)

        assert [one.attributes for one in report.failures] == [{"title": "edited"}]
        assert sorted(contents(replica)) == ["t2"]


class TestOutsideTheProjection:
    """What a selection fetched from outside of what is downloaded stays until the next session of mode all."""

    def test_it_is_dropped(self, replica: Replica, server: ServerEnd) -> None:
        """It goes even if nothing has changed on the server meanwhile; what is in the projection stays."""
        fill(replica, server)
        server.pages = [page(("Task", "far", 3, {}), ("Task", "t1", 1, {"n": 1}), outside=["far"])]
        synchronize(replica, server, "selected", [("Task", "far"), ("Task", "t1")])
        assert sorted(contents(replica)) == ["far", "t1", "t2"]

        server.pages = []
        report = synchronize(replica, server)

        assert (sorted(contents(replica)), report.removed) == (["t1", "t2"], 1)

    def test_it_stays_if_the_download_brings_it(self, replica: Replica, server: ServerEnd) -> None:
        """What has moved into the projection since is brought, and stays."""
        fill(replica, server)
        server.pages = [page(("Task", "far", 3, {}), outside=["far"])]
        synchronize(replica, server, "selected", [("Task", "far")])
        server.pages = [page(("Task", "far", 104, {"n": 4}))]

        synchronize(replica, server)

        assert contents(replica)["far"] == {"n": 4}

    @pytest.mark.parametrize("mode", KEPT)
    def test_it_stays_if_its_entity_is_kept(self, replica: Replica, server: ServerEnd, mode: str) -> None:
        """Of an entity that is kept, what was fetched is kept too, edits on top of it included."""
        server.plans = [plan("Task", mode)]
        synchronize(replica, server)
        server.pages = [page(("Task", "far", 3, {"n": 1}), outside=["far"])]
        synchronize(replica, server, "selected", [("Task", "far")])
        replica.update("Task", "far", {"n": 2})

        server.pages = []
        synchronize(replica, server)
        synchronize(replica, server)

        assert contents(replica) == {"far": {"n": 2}}


def _shown(replica: Replica) -> Any:
    """Read what a replica shows of an entity in every way that there is."""
    keys = ("x0", "x1", "x2", "x3", "x4", "far")
    with replica.transaction() as transaction:
        seen = [transaction.get("Task", id_) for id_ in keys]
    handles = [replica.get("Task", id_) for id_ in keys]
    assert [None if one is None else one.to_dict() for one in handles] == seen
    ordered = {one.id: one.to_dict() for one in replica.query("Task", order_by="n")}
    assert ordered == contents(replica) == {id_: one for id_, one in zip(keys, seen, strict=True) if one is not None}
    assert replica.count("Task") == len(ordered)
    assert replica.count("Task", {"n": 10}) == sum(one["n"] == 10 for one in ordered.values())
    return ordered


def _after_step(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, step: int, work: Callable[[], None]
) -> Iterator[int]:
    """Let somebody work after a step of a publication; return what is used up by then."""
    steps = iter(range(step))
    environment = replica._storage.environment
    write, finish = environment.write, replica._storage.publication.finish

    def watched(written: Any) -> Any:
        result = write(written)
        if next(steps, None) == step - 1:
            work()
        return result

    def finished() -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(environment, "write", watched)
            return finish()

    monkeypatch.setattr(replica._storage.publication, "finish", finished)
    return steps


def _work(replica: Replica) -> None:
    """Change whatever there is, and see that it shows."""
    replica.update("Task", "x0", {"mine": 1})
    replica.update("Task", "x1", {"mine": 1})
    replica.delete("Task", "x1")
    replica.update("Task", "x2", {"mine": 1})
    replica.create("Task", {"mine": 3}, "x3")
    replica.create("Task", {"mine": 4}, "x4")
    replica.delete("Task", "x5")
    replica.create("Task", {"mine": 5}, "x5")
    assert contents(replica) == {
        "x0": {"n": 0, "mine": 1},
        "x2": {"n": 2, "mine": 1},
        "x3": {"mine": 3},
        "x4": {"mine": 4},
        "x5": {"mine": 5},
    }


class TestSteps:
    """A publication in steps ends as one in a single transaction does."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stage each page and publish one at a step, and end with one object a step."""
        monkeypatch.setattr(synchronization, "STAGE_BYTES", 1)
        monkeypatch.setattr(publication, "PUBLISH_STEP_PAGES", 1)
        monkeypatch.setattr(publication, "END_STEP_OBJECTS", 1)

    @pytest.mark.parametrize("at_once", [True, False])
    @pytest.mark.parametrize("writes", range(14))
    def test_a_crash_between_two_steps(
        self, folder: Path, server: ServerEnd, monkeypatch: pytest.MonkeyPatch, writes: int, *, at_once: bool
    ) -> None:
        """However far a publication came, the next synchronization ends it as it would have ended."""
        monkeypatch.setattr(publication, "PUBLISH_OBJECTS_MAX", 1_000 if at_once else 0)
        replica = Replica(folder / "a")
        server.reconcile = True
        server.pages = [page(*((entity, f"x{n}", 1 + n, {"n": n}) for n in range(3))) for entity in ENTITIES]
        synchronize(replica, server)
        for entity in ENTITIES:
            replica.update(entity, "x0", {"n": 10})
            replica.create(entity, {}, "new")
            replica.delete(entity, "x1")
        synchronize(replica, server, "unsynchronized")
        replica.update("Clear", "x2", {"n": 20})
        server.reconcile, server.refuses = False, [10]
        server.plans = [plan("Task", reconcile=True), plan("Keep", "nothing_preserve"), plan("Clear", "nothing_clear")]
        server.pages = [page(("Task", "x0", 101, {"n": 10})), page(("Task", "x3", 110, {"n": 3})), page()]
        write = replica._storage.environment.write
        fuse = iter(range(writes))

        def burns(work: Any) -> Any:
            if server.uploaded and replica.pending_count() == 0 and next(fuse, None) is None:
                raise Broken
            return write(work)

        monkeypatch.setattr(replica._storage.environment, "write", burns)
        with suppress(Broken):
            synchronize(replica, server)
        replica.close()

        with Replica(folder / "a") as again:
            again._storage.publication.finish()
            if again._storage.meta("cursor") == server.cursor():
                server.plans, server.pages = [plan(one.entity, "never") for one in server.plans], []
            synchronize(again, server)

            assert contents(again) == {"x0": {"n": 10}, "x3": {"n": 3}}
            assert contents(again, "Keep") == {"x0": {"n": 10}, "x2": {"n": 2}, "new": {}}
            assert contents(again, "Clear") == {}
            assert contents(again, "Note") == {"x0": {"n": 0}, "x1": {"n": 1}, "x2": {"n": 2}}

    @pytest.mark.parametrize("at_once", [True, False])
    @pytest.mark.parametrize("reconcile", [True, False])
    def test_nothing_shows_before_all_does(
        self, replica: Replica, server: ServerEnd, monkeypatch: pytest.MonkeyPatch, *, reconcile: bool, at_once: bool
    ) -> None:
        """Between two steps everything is what it was, the user's own edits included, however it is read."""
        monkeypatch.setattr(publication, "PUBLISH_OBJECTS_MAX", 1_000 if at_once else 0)
        server.reconcile, server.pages = True, [page(*(("Task", f"x{n}", 1 + n, {"n": n}) for n in range(4)))]
        synchronize(replica, server)
        server.reconcile, server.pages = False, [page(("Task", "far", 5, {"n": 5}), outside=["far"])]
        synchronize(replica, server, "selected", [("Task", "far")])
        for id_ in contents(replica):
            replica.update("Task", id_, {"n": 10})
        server.pages = []
        synchronize(replica, server, "unsynchronized")
        replica.update("Task", "x3", {"m": 20})
        before, shown = _shown(replica), []
        write = replica._storage.environment.write

        def watched(work: Any) -> Any:
            result = write(work)
            shown.append(_shown(replica))
            return result

        monkeypatch.setattr(replica._storage.environment, "write", watched)
        gone = [] if reconcile else [("Task", "x1", 190), ("Task", "x2", 191), ("Task", "x3", 192)]
        server.reconcile = reconcile
        server.pages = [page(("Task", "x0", 200, {"n": 30}), removals=gone), page(("Task", "x4", 201, {"n": 4}))]

        synchronize(replica, server)

        after = _shown(replica)
        assert contents(replica) == {"x0": {"n": 30}, "x4": {"n": 4}}
        # What is still read from the stream, and noted, comes before the steps; the last of these shows all.
        assert len(shown) > 5
        first = shown.index(after)
        assert shown == [before] * first + [after] * (len(shown) - first)
        assert len(shown) - first <= 2

    @pytest.mark.parametrize("writes", range(12))
    def test_all_that_came_stays(
        self, folder: Path, server: ServerEnd, monkeypatch: pytest.MonkeyPatch, writes: int
    ) -> None:
        """Wherever a program ends: what it had downloaded is either published, or can be gone on with."""
        monkeypatch.setattr(publication, "PUBLISH_OBJECTS_MAX", 0)
        server.reconcile = True
        server.pages = [page(("Task", f"x{n}", 1 + n, {"n": n}), token=b"after %d" % n) for n in range(4)]
        with Replica(folder / "a") as replica:
            write, fuse = replica._storage.environment.write, iter(range(writes))

            def burns(work: Any) -> Any:
                if next(fuse, None) is None:
                    raise Broken
                return write(work)

            with monkeypatch.context() as patch, suppress(Broken):
                patch.setattr(replica._storage.environment, "write", burns)
                synchronize(replica, server)
            token = replica._storage.meta("resume_token")
            count = unpack_position(replica._storage.meta("staged_count"))
            is_begun = replica._storage.publication.is_under_way() or bool(replica._storage.meta("cursor"))

        assert is_begun or token == (b"after %d" % (count - 1) if count else b"")
        with Replica(folder / "a") as again:
            assert contents(again) == ({f"x{n}": {"n": n} for n in range(4)} if is_begun else {})

    @pytest.mark.parametrize("step", range(1, 4))
    def test_what_is_committed_meanwhile_shows_at_once(
        self, replica: Replica, server: ServerEnd, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        """Whatever step the user works after: he sees his edits on what he saw, and later on what came."""
        monkeypatch.setattr(publication, "PUBLISH_OBJECTS_MAX", 0)
        server.reconcile, server.pages = True, [page(*(("Task", f"x{n}", 1 + n, {"n": n}) for n in (0, 1, 2, 3, 5)))]
        synchronize(replica, server)
        replica.delete("Task", "x3")
        replica.delete("Task", "x5")
        replica.create("Task", {"again": True}, "x5")
        steps = _after_step(replica, monkeypatch, step, lambda: _work(replica))
        server.reconcile = False
        server.pages = [
            page(("Task", "x0", 200, {"n": 10, "new": True})),
            page(("Task", "x4", 201, {"n": 14}), removals=[("Task", "x2", 202)]),
            page(("Task", "x1", 203, {"n": 11}), ("Task", "x3", 204, {"n": 13}), ("Task", "x5", 205, {"n": 15})),
        ]

        synchronize(replica, server)

        assert next(steps, None) is None
        assert contents(replica) == {
            "x0": {"n": 10, "new": True, "mine": 1},
            "x3": {"mine": 3},
            "x4": {"mine": 4},
            "x5": {"mine": 5},
        }
        named = {one.operation.id: one.operation.base_version for one in replica.pending()}
        assert named == {"x0": 1, "x1": 2, "x2": 3, "x3": 4, "x4": 0, "x5": 6}
        assert list(replica.verify()) == []

    @pytest.mark.parametrize("order_by", [None, "n"])
    def test_a_count_is_of_one_moment(
        self, replica: Replica, server: ServerEnd, monkeypatch: pytest.MonkeyPatch, order_by: str | None
    ) -> None:
        """What is counted, or put in order, while a download comes is all as before, however many pages it takes."""
        server.reconcile, server.pages = True, [page(*(("Task", f"x{n}", 1 + n, {"n": 1}) for n in range(6)))]
        synchronize(replica, server)
        server.reconcile, server.pages = False, [page(*(("Task", f"x{n}", 200, {"n": 2}) for n in range(6)))]
        monkeypatch.setattr(view, "PAGE_OBJECTS", 2)
        matches, looked_at = Constraint.matches, count(1)

        def matched(constraint: Constraint, attributes: Any) -> bool:
            if next(looked_at) == 3:
                with ThreadPoolExecutor(1) as elsewhere:
                    elsewhere.submit(synchronize, replica, server).result(10)
            return matches(constraint, attributes)

        monkeypatch.setattr(Constraint, "matches", matched)

        if order_by is None:
            assert replica.count("Task", {"n": 1}) == 6
        else:
            assert [one.id for one in replica.query("Task", {"n": 1}, order_by=order_by)] == [
                f"x{n}" for n in range(6)
            ]
        assert replica.count("Task", {"n": 1}) == 0

    def test_a_count_that_fails_holds_nothing(self, replica: Replica, server: ServerEnd) -> None:
        """Though its error is kept, a count, or a query in order, keeps no transaction."""
        fill(replica, server)
        objects = replica._storage.environment.database("objects")
        replica._storage.environment.write(
            lambda transaction: transaction.put(pack_object_key("Task", "t1"), bytes(9) + b"\xc1", db=objects)
        )

        with pytest.raises(TidelogError) as counted:
            replica.count("Task", {"n": 1})
        with pytest.raises(TidelogError) as ordered:
            list(replica.query("Task", order_by="n"))

        assert replica._storage.environment._gate.inside == set()
        assert counted.value is not ordered.value

    @pytest.mark.parametrize("writes", range(9))
    def test_a_merge_in_steps_shows_whole(
        self, folder: Path, server: ServerEnd, monkeypatch: pytest.MonkeyPatch, writes: int
    ) -> None:
        """What a selection brings in steps shows at once, wherever a crash comes; opening does the rest."""
        monkeypatch.setattr(publication, "MERGE_STEP_PAGES", 1)
        ids = [f"x{n}" for n in range(4)]
        before, after = {id_: {"n": 0} for id_ in ids}, {id_: {"n": 1, "mine": True} for id_ in ids}
        fuse = iter(range(writes))
        shown = []
        with Replica(folder / "a") as replica:
            server.reconcile, server.pages = True, [page(*(("Task", id_, 1, {"n": 0}) for id_ in ids))]
            synchronize(replica, server)
            server.reconcile, server.pages = False, [page(("Task", id_, 200, {"n": 1})) for id_ in ids]
            merge, write = replica._storage.publication.merge, replica._storage.environment.write

            def burns(work: Any) -> Any:
                if next(fuse, None) is None:
                    raise Broken
                result = write(work)
                shown.append(contents(replica))
                return result

            def merged(*arguments: Any) -> Any:
                with monkeypatch.context() as patch:
                    patch.setattr(replica._storage.environment, "write", burns)
                    return merge(*arguments)

            monkeypatch.setattr(replica._storage.publication, "merge", merged)
            with suppress(Broken):
                synchronize(replica, server, "selected", [("Task", id_) for id_ in ids])
            assert all(one == before for one in shown[:-1])
            is_begun = len(shown) >= 1  # how it ends is on disk
            for id_ in ids:
                replica.update("Task", id_, {"mine": True})
            seen = contents(replica)

        with Replica(folder / "a") as again:
            assert contents(again) == (after if is_begun else {id_: {"n": 0, "mine": True} for id_ in ids})
            assert seen in ({id_: {"n": 0, "mine": True} for id_ in ids}, after)
            assert list(again.verify()) == []
            assert not again._storage.publication.is_under_way()

    def test_a_state_that_is_lost_between_two_steps(
        self, replica: Replica, server: ServerEnd, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a step finds that something is missing, all is asked for, and shows with what the user did."""
        monkeypatch.setattr(publication, "PUBLISH_OBJECTS_MAX", 0)
        fill(replica, server)
        server.pages = [page(("Task", "t1", 200, {"n": 3})), page(confirmations=[("Task", "t3", 201)])]
        start_over = replica._storage.publication.start_over

        def started_over() -> None:
            assert contents(replica) == {"t1": {"n": 1}, "t2": {"n": 2}}
            replica.update("Task", "t1", {"m": 1})
            start_over()
            assert contents(replica) == {"t1": {"n": 1, "m": 1}, "t2": {"n": 2}}
            assert list(replica.verify()) == []
            server.reconcile, server.pages = True, [page(("Task", "t1", 200, {"n": 3, "m": 1}))]

        monkeypatch.setattr(replica._storage.publication, "start_over", started_over)

        synchronize(replica, server)

        assert server.reconcile
        assert contents(replica) == {"t1": {"n": 3, "m": 1}}
        assert list(replica.verify()) == []

    def test_staged_pages_of_another_download(self, replica: Replica, server: ServerEnd) -> None:
        """What was staged is thrown away when the server does not go on with it."""
        server.pages = [page(("Task", f"t{n}", n, {}), token=b"%d" % n) for n in (1, 2)]

        def cuts() -> None:
            if replica._storage.meta("resume_token") == b"1":
                raise Broken

        with pytest.raises(Broken):
            synchronize(replica, server, on_answer=cuts)
        server.plans, server.pages = [plan("Task", "where", reconcile=True)], [page(("Task", "t2", 2, {}))]

        synchronize(replica, server)

        assert server.start.resume_token == b"1"
        assert sorted(contents(replica)) == ["t2"]


class TestMassRemoval:
    """Most of an entity does not go without a stated cause."""

    @pytest.mark.parametrize("at_once", [1, 7, 1_000])
    def test_an_object_that_comes_twice_counts_once(
        self, replica: Replica, server: ServerEnd, monkeypatch: pytest.MonkeyPatch, at_once: int
    ) -> None:
        """Objects that change while they are downloaded do not make up for others that are gone."""
        monkeypatch.setattr(publication, "GUARD_OBJECTS_AT_ONCE", at_once)
        server.reconcile = True
        server.pages = [page(*(("Task", f"t{number}", 1 + number, {}) for number in range(40)))]
        synchronize(replica, server)
        server.pages = [
            page(*(("Task", f"t{number}", 50 + 10 * again + number, {}) for number in range(10))) for again in range(4)
        ]

        with pytest.raises(MassRemoval) as caught:
            synchronize(replica, server)

        assert (caught.value.removed, caught.value.present) == ({"Task": 30}, {"Task": 40})
        assert len(contents(replica)) == 40

    @pytest.mark.parametrize(("bits_per_object", "passes"), [(64, [1]), (0, [1, 2])])
    def test_what_is_brought_is_looked_at_once(
        self,
        replica: Replica,
        server: ServerEnd,
        monkeypatch: pytest.MonkeyPatch,
        bits_per_object: int,
        passes: list[int],
    ) -> None:
        """A download is looked at once, however large; again only if objects may have passed for others."""
        monkeypatch.setattr(publication, "GUARD_BITS_PER_OBJECT", bits_per_object)
        server.reconcile = True
        server.pages = [page(*(("Task", f"t{number}", 1 + number, {}) for number in range(40)))]
        synchronize(replica, server)
        seen: list[int] = []
        kept = publication.Publication._kept

        def counted(*arguments: Any) -> Any:
            seen.append(len(seen) + 1)
            return kept(*arguments)

        monkeypatch.setattr(publication.Publication, "_kept", counted)
        server.pages = [page(*(("Task", f"t{number}", 100 + number, {}) for number in range(19, 40)))]
        synchronize(replica, server)

        assert (seen, len(contents(replica))) == (passes, 21)


class TestNewerServers:
    """What a newer server says is not a reason to stop."""

    @pytest.mark.parametrize("mode", [0, 99])
    def test_a_mode_that_is_not_known(self, replica: Replica, server: ServerEnd, mode: int) -> None:
        """An entity in a mode that is not known here is treated as one that is downloaded."""
        fill(replica, server)
        server.plans = [sync_pb2.EntityPlan(entity="Task", mode=mode, reconcile=True)]  # type: ignore[arg-type]
        server.pages = [page(("Task", "t2", 2, {"n": 2}))]

        synchronize(replica, server)
        replica.update("Task", "t2", {"n": 3})
        report = synchronize(replica, server)

        assert report.applied == 1
        assert sorted(contents(replica)) == ["t2"]

    def test_entities_that_are_none(self, replica: Replica, server: ServerEnd) -> None:
        """Plans for entities that cannot be, or are named twice, harm nothing."""
        fill(replica, server)
        server.plans = [plan("", "nothing_clear"), plan("Task\0t1", "nothing_clear"), *[plan("Task", "never")] * 2]

        synchronize(replica, server)

        assert sorted(contents(replica)) == ["t1", "t2"]


class TestInterruptions:
    def test_what_a_crash_costs_at_most(self, replica: Replica, server: ServerEnd) -> None:
        """However a program ends, what came of a download is on disk but for the last mebibyte."""
        page_bytes = 200_000
        text = "x" * page_bytes
        server.pages = [page(("Task", f"t{n}", n, {"text": text}), token=b"%d" % n) for n in range(1, 31)]
        came: list[int] = []

        def crashes() -> None:
            came.append(len(came))
            if len(came) == 25:
                raise Broken

        with pytest.raises(Broken):
            synchronize(replica, server, on_answer=crashes)

        page_count = came[-1] - 2  # but `started` and `upload_settled`
        token = int(replica._storage.meta("resume_token"))
        assert 0 <= (page_count - token) * page_bytes < 1024 * 1024

    def test_what_a_cut_costs(self, replica: Replica, server: ServerEnd) -> None:
        """What came before a connection broke is kept, however little it is."""
        server.pages = [page(("Task", f"t{n}", n, {}), token=b"%d" % n) for n in (1, 2, 3)]
        attempt = begin(replica, Report(), "all")
        requests = [request for request in attempt.begin() if request is not None]
        answers = [one for data in requests for one in server.answer(sync_pb2.SynchronizeRequest.FromString(data))]
        for answer in answers[:4]:  # started, upload_settled, two pages
            attempt.receive(answer.SerializeToString())

        attempt.keep()

        assert replica._storage.meta("resume_token") == b"2"
        synchronize(replica, server)
        assert server.start.resume_token == b"2"
