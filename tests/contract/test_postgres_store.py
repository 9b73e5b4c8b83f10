from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.contract.store_contract import StoreContract
from tests.postgres import Cluster

from tidelog_server import PostgresStore


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
