"""
Contents: a directory of the contents of files, each once, named by its SHA-256.

    ab/cd/abcd...        a content that is whole, verified and on disk
    ab/cd/abcd...-copy   another copy of one, where there are such
    incoming/<name>      a part of one that is on its way

A content never changes, and appears by a rename: whoever sees it sees all of it. What
a crash leaves is a part under `incoming`, or a content that nobody refers to; both
are found by `leftovers` and `contents`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeAlias
from uuid import uuid4

from tidelog._errors import DiskFull, StorageError

SHA256_BYTES: Final = 32
READ_BYTES: Final = 1024 * 1024

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME: Final = re.compile(r"([0-9a-f]{64})(?:-([0-9a-z]+))?")
_INCOMING: Final = "incoming"


Alone: TypeAlias = Callable[[Callable[[], None]], None]


def _at_once(work: Callable[[], None]) -> None:
    work()


class Content(NamedTuple):
    """
    A content that is there.

    Attributes:
        sha256: Its SHA-256: 32 bytes.
        size: Its length in bytes.
        time: When it was last put there, in seconds since 1970, by the file system's clock.
        copy: Which copy of it: a few letters and digits. Empty: the one without a name.
    """

    sha256: bytes
    size: int
    time: float
    copy: str = ""


class ContentCorrupt(Exception):
    """What came is not the content that it was said to be. Nothing of it is kept."""


class ContentDirectory:
    """
    Contents in a directory, which is made when it is needed. Safe to use from many threads and processes.

    Methods raise DiskFull, if there is no room, and StorageError, if the directory cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self, name: str) -> bytes | None:
        """Return what a file beside the contents says, without the space around it, or None if it is not there."""
        with _storage_errors(self.path):
            try:
                return (self.path / name).read_bytes().strip()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def set_mark(self, name: str, mark: bytes) -> None:
        """Write a file beside the contents. Returns once it is on disk."""
        with _storage_errors(self.path):
            _make_durably(self.path)
            written = self.path / f"{name}.{uuid4().hex}"
            with written.open("wb") as file:
                file.write(mark)
                file.flush()
                os.fsync(file.fileno())
            written.replace(self.path / name)
            _sync_directory(self.path)

    def size(self, sha256: bytes, copy: str = "") -> int | None:
        """Return the length of a content, or None if it is not there."""
        with _storage_errors(self.path):
            try:
                return self._path(sha256, copy).stat().st_size
            except FileNotFoundError:
                return None

    def open(self, sha256: bytes, copy: str = "") -> BinaryIO | None:
        """Open a content to be read, or return None if it is not there. It may be deleted meanwhile."""
        with _storage_errors(self.path):
            try:
                return self._path(sha256, copy).open("rb")
            except FileNotFoundError:
                return None

    def add(self, source: BinaryIO) -> Content:
        """Store what a stream holds, from where it stands to its end. Returns once it is on disk."""
        part = self.part(uuid4().hex)
        try:
            while chunk := source.read(READ_BYTES):
                part.append(chunk)
            return part.complete()
        except BaseException:
            part.discard()
            raise

    def part(self, name: str) -> Part:
        """Return a part of a content that comes in pieces; *name* is that of a file."""
        return Part(self.path / _INCOMING / name, self._adopt)

    def find(self, sha256: bytes) -> Content | None:
        """Return what is known of a content, or None if it is not there."""
        with _storage_errors(self.path):
            try:
                found = self._path(sha256).stat()
            except FileNotFoundError:
                return None
        return Content(sha256, found.st_size, found.st_mtime)

    def renew(self, sha256: bytes, at: float | None = None) -> bool:
        """Make a content as young as if it had just come, or had come at another time; tell whether it is there."""
        with _storage_errors(self.path):
            try:
                os.utime(self._path(sha256), None if at is None else (at, at))
            except FileNotFoundError:
                return False
        return True

    def move_out(self, sha256: bytes, target: Path) -> None:
        """Move a content to a file outside, in a directory that is made if need be; nothing if it is not there."""
        with _storage_errors(self.path), suppress(FileNotFoundError):
            if self.size(sha256) is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(self._path(sha256), target)  # to another file system, perhaps
                self._remove_folders(sha256)

    def delete(self, sha256: bytes, copy: str = "") -> None:
        """Delete a content, if it is there. Who has it open can read on."""
        with _storage_errors(self.path):
            self._path(sha256, copy).unlink(missing_ok=True)
            self._remove_folders(sha256)

    def contents(self) -> Iterator[Content]:
        """Iterate over the contents, in no order. What comes or goes meanwhile may be missed."""
        with _storage_errors(self.path):
            yield from _contents(_files(self.path, depth=2))

    def copies(self, sha256: bytes) -> list[Content]:
        """Return the copies of a content that are there."""
        with _storage_errors(self.path):
            found = _contents(_files(self._path(sha256).parent, depth=0))
            return [one for one in found if one.sha256 == sha256]

    def delete_leftovers(self, older_than_seconds: float, now: float | None = None) -> int:
        """Delete parts that nothing was appended to for so long, *now* or by the machine's clock; return how many."""
        before = (time.time() if now is None else now) - older_than_seconds
        count = 0
        with _storage_errors(self.path):
            for entry in _files(self.path / _INCOMING, depth=0):
                with suppress(FileNotFoundError):
                    if entry.stat().st_mtime < before:
                        entry.unlink()
                        count += 1
        return count

    def _path(self, sha256: bytes, copy: str = "") -> Path:
        return self.path / content_path(sha256, copy)

    def _adopt(self, path: Path, content: Content, alone: Alone, at: float | None) -> None:
        """Move a file that is on disk to its place, instead of what is there: it may be damaged."""
        target = self._path(content.sha256, content.copy)
        _make_durably(target.parent)

        def place() -> None:
            os.utime(path, None if at is None or target.exists() else (at, at))
            _replace(path, target)

        alone(place)
        with suppress(FileNotFoundError):  # deleted already
            _sync_directory(target.parent)

    def _remove_folders(self, sha256: bytes) -> None:
        """Remove the folders of a content that is gone, if nothing else is in them."""
        folder = self._path(sha256).parent
        with suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()


class Part:
    """
    A content on its way, which may go on after a crash. One may append at a time.

    Attributes:
        path: Its file.
    """

    def __init__(self, path: Path, adopt: Callable[[Path, Content, Alone, float | None], None]) -> None:
        self.path = path
        self._adopt = adopt
        self._file: BinaryIO | None = None

    @property
    def size(self) -> int:
        """How many bytes have come."""
        if self._file is not None:
            return self._file.tell()
        with _storage_errors(self.path):
            try:
                return self.path.stat().st_size
            except FileNotFoundError:
                return 0

    def append(self, data: bytes) -> None:
        """Append bytes."""
        with _storage_errors(self.path):
            if self._file is None:
                _make_durably(self.path.parent)
                self._file = self.path.open("ab", buffering=0)
            view = memoryview(data)
            while view:  # a write of a file may take less than all
                view = view[self._file.write(view) or 0 :]

    def close(self) -> None:
        """Stop for now; what has come stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def complete(
        self,
        sha256: bytes | None = None,
        size: int | None = None,
        copy: str = "",
        *,
        alone: Alone = _at_once,
        at: float | None = None,
    ) -> Content:
        """
        Make what has come a content. Returns once it is on disk.

        Args:
            sha256: What its hash must be. None: whatever it is.
            size: What its length must be. None: whatever it is.
            copy: Which copy of the content it becomes.
            alone: Puts it in its place, by calling what it is given: what takes long is done by then.
            at: The time that it gets if it was not there. None, or if it was: now.

        Raises:
            ContentCorrupt: It is something else. The part is deleted.
        """
        self.append(b"")  # an empty content has a file too
        self.close()
        with _storage_errors(self.path):
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                os.fsync(file.fileno())
                found = os.fstat(file.fileno())
            if (size is not None and found.st_size != size) or (sha256 is not None and digest != sha256):
                self.discard()
                raise ContentCorrupt(f"{found.st_size} bytes with the SHA-256 {digest.hex()}")
            content = Content(digest, found.st_size, found.st_mtime, copy)
            self._adopt(self.path, content, alone, at)
        return content

    def discard(self) -> None:
        """Delete what has come."""
        self.close()
        with _storage_errors(self.path):
            self.path.unlink(missing_ok=True)


def content_path(sha256: bytes, copy: str = "") -> Path:
    """Return where a content lies in its directory."""
    name = sha256.hex()
    return Path(name[:2], name[2:4], f"{name}-{copy}" if copy else name)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"no room left on the disk of {path}: make room and repeat") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


def _contents(entries: Iterable[Path]) -> Iterator[Content]:
    for entry in entries:
        if match := _NAME.fullmatch(entry.name):
            with suppress(FileNotFoundError):
                found = entry.stat()
                yield Content(bytes.fromhex(match[1]), found.st_size, found.st_mtime, match[2] or "")


def _files(path: Path, *, depth: int) -> Iterator[Path]:
    # Not `scandir`: an interrupt may leave it open.
    try:
        names = os.listdir(path)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if depth and name != _INCOMING:
            yield from _files(path / name, depth=depth - 1)
        elif not depth and (path / name).is_file():
            yield path / name


def _replace(path: Path, target: Path) -> None:
    """Move a file. Who deleted the last content of the folder that it goes to may have removed that just now."""
    while True:
        try:
            path.replace(target)
        except FileNotFoundError:
            if not path.exists():
                raise
            with suppress(FileNotFoundError):
                _make_durably(target.parent)
        else:
            return


def _make_durably(path: Path) -> None:
    """Make a directory, and those above it that are missing, so that they outlast a loss of power."""
    if not path.exists():
        _make_durably(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
