"""Backup, restore and verification as commands and between processes: beside a writer, killed, out of room."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from tests.builders import TENANT, TIME_US, Lab, create, quick_folder
from tests.integration.test_cli import fail, read_json, run, serving, started, succeed
from tests.simulation.processes import wait_until

from tidelog import FormatUnsupported, StorageError
from tidelog_client import Replica
from tidelog_server import (
    Application,
    BackupDamaged,
    DirectoryContents,
    LmdbStore,
    Tenant,
    _content_backup,
    _lmdb_backup,
    backup_store,
    restore_store,
    verify_store,
)
from tidelog_server._content_backup import copy_contents
from tidelog_server._content_store import MARK_NAME
from tidelog_server._files import Files
from tidelog_server._place import Place
from tidelog_server._records import Change
from tidelog_server._retention import Periods, Retention
from tidelog_server._sightings import UNKNOWN_KEPT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BACKUPS = 5
RUN_TIMEOUT_SECONDS = 60
KILLED = -9
PHOTO = b"a photo, say" * 5_000

WRITER = """
import sys
from tests.builders import Lab, create, update
from tidelog_server import LmdbStore

lab = Lab(store=LmdbStore(sys.argv[1]))
session = lab.session()
seq = 0
while True:
    ids = [f"t{seq + number}" for number in range(100)]
    session.batch(*(create(seq + number, id_, {"text": "x" * 300}) for number, id_ in enumerate(ids, start=1)))
    seq += 200
    session.batch(*(update(seq - 100 + number, id_, {"n": seq}) for number, id_ in enumerate(ids, start=1)))
    print(seq, flush=True)
"""

# Kills itself where it comes to force something to disk for the n-th time, or where the copy is checked.
KILLED_AT = """
import os, signal, sys
from tidelog_server import _content_backup as content_backup, _lmdb_backup as lmdb_backup

place, work, *paths = sys.argv[1:]
count = 0

def killing(function, at):
    def runs(*args):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return runs

if place == "check":
    lmdb_backup._checked_copy = killing(lmdb_backup._checked_copy, 1)
else:
    lmdb_backup.sync_to_disk = content_backup.sync_to_disk = killing(lmdb_backup.sync_to_disk, int(place))
getattr(lmdb_backup, work)(*paths)
"""

FULL = """
import resource, signal, sys
from tidelog import DiskFull
from tidelog_server import _lmdb_backup as lmdb_backup

work, *paths = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    getattr(lmdb_backup, work)(*paths)
except DiskFull as error:
    print("no room")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder."""
    with quick_folder() as path:
        yield path


@pytest.fixture
def store(folder: Path) -> Path:
    """Give the directory of a store with some objects, one of which refers to a file."""
    opened = LmdbStore(folder / "store")
    lab = Lab(store=opened)
    lab.settle(*(create(seq, f"t{seq}", {"text": "x" * 1_000}) for seq in range(1, 300)))
    files = Files(lab.application, opened, DirectoryContents(folder / "store" / "files"), lambda: TIME_US)
    tenant = Tenant(lab.application, opened, TENANT, None, lambda: TIME_US, files)
    tenant.create("Task", {"photo": tenant.add_file(PHOTO, name="photo.jpg")}, "t300")
    opened.close()
    return folder / "store"


def script(text: str, *args: object) -> subprocess.Popen[str]:
    """Start a program that may use what tests are built from."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, args)],
        cwd=ROOT,
        env={"PYTHONPATH": ":".join(map(str, (ROOT, ROOT / "changelog", ROOT / "server", ROOT / "client")))},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a program; return its exit code and what it printed."""
    with process:
        printed, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    return process.returncode, printed


def history(path: Path) -> list[Change]:
    """Return the change log of a store."""
    opened = LmdbStore(path)
    try:
        with opened.read(TENANT) as reader:
            return reader.changes(0, 1_000_000, 1 << 40)
    finally:
        opened.close()


def contents(path: Path) -> list[bytes]:
    """Return the contents of files that a store has."""
    kept = DirectoryContents(path / "files")
    return [b"".join(kept.read(TENANT, one.sha256, copy=one.copy)) for one in kept.contents(TENANT)]


class TestContents:
    def test_go_along(self, store: Path, folder: Path) -> None:
        """A backup has the contents of files, shared with the store, but no parts; what is restored has its own."""
        DirectoryContents(store / "files").append(TENANT, "apart", 0, b"half of one")

        backup_store(store, folder / "backup")
        restore_store(folder / "backup", folder / "restored")

        for copy in (folder / "backup", folder / "restored"):
            assert contents(copy) == [PHOTO]
            assert list(verify_store(copy)) == []
            assert DirectoryContents(copy / "files").part_size(TENANT, "apart") == 0
            (file,) = (one for one in (copy / "files").rglob("*") if one.is_file() and one.name != MARK_NAME)
            assert file.stat().st_nlink == (2 if copy.name == "backup" else 1)
        with closing(LmdbStore(folder / "restored")) as restored:
            Place(restored, DirectoryContents(folder / "restored" / "files")).look()

    def test_where_files_cannot_share(self, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a file system that cannot give a file two names contents are copied."""

        def cannot(*_: object) -> None:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(Path, "hardlink_to", cannot)
        backup_store(store, folder / "backup")
        restore_store(folder / "backup", folder / "restored")

        shutil.rmtree(store)
        assert contents(folder / "backup") == contents(folder / "restored") == [PHOTO]

    def test_outlive_the_store(self, store: Path, folder: Path) -> None:
        """What becomes of a content in the store, deleted or replaced, does not touch the backup."""
        backup_store(store, folder / "backup")
        kept = DirectoryContents(store / "files")
        (one,) = kept.contents(TENANT)
        kept.delete(TENANT, one.sha256, one.copy)

        assert contents(folder / "backup") == [PHOTO]

    def test_that_are_collected_meanwhile(self, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A content that nothing refers to, and that goes between the copies of data and contents, does no harm."""
        opened = LmdbStore(store)
        now_us = TIME_US
        files = Files(Application(), opened, DirectoryContents(store / "files"), lambda: now_us)
        for _ in range(UNKNOWN_KEPT.days):  # as long as nothing is collected after a restore
            files.note_timeline()
            now_us += timedelta(days=1, hours=1) // timedelta(microseconds=1)
        unneeded = files.add(TENANT, io.BytesIO(b"nobody needs this"))

        def collecting(source: Path, target: Path) -> int:
            nonlocal now_us
            now_us += 1
            never = timedelta.max
            Retention(opened, Periods(never, never, never, timedelta(0)), lambda: now_us, files).collect()
            assert unneeded.sha256 not in {one.sha256 for one in files.contents.contents(TENANT)}
            return copy_contents(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(_lmdb_backup, "copy_contents", collecting)
            backup_store(store, folder / "backup")
        opened.close()
        restore_store(folder / "backup", folder / "restored")

        assert contents(folder / "restored") == [PHOTO]
        assert list(verify_store(folder / "restored")) == []

    def test_that_are_replaced_meanwhile(self, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A damaged content of which a sound copy comes between the copies of data and contents does no harm."""
        opened = LmdbStore(store)
        files = Files(Application(), opened, DirectoryContents(store / "files"), lambda: TIME_US)

        def replacing(source: Path, target: Path) -> int:
            (damaged,) = (one for one in (store / "files").rglob("*") if one.is_file() and one.name != MARK_NAME)
            damaged.write_bytes(b"rot")
            files.add(TENANT, io.BytesIO(PHOTO))
            assert not damaged.exists()
            return copy_contents(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(_lmdb_backup, "copy_contents", replacing)
            backup_store(store, folder / "backup")
        opened.close()

        restore_store(folder / "backup", folder / "restored")

        assert contents(folder / "restored") == [PHOTO]
        assert list(verify_store(folder / "restored")) == []

    def test_that_are_replaced_as_they_are_copied(
        self, store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A content that is uploaded once more between the look at its folder and its copy is in the backup."""
        opened = LmdbStore(store)
        files = Files(Application(), opened, DirectoryContents(store / "files"), lambda: TIME_US)
        linked = _content_backup._link
        replaced: list[object] = []

        def replacing(source: Path, target: Path) -> bool:
            if not replaced:
                replaced.append(files.add(TENANT, io.BytesIO(PHOTO)))
            return linked(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(_content_backup, "_link", replacing)
            backup_store(store, folder / "backup")
        opened.close()

        restore_store(folder / "backup", folder / "restored")

        assert (len(replaced), contents(folder / "restored")) == (1, [PHOTO])

    def test_that_were_lost(self, store: Path, folder: Path) -> None:
        """A backup that lacks a content, or has another one in its place, is refused."""
        backup_store(store, folder / "backup")
        (file,) = (one for one in (folder / "backup" / "files").rglob("*") if one.is_file())
        file.unlink()
        for found in ("content_lost", "content_damaged"):
            with pytest.raises(BackupDamaged) as caught:
                restore_store(folder / "backup", folder / "restored")
            assert [one.kind for one in caught.value.findings] == [found]
            file.write_bytes(PHOTO[:-1] + b"?")


class TestBesideAWriter:
    def test_backups_are_prefixes_of_the_history(self, folder: Path) -> None:
        """Each backup made while another process writes is sound, and holds what had been written when it began."""
        with script(WRITER, folder / "store") as writer:
            try:
                assert writer.stdout is not None
                known = []
                for number in range(BACKUPS):
                    known.append(int(writer.stdout.readline()))
                    backup_store(folder / "store", folder / f"backup-{number}")
            finally:
                writer.kill()
                writer.communicate()

        whole = history(folder / "store")
        assert list(verify_store(folder / "store")) == []
        for number, written in enumerate(known):
            restored = restore_store(folder / f"backup-{number}", folder / f"restored-{number}")
            assert restored.versions[TENANT] >= written
            part = history(folder / f"restored-{number}")
            assert len(part) == restored.versions[TENANT]
            assert part == whole[: len(part)]
            assert list(verify_store(folder / f"restored-{number}")) == []

    def test_verification_beside_a_writer(self, folder: Path) -> None:
        """A store that another process writes to all the time is found sound."""
        with script(WRITER, folder / "store") as writer:
            try:
                assert writer.stdout is not None
                for _ in range(BACKUPS):
                    writer.stdout.readline()
                    assert list(verify_store(folder / "store")) == []
            finally:
                writer.kill()
                writer.communicate()


class TestKilled:
    # Four folders of a content; data.mdb, lock files, FORMAT, BACKUP, files, the folder itself; then, under its name,
    # the folder around it.
    @pytest.mark.parametrize("place", ["check", *range(1, 13)])
    def test_a_backup_that_is_killed(self, store: Path, folder: Path, place: object) -> None:
        """Wherever a backup is killed, its name is free or has all of it; the next one goes well."""
        target = folder / "backup"
        code, _ = finish(script(KILLED_AT, place, "backup_store", store, target))
        assert code == KILLED or target.exists()

        if target.exists():
            assert list(verify_store(target)) == []
            shutil.rmtree(target)
        backup_store(store, target)
        restore_store(target, folder / "restored")
        assert history(folder / "restored") == history(store)
        assert contents(folder / "restored") == contents(target) == [PHOTO]

    @pytest.mark.parametrize("place", ["check", *range(1, 15)])
    def test_a_restore_that_is_killed(self, store: Path, folder: Path, place: object) -> None:
        """Wherever a restore is killed, no server takes a part of it for a store; the next one goes well."""
        backup, target = folder / "backup", folder / "restored"
        backup_store(store, backup)
        code, _ = finish(script(KILLED_AT, place, "restore_store", backup, target))

        if code == KILLED and not (target / "FORMAT").exists():
            with pytest.raises((FormatUnsupported, StorageError)):
                LmdbStore(target)
            restore_store(backup, target)
        elif code == KILLED:
            shutil.rmtree(target / "restore.unfinished", ignore_errors=True)
        assert history(target) == history(store)
        assert contents(target) == contents(backup) == [PHOTO]
        assert list(verify_store(target)) == []

    def test_a_backup_that_is_killed_while_it_copies(self, store: Path, folder: Path) -> None:
        """A backup that is killed in the middle of its copy leaves nothing under its name."""
        target = folder / "backup"
        process = script(
            "import sys; from tidelog_server import backup_store; backup_store(*sys.argv[1:])", store, target
        )
        wait_until(lambda: (folder / "backup.unfinished").exists() or target.exists(), "the copy does not begin")
        process.kill()
        finish(process)

        assert not target.exists() or list(verify_store(target)) == []


class TestFullDisk:
    @pytest.mark.parametrize("work", ["backup_store", "restore_store"])
    def test_no_room_for_a_copy(self, store: Path, folder: Path, work: str) -> None:
        """Without room for it there is a typed error, and nothing that could be taken for a copy."""
        backup_store(store, folder / "backup")
        source, target = (store if work == "backup_store" else folder / "backup"), folder / "target"

        assert finish(script(FULL, work, source, target)) == (0, "no room\n")
        if work == "backup_store":
            assert not target.exists()
            assert not (folder / "target.unfinished").exists()
        else:
            assert {entry.name for entry in target.iterdir()} <= {"server.lock"}
            restore_store(source, target)
            assert history(target) == history(store)


class TestCommands:
    def test_backup_and_restore(self, folder: Path) -> None:
        """A server that runs is backed up, and another directory restored from it, by commands."""
        with started("serve", "--data", "data", "--listen", "127.0.0.1:0", cwd=folder) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            with Replica(folder / "a", server=address) as replica:
                replica.create("Task", {"n": 1}, "t1")
                replica.synchronize_all()

            assert succeed("backup", "--data", "data", "copy", cwd=folder) == "backed up data to copy\n"
            message = fail("backup", "--data", "data", "copy", cwd=folder, code=5)
            assert message.endswith("copy is there already: choose another name")
            assert "a server has" in fail("restore", "copy", "--data", "data", "--move-aside", cwd=folder, code=5)
            server.terminate()
            server.wait(RUN_TIMEOUT_SECONDS)

        about = json.loads((folder / "copy" / "BACKUP").read_text())
        assert "is not empty" in fail("restore", "copy", "--data", "data", cwd=folder, code=5)
        printed = succeed("restore", "copy", "--data", "data", "--move-aside", cwd=folder).splitlines()
        assert printed[0].startswith("moved data to ")
        assert printed[1:3] == ["restored copy to data", f"epoch {about['epoch']}"]
        assert printed[3].endswith(f", before it {about['timeline']}")
        assert printed[4:] == ["TENANT   VERSION", "default  1"]
        [restored] = read_json(succeed("restore", "copy", "--data", "other", "--json", cwd=folder))
        assert restored["versions"] == {"default": 1}
        assert (restored["former_timeline"], restored["moved_to"]) == (about["timeline"], None)
        message = fail("serve", "--data", "copy", "--listen", "127.0.0.1:0", cwd=folder, code=5)
        assert message == "copy is a backup: a server gets its data from it by `tidelog restore`"

    def test_a_directory_that_was_put_back(self, folder: Path) -> None:
        """After a copy of the directory was put back, `new-timeline` makes replicas offer again what it lacks."""
        with serving(cwd=folder, data="data") as address, Replica(folder / "a", server=address) as replica:
            replica.create("Task", {"n": 1}, "t1")
            replica.synchronize_all()
        shutil.copytree(folder / "data", folder / "copy")
        with serving(cwd=folder, data="data") as address:
            in_use = fail("new-timeline", "--data", "data", cwd=folder, code=5)
            with Replica(folder / "a", server=address) as replica:
                replica.create("Task", {"n": 2}, "t2")
                replica.synchronize_all()

        printed = succeed("new-timeline", "--data", "copy", cwd=folder).splitlines()
        [again] = read_json(succeed("new-timeline", "--data", "copy", "--json", cwd=folder))

        assert "a server has" in in_use or "another server has" in in_use
        assert printed[0] == "began a timeline in copy"
        assert printed[1] == f"epoch {again['epoch']}"
        assert printed[2].split()[1] == f"{again['former_timeline']},"
        assert printed[3:] == ["TENANT   VERSION", "default  1"]
        assert again["versions"] == {"default": 1}
        with serving(cwd=folder, data="copy") as address, Replica(folder / "a", server=address) as replica:
            report = replica.synchronize_all()
        assert (report.server_restored, report.reoffered) == (True, 1)

    def test_a_timeline_begins_in_a_store_only(self, store: Path, folder: Path) -> None:
        """Where there is no store `new-timeline` makes none, and a backup has to be restored."""
        backup_store(store, folder / "backup")

        fail("new-timeline", "--data", "nowhere", cwd=folder, code=5)
        assert not (folder / "nowhere").exists()
        assert "is a backup" in fail("new-timeline", "--data", "backup", cwd=folder, code=5)

    def test_a_damaged_backup(self, store: Path, folder: Path) -> None:
        """A backup in which something is wrong is refused, with a line for each thing."""
        backup_store(store, folder / "backup")
        flip(folder / "backup" / "data.mdb", b"x" * 1_000)

        result = run("restore", "backup", "--data", "restored", cwd=folder)

        assert (result.returncode, result.stdout) == (5, "")
        of_the_file, of_the_object, last = result.stderr.splitlines()
        assert of_the_file.startswith(f"{folder / 'backup' / 'data.mdb'}: expected SHA-256 ")
        assert of_the_object.startswith("tenant 'default': Task 't")
        assert last.endswith("wrong in the backup " + str(folder / "backup") + ": nothing was restored")
        assert not (folder / "restored").exists()

    def test_verify(self, store: Path, folder: Path) -> None:
        """What was looked at is counted; what is wrong is named, a line for each, with exit code 5."""
        sound = succeed("verify", "--data", store, cwd=folder)
        counts = "tenants 1, changes 300, objects 300, index entries 5, replicas 1, outcomes 299, contents 1"
        assert sound == f"checked: {counts}\n"
        [summary] = read_json(succeed("verify", "--data", store, "--json", cwd=folder))
        assert summary["findings"] == 0
        assert summary["checked"]["objects"] == 300

        # A copy, because no page of it is out of use.
        backup_store(store, folder / "copy")
        flip(folder / "copy" / "data.mdb", b"x" * 1_000)
        result = run("verify", "--data", "copy", "--json", cwd=folder)
        *findings, summary = read_json(result.stdout)
        assert (result.returncode, result.stderr) == (5, "error: copy: 2 findings\n")
        assert summary["findings"] == len(findings) == 2
        assert findings[1].keys() == {"kind", "where", "expected", "found", "tenant"}
        assert [(one["kind"], one["tenant"]) for one in findings] == [
            ("file_damaged", ""),
            ("state_differs", "default"),
        ]
        result = run("verify", "--data", "copy", cwd=folder)
        assert result.stdout.splitlines()[0].split() == ["FINDING", "TENANT", "WHERE", "EXPECTED", "FOUND"]

    def test_verify_a_replica(self, folder: Path) -> None:
        """A replica is verified, and an operation that cannot be read is set aside."""
        with Replica(folder / "a") as replica:
            for number in range(3):
                replica.create("Task", {"text": "y" * 500, "n": number}, f"t{number}")
        assert succeed("verify", "--replica", "a", cwd=folder) == "checked: operations 3, pending 3, objects 3\n"

        with Replica(folder / "a") as replica:
            log = replica._storage.log

            def spoil(transaction: object) -> None:
                key = (2).to_bytes(8, "big")
                transaction.put(key, b"0000spoiled", db=log._database)  # type: ignore[attr-defined]

            replica._storage.environment.write(spoil)
        result = run("verify", "--replica", "a", "--json", cwd=folder)
        assert (result.returncode, read_json(result.stdout)[0]["kind"]) == (5, "log_damaged")

        [aside, summary] = read_json(succeed("verify", "--replica", "a", "--set-aside", "--json", cwd=folder))
        assert aside == {"set_aside": 2, "file": str(folder / "a" / "set-aside" / "operation-2")}
        assert summary["findings"] == 0
        assert Path(aside["file"]).read_bytes() == b"spoiled"
        assert succeed("verify", "--replica", "a", "--set-aside", cwd=folder).startswith("checked: operations 2")

    @pytest.mark.parametrize("size", [0, 100, 8_192, 20_000, 100_000])
    def test_a_file_that_was_cut_off(self, store: Path, folder: Path, size: int) -> None:
        """A file that lacks its end is found damaged, whatever that does to the process that reads it."""
        with (store / "data.mdb").open("r+b") as file:
            file.truncate(size)

        result = run("verify", "--data", store, "--json", cwd=folder)

        assert result.returncode == 5
        assert result.stderr.startswith("error: ")
        if size >= 20_000:
            assert "file_damaged" in {one.get("kind") for one in read_json(result.stdout)}

    def test_wrong_usage(self, store: Path, folder: Path) -> None:
        """What can be verified is one directory, which is there and holds what was said."""
        assert "give one of them" in fail("verify", cwd=folder, code=2)
        assert "give one of them" in fail("verify", "--data", store, "--replica", store, cwd=folder, code=2)
        assert "only operations of a replica" in fail("verify", "--data", store, "--set-aside", cwd=folder, code=2)
        assert "there is nothing of tidelog in" in fail("verify", "--data", "nowhere", cwd=folder, code=5)
        assert "reads tidelog-replica-1" in fail("verify", "--replica", store, cwd=folder, code=5)


def flip(file: Path, text: bytes) -> None:
    """Change one byte of the first place in a file where a text stands."""
    data = bytearray(file.read_bytes())
    place = data.index(text)
    data[place + len(text) // 2] ^= 1
    file.write_bytes(bytes(data))
