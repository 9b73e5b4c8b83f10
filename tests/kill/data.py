"""Where the servers of a scene keep their data: one of them in a directory, several in a database that they share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random
from typing import Final, Protocol

from tests.object_stores import Bucket, s3_options, s3_stand_in
from tests.postgres import Cluster, running_cluster

from tidelog import Finding
from tidelog_server import ContentStore, LmdbStore, ObjectStoreContents, PostgresStore, verify_store
from tidelog_server._content_store import CONTENTS_DIRECTORY, MARK_NAME
from tidelog_server._store import Store

# What runs statements for somebody; others of the database's processes do not.
_BACKENDS: Final = "SELECT pid FROM pg_stat_activity WHERE datname = '{}' AND backend_type = 'client backend'"


class Data(Protocol):
    """
    What one or several servers serve from.

    Attributes:
        place: What a server is told of it.
        server_count: How many may serve from it at once.
        contents_url: The object store with the contents of files; empty: they are in the directory.
        endpoint: How that is reached.
    """

    place: str
    server_count: int
    contents_url: str
    endpoint: str

    def open(self) -> Store:
        """Open it, when nobody has it open alone."""
        ...

    def verify(self) -> list[Finding]:
        """Return what is wrong."""
        ...

    def content_names(self) -> list[str]:
        """Return the names of the contents of files that are kept: each begins with its hash."""
        ...

    def keep(self) -> None:
        """Keep a copy of all but contents of files, while nobody has it open."""
        ...

    def put_back(self) -> None:
        """Put the copy that was kept in its place, while nobody has it open."""
        ...

    def strike(self, dice: Random) -> str:
        """Kill something beside the servers that they need, or nothing; return what."""
        ...


class DirectoryData:
    """An embedded store."""

    server_count = 1
    contents_url = ""
    endpoint = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = path.with_name(f"{path.name}.kept")
        self.place = str(path)

    def open(self) -> LmdbStore:
        """Open it."""
        return LmdbStore(self._path)

    def verify(self) -> list[Finding]:
        """Return what is wrong."""
        return list(verify_store(self._path))

    def content_names(self) -> list[str]:
        """Return the names of the contents of files that are kept."""
        files = (self._path / CONTENTS_DIRECTORY).rglob("*")
        return [one.name for one in files if one.is_file() and one.name != MARK_NAME]

    def keep(self) -> None:
        """Copy the directory."""
        shutil.copytree(self._path, self._kept)

    def put_back(self) -> None:
        """Put the copy of the directory in its place."""
        shutil.rmtree(self._path)
        shutil.copytree(self._kept, self._path)

    def strike(self, dice: Random) -> str:
        """Kill nothing: a directory has no processes."""
        return ""


class DatabaseData:
    """
    A database and an object store, for two servers.

    Attributes:
        name: The database's.
    """

    server_count = 2

    def __init__(self, cluster: Cluster, name: str, endpoint: str) -> None:
        self._cluster = cluster
        self.name = name
        self._kept = f"{name}_kept"
        self._bucket = Bucket(endpoint)
        self.place = cluster.conninfo(name)
        self.contents_url = self._bucket.url
        self.endpoint = endpoint

    def open(self) -> PostgresStore:
        """Open it."""
        return PostgresStore(self.place)

    def verify(self) -> list[Finding]:
        """Return what is wrong."""
        return list(verify_store(self.place, contents=contents_at(self.contents_url, self.endpoint)))

    def content_names(self) -> list[str]:
        """Return the names of the contents of files that are kept."""
        return [key.rpartition("/")[2] for key in self._bucket.objects()]

    def keep(self) -> None:
        """Copy the database."""
        self._cluster.copy_database(self.name, self._kept)

    def put_back(self) -> None:
        """Put the copy of the database in its place."""
        self._cluster.drop_database(self.name)
        self._cluster.copy_database(self._kept, self.name)

    def strike(self, dice: Random) -> str:
        """Kill a process of the database, or let all of it crash and come back, or leave it alone."""
        match dice.choice(["", "backend", "database"]):
            case "backend":
                return "database process" if self.kill_backend(dice.random()) else ""
            case "database":
                self._cluster.stop("immediate")
                self._cluster.start()
                return "database"
        return ""

    def kill_backend(self, place: float) -> bool:
        """Kill a process that runs statements for somebody, by its place among them; tell whether there was one."""
        pids = sorted(pid for (pid,) in self._cluster.execute(_BACKENDS.format(self.name)))
        return bool(pids) and self._cluster.kill_backend(pids[int(place * len(pids))])


MakeData = Callable[[Path], AbstractContextManager[Data]]


@contextmanager
def directories() -> Iterator[MakeData]:
    """Give what makes an embedded store in a folder."""

    @contextmanager
    def make(folder: Path) -> Iterator[Data]:
        yield DirectoryData(folder / "server")

    yield make


@contextmanager
def databases() -> Iterator[MakeData]:
    """
    Run PostgreSQL and an object store, and give what makes a database and a bucket in them.

    Raises:
        PostgresMissing: There is none that could be run.
    """
    with running_cluster(durable=True) as cluster, s3_stand_in() as endpoint:

        @contextmanager
        def make(folder: Path) -> Iterator[Data]:
            with cluster.database() as conninfo:
                yield DatabaseData(cluster, conninfo.rpartition("/")[2], endpoint)

        yield make


STORES: Final[Mapping[str, Callable[[], AbstractContextManager[MakeData]]]] = {
    "lmdb": directories,
    "postgres": databases,
}


def contents_at(url: str, endpoint: str) -> ContentStore | None:
    """Return the contents of files in an object store; None: they are in the directory of the data."""
    return ObjectStoreContents(url, **s3_options(endpoint)) if url else None
