"""
The rules of an application, from device to device: access, references, hooks, commit groups.

A real server, replicas of several users. What somebody else does meanwhile is done by
the service itself, through `Server.tenant`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from tests.builders import World, contents, quick_folder

from tidelog import (
    Entity,
    FailureReason,
    Integer,
    ObjectNotFound,
    Reference,
    Schema,
    String,
    SynchronizationFailure,
    attribute,
    claim,
)
from tidelog.v1 import failure_pb2, failure_pb2_grpc, object_pb2, object_pb2_grpc
from tidelog_client import Replica, Report
from tidelog_client import _connection as connection
from tidelog_server import Application, Credentials, HookContext, HookObject, Principal, Reject, Tenant

SCHEMA: Final = Schema(
    [
        Entity(
            "Task",
            {"title": String(), "owner": String(), "note": String(), "secret": String(), "count": Integer()},
            unique=["title"],
            indexes=["owner"],
        ),
        Entity("Line", {"task": Reference("Task", on_delete="cascade"), "owner": String(), "text": String()}),
        Entity("Memo", {"task": Reference("Task", on_delete="clear"), "text": String()}),
        Entity("Seal", {"task": Reference("Task", on_delete="restrict")}),
    ]
)
MINE: Final = attribute("owner") == claim("user_id")
# Nobody but the service may read it, wherever it is written.
MARKER: Final = "what nobody may read"

MODES: Final[dict[str, Callable[[Replica], Report]]] = {
    "all": Replica.synchronize_all,
    "unsynchronized": Replica.synchronize_unsynchronized,
    "selected": lambda replica: replica.synchronize_selected([("Task", "t1"), ("Task", "t2"), ("Task", "hidden-1")]),
}


class Office:
    """
    A server, the people who work with it, each with a device.

    Attributes:
        world: The server.
        people: Who is whom today: anybody's roles and claims may change at any time.
    """

    def __init__(self, folder: Path, application: Application) -> None:
        self.people = {
            name: Principal(name, roles=frozenset({role}), claims={"region": "north"})
            for name, role in (("ann", "clerk"), ("bob", "clerk"), ("otto", "operator"))
        }
        self.world = World(folder, application, authenticator=self)
        self._devices: dict[str, Replica] = {}

    def authenticate(self, credentials: Credentials) -> Principal:
        """Return who has the token, which is the name."""
        return self.people[str(credentials.token)]

    def device(self, name: str, **options: Any) -> Replica:
        """Return somebody's replica; with options it is opened again with these."""
        if options and name in self._devices:
            self._devices.pop(name).close()
        if name not in self._devices:
            self._devices[name] = self.world.replica(name, token=name, **options)
        return self._devices[name]

    def deploy(self, application: Application) -> None:
        """Let the server go on with another application."""
        for replica in self._devices.values():
            replica.close()
        self._devices.clear()
        self.world.deploy(application)

    @property
    def service(self) -> Tenant:
        """The data, for the service itself."""
        return self.world.server.tenant()

    def failures(self, name: str, **request: Any) -> list[failure_pb2.SynchronizationFailure]:
        """Return the failures that somebody gets to see on the server."""
        stub = failure_pb2_grpc.FailureServiceStub(self.world.channel())
        metadata = (("authorization", f"Bearer {name}"),)
        response = stub.ListFailures(failure_pb2.ListFailuresRequest(**request), metadata=metadata)
        return list(response.failures)


@pytest.fixture
def opened() -> Iterator[Callable[[Application], Office]]:
    """Give a function that opens the office with an application."""
    with quick_folder() as folder:
        offices: list[Office] = []

        def open_office(application: Application) -> Office:
            offices.append(Office(folder, application))
            offices[0].world.__enter__()
            return offices[0]

        try:
            yield open_office
        finally:
            for office in offices:
                office.world.__exit__()


Opened = Callable[[Application], Office]


def rules(*, read: str | list[str] = "*", **others: Any) -> Application:
    """Return an application where clerks see and write their own tasks, or what else is said."""
    application = Application(schema=SCHEMA, operators=["operator"])
    options: dict[str, Any] = {"create": True, "delete": True, "write": "*", "where": MINE, **others}
    application.allow("clerk", "Task", read=read, **options)
    application.allow("operator", "*")
    return application


def the_failure(report: Report) -> SynchronizationFailure:
    """Return the only failure of a report."""
    assert len(report.failures) == 1, list(report.failures)
    return report.failures[0]


# --- access lost and regained -----------------------------------------------------------


def lose_the_row(office: Office) -> None:
    """Give the task to somebody else."""
    office.service.update("Task", "t1", {"owner": "bob"})


def regain_the_row(office: Office) -> None:
    """Give it back."""
    office.service.update("Task", "t1", {"owner": "ann"})


def lose_the_role(office: Office) -> None:
    """Take Ann's role away; nothing of the data changes."""
    office.people["ann"] = replace(office.people["ann"], roles=frozenset({"guest"}))


def regain_the_role(office: Office) -> None:
    """Give it back."""
    office.people["ann"] = replace(office.people["ann"], roles=frozenset({"clerk"}))


def lose_the_claim(office: Office) -> None:
    """Take the claim away that the rule asks for."""
    office.people["ann"] = replace(office.people["ann"], claims={})


def regain_the_claim(office: Office) -> None:
    """Give it back."""
    office.people["ann"] = replace(office.people["ann"], claims={"region": "north"})


def lose_the_rule(office: Office) -> None:
    """Restart the server with other rules."""
    office.deploy(rules(where=attribute("title") == "nobody's"))


def regain_the_rule(office: Office) -> None:
    """Restart it with the former ones."""
    office.deploy(regional())


def regional() -> Application:
    """Return rules that ask for the row, the role and the claim."""
    north = Application(schema=SCHEMA, operators=["operator"])
    north.allow(
        "clerk",
        "Task",
        create=True,
        delete=True,
        write="*",
        where=MINE & ((attribute("note") == claim("region")) | attribute("title").exists()) & _CLAIMED,
    )
    return north


# True of each object, for whoever has the claim.
_CLAIMED: Final = (attribute("title") == claim("region")) | ~(attribute("title") == claim("region"))

LOSSES: Final = {
    "row": (lose_the_row, regain_the_row),
    "role": (lose_the_role, regain_the_role),
    "claim": (lose_the_claim, regain_the_claim),
    "rule": (lose_the_rule, regain_the_rule),
}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> tuple[Callable[[Office], None], Callable[[Office], None]]:
    """Give each way to lose access, with the way to regain it."""
    return LOSSES[request.param]


Loss = tuple[Callable[[Office], None], Callable[[Office], None]]


class TestAccessLost:
    def test_what_is_lost_leaves_the_device_and_comes_back(self, opened: Opened, loss: Loss) -> None:
        """Objects go at the next synchronization, and come back, though nobody changed them, when access does."""
        lose, regain = loss
        office = opened(regional())
        office.service.create("Task", {"title": "roof", "owner": "ann", "count": 3}, "t1")
        office.device("ann").synchronize_all()
        before = contents(office.device("ann"))
        assert before == {"t1": {"title": "roof", "owner": "ann", "count": 3}}

        lose(office)
        report = office.device("ann").synchronize_all()
        assert (contents(office.device("ann")), report.removed) == ({}, 1)

        regain(office)
        office.device("ann").synchronize_all()
        assert contents(office.device("ann")) == before

    def test_pending_edits_are_kept_before_the_object_goes(self, opened: Opened, loss: Loss) -> None:
        """What was edited meanwhile is a failure with its payload, on both sides, and then the object goes."""
        lose, _regain = loss
        office = opened(regional())
        office.service.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        ann = office.device("ann")
        ann.synchronize_all()
        ann.update("Task", "t1", {"note": "wet"}, increment={"count": 2})
        ann.delete("Task", "t1")

        lose(office)
        ann = office.device("ann")
        report = ann.synchronize_all()

        assert contents(ann) == {}
        assert ann.pending_count() == 0
        assert [failure.attributes for failure in report.failures] == [{"note": "wet", "count": 2}, {}]
        assert {failure.reason for failure in report.failures} <= {
            FailureReason.OBJECT_GONE, FailureReason.ACCESS_DENIED,
        }  # fmt: skip
        assert [failure.id for failure in ann.failures()] == [failure.id for failure in report.failures]
        assert {one.id for one in office.failures("otto")} == {failure.id for failure in report.failures}

    def test_live_handles_become_empty(self, opened: Opened) -> None:
        """A handle on what is gone does not exist; reading and committing raise, with what was not saved."""
        office = opened(regional())
        office.service.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        ann = office.device("ann")
        ann.synchronize_all()
        handle = ann.get("Task", "t1")
        assert handle is not None
        handle["note"] = "not committed yet"

        lose_the_role(office)
        ann.synchronize_all()

        assert not handle.exists
        for use in (handle.to_dict, handle.commit, lambda: handle["title"]):
            with pytest.raises(ObjectNotFound) as raised:
                use()
            assert raised.value.unsaved == {"note": "not committed yet"}
        regain_the_role(office)
        ann.synchronize_all()
        assert handle.exists
        assert handle.to_dict() == {"title": "roof", "owner": "ann", "note": "not committed yet"}

    def test_selecting_what_is_lost_removes_it(self, opened: Opened) -> None:
        """A synchronization of mode selected removes what may not be read any more, and only that."""
        office = opened(regional())
        for id_ in ("t1", "t2", "t3"):
            office.service.create("Task", {"title": id_, "owner": "ann"}, id_)
        ann = office.device("ann")
        ann.synchronize_all()
        office.service.update("Task", "t1", {"owner": "bob"})
        office.service.update("Task", "t3", {"owner": "bob"})

        ann.synchronize_selected([("Task", "t1"), ("Task", "t2")])

        assert sorted(contents(ann)) == ["t2", "t3"]

    @pytest.mark.parametrize("mode", ["selected", "unsynchronized"])
    def test_what_was_seen_for_a_while_only_goes_again(self, opened: Opened, mode: str) -> None:
        """Access that was gained, used by another mode than all, and lost again leaves nothing on the device."""
        office = opened(regional())
        office.service.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        ann = office.device("ann")
        lose_the_role(office)
        ann.synchronize_all()
        regain_the_role(office)
        ann.create("Task", {"title": "cellar", "owner": "ann"}, "t2")
        MODES[mode](ann)
        assert "t2" in contents(ann)

        lose_the_role(office)
        ann.synchronize_all()

        assert contents(ann) == {}

    def test_what_was_lost_for_a_while_only_is_there_again(self, opened: Opened) -> None:
        """An object that a selection removed comes back with the access, though neither it nor the cursor changed."""
        office = opened(regional())
        office.service.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        ann = office.device("ann")
        ann.synchronize_all()
        lose_the_role(office)
        ann.synchronize_selected([("Task", "t1")])
        assert contents(ann) == {}

        regain_the_role(office)
        ann.synchronize_all()

        assert contents(ann) == {"t1": {"title": "roof", "owner": "ann"}}

    def test_a_wish_for_a_while_takes_nothing_away(self, opened: Opened) -> None:
        """What was selected while the replica wanted none of it is still there when it wants all again."""
        office = opened(rules())
        office.service.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        office.device("ann").synchronize_all()
        office.device("ann", download={"Task": "nothing_clear"}).synchronize_selected([("Task", "t1")])

        ann = office.device("ann", download={})
        ann.synchronize_all()

        assert contents(ann) == {"t1": {"title": "roof", "owner": "ann"}}

    def test_what_was_created_under_a_lost_role_is_refused_and_goes(self, opened: Opened) -> None:
        """A creation that is pending when the role is taken away becomes a failure, and leaves the view."""
        office = opened(regional())
        ann = office.device("ann")
        ann.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        lose_the_role(office)

        failure = the_failure(ann.synchronize_all())

        assert (failure.reason, failure.attributes["title"]) == (FailureReason.ACCESS_DENIED, "roof")
        assert contents(ann) == {}

    def test_an_own_edit_that_gives_the_object_away_removes_it(self, opened: Opened) -> None:
        """Who hands an object over, as the rule's check allows, has it no more after the same synchronization."""
        office = opened(rules(check=attribute("owner").exists()))
        ann, bob = office.device("ann"), office.device("bob")
        ann.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        ann.synchronize_all()
        ann.update("Task", "t1", {"owner": "bob"})

        report = ann.synchronize_all()
        bob.synchronize_all()

        assert (report.applied, contents(ann)) == (1, {})
        assert contents(bob) == {"t1": {"title": "roof", "owner": "bob"}}

    def test_others_keep_what_one_loses(self, opened: Opened) -> None:
        """Whose rights did not change downloads nothing anew."""
        office = opened(regional())
        office.service.create("Task", {"title": "roof", "owner": "bob"}, "t1")
        office.device("bob").synchronize_all()
        lose_the_role(office)
        office.device("ann").synchronize_all()

        report = office.device("bob").synchronize_all()

        assert (report.downloaded, report.removed) == (0, 0)
        assert sorted(contents(office.device("bob"))) == ["t1"]


class TestAttributes:
    def test_attributes_come_and_go_with_the_right_to_read_them(self, opened: Opened) -> None:
        """What may be read from now on is there after the next synchronization, what may not any more is gone."""
        few, many = rules(read=["title", "owner"]), rules(read=["title", "owner", "note"])
        office = opened(few)
        office.service.create("Task", {"title": "roof", "owner": "ann", "note": "wet"}, "t1")

        seen = []
        for application in (few, many, few):
            office.deploy(application)
            office.device("ann").synchronize_all()
            seen.append(contents(office.device("ann"))["t1"])

        assert seen == [
            {"title": "roof", "owner": "ann"},
            {"title": "roof", "owner": "ann", "note": "wet"},
            {"title": "roof", "owner": "ann"},
        ]

    @pytest.mark.parametrize("mode", MODES)
    def test_what_was_seen_in_part_comes_whole(self, opened: Opened, mode: str) -> None:
        """An own object of which a part was gone is sent, not confirmed, once all of it may be read again."""
        office = opened(rules())
        office.device("ann").create("Task", {"title": "roof", "owner": "ann", "note": "wet"}, "t1")
        office.device("ann").synchronize_all()
        office.deploy(rules(read=["title", "owner"]))
        office.device("ann").synchronize_all()
        office.device("ann").update("Task", "t1", {"title": "the roof"})
        office.deploy(rules())

        MODES[mode](office.device("ann"))

        assert contents(office.device("ann")) == {"t1": {"title": "the roof", "owner": "ann", "note": "wet"}}

    def test_a_wish_tells_nothing_of_what_may_not_be_read(self, opened: Opened) -> None:
        """A device that asks for objects by an attribute that its user may not read gets none, right or wrong."""
        office = opened(rules(read=["title", "owner"]))
        office.service.create("Task", {"title": "roof", "owner": "ann", "secret": MARKER}, "t1")
        for guess in (attribute("secret") == MARKER, ~(attribute("secret") == "x"), attribute("secret").exists()):
            ann = office.device("ann", download={"Task": guess})

            ann.synchronize_all()

            assert contents(ann) == {}
            ann.close()

    @pytest.mark.parametrize("mode", MODES)
    def test_what_may_be_written_only_is_gone_once_it_is_settled(self, opened: Opened, mode: str) -> None:
        """An author who may write an attribute and not read it has it no more when the server has it."""
        office = opened(rules(read=["title", "owner"]))
        ann = office.device("ann")
        ann.create("Task", {"title": "roof", "owner": "ann", "note": "wet"}, "t1")
        MODES[mode](ann)
        ann.update("Task", "t1", {"note": "dry"})
        MODES[mode](ann)

        assert contents(ann) == {"t1": {"title": "roof", "owner": "ann"}}
        assert office.service.get("Task", "t1") == {"title": "roof", "owner": "ann", "note": "dry"}

    def test_a_denied_attribute_refuses_the_operation_and_keeps_it(self, opened: Opened) -> None:
        """Who writes what is not theirs to write gets all of the operation back, in a failure that names it."""
        office = opened(rules(write=["title", "owner", "note"]))
        ann = office.device("ann")
        ann.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        ann.update("Task", "t1", {"note": "wet", "count": 9})

        failure = the_failure(ann.synchronize_all())

        assert failure.reason == FailureReason.ATTRIBUTE_DENIED
        assert "'count'" in failure.message
        assert failure.attributes == {"note": "wet", "count": 9}
        assert contents(ann) == {"t1": {"title": "roof", "owner": "ann"}}


# --- nothing that may not be read is on the wire ------------------------------------------


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Give all that replicas receive from now on."""
    found: list[bytes] = []
    receive = connection.Stream.receive

    def receive_and_keep(stream: connection.Stream) -> bytes | None:
        data = receive(stream)
        found.append(data or b"")
        return data

    monkeypatch.setattr(connection.Stream, "receive", receive_and_keep)
    return found


class TestPrivate:
    @pytest.mark.parametrize("mode", MODES)
    def test_no_synchronization_brings_what_may_not_be_read(
        self, opened: Opened, received: list[bytes], mode: str
    ) -> None:
        """Hidden objects and attributes are in no byte that a replica gets, in whatever mode, as things change."""
        application = rules(read=["title", "owner", "note"], check=attribute("owner").exists())

        @application.after_commit("Task")
        def write_the_secret(task: HookObject, context: HookContext) -> None:
            if task["secret"] != f"{MARKER} {task['title']}":
                context.update("Task", task.id, {"secret": f"{MARKER} {task['title']}"})

        office = opened(application)
        ann = office.device("ann")
        for id_ in ("hidden-1", "hidden-2"):
            office.service.create("Task", {"title": f"{MARKER} {id_}", "owner": "bob"}, id_)
        for id_ in ("t1", "t4"):
            ann.create("Task", {"title": id_, "owner": "ann"}, id_)
        changes: list[Callable[[], None]] = [
            lambda: None,
            lambda: office.service.update("Task", "hidden-1", {"note": MARKER}),
            lambda: ann.update("Task", "t1", {"note": "mine"}),
            lambda: office.service.update("Task", "t1", {"owner": "bob", "note": MARKER}),
            lambda: office.service.delete("Task", "hidden-1"),
            lambda: office.service.update("Task", "t1", {"owner": "ann", "note": "back"}),
            lambda: ann.update("Task", "t1", {"owner": "bob"}),
        ]
        for change in changes:
            change()
            MODES[mode](ann)
        ann.synchronize_all()

        assert len(received) > 8
        assert "t4" in contents(ann)
        assert not any(MARKER.encode() in data for data in received)
        # What is hidden gives away no id either, unless somebody asked for it.
        assert mode == "selected" or not any(b"hidden-" in data for data in received)

    def test_no_refusal_tells_what_may_not_be_read(self, opened: Opened, received: list[bytes]) -> None:
        """Refusals about hidden objects read as if those were not there; only a unique value is told to be taken."""
        application = rules(read=["title", "owner"])
        application.allow("clerk", "Line", create=True, write="*")
        office = opened(application)
        hidden = {"title": "taken", "owner": "bob", "note": MARKER, "secret": MARKER}
        office.service.create("Task", hidden, "hidden")
        office.service.create("Task", {**hidden, "title": MARKER}, "hidden too")
        office.service.create("Task", {"title": "seen", "owner": "ann", "secret": MARKER}, "seen")
        office.service.create("Seal", {"task": "seen"}, f"seal-{MARKER}")
        ann = office.device("ann")
        ann.synchronize_all()
        ann.create("Task", {"title": "taken", "owner": "ann"}, "t1")
        ann.create("Task", {"title": "x", "owner": "ann"}, "hidden too")
        ann.create("Line", {"task": "hidden", "text": "to what is hidden"})
        ann.create("Line", {"task": "nowhere", "text": "to what is not there"})
        ann.delete("Task", "seen")

        report = ann.synchronize_all()

        reasons = {failure.entity + failure.object_id[:6]: failure.reason for failure in report.failures}
        assert reasons["Taskt1"] == FailureReason.UNIQUE_VIOLATED
        assert reasons["Taskseen"] == FailureReason.REFERENCED
        lines = [one for one in report.failures if one.entity == "Line"]
        assert {one.reason for one in lines} == {FailureReason.DANGLING_REFERENCE}
        hidden_message, missing_message = (
            one.message.replace(one.object_id, "ID").replace(str(one.attributes["task"]), "TASK") for one in lines
        )
        assert hidden_message == missing_message
        assert not any(MARKER.encode() in data for data in received)
        shown = b"".join(one.SerializeToString() for one in office.failures("ann"))
        assert MARKER.encode() not in shown

    def test_online_reads_show_what_a_synchronization_would(self, opened: Opened) -> None:
        """GetObject, ListObjects and GetFailure hold no byte of what the caller may not read, nor do their errors."""
        office = opened(rules(read=["title", "owner"]))
        office.service.create("Task", {"title": "seen", "owner": "ann", "secret": MARKER}, "seen")
        office.service.create("Task", {"title": MARKER, "owner": "bob"}, "hidden")
        ann = office.device("ann")
        ann.synchronize_all()
        ann.update("Task", "seen", {"title": MARKER + "?"})
        office.service.update("Task", "hidden", {"title": MARKER + "?"})
        ann.update("Task", "seen", {"owner": "bob"})
        ann.synchronize_all()
        channel = office.world.channel()
        objects, failures = object_pb2_grpc.ObjectServiceStub(channel), failure_pb2_grpc.FailureServiceStub(channel)
        metadata = (("authorization", "Bearer ann"),)

        answers: list[Any] = [
            objects.ListObjects(object_pb2.ListObjectsRequest(entity="Task"), metadata=metadata),
            objects.GetObject(object_pb2.GetObjectRequest(entity="Task", id="seen"), metadata=metadata),
        ]
        answers += [
            failures.GetFailure(failure_pb2.GetFailureRequest(id=one.id), metadata=metadata).present
            for one in office.failures("ann")
        ]
        assert [one.id for one in answers[0].objects] == ["seen"]
        assert len(answers) > 2
        assert not any(MARKER.encode() in answer.SerializeToString() for answer in answers)
        hidden, missing = (
            _error(partial(objects.GetObject, _get(id_), metadata=metadata)) for id_ in ("hidden", "nowhere")
        )
        assert hidden.replace("hidden", "ID") == missing.replace("nowhere", "ID")
        where = (attribute("secret") == MARKER).to_message()
        request = object_pb2.ListObjectsRequest(entity="Task", where=where)
        assert "'secret'" in _error(lambda: objects.ListObjects(request, metadata=metadata))

    def test_the_failures_of_others_are_theirs(self, opened: Opened) -> None:
        """Somebody sees the failures of their own operations; an operator sees all."""
        office = opened(rules())
        bob = office.device("bob")
        bob.create("Task", {"title": "x", "owner": "ann", "note": MARKER}, "t1")
        failure = the_failure(bob.synchronize_all())

        assert office.failures("ann") == []
        assert [one.id for one in office.failures("bob")] == [failure.id]
        assert [one.id for one in office.failures("otto")] == [failure.id]


def _get(id_: str) -> object_pb2.GetObjectRequest:
    return object_pb2.GetObjectRequest(entity="Task", id=id_)


def _error(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return f"{raised.value.code()} {raised.value.details()}"


# --- references ---------------------------------------------------------------------------


class TestReferences:
    @pytest.fixture
    def office(self, opened: Opened) -> Office:
        """Give an office where Ann sees tasks only, and Bob all; one task with lines, a memo and no seal."""
        application = Application(schema=SCHEMA, operators=["operator"])
        application.allow("clerk", "Task", create=True, delete=True, write="*")
        application.allow("chief", "*", create=True, delete=True, write="*")
        office = opened(application)
        office.people["bob"] = replace(office.people["bob"], roles=frozenset({"chief"}))
        office.service.create("Task", {"title": "roof"}, "t1")
        for id_ in ("l1", "l2"):
            office.service.create("Line", {"task": "t1", "text": id_}, id_)
        office.service.create("Memo", {"task": "t1", "text": "call"}, "m1")
        for name in ("ann", "bob"):
            office.device(name).synchronize_all()
        return office

    @pytest.mark.parametrize("mode", ["all", "unsynchronized"])
    def test_cascade_and_clear_reach_who_holds_the_objects(self, office: Office, mode: str) -> None:
        """What a deletion takes along or clears is gone or cleared on other devices, seen by its author or not."""
        ann, bob = office.device("ann"), office.device("bob")
        assert contents(ann, "Line") == {}
        ann.delete("Task", "t1")

        MODES[mode](ann)
        bob.synchronize_all()

        assert contents(bob, "Task") == contents(bob, "Line") == {}
        assert contents(bob, "Memo") == {"m1": {"text": "call"}}
        assert contents(ann, "Memo") == {}

    @pytest.mark.parametrize("mode", ["all", "unsynchronized"])
    def test_the_author_of_a_deletion_gets_its_effects_at_once(self, office: Office, mode: str) -> None:
        """What the deletion does to objects that its author holds is on the device after the same synchronization."""
        bob = office.device("bob")
        bob.delete("Task", "t1")
        assert sorted(contents(bob, "Line")) == ["l1", "l2"]

        MODES[mode](bob)

        assert contents(bob, "Line") == {}
        assert contents(bob, "Memo") == {"m1": {"text": "call"}}

    def test_pending_edits_of_what_a_cascade_took_are_kept(self, office: Office) -> None:
        """Who edited a line of a task that somebody deleted has the edit as a failure, and the line no more."""
        ann, bob = office.device("ann"), office.device("bob")
        bob.update("Line", "l1", {"text": "edited"})
        bob.create("Line", {"task": "t1", "text": "new"}, "l3")
        bob.update("Memo", "m1", {"text": "call again"})
        ann.delete("Task", "t1")
        ann.synchronize_all()

        report = bob.synchronize_all()

        assert [(one.object_id, one.reason) for one in report.failures] == [
            ("l1", FailureReason.OBJECT_GONE),
            ("l3", FailureReason.DANGLING_REFERENCE),
        ]
        assert [one.attributes["text"] for one in report.failures] == ["edited", "new"]
        assert contents(bob, "Line") == {}
        assert contents(bob, "Memo") == {"m1": {"text": "call again"}}

    def test_a_restricted_deletion_is_refused_and_the_object_comes_back(self, office: Office) -> None:
        """A deletion that a hidden object forbids is refused without naming it, and everybody keeps everything."""
        office.service.create("Seal", {"task": "t1"}, "the-seal")
        ann, bob = office.device("ann"), office.device("bob")
        ann.delete("Task", "t1")

        failure = the_failure(ann.synchronize_all())
        bob.synchronize_all()

        assert failure.reason == FailureReason.REFERENCED
        assert "the-seal" not in failure.message
        assert contents(ann) == contents(bob) == {"t1": {"title": "roof"}}
        assert sorted(contents(bob, "Line")) == ["l1", "l2"]

    def test_a_group_that_deletes_what_restricts_goes_through(self, office: Office) -> None:
        """Who deletes the seal and the task together, in whatever order, is not restricted by it."""
        office.service.create("Seal", {"task": "t1"}, "s1")
        bob = office.device("bob")
        bob.synchronize_all()
        with bob.transaction(atomic=True) as transaction:
            transaction.delete("Task", "t1")
            transaction.delete("Seal", "s1")

        report = bob.synchronize_all()
        office.device("ann").synchronize_all()

        assert (report.applied, report.rejected) == (2, 0)
        assert contents(office.device("ann")) == contents(bob, "Line") == {}


# --- hooks --------------------------------------------------------------------------------


class TestHooks:
    @pytest.mark.parametrize("mode", ["all", "unsynchronized"])
    def test_what_a_hook_changed_arrives_in_the_same_synchronization(self, opened: Opened, mode: str) -> None:
        """The object itself, another one and a new one, changed by hooks, are on the device when the call returns."""
        application = Application(schema=SCHEMA)

        @application.before_commit("Task")
        def shout(task: HookObject, _context: HookContext) -> None:
            task["title"] = str(task["title"]).upper()

        @application.after_commit("Task")
        def note(task: HookObject, context: HookContext) -> None:
            if context.get("Memo", "last") is not None:
                context.update("Memo", "last", {"text": task["title"]})
            context.create("Line", {"task": task.id, "text": "by the server"}, f"line-{task['title']}")

        @application.after_delete("Task")
        def tidy(task: HookObject, context: HookContext) -> None:
            context.delete("Memo", "last")

        office = opened(application)
        office.service.create("Memo", {"text": ""}, "last")
        ann = office.device("ann")
        ann.synchronize_all()

        ann.create("Task", {"title": "roof"}, "t1")
        MODES[mode](ann)
        assert contents(ann) == {"t1": {"title": "ROOF"}}
        assert contents(ann, "Memo") == {"last": {"text": "ROOF"}}
        assert contents(ann, "Line") == {"line-ROOF": {"task": "t1", "text": "by the server"}}

        ann.delete("Task", "t1")
        MODES[mode](ann)
        assert contents(ann) == contents(ann, "Memo") == contents(ann, "Line") == {}

    @pytest.mark.parametrize("mode", MODES)
    def test_what_a_hook_writes_where_nobody_may_read_stays_there(
        self, opened: Opened, received: list[bytes], mode: str
    ) -> None:
        """A hook may write what its caller may not: with the operation's own transaction, and unseen by the caller."""
        application = rules(read=["title", "owner"])

        @application.before_commit("Task")
        def remember(task: HookObject, context: HookContext) -> None:
            task["secret"] = MARKER
            context.create("Memo", {"text": f"{MARKER} {context.principal.user_id}"})

        office = opened(application)
        ann = office.device("ann")
        ann.create("Task", {"title": "roof", "owner": "ann"}, "t1")
        MODES[mode](ann)

        assert [found.attributes["text"] for found in office.service.query("Memo")] == [f"{MARKER} ann"]
        assert contents(ann) == {"t1": {"title": "roof", "owner": "ann"}}
        assert contents(ann, "Memo") == {}
        assert not any(MARKER.encode() in data for data in received)

    def test_a_rejection_takes_back_what_the_hook_did(self, opened: Opened) -> None:
        """What a hook wrote before it rejects is undone; the device keeps message, code and payload."""
        application = Application(schema=SCHEMA)

        @application.after_commit("Task")
        def only_roofs(task: HookObject, context: HookContext) -> None:
            context.create("Memo", {"text": "seen"})
            if task["title"] != "roof":
                raise Reject("roofs only", code="NO_ROOF")

        office = opened(application)
        ann = office.device("ann")
        ann.create("Task", {"title": "cellar", "count": 1}, "t1")

        failure = the_failure(ann.synchronize_all())

        assert (failure.reason, failure.message) == (FailureReason.HOOK_REJECTED, "roofs only")
        assert failure.attributes == {"title": "cellar", "count": 1}
        assert [one.code for one in office.failures("ann")] == ["NO_ROOF"]
        assert contents(ann) == contents(ann, "Memo") == {}


# --- commit groups ------------------------------------------------------------------------


class TestGroups:
    def test_a_group_is_refused_as_a_whole(self, opened: Opened) -> None:
        """One operation that is refused takes its group back, on the device too; what came before and after stays."""
        office = opened(rules())
        ann = office.device("ann")
        ann.create("Task", {"title": "before", "owner": "ann"}, "t0")
        with ann.transaction(atomic=True) as transaction:
            transaction.create("Task", {"title": "fine", "owner": "ann"}, "t1")
            transaction.update("Task", "t0", {"note": "of the group"})
            transaction.create("Task", {"title": "not mine", "owner": "bob"}, "t2")
        ann.create("Task", {"title": "after", "owner": "ann"}, "t3")

        report = ann.synchronize_all()

        assert (report.applied, report.rejected) == (2, 3)
        assert contents(ann) == {
            "t0": {"title": "before", "owner": "ann"},
            "t3": {"title": "after", "owner": "ann"},
        }
        failure = the_failure(report)
        assert (failure.reason, failure.object_id) == (FailureReason.ACCESS_DENIED, "t2")
        assert [operation.id for operation in failure.group_operations] == ["t1", "t0", "t2"]

    @pytest.mark.slow
    def test_nobody_ever_sees_a_part_of_a_group(self, opened: Opened) -> None:
        """While groups move amounts between objects, no replica and no read of the service sees another sum."""
        application = Application(schema=SCHEMA)
        office = opened(application)
        for number in range(5):
            office.service.create("Task", {"title": str(number), "count": 100}, f"t{number}")
        mover, observer = office.device("ann"), office.device("bob")
        mover.synchronize_all()
        over = threading.Event()

        def move() -> None:
            try:
                for number in range(41):
                    with mover.transaction(atomic=True) as transaction:
                        for place, amount in ((number, -3), (number + 1, 1), (number + 2, 2)):
                            transaction.update("Task", f"t{place % 5}", increment={"count": amount})
                    mover.synchronize_all()
            finally:
                over.set()

        def sums() -> list[int]:
            observer.synchronize_all()
            return [
                sum(found["count"] for found in contents(observer).values()),
                sum(found.attributes["count"] for found in office.service.query("Task")),
            ]

        thread = threading.Thread(target=move)
        thread.start()
        observed = []
        while not over.is_set():
            observed += sums()
        thread.join()
        observed += sums()

        assert mover.pending_count() == 0
        assert office.service.get("Task", "t0") != {"title": "0", "count": 100}
        assert set(observed) == {500}


# --- what is uploaded ---------------------------------------------------------------------


class TestUploads:
    def test_operations_on_what_takes_none_are_refused_until_it_does(self, opened: Opened) -> None:
        """Uploads that are switched off are refused with their payload; until a date they may be taken still."""

        def application(**options: Any) -> Application:
            made = Application(schema=SCHEMA)
            made.synchronize("Task", **options)
            return made

        now = datetime.now(UTC)
        office = opened(application())
        outcomes = []
        offers: list[dict[str, Any]] = [
            {"uploads": False},
            {"uploads": False, "uploads_until": now + timedelta(days=1)},
            {"uploads": False, "uploads_until": now - timedelta(days=1)},
            {},
        ]
        for number, options in enumerate(offers):
            office.deploy(application(**options))
            ann = office.device("ann")
            ann.create("Task", {"title": f"t{number}"}, f"t{number}")
            ann.create("Line", {"text": f"l{number}"}, f"l{number}")
            report = ann.synchronize_all()
            outcomes.append((report.applied, [one.attributes for one in report.failures]))

        assert outcomes == [(1, [{"title": "t0"}]), (2, []), (1, [{"title": "t2"}]), (2, [])]
        assert sorted(contents(office.device("ann"))) == ["t1", "t3"]
