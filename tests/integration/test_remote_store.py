"""Servers whose store is reached over a network, so that it may be slow, and that others may serve too."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.builders import quick_folder
from tests.postgres import Cluster
from tests.simulation.processes import wait_until

from tidelog import Entity, Integer, Rename, Schema, ServerUnavailable
from tidelog.testing import Proxy
from tidelog_client import Replica
from tidelog_server import Application, DirectoryContents, PostgresStore, Server

WAIT_SECONDS: Final = 30


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder."""
    with quick_folder() as path:
        yield path


@pytest.mark.parametrize("mode", ["upload", "download", "selected"])
def test_a_database_that_does_not_answer(
    folder: Path, postgres_cluster: Cluster, postgres_database: str, mode: str
) -> None:
    """While a session waits for the database the server answers whoever wants nothing of it, and then goes on."""
    with (
        Proxy(f"127.0.0.1:{postgres_cluster.port}") as proxy,
        ThreadPoolExecutor(1) as pool,
    ):
        store = PostgresStore(f"postgresql://postgres@{proxy.address}{urlsplit(postgres_database).path}")
        contents = DirectoryContents(folder / "files")
        with (
            Server(Application(), store=store, contents=contents) as server,
            Replica(folder / "a", server=server.address) as replica,
            grpc.insecure_channel(server.address) as channel,
        ):
            replica.create("Task", {"n": 1}, "t1")
            replica.synchronize_all()
            if mode == "upload":
                replica.create("Task", {"n": 2}, "t2")
            synchronize = {
                "upload": replica.synchronize_unsynchronized,
                "download": replica.synchronize_all,
                "selected": lambda: replica.synchronize_selected([("Task", "t1")]),
            }[mode]
            health: Any = health_pb2_grpc.HealthStub(channel)

            proxy.stall()
            done = pool.submit(synchronize)
            wait_until(lambda: proxy.up.is_holding, "the session asks the database")
            for _ in range(3):
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_SECONDS)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert not done.done()
            proxy.heal()

            done.result(WAIT_SECONDS)
        store.close()


def test_a_server_of_an_older_schema(folder: Path, postgres_database: str) -> None:
    """Once a server has adopted a newer schema the others refuse for the time being; nothing is lost by that."""
    older = Schema([Entity("Task", {"n": Integer()})], version=1)
    newer = Schema(
        [Entity("Task", {"number": Integer()})],
        version=2,
        renames=[Rename(entity="Task", attribute="n", to="number", version=2)],
    )
    contents = DirectoryContents(folder / "files")
    stores = [PostgresStore(postgres_database) for _ in range(3)]
    with (
        Server(Application(schema=older), store=stores[0], contents=contents) as before,
        Server(Application(schema=older), store=stores[1], contents=contents),
        Replica(folder / "a", server=before.address) as replica,
    ):
        replica.create("Task", {"n": 1}, "t1")
        replica.synchronize_all()

        with Server(Application(schema=newer), store=stores[2], contents=contents, migrate=True) as after:
            replica.create("Task", {"n": 2}, "t2")
            with pytest.raises(ServerUnavailable):
                replica.synchronize_all(timeout=1)
            assert replica.pending_count() == 1

            replica.close()
            with Replica(folder / "a", server=after.address) as moved:
                report = moved.synchronize_all()
            assert (report.applied, report.rejected) == (1, 0)
            assert {found.id: found.attributes for found in after.tenant().query("Task")} == {
                "t1": {"number": 1},
                "t2": {"number": 2},
            }
    for store in stores:
        store.close()
