"""Several server processes over one PostgreSQL and one object store, and what may happen to them and to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.balancer import Balancer
from tests.builders import contents, quick_folder
from tests.kill.children import Child
from tests.kill.data import DatabaseData
from tests.kill.roles import serve_open
from tests.object_stores import s3_stand_in
from tests.postgres import Cluster
from tests.simulation.processes import free_port, wait_until

from tidelog import ServerUnavailable
from tidelog.testing import Proxy
from tidelog_client import Replica
from tidelog_server import Application, ObjectStoreContents, Server

pytestmark = pytest.mark.slow

TASKS = 400
# More than one batch, several times over.
TRANSACTION_TASKS = 20


class Site:
    """Two servers as processes of their own, and the replicas of a test."""

    def __init__(self, folder: Path, data: DatabaseData, cluster: Cluster) -> None:
        self.folder = folder
        self.data = data
        self.cluster = cluster
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(data.server_count)]
        self.servers = [self._served(number) for number in range(data.server_count)]
        self._open = ExitStack()

    def replica(self, name: str, address: str, **options: Any) -> Replica:
        """Open a replica; it is closed with the site."""
        return self._open.enter_context(Replica(self.folder / name, server=address, **options))

    def kill(self, number: int) -> None:
        """Kill a server."""
        assert self.servers[number].kill()

    def start(self, number: int) -> None:
        """Start a server that was killed."""
        self.servers[number] = self._served(number)

    def put_back(self, dump: str) -> None:
        """Put the data back as they were when they were dumped, while no server runs; tell nobody."""
        for number in range(len(self.servers)):
            self.kill(number)
        self.cluster.drop_database(self.data.name)
        self.cluster.create_database(self.data.name)
        self.cluster.load(self.data.name, dump)
        for number in range(len(self.servers)):
            self.start(number)

    def close(self) -> None:
        """End everything, and check what is left."""
        self._open.close()
        for server in self.servers:
            server.kill()
        assert self.data.verify() == []

    def _served(self, number: int) -> Child:
        data = self.data
        return Child(serve_open, data.place, self.addresses[number], data.contents_url, data.endpoint)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Run the stand-in for S3."""
    with s3_stand_in() as endpoint:
        yield endpoint


@pytest.fixture
def site(postgres_cluster: Cluster, s3: str) -> Iterator[Site]:
    """Give two servers over one database and one bucket."""
    with quick_folder() as folder, postgres_cluster.database() as conninfo:
        found = Site(folder, DatabaseData(postgres_cluster, conninfo.rpartition("/")[2], s3), postgres_cluster)
        try:
            yield found
        finally:
            found.close()


@contextmanager
def synchronizing(replica: Replica) -> Iterator[threading.Event]:
    """Synchronize all the time, whatever comes of it; give what is set once it has gone well for the first time."""
    stopped, succeeded = threading.Event(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                replica.synchronize_all(timeout=2)
                succeeded.set()
            except ServerUnavailable:
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield succeeded
    finally:
        stopped.set()
        thread.join()


def test_replicas_that_go_to_either_server(site: Site) -> None:
    """Whichever server each connection leads to, all replicas end with the same objects, counts and files."""
    with Balancer(site.addresses) as balancer:
        replicas = [site.replica(name, balancer.address) for name in "abc"]
        replicas[0].create("Task", {"n": 0}, "shared")
        replicas[0].synchronize_all()
        for replica in replicas[1:]:
            replica.synchronize_all()

        for turn in range(4):
            for number, replica in enumerate(replicas):
                photo = replica.add_file(b"photo %d of %d" % (turn, number))
                replica.create("Task", {"photo": photo}, f"t{turn}-{number}")
                replica.update("Task", "shared", increment={"n": 1})
            for replica in replicas:
                balancer.cut()  # so that the next session is with the next server
                assert replica.synchronize_all().rejected == 0
        for replica in replicas:
            replica.synchronize_all()

        expected = contents(replicas[0])
        assert expected["shared"] == {"n": 12}
        assert len(expected) == 13
        for replica in replicas:
            assert contents(replica) == expected
            with replica.open_file("Task", "t3-1", "photo") as file:
                assert file.read() == b"photo 3 of 1"


def test_a_session_that_goes_on_at_another_server(site: Site) -> None:
    """What is still on its way to a server when a replica goes on at another one comes too late: all counts once."""
    with Proxy(site.addresses[0]) as late, Proxy(late.address) as proxy:
        replica = site.replica("a", proxy.address)
        replica.create("Task", {"n": 0}, "counter")
        replica.synchronize_all()
        for _ in range(TASKS // TRANSACTION_TASKS):
            with replica.transaction() as transaction:
                for _ in range(TRANSACTION_TASKS):
                    transaction.create("Task", {"text": "x" * 1_000})
                    transaction.update("Task", "counter", increment={"n": 1})
        before = late.up.byte_count

        with synchronizing(replica) as succeeded:
            wait_until(lambda: late.up.byte_count > before + 50_000, "the upload does not begin")
            late.up.stall()
            wait_until(lambda: late.up.is_holding, "nothing more comes")
            proxy.target = site.addresses[1]
            proxy.cut()
            succeeded.clear()
            assert succeeded.wait(60)
            late.heal()
            wait_until(lambda: late.open_count == 0, "what was held does not come to its end")

        replica.synchronize_all()
        assert replica.pending_count() == 0
        assert not list(replica.failures())
        other = site.replica("b", site.addresses[0])
        other.synchronize_all()
        assert contents(other) == contents(replica)
        assert contents(other)["counter"] == {"n": TASKS}
        assert len(contents(other)) == TASKS + 1


def kill_server(site: Site) -> None:
    """Kill the server that the replica speaks to."""
    site.kill(0)


def kill_backend(site: Site) -> None:
    """Kill a process of the database."""
    assert site.data.kill_backend(0)


def crash_database(site: Site) -> None:
    """Let the whole database crash, and come back."""
    site.cluster.stop("immediate")
    site.cluster.start()


@pytest.mark.parametrize("happens", [kill_server, kill_backend, crash_database])
def test_whatever_dies_in_the_middle_of_an_upload(site: Site, happens: Callable[[Site], None]) -> None:
    """Nothing is lost and nothing happens twice, and nobody has to do anything about it."""
    with Balancer(site.addresses) as balancer:
        replica, other = site.replica("a", balancer.address), site.replica("b", balancer.address)
        replica.create("Task", {"n": 0}, "counter")
        replica.synchronize_all()
        other.synchronize_all()

        with synchronizing(replica) as succeeded, synchronizing(other):
            for number in range(TASKS // TRANSACTION_TASKS):
                for one in (replica, other):
                    with one.transaction() as transaction:
                        for _ in range(TRANSACTION_TASKS):
                            transaction.create("Task", {"photo": one.add_file(b"photo %d" % number)})
                            transaction.update("Task", "counter", increment={"n": 1})
                if number == TASKS // TRANSACTION_TASKS // 2:
                    happens(site)
            succeeded.clear()
            assert succeeded.wait(60)

        replica.synchronize_all()
        other.synchronize_all()
        replica.synchronize_all()
        assert (replica.pending_count(), other.pending_count()) == (0, 0)
        assert not [*replica.failures(), *other.failures()]
        assert contents(replica) == contents(other)
        assert contents(replica)["counter"] == {"n": 2 * TASKS}
        assert len(contents(replica)) == 2 * TASKS + 1


def test_an_outage_of_the_database(site: Site) -> None:
    """Meanwhile the servers are unavailable and nothing is refused; afterwards they go on by themselves."""
    replica = site.replica("a", site.addresses[0])
    replica.create("Task", {}, "t1")
    replica.synchronize_all()
    replica.create("Task", {}, "t2")

    site.cluster.stop()
    with pytest.raises(ServerUnavailable):
        replica.synchronize_all(timeout=1)
    assert replica.pending_count() == 1
    site.cluster.start()

    report = replica.synchronize_all()
    assert (report.applied, report.rejected) == (1, 0)


def test_a_database_that_was_put_back_silently(site: Site) -> None:
    """Servers that were told nothing find out, and what the dump lacks is offered again, with its files."""
    replica = site.replica("a", site.addresses[0])
    replica.create("Task", {"n": 0}, "t1")
    replica.synchronize_all()
    dump = site.cluster.run("pg_dump", site.data.place).decode()
    replica.update("Task", "t1", increment={"n": 1})
    replica.create("Task", {"photo": replica.add_file(b"a photo")}, "t2")
    replica.synchronize_all()
    replica.update("Task", "t1", increment={"n": 10})  # pending

    site.put_back(dump)
    report = replica.synchronize_all()

    assert report.server_restored
    assert (report.reoffered, report.applied, report.rejected) == (2, 1, 0)
    other = site.replica("b", site.addresses[1])
    assert not other.synchronize_all().server_restored
    assert contents(other) == contents(replica)
    assert contents(other)["t1"] == {"n": 11}
    with other.open_file("Task", "t2", "photo") as file:
        assert file.read() == b"a photo"
    assert not replica.synchronize_all().server_restored


def test_a_database_that_does_not_answer_holds_up_its_callers_only(
    postgres_cluster: Cluster, postgres_database: str, tmp_path: Path
) -> None:
    """While a database is a black hole the server still answers what needs none."""
    with Proxy(f"127.0.0.1:{postgres_cluster.port}") as proxy:
        place = postgres_database.replace(f"127.0.0.1:{postgres_cluster.port}", proxy.address)
        with (
            Server(Application(), store=place, contents=ObjectStoreContents("memory:///")) as server,
            Replica(tmp_path / "a", server=server.address) as replica,
            grpc.insecure_channel(server.address) as channel,
        ):
            replica.create("Task", {}, "t1")
            replica.synchronize_all()
            replica.create("Task", {}, "t2")
            proxy.stall()
            try:
                with synchronizing(replica):
                    wait_until(lambda: proxy.up.is_holding, "nobody asks the database")
                    stub: Any = health_pb2_grpc.HealthStub(channel)
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                    assert replica.pending_count() == 1
            finally:
                proxy.heal()
            assert replica.synchronize_all().applied <= 1
            assert replica.pending_count() == 0
