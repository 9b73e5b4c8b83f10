"""Contents of a simulated world: what users attach, small, and some of it the same in many places."""

from __future__ import annotations

import hashlib
from random import Random
from typing import Any, Final

from tidelog._file_reference import FileReference, file_references

MEDIA_TYPE: Final = "text/plain"
ATTRIBUTES: Final = ("photo", "scan")
SIZES: Final = (0, 1, 7, 40, 90, 130, 250, 420)
COMMON_SHARE: Final = 0.5


class Library:
    """All contents that anybody in a world ever had, by SHA-256."""

    def __init__(self) -> None:
        self._contents: dict[bytes, bytes] = {}
        self._common = [self._made(Random(f"content {number}"), size) for number, size in enumerate(SIZES)]

    def draw(self, random: Random) -> bytes:
        """Return a content: one that others may have too, or another one."""
        if random.random() < COMMON_SHARE:
            return random.choice(self._common)
        return self._made(random, random.choice(SIZES))

    def content(self, sha256: bytes) -> bytes | None:
        """Return a content, or None if nobody ever had it."""
        return self._contents.get(sha256)

    def _made(self, random: Random, size: int) -> bytes:
        content = random.randbytes(size)
        self._contents[hashlib.sha256(content).digest()] = content
        return content


def reference_to(content: bytes, name: str) -> dict[str, Any]:
    """Return what an attribute says that is a file."""
    return FileReference(name, len(content), MEDIA_TYPE, hashlib.sha256(content).digest()).to_value()


def references(attributes: dict[str, Any] | None) -> dict[str, FileReference]:
    """Return the file references of an object, by attribute."""
    return dict(file_references(attributes or {}))
