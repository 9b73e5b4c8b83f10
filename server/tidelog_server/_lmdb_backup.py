"""
Backups of an embedded store, and stores from backups.

A backup is a directory with a copy of the data as of one moment, marked so that no
server takes it for its own: its history may have gone on elsewhere, and a server that
goes on from it has to begin a new timeline, which `restore_store` does.

What is made here lies under another name, or beside the name that counts, until it is
on disk and checked. Whatever ends it before, nothing half made can be mistaken for it.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from filelock import FileLock, Timeout

from tidelog._environment import DATA_FILE, FORMAT_FILE, Environment, typed_errors
from tidelog._errors import StorageError, StoreInUse, TargetExists
from tidelog._finding import Finding
from tidelog._keys import POSITION_BYTES, unpack_position
from tidelog._logging import get_logger
from tidelog_server._backup_note import BackupNote
from tidelog_server._content_backup import copy_contents, sync_to_disk
from tidelog_server._content_store import CONTENTS_DIRECTORY, CONTENTS_ELSEWHERE, CONTENTS_NOTE, DirectoryContents
from tidelog_server._errors import BackupDamaged
from tidelog_server._lmdb_store import (
    FORMAT,
    LOCK_FILE,
    TENANT_BYTES,
    UNFINISHED_RESTORE,
    Databases,
    LmdbStore,
)
from tidelog_server._lmdb_verification import verify_directory
from tidelog_server._place import MARKED_NOTE
from tidelog_server._records import Identity

if TYPE_CHECKING:
    from tidelog._environment import LmdbDatabase, LmdbTransaction

FINDINGS_NAMED_MAX: Final = 20

_MAKING: Final = "making.lock"

_log = get_logger("tidelog.backup")


@dataclass(frozen=True, slots=True)
class Restored:
    """
    What a restore did.

    Attributes:
        epoch: Names the store: the one that the backup is of.
        former_timeline: The timeline of the backup.
        timeline: The one that has begun.
        versions: Each tenant's version.
        moved_to: Where the former directory is now; None: there was none.
    """

    epoch: str
    former_timeline: str
    timeline: str
    versions: dict[str, int]
    moved_to: Path | None


def backup_store(path: str | Path, target: str | Path) -> None:
    """
    Copy an embedded store, as of one moment, into a new directory. A server may be running on it.

    Raises:
        TargetExists: There is something of this name, or another backup makes it just now.
        FormatUnsupported: *path* holds something else.
        DiskFull: There is no room for the copy.
        StorageError: There is no store, or it cannot be copied.
    """
    target = Path(target).absolute()
    unfinished = target.with_name(f"{target.name}.unfinished")
    _check_absent(target)
    with (
        closing(Environment.open_read_only(Path(path), format_name=FORMAT)) as environment,
        typed_errors(target),
        _taken(unfinished),
    ):
        environment.copy_to(unfinished)
        identity, versions = _checked_copy(unfinished)
        content_count = copy_contents(Path(path), unfinished)
        BackupNote.of(unfinished, identity, versions).write(unfinished)
        _sync_files(unfinished)
        _check_absent(target)
        unfinished.rename(target)
        sync_to_disk(target.parent)
        (target / _MAKING).unlink()
    _log.info(
        "backed up",
        target=str(target),
        epoch=identity.epoch,
        tenant_count=len(versions),
        content_count=content_count,
    )


def restore_store(
    backup: str | Path, path: str | Path, *, move_aside: bool = False, accept_findings: bool = False
) -> Restored:
    """
    Make a server's directory from a backup, and begin a new timeline in it.

    Args:
        backup: The backup. It stays as it is.
        path: The directory; made if it is not there, else it has to be empty.
        move_aside: Give what is there another name before, beside its own.
        accept_findings: Go on although something is wrong in the backup.

    Raises:
        TargetExists: *path* is not empty. Nothing was changed.
        StoreInUse: A server has it open. Nothing was changed.
        BackupDamaged: Something is wrong in the backup. Nothing was changed.
        FormatUnsupported: *backup* is something else.
        DiskFull: There is no room for the copy.
        StorageError: There is no backup, or it cannot be copied.
    """
    backup, path = Path(backup).resolve(), Path(path).absolute()
    if backup.is_relative_to(path.resolve()):
        raise TargetExists(f"{path} holds the backup {backup}: restore to another directory")
    _check_backup(backup, accept_findings=accept_findings)
    with typed_errors(path):
        moved_to = _make_room(path, move_aside=move_aside)
        path.mkdir(parents=True, exist_ok=True)
        unfinished = path / UNFINISHED_RESTORE
        with _no_server(path), _taken(unfinished):
            if not _is_free(path):
                raise TargetExists(f"{path} is not empty any more")
            with closing(Environment.open_read_only(backup, format_name=FORMAT)) as environment:
                environment.copy_to(unfinished)
            identity, versions = _checked_copy(unfinished)
            with closing(LmdbStore(unfinished)) as store:
                timeline = store.begin_timeline().timeline
                if store.note(MARKED_NOTE) and store.note(CONTENTS_NOTE) != CONTENTS_ELSEWHERE:
                    DirectoryContents(unfinished / CONTENTS_DIRECTORY).set_mark(identity.epoch.encode())
            copy_contents(backup, unfinished, share=False)
            _sync_files(unfinished)
            _move_contents(unfinished, path)
            # Data without the mark of their format are no store: it is one from the last step on.
            for name in (DATA_FILE, FORMAT_FILE):
                (unfinished / name).replace(path / name)
                sync_to_disk(path)
            shutil.rmtree(unfinished)
    _log.info("restored", path=str(path), epoch=identity.epoch, timeline=timeline)
    return Restored(identity.epoch, identity.timeline, timeline, versions, moved_to)


def _move_contents(unfinished: Path, path: Path) -> None:
    """Move contents into a directory, in place of those that a restore left there which was broken off."""
    made, place = unfinished / CONTENTS_DIRECTORY, path / CONTENTS_DIRECTORY
    if place.exists():
        shutil.rmtree(place)
    if made.exists():
        made.replace(place)
        sync_to_disk(path)


def _check_backup(backup: Path, *, accept_findings: bool) -> None:
    BackupNote.read(backup)  # raises if it is none
    count = 0
    named: list[Finding] = []
    for finding in verify_directory(backup, counts=Counter(), contents=None):
        count += 1
        if len(named) < FINDINGS_NAMED_MAX:
            named.append(finding)
    if count and not accept_findings:
        raise BackupDamaged(f"{count} things are wrong in the backup {backup}: nothing was restored", named)


def _make_room(path: Path, *, move_aside: bool) -> Path | None:
    """Give what is in the place of a restored store another name, if that is wanted; return the name."""
    if not path.exists() or _is_free(path):
        return None
    # A directory that no server ever had open has no lock, and gets none.
    with _no_server(path) if (path / LOCK_FILE).exists() else nullcontext():
        if not move_aside:
            raise TargetExists(f"{path} is not empty: restore to another directory, or have this one moved aside")
        moved_to = path.with_name(f"{path.name}.{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
        _check_absent(moved_to)
        path.rename(moved_to)
        sync_to_disk(path.parent)
    return moved_to


def _is_free(path: Path) -> bool:
    """Tell whether there is nothing in a directory but what a restore left that was broken off."""
    names = {entry.name for entry in path.iterdir()}
    if UNFINISHED_RESTORE in names:
        # It ended before its last step, the mark of the format: what data there are, are its own.
        names -= {UNFINISHED_RESTORE, DATA_FILE, CONTENTS_DIRECTORY}
    return names <= {LOCK_FILE}


def _check_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise TargetExists(f"{path} is there already: choose another name")


@contextmanager
def _no_server(path: Path) -> Iterator[None]:
    """Keep servers out of a directory."""
    lock = FileLock(path / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StoreInUse(f"a server has {path} open: stop it first") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _taken(directory: Path) -> Iterator[None]:
    """Make a directory to work in, empty; what an attempt that was killed has left there goes. It goes on errors."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / _MAKING, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TargetExists(f"{directory} is being made by another process") from None
    try:
        for entry in directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _MAKING:
                entry.unlink()
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        lock.release()


def _checked_copy(directory: Path) -> tuple[Identity, dict[str, int]]:
    """
    Mark a copy with its format and read all of it once; return its identity and its tenants' versions.

    Raises:
        StorageError: It is not what it should be.
    """
    (directory / FORMAT_FILE).write_text(FORMAT + "\n")
    versions = {}
    with closing(Environment.open_read_only(directory, format_name=FORMAT)) as environment:
        databases = Databases(environment)
        with environment.read() as transaction:
            for name, database in databases.all.items():
                count = sum(1 for _ in transaction.cursor(database))
                if count != transaction.stat(database)["entries"]:
                    raise StorageError(f"the table {name} of the copy has not all of its entries")
            if _counts(transaction, databases.objects) != _counts(transaction, databases.by_version):
                raise StorageError("the objects of the copy and their list by version differ")
            for tenant, number in transaction.cursor(databases.tenants):
                head = transaction.get(number, bytes(POSITION_BYTES), db=databases.heads)
                versions[tenant.decode()] = unpack_position(head[:POSITION_BYTES])
            epoch, timeline = (
                transaction.get(name, b"", db=databases.meta).decode() for name in (b"epoch", b"timeline")
            )
    return Identity(epoch, timeline), versions


def _counts(transaction: LmdbTransaction, database: LmdbDatabase) -> Counter[bytes]:
    """Return how many entries of a table each tenant has."""
    return Counter(key[:TENANT_BYTES] for key in transaction.cursor(database).iternext(keys=True, values=False))


def _sync_files(directory: Path) -> None:
    for entry in directory.iterdir():
        sync_to_disk(entry)
    sync_to_disk(directory)
