from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from uuid import uuid4

import pytest
from tests.builders import TENANT
from tests.contract.store_contract import StoreContract
from tests.postgres import Cluster, running_cluster

from tidelog_server import PostgresStore


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
