"""
The disks of a simulated world: every commit passes here, and may fail, or be the last one.

What fails does so inside the product's own transaction, with the errors that LMDB has:
they are turned into typed ones, and the map is enlarged, by the code that is tested.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from unittest import mock

import lmdb
from tests.simulation.faults import Commit, Coverage, CrashPoint, Fault, Moment

from tidelog import DiskFull, StorageError, _contents
from tidelog._contents import Content, ContentDirectory, Part, _files
from tidelog._environment import Environment, LmdbTransaction

T = TypeVar("T")

Work = Callable[[LmdbTransaction], T]

FULL: Final = frozenset((Fault.CLIENT_DISK_FULL, Fault.SERVER_DISK_FULL))
MAP_FULL: Final = frozenset((Fault.CLIENT_MAP_FULL, Fault.SERVER_MAP_FULL))
FAILED: Final = frozenset((Fault.CLIENT_WRITE_FAILED, Fault.SERVER_WRITE_FAILED))


@dataclass(frozen=True)
class Trap:
    """
    What is to happen at a commit.

    Attributes:
        fault: A crash, or a failure of the disk.
        passed: How many of the commits meant go well before.
        commit: Which commits are meant. None: any.
        moment: When a process dies.
    """

    fault: Fault
    passed: int = 0
    commit: Commit | None = None
    moment: Moment = Moment.BEFORE


class FilePoints(NamedTuple):
    """What is written to contents, which are files of their own, by one of the two sides."""

    part: Commit
    content: Commit
    deleted: Commit


CLIENT_FILES: Final = FilePoints(Commit.PART, Commit.CONTENT, Commit.CONTENT_DELETED)
SERVER_FILES: Final = FilePoints(Commit.SERVER_PART, Commit.SERVER_CONTENT, Commit.SERVER_CONTENT_DELETED)


class Disk:
    """
    The disk of one process.

    Attributes:
        trap: What happens at its next commits.
        has_failed: Whether a write has failed, or was the last one, since somebody set this to False.
        is_dead: Whether the process has died at a commit.

    Args:
        death: What is raised where the process dies.
        coverage: Counts what happens.
        begin: Called before a write; what it returns names what was written, once that is known.
        on_commit: Called after each commit.
        files: What writes to contents are called.
    """

    def __init__(
        self,
        death: type[BaseException],
        coverage: Coverage,
        begin: Callable[[object], Callable[[], list[Commit]]],
        on_commit: Callable[[], None] | None = None,
        *,
        files: FilePoints = CLIENT_FILES,
    ) -> None:
        self.files = files
        self.trap: Trap | None = None
        self.has_failed = False
        self.is_dead = False
        self._death = death
        self._coverage = coverage
        self._begin = begin
        self._on_commit = on_commit

    def write(self, write: Callable[[Work[Any]], Any], work: Work[Any]) -> Any:
        """Run a write of the environment, unless something happens to it."""
        if self.is_dead:
            raise self._death  # the dead write nothing
        names = self._begin(work)
        trap: Trap | None = None
        is_first = True

        def trapped(transaction: LmdbTransaction) -> Any:
            nonlocal trap, is_first
            result = work(transaction)
            if is_first:
                is_first = False
                trap = self._met(names())
                if trap is not None:
                    self._fail(trap)
            return result

        result = write(trapped)
        if self._on_commit is not None:
            self._on_commit()
        if trap is not None and trap.fault not in MAP_FULL:
            raise self._death
        return result

    def require_life(self) -> None:
        """Raise what the process died of, if it is dead."""
        if self.is_dead:
            raise self._death

    def touch(self, commit: Commit, work: Callable[[], T], torn: Callable[[], object] | None = None) -> T:
        """
        Write to a file, unless something happens to it.

        Args:
            commit: What is written.
            work: Writes it.
            torn: Writes a part of it, as a disk does that becomes full meanwhile.
        """
        if self.is_dead:
            raise self._death
        trap = None if self.trap is not None and self.trap.fault in MAP_FULL else self._met([commit])
        if trap is None:
            return work()
        if trap.fault in FULL | FAILED:
            if torn is not None:
                torn()
            raise DiskFull("simulated") if trap.fault in FULL else StorageError("simulated: the disk is gone")
        if trap.moment is Moment.AFTER:
            work()
        elif torn is not None:
            torn()
        raise self._death

    def _met(self, commits: list[Commit]) -> Trap | None:
        """Count what is about to be committed; return what happens to it."""
        self._coverage.commits.update(one.name for one in commits)
        trap = self._sprung(commits)
        if trap is None:
            return None
        self._coverage.faults[trap.fault.name] += 1
        if trap.fault not in MAP_FULL:
            self.has_failed = True
        if trap.fault not in MAP_FULL | FULL | FAILED:
            self.is_dead = True
            for commit in commits:
                self._coverage.crashes[str(CrashPoint(commit, trap.moment))] += 1
        return trap

    def _fail(self, trap: Trap) -> None:
        """Let a transaction fail, unless its process dies behind it."""
        if trap.fault in MAP_FULL:
            raise lmdb.MapFullError("simulated")
        if trap.fault in FULL:
            raise lmdb.Error(os.strerror(errno.ENOSPC))
        if trap.fault in FAILED:
            raise lmdb.Error("simulated: the disk is gone")
        if trap.moment is Moment.BEFORE:
            raise self._death

    def _sprung(self, commits: list[Commit]) -> Trap | None:
        trap = self.trap
        if trap is None or not commits or (trap.commit is not None and trap.commit not in commits):
            return None
        self.trap = replace(trap, passed=trap.passed - 1) if trap.passed else None
        return None if trap.passed else trap


@contextmanager
def inserted(disks: dict[Path, Disk], time: Callable[[], float]) -> Iterator[None]:
    """
    Let all writes to the directories named pass through their disks.

    Args:
        disks: By directory.
        time: The clock of the file system, in seconds since 1970.
    """
    write = Environment.write

    def passing(environment: Environment, work: Work[Any]) -> Any:
        disk = disks.get(environment.path)
        return write(environment, work) if disk is None else disk.write(lambda work: write(environment, work), work)

    with mock.patch.object(Environment, "write", passing), _inserted_contents(disks, time):
        yield


@contextmanager
def _inserted_contents(disks: dict[Path, Disk], time: Callable[[], float]) -> Iterator[None]:
    append, complete, discard = Part.append, Part.complete, Part.discard
    renew, delete, move_out = ContentDirectory.renew, ContentDirectory.delete, ContentDirectory.move_out

    def disk_of(path: Path) -> Disk:
        return next(disks[directory] for directory in path.parents if directory in disks)

    def appending(part: Part, data: bytes) -> None:
        def write(count: int) -> None:
            append(part, data[:count])
            os.utime(part.path, (time(), time()))

        disk = disk_of(part.path)
        if not data and not disk.is_dead:
            write(0)
        else:
            disk.touch(disk.files.part, lambda: write(len(data)), lambda: write(len(data) // 2))

    def completing(
        part: Part, sha256: bytes | None = None, size: int | None = None, copy: str = "", **how: Any
    ) -> Content:
        disk = disk_of(part.path)
        return disk.touch(disk.files.content, lambda: complete(part, sha256, size, copy, **how))

    def discarding(part: Part) -> None:
        part.close()  # which a process does that dies, too
        disk_of(part.path).require_life()
        discard(part)

    def renewing(contents: ContentDirectory, sha256: bytes, at: float | None = None) -> bool:
        return renew(contents, sha256, time() if at is None else at)

    def deleting(contents: ContentDirectory, sha256: bytes, copy: str = "") -> None:
        disk = disk_of(contents.path)
        disk.touch(disk.files.deleted, lambda: delete(contents, sha256, copy))

    def moving_out(contents: ContentDirectory, sha256: bytes, target: Path) -> None:
        disk_of(contents.path).require_life()
        move_out(contents, sha256, target)

    with (
        mock.patch.multiple(Part, append=appending, complete=completing, discard=discarding),
        mock.patch.multiple(ContentDirectory, renew=renewing, delete=deleting, move_out=moving_out),
        mock.patch.object(_contents, "_files", lambda path, *, depth: sorted(_files(path, depth=depth))),
    ):
        yield


def abandon(path: Path) -> None:
    """Close what a process that died while it opened a directory has left open."""
    shared = Environment._open_paths.pop(os.path.realpath(path), None)
    if shared is not None:
        shared.opened.close()
