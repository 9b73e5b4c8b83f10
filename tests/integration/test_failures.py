"""Failures worked off over gRPC: who sees and does what, pages that fit, and what reaches the devices."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status
from tests.builders import (
    REPLICA_B,
    World,
    contents,
    create,
    group,
    make_operation,
    quick_folder,
    references_schema,
    update,
)

from tidelog import FailureReason, parse_constraint
from tidelog._operation import CommitGroup
from tidelog._patch import Patch
from tidelog._values import decode_map
from tidelog.v1 import failure_pb2, failure_pb2_grpc
from tidelog_client import Replica
from tidelog_server import Application, HookContext, HookObject, Principal, Reject, Server, StaticTokens

OPEN, RETRIED, DISMISSED = (
    failure_pb2.FAILURE_STATUS_OPEN,
    failure_pb2.FAILURE_STATUS_RETRIED,
    failure_pb2.FAILURE_STATUS_DISMISSED,
)


class Picky(Application):
    """
    An application with a hook that refuses tasks without a title, until it is told to take everything.

    Attributes:
        strict: Whether it refuses.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.strict = True
        self.before_commit("Task")(self._look)

    def _look(self, task: HookObject, _context: HookContext) -> None:
        if self.strict and not task["title"]:
            raise Reject("a task needs a title")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for a server and its replicas."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def application() -> Picky:
    """Give an application that refuses tasks without a title."""
    return Picky()


@pytest.fixture
def world(folder: Path, application: Picky) -> Iterator[World]:
    """Give a server of that application."""
    with World(folder, application) as found:
        yield found


def service(world: World) -> failure_pb2_grpc.FailureServiceStub:
    """Return the service."""
    return failure_pb2_grpc.FailureServiceStub(world.channel())


def retry(world: World, failure_id: str, **options: Any) -> list[failure_pb2.RetryResult]:
    """Retry a failure."""
    request = failure_pb2.RetryFailureRequest(id=failure_id, **options)
    return list(service(world).RetryFailure(request).results)


def reason_of(error: grpc.RpcError) -> str:
    """Return the reason that programs branch on."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return str(info.reason)


class TestDevices:
    def test_object_that_its_failed_creation_removed_comes_back(self, world: World, application: Picky) -> None:
        """A device sees by an ordinary synchronization that its refused creation was applied after all."""
        a, b = world.replica("a"), world.replica("b")
        a.create("Task", {"n": 1}, "t1")
        [failure] = a.synchronize_all().failures
        assert contents(a) == {}
        application.strict = False

        [result] = retry(world, failure.id)

        assert result.version == 1
        report = a.synchronize_all()
        assert (report.downloaded, report.confirmed, report.applied, report.rejected) == (1, 0, 0, 0)
        b.synchronize_all()
        assert contents(a) == contents(b) == {"t1": {"n": 1}}
        a.update("Task", "t1", {"n": 2})
        assert a.synchronize_all().applied == 1

    def test_edited_operation_comes_as_it_was_edited(self, world: World) -> None:
        """What the operator made of an update replaces what the device had before."""
        a = world.replica()
        a.create("Task", {"title": "Milk", "n": 1}, "t1")
        a.synchronize_all()
        a.update("Task", "t1", {"title": "", "n": 2})
        [failure] = a.synchronize_all().failures
        assert contents(a) == {"t1": {"title": "Milk", "n": 1}}

        retry(world, failure.id, patch=Patch({"n": 2}).encode(), note="no title")

        a.synchronize_all()
        assert contents(a) == {"t1": {"title": "Milk", "n": 2}}

    def test_pending_work_stays_on_top(self, world: World, application: Picky) -> None:
        """What the device has done meanwhile is replayed on the retried state, not lost under it."""
        a = world.replica()
        a.create("Task", {"title": "Milk"}, "t1")
        a.synchronize_all()
        a.update("Task", "t1", {"title": "", "n": 1})
        [failure] = a.synchronize_all().failures
        a.update("Task", "t1", {"m": 2})
        application.strict = False
        retry(world, failure.id)

        a.synchronize_all()

        assert contents(a) == {"t1": {"title": "", "n": 1, "m": 2}}
        assert world.lab.attributes() == {"title": "", "n": 1, "m": 2}

    def test_repetition_hears_the_former_refusal_then_gets_the_state(self, world: World, application: Picky) -> None:
        """A device that lost the answer is told of the refusal, and shown what became of it in the same session."""
        a = world.replica()
        a.create("Task", {"n": 1}, "t1")
        [refused] = world.lose_answers(a)
        application.strict = False
        retry(world, world.lab.failure(refused).id)

        report = a.synchronize_all()

        assert (report.rejected, report.downloaded) == (1, 1)
        assert report.failures[0].reason is FailureReason.HOOK_REJECTED
        assert contents(a) == {"t1": {"n": 1}}

    def test_dependents_come_with_their_cause(self, folder: Path) -> None:
        """A parent that is retried brings its children back to the device that lost them with it."""
        application = Picky(schema=references_schema({"Line": {"task": "Task"}, "Task": {}}))
        with World(folder, application) as world:
            a = world.replica()
            with a.transaction(atomic=False) as tx:
                tx.create("Task", {}, "t1")
                tx.create("Line", {"task": "t1"}, "l1")
                tx.update("Line", "l1", {"n": 1})
            report = a.synchronize_all()
            assert report.rejected == 3
            application.strict = False
            parent = next(one for one in report.failures if one.entity == "Task")

            results = retry(world, parent.id)

            assert [one.version for one in results] == [1, 2, 3]
            a.synchronize_all()
            assert contents(a, "Line") == {"l1": {"task": "t1", "n": 1}}

    def test_dismissed_failure_changes_nothing(self, world: World) -> None:
        """A device hears nothing of a failure that was dismissed."""
        a = world.replica()
        a.create("Task", {}, "t1")
        [failure] = a.synchronize_all().failures

        service(world).DismissFailure(failure_pb2.DismissFailureRequest(id=failure.id))

        report = a.synchronize_all()
        assert (report.rejected, report.downloaded, report.removed) == (0, 0, 0)
        assert [one.id for one in a.failures()] == [failure.id]


class TestRetry:
    def test_by_many_at_once_happens_once(self, world: World, application: Picky) -> None:
        """However many operators retry one failure at the same moment, one of them does it."""
        world.lab.settle(create(1))
        [refused] = world.lab.settle(update(2, set={"title": ""}, increment={"n": 1}))
        failure_id = world.lab.failure(refused).id
        application.strict = False
        stub = service(world)

        def attempt(_number: int) -> str:
            try:
                stub.RetryFailure(failure_pb2.RetryFailureRequest(id=failure_id))
            except grpc.RpcError as error:
                return reason_of(error)
            return "retried"

        with ThreadPoolExecutor(8) as pool:
            said = sorted(pool.map(attempt, range(16)))

        assert said == ["FAILURE_SETTLED"] * 15 + ["retried"]
        assert world.lab.attributes() == {"title": "", "n": 1}

    def test_refused_again_is_no_error(self, world: World) -> None:
        """The response says why, and the failure stays open."""
        [refused] = world.lab.settle(create(1, set={}))

        [result] = retry(world, world.lab.failure(refused).id)

        assert (result.version, result.failure.status) == (0, OPEN)
        assert FailureReason.of_number(result.reason) is FailureReason.HOOK_REJECTED
        assert result.message == "a task needs a title"

    def test_of_many_dependents_fits_a_message(self, folder: Path) -> None:
        """The results of as many as are retried at once fit, whatever they carried and however they are refused."""
        application = Picky(schema=references_schema({"Line": {"task": "Task"}, "Task": {}}))

        @application.before_commit("Line")
        def complain(_line: HookObject, _context: HookContext) -> None:
            if not application.strict:
                raise Reject("x" * 5_000)

        with World(folder, application) as world:
            lines = [create(n, f"l{n}", {"task": "t1", "x": "x" * 5_000}, entity="Line") for n in range(2, 1_102)]
            session = world.lab.session()
            parent = session.batch(create(1, set={}))[0]
            for start in range(0, len(lines), 500):
                session.batch(*lines[start : start + 500])
            session.held()
            application.strict = False

            results = retry(world, world.lab.failure(parent).id)

        assert len(results) == 1_000
        assert [bool(one.version) for one in results] == [True] + [False] * 999
        assert not any(one.failure.operation for one in results)

    @pytest.mark.parametrize(
        ("method", "request_", "reason"),
        [
            ("RetryFailure", failure_pb2.RetryFailureRequest(id="x"), "REQUEST_INVALID"),
            ("RetryFailure", failure_pb2.RetryFailureRequest(id="{id}", note="é" * 501), "REQUEST_INVALID"),
            ("RetryFailure", failure_pb2.RetryFailureRequest(id="{id}", patch=b"\xc1"), "REQUEST_INVALID"),
            ("RetryFailure", failure_pb2.RetryFailureRequest(id="{id}", patch=b"\x80"), ""),
            ("DismissFailure", failure_pb2.DismissFailureRequest(id="{id}", note="x" * 1001), "REQUEST_INVALID"),
            ("ListFailures", failure_pb2.ListFailuresRequest(since=Timestamp(nanos=-1)), "REQUEST_INVALID"),
            ("ListFailures", failure_pb2.ListFailuresRequest(before=Timestamp(seconds=2**62)), "REQUEST_INVALID"),
            ("ListFailures", failure_pb2.ListFailuresRequest(cause_failure_id="x"), "REQUEST_INVALID"),
        ],
    )
    def test_that_cannot_be_meant(self, world: World, method: str, request_: Any, reason: str) -> None:
        """What a request gets wrong is said, and changes nothing."""
        [refused] = world.lab.settle(create(1, set={}))
        failure = world.lab.failure(refused)
        if getattr(request_, "id", "") == "{id}":
            request_ = type(request_).FromString(request_.SerializeToString())
            request_.id = failure.id
        call = getattr(service(world), method)
        if not reason:
            assert call(request_).results[0].failure.status == OPEN
            return
        with pytest.raises(grpc.RpcError) as caught:
            call(request_)
        assert reason_of(caught.value) == reason
        assert world.lab.failure(refused) == failure


TOKENS: Final = StaticTokens(
    {
        "ann": Principal("ann", roles=frozenset({"clerk"})),
        "bob": Principal("bob", roles=frozenset({"clerk"})),
        "olga": Principal("olga", roles=frozenset({"operator"})),
    }
)


class Shop:
    """
    A server that tells its callers apart, with a failure of ann's.

    Attributes:
        failure: The failure.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.application = Application(operators=["operator"])
        self.application.allow(
            "clerk", "Task", create=True, write=["title"], where=parse_constraint("user == claim.user_id")
        )
        self.application.allow("operator", "Task", read=["title"])
        self.server = stack.enter_context(Server(self.application, store=folder / "server", authenticator=TOKENS))
        self.stub = failure_pb2_grpc.FailureServiceStub(
            stack.enter_context(grpc.insecure_channel(self.server.address))
        )
        replica = stack.enter_context(Replica(folder / "ann", server=self.server.address, token="ann"))
        replica.create("Task", {"title": "Milk", "price": 3}, "t1")
        [self.failure] = replica.synchronize_all().failures

    def call(self, method: str, request: Any, token: str) -> Any:
        """Call a method as a user."""
        return getattr(self.stub, method)(request, metadata=[("authorization", f"Bearer {token}")])

    def refusal(self, method: str, request: Any, token: str) -> str:
        """Call a method as a user, which must be refused; return the reason."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, request, token)
        return reason_of(caught.value)


@pytest.fixture
def shop(folder: Path) -> Iterator[Shop]:
    """Give a shop."""
    with ExitStack() as stack:
        yield Shop(folder, stack)


class TestCallers:
    def test_see_their_own_and_operators_all(self, shop: Shop) -> None:
        """To others a failure is not there; its author and operators see it whole."""
        one, all_ = failure_pb2.GetFailureRequest(id=shop.failure.id), failure_pb2.ListFailuresRequest()

        assert shop.refusal("GetFailure", one, "bob") == "FAILURE_NOT_FOUND"
        assert not shop.call("ListFailures", all_, "bob").failures
        for token in ("ann", "olga"):
            assert shop.call("GetFailure", one, token).failure.operation == shop.failure.operation_bytes
            assert [failure.id for failure in shop.call("ListFailures", all_, token).failures] == [shop.failure.id]

    @pytest.mark.parametrize("spelled", [str.lower, str.upper])
    def test_cannot_tell_hidden_from_absent(self, shop: Shop, spelled: Callable[[str], str]) -> None:
        """The words about somebody else's failure are those about none, however its id is spelled."""
        words = []
        for failure_id in (shop.failure.id, str(uuid.uuid4())):
            with pytest.raises(grpc.RpcError) as caught:
                shop.call("GetFailure", failure_pb2.GetFailureRequest(id=spelled(failure_id)), "bob")
            words.append(str(caught.value.details()).replace(failure_id, "?"))

        assert words == ["there is no failure ?"] * 2

    def test_learn_no_id_from_a_page_token(self, shop: Shop) -> None:
        """Where a list goes on does not tell which failures of others it has passed, and goes on all the same."""
        page = shop.call("ListFailures", failure_pb2.ListFailuresRequest(), "bob")
        token = page.next_page_token

        assert (len(page.failures), bool(token)) == (0, True)
        failure_id = uuid.UUID(shop.failure.id)
        assert failure_id.bytes not in base64.urlsafe_b64decode(token)
        assert not {str(failure_id), failure_id.hex} & {token, token.lower()}
        rest = shop.call("ListFailures", failure_pb2.ListFailuresRequest(page_token=token), "bob")
        assert (len(rest.failures), rest.next_page_token) == (0, "")

    @pytest.mark.parametrize("token", ["ann", "bob"])
    def test_need_to_be_operators_to_work_off(self, shop: Shop, token: str) -> None:
        """Nobody else retries or dismisses, not even the author; whether there is such a failure is not said."""
        for failure_id in (shop.failure.id, "00000000-0000-0000-0000-000000000000"):
            for method, request in (
                ("RetryFailure", failure_pb2.RetryFailureRequest(id=failure_id)),
                ("DismissFailure", failure_pb2.DismissFailureRequest(id=failure_id)),
            ):
                assert shop.refusal(method, request, token) == "OPERATOR_REQUIRED"

    def test_see_the_object_as_far_as_they_may_read_it(self, shop: Shop) -> None:
        """Beside the failure the object is shown with the attributes that the caller may read, or not at all."""
        request = failure_pb2.GetFailureRequest(id=shop.failure.id)
        assert not shop.call("GetFailure", request, "olga").HasField("present")
        shop.server.tenant().create("Task", {"title": "Bread", "price": 2, "user": "bob"}, "t1")

        present = shop.call("GetFailure", request, "olga").present
        assert (decode_map(present.attributes), present.version) == ({"title": "Bread"}, 1)
        assert not shop.call("GetFailure", request, "ann").HasField("present")

    def test_operators_act_as_the_author(self, shop: Shop) -> None:
        """An operator who may write nothing applies what the author may write today."""
        shop.application.users(lambda tenant, user: Principal(user, tenant, frozenset({"boss"})))
        shop.application.allow("boss", "Task", create=True, write="*")
        request = failure_pb2.RetryFailureRequest(id=shop.failure.id)

        [result] = shop.call("RetryFailure", request, "olga").results

        assert result.version == 1
        [action] = shop.call("GetFailure", failure_pb2.GetFailureRequest(id=shop.failure.id), "ann").failure.actions
        assert (action.user_id, action.acted_as) == ("olga", "ann")


DAY: Final = timedelta(days=1)


def at(moment: datetime) -> Timestamp:
    """Return a moment as it is sent."""
    found = Timestamp()
    found.FromDatetime(moment)
    return found


class TestLists:
    @pytest.fixture
    def filled(self, folder: Path) -> Iterator[World]:
        """Give a server with failures of two replicas, of two entities, in every state."""
        application = Picky()
        with World(folder, application) as world:
            world.lab.settle(
                create(1, "a", {}),
                update(2, "a", {"n": 1}),
                update(3, "nowhere", entity="Note"),
                b"\xff",
            )
            world.lab.settle(create(1, "b", {}), create(2, "c", {}), replica=REPLICA_B)
            by_id = {one.object_id: one.id for one in world.lab.failures()}
            stub = service(world)
            stub.DismissFailure(failure_pb2.DismissFailureRequest(id=by_id["b"]))
            application.strict = False
            stub.RetryFailure(failure_pb2.RetryFailureRequest(id=by_id["c"]))
            yield world

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ({}, "? a a b c nowhere"),
            ({"statuses": [OPEN]}, "? a a nowhere"),
            ({"statuses": [RETRIED, DISMISSED]}, "b c"),
            ({"entity": "Task"}, "a a b c"),
            ({"entity": "Task", "object_id": "a"}, "a a"),
            ({"object_id": "nowhere", "entity": "Task"}, ""),
            ({"user_id": "ann"}, "? a a b c nowhere"),
            ({"user_id": "bob"}, ""),
            ({"replica_id": "62626262-6262-6262-6262-626262626262"}, "b c"),
            ({"reasons": [FailureReason.MALFORMED.number, FailureReason.OBJECT_GONE.number]}, "? nowhere"),
            ({"reasons": [FailureReason.DEPENDENCY_FAILED.number]}, "a"),
            ({"since": at(datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC))}, "? a a b c nowhere"),
            ({"since": at(datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC) + DAY)}, ""),
            ({"before": at(datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC))}, ""),
            ({"before": at(datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC) + DAY)}, "? a a b c nowhere"),
        ],
    )
    @pytest.mark.parametrize("page_size", [0, 1])
    def test_are_filtered(self, filled: World, filters: dict[str, Any], expected: str, page_size: int) -> None:
        """Filters add up, whatever the size of a page."""
        found = self.everything(filled, page_size=page_size, **filters)

        assert sorted(one.object_id or "?" for one in found) == expected.split()

    def test_of_what_a_failure_caused(self, filled: World) -> None:
        """The failures that one caused are found by it."""
        cause = next(one for one in self.everything(filled) if (one.object_id, one.cause_failure_id) == ("a", ""))

        [found] = self.everything(filled, cause_failure_id=cause.id.upper())

        assert FailureReason.of_number(found.reason) is FailureReason.DEPENDENCY_FAILED
        got = service(filled).GetFailure(failure_pb2.GetFailureRequest(id=cause.id))
        assert list(got.dependents) == [found.id]

    def test_filter_does_not_shorten_the_scan(self, filled: World) -> None:
        """A small page of what is rare is found in one call, not one failure a call."""
        request = failure_pb2.ListFailuresRequest(page_size=1, statuses=[RETRIED])

        assert len(service(filled).ListFailures(request).failures) == 1

    @staticmethod
    def everything(world: World, **filters: Any) -> list[failure_pb2.SynchronizationFailure]:
        """Return what all pages list."""
        request = failure_pb2.ListFailuresRequest(**filters)
        found: list[failure_pb2.SynchronizationFailure] = []
        while True:
            page = service(world).ListFailures(request)
            assert len(page.failures) <= (request.page_size or 100)
            found += page.failures
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token


@pytest.mark.slow
class TestSizes:
    def test_whatever_is_recorded_can_be_listed(self, world: World) -> None:
        """Records whose JSON is many times their size, or that no message holds, do not stop a list."""
        world.lab.settle(*[create(n, f"t{n}", {"x": "\0" * 100_000}) for n in range(1, 21)])
        large = [make_operation(seq=n, id=f"t{n}", set={"x": "x" * 1_000_000}) for n in range(21, 25)]
        [*_, whole] = world.lab.settle(*group(*large))
        [too_large] = world.lab.settle(create(25, "t25", {"x": "x" * 3_900_000}))

        found = TestLists.everything(world)

        assert len(found) == 22
        assert all(one.operation_json for one in found[:-2] if one.object_id != "t21")
        by_id = {one.id: one for one in found}
        assert not by_id[world.lab.failure(whole).id].group_operations
        first = large[0]._replace(group=CommitGroup(21, 0, 4)).encode()
        assert by_id[world.lab.failure(whole).id].operation == first
        assert by_id[world.lab.failure(too_large).id].message

    def test_failure_and_object_fit_one_message(self, world: World) -> None:
        """A large commit group and its edits beside a large object can be looked at: parts of it give way."""
        world.lab.settle(create(1, set={"title": "x", "y": "y" * 1_000_000}))
        world.lab.settle(update(2, set={"z": "z" * 1_000_000}))
        members = group(
            make_operation("update", seq=3, set={"title": "", "x": "x" * 1_000_000}),
            make_operation(seq=4, id="t2", set={"title": "x", "x": "x" * 900_000}),
        )
        refused, _ = world.lab.settle(*members)
        failure_id = world.lab.failure(refused).id
        retry(world, failure_id, patch=Patch({"title": "", "x": "z" * 1_000_000}).encode())

        got = service(world).GetFailure(failure_pb2.GetFailureRequest(id=failure_id))

        record = world.lab.failure(refused)
        assert got.present.version == 2
        assert got.failure.operation == record.operation == members[0]
        assert record.actions[0].edited_operation
        assert not got.failure.actions[0].edited_operation
        assert list(record.group_operations) == members
        assert not got.failure.group_operations
