"""
Content store: what the server needs of a place that keeps the contents of files.

Every implementation passes one contract test. Like a store it decides nothing: who may
have a content, and which are still needed, is told by the records in the store. It
keeps bytes, per tenant, each content under its SHA-256, and the parts of those that are
on their way.

It may have several copies of a content, each under a name of its own: whoever deletes one
need not know of whoever makes another one meanwhile. See `_upload_records`.

Threads call it, many at once, and may be kept waiting. Nobody appends to one part, or
completes it, from two threads at once: its caller takes care of that. A content never
changes, and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final, Protocol

from tidelog._contents import Content, ContentDirectory
from tidelog._errors import TidelogError
from tidelog._limits import FILE_CHUNK_BYTES

# Where contents lie in the directory of an embedded store.
CONTENTS_DIRECTORY: Final = "files"
# What a server notes in its store about where they lie: elsewhere, or nothing.
CONTENTS_NOTE: Final = "contents"
CONTENTS_ELSEWHERE: Final = b"elsewhere"
# What the mark of a place is called there; see `_place`.
MARK_NAME: Final = "tidelog-contents"

_TENANT_DIGEST_CHARS: Final = 32


class ContentLost(TidelogError):
    """A content is not there."""


class PartMismatch(TidelogError):
    """
    What was to be appended does not begin where the part ends. Nothing was appended.

    Attributes:
        size: Where it ends.
    """

    def __init__(self, message: str, *, size: int) -> None:
        super().__init__(message)
        self.size = size


class ContentStore(Protocol):
    """
    Keeps the contents of all tenants.

    Methods raise DiskFull, if there is no room, and StorageError, if the store cannot be used at the moment.
    """

    def mark(self) -> bytes | None:
        """Return the mark of the place, or None: it has none, or there is no such place."""
        ...

    def set_mark(self, mark: bytes) -> None:
        """Mark the place, durably."""
        ...

    def size(self, tenant: str, sha256: bytes, copy: str = "") -> int | None:
        """Return the length of a content in bytes, or None if it is not there."""
        ...

    def read(self, tenant: str, sha256: bytes, offset: int = 0, copy: str = "") -> Generator[bytes, None, None]:
        """
        Iterate over a content from *offset* on, in pieces of at most `FILE_CHUNK_BYTES`, none of them empty.

        Whether it is there is found out by the first step. Whoever does not read to the end closes what is returned.

        Raises:
            ContentLost: It is not there, or ended being there.
        """
        ...

    def part_size(self, tenant: str, part: str) -> int:
        """Return how many bytes of a part are kept: where its upload goes on. 0: none."""
        ...

    def append(self, tenant: str, part: str, offset: int, data: bytes) -> None:
        """
        Append bytes to a part; the first ones make it. What comes may be kept a little later, see `pause`.

        Args:
            tenant: Whose part it is.
            part: Its name: a few letters and digits.
            offset: How many bytes came before.
            data: At most `FILE_CHUNK_BYTES`.

        Raises:
            PartMismatch: The part has not so many bytes.
        """
        ...

    def pause(self, tenant: str, part: str) -> None:
        """
        Let go of a part that nobody appends to for now.

        What came stays as far as it can: it may be less, and `part_size` tells how much it is.
        """
        ...

    def complete(self, tenant: str, part: str, sha256: bytes, size: int, copy: str = "") -> None:
        """
        Make a part a content, which is then durable. The part is gone in any case, unless the store fails.

        A copy that is there already is replaced, and as young as a new one from then on.

        Raises:
            ContentCorrupt: The part has another length or another hash. Nothing of it is kept.
        """
        ...

    def discard(self, tenant: str, part: str) -> None:
        """Delete a part, if it is there."""
        ...

    def delete(self, tenant: str, sha256: bytes, copy: str = "") -> None:
        """Delete a content, if it is there."""
        ...

    def contents(self, tenant: str) -> Iterator[Content]:
        """Iterate over a tenant's contents, all copies, in no order. What comes or goes meanwhile may be missed."""
        ...

    def copies(self, tenant: str, sha256: bytes) -> list[Content]:
        """Return the copies of a content that are there."""
        ...

    def delete_leftovers(self, tenant: str, older_than_seconds: float) -> int:
        """Delete parts of a tenant that nothing was appended to for so long; return how many."""
        ...


class DirectoryContents:
    """
    Contents in a directory, with one of its own for each tenant.

    Args:
        path: The directory. It is made when it is needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def mark(self) -> bytes | None:
        """Return what the file of the mark says, if it is there."""
        return ContentDirectory(self.path).mark(MARK_NAME)

    def set_mark(self, mark: bytes) -> None:
        """Write the file of the mark."""
        ContentDirectory(self.path).set_mark(MARK_NAME, mark)

    def size(self, tenant: str, sha256: bytes, copy: str = "") -> int | None:
        """Return the length of a content in bytes, or None if it is not there."""
        return self._directory(tenant).size(sha256, copy)

    def read(self, tenant: str, sha256: bytes, offset: int = 0, copy: str = "") -> Generator[bytes, None, None]:
        """Iterate over a content from *offset* on. Raises ContentLost."""
        file = self._directory(tenant).open(sha256, copy)
        if file is None:
            raise ContentLost(f"the content {sha256.hex()} is not there")
        with file:
            file.seek(offset)
            while piece := file.read(FILE_CHUNK_BYTES):
                yield piece

    def part_size(self, tenant: str, part: str) -> int:
        """Return how many bytes of a part are kept."""
        return self._directory(tenant).part(part).size

    def append(self, tenant: str, part: str, offset: int, data: bytes) -> None:
        """Append bytes to a part. Raises PartMismatch."""
        found = self._directory(tenant).part(part)
        if (size := found.size) != offset:
            raise PartMismatch(f"bytes from {offset} on came where {size} are there", size=size)
        try:
            found.append(data)
        finally:
            found.close()

    def pause(self, tenant: str, part: str) -> None:
        """Let go of a part. All that came is kept."""

    def complete(self, tenant: str, part: str, sha256: bytes, size: int, copy: str = "") -> None:
        """Make a part a content. Raises ContentCorrupt."""
        self._directory(tenant).part(part).complete(sha256, size, copy)

    def discard(self, tenant: str, part: str) -> None:
        """Delete a part, if it is there."""
        self._directory(tenant).part(part).discard()

    def delete(self, tenant: str, sha256: bytes, copy: str = "") -> None:
        """Delete a content, if it is there. Who reads it can read on."""
        self._directory(tenant).delete(sha256, copy)

    def contents(self, tenant: str) -> Iterator[Content]:
        """Iterate over a tenant's contents, in no order."""
        return self._directory(tenant).contents()

    def copies(self, tenant: str, sha256: bytes) -> list[Content]:
        """Return the copies of a content that are there."""
        return self._directory(tenant).copies(sha256)

    def delete_leftovers(self, tenant: str, older_than_seconds: float) -> int:
        """Delete parts of a tenant that nothing was appended to for so long; return how many."""
        return self._directory(tenant).delete_leftovers(older_than_seconds)

    def tenant_path(self, tenant: str) -> Path:
        """Return the directory of a tenant."""
        return self.path / tenant_name(tenant)

    def _directory(self, tenant: str) -> ContentDirectory:
        return ContentDirectory(self.tenant_path(tenant))


def tenant_name(tenant: str) -> str:
    """Return what stands for a tenant where a name may not hold every character."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:_TENANT_DIGEST_CHARS]
