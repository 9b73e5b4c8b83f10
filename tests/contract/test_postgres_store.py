from __future__ import annotations

import gc
import itertools
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from tests.builders import REPLICA_A, TENANT, Lab, create, said, update
from tests.contract.store_contract import (
    UNBOUNDED,
    Job,
    Refusal,
    StoreContract,
    ids_of,
    make_change,
    make_state,
    make_writes,
    task,
    writing,
)
from tests.interrupts import Interrupted, run_interrupted
from tests.postgres import Cluster, running_cluster

from tidelog import (
    Entity,
    FormatUnsupported,
    Integer,
    InvalidValue,
    Reference,
    ResourceClosed,
    Schema,
    StorageError,
    String,
)
from tidelog.testing import Proxy
from tidelog_server import Application, HookContext, HookObject, PostgresStore, ServerOutdated, StoreUnavailable
from tidelog_server import _postgres_connection as postgres_connection
from tidelog_server import _postgres_store as postgres_store
from tidelog_server._attempts import Attempt
from tidelog_server._outcomes import Status
from tidelog_server._postgres_connection import Transaction
from tidelog_server._postgres_entry import Entry, TenantState
from tidelog_server._postgres_writer import Writer
from tidelog_server._records import Writes
from tidelog_server._store import Reader

POLL_SECONDS: Final = 0.01
WAIT_SECONDS: Final = 30


def run_of(conninfo: str) -> bytes:
    """Return which life of a store this is."""
    with closing(PostgresStore(conninfo)) as store, store.read(TENANT) as reader:
        return reader.run()


@pytest.mark.usefixtures("postgres_cluster")  # or it is skipped
def test_a_database_that_was_put_back_is_another_run() -> None:
    """A copy of a database is another life of the store, and so is one whose PostgreSQL was started again."""
    names = [f"test_{uuid4().hex}" for _ in range(2)]
    with running_cluster(durable=False) as cluster, cluster.database() as conninfo:
        known = run_of(conninfo)
        assert run_of(conninfo) == known
        first, second = names
        cluster.execute(f"ALTER DATABASE {Path(conninfo).name} RENAME TO {first}")
        cluster.execute(f"CREATE DATABASE {second} TEMPLATE {first}")
        copied = run_of(cluster.conninfo(second))
        cluster.stop()
        cluster.start()

        assert len({known, copied, run_of(cluster.conninfo(first)), run_of(cluster.conninfo(second))}) == 4


class TestPostgresStore(StoreContract):
    databases: dict[Path, str]

    @pytest.fixture(autouse=True)
    def _databases(self, postgres_cluster: Cluster) -> Iterator[None]:
        with ExitStack() as stack:
            self.cluster, self.stack, self.databases = postgres_cluster, stack, {}
            yield

    def open(self, folder: Path) -> PostgresStore:
        """Open the store in the database that stands for a folder."""
        if folder not in self.databases:
            self.databases[folder] = self.stack.enter_context(self.cluster.database())
        return PostgresStore(self.databases[folder])

    def test_statements_stay_prepared(self, store: PostgresStore) -> None:
        """What ends without a commit leaves no statement behind that the driver knows and the database forgot."""
        for _ in range(3):
            store.submit(TENANT, lambda reader: (None, reader.index(b"key"))).result()
            with store.read(TENANT) as reader:
                reader.index(b"key")
            for _ in range(3):
                assert store.note("some name") == b""


@contextmanager
def opened(conninfo: str) -> Iterator[PostgresStore]:
    """Open a store, and close it."""
    store = PostgresStore(conninfo)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(postgres_database: str) -> Iterator[PostgresStore]:
    """Give an empty store."""
    with opened(postgres_database) as found:
        yield found


@pytest.fixture
def other(store: PostgresStore, postgres_database: str) -> Iterator[PostgresStore]:
    """Give the same store as another server has it."""
    with opened(postgres_database) as found:
        yield found


class Gate:
    """A job that holds a tenant's writer up, so that those submitted behind it come together."""

    def __init__(self, store: PostgresStore, tenant: str = TENANT, attempt: Attempt | None = None) -> None:
        entered = threading.Event()
        self._release = threading.Event()

        def holds(reader: Reader) -> tuple[None, None]:
            entered.set()
            self._release.wait(WAIT_SECONDS)
            return None, None

        self.held = store.submit(tenant, holds, attempt)
        assert entered.wait(WAIT_SECONDS)

    def open(self) -> None:
        """Let the writer go on."""
        self._release.set()
        self.held.result(WAIT_SECONDS)


def wait_until(is_so: Callable[[], object]) -> None:
    """Wait for something that is bound to happen."""
    until = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(POLL_SECONDS)


def head(store: PostgresStore, tenant: str = TENANT) -> int:
    """Return a tenant's version."""
    with store.read(tenant) as reader:
        return reader.head().version


def in_first_run(work: Callable[[], object], job: Job) -> tuple[Job, list[int]]:
    """Return a job that does something when it runs first, before it reads, and how often it has run."""
    runs: list[int] = []

    def watched(reader: Reader) -> tuple[Writes | None, Any]:
        runs.append(reader.head().version)
        if len(runs) == 1:
            work()
        return job(reader)

    return watched, runs


class TestGroups:
    def test_jobs_that_wait_are_committed_together(self, store: PostgresStore) -> None:
        """Jobs of a tenant that queue up while its writer is busy are one commit, at the last of their versions."""
        gate = Gate(store)
        futures = [store.submit(TENANT, writing(task(f"t{number}"), result=number)) for number in range(1, 21)]
        gate.open()

        assert [future.result(WAIT_SECONDS) for future in futures] == list(range(1, 21))
        with store.read(TENANT) as reader:
            assert reader.head().version == 20
            assert [version for version in range(1, 21) if reader.commit_id(version)] == [20]
            assert reader.commit_id(20) == reader.head().commit_id

    def test_a_group_is_bounded(self, postgres_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """More jobs than a group may have are several commits."""
        monkeypatch.setattr(postgres_store, "GROUP_JOBS_MAX", 4)
        with opened(postgres_database) as store:
            gate = Gate(store)
            futures = [store.submit(TENANT, writing(task(f"t{number}"))) for number in range(10)]
            gate.open()
            for future in futures:
                future.result(WAIT_SECONDS)

            with store.read(TENANT) as reader:
                assert [version for version in range(1, 11) if reader.commit_id(version)] == [4, 8, 10]

    def test_tenants_do_not_wait_for_each_other(self, store: PostgresStore) -> None:
        """While the writer of one tenant is busy others' jobs are done."""
        gate = Gate(store, "busy")
        waits = store.submit("busy", writing(task("t1"), result="waited"))

        assert store.submit("free", writing(task("t1"), result="done")).result(WAIT_SECONDS) == "done"
        assert not waits.done()
        gate.open()
        assert waits.result(WAIT_SECONDS) == "waited"

    def test_what_the_database_does_not_take(self, store: PostgresStore) -> None:
        """A job whose writes are refused by the database fails alone, and those of its group are done."""
        gate = Gate(store)
        before = store.submit(TENANT, writing(task("t1")))
        bad = store.submit(TENANT, writing(task("a NUL\0 in an id")))
        after = store.submit(TENANT, writing(task("t2")))
        gate.open()

        before.result(WAIT_SECONDS)
        after.result(WAIT_SECONDS)
        with pytest.raises(StorageError) as caught:
            bad.result(WAIT_SECONDS)
        assert not isinstance(caught.value, StoreUnavailable)
        with store.read(TENANT) as reader:
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t1", "t2"]
            assert [change.version for change in reader.changes(0, 10, UNBOUNDED)] == [1, 2]

    def test_what_cannot_be_sent(self, store: PostgresStore) -> None:
        """Writes that make no sense harm neither the store nor whoever shares their transaction."""
        nonsense: Any = make_writes(objects={task("t1"): (None, 0)}, version=1)
        gate = Gate(store)
        bad = store.submit(TENANT, lambda reader: (nonsense, None))
        good = store.submit(TENANT, writing(task("t2")))
        gate.open()

        assert bad.exception(WAIT_SECONDS) is not None
        good.result(WAIT_SECONDS)
        with store.read(TENANT) as reader:
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t2"]


class TestManyServers:
    def test_versions_have_no_holes(self, store: PostgresStore, other: PostgresStore) -> None:
        """Whichever server writes, a tenant's versions follow each other, and each job sees all before it."""

        def work(number: int) -> None:
            one = (store, other)[number % 2]
            for step in range(10):
                one.submit(TENANT, writing(task(f"t{number}-{step}"), task("shared"))).result(WAIT_SECONDS)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

        with store.read(TENANT) as reader:
            changes = reader.changes(0, 1_000, UNBOUNDED)
            assert [change.version for change in changes] == list(range(1, 161))
            shared = [change for change in changes if change.key == task("shared")]
            assert [change.previous for change in shared] == [0, *(change.version for change in shared[:-1])]
            assert len(reader.latest_objects("Task", 0, 1_000, UNBOUNDED).objects) == 81

    def test_a_tenant_that_another_server_makes_just_now(
        self, store: PostgresStore, other: PostgresStore, postgres_database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who found no tenant to be locked, and one when it looked, has locked that before its job sees it."""
        entered, first = Entry._entered, itertools.count(1)

        def late(entry: Entry, transaction: Transaction, tenant: str) -> TenantState:
            if entry is store._entry and next(first) == 1:
                transaction.rows("SELECT")  # by now it has locked what there was
                other.submit(TENANT, writing(task("theirs"))).result(WAIT_SECONDS)
            return entered(entry, transaction, tenant)

        monkeypatch.setattr(Entry, "_entered", late)
        unlocked: list[Any] = []

        def work(reader: Reader) -> Any:
            with psycopg.connect(postgres_database) as looking:
                unlocked.extend(looking.execute("SELECT name FROM tidelog.tenants FOR UPDATE SKIP LOCKED"))
            return writing(task("mine"))(reader)

        store.submit(TENANT, work).result(WAIT_SECONDS)

        assert unlocked == []
        with store.read(TENANT) as reader:
            keys = [(change.version, change.key) for change in reader.changes(0, 10, UNBOUNDED)]
        assert keys == [(1, task("theirs")), (2, task("mine"))]

    def test_a_server_that_comes_to_a_halt(
        self, store: PostgresStore, postgres_database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody waits for ever for a tenant that another server does not let go of; others' jobs are done."""
        monkeypatch.setattr(postgres_connection, "LOCK_SECONDS_MAX", 0.05)
        monkeypatch.setattr("tidelog_server._postgres_writer.RUNS_MAX", 2)
        gate = Gate(store)
        with opened(postgres_database) as other:
            # Where nothing was ever written there is no row to be locked, but one that is being made.
            for tenant in (TENANT, "free", TENANT):
                future = other.submit(tenant, writing(task("t1")))
                if tenant == TENANT:
                    with pytest.raises(StoreUnavailable):
                        future.result(WAIT_SECONDS)
                else:
                    future.result(WAIT_SECONDS)
            gate.open()
            other.submit(TENANT, writing(task("t1"))).result(WAIT_SECONDS)
        assert head(store) == 1

    def test_a_reader_never_passes_over_what_is_still_to_come(
        self, store: PostgresStore, other: PostgresStore
    ) -> None:
        """Where the head of one moment stands, nothing below it appears later: commits come in version order."""
        gate = Gate(store)
        behind = store.submit(TENANT, writing(task("first")))
        there = other.submit(TENANT, writing(task("second")))
        with other.read(TENANT) as reader:
            seen = reader.head().version
        gate.open()
        behind.result(WAIT_SECONDS)
        there.result(WAIT_SECONDS)

        assert seen == 0
        with other.read(TENANT) as reader:
            assert [change.version for change in reader.changes(0, 10, UNBOUNDED)] == [1, 2]

    def test_a_new_tenant_of_two(self, store: PostgresStore, other: PostgresStore) -> None:
        """Two servers that make a tenant at the same moment make one."""
        barrier = threading.Barrier(2)

        def work(one: PostgresStore) -> int:
            barrier.wait(WAIT_SECONDS)
            futures = [one.submit(f"tenant {number}", writing(task("t"))) for number in range(20)]
            return len([future.result(WAIT_SECONDS) for future in futures])

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(work, (store, other))) == [20, 20]
        assert len(store.tenants()) == 20
        assert {head(other, tenant) for tenant in store.tenants()} == {2}

    def test_a_timeline_of_another_server(self, store: PostgresStore, other: PostgresStore) -> None:
        """Who reads or writes after another server began a timeline is of that one, without being told."""
        begun = other.begin_timeline()
        seen: Future[Any] = store.submit(TENANT, lambda reader: (None, reader.identity()))

        assert seen.result(WAIT_SECONDS) == store.identity == begun
        again = other.submit(TENANT, lambda _: (make_writes(timeline="third"), None))
        again.result(WAIT_SECONDS)
        with store.read(TENANT) as reader:
            assert reader.identity() == begun._replace(timeline="third") == store.identity

    def test_a_timeline_ends_with_its_last_transaction(
        self, store: PostgresStore, other: PostgresStore, postgres_cluster: Cluster, postgres_database: str
    ) -> None:
        """A timeline begins once the transactions of the one before it are over, of whatever tenant."""
        gate = Gate(store)
        with ThreadPoolExecutor(1) as pool:
            beginning = pool.submit(other.begin_timeline)
            wait_until(lambda: _waiting_locks(postgres_cluster, postgres_database))
            assert not beginning.done()
            gate.open()
            assert beginning.result(WAIT_SECONDS).timeline != store.identity.timeline

    def test_two_who_begin_a_timeline(self, store: PostgresStore, other: PostgresStore) -> None:
        """Transactions that wait for each other are run again, one of them first."""
        barrier = threading.Barrier(2)
        begun = []

        def beginning(name: str) -> tuple[Job, list[int]]:
            def begin(reader: Reader) -> tuple[Writes, None]:
                begun.append(name)
                return make_writes(timeline=name), None

            return in_first_run(lambda: barrier.wait(WAIT_SECONDS), begin)

        (one, one_runs), (two, two_runs) = beginning("one"), beginning("two")
        futures = [store.submit("a", one), other.submit("b", two)]
        for future in futures:
            future.result(WAIT_SECONDS)

        assert len(one_runs) + len(two_runs) == 3
        with store.read("a") as reader:
            assert reader.identity().timeline == begun[-1]

    def test_while_a_store_is_prepared(self, store: PostgresStore, other: PostgresStore) -> None:
        """While one server makes the store ready it reads and writes, and the others neither read nor write."""
        with store.preparing():
            store.submit(TENANT, writing(task("t1"))).result(WAIT_SECONDS)
            assert head(store) == 1
            with pytest.raises(ServerOutdated):
                head(other)
            with pytest.raises(ServerOutdated):
                other.submit(TENANT, writing(task("t2"))).result(WAIT_SECONDS)

        other.submit(TENANT, writing(task("t3"))).result(WAIT_SECONDS)
        assert head(store) == head(other) == 2

    def test_two_who_prepare(
        self, store: PostgresStore, other: PostgresStore, postgres_cluster: Cluster, postgres_database: str
    ) -> None:
        """Whoever prepares a store waits for the one who does so already."""
        order = []

        def prepare() -> None:
            with other.preparing():
                order.append("other")

        with ThreadPoolExecutor(1) as pool:
            with store.preparing():
                preparing = pool.submit(prepare)
                wait_until(lambda: _waiting_locks(postgres_cluster, postgres_database))
                order.append("store")
            preparing.result(WAIT_SECONDS)
        assert order == ["store", "other"]

    def test_whoever_prepares_without_its_lock(
        self, store: PostgresStore, other: PostgresStore, postgres_cluster: Cluster, postgres_database: str
    ) -> None:
        """Once the connection is lost that keeps the others out, whoever makes the store ready cannot go on."""
        query = "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks WHERE objsubid = 1 AND mode = 'ExclusiveLock'"
        with store.preparing():
            store.set_note("schema", b"1")
            assert store.note("schema") == b"1"
            assert postgres_cluster.execute(query, urlsplit(postgres_database).path[1:]) == [(True,)]

            other.submit(TENANT, writing(task("t1"))).result(WAIT_SECONDS)
            for is_prepared_by_another in (False, True):
                with other.preparing() if is_prepared_by_another else nullcontext():
                    with pytest.raises(ServerOutdated):
                        head(store)
                    with pytest.raises(ServerOutdated):
                        store.submit(TENANT, writing(task("t2"))).result(WAIT_SECONDS)
                    with pytest.raises(StoreUnavailable):
                        store.set_note("schema", b"2")

        assert store.note("schema") == b"1"
        assert head(store) == 1

    def test_a_server_that_is_outdated(self, store: PostgresStore, other: PostgresStore) -> None:
        """A server stops as soon as another one has noted another schema, and goes on if that is taken back."""
        store.set_note("schema", b"1")
        store.require_note("schema", b"1")
        assert other.set_note("schema", b"2", expected=b"1")
        with pytest.raises(ServerOutdated):
            head(store)

        other.set_note("schema", b"1")
        assert head(store) == 0


def _waiting_locks(cluster: Cluster, conninfo: str) -> int:
    database = urlsplit(conninfo).path[1:]
    [(count,)] = cluster.execute("SELECT count(*) FROM pg_locks WHERE NOT granted", database)
    return int(count)


class TestLostConnections:
    """What becomes of a transaction when its connection breaks, wherever it stands."""

    @pytest.fixture
    def proxy(self, postgres_cluster: Cluster) -> Iterator[Proxy]:
        """Give a proxy before the database."""
        with Proxy(f"127.0.0.1:{postgres_cluster.port}") as proxy:
            yield proxy

    @pytest.fixture
    def behind(self, proxy: Proxy, postgres_database: str) -> Iterator[PostgresStore]:
        """Give an empty store behind the proxy."""
        with opened(_by_way_of(proxy.address, postgres_database)) as store:
            yield store

    @pytest.mark.parametrize("swallows", [False, True])
    def test_in_a_job(
        self, store: PostgresStore, postgres_cluster: Cluster, postgres_database: str, *, swallows: bool
    ) -> None:
        """A job whose connection is ended by the database runs again, whatever it made of the error."""

        def job(reader: Reader) -> tuple[Writes | None, str]:
            try:
                return writing(task("t1"), result="done")(reader)
            except StorageError:
                if not swallows:
                    raise
                return make_writes(objects={task("wrong"): (make_state(1), 0)}), "wrong"

        watched, runs = in_first_run(lambda: _end_writers(postgres_cluster, postgres_database), job)
        store.submit(TENANT, writing(task("t0"))).result(WAIT_SECONDS)

        assert store.submit(TENANT, watched).result(WAIT_SECONDS) == "done"
        assert runs == [1, 1]
        with store.read(TENANT) as reader:
            assert ids_of(reader.latest_objects("Task", 0, 10, UNBOUNDED).objects) == ["t0", "t1"]
            assert [change.version for change in reader.changes(0, 10, UNBOUNDED)] == [1, 2]

    def test_before_the_commit_arrives(self, proxy: Proxy, behind: PostgresStore, store: PostgresStore) -> None:
        """A commit that never reached the database is not taken for done: the jobs run again, and count once."""
        job, runs = in_first_run(lambda: proxy.strand(proxy.up), _blind("t1"))
        future = behind.submit(TENANT, job, Attempt(REPLICA_A, 1))
        wait_until(lambda: proxy.up.is_holding)
        assert head(store) == 0
        proxy.cut()

        assert future.result(WAIT_SECONDS) == "done"
        assert len(runs) == 2
        assert head(store) == head(behind) == 1
        assert behind.left_under_way() == []

    def test_after_the_commit(self, proxy: Proxy, behind: PostgresStore, store: PostgresStore) -> None:
        """A commit whose answer got lost is found to be done, and nothing runs twice."""
        job, runs = in_first_run(lambda: proxy.strand(proxy.down), _blind("t1"))
        future = behind.submit(TENANT, job)
        wait_until(lambda: head(store))
        assert not future.done()
        proxy.cut()

        assert future.result(WAIT_SECONDS) == "done"
        assert len(runs) == 1
        assert head(store) == 1

    def test_after_the_commit_of_one_taken_for_dead(  # noqa: PLR0917 - fixtures
        self,
        proxy: Proxy,
        behind: PostgresStore,
        store: PostgresStore,
        postgres_cluster: Cluster,
        postgres_database: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A commit whose answer got lost is found, whatever its server has come to be known by meanwhile."""
        asked = Writer._asked

        def asks_later(self: Writer, *arguments: Any) -> bool:
            behind._presence.put(9, ())
            return asked(self, *arguments)

        monkeypatch.setattr(Writer, "_asked", asks_later)
        known = behind._presence.server
        gate = Gate(behind, "other", Attempt(REPLICA_A, 7))
        _end_presences(postgres_cluster, postgres_database)
        with opened(postgres_database) as finder:
            assert finder.left_under_way()
            job, runs = in_first_run(lambda: proxy.strand(proxy.down), _blind("t1"))
            future = behind.submit(TENANT, job)
            wait_until(lambda: head(store))
            proxy.cut()

            assert future.result(WAIT_SECONDS) == "done"
            assert behind._presence.server != known
            assert len(runs) == 1
            assert head(store) == 1
            gate.open()

    def test_nobody_knows(  # noqa: PLR0917 - fixtures
        self,
        proxy: Proxy,
        behind: PostgresStore,
        store: PostgresStore,
        postgres_cluster: Cluster,
        postgres_database: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """If the database does not know any more what became of a commit, nothing runs again: the owner is told."""
        monkeypatch.setattr("tidelog_server._postgres_writer.ASK_SECONDS_MAX", 10 * WAIT_SECONDS)
        job, runs = in_first_run(lambda: proxy.strand(proxy.down), _blind("t1"))
        future = behind.submit(TENANT, job)
        wait_until(lambda: head(store))
        postgres_cluster.execute("DELETE FROM tidelog.writers", urlsplit(postgres_database).path[1:])
        proxy.cut()

        with pytest.raises(StoreUnavailable):
            future.result(WAIT_SECONDS)
        assert len(runs) == 1
        behind.submit(TENANT, writing(task("t2"))).result(WAIT_SECONDS)
        assert head(behind) == 2

    def test_between_transactions(self, proxy: Proxy, behind: PostgresStore) -> None:
        """Connections that broke while nobody used them are noticed by nobody."""
        behind.submit(TENANT, writing(task("t1")), Attempt(REPLICA_A, 1)).result(WAIT_SECONDS)
        behind.set_note("a", b"x")
        uses: list[Callable[[], object]] = [
            lambda: head(behind),
            lambda: behind.note("a"),
            lambda: behind.submit(TENANT, writing(task("t2")), Attempt(REPLICA_A, 2)).result(WAIT_SECONDS),
        ]
        for use in (*uses, *reversed(uses)):
            proxy.cut()
            wait_until(lambda: not proxy.open_count)
            use()

        assert head(behind) == 3

    def test_an_outage(self, proxy: Proxy, behind: PostgresStore, postgres_cluster: Cluster) -> None:
        """While the database cannot be reached that is said, in no time; afterwards everything goes on by itself."""
        behind.submit(TENANT, writing(task("t1"))).result(WAIT_SECONDS)
        proxy.target = "127.0.0.1:1"
        proxy.cut()

        with pytest.raises(StoreUnavailable):
            head(behind)
        for attempt in (None, Attempt(REPLICA_A, 1)):
            with pytest.raises(StoreUnavailable):
                behind.submit(TENANT, writing(task("t2")), attempt).result(WAIT_SECONDS)
        with pytest.raises(StoreUnavailable):
            behind.note("a")

        proxy.target = f"127.0.0.1:{postgres_cluster.port}"
        behind.submit(TENANT, writing(task("t3")), Attempt(REPLICA_A, 1)).result(WAIT_SECONDS)
        assert head(behind) == 2

    def test_a_hook_that_reads_while_the_database_is_slow(self, proxy: Proxy, behind: PostgresStore) -> None:
        """What the database takes to answer is not the hook's time: the operation is not refused for it."""
        application = Application(hook_seconds_max=0.2)

        @application.before_commit("Task")
        def reads(task: HookObject, context: HookContext) -> None:
            proxy.stall()
            threading.Timer(1, proxy.heal).start()
            assert context.get("Task", "other") is None

        assert said(Lab(application, behind).settle(create(1, "t1"))) == ["APPLIED"]

    def test_an_interrupted_answer(self, store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """A connection on which whoever waited was interrupted is not used any more."""

        class Interrupt(BaseException):
            pass

        def interrupted(*_: Any) -> None:
            raise Interrupt

        with store.read(TENANT) as reader:
            with monkeypatch.context() as patched:
                patched.setattr(psycopg.Cursor, "fetchall", interrupted)
                with pytest.raises(Interrupt):
                    reader.objects([task("t1")])
            with pytest.raises(StoreUnavailable):
                reader.objects([task("t1")])
        assert head(store) == 0

    def test_a_process_that_has_come_to_a_halt(
        self, store: PostgresStore, postgres_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where a process of the database says nothing, but its machine does, whoever waits is told in the end."""
        monkeypatch.setattr(postgres_connection, "SILENCE_SECONDS_MAX", 0.3)
        with store.read(TENANT) as reader:
            [(pid,)] = reader._rows("SELECT pg_backend_pid()")
            others = ThreadPoolExecutor(1)
            with postgres_cluster.halted(pid):
                with pytest.raises(StoreUnavailable, match="said nothing"):
                    others.submit(reader.objects, [task("t1")]).result(WAIT_SECONDS)
                assert others.submit(head, store).result(WAIT_SECONDS) == 0
            others.shutdown()
        assert store._readers._places.qsize() == postgres_store.READ_CONNECTIONS_MAX

    def test_interrupted_reads(self, store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever Ctrl-C comes to a read, it leaves nothing taken that others wait for."""
        # The driver complains of what was forgotten before it was closed. Whoever kept that would keep the connection.
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
        monkeypatch.setattr(logging.getLogger("psycopg"), "disabled", True)

        def reads() -> None:
            with store.read(TENANT) as reader:
                assert reader.objects([task("t1")]) == {}

        for place in itertools.count(1):
            error = run_interrupted(reads, place)
            assert error is None or isinstance(error, Interrupted), repr(error)
            was_interrupted = error is not None
            del error
            # In a thread that nobody has to wait for.
            others = ThreadPoolExecutor(1)
            assert others.submit(head, store).result(WAIT_SECONDS) == 0
            others.shutdown()
            if not was_interrupted:
                assert place > 100, "hardly any place was tried"
                break
        gc.collect()  # what the exceptions hold
        assert store._readers._places.qsize() == postgres_store.READ_CONNECTIONS_MAX

    def test_a_job_that_reads_while_the_store_is_closed(self, store: PostgresStore) -> None:
        """A job under way can read on, so that a hook that does is not taken for a broken one."""
        began, closing = threading.Event(), threading.Event()

        def job(reader: Reader) -> tuple[None, int]:
            began.set()
            assert closing.wait(WAIT_SECONDS)
            return None, head(store)

        future = store.submit(TENANT, job)
        assert began.wait(WAIT_SECONDS)
        with ThreadPoolExecutor(1) as pool:
            closed = pool.submit(store.close)
            wait_until(lambda: store._closing)
            with pytest.raises(ResourceClosed):
                head(store)
            closing.set()
            assert future.result(WAIT_SECONDS) == 0
            closed.result(WAIT_SECONDS)

    def test_one_that_is_broken_off_too_often(
        self, store: PostgresStore, postgres_cluster: Cluster, postgres_database: str
    ) -> None:
        """A job whose transaction breaks each time is given up with a typed error, and the next one is done."""
        runs = []

        def job(reader: Reader) -> tuple[Writes | None, Any]:
            runs.append(1)
            _end_writers(postgres_cluster, postgres_database)
            return writing(task("t1"))(reader)

        with pytest.raises(StoreUnavailable):
            store.submit(TENANT, job).result(WAIT_SECONDS)
        assert len(runs) == 5
        store.submit(TENANT, writing(task("t2"))).result(WAIT_SECONDS)
        assert head(store) == 1

    def test_closing_in_an_outage(self, proxy: Proxy, postgres_database: str) -> None:
        """A store can be closed while its database cannot be reached; what waits is told so."""
        store = PostgresStore(_by_way_of(proxy.address, postgres_database))
        gate = Gate(store)
        waits = store.submit(TENANT, writing(task("t1")))
        proxy.target = "127.0.0.1:1"
        proxy.cut()
        closing = threading.Thread(target=store.close)
        closing.start()
        gate._release.set()
        closing.join(WAIT_SECONDS)

        assert not closing.is_alive()
        assert isinstance(waits.exception(0), StoreUnavailable)
        with pytest.raises(ResourceClosed):
            store.submit(TENANT, writing(task("t2")))


def _blind(id: str) -> Job:  # noqa: A002 - the glossary's word
    """Return a job that writes the first version without looking."""
    writes = make_writes(objects={task(id): (make_state(1), 0)}, changes=[make_change(1, task(id))], version=1)
    return lambda reader: (writes, "done")


def _by_way_of(address: str, conninfo: str) -> str:
    return f"postgresql://postgres@{address}{urlsplit(conninfo).path}"


def _end_presences(cluster: Cluster, conninfo: str) -> None:
    """End the sessions by which servers are known to run."""
    query = "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2"
    assert cluster.execute(query, urlsplit(conninfo).path[1:])


def _configure(cluster: Cluster, conninfo: str, setting: str, value: str) -> None:
    """Make a database give all its sessions a setting."""
    cluster.execute(f"ALTER DATABASE {urlsplit(conninfo).path[1:]} SET {setting} TO '{value}'")


def _end_writers(cluster: Cluster, conninfo: str) -> None:
    database = urlsplit(conninfo).path[1:]
    cluster.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        f"WHERE datname = '{database}' AND backend_xid IS NOT NULL"
    )


class TestRoundTrips:
    """How often a batch waits for the database, which may be far away."""

    SCHEMA = Schema(
        [
            Entity("Project", {"name": String()}),
            Entity(
                "Task",
                {"code": Integer(), "who": String(), "project": Reference("Project", on_delete="restrict")},
                unique=["code"],
                indexes=["who"],
            ),
        ]
    )

    @pytest.fixture
    def waits(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Note each statement that is waited for."""
        noted: list[str] = []
        rows = postgres_connection.Transaction.rows

        def counted(self: Any, statement: Any, *parameters: Any) -> Any:
            noted.append(statement)
            return rows(self, statement, *parameters)

        monkeypatch.setattr(postgres_connection.Transaction, "rows", counted)
        return noted

    @pytest.mark.parametrize("count", [10, 300])
    def test_a_batch(self, store: PostgresStore, waits: list[str], count: int) -> None:
        """A batch waits for the same few answers, however many objects it creates or changes."""
        session = Lab(Application(schema=self.SCHEMA), store).session()
        session.settle(create(1, "p", {"name": "x"}, entity="Project"))

        def values(number: int, who: str) -> dict[str, Any]:
            return {"code": number, "who": who, "project": "p"}

        seqs = range(2, 2 + count)
        for batch in (
            [create(seq, f"t{seq}", values(seq, "ann")) for seq in seqs],
            [update(seq + count, f"t{seq}", values(seq + 1_000, "bob"), base_version=seq) for seq in seqs],
        ):
            waits.clear()
            results = session.batch(*batch)

            assert {result.status for result in results} == {Status.APPLIED}
            assert len(waits) <= 6, waits


class TestUnderWay:
    """What a server leaves that dies, and who finds it."""

    def test_a_death_leaves_it(self, store: PostgresStore, postgres_database: str) -> None:
        """What was under way in a server that died is found by those that start, as it was announced last."""
        script = textwrap.dedent(f"""
            import os, sys
            from tidelog_server import PostgresStore
            from tidelog_server._attempts import Attempt

            store = PostgresStore(sys.argv[1])

            def job(reader):
                store.announce("other", Attempt({REPLICA_A!r}, 9, 4))
                os._exit(3)

            store.submit("other", job, Attempt({REPLICA_A!r}, 12, alone=True)).result()
        """)
        done = subprocess.run([sys.executable, "-c", script, postgres_database], check=False, timeout=60)
        assert done.returncode == 3

        left = [("other", Attempt(REPLICA_A, 9, 4))]
        for _ in range(2):
            with opened(postgres_database) as following:
                assert following.left_under_way() == left
                with opened(postgres_database) as another:
                    assert another.left_under_way() == [], "one server finds it"
        assert store.left_under_way() == [], "it was running before"
        with opened(postgres_database) as following:
            following.forget_under_way()
            assert following.left_under_way() == []
        with opened(postgres_database) as following:
            assert following.left_under_way() == []

    def test_what_runs_is_not_left(self, store: PostgresStore, postgres_database: str) -> None:
        """What is under way in a server that runs is nobody else's business."""
        gate = Gate(store, attempt=Attempt(REPLICA_A, 7))
        with opened(postgres_database) as another:
            assert another.left_under_way() == []
        gate.open()

    def test_one_that_was_taken_for_dead(
        self, postgres_cluster: Cluster, postgres_database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server whose presence was lost for a moment goes on at once, whoever found what it left."""
        monkeypatch.setattr(postgres_store, "WRITERS", 1)
        with opened(postgres_database) as store:
            gate = Gate(store, attempt=Attempt(REPLICA_A, 7))
            _end_presences(postgres_cluster, postgres_database)
            with opened(postgres_database) as finder:
                assert finder.left_under_way() == [(TENANT, Attempt(REPLICA_A, 7))]
                gate.open()
                store.submit(TENANT, writing(task("t1")), Attempt(REPLICA_A, 8)).result(WAIT_SECONDS)
                assert head(store) == 1

                gate = Gate(store, attempt=Attempt(REPLICA_A, 9))
                query = f"SELECT FROM tidelog.writers WHERE server = {store._presence.server}"
                assert postgres_cluster.execute(query, urlsplit(postgres_database).path[1:]), "its commits are known"
                with opened(postgres_database) as another:
                    assert another.left_under_way() == [], "it is present again"
                gate.open()

    def test_after_a_database_was_put_back(self, postgres_cluster: Cluster, postgres_database: str) -> None:
        """Servers that ran before a database was put back and those that start on it do not wait for each other."""
        PostgresStore(postgres_database).close()
        name = urlsplit(postgres_database).path[1:]
        backup = f"test_{uuid4().hex}"
        postgres_cluster.execute(f"CREATE DATABASE {backup} TEMPLATE {name}")
        with opened(postgres_database) as one, opened(postgres_database) as two:
            postgres_cluster.execute(f"DROP DATABASE {name} WITH (FORCE)")
            postgres_cluster.execute(f"ALTER DATABASE {backup} RENAME TO {name}")
            one.submit(TENANT, writing(task("t1")), Attempt(REPLICA_A, 1)).result(WAIT_SECONDS)
            with ExitStack() as stack:
                started = [stack.enter_context(opened(postgres_database)) for _ in range(2)]
                for number, running in enumerate((two, *started)):
                    attempt = Attempt(REPLICA_A, 2 + number)
                    running.submit(TENANT, writing(task(f"x{number}")), attempt).result(WAIT_SECONDS)
                assert head(one) == 4

    @pytest.mark.parametrize("ends", ["written", "looked", "failed"])
    def test_nothing_is_under_way_afterwards(
        self, store: PostgresStore, postgres_cluster: Cluster, postgres_database: str, ends: str
    ) -> None:
        """Once the future of a job is done the database does not say any more that it is under way."""

        def job(reader: Reader) -> tuple[Writes | None, Any]:
            if ends == "failed":
                raise Refusal
            return writing(task("t1"))(reader) if ends == "written" else (None, None)

        def noted() -> list[tuple[Any, ...]]:
            query = "SELECT attempts FROM tidelog.under_way WHERE attempts <> ''"
            return postgres_cluster.execute(query, urlsplit(postgres_database).path[1:])

        gate = Gate(store, attempt=Attempt(REPLICA_A, 7, 1, alone=True))
        future = store.submit(TENANT, job, Attempt(REPLICA_A, 8))
        assert len(noted()) == 1
        gate.open()
        assert isinstance(future.exception(WAIT_SECONDS), Refusal if ends == "failed" else type(None))

        assert noted() == []


class TestOpening:
    def test_what_is_no_connection_string(self) -> None:
        """What PostgreSQL cannot read as a connection string is refused, without a word of what it holds."""
        with pytest.raises(InvalidValue) as caught:
            PostgresStore("postgresql://ann:secret@host:port/x y")
        assert "secret" not in str(caught.value)

    def test_a_database_that_is_not_there(self, postgres_cluster: Cluster) -> None:
        """A database that cannot be reached, or is not there, is unavailable; no password is told."""
        for conninfo in (
            "postgresql://ann:secret@127.0.0.1:1/tidelog",
            f"postgresql://postgres:secret@127.0.0.1:{postgres_cluster.port}/never_made",
        ):
            with pytest.raises(StoreUnavailable) as caught:
                PostgresStore(conninfo)
            assert "secret" not in str(caught.value)

    def test_a_database_of_something_else(self, postgres_cluster: Cluster, postgres_database: str) -> None:
        """A database in which tidelog's schema holds something else, or another format, is refused."""
        name = urlsplit(postgres_database).path[1:]
        postgres_cluster.execute("CREATE SCHEMA tidelog", name)
        postgres_cluster.execute("CREATE TABLE tidelog.mine ()", name)
        with pytest.raises(FormatUnsupported):
            PostgresStore(postgres_database)

        postgres_cluster.execute("CREATE TABLE tidelog.store AS SELECT 'newer'::text AS format", name)
        with pytest.raises(FormatUnsupported) as caught:
            PostgresStore(postgres_database)
        assert caught.value.found == "newer"

    def test_a_database_that_is_not_utf8(self, postgres_cluster: Cluster) -> None:
        """A database whose encoding is not that of all text is refused."""
        postgres_cluster.execute("DROP DATABASE IF EXISTS plain")
        postgres_cluster.execute(
            "CREATE DATABASE plain TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'"
        )
        with pytest.raises(StorageError, match="UTF8"):
            PostgresStore(postgres_cluster.conninfo("plain"))
        postgres_cluster.execute("DROP DATABASE plain")

    @pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
    def test_several_at_once(self, postgres_cluster: Cluster, postgres_database: str, isolation: str) -> None:
        """Servers that start together on an empty database are of one store, however it would isolate them."""
        _configure(postgres_cluster, postgres_database, "default_transaction_isolation", isolation)
        with ThreadPoolExecutor(4) as pool:
            stores = list(pool.map(PostgresStore, [postgres_database] * 4))

        assert len({store.identity for store in stores}) == 1
        for store in stores:
            store.close()

    def test_text_is_what_it_is(
        self, postgres_cluster: Cluster, postgres_database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Servers agree about text, whatever encoding the database, the environment or the address ask for."""
        with opened(postgres_database) as store:
            store.submit(TENANT, writing(task("é"))).result(WAIT_SECONDS)
        _configure(postgres_cluster, postgres_database, "client_encoding", "LATIN1")
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
        for conninfo in (postgres_database, f"{postgres_database}?client_encoding=LATIN1"):
            with opened(conninfo) as store, store.read(TENANT) as reader:
                assert ids_of(reader.objects([task("é")]).items()) == ["é"]

    def test_what_a_session_needs(self, postgres_cluster: Cluster, postgres_database: str) -> None:
        """Nobody's configuration ends what stands still, or takes long."""
        names = ["statement_timeout", "idle_session_timeout", "transaction_timeout"]
        known = postgres_cluster.execute("SELECT name FROM pg_settings WHERE name LIKE '%timeout'")
        for name in names:
            if (name,) in known:
                _configure(postgres_cluster, postgres_database, name, "100s")
        with closing(postgres_connection.Address(postgres_database).connect()) as connection:
            for name in names:
                [(found,)] = connection.rows("SELECT coalesce(current_setting(%s, true), '0')", name)
                assert found == "0", name

    def test_connections_that_nobody_uses(self, postgres_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Connections that many have read with at once are closed when they have not been used for a while."""
        now = 0.0
        clock = SimpleNamespace(monotonic=lambda: now)
        monkeypatch.setattr("tidelog_server._postgres_connection.time", clock)
        pool = postgres_connection.Pool(postgres_connection.Address(postgres_database), 9)
        many = [pool.take() for _ in range(3)]
        for connection in many:
            pool.give_back(connection)
        assert all(connection.is_usable for connection in many)

        now = 50.0
        pool.give_back(pool.take())
        assert all(connection.is_usable for connection in many)
        now = 70.0
        pool.give_back(pool.take())
        assert [connection.is_usable for connection in many] == [False, False, True]
        pool.close()
        assert not many[2].is_usable

    def test_who_writes_gets_a_connection(self, postgres_cluster: Cluster, postgres_database: str) -> None:
        """Where a database has no more connections to give, those that nobody uses make room for who writes."""
        name = urlsplit(postgres_database).path[1:]
        with opened(postgres_database) as store:
            store.submit(TENANT, writing(task("t1"))).result(WAIT_SECONDS)
        role = f"few_{name}"
        postgres_cluster.execute(f"CREATE ROLE {role} LOGIN", name)
        try:
            postgres_cluster.execute(f"GRANT ALL ON SCHEMA tidelog TO {role}", name)
            for what in ("TABLES", "SEQUENCES"):
                postgres_cluster.execute(f"GRANT ALL ON ALL {what} IN SCHEMA tidelog TO {role}", name)
            with opened(postgres_database.replace("postgres@", f"{role}@", 1)) as store:
                with ExitStack() as stack:
                    for _ in range(3):
                        stack.enter_context(store.read(TENANT))
                postgres_cluster.execute(f"ALTER ROLE {role} CONNECTION LIMIT 4", name)
                with pytest.raises(StoreUnavailable, match="too many connections"):
                    store.submit(TENANT, writing(task("t2"))).result(WAIT_SECONDS)

                # The database's processes end after their connections.
                there = f"SELECT FROM pg_stat_activity WHERE usename = '{role}'"
                wait_until(lambda: len(postgres_cluster.execute(there)) < 4)
                store.submit(TENANT, writing(task("t2"))).result(WAIT_SECONDS)
        finally:
            postgres_cluster.execute(f"DROP OWNED BY {role}", name)
            postgres_cluster.execute(f"DROP ROLE {role}", name)

    def test_nothing_is_left_of_servers(
        self, store: PostgresStore, postgres_cluster: Cluster, postgres_database: str
    ) -> None:
        """A server that is closed leaves nothing of itself, and whoever starts tidies up after those that died."""
        name = urlsplit(postgres_database).path[1:]
        store.submit(TENANT, writing(task("t1")), Attempt(REPLICA_A, 1)).result(WAIT_SECONDS)
        postgres_cluster.execute("INSERT INTO tidelog.writers VALUES (4711, 0, 'x')", name)
        postgres_cluster.execute("INSERT INTO tidelog.under_way VALUES (4711, 0, '')", name)

        with opened(postgres_database):
            for table in ("writers", "under_way"):
                query = f"SELECT DISTINCT server FROM tidelog.{table}"
                assert postgres_cluster.execute(query, name) == [(store._presence.server,)]
        store.close()

        assert postgres_cluster.execute("SELECT count(*) FROM tidelog.writers", name) == [(0,)]
        assert postgres_cluster.execute("SELECT count(*) FROM tidelog.under_way", name) == [(0,)]

    def test_who_has_no_use_for_it(self) -> None:
        """Whoever imports the server without a store in PostgreSQL needs no driver."""
        script = "import sys, tidelog_server; print('psycopg' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

        assert done.stdout.strip() == "False"
