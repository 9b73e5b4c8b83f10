"""What operations may refer to which contents of files, as the engine judges it."""

from __future__ import annotations

import io
import random
import tracemalloc
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from unittest import mock
from uuid import UUID

import pytest
from tests.builders import (
    REPLICA_A,
    REPLICA_B,
    TENANT,
    TIME_US,
    USER,
    Cabinet,
    Lab,
    Session,
    create,
    delete,
    file_value,
    group,
    make_operation,
    references_schema,
    said,
    update,
)

from tidelog import FailureReason, InvalidValue, ObjectNotFound, StorageError, attribute, claim
from tidelog._file_reference import file_references
from tidelog._limits import FILE_CHUNK_BYTES
from tidelog.v1 import failure_pb2
from tidelog_server import (
    Application,
    ContentLost,
    HookContext,
    HookObject,
    LmdbStore,
    OperationRefused,
    Principal,
    Reject,
    StoreUnavailable,
    verify_store,
)
from tidelog_server import _failures as failures
from tidelog_server import _file_rules as file_rules
from tidelog_server._adoption import adopt_schema
from tidelog_server._author import OldBases
from tidelog_server._engine import Evaluation, UploadState, evaluate_batch
from tidelog_server._errors import FailureStale
from tidelog_server._files import Files, Standing, Wanted
from tidelog_server._outcomes import Result, Uploader
from tidelog_server._overlay import Overlay
from tidelog_server._records import MAX_POSITION, Writes
from tidelog_server._session import begin_upload
from tidelog_server._store import Reader
from tidelog_server._units import FormerOutcome

WEEK: Final = timedelta(days=7)
SECOND: Final = timedelta(seconds=1)

PHOTO: Final = b"a photo, say"
OTHER: Final = b"another one"

ORDERS: Final = references_schema({"Line": {"order": "Order"}, "Order": {}})

ANN: Final = Principal("ann", roles=frozenset({"clerk"}))
BOB: Final = Principal("bob", roles=frozenset({"clerk"}))
OPERATOR: Final = Principal("olga", roles=frozenset({"operator"}))


def cabinet_of(path: Path, application: Application | None = None) -> Cabinet:
    """Return the files of a new lab."""
    return Cabinet(Lab(application or Application()), path / "files")


@pytest.fixture
def cabinet(tmp_path: Path) -> Cabinet:
    """Give files with an application that allows everything."""
    return cabinet_of(tmp_path)


@pytest.fixture
def ruled(tmp_path: Path) -> Cabinet:
    """Give files with an application where each has objects of his own and reads public ones, but for the secret."""
    application = Application()
    own = attribute("owner") == claim("user_id")
    application.allow("clerk", "Task", create=True, delete=True, write="*", where=own)
    application.allow("clerk", "Task", read=["owner", "public", "photo"], where=attribute("public") == 1)
    return cabinet_of(tmp_path, application)


def sha256(data: bytes) -> bytes:
    """Return the hash of a content."""
    return bytes(file_value(data)["sha256"])


def refusing(task: HookObject, context: HookContext) -> None:
    """Refuse everything."""
    raise Reject("never")


def index_only(reader: Reader, entries: dict[bytes, bytes | None]) -> Writes:
    """Return writes of the table of indexes only."""
    return Writes({}, [], None, [], [], reader.head().version, entries)


def wanted_of(data: bytes) -> Wanted:
    """Name a content."""
    return Wanted(sha256(data), len(data))


def upload(cabinet: Cabinet, principal: Principal, *operations: bytes, lost: Iterable[bytes] = ()) -> list[Result]:
    """Upload operations of a user."""
    replica = {"ann": REPLICA_A, "bob": REPLICA_B}[principal.user_id]
    return cabinet.lab.session(replica, principal=principal).settle(*operations, lost=lost)


def retry(cabinet: Cabinet, failed: Result | failure_pb2.SynchronizationFailure) -> list[failures.RetryOutcome]:
    """Retry a failure."""
    failure_id = failed.failure_id if isinstance(failed, Result) else UUID(failed.id).bytes
    decision = failures.Decision(OPERATOR, cabinet.time_us)
    return cabinet.lab.store.submit(
        TENANT, lambda reader: failures.retry(reader, cabinet.lab.application, failure_id, decision)
    ).result()


def offer(lab: Lab, *operations: bytes, lost: Iterable[bytes] = ()) -> list[Result]:
    """Offer operations again, which had been told that they were applied from version 100 on."""
    begun = lab.store.submit(TENANT, lambda reader: begin_upload(reader, REPLICA_A, USER, TIME_US)).result()
    bases = OldBases(MAX_POSITION, 0, "old")
    uploader = Uploader(REPLICA_A, USER, begun.session_number, leaves_earlier=False, old_bases=bases)

    def job(reader: Reader) -> tuple[Writes, Evaluation]:
        evaluation = evaluate_batch(
            operations,
            application=lab.application,
            uploader=uploader,
            reader=reader,
            state=UploadState(),
            time_us=TIME_US,
            former_outcomes=[FormerOutcome(100 + place) for place in range(len(operations))],
            lost_contents=lost,
        )
        return evaluation.writes, evaluation

    return lab.store.submit(TENANT, job).result().results


class TestAvailability:
    def test_what_was_uploaded_may_be_referred_to(self, cabinet: Cabinet) -> None:
        """Creations and updates that refer to contents which their author uploaded are applied."""
        photo, other = cabinet.upload(PHOTO), cabinet.upload(OTHER)

        results = cabinet.lab.settle(create(1, set={"photo": photo}), update(2, set={"other": other}))

        assert said(results) == ["APPLIED"] * 2
        assert cabinet.lab.attributes() == {"photo": photo, "other": other}

    def test_what_was_not_uploaded_is_awaited(self, cabinet: Cabinet) -> None:
        """An operation whose content is not there stays pending with what comes behind it on its object only."""
        operations = [
            create(1, set={"photo": file_value(PHOTO)}),
            update(2, set={"title": "x"}),
            create(3, "t2"),
            update(4, "t2", {"photo": file_value(OTHER)}),
            update(5, "t2", {"title": "y"}),
        ]
        results = cabinet.lab.settle(*operations)

        assert said(results) == ["NOT_READY", "NOT_READY", "APPLIED", "NOT_READY", "NOT_READY"]
        assert "was not uploaded yet" in results[0].message
        assert cabinet.lab.failures() == []

        cabinet.upload(PHOTO)
        assert said(cabinet.lab.settle(*operations)) == ["APPLIED"] * 3 + ["NOT_READY"] * 2
        cabinet.upload(OTHER)
        assert said(cabinet.lab.settle(*operations)) == ["APPLIED"] * 5

    def test_a_commit_group_waits_as_a_whole(self, cabinet: Cabinet) -> None:
        """Of a group that one content is missing for nothing is applied."""
        members = group(
            make_operation("create", seq=1, id="a", set={"n": 1}),
            make_operation("create", seq=2, id="b", set={"photo": file_value(PHOTO)}),
        )

        assert said(cabinet.lab.settle(*members)) == ["NOT_READY"] * 2
        assert cabinet.lab.attributes("a") is None
        cabinet.upload(PHOTO)
        assert said(cabinet.lab.settle(*members)) == ["APPLIED"] * 2

    def test_what_refers_to_an_object_that_waits_waits_too(self, tmp_path: Path) -> None:
        """A child whose parent waits for a content is no failure, whichever came first."""
        cabinet = cabinet_of(tmp_path, Application(schema=ORDERS))
        line = make_operation("create", seq=1, entity="Line", id="l1", set={"order": "o1"}).encode()
        order = make_operation("create", seq=2, entity="Order", id="o1", set={"photo": file_value(PHOTO)}).encode()
        late = make_operation("create", seq=3, entity="Line", id="l2", set={"order": "o1"}).encode()

        assert said(cabinet.lab.settle(line, order, late)) == ["NOT_READY"] * 3
        cabinet.upload(PHOTO)
        assert said(cabinet.lab.settle(line, order, late)) == ["APPLIED"] * 3

    def test_one_that_was_held_waits_for_its_content_too(self, tmp_path: Path) -> None:
        """An operation that waited for an object, or behind one that did, is judged by its content then."""
        cabinet = cabinet_of(tmp_path, Application(schema=ORDERS))
        photo = cabinet.upload(PHOTO)
        operations = [
            make_operation("create", seq=1, entity="Line", id="l1", set={"order": "o1", "photo": photo}).encode(),
            make_operation("create", seq=2, entity="Line", id="l2", set={"order": "o1"}).encode(),
            make_operation("update", seq=3, entity="Line", id="l2", set={"photo": file_value(OTHER)}).encode(),
            make_operation("create", seq=4, entity="Order", id="o1").encode(),
        ]
        session = cabinet.lab.session()

        assert said(session.batch(*operations)) == ["HELD", "HELD", "HELD", "APPLIED"]
        entries: dict[bytes, bytes | None] = {b"c" + sha256(PHOTO): None}
        cabinet.lab.store.submit(TENANT, lambda reader: (index_only(reader, entries), None)).result()
        assert said(session.held()) == ["NOT_READY", "APPLIED", "NOT_READY"]

    @pytest.mark.parametrize("where", ["batch", "held"])
    def test_what_its_replica_lost_is_a_failure(self, tmp_path: Path, where: str) -> None:
        """An operation whose content its replica has lost is refused, with its whole payload, and blocks nothing."""
        cabinet = cabinet_of(tmp_path, Application(schema=ORDERS))
        reference = {"order": "o1"} if where == "held" else {}
        operations = [
            make_operation("create", seq=1, entity="Line", id="l1", set=reference).encode(),
            make_operation("update", seq=2, entity="Line", id="l1", set={"photo": file_value(PHOTO)}).encode(),
            make_operation("create", seq=3, entity="Order", id="o1").encode(),
        ]
        session = cabinet.lab.session()
        first = session.batch(*operations[:2], lost=[sha256(PHOTO)])
        assert said(first) == (["HELD"] * 2 if where == "held" else ["APPLIED", "FILE_MISSING"])
        assert said(session.batch(operations[2])) == ["APPLIED"]

        assert said(session.held()) == (["APPLIED", "FILE_MISSING"] if where == "held" else [])
        (failure,) = cabinet.lab.failures()
        assert failure.operation == operations[1]

    def test_losing_what_the_server_has_is_no_harm(self, cabinet: Cabinet) -> None:
        """An operation whose content the replica lost is applied if it was uploaded before."""
        cabinet.upload(PHOTO)
        operation = create(1, set={"photo": file_value(PHOTO)})

        assert said(cabinet.lab.session().settle(operation, lost=[sha256(PHOTO)])) == ["APPLIED"]

    def test_another_size_is_refused(self, cabinet: Cabinet) -> None:
        """A reference that says another size than the content has breaks a rule."""
        cabinet.upload(PHOTO)
        results = cabinet.lab.settle(create(1, set={"photo": file_value(PHOTO, size=5)}))

        assert said(results) == ["VALIDATION_FAILED"]
        assert results[0].message == "Task 't1': attribute 'photo' says that its file has 5 bytes: it has 12"

    def test_a_file_that_is_too_large_is_refused(self, cabinet: Cabinet) -> None:
        """A reference to more bytes than the server takes is refused, unless the content is there already."""
        begun = cabinet.lab.session().uploader
        uploader = Uploader(begun.replica, USER, begun.session_number, leaves_earlier=False, file_bytes_max=11)
        session = Session(cabinet.lab.store, cabinet.lab.application, uploader)

        assert said(session.settle(create(1, set={"photo": file_value(PHOTO)}))) == ["TOO_LARGE"]
        photo = cabinet.upload(PHOTO)
        assert said(session.settle(create(2, set={"photo": photo}))) == ["APPLIED"]
        small = Files(cabinet.lab.application, cabinet.lab.store, cabinet.contents, lambda: TIME_US, bytes_max=11)
        assert [one.is_present for one in small.stat(USER, [wanted_of(PHOTO), wanted_of(OTHER)])] == [True, False]

    def test_what_was_settled_is_not_looked_at_again(self, cabinet: Cabinet) -> None:
        """A repetition gets its former outcome although the content is gone since."""
        operation = create(1, set={"photo": cabinet.upload(PHOTO)})
        (first,) = cabinet.lab.settle(operation)
        cabinet.lab.settle(delete(2))
        cabinet.wait(WEEK)
        assert cabinet.collect() == 1

        assert cabinet.lab.settle(operation) == [first]

    def test_what_only_looks_like_a_file_is_no_reference(self, cabinet: Cabinet) -> None:
        """A map that lacks something of a file, or has more, and one inside of a list, refer to nothing."""
        photo = file_value(PHOTO)
        near = {**photo, "more": 1}
        results = cabinet.lab.settle(create(1, set={"near": near, "list": [photo], "map": {"photo": photo}}))

        assert said(results) == ["APPLIED"]

    def test_nothing_is_decoded_for_what_has_no_files(self, cabinet: Cabinet) -> None:
        """Operations without files are not searched for references."""
        with (
            mock.patch("tidelog_server._file_rules.file_references", side_effect=AssertionError),
            mock.patch("tidelog_server._file_records.encoded_file_references", side_effect=AssertionError),
        ):
            results = cabinet.lab.settle(create(1, set={"title": "x"}), update(2, set={"title": "y"}), delete(3))
        assert said(results) == ["APPLIED"] * 3

    def test_what_is_offered_again_is_judged_the_same(self, cabinet: Cabinet) -> None:
        """An operation offered again to a server that was put back waits for its content."""
        operation = create(1, set={"photo": file_value(PHOTO)})

        assert said(offer(cabinet.lab, operation)) == ["NOT_READY"]
        cabinet.upload(PHOTO)
        assert said(offer(cabinet.lab, operation)) == ["APPLIED"]

    def test_what_is_offered_again_without_its_files(self, cabinet: Cabinet) -> None:
        """A file that nobody has any more costs what is offered again nothing else, and a person can put it right."""
        photo, scan = file_value(PHOTO), file_value(OTHER)
        operations = [
            create(1, set={"title": "x", "photo": photo, "scan": scan}),
            update(2, set={"scan": None}, base_version=100),
            create(3, "t2", {"photo": photo}),
            update(4, "t2", {"photo": cabinet.upload(b"retaken")}, base_version=102),
            create(5, "t3", {"photo": photo}),
            delete(6, "t3", base_version=104),
        ]
        results = offer(cabinet.lab, *operations, lost=[sha256(PHOTO), sha256(OTHER)])

        assert said(results) == ["APPLIED"] * 6
        assert cabinet.lab.attributes() == {"title": "x", "scan": None}
        (failure,) = cabinet.lab.failures()
        assert (failure.reason, failure.object_id) == (FailureReason.FILE_MISSING.number, "t1")
        assert retry(cabinet, failure)[0].reason is FailureReason.FILE_MISSING
        cabinet.tenant().add_file(PHOTO, name="found.jpg")
        assert retry(cabinet, failure)[0].version
        assert cabinet.lab.attributes() == {"title": "x", "scan": None, "photo": photo}

    def test_what_is_left_out_is_no_contradiction(self, tmp_path: Path) -> None:
        """A store where something was applied without its files is sound."""
        lab = Lab(store=LmdbStore(tmp_path / "store"))
        assert said(offer(lab, create(1, set={"photo": file_value(PHOTO)}), lost=[sha256(PHOTO)])) == ["APPLIED"]
        assert len(lab.failures()) == 1
        lab.store.close()

        assert list(verify_store(tmp_path / "store")) == []

    def test_what_is_left_out_and_then_written(self, cabinet: Cabinet) -> None:
        """What was left out of an operation takes the place of nothing that came since."""
        offer(cabinet.lab, create(1, set={"photo": file_value(PHOTO)}), lost=[sha256(PHOTO)])
        cabinet.tenant().update("Task", "t1", {"photo": cabinet.tenant().add_file(OTHER, name="other.jpg")})
        cabinet.tenant().add_file(PHOTO, name="found.jpg")

        (failure,) = cabinet.lab.failures()
        with pytest.raises(FailureStale):
            retry(cabinet, failure)


class TestRights:
    def test_a_hash_alone_gives_nothing(self, ruled: Cabinet) -> None:
        """Who neither uploaded a content nor reads a referrer is told the same as if nobody had it."""
        ruled.upload(PHOTO, ANN)
        upload(ruled, ANN, create(1, set={"owner": "ann", "photo": file_value(PHOTO)}))
        results = []
        for number, data in enumerate((PHOTO, b"nobody's ...")):
            ids = f"same-{number}", f"size-{number}", f"lost-{number}"
            operations = [
                create(10 * number + 1, ids[0], {"owner": "bob", "photo": file_value(data)}),
                create(10 * number + 2, ids[1], {"owner": "bob", "photo": file_value(data, size=5)}),
            ]
            found = upload(ruled, BOB, *operations)
            lost = create(10 * number + 3, ids[2], {"owner": "bob", "photo": file_value(data)})
            found += upload(ruled, BOB, lost, lost=[sha256(data)])
            results.append([(one.status, one.reason, one.message.replace(str(number), "")) for one in found])
            assert said(found) == ["NOT_READY", "NOT_READY", "FILE_MISSING"]
            assert ruled.files.stat(BOB, [wanted_of(data)])[0] == Standing()

        assert results[0] == results[1]

    def test_an_attribute_that_is_not_read(self, ruled: Cabinet) -> None:
        """A referrer counts as far as it may be read: not by a secret attribute, but by a public one."""
        ruled.upload(PHOTO, ANN)
        upload(ruled, ANN, create(1, "a", {"owner": "ann", "public": 1, "secret": file_value(PHOTO)}))
        operation = create(1, "b", {"owner": "bob", "photo": file_value(PHOTO)})

        assert said(upload(ruled, BOB, operation)) == ["NOT_READY"]
        upload(ruled, ANN, update(2, "a", {"photo": file_value(PHOTO)}))
        assert said(upload(ruled, BOB, operation)) == ["APPLIED"]

    def test_the_object_itself_counts(self, ruled: Cabinet) -> None:
        """Whoever reads the object may write the reference that it holds once more, without having uploaded it."""
        ruled.upload(PHOTO, ANN)
        ruled.tenant().create("Task", {"owner": "bob", "public": 1, "photo": file_value(PHOTO)}, "a")
        with mock.patch.object(file_rules, "REFERRERS_MAX", 0):
            renamed = update(1, "a", {"other": file_value(PHOTO, name="renamed.jpg")}, base_version=1)
            assert said(upload(ruled, BOB, renamed)) == ["APPLIED"]
            assert said(upload(ruled, BOB, create(2, "b", {"owner": "bob", "photo": file_value(PHOTO)}))) == [
                "NOT_READY"
            ]

    def test_an_object_of_the_same_batch_counts(self, ruled: Cabinet) -> None:
        """A right may come from an object that the batch itself made a referrer, and ends with it."""
        ruled.upload(PHOTO, ANN)
        ruled.tenant().create("Task", {"owner": "ann", "public": 1, "photo": file_value(PHOTO)}, "a")
        copy = {"owner": "bob", "public": 1, "photo": file_value(PHOTO)}
        ruled.tenant().create("Task", {"owner": "ann", "photo": file_value(PHOTO)}, "0")
        assert said(upload(ruled, BOB, create(1, "b", copy))) == ["APPLIED"]
        with mock.patch.object(file_rules, "REFERRERS_MAX", 1):
            assert said(upload(ruled, BOB, create(2, "c", copy))) == ["NOT_READY"]
            named = update(2, "b", {"other": file_value(PHOTO)}, base_version=3)
            assert said(upload(ruled, BOB, named, create(3, "c", copy))) == ["APPLIED"] * 2
            named = update(4, "b", {"third": file_value(PHOTO)}, base_version=4)
            gone = update(5, "b", unset=["photo", "other", "third"], base_version=4)
            assert said(upload(ruled, BOB, named, gone, create(6, "d", copy))) == ["APPLIED", "APPLIED", "NOT_READY"]

    def test_a_right_to_what_is_lost(self, cabinet: Cabinet) -> None:
        """Who uploaded a content that the server has lost since uploads it again before anything refers to it."""
        cabinet.upload(PHOTO)
        cabinet.path(PHOTO).unlink()
        assert not cabinet.files.stat(USER, [wanted_of(PHOTO)])[0].is_present

        assert said(cabinet.lab.settle(create(1, set={"photo": file_value(PHOTO)}))) == ["NOT_READY"]
        cabinet.upload(PHOTO)
        assert said(cabinet.lab.settle(create(1, set={"photo": file_value(PHOTO)}))) == ["APPLIED"]

    def test_each_object_is_looked_at_once(self, cabinet: Cabinet) -> None:
        """However many files an operation sets, and an object that has them too, each is gone through a few times."""
        names = [f"a{number}" for number in range(40)]
        files = {name: cabinet.upload(name.encode(), ANN) for name in names}
        assert said(upload(cabinet, ANN, create(1, "a", files))) == ["APPLIED"]

        for operation in (create(1, "b", files), update(2, "b", dict.fromkeys(names, files["a7"]))):
            walked = mock.Mock(side_effect=file_references)
            with mock.patch.object(file_rules, "file_references", walked):
                assert said(upload(cabinet, BOB, operation)) == ["APPLIED"]
            assert walked.call_count <= 5

    def test_so_many_referrers_are_looked_at(self, ruled: Cabinet) -> None:
        """Behind more unreadable referrers than are looked at a readable one is not found: the content is uploaded."""
        ruled.upload(PHOTO, ANN)
        for number in range(3):
            ruled.tenant().create("Task", {"owner": "ann", "photo": file_value(PHOTO)}, f"a{number}")
        ruled.tenant().create("Task", {"owner": "ann", "public": 1, "photo": file_value(PHOTO)}, "b")
        operation = create(1, "c", {"owner": "bob", "photo": file_value(PHOTO)})

        with mock.patch.object(file_rules, "REFERRERS_MAX", 3):
            assert said(upload(ruled, BOB, operation)) == ["NOT_READY"]
            assert not ruled.files.stat(BOB, [wanted_of(PHOTO)])[0].is_present
        with mock.patch.object(file_rules, "REFERRERS_MAX", 4):
            assert said(upload(ruled, BOB, operation)) == ["APPLIED"]

    def test_asking_keeps_no_right(self, ruled: Cabinet) -> None:
        """Who could read a content once, and may not any more, loses the right to it, however often he asks."""
        ruled.upload(PHOTO, ANN)
        ruled.tenant().create("Task", {"owner": "ann", "public": 1, "photo": file_value(PHOTO)}, "a")
        assert ruled.files.stat(BOB, [wanted_of(PHOTO)])[0].is_present
        ruled.tenant().update("Task", "a", {"public": 0})
        copy = {"owner": "bob", "photo": file_value(PHOTO)}

        assert not ruled.files.stat(BOB, [wanted_of(PHOTO)])[0].is_present
        named = [create(1, "b", copy), delete(2, "b")]
        assert said(upload(ruled, BOB, *named)) == ["APPLIED"] * 2  # he was told that he may, today
        for _ in range(3):
            ruled.wait(timedelta(hours=13))
            assert not ruled.files.stat(BOB, [wanted_of(PHOTO)])[0].is_present
            assert ruled.files.stat(ANN, [wanted_of(PHOTO)])[0].is_present
            ruled.collect()
        assert said(upload(ruled, BOB, create(3, "c", copy))) == ["NOT_READY"]
        assert ruled.entries(b"g") == [b"g" + sha256(PHOTO) + b"ann"]
        ruled.tenant().update("Task", "a", {"public": 1})
        assert ruled.files.stat(BOB, [wanted_of(PHOTO)])[0].is_present

    def test_what_is_asked_besides_does_not_tell(self, ruled: Cabinet) -> None:
        """However often, and about whatever else, somebody asks: what he is told of a content is the same."""
        ruled.upload(PHOTO, ANN)
        ruled.upload(OTHER, ANN)
        for number in range(3):
            ruled.tenant().create("Task", {"owner": "ann", "photo": file_value(PHOTO)}, f"a{number}")
        ruled.tenant().create("Task", {"owner": "ann", "public": 1, "photo": file_value(OTHER)}, "b")
        looked_at: list[int] = []
        for data in (PHOTO, b"nobody's ..."):
            with mock.patch.object(Overlay, "passed_by", autospec=True, side_effect=Overlay.passed_by) as passed_by:
                sizes = [Wanted(sha256(data), size) for size in range(100)]
                standings = ruled.files.stat(BOB, [*[wanted_of(data)] * 5_000, *sizes, wanted_of(OTHER)])
            assert [one.is_present for one in standings] == [False] * 5_100 + [True]
            looked_at.append(passed_by.call_count)
        assert looked_at == [3 + 1, 1]  # each object once

    def test_what_refers_to_many_is_looked_at_once(self, ruled: Cabinet) -> None:
        """However many of the contents that somebody asks about an object refers to, it is read once."""
        contents = [b"%d" % number for number in range(50)]
        forms = {"owner": "ann", **{f"a{number}": ruled.upload(data, ANN) for number, data in enumerate(contents)}}
        for number in range(3):
            ruled.tenant().create("Task", forms, f"t{number}")

        with mock.patch.object(Overlay, "passed_by", autospec=True, side_effect=Overlay.passed_by) as passed_by:
            standings = ruled.files.stat(BOB, [wanted_of(data) for data in contents])
        assert not any(one.is_present for one in standings)
        assert passed_by.call_count == 3

    def test_what_is_looked_at_is_not_kept(self, cabinet: Cabinet) -> None:
        """However many contents large objects refer to, a question about them holds few objects in memory at once."""
        asked = []
        for number in range(40):
            photo = cabinet.upload(b"%d" % number)
            cabinet.tenant().create("Task", {"photo": photo, "text": "x" * 200_000}, f"t{number}")
            asked.append(wanted_of(b"%d" % number))

        tracemalloc.start()
        try:
            standings = cabinet.files.stat(BOB, asked)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert all(one.is_present for one in standings)
        assert peak_bytes < 2_000_000

    def test_access_is_asked_before_contents(self, ruled: Cabinet) -> None:
        """Who may not write the object is refused for that, content or not."""
        ruled.tenant().create("Task", {"owner": "ann", "public": 1}, "a")
        results = upload(ruled, BOB, update(1, "a", {"photo": file_value(PHOTO)}, base_version=1))

        assert said(results) == ["ACCESS_DENIED"]


class TestHooks:
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_refer_to_what_is_there_only(self, tmp_path: Path, moment: str) -> None:
        """What a hook refers to has to be there, whoever uploaded it; else the operation fails, not the session."""
        application = Application()

        def before(task: HookObject, context: HookContext) -> None:
            task["photo"] = file_value(PHOTO)

        def after(task: HookObject, context: HookContext) -> None:
            if task.id == "t1":
                context.create("Task", {"photo": file_value(PHOTO)}, f"copy-{task.id}")

        if moment == "before":
            application.before_commit("Task")(before)
        else:
            application.after_commit("Task")(after)
        cabinet = cabinet_of(tmp_path, application)

        assert said(cabinet.lab.settle(create(1))) == ["HOOK_ERROR"]
        cabinet.upload(PHOTO, Principal("somebody"))
        assert said(cabinet.lab.settle(create(2))) == ["APPLIED"]

    def test_cannot_add_files(self, tmp_path: Path) -> None:
        """A hook that adds a file is broken: nothing of it is read, and nobody waits for it."""
        application = Application()
        cabinet = cabinet_of(tmp_path, application)
        source = io.BytesIO(PHOTO)

        @application.before_commit("Task")
        def adds(task: HookObject, context: HookContext) -> None:
            task["photo"] = cabinet.tenant().add_file(source, name="photo.jpg")

        assert said(cabinet.lab.settle(create(1))) == ["HOOK_ERROR"]
        assert source.tell() == 0
        assert list(cabinet.contents.contents(TENANT)) == []

    def test_see_no_reference_whose_author_has_no_right(self, tmp_path: Path) -> None:
        """What a hook makes of a reference tells nobody whether somebody has the content."""
        application = Application()

        @application.before_commit("Task")
        def copies(task: HookObject, context: HookContext) -> None:
            context.create("Copy", {"photo": task["photo"]})

        cabinet = cabinet_of(tmp_path, application)
        application.allow("*", "*", create=True, write="*", read=["title"])
        cabinet.upload(PHOTO, ANN)
        for data in (PHOTO, b"nobody's"):
            for photo in (file_value(data), file_value(data, size=1)):
                assert said(upload(cabinet, BOB, create(1, set={"photo": photo}))) == ["NOT_READY"]
        assert said(upload(cabinet, ANN, create(1, set={"photo": file_value(PHOTO)}))) == ["APPLIED"]
        with mock.patch.object(application, "hooks", side_effect=AssertionError):
            changed = update(2, set={"photo": file_value(OTHER)}, base_version=2)
            assert said(upload(cabinet, ANN, changed)) == ["NOT_READY"]

    @pytest.mark.parametrize("where", ["own object", "another object"])
    @pytest.mark.parametrize("form", ["list", "map"])
    def test_make_nothing_theirs_that_the_author_named(self, tmp_path: Path, form: str, where: str) -> None:
        """A hash that an operation names in whatever form stays its author's when a hook makes a reference of it."""
        application = Application()

        @application.before_commit("Task")
        def unpacks(task: HookObject, context: HookContext) -> None:
            found = task["packed"]
            photo = found[0] if form == "list" else {name: found[name] for name in found if name != "more"}
            if where == "own object":
                task["photo"] = photo
            else:
                context.create("Copy", {"photo": photo}, "secret-id")

        @application.before_commit("Copy")
        def looks(copy: HookObject, context: HookContext) -> None:
            assert copy["photo"]

        cabinet = cabinet_of(tmp_path, application)
        application.allow("*", "*", create=True, write="*", read=["title"])
        cabinet.upload(PHOTO, ANN)

        def packed(data: bytes) -> dict[str, Any]:
            return {"packed": [file_value(data)] if form == "list" else {**file_value(data), "more": 1}}

        for data in (PHOTO, b"nobody's ..."):
            (result,) = upload(cabinet, BOB, create(1, set=packed(data)))
            assert said([result]) == ["NOT_READY"]
            assert "secret-id" not in result.message
        assert said(upload(cabinet, ANN, create(1, set=packed(PHOTO)))) == ["APPLIED"]

    @pytest.mark.parametrize("form", ["list", "map", "bytes", "another object", "seen besides"])
    def test_make_nothing_theirs_that_waits(self, tmp_path: Path, form: str) -> None:
        """A hash that an author left in an object, where nobody follows it, gives nobody its content later."""
        application = Application()

        @application.before_commit("Task")
        def unpacks(task: HookObject, context: HookContext) -> None:
            if task["state"] == "published":
                if form == "seen besides":
                    assert dict(context.query("Task"))["a"]["photo"]
                packed = (
                    (context.get("Draft", task.id) or {})["packed"] if form == "another object" else task["packed"]
                )
                if form == "list":
                    task["photo"] = packed[0]
                else:
                    sha256 = packed if form == "bytes" else packed["sha256"]
                    task["photo"] = {**file_value(PHOTO), "sha256": sha256}

        cabinet = cabinet_of(tmp_path, application)
        own = attribute("owner") == claim("user_id")
        application.allow("clerk", "*", create=True, write="*", read="*", where=own)
        cabinet.upload(PHOTO, ANN)
        assert said(upload(cabinet, ANN, create(1, "a", {"owner": "ann", "photo": file_value(PHOTO)}))) == ["APPLIED"]

        messages = set()
        for number, data in enumerate((PHOTO, b"nobody's ...")):
            value = file_value(data)
            packed = {"list": [value], "bytes": value["sha256"]}.get(form, {**value, "caption": "a cat"})
            draft = create(number * 10 + 1, f"b{number}", {"owner": "bob", "packed": packed}, entity="Draft")
            task = create(number * 10 + 2, f"b{number}", {"owner": "bob", "packed": packed})
            published = update(number * 10 + 3, f"b{number}", {"state": "published"})
            if form == "another object":
                task = create(number * 10 + 2, f"b{number}", {"owner": "bob"})
            results = upload(cabinet, BOB, draft, task, published)
            assert said(results) == ["APPLIED", "APPLIED", "HOOK_ERROR"]
            messages.add(results[2].message)
        assert len(messages) == 1

    def test_tell_nobody_what_they_write(self, tmp_path: Path) -> None:
        """Whose operation a hook breaks with a content that is not there is told neither where nor what it writes."""
        application = Application()

        @application.after_commit("Task")
        def copies(task: HookObject, context: HookContext) -> None:
            if not task["nothing"]:
                context.create("CaseCopy", {"scan": file_value(PHOTO, "ann-schmidt.pdf")}, "of-patient-4711")

        cabinet = cabinet_of(tmp_path, application)
        application.allow("clerk", "Task", create=True, write="*", read="*")
        (missing,) = upload(cabinet, BOB, create(1))
        cabinet.upload(PHOTO, ANN)
        named = {"note": sha256(PHOTO)}
        (awaited, lost) = [
            *upload(cabinet, BOB, create(2, "t2", named)),
            *upload(cabinet, BOB, create(3, "t3", named), lost=[sha256(PHOTO)]),
        ]

        assert said([missing, awaited, lost]) == ["HOOK_ERROR", "NOT_READY", "FILE_MISSING"]
        for one in (missing, awaited, lost):
            assert one.message.startswith("what hooks write refers to a file")
            assert not any(word in one.message for word in ("CaseCopy", "4711", "scan", "ann"))

    @pytest.mark.parametrize("guess", ["right", "wrong"])
    def test_copy_what_the_author_may_not_read(self, tmp_path: Path, guess: str) -> None:
        """Who names the hash of what a hook moves between hidden objects is not told whether it is the right one."""
        application = Application()

        @application.after_commit("Task")
        def audits(task: HookObject, context: HookContext) -> None:
            scan = (context.get("Case", "c1") or {})["scan"]
            context.create("Audit", {"scan": scan})

        cabinet = cabinet_of(tmp_path, application)
        application.allow("clerk", "Task", create=True, write="*", read="*")
        cabinet.tenant().create("Case", {"scan": cabinet.tenant().add_file(PHOTO, name="scan.pdf")}, "c1")

        note = sha256(PHOTO if guess == "right" else OTHER)
        assert said(upload(cabinet, BOB, create(1, set={"note": note}))) == ["APPLIED"]

    def test_move_what_the_server_has_lost(self, tmp_path: Path) -> None:
        """A hook that moves the reference to a content which is gone breaks nothing: that file is lost, no more."""
        application = Application()

        @application.before_delete("Task")
        def archives(task: HookObject, context: HookContext) -> None:
            context.create("Archived", {"photo": task["photo"]}, task.id)

        cabinet = cabinet_of(tmp_path, application)
        assert said(cabinet.lab.settle(create(1, set={"photo": cabinet.upload(PHOTO)}))) == ["APPLIED"]
        cabinet.path(PHOTO).unlink()
        assert not cabinet.files.stat(USER, [wanted_of(PHOTO)])[0].is_present

        assert said(cabinet.lab.settle(delete(2))) == ["APPLIED"]

    def test_move_what_the_author_may_refer_to(self, ruled: Cabinet) -> None:
        """What the author may refer to because the object did already, a hook may write elsewhere."""
        ruled.upload(PHOTO, ANN)
        ruled.tenant().create("Task", {"owner": "bob", "public": 1, "photo": file_value(PHOTO)}, "a")

        @ruled.lab.application.before_commit("Task")
        def copies(task: HookObject, context: HookContext) -> None:
            task["copy"] = task["other"]

        with mock.patch.object(file_rules, "REFERRERS_MAX", 0):
            named = update(1, "a", {"other": file_value(PHOTO)}, base_version=1)
            assert said(upload(ruled, BOB, named)) == ["APPLIED"]


class TestFailures:
    @pytest.fixture
    def desk(self, tmp_path: Path) -> Cabinet:
        """Give files with an application whose hook refuses tasks that are not ready."""
        application = Application()
        application.allow("operator", "*", create=True, write="*")
        application.allow("*", "Task", create=True, write="*", read=["title"])
        application.users(lambda _tenant, user_id: Principal(user_id))

        @application.before_commit("Task")
        def refuses(task: HookObject, context: HookContext) -> None:
            if not self.is_accepting:
                raise Reject("not now")

        self.is_accepting = False
        return cabinet_of(tmp_path, application)

    def test_a_retry_finds_its_content(self, desk: Cabinet) -> None:
        """A failure keeps its content, and its author's right to it, until it is settled."""
        photo = desk.upload(PHOTO)
        (failed,) = desk.lab.settle(create(1, set={"photo": photo}))
        desk.wait(WEEK)
        assert desk.collect() == 0

        self.is_accepting = True
        (outcome,) = retry(desk, failed)

        assert outcome.version == 1
        assert desk.has(PHOTO)
        assert desk.entries(b"f") == [b"f" + sha256(PHOTO) + b"oTask\0t1"]

    def test_a_retry_without_its_content(self, desk: Cabinet) -> None:
        """A failure whose content is not there stays open, and says why; it is retried once somebody uploads it."""
        operation = create(1, set={"photo": file_value(PHOTO)})
        self.is_accepting = True
        (failed,) = desk.lab.session().settle(operation, lost=[sha256(PHOTO)])

        (outcome,) = retry(desk, failed)
        assert (outcome.reason, outcome.failure.status) == (
            FailureReason.FILE_MISSING,
            failure_pb2.FAILURE_STATUS_OPEN,
        )

        desk.upload(PHOTO)
        assert retry(desk, failed)[0].version == 1

    @pytest.mark.parametrize("is_known", [True, False])
    def test_a_retry_gives_nobody_a_content(self, desk: Cabinet, *, is_known: bool) -> None:
        """A failure that refers to a content its author has no right to is not applied by who merely reads it."""
        operation = create(1, set={"photo": file_value(PHOTO)})
        (failed,) = desk.lab.session().settle(operation, lost=[sha256(PHOTO)])
        desk.upload(PHOTO, BOB)
        self.is_accepting = True
        desk.tenant().create("Task", {"photo": file_value(PHOTO)}, "of bob")
        if not is_known:
            desk.lab.application.users(lambda _tenant, _user_id: None)
        desk.lab.application.allow("operator", "Task", read="*")
        assert desk.files.stat(OPERATOR, [wanted_of(PHOTO)])[0].is_present

        assert retry(desk, failed)[0].reason is FailureReason.FILE_MISSING

    @pytest.mark.parametrize("who", ["operator", "service"])
    def test_a_retry_with_what_was_put_there(self, desk: Cabinet, who: str) -> None:
        """A failure whose content its author has lost is retried with what the operator, or the service, adds."""
        operation = create(1, set={"photo": file_value(PHOTO)})
        (failed,) = desk.lab.session().settle(operation, lost=[sha256(PHOTO)])
        self.is_accepting = True
        assert retry(desk, failed)[0].reason is FailureReason.FILE_MISSING

        desk.tenant(OPERATOR if who == "operator" else None).add_file(PHOTO, name="photo.jpg")
        assert retry(desk, failed)[0].version == 1

    @pytest.mark.parametrize("who", ["operator", "service"])
    def test_a_retry_gives_nobody_what_was_there_before(self, desk: Cabinet, who: str) -> None:
        """What the operator or the service had added before a failure was not put there for its author."""
        adder = desk.tenant(OPERATOR if who == "operator" else None)
        adder.add_file(PHOTO, name="salaries.pdf")
        desk.wait(timedelta(hours=1))
        session = desk.lab.session()
        session.time_us = desk.time_us
        (failed,) = session.settle(create(1, set={"photo": file_value(PHOTO)}), lost=[sha256(PHOTO)])
        self.is_accepting = True
        desk.wait(timedelta(hours=1))
        desk.files.stat(OPERATOR, [wanted_of(PHOTO)])

        assert retry(desk, failed)[0].reason is FailureReason.FILE_MISSING
        adder.add_file(PHOTO, name="salaries.pdf")
        assert retry(desk, failed)[0].version == 1

    def test_a_retry_for_somebody_who_is_not_known(self, tmp_path: Path) -> None:
        """An operator who retries by his own rights gives the author no content that the author could not read."""
        application = Application()
        application.allow("operator", "*", create=True, write="*")
        application.allow("clerk", "Task", create=True, write="*", where=attribute("owner") == claim("user_id"))
        application.allow("clerk", "Task", where=attribute("public") == 1)
        desk = cabinet_of(tmp_path, application)
        desk.upload(PHOTO, BOB)
        desk.tenant().create("Task", {"owner": "bob", "photo": file_value(PHOTO)}, "of bob")
        named = create(1, "a", {"owner": "ann", "photo": file_value(PHOTO)})
        (failed,) = upload(desk, ANN, named, lost=[sha256(PHOTO)])

        assert retry(desk, failed)[0].reason is FailureReason.FILE_MISSING
        desk.tenant().update("Task", "of bob", {"public": 1})
        assert retry(desk, failed)[0].version

    def test_a_retry_of_what_follows_with_what_was_there(self, desk: Cabinet) -> None:
        """What was added between a failure and one that follows from it was not added for the latter."""
        (failed,) = desk.lab.settle(create(1, set={"title": "x"}))
        desk.wait(SECOND)
        desk.tenant().add_file(PHOTO, name="salaries.pdf")
        desk.wait(SECOND)
        desk.lab.time_us = desk.time_us
        named = update(2, set={"photo": file_value(PHOTO)})
        (following,) = desk.lab.session().settle(named, lost=[sha256(PHOTO)])
        assert said([failed, following]) == ["HOOK_REJECTED", "DEPENDENCY_FAILED"]
        self.is_accepting = True

        first, second = retry(desk, failed)
        assert (first.version, second.reason) == (1, FailureReason.FILE_MISSING)

    def test_a_failure_keeps_what_its_author_may_have(self, desk: Cabinet) -> None:
        """A failure keeps no content that its author has no right to, nor anybody else's right to it."""
        desk.upload(PHOTO, BOB)
        self.is_accepting = True
        assert said(desk.lab.session().settle(create(1, set={"photo": file_value(PHOTO)}), lost=[sha256(PHOTO)])) == [
            "FILE_MISSING"
        ]
        assert len(desk.entries(b"f")) == 1
        desk.wait(WEEK)
        assert desk.collect() == 1
        assert desk.entries(b"g") == []

        self.is_accepting = False
        desk.upload(PHOTO, BOB)
        assert said(desk.lab.settle(create(2, "t2", {"photo": desk.upload(PHOTO)}))) == ["HOOK_REJECTED"]
        desk.wait(WEEK)
        assert desk.collect() == 0
        assert desk.entries(b"g") == [b"g" + sha256(PHOTO) + USER.user_id.encode()]

    @pytest.mark.parametrize("how", ["dismiss", "retry"])
    def test_a_settled_failure_lets_its_content_go(self, desk: Cabinet, how: str) -> None:
        """What only a settled failure refers to is collected after the grace."""
        (failed,) = desk.lab.settle(create(1, set={"photo": desk.upload(PHOTO)}))
        assert desk.entries(b"f") == [b"f" + sha256(PHOTO) + b"xann\0" + failed.failure_id]
        desk.wait(WEEK)
        decision = failures.Decision(OPERATOR, desk.time_us)

        if how == "dismiss":
            desk.lab.store.submit(
                TENANT, lambda reader: failures.dismiss(reader, failed.failure_id, decision)
            ).result()
        else:
            self.is_accepting = True
            retry(desk, failed)
            desk.tenant().delete("Task", "t1")

        assert desk.entries(b"f") == []
        assert desk.collect() == 0
        desk.wait(WEEK)
        assert desk.collect() == 1


class TestServices:
    def test_add_and_open_files(self, cabinet: Cabinet) -> None:
        """What a service adds it can refer to, without having a user, and open again by the object."""
        tenant = cabinet.tenant()
        photo = tenant.add_file(PHOTO, name="photo.png")
        tenant.create("Task", {"photo": photo}, "t1")

        assert photo == file_value(PHOTO, "photo.png", media_type="image/png")
        with tenant.open_file("Task", "t1", "photo") as opened:
            assert opened.read() == PHOTO
            opened.seek(2)
            assert opened.read(5) == PHOTO[2:7]
            assert opened.seek(-3, 2) == len(PHOTO) - 3
            assert opened.read() == PHOTO[-3:]

    def test_a_large_file_is_read_anywhere(self, cabinet: Cabinet, tmp_path: Path) -> None:
        """A file that comes in many pieces reads like one on the disk, from wherever somebody seeks to."""
        data = random.Random(3).randbytes(3 * FILE_CHUNK_BYTES + 5)
        (tmp_path / "manual.pdf").write_bytes(data)
        tenant = cabinet.tenant()
        manual = tenant.add_file(tmp_path / "manual.pdf")
        tenant.create("Task", {"manual": manual}, "t1")

        assert (manual["name"], manual["media_type"]) == ("manual.pdf", "application/pdf")
        with tenant.open_file("Task", "t1", "manual") as opened:
            assert b"".join(iter(lambda: opened.read(100_000), b"")) == data
            for place in (FILE_CHUNK_BYTES - 3, 7, 3 * FILE_CHUNK_BYTES, len(data) + 9):
                assert opened.seek(place) == opened.tell() == place
                assert opened.read(FILE_CHUNK_BYTES + 11) == data[place : place + FILE_CHUNK_BYTES + 11]

    @pytest.mark.parametrize("method", ["size", "read"])
    def test_a_hook_reads_a_file_whose_place_is_out_of_reach(
        self, cabinet: Cabinet, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        """That contents cannot be read now refuses no operation: it goes when they can."""
        tenant = cabinet.tenant()
        tenant.create("Brand", {"logo": tenant.add_file(PHOTO, name="logo")}, "b1")
        read = []

        @cabinet.lab.application.before_commit("Task")
        def reads(task: HookObject, context: HookContext) -> None:
            with tenant.open_file("Brand", "b1", "logo") as logo:
                read.append(logo.read())

        def away(*_: Any, **__: Any) -> Any:
            raise StorageError("the object store does not answer")

        with monkeypatch.context() as patched:
            patched.setattr(cabinet.contents, method, away)
            with pytest.raises(StoreUnavailable, match="does not answer"):
                cabinet.lab.settle(create(1))

        assert said(cabinet.lab.settle(create(1))) == ["APPLIED"]
        assert read == [PHOTO]

    def test_what_is_added(self, cabinet: Cabinet) -> None:
        """A service adds a stream from where it stands, which stays open; what has no path needs a name."""
        stream = io.BytesIO(b"not this" + PHOTO)
        stream.seek(8)
        added = cabinet.tenant().add_file(stream, name="x", media_type="image/x-own")

        assert added == file_value(PHOTO, "x", media_type="image/x-own")
        assert not stream.closed
        assert cabinet.tenant().add_file(b"", name="nothing")["size"] == 0
        for buffer in (bytearray(PHOTO), memoryview(PHOTO)):
            assert cabinet.tenant().add_file(buffer, name="x", media_type="image/x-own") == added
        with pytest.raises(InvalidValue):
            cabinet.tenant().add_file(PHOTO)
        odd: Any
        for odd in ("", "a\0b", "n" * 1_025, "\ud800", 5):
            with pytest.raises(InvalidValue):
                cabinet.tenant().add_file(PHOTO, name=odd)
        with pytest.raises(FileNotFoundError):
            cabinet.tenant().add_file("no-such-file")

    def test_a_principal_is_given_no_content_for_a_hash(self, ruled: Cabinet) -> None:
        """What a service does as a user may refer to what that user may refer to, no more."""
        ruled.upload(PHOTO, ANN)
        ruled.tenant().create("Task", {"owner": "ann", "photo": file_value(PHOTO)}, "a")
        bob = ruled.tenant(BOB)
        for data in (PHOTO, b"nobody's ..."):
            with pytest.raises(OperationRefused) as caught:
                bob.create("Task", {"owner": "bob", "photo": file_value(data)}, "b")
            assert caught.value.reason is FailureReason.FILE_MISSING
        ruled.tenant().add_file(OTHER, name="x")
        with pytest.raises(OperationRefused):
            bob.create("Task", {"owner": "bob", "photo": file_value(OTHER)}, "b")

        added = bob.add_file(OTHER, name="x")
        bob.create("Task", {"owner": "bob", "photo": added}, "b")
        assert said(upload(ruled, BOB, create(1, "c", {"owner": "bob", "photo": added}))) == ["APPLIED"]
        ruled.tenant(ANN).update("Task", "a", {"public": 1})
        bob.update("Task", "b", {"photo": file_value(PHOTO)})

    def test_what_cannot_be_opened(self, ruled: Cabinet) -> None:
        """Where there is no file, or none that the principal may read, that is said; so is what is lost."""
        photo, secret = ruled.upload(PHOTO), ruled.upload(OTHER)
        attributes = {"owner": "ann", "public": 1, "photo": photo, "secret": secret}
        ruled.tenant().create("Task", attributes, "t1")
        ruled.tenant().create("Task", {"owner": "ann", "photo": photo}, "t2")
        bob = ruled.tenant(BOB)

        with bob.open_file("Task", "t1", "photo") as opened:
            assert opened.read() == PHOTO
        for attribute_name in ("owner", "secret", "absent"):
            with pytest.raises(InvalidValue):
                bob.open_file("Task", "t1", attribute_name)
        for id_ in ("t2", "t3"):
            with pytest.raises(ObjectNotFound):
                bob.open_file("Task", id_, "photo")
        ruled.path(PHOTO).unlink()
        with pytest.raises(ContentLost):
            bob.open_file("Task", "t1", "photo")

    @pytest.mark.parametrize("value", [file_value(PHOTO), file_value(OTHER, size=3)])
    def test_refer_to_what_is_there_only(self, cabinet: Cabinet, value: dict[str, Any]) -> None:
        """A transaction that refers to a content which is not there, or is another one, is refused."""
        cabinet.upload(OTHER)
        with pytest.raises(OperationRefused) as caught:
            cabinet.tenant().create("Task", {"photo": value}, "t1")

        reason = FailureReason.VALIDATION_FAILED if value["size"] == 3 else FailureReason.FILE_MISSING
        assert caught.value.reason is reason
        assert cabinet.lab.attributes() is None


class TestReferrers:
    def test_are_on_record(self, cabinet: Cabinet) -> None:
        """Who refers to a content is noted when he begins to, and not any more when he ends."""
        photo, other = cabinet.upload(PHOTO), cabinet.upload(OTHER)
        session = cabinet.lab.session()

        def referrers(data: bytes) -> set[bytes]:
            prefix = b"f" + sha256(data)
            return {key[len(prefix) :] for key in cabinet.entries(prefix)}

        session.batch(create(1, "a", {"x": photo, "y": photo}), create(2, "b", {"x": photo}))
        assert (referrers(PHOTO), referrers(OTHER)) == ({b"oTask\0a", b"oTask\0b"}, set())
        session.batch(update(3, "a", {"x": other}), update(4, "b", {"x": other}))
        assert (referrers(PHOTO), referrers(OTHER)) == ({b"oTask\0a"}, {b"oTask\0a", b"oTask\0b"})
        session.batch(update(5, "a", unset=["x", "y"]), delete(6, "b"))
        assert (referrers(PHOTO), referrers(OTHER)) == (set(), set())
        session.batch(create(7, "b", {"x": photo}), delete(8, "b"), create(9, "c", {"x": photo}), delete(10, "c"))
        assert cabinet.entries(b"f") == []

    def test_of_a_store_from_before(self, cabinet: Cabinet) -> None:
        """A server that finds a store without them notes who refers to what before it serves, once."""
        application = cabinet.lab.application
        application.before_commit("Refused")(refusing)
        photo = cabinet.upload(PHOTO)
        (failed, _) = cabinet.lab.settle(
            create(1, set={"photo": photo}, entity="Refused"), create(2, set={"photo": photo})
        )
        expected = cabinet.entries(b"f")
        assert expected == [b"f" + sha256(PHOTO) + b"oTask\0t1", b"f" + sha256(PHOTO) + b"xann\0" + failed.failure_id]
        forget: dict[bytes, bytes | None] = dict.fromkeys(expected)
        wrong: dict[bytes, bytes | None] = {b"f" + sha256(PHOTO) + b"oTask\0gone": b""}
        cabinet.lab.store.submit(TENANT, lambda reader: (index_only(reader, {**forget, **wrong}), None)).result()

        adopt_schema(application, cabinet.lab.store, migrate=False, time_us=TIME_US)
        assert cabinet.entries(b"f") == expected

        cabinet.lab.store.submit(TENANT, lambda reader: (index_only(reader, forget), None)).result()
        adopt_schema(application, cabinet.lab.store, migrate=False, time_us=TIME_US)
        assert cabinet.entries(b"f") == []
