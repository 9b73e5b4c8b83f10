"""
What is forced to disk, and when.

Whatever a process has committed outlives it, synced or not: only a loss of power shows the
difference. So what is looked at here is what LMDB is told, and the order of syncs and commits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.builders import TENANT, Cabinet, Lab, wanted

from tidelog._contents import content_path
from tidelog._environment import Environment
from tidelog_client import Replica
from tidelog_server import LmdbStore
from tidelog_server._file_records import content_record


def flags(environment: Environment) -> dict[str, bool]:
    """Return by what LMDB decides what it forces to disk, and when."""
    found = environment._shared.opened.flags()
    return {name: found[name] for name in ("sync", "metasync", "writemap", "map_async")}


FULL = {"sync": True, "metasync": True, "writemap": False, "map_async": False}


def test_a_replica_with_full_durability(tmp_path: Path) -> None:
    """Unless it is told otherwise a replica waits for both syncs of a commit."""
    with Replica(tmp_path / "default") as by_default, Replica(tmp_path / "full", durability="full") as full:
        assert flags(by_default._storage.environment) == flags(full._storage.environment) == FULL


def test_a_relaxed_replica(tmp_path: Path) -> None:
    """A relaxed replica leaves out the last sync of a commit only: order and integrity rest on the other one."""
    with Replica(tmp_path / "relaxed", durability="relaxed") as replica:
        assert flags(replica._storage.environment) == {**FULL, "metasync": False}


def test_a_server(tmp_path: Path) -> None:
    """A server's store waits for both syncs of a commit: what it answers is on disk."""
    with closing(LmdbStore(tmp_path / "store")) as store:
        assert flags(store._environment) == FULL


class Disk:
    """
    Notes which files were forced to disk when something was committed.

    Attributes:
        synced_before: The inodes that were synced before the commit began that told of something.
    """

    def __init__(self, patch: pytest.MonkeyPatch, is_told: Callable[[], bool]) -> None:
        self.synced_before: set[int] | None = None
        synced: set[int] = set()
        sync, write = os.fsync, Environment.write

        def noted_sync(descriptor: int) -> None:
            sync(descriptor)
            synced.add(os.fstat(descriptor).st_ino)

        def noted_write(environment: Environment, work: Callable[[Any], Any]) -> Any:
            before = set(synced)
            result = write(environment, work)
            if self.synced_before is None and is_told():
                self.synced_before = before
            return result

        patch.setattr(os, "fsync", noted_sync)
        patch.setattr(Environment, "write", noted_write)

    def had(self, path: Path) -> bool:
        """Tell whether a file, or directory, was on disk before the commit that tells of it."""
        assert self.synced_before is not None
        return path.stat().st_ino in self.synced_before


def test_a_content_is_on_disk_before_the_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is attached, and its name in its directory, are on disk before the operation that refers to it."""
    with Replica(tmp_path / "replica") as replica:
        disk = Disk(monkeypatch, lambda: bool(list(replica.pending())))
        with replica.transaction() as transaction:
            transaction.create("Task", {}, "t1")
            transaction.attach("Task", "t1", "photo", b"photo")
        path = tmp_path / "replica" / "files" / content_path(wanted(b"photo").sha256)

        assert disk.had(path)
        assert disk.had(path.parent)


def test_a_content_is_on_disk_before_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A content that was uploaded, and its name in its directory, are on disk before the server has it on record."""
    with closing(LmdbStore(tmp_path / "store")) as store:
        cabinet = Cabinet(Lab(store=store), tmp_path / "contents")

        def is_on_record() -> bool:
            with store.read(TENANT) as reader:
                return content_record(wanted(b"photo").sha256, reader.index) is not None

        disk = Disk(monkeypatch, is_on_record)
        cabinet.upload(b"photo")
        path = cabinet.path(b"photo")

        assert disk.had(path)
        assert disk.had(path.parent)
