"""Backups of a store, and stores from backups."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tests.builders import TENANT, Lab, World, contents, create, quick_folder, update

from tidelog import FormatUnsupported, ResourceClosed, StorageError, StoreInUse, TargetExists
from tidelog._keys import pack_position
from tidelog_client import Replica
from tidelog_server import (
    Application,
    BackupDamaged,
    LmdbStore,
    Server,
    backup_store,
    restore_store,
    verify_store,
)
from tidelog_server import _lmdb_backup as lmdb_backup


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def store(folder: Path) -> Path:
    """Give the directory of a store with two objects; no server has it open."""
    with_objects(folder / "store", "t1", "t2")
    return folder / "store"


@pytest.fixture
def backup(store: Path, folder: Path) -> Path:
    """Give a backup of that store."""
    backup_store(store, folder / "backup")
    return folder / "backup"


def with_objects(path: Path, *ids: str) -> None:
    """Put tasks into a store."""
    opened = LmdbStore(path)
    Lab(store=opened).settle(*(create(seq, id_) for seq, id_ in enumerate(ids, start=1)))
    opened.close()


def tasks(path: Path) -> list[str]:
    """Return the ids of the tasks in a store."""
    opened = LmdbStore(path)
    try:
        with opened.read(TENANT) as reader:
            return [key[1] for key, _ in reader.entity_objects("Task", "", 100, 1 << 20).objects]
    finally:
        opened.close()


def names(folder: Path) -> set[str]:
    """Return what is in a folder."""
    return {entry.name for entry in folder.iterdir()}


class TestBackup:
    def test_of_a_store_that_nobody_uses(self, backup: Path) -> None:
        """A backup holds what the store holds, and is found sound."""
        assert list(verify_store(backup)) == []
        about = json.loads((backup / "BACKUP").read_text())
        assert about["versions"] == {TENANT: 2}
        assert names(backup) - {"lock.mdb"} == {"BACKUP", "FORMAT", "data.mdb"}

    def test_while_a_server_runs(self, folder: Path) -> None:
        """A server backs up its store as of one moment, and goes on."""
        with World(folder) as world:
            replica = world.replica()
            replica.create("Task", {"n": 1}, "t1")
            replica.synchronize_all()

            world.server.backup(folder / "backup")

            replica.create("Task", {"n": 2}, "t2")
            assert replica.synchronize_all().applied == 1
        restore_store(folder / "backup", folder / "restored")
        assert tasks(folder / "restored") == ["t1"]
        assert tasks(folder / "server") == ["t1", "t2"]

    def test_as_of_one_moment(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is written after the copy was made is not in the backup, however long the rest takes."""
        opened = LmdbStore(folder / "store")
        lab = Lab(store=opened)
        lab.settle(create(1, "t1"))
        check = lmdb_backup._checked_copy

        def writes_before(directory: Path) -> Any:
            lab.settle(create(2, "t2"))
            return check(directory)

        monkeypatch.setattr(lmdb_backup, "_checked_copy", writes_before)
        backup_store(folder / "store", folder / "backup")
        monkeypatch.undo()
        opened.close()

        restore_store(folder / "backup", folder / "restored")
        assert tasks(folder / "restored") == ["t1"]

    @pytest.mark.parametrize("there", ["folder", "file", "link"])
    def test_a_target_that_is_there_is_refused(self, store: Path, folder: Path, there: str) -> None:
        """Nothing is written over, not even an empty folder, or a link to nowhere."""
        target = folder / "target"
        match there:
            case "folder":
                target.mkdir()
            case "file":
                target.write_text("mine")
            case _:
                target.symlink_to(folder / "nowhere")

        with pytest.raises(TargetExists):
            backup_store(store, target)

        assert names(folder) == {"store", "target"}

    def test_a_copy_that_is_not_sound(self, store: Path, folder: Path) -> None:
        """A copy that fails its check never gets the name, and leaves nothing."""
        opened = LmdbStore(store)
        key = b"\0\0\0\1Task\0" + pack_position(1)
        opened._environment.write(lambda transaction: transaction.delete(key, db=opened._databases.by_version))
        opened.close()

        with pytest.raises(StorageError, match="differ"):
            backup_store(store, folder / "backup")

        assert names(folder) == {"store"}

    def test_another_backup_to_the_same_target(self, store: Path, folder: Path) -> None:
        """Two backups do not write to one target at the same time; what a killed one left is written over."""
        unfinished = folder / "backup.unfinished"
        unfinished.mkdir()
        (unfinished / "data.mdb").write_bytes(b"half")
        with FileLock(unfinished / "making.lock"), pytest.raises(TargetExists):
            backup_store(store, folder / "backup")
        assert (unfinished / "data.mdb").read_bytes() == b"half"

        backup_store(store, folder / "backup")
        assert names(folder) == {"store", "backup"}
        assert list(verify_store(folder / "backup")) == []

    def test_of_what_is_no_store(self, folder: Path) -> None:
        """There is no backup of nothing, nor of a replica."""
        with pytest.raises(StorageError):
            backup_store(folder / "nowhere", folder / "backup")
        Replica(folder / "replica").close()
        with pytest.raises(FormatUnsupported):
            backup_store(folder / "replica", folder / "backup")
        assert names(folder) == {"replica"}

    def test_by_a_server_that_does_not_run(self, folder: Path) -> None:
        """A server backs up while it runs."""
        server = Server(Application(), store=folder / "store")

        with pytest.raises(ResourceClosed):
            server.backup(folder / "backup")

    def test_a_backup_is_not_served(self, backup: Path) -> None:
        """A server does not go on from a backup as if it were its store."""
        with pytest.raises(StorageError, match="is a backup"):
            LmdbStore(backup)


class TestRestore:
    def test_a_new_timeline_begins(self, backup: Path, folder: Path) -> None:
        """The restored store holds what the backup holds, under the same epoch and another timeline."""
        before = json.loads((backup / "BACKUP").read_text())

        restored = restore_store(backup, folder / "restored")

        assert restored.epoch == before["epoch"]
        assert restored.former_timeline == before["timeline"] != restored.timeline
        assert (restored.versions, restored.moved_to) == ({TENANT: 2}, None)
        assert tasks(folder / "restored") == ["t1", "t2"]
        opened = LmdbStore(folder / "restored")
        assert opened.identity == (restored.epoch, restored.timeline)
        opened.close()
        assert list(verify_store(folder / "restored")) == []
        assert names(folder / "restored") - {"lock.mdb"} == {"FORMAT", "data.mdb", "server.lock", "under-way"}

    def test_a_backup_can_be_restored_twice(self, backup: Path, folder: Path) -> None:
        """The backup stays as it is; each restore begins a timeline of its own."""
        data = (backup / "data.mdb").read_bytes()

        first, second = (restore_store(backup, folder / name) for name in ("one", "two"))

        assert first.timeline != second.timeline
        assert (backup / "data.mdb").read_bytes() == data

    def test_into_an_empty_folder(self, backup: Path, folder: Path) -> None:
        """An empty folder can be restored to; it may be where another disk is mounted."""
        (folder / "restored").mkdir()
        inode = (folder / "restored").stat().st_ino

        restore_store(backup, folder / "restored")

        assert (folder / "restored").stat().st_ino == inode
        assert tasks(folder / "restored") == ["t1", "t2"]

    def test_what_is_there_is_not_written_over(self, backup: Path, store: Path, folder: Path) -> None:
        """A folder with anything in it is refused, a store as much as a file of somebody's."""
        (folder / "papers").mkdir()
        (folder / "papers" / "letter").write_text("mine")
        for path in (store, folder / "papers"):
            before = names(path)
            with pytest.raises(TargetExists):
                restore_store(backup, path)
            assert names(path) == before
        assert tasks(store) == ["t1", "t2"]

    def test_what_is_there_is_moved_aside(self, backup: Path, store: Path) -> None:
        """If that is wanted, the former store gets another name, and loses nothing."""
        opened = LmdbStore(store)
        Lab(store=opened).settle(create(3, "t3"))
        opened.close()

        restored = restore_store(backup, store, move_aside=True)

        assert restored.moved_to is not None
        assert restored.moved_to.parent == store.parent
        assert tasks(restored.moved_to) == ["t1", "t2", "t3"]
        assert tasks(store) == ["t1", "t2"]

    @pytest.mark.parametrize("move_aside", [False, True])
    def test_a_server_that_runs_is_left_alone(self, backup: Path, store: Path, *, move_aside: bool) -> None:
        """While a server has the directory open nothing is restored to it."""
        opened = LmdbStore(store)

        with pytest.raises(StoreInUse):
            restore_store(backup, store, move_aside=move_aside)

        Lab(store=opened).settle(create(3, "t3"))
        opened.close()
        assert tasks(store) == ["t1", "t2", "t3"]

    def test_a_damaged_backup(self, backup: Path, folder: Path) -> None:
        """A backup in which something is wrong is refused and the findings are named, unless they are accepted."""
        data = (backup / "data.mdb").read_bytes()
        (backup / "data.mdb").write_bytes(data.replace(b"Buy milk", b"Buy silk", 1))

        with pytest.raises(BackupDamaged) as error:
            restore_store(backup, folder / "restored")
        assert [one.kind for one in error.value.findings] == ["file_damaged", "state_differs"]
        assert not (folder / "restored").exists()

        restore_store(backup, folder / "restored", accept_findings=True)
        assert tasks(folder / "restored") == ["t1", "t2"]

    def test_any_other_byte(self, backup: Path, folder: Path) -> None:
        """A backup whose data are not what was copied is refused, wherever they differ."""
        data = (backup / "data.mdb").read_bytes()
        (backup / "data.mdb").write_bytes(data.replace(b"ann", b"eve", 1))

        with pytest.raises(BackupDamaged) as error:
            restore_store(backup, folder / "restored")
        assert [one.kind for one in error.value.findings] == ["file_damaged"]

    def test_a_backup_that_was_cut_off(self, backup: Path, folder: Path) -> None:
        """A backup that lacks its end is refused without being read."""
        with (backup / "data.mdb").open("r+b") as file:
            file.truncate(20_000)

        with pytest.raises(BackupDamaged) as error:
            restore_store(backup, folder / "restored")
        assert "found 20000 bytes" in str(error.value.findings[0])
        (backup / "data.mdb").unlink()
        with pytest.raises(BackupDamaged):
            restore_store(backup, folder / "restored")

    def test_a_note_that_cannot_be_read(self, backup: Path, folder: Path) -> None:
        """A backup whose note cannot be read is refused."""
        (backup / "BACKUP").write_text("{}")

        with pytest.raises(StorageError, match="cannot be read"):
            restore_store(backup, folder / "restored")

    def test_what_is_no_backup(self, store: Path, folder: Path) -> None:
        """A directory that no backup made is refused, a copied store too."""
        shutil.copytree(store, folder / "copy")

        with pytest.raises(StorageError, match="is no backup"):
            restore_store(folder / "copy", folder / "restored")
        with pytest.raises(StorageError, match="is no backup"):
            restore_store(folder / "nowhere", folder / "restored")

    def test_onto_itself(self, backup: Path) -> None:
        """A backup is not restored to where it lies, nor moved aside for that."""
        with pytest.raises(TargetExists):
            restore_store(backup, backup, move_aside=True)
        with pytest.raises(TargetExists):
            restore_store(backup, backup.parent, move_aside=True)
        assert backup.exists()

    def test_a_restore_that_was_broken_off(self, backup: Path, folder: Path) -> None:
        """A server does not begin anew in a directory to which a restore was broken off; the next restore does."""
        (folder / "restored" / "restore.unfinished").mkdir(parents=True)
        (folder / "restored" / "data.mdb").write_bytes(b"half")

        with pytest.raises(StorageError, match="broken off"):
            LmdbStore(folder / "restored")

        restore_store(backup, folder / "restored")
        assert tasks(folder / "restored") == ["t1", "t2"]

    def test_replicas_bring_back_what_the_backup_lacks(self, folder: Path) -> None:
        """After a restore, what replicas had uploaded since the backup is there again."""
        with World(folder) as world:
            replica = world.replica()
            replica.create("Task", {"n": 1}, "t1")
            replica.synchronize_all()
            world.server.backup(folder / "backup")
            replica.update("Task", "t1", {"n": 2})
            replica.create("Task", {"n": 3}, "t2")
            replica.synchronize_all()
            expected = contents(replica)
        restore_store(folder / "backup", folder / "server", move_aside=True)

        with World(folder) as world:
            replica = world.replica()
            replica.synchronize_all()
            assert contents(replica) == expected
            other = world.replica("b")
            other.synchronize_all()
            assert contents(other) == expected
            assert list(replica.verify()) == []
            assert list(verify_store(folder / "server")) == []
            world.lab.settle(update(1, "t1", {"n": 4}))
