"""Content reader: a content as an open file, which can be read and sought in."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, BinaryIO

from tidelog._limits import FILE_CHUNK_BYTES
from tidelog_server._content_store import ContentLost

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Pieces = Generator[bytes, None, None]


def open_content(read: Callable[[int], Pieces], size: int) -> BinaryIO:
    """
    Return a content as an open file.

    Args:
        read: Returns the content from an offset on, in pieces.
        size: Its length in bytes. Reading raises ContentLost where it ends before that.
    """
    return io.BufferedReader(_ContentReader(read, size), FILE_CHUNK_BYTES)


class _ContentReader(io.RawIOBase):
    def __init__(self, read: Callable[[int], Pieces], size: int) -> None:
        super().__init__()
        self._read = read
        self._size = size
        self._position = 0
        self._pieces: Pieces | None = None
        # What has come of the present piece and was not asked for yet.
        self._rest = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._position >= self._size:
            return 0
        if not self._rest:
            if self._pieces is None:
                self._pieces = self._read(self._position)
            self._rest = next(self._pieces, b"")
            if not self._rest:
                raise ContentLost(f"the content ended after {self._position} of {self._size} bytes")
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"a negative position: {base + offset}")
        if base + offset != self._position:
            self._let_go()
            self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        if self._pieces is not None:
            self._pieces.close()
        self._pieces, self._rest = None, b""
