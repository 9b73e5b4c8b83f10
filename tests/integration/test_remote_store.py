"""A server whose store is reached over a network: what is slow there must not hold up what needs nothing of it."""

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
