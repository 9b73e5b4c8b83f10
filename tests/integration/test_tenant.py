"""A service and its server in one process: threads, an event loop, and the replicas that get what it does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.builders import World, contents, quick_folder

from tidelog import Entity, InvalidValue, Reference, ResourceClosed, Schema, String, attribute, claim
from tidelog_server import Application, ChangedMeanwhile, HookContext, HookObject, OperationRefused, Principal, Server

THREADS = 4
ROUNDS = 25
WAIT_SECONDS = 30


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder for a server and its replicas."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    """Give a server without rules."""
    with World(folder) as found:
        yield found


class TestReplicas:
    def test_what_a_service_does_reaches_replicas(self, folder: Path) -> None:
        """Creations, updates, deletions and what goes with these come with the next synchronization."""
        schema = Schema(
            [Entity("Order", {"n": String()}), Entity("Line", {"of": Reference("Order", on_delete="cascade")})]
        )
        with World(folder, Application(schema=schema)) as world:
            tenant = world.server.tenant()
            with tenant.transaction() as transaction:
                transaction.create("Order", {"n": "a"}, "o1")
                transaction.create("Order", {"n": "b"}, "o2")
                transaction.create("Line", {"of": "o1"}, "l1")
            replica = world.replica()
            replica.synchronize_all()
            assert contents(replica, "Order") == {"o1": {"n": "a"}, "o2": {"n": "b"}}

            tenant.update("Order", "o2", {"n": "c"})
            tenant.delete("Order", "o1")
            report = replica.synchronize_all()

            assert (report.downloaded, report.removed) == (1, 2)
            assert contents(replica, "Order") == {"o2": {"n": "c"}}
            assert contents(replica, "Line") == {}

    @pytest.mark.parametrize("mode", ["all", "selected"])
    def test_what_a_service_created_comes_whole(self, world: World, mode: str) -> None:
        """No replica takes an object of the service for one of its own, whatever the mode."""
        world.server.tenant().create("Task", {"title": "a"}, "t1")
        replica = world.replica()

        if mode == "all":
            replica.synchronize_all()
        else:
            replica.synchronize_selected([("Task", "t1")])

        assert contents(replica) == {"t1": {"title": "a"}}

    def test_a_device_and_a_service_change_one_object(self, world: World) -> None:
        """Attribute by attribute the last one wins, and increments of both add up."""
        tenant = world.server.tenant()
        replica = world.replica()
        replica.create("Task", {"a": 1, "n": 1}, "t1")
        replica.synchronize_all()

        replica.update("Task", "t1", {"b": "device"}, increment={"n": 1})
        tenant.update("Task", "t1", {"a": "service"}, increment={"n": 1})
        replica.synchronize_all()

        assert contents(replica) == {"t1": {"a": "service", "b": "device", "n": 3}}
        assert tenant.get("Task", "t1") == contents(replica)["t1"]

    def test_a_device_that_saw_something_else_is_refused(self, folder: Path) -> None:
        """With the policy `reject_stale` the change of a service is somebody else's."""
        application = Application()
        application.on_conflict("Task", "reject_stale")
        with World(folder, application) as world:
            replica = world.replica()
            replica.create("Task", {"a": 1}, "t1")
            replica.synchronize_all()
            replica.update("Task", "t1", {"a": 2})
            world.server.tenant().update("Task", "t1", {"a": 3})

            report = replica.synchronize_all()

            assert [str(failure.reason) for failure in report.failures] == ["CONFLICT"]
            assert contents(replica) == {"t1": {"a": 3}}

    def test_what_a_hook_changed_comes_in_the_same_synchronization(self, folder: Path) -> None:
        """A replica sees what a hook made of what a service did, and of what it did itself."""
        application = Application()

        @application.after_commit("Line")
        def total(line: HookObject, context: HookContext) -> None:
            lines = context.query("Line", {"order": line["order"]})
            context.update("Order", line["order"], {"total": sum(found["n"] for _, found in lines)})

        with World(folder, application) as world:
            world.server.tenant().create("Order", {}, "o1")
            world.server.tenant().create("Line", {"order": "o1", "n": 2})
            replica = world.replica()
            replica.synchronize_all()
            assert contents(replica, "Order") == {"o1": {"total": 2}}

            replica.create("Line", {"order": "o1", "n": 3})
            replica.synchronize_unsynchronized()

            assert contents(replica, "Order") == {"o1": {"total": 5}}


class TestThreads:
    def test_threads_that_look_and_write_lose_no_update(self, world: World) -> None:
        """A counter that several threads read and write in transactions, and repeat when told to, misses nothing."""
        tenant = world.server.tenant()
        tenant.create("Counter", {"n": 0}, "c")
        repeated = []

        def count() -> None:
            for _ in range(ROUNDS):
                while True:
                    try:
                        with tenant.transaction() as transaction:
                            found = transaction.get("Counter", "c")
                            assert found is not None
                            transaction.update("Counter", "c", {"n": found["n"] + 1})
                        break
                    except ChangedMeanwhile:
                        repeated.append(True)

        _together(count)

        assert tenant.get("Counter", "c") == {"n": THREADS * ROUNDS}
        assert world.lab.version() == 1 + THREADS * ROUNDS

    def test_increments_of_threads_add_up(self, world: World) -> None:
        """Increments need no look and no repetition."""
        tenant = world.server.tenant()
        tenant.create("Counter", {}, "c")

        def count() -> None:
            for _ in range(ROUNDS):
                tenant.update("Counter", "c", increment={"n": 1})

        _together(count)

        assert tenant.get("Counter", "c") == {"n": THREADS * ROUNDS}

    def test_a_transaction_is_seen_whole_or_not_at_all(self, world: World) -> None:
        """Who reads two objects in one transaction never sees half of what another one did."""
        tenant = world.server.tenant()
        with tenant.transaction() as transaction:
            transaction.create("Account", {"n": 100}, "a")
            transaction.create("Account", {"n": 0}, "b")
        done = threading.Event()
        totals = set()

        def watch() -> None:
            while not done.is_set():
                try:
                    with tenant.transaction() as reading:
                        found = [reading.get("Account", id_) for id_ in "ab"]
                except ChangedMeanwhile:
                    continue
                totals.add(sum(one["n"] for one in found if one is not None))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for _ in range(50):
                with tenant.transaction() as transaction:
                    transaction.update("Account", "a", increment={"n": -1})
                    transaction.update("Account", "b", increment={"n": 1})
        finally:
            done.set()
            watcher.join()

        assert totals <= {100}

    def test_a_hook_that_waits_for_the_store_is_refused(self, folder: Path) -> None:
        """A hook that writes by the tenant, and would wait for itself for ever, is an error; the server goes on."""
        application = Application()

        with World(folder, application) as world:
            tenant = world.server.tenant()

            @application.after_commit("Task")
            def writes(task: HookObject, context: HookContext) -> None:
                tenant.create("Audit", {})

            with pytest.raises(OperationRefused, match="the server's log has the details") as refused:
                tenant.create("Task", {})

            cause = refused.value.__cause__
            assert cause is not None
            assert "a hook writes through its context" in str(cause.__cause__)
            tenant.create("Note", {})

    def test_a_hook_that_reads_while_the_server_is_stopped(self, folder: Path) -> None:
        """A hook under way may ask its server for data on, so that the operation is not refused for the stop."""
        application = Application()
        began, stopped = threading.Event(), threading.Event()

        with World(folder, application) as world:
            server = world.server

            @application.before_commit("Task")
            def reads(task: HookObject, context: HookContext) -> None:
                began.set()
                assert stopped.wait(WAIT_SECONDS)
                assert server.tenant().get("Note", "n1") is None

            with ThreadPoolExecutor(1) as pool:
                created = pool.submit(server.tenant().create, "Task", {}, "t1")
                assert began.wait(WAIT_SECONDS)
                server.stop()
                stopped.set()
                assert created.result(WAIT_SECONDS) == "t1"
            with pytest.raises(ResourceClosed):
                server.tenant()


class TestAsyncio:
    def test_the_event_loop_goes_on(self, folder: Path) -> None:
        """While a transaction of an `async with` waits to be durable, the loop does other things."""
        application = Application()
        released = threading.Event()

        @application.before_commit("Task")
        def waits(task: HookObject, context: HookContext) -> None:
            assert released.wait(timeout=30)

        async def work(world: World) -> int:
            tenant = world.server.tenant()

            async def write() -> int:
                async with tenant.transaction() as transaction:
                    transaction.create("Task", {}, "t1")
                return transaction.version

            writing = asyncio.create_task(write())
            for _ in range(100):
                await asyncio.sleep(0)
            assert not writing.done()
            assert tenant.get("Task", "t1") is None
            released.set()
            version = await writing
            assert [found.id for found in tenant.query("Task")] == ["t1"]
            return version

        with World(folder, application) as world:
            assert asyncio.run(work(world)) == 1

    def test_errors_come_out_of_the_block(self, world: World) -> None:
        """What a plain transaction raises an asynchronous one raises too; a block that raises applies nothing."""
        tenant = world.server.tenant()
        tenant.create("Task", {}, "t1")

        async def work() -> None:
            with pytest.raises(ChangedMeanwhile):  # noqa: PT012 - its end raises
                async with tenant.transaction() as transaction:
                    transaction.get("Task", "t1")
                    tenant.update("Task", "t1", {"n": 1})
            with pytest.raises(KeyError):  # noqa: PT012 - its end raises
                async with tenant.transaction() as transaction:
                    transaction.create("Task", {}, "t2")
                    raise KeyError

        asyncio.run(work())

        assert tenant.get("Task", "t2") is None

    def test_many_at_once(self, world: World) -> None:
        """Transactions of many tasks are all applied, each once."""
        tenant = world.server.tenant()

        async def write(number: int) -> int:
            async with tenant.transaction() as transaction:
                transaction.create("Task", {"number": number}, f"t{number}")
            return transaction.version

        async def work() -> list[int]:
            return await asyncio.gather(*(write(number) for number in range(50)))

        assert sorted(asyncio.run(work())) == list(range(1, 51))


class TestServer:
    def test_a_tenant_needs_a_running_server(self, tmp_path: Path) -> None:
        """Before the start there is none; after the stop it says who closed what."""
        server = Server(Application(), store=tmp_path)
        with pytest.raises(ResourceClosed, match="not running"):
            server.tenant()
        with server:
            tenant = server.tenant()
            objects = tenant.query("Task")
            transaction = tenant.transaction()
        with pytest.raises(ResourceClosed, match="not running"):
            server.tenant()
        with pytest.raises(ResourceClosed), transaction:
            transaction.create("Task", {})
        for use in (lambda: tenant.get("Task", "t1"), lambda: next(objects), lambda: tenant.create("Task", {})):
            with pytest.raises(ResourceClosed):
                use()

    def test_a_tenant_has_a_name_and_its_own_principals(self, world: World) -> None:
        """What can be no tenant, and somebody of another one, are refused."""
        for wrong in ("", "x" * 129, "nul\0"):
            with pytest.raises(InvalidValue):
                world.server.tenant(wrong)
        with pytest.raises(InvalidValue, match="belongs to the tenant 'brick', not to 'acme'"):
            world.server.tenant("acme", principal=Principal("ann", "brick"))

    def test_a_service_acts_on_behalf_of_somebody(self, folder: Path) -> None:
        """A principal is bound by the rules of its roles and claims, the system is not; tenants stay apart."""
        application = Application()
        application.allow("clerk", "Task", create=True, write="*", where=attribute("region") == claim("region"))
        ann = Principal("ann", "acme", frozenset({"clerk"}), {"region": "north"})
        with World(folder, application) as world:
            world.server.tenant("acme").create("Task", {"region": "south"}, "t1")
            world.server.tenant("brick").create("Task", {"region": "north"}, "t1")
            tenant = world.server.tenant("acme", principal=ann)
            tenant.create("Task", {"region": "north"}, "t2")

            assert [found.id for found in tenant.query("Task")] == ["t2"]
            assert tenant.get("Task", "t1") is None
            with pytest.raises(OperationRefused):
                tenant.create("Task", {"region": "south"})


def _together(work: object) -> None:
    barrier = threading.Barrier(THREADS)

    def run() -> None:
        barrier.wait()
        work()  # type: ignore[operator]

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(run) for _ in range(THREADS)]:
            future.result()
